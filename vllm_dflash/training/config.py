"""Everything a training run can be told, with the paper's defaults.

The command line is made of these fields, see :mod:`vllm_dflash.settings`; nothing here needs torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import MISSING, asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, get_args

from vllm_dflash.bounds import (
    DTYPES,
    POSITIVE,
    SHARE,
    Bound,
    count,
    int_list,
    json_object,
    one_or_all,
    words,
)
from vllm_dflash.config import FULL, SLIDING, CheckpointFormat
from vllm_dflash.modeling.loss_kinds import LOSSES, Loss
from vllm_dflash.settings import check, option
from vllm_dflash.training.rows import Data, data_files
from vllm_dflash.verifier import Verifier

_data, _responses = partial(option, panel="Data"), partial(option, panel="Responses")
_drafter, _training = partial(option, panel="Drafter"), partial(option, panel="Training")
_engine = partial(option, panel="Engine")

# Options of several commands.
DTYPE_HELP = (
    "The verifier's, as vLLM's --dtype; on a CPU without bfloat16 instructions auto is float32."
)
_DATA = partial(
    _data,
    MISSING,
    "JSONL, JSON or Parquet of messages, ShareGPT, prompts or logged requests: a file, a folder, a "
    "pattern, or a Hugging Face data set (org/name:split, org/name/subset:split). May be repeated.",
    parse=one_or_all,
    given_as=list[str],
)
_ON_POLICY = partial(_data, False, "Trust the responses in the data.")
_RESPONSES = partial(_responses, None, "Keep generated responses here and reuse them.")
_LIMIT = partial(_data, None, "Use only the first usable conversations.", bound=count())
_MAX_REJECTED = partial(
    _data, 0.5, "Share of the rows that may be rejected; 1 allows all.", bound=SHARE
)
_TEMPLATE_KWARGS = partial(
    _data,
    None,
    "JSON of chat_template_kwargs, as the server uses them (thinking mode...).",
    parse=lambda name, text: json_object(name, text) or None,
)
speculative_tokens = partial(
    _drafter,
    None,
    "Draft tokens a step. Default: all of a block.",
    "-k",
    "--num-speculative-tokens",
    bound=count(),
)

#: vLLM's ways to spread a model that training does not follow.
_ONE_ONLY = (
    "pipeline_parallel_size",
    "data_parallel_size",
    "prefill_context_parallel_size",
    "decode_context_parallel_size",
    "nnodes",
)


@dataclass(frozen=True)
class Hyperparameters:
    """What decides the trained weights, given the examples. Sent to the worker as a plain dict.

    Attributes:
        lr, num_anchors: the paper's.
        warmup_ratio: linear, before a cosine down to ``min_lr``.
        loss, gamma, alpha: see :func:`vllm_dflash.modeling.losses.block_loss`; gamma None takes the
            paper's value for the block size.
        ema_decay: the averaged weights are then what is exported.
        autocast: ``bfloat16`` keeps fp32 masters. Muon orthogonalises in the same.
        half_blocks: see :meth:`vllm_dflash.training.learner.Learner.halves_blocks`.
        max_skipped: more sequences with non-finite values than this stop the training.
    """

    lr: float = _training(6e-4, "Peak learning rate.", bound=Bound(above=0, high=10))
    weight_decay: float = _training(
        0.0, "Decay of the matrices, times the rate.", bound=Bound(low=0, high=100)
    )
    warmup_ratio: float = _training(0.04, "Share of the steps.", bound=SHARE)
    min_lr: float = _training(0.0, "End of the cosine, share of --lr.", bound=SHARE)
    max_grad_norm: float = _training(1.0, "Largest norm of the gradient.", bound=POSITIVE)
    optimizer: str = _training("adamw", "adamw or muon.", choices=("adamw", "muon"))
    num_anchors: int = _training(512, "Random anchors of a sequence.", bound=count())
    batch_size: int = _training(1, "Sequences of a step.", bound=count())
    half_blocks: float = _training(
        0.5,
        "Share of the steps, the first ones, with half blocks and twice the anchors.",
        bound=SHARE,
    )
    loss: str = _training("dpace", "dpace, ce or kl.", choices=tuple(LOSSES))
    gamma: float | None = _training(None, "Decay of ce and kl.", bound=POSITIVE)
    alpha: float = _training(0.5, "Smoothing of dpace.", bound=SHARE)
    codebooks: str = _training(
        "factored",
        "Of a head: factored (from the verifier's tables) or free.",
        choices=("factored", "free"),
    )
    ema_decay: float = _training(
        0.0, "Decay of averaged weights; 0 for none.", bound=Bound(low=0, below=1)
    )
    autocast: str = _training(
        "bfloat16",
        "bfloat16 (if the device has instructions for it) or float32.",
        choices=("bfloat16", "float32"),
    )
    seed: int = _training(0, "Of initial weights, order and anchors.", bound=count(0))
    max_skipped: float = _training(0.1, "Share of sequences that may be skipped.", bound=SHARE)

    def __post_init__(self) -> None:
        check(self)
        if self.gamma is not None and not self.loss_kind.decays:
            raise ValueError(
                f"--gamma {self.gamma:g} is the decay of the losses ce and kl, but --loss is {self.loss}; "
                "name one of the two, or leave --gamma out"
            )

    @property
    def loss_kind(self) -> Loss:
        return LOSSES[self.loss]

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Hyperparameters:
        return cls(**{f.name: raw[f.name] for f in dataclasses.fields(cls) if f.name in raw})

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class StepLayout:
    """How a step is run where memory is short. It changes a step's result by rounding only.

    Attributes:
        anchors_in_flight: anchors whose activations are alive at once; a step of more adds up its parts'
            gradients. None for all.
        checkpoint_mlps: compute the layers' MLPs again in the backward pass, and keep nothing of them.
    """

    anchors_in_flight: int | None = None
    checkpoint_mlps: bool = False


def _layer_types(name: str, text: str) -> tuple[str, ...]:
    kinds = {"sliding": SLIDING, "full": FULL}
    try:
        return tuple(kinds[word] for word in words(name, text))
    except KeyError as error:
        raise ValueError(
            f"{name} is {text!r}; give sliding or full for each layer, separated by commas"
        ) from error


@dataclass(frozen=True)
class DrafterShape:
    """The drafter to make: sizes and layers.

    None leaves the paper's default (arXiv 2602.06036), or what the verifier has. Beside a
    drafter to go on from, whose shape stays, what is given must be its shape.

    Attributes:
        hidden_size: another width than the verifier's brings an own embedding and lm_head, which are learned.
        layer_types: ``sliding_attention`` or ``full_attention`` for each layer; None for all full.
        causal: None leaves it to the layer types.
        sample_from_anchor: whether the anchor's own output predicts.
    """

    num_layers: int | None = _drafter(None, "Draft layers. Default: 5.", bound=count(1, 512))
    block_size: int | None = _drafter(
        None, "Draft block, anchor included. Default: 16.", bound=count(1, 4096)
    )
    num_target_layers: int | None = _drafter(
        None, "How many verifier layers to read. Default: 5.", bound=count(1, 512)
    )
    target_layer_ids: tuple[int, ...] | None = _drafter(
        None, "Which ones, 0-based, comma separated.", parse=int_list
    )
    draft_vocab: int | None = _drafter(
        None, "Draft only the N tokens the verifier uses most.", bound=count()
    )
    mask_token_id: int | None = _drafter(None, "Default: a reserved token.", bound=count(0))
    intermediate_size: int | None = _drafter(
        None, "Default: the verifier's.", bound=count(1, 2**20)
    )
    hidden_size: int | None = _drafter(
        None,
        "Default: the verifier's, whose embedding is then shared.",
        bound=count(8, 2**17),
    )
    num_heads: int | None = _drafter(None, "Default: the verifier's.", bound=count(1, 2**12))
    num_kv_heads: int | None = _drafter(None, "Default: the verifier's.", bound=count(1, 2**12))
    head_dim: int | None = _drafter(None, "Default: the verifier's.", bound=count(2, 2**12))
    sliding_window: int | None = _drafter(
        None, "In tokens, of the layers that --layer-types calls sliding.", bound=count()
    )
    layer_types: tuple[str, ...] | None = _drafter(
        None,
        "sliding or full for each layer, comma separated. Default: all full.",
        parse=_layer_types,
    )
    causal: bool | None = _drafter(
        None, "Block tokens see only earlier ones. Default: in sliding layers."
    )
    sample_from_anchor: bool = _drafter(False, "A block of B drafts B tokens, not B - 1.")
    head: str | None = _drafter(
        None, "dflash2: make blocks coherent by DFlash 2's head. Default: none."
    )

    def __post_init__(self) -> None:
        check(self)
        if self.head not in (None, "dflash2"):
            raise ValueError(f"--head is {self.head!r}; only dflash2 is known")
        if self.hidden_size is not None and self.hidden_size % 8:
            raise ValueError(
                f"--hidden-size is {self.hidden_size}; vLLM's kernels want a multiple of 8"
            )
        if self.sliding_window is not None and SLIDING not in (self.layer_types or ()):
            raise ValueError(
                f"--sliding-window is {self.sliding_window}, but --layer-types names no sliding layer; give "
                "both or none"
            )

    def given(self) -> dict[str, Any]:
        """The fields that are set."""
        return {k: v for k, v in asdict(self).items() if v is not None and v is not False}

    def with_defaults(self) -> DrafterShape:
        """The same with the paper's values where none are given."""
        return dataclasses.replace(
            self,
            num_layers=5 if self.num_layers is None else self.num_layers,
            block_size=16 if self.block_size is None else self.block_size,
            num_target_layers=5 if self.num_target_layers is None else self.num_target_layers,
        )


