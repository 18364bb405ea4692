"""What the verifier takes of a GPU, from its configuration alone: weights and KV cache of one rank.

Where a checkpoint is at hand its files say how large the weights are; else a model without memory (torch's
meta device) is built to count them. Neither reads a weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_dflash.checkpoint import weight_bytes

#: Weights of a quantised checkpoint that are stored as they are: what the drafter learns through, and what is
#: no matrix. Bits of a weight and of what belongs to it, by the names that configurations use.
_BITS = {
    "fp8": 8.0,
    "fbgemm_fp8": 8.0,
    "awq": 4.5,
    "awq_marlin": 4.5,
    "gptq": 4.5,
    "gptq_marlin": 4.5,
    "bitsandbytes": 4.5,
    "mxfp4": 4.25,
    "modelopt_fp4": 4.5,
    "nvfp4": 4.5,
}


@dataclass(frozen=True)
class VerifierSizes:
    """Bytes of a verifier that is not spread over ranks.

    Attributes:
        weights: all weights of the language model.
        vocabulary: embedding and lm_head among them (once where they are tied), which are not quantised.
        source: where that is known from, for the table.
        parameters: without embedding and lm_head; what a token is multiplied with (all experts counted).
        active: of these, what one token runs through.
    """

    weights: int
    vocabulary: int
    source: str
    parameters: int
    active: int


def verifier_sizes(
    hf_config: Any, folder: Path | None, dtype: str, *, trust_remote_code: bool = False
) -> VerifierSizes:
    """Counts a verifier's weights.

    Args:
        hf_config: of the verifier; multimodal ones are counted without their towers, which training leaves
            out.
        folder: of the checkpoint, where it is on this machine.
        dtype: as vLLM's ``--dtype``.
        trust_remote_code: whether the model's own code may run.

    Raises:
        ValueError: the model cannot be built.
    """
    from transformers import AutoModelForCausalLM

    text = hf_config.get_text_config()
    itemsize = _dtype(text, hf_config, dtype).itemsize
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(text, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever code that belongs to a model raises
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"the verifier's size cannot be told from its configuration ({first}); say how much memory its "
            "engine may have: --engine-args '{\"gpu_memory_utilization\": 0.6}'"
        ) from error
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    vocabulary = {id(m.weight): m.weight.numel() for m in ends if m is not None}
    rest = {id(p): p for p in model.parameters() if id(p) not in vocabulary}
    matrices = sum(p.numel() for p in rest.values() if p.dim() > 1)
    others = sum(p.numel() for p in rest.values() if p.dim() <= 1)
    bits = _quantised_bits(hf_config)
    stored = (matrices * bits / 8 if bits else matrices * itemsize) + others * itemsize
    weights = int(stored) + sum(vocabulary.values()) * itemsize
    source = f"{matrices / 1e9:.1f} B weights of {bits or 8 * itemsize:g} bits"
    on_disk = weight_bytes(folder) if folder is not None and folder.is_dir() else None
    if on_disk is not None and bits:
        # The files know what is left unquantised and how large scales are; a tower counts with them.
        weights, source = on_disk, "size of the checkpoint"
    return VerifierSizes(
        weights=weights,
        vocabulary=sum(vocabulary.values()) * itemsize,
        source=source,
        parameters=matrices,
        active=matrices - _idle_experts(text, rest),
    )


def _dtype(text: Any, hf_config: Any, asked: str) -> torch.dtype:
    if asked != "auto":
        return getattr(torch, {"half": "float16", "float": "float32"}.get(asked, asked))
    found = getattr(text, "dtype", None) or getattr(hf_config, "dtype", None) or torch.bfloat16
    found = getattr(torch, found) if isinstance(found, str) else found
    # vLLM's "auto" serves float32 checkpoints in bfloat16.
    return torch.bfloat16 if found == torch.float32 else found


def _quantised_bits(hf_config: Any) -> float | None:
    """Bits of a quantised matrix's weight, scales included; None for an unquantised checkpoint."""
    raw = getattr(hf_config, "quantization_config", None)
    if raw is None:
        raw = getattr(hf_config.get_text_config(), "quantization_config", None)
    if raw is None:
        return None
    raw = raw if isinstance(raw, dict) else raw.to_dict()
    groups = [g.get("weights") or {} for g in (raw.get("config_groups") or {}).values()]
    if groups:
        bits, group = (max(int(g.get(n) or 0) for g in groups) for n in ("num_bits", "group_size"))
    else:
        bits, group = int(raw.get("bits") or 0), int(raw.get("group_size") or 0)
    if bits:
        return bits + (16 / group if group > 0 else 0)
    method = str(raw.get("quant_method", ""))
    if method not in _BITS:
        raise ValueError(
            f"the verifier is quantised by {method!r}, whose size is not known here; say how much memory its "
            "engine may have: --engine-args '{\"gpu_memory_utilization\": 0.6}'"
        )
    return _BITS[method]


