"""The drafter's configuration, in both public checkpoint formats.

This is the one home of every id and size conversion of the field (see docs/user/glossary.md):

* ``target_layer_ids`` (z-lab) are 0-based decoder layers whose *output* is read;
  ``aux_hidden_state_layer_ids`` (speculators, vLLM) index Hugging Face's ``hidden_states``, where
  0 is the embedding, so they are one larger: :func:`hidden_state_index`.
* ``draft_block_size`` counts the anchor, ``num_speculative_tokens`` does not (unless the drafter
  samples from its anchor).

Neither torch nor vllm is imported here: the plugin reads configurations in every vLLM process.
:mod:`vllm_dflash.config_formats` reads and writes the files.
"""

from __future__ import annotations

import reprlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

CheckpointFormat = Literal["zlab", "speculators"]
SLIDING = "sliding_attention"
FULL = "full_attention"


def quoted(value: Any) -> str:
    """A value for a message, cut where it is long."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 60
    short.maxlist = 24
    return short.repr(value)


def hidden_state_index(target_layer_id: int) -> int:
    """Index into Hugging Face's ``hidden_states`` (and vLLM's aux layer id) of a layer's output."""
    return target_layer_id + 1


def target_layer_id(hidden_state_idx: int) -> int:
    """Inverse of :func:`hidden_state_index`."""
    return hidden_state_idx - 1


def default_target_layer_ids(num_verifier_layers: int, num_features: int = 5) -> tuple[int, ...]:
    """Layers spread evenly from the 2nd to the third-to-last (arXiv 2602.06036, section 3).

    A verifier with fewer eligible layers than ``num_features`` gives one feature per eligible
    layer; one too small to have two eligible layers lends all of its layers.
    """
    if num_verifier_layers < 1:
        raise ValueError(f"the verifier has {num_verifier_layers} layers; at least 1 is needed")
    if num_features < 1:
        raise ValueError(f"{num_features} features asked for; a drafter needs at least 1")
    start, end = min(1, num_verifier_layers - 1), max(num_verifier_layers - 3, 0)
    if end <= start:
        start, end = 0, num_verifier_layers - 1
    count = min(num_features, end - start + 1)
    if count == 1:
        return (end,)
    step = (end - start) / (count - 1)
    return tuple(sorted({round(start + i * step) for i in range(count)}))


def _setting(config: Any, name: str) -> Any:
    """One value of a transformers config, None where absent; the largest where layers have their own."""
    try:
        value = getattr(config, name, None)
    except RuntimeError:
        # transformers will not say which layer's is meant; the file has the common one.
        value = config.to_dict().get(name)
    return max(value) if isinstance(value, (list, tuple)) else value


@dataclass(frozen=True)
class VerifierInfo:
    """What a drafter must agree with, read from the verifier's ``config.json``.

    Attributes:
        hidden_size: width of the verifier's residual stream.
        num_hidden_layers: number of decoder layers.
        vocab_size: rows of the verifier's embedding.
        pad_token_id: the padding token, which must not be the mask token; None when unset.
        eos_token_ids: tokens that end a text, by the model's configuration.
        name: path or hub name, for messages.
    """

    hidden_size: int
    num_hidden_layers: int
    vocab_size: int
    pad_token_id: int | None = None
    name: str = "verifier"
    eos_token_ids: frozenset[int] = frozenset()

    @classmethod
    def from_hf_config(cls, config: Any, name: str = "verifier") -> VerifierInfo:
        """From a transformers config; multimodal configs are read through their text config."""
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        pad = getattr(text, "pad_token_id", None)
        if pad is None:
            pad = getattr(config, "pad_token_id", None)
        eos = getattr(text, "eos_token_id", None)
        if eos is None:
            eos = getattr(config, "eos_token_id", None)
        return cls(
            hidden_size=int(text.hidden_size),
            num_hidden_layers=int(text.num_hidden_layers),
            vocab_size=int(text.vocab_size),
            pad_token_id=pad if isinstance(pad, int) and pad >= 0 else None,
            name=name,
            eos_token_ids=frozenset(eos if isinstance(eos, list | tuple) else [eos]) - {None},
        )


