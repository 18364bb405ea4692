"""Prompt lookup as a second source of drafts, by vLLM's own n-gram matcher."""

from __future__ import annotations

import numpy as np
from vllm.v1.spec_decode.ngram_proposer import _find_longest_matched_ngram_and_propose_tokens

#: Shortest and longest match; those of vLLM's own example.
MIN_MATCH, MAX_MATCH = 2, 5


class PromptLookup:
    """Drafts what followed the last occurrence of a request's latest tokens.

    vLLM's ``NgramProposer`` matches a whole batch by parallel numba loops, which on a small machine wait for
    each other longer than they work, and does not tell how long the match was. Its matcher is called per
    request here.

    Args:
        max_model_len: the verifier's.
    """

    def __init__(self, max_model_len: int) -> None:
        self.max_model_len = max_model_len
        # Compiles it, which takes a second.
        self.draft(np.array([1, 2, 3, 1, 2], dtype=np.int32), 2)

    def draft(self, tokens: np.ndarray, num_tokens: int) -> tuple[np.ndarray, int]:
        """Draft tokens ``[<= num_tokens]`` for a request with ``tokens [n]``, and the length of the match.

        Without a match both are empty.
        """
        found = _find_longest_matched_ngram_and_propose_tokens(
            origin_tokens=tokens,
            min_ngram=MIN_MATCH,
            max_ngram=MAX_MATCH,
            max_model_len=self.max_model_len,
            k=num_tokens,
        )
        if len(found) == 0:
            return found, 0
        # A view of the tokens, so where it starts tells what precedes it.
        start = (found.__array_interface__["data"][0] - tokens.__array_interface__["data"][0]) // (
            tokens.itemsize
        )
        return found.copy(), match_length(tokens, start)


def match_length(tokens: np.ndarray, start: int) -> int:
    """How many tokens before ``start`` equal the latest ones, at most ``MAX_MATCH``."""
    longest = min(MAX_MATCH, start)
    before, latest = tokens[start - longest : start][::-1], tokens[::-1][:longest]
    same = before == latest
    return longest if same.all() else int(np.argmin(same))
