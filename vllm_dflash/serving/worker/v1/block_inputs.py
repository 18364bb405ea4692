"""The V1 proposer's inputs through ``build_block``: one call for a kernel and a dozen tensor operations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vllm_dflash import ops


class BlockInputs:
    """Fills the proposer's own buffers, whose addresses CUDA graphs have recorded.

    Args:
        proposer: ours, with the layout of its KV cache.
        plain: in plain PyTorch, for those who switched the ops off with a drafter that vLLM's kernel does
            not know.
    """

    def __init__(self, proposer: Any, plain: bool) -> None:
        self.plain = plain
        device = proposer.device
        requests = proposer.max_batch_size
        self.start_loc = torch.zeros(requests + 1, dtype=torch.int32, device=device)
        self.seq_lens = torch.zeros(requests, dtype=torch.int32, device=device)
        self.sample_indices = torch.zeros(
            requests * proposer.max_query_len, dtype=torch.int32, device=device
        )

    def build(
        self,
        proposer: Any,
        anchor_ids: Tensor,
        target_positions: Tensor,
        metadata: Any,
        num_rejected: Tensor | None,
    ) -> tuple[int, Tensor, Any]:
        """What ``DFlashProposer.set_inputs_first_pass`` returns for this batch.

        Args:
            anchor_ids: ``[B]``.
            target_positions: ``[T]``, or ``[3, T]`` with M-RoPE, whose rows are equal for text.
            metadata: vLLM's ``CommonAttentionMetadata`` of the verifier's step.
            num_rejected: ``[B]`` or None.

        Returns:
            Number of query tokens, sample indices ``[B*K]``, and the block's attention metadata; of the
            requests in ``proposer.draft_rows`` only, where that is set.
        """
        B, wanted = metadata.batch_size(), proposer.num_speculative_tokens
        # vLLM's batch-size table can ask for none; the context still has to be stored.
        K = max(wanted, 1)
        Q = K if proposer.sample_from_anchor else K + 1
        if target_positions.dim() == 2:
            target_positions = target_positions[0]
        T = target_positions.shape[0]
        groups = proposer.kv_groups
        query_slots = proposer.query_slots[:, : B * Q]
        start_loc, seq_lens = self.start_loc[: B + 1], self.seq_lens[:B]
        sample_indices = self.sample_indices[: B * K]
        ops.build_block(
            anchor_ids=anchor_ids,
            target_positions=target_positions,
            query_start_loc=metadata.query_start_loc[: B + 1],
            num_rejected=num_rejected,
            seq_lens=metadata.seq_lens,
            block_tables=groups.block_tables(proposer.runner, metadata),
            kv_block_sizes=proposer.kv_block_sizes,
            num_draft_tokens=K,
            mask_token_id=proposer.parallel_drafting_token_id,
            max_model_len=proposer.max_model_len,
            sample_from_anchor=proposer.sample_from_anchor,
            input_ids=proposer.input_ids[: B * Q],
            query_positions=proposer.positions[: B * Q],
            query_slots=query_slots,
            context_positions=proposer._context_positions_buffer[:T],
            context_slots=proposer.context_slots[:, :T],
            sample_indices=sample_indices,
            block_start_loc=start_loc,
            block_seq_lens=seq_lens,
            plain=self.plain,
        )
        upper_bound = metadata.seq_lens_cpu_upper_bound
        block_table = metadata.block_table_tensor
        rows = groups.rows = proposer.draft_rows
        if rows is not None:
            B = len(rows)
            self._keep(proposer, rows, Q)
            query_slots = proposer.query_slots[:, : B * Q]
            start_loc, seq_lens = self.start_loc[: B + 1], seq_lens[rows]
            block_table = block_table[rows]
            upper_bound = None if upper_bound is None else upper_bound[rows.to(upper_bound.device)]
            sample_indices = self.sample_indices[: B * K]
        on_cpu = start_loc.device.type == "cpu"
        block = type(metadata)(
            query_start_loc=start_loc,
            # On a GPU the offsets are known here without asking the device.
            query_start_loc_cpu=(
                start_loc if on_cpu else torch.from_numpy(proposer.token_arange_np[: B + 1]) * Q
            ),
            seq_lens=seq_lens,
            seq_lens_cpu_upper_bound=None if upper_bound is None else upper_bound + Q,
            num_reqs=metadata.num_reqs if rows is None else B,
            num_actual_tokens=B * Q,
            max_query_len=Q,
            max_seq_len=metadata.max_seq_len + Q,
            block_table_tensor=block_table,
            slot_mapping=query_slots[0],
            causal=proposer.dflash_causal,
        )
        return B * Q, sample_indices[: B * wanted], block

    @staticmethod
    def _keep(proposer: Any, rows: Tensor, num_queries: int) -> None:
        """Moves the blocks of some requests to the front of the proposer's buffers.

        Offsets and sample indices are those of a batch of that size already: all blocks are of one length.
        """
        each = torch.arange(num_queries, device=rows.device)
        kept = (rows.unsqueeze(1) * num_queries + each).flatten()
        count = len(kept)
        for buffer in (proposer.input_ids, proposer.positions):
            buffer[:count] = buffer[kept]
        proposer.query_slots[:, :count] = proposer.query_slots[:, kept]
