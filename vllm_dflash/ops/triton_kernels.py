"""The ops in Triton: what runs on CUDA tensors where no compiled CUDA extension is present.

One launch an op, its grid from shapes alone: nothing waits for the GPU, and all that a launch needs is in its
arguments, so CUDA graphs may capture it. Block tables and caches are separate tensors; they go in as tuples
of pointers. What changes from step to step is not specialised, so that serving stops compiling early; but for
the alignment (16 bytes or not) of what is in a tuple, where Triton leaves no choice.

Letters: B requests, T context tokens, Q query tokens a request, K draft tokens a request, G KV-cache groups,
L draft layers, N KV heads, D head size, H hidden size, R request states.
"""

# Kernel arguments are named as the ops' are; constexpr ones are in capitals, as in Triton's tutorials.

import contextlib
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_dflash.ops.reference import PAD_SLOT

#: Elements of every output that one program writes. Small: a decode step has a few hundred to share out.
_BUILD_BLOCK = 128
_TAP_BLOCK = 1024
#: Elements of K (and of V) in a tile: about 16 a thread with four warps.
_STORE_BLOCK = 2048

#: Mantissa bits and smallest normal exponent of the cache dtypes that are written as bytes.
_FLOAT8 = {torch.float8_e4m3fn: (3, -6), torch.float8_e5m2: (2, -14)}
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_INTS = (torch.int32, torch.int64)


# build_block --------------------------------------------------------------------------------------


@triton.jit
def _slots(
    table,
    row_stride,
    width,
    KV_BLOCK_SIZE: tl.constexpr,
    row,
    position,
    writable,
    PAD_SLOT: tl.constexpr,
):
    """Cache slots of positions; padding where the block is none, or outside the table."""
    block = position // KV_BLOCK_SIZE
    inside = writable & (position >= 0) & (block < width)
    block_id = tl.load(table + row * row_stride + block, mask=inside, other=0).to(tl.int64)
    # Block 0 is vLLM's null block.
    return tl.where(block_id > 0, block_id * KV_BLOCK_SIZE + position % KV_BLOCK_SIZE, PAD_SLOT)


@triton.jit
def _request_ends(query_start_loc, num_rejected, request, real):
    """Start and end of the requests' context tokens, and the end of those that are not rejected."""
    start = tl.load(query_start_loc + request, mask=real, other=0).to(tl.int64)
    end = tl.load(query_start_loc + request + 1, mask=real, other=0).to(tl.int64)
    valid_end = end
    if num_rejected is not None:
        rejected = tl.load(num_rejected + request, mask=real, other=0).to(tl.int64)
        valid_end = end - tl.minimum(tl.maximum(rejected, 0), end - start)
    return start, end, valid_end


@triton.jit
def _next_position(target_positions, start, valid_end, num_context, real):
    """Where a request's block starts: behind its last valid token; where all are rejected, at the first."""
    some = valid_end > start
    token = tl.where(some, valid_end - 1, start)
    position = tl.load(
        target_positions + token, mask=real & (token >= 0) & (token < num_context), other=0
    ).to(tl.int64)
    return tl.where(some, position + 1, position)


@triton.jit
def _states(request_index, request, real):
    if request_index is not None:
        state = tl.load(request_index + request, mask=real, other=-1).to(tl.int64)
    else:
        state = request
    return state


#: They change from step to step.
_STEP_VALUES = """
    num_requests num_context num_states search_steps input_ids_size query_positions_size query_slots_stride
    query_slots_size context_positions_size context_slots_stride context_slots_size sample_indices_size
    block_start_loc_size block_seq_lens_size sample_positions_size sample_requests_size
""".split()
#: The runner hands over slices of its buffers; nothing here is wide enough to gain from their alignment.
_STEP_TENSORS = """
    anchor_ids target_positions query_start_loc num_rejected seq_lens request_index num_sampled prefill_ids
    temperature seeds block_tables input_ids query_positions query_slots context_positions context_slots
    sample_indices block_start_loc block_seq_lens sample_positions sample_requests temperature_out seeds_out
""".split()


