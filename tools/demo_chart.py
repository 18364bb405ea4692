"""README's bar chart: output tokens per second of the demo's modes, from its result file.

    python tools/demo_chart.py benchmarks/results/demo_bf16_HARDWARE_DATE.json [-o docs/img/demo.svg]

``make demo`` leaves such a file as demo/out/report.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from vllm_dflash.bench.report import MODE_COLORS
from vllm_dflash.files import atomic_write
from vllm_dflash.renamed import MODES

NAMES = {
    "none": "no speculation",
    "ngram": "vLLM's n-gram",
    "stock": "stock dflash, same drafter",
    "plugin": "vllm-dflash, same drafter",
}
WIDTH, LEFT, RIGHT, BAR, GAP, TOP = 760, 190, 150, 20, 6, 52


def draw(report: Mapping[str, Any]) -> str:
    """SVG with a group of bars for each number of requests in flight.

    Raises:
        ValueError: a mode is missing in the report.
    """
    measured = {MODES.get(mode, mode): points for mode, points in report["modes"].items()}
    if missing := sorted(set(NAMES) - set(measured)):
        raise ValueError(f"the report lacks the modes {', '.join(missing)}; run all of `make demo`")
    modes = {mode: measured[mode] for mode in NAMES}
    fastest = max(
        point["output_tokens_per_s"]["median"]
        for points in modes.values()
        for point in points.values()
    )
    parts: list[str] = []
    y = TOP
    for number in modes["none"]:
        parts.append(f'<text x="16" y="{y + 8}" font-weight="bold">{number} in flight</text>')
        y += 18
        for mode, points in modes.items():
            speed = points[number]["output_tokens_per_s"]
            scale = (WIDTH - LEFT - RIGHT) / fastest
            width, middle = speed["median"] * scale, y + BAR / 2
            label = f"{speed['median']:.0f} tokens/s"
            if mode != "none":
                label += f", {points[number]['over_none']['ratio']:.2f}x"
            color = MODE_COLORS.get(mode, "#009e73")
            low, high = LEFT + speed["min"] * scale, LEFT + speed["max"] * scale
            parts += [
                f'<text x="{LEFT - 8}" y="{middle + 4}" text-anchor="end">{escape(NAMES[mode])}</text>',
                f'<rect x="{LEFT}" y="{y}" width="{width:.1f}" height="{BAR}" fill="{color}"/>',
                f'<path d="M{low:.1f} {middle}H{high:.1f}" stroke="#1f2328" stroke-width="2"/>',
                f'<text x="{max(LEFT + width, high) + 8:.1f}" y="{middle + 4}">{label}</text>',
            ]
            y += BAR + GAP
        y += 14
    machine, have = report["machine"], report["versions"]
    where = f"{machine['cores']} cores of {machine['cpu']}; vLLM {have['vllm']}; range of the runs as a line"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" font-size="12" '
        'font-family="Helvetica, Arial, sans-serif">\n'
        f'<rect width="{WIDTH}" height="{y}" fill="#fff"/>\n'
        f'<text x="16" y="20" font-size="14" font-weight="bold">{escape(report["verifier"])}, held-out '
        f'tickets</text>\n<text x="16" y="36" fill="#57606a">{escape(where)}</text>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("report", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/img/demo.svg"))
    args = parser.parse_args()
    atomic_write(args.output, draw(json.loads(args.report.read_text())))


if __name__ == "__main__":
    main()
