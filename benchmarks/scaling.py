"""What replicas would bring on GPUs that are not here, by arithmetic: minutes of a run, by their number.

    python benchmarks/scaling.py [-o benchmarks/results/scaling_bf16_computed_DATE.json]

The minutes of one replica are those of ``vllm-dflash plan``; docs/dev/scaling.md has the model.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from helpers.plan_shapes import Shape
from vllm_dflash.bench.report import write_json
from vllm_dflash.environment import versions
from vllm_dflash.training.config import EngineOptions, Hyperparameters
from vllm_dflash.training.durations import Card, Traffic, durations
from vllm_dflash.training.memory import drafter_parameters
from vllm_dflash.training.plan import balanced_owners, run_steps

CARD, TRAFFIC = Card(800e12, 3.3e12), Traffic(10_000, 300, 600, 6)
HPARAMS = Hyperparameters(batch_size=16)
#: Bytes a second that a GPU receives from the others while all of them send.
LINKS = {"NVLink": 450e9, "PCIe": 25e9}
SHAPES = (Shape("Qwen3-8B", 80), Shape("gemma-4-31B-it", 141))


def speedup(replicas: int) -> float:
    """Sequences in the time of one, where each step waits for the rank with most to do."""
    rng = random.Random(0)
    tokens = {str(i): rng.randint(300, 900) for i in range(TRAFFIC.prompts)}
    work = {key: min(HPARAMS.num_anchors, n) for key, n in tokens.items()}
    num_steps = int(TRAFFIC.epochs) * TRAFFIC.prompts // HPARAMS.batch_size
    steps = run_steps(list(work), HPARAMS.batch_size, 0, num_steps)
    owners = balanced_owners(steps, work, replicas)
    longest = 0
    for step in steps:
        loads = [0] * replicas
        for key in step:
            loads[owners[key]] += work[key]
        longest += max(loads)
    return sum(work[key] for step in steps for key in step) / longest


def rows_of(shape: Shape) -> list[dict[str, Any]]:
    text, plan = shape.hf_config.get_text_config(), shape.plan(HPARAMS)
    engine = EngineOptions(tensor_parallel_size=shape.ranks)
    one = durations(plan, text, shape.sizes, shape.drafter, HPARAMS, engine, TRAFFIC, CARD)
    parameters = drafter_parameters(shape.drafter)["all"]
    num_steps = TRAFFIC.epochs * TRAFFIC.prompts / HPARAMS.batch_size
    rows = []
    for replicas in (1, 2, 4, 8):
        # A ring's sum sends everything almost twice, and then each rank gets what the others updated; fp32.
        received = 3 * 4 * parameters * (replicas - 1) / replicas
        parts = {name: seconds / replicas for name, seconds in one.items()}
        parts["training"] = one["training"] / speedup(replicas)
        sums = {link: num_steps * received / speed for link, speed in LINKS.items()}
        rows.append(
            {
                "verifier": shape.name,
                "replicas": replicas,
                **{f"{name} min": round(s / 60, 1) for name, s in parts.items()},
                **{f"sums min, {link}": round(s / 60, 1) for link, s in sums.items()},
                **{
                    f"times as fast, {link}": round(
                        sum(one.values()) / (sum(parts.values()) + s), 1
                    )
                    for link, s in sums.items()
                },
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    rows = [row for shape in SHAPES for row in rows_of(shape)]
    print("| " + " | ".join(rows[0]) + " |\n" + "|---" * len(rows[0]) + "|")
    for row in rows:
        print("| " + " | ".join(map(str, row.values())) + " |")
    if args.output:
        write_json({"rows": rows, "versions": versions()}, args.output)


if __name__ == "__main__":
    main()
