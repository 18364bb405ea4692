"""Drafting losses over anchor blocks.

Shape suffixes: A anchors, K drafted positions of a block, V draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

LossName = Literal["dpace", "ce", "kl"]

#: Decay constants of the paper's checkpoints, by block size (arXiv 2602.06036, section 4).
_GAMMA = {16: 7.0, 10: 5.0, 8: 4.0}


def default_gamma(draft_block_size: int) -> float:
    """gamma of exp(-(k-1)/gamma); block sizes the paper does not list get B/2."""
    return _GAMMA.get(draft_block_size, draft_block_size / 2)


def decay_weights(num_positions: int, gamma: float) -> Tensor:
    """``w_k = exp(-(k-1)/gamma)`` for k = 1..K (arXiv 2602.06036, eq. 4), fp32 ``[K]``."""
    return torch.exp(-torch.arange(num_positions, dtype=torch.float32) / gamma)


def dpace_weights(target_probs_AK: Tensor, valid_AK: Tensor, alpha: float) -> Tensor:
    """``w_j = sum_{m>=j} prod_{i<=m} q~_i`` with ``q~ = (1-alpha) q + alpha`` (arXiv 2605.18810).

    The weight of a position is the expected number of accepted tokens that hang on it. Invalid
    positions count as certain inside the product and get weight 0. fp32 ``[A, K]``, no gradient.
    """
    with torch.no_grad():
        smooth = (1 - alpha) * target_probs_AK.float() + alpha
        smooth = torch.where(valid_AK, smooth, torch.ones_like(smooth))
        prefix = smooth.cumprod(dim=-1) * valid_AK
        return prefix.flip(-1).cumsum(-1).flip(-1) * valid_AK


def block_loss(
    logits_AKV: Tensor,
    labels_AK: Tensor,
    valid_AK: Tensor,
    *,
    loss: LossName = "dpace",
    gamma: float = 7.0,
    alpha: float = 0.5,
    verifier_logits_AKV: Tensor | None = None,
    total_weight: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Weighted mean loss over the valid drafted positions.

    Args:
        logits_AKV: drafter logits.
        labels_AK: int64 draft-vocabulary ids of the verifier's tokens; ignored where invalid.
        valid_AK: bool, whether the position lies on what the verifier generated.
        loss: ``dpace`` (CE, D-PACE weights), ``ce`` (CE, exponential decay) or ``kl`` (KL from the
            verifier's distribution over the draft vocabulary, exponential decay).
        gamma: decay constant of ``ce`` and ``kl``.
        alpha: smoothing of ``dpace``.
        verifier_logits_AKV: the verifier's logits, for ``kl``.
        total_weight: gives the weight of a whole step from that of these anchors (fp32 scalar), where they
            are a part of it; the losses of the parts then add up to that of the step.

    Returns:
        The scalar fp32 loss and the CE of every position ``[A, K]`` (0 where invalid), detached.
    """
    num_draft = logits_AKV.shape[-1]
    ce_AK = F.cross_entropy(
        logits_AKV.float().reshape(-1, num_draft),
        torch.where(valid_AK, labels_AK, torch.full_like(labels_AK, -100)).flatten(),
        reduction="none",
        ignore_index=-100,
    ).view(labels_AK.shape)
    if loss == "kl":
        if verifier_logits_AKV is None:
            raise ValueError("the kl loss needs the verifier's logits")
        term_AK = F.kl_div(
            logits_AKV.float().log_softmax(-1),
            verifier_logits_AKV.float().log_softmax(-1),
            reduction="none",
            log_target=True,
        ).sum(-1)
        # A weight of 0 does not silence what is not finite.
        term_AK = torch.where(valid_AK, term_AK, torch.zeros_like(term_AK))
    elif loss in ("ce", "dpace"):
        term_AK = ce_AK
    else:
        raise ValueError(f"unknown loss {loss!r}; use 'dpace', 'ce' or 'kl'")
    if loss == "dpace":
        weights_AK = dpace_weights(torch.exp(-ce_AK.detach()), valid_AK, alpha)
    else:
        weights_AK = decay_weights(labels_AK.shape[1], gamma).to(term_AK.device) * valid_AK
    total = weights_AK.sum()
    if total_weight is not None:
        total = total_weight(total)
    return (term_AK * weights_AK).sum() / total.clamp_min(1e-9), ce_AK.detach()
