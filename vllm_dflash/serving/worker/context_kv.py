"""The drafter's context K/V through our op: one GEMM, then one launch for norm, rotation, cache writes."""

from __future__ import annotations

import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from vllm import _custom_ops as vllm_ops

from vllm_dflash import ops

#  Attention backends whose cache is ``[blocks, heads, kv_block_size, 2 * head_size]``, keys first, in any
# strides.
_PAGED = frozenset({"FlashAttentionImpl", "TritonAttentionImpl", "FlashInferImpl"})
_FLOAT8 = {
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}


class ContextKV:
    """Stands in for ``DFlashQwen3Model.precompute_and_store_context_kv`` of vLLM.

    Reads the buffers that vLLM fuses from the loaded weights (``_fused_kv_weight``, ``_k_norm_weights``,
    ...), every time anew, so that a refill or a rebuild of them is seen. Where the paged cache has a layout
    of its own (vLLM's CPU attention) the op writes to staging rows and vLLM's writer takes them from there.

    Args:
        model: vLLM's ``DFlashQwen3Model`` with its weights loaded.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        # Views of the caches that are bound, as long as those live: vLLM frees the ones that it profiles
        # CUDA graphs with, and counts on their memory.
        self._bound: tuple[weakref.ref[Tensor], ...] = ()
        self._caches: tuple[list[Tensor], list[Tensor]] | None = None

    def usable(self) -> bool:
        """Whether the weights are there and in a form the fused GEMM can read (not quantised)."""
        return getattr(self.model, "_fused_kv_weight", None) is not None

    def store(
        self, states: Tensor, positions: Tensor, slots: Tensor | list[Tensor | None] | None
    ) -> None:
        """Projects context states and writes their K/V to every draft layer's cache.

        Args:
            states: the drafter's combined context states ``[T, H]``.
            positions: ``[T]``.
            slots: int64 ``[T]`` for all layers, a list with one per layer, or None (memory profiling): then
                nothing is written.
        """
        model = self.model
        normed = torch.empty_like(states)
        vllm_ops.rms_norm(normed, states, model._hidden_norm_weight, model._rms_norm_eps)
        flat = F.linear(normed, model._fused_kv_weight, model._fused_kv_bias)
        L, N, D = model._num_attn_layers, model._num_kv_heads, model._head_dim
        kv_TL2ND = flat.view(flat.shape[0], L, 2, N, D)
        given = slots if isinstance(slots, (list, tuple)) else [slots] * L
        per_layer = [slot for slot in given if slot is not None]
        if flat.shape[0] == 0 or len(per_layer) < L:
            return
        caches = self._paged_caches()
        if caches is None:
            self._store_by_vllm(kv_TL2ND, positions, per_layer)
            return
        self._run(kv_TL2ND, positions, per_layer, *caches, *self._scales(caches))

    def _run(
        self,
        kv_TL2ND: Tensor,
        positions: Tensor,
        slots: list[Tensor],
        keys: list[Tensor],
        values: list[Tensor],
        key_scales: Tensor | None = None,
        value_scales: Tensor | None = None,
    ) -> None:
        model = self.model
        cos_sin = model._rope_cos_sin_cache
        if cos_sin.dtype not in (kv_TL2ND.dtype, torch.float32):
            cos_sin = cos_sin.to(kv_TL2ND.dtype)
        scale = getattr(model.layers[0].self_attn, "v_scale", None)
        ops.store_context_kv(
            kv_TL2ND,
            model._k_norm_weights,
            positions,
            cos_sin,
            keys,
            values,
            eps=model._rms_norm_eps,
            is_neox=model._rope_is_neox,
            value_scale=1.0 if scale is None else scale,
            slots=slots,
            key_scales=key_scales,
            value_scales=value_scales,
        )

    def _store_by_vllm(self, kv_TL2ND: Tensor, positions: Tensor, slots: list[Tensor]) -> None:
        T, L, _, N, D = kv_TL2ND.shape
        staging = torch.empty(2, L, 1, T, N, D, dtype=kv_TL2ND.dtype, device=kv_TL2ND.device)
        keys, values = list(staging[0].unbind(0)), list(staging[1].unbind(0))
        self._run(kv_TL2ND, positions, [], keys, values)
        for attn, key, value, slot in zip(
            self.model._attn_layers, keys, values, slots, strict=True
        ):
            attn.impl.do_kv_cache_update(attn, key[0], value[0], attn.kv_cache, slot)

    def _paged_caches(self) -> tuple[list[Tensor], list[Tensor]] | None:
        """Key and value views ``[blocks, kv_block_size, N, D]`` of each layer; None if unknown."""
        attns = self.model._attn_layers
        if len(attns) == len(self._bound) and all(
            attn.kv_cache is bound() for attn, bound in zip(attns, self._bound, strict=True)
        ):
            return self._caches
        self._bound = tuple(weakref.ref(attn.kv_cache, self._let_go) for attn in attns)
        views = [_paged_views(attn, self.model) for attn in attns]
        whole = [v for v in views if v is not None]
        same = len({(v[0].shape, v[0].dtype) for v in whole}) == 1
        self._caches = (
            ([v[0] for v in whole], [v[1] for v in whole])
            if len(whole) == len(views) and same
            else None
        )
        return self._caches

    def _let_go(self, bound: weakref.ref[Tensor]) -> None:
        if any(bound is b for b in self._bound):
            self._bound, self._caches = (), None

    def _scales(
        self, caches: tuple[list[Tensor], list[Tensor]]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Those of keys and values of float8 caches, ``[L]`` each, as they are now: with
        ``--calculate-kv-scales`` vLLM sets them by the first request."""
        if caches[0][0].dtype not in _FLOAT8.values():
            return None, None
        attns = self.model._attn_layers
        return (
            torch.stack([a._k_scale.float().reshape(()) for a in attns]),
            torch.stack([a._v_scale.float().reshape(()) for a in attns]),
        )


def _paged_views(attn: Any, model: Any) -> tuple[Tensor, Tensor] | None:
    # .data: a view of the tensor itself would keep it alive.
    cache, impl = attn.kv_cache.data, attn.impl
    D, N = model._head_dim, model._num_kv_heads
    if type(impl).__name__ not in _PAGED:
        return None
    if getattr(impl, "kv_sharing_target_layer_name", None) is not None:
        return None
    if cache.dim() != 4 or cache.shape[1] != N or cache.shape[3] != 2 * D:
        return None
    name = getattr(impl, "kv_cache_dtype", "auto")
    if name in _FLOAT8:
        cache = cache.view(_FLOAT8[name])
    elif cache.dtype != model._fused_kv_weight.dtype:
        return None
    key, value = cache.transpose(1, 2).split(D, dim=-1)
    return key, value
