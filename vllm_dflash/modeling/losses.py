"""Drafting losses over anchor blocks.

Shape suffixes: A anchors, K drafted positions of a block, H drafter hidden size, V draft vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from vllm_dflash.modeling.loss_kinds import LOSSES, Loss

#: Decay constants of the paper's checkpoints, by block size (arXiv 2602.06036, section 4).
_GAMMA = {16: 7.0, 10: 5.0, 8: 4.0}

#: Memory of the logits that are alive at once and of what is computed from them. The GEMMs of the rows that
#: fit (700 of 152K logits) fill any device; more rows would only be more memory.
CHUNK_BYTES = 2**30


def default_gamma(draft_block_size: int) -> float:
    """gamma of exp(-(k-1)/gamma); block sizes the paper does not list get B/2."""
    return _GAMMA.get(draft_block_size, draft_block_size / 2)


def decay_weights(num_positions: int, gamma: float) -> Tensor:
    """``w_k = exp(-(k-1)/gamma)`` for k = 1..K (arXiv 2602.06036, eq. 4), fp32 ``[K]``."""
    return torch.exp(-torch.arange(num_positions, dtype=torch.float32) / gamma)


def dpace_weights(target_probs_AK: Tensor, valid_AK: Tensor, alpha: float) -> Tensor:
    """``w_j = sum_{m>=j} prod_{i<=m} q~_i`` with ``q~ = (1-alpha) q + alpha`` (arXiv 2605.18810).

    The weight of a position is the expected number of accepted tokens that hang on it. Invalid
    positions count as certain inside the product and get weight 0. ``[A, K]``, no gradient.
    """
    with torch.no_grad():
        smooth = (1 - alpha) * target_probs_AK + alpha
        smooth = torch.where(valid_AK, smooth, torch.ones_like(smooth))
        prefix = smooth.cumprod(dim=-1) * valid_AK
        return prefix.flip(-1).cumsum(-1).flip(-1) * valid_AK


def position_weights(
    ce_AK: Tensor, valid_AK: Tensor, *, kind: Loss, gamma: float, alpha: float
) -> Tensor:
    """Weight of each position in a loss ``[A, K]``, 0 where invalid; ``ce_AK`` counts with D-PACE only."""
    if kind.decays:
        return decay_weights(ce_AK.shape[1], gamma).to(ce_AK) * valid_AK
    return dpace_weights(torch.exp(-ce_AK), valid_AK, alpha)


def logit_bytes(dtype: torch.dtype, loss: str = "dpace") -> int:
    """Bytes that one logit takes at most: itself, a copy in fp32, its log-probability, kl's targets."""
    wide = torch.promote_types(dtype, torch.float32)
    copy = 0 if wide == dtype else wide.itemsize
    return dtype.itemsize + copy + (4 if LOSSES[loss].needs_final_states else 1) * wide.itemsize


