"""Inputs for the ops, shared by the tests of every implementation (C++, CUDA emulated, Triton, reference)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CANARY = -77
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
#: build_block's arguments that it writes.
BLOCK_OUTPUTS = (
    "input_ids",
    "query_positions",
    "query_slots",
    "context_positions",
    "context_slots",
    "sample_indices",
    "block_start_loc",
    "block_seq_lens",
    "sample_positions",
    "sample_requests",
    "temperature_out",
    "seeds_out",
)


def block_case(
    context_lens: list[int],
    rejected: list[int] | None,
    *,
    num_draft_tokens: int = 3,
    kv_block_sizes: tuple[int, ...] = (16,),
    starts: list[int] | None = None,
    sample_from_anchor: bool = False,
    states: bool = False,
    lengths: bool = False,
    padding: int = 0,
    max_model_len: int = 256,
    wide: bool = False,
    null_blocks: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments of ``build_block`` by name; outputs hold ``CANARY`` everywhere.

    Args:
        context_lens: tokens of each request in this step.
        rejected: how many of them are rejected.
        starts: position of each request's first token.
        states: with request states, as the V2 runner has them.
        lengths: with ``seq_lens``, as the V1 runner has them.
        padding: elements of every output behind the batch.
        wide: int64 where vLLM has int32.
        null_blocks: with evicted blocks in the tables.
    """
    g = torch.Generator().manual_seed(seed)
    B, T, K = len(context_lens), sum(context_lens), num_draft_tokens
    Q = K if sample_from_anchor else K + 1
    G = len(kv_block_sizes)
    ints = torch.int64 if wide else torch.int32
    if starts is None:
        starts = torch.randint(0, max(1, max_model_len - 80), (B,), generator=g).tolist()
    positions = [torch.arange(s, s + n) for s, n in zip(starts, context_lens, strict=True)]
    R = 2 * B + 3
    tables = []
    for size in kv_block_sizes:
        width = -(-max_model_len // size)
        # A wider buffer, so that the row stride differs from the width.
        table = torch.randint(1, 1000, (B + 1, width + 2), generator=g, dtype=torch.int32)
        if null_blocks:
            table[torch.rand(table.shape, generator=g) < 0.3] = 0
        tables.append(table[:, :width])

    def out(n: int, dtype: torch.dtype = ints) -> Tensor:
        return torch.full((n + padding,), CANARY, dtype=dtype)

    case: dict[str, Any] = {
        "anchor_ids": torch.randint(0, 9999, (R if states else B,), generator=g, dtype=ints),
        "target_positions": torch.cat([*positions, torch.empty(0, dtype=torch.int64)]),
        "query_start_loc": torch.tensor([0, *context_lens]).cumsum(0).to(ints),
        "num_rejected": None if rejected is None else torch.tensor(rejected, dtype=ints),
        "seq_lens": (
            torch.tensor([s + n for s, n in zip(starts, context_lens, strict=True)], dtype=ints)
            if lengths
            else None
        ),
        "block_tables": tables,
        "kv_block_sizes": list(kv_block_sizes),
        "num_draft_tokens": K,
        "mask_token_id": 4242,
        "max_model_len": max_model_len,
        "sample_from_anchor": sample_from_anchor,
        "input_ids": out(B * Q),
        "query_positions": out(B * Q, torch.int64),
        "query_slots": torch.full((G + 1, B * Q + padding), CANARY),
        # Not in order and not from the front, as the groups of a hybrid verifier lie.
        "query_slot_rows": list(range(G, 0, -1)),
        "context_positions": out(T, torch.int64),
        "context_slots": torch.full((G, T + padding), CANARY),
        "sample_indices": out(B * K),
        "block_start_loc": out(B + 1),
        "block_seq_lens": out(B),
    }
    if states:
        case |= {
            "request_index": torch.randperm(R, generator=g)[:B].to(ints),
            "num_sampled": torch.randint(0, 2, (B,), generator=g, dtype=ints),
            "prefill_ids": torch.randint(0, 9999, (R,), generator=g, dtype=ints),
            "temperature": torch.rand(R, generator=g),
            "seeds": torch.randint(0, 2**40, (R,), generator=g),
            "sample_positions": out(B * K, torch.int64),
            "sample_requests": out(B * K, torch.int64),
            "temperature_out": torch.full((R,), float(CANARY)),
            "seeds_out": torch.full((R,), CANARY),
        }
    return case


def clone(case: dict[str, Any]) -> dict[str, Any]:
    """A copy of a case that shares no storage with it and keeps the strides."""

    def copy(value: Any) -> Any:
        if isinstance(value, Tensor):
            base = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype)
            return base.copy_(value)
        if isinstance(value, list):
            return [copy(v) for v in value]
        return value

    return {k: copy(v) for k, v in case.items()}