_SIZES = count(1, 2**16)


@dataclass(frozen=True)
class EngineOptions:
    """How the verifier's engine runs while it generates and extracts.

    Attributes:
        max_len: longer conversations are cut; the paper's.
        max_num_batched_tokens: token budget of an engine step; chunked prefill beyond it.
        enforce_eager: run without CUDA graphs and compilation; None for eager on a CPU only.
        tensor_parallel_size: the ranks train together.
        extra: further vLLM ``EngineArgs``; they win over the fields above.

    Raises:
        ValueError: a value that cannot be, or ``extra`` spreads the verifier in a way that training cannot
            follow.
    """

    dtype: str = _engine("auto", DTYPE_HELP, choices=DTYPES)
    max_len: int = _data(3072, "Longest conversation in tokens.", bound=count())
    max_num_seqs: int = _responses(256, "Responses generated at once.", bound=_SIZES)
    max_num_batched_tokens: int = 4096
    enforce_eager: bool | None = None
    tensor_parallel_size: int = _engine(
        1, "Ranks of the verifier, as vLLM's --tensor-parallel-size.", bound=_SIZES
    )
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check(self)
        budget = self.extra.get("max_num_batched_tokens")
        budget = self.max_num_batched_tokens if type(budget) is not int else budget
        if "max_num_seqs" not in self.extra and not 0 < self.max_num_seqs <= budget:
            # vLLM wants a token of each in a step.
            raise ValueError(
                f"--max-num-seqs is {self.max_num_seqs}, above max_num_batched_tokens of --engine-args "
                f"({budget}); lower it, or raise that"
            )
        ranks = self.extra.get("tensor_parallel_size", 1)
        if not _SIZES.holds(ranks):
            raise ValueError(
                f"--engine-args has tensor_parallel_size {ranks!r}; give {_SIZES.describe()}"
            )
        for name in _ONE_ONLY:
            if self.extra.get(name, 1) not in (1, None):
                raise ValueError(
                    f"{name} is {self.extra[name]!r}: training spreads over this machine by "
                    "--tensor-parallel-size, and with train by --data-parallel-size; use those"
                )
        backend = self.extra.get("distributed_executor_backend")
        if backend not in (None, "mp", "uni"):
            raise ValueError(
                f"distributed_executor_backend is {backend!r}: training runs in vLLM's own worker processes; "
                "leave it out"
            )

    @property
    def ranks(self) -> int:
        """Workers of the engine."""
        return int(self.extra.get("tensor_parallel_size", self.tensor_parallel_size))


