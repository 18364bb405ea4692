"""``ContextKV`` against vLLM's own ``precompute_and_store_context_kv`` on the same weights."""

from __future__ import annotations

from types import MethodType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from vllm_dflash import ops

L, N, D, HIDDEN, BLOCKS, BLOCK = 3, 2, 32, 48, 6, 8


class Writer:
    """An attention backend: keeps what it is given, or writes pages as FlashAttention's does."""

    def __init__(self) -> None:
        self.kv_cache_dtype = "auto"
        self.kv_sharing_target_layer_name = None
        self.given: list[tuple[Tensor, Tensor, Tensor]] = []

    def do_kv_cache_update(self, layer, key, value, kv_cache, slot_mapping) -> None:
        self.given.append((key.clone(), value.clone(), slot_mapping.clone()))
        keys, values = kv_cache.transpose(1, 2).split(D, dim=-1)
        real = slot_mapping >= 0
        at = (slot_mapping[real] // BLOCK, slot_mapping[real] % BLOCK)
        keys[at] = key[real].to(keys.dtype)
        values[at] = value[real].to(values.dtype)


class FlashAttentionImpl(Writer):
    """Goes by the name of a backend whose pages our op writes itself."""


def make_model(
    dtype: torch.dtype, writer: type, v_scale: float | None = None, is_neox: bool = True
):
    """What vLLM's ``DFlashQwen3Model`` is after ``_build_fused_kv_buffers``."""
    from vllm.model_executor.models.qwen3_dflash import DFlashQwen3Model as Stock

    torch.manual_seed(0)
    angles = torch.rand(500, D // 2) * 6.28
    attns = []
    for _ in range(L):
        cache = torch.zeros(BLOCKS, N, BLOCK, 2 * D, dtype=dtype)
        attns.append(SimpleNamespace(kv_cache=cache, impl=writer()))
    model = SimpleNamespace(
        _hidden_norm_weight=(1 + 0.1 * torch.randn(HIDDEN)).to(dtype),
        _rms_norm_eps=1e-6,
        _fused_kv_weight=(torch.randn(L * 2 * N * D, HIDDEN) / HIDDEN**0.5).to(dtype),
        _fused_kv_bias=None,
        _k_norm_weights=(1 + 0.1 * torch.randn(L, D)).to(dtype),
        _rope_cos_sin_cache=torch.cat([angles.cos(), angles.sin()], -1).to(dtype),
        _rope_head_size=D,
        _rope_is_neox=is_neox,
        _num_attn_layers=L,
        _kv_size=N * D,
        _head_dim=D,
        _num_kv_heads=N,
        _attn_layers=attns,
        layers=[SimpleNamespace(self_attn=SimpleNamespace(v_scale=v_scale))],
    )
    for name in ("_project_context_kv", "precompute_and_store_context_kv"):
        setattr(model, name, MethodType(getattr(Stock, name), model))
    # vLLM's CPU kernel norms all layers with the first one's weight; see drafter_model.py.
    from vllm_dflash.serving.worker.drafter_model import DrafterLayers

    model._normalize_context_k = MethodType(DrafterLayers._normalize_context_k, model)
    return model


@pytest.mark.parametrize("slots", ["one for all", "a list"])
@pytest.mark.parametrize("v_scale", [None, 0.4])
@pytest.mark.parametrize("is_neox", [True, False], ids=["neox", "interleaved"])
@pytest.mark.parametrize("writer", [Writer, FlashAttentionImpl], ids=["by vLLM", "paged"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equal_to_vllms(dtype, writer, is_neox, v_scale, slots) -> None:
    from vllm_dflash.serving.worker.context_kv import ContextKV

    stock, ours = (make_model(dtype, writer, v_scale, is_neox) for _ in range(2))
    states = torch.randn(11, HIDDEN).to(dtype)
    positions = torch.randint(0, 500, (11,))
    mapping = torch.randperm(BLOCKS * BLOCK)[:11]
    mapping[3] = ops.PAD_SLOT
    given = mapping if slots == "one for all" else [mapping, mapping.flip(0), mapping]
    stock.precompute_and_store_context_kv(states, positions, given)
    ContextKV(ours).store(states, positions, given)
    if writer is FlashAttentionImpl:
        assert not any(attn.impl.given for attn in ours._attn_layers)
    for a, b in zip(ours._attn_layers, stock._attn_layers, strict=True):
        # vLLM rounds to bfloat16 after the norm and in the rotation; we once, at the end: two units in the
        # last place of the largest element that takes part, 2^2 here.
        tolerance = 3e-6 if dtype == torch.float32 else 2 * 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(a.kv_cache, b.kv_cache, rtol=0, atol=tolerance)
        assert a.kv_cache.any()
        if v_scale is None:
            assert torch.equal(a.kv_cache[..., D:], b.kv_cache[..., D:])


def test_memory_profiling_writes_nothing() -> None:
    from vllm_dflash.serving.worker.context_kv import ContextKV

    model = make_model(torch.float32, Writer)
    kv = ContextKV(model)
    kv.store(torch.randn(4, HIDDEN), torch.arange(4), None)
    kv.store(torch.randn(4, HIDDEN), torch.arange(4), [None, None, None])
    kv.store(torch.randn(0, HIDDEN), torch.arange(0), torch.arange(0))
    assert not any(attn.impl.given for attn in model._attn_layers)


def test_a_cache_that_is_bound_later_is_seen() -> None:
    """vLLM allocates the cache after the first (profiling) calls, and may do so again."""
    from vllm_dflash.serving.worker.context_kv import ContextKV

    model = make_model(torch.float32, FlashAttentionImpl)
    kv = ContextKV(model)
    args = (torch.randn(4, HIDDEN), torch.arange(4), torch.arange(4))
    kv.store(*args)
    before = [attn.kv_cache for attn in model._attn_layers]
    for attn in model._attn_layers:
        attn.kv_cache = torch.zeros_like(attn.kv_cache)
    kv.store(*args)
    for attn, old in zip(model._attn_layers, before, strict=True):
        assert torch.equal(attn.kv_cache, old)


def test_other_layouts_are_left_to_vllm() -> None:
    """A cache that is not laid out as known goes through the backend's own writer."""
    from vllm_dflash.serving.worker.context_kv import ContextKV

    model = make_model(torch.float32, FlashAttentionImpl)
    model._attn_layers[1].impl.kv_sharing_target_layer_name = "model.layers.0"
    ContextKV(model).store(torch.randn(4, HIDDEN), torch.arange(4), torch.arange(4))
    assert all(len(attn.impl.given) == 1 for attn in model._attn_layers)


def test_a_cache_that_vllm_drops_is_freed() -> None:
    """vLLM profiles CUDA graphs with a cache of its own and gives it back before the real one is made."""
    from torch.multiprocessing.reductions import StorageWeakRef

    from vllm_dflash.serving.worker.context_kv import ContextKV

    model = make_model(torch.float32, FlashAttentionImpl)
    kv = ContextKV(model)
    args = (torch.randn(4, HIDDEN), torch.arange(4), torch.arange(4))
    kv.store(*args)
    kv.store(*args)
    storages = [StorageWeakRef(a.kv_cache.untyped_storage()) for a in model._attn_layers]
    for attn in model._attn_layers:
        attn.kv_cache = torch.empty(0)
    assert all(storage.expired() for storage in storages)


def test_scales_are_those_of_the_moment() -> None:
    """With --calculate-kv-scales vLLM sets them by the first request, after dummy steps have run."""
    from vllm_dflash.serving.worker.context_kv import ContextKV

    model = make_model(torch.float32, FlashAttentionImpl)
    for attn in model._attn_layers:
        attn.kv_cache = torch.zeros(BLOCKS, N, BLOCK, 2 * D, dtype=torch.uint8)
        attn.impl.kv_cache_dtype = "fp8"
        attn._k_scale, attn._v_scale = torch.tensor(1.0), torch.tensor(1.0)
    kv = ContextKV(model)
    args = (torch.randn(4, HIDDEN), torch.arange(4), torch.arange(4))
    kv.store(*args)

    def keys() -> Tensor:
        cache = model._attn_layers[0].kv_cache.view(torch.float8_e4m3fn)
        return cache.float()[0, :, :4, :D].clone()

    before = keys()
    model._attn_layers[0]._k_scale.fill_(0.5)
    kv.store(*args)
    assert before.any()
    torch.testing.assert_close(0.5 * keys(), before, rtol=0.13, atol=0.02)  # 3 bits of mantissa
