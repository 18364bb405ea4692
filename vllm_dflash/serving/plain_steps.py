"""What vLLM does around its proposers, where nothing is drafted and where a request nears its end."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any


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


def skip_proposing(runner: Any, plain_step: Callable[..., list[list[int]] | None]) -> None:
    """Lets steps before and after which nothing is drafted do without what vLLM prepares for its proposers.

    Args:
        plain_step: gets of a step without draft tokens those sampled (``[B, 1]``), the verifier's hidden
            states (of each layer ``[T, H]``), positions (``[T]`` or ``[3, T]``), attention metadata and how
            many draft tokens the next step may have. It returns the drafts of each request, or None to have
            the step go vLLM's way.
    """
    propose = runner.propose_draft_token_ids
    names = tuple(inspect.signature(propose).parameters)

    def propose_draft_token_ids(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        if given["spec_decode_metadata"] is None and given["aux_hidden_states"]:
            output = given["scheduler_output"]
            num_tokens = output.total_num_scheduled_tokens
            drafts = plain_step(
                given["sampled_token_ids"],
                [h[:num_tokens] for h in given["aux_hidden_states"]],
                runner._get_positions(num_tokens),
                given["common_attn_metadata"],
                output.num_spec_tokens_to_schedule,
            )
            if drafts is not None:
                return drafts
        return propose(*args, **kwargs)

    runner.propose_draft_token_ids = propose_draft_token_ids


def propose_near_the_end(runner: Any) -> None:
    """Has the proposer asked in every step, also where a request comes close to ``max_model_len``.

    vLLM's runner leaves it out then for the whole batch, whose features of those steps the drafter's context
    would lack for good, and schedules drafts of zeros. Lengths that are chosen end before the limit.
    """
    runner._input_fits_in_drafter = lambda metadata: metadata is not None