@dataclass(frozen=True)
class SamplingOptions:
    """How responses are generated: as production will sample them."""

    temperature: float = _responses(0.0, "Of regenerated responses.", bound=Bound(low=0, high=100))
    top_p: float = _responses(1.0, "Of regenerated responses.", bound=Bound(above=0, high=1))
    # -1 is vLLM's other word for all
    top_k: int = _responses(0, "Of regenerated responses; 0 for all tokens.", bound=count(-1))
    max_tokens: int = option(1024, None, "--max-tokens", bound=count())
    seed: int = 0

    def __post_init__(self) -> None:
        check(self)


def response_limit(max_tokens: int | None, max_len: int) -> int:
    """Most tokens of a response; the default where none is given, which ``max_len`` may cut.

    Raises:
        ValueError: the given number leaves no room for a prompt.
    """
    if max_tokens is None:
        return SamplingOptions.max_tokens
    if max_tokens >= max_len > 0:
        raise ValueError(
            f"--max-tokens {max_tokens} leaves no room for a prompt in --max-len {max_len}; lower one or "
            "raise the other"
        )
    return max_tokens


@dataclass(frozen=True)
class TrainConfig:
    """A training run.

    Attributes:
        verifier: the model, and how it is loaded and served.
        data: prompts or conversations (training/conversations.py lists the formats), one name or several.
        output: folder of the finished drafter; the run's own folder is ``<output>-run``.
        responses: by default the run folder keeps them; those of ``eval_data`` stand beside the file.
        feature_gib: beyond it features are extracted again. The default is taken when a run is first started.
            Replicas share it, so that a run may go on with more of them.
        data_parallel_size: a run may be resumed with another one.
        max_rejected: share of the rows of the data, and of the held-out data.
    """

    verifier: Verifier
    data: Data = _DATA()
    output: Path = option(MISSING, "Folder of the drafter.", "-o", "--output")
    eval_data: Data | None = _data(
        None,
        "Held-out conversations; default: a part of the data.",
        parse=one_or_all,
        given_as=list[str],
    )
    holdout: float = _data(
        0.05, "Share kept back without --eval-data.", bound=Bound(low=0, below=1)
    )
    max_holdout: int = option(64, bound=count(0))
    init_from: str | None = _drafter(None, "Fine-tune this drafter.")
    epochs: float = _training(6.0, "Passes over the data.", bound=Bound(above=0, high=100_000))
    max_steps: int | None = _training(
        None, "Steps in all, whatever --epochs says.", bound=count(1, 100_000_000)
    )
    on_policy: bool = _ON_POLICY()
    responses: Path | None = _RESPONSES()
    chat_template_kwargs: dict[str, Any] | None = _TEMPLATE_KWARGS()
    limit: int | None = _LIMIT()
    max_rejected: float = _MAX_REJECTED()
    feature_gib: float | None = _training(
        None,
        "Host memory for features of each tensor parallel rank, which replicas share. Default: half of what "
        "is available, shared by the ranks.",
        bound=Bound(above=0, high=2**20),
    )
    cache_features: Path | None = _training(
        None, "Keep features on disk for later epochs and runs."
    )
    features_from: str = _training(
        "extraction",
        "extraction, or generation: recorded while responses are generated.",
        choices=("extraction", "generation"),
    )
    eval_every: int | None = _training(
        None, "Steps between evaluations. Default: by time, 5 % of it at most.", bound=count()
    )
    save_minutes: float = _training(
        5.0,
        "Minutes between saved states; up to 12 times as many if saving takes over 3 % of the time.",
        bound=Bound(low=0),
    )
    checkpoint_format: CheckpointFormat = _drafter(
        "zlab", "zlab or speculators.", choices=get_args(CheckpointFormat)
    )
    data_parallel_size: int = _engine(
        1, "Replicas of the verifier on this machine, which train together.", bound=count(1, 2**10)
    )
    tensorboard: bool = _training(False, "Also log for TensorBoard in the run folder.")
    restart: bool = _training(False, "Discard an earlier run of this output.")
    shape: DrafterShape = field(default_factory=DrafterShape)
    hparams: Hyperparameters = field(default_factory=Hyperparameters)
    engine: EngineOptions = field(default_factory=EngineOptions)
    sampling: SamplingOptions = field(default_factory=SamplingOptions)

    def __post_init__(self) -> None:
        check(self)
        _check_responses(self.responses, self.on_policy)
        if self.records and self.on_policy:
            raise ValueError(
                "--features-from generation records while responses are generated, but --on-policy generates "
                "none; leave one out"
            )
        if self.records and self.data_parallel_size > 1:
            raise ValueError(
                f"--features-from generation with --data-parallel-size {self.data_parallel_size}: a replica "
                "would record what another one trains on; leave one out"
            )

    @property
    def ranks(self) -> int:
        """Workers that train together: those of all replicas."""
        return self.data_parallel_size * self.engine.ranks

    @property
    def records(self) -> bool:
        """Whether features are recorded while responses are generated."""
        return self.features_from == "generation"

    @property
    def run_path(self) -> Path:
        return self.output.with_name(self.output.name + "-run")

    @property
    def rejected_beside(self) -> Path:
        """Where rejected rows are kept of data that no run can begin with."""
        return self.output.with_name(self.output.name + "-rejected.jsonl")

    def identity(self) -> dict[str, Any]:
        """What decides the weights, flat: a run is resumed only with the same."""
        out: dict[str, Any] = self.verifier.identity()
        for name in (
            "data eval_data holdout max_holdout epochs max_steps on_policy init_from "
            "chat_template_kwargs limit feature_gib"
        ).split():
            out[name] = getattr(self, name)
        if self.records:  # runs of before there was a choice can be resumed without
            out["features_from"] = self.features_from
        for name in ("data", "eval_data"):
            files = data_files(getattr(self, name) or [])
            if files:
                out[f"{name}_sha256"] = _digest(files)
        parts: dict[str, Any] = {
            "shape": self.shape.with_defaults(),
            "hparams": self.hparams,
            "engine": self.engine,
            "sampling": self.sampling,
        }
        for name, part in parts.items():
            out |= {f"{name}.{k}": v for k, v in asdict(part).items()}
        return out


