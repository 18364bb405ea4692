"""Other weights for the drafter that serves, in the place of its own, between two steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
    with torch.inference_mode(False), torch.no_grad():
        for part in parts:
            initialize_layerwise_reload(part)
        dtype = _dtype(inner)
        inner.load_weights((n, w.to(dtype)) for n, w in _ordered(weights))
        for part in parts:
            finalize_layerwise_reload(part, runner.model_config)
        if context:
            _refill(inner, weights)


def _ordered(weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    # vLLM buffers a layer until it is complete.
    yield from sorted(weights.items())


def _dtype(inner: nn.Module) -> torch.dtype:
    return next(p.dtype for p in inner.parameters() if p.is_floating_point())


def _refill(inner: Any, weights: Mapping[str, Tensor]) -> None:
    """Fills the buffers that vLLM fuses for the context's K/V from whole weights of all layers."""
    num_layers, size = inner._num_attn_layers, inner._num_kv_heads * inner._head_dim
    rows = []
    for i in range(num_layers):
        for kind in ("k_proj", "v_proj"):
            weight = weights[f"layers.{i}.self_attn.{kind}.weight"]
            if weight.shape[0] != size:
                raise ValueError(
                    "the context's weights cannot be replaced under tensor parallelism; use "
                    '"dflash_learn_weights": "decode"'
                )
            rows.append(weight)
    inner._fused_kv_weight.copy_(torch.cat(rows))
    norms = [weights[f"layers.{i}.self_attn.k_norm.weight"] for i in range(num_layers)]
    inner._k_norm_weights.copy_(torch.stack(norms))
