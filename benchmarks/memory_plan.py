"""The memory plans of docs/user/training.md beside what fake tensors need: nothing is allocated or computed.

    python benchmarks/memory_plan.py -o benchmarks/results/memory-plan_bf16_computed_DATE.json

A list of rows. ``planned_gib`` and ``fake_tensor_gib`` are of the learner alone (fp32 weights, optimizer, one
training step in the layout that the plan chose), the part that fake tensors can show. ``whole_gib``,
``least_gib`` and ``fits`` are of the whole plan, verifier and KV cache included: arithmetic throughout.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from helpers.fake_peak import fake_peak
from helpers.plan_shapes import SHAPES, Shape
from vllm_dflash.bench.report import write_json
from vllm_dflash.training.config import EngineOptions, Hyperparameters
from vllm_dflash.training.memory import GIB, card_bytes, learner_memory

COVERS = (
    "planned_gib, fake_tensor_gib: the learner (fp32 weights, optimizer, one step); whole_gib, least_gib, "
    "fits: all of the plan (least_gib with a KV cache of two sequences), by arithmetic"
)


def row(shape: Shape) -> dict:
    hparams, max_len = Hyperparameters(), EngineOptions().max_len
    plan = shape.plan()
    ranks = shape.ranks
    planned = learner_memory(shape.drafter, hparams, plan.layout, max_len, ranks=ranks).peak
    fake = fake_peak(shape.drafter, hparams, max_len, plan.layout, ranks)
    return {
        "shape": shape.name,
        "covers": COVERS,
        "card_gib": round(card_bytes(shape.gigabytes) / GIB, 2),
        "planned_gib": round(planned / GIB, 2),
        "fake_tensor_gib": round(fake / GIB, 2),
        "off": round(planned / fake - 1, 4),
        "fits": plan.fits,
        "whole_gib": round(plan.total / GIB, 2),
        "least_gib": round(plan.least / GIB, 2),
        "kv_sequences": plan.sequences,
        "anchors_in_flight": plan.layout.anchors_in_flight,
        "checkpoint_mlps": plan.layout.checkpoint_mlps,
        "rows_gib": {name: round(size / GIB, 2) for name, size in plan.rows},
        "ways_out_gib": {name: round(size / GIB, 2) for name, size in plan.ways_out},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    rows = []
    for shape in SHAPES:
        rows.append(row(shape))
        print(rows[-1], flush=True)
    write_json(rows, args.output)


if __name__ == "__main__":
    main()
