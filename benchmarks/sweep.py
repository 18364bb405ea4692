"""Is the chosen draft length ever the wrong one? Concurrency x traffic x context x speculation modes.

    python benchmarks/sweep.py VERIFIER DRAFTER --own own.jsonl --foreign foreign.jsonl [-o FILE] [--plot PNG]

A point is a number of requests in flight, a kind of traffic and a length of context:

* own: what the drafter was trained for; foreign: something else (``tools/make_chat.py`` writes some);
  mixed: the two in turn, so that requests of both kinds share a batch;
* short: the prompts as they are; long: behind earlier turns of at least --context-tokens tokens, about
  other things (benchmarks/data/earlier.jsonl). They are the same for all requests, and prefix caching is on
  in all modes, so that a run is decoding over a long context rather than prefill, where speculation changes
  nothing. --no-prefix-caching measures both.

Answers end after half to one and a half times --max-tokens, another number for each request. With one for
all, requests of mode none would run in step from the first token to the last, the next ones begin together,
and only modes that speculate would have batches that are half empty at the end.

Modes: none; ngram (vLLM's prompt lookup); kN (ours with N draft tokens, always); stock (the drafter in vLLM's
own dflash), adaptive (with vLLM's adaptive verification; V2 runner on a GPU) and table (with
vLLM's ``num_speculative_tokens_per_batch_size``); ours (the defaults); ours-no-lookup. All engines are alive
and take turns within a point, another one first in every repeat. A ratio is one of medians; its spread is
that of the repeats' own ratios.

Bounds are reported as met or short, never asserted. A ratio over the best of several fixed K is biased
against ours: the best of noisy medians is a lucky one. --dtype float32 makes outputs comparable token by
token; in bf16 near ties fall out differently in other batch shapes.

The file is written after each point, --resume goes on with the points that are not in it, --minutes stops
before a point that would not fit. The points run in the order given, concurrency outermost. --gpu sets
defaults meant to fit a call of ten minutes (all engines start together, no memory profiling); it has not run
on a GPU yet. --load-format dummy serves random weights where the verifier's are not at hand: tau is 1 then,
and what is measured is what speculation costs, not what it gains.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from itertools import chain, cycle, zip_longest
from pathlib import Path
from typing import Any

from rich.console import Console
from sweep_figures import (
    BOUNDS,
    CONTEXTS,
    FIXED,
    OUR_MODES,
    TRAFFIC,
    Point,
    finish,
    make_row,
)
from sweep_report import show, write_png

from vllm_dflash.bench.config import BenchConfig
from vllm_dflash.bench.engine_process import EngineProcess, EngineSpec, RunResult
from vllm_dflash.bench.report import write_json
from vllm_dflash.bench.runner import (
    EngineFactory,
    Progress,
    await_engine,
    drop_engine,
    make_spec,
    rotate,
    run_prompts,
    speculative_config,
)
from vllm_dflash.environment import describe_machine, set_cpu_defaults, versions

MODES = ("none", "ngram", "k1", "k3", "k5", "k7", "table", "ours")
STOCK_MODES = ("none", "ngram", "stock", "adaptive", "table")
MIN_REQUESTS = 8
#: Tokens that max_model_len leaves beyond the longest request: vLLM stops drafting close to it.
ROOM = 64
#: Earlier turns of a long context. Texts to look at, or a verifier's own loops, would be copied and answered
#: rather than the request; so these are complete exchanges about other things.
EARLIER = Path(__file__).parent / "data" / "earlier.jsonl"
#: Defaults that --gpu changes. Unrun: made from the CPU figures and vLLM's documentation.
GPU_PROFILE: dict[str, Any] = {
    "concurrency": "1,16,4",
    "modes": "none,ngram,k1,k3,k7,table,ours",
    "minutes": 8.5,
    "settle": 0.3,
    "start_together": 8,
    # Engines that start at the same time would take each other's memory for their own.
    "engine_args": json.dumps({"kv_cache_memory_bytes": 4 * 2**30}),
}


@dataclass
class SweepConfig:
    """One sweep.

    Attributes:
        bench: the settings that all engines and runs share; its ``modes`` play no part.
        modes: see the module's text.
        concurrencies, traffic, contexts: the points are their product.
        requests_per_slot: a run has this many times ``concurrency`` requests, eight at least.
        table: of mode ``table``, rows of first and last batch size and draft length; None makes one.
        minutes: no point is begun that would end later, judged by the longest so far.
        start_together: engines that start at the same time.
        settings: more of what made the figures (file names, lengths), for the report and --resume.
    """

    bench: BenchConfig
    modes: tuple[str, ...] = MODES
    concurrencies: tuple[int, ...] = (1, 2, 4, 8, 16)
    traffic: tuple[str, ...] = TRAFFIC
    contexts: tuple[str, ...] = CONTEXTS
    requests_per_slot: int = 2
    table: list[list[int]] | None = None
    minutes: float | None = None
    start_together: int = 1
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for mode in self.modes:
            if not (mode in STOCK_MODES or mode in OUR_MODES or FIXED.fullmatch(mode)):
                names = (*STOCK_MODES, "k1, k2...", *OUR_MODES)
                raise ValueError(f"mode {mode!r} is unknown; there are {', '.join(names)}")
        for name, given, known in (
            ("modes", self.modes, self.modes),
            ("concurrency", self.concurrencies, self.concurrencies),
            ("traffic", self.traffic, TRAFFIC),
            ("context", self.contexts, CONTEXTS),
        ):
            if not given or len(set(given)) != len(given) or not set(given) <= set(known):
                raise ValueError(f"{name} is {list(given)}; give some of {list(known)}, each once")
        if min(self.concurrencies) < 1 or self.requests_per_slot < 1 or self.start_together < 1:
            raise ValueError("concurrency, requests and start_together must be at least 1")
        if self.table is None:
            longest = self.bench.resolve_num_speculative_tokens() or 1
            # Long drafts while the batch is small, one token when it is not.
            self.table = [
                [1, 2, longest],
                [3, 4, min(3, longest)],
                [5, 256, 1],
            ]

    def points(self) -> list[Point]:
        return [
            Point(concurrency, traffic, context)
            for concurrency in self.concurrencies
            for context in self.contexts
            for traffic in self.traffic
        ]

    def output_tokens(self, num_requests: int) -> list[int]:
        """At most so many tokens for each request: half to one and a half of ``max_tokens``, evenly spread
        (multiples of the golden ratio, so that neighbours differ)."""
        golden = (5**0.5 - 1) / 2
        limit = self.bench.max_tokens
        return [max(1, round(limit * (0.5 + i * golden % 1))) for i in range(num_requests)]

    def num_requests(self, point: Point) -> int:
        return max(MIN_REQUESTS, self.requests_per_slot * point.concurrency)

    def spec(self, mode: str) -> EngineSpec:
        """The engine of a mode; they differ in speculation and the plugin alone."""
        plugin = mode not in STOCK_MODES
        base = {"table": "stock"}.get(mode, "plugin" if plugin else mode)
        speculative = speculative_config(self.bench, base)
        if mode == "table":
            speculative = {
                **(speculative or {}),
                "num_speculative_tokens_per_batch_size": self.table,
            }
        elif plugin:
            speculative = {**(speculative or {}), **OUR_MODES.get(mode, {})}
            if fixed := FIXED.fullmatch(mode):
                speculative |= {
                    "num_speculative_tokens": int(fixed[1]),
                    "dflash_draft_length": "fixed",
                }
        return make_spec(self.bench, mode, speculative, plugin, len(self.modes))


# -- prompts -----------------------------------------------------------------------------------


def interleave(own: Sequence[Any], foreign: Sequence[Any], num: int) -> list[Any]:
    """``num`` of the two in turn, own first."""
    pairs = zip_longest(own[: num - num // 2], foreign[: num // 2])
    return [x for x in chain.from_iterable(pairs) if x is not None]


def with_context(conversation: Any, turns: Sequence[dict[str, Any]]) -> Any:
    """The request behind earlier turns of the same conversation."""
    messages = conversation.messages
    num = next((i for i, m in enumerate(messages) if m["role"] not in ("system", "developer")), 0)
    return replace(conversation, messages=(*messages[:num], *turns, *messages[num:]))


class Prompts:
    """The requests of each kind and context as token ids.

    Args:
        requests: conversations by kind (own, foreign), each up to its last user turn.
        tokenizer: the verifier's.
        num: how many of each kind the largest run needs; a kind may have fewer.
        earlier: conversations with answers; the long context is made of them, in order, from the first again
            where they do not suffice.
        context_tokens: by which a long prompt is longer, at least.
    """

    def __init__(
        self,
        requests: Mapping[str, Sequence[Any]],
        tokenizer: Any,
        num: int,
        earlier: Sequence[Any],
        context_tokens: int,
    ) -> None:
        from vllm_dflash.training.tokenization import prompt_token_ids

        if not earlier or any(c.messages[-1]["role"] != "assistant" for c in earlier):
            raise ValueError("a long context is made of conversations that end with an answer")
        self.ids: dict[tuple[str, str], list[list[int]]] = {}
        for kind, pool in requests.items():
            short = [prompt_token_ids(tokenizer, c) for c in pool[:num]]
            long: list[list[int]] = []
            for conversation, ids in zip(pool, short, strict=False):
                turns: list[dict[str, Any]] = []
                more = cycle(earlier)
                made: list[int] = []
                while len(made) < len(ids) + context_tokens:
                    turns += next(more).messages
                    made = prompt_token_ids(tokenizer, with_context(conversation, turns))
                long.append(made)
            self.ids[kind, "short"], self.ids[kind, "long"] = short, long

    def of(self, point: Point, num: int) -> list[list[int]]:
        own, foreign = (self.ids.get((kind, point.context), []) for kind in ("own", "foreign"))
        pools = {"own": own[:num], "foreign": foreign[:num], "mixed": interleave(own, foreign, num)}
        prompts = pools[point.traffic]
        if len(prompts) < num:
            raise ValueError(
                f"{point} takes {num} prompts and the files give {len(prompts)}; give more prompts, or "
                "lower --concurrency or --requests"
            )
        return prompts


# -- the run -----------------------------------------------------------------------------------


def new_report(config: SweepConfig) -> dict[str, Any]:
    """An empty report; names, not this machine's folders."""
    bench = config.bench
    return {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
        "machine": describe_machine(),
        "settings": {
            "verifier": Path(bench.verifier).name,
            "drafter": Path(bench.drafter).name if bench.drafter else None,
            "num_speculative_tokens": bench.resolve_num_speculative_tokens(),
            "max_tokens": bench.max_tokens,
            "output_tokens": "half to one and a half of max_tokens",
            "ignore_eos": bench.ignore_eos,
            "dtype": bench.dtype,
            "enforce_eager": bench.enforce_eager,
            "prefix_caching": bench.prefix_caching,
            "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
            "requests_per_slot": config.requests_per_slot,
            "table": config.table,
            **config.settings,
        },
        "bounds": BOUNDS,
        "errors": {},
        "modes": {},
        "minutes": 0.0,
        "not_measured": [],
        "rows": [],
    }


