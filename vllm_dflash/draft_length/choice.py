"""The choice of draft lengths for one batch: most expected tokens per second."""

from __future__ import annotations

from collections.abc import Sequence
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


def choose(curves: Sequence[np.ndarray], seconds_M: np.ndarray) -> Choice:
    """Draft lengths with the most expected tokens per second, the shorter ones where two are alike.

    The step's cost depends on the number of tokens in the batch only, and in each request a token is worth
    at most as much as the one before it. So the best M draft tokens of the batch are the M worth most, and
    they are a prefix of every request's draft; what is left is to try every M.

    Args:
        curves: of each request the probabilities that its first 1, 2, ... draft tokens are all accepted.
        seconds_M: seconds of a step with 0, 1, ... draft tokens in the whole batch; at least as many
            entries as there are draft tokens, and one.
    """
    lens = [len(curve) for curve in curves]
    worth = np.concatenate(curves) if curves else np.empty(0)
    # Stable, so that equal worths of one request stay in order.
    order = np.argsort(-worth, kind="stable")
    tokens_M = len(curves) + np.concatenate(([0.0], np.cumsum(worth[order])))
    seconds_M = seconds_M[: len(tokens_M)]
    best = int(np.argmax(tokens_M / seconds_M))
    owners = np.repeat(np.arange(len(lens)), lens)[order[:best]]
    lengths = np.bincount(owners, minlength=len(lens))
    return Choice(tuple(lengths.tolist()), float(tokens_M[best]), float(seconds_M[best]))
