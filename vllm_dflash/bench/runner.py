"""Measures speculation modes against each other: same prompts, same limits, alternating.

All engines are alive during the measurement and take turns, so that a machine that slows down
(heat, neighbours) slows every mode alike, and the speed-up of a repeat compares runs made shortly
after each other. They are *started* one by one, since loading and compiling needs the most memory.

Modes:

* ``none``: no speculation, plugin off: the baseline of every ratio.
* ``ngram``: vLLM's prompt lookup with as many draft tokens as the drafter gives, plugin off.
* ``stock``: the drafter in vLLM's own ``dflash``, plugin off.
* ``ours``: the drafter in ``dflash``, plugin on.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

from vllm_dflash.bench.engine_process import (
    EngineProcess,
    EngineSpec,
    RequestResult,
    RunResult,
    SpecCounters,
)
from vllm_dflash.config import DrafterConfig
from vllm_dflash.environment import describe_machine, versions

MODES = ("none", "ngram", "stock", "ours")
DRAFTER_MODES = frozenset({"stock", "ours"})
#: Entry point name of the plugin in ``pyproject.toml``; what ``VLLM_PLUGINS`` lists.
PLUGIN_NAME = "dflash"
#: Longest and shortest n-gram looked up. vLLM's own default (5, 5) misses most repeats, 1 would
#: match on single frequent tokens; 5 and 2 are the values of vLLM's speculation example.
NGRAM_LOOKUP_MAX, NGRAM_LOOKUP_MIN = 5, 2
#: Share of the memory that all engines of a benchmark take together.
MEMORY_SHARE = 0.85
WARMUP_MAX_TOKENS = 16

Progress = Callable[[str], None]
EngineFactory = Callable[[EngineSpec], EngineProcess]


@dataclass
class BenchConfig:
    """One benchmark.

    Attributes:
        verifier: path or hub name of the model that is served.
        drafter: checkpoint folder of the DFlash drafter; needed by ``stock`` and ``ours``.
        num_speculative_tokens: draft tokens a step; None reads the drafter's ``config.json``.
        modes: some of :data:`MODES`; ratios need ``none``.
        concurrencies: requests in flight; each is measured by itself.
        num_prompts: how many of the given prompts are used.
        repeats: measured runs per mode and concurrency.
        max_tokens: output tokens a prompt at most.
        temperature: 0 is greedy.
        ignore_eos: generate ``max_tokens`` always. Text after its end tends to repeat, which
            flatters every drafter.
        dtype: as vLLM's ``--dtype``.
        max_model_len: as vLLM's ``--max-model-len``. vLLM stops drafting for a batch that comes
            within a draft of it, so leave room. None takes the model's.
        enforce_eager: no compilation and no graphs: quick start, slow serving.
        prefix_caching: off, so that a repeat does all the work again.
        out_dir: gets ``logs/<mode>.log``.
        engine_args: further ``AsyncEngineArgs`` of every mode; they win over the fields above.
        env: environment of every engine, e.g. ``VLLM_CPU_OMP_THREADS_BIND``.
        settle_s: pause before each measured run. A vLLM worker goes on polling for its next batch
            for a second after the last one, at the expense of the engine whose turn it is.
        startup_timeout_s: seconds that one engine may take to start.
        run_timeout_s: seconds that one run may take.
    """

    verifier: str
    drafter: str | None = None
    num_speculative_tokens: int | None = None
    modes: tuple[str, ...] = MODES
    concurrencies: tuple[int, ...] = (1, 4)
    num_prompts: int = 16
    repeats: int = 3
    max_tokens: int = 128
    temperature: float = 0.0
    ignore_eos: bool = False
    dtype: str = "auto"
    max_model_len: int | None = None
    enforce_eager: bool = False
    prefix_caching: bool = False
    out_dir: str | Path = "bench"
    engine_args: dict[str, Any] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    settle_s: float = 2.0
    startup_timeout_s: float = 1800.0
    run_timeout_s: float = 3600.0

    def __post_init__(self) -> None:
        unknown = [m for m in self.modes if m not in MODES]
        if unknown or not self.modes or len(set(self.modes)) != len(self.modes):
            raise ValueError(
                f"modes is {list(self.modes)}; give some of {', '.join(MODES)}, each once"
            )
        if not self.concurrencies or min(self.concurrencies) < 1:
            raise ValueError(
                f"concurrencies is {list(self.concurrencies)}; give at least one, all positive"
            )
        for name in ("num_prompts", "repeats", "max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("temperature", "settle_s"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")
        need_drafter = sorted(DRAFTER_MODES & set(self.modes))
        if self.drafter is None and need_drafter:
            raise ValueError(
                f"modes {need_drafter} need a drafter and none is given; name a checkpoint folder "
                "or measure only none and ngram"
            )
        if self.num_speculative_tokens is not None and self.num_speculative_tokens < 1:
            raise ValueError(
                f"num_speculative_tokens is {self.num_speculative_tokens}; it must be at least 1"
            )

    def resolve_num_speculative_tokens(self) -> int | None:
        """Draft tokens a step, from the drafter where not given; None when no mode drafts."""
        if set(self.modes) == {"none"} or self.num_speculative_tokens is not None:
            return self.num_speculative_tokens
        if self.drafter is None:
            raise ValueError(
                "num_speculative_tokens is not given and there is no drafter to read it from; "
                "mode ngram needs one of them"
            )
        tokens = DrafterConfig.from_pretrained(self.drafter).num_speculative_tokens
        if tokens is None:
            raise ValueError(f"the drafter {self.drafter} does not state its block size: give -k")
        return tokens


def speculative_config(config: BenchConfig, mode: str) -> dict[str, Any] | None:
    """What one of :data:`MODES` gives to ``--speculative-config``."""
    num_tokens = config.resolve_num_speculative_tokens()
    if mode == "ngram":
        return {
            "method": "ngram",
            "num_speculative_tokens": num_tokens,
            "prompt_lookup_max": NGRAM_LOOKUP_MAX,
            "prompt_lookup_min": NGRAM_LOOKUP_MIN,
        }
    if mode in DRAFTER_MODES:
        return {
            "method": "dflash",
            "model": config.drafter,
            "num_speculative_tokens": num_tokens,
        }
    return None


def engine_spec(config: BenchConfig, mode: str) -> EngineSpec:
    """The engine of one mode; the modes differ in speculation and in the plugin only."""
    speculative = speculative_config(config, mode)
    return make_spec(config, mode, speculative, mode == "ours", len(config.modes))


def make_spec(
    config: BenchConfig,
    mode: str,
    speculative: Mapping[str, Any] | None,
    plugin: bool,
    num_engines: int,
) -> EngineSpec:
    """An engine with the settings of ``config`` under any name.

    Args:
        config: the settings that all engines share.
        mode: what the engine is called.
        speculative: its ``--speculative-config``.
        plugin: whether it loads the vllm-dflash plugin.
        num_engines: how many share the memory.
    """
    engine_args: dict[str, Any] = {
        "dtype": config.dtype,
        "enforce_eager": config.enforce_eager,
        "enable_prefix_caching": config.prefix_caching,
        "max_num_seqs": max(config.concurrencies),
        # All engines live side by side, on the CPU (where the option means RAM) as on a GPU.
        "gpu_memory_utilization": math.floor(1000 * MEMORY_SHARE / num_engines) / 1000,
    }
    if config.max_model_len is not None:
        engine_args["max_model_len"] = config.max_model_len
    # VLLM_PLUGINS is the list of allowed plugins. An empty one (which vLLM reads as one nameless
    # plugin, not as "unset") turns all groups off, stat loggers included; naming ours alone makes
    # our plugin the one difference between stock and ours.
    return EngineSpec(
        mode=mode,
        model=config.verifier,
        engine_args=engine_args | config.engine_args,
        speculative_config=speculative,
        env={**config.env, "VLLM_PLUGINS": PLUGIN_NAME if plugin else ""},
        log_path=Path(config.out_dir) / "logs" / f"{mode}.log",
    )


def run_bench(
    config: BenchConfig,
    prompts: Sequence[Sequence[int]],
    progress: Progress | None = None,
    *,
    engine_factory: EngineFactory = EngineProcess,
) -> dict[str, Any]:
    """Runs the benchmark.

    A mode that fails, at start-up or later, is reported under ``errors`` and left out from then on;
    the others are still measured.

    Args:
        config: what to measure.
        prompts: token ids; the first ``config.num_prompts`` of them are used.
        progress: called with one line before each step.
        engine_factory: makes the engines, for tests.

    Returns:
        The report, ready for JSON: ``created``, ``versions``, ``machine``, ``config``, ``errors``
        (mode to message) and ``modes``, which maps a mode to its ``log``, its ``startup_s`` and
        ``concurrency``, a map from ``"1"``, ``"4"`` ... to the figures of :func:`summarize`.
    """
    prompts = _check_prompts(config, prompts)
    say = progress or (lambda _: None)
    report: dict[str, Any] = {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
        "machine": describe_machine(),
        "config": {
            **asdict(config),
            "out_dir": str(config.out_dir),
            "num_speculative_tokens": config.resolve_num_speculative_tokens(),
            "ngram_lookup": [NGRAM_LOOKUP_MIN, NGRAM_LOOKUP_MAX],
        },
        "errors": {},
        "modes": {},
    }
    runs: dict[str, dict[int, list[RunResult]]] = {}
    with contextlib.ExitStack() as stack:
        engines: dict[str, EngineProcess] = {}
        for mode in config.modes:
            spec = engine_spec(config, mode)
            entry: dict[str, Any] = {"log": str(spec.log_path), "startup_s": None}
            report["modes"][mode] = entry
            runs[mode] = {c: [] for c in config.concurrencies}
            say(f"{mode}: starting the engine")
            engine = engine_factory(spec)
            stack.callback(engine.close)
            try:
                entry["startup_s"] = _start(config, engine, mode, prompts)
            except (RuntimeError, OSError) as error:
                drop_engine(report["errors"], engines, engine, error, say)
            else:
                engines[mode] = engine
        _measure(config, prompts, engines, runs, report, say)
    for mode in config.modes:
        report["modes"][mode]["concurrency"] = {
            str(c): summarize(results, runs.get("none", {}).get(c), config.temperature)
            for c, results in runs[mode].items()
            if results
        }
    return report


def _check_prompts(config: BenchConfig, prompts: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    if len(prompts) < config.num_prompts:
        raise ValueError(
            f"{len(prompts)} prompts given, num_prompts is {config.num_prompts}; give more prompts "
            "or ask for fewer"
        )
    used = list(prompts[: config.num_prompts])
    limit = config.engine_args.get("max_model_len", config.max_model_len)
    for i, prompt in enumerate(used):
        if not prompt:
            raise ValueError(f"prompt {i} is empty; every prompt needs at least one token")
        if isinstance(limit, int) and len(prompt) + config.max_tokens > limit:
            raise ValueError(
                f"prompt {i} has {len(prompt)} tokens, which with max_tokens ({config.max_tokens}) "
                f"is beyond max_model_len ({limit}); shorten it, or change one of the two"
            )
    return used


def _start(
    config: BenchConfig, engine: EngineProcess, mode: str, prompts: Sequence[Sequence[int]]
) -> float:
    """Starts and warms one engine; returns its start-up time in seconds."""
    engine.start()
    startup_s = await_engine(config, engine, plugin=mode == "ours")
    for concurrency in config.concurrencies:
        # First batches of a size pay for allocations, kernel look-ups and worker start.
        run_prompts(config, engine, prompts[:concurrency], concurrency, warmup=True)
    return startup_s


def await_engine(config: BenchConfig, engine: EngineProcess, *, plugin: bool) -> float:
    """Waits for a started engine; returns its start-up time in seconds.

    Raises:
        RuntimeError: it died, or the plugin is loaded where it must not be or the other way round.
    """
    info = engine.wait_ready(config.startup_timeout_s)
    if info["plugin_active"] != plugin:
        # Figures under the wrong name are worse than none.
        state = "active" if info["plugin_active"] else "not active"
        raise RuntimeError(
            f"the vllm-dflash plugin is {state} in mode {engine.spec.mode!r}; vLLM finds it once the "
            f"package is installed (pip install --no-deps -e .), see also {engine.log_path}"
        )
    return info["startup_s"]


def run_prompts(
    config: BenchConfig,
    engine: EngineProcess,
    prompts: Sequence[Sequence[int]],
    concurrency: int,
    *,
    warmup: bool = False,
    max_tokens: Sequence[int] | None = None,
) -> RunResult:
    """One run with the settings of ``config``; a warm-up is short.

    Args:
        max_tokens: of each prompt, in place of the settings'; not of a warm-up.
    """
    limit = min(config.max_tokens, WARMUP_MAX_TOKENS) if warmup else config.max_tokens
    return engine.run(
        prompts,
        max_tokens=limit if warmup or max_tokens is None else max_tokens,
        concurrency=concurrency,
        temperature=config.temperature,
        ignore_eos=config.ignore_eos,
        warmup=warmup,
        timeout=config.run_timeout_s,
    )


def _measure(
    config: BenchConfig,
    prompts: Sequence[Sequence[int]],
    engines: dict[str, EngineProcess],
    runs: dict[str, dict[int, list[RunResult]]],
    report: dict[str, Any],
    say: Progress,
) -> None:
    """The alternating runs; appends to ``runs`` and drops engines that fail."""
    for repeat in range(config.repeats):
        for i, concurrency in enumerate(config.concurrencies):
            # In turn, each mode goes first.
            for mode in [m for m in rotate(config.modes, repeat + i) if m in engines]:
                say(f"{mode}: repeat {repeat + 1} of {config.repeats}, concurrency {concurrency}")
                time.sleep(config.settle_s)
                try:
                    result = run_prompts(config, engines[mode], prompts, concurrency)
                except (RuntimeError, OSError) as error:
                    drop_engine(report["errors"], engines, engines[mode], error, say)
                else:
                    runs[mode][concurrency].append(result)


def rotate(modes: Sequence[str], turn: int) -> list[str]:
    """The modes from number ``turn`` on, then the ones before it."""
    shift = turn % len(modes)
    return [*modes[shift:], *modes[:shift]]


def drop_engine(
    errors: dict[str, str],
    engines: dict[str, EngineProcess],
    engine: EngineProcess,
    error: Exception,
    say: Progress,
) -> None:
    """Reports a mode's failure and leaves it out from now on."""
    mode = engine.spec.mode
    errors[mode] = str(error)
    engines.pop(mode, None)
    # Its memory and cores belong to the others now.
    engine.close()
    say(f"{mode}: failed and is left out: {str(error).splitlines()[0]}")


