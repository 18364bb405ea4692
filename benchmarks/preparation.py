"""Responses and extraction of the demo's traffic, with this checkout's trainer and an earlier one's.

    python benchmarks/preparation.py VERIFIER --before CHECKOUT [--train 64] [--rounds 2] [-o FILE]

CHECKOUT is a work tree of the earlier commit (git worktree add). Both train a small drafter by ``vllm-dflash
train`` on the same tickets, in turns; the seconds for responses and extraction are those of their summaries,
tau is that of the same held-out tickets. Their responses are compared token by token.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from vllm_dflash.bench.report import write_json
from vllm_dflash.environment import describe_machine, set_cpu_defaults, versions

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "demo"))
import tickets  # noqa: E402


def train(
    checkout: Path, verifier: Path, data: tuple[Path, Path], out: Path, steps: int
) -> dict[str, Any]:
    """Trains with a checkout's code; the summary of ``dflash_training.json``."""
    command = (
        sys.executable, "-c", "from vllm_dflash.cli import main; main()", "train",
        verifier.resolve(), "--data", data[0], "--eval-data", data[1], "-o", out,
        "--dtype", "bfloat16", "--max-len", "1024", "--max-tokens", "256",
        "--num-layers", "2", "--block-size", "8", "--draft-vocab", "8192",
        "--lr", "1.5e-3", "--num-anchors", "32", "--max-steps", str(steps),
    )  # fmt: skip
    subprocess.run(
        list(map(str, command)),
        cwd=checkout,  # where Python looks first
        env={**os.environ, "PYTHONPATH": str(checkout.resolve())},
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return json.loads((out / "dflash_training.json").read_text())


def responses(out: Path) -> dict[str, list[int]]:
    run = out.with_name(out.name + "-run")
    lines = [
        json.loads(line)
        for file in sorted(run.glob("responses*.jsonl"))
        for line in file.read_text().splitlines()
    ]
    return {line["key"]: line["token_ids"] for line in lines if "key" in line}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("verifier", type=Path)
    parser.add_argument(
        "--before", type=Path, required=True, help="work tree of the earlier commit"
    )
    parser.add_argument("--train", type=int, default=64, help="training tickets")
    parser.add_argument("--heldout", type=int, default=8, help="held-out tickets")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()

    set_cpu_defaults(kv_gib=1)  # the same for both
    seconds: dict[str, list[dict[str, float]]] = {"before": [], "after": []}
    taus: dict[str, list[float]] = {"before": [], "after": []}
    texts = {}
    with tempfile.TemporaryDirectory() as scratch:
        data = tickets.write(Path(scratch) / "data", args.train, args.heldout, seed=0)
        for round_ in range(args.rounds):
            for arm, checkout in (("before", args.before), ("after", ROOT)):
                out = Path(scratch) / f"{arm}-{round_}"
                summary = train(checkout, args.verifier, data, out, args.steps)
                minutes = summary["minutes"]
                seconds[arm].append({k: 60 * minutes[k] for k in ("responses", "extract")})
                taus[arm].append(summary["tau_heldout"]["tau"])
                texts[arm] = responses(out)
    totals = {arm: [sum(row.values()) for row in rows] for arm, rows in seconds.items()}
    ratios = [b / a for b, a in zip(totals["before"], totals["after"], strict=True)]
    same = sum(texts["after"][key] == ids for key, ids in texts["before"].items())
    commit = ("git", "-C", str(args.before), "rev-parse", "--short", "HEAD")
    report = {
        "benchmark": "preparation",
        "verifier": args.verifier.name,
        "tickets": {"train": args.train, "heldout": args.heldout},
        "steps": args.steps,
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "before_commit": subprocess.run(commit, capture_output=True, text=True).stdout.strip(),
        "seconds": seconds,
        "before_s": median(totals["before"]),
        "after_s": median(totals["after"]),
        "ratio": median(totals["before"]) / median(totals["after"]),
        "spread": [min(ratios), max(ratios)],
        "tau_heldout": taus,
        "responses_equal": [same, len(texts["before"])],
        "response_tokens": {arm: sum(map(len, t.values())) for arm, t in texts.items()},
        "versions": versions(),
        "machine": describe_machine(),
    }
    Console().print(report)
    if args.output:
        write_json(report, args.output)


if __name__ == "__main__":
    main()
