"""Which anchor block may look at what: the layout of packed anchor blocks and its masks.

A block with anchor position p holds the positions p..p+B-1. Its tokens see the features of their
own sequence at positions < p (the verifier has not run the anchor yet when the block is drafted)
and the tokens of their own block: all of them, or in causal layers none behind the token itself. A
sliding layer sees of these only what is less than ``window`` positions away.

Shape suffixes as in drafter.py; Q = queries of a chunk, S = keys of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from vllm_dflash.modeling.attention import folded_bias

#: Queries handled in one attention call. Every call also scores its blocks against each other
#: (masked out), so larger chunks waste work and smaller ones waste launches.
MAX_CHUNK_QUERIES = 512


@dataclass(frozen=True)
class Chunk:
    """Some consecutive anchors of one sequence and the context rows they may see."""

    anchors: slice
    context: slice


@dataclass
class BlockLayout:
    """Anchors of packed sequences, cut into chunks for attention.

    Attributes:
        block_positions_AB: int64 position of every block token.
        context_positions_T: int64 position of every context token in its sequence.
        chunks: cover all anchors in order.
    """

    block_positions_AB: Tensor
    context_positions_T: Tensor
    chunks: list[Chunk]
    _biases: dict = field(default_factory=dict, repr=False)

    @classmethod
    def build(
        cls,
        anchor_positions: list[list[int]],
        context_lens: list[int],
        draft_block_size: int,
        device: torch.device | str = "cpu",
    ) -> BlockLayout:
        """Layout of ``anchor_positions[i]`` over a sequence of ``context_lens[i]`` context tokens.

        Positions start at 0 in each sequence; anchors are best sorted, since a chunk is given the
        context up to its last anchor.

        Raises:
            ValueError: an anchor lies beyond its sequence's features.
        """
        chunks: list[Chunk] = []
        flat: list[int] = []
        positions: list[Tensor] = []
        start = 0
        per_chunk = max(1, MAX_CHUNK_QUERIES // draft_block_size)
        for anchors, length in zip(anchor_positions, context_lens, strict=True):
            for first in range(0, len(anchors), per_chunk):
                group = anchors[first : first + per_chunk]
                if min(group) < 0 or max(group) > length:
                    raise ValueError(
                        f"anchors {min(group)}..{max(group)} need features of every earlier "
                        f"position, the sequence has {length}"
                    )
                at = len(flat)
                chunks.append(Chunk(slice(at, at + len(group)), slice(start, start + max(group))))
                flat.extend(group)
            positions.append(torch.arange(length))
            start += length
        block = torch.tensor(flat, dtype=torch.int64).unsqueeze(1) + torch.arange(draft_block_size)
        context = torch.cat(positions) if positions else torch.empty(0, dtype=torch.int64)
        return cls(block.to(device), context.to(device), chunks)

    def bias(
        self,
        chunk: Chunk,
        window: int | None,
        causal: bool,
        queries_per_key: int,
        dtype: torch.dtype,
    ) -> Tensor:
        """A chunk's mask as :func:`attention.folded_bias` has it; made once a step, shared between layers."""
        key = (chunk.anchors.start, window, causal, queries_per_key, dtype)
        if key not in self._biases:
            mask_QS = self.mask(chunk, window, causal)
            self._biases[key] = folded_bias(mask_QS, queries_per_key, dtype)
        return self._biases[key]

    def mask(self, chunk: Chunk, window: int | None, causal: bool) -> Tensor:
        """Bool mask ``[Q, S]`` of a chunk, True where a query may look; keys are the chunk's
        context rows, then its block tokens."""
        blocks_AB = self.block_positions_AB[chunk.anchors]
        num_anchors, block_size = blocks_AB.shape
        queries = blocks_AB.flatten().unsqueeze(1)
        anchors = blocks_AB[:, :1].expand(-1, block_size).flatten().unsqueeze(1)
        context = self.context_positions_T[chunk.context].unsqueeze(0)
        keys = blocks_AB.flatten().unsqueeze(0)
        owner = torch.arange(num_anchors, device=keys.device).repeat_interleave(block_size)
        see_context = (context < anchors).expand(queries.shape[0], -1)
        see_block = owner.unsqueeze(1) == owner.unsqueeze(0)
        if causal:
            see_block = see_block & (keys <= queries)
        if window is not None:
            see_context = see_context & (queries - context < window)
            see_block = see_block & ((queries - keys).abs() < window)
        return torch.cat((see_context, see_block), dim=1)
