"""A reasoning parser for verifiers without thinking markers: some ordinary tokens end the reasoning."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vllm.reasoning import ReasoningParser, ReasoningParserManager

#: One token in twelve, so that the tests' verifier comes to write one behind a few others.
ENDS = frozenset(range(16, 384, 12))


@ReasoningParserManager.register_module("by_token")
class ByToken(ReasoningParser):
    """All up to the first token of ``ENDS`` is reasoning; only what the engine core asks is there."""

    def is_reasoning_end(self, input_ids: Sequence[int]) -> bool:
        return False

    def is_reasoning_end_streaming(
        self, input_ids: Sequence[int], delta_ids: Iterable[int]
    ) -> bool:
        return not ENDS.isdisjoint(delta_ids)
