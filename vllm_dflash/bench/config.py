"""What a benchmark can be told."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from vllm_dflash.bounds import DTYPES, POSITIVE, Bound, count, int_list, words
from vllm_dflash.config import DrafterConfig
from vllm_dflash.renamed import bench_modes
from vllm_dflash.settings import check, option
from vllm_dflash.training.config import DTYPE_HELP, speculative_tokens

#: All engines at once; weights in host memory between turns (vLLM's sleep mode); one process a turn.
SHARING = ("together", "sleep", "restart")
MODES = ("none", "ngram", "stock", "plugin")
#: Stock with vLLM's adaptive verification, for its V2 runner on a GPU.
ADAPTIVE = "adaptive"
DRAFTER_MODES = frozenset({"stock", "plugin", ADAPTIVE})

_engine = partial(option, panel="Engine")


def _modes(name: str, text: str) -> tuple[str, ...]:
    return bench_modes(words(name, text))


@dataclass
class BenchConfig:
    """One benchmark.

    Attributes:
        verifier: path or hub name of the model that is served.
        drafter: checkpoint folder of the DFlash drafter; needed by ``stock`` and ``plugin``.
        num_speculative_tokens: None reads the drafter's ``config.json``.
        modes: some of :data:`MODES` and :data:`ADAPTIVE`; ratios need ``none``.
        concurrencies: each is measured by itself.
        minutes: after which no further repeat begins that would end later, starting the engines included.
        ignore_eos: generate ``max_tokens`` always. Text after its end tends to repeat, which
            flatters every drafter.
        max_model_len: vLLM stops drafting for a batch that comes within a draft of it. None: see
            :func:`vllm_dflash.bench.runner.run_bench`.
        sharing: one of :data:`SHARING`, or ``auto``.
        prefix_caching: off, so that a repeat does all the work again.
        out_dir: also gets ``logs/<mode>.log``.
        engine_args: further ``AsyncEngineArgs`` of every mode; they win over the fields above.
        env: environment of every engine, e.g. ``VLLM_CPU_OMP_THREADS_BIND``.
        settle_s: pause before each measured run. A vLLM worker goes on polling for its next batch
            for a second after the last one, at the expense of the engine whose turn it is.
        startup_timeout_s: seconds that one engine may take to start.
        run_timeout_s: seconds that one run may take.
    """

    verifier: str
    drafter: str | None = None
    out_dir: Path = option(Path("bench"), "Folder of the report.", "-o", "--output")
    modes: tuple[str, ...] = option(MODES, f"Of {', '.join((*MODES, ADAPTIVE))}.", parse=_modes)
    concurrencies: tuple[int, ...] = option(
        (1, 4), "Requests in flight, comma separated.", "--concurrency", parse=int_list
    )
    num_prompts: int = option(16, "Prompts of a run.", bound=count())
    repeats: int = option(3, "Measured runs of each mode.", bound=count())
    minutes: float | None = option(
        None, "Fewer repeats, at least one, where they would take longer.", bound=POSITIVE
    )
    max_tokens: int = option(128, "Longest response.", bound=count())
    temperature: float = option(0.0, "0 is greedy.", bound=Bound(low=0, high=100))
    ignore_eos: bool = option(False, "Go on to --max-tokens; flatters drafters.")
    num_speculative_tokens: int | None = speculative_tokens()
    dtype: str = _engine("auto", DTYPE_HELP, choices=DTYPES)
    max_model_len: int | None = _engine(
        None, "As vLLM's; leave room for a draft. Default: as prompts need.", bound=count()
    )
    sharing: str = option(
        "auto",
        "Engines on one device: together, sleep or restart between turns, or auto: what fits.",
        choices=("auto", *SHARING),
    )
    enforce_eager: bool = _engine(False, "No compilation: quick start, slow serving.")
    prefix_caching: bool = _engine(False, "Let repeats reuse cached prompts.")
    engine_args: dict[str, Any] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    settle_s: float = option(2.0, bound=Bound(low=0))
    startup_timeout_s: float = option(1800.0, bound=POSITIVE)
    run_timeout_s: float = option(3600.0, bound=POSITIVE)

    def __post_init__(self) -> None:
        known = (*MODES, ADAPTIVE)
        unknown = [m for m in self.modes if m not in known]
        if unknown or not self.modes or len(set(self.modes)) != len(self.modes):
            raise ValueError(
                f"--modes is {','.join(self.modes)!r}; give some of {', '.join(known)}, each once"
            )
        flights = self.concurrencies
        if not flights or len(set(flights)) != len(flights) or not all(map(count().holds, flights)):
            raise ValueError(
                f"--concurrency is {','.join(map(str, flights))!r}; give numbers of at least 1, each once"
            )
        check(self)
        need_drafter = sorted(DRAFTER_MODES & set(self.modes))
        if self.drafter is None and need_drafter:
            raise ValueError(
                f"modes {need_drafter} need a drafter and none is given; name a checkpoint folder "
                "or measure only none and ngram"
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