@dataclass(frozen=True)
class CandidateHead:
    """What DFlash 2 has beside DFlash (:mod:`vllm_dflash.modeling.dflash2`).

    Attributes:
        conv_kernel_size: taps of the convolutions, a token's own included.
        conv_group_size: channels that share what is projected to their kernels.
        selector_rank: width of the selector's codebooks.
        selector_top_k: candidates of a position.
    """

    conv_kernel_size: int = 2
    conv_group_size: int = 16
    selector_rank: int = 256
    selector_top_k: int = 16

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**16:
                raise ValueError(
                    f"drafter config: {name} is {quoted(value)}; a positive integer below 2^16 is needed"
                )

    @classmethod
    def for_width(cls, hidden_size: int, **changes: Any) -> CandidateHead:
        """One for a drafter of that width: the published rank is 256, at widths of 2,048 and more."""
        return cls(selector_rank=max(16, min(256, hidden_size // 128 * 16)), **changes)


@dataclass(frozen=True)
class DrafterConfig:
    """One DFlash drafter.

    Sizes are in elements, ids are token or layer ids. ``layer_types`` is None for all-full
    attention; ``causal`` is None when each layer type decides (sliding layers causal, full layers
    bidirectional inside the block: ``_dflash_layer_causal`` in vLLM's ``qwen3_dflash.py``).
    ``draft_block_size`` is None where the file leaves it to the server's ``num_speculative_tokens``.
    ``head`` makes it a DFlash 2 drafter.
    ``remarks`` are what a reader of the file should know; they decide nothing.
    """

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    draft_block_size: int | None
    target_layer_ids: tuple[int, ...]
    mask_token_id: int
    num_target_layers: int | None = None
    target_hidden_size: int | None = None
    draft_vocab_size: int | None = None
    rms_norm_eps: float = 1e-6
    rope_parameters: dict[str, Any] = field(default_factory=lambda: {"rope_type": "default"})
    max_position_embeddings: int = 32768
    hidden_act: str = "silu"
    attention_bias: bool = False
    is_neox_style: bool = True
    layer_types: tuple[str, ...] | None = None
    sliding_window: int | None = None
    causal: bool | None = None
    sample_from_anchor: bool = False
    head: CandidateHead | None = None
    verifier: str | None = None
    dtype: str = "bfloat16"
    serve_only: dict[str, Any] = field(default_factory=dict)
    remarks: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        positive = (
            "hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
            "intermediate_size vocab_size max_position_embeddings"
        ).split()
        # Those that may be unset.
        positive += [
            name
            for name in (
                "draft_block_size",
                "target_hidden_size",
                "num_target_layers",
                "sliding_window",
            )
            if getattr(self, name) is not None
        ]
        for name in positive:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
                key = "block_size" if name == "draft_block_size" else name
                raise ValueError(
                    f"drafter config: {key} is {quoted(value)}; a positive integer below 2^31 is needed"
                )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"drafter config: num_attention_heads ({self.num_attention_heads}) is not a "
                f"multiple of num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise ValueError(f"drafter config: head_dim is {self.head_dim}; rotary needs it even")
        if self.draft_block_size == 1 and not self.sample_from_anchor:
            raise ValueError(
                f"drafter config: block_size is {self.draft_block_size}; it counts the anchor, so "
                "a block that drafts anything has at least 2"
            )
        ids = self.target_layer_ids
        if not ids or any(not isinstance(i, int) or i < 0 for i in ids):
            raise ValueError(
                f"drafter config: target_layer_ids is {quoted(list(ids))}; 0-based layer ids needed"
            )
        if list(ids) != sorted(set(ids)):
            # vLLM sorts and de-duplicates aux layers (interfaces.py), which permutes fc's input.
            raise ValueError(
                f"drafter config: target_layer_ids {quoted(list(ids))} must be ascending and distinct, "
                "since vLLM concatenates the features in ascending order"
            )
        if not isinstance(self.mask_token_id, int) or not 0 <= self.mask_token_id < self.vocab_size:
            raise ValueError(
                f"drafter config: mask_token_id is {quoted(self.mask_token_id)}; it must be a token id "
                f"below vocab_size ({self.vocab_size})"
            )
        if self.draft_vocab_size is not None and not 1 <= self.draft_vocab_size <= self.vocab_size:
            raise ValueError(
                f"drafter config: draft_vocab_size is {quoted(self.draft_vocab_size)}, outside "
                f"1..vocab_size ({self.vocab_size})"
            )
        if self.head is not None:
            self._check_head(self.head)
        if self.layer_types is not None:
            unknown = sorted(set(self.layer_types) - {SLIDING, FULL})
            if unknown:
                raise ValueError(
                    f"drafter config: layer_types has {quoted(unknown)}; only {SLIDING!r} and {FULL!r} "
                    "exist"
                )
            if len(self.layer_types) != self.num_hidden_layers:
                raise ValueError(
                    f"drafter config: layer_types names {len(self.layer_types)} layers, "
                    f"num_hidden_layers is {self.num_hidden_layers}"
                )

    def _check_head(self, head: CandidateHead) -> None:
        if self.hidden_size % head.conv_group_size:
            raise ValueError(
                f"drafter config: conv_group_size ({head.conv_group_size}) does not divide hidden_size "
                f"({self.hidden_size})"
            )
        if head.selector_top_k > self.logits_vocab_size:
            raise ValueError(
                f"drafter config: selector_top_k is {head.selector_top_k}, more than the "
                f"{self.logits_vocab_size} tokens that are drafted from"
            )
        block_size = self.draft_block_size
        if block_size is not None and head.conv_kernel_size > block_size:
            raise ValueError(
                f"drafter config: conv_kernel_size ({head.conv_kernel_size}) is above block_size "
                f"({block_size})"
            )

    # -- derived ---------------------------------------------------------------------------------

    @property
    def num_speculative_tokens(self) -> int | None:
        """Draft tokens a block yields: the anchor predicts nothing unless it is sampled from.

        None where the file states no block size.
        """
        if self.draft_block_size is None:
            return None
        return self.draft_block_size if self.sample_from_anchor else self.draft_block_size - 1

    def block_size_for(self, num_speculative_tokens: int) -> int:
        """Tokens of a block that drafts so many, the anchor included."""
        return num_speculative_tokens + (not self.sample_from_anchor)

    def known_block_size(self, why: str) -> int:
        """``draft_block_size``; ValueError where the file does not state it."""
        if self.draft_block_size is None:
            raise ValueError(f"drafter config: block_size is missing from config.json; {why}")
        return self.draft_block_size

    @property
    def aux_hidden_state_layer_ids(self) -> tuple[int, ...]:
        """Target layers as vLLM and speculators number them."""
        return tuple(hidden_state_index(i) for i in self.target_layer_ids)

    @property
    def num_features(self) -> int:
        """Width of a context token's features, L*H: the input size of ``fc``."""
        return len(self.target_layer_ids) * self.verifier_hidden_size

    @property
    def verifier_hidden_size(self) -> int:
        """Width of the verifier's residual stream, embedding and lm_head."""
        return self.target_hidden_size or self.hidden_size

    @property
    def has_own_vocab_weights(self) -> bool:
        """Whether it cannot share the verifier's embedding and lm_head, being of another width."""
        return self.target_hidden_size not in (None, self.hidden_size)

    @property
    def logits_vocab_size(self) -> int:
        return self.draft_vocab_size or self.vocab_size

    @property
    def has_draft_vocab(self) -> bool:
        return self.draft_vocab_size is not None and self.draft_vocab_size != self.vocab_size

    @property
    def rope_theta(self) -> float:
        # 1e6 is vLLM's default for DFlash (set_default_rope_theta in qwen3_dflash.py).
        return float(self.rope_parameters.get("rope_theta", 1_000_000.0))

    def layer_window(self, layer_idx: int) -> int | None:
        """Sliding window of a draft layer in tokens, None for full attention."""
        if self.layer_types is None or self.layer_types[layer_idx] == FULL:
            return None
        return self.sliding_window

    def layer_causal(self, layer_idx: int) -> bool:
        """Whether a block token sees only earlier block tokens (vLLM ``_dflash_layer_causal``)."""
        if self.causal is not None:
            return self.causal
        return self.layer_types is not None and self.layer_types[layer_idx] == SLIDING

    # -- agreement with a verifier ---------------------------------------------------------------

    def check_windows(self) -> None:
        """Raises ValueError for sliding layers without a window, which vLLM refuses."""
        if SLIDING in (self.layer_types or ()) and not self.sliding_window:
            raise ValueError(
                "drafter config: layer_types has sliding layers but there is no window: give sliding_window, "
                "in tokens, with use_sliding_window true (without that flag transformers' Qwen3Config "
                "drops it), or dflash_config.swa_window_size"
            )

    def verifier_remarks(self, verifier: VerifierInfo) -> list[str]:
        """What differs between the two and still is served."""
        remarks = []
        if self.num_target_layers not in (None, verifier.num_hidden_layers):
            remarks.append(
                f"it was trained for {self.num_target_layers} verifier layers, {verifier.name} has "
                f"{verifier.num_hidden_layers}"
            )
        if self.vocab_size < verifier.vocab_size:
            remarks.append(
                f"its vocabulary has {self.vocab_size} tokens, that of {verifier.name} "
                f"{verifier.vocab_size}: it drafts none of the others"
            )
        if self.mask_token_id in verifier.eos_token_ids:
            remarks.append(
                f"its mask token {self.mask_token_id} is one that ends the texts of {verifier.name}, "
                "which costs acceptance; a reserved token serves better"
            )
        return remarks

    def check_verifier(self, verifier: VerifierInfo) -> None:
        """Raises ValueError, naming both sides, where drafter and verifier cannot work together."""
        self.check_windows()
        problems = []
        too_deep = [i for i in self.target_layer_ids if i >= verifier.num_hidden_layers]
        if too_deep:
            problems.append(
                f"target_layer_ids {too_deep} do not exist (the verifier has layers "
                f"0..{verifier.num_hidden_layers - 1})"
            )
        width = self.target_hidden_size or self.hidden_size
        if width != verifier.hidden_size:
            problems.append(
                f"it reads features of width {width}, the verifier's hidden size is "
                f"{verifier.hidden_size}"
            )
        # One with an embedding of its own must know every token that the verifier may write.
        own_rows = self.has_own_vocab_weights and self.vocab_size < verifier.vocab_size
        if self.vocab_size > verifier.vocab_size or own_rows:
            problems.append(
                f"its vocabulary has {self.vocab_size} tokens, the verifier's {verifier.vocab_size}"
            )
        if self.mask_token_id == verifier.pad_token_id:
            problems.append(
                f"mask_token_id {self.mask_token_id} is the verifier's pad token, which ruins "
                "acceptance; retrain with a reserved token (--mask-token-id)"
            )
        if problems:
            raise ValueError(
                f"this drafter does not fit the verifier {verifier.name}: " + "; ".join(problems)
            )

    def check_ranks(self, tensor_parallel_size: int) -> None:
        """Raises ValueError where vLLM cannot shard the drafter over so many ranks."""
        ranks, kv_heads = tensor_parallel_size, self.num_key_value_heads
        problems = []
        if self.num_attention_heads % ranks:
            problems.append(f"{self.num_attention_heads} attention heads")
        # Fewer key/value heads than ranks are replicated.
        if kv_heads % ranks and ranks % kv_heads:
            problems.append(f"{kv_heads} key/value heads")
        if self.intermediate_size % ranks:
            problems.append(f"an MLP of width {self.intermediate_size}")
        if problems:
            raise ValueError(
                f"this drafter cannot be split over --tensor-parallel-size {ranks}: it has "
                f"{', '.join(problems)}. Serve with fewer ranks, or train one of another shape"
            )

    # -- files -----------------------------------------------------------------------------------

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> DrafterConfig:
        """Reads either public format; see :func:`vllm_dflash.config_formats.read`."""
        from vllm_dflash.config_formats import read

        return read(raw)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> DrafterConfig:
        """Reads ``config.json`` of a checkpoint folder or hub name."""
        from vllm_dflash.checkpoint import read_config

        return cls.from_dict(read_config(path))

    def to_dict(self, fmt: CheckpointFormat = "zlab") -> dict[str, Any]:
        """``config.json`` in the given format, loadable by stock vLLM."""
        from vllm_dflash.config_formats import write

        return write(self, fmt)

    # -- making ----------------------------------------------------------------------------------

    @classmethod
    def for_verifier(
        cls,
        hf_config: Any,
        *,
        mask_token_id: int,
        name: str | None = None,
        num_hidden_layers: int = 5,
        draft_block_size: int = 16,
        target_layer_ids: tuple[int, ...] | None = None,
        num_features: int = 5,
        draft_vocab_size: int | None = None,
        dtype: str = "bfloat16",
        **changes: Any,
    ) -> DrafterConfig:
        """A drafter of the verifier's own width and head shape, with the paper's defaults.

        Args:
            changes: other fields to set (``hidden_size``, ``layer_types``, ...); None leaves the default.
        """
        info = VerifierInfo.from_hf_config(hf_config, name or "verifier")
        text = hf_config.get_text_config() if hasattr(hf_config, "get_text_config") else hf_config
        heads = int(_setting(text, "num_attention_heads"))
        head_dim = int(_setting(text, "head_dim") or info.hidden_size // heads)
        rope = dict(getattr(text, "rope_parameters", None) or {})
        theta = rope.get("rope_theta")
        if theta is None:
            # Models with one rope per layer type (Gemma 3) nest the parameters by type.
            nested = [v.get("rope_theta") for v in rope.values() if isinstance(v, dict)]
            theta = max([t for t in nested if t is not None], default=None)
        if theta is None:
            theta = getattr(text, "rope_theta", None) or 1_000_000.0
        config = cls(
            hidden_size=info.hidden_size,
            num_hidden_layers=num_hidden_layers,
            num_attention_heads=heads,
            num_key_value_heads=int(_setting(text, "num_key_value_heads") or heads),
            head_dim=head_dim,
            intermediate_size=int(_setting(text, "intermediate_size") or 4 * info.hidden_size),
            vocab_size=info.vocab_size,
            draft_block_size=draft_block_size,
            target_layer_ids=target_layer_ids
            or default_target_layer_ids(info.num_hidden_layers, num_features),
            mask_token_id=mask_token_id,
            num_target_layers=info.num_hidden_layers,
            target_hidden_size=info.hidden_size,
            draft_vocab_size=draft_vocab_size if draft_vocab_size != info.vocab_size else None,
            rms_norm_eps=float(getattr(text, "rms_norm_eps", 1e-6)),
            # The drafter has its own plain rotary embedding over the full head, whatever scaling
            # or partial rotation the verifier uses (arXiv 2602.06036, appendix).
            rope_parameters={"rope_type": "default", "rope_theta": float(theta)},
            max_position_embeddings=int(getattr(text, "max_position_embeddings", 32768)),
            verifier=name,
            dtype=dtype,
        )
        config = config.with_(**{k: v for k, v in changes.items() if v is not None})
        config.check_verifier(info)
        return config

    def with_(self, **changes: Any) -> DrafterConfig:
        """A copy with some fields replaced, validated again."""
        return replace(self, **changes)
