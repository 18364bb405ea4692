"""What each mechanism of the draft-length engine is worth: model worlds with one of them switched off.

    python benchmarks/ablation.py [--seeds 4] [--only NAME,NAME] [-o FILE]

The worlds are those of the tests (tests/helpers/worlds.py): a verifier and a drafter of known cost and
acceptance. A row is a mechanism, replaced by nothing or by the plainest thing that could stand there. Its
figure is the speed (tokens per modelled second, the start included) over that with everything on, by world,
the mean over seeds that both have in common; then the policy's CPU time a step over that with everything on.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from policy_cost import POLICY, Clock  # noqa: E402

from helpers.worlds import K, SchedulerWorld, WorkerWorld, made  # noqa: E402
from vllm_dflash.bench.report import write_json  # noqa: E402
from vllm_dflash.draft_length import (  # noqa: E402
    acceptance,
    cost,
    explore,
    scheduler_policy,
    worker_policy,
)
from vllm_dflash.draft_length.acceptance import (  # noqa: E402
    AcceptanceModel,
    RequestStats,
)
from vllm_dflash.draft_length.cost import StepCost  # noqa: E402
from vllm_dflash.draft_length.explore import Exploration  # noqa: E402
from vllm_dflash.draft_length.scheduler_policy import SchedulerPolicy  # noqa: E402
from vllm_dflash.draft_length.worker_policy import WorkerPolicy  # noqa: E402
from vllm_dflash.environment import describe_machine, versions  # noqa: E402

# -- mechanisms

Patch = tuple[Any, str, Any]


def _used_only(self: WorkerPolicy, request: Any, source: str, tokens: Any, *rest: Any) -> None:
    if rest[1].source == source and rest[1].length > 0:
        _await(self, request, source, tokens, *rest)


_await = WorkerPolicy._await
_match_cells = WorkerPolicy._match_cells
_observe_step = SchedulerPolicy.observe_step


def _unpaid(self: SchedulerPolicy, **step: Any) -> None:
    budget = self.exploration.budget
    _observe_step(self, **step)
    self.exploration.budget = budget


def _even_only(self: SchedulerPolicy, **step: Any) -> None:
    _observe_step(self, **{**step, "even": True})


def _best_lengths(self: SchedulerPolicy, batch: Any, value: Any) -> Any:
    seconds_M = value.seconds_M + value.passed
    return scheduler_policy.assign_draft_budget(value.survival_BK, seconds_M)


def _untaught(self: AcceptanceModel, kinds: int = 5) -> np.ndarray:
    return np.zeros(1)


#: Name, what stands in its place, and the patches that do it.
MECHANISMS: dict[str, tuple[str, list[Patch]]] = {
    "standing decision": (
        "the search runs in every step",
        [(Exploration, "stands", lambda *a: False)],
    ),
    "probes": (
        "none, new requests tried all the same",
        [(explore, "PROBE_SHARE", 0.0), (explore, "LEAST_PROBE_SHARE", 0.0)],
    ),
    "trying new requests": (
        "probes only",
        [(worker_policy, "HORIZON", 0), (scheduler_policy, "HORIZON", 0)],
    ),
    "confidence": (
        "position",
        [(WorkerPolicy, "use_confidence", property(lambda self: False))],
    ),
    "offsets of requests": (
        "averages",
        [
            (
                RequestStats,
                "add",
                lambda self, tried, *a: setattr(self, "tried", self.tried + tried),
            ),
            (acceptance, "_add_to_each", lambda counts, *a: [*counts, np.zeros_like(counts[0])]),
            (AcceptanceModel, "likely_offsets", _untaught),
        ],
    ),
    "kinds of requests": (
        "each request by its own counts and a prior",
        [
            (acceptance, "_STRANGERS", ()),
            (
                AcceptanceModel,
                "likely_offsets",
                lambda self, num=5: np.zeros(0),
            ),
            (AcceptanceModel, "likely_survival", lambda self, cells: _mean_curve(self, cells)),
        ],
    ),
    "strangers": ("kinds seen lately only", [(acceptance, "_RARITY", 0.0)]),
    "lengths of matches": (
        "one average",
        [(WorkerPolicy, "_match_cells", lambda self, n: _match_cells(self, 3))],
    ),
    "unused drafts teach": ("only those verified", [(WorkerPolicy, "_await", _used_only)]),
    "drafting for a part": (
        "for all that it may help, or none",
        [
            (
                worker_policy,
                "_sizes",
                lambda candidates, whole_batch: [candidates] if candidates else [],
            )
        ],
    ),
    "margin": ("1.0", [(worker_policy, "MARGIN", 1.0), (scheduler_policy, "MARGIN", 1.0)]),
    "cost of checking": ("none", [(cost, "_CHECK_RATE", 0.0)]),
    "learned costs": (
        "as calibrated",
        [(StepCost, "observe_step", lambda *a, **k: None)],
    ),
    "rounding to graphs": (
        "any lengths",
        [(SchedulerPolicy, "_choose", _best_lengths)],
    ),
    "cost of uneven batches": ("none", [(SchedulerPolicy, "observe_step", _even_only)]),
    "decaying probes": ("always as many", [(explore, "PROBE_DECAY", 1.0)]),
    "paying probes back": ("the budget only", [(SchedulerPolicy, "observe_step", _unpaid)]),
    "turns of 64": ("all requests teach", [(scheduler_policy, "_TAUGHT", 10**6)]),
}


def _mean_curve(self: AcceptanceModel, cells_T: np.ndarray) -> np.ndarray:
    return np.cumprod(acceptance._probability(self._logit_C[cells_T]))[None]


#: Mechanisms that only one of the two policies has.
ONLY = {
    "worker": {
        "confidence", "lengths of matches", "unused drafts teach",
        "drafting for a part",
    },
    "scheduler": {
        "rounding to graphs", "cost of uneven batches", "paying probes back", "turns of 64",
    },
}  # fmt: skip


@contextmanager
def without(name: str | None) -> Iterator[None]:
    """A mechanism off; None for all on."""
    with ExitStack() as stack:
        for target, attribute, value in MECHANISMS[name][1] if name else []:
            stack.enter_context(mock.patch.object(target, attribute, value))
        yield


# -- worlds

WORKER: dict[str, dict[str, Any]] = {
    "good, cheap tokens": {"quality": [0.85] * 2, "slope": 0.01},
    "good, dear tokens": {"quality": [0.85] * 4, "slope": 0.2},
    "bad, cheap tokens": {"quality": [0.2] * 2, "slope": 0.01},
    "bad, dear tokens": {"quality": [0.2] * 8, "slope": 0.2},
    "middling": {"quality": [0.6] * 4, "slope": 0.08},
    "mixed, dear tokens": {"quality": [0.9, 0.1] * 4, "slope": 0.1},
    "one middling request": {"quality": [0.6], "slope": 0.05},
    "bad, dear check": {"quality": [0.3] * 8, "slope": 0.02, "check": 0.2},
    "confident": {"quality": [0.6] * 4, "slope": 0.15, "confident": True},
    "useless, dear pass": {"quality": [0.02] * 4, "slope": 0.05, "draft": (1.0, 0.01)},
    "kinds, short": {"quality": [0.9] * 4, "slope": 0.1, "kinds": (0.9, 0.05), "length": 60},
    "kinds, 16": {"quality": [0.9] * 16, "slope": 0.03, "kinds": (0.9, 0.05)},
    "near break-even": {"quality": [0.35] * 2, "slope": 0.05, "draft": (0.25, 0.002)},
    "turns good": {"quality": [0.05] * 4, "slope": 0.1, "then": 0.9},
    "turns bad": {"quality": [0.9] * 4, "slope": 0.1, "then": 0.03},
    "wrong costs": {"quality": [0.5] * 8, "slope": 0.2, "believed": 0.0},
    "sure matches": {
        "quality": [0.3, 0.3, 0.9, 0.9],
        "slope": 0.05,
        "lookup": [0.5, 0.0, 0.0, 0.5],
    },
    "rare matches, useless drafter": {
        "quality": [0.03] * 2,
        "slope": 0.1,
        "lookup": [0.1] * 2,
        "matches_hold": 0.7,
    },
    "rare matches, dear tokens": {
        "quality": [0.03],
        "slope": 0.3,
        "lookup": [0.25],
        "matches_hold": 0.5,
        "draft": (9.0, 0.0),
    },
    "bad matches": {
        "quality": [0.6] * 4,
        "slope": 0.1,
        "lookup": [0.5] * 4,
        "matches_hold": 0.1,
    },
}
SCHEDULER: dict[str, dict[str, Any]] = {
    "good, 1": {"acceptance": lambda i, n: 0.9},
    "good, 16": {"acceptance": lambda i, n: 0.9, "requests": 16},
    "half, dear pass": {"acceptance": lambda i, n: 0.5, "draft": 0.4},
    "fair, dear tokens": {
        "acceptance": lambda i, n: 0.75,
        "requests": 4,
        "per_token": 0.2,
        "draft": 0.02,
    },
    "useless, 1, dear pass": {
        "acceptance": lambda i, n: 0.01,
        "draft": 1.0,
        "per_token": 0.002,
        "max_tokens": 100,
    },
    "useless, 8, very dear pass": {
        "acceptance": lambda i, n: 0.01,
        "requests": 8,
        "draft": 3.0,
        "per_token": 0.002,
        "max_tokens": 100,
    },
    "good and bad, 4": {
        "acceptance": lambda i, n: 0.95 if i % 2 else 0.05,
        "requests": 4,
        "per_token": 0.1,
        "draft": 0.1,
    },
    "good and bad by turns": {
        "acceptance": lambda i, n: 0.95 if i % 2 else 0.03,
        "max_tokens": 120,
    },
    "kinds, 16": {
        "acceptance": lambda i, n: (0.9, 0.6, 0.05)[i % 3],
        "requests": 16,
        "per_token": 0.05,
        "max_tokens": 120,
    },
    "turns good": {"acceptance": lambda i, n: 0.9 if n >= 500 else 0.03, "requests": 4},
    "turns bad": {"acceptance": lambda i, n: 0.9 if n < 500 else 0.03, "requests": 4},
    "wrong costs": {"acceptance": lambda i, n: 0.5, "requests": 8, "true": (0.25, 0.3)},
    "uneven dear": {
        "acceptance": lambda i, n: 0.95 if i % 2 else 0.6,
        "requests": 4,
        "per_token": 0.05,
        "draft": 0.1,
        "uneven": 0.8,
    },
    "graphs": {
        "acceptance": lambda i, n: (0.7, 0.75, 0.8)[i % 3],
        "requests": 8,
        "per_token": 0.06,
        "draft": 0.02,
        "uneven": 0.4,
        "graphs": (1, 3),
    },
    "good and bad, 128": {
        "acceptance": lambda i, n: 0.95 if i % 2 else 0.05,
        "requests": 128,
        "per_token": 0.004,
        "draft": 0.1,
        "steps": 200,
    },
}


def timed(policy: Any, *names: str) -> Clock:
    """The clock that runs in these methods of it from now on."""
    clock = Clock()
    for name in names:
        setattr(policy, name, clock.around(getattr(policy, name)))
    return clock


def worker(given: Mapping[str, Any], seed: int, steps: int) -> dict[str, float]:
    """Figures of one run: tokens a second, microseconds of the policy a step, error of its own speed-up."""
    given = dict(given)
    slope, draft = given.pop("slope"), given.pop("draft", (0.06, 0.002))
    believed, then = given.pop("believed", slope), given.pop("then", None)
    truth = made(lambda n: 1 + slope * n, draft=draft)
    truth.check = given.pop("check", 0.0)
    chosen = WorkerPolicy(made(lambda n: 1 + believed * n, draft=draft), K)
    clock = timed(chosen, "plan", "allocate", "forget")
    world = WorkerWorld(chosen, truth, given.pop("quality"), seed=seed, **given)
    for step in range(steps):
        if step == steps // 2 and then is not None:
            world.quality = [then] * len(world.quality)
        world.step()
    B = len(world.quality)
    true = world.tokens / world.seconds * float(truth.step(B, B, 70 * B)) / B
    return {
        "speed": true,
        "us": 1e6 * clock.seconds / steps,
        "estimate": (chosen.counters.speedup or 1.0) / true,
    }


def scheduler(given: Mapping[str, Any], seed: int, steps: int) -> dict[str, float]:
    """The same where the scheduler chooses."""
    given = dict(given)
    true, steps = given.pop("true", None), min(given.pop("steps", steps), steps)
    if true is not None:
        given |= {"per_token": 0.0, "draft": 0.0}
    world = SchedulerWorld(seed=seed, **given)
    if true is not None:
        world.truth = StepCost([1, 512], [1.0, 1.0 + 511 * true[0]], draft=(true[1], 0.0))
    clock = timed(world.policy, *POLICY, "forget")
    world.run(steps)
    return {
        "speed": world.speed(),
        "us": 1e6 * clock.seconds / steps,
        "estimate": (world.policy.counters.speedup or 1.0) / world.speed(),
    }


def run(name: str | None, seeds: int, steps: int) -> dict[str, list[dict[str, float]]]:
    """Figures by world and seed."""
    out = {}
    kinds = {"worker": (WORKER, worker), "scheduler": (SCHEDULER, scheduler)}
    of_one = [kind for kind, names in ONLY.items() if name in names]
    for kind in of_one or kinds:
        worlds, go = kinds[kind]
        for world, given in worlds.items():
            with without(name):
                out[f"{kind}: {world}"] = [go(given, seed, steps) for seed in range(seeds)]
    return out


def compare(
    off: Mapping[str, list[dict[str, float]]], on: Mapping[str, list[dict[str, float]]]
) -> dict[str, Any]:
    """Changes of speed by world, and of the policy's time."""
    speed, error, us = {}, {}, {}
    for world, rows in off.items():
        ratios = [a["speed"] / b["speed"] for a, b in zip(rows, on[world], strict=True)]
        speed[world] = float(np.mean(ratios))
        error[world] = float(np.std(ratios, ddof=1) / len(ratios) ** 0.5) if ratios[1:] else 0.0
        us[world] = float(np.median([r["us"] for r in rows]))
    before = {world: float(np.median([r["us"] for r in rows])) for world, rows in on.items()}
    parts = {
        part: float(np.mean([v for w, v in speed.items() if w.startswith(part)]))
        for part in parts_of(speed)
    }
    return {
        "mean_speed": parts,
        "speed": {w: round(v, 4) for w, v in speed.items()},
        "standard_error": {w: round(v, 4) for w, v in error.items()},
        "policy_time": {
            part: float(np.mean([us[w] / before[w] for w in us if w.startswith(part)]))
            for part in parts_of(us)
        },
    }


