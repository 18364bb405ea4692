"""What keeps vLLM 0.31 and 0.32 from sampling right while speculating on the CPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def wrap_apply_sampling_constraints(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """In a batch without draft tokens (a prefill) top-k takes the maximum of an empty tensor, which ends the
    engine."""

    @functools.wraps(original)
    def apply_sampling_constraints(logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return logits if logits.shape[0] == 0 else original(logits, *args, **kwargs)

    return apply_sampling_constraints


def wrap_expand_batch_to_tokens(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """vLLM's never writes its result there, so that temperature, top-k and top-p of draft rows are whatever
    the memory held: wrong samples, or the end of the engine (vLLM #55005)."""

    @functools.wraps(original)
    def expand_batch_to_tokens(
        x: Tensor,
        cu_num_tokens: Tensor,
        num_tokens: int,
        replace_from: float = 0,
        replace_to: float = 0,
    ) -> Tensor:
        counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
        out = x.repeat_interleave(counts, output_size=num_tokens)
        return out.masked_fill_(out == replace_from, replace_to)

    return expand_batch_to_tokens
