"""benchmarks/gpu_ops.py: caches as vLLM has them, and checks that find what is wrong."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_context_kv import FlashAttentionImpl
from vllm.v1.kv_cache_layout import KVCacheLayout

from vllm_dflash.serving.worker.context_kv import _paged_views

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
import gpu_ops

LAYERS, HEADS, HEAD_SIZE = 2, 3, 8
SMALL = {"layers": LAYERS, "heads": HEADS, "head_size": HEAD_SIZE, "dtype": torch.float32}


@pytest.mark.parametrize("layout", gpu_ops.KV_LAYOUTS)
def test_caches_are_strided_as_vllms(layout) -> None:
    case = gpu_ops.kv_case(20, **SMALL, layout=layout)
    blocks = case["key_caches"][0].shape[0]
    order = KVCacheLayout[layout].stride_order
    assert order == gpu_ops.KV_LAYOUTS[layout]
    logical = (LAYERS, blocks, HEADS, gpu_ops.KV_BLOCK, 2 * HEAD_SIZE)
    storage = torch.empty([logical[axis] for axis in order])
    caches = storage.permute([order.index(axis) for axis in range(5)])
    model = SimpleNamespace(
        _head_dim=HEAD_SIZE, _num_kv_heads=HEADS, _fused_kv_weight=torch.empty(0)
    )
    for layer, cache in enumerate(caches):
        views = _paged_views(SimpleNamespace(kv_cache=cache, impl=FlashAttentionImpl()), model)
        assert views is not None
        for kind, view in zip(("key_caches", "value_caches"), views, strict=True):
            ours = case[kind][layer]
            assert (ours.shape, ours.stride()) == (view.shape, view.stride())
        key, value = case["key_caches"][layer], case["value_caches"][layer]
        # Side by side: a token's values follow its keys.
        assert value.storage_offset() - key.storage_offset() == HEAD_SIZE


@pytest.mark.parametrize("layout", gpu_ops.KV_LAYOUTS)
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.float8_e4m3fn], ids=str)
def test_store_is_right_in_each_layout(layout, cache_dtype) -> None:
    options = {**SMALL, "head_size": 64, "skipped": 0.2, "cache_dtype": cache_dtype}
    check = gpu_ops.check_store_case(33, {**options, "layout": layout})
    assert check.problem == ""
    assert 0 < check.error < 0.1


def test_a_value_in_the_wrong_place_is_found(monkeypatch) -> None:
    run = gpu_ops.our_op("store_context_kv")

    def wrong(case) -> None:
        run(case)
        case["value_caches"][1][-1, -1, -1, -1] = 77

    monkeypatch.setattr(gpu_ops, "our_op", lambda name: wrong)
    check = gpu_ops.check_store_case(33, {**SMALL, "head_size": 64})
    assert check.problem == "cache 3 changed where no token was stored"
