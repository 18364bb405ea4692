"""What a draft is worth: probabilities of acceptance, learned from what was accepted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Cells = Sequence[int] | np.ndarray
#: Trials of a cell after which what it learned counts half.
_HALF_LIFE = 150.0
#: The same inside a request, whose text moves on.
_REQUEST_HALF_LIFE = 40.0
#: Trials that the running average counts for against those of one request.
_REQUEST_PRIOR = 6.0
#: Requests over which the spread between requests is known.
_RECENT = 64


def _logit(p):
    return np.log(p) - np.log1p(-p)


@dataclass
class Trials:
    """Decayed counts of one request: tokens tried, accepted, and how many were expected to be."""

    tried: float = 0.0
    accepted: float = 0.0
    expected: float = 0.0

    @property
    def offset(self) -> float:
        """How much better than the average the request's acceptance is, in log-odds."""
        if self.tried == 0:
            return 0.0
        mean = min(max(self.expected / self.tried, 0.01), 0.99)
        p = (self.accepted + _REQUEST_PRIOR * mean) / (self.tried + _REQUEST_PRIOR)
        return float(_logit(min(max(p, 0.005), 0.995)) - _logit(mean))


class Predictor:
    """P(a draft token is accepted | those before it were), by cell and by request.

    A cell is whatever tells draft tokens apart: their position, the drafter's confidence, the length of a
    match. Each has a running average over all requests; a request shifts them by its own offset in log-odds
    as it shows how it differs.

    Args:
        prior: the averages before anything was seen, ``[cells]``.
        weight: trials that the prior counts for.
    """

    def __init__(self, prior: Sequence[float], weight: float = 6.0) -> None:
        prior_C = np.clip(np.asarray(prior, dtype=float), 0.005, 0.995)
        self._tried = np.full(len(prior_C), weight)
        self._accepted = weight * prior_C
        self._requests: dict[str, Trials] = {}
        self._recent: list[float] = []
        #: Running mean of -log P(what happened): which of two predictors is the better one.
        self.loss = 0.0
        self.trials = 0

    @property
    def averages(self) -> np.ndarray:
        """``[cells]``."""
        return np.clip(self._accepted / self._tried, 0.005, 0.995)

    def conditional(self, cells: Cells, request: str | None, offset: float = 0.0):
        """Probabilities of the tokens in these cells, each given the ones before it."""
        p = self.averages[np.asarray(cells, dtype=int)]
        trials = self._requests.get(request) if request is not None else None
        shift = offset if trials is None else trials.offset
        return p if shift == 0 else 1 / (1 + np.exp(-(_logit(p) + shift)))

    def curve(self, cells: Cells, request: str | None, offset: float = 0.0) -> np.ndarray:
        """Probabilities that the first 1, 2, ... tokens are all accepted."""
        return np.cumprod(self.conditional(cells, request, offset))

    def observe(self, cells: Cells, num_accepted: int, request: str) -> None:
        """Learns from one draft: the first ``num_accepted`` were right, the next one was not.

        Args:
            cells: of the tokens whose fate is known: as many as were accepted, and one more unless all were.
        """
        tried = len(cells)
        if tried == 0:
            return
        p = self.conditional(cells, request)
        right = np.arange(tried) < num_accepted
        for one in np.where(right, p, 1 - p):
            self.loss += (-math.log(max(one, 1e-6)) - self.loss) / min(self.trials + 1, _HALF_LIFE)
            self.trials += 1
        trials = self._requests.setdefault(request, Trials())
        decay = 0.5 ** (tried / _REQUEST_HALF_LIFE)
        average = self.averages[np.asarray(cells, dtype=int)]
        trials.tried = trials.tried * decay + tried
        trials.accepted = trials.accepted * decay + num_accepted
        trials.expected = trials.expected * decay + float(average.sum())
        decay = 0.5 ** (1 / _HALF_LIFE)
        for cell, was_right in zip(cells, right, strict=True):
            self._tried[cell] = self._tried[cell] * decay + 1
            self._accepted[cell] = self._accepted[cell] * decay + was_right

    def seen(self, request: str) -> bool:
        """Whether the request has shown anything yet."""
        return request in self._requests

    def forget(self, request: str) -> None:
        """The request has ended; its offset stays as one of those that requests have."""
        trials = self._requests.pop(request, None)
        if trials is not None and trials.tried >= 2:
            self._recent = [*self._recent[1 - _RECENT :], trials.offset]

    def likely_offsets(self, num: int = 5) -> np.ndarray:
        """Offsets that a request of which nothing is known may have: quantiles of those seen."""
        now = [t.offset for t in self._requests.values() if t.tried >= 2]
        known = [*self._recent, *now]
        if len(known) < 4:
            # Too few to know the spread: some requests are taken to be much better than the average.
            return np.array([-1.0, 0.0, 1.5])
        return np.quantile(known, np.linspace(0.5 / num, 1 - 0.5 / num, num))


#: Edges in the log-odds of the drafter's confidence.
_EDGES = np.array([-2.0, -1.2, -0.6, 0.0, 0.5, 1.0, 1.6, 2.3, 3.2, 4.4, 6.0])
#: Confidence taken at face value inside each cell, until acceptance says otherwise.
CONFIDENCE_PRIOR = tuple(1 / (1 + np.exp(-np.array([-3.0, *(_EDGES[:-1] + _EDGES[1:]) / 2, 7.0]))))


def confidence_cells(confidence: np.ndarray) -> np.ndarray:
    """Cells of the drafter's probabilities of the tokens that it drafted."""
    return np.searchsorted(_EDGES, _logit(np.clip(confidence, 1e-6, 1 - 1e-6)))
