"""Measures speculation modes against each other: same prompts, same limits, alternating.

Engines take turns, so that a machine that slows down (heat, neighbours) slows every mode alike, and the
speed-up of a repeat compares runs made shortly after each other. Where they fit side by side all are alive
during the measurement; else they sleep between their turns, or are started for each
(:mod:`vllm_dflash.bench.sharing`). They are *started* one by one, since loading and compiling needs the most
memory.

Modes:

* ``none``: no speculation, plugin off: the baseline of every ratio.
* ``ngram``: vLLM's prompt lookup with as many draft tokens as the drafter gives, plugin off.
* ``stock``: the drafter in vLLM's own ``dflash``, plugin off.
* ``plugin``: the drafter in ``dflash``, plugin on.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import datetime, timezone
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

from vllm_dflash.bench.config import ADAPTIVE, DRAFTER_MODES, BenchConfig
from vllm_dflash.bench.engine_process import (
    EngineProcess,
    EngineSpec,
    RequestResult,
    RunResult,
    SpecCounters,
)
from vllm_dflash.bench.sharing import (
    MEMORY_SHARE,
    Device,
    Sharing,
    needed_model_len,
    plan_sharing,
)
from vllm_dflash.environment import describe_machine, versions

#: Entry point name of the plugin in ``pyproject.toml``; what ``VLLM_PLUGINS`` lists.
PLUGIN_NAME = "dflash"
#: Longest and shortest n-gram looked up. vLLM's own default (5, 5) misses most repeats, 1 would
#: match on single frequent tokens; 5 and 2 are the values of vLLM's speculation example.
NGRAM_LOOKUP_MAX, NGRAM_LOOKUP_MIN = 5, 2
WARMUP_MAX_TOKENS = 16

Progress = Callable[[str], None]
EngineFactory = Callable[[EngineSpec], EngineProcess]


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
            **({"enable_adaptive_verification": True} if mode == ADAPTIVE else {}),
        }
    return None


def engine_spec(config: BenchConfig, mode: str) -> EngineSpec:
    """The engine of one mode; the modes differ in speculation and in the plugin only."""
    speculative = speculative_config(config, mode)
    return make_spec(config, mode, speculative, mode == "plugin", len(config.modes))


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
    # our plugin the one difference between stock and plugin.
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
    verifier_config: Any = None,
    device: Device | None = None,
) -> dict[str, Any]:
    """Runs the benchmark.

    A mode that fails, at start-up or later, is reported under ``errors`` and left out from then on;
    the others are still measured.

    Args:
        config: what to measure.
        prompts: token ids; the first ``config.num_prompts`` of them are used.
        progress: called with one line before each step.
        engine_factory: makes the engines, for tests.
        verifier_config: transformers' configuration of the verifier. Lengths that are not given then follow
            from the prompts, and how the engines share the device from its size. Without it lengths are the
            model's, and ``auto`` is ``together``.
        device: where the engines run; None looks at this machine.

    Returns:
        The report, ready for JSON: ``created``, ``versions``, ``machine``, ``config``, ``sharing`` (``kind``
        and the plan's ``sentence``), ``errors`` (mode to message) and ``modes``, which maps a mode to its
        ``log``, its ``startup_s`` and ``concurrency``, a map from ``"1"``, ``"4"`` ... to the figures of
        :func:`summarize`.
    """
    config, sharing = plan_run(config, prompts, verifier_config, device)
    prompts = check_prompts(config, prompts)
    say = progress or (lambda _: None)
    if sharing.sentence:
        say(sharing.sentence)
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
        "sharing": {"kind": sharing.kind, "sentence": sharing.sentence},
        "errors": {},
        "modes": {},
    }
    runs: dict[str, dict[int, list[RunResult]]] = {}
    for mode in config.modes:
        log = engine_spec(config, mode).log_path
        report["modes"][mode] = {"log": str(log), "startup_s": None}
        runs[mode] = {c: [] for c in config.concurrencies}
    started = time.monotonic()
    with _Engines(config, prompts, sharing, engine_factory, report, say) as engines:
        for repeat in range(config.repeats):
            began = time.monotonic()
            _measure(config, prompts, engines, repeat, runs, report, say)
            now = time.monotonic()
            fits = config.minutes is None or 2 * now - began - started <= 60 * config.minutes
            if repeat + 1 < config.repeats and not fits:
                say(
                    f"{repeat + 1} of {config.repeats} repeats, to end in {config.minutes:g} minutes"
                )
                report["config"]["repeats"] = repeat + 1
                break
    for mode in config.modes:
        report["modes"][mode]["concurrency"] = {
            str(c): summarize(results, runs.get("none", {}).get(c), config.temperature)
            for c, results in runs[mode].items()
            if results
        }
    return report


def plan_run(
    config: BenchConfig,
    prompts: Sequence[Sequence[int]],
    verifier_config: Any,
    device: Device | None = None,
) -> tuple[BenchConfig, Sharing]:
    """The settings with the lengths that follow from the prompts, and how the engines share the device."""
    kind = "together" if config.sharing == "auto" else config.sharing
    if verifier_config is None:
        return config, Sharing(kind)
    used = list(map(len, prompts[: config.num_prompts]))
    drafted = config.resolve_num_speculative_tokens() or 0
    length = config.engine_args.get("max_model_len", config.max_model_len)
    if length is None:
        length = needed_model_len(max(used, default=0), config.max_tokens, drafted, verifier_config)
        config = replace(config, max_model_len=length)
    most = max(used, default=0) + config.max_tokens + drafted + 1
    drafter = [config.drafter] if config.drafter is not None else []
    sharing = plan_sharing(
        config.sharing,
        [[config.verifier, *(drafter if m in DRAFTER_MODES else [])] for m in config.modes],
        verifier_config,
        max(config.concurrencies),
        most,
        {"dtype": config.dtype, **config.engine_args},
        device or Device.here(),
    )
    return config, sharing


def check_prompts(config: BenchConfig, prompts: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    """The prompts that are used.

    Raises:
        ValueError: too few, or one that is empty or too long.
    """
    if len(prompts) < config.num_prompts:
        raise ValueError(
            f"{len(prompts)} prompts given, --num-prompts is {config.num_prompts}; give more prompts "
            "or ask for fewer"
        )
    used = list(prompts[: config.num_prompts])
    limit = config.engine_args.get("max_model_len", config.max_model_len)
    for i, prompt in enumerate(used):
        if not prompt:
            raise ValueError(f"prompt {i} is empty; every prompt needs at least one token")
        if isinstance(limit, int) and len(prompt) + config.max_tokens > limit:
            raise ValueError(
                f"prompt {i} has {len(prompt)} tokens, which with --max-tokens ({config.max_tokens}) "
                f"is beyond --max-model-len ({limit}); shorten it, or change one of the two"
            )
    return used


class _Engines:
    """The engines of a benchmark. Leaving the context ends all that are alive.

    Args:
        sharing: ``together`` and ``sleep`` start all of them on entering; ``restart`` one a turn.
        report: gets start-up times and errors.
    """

    def __init__(
        self,
        config: BenchConfig,
        prompts: Sequence[Sequence[int]],
        sharing: Sharing,
        factory: EngineFactory,
        report: dict[str, Any],
        say: Progress,
    ) -> None:
        self.config, self.prompts, self.sharing = config, prompts, sharing
        self.factory, self.report, self.say = factory, report, say
        self.alive: dict[str, EngineProcess] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> _Engines:
        try:
            if self.sharing.kind != "restart":
                for mode in self.config.modes:
                    with self.leaving_out(mode):
                        self.start(mode)
                        if self.sharing.kind == "sleep":
                            self.alive[mode].sleep()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def start(self, mode: str) -> None:
        """Starts and warms the engine of a mode."""
        spec = engine_spec(self.config, mode)
        # What the user gave wins.
        args = {**spec.engine_args, **self.sharing.engine_args, **self.config.engine_args}
        self.say(f"{mode}: starting the engine")
        engine = self.alive[mode] = self.factory(replace(spec, engine_args=args))
        self._stack.callback(engine.close)
        engine.start()
        startup_s = await_engine(self.config, engine, plugin=mode == "plugin")
        entry = self.report["modes"][mode]
        if entry["startup_s"] is None:
            entry["startup_s"] = startup_s
        for concurrency in self.config.concurrencies:
            # First batches of a size pay for allocations, kernel look-ups and worker start.
            some = self.prompts[:concurrency]
            run_prompts(self.config, engine, some, concurrency, warmup=True)

    @contextlib.contextmanager
    def turn(self, mode: str) -> Iterator[EngineProcess]:
        """The mode's engine, ready to be measured; the device is the next one's afterwards."""
        if self.sharing.kind == "restart":
            self.start(mode)
            yield self.alive[mode]
            self.alive.pop(mode).close()
        elif self.sharing.kind == "sleep":
            self.alive[mode].wake()
            yield self.alive[mode]
            self.alive[mode].sleep()
        else:
            yield self.alive[mode]

    @contextlib.contextmanager
    def leaving_out(self, mode: str) -> Iterator[None]:
        """Reports a failure of the mode and leaves it out from now on."""
        try:
            yield
        except (RuntimeError, OSError) as error:
            drop_engine(self.report["errors"], self.alive, self.alive[mode], error, self.say)


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
    engines: _Engines,
    repeat: int,
    runs: dict[str, dict[int, list[RunResult]]],
    report: dict[str, Any],
    say: Progress,
) -> None:
    """The alternating runs of a repeat; appends to ``runs``."""
    for mode, concurrencies in turns(config, engines.sharing.kind, repeat):
        if mode in report["errors"]:
            continue
        with engines.leaving_out(mode), engines.turn(mode) as engine:
            for concurrency in concurrencies:
                say(f"{mode}: repeat {repeat + 1} of {config.repeats}, concurrency {concurrency}")
                time.sleep(config.settle_s)
                result = run_prompts(config, engine, prompts, concurrency)
                runs[mode][concurrency].append(result)


def turns(config: BenchConfig, kind: str, repeat: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Who is measured when in a repeat: mode, and what the turn measures. In turn, each mode goes first.

    An engine that is started for its turn measures all concurrencies in it.
    """
    parts = [config.concurrencies] if kind == "restart" else [(c,) for c in config.concurrencies]
    for i, concurrencies in enumerate(parts):
        for mode in rotate(config.modes, repeat + i):
            yield mode, concurrencies


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
