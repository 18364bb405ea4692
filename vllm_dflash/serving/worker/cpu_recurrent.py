"""Recurrent layers beside a drafter on vLLM's CPU backend: states that go back to the last accepted token.

With K draft tokens a request has 1 + K recurrent states, one behind each token of the step, and its
convolution of width W keeps W - 1 + K tokens. The next step goes on from the state of whichever token was
accepted. vLLM 0.32 gets this wrong on the CPU, for every speculative method, even where nothing is drafted:
Mamba-2 layers ignore what was accepted and take the table of states for a list, GDN layers misplace the
convolution's tokens in steps of fewer than 1 + K. What they compute then is not the verifier's. Its CUDA and
Triton kernels do it as the functions here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def update_conv_states(
    x_TD: Tensor,
    conv_state: Tensor,
    weight_DW: Tensor,
    bias_D: Tensor | None,
    silu: bool,
    slots: Tensor,
    query_start_loc: Tensor,
    num_accepted: Tensor | None,
) -> Tensor:
    """Convolves each request's tokens behind its last accepted one; keeps what any acceptance may need.

    Args:
        x_TD: tokens of all requests.
        conv_state: ``[slots, D, W - 1 + K]``; columns 0..W-2 precede a request's first token, the next ones
            follow it. Written in place.
        slots: int ``[B]``.
        query_start_loc: int ``[B + 1]``.
        num_accepted: int ``[B]`` tokens of the request's previous step that were kept; None for one each.

    Returns:
        ``[T, D]`` in the dtype of ``x_TD``.
    """
    history = weight_DW.shape[1] - 1
    out = torch.empty_like(x_TD)
    starts = query_start_loc.tolist()
    kept = [1] * len(slots) if num_accepted is None else num_accepted.tolist()
    for i, slot in enumerate(slots.tolist()):
        first, last = starts[i], starts[i + 1]
        if last == first or slot <= 0:  # padding; vLLM's null block is 0
            continue
        before = conv_state[slot, :, kept[i] - 1 : kept[i] - 1 + history]
        tokens = torch.cat((before, x_TD[first:last].T.to(before.dtype)), dim=-1)
        convolved = F.conv1d(
            tokens.unsqueeze(0).to(weight_DW.dtype),
            weight_DW.unsqueeze(1),
            bias_D,
            groups=len(tokens),
        )[0]
        out[first:last] = (F.silu(convolved) if silu else convolved).T.to(out.dtype)
        conv_state[slot, :, : tokens.shape[-1] - 1] = tokens[:, 1:]
    return out


def _causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: bool | str | None = None,
    conv_state_indices: Tensor | None = None,
    num_accepted_tokens: Tensor | None = None,
    query_start_loc: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """In place of vLLM's function of that name in Mamba-2 layers; ``x`` is ``[T, D]``."""
    assert conv_state_indices is not None
    slots = conv_state_indices[:, 0] if conv_state_indices.dim() == 2 else conv_state_indices
    if query_start_loc is None:
        query_start_loc = torch.arange(len(slots) + 1)
    return update_conv_states(
        x, conv_state, weight, bias, bool(activation), slots, query_start_loc, num_accepted_tokens
    )


def _selective_state_update(
    original: Callable[..., Any],
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *args: Any,
    **kwargs: Any,
) -> None:
    """In place of ``mamba_mixer2.selective_state_update``: token by token, as vLLM's kernel can.

    A token's state is written over a copy of the one before it, ``state_batch_indices[b, t]`` behind token t.
    """
    accepted, starts = kwargs.pop("num_accepted_tokens", None), kwargs.pop("cu_seqlens", None)
    if accepted is None:
        original(state, x, dt, A, B, C, *args, **kwargs)
        return
    table, out = kwargs.pop("state_batch_indices"), kwargs.pop("out")
    kwargs.pop("dst_state_batch_indices")
    lens = torch.diff(starts)
    before = table.gather(1, (accepted.long() - 1).unsqueeze(1)).squeeze(1)
    for t in range(int(lens.max())):
        going = lens > t
        rows, here = (starts[:-1] + t)[going].long(), table[going, t]
        state[here] = state[before[going]]
        out_t = torch.empty_like(out[rows])
        original(
            state,
            x[rows],
            dt[rows],
            A,
            B[rows],
            C[rows],
            *args,
            state_batch_indices=here,
            out=out_t,
            **kwargs,
        )
        out[rows] = out_t
        before[going] = here


def _gdn_spec_forward(
    layer: Any,
    metadata: Any,
    mixed_qkv: Tensor,
    b: Tensor,
    a: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    width: int,
    state_len: int,
) -> Tensor:
    """In place of ``gdn_attention._spec_forward``: its recurrence behind our convolution."""
    from vllm import _custom_ops as vllm_ops
    from vllm.model_executor.layers.mamba.ops.cpu import gdn_attention

    count = metadata.num_spec_decodes
    slots = metadata.spec_state_indices_tensor[:count].int().contiguous()
    starts = metadata.spec_query_start_loc[: count + 1].int().contiguous()
    accepted = metadata.num_accepted_tokens[:count].int().contiguous()
    convolved = update_conv_states(
        mixed_qkv,
        conv_state,
        gdn_attention._unpacked_conv_weight(layer),
        layer.conv1d.bias,
        layer.activation == "silu",
        slots[:, 0],
        starts,
        accepted,
    )
    query, key, value = (t.squeeze(0) for t in layer.rearrange_mixed_qkv(convolved))
    return vllm_ops.fused_sigmoid_gating_delta_rule_update_spec_cpu(
        A_log=layer.A_log,
        dt_bias=layer.dt_bias,
        q=query,
        k=key,
        v=value,
        a=a,
        b=b,
        initial_state_source=ssm_state,
        spec_state_indices=slots,
        num_accepted_tokens=accepted,
        cu_seqlens=starts,
        use_qk_l2norm_in_kernel=True,
    )


def wrap_causal_conv1d_update(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """For ``mamba_mixer2.causal_conv1d_update``."""
    return _causal_conv1d_update


def wrap_selective_state_update(original: Callable[..., None]) -> Callable[..., None]:
    """For ``mamba_mixer2.selective_state_update``."""
    return functools.partial(_selective_state_update, original)


def wrap_spec_forward(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """For ``gdn_attention._spec_forward``."""
    return _gdn_spec_forward
