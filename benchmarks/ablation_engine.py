"""What mechanisms of draft lengths are worth in a real engine: a sweep in which each is off in one engine.

    python benchmarks/ablation_engine.py VERIFIER DRAFTER --own own.jsonl --foreign foreign.jsonl \\
        --off context-at-once,no-plain-steps [--concurrency 1,8] [--repeats 3] [-o FILE]

For what the model worlds of ablation.py cannot show: time between steps. An engine with a mechanism off
imports a copy of the package in which a line of it is another one. All engines take turns with one without
speculation and one with everything on, as in sweep.py, whose options apply. ``at:REVISION`` is the package as
it was.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import sweep
import sweep_figures

from vllm_dflash.bench.engine_process import EngineProcess, EngineSpec

ROOT = Path(__file__).resolve().parents[1]
#: By name: the file, a piece of it, and what stands there instead.
SWITCHES: dict[str, list[tuple[str, str, str]]] = {
    "context-at-once": [
        (
            "serving/worker/v1/deferred_context.py",
            "at_once or config.kv_transfer_config is not None",
            "True",
        )
    ],
    "no-standing-decision": [("draft_length/explore.py", "self._left >= 0", "False")],
    "no-plain-steps": [
        (
            "serving/worker/v1/draft_controller.py",
            "if self._group is None:\n            # Ranks",
            "if False:\n#",
        )
    ],
    "rejection-sampler": [
        (
            "serving/worker/v1/draft_controller.py",
            "        skip_rejection_sampling(proposer.runner)\n",
            "",
        )
    ],
    "drafts-asked-for": [
        ("serving/worker/v1/draft_controller.py", "        send_with_output(proposer.runner)\n", "")
    ],
    "no-confidence": [
        ("draft_length/worker_policy.py", "known.trials >= _ENOUGH and", "False and"),
    ],
}


def package(name: str, folder: Path) -> Path:
    """A folder to import the package from, with the mechanism off."""
    made = folder / name.replace(":", "-").replace("/", "-")
    if name.startswith("at:"):
        command = ["git", "archive", name.removeprefix("at:"), "vllm_dflash"]
        tar = subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        with tarfile.open(fileobj=io.BytesIO(tar.stdout)) as archive:
            archive.extractall(made, filter="data")
        return made
    shutil.copytree(ROOT / "vllm_dflash", made / "vllm_dflash")
    for file, old, new in SWITCHES[name]:
        path = made / "vllm_dflash" / file
        text = path.read_text()
        if text.count(old) != 1:
            raise ValueError(f"{file} has {text.count(old)} times {old!r}; mend the switch {name}")
        path.write_text(text.replace(old, new))
    return made


def over(row: Mapping[str, Any], mode: str, base: str) -> list[float]:
    """Speed of a mode over another one's in the same repeat."""
    speeds = sweep_figures.speeds
    return [a / b for a, b in zip(speeds(row, mode), speeds(row, base), strict=True)]


def table(report: Mapping[str, Any]) -> str:
    """Markdown: speed over that with everything on, mean of the repeats and their range; that over none."""
    rows, ours = report["rows"], sweep_figures.OURS
    points = [f"{r['traffic']}, {r['concurrency']} in flight" for r in rows]
    lines = ["| | " + " | ".join(points) + " |", "|---" * (len(points) + 1) + "|"]
    pairs = [(mode, ours) for mode in report["modes"] if mode not in ("none", ours)]
    for mode, base in [(ours, "none"), *pairs]:
        cells = []
        for row in rows:
            ratios = over(row, mode, base)
            cells.append(f"{geometric_mean(ratios):.3f} ({min(ratios):.2f}-{max(ratios):.2f})")
        lines.append(f"| {mode} over {base} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    names = []
    if "--off" in sys.argv:
        at = sys.argv.index("--off")
        names = sys.argv[at + 1].split(",")
        del sys.argv[at : at + 2]
    with tempfile.TemporaryDirectory() as scratch:
        trees = {name: package(name, Path(scratch)) for name in names}
        sweep_figures.OUR_MODES.update({name: {} for name in names})

        def engine(spec: EngineSpec) -> EngineProcess:
            tree = trees.get(spec.mode, ROOT)
            return EngineProcess(replace(spec, env={**spec.env, "PYTHONPATH": str(tree)}))

        sweep.EngineProcess = engine  # type: ignore[assignment,misc]
        made: dict[str, Any] = {}
        sweep.show = lambda report, console: made.update(report)  # type: ignore[assignment]
        sys.argv += [
            "--context",
            "short",
            "--modes",
            ",".join(["none", sweep_figures.OURS, *names]),
        ]
        code = sweep.main()
        print(table(made))
    return code


if __name__ == "__main__":
    sys.exit(main())
