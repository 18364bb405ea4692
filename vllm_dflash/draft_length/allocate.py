"""How many draft tokens each request of a batch gets: most expected tokens for the time that they take.

Shapes: B requests, K draft tokens of a request, M = 0..B * K draft tokens of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class DraftBudget:
    """Draft lengths of a batch.

    Attributes:
        lengths: draft tokens of each request, 0 for none, ``[B]``.
        tokens: expected tokens of the step, bonus tokens included.
        seconds: what the step is expected to cost.
    """

    lengths: tuple[int, ...]
    tokens: float
    seconds: float

    @property
    def rate(self) -> float:
        """Expected tokens per second."""
        return self.tokens / self.seconds


def assign_draft_budget(survival_BK: np.ndarray, seconds_M: np.ndarray) -> DraftBudget:
    """Draft lengths with the most expected tokens per second, the shorter ones where two are alike.

    The step's cost depends on the number of tokens in the batch only, and in each request a token is worth
    at most as much as the one before it. So the best M draft tokens of the batch are the M worth most, and
    they are a prefix of every request's draft; what is left is to try every M.

    Args:
        survival_BK: of each request the probabilities that its first 1, 2, ... draft tokens are all accepted;
            0 from where it can have none.
        seconds_M: seconds of a step with 0, 1, ... B * K draft tokens in the whole batch.
    """
    B = len(survival_BK)
    value_M = np.sort(survival_BK, axis=None)[::-1]
    tokens_M = np.empty(len(value_M) + 1)
    tokens_M[0] = B
    np.cumsum(value_M, out=tokens_M[1:])
    tokens_M[1:] += B
    best = int(np.argmax(tokens_M / seconds_M))
    lengths = np.zeros(B, dtype=int)
    if best:
        # Those worth as much as the last one chosen, or more.
        least = value_M[best - 1]
        lengths = (survival_BK >= least).sum(axis=1)
        if (more := int(lengths.sum()) - best) > 0:
            # Of those worth as much the first ones only.
            alike = (survival_BK == least).sum(axis=1)
            behind = np.cumsum(alike[::-1])[::-1] - alike
            lengths -= np.clip(more - behind, 0, alike)
    return DraftBudget(tuple(lengths.tolist()), float(tokens_M[best]), float(seconds_M[best]))
