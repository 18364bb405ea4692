"""How the candidate selector of DFlash 2 learns: its loss, its start, what is exported of it.

Shape suffixes as in modeling/dflash2.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vllm_dflash.modeling.dflash2 import SELECTOR, CandidateSelector, FactoredSelector
from vllm_dflash.modeling.losses import CHUNK_BYTES

if TYPE_CHECKING:
    from vllm_dflash.modeling.drafter import Drafter
    from vllm_dflash.training.learner import SharedHead

#: Most by which codebooks may differ from projections of the verifier's tables, as a share of their length;
#: bfloat16 rounds by a tenth of that.
_RESIDUAL = 0.02
#: Rows of a table that are converted at once.
_ROWS = 16384


class SelectorLoss(NamedTuple):
    """Of the positions of a part of a step.

    Attributes:
        ce_AK: cross entropy over the candidates, 0 where there is nothing to learn. It has a gradient.
        found_AK: bool, where a valid position's label is a candidate.
        right_AK: bool, where the selector takes a valid position's label behind the right token.
    """

    ce_AK: Tensor
    found_AK: Tensor
    right_AK: Tensor


def selector_loss(
    drafter: Drafter,
    head: SharedHead,
    hidden_AKH: Tensor,
    anchors_A: Tensor,
    labels_AK: Tensor,
    valid_AK: Tensor,
    candidates_AKC: Tensor,
) -> SelectorLoss:
    """Cross entropy over each position's candidates, behind the right token of the position before.

    A position whose label is no candidate teaches nothing. Public trainers put the label in the place of the
    last candidate, which teaches to prefer unlikely ones: where a drafter finds few labels, its first
    position then drafts worse than by the logits alone.

    Args:
        hidden_AKH: the drafter's final hidden states, which learn too.
        anchors_A: verifier ids of the tokens in front of the first position.
        labels_AK: draft-vocabulary ids of the right tokens.
        candidates_AKC: draft-vocabulary ids, the most likely first.
    """
    labels_AK = torch.where(valid_AK, labels_AK, 0)
    there_AKC = candidates_AKC == labels_AK.unsqueeze(-1)
    found_AK = there_AKC.any(-1) & valid_AK
    places_AK = there_AKC.long().argmax(-1)
    before_AK = torch.cat((anchors_A.unsqueeze(1), head.tokens(labels_AK[:, :-1])), dim=1)

    def part(hidden: Tensor, before: Tensor, candidates: Tensor, places: Tensor) -> Tensor:
        scores = candidate_scores(drafter, head, hidden, before, candidates).float()
        ce = F.cross_entropy(scores.flatten(0, 1), places.flatten(), reduction="none")
        right_AK.append(scores.detach().argmax(-1) == places)
        return ce.view_as(places)

    right_AK: list[Tensor] = []
    rows = head.lm_head[:1].numel() * head.lm_head.element_size()
    step = max(1, CHUNK_BYTES // (candidates_AKC[:1].numel() * rows))
    tensors = (hidden_AKH, before_AK, candidates_AKC, places_AK)
    if step >= len(hidden_AKH):
        ce_AK = part(*tensors)
    else:
        # The candidates' rows of lm_head are read again in the backward pass, not kept.
        ce_AK = torch.cat(
            [
                checkpoint(part, *parts, use_reentrant=False, preserve_rng_state=False)
                for parts in zip(*(t.split(step) for t in tensors), strict=True)
            ]
        )
    right = torch.cat(right_AK[: -(-len(hidden_AKH) // step)]) & found_AK
    # What is invalid may be not finite, and 0 times that is no 0.
    return SelectorLoss(torch.where(found_AK, ce_AK, 0), found_AK, right)


def candidate_scores(
    drafter: Drafter, head: SharedHead, hidden: Tensor, before: Tensor, candidates: Tensor
) -> Tensor:
    """Logits and scores ``[..., C]`` of candidates.

    Args:
        hidden: the drafter's ``[..., H]``.
        before: verifier ids of the tokens in front ``[...]``.
        candidates: draft-vocabulary ids ``[..., C]``.
    """
    projection, selector = head.projection(drafter), drafter.candidate_selector
    before = before.clamp_max(drafter.config.vocab_size - 1)
    rows = F.embedding(candidates, projection)
    logits = (rows.to(hidden.dtype) @ hidden.unsqueeze(-1)).squeeze(-1)
    if isinstance(selector, CandidateSelector):
        return logits + selector(hidden, before, head.tokens(candidates))
    assert isinstance(selector, FactoredSelector)
    tables = head.verifier_lm_head
    if projection is not tables:
        rows = F.embedding(candidates, tables)
    return logits + selector(hidden, F.embedding(before, head.embedding), rows)


# -- weights -----------------------------------------------------------------------------------------


def factors(weights: dict[str, Tensor], head: SharedHead) -> dict[str, Tensor] | None:
    """A checkpoint's weights with the projections that its codebooks were multiplied out of; None if they
    were not."""
    out = dict(weights)
    size = len(out[f"{SELECTOR}.predecessor_codebook"])
    rows = slice(None) if head.draft_token_ids is None else head.draft_token_ids
    for name, table, rows_of in (
        ("predecessor", head.embedding[:size], slice(None)),
        ("successor", head.verifier_lm_head, rows),
    ):
        codebook = out.pop(f"{SELECTOR}.{name}_codebook").to(table.device)[rows_of]
        projection = _projection(table, codebook)
        residual = torch.linalg.vector_norm(table.float() @ projection - codebook.float())
        if residual > _RESIDUAL * torch.linalg.vector_norm(codebook.float()):
            return None
        out[f"{SELECTOR}.{name}_projection"] = projection
    return out


def _projection(table_VE: Tensor, codebook_VR: Tensor) -> Tensor:
    """``[E, R]`` by least squares."""
    width = table_VE.shape[1]
    gram = torch.zeros(width, width + codebook_VR.shape[1], dtype=torch.float64)
    for first in range(0, len(table_VE), _ROWS):
        rows = table_VE[first : first + _ROWS].double().cpu()
        both = torch.cat((rows, codebook_VR[first : first + _ROWS].double().cpu()), dim=1)
        gram += rows.T @ both
    inverse = torch.linalg.pinv(gram[:, :width], hermitian=True)
    return (inverse @ gram[:, width:]).float().to(table_VE.device)