def load_report(path: Path, config: SweepConfig) -> dict[str, Any]:
    """The report of an earlier sweep to go on with; ValueError if it was made in another way."""
    report, now = json.loads(path.read_text()), new_report(config)
    for part in ("versions", "settings"):
        if differing := sorted(k for k in now[part] if now[part][k] != report[part].get(k)):
            was = {k: report[part].get(k) for k in differing}
            raise ValueError(f"{path} was made with other {part}: {was}; write to another file")
    if any(report["machine"][k] != now["machine"][k] for k in ("cpu", "gpus")):
        raise ValueError(f"{path} was made on another machine; write to another file")
    return report


def unmeasured(
    report: Mapping[str, Any], points: Sequence[Point], modes: Sequence[str]
) -> list[Point]:
    """Points that lack a row, or a mode in theirs."""
    done = {Point.of(row): set(row["modes"]) for row in report["rows"]}
    return [p for p in points if not set(modes) <= done.get(p, set())]


def run_sweep(
    config: SweepConfig,
    prompts: Callable[[Point, int], list[list[int]]],
    report: dict[str, Any],
    save: Callable[[dict[str, Any]], object],
    say: Progress,
    *,
    engine_factory: EngineFactory = EngineProcess,
) -> dict[str, Any]:
    """Measures the points that the report lacks, and saves it after each.

    A mode that fails is reported under ``errors`` and left out from then on.
    """
    began, minutes_before = time.monotonic(), report["minutes"]
    points = config.points()
    report["errors"] = {}
    # All are made before the first engine starts: too few prompts should not cost a sweep.
    todo = [
        (p, prompts(p, config.num_requests(p))) for p in unmeasured(report, points, config.modes)
    ]
    if not todo:
        return finish(report)
    with contextlib.ExitStack() as stack:
        engines = start_engines(config, report, stack, engine_factory, say)
        # A mode that fails every time is no reason to measure a point again.
        wanted = unmeasured(report, points, list(engines))
        todo = [(p, ids) for p, ids in todo if p in wanted]
        longest = 0.0
        for number, (point, ids) in enumerate(todo):
            elapsed = time.monotonic() - began
            if not engines:
                break
            if config.minutes is not None and elapsed + longest > 60 * config.minutes:
                say(f"{config.minutes:g} minutes are over; {len(todo) - number} points are left")
                break
            say(f"point {number + 1} of {len(todo)}: {point}")
            results = measure(config, engines, point, ids, number, report["errors"], say)
            if any(results.values()):
                report["rows"] = [r for r in report["rows"] if Point.of(r) != point]
                report["rows"].append(make_row(point, ids, results))
            report["minutes"] = minutes_before + (time.monotonic() - began) / 60
            report["not_measured"] = [str(p) for p, _ in todo[number + 1 :]]
            save(finish(report))
            longest = max(longest, time.monotonic() - began - elapsed)
    return finish(report)


