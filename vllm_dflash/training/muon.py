"""Muon in a chosen precision; torch's is in bfloat16 always."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class Muon(torch.optim.Muon):
    """torch's Muon with ``adjust_lr_fn="match_rms_adamw"`` and the same state, orthogonalising in ``dtype``.

    In bfloat16 rounding is amplified: the iteration multiplies what a gradient has beside its large singular
    values by up to 3.4445**5 = 485, and bfloat16 puts 2**-9 there. Where bfloat16 has no instructions it is
    slow besides.

    Args:
        params: matrices.
        dtype: of the Newton-Schulz iteration.
        options: of torch's.
    """

    def __init__(self, params: Iterable[Tensor], dtype: torch.dtype, **options: Any) -> None:
        super().__init__(params, adjust_lr_fn="match_rms_adamw", **options)
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for param in group["params"]:
                grad = param.grad
                if grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(grad)
                buffer = state["momentum_buffer"].lerp_(grad, 1 - momentum)
                update = grad.lerp(buffer, momentum) if group["nesterov"] else buffer
                update = orthogonalised(
                    update.to(self.dtype), group["ns_coefficients"], group["ns_steps"], group["eps"]
                )
                param.mul_(1 - lr * group["weight_decay"])
                param.add_(update, alpha=-lr * 0.2 * math.sqrt(max(param.shape)))


def orthogonalised(
    matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> Tensor:
    """Nearly U V^T of the matrix U S V^T, by Newton-Schulz iterations in its dtype."""
    a, b, c = coefficients
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x
