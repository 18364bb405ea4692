"""What choosing draft lengths costs the engine core's thread, by requests in flight.

    python benchmarks/policy_cost.py [--before REVISION] [--rounds 5] [-o FILE]

Steps of a model scheduler, whose drafts are accepted with probability 0.8: no engine, no model. Counted is
the CPU time of the thread in a step: ``policy_ms`` in the policy alone (decisions and learning), ``ms`` in
everything that ``serving.engine_core.scheduler.EngineLengths`` does around it. With ``--before`` the package
of that revision takes turns with this one, each in a process of its own.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
REQUESTS = (1, 16, 64, 256)
K = 15
ACCEPTANCE = 0.8
WARM_UP, STEPS = 20, 60
#: Methods of the policy that work in a step.
POLICY = ("verify_lengths", "should_draft", "observe", "observe_step", "count")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", help="git revision to compare with")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve()
        return
    with tempfile.TemporaryDirectory() as scratch:
        packages = {"after": ROOT}
        if args.before:
            packages = {"before": checkout(args.before, Path(scratch)), **packages}
        started = {name: start(package) for name, package in packages.items()}
        rows = []
        for n in REQUESTS:
            measured: dict[str, list[dict[str, float]]] = {name: [] for name in started}
            for _ in range(args.rounds):
                for name, process in started.items():
                    measured[name].append(ask(process, n))
            row: dict[str, Any] = {"requests": n, "draft_tokens": K}
            for name, rounds in measured.items():
                for key in ("policy_ms", "ms"):
                    times = sorted(round(m[key], 3) for m in rounds)
                    row |= {f"{name}_{key}": median(times), f"{name}_{key}_of_rounds": times}
            rows.append(row)
            print("  ".join(f"{k} {v}" for k, v in row.items() if not k.endswith("of_rounds")))
        for process in started.values():
            process.communicate()
    if args.output:
        from vllm_dflash.bench.report import write_json
        from vllm_dflash.environment import describe_machine, versions

        data = {"benchmark": "policy_cost", "machine": describe_machine(), "versions": versions()}
        write_json(data | {"acceptance": ACCEPTANCE, "rows": rows}, args.output)


def checkout(revision: str, folder: Path) -> Path:
    """The package as it was."""
    tar = subprocess.run(
        ["git", "archive", revision, "vllm_dflash"], cwd=ROOT, check=True, capture_output=True
    )
    with tarfile.open(fileobj=io.BytesIO(tar.stdout)) as archive:
        archive.extractall(folder, filter="data")
    return folder


def start(package: Path) -> subprocess.Popen[str]:
    """A process that measures with a package what it is asked for."""
    env = {**os.environ, "PYTHONPATH": str(package), "VLLM_LOGGING_LEVEL": "ERROR"}
    command = [sys.executable, __file__, "--serve"]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=env, stdin=pipe, stdout=pipe, text=True)


def ask(process: subprocess.Popen[str], num_requests: int) -> dict[str, float]:
    """:func:`measure` in that process."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{num_requests}\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


def serve() -> None:
    """Answers numbers of requests on stdin until it is closed."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what vLLM prints must not mix with them
    for line in sys.stdin:
        print(json.dumps(measure(int(line))), file=answers)


class Clock:
    """CPU seconds of the thread in some functions."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, function: Any) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.thread_time() - began

        return timed


def measure(num_requests: int) -> dict[str, float]:
    """Milliseconds a step, the median of many, from two runs: the clock in the policy takes time, too."""
    return {"policy_ms": run(num_requests, True), "ms": run(num_requests, False)}


def run(num_requests: int, policy_alone: bool) -> float:
    from vllm_dflash.draft_length.cost import StepCost
    from vllm_dflash.serving.engine_core.scheduler import EngineLengths

    cost = StepCost(
        [1, 256, 8192], [6e-3, 8e-3, 0.12], draft=(1e-3, 2e-6), per_context=1e-9, max_tokens=8192
    )
    make, of_policy, around = names()
    policy, rng, clock = make(cost, K), random.Random(0), Clock()
    running = [request(i) for i in range(num_requests)]
    scheduler = SimpleNamespace(running=running, requests={}, scored=None)
    scheduler.requests = {r.request_id: r for r in scheduler.running}
    stats = SimpleNamespace(update=lambda policy: None)
    lengths = EngineLengths(scheduler, policy, stats, 10**6)  # type: ignore[arg-type]
    lengths.verify_all = lambda pairs: [lengths.verified(*pair) for pair in pairs]
    timed: Any = policy if policy_alone else lengths
    for name in of_policy if policy_alone else (*around, "verify_all", "publish"):
        setattr(timed, name, clock.around(getattr(timed, name)))
    before_schedule, after_schedule, on_output = (getattr(lengths, name) for name in around)
    times = []
    for _ in range(WARM_UP + STEPS):
        clock.seconds = 0.0
        before_schedule()
        drafts = {r.request_id: r.spec_token_ids for r in scheduler.running if r.spec_token_ids}
        tokens = {r.request_id: 1 + len(r.spec_token_ids) for r in scheduler.running}
        output = SimpleNamespace(
            num_scheduled_tokens=tokens,
            total_num_scheduled_tokens=sum(tokens.values()),
            scheduled_spec_decode_tokens=drafts,
            num_spec_tokens_to_schedule=K,
            num_invalid_spec_tokens=None,
        )
        after_schedule(output)
        sampled = [list(range(1 + accepted(len(r.spec_token_ids), rng))) for r in scheduler.running]
        rows = {r.request_id: i for i, r in enumerate(scheduler.running)}
        result = SimpleNamespace(sampled_token_ids=sampled, req_id_to_index=rows)
        on_output(output, result)
        lengths.verify_all(
            [
                (r.request_id, len(r.spec_token_ids), len(kept) - 1)
                for r, kept in zip(scheduler.running, sampled, strict=True)
                if r.spec_token_ids
            ]
        )
        lengths.publish()
        times.append(1e3 * clock.seconds)
        for r, kept in zip(scheduler.running, sampled, strict=True):
            r.num_computed_tokens += len(kept)
            r.num_tokens += len(kept)
            r.num_output_tokens += len(kept)
            r.spec_token_ids = [0] * K if output.num_spec_tokens_to_schedule else []
    return median(times[WARM_UP:])


def names() -> tuple[Any, tuple[str, ...], tuple[str, ...]]:
    """The policy's class, its methods, and those of the scheduler around it; older revisions had others."""
    try:
        from vllm_dflash.draft_length.scheduler_policy import SchedulerPolicy
    except ImportError:
        from vllm_dflash.draft_length.ahead import Ahead  # type: ignore[import-not-found]

        old = ("lengths", "draft", "observe", "observe_step", "count")
        return Ahead, old, ("trim", "scheduled", "done")
    return SchedulerPolicy, POLICY, ("before_schedule", "after_schedule", "on_output")


def request(i: int) -> Any:
    """What the scheduler looks at in one of vLLM's requests."""
    from vllm import SamplingParams

    return SimpleNamespace(
        request_id=f"cmpl-{i:032d}-0",
        sampling_params=SamplingParams(temperature=0.0, max_tokens=10**5),
        is_prefill_chunk=False,
        is_finished=lambda: False,
        spec_token_ids=[0] * K,
        num_computed_tokens=500,
        num_tokens=501,
        num_output_tokens=1,
        num_output_placeholders=0,
        max_tokens=10**5,
    )


def accepted(length: int, rng: random.Random) -> int:
    for n in range(length):
        if rng.random() >= ACCEPTANCE:
            return n
    return length


if __name__ == "__main__":
    main()
