"""What DFlash 2 adds: convolutions around the sublayers, and a selector that makes blocks coherent.

Arithmetic and parameter names are those of z-lab's checkpoints, as vLLM and speculators have them. With
convolutions that change nothing and a selector that scores every pair with 0 the drafter is the plain one.

Shape suffixes: A blocks, B tokens of a block, K drafted positions, C candidates of a position, H drafter
hidden size, E verifier hidden size, V vocabulary, R rank of the selector, G channel groups.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vllm_dflash.config import CandidateHead

#: Prefix of the selector's tensors.
SELECTOR = "candidate_selector"


class GroupedConv(nn.Module):
    """Causal convolutions over a block's tokens, in front of a sublayer and behind it.

    A token's kernels are learned ones and what a projection of the sublayer's input adds, equal for the
    channels of a group. Nothing crosses the start of a block.
    """

    def __init__(self, hidden_size: int, head: CandidateHead) -> None:
        super().__init__()
        self.num_groups = hidden_size // head.conv_group_size
        self.taps = head.conv_kernel_size
        self.base_kernel = nn.Parameter(torch.empty(2, self.taps, hidden_size))
        self.kernel_projection = nn.Linear(hidden_size, 2 * self.taps * self.num_groups, bias=False)

    @torch.no_grad()
    def init_neutral(self) -> None:
        """Makes both convolutions change nothing."""
        self.base_kernel.zero_()
        self.base_kernel[:, 0] = 1.0
        self.kernel_projection.weight.zero_()

    def prepare(self, x_ABH: Tensor) -> tuple[Tensor, Tensor]:
        """The sublayer's input, and the kernels ``[A, B, taps, G]`` for its output."""
        kernels = self.kernel_projection(x_ABH)
        kernels = kernels.view(*x_ABH.shape[:-1], 2, self.taps, self.num_groups)
        return self._convolve(x_ABH, kernels[..., 0, :, :], 0), kernels[..., 1, :, :]

    def finish(self, y_ABH: Tensor, kernels: Tensor) -> Tensor:
        """What the residual stream gets of a sublayer's output."""
        return self._convolve(y_ABH, kernels, 1)

    def _convolve(self, x_ABH: Tensor, kernels: Tensor, side: int) -> Tensor:
        x = x_ABH.unflatten(-1, (self.num_groups, -1))
        base = self.base_kernel[side].unflatten(-1, (self.num_groups, -1))
        out = (base[0] + kernels[..., 0, :, None]) * x
        for tap in range(1, min(self.taps, x.shape[1])):
            # Of the tokens before, zeros at the block's start.
            before = F.pad(x[:, :-tap], (0, 0, 0, 0, tap, 0))
            out = out + (base[tap] + kernels[..., tap, :, None]) * before
        return out.flatten(-2)


class CandidateSelector(nn.Module):
    """Scores candidates of a position by the token in front: ``< A[p] * (P h), B[c] >`` beside their logits.

    A row of both codebooks is a token's, by the verifier's ids.
    """

    def __init__(self, vocab_size: int, hidden_size: int, rank: int) -> None:
        super().__init__()
        self.predecessor_codebook = nn.Parameter(torch.empty(vocab_size, rank))
        self.successor_codebook = nn.Parameter(torch.empty(vocab_size, rank))
        self.hidden_projection = nn.Linear(hidden_size, rank, bias=False)

    @torch.no_grad()
    def init_neutral(self) -> None:
        """Makes all scores 0, whatever the codebooks will be."""
        self.predecessor_codebook.zero_()
        self.successor_codebook.zero_()
        self.hidden_projection.weight.zero_()

    def forward(self, hidden: Tensor, predecessors: Tensor, candidates: Tensor) -> Tensor:
        """Scores ``[..., C]``.

        Args:
            hidden: of the drafter, ``[..., H]``.
            predecessors: token in front of each position, ``[...]``.
            candidates: tokens to score, ``[..., C]``.
        """
        context = F.embedding(predecessors, self.predecessor_codebook)
        context = context * self.hidden_projection(hidden)
        successors = F.embedding(candidates, self.successor_codebook)
        return (successors @ context.unsqueeze(-1)).squeeze(-1)