def _check_responses(responses: Path | None, on_policy: bool) -> None:
    if on_policy and responses is not None:
        raise ValueError(
            f"--responses {responses} keeps generated responses, but --on-policy generates none; "
            "leave one out"
        )


def _digest(files: list[Path]) -> str:
    """SHA-256 of a file; of several, that of their digests."""
    digests = []
    for file in files:
        digest = hashlib.sha256()
        with file.open("rb") as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
        digests.append(digest.hexdigest())
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


@dataclass(frozen=True)
class EvalConfig:
    """What to evaluate.

    Attributes:
        num_speculative_tokens: None takes the drafter's own.
        on_policy: else the verifier answers greedily.
        through_engine: also serve the prompts and read vLLM's own counters.
        responses: a second evaluation reuses them.
        rejected: file that gets the rows that are not used; None keeps none.
        page: HTML file that gets a few responses, marked with what each draft brought; None writes none.
    """

    verifier: Verifier
    drafter: str
    data: Data = _DATA()
    num_speculative_tokens: int | None = speculative_tokens()
    on_policy: bool = _ON_POLICY()
    through_engine: bool = option(
        False, "Also serve the prompts and read vLLM's counters.", "--engine"
    )
    concurrency: int = option(4, "Requests in flight of --engine.", bound=count(1, 2**16))
    responses: Path | None = _RESPONSES()
    chat_template_kwargs: dict[str, Any] | None = _TEMPLATE_KWARGS()
    limit: int | None = _LIMIT()
    max_rejected: float = _MAX_REJECTED()
    rejected: Path | None = None
    page: Path | None = option(
        None, "A page of responses that shows where each draft ended.", "--html"
    )
    engine: EngineOptions = field(default_factory=EngineOptions)
    max_tokens: int = option(1024, None, "--max-tokens", bound=count())

    def __post_init__(self) -> None:
        check(self)
        _check_responses(self.responses, self.on_policy)