@triton.jit(do_not_specialize=_STEP_VALUES, do_not_specialize_on_alignment=_STEP_TENSORS)
def _build_block_kernel(
    anchor_ids,
    target_positions,
    query_start_loc,
    num_rejected,
    seq_lens,
    request_index,
    num_sampled,
    prefill_ids,
    temperature,
    seeds,
    block_tables,
    table_strides,
    table_widths,
    mask_token_id,
    max_model_len,
    num_requests,
    num_context,
    num_states,
    search_steps,
    input_ids,
    input_ids_size,
    query_positions,
    query_positions_size,
    query_slots,
    query_slots_stride,
    query_slots_size,
    context_positions,
    context_positions_size,
    context_slots,
    context_slots_stride,
    context_slots_size,
    sample_indices,
    sample_indices_size,
    block_start_loc,
    block_start_loc_size,
    block_seq_lens,
    block_seq_lens_size,
    sample_positions,
    sample_positions_size,
    sample_requests,
    sample_requests_size,
    temperature_out,
    seeds_out,
    KV_BLOCK_SIZES: tl.constexpr,
    QUERY_SLOT_ROWS: tl.constexpr,
    NUM_DRAFT: tl.constexpr,
    SAMPLE_FROM_ANCHOR: tl.constexpr,
    PAD_SLOT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # A program owns elements i..i+BLOCK of every output, whatever request they belong to: the grid then
    # follows from the outputs' sizes, and what is behind the batch is padded by the same stores.
    SKIPPED: tl.constexpr = 0 if SAMPLE_FROM_ANCHOR else 1
    NUM_QUERY: tl.constexpr = NUM_DRAFT + SKIPPED
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)

    # Context tokens: the owner is the first request that ends behind the token.
    is_token = i < num_context
    low = tl.zeros([BLOCK], tl.int64)
    high = tl.zeros([BLOCK], tl.int64) + num_requests - 1
    for _ in range(search_steps):
        open_ = low < high
        middle = (low + high) // 2
        end = tl.load(query_start_loc + middle + 1, mask=is_token & open_, other=0)
        low = tl.where(open_ & (end <= i), middle + 1, low)
        high = tl.where(open_ & (end > i), middle, high)
    owned = is_token & (low <= high)  # false without requests
    start, _, valid_end = _request_ends(query_start_loc, num_rejected, low, owned)
    valid = owned & (i >= start) & (i < valid_end)
    position = tl.load(target_positions + i, mask=valid, other=0).to(tl.int64)
    tl.store(context_positions + i, position, mask=i < context_positions_size)

    # Query tokens.
    request = i // NUM_QUERY
    offset = i % NUM_QUERY
    is_query = request < num_requests
    start, end, valid_end = _request_ends(query_start_loc, num_rejected, request, is_query)
    present = is_query & (end > start)
    query = _next_position(target_positions, start, valid_end, num_context, is_query) + offset
    state = _states(request_index, request, is_query)
    is_anchor = is_query & (offset == 0) & (state >= 0) & (state < num_states)
    token_id = tl.load(anchor_ids + state, mask=is_anchor, other=0).to(tl.int64)
    if num_sampled is not None:
        prompted = is_anchor & (tl.load(num_sampled + request, mask=is_anchor, other=1) <= 0)
        prompt_id = tl.load(prefill_ids + state, mask=prompted, other=0).to(tl.int64)
        token_id = tl.where(prompted, prompt_id, token_id)
    token_id = tl.where(offset == 0, token_id, mask_token_id)
    tl.store(input_ids + i, tl.where(is_query, token_id, 0), mask=i < input_ids_size)
    shown = tl.where(present, tl.minimum(query, max_model_len - 1), 0)
    tl.store(query_positions + i, shown, mask=i < query_positions_size)

    # Slots of both, the only outputs that differ between groups.
    writable = present & (query < max_model_len)
    for group in tl.static_range(len(KV_BLOCK_SIZES)):
        slot = _slots(
            block_tables[group],
            table_strides[group],
            table_widths[group],
            KV_BLOCK_SIZES[group],
            request,
            query,
            writable,
            PAD_SLOT,
        )
        out = query_slots + QUERY_SLOT_ROWS[group] * query_slots_stride
        tl.store(out + i, slot, mask=i < query_slots_size)
        slot = _slots(
            block_tables[group],
            table_strides[group],
            table_widths[group],
            KV_BLOCK_SIZES[group],
            low,
            position,
            valid,
            PAD_SLOT,
        )
        out = context_slots + group * context_slots_stride
        tl.store(out + i, slot, mask=i < context_slots_size)

    # Samples.
    request = i // NUM_DRAFT
    offset = i % NUM_DRAFT
    is_sample = request < num_requests
    row = tl.where(is_sample, request * NUM_QUERY + offset + SKIPPED, 0)
    tl.store(sample_indices + i, row, mask=i < sample_indices_size)
    if sample_positions is not None:
        start, end, valid_end = _request_ends(query_start_loc, num_rejected, request, is_sample)
        # From the anchor, query k predicts the token behind it; a mask predicts its own.
        sampled_at = (
            _next_position(target_positions, start, valid_end, num_context, is_sample) + offset + 1
        )
        sampled_at = tl.where(is_sample & (end > start), sampled_at, 0)
        tl.store(sample_positions + i, sampled_at, mask=i < sample_positions_size)
    if sample_requests is not None:
        state = tl.where(is_sample, _states(request_index, request, is_sample), -1)
        tl.store(sample_requests + i, state, mask=i < sample_requests_size)

    # Requests.
    is_request = i < num_requests
    first = tl.minimum(i, num_requests) * NUM_QUERY
    tl.store(block_start_loc + i, first, mask=i < block_start_loc_size)
    start, end, valid_end = _request_ends(query_start_loc, num_rejected, i, is_request)
    if seq_lens is not None:
        length = tl.load(seq_lens + i, mask=is_request, other=0).to(tl.int64) - (end - valid_end)
    else:
        length = _next_position(target_positions, start, valid_end, num_context, is_request)
    length = tl.minimum(length + NUM_QUERY, max_model_len)
    length = tl.where(is_request & (end > start), length, 0)
    tl.store(block_seq_lens + i, length, mask=i < block_seq_lens_size)
    if temperature_out is not None or seeds_out is not None:
        state = _states(request_index, i, is_request)
        known = is_request & (state >= 0) & (state < num_states)
        if temperature_out is not None:
            tl.store(temperature_out + state, tl.load(temperature + state, mask=known), mask=known)
        if seeds_out is not None:
            tl.store(seeds_out + state, tl.load(seeds + state, mask=known), mask=known)


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
    """See :func:`vllm_dflash.ops.build_block`. One launch for all KV-cache groups.

    Values of ``request_index`` that are no state are taken as none: anchor 0, nothing copied.
    """
    _require(num_draft_tokens >= 1, "num_draft_tokens is {}, needs at least 1", num_draft_tokens)
    _require(max_model_len >= 1, "max_model_len is {}, needs at least 1", max_model_len)
    B, T, K = query_start_loc.numel() - 1, target_positions.numel(), num_draft_tokens
    Q = K if sample_from_anchor else K + 1
    _require(B >= 0, "query_start_loc has 0 elements, needs 1")
    device = query_start_loc.device
    of_states = (anchor_ids, prefill_ids, temperature, temperature_out, seeds, seeds_out)
    num_states = min(t.numel() for t in of_states if t is not None)
    least = 0 if request_index is not None else B
    _check_ints("query_start_loc", query_start_loc, 1, device)
    _check_ints("target_positions", target_positions, 0, device)
    _check_ints("anchor_ids", anchor_ids, least, device)
    _check_ints("num_rejected", num_rejected, B, device)
    _check_ints("seq_lens", seq_lens, B, device)
    _check_ints("request_index", request_index, B, device)
    _check_together("num_sampled", num_sampled, "prefill_ids", prefill_ids)
    _check_ints("num_sampled", num_sampled, B, device)
    _check_ints("prefill_ids", prefill_ids, least, device)
    _check_together("temperature", temperature, "temperature_out", temperature_out)
    _check_floats("temperature", temperature, least, device)
    _check_floats("temperature_out", temperature_out, least, device)
    _check_together("seeds", seeds, "seeds_out", seeds_out)
    _check_ints("seeds", seeds, least, device)
    _check_ints("seeds_out", seeds_out, least, device)
    _check_ints("input_ids", input_ids, B * Q, device)
    _check_ints("query_positions", query_positions, B * Q, device)
    _check_ints("context_positions", context_positions, T, device)
    _check_ints("sample_indices", sample_indices, B * K, device)
    _check_ints("block_start_loc", block_start_loc, B + 1, device)
    _check_ints("block_seq_lens", block_seq_lens, B, device)
    _check_ints("sample_positions", sample_positions, B * K, device)
    _check_ints("sample_requests", sample_requests, B * K, device)

    G = len(block_tables)
    _require(G >= 1, "block_tables has no KV-cache groups")
    for name, values in (("kv_block_sizes", kv_block_sizes), ("query_slot_rows", query_slot_rows)):
        _require(len(values) == G, "{} has {} entries, block_tables {}", name, len(values), G)
    for group, (table, size) in enumerate(zip(block_tables, kv_block_sizes, strict=True)):
        _check_matrix(f"block_tables[{group}]", table, (torch.int32,), B, 0, device)
        _require(size >= 1, "kv_block_sizes[{}] is {}, needs at least 1", group, size)
    _check_matrix("query_slots", query_slots, (torch.int64,), 0, B * Q, device)
    _check_matrix("context_slots", context_slots, (torch.int64,), G, T, device)
    for row in query_slot_rows:
        _check_row("query_slots", query_slots, row)

    outputs = (
        input_ids, query_positions, context_positions, sample_indices, block_start_loc, block_seq_lens,
        sample_positions, sample_requests,
    )  # fmt: skip
    size = max(B, query_slots.shape[1], context_slots.shape[1])
    size = max(size, *(t.numel() for t in outputs if t is not None))
    with _on(device):
        _build_block_kernel[(triton.cdiv(size, _BUILD_BLOCK),)](
            anchor_ids,
            target_positions,
            query_start_loc,
            num_rejected,
            seq_lens,
            request_index,
            num_sampled,
            prefill_ids,
            temperature,
            seeds,
            tuple(block_tables),
            tuple(table.stride(0) for table in block_tables),
            tuple(table.shape[1] for table in block_tables),
            mask_token_id,
            max_model_len,
            B,
            T,
            num_states,
            max(0, (B - 1).bit_length()),
            input_ids,
            input_ids.numel(),
            query_positions,
            query_positions.numel(),
            query_slots,
            query_slots.stride(0),
            query_slots.shape[1],
            context_positions,
            context_positions.numel(),
            context_slots,
            context_slots.stride(0),
            context_slots.shape[1],
            sample_indices,
            sample_indices.numel(),
            block_start_loc,
            block_start_loc.numel(),
            block_seq_lens,
            block_seq_lens.numel(),
            sample_positions,
            0 if sample_positions is None else sample_positions.numel(),
            sample_requests,
            0 if sample_requests is None else sample_requests.numel(),
            temperature_out,
            seeds_out,
            KV_BLOCK_SIZES=tuple(kv_block_sizes),
            QUERY_SLOT_ROWS=tuple(query_slot_rows),
            NUM_DRAFT=K,
            SAMPLE_FROM_ANCHOR=bool(sample_from_anchor),
            PAD_SLOT=PAD_SLOT,
            BLOCK=_BUILD_BLOCK,
            enable_fp_fusion=False,
        )


