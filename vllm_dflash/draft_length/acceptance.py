"""What a draft is worth: probabilities of acceptance, learned from what was accepted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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


def _logit(p: Any) -> Any:
    return np.log(p) - np.log1p(-p)


def _probability(logit: Any) -> Any:
    return 1 / (1 + np.exp(-logit))


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
        self._logit_C = _logit(np.clip(np.asarray(prior, dtype=float), 0.005, 0.995))
        self._weight_C = np.full(len(self._logit_C), weight)
        self._requests: dict[str, Trials] = {}
        self._recent: list[float] = []
        #: Running mean of -log P(what happened): which of two predictors is the better one.
        self.loss = 0.0
        self.trials = 0

    @property
    def averages(self) -> np.ndarray:
        """For a request like most, ``[cells]``."""
        return _probability(self._logit_C)

    def conditional(self, cells: Cells, request: str) -> np.ndarray:
        """Probabilities of the tokens in these cells, each given the ones before it."""
        trials = self._requests.get(request)
        offset = 0.0 if trials is None else trials.offset
        return _probability(self._logit_C[np.asarray(cells, dtype=int)] + offset)

    def curve(self, cells: Cells, request: str) -> np.ndarray:
        """Probabilities that the first 1, 2, ... tokens are all accepted.

        For a request that has shown nothing yet the mean over what requests are like.
        """
        if request in self._requests:
            return np.cumprod(self.conditional(cells, request))
        return self.likely_curves(cells).mean(axis=0)

    def likely_curves(self, cells: Cells) -> np.ndarray:
        """Curves that a request of which nothing is known may have, ``[kinds of requests, tokens]``."""
        offsets = self.likely_offsets()[:, None]
        return np.cumprod(
            _probability(self._logit_C[np.asarray(cells, dtype=int)] + offsets), axis=1
        )

    def observe(self, cells: Cells, num_accepted: int, request: str) -> None:
        """Learns from one draft: the first ``num_accepted`` were right, the next one was not.

        Averages learn what the request's offset does not explain (a logistic regression, token by token).
        Else those of late tokens would be the averages of good requests, since others do not get there.

        Args:
            cells: of the tokens whose fate is known: as many as were accepted, and one more unless all were.
        """
        tried = len(cells)
        if tried == 0:
            return
        p_T = self.conditional(cells, request)
        average_T = self.averages[np.asarray(cells, dtype=int)]
        decay = 0.5 ** (1 / _HALF_LIFE)
        for t, (cell, p) in enumerate(zip(cells, p_T.tolist(), strict=True)):
            right = t < num_accepted
            self.trials += 1
            surprise = -math.log(max(p if right else 1 - p, 1e-6))
            self.loss += (surprise - self.loss) / min(self.trials, _HALF_LIFE)
            self._weight_C[cell] = self._weight_C[cell] * decay + 1
            step = (right - p) / (self._weight_C[cell] * max(p * (1 - p), 0.05))
            self._logit_C[cell] = min(max(self._logit_C[cell] + step, -5.0), 5.0)
        trials = self._requests.setdefault(request, Trials())
        decay = 0.5 ** (tried / _REQUEST_HALF_LIFE)
        trials.tried = trials.tried * decay + tried
        trials.accepted = trials.accepted * decay + num_accepted
        trials.expected = trials.expected * decay + float(average_T.sum())

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
            # Too few to know the spread.
            return np.array([-1.5, 0.0, 1.5])
        return np.quantile(known, np.linspace(0.5 / num, 1 - 0.5 / num, num))


#: Edges in the log-odds of the drafter's confidence.
_EDGES = np.array([-2.0, -1.2, -0.6, 0.0, 0.5, 1.0, 1.6, 2.3, 3.2, 4.4, 6.0])
#: Confidence taken at face value inside each cell, until acceptance says otherwise.
CONFIDENCE_PRIOR = tuple(1 / (1 + np.exp(-np.array([-3.0, *(_EDGES[:-1] + _EDGES[1:]) / 2, 7.0]))))


def confidence_cells(confidence: np.ndarray) -> np.ndarray:
    """Cells of the drafter's probabilities of the tokens that it drafted."""
    return np.searchsorted(_EDGES, _logit(np.clip(confidence, 1e-6, 1 - 1e-6)))
