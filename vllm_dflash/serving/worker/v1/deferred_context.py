"""The drafter's context K/V of steps without a draft pass: kept as features, written in one go or never."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.v1.kv_cache_interface import FullAttentionSpec, RSWASpec, UniformTypeKVCacheSpecs

from vllm_dflash import ops

#: Features that may wait. Rows that wait for long belong to requests that end before anything is drafted.
_BYTES = 32 * 2**20
#: Where so large a share of the room is taken, the oldest rows of another such share are written.
_FULL, _PORTION = 3 / 4, 1 / 4
_NOBODY = 0


class DeferredContext:
    """Rows of the verifier's features whose keys and values the drafter's cache still lacks.

    A step that drafts nothing has a row or a few of new context for each request. The drafter's
    projections read all their weights for them, however few they are, so rows are gathered and written
    together: when there are enough, and before anything drafts.

    Rows of a request that leaves the batch are written then, since its cache blocks may pass to others. Has
    it ended, only those in full blocks are: prefix caching may show them to a later request, and nobody
    will read the others. A step that takes blocks from running requests and gives them others at once
    (preempted and resumed) is preceded by writing everything.

    That holds while one KV cache group has all layers, and keeps all their blocks. With several, as hybrids
    have and verifiers with sliding layers, a block may pass to another group, whose recurrent states or
    verifier's keys it then holds; a group of sliding layers gives away blocks of running requests. There all
    rows are written when a request leaves, and before a step that brings any request new blocks.

    Args:
        proposer: ours, with its KV cache laid out.
        at_once: every step writes its rows, as a KV connector needs, which passes blocks on as they are.
    """

    def __init__(self, proposer: Any, at_once: bool = False) -> None:
        config = proposer.vllm_config
        self.proposer = proposer
        self.at_once = at_once or config.kv_transfer_config is not None
        groups = proposer.runner.kv_cache_config.kv_cache_groups
        self._single = len(groups) == 1 and _keeps_blocks(groups[0].kv_cache_spec)
        self._block_size = groups[0].kv_cache_spec.block_size
        self._prefix_caching = bool(config.cache_config.enable_prefix_caching)
        self._rows: tuple[Tensor, Tensor, Tensor] | None = None
        #: Whose the rows are, ``[rows]``, by number.
        self._owner_R = np.empty(0, dtype=np.int64)
        self._end = 0
        self._requests: tuple[str, ...] = ()
        self._number: dict[str, int] = {}
        self._numbers_B = np.empty(0, dtype=np.int64)
        self._made = _NOBODY
        #: Of requests that had rows written past those that wait: how many tokens they had at most.
        self._known: dict[int, int] = {}
        # Rotary positions of images are not token indices.
        self._mrope = bool(proposer.runner.uses_mrope)

    @property
    def waiting(self) -> int:
        """Rows that are not written yet."""
        return int(np.count_nonzero(self._owner_R[: self._end]))

    def before_step(self, scheduler_output: Any) -> None:
        """Writes what a step is about to take the blocks of."""
        if self.at_once:
            return
        new, going_on = (
            scheduler_output.scheduled_new_reqs,
            scheduler_output.scheduled_cached_reqs,
        )
        if self._single:
            ended = scheduler_output.finished_req_ids
            moved = scheduler_output.preempted_req_ids or going_on.resumed_req_ids
            if moved or (ended and any(request.req_id in ended for request in new)):
                self.flush()
        elif new or any(blocks is not None for blocks in going_on.new_block_ids):
            self.flush()

    def add(
        self,
        features_TF: Tensor,
        anchor_ids: Tensor,
        positions: Tensor,
        metadata: Any,
        num_rejected: Tensor | None,
    ) -> None:
        """Takes a step's rows; rejected ones are left out.

        Args:
            features_TF: valid during this step only.
            anchor_ids: ``[B]``, positions: ``[T]`` or ``[3, T]``, metadata, num_rejected: as the proposer
                gets them.
        """
        proposer = self.proposer
        num_tokens = features_TF.shape[0]
        if num_rejected is None and proposer.kv_groups.single:
            # The verifier's step wrote its own keys and values of these tokens to the same slots.
            positions = positions[0] if positions.dim() == 2 else positions
            slots = metadata.slot_mapping[:num_tokens].unsqueeze(0)
        else:
            proposer._block_inputs.build(proposer, anchor_ids, positions, metadata, num_rejected)
            positions = proposer._context_positions_buffer[:num_tokens]
            slots = proposer.context_slots[:, :num_tokens]
        if self.at_once:
            self._write(features_TF, positions, slots)
            return
        self._meet()
        owner_T, num_requests = self._numbers_B, len(self._requests)
        if num_tokens != num_requests:
            starts = metadata.query_start_loc_cpu[: num_requests + 1].numpy()
            owner_T = np.repeat(owner_T, np.diff(starts))
        if num_rejected is not None:
            kept = (slots[0] != ops.PAD_SLOT).nonzero().flatten()
            features_TF = features_TF.index_select(0, kept)
            positions, slots = positions.index_select(0, kept), slots.index_select(1, kept)
            owner_T = owner_T[kept.cpu().numpy()]
        self._keep(features_TF, positions, slots, owner_T)

    def _keep(
        self, features_TF: Tensor, positions: Tensor, slots: Tensor, owner_T: np.ndarray
    ) -> None:
        if self._rows is None:
            num = max(_BYTES // (features_TF.shape[1] * features_TF.element_size()), 1)
            self._rows = (
                features_TF.new_empty(num, features_TF.shape[1]),
                positions.new_empty(num),
                slots.new_empty(slots.shape[0], num),
            )
            self._owner_R = np.full(num, _NOBODY)
        room = len(self._owner_R)
        if len(owner_T) > _PORTION * room:
            self.flush()
            self._write(features_TF, positions, slots)
            return
        if self._end + len(owner_T) > room:
            self._make_room()
        begin, end = self._end, self._end + len(owner_T)
        features, places, caches = self._rows
        features[begin:end] = features_TF
        places[begin:end] = positions
        caches[:, begin:end] = slots
        self._owner_R[begin:end] = owner_T
        self._end = end

    def _make_room(self) -> None:
        """Closes the gaps; where there are few, writes the oldest rows. All at once would hold up a step."""
        assert self._rows is not None
        room, rows = len(self._owner_R), np.flatnonzero(self._owner_R[: self._end])
        if len(rows) > _FULL * room:
            portion = math.ceil(_PORTION * room)
            self._write_rows(rows[:portion])
            rows = rows[portion:]
        owner_R = self._owner_R[rows]
        self._end = len(rows)
        at = torch.from_numpy(rows).to(self._rows[0].device)
        for kept, dim in zip(self._rows, (0, 0, 1), strict=True):
            kept.narrow(dim, 0, self._end).copy_(kept.index_select(dim, at))
        self._owner_R[: self._end] = owner_R
        self._owner_R[self._end :] = _NOBODY

    def _meet(self) -> None:
        """Numbers the requests of the step, and parts with those that it lacks."""
        requests = tuple(self.proposer.runner.input_batch.req_ids)
        if requests == self._requests:
            return
        self._part_with(set(self._number).difference(requests))
        for request in requests:
            if request not in self._number:
                self._made += 1
                self._number[request] = self._made
        self._requests = requests
        self._numbers_B = np.array([self._number[r] for r in requests], dtype=np.int64)

    def _part_with(self, gone: set[str]) -> None:
        """Writes what is still of use of the rows of requests that have left the batch."""
        if not self._single:
            self._number = {r: n for r, n in self._number.items() if r not in gone}
            self.flush()
            return
        numbers = {self._number.pop(request): request for request in gone}
        going_on = self.proposer.runner.requests
        rows = np.flatnonzero(np.isin(self._owner_R[: self._end], list(numbers)))
        if len(rows):
            preempted = [n for n, request in numbers.items() if request in going_on]
            wanted = self._in_full_blocks(rows) | np.isin(self._owner_R[rows], preempted)
            self._write_rows(rows[wanted])
            self._owner_R[rows] = _NOBODY
            if not self._owner_R[: self._end].any():
                self._end = 0
        for number in numbers:
            self._known.pop(number, None)

    def _in_full_blocks(self, rows: np.ndarray) -> np.ndarray:
        """Whether rows, all of their requests, are in cache blocks that prefix caching may show to others."""
        if self._rows is None or not self._prefix_caching or self._mrope:
            return np.full(len(rows), self._prefix_caching)
        position_R = self._rows[1][torch.from_numpy(rows)].cpu().numpy()
        owners, at_R = np.unique(self._owner_R[rows], return_inverse=True)
        lengths = np.array([self._known.get(n, 0) for n in owners.tolist()], dtype=np.int64)
        np.maximum.at(lengths, at_R, position_R + 1)
        return position_R < lengths[at_R] // self._block_size * self._block_size

    def flush_for(self, batch_rows: Sequence[int]) -> int:
        """Writes what a draft pass for the requests in these rows of the batch reads; how many rows it was.

        That is their own rows and those in full blocks of others, since they may share them. The step's own
        rows are written with the draft pass, for all of its requests.
        """
        if not (self._end and self._single):
            waited = self.waiting
            self.flush()
            return waited
        self._meet()
        batch = self.proposer.runner.input_batch
        for row, number in enumerate(self._numbers_B.tolist()):
            # After this step, at most: what its drafts brought is not counted in yet.
            self._known[number] = int(batch.num_tokens_no_spec[row]) + self.proposer.max_query_len
        rows = np.flatnonzero(self._owner_R[: self._end])
        of_them = np.isin(self._owner_R[rows], self._numbers_B[batch_rows])
        rows = rows[of_them | self._in_full_blocks(rows)]
        self._write_rows(rows)
        self._owner_R[rows] = _NOBODY
        return len(rows)

    def flush(self) -> None:
        """Writes all rows to the drafter's cache."""
        if self._end:
            self._write_rows(np.flatnonzero(self._owner_R[: self._end]))
        self._owner_R[: self._end] = _NOBODY
        self._end = 0

    def _write_rows(self, rows: np.ndarray) -> None:
        if self._rows is None or not len(rows):
            return
        features, positions, slots = self._rows
        at = torch.from_numpy(rows).to(features.device)
        self._write(
            features.index_select(0, at), positions.index_select(0, at), slots.index_select(1, at)
        )

    def _write(self, features_TF: Tensor, positions: Tensor, slots: Tensor) -> None:
        proposer = self.proposer
        model = proposer.model
        states = model.combine_hidden_states(features_TF)
        groups = proposer.kv_groups
        model.precompute_and_store_context_kv(
            states,
            positions,
            slots[0] if groups.single else [slots[row] for row in groups.layer_rows],
        )


def _keeps_blocks(spec: Any) -> bool:
    """Whether a KV cache group keeps all blocks of a request while it runs."""
    if isinstance(spec, UniformTypeKVCacheSpecs):
        return all(_keeps_blocks(inner) for inner in spec.kv_cache_specs.values())
    return isinstance(spec, FullAttentionSpec) and not isinstance(spec, RSWASpec)
