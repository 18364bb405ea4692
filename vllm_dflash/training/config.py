"""Everything a training run can be told, with the paper's defaults."""

from __future__ import annotations

import dataclasses
from dataclasses import asdict, dataclass
from typing import Any, Literal

from vllm_dflash.bounds import (
    DTYPES,
    POSITIVE,
    SHARE,
    Bound,
    check_bounds,
    check_choice,
    count,
)
from vllm_dflash.modeling.losses import LossName

Optimizer = Literal["adamw", "muon"]

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
        lr: peak learning rate (paper: 6e-4).
        warmup: share of all steps spent on linear warm-up.
        min_lr: learning rate at the end of the cosine, as a share of ``lr``.
        clip: largest gradient norm.
        anchors: random anchors taken of each sequence a step (paper: 512).
        sequences: sequences a step.
        loss, gamma, alpha: see :func:`vllm_dflash.modeling.losses.block_loss`; gamma None takes the
            paper's value for the block size.
        codebooks: how a selector's tables learn: ``factored``, as projections of the verifier's, or ``free``.
        ema: decay of an exponential moving average of the weights, which is then what is exported;
            0 for none.
        autocast: ``bfloat16`` (fp32 masters) or ``float32``, which a CPU without bfloat16 instructions takes
            in any case. Muon orthogonalises in the same.
        max_bad: share of the sequences that may be skipped for non-finite values before training stops.
    """

    lr: float = 6e-4
    weight_decay: float = 0.0
    warmup: float = 0.04
    min_lr: float = 0.0
    clip: float = 1.0
    optimizer: Optimizer = "adamw"
    anchors: int = 512
    sequences: int = 1
    loss: LossName = "dpace"
    gamma: float | None = None
    alpha: float = 0.5
    codebooks: str = "factored"
    ema: float = 0.0
    autocast: str = "bfloat16"
    seed: int = 0
    max_bad: float = 0.1

    def __post_init__(self) -> None:
        check_choice("loss", self.loss, ("dpace", "ce", "kl"))
        check_choice("optimizer", self.optimizer, ("adamw", "muon"))
        check_choice("codebooks", self.codebooks, ("factored", "free"))
        check_choice("autocast", self.autocast, ("bfloat16", "float32"))
        bounds = {
            "lr": Bound(above=0, high=10),
            "weight_decay": Bound(low=0, high=100),
            "warmup": SHARE,
            "min_lr": SHARE,
            "clip": POSITIVE,
            "anchors": count(),
            "sequences": count(),
            "gamma": POSITIVE,
            "alpha": SHARE,
            "ema": Bound(low=0, below=1),
            "seed": count(0),
            "max_bad": SHARE,
        }
        check_bounds(self, bounds)
        if self.gamma is not None and self.loss == "dpace":
            raise ValueError(
                f"--gamma {self.gamma:g} is the decay of the losses ce and kl, but --loss is dpace; name one "
                "of the two, or leave --gamma out"
            )

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


@dataclass(frozen=True)
class DrafterShape:
    """The drafter to make: sizes and layers.

    None leaves the paper's default (arXiv 2602.06036), or what the verifier has. Beside a
    drafter to go on from, whose shape stays, what is given must be its shape.

    Attributes:
        layers, block_size, features: 5, 16 and 5 by default.
        hidden_size: another width than the verifier's brings an own embedding and lm_head, which are learned.
        layer_types: ``sliding_attention`` or ``full_attention`` for each layer; None for all full.
        sliding_window: in tokens.
        causal: whether block tokens see only earlier ones; None leaves it to the layer types.
        sample_from_anchor: whether the anchor's own output predicts, so that a block of B drafts B tokens.
        head: ``dflash2``; None for a plain drafter. A plain one to go on from can be given a head.
    """

    layers: int | None = None
    block_size: int | None = None
    features: int | None = None
    target_layer_ids: tuple[int, ...] | None = None
    draft_vocab: int | None = None
    mask_token_id: int | None = None
    intermediate_size: int | None = None
    hidden_size: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    layer_types: tuple[str, ...] | None = None
    sliding_window: int | None = None
    causal: bool | None = None
    sample_from_anchor: bool = False
    head: str | None = None

    def __post_init__(self) -> None:
        if self.head not in (None, "dflash2"):
            raise ValueError(f"--head is {self.head!r}; only dflash2 is known")
        bounds = {
            "layers": count(1, 512),
            "block_size": count(1, 4096),
            "features": count(1, 512),
            "draft_vocab": count(),
            "mask_token_id": count(0),
            "intermediate_size": count(1, 2**20),
            "hidden_size": count(8, 2**17),
            "heads": count(1, 2**12),
            "kv_heads": count(1, 2**12),
            "head_dim": count(2, 2**12),
            "sliding_window": count(),
        }
        check_bounds(self, bounds)
        if self.hidden_size is not None and self.hidden_size % 8:
            raise ValueError(
                f"--hidden-size is {self.hidden_size}; vLLM's kernels want a multiple of 8"
            )
        if self.sliding_window is not None and "sliding_attention" not in (self.layer_types or ()):
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
            layers=5 if self.layers is None else self.layers,
            block_size=16 if self.block_size is None else self.block_size,
            features=5 if self.features is None else self.features,
        )


@dataclass(frozen=True)
class EngineOptions:
    """How the verifier's engine runs while it generates and extracts.

    Attributes:
        max_len: longest conversation in tokens; longer ones are cut (paper: 3072).
        max_num_seqs: requests generated at once.
        max_num_batched_tokens: token budget of an engine step; chunked prefill beyond it.
        enforce_eager: run without CUDA graphs and compilation; None for eager on a CPU only.
        tensor_parallel_size: ranks of the verifier, which train together.
        extra: further vLLM ``EngineArgs``; they win over the fields above.

    Raises:
        ValueError: a value that cannot be, or ``extra`` spreads the verifier in a way that training cannot
            follow.
    """

    dtype: str = "auto"
    max_len: int = 3072
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 4096
    enforce_eager: bool | None = None
    tensor_parallel_size: int = 1
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        check_choice("dtype", self.dtype, DTYPES)
        sizes = count(1, 2**16)
        budget = self.extra.get("max_num_batched_tokens")
        bounds = {
            "max_len": count(),
            "max_num_seqs": sizes,
            "tensor_parallel_size": sizes,
        }
        check_bounds(self, bounds)
        budget = self.max_num_batched_tokens if type(budget) is not int else budget
        if "max_num_seqs" not in self.extra and not 0 < self.max_num_seqs <= budget:
            # vLLM wants a token of each in a step.
            raise ValueError(
                f"--max-num-seqs is {self.max_num_seqs}, above max_num_batched_tokens of --engine-args "
                f"({budget}); lower it, or raise that"
            )
        ranks = self.extra.get("tensor_parallel_size", 1)
        if not sizes.holds(ranks):
            raise ValueError(
                f"--engine-args has tensor_parallel_size {ranks!r}; give {sizes.describe()}"
            )
        for name in _ONE_ONLY:
            if self.extra.get(name, 1) not in (1, None):
                raise ValueError(
                    f"{name} is {self.extra[name]!r}: training runs on the tensor parallel ranks of one "
                    "engine on one machine; use --tensor-parallel-size"
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

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        bounds = {
            "temperature": Bound(low=0, high=100),
            "top_p": Bound(above=0, high=1),
            "top_k": count(-1),  # -1 is vLLM's other word for all
            "max_tokens": count(),
        }
        check_bounds(self, bounds)


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
