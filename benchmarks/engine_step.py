"""What one engine step costs with stock dflash, with ours, and with ours without its ops.

    python benchmarks/engine_step.py VERIFIER DRAFTER --data prompts.jsonl [--batch 1 8] [--rounds 7] [-o
    FILE]

One process an arm, each with its own engine; the arms take turns, the same prompts each, one at work at a
time. Timed are decode steps only (every request drafts): the whole engine step, and within it ``propose``
(all that the drafter costs) and ``set_inputs_first_pass`` (building the block). Reported are medians over
the steps of a round and, over the rounds, the median and range of stock's time divided by the arm's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from vllm_dflash.bench.report import write_json
from vllm_dflash.environment import describe_machine, versions

ARMS: dict[str, dict[str, Any]] = {
    "stock": {"env": {"VLLM_DFLASH_DISABLE": "1"}},
    "ours without ops": {"speculative": {"dflash_ops": False}},
    "ours": {},
}
PARTS = ("engine step", "propose", "build block")


class Timer:
    """Wraps a method; keeps the seconds of each call."""

    def __init__(self, cls: type, name: str) -> None:
        self.seconds: list[float] = []
        original = getattr(cls, name)

        def timed(*args, **kwargs):
            began = time.perf_counter()
            result = original(*args, **kwargs)
            self.seconds.append(time.perf_counter() - began)
            return result

        setattr(cls, name, timed)


def worker(config: dict[str, Any]) -> None:
    """An arm: serves rounds asked for on stdin, one JSON line each, and answers on stdout."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what vLLM prints must not mix with the answers
    from vllm import LLM, SamplingParams
    from vllm.plugins import load_general_plugins
    from vllm.v1.worker import gpu_model_runner

    load_general_plugins()  # so that the class below is the one that serves
    proposer = gpu_model_runner.DFlashProposer
    propose = Timer(proposer, "propose")
    build = Timer(proposer, "set_inputs_first_pass")
    llm = LLM(**config["engine"])
    engine = llm.llm_engine
    print(json.dumps("ready"), file=answers)
    for line in sys.stdin:
        job = json.loads(line)
        params = SamplingParams(temperature=0.0, max_tokens=job["max_tokens"], ignore_eos=True)
        prompts = job["prompts"]
        for i, ids in enumerate(prompts):
            engine.add_request(f"{job['round']}-{i}", {"prompt_token_ids": ids}, params)
        times: dict[str, list[float]] = {part: [] for part in PARTS}
        outputs: dict[str, list[int]] = {}
        while engine.has_unfinished_requests():
            propose.seconds.clear()
            build.seconds.clear()
            began = time.perf_counter()
            finished = engine.step()
            whole = time.perf_counter() - began
            for output in finished:
                outputs[output.request_id.partition("-")[2]] = list(output.outputs[0].token_ids)
            running = sum(not o.finished for o in finished) == len(prompts)
            if propose.seconds and running:
                row = (whole, sum(propose.seconds), sum(build.seconds))
                for part, seconds in zip(PARTS, row, strict=True):
                    times[part].append(seconds)
        # The first steps prefill.
        answer = {part: [1e3 * s for s in seconds[2:]] for part, seconds in times.items()}
        print(json.dumps({"times": answer, "outputs": outputs}), file=answers)


class Arm:
    def __init__(self, name: str, engine: dict[str, Any]) -> None:
        arm = ARMS[name]
        speculative = {**engine["speculative_config"], **arm.get("speculative", {})}
        config = {"engine": {**engine, "speculative_config": speculative}}
        env = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", **arm.get("env", {})}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", json.dumps(config)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )
        self.answer()

    def ask(self, job: dict[str, Any]) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"an engine ended with exit code {self.process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("verifier")
    parser.add_argument("drafter")
    parser.add_argument("--data", required=True)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()

    from vllm_dflash.bench.prompts import load_prompts

    prompts = load_prompts(args.verifier, args.data, {}, max(args.batch) * args.rounds)
    engine = {
        "model": args.verifier,
        "max_num_seqs": max(args.batch),
        "max_model_len": 1024,
        "enforce_eager": args.eager,
        "enable_prefix_caching": False,
        "speculative_config": {
            "method": "dflash",
            "model": args.drafter,
            "num_speculative_tokens": 7,
        },
    }
    console = Console()
    arms: dict[str, Arm] = {}
    for name in args.arms:
        console.print(f"starting {name}")
        arms[name] = Arm(name, engine)
    points = []
    for batch in args.batch:
        medians: dict[str, dict[str, list[float]]] = {a: {p: [] for p in PARTS} for a in arms}
        outputs: dict[str, list[Any]] = {a: [] for a in arms}
        for number in range(-1, args.rounds):  # one to warm up
            first = (max(number, 0) * batch) % (len(prompts) - batch + 1)
            job = {
                "round": f"{batch}/{number}",
                "prompts": prompts[first : first + batch],
                "max_tokens": args.max_tokens,
            }
            order = list(arms) if number % 2 else list(reversed(arms))
            for name in order:
                answer = arms[name].ask(job)
                outputs[name].append(answer["outputs"])
                if number >= 0:
                    for part in PARTS:
                        medians[name][part].append(median(answer["times"][part]))
            console.print(f"batch {batch}, round {number + 1} of {args.rounds}")
        for name in arms:
            point: dict[str, Any] = {
                "batch": batch,
                "arm": name,
                "same_output_as_stock": outputs[name] == outputs[args.arms[0]],
            }
            for part in PARTS:
                mine, stock = medians[name][part], medians[args.arms[0]][part]
                ratios = [s / m for s, m in zip(stock, mine, strict=True)]
                point[part] = {
                    "ms": median(mine),
                    "stock_over_this": median(stock) / median(mine),
                    "range": [min(ratios), max(ratios)],
                    "rounds_ms": mine,
                }
            points.append(point)
    for arm in arms.values():
        arm.close()
    table = Table(title=f"ms a step, and {args.arms[0]}'s time over it (range over rounds)")
    for column in ("batch", "arm", *PARTS, "same output"):
        table.add_column(column)
    for point in points:
        cells = [
            f"{p['ms']:.3f}  {p['stock_over_this']:.3f} ({p['range'][0]:.3f}-{p['range'][1]:.3f})"
            for p in (point[part] for part in PARTS)
        ]
        table.add_row(str(point["batch"]), point["arm"], *cells, str(point["same_output_as_stock"]))
    if args.output:
        config = {k: v for k, v in vars(args).items() if k != "output"}
        for key in ("verifier", "drafter", "data"):  # names, not this machine's folders
            config[key] = Path(config[key]).name
        report = {"versions": versions(), "machine": describe_machine(), "config": config}
        write_json({**report, "points": points}, args.output)
    console.print(table)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(json.loads(sys.argv[2]))
    else:
        main()
