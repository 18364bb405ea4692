"""The ops in plain PyTorch: what the kernels must compute, and the last fallback.

No data-dependent shapes and no host synchronisation, so they run on any device, under
``torch.compile`` and in CUDA graphs. Arithmetic is float32 with one rounding at the end, as in the kernels.

Letters: B requests, T context tokens, Q query tokens a request, K draft tokens a request, G KV-cache
groups, L draft layers, N KV heads, D head size, R request states.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: vLLM's PAD_SLOT_ID: no cache write touches it.
PAD_SLOT = -1
#: vLLM's null block: holds nothing, is never written.
NULL_BLOCK = 0


def build_block(
    anchor_ids: Tensor,
    target_positions: Tensor,
    query_start_loc: Tensor,
    num_rejected: Tensor | None,
    seq_lens: Tensor | None,
    request_index: Tensor | None,
    num_sampled: Tensor | None,
    prefill_ids: Tensor | None,
    temperature: Tensor | None,
    seeds: Tensor | None,
    block_tables: Sequence[Tensor],
    kv_block_sizes: Sequence[int],
    num_draft_tokens: int,
    mask_token_id: int,
    max_model_len: int,
    sample_from_anchor: bool,
    input_ids: Tensor,
    query_positions: Tensor,
    query_slots: Tensor,
    query_slot_rows: Sequence[int],
    context_positions: Tensor,
    context_slots: Tensor,
    sample_indices: Tensor,
    block_start_loc: Tensor,
    block_seq_lens: Tensor,
    sample_positions: Tensor | None,
    sample_requests: Tensor | None,
    temperature_out: Tensor | None,
    seeds_out: Tensor | None,
) -> None:
    """See :func:`vllm_dflash.ops.build_block`."""
    device = target_positions.device
    B, T, K = query_start_loc.numel() - 1, target_positions.numel(), num_draft_tokens
    Q = K if sample_from_anchor else K + 1
    start_B, end_B = query_start_loc[:-1].long(), query_start_loc[1:].long()
    num_context_B = end_B - start_B
    rejected_B = torch.zeros_like(start_B) if num_rejected is None else num_rejected[:B].long()
    rejected_B = torch.minimum(rejected_B.clamp(min=0), num_context_B)
    valid_end_B = end_B - rejected_B
    present_B = num_context_B > 0

    # The block starts behind the last valid token; where all are rejected, in place of the first.
    positions_T = target_positions.long()
    if T:
        last_B = positions_T[(valid_end_B - 1).clamp(0, T - 1)]
        first_B = positions_T[start_B.clamp(0, T - 1)]
        next_B = torch.where(valid_end_B > start_B, last_B + 1, first_B)
    else:
        next_B = torch.zeros_like(start_B)
    state_B = torch.arange(B, device=device) if request_index is None else request_index[:B].long()
    anchor_B = anchor_ids[state_B].long()
    if num_sampled is not None and prefill_ids is not None:
        anchor_B = torch.where(num_sampled[:B] > 0, anchor_B, prefill_ids[state_B].long())

    offset_Q = torch.arange(Q, device=device)
    position_BQ = next_B[:, None] + offset_Q
    ids_BQ = torch.where(offset_Q == 0, anchor_B[:, None], mask_token_id)
    _fill(input_ids, ids_BQ.reshape(-1), 0)
    shown_BQ = torch.where(present_B[:, None], position_BQ.clamp(max=max_model_len - 1), 0)
    _fill(query_positions, shown_BQ.reshape(-1), 0)

    token_T = torch.arange(T, device=device)
    owner_T = torch.searchsorted(end_B.contiguous(), token_T, right=True).clamp(max=max(B - 1, 0))
    valid_T = (
        (token_T >= start_B[owner_T]) & (token_T < valid_end_B[owner_T])
        if B
        else torch.zeros(T, dtype=torch.bool, device=device)
    )
    _fill(context_positions, torch.where(valid_T, positions_T, 0), 0)

    row_BQ = torch.arange(B, device=device)[:, None].expand(B, Q)
    writable_BQ = present_B[:, None] & (position_BQ < max_model_len)
    for group, (table, size) in enumerate(zip(block_tables, kv_block_sizes, strict=True)):
        slots_BQ = _slots(table, size, row_BQ, position_BQ, writable_BQ)
        _fill(query_slots[query_slot_rows[group]], slots_BQ.reshape(-1), PAD_SLOT)
        slots_T = _slots(table, size, owner_T, positions_T, valid_T)
        _fill(context_slots[group], slots_T, PAD_SLOT)

    skipped = 0 if sample_from_anchor else 1
    first_query_B = torch.arange(B, device=device) * Q
    offset_K = torch.arange(K, device=device) + skipped
    _fill(sample_indices, (first_query_B[:, None] + offset_K).reshape(-1), 0)
    if sample_positions is not None:
        shift = 1 if sample_from_anchor else 0
        sampled_BK = torch.where(present_B[:, None], next_B[:, None] + offset_K + shift, 0)
        _fill(sample_positions, sampled_BK.reshape(-1), 0)
    if sample_requests is not None:
        _fill(sample_requests, state_B[:, None].expand(B, K).reshape(-1), -1)
    _fill(block_start_loc, torch.arange(B + 1, device=device) * Q, B * Q)
    length_B = next_B if seq_lens is None else seq_lens[:B].long() - rejected_B
    length_B = torch.where(present_B, (length_B + Q).clamp(max=max_model_len), 0)
    _fill(block_seq_lens, length_B, 0)
    if temperature is not None and temperature_out is not None:
        temperature_out[state_B] = temperature[state_B]
    if seeds is not None and seeds_out is not None:
        seeds_out[state_B] = seeds[state_B].to(seeds_out.dtype)


def _fill(out: Tensor, values: Tensor, padding: int) -> None:
    """Writes ``values`` at the front of ``out`` and ``padding`` behind them."""
    out[: values.numel()] = values.to(out.dtype)
    out[values.numel() :] = padding


def _slots(
    table: Tensor, kv_block_size: int, row: Tensor, position: Tensor, writable: Tensor
) -> Tensor:
    if table.shape[1] == 0 or position.numel() == 0:
        return torch.full_like(position, PAD_SLOT)
    block = position // kv_block_size
    inside = writable & (position >= 0) & (block < table.shape[1])
    block_id = table[row, block.clamp(0, table.shape[1] - 1)].long()
    slot = block_id * kv_block_size + position % kv_block_size
    return torch.where(inside & (block_id > NULL_BLOCK), slot, PAD_SLOT)


def tap_hidden_states(
    features: Tensor, hidden: Tensor, residual: Tensor | None, column: int
) -> None:
    """See :func:`vllm_dflash.ops.tap_hidden_states`."""
    value = hidden if residual is None else hidden + residual
    features[: hidden.shape[0], column : column + hidden.shape[1]] = value


def store_context_kv(
    kv: Tensor,
    k_norm_weights: Tensor,
    eps: float,
    positions: Tensor,
    cos_sin_cache: Tensor,
    is_neox: bool,
    value_scale: float,
    slots: Sequence[Tensor],
    key_caches: Sequence[Tensor],
    value_caches: Sequence[Tensor],
    key_scales: Tensor | None,
    value_scales: Tensor | None,
) -> None:
    """See :func:`vllm_dflash.ops.store_context_kv`."""
    T, L = kv.shape[:2]
    if T == 0:
        return
    cos_T1D, sin_T1D = cos_sin_cache[positions].float()[:, None].chunk(2, dim=-1)
    for layer in range(L):
        k_TND = kv[:, layer, 0].float()
        k_TND = k_TND * torch.rsqrt(k_TND.square().mean(-1, keepdim=True) + eps)
        k_TND = _rotate(k_TND * k_norm_weights[layer].float(), cos_T1D, sin_T1D, is_neox)
        v_TND = kv[:, layer, 1].float() * value_scale
        slot_T = slots[layer][:T].long() if slots else torch.arange(T, device=kv.device)
        _write(key_caches[layer], k_TND, slot_T, None if key_scales is None else key_scales[layer])
        _write(
            value_caches[layer],
            v_TND,
            slot_T,
            None if value_scales is None else value_scales[layer],
        )


def _rotate(x_TND: Tensor, cos: Tensor, sin: Tensor, is_neox: bool) -> Tensor:
    """Rotary embedding of the first ``2 * cos.shape[-1]`` elements of each head."""
    half = cos.shape[-1]
    head, rest = x_TND[..., : 2 * half], x_TND[..., 2 * half :]
    if is_neox:
        a, b = head[..., :half], head[..., half:]
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    else:
        a, b = head[..., 0::2], head[..., 1::2]
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
    return torch.cat([turned, rest], dim=-1)


def _write(cache: Tensor, x_TND: Tensor, slot_T: Tensor, scale: Tensor | None) -> None:
    if scale is not None:
        x_TND = x_TND / scale
    if cache.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        # vLLM's writer saturates; a plain cast would make infinities and NaN.
        limit = torch.finfo(cache.dtype).max
        x_TND = x_TND.clamp(-limit, limit)
    size = cache.shape[1]
    # Slots of no cache go to a row that keeps its value, so that shapes do not depend on the data.
    wanted_T = (slot_T >= 0) & (slot_T < cache.shape[0] * size)
    order = torch.argsort(wanted_T.to(torch.int8), stable=True)
    slot_T, x_TND, wanted_T = slot_T[order], x_TND[order], wanted_T[order]
    slot_T = torch.where(wanted_T, slot_T, slot_T[-1].clamp(0, cache.shape[0] * size - 1))
    block, offset = slot_T // size, slot_T % size
    raw = cache.view(torch.uint8) if cache.element_size() == 1 else cache
    new = x_TND.to(cache.dtype)
    new = new.view(torch.uint8) if cache.element_size() == 1 else new
    new = torch.where(wanted_T[:, None, None], new, new[-1:])
    keep = raw[block, offset]
    raw[block, offset] = torch.where(wanted_T[-1], new, keep)