def start_engines(
    config: SweepConfig,
    report: dict[str, Any],
    stack: contextlib.ExitStack,
    engine_factory: EngineFactory,
    say: Progress,
) -> dict[str, EngineProcess]:
    engines: dict[str, EngineProcess] = {}
    errors = report["errors"]
    for first in range(0, len(config.modes), config.start_together):
        group = config.modes[first : first + config.start_together]
        for mode in group:
            spec = config.spec(mode)
            given = dict(spec.speculative_config or {})
            if "model" in given:
                given["model"] = Path(given["model"]).name
            report["modes"][mode] = {"speculative_config": given or None}
            say(f"{mode}: starting the engine")
            engines[mode] = engine = engine_factory(spec)
            stack.callback(engine.close)
            try:
                engine.start()
            except (RuntimeError, OSError) as error:
                drop_engine(errors, engines, engine, error, say)
        for mode in [m for m in group if m in engines]:
            try:
                startup_s = await_engine(
                    config.bench, engines[mode], plugin=mode not in STOCK_MODES
                )
            except (RuntimeError, OSError) as error:
                drop_engine(errors, engines, engines[mode], error, say)
            else:
                report["modes"][mode]["startup_s"] = startup_s
                say(f"{mode}: ready in {startup_s:.0f} s")
    return engines


