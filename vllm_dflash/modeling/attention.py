"""The drafter's attention where it learns and is evaluated: torch's fused kernel, or an error.

Shape suffixes as in drafter.py; Q queries, S keys, M = N / G x Q rows of one KV head, P = S padded.
"""

from __future__ import annotations

import warnings
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

#: The fused kernels that take a mask, by device. What torch takes instead by itself, if they cannot run, is
#: the math backend: it keeps the scores of every layer for the backward pass, on CUDA in fp32.
_KERNEL = {"cpu": SDPBackend.FLASH_ATTENTION, "cuda": SDPBackend.EFFICIENT_ATTENTION}
#: CUDA's kernel reads the bias in place only if its rows are of whole 16 elements.
_KEYS = 16


def folded_bias(mask_QS: Tensor, queries_per_key: int, dtype: torch.dtype) -> Tensor:
    """What :func:`attend` adds to the scores: 0 where the mask is True, -inf elsewhere; ``[M, P]``.

    Args:
        mask_QS: bool, True where a query may look.
        queries_per_key: query heads that share a KV head, N / G.
        dtype: of queries, keys and values.
    """
    mask_QP = F.pad(mask_QS, (0, -mask_QS.shape[1] % _KEYS))
    bias = torch.zeros(mask_QP.shape, dtype=dtype, device=mask_QP.device)
    return bias.masked_fill_(~mask_QP, float("-inf")).repeat(queries_per_key, 1)


def attend(q_NQD: Tensor, k_GSD: Tensor, v_GSD: Tensor, bias_MP: Tensor) -> Tensor:
    """Masked grouped-query attention ``[N, Q, D]``; every query must see at least one key.

    The query heads of a KV head are rows of one head, since CUDA's kernel wants as many heads on both sides
    (torch 2.13; where it does not it would copy keys and values).

    Raises:
        RuntimeError: torch has no fused kernel for these tensors; the reasons are named.
    """
    num_groups, num_keys, head_dim = k_GSD.shape
    padding = bias_MP.shape[1] - num_keys
    if padding:
        k_GSD, v_GSD = F.pad(k_GSD, (0, 0, 0, padding)), F.pad(v_GSD, (0, 0, 0, padding))
    q, k, v = q_NQD.reshape(num_groups, -1, head_dim)[None], k_GSD[None], v_GSD[None]
    bias = bias_MP[None, None]
    kernel = _KERNEL.get(q_NQD.device.type)
    with sdpa_kernel([kernel]) if kernel else nullcontext():
        try:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RuntimeError(_refusal(kernel, q, k, v, bias)) from error
    return out.view(q_NQD.shape)


def _refusal(kernel: SDPBackend | None, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> str:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        params = torch.backends.cuda.SDPAParams(q, k, v, bias, 0.0, False, False)
        torch.backends.cuda.can_use_efficient_attention(params, True)
    reasons = "; ".join(str(w.message).partition(" (Triggered")[0] for w in caught)
    return (
        f"torch {torch.__version__} did not run its fused attention ({kernel}) on {q.device} for "
        f"{q.dtype}, head size {q.shape[-1]}, {q.shape[1]} KV heads, {q.shape[2]} rows, {k.shape[2]} keys: "
        f"{reasons or 'it gives no reason beyond the error above'}. Its unfused attention, which needs far "
        "more memory and time, is not taken instead; use another torch, --autocast or --head-dim"
    )
