"""Where drafting ends: a drafter may have fewer positions than the server's requests have tokens."""

from __future__ import annotations

import math
from typing import Any

#: RoPE types whose table vLLM makes from ``original_max_position_embeddings``.
_FROM_ORIGINAL = {"yarn", "deepseek_yarn", "deepseek_llama_scaling"}


def draft_limit(speculative_config: Any, max_model_len: int) -> int:
    """Tokens of a request behind which nothing is drafted; the same in the engine core and its workers.

    The least of the server's limit, the drafter's own ``max_model_len`` (from its checkpoint, or
    ``max_model_len`` of the speculative configuration), and the rows of its rotary table.

    Args:
        speculative_config: vLLM's, of method dflash.
        max_model_len: the server's.
    """
    draft = speculative_config.draft_model_config
    own = getattr(draft, "max_model_len", None)
    rows = rotary_positions(getattr(draft, "hf_config", None))
    return min(n for n in (max_model_len, own, rows) if n is not None)


def rotary_positions(hf_config: Any) -> int | None:
    """Rows of the rotary table that vLLM makes for a drafter; None where its config does not tell.

    Not always the length that vLLM derives: that has the factor of dynamic and NTK scaling in it, whose
    tables do not grow with it, and takes YaRN's ``max_position_embeddings`` as it stands.
    """
    positions = getattr(hf_config, "max_position_embeddings", None)
    rope = getattr(hf_config, "rope_parameters", None) or {}
    kind, factor = rope.get("rope_type"), rope.get("factor") or 1.0
    original = rope.get("original_max_position_embeddings")
    if kind in _FROM_ORIGINAL and original is not None:
        return math.ceil(original * factor)
    if kind == "linear" and positions is not None:
        return math.ceil(positions * factor)
    return positions


def end_drafts(scheduler: Any, limit: int) -> None:
    """Has a scheduler of vLLM verify no draft token at position ``limit`` or behind it."""
    schedule = scheduler.schedule

    def limited(*args: Any, **kwargs: Any) -> Any:
        for request in scheduler.running:
            room = max(limit - request.num_computed_tokens - 1, 0)
            if len(request.spec_token_ids) > room:
                # Not in place: vLLM's asynchronous scheduler gives all requests one list.
                request.spec_token_ids = list(request.spec_token_ids[:room])
        return schedule(*args, **kwargs)

    scheduler.schedule = limited


def leave_unpadded(scheduler: Any, max_num_seqs: int) -> None:
    """Keeps a scheduler of vLLM from filling a request's first step up with draft tokens that nobody drafted.

    It does not where the number of draft tokens depends on the batch's size, so here that gets a table that
    says the same for all sizes.
    """
    if scheduler.dynamic_sd_lookup is None:
        scheduler.dynamic_sd_lookup = [scheduler.num_spec_tokens] * (max_num_seqs + 1)
