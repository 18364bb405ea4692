"""What replicas spend of a training step on waiting for each other and on sums, by their number.

    python benchmarks/replicas.py [--replicas 1 2 4] [--shapes tiny demo] [--batch-size 16] [--steps 12]
        [-o FILE]

Each replica is a process with one thread and a learner of random weights; there is no engine. They share each
step's sequences as ``train --data-parallel-size`` does, over gloo. ``demo`` has SmolLM2-135M's widths.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from learner_step import SHAPES, make_learner
from rich.console import Console
from torch import Tensor

from vllm_dflash.bench.report import write_json
from vllm_dflash.environment import describe_machine, versions
from vllm_dflash.training.plan import balanced_owners, run_steps
from vllm_dflash.training.ranks import Ranks
from vllm_dflash.training.replica_group import ReplicaGroup

#: Steps before those that count.
WARM_UP = 2


class TimedRanks(Ranks):
    """Seconds of each kind of exchange; ``wait`` is each one's first part, until all are there."""

    def __init__(self, group: Any) -> None:
        super().__init__(group)
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def gather(self, part: Any) -> list[Any]:
        started = time.perf_counter()
        parts = super().gather(part)
        self.seconds["wait"] += time.perf_counter() - started
        return parts

    def sum(self, tensors: Sequence[Tensor]) -> None:
        self._timed("sum", super().sum, tensors)

    def share(self, tensors: Sequence[Sequence[Tensor]]) -> None:
        self._timed("share weights", super().share, tensors)

    def _timed(self, name: str, work: Any, *args: Any) -> None:
        waited, cpu, started = self.seconds["wait"], time.process_time(), time.perf_counter()
        work(*args)
        took = time.perf_counter() - started
        self.seconds[name] += took - (self.seconds["wait"] - waited)
        self.seconds["cpu of both"] += time.process_time() - cpu


def lengths(shape: str, batch_size: int, steps: int) -> dict[str, int]:
    """Tokens of an epoch's sequences: half of the shape's to all."""
    most, rng = SHAPES[shape][-1], random.Random(0)
    return {str(i): rng.randint(most // 2, most) for i in range(batch_size * steps)}


def replica(rank: int, count: int, store: str, shape: str, batch_size: int, steps: int) -> None:
    """Writes the seconds of each of its steps beside the store."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=count
    )
    world = torch.distributed.group.WORLD
    ranks = TimedRanks(ReplicaGroup(world, world))
    learner, sample = make_learner(shape, "float32", ranks, batch_size=batch_size)
    tokens = lengths(shape, batch_size, steps)
    plan = run_steps(list(tokens), batch_size, 0, steps)
    owners = balanced_owners(plan, tokens, count)
    rows = []
    for i, keys in enumerate(plan):
        own = [sample(k, tokens[k]) for k in keys if owners[k] == rank]
        ranks.gather(None)
        ranks.seconds.clear()
        cpu, started = time.process_time(), time.perf_counter()
        learner.step(i, own)
        row = {"step": time.perf_counter() - started, "cpu": time.process_time() - cpu}
        if i >= WARM_UP:
            rows.append({**row, **ranks.seconds})
    write_json(rows, Path(f"{store}.{rank}.json"))


def measure(count: int, shape: str, batch_size: int, steps: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        store = f"{folder}/store"
        context = multiprocessing.get_context("spawn")
        args = (count, store, shape, batch_size, steps)
        replicas = [context.Process(target=replica, args=(r, *args)) for r in range(count)]
        for one in replicas:
            one.start()
        for one in replicas:
            one.join()
        if any(one.exitcode for one in replicas):
            raise RuntimeError(f"exit codes {[one.exitcode for one in replicas]}")
        of_ranks = [json.loads(Path(f"{store}.{r}.json").read_text()) for r in range(count)]
    rows = [row for of_rank in of_ranks for row in of_rank]
    total = sum(row["step"] for row in rows)
    tokens = lengths(shape, batch_size, steps)
    plan = run_steps(list(tokens), batch_size, 0, steps)
    owners = balanced_owners(plan, tokens, count)
    loads = [[sum(tokens[k] for k in s if owners[k] == r) for r in range(count)] for s in plan]
    return {
        "replicas": count,
        "shape": shape,
        "step_ms": round(1e3 * median(row["step"] for row in rows), 1),
        "cpu_ms": round(1e3 * sum(median(r["cpu"] for r in of_rank) for of_rank in of_ranks), 1),
        "shares": {
            name: round(sum(row.get(name, 0.0) for row in rows) / total, 4)
            for name in ("wait", "sum", "share weights")
        },
        # Of the CPU time: what other work on the machine does not change.
        "cpu_share": round(
            sum(row.get("cpu of both", 0.0) for row in rows) / sum(row["cpu"] for row in rows), 4
        ),
        "idle_by_plan": round(1 - mean(map(mean, loads)) / mean(map(max, loads)), 4),
        "steps": of_ranks,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replicas", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["tiny", "demo"])
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    runs = []
    for shape in args.shapes:
        for count in args.replicas:
            runs.append(measure(count, shape, args.batch_size, args.steps))
            Console().print({k: v for k, v in runs[-1].items() if k != "steps"})
    result = {
        "batch_size": args.batch_size,
        "runs": [{k: v for k, v in run.items() if k != "steps"} for run in runs],
        "seconds": {f"{run['shape']} x {run['replicas']}": run["steps"] for run in runs},
        "machine": describe_machine(),
        "versions": versions(),
    }
    if args.output:
        write_json(result, args.output)


if __name__ == "__main__":
    main()
