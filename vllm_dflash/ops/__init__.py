"""The plugin's ops, ``torch.ops.vllm_dflash.*``: C++, CUDA, Triton or plain PyTorch behind one call.

Every op writes into tensors of the caller and returns nothing, so buffers keep their addresses (CUDA
graphs) and the mutation is declared (``torch.compile``). :func:`load` picks the implementation, once, and
says which.

Letters: B requests, T context tokens, Q query tokens a request, K draft tokens a request, G KV-cache groups,
L draft layers, N KV heads, D head size, H hidden size, R request states.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vllm_dflash.ops import reference
from vllm_dflash.ops.load import Loaded, forced, load
from vllm_dflash.ops.reference import NULL_BLOCK, PAD_SLOT

__all__ = [
    "NULL_BLOCK",
    "PAD_SLOT",
    "Loaded",
    "build_block",
    "load",
    "store_context_kv",
    "tap_hidden_states",
    "worthwhile",
]


def worthwhile(device: torch.device) -> bool:
    """Whether serving on this device should use the ops.

    Not where only plain PyTorch is left: vLLM's own kernels are faster then. ``VLLM_DFLASH_OPS`` overrules
    that.
    """
    loaded = load()
    mode = {"cpu": loaded.cpu, "cuda": loaded.cuda}.get(device.type)
    return mode is not None and (mode != "torch" or forced() is not None)


def build_block(
    *,
    anchor_ids: Tensor,
    target_positions: Tensor,
    query_start_loc: Tensor,
    block_tables: Sequence[Tensor],
    kv_block_sizes: Sequence[int],
    num_draft_tokens: int,
    mask_token_id: int,
    max_model_len: int,
    input_ids: Tensor,
    query_positions: Tensor,
    query_slots: Tensor,
    context_positions: Tensor,
    context_slots: Tensor,
    sample_indices: Tensor,
    block_start_loc: Tensor,
    block_seq_lens: Tensor,
    num_rejected: Tensor | None = None,
    seq_lens: Tensor | None = None,
    request_index: Tensor | None = None,
    num_sampled: Tensor | None = None,
    prefill_ids: Tensor | None = None,
    temperature: Tensor | None = None,
    seeds: Tensor | None = None,
    sample_from_anchor: bool = False,
    query_slot_rows: Sequence[int] | None = None,
    sample_positions: Tensor | None = None,
    sample_requests: Tensor | None = None,
    temperature_out: Tensor | None = None,
    seeds_out: Tensor | None = None,
    plain: bool = False,
) -> None:
    """The drafter's inputs for a batch, in one launch: the anchor and the mask tokens of every request.

    Replaces vLLM's ``copy_and_expand_dflash_inputs_kernel`` (V1) and ``_prepare_dflash_inputs_kernel`` (V2,
    there one launch a KV-cache group) and what surrounds them. Integer tensors are int32 or int64,
    contiguous. A request's block starts behind its last token that is not rejected; where all are, in place
    of the first. Every output is filled to its end: behind the batch with ``PAD_SLOT``, -1
    (``sample_requests``), the last offset (``block_start_loc``) or 0. Requests without context tokens get
    padding slots and length 0.

    Args:
        anchor_ids: last sampled tokens ``[B]``, or ``[R]`` with ``request_index``.
        target_positions: positions of the verifier's tokens of this step ``[T]``, rejected ones included.
        query_start_loc: where each request's tokens start ``[B + 1]``.
        block_tables: per KV-cache group int32 ``[>= B, blocks]``; block 0 is vLLM's null block.
        kv_block_sizes: tokens in a cache block, per group.
        num_draft_tokens: K; Q is K + 1, or K with ``sample_from_anchor``.
        max_model_len: query positions stop there; slots beyond are padding.
        input_ids: out ``[>= B*Q]``.
        query_positions: out ``[>= B*Q]``.
        query_slots: out int64 ``[rows, >= B*Q]``, group g in row ``query_slot_rows[g]`` (default g).
        context_positions: out ``[>= T]``.
        context_slots: out int64 ``[>= G, >= T]``; rejected tokens and tokens of the null block are padding.
        sample_indices: out ``[>= B*K]``, rows of the drafter's output that predict.
        block_start_loc: out ``[>= B + 1]``, ``query_start_loc`` of the drafter's forward pass.
        block_seq_lens: out ``[>= B]``, context and block.
        num_rejected: draft tokens rejected at the end of each request's tokens ``[B]``.
        seq_lens: the verifier's sequence lengths, rejected included ``[B]``; default: from the positions.
        request_index: row of each request in the state tensors ``[R]``.
        num_sampled: tokens sampled this step ``[B]``; where 0 the anchor is from ``prefill_ids`` ``[R]``.
        temperature: float32 ``[R]``, copied to ``temperature_out`` for the requests of the batch.
        seeds: ``[R]``, copied to ``seeds_out`` likewise.
        sample_positions: out ``[>= B*K]``, position of the token each sample predicts.
        sample_requests: out ``[>= B*K]``, request state of each sample.
        plain: in plain PyTorch, whatever is loaded.

    Raises:
        RuntimeError: a bad argument or a failed launch; it names the op and the switch.
    """
    rows = list(range(len(block_tables))) if query_slot_rows is None else list(query_slot_rows)
    run = reference.build_block if plain else functools.partial(_call, "build_block")
    run(
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
        kv_block_sizes,
        num_draft_tokens,
        mask_token_id,
        max_model_len,
        sample_from_anchor,
        input_ids,
        query_positions,
        query_slots,
        rows,
        context_positions,
        context_slots,
        sample_indices,
        block_start_loc,
        block_seq_lens,
        sample_positions,
        sample_requests,
        temperature_out,
        seeds_out,
    )


def tap_hidden_states(
    features: Tensor, hidden: Tensor, residual: Tensor | None = None, *, column: int = 0
) -> None:
    """Writes ``hidden (+ residual)`` into its columns of the feature buffer, in one pass.

    Args:
        features: out ``[>= T, W]``, rows 0..T-1 and columns ``column``..``column + H - 1`` are written.
        hidden: a verifier layer's output ``[T, H]``, of the dtype of ``features``.
        residual: ``[T, H]``, added in float32, rounded once; None where the layer adds it itself.
        column: first column.

    Raises:
        RuntimeError: a bad argument or a failed launch; it names the op and the switch.
    """
    _call("tap_hidden_states", features, hidden, residual, column)


def store_context_kv(
    kv: Tensor,
    k_norm_weights: Tensor,
    positions: Tensor,
    cos_sin_cache: Tensor,
    key_caches: Sequence[Tensor],
    value_caches: Sequence[Tensor],
    *,
    eps: float,
    is_neox: bool = True,
    value_scale: float = 1.0,
    slots: Sequence[Tensor] = (),
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> None:
    """Projected context K and V into the paged caches of all draft layers: norm, rotary embedding, write.

    Replaces what ``DFlashQwen3Model.precompute_and_store_context_kv`` of vLLM does behind its GEMM with a
    permuting copy, a norm, repeated positions, a rotary embedding and one cache write a layer. Float32
    inside, one rounding at the end.

    Args:
        kv: ``[T, L, 2, N, D]``, keys then values; heads contiguous, any other strides.
        k_norm_weights: ``[L, D]``, per-head RMS norm of the keys.
        positions: ``[T]``, rows of ``cos_sin_cache``.
        cos_sin_cache: ``[P, rotary_dim]``, cosines first, float32 or the dtype of ``kv``; the elements of a
            head behind ``rotary_dim`` are not turned.
        key_caches: out, per layer ``[blocks, kv_block_size, N, D]`` with any outer strides (NHD, HND), of the
            dtype of ``kv`` or float8.
        value_caches: out, likewise.
        is_neox: halves turn against each other; False: neighbours.
        value_scale: multiplies the values.
        slots: per layer int64 ``[>= T]``; negative slots are skipped. None given: token t goes to slot t.
        key_scales: float32 ``[L]``, a float8 cache holds ``x / scale``, saturated.
        value_scales: float32 ``[L]``, likewise.

    Raises:
        RuntimeError: a bad argument or a failed launch; it names the op and the switch.
    """
    _call(
        "store_context_kv",
        kv,
        k_norm_weights,
        eps,
        positions,
        cos_sin_cache,
        is_neox,
        value_scale,
        slots,
        key_caches,
        value_caches,
        key_scales,
        value_scales,
    )


def _call(op: str, *args: Any) -> None:
    loaded = load()
    try:
        getattr(torch.ops.vllm_dflash, op)(*args)
    except (RuntimeError, IndexError, ValueError) as error:
        # Out of memory and aborted devices stay what they are; they are not the op's.
        if isinstance(error, torch.OutOfMemoryError):
            raise
        cause = str(error).removeprefix(f"vllm_dflash::{op}: ")
        raise RuntimeError(
            f"vllm_dflash::{op} failed ({loaded.describe()}): {cause}\nTo serve without the plugin's ops add "
            '"dflash_ops": false to --speculative-config; VLLM_DFLASH_OPS=torch runs them in plain PyTorch.'
        ) from error