class FactoredSelector(nn.Module):
    """The selector where it learns: its codebooks are projections of the verifier's embedding and lm_head.

    What is learned of a token then serves others too, so that little data suffices: E R parameters for a
    codebook and not V R. Exported with the projections multiplied out, it is a :class:`CandidateSelector`.
    """

    def __init__(self, verifier_hidden_size: int, hidden_size: int, rank: int) -> None:
        super().__init__()
        self.predecessor_projection = nn.Parameter(torch.empty(verifier_hidden_size, rank))
        self.successor_projection = nn.Parameter(torch.empty(verifier_hidden_size, rank))
        self.hidden_projection = nn.Linear(hidden_size, rank, bias=False)

    @torch.no_grad()
    def init_neutral(self) -> None:
        """Makes all scores 0, whatever the projections will be."""
        self.predecessor_projection.zero_()
        self.successor_projection.zero_()
        self.hidden_projection.weight.zero_()

    @torch.no_grad()
    def init_projections(self, embedding_VE: Tensor, lm_head_VE: Tensor) -> None:
        """Codebooks of the tables' principal components, all as long: what is learned then has one scale."""
        for projection, table in (
            (self.predecessor_projection, embedding_VE),
            (self.successor_projection, lm_head_VE),
        ):
            table = table.float()
            lengths, directions = torch.linalg.eigh(table.T @ table / len(table))
            lengths, directions = lengths.flip(-1), directions.flip(-1)
            kept = torch.arange(projection.shape[1], device=table.device) % table.shape[1]
            least = 1e-6 * lengths[0].clamp_min(1e-30)
            projection.copy_((directions * lengths.clamp_min(least).rsqrt())[:, kept])

    def forward(self, hidden: Tensor, predecessors: Tensor, candidates: Tensor) -> Tensor:
        """As the other's, with rows of the embedding ``[..., E]`` and of lm_head ``[..., C, E]`` for ids."""
        context = (predecessors.to(hidden.dtype) @ self.predecessor_projection) * (
            self.hidden_projection(hidden)
        )
        # Projecting one vector back is cheaper than projecting all candidates.
        context = context @ self.successor_projection.T
        return (candidates.to(context.dtype) @ context.unsqueeze(-1)).squeeze(-1)


def multiplied_out(
    weights: dict[str, Tensor],
    embedding_VE: Tensor,
    lm_head_VE: Tensor,
    draft_token_ids: Tensor | None,
) -> dict[str, Tensor]:
    """A drafter's weights with codebooks, as they are exported; those that have them stay as they are.

    Args:
        weights: of a drafter whose selector may be factored.
        embedding_VE: the verifier's token embedding, of as many tokens as the drafter knows.
        lm_head_VE: its output projection, of the draft vocabulary.
        draft_token_ids: verifier ids of those rows; None for all. No other token is a candidate.
    """
    out = dict(weights)
    name = f"{SELECTOR}.predecessor_projection"
    if name in out:
        projection = out.pop(name)
        out[f"{SELECTOR}.predecessor_codebook"] = embedding_VE.to(projection) @ projection
        projection = out.pop(f"{SELECTOR}.successor_projection")
        successors = lm_head_VE.to(projection) @ projection
        ids = torch.arange(len(successors)) if draft_token_ids is None else draft_token_ids
        codebook = successors.new_zeros(len(embedding_VE), successors.shape[1])
        out[f"{SELECTOR}.successor_codebook"] = codebook.index_copy(
            0, ids.to(codebook.device), successors
        )
    return out


def top_candidates(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The most likely tokens ``[..., C]`` of logits ``[..., V]`` in the order of their ids, and their logits.

    In that order the first of equal ones is the lowest id, as without a selector.
    """
    best, ids = logits.topk(count, dim=-1)
    ids, order = ids.sort(dim=-1)
    return ids, best.gather(-1, order)


def transition_scores(
    predecessor_VR: Tensor,
    successor_VR: Tensor,
    context_AKR: Tensor,
    candidates_AKC: Tensor,
    logits_AKC: Tensor,
    anchors_A: Tensor,
) -> Tensor:
    """Scores ``[A, K, C, C]`` of each candidate behind each candidate of the position before; float32.

    Args:
        predecessor_VR, successor_VR: the codebooks.
        context_AKR: projected hidden states.
        candidates_AKC: token ids by which the codebooks are indexed.
        logits_AKC: the candidates' own.
        anchors_A: the tokens in front of the first position, whose rows are all alike.
    """
    first = anchors_A[:, None, None].expand(-1, 1, candidates_AKC.shape[-1])
    before = torch.cat((first, candidates_AKC[:, :-1]), dim=1)
    # A verifier may write tokens that the drafter does not know.
    before = before.clamp_max(len(predecessor_VR) - 1)
    contexts = F.embedding(before, predecessor_VR).float() * context_AKR.float().unsqueeze(2)
    successors = F.embedding(candidates_AKC, successor_VR).float()
    return logits_AKC.float().unsqueeze(2) + contexts @ successors.transpose(-1, -2)


def greedy_walk(scores_AKCC: Tensor) -> Tensor:
    """Index of the candidate that each position takes, int64 ``[A, K]``: the best behind the one before."""
    best = scores_AKCC.argmax(-1)
    at = best[:, 0, :1]
    path = [at]
    for k in range(1, best.shape[1]):
        at = best[:, k].gather(1, at)
        path.append(at)
    return torch.cat(path, dim=1)


def scores_on_path(scores_AKCC: Tensor, path_AK: Tensor) -> Tensor:
    """Scores ``[A, K, C]`` of the candidates behind the tokens that were taken."""
    before = F.pad(path_AK[:, :-1], (1, 0))
    index = before[:, :, None, None].expand(-1, -1, 1, scores_AKCC.shape[-1])
    return scores_AKCC.gather(2, index).squeeze(2)