def kv_case(
    num_tokens: int,
    *,
    num_layers: int = 2,
    num_heads: int = 2,
    head_size: int = 64,
    rotary_dim: int | None = None,
    is_neox: bool = True,
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype | None = None,
    rope_dtype: torch.dtype | None = None,
    layout: str = "NHD",
    kv_block_size: int = 16,
    value_scale: float = 1.0,
    consecutive: bool = False,
    skipped: float = 0.2,
    groups: int = 1,
    non_contiguous: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments of ``store_context_kv`` by name; the caches hold random values.

    Args:
        layout: ``NHD`` or ``HND`` blocks with K beside V as FlashAttention has them, ``split`` for caches of
            their own.
        consecutive: without slots, as the CPU path has its staging rows.
        skipped: share of tokens with the padding slot.
        groups: KV-cache groups with slots of their own.
        non_contiguous: kv as a part of a wider projection.
    """
    g = torch.Generator().manual_seed(seed)
    cache_dtype = cache_dtype or dtype
    rotary_dim = head_size if rotary_dim is None else rotary_dim
    T, L, N, D = num_tokens, num_layers, num_heads, head_size
    wide = torch.randn(T, L * 2 * N * D + (16 if non_contiguous else 0), generator=g).to(dtype)
    kv = wide[:, : L * 2 * N * D].unflatten(1, (L, 2, N, D))
    capacity = max(1, T) if consecutive else T + 40
    block = capacity if consecutive else kv_block_size
    blocks = 1 if consecutive else -(-capacity // block)
    keys, values = [], []
    for _ in range(L):
        if layout == "split" or consecutive:
            pair = [torch.randn(blocks, block, N, D, generator=g).to(cache_dtype) for _ in range(2)]
        else:
            shape = (blocks, N, block, 2 * D) if layout == "HND" else (blocks, block, N, 2 * D)
            cache = torch.randn(*shape, generator=g).to(cache_dtype)
            pair = list((cache.transpose(1, 2) if layout == "HND" else cache).split(D, dim=-1))
        keys.append(pair[0])
        values.append(pair[1])
    slots = torch.stack([torch.randperm(blocks * block, generator=g)[:T] for _ in range(groups)])
    slots[torch.rand(slots.shape, generator=g) < skipped] = -1
    positions = torch.randint(0, 500, (T,), generator=g)
    angles = torch.rand(500, rotary_dim // 2, generator=g) * 6.28
    float8 = cache_dtype in FLOAT8
    return {
        "kv": kv,
        "k_norm_weights": (1 + 0.2 * torch.randn(L, D, generator=g)).to(dtype),
        "eps": 1e-6,
        "positions": positions,
        "cos_sin_cache": torch.cat([angles.cos(), angles.sin()], -1).to(rope_dtype or dtype),
        "is_neox": is_neox,
        "value_scale": value_scale,
        "slots": [] if consecutive else [slots[layer % groups] for layer in range(L)],
        "key_caches": keys,
        "value_caches": values,
        "key_scales": 0.5 + torch.rand(L, generator=g) if float8 else None,
        "value_scales": 0.5 + torch.rand(L, generator=g) if float8 else None,
    }


def assert_caches_close(got: list[Tensor], want: list[Tensor]) -> None:
    """Within one unit in the last place of the dtype, and float32's error where a rotation cancels."""
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        info = torch.finfo(b.dtype)
        rtol = info.eps * (4 if b.dtype == torch.float32 else 1)
        atol = max(2e-6, info.smallest_normal * info.eps)  # the step between float8's subnormals
        torch.testing.assert_close(a.float(), b.float(), rtol=rtol, atol=atol)