def measure(
    config: SweepConfig,
    engines: dict[str, EngineProcess],
    point: Point,
    prompts: Sequence[Sequence[int]],
    turn: int,
    errors: dict[str, str],
    say: Progress,
) -> dict[str, list[RunResult]]:
    """The alternating runs of a point; repeat -1 warms up."""
    bench, concurrency = config.bench, point.concurrency
    results: dict[str, list[RunResult]] = {mode: [] for mode in config.modes if mode in engines}
    for repeat in range(-1, bench.repeats):
        warmup = repeat < 0
        said = []
        for mode in [m for m in rotate(config.modes, turn + max(repeat, 0)) if m in engines]:
            # Batches of a size, and with prefix caching the contexts of both kinds, come first.
            given = prompts[: max(2, concurrency)] if warmup else prompts
            if not warmup:
                time.sleep(bench.settle_s)
            try:
                result = run_prompts(
                    bench,
                    engines[mode],
                    given,
                    concurrency,
                    warmup=warmup,
                    max_tokens=config.output_tokens(len(given)),
                )
            except (RuntimeError, OSError) as error:
                drop_engine(errors, engines, engines[mode], error, say)
                continue
            if not warmup:
                results[mode].append(result)
                said.append(f"{mode} {result.output_tokens_per_s:.1f}")
        if said:
            say(f"  repeat {repeat + 1} of {bench.repeats}, tokens/s: {', '.join(said)}")
    return results


