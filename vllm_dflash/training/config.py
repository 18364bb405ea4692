"""Everything a training run can be told, with the paper's defaults."""

from __future__ import annotations

import dataclasses
from dataclasses import asdict, dataclass
from typing import Any, Literal

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
        ema: decay of an exponential moving average of the weights, which is then what is exported;
            0 for none.
        autocast: ``bfloat16`` (fp32 masters) or ``float32``.
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
    ema: float = 0.0
    autocast: str = "bfloat16"
    seed: int = 0
    max_bad: float = 0.1

    def __post_init__(self) -> None:
        choices = {
            "loss": ("dpace", "ce", "kl"),
            "optimizer": ("adamw", "muon"),
            "autocast": ("bfloat16", "float32"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; allowed are {', '.join(allowed)}"
                )
        bounds = {
            "lr": (0, None),
            "clip": (0, None),
            "anchors": (1, None),
            "sequences": (1, None),
            "warmup": (0, 1),
            "min_lr": (0, 1),
            "alpha": (0, 1),
            "ema": (0, 1),
            "max_bad": (0, 1),
        }
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if value < low or (high is not None and value > high):
                raise ValueError(
                    f"{name} is {value!r}; it must be at least {low}"
                    + (f" and at most {high}" if high is not None else "")
                )

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Hyperparameters:
        return cls(**{f.name: raw[f.name] for f in dataclasses.fields(cls) if f.name in raw})

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class DrafterShape:
    """The drafter to make: sizes and layers, with the paper's defaults (arXiv 2602.06036).

    None leaves the verifier's own.

    Attributes:
        hidden_size: another width than the verifier's brings an own embedding and lm_head, which are learned.
        layer_types: ``sliding_attention`` or ``full_attention`` for each layer; None for all full.
        sliding_window: in tokens.
        causal: whether block tokens see only earlier ones; None leaves it to the layer types.
        sample_from_anchor: whether the anchor's own output predicts, so that a block of B drafts B tokens.
    """

    layers: int = 5
    block_size: int = 16
    features: int = 5
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


@dataclass(frozen=True)
class EngineOptions:
    """How the verifier's engine runs while it generates and extracts.

    Attributes:
        max_len: longest conversation in tokens; longer ones are cut (paper: 3072).
        max_num_seqs: requests generated at once.
        max_num_batched_tokens: token budget of an engine step; chunked prefill beyond it.
        tensor_parallel_size: ranks of the verifier, which train together.
        extra: further vLLM ``EngineArgs``; they win over the fields above.

    Raises:
        ValueError: ``extra`` spreads the verifier in a way that training cannot follow.
    """

    dtype: str = "auto"
    max_len: int = 3072
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 4096
    enforce_eager: bool = True
    tensor_parallel_size: int = 1
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
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