def _setting(text: Any, *names: str) -> int:
    raw = text.to_dict()
    for name in names:
        value = raw.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return 0


def _idle_experts(text: Any, parameters: dict[int, Any]) -> int:
    """Weights of the experts that a token does not run through: those with a dimension for the expert."""
    experts = _setting(text, "num_experts", "num_local_experts", "n_routed_experts")
    chosen = _setting(text, "num_experts_per_tok", "top_k_experts", "moe_topk")
    if not experts or not chosen:
        return 0
    stacked = sum(p.numel() for p in parameters.values() if p.dim() == 3 and p.shape[0] == experts)
    return stacked * (experts - chosen) // experts


def kv_bytes(text: Any, tokens: int, budget: int, ranks: int, itemsize: int = 2) -> int:
    """KV cache of one sequence of so many tokens on each of ``ranks``, recurrent states included.

    Args:
        text: the verifier's text configuration.
        tokens: longest sequence.
        budget: tokens of an engine step: a sliding window's blocks are freed after the step.
        ranks: tensor parallel ranks; fewer KV heads than ranks are replicated.
        itemsize: bytes of a cached value.
    """
    raw = text.to_dict()
    layers = int(text.num_hidden_layers)
    kinds = raw.get("layer_types") or raw.get("layers_block_type") or ["full_attention"] * layers
    own = raw.get("per_layer_config") or {}
    heads = _setting(text, "num_attention_heads")
    latent = _setting(text, "kv_lora_rank")
    window = _setting(text, "sliding_window", "attention_chunk_size") or tokens
    total = 0
    for i, kind in enumerate(kinds):
        raw_layer = {**raw, **(own.get(f"{i:02d}") or own.get(str(i)) or {})}
        if kind in ("mamba", "linear_attention", "conv", "recurrent"):
            total += _state_bytes(text, itemsize) // ranks
            continue
        if kind in ("mlp", "moe"):
            continue
        held = min(tokens, window + budget) if kind.startswith(("sliding", "chunked")) else tokens
        if latent:
            # Multi-head latent attention: one vector a token, on every rank.
            total += held * (latent + _setting(text, "qk_rope_head_dim")) * itemsize
            continue
        kv_heads = raw_layer.get("num_key_value_heads") or heads
        head_dim = raw_layer.get("head_dim") or int(text.hidden_size) // heads
        total += held * 2 * max(1, kv_heads // ranks) * head_dim * itemsize
    return total


def _state_bytes(text: Any, itemsize: int) -> int:
    """A recurrent layer's state of one sequence: GDN's or Mamba-2's, by the names in the configuration."""
    value_heads = _setting(text, "linear_num_value_heads")
    if value_heads:
        key = _setting(text, "linear_key_head_dim") * _setting(text, "linear_num_key_heads")
        value = _setting(text, "linear_value_head_dim") * value_heads
        state = value * _setting(text, "linear_key_head_dim") * 4
        return state + (2 * key + value) * _setting(text, "linear_conv_kernel_dim") * itemsize
    heads = _setting(text, "mamba_n_heads", "mamba_num_heads")
    inner = heads * _setting(text, "mamba_d_head", "mamba_head_dim")
    inner = inner or 2 * int(text.hidden_size)
    return inner * (_setting(text, "mamba_d_state", "ssm_state_size") or 128) * 4
