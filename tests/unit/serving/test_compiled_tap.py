"""The tap in a compiled verifier, by Inductor on the CPU: the bits that come out without it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from vllm_dflash.serving.worker.features.tap import FeatureTap, write_features

pytestmark = pytest.mark.long
T, H, LAYERS, TAPPED = 24, 64, 3, (0, 1)


def add_norm(x: Tensor, residual: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    """vLLM's ``RMSNorm.forward_native``: in float32, the residual in the model's dtype."""
    wide = x.float() if residual is None else x.float() + residual.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return normed.to(x.dtype) * weight, wide.to(x.dtype)


class Verifier(nn.Module):
    """Decoder layers without attention.

    Args:
        collect: "none", "stock" (vLLM's list of hidden states) or "tap".
    """

    def __init__(self, collect: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.collect = collect
        self.up = nn.ModuleList(nn.Linear(H, 2 * H, bias=False) for _ in range(LAYERS))
        self.down = nn.ModuleList(nn.Linear(2 * H, H, bias=False) for _ in range(LAYERS))
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(H))
        self.to(torch.bfloat16)
        self.tap = FeatureTap(self, torch.zeros(T + 8, len(TAPPED) * H, dtype=torch.bfloat16))

    def forward(self, hidden: Tensor) -> tuple[Tensor, list[Tensor]]:
        residual, aux = None, []
        for i, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            normed, residual = add_norm(hidden, residual, self.weight)
            hidden = down(torch.nn.functional.silu(up(normed)))
            if i in TAPPED and self.collect == "stock":
                aux.append(hidden + residual)
            elif i in TAPPED and self.collect == "tap":
                write_features(self, hidden, residual, TAPPED.index(i) * H)
        return add_norm(hidden, residual, self.weight)[0], aux


@torch.no_grad()
def test_a_tapped_verifier_rounds_like_an_untapped_one() -> None:
    hidden = torch.randn(T, H, generator=torch.Generator().manual_seed(1)).bfloat16()
    outputs, features = {}, {}
    for collect in ("none", "stock", "tap"):
        torch._dynamo.reset()
        verifier = Verifier(collect)
        outputs[collect], aux = torch.compile(verifier)(hidden)
        features[collect] = (
            torch.cat(aux, -1) if aux else verifier.tap.take(T, real=collect == "tap")
        )
    assert torch.equal(outputs["stock"], outputs["none"])
    assert torch.equal(outputs["tap"], outputs["none"])
    assert torch.equal(features["tap"], features["stock"])
    # In eager mode every sum is rounded, so there is something to lose.
    assert not torch.equal(Verifier("none")(hidden)[0], outputs["none"])