# -- aggregation -------------------------------------------------------------------------------


def summarize(
    results: Sequence[RunResult], none_results: Sequence[RunResult] | None, temperature: float
) -> dict[str, Any]:
    """The figures of one mode at one concurrency.

    Args:
        results: one run per repeat.
        none_results: those of mode ``none`` at the same concurrency; None or empty without it.
        temperature: above 0 outputs differ by chance and are not compared.

    Returns:
        ``output_tokens_per_s`` (``raw``, ``median``, ``min``, ``max``), ``num_output_tokens`` per
        repeat, ``ttft_ms_p50`` and ``tpot_ms_p50`` over the requests of all repeats, ``tau``
        (tokens delivered a step with a draft, pooled over all of them), ``tau_by_source`` (see
        :func:`tau_by_source`), ``num_drafts``, ``draft_length`` (tokens a draft),
        ``acceptance_per_position``, ``over_none`` (``ratio`` of the medians, ``min`` and ``max`` of
        the repeats' own ratios), ``num_differing_from_none`` and ``num_unstable``: prompts whose
        output differs from mode ``none``'s in the first repeat, and between repeats of this mode.
        In bf16 both happen without a fault, where two tokens are nearly tied. ``chosen``: see
        :func:`chosen_lengths`.
    """
    speeds = [r.output_tokens_per_s for r in results]
    requests = [q for r in results for q in r.requests]
    counters = reduce(add, (r.counters for r in results), SpecCounters())
    over_none = differing = None
    if none_results:
        over_none = speed_ratio(speeds, [r.output_tokens_per_s for r in none_results])
        if temperature == 0:
            differing = num_differing([results[0], none_results[0]])
    return {
        "output_tokens_per_s": {"raw": speeds, **spread(speeds)},
        "num_output_tokens": [r.num_output_tokens for r in results],
        "ttft_ms_p50": 1000 * statistics.median(q.ttft_s for q in requests),
        "tpot_ms_p50": _median_tpot_ms(requests),
        "tau": counters.acceptance_length,
        "num_drafts": counters.num_drafts,
        "draft_length": counters.draft_length,
        "acceptance_per_position": counters.acceptance_per_position,
        "over_none": over_none,
        "num_differing_from_none": differing,
        "num_unstable": num_differing(results) if temperature == 0 else None,
        "chosen": chosen_lengths(results),
        "tau_by_source": tau_by_source(results),
    }


