"""Steps in which nothing was drafted, without what vLLM does for those with drafts."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor


def skip_rejection_sampling(runner: Any) -> None:
    """Lets steps in which nothing was drafted be sampled as without speculation.

    vLLM's runner sends every step of an engine with a drafter through the rejection sampler, which has
    nothing to reject then and costs more than the plain sampler, and so does what it prepares for it.
    """
    prepare = runner._prepare_inputs

    def _prepare_inputs(*args: Any, **kwargs: Any) -> Any:
        logits_indices, metadata, *rest = prepare(*args, **kwargs)
        if metadata is not None and metadata.max_spec_len == 0:
            metadata = None
        return logits_indices, metadata, *rest

    runner._prepare_inputs = _prepare_inputs


def skip_proposing(
    runner: Any, nap: Callable[[list[Tensor], Tensor, Any], list[list[int]] | None]
) -> None:
    """Lets steps in which nobody looks for drafts do without what vLLM prepares for its proposers.

    Args:
        nap: gets the verifier's hidden states (of each layer ``[T, H]``), positions ``[T]`` or ``[3, T]``
            and attention metadata of a step without draft tokens. It returns the drafts of each request
            (none), or None to have the step go vLLM's way.
    """
    propose = runner.propose_draft_token_ids
    names = tuple(inspect.signature(propose).parameters)

    def propose_draft_token_ids(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        if given["spec_decode_metadata"] is None and given["aux_hidden_states"]:
            num_tokens = given["scheduler_output"].total_num_scheduled_tokens
            states = [h[:num_tokens] for h in given["aux_hidden_states"]]
            positions = runner._get_positions(num_tokens)
            drafts = nap(states, positions, given["common_attn_metadata"])
            if drafts is not None:
                return drafts
        return propose(*args, **kwargs)

    runner.propose_draft_token_ids = propose_draft_token_ids
