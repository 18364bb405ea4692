"""Other weights for the drafter that serves, in the place of its own, between two steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def reload_weights(drafter: Any, runner: Any, weights: Mapping[str, Tensor], context: bool) -> None:
    """Loads weights into the running drafter.

    vLLM's own layerwise reload does it: it loads, shards and packs as at start, and copies the result into
    the tensors that there are, whose addresses CUDA graphs hold.

    Args:
        drafter: our proposer or speculator.
        runner: vLLM's model runner.
        weights: all tensors of the drafter's layers, norms and ``fc``, named as in a checkpoint.
        context: whether those that the context's K/V are made with differ; their fused copies are then
            refilled. K/V in the cache stay those of the old ones.
    """
    from vllm.model_executor.model_loader.reload import (
        finalize_layerwise_reload,
        initialize_layerwise_reload,
    )

    inner: Any = drafter.model.model
    parts = [m for name, m in inner.named_children() if name != "embed_tokens"]
    if context:
        _check_whole(inner, weights)
    with torch.inference_mode(False), torch.no_grad():
        for part in parts:
            initialize_layerwise_reload(part)
        try:
            dtype = _dtype(inner)
            # In their order: vLLM buffers a layer until it is complete.
            inner.load_weights((n, w.to(dtype)) for n, w in sorted(weights.items()))
        finally:
            # Layers that got nothing have their tensors back.
            for part in parts:
                finalize_layerwise_reload(part, runner.model_config)
        if context:
            _refill(inner, weights)


def _dtype(inner: nn.Module) -> torch.dtype:
    return next(p.dtype for p in inner.parameters() if p.is_floating_point())


def _of_layers(inner: Any, weights: Mapping[str, Tensor], what: str) -> list[Tensor]:
    """Those of K and V of each layer, in the order that vLLM fuses them in; none where there are none."""
    names = [
        f"layers.{i}.self_attn.{kind}.{what}"
        for i in range(inner._num_attn_layers)
        for kind in ("k_proj", "v_proj")
    ]
    return [weights[name] for name in names if name in weights]


def _check_whole(inner: Any, weights: Mapping[str, Tensor]) -> None:
    """Raises before anything is touched."""
    size = inner._num_kv_heads * inner._head_dim
    if any(w.shape[0] != size for w in _of_layers(inner, weights, "weight")):
        raise ValueError(
            "the context's weights cannot be replaced under tensor parallelism; use "
            '"dflash_learn_weights": "decode"'
        )
    if inner._fused_kv_weight is None:
        raise ValueError('the drafter is served quantised; use "dflash_learn_weights": "decode"')


def _refill(inner: Any, weights: Mapping[str, Tensor]) -> None:
    """Fills the buffers that vLLM fuses for the context's K/V from whole weights of all layers."""
    num_layers = inner._num_attn_layers
    inner._fused_kv_weight.copy_(torch.cat(_of_layers(inner, weights, "weight")))
    if inner._fused_kv_bias is not None:
        inner._fused_kv_bias.copy_(torch.cat(_of_layers(inner, weights, "bias")))
    norms = [weights[f"layers.{i}.self_attn.k_norm.weight"] for i in range(num_layers)]
    inner._k_norm_weights.copy_(torch.stack(norms))