def tau_by_source(results: Sequence[RunResult]) -> dict[str, float | None] | None:
    """tau of the drafter's drafts and of prompt lookup's by the plugin's counts, pooled over the runs.

    None for modes in which it does not choose between them.
    """
    given = [r.chosen for r in results if r.chosen is not None]
    if not given:
        return None
    pooled = reduce(add, given)
    return {source: pooled.tau(source) for source in pooled.drafts}


def chosen_lengths(results: Sequence[RunResult]) -> dict[str, Any] | None:
    """What the plugin chose, pooled over the runs; None for modes in which it does not choose."""
    given = [r.chosen for r in results if r.chosen is not None]
    if not given:
        return None
    pooled = reduce(add, given)
    return {**asdict(pooled), "estimated_speedup": pooled.estimated_speedup}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, minimum and maximum."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def speed_ratio(speeds: Sequence[float], base_speeds: Sequence[float]) -> dict[str, float]:
    """Ratio of the medians, and how far the ratios of single repeats lie apart.

    A mode that failed on the way has fewer repeats; both sides are cut to those they share.
    """
    pairs = list(zip(speeds, base_speeds, strict=False))
    ratios = [mine / base for mine, base in pairs]
    medians = [statistics.median(column) for column in zip(*pairs, strict=True)]
    return {"ratio": medians[0] / medians[1], "min": min(ratios), "max": max(ratios)}


def num_differing(results: Sequence[RunResult]) -> int:
    """Prompts whose output tokens are not the same in all of the runs."""
    columns = zip(*(r.requests for r in results), strict=True)
    return sum(len({q.output_token_ids for q in column}) > 1 for column in columns)


def _median_tpot_ms(requests: Sequence[RequestResult]) -> float | None:
    tpots = [q.tpot_s for q in requests if q.tpot_s is not None]
    return 1000 * statistics.median(tpots) if tpots else None


def failed_modes(report: Mapping[str, Any]) -> list[str]:
    """Modes with an error; the command line exits non-zero when there are any."""
    return sorted(report["errors"])
