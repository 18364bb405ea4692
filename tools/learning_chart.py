"""The learning guide's chart: tau while a server learns a new traffic, of results of benchmarks/learning.py.

    python tools/learning_chart.py drift_*.json [-o docs/img/learning.svg]

A result without learning (``--weights off``) whose drafter was trained on the new traffic is a level line.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_dflash.files import atomic_write

TRAFFIC = {"tau_b": "traffic that has come", "tau_a": "traffic that it was trained on"}


def draw(results: Sequence[dict[str, Any]]) -> str:
    """SVG with tau of both kinds of traffic over the requests of the new one."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "vllm-dflash"
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    for axes, (key, title) in zip(figure.subplots(1, 2), TRAFFIC.items(), strict=True):
        for result in results:
            rows, which = result["rows"], result["config"]["weights"]
            if which == "off":
                axes.axhline(
                    rows[-1][key], color="gray", linestyle="--", label="trained offline on it"
                )
                continue
            requests = [row["requests_b"] for row in rows]
            taus = [row[key] for row in rows]
            axes.plot(requests, taus, marker=".", label=f"learns while it serves ({which})")
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("requests of the new traffic")
    figure.axes[0].set_ylabel("tau")
    figure.axes[0].legend(fontsize=8)
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/img/learning.svg"))
    args = parser.parse_args()
    atomic_write(args.output, draw([json.loads(file.read_text()) for file in args.results]))


if __name__ == "__main__":
    main()
