"""Muon: torch's in bfloat16, and one that does not blow up rounding in float32."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from vllm_dflash.training.muon import Muon, orthogonalised

SHAPES = [(12, 12), (24, 8), (6, 30)]


def params(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=generator)) for s in SHAPES]


def steps(optimizer: torch.optim.Optimizer, weights: list[nn.Parameter], count: int) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator)
        weights[0].grad = None if count > 3 else weights[0].grad
        optimizer.step()


@pytest.mark.parametrize("options", [{"weight_decay": 0.0}, {"weight_decay": 0.3}])
def test_in_bfloat16_it_is_torchs_bit_for_bit(options):
    mine, theirs = params(), params()
    ours = Muon(mine, torch.bfloat16, lr=0.01, **options)
    torchs = torch.optim.Muon(theirs, lr=0.01, adjust_lr_fn="match_rms_adamw", **options)
    for count in (3, 5):
        steps(ours, mine, count)
        steps(torchs, theirs, count)
        for a, b in zip(mine, theirs, strict=True):
            assert torch.equal(a, b)
    # And so is what is saved.
    state, other = ours.state_dict(), torchs.state_dict()
    assert state["state"].keys() == other["state"].keys()
    torchs.load_state_dict(copy.deepcopy(state))
    steps(ours, mine, 2)
    steps(torchs, theirs, 2)
    assert all(map(torch.equal, mine, theirs))


@pytest.mark.parametrize("shape", SHAPES)
def test_updates_are_nearly_orthogonal(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    got = orthogonalised(matrix, (3.4445, -4.775, 2.0315), 5, 1e-7)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    inside = u.T @ got @ vh.T
    # The iteration keeps the singular vectors.
    torch.testing.assert_close(inside, torch.diag(inside.diag()), rtol=0, atol=1e-4)
    assert (inside.diag()[s > 0.1 * s[0]] > 0.6).all()
    assert (inside.diag() < 1.3).all()


def test_float32_goes_only_where_the_gradient_points():
    """A gradient of few anchors has few directions; bfloat16's rounding becomes directions of its own."""
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(64, 2, generator=generator) @ torch.randn(2, 96, generator=generator)
    u, _, vh = torch.linalg.svd(gradient, full_matrices=False)
    u, vh = u[:, :2], vh[:2]
    beside = {}
    for dtype in (torch.float32, torch.bfloat16):
        update = orthogonalised(gradient.to(dtype), (3.4445, -4.775, 2.0315), 5, 1e-7).float()
        outside = update - u @ (u.T @ update @ vh.T) @ vh
        beside[dtype] = float(outside.norm() / update.norm())
    assert beside[torch.float32] < 1e-3
    assert beside[torch.bfloat16] > 0.1
