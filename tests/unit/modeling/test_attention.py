"""The learner's attention: equal to its definition, by a fused kernel or not at all."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from test_modeling import make_drafter, make_inputs, run
from torch.nn.attention import SDPBackend

from vllm_dflash.modeling import attention
from vllm_dflash.modeling.attention import attend, folded_bias
from vllm_dflash.modeling.blocks import BlockLayout


def spelled_out(q_NQD, k_GSD, v_GSD, mask_QS):
    """Attention head by head, with a KV head for every query head."""
    shared = q_NQD.shape[0] // k_GSD.shape[0]
    out = []
    for i, q in enumerate(q_NQD):
        k, v = k_GSD[i // shared], v_GSD[i // shared]
        scores = (q @ k.T) * q.shape[-1] ** -0.5
        out.append(torch.where(mask_QS, scores, -torch.inf).softmax(-1) @ v)
    return torch.stack(out)


def inputs(heads, groups, num_queries, num_keys, dtype, requires_grad=True, dim=16):
    generator = torch.Generator().manual_seed(0)
    shapes = (heads, num_queries, dim), (groups, num_keys, dim), (groups, num_keys, dim)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64)
        .to(dtype)
        .requires_grad_(requires_grad)
        for shape in shapes
    ]


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2), (4, 1)], ids=["MHA", "GQA", "MQA"])
@pytest.mark.parametrize("context", [0, 5, 24, 33])
@pytest.mark.parametrize(("window", "causal"), [(None, False), (None, True), (4, False), (4, True)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)], ids=["fp64", "fp32"]
)
def test_equals_its_definition(heads, groups, context, window, causal, dtype, tolerance):
    """Forward and backward, also where keys are padded, masks ragged and windows narrow."""
    anchors = sorted({0, context // 3, context})
    layout = BlockLayout.build([anchors], [context], 8)
    (chunk,) = layout.chunks
    mask = layout.mask(chunk, window, causal)
    mine = inputs(heads, groups, *mask.shape, dtype)
    bias = layout.bias(chunk, window, causal, heads // groups, dtype)
    assert bias.shape[0] == heads // groups * mask.shape[0]
    assert bias.shape[1] % 16 == 0
    got = attend(*mine, bias)
    theirs = inputs(heads, groups, *mask.shape, torch.float64)
    want = spelled_out(*theirs, mask)
    upstream = torch.randn(want.shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    got.backward(upstream)
    want.backward(upstream.double())
    for a, b in zip((got, *(x.grad for x in mine)), (want, *(x.grad for x in theirs)), strict=True):
        torch.testing.assert_close(
            a.double(), b, rtol=0, atol=tolerance * float(b.detach().abs().max())
        )


def test_masks_are_made_once_a_step(monkeypatch):
    made = []
    mask = BlockLayout.mask
    monkeypatch.setattr(
        BlockLayout, "mask", lambda self, *args: made.append(args) or mask(self, *args)
    )
    drafter = make_drafter(layer_types=None, sliding_window=None)
    embeds, features = make_inputs(2, 5)
    run(drafter, embeds, features, [[2, 5]], [5])
    assert len(drafter.layers) == 3
    assert len(made) == 1


class OnCuda(torch.Tensor):
    """Says that it is on a GPU; its values are here."""

    @property
    def device(self):
        return torch.device("cuda", 0)


def test_cuda_may_take_one_fused_kernel_and_nothing_else(monkeypatch):
    fused, allowed = F.scaled_dot_product_attention, []

    def recorded(*args, **kwargs):
        allowed.append(torch.nn.attention._cur_sdpa_kernel_backends())
        assert not kwargs.get("enable_gqa")
        with torch.nn.attention.sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
            return fused(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    mask = torch.ones(5, 19, dtype=torch.bool)
    q, k, v = (x.as_subclass(OnCuda) for x in inputs(4, 2, 5, 19, torch.float32, False))
    got = attend(q, k, v, folded_bias(mask, 2, torch.float32))
    assert allowed == [[SDPBackend.EFFICIENT_ATTENTION]]
    want = spelled_out(*(x.as_subclass(torch.Tensor) for x in (q, k, v)), mask)
    torch.testing.assert_close(got.as_subclass(torch.Tensor), want)
    # What torch would take otherwise is as before.
    assert SDPBackend.MATH in torch.nn.attention._cur_sdpa_kernel_backends()


def test_no_kernel_is_an_error_with_its_reasons(monkeypatch):
    def reasons(params, debug):
        assert debug
        warnings.warn("bf16 wants sm80 or newer (Triggered internally at here)", stacklevel=1)
        return False

    monkeypatch.setitem(attention._KERNEL, "cpu", SDPBackend.EFFICIENT_ATTENTION)
    monkeypatch.setattr(torch.backends.cuda, "can_use_efficient_attention", reasons)
    q, k, v = inputs(4, 2, 5, 19, torch.bfloat16, False)
    bias = folded_bias(torch.ones(5, 19, dtype=torch.bool), 2, torch.bfloat16)
    with pytest.raises(RuntimeError) as caught:
        attend(q, k, v, bias)
    message = str(caught.value)
    for part in (f"torch {torch.__version__}", "EFFICIENT_ATTENTION", "bfloat16", "head size 16"):
        assert part in message
    assert "keys: bf16 wants sm80 or newer. Its unfused" in message


def test_a_full_device_is_no_missing_kernel(monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(F, "scaled_dot_product_attention", full)
    bias = folded_bias(torch.ones(5, 19, dtype=torch.bool), 2, torch.float32)
    with pytest.raises(torch.OutOfMemoryError, match=r"^full$"):
        attend(*inputs(4, 2, 5, 19, torch.float32, False), bias)