def parts_of(worlds: Iterable[str]) -> list[str]:
    """Policies that the worlds are of."""
    return list(dict.fromkeys(world.split(": ")[0] for world in worlds))


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| without | instead | worker: mean | worst | scheduler: mean | worst | policy time |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        cells = [name, MECHANISMS[name][0]]
        for part in ("worker", "scheduler"):
            if part not in row["mean_speed"]:
                cells += ["", ""]
                continue
            worst = min((v, w) for w, v in row["speed"].items() if w.startswith(part))
            cells.append(f"{row['mean_speed'][part]:.3f}")
            cells.append(f"{worst[0]:.3f} {worst[1].split(': ')[1]}")
        cells.append(" / ".join(f"{v:.2f}" for v in row["policy_time"].values()))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--only", help="comma-separated mechanisms")
    parser.add_argument("--part", help="I/N: every N-th mechanism")
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    names = args.only.split(",") if args.only else list(MECHANISMS)
    if args.part:
        i, n = map(int, args.part.split("/"))
        names = names[i::n]
    on = run(None, args.seeds, args.steps)
    rows = {}
    for name in names:
        began = time.monotonic()
        rows[name] = compare(run(name, args.seeds, args.steps), on)
        print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        if args.output:
            data = {"benchmark": "ablation", "versions": versions(), "machine": describe_machine()}
            everything = [
                {"world": w, **{k: float(np.mean([r[k] for r in v])) for k in v[0]}}
                for w, v in on.items()
            ]
            data |= {"seeds": args.seeds, "steps": args.steps, "everything_on": everything}
            data["rows"] = [{"without": n, **row} for n, row in rows.items()]
            write_json(data, args.output)
    print(table(rows))


if __name__ == "__main__":
    main()