def chunk_anchors(
    num_draft_tokens: int, vocab: int, dtype: torch.dtype, loss: str = "dpace"
) -> int:
    """Anchors whose logits fit :data:`CHUNK_BYTES`; at least one."""
    return max(1, CHUNK_BYTES // (num_draft_tokens * vocab * logit_bytes(dtype, loss)))


class BlockLoss(NamedTuple):
    """What :func:`block_loss` gives; only the total has a gradient.

    Attributes:
        total: sum of the weighted losses, a scalar (fp32; fp64 of fp64).
        weight: sum of the weights, by which ``total`` is a mean. It has no gradient, so parts of a step can
            be summed and divided at the end.
        ce_AK: CE of every position, 0 where invalid.
        right_AK: bool, where a valid position's most likely token is its label.
        candidates_AKC: draft-vocabulary ids of the most likely tokens, those first; none if not asked for.
    """

    total: Tensor
    weight: Tensor
    ce_AK: Tensor
    right_AK: Tensor
    candidates_AKC: Tensor


def block_loss(
    hidden_AKH: Tensor,
    head_VH: Tensor,
    labels_AK: Tensor,
    valid_AK: Tensor,
    *,
    loss: str = "dpace",
    gamma: float = 7.0,
    alpha: float = 0.5,
    verifier_logits: Callable[[slice], Tensor] | None = None,
    num_candidates: int = 0,
) -> BlockLoss:
    """Weighted loss over the valid drafted positions, of the logits ``hidden_AKH @ head_VH.T``.

    The logits would be by far a step's largest tensor (512 anchors, 15 positions, 152K tokens: 2.2 GiB, and
    twice that for each copy in fp32), so no more than :data:`CHUNK_BYTES` of them are alive at a time: those
    of a few anchors become their loss and at once the gradient of their hidden states. An anchor's positions
    are never parted, and weights carry no gradient, so this is exact with every loss.

    Args:
        hidden_AKH: the drafter's final hidden states. Under autocast they are multiplied in its dtype.
        head_VH: output projection; gets a gradient where it requires one.
        labels_AK: int64 draft-vocabulary ids of the verifier's tokens; ignored where invalid.
        valid_AK: bool, whether the position lies on what the verifier generated.
        loss: ``dpace`` (CE, D-PACE weights), ``ce`` (CE, exponential decay) or ``kl`` (KL from the
            verifier's distribution over the draft vocabulary, exponential decay).
        gamma: decay constant of ``ce`` and ``kl``.
        alpha: smoothing of ``dpace``.
        verifier_logits: gives the verifier's logits ``[a, K, V]`` at a slice of the anchors, for ``kl``.
        num_candidates: how many of a position's most likely tokens to name.

    Raises:
        ValueError: an unknown loss, or no verifier's logits for ``kl``.
    """
    if loss not in LOSSES:
        raise ValueError(f"unknown loss {loss!r}; use one of {', '.join(LOSSES)}")
    kind = LOSSES[loss]
    if not kind.needs_final_states:
        verifier_logits = None
    elif verifier_logits is None:
        raise ValueError(f"the {loss} loss needs the verifier's logits")

    weights = functools.partial(position_weights, kind=kind, gamma=gamma, alpha=alpha)
    device = hidden_AKH.device.type
    dtype = hidden_AKH.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    step = chunk_anchors(labels_AK.shape[1], len(head_VH), dtype, loss)
    with torch.autocast(device, enabled=False):
        return BlockLoss(
            *_LossByChunks.apply(
                hidden_AKH,
                head_VH,
                labels_AK,
                valid_AK,
                (dtype, step, weights, verifier_logits, num_candidates),
            )
        )


class _LossByChunks(torch.autograd.Function):
    """The loop over anchors of :func:`block_loss`; its gradient is made in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden_AKH: Tensor, head_VH: Tensor, labels_AK: Tensor, valid_AK: Tensor, how: Any
    ) -> tuple[Tensor, ...]:
        dtype, step, weights_of, verifier_logits, num_candidates = how
        head = head_VH.to(dtype)
        wide = torch.promote_types(dtype, torch.float32)
        num_anchors, num_draft, width = hidden_AKH.shape
        total = hidden_AKH.new_zeros((), dtype=wide)
        weight = torch.zeros_like(total)
        ce_AK = hidden_AKH.new_zeros(num_anchors, num_draft, dtype=wide)
        right_AK = torch.zeros_like(valid_AK)
        candidates = labels_AK.new_zeros(num_anchors, num_draft, num_candidates)
        grad_hidden = grad_head = None
        if ctx.needs_input_grad[0]:
            grad_hidden = hidden_AKH.new_empty(hidden_AKH.shape)
        if ctx.needs_input_grad[1]:
            grad_head = head_VH.new_zeros(head_VH.shape, dtype=wide)
        for first in range(0, num_anchors, step):
            part = slice(first, first + step)
            valid = valid_AK[part]
            # Where a label does not count it may be no row of the head.
            labels = torch.where(valid, labels_AK[part], 0)
            rows = labels.flatten().unsqueeze(1)
            hidden = hidden_AKH[part].reshape(-1, width).to(dtype)
            logits = F.linear(hidden, head)
            log_probs = logits.log_softmax(-1, dtype=wide)
            if num_candidates:
                best = logits.topk(num_candidates, dim=-1).indices
                candidates[part] = best.view(*labels.shape, num_candidates)
                likely = best[:, 0]
            else:
                # argmax takes three times as long on a CPU.
                likely = log_probs.max(-1).indices
            right_AK[part] = (likely.view_as(labels) == labels) & valid
            ce = torch.where(valid, -log_probs.gather(1, rows).view_as(labels), 0)
            ce_AK[part] = ce
            weights = weights_of(ce, valid)
            if verifier_logits is None:
                term = ce
                grad = log_probs.exp_()
                grad.scatter_add_(1, rows, torch.full_like(rows, -1, dtype=wide))
            else:
                targets = verifier_logits(part).flatten(0, 1).log_softmax(-1, dtype=wide)
                probs = targets.exp()
                term = targets.sub_(log_probs).mul_(probs).sum(-1).view_as(labels)
                # A weight of 0 does not silence what is not finite.
                term = torch.where(valid, term, 0)
                grad = log_probs.exp_().sub_(probs)
                del targets, probs
            total += (term * weights).sum()
            weight += weights.sum()
            # Rounded for the GEMM into the logits' memory.
            grad = torch.mul(grad, weights.flatten().unsqueeze(1), out=logits)
            del log_probs
            if grad_hidden is not None:
                grad_hidden[part] = torch.mm(grad, head).view(-1, num_draft, width)
            if grad_head is not None:
                grad_head += torch.mm(grad.T, hidden)
            del grad, logits
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.mark_non_differentiable(weight, ce_AK, right_AK, candidates)
        return total, weight, ce_AK, right_AK, candidates

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        grads = (
            None if grad is None else grad * grad_total.to(grad.dtype) for grad in ctx.saved_tensors
        )
        return (*grads, None, None, None)
