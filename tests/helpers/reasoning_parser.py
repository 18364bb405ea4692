"""A reasoning parser for verifiers without thinking markers: some ordinary tokens end the reasoning."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from vllm.reasoning import ReasoningParser, ReasoningParserManager

#: One token in twelve, so that the tests' verifier comes to write one behind a few others.
ENDS = frozenset(range(16, 384, 12))


@ReasoningParserManager.register_module("by_token")
class ByToken(ReasoningParser):
    """All up to the first token of ``ENDS`` is reasoning, whatever the prompt has."""

    def is_reasoning_end(self, input_ids: Sequence[int]) -> bool:
        return False

    def is_reasoning_end_streaming(
        self, input_ids: Sequence[int], delta_ids: Iterable[int]
    ) -> bool:
        return not ENDS.isdisjoint(delta_ids)

    def extract_content_ids(self, input_ids: list[int]) -> list[int]:
        raise NotImplementedError("only the engine core asks this parser")

    def extract_reasoning(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("only the engine core asks this parser")

    def extract_reasoning_streaming(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("only the engine core asks this parser")