# tap_hidden_states --------------------------------------------------------------------------------


@triton.jit
def _tap_kernel(
    features,
    features_stride,
    hidden,
    hidden_stride,
    residual,
    residual_stride,
    hidden_size,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = column < hidden_size
    value = tl.load(hidden + row * hidden_stride + column, mask=real)
    if residual is not None:
        other = tl.load(residual + row * residual_stride + column, mask=real)
        value = (value.to(tl.float32) + other.to(tl.float32)).to(value.dtype)
    tl.store(features + row * features_stride + column, value, mask=real)


def tap_hidden_states(
    features: Tensor, hidden: Tensor, residual: Tensor | None, column: int
) -> None:
    """See :func:`vllm_dflash.ops.tap_hidden_states`."""
    device = hidden.device
    _check_matrix("features", features, _FLOATS, 0, 0, device)
    _check_matrix("hidden", hidden, _FLOATS, 0, 0, device)
    T, H = hidden.shape
    _require(
        hidden.dtype == features.dtype,
        "hidden has dtype {}, features {}",
        hidden.dtype,
        features.dtype,
    )
    _require(features.shape[0] >= T, "features has {} rows, hidden {}", features.shape[0], T)
    width = features.shape[1]
    _require(
        0 <= column <= width - H,
        "column is {}, hidden has {} columns, features {}",
        column,
        H,
        width,
    )
    if residual is not None:
        _check_matrix("residual", residual, (features.dtype,), 0, 0, device)
        _require(
            residual.shape == hidden.shape,
            "residual must have the shape of hidden, {}",
            list(hidden.shape),
        )
    if T == 0 or H == 0:
        return
    block = min(_TAP_BLOCK, triton.next_power_of_2(H))
    with _on(device):
        _tap_kernel[(T, triton.cdiv(H, block))](
            features[:, column:],
            features.stride(0),
            hidden,
            hidden.stride(0),
            residual,
            0 if residual is None else residual.stride(0),
            H,
            BLOCK=block,
            enable_fp_fusion=False,
        )


# store_context_kv ---------------------------------------------------------------------------------


@triton.jit
def _float8_bits(x, MANTISSA: tl.constexpr, MIN_EXPONENT: tl.constexpr, LIMIT: tl.constexpr):
    """Float32 to the bits of a float8: nearest even, saturating, NaN stays NaN.

    In integers, not with a cast: Triton casts to float8 on some GPUs only (e4m3 from sm_89), and so the
    interpreter runs what the GPU runs.
    """
    bits = x.to(tl.uint32, bitcast=True)
    sign = (bits >> 24) & 0x80
    bits = bits & 0x7FFFFFFF
    is_nan = bits > 0x7F800000
    size = tl.minimum(bits.to(tl.float32, bitcast=True), LIMIT)
    bits = size.to(tl.uint32, bitcast=True)
    DROPPED: tl.constexpr = 23 - MANTISSA
    # Normal numbers: round the mantissa, let it carry into the exponent, change the exponent's bias.
    normal = bits + ((1 << (DROPPED - 1)) - 1) + ((bits >> DROPPED) & 1)
    normal = (normal >> DROPPED) - ((126 + MIN_EXPONENT) << MANTISSA)
    # Smaller ones are multiples of one step; adding a number whose neighbours are that far away rounds to it.
    SHIFTER: tl.constexpr = 2.0 ** (23 + MIN_EXPONENT - MANTISSA)
    SHIFTER_BITS: tl.constexpr = (127 + 23 + MIN_EXPONENT - MANTISSA) << 23
    small = (size + SHIFTER).to(tl.uint32, bitcast=True) - SHIFTER_BITS
    rounded = tl.where(size < 2.0**MIN_EXPONENT, small, normal)
    return (tl.where(is_nan, 0x7F, rounded) | sign).to(tl.uint8)


@triton.jit
def _store(
    cache,
    offset,
    x,
    scales,
    layer,
    real,
    MANTISSA: tl.constexpr,
    MIN_EXPONENT: tl.constexpr,
    LIMIT: tl.constexpr,
):
    if scales is not None:
        x = tl.div_rn(x, tl.zeros_like(x) + tl.load(scales + layer))
    if MANTISSA > 0:
        tl.store(cache + offset, _float8_bits(x, MANTISSA, MIN_EXPONENT, LIMIT), mask=real)
    else:
        tl.store(cache + offset, x.to(cache.dtype.element_ty), mask=real)


@triton.jit(
    do_not_specialize=["value_scale", "num_positions", "kv_block_size", "num_slots"],
    do_not_specialize_on_alignment=["positions", "slots"],
)
def _store_context_kv_kernel(
    kv,
    kv_token_stride,
    kv_layer_stride,
    kv_value_offset,
    kv_head_stride,
    k_norm_weights,
    k_norm_stride,
    eps,
    value_scale,
    positions,
    num_positions,
    cos_sin_cache,
    cos_sin_stride,
    slots,
    kv_block_size,
    num_slots,
    key_caches,
    key_block_stride,
    key_token_stride,
    key_head_stride,
    value_caches,
    value_block_stride,
    value_token_stride,
    value_head_stride,
    key_scales,
    value_scales,
    num_heads,
    LAYERS: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    IS_NEOX: tl.constexpr,
    MANTISSA: tl.constexpr,
    MIN_EXPONENT: tl.constexpr,
    LIMIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # A program writes K and V of a token, a layer and BLOCK_N heads. The caches are separate tensors: it
    # picks its pointers by comparing, as a table of pointers in memory would have to outlive a CUDA graph.
    token = tl.program_id(0).to(tl.int64)
    index = tl.program_id(1)
    layer = tl.zeros([], tl.int64) + LAYERS[0]
    layer_slots = slots[0]
    key_cache = key_caches[0]
    value_cache = value_caches[0]
    for other in tl.static_range(1, len(LAYERS)):
        chosen = index == other
        layer = tl.where(chosen, LAYERS[other], layer)
        layer_slots = tl.where(chosen, slots[other], layer_slots)
        key_cache = tl.where(chosen, key_caches[other], key_cache)
        value_cache = tl.where(chosen, value_caches[other], value_cache)

    slot = token
    if HAS_SLOTS:
        slot = tl.load(layer_slots + token).to(tl.int64)
    if (slot >= 0) & (slot < num_slots):
        head_N1 = (tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
        d_1D = tl.arange(0, BLOCK_D)[None, :]
        real_1D = d_1D < HEAD_SIZE
        real_ND = (head_N1 < num_heads) & real_1D
        head = kv + token * kv_token_stride + layer * kv_layer_stride + head_N1 * kv_head_stride

        k_ND = tl.load(head + d_1D, mask=real_ND, other=0.0).to(tl.float32)
        norm_N1 = tl.rsqrt(tl.sum(k_ND * k_ND, axis=1) / HEAD_SIZE + eps)[:, None]
        weights = k_norm_weights + layer * k_norm_stride
        k_ND = k_ND * norm_N1 * tl.load(weights + d_1D, mask=real_1D, other=0.0).to(tl.float32)
        if ROTARY_DIM > 0:
            # Each element turns against a partner, which is read (from L1) and normed again: that needs no
            # power of two, and serves halves and neighbours alike.
            HALF: tl.constexpr = ROTARY_DIM // 2
            turned_1D = d_1D < ROTARY_DIM
            if IS_NEOX:
                is_second_1D = d_1D >= HALF
                partner_1D = tl.where(is_second_1D, d_1D - HALF, d_1D + HALF)
                angle_1D = tl.where(is_second_1D, d_1D - HALF, d_1D)
            else:
                is_second_1D = d_1D % 2 == 1
                partner_1D = tl.where(is_second_1D, d_1D - 1, d_1D + 1)
                angle_1D = d_1D // 2
            mask_ND = real_ND & turned_1D
            p_ND = tl.load(head + partner_1D, mask=mask_ND, other=0.0).to(tl.float32)
            p_ND = (
                p_ND
                * norm_N1
                * tl.load(weights + partner_1D, mask=turned_1D, other=0.0).to(tl.float32)
            )
            position = tl.load(positions + token).to(tl.int64)
            position = tl.minimum(tl.maximum(position, 0), num_positions - 1)
            angles = cos_sin_cache + position * cos_sin_stride + angle_1D
            cos_1D = tl.load(angles, mask=turned_1D, other=0.0).to(tl.float32)
            sin_1D = tl.load(angles + HALF, mask=turned_1D, other=0.0).to(tl.float32)
            sin_1D = tl.where(is_second_1D, sin_1D, -sin_1D)
            k_ND = tl.where(turned_1D, k_ND * cos_1D + p_ND * sin_1D, k_ND)
        block = slot // kv_block_size
        row = slot % kv_block_size
        offset = (
            block * key_block_stride + row * key_token_stride + head_N1 * key_head_stride + d_1D
        )
        _store(key_cache, offset, k_ND, key_scales, layer, real_ND, MANTISSA, MIN_EXPONENT, LIMIT)

        v_ND = (
            tl.load(head + kv_value_offset + d_1D, mask=real_ND, other=0.0).to(tl.float32)
            * value_scale
        )
        offset = (
            block * value_block_stride
            + row * value_token_stride
            + head_N1 * value_head_stride
            + d_1D
        )
        _store(
            value_cache, offset, v_ND, value_scales, layer, real_ND, MANTISSA, MIN_EXPONENT, LIMIT
        )


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
    """See :func:`vllm_dflash.ops.store_context_kv`. One launch for all layers whose caches lie alike.

    Slots outside the caches are skipped like negative ones; positions outside ``cos_sin_cache`` are clamped.
    """
    device = kv.device
    _require(
        kv.dim() == 5 and kv.shape[2] == 2,
        "kv must have the shape [tokens, layers, 2, heads, head_size], has {}",
        list(kv.shape),
    )
    _require(kv.dtype in _FLOATS, "kv has dtype {}, needs float32, float16 or bfloat16", kv.dtype)
    T, L, _, N, D = kv.shape
    _check_inner("kv", kv)
    _check_matrix("k_norm_weights", k_norm_weights, (kv.dtype,), 0, 0, device)
    _require(
        tuple(k_norm_weights.shape) == (L, D),
        "k_norm_weights must have the shape {}, has {}",
        [L, D],
        list(k_norm_weights.shape),
    )
    _check_ints("positions", positions, T, device)
    _check_matrix("cos_sin_cache", cos_sin_cache, (torch.float32, kv.dtype), 0, 0, device)
    num_positions, rotary_dim = cos_sin_cache.shape
    _require(
        rotary_dim % 2 == 0 and rotary_dim <= D,
        "cos_sin_cache rotates {} elements, needs an even number of at most {}",
        rotary_dim,
        D,
    )
    _require(len(key_caches) == L, "key_caches has {} layers, kv {}", len(key_caches), L)
    _require(len(value_caches) == L, "value_caches has {} layers, kv {}", len(value_caches), L)
    _require(len(slots) in (0, L), "slots has {} layers, kv {}", len(slots), L)
    for layer, of_layer in enumerate(slots):
        _check_ints(f"slots[{layer}]", of_layer, T, device)
    _check_floats("key_scales", key_scales, L, device)
    _check_floats("value_scales", value_scales, L, device)

    # Layers whose caches differ in their strides or sizes need launches of their own; as a rule none do.
    layers_of: dict[tuple, list[int]] = {}
    for layer in range(L):
        keys, values = key_caches[layer], value_caches[layer]
        _check_cache(f"key_caches[{layer}]", keys, kv.dtype, N, D, device)
        _check_cache(f"value_caches[{layer}]", values, kv.dtype, N, D, device)
        _require(
            values.dtype == keys.dtype and values.shape == keys.shape,
            "value_caches[{0}] differs from key_caches[{0}] in dtype, number of blocks or block size",
            layer,
        )
        slot_dtype = slots[layer].dtype if slots else None
        layout = (keys.dtype, keys.shape, keys.stride(), values.stride(), slot_dtype)
        layers_of.setdefault(layout, []).append(layer)
    if T == 0 or N == 0 or D == 0 or (rotary_dim and num_positions == 0):
        return

    block_d = triton.next_power_of_2(D)
    block_n = min(triton.next_power_of_2(N), max(1, _STORE_BLOCK // block_d))
    for (dtype, shape, key_strides, value_strides, _), layers in layers_of.items():
        mantissa, min_exponent = _FLOAT8.get(dtype, (0, 0))
        raw_keys = [key_caches[layer] for layer in layers]
        raw_values = [value_caches[layer] for layer in layers]
        if mantissa:
            raw_keys = [cache.view(torch.uint8) for cache in raw_keys]
            raw_values = [cache.view(torch.uint8) for cache in raw_values]
        with _on(device):
            _store_context_kv_kernel[(T, len(layers), triton.cdiv(N, block_n))](
                kv,
                kv.stride(0),
                kv.stride(1),
                kv.stride(2),
                kv.stride(3),
                k_norm_weights,
                k_norm_weights.stride(0),
                eps,
                float(value_scale),
                positions,
                num_positions,
                cos_sin_cache,
                cos_sin_cache.stride(0),
                # Positions stand in where there are none, so that the argument keeps its form.
                tuple(slots[layer] for layer in layers) if slots else (positions,) * len(layers),
                shape[1],
                shape[0] * shape[1],
                tuple(raw_keys),
                *key_strides[:3],
                tuple(raw_values),
                *value_strides[:3],
                key_scales,
                value_scales,
                N,
                LAYERS=tuple(layers),
                HAS_SLOTS=bool(slots),
                HEAD_SIZE=D,
                ROTARY_DIM=rotary_dim,
                IS_NEOX=bool(is_neox),
                MANTISSA=mantissa,
                MIN_EXPONENT=min_exponent,
                LIMIT=torch.finfo(dtype).max if mantissa else 0.0,
                BLOCK_N=block_n,
                BLOCK_D=block_d,
                enable_fp_fusion=False,
                num_warps=max(1, min(4, block_n * block_d // 256)),
            )


# Checks of metadata, as in csrc/checks.h: without them a kernel would read or write elsewhere.


def _require(ok: bool, message: str, *values: object) -> None:
    if not ok:
        raise ValueError(message.format(*values))


def _check_ints(name: str, tensor: Tensor | None, least: int, device: torch.device) -> None:
    if tensor is not None:
        _require(tensor.dtype in _INTS, "{} has dtype {}, needs int32 or int64", name, tensor.dtype)
        _check_vector(name, tensor, least, device)


def _check_floats(name: str, tensor: Tensor | None, least: int, device: torch.device) -> None:
    if tensor is not None:
        _require(
            tensor.dtype == torch.float32, "{} has dtype {}, needs float32", name, tensor.dtype
        )
        _check_vector(name, tensor, least, device)


def _check_vector(name: str, tensor: Tensor, least: int, device: torch.device) -> None:
    _check_device(name, tensor, device)
    _require(tensor.dim() == 1, "{} has {} dimensions, needs 1", name, tensor.dim())
    _require(tensor.shape[0] >= least, "{} has {} elements, needs {}", name, tensor.shape[0], least)
    _require(
        tensor.shape[0] < 2 or tensor.stride(0) == 1,
        "{} has stride {}, needs 1",
        name,
        tensor.stride(0),
    )


def _check_matrix(
    name: str,
    tensor: Tensor,
    dtypes: tuple[torch.dtype, ...],
    rows: int,
    columns: int,
    device: torch.device,
) -> None:
    _check_device(name, tensor, device)
    _require(tensor.dim() == 2, "{} has {} dimensions, needs 2", name, tensor.dim())
    if tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name} has dtype {tensor.dtype}, needs {wanted}")
    _require(tensor.shape[0] >= rows, "{} has {} rows, needs {}", name, tensor.shape[0], rows)
    _require(
        tensor.shape[1] >= columns, "{} has rows of {}, needs {}", name, tensor.shape[1], columns
    )
    _check_inner(name, tensor)


def _check_row(name: str, tensor: Tensor, row: int) -> None:
    rows = tensor.shape[0]
    _require(0 <= row < rows, "{} has {} rows, row {} is asked for", name, rows, row)


def _check_cache(
    name: str, cache: Tensor, dtype: torch.dtype, N: int, D: int, device: torch.device
) -> None:
    _check_device(name, cache, device)
    _require(
        cache.dim() == 4 and cache.shape[1] >= 1 and tuple(cache.shape[2:]) == (N, D),
        "{} must have the shape [blocks, kv_block_size, {}, {}], has {}",
        name,
        N,
        D,
        list(cache.shape),
    )
    _require(
        cache.dtype == dtype or cache.dtype in _FLOAT8,
        "{} has dtype {}, kv {}",
        name,
        cache.dtype,
        dtype,
    )
    _check_inner(name, cache)


def _check_inner(name: str, tensor: Tensor) -> None:
    _require(
        tensor.shape[-1] < 2 or tensor.stride(-1) == 1,
        "{} has inner stride {}, needs 1",
        name,
        tensor.stride(-1),
    )


def _check_together(
    name: str, tensor: Tensor | None, other_name: str, other: Tensor | None
) -> None:
    _require(
        (tensor is None) == (other is None), "{} and {} must be given together", name, other_name
    )


def _check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    _require(
        tensor.device == device, "{} is on {}, other arguments on {}", name, tensor.device, device
    )


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, whatever device its arguments are on."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
