"""``BlockInputs`` against vLLM's own ``DFlashProposer.set_inputs_first_pass``."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from vllm_dflash.serving.worker.v1.kv_groups import KVGroups

K, BLOCK, LENGTH, REQUESTS, TOKENS = 5, 16, 256, 8, 128
MASK = 42


def make_proposer() -> SimpleNamespace:
    """The buffers of vLLM's proposer, which both ways fill; draft layers in one KV-cache group."""
    context_slots, query_slots = torch.full((2, 1, TOKENS), -7)
    return SimpleNamespace(
        runner=None,
        sample_from_anchor=False,
        draft_rows=None,
        max_query_len=K + 1,
        kv_groups=KVGroups([], [0], []),
        kv_block_sizes=[BLOCK],
        context_slots=context_slots,
        query_slots=query_slots,
        device=torch.device("cpu"),
        max_batch_size=REQUESTS,
        max_model_len=LENGTH,
        block_size=BLOCK,
        num_speculative_tokens=K,
        parallel_drafting_token_id=MASK,
        dflash_causal=False,
        input_ids=torch.full((TOKENS,), -7, dtype=torch.int32),
        positions=torch.full((TOKENS,), -7),
        arange=torch.arange(TOKENS + 1, dtype=torch.int32),
        token_arange_np=np.arange(TOKENS),
        _context_positions_buffer=torch.full((TOKENS,), -7),
        _context_slot_mapping_buffer=context_slots[0],
        _slot_mapping_buffer=query_slots[0],
    )


def make_metadata(lens: list[int], seq_lens: list[int], seed: int = 0) -> Any:
    from vllm.v1.attention.backend import CommonAttentionMetadata

    g = torch.Generator().manual_seed(seed)
    start = torch.tensor([0, *lens], dtype=torch.int32).cumsum(0).int()
    lengths = torch.tensor(seq_lens, dtype=torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=start,
        query_start_loc_cpu=start,
        seq_lens=lengths,
        seq_lens_cpu_upper_bound=lengths.clone(),
        num_reqs=len(lens),
        num_actual_tokens=sum(lens),
        max_query_len=max(lens),
        max_seq_len=max(seq_lens),
        block_table_tensor=torch.randint(
            1, 99, (len(lens), LENGTH // BLOCK), generator=g, dtype=torch.int32
        ),
        slot_mapping=torch.zeros(sum(lens), dtype=torch.int64),
    )


@pytest.mark.parametrize(
    ("lens", "rejected"),
    [([6, 6], [0, 4]), ([1], [0]), ([40, 6, 1], [0, 5, 0]), ([17, 16], None)],
    ids=["decode", "one", "mixed", "prefill"],
)
@pytest.mark.parametrize("plain", [False, True], ids=["op", "plain"])
def test_equal_to_vllms(lens, rejected, plain) -> None:
    from vllm.platforms import current_platform
    from vllm.v1.spec_decode.dflash import DFlashProposer as Stock

    from vllm_dflash.serving.worker.v1.block_inputs import BlockInputs

    current_platform.import_kernels()
    current_platform.register_triton_kernel_overrides()
    starts = [11 * i for i in range(len(lens))]
    seq_lens = [s + n for s, n in zip(starts, lens, strict=True)]
    positions = torch.cat([torch.arange(s, s + n) for s, n in zip(starts, lens, strict=True)])
    anchors = torch.randint(0, 300, (len(lens),), dtype=torch.int32)
    given = None if rejected is None else torch.tensor(rejected, dtype=torch.int32)
    stock, ours = make_proposer(), make_proposer()
    states = torch.zeros(len(positions), 4)
    want = Stock.set_inputs_first_pass(
        stock, positions, anchors, positions, states, None, make_metadata(lens, seq_lens), given
    )
    got = BlockInputs(ours, plain).build(
        ours, anchors, positions, make_metadata(lens, seq_lens), given
    )

    assert got[0] == want[0]
    assert torch.equal(got[1], want[1])
    for name in vars(want[2]):
        a, b = getattr(got[2], name), getattr(want[2], name)
        assert torch.equal(a, b) if isinstance(b, torch.Tensor) else a == b, name
    for name in ("input_ids", "positions", "_slot_mapping_buffer"):
        assert torch.equal(getattr(ours, name), getattr(stock, name)), name
    # Rejected rows: vLLM writes them to slots that the block overwrites, we write them nowhere.
    valid = torch.ones(len(positions), dtype=torch.bool)
    for end, n in zip(np.cumsum(lens), rejected or [], strict=False):
        valid[end - n : end] = False
    T = len(positions)
    for name in ("_context_positions_buffer", "_context_slot_mapping_buffer"):
        a, b = getattr(ours, name), getattr(stock, name)
        assert torch.equal(a[:T][valid], b[:T][valid]), name
        assert torch.equal(a[T:], b[T:]), name
    assert (ours._context_slot_mapping_buffer[:T][~valid] == -1).all()


@pytest.mark.parametrize("rows", [[1], [0, 2], [2]])
def test_blocks_of_some_requests(rows) -> None:
    """As if the batch had only those; the context's slots are those of all."""
    from vllm_dflash.serving.worker.v1.block_inputs import BlockInputs

    lens, seq_lens, rejected = [40, 6, 1], [40, 17, 23], torch.tensor([0, 5, 0])
    positions = torch.cat([torch.arange(s - n, s) for s, n in zip(seq_lens, lens, strict=True)])
    anchors = torch.tensor([7, 8, 9], dtype=torch.int32)
    whole, some = make_proposer(), make_proposer()
    kept = some.draft_rows = torch.tensor(rows)
    results = [
        BlockInputs(p, plain=False).build(
            p, anchors, positions, make_metadata(lens, seq_lens), rejected
        )
        for p in (whole, some)
    ]
    (_, indices, all_blocks), (num_queries, some_indices, blocks) = results
    Q, B = K + 1, len(rows)
    assert num_queries == blocks.num_actual_tokens == B * Q
    assert blocks.num_reqs == B
    assert torch.equal(some_indices, indices[: B * K])
    assert blocks.query_start_loc.tolist() == [Q * i for i in range(B + 1)]
    for name in ("seq_lens", "seq_lens_cpu_upper_bound", "block_table_tensor"):
        assert torch.equal(getattr(blocks, name), getattr(all_blocks, name)[kept]), name
    at = (kept[:, None] * Q + torch.arange(Q)).flatten()
    for name in ("input_ids", "positions", "_slot_mapping_buffer"):
        assert torch.equal(getattr(some, name)[: B * Q], getattr(whole, name)[at]), name
    assert torch.equal(blocks.slot_mapping, whole._slot_mapping_buffer[at])
    assert torch.equal(some._context_slot_mapping_buffer, whole._context_slot_mapping_buffer)


def test_rows_of_mrope_and_the_end_of_the_model() -> None:
    """M-RoPE positions have three equal rows for text; slots stop at the longest sequence allowed."""
    from vllm_dflash.serving.worker.v1.block_inputs import BlockInputs

    proposer = make_proposer()
    positions = torch.arange(LENGTH - 4, LENGTH - 1)
    metadata = make_metadata([3], [LENGTH - 1])
    BlockInputs(proposer, plain=False).build(
        proposer, torch.tensor([1]), positions.expand(3, -1), metadata, torch.tensor([0])
    )
    assert proposer.positions[: K + 1].tolist() == [LENGTH - 1] * (K + 1)
    slots = proposer._slot_mapping_buffer[: K + 1]
    assert slots[0] >= 0
    assert (slots[1:] == -1).all()