# -- command line ------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("verifier")
    parser.add_argument("drafter")
    parser.add_argument("--own", required=True, help="prompts of the drafter's own traffic")
    parser.add_argument("--foreign", required=True, help="prompts of other traffic")
    parser.add_argument("--concurrency", default="1,2,4,8,16")
    parser.add_argument("--traffic", default=",".join(TRAFFIC))
    parser.add_argument("--context", default=",".join(CONTEXTS))
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=64, help="of an answer, on average")
    parser.add_argument(
        "--requests", type=int, default=2, help="a run has N times concurrency (8 at least)"
    )
    parser.add_argument(
        "--context-tokens", type=int, default=2048, help="of the long context, at least"
    )
    parser.add_argument("--earlier", type=Path, default=EARLIER, help="conversations it is made of")
    parser.add_argument("--ignore-eos", action="store_true")
    parser.add_argument("--no-prefix-caching", action="store_true")
    parser.add_argument(
        "--table", help="of mode table, JSON: [[first batch size, last, draft length], ...]"
    )
    parser.add_argument("-k", "--num-speculative-tokens", type=int, help="default: the drafter's")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--load-format", help="as vLLM's; dummy for random weights")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--engine-args", help="JSON of further vLLM engine arguments")
    parser.add_argument(
        "--settle", type=float, default=2.0, help="seconds before each measured run"
    )
    parser.add_argument(
        "--start-together", type=int, default=1, help="engines that start at a time"
    )
    parser.add_argument("--minutes", type=float, help="stop before a point that would end later")
    parser.add_argument(
        "--gpu", action="store_true", help="defaults for ten minutes on a GPU (unrun)"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on with the points missing in the file"
    )
    parser.add_argument(
        "--logs", type=Path, help="folder of the engines' logs; default: a temporary one"
    )
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--plot", type=Path)
    return parser


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.gpu:
        parser.set_defaults(**GPU_PROFILE)
        args = parser.parse_args(argv)
    if args.resume and args.output is None:
        parser.error("--resume goes on with a file: name it with -o")
    if args.output and args.output.exists() and not args.resume:
        parser.error(f"{args.output} exists; --resume goes on with it")
    return args


def make_config(args: argparse.Namespace, logs: Path) -> SweepConfig:
    engine_args = json.loads(args.engine_args or "{}")
    if args.load_format:
        engine_args["load_format"] = args.load_format
    numbers = tuple(int(part) for part in args.concurrency.split(","))
    bench = BenchConfig(
        verifier=args.verifier,
        drafter=args.drafter,
        num_speculative_tokens=args.num_speculative_tokens,
        concurrencies=numbers,
        repeats=args.repeats,
        max_tokens=args.max_tokens,
        ignore_eos=args.ignore_eos,
        dtype=args.dtype,
        enforce_eager=args.eager,
        prefix_caching=not args.no_prefix_caching,
        out_dir=logs,
        engine_args=engine_args,
        settle_s=args.settle,
    )
    if args.minutes is not None:
        bench.startup_timeout_s = min(bench.startup_timeout_s, 60 * args.minutes)
    return SweepConfig(
        bench=bench,
        modes=tuple(args.modes.split(",")),
        concurrencies=numbers,
        traffic=tuple(args.traffic.split(",")),
        contexts=tuple(args.context.split(",")),
        requests_per_slot=args.requests,
        table=json.loads(args.table) if args.table else None,
        minutes=args.minutes,
        start_together=args.start_together,
        settings={
            "own": Path(args.own).name,
            "foreign": Path(args.foreign).name,
            "context_tokens": args.context_tokens,
            "earlier": args.earlier.name,
            "engine_args": engine_args,
        },
    )


def main() -> int:
    args = parse()
    set_cpu_defaults(kv_gib=1)
    console = Console(stderr=True)

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False)

    from transformers import AutoTokenizer

    from vllm_dflash.bench.prompts import load_requests
    from vllm_dflash.training.conversations import load_conversations

    logs = args.logs or Path(tempfile.mkdtemp(prefix="sweep-"))
    config = make_config(args, logs)
    num = max(config.num_requests(p) for p in config.points())
    requests = {
        kind: load_requests(args.verifier, str(path), {}, 10**6)
        for kind, path in (("own", args.own), ("foreign", args.foreign))
    }
    earlier, _ = load_conversations(args.earlier)
    tokenizer = AutoTokenizer.from_pretrained(args.verifier)
    prompts = Prompts(requests, tokenizer, num, earlier, args.context_tokens)
    longest = max(
        len(ids) for (_, c), pool in prompts.ids.items() if c in config.contexts for ids in pool
    )
    config.bench.max_model_len = longest + 2 * config.bench.max_tokens + ROOM
    resume = args.resume and args.output.exists()
    report = load_report(args.output, config) if resume else new_report(config)

    def save(made: dict[str, Any]) -> None:
        if args.output:
            write_json(made, args.output)
        if args.plot and made["rows"]:
            write_png(made, args.plot)

    say(f"{len(config.points())} points, {len(config.modes)} modes; logs in {logs / 'logs'}")
    run_sweep(config, prompts.of, report, save, say, engine_factory=EngineProcess)
    save(report)
    show(report, Console(width=None if sys.stdout.isatty() else 180))
    return 1 if report["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
