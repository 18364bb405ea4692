"""The drafter's context K/V of steps without a draft pass: kept as features, written in one go."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vllm_dflash import ops


class DeferredContext:
    """Rows of the verifier's features whose keys and values the drafter's cache still lacks.

    A step that drafts nothing has a row or a few of new context for each request. The drafter's
    projections read all their weights for them, however few they are, so rows are gathered and written
    together: when there are enough, and before anything drafts. Rows are written in the order in which they
    came, before rows of a later step; a cache block that has passed to another request meanwhile is written
    by that request's own rows after them.

    That holds while one KV cache group has all layers. With several, as hybrids have and verifiers with
    sliding layers, a block may pass to another group, whose recurrent states or verifier's keys it then
    holds: rows are written before a step that brings any request new blocks.

    Args:
        proposer: ours, with its KV cache laid out.
        num_rows: written when there are as many; 0 for each step at once, as a KV connector needs, which
            passes blocks on as they are.
    """

    def __init__(self, proposer: Any, num_rows: int = 128) -> None:
        if proposer.vllm_config.kv_transfer_config is not None:
            num_rows = 0
        self.proposer, self.num_rows = proposer, num_rows
        self._features: list[Tensor] = []
        self._positions: list[Tensor] = []
        self._slots: list[Tensor] = []
        self._requests: tuple[str, ...] = ()
        self.waiting = 0
        if num_rows and len(proposer.runner.kv_cache_config.kv_cache_groups) > 1:
            self._watch_blocks(proposer.runner)

    def _watch_blocks(self, runner: Any) -> None:
        execute = runner.execute_model

        def execute_model(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            going_on = scheduler_output.scheduled_cached_reqs.new_block_ids
            if scheduler_output.scheduled_new_reqs or any(b is not None for b in going_on):
                self.flush()
            return execute(scheduler_output, *args, **kwargs)

        runner.execute_model = execute_model

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
        requests = tuple(proposer.runner.input_batch.req_ids)
        if requests != self._requests:
            # Cache blocks may have changed hands.
            self.flush()
            self._requests = requests
        num_tokens = features_TF.shape[0]
        if num_rejected is None and proposer.kv_groups.single:
            # The verifier's step wrote its own keys and values of these tokens to the same slots.
            positions = positions[0] if positions.dim() == 2 else positions
            slots = metadata.slot_mapping[:num_tokens].unsqueeze(0)
        else:
            proposer._block_inputs.build(proposer, anchor_ids, positions, metadata, num_rejected)
            positions = proposer._context_positions_buffer[:num_tokens]
            slots = proposer.context_slots[:, :num_tokens]
        if num_tokens >= self.num_rows:
            self.flush()
            self._write(features_TF, positions, slots)
            return
        if num_rejected is not None:
            kept = (slots[0] != ops.PAD_SLOT).nonzero().flatten()
            self._features.append(features_TF.index_select(0, kept))
            self._positions.append(positions.index_select(0, kept))
            self._slots.append(slots.index_select(1, kept))
        else:
            self._features.append(features_TF.clone())
            self._positions.append(positions.clone())
            self._slots.append(slots.clone())
        self.waiting += self._features[-1].shape[0]
        if self.waiting >= self.num_rows:
            self.flush()

    def flush(self) -> None:
        """Writes all rows to the drafter's cache."""
        if self.waiting:
            features = torch.cat(self._features)
            self._write(features, torch.cat(self._positions), torch.cat(self._slots, dim=1))
        self._features, self._positions, self._slots, self.waiting = [], [], [], 0

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
