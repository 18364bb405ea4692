"""The choice of draft lengths for one batch: most expected tokens for the time that they take."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Choice:
    """Draft lengths of a batch.

    Attributes:
        lengths: draft tokens of each request, 0 for none.
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

    def worth(self, price: float) -> float:
        """Expected tokens, less what could be had in the same time at ``price`` tokens a second."""
        return self.tokens - price * self.seconds


def choose(curves_BK: np.ndarray, seconds_M: np.ndarray, price: float | None = None) -> Choice:
    """Draft lengths with the most expected tokens per second, the shorter ones where two are alike.

    Those are the best ones if all steps are like this one. Given the tokens per second of the others
    (``price``), it is the lengths worth most by :meth:`Choice.worth`.

    The step's cost depends on the number of tokens in the batch only, and in each request a token is worth
    at most as much as the one before it. So the best M draft tokens of the batch are the M worth most, and
    they are a prefix of every request's draft; what is left is to try every M.

    Args:
        curves_BK: of each request the probabilities that its first 1, 2, ... draft tokens are all accepted;
            0 from where it can have none.
        seconds_M: seconds of a step with 0, 1, ... B * K draft tokens in the whole batch.
        price: tokens per second of other steps; None for those of this one.
    """
    B = len(curves_BK)
    worth_M = np.sort(curves_BK, axis=None)[::-1]
    tokens_M = np.empty(len(worth_M) + 1)
    tokens_M[0] = B
    np.cumsum(worth_M, out=tokens_M[1:])
    tokens_M[1:] += B
    rate_M = tokens_M / seconds_M if price is None else tokens_M - price * seconds_M
    best = int(np.argmax(rate_M))
    lengths = np.zeros(B, dtype=int)
    if best:
        # Those worth more than the last one chosen, and of those worth as much the first.
        least = worth_M[best - 1]
        lengths = (curves_BK > least).sum(axis=1)
        alike = (curves_BK == least).sum(axis=1)
        left = best - int(lengths.sum()) - (np.cumsum(alike) - alike)
        lengths += np.clip(left, 0, alike)
    return Choice(tuple(lengths.tolist()), float(tokens_M[best]), float(seconds_M[best]))
