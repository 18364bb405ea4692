"""What a draft is worth: probabilities of acceptance, learned from what was accepted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

#: Trials of a cell after which what it learned counts half.
_HALF_LIFE = 150.0
#: The same inside a request, whose text moves on.
_REQUEST_HALF_LIFE = 40.0
#: Trials that the running average counts for against those of one request.
_REQUEST_PRIOR = 6.0
#: Offsets of requests unlike all that were seen lately, and how likely one is beside a kind that was seen.
_STRANGERS, _RARITY = (-3.0, 3.0), 0.25
#: Promised tokens after which promises count half, and those that are taken to be kept at the start.
_PROMISE_HALF_LIFE = 100.0
_PROMISE_PRIOR = 10.0
#: Ended requests by which the spread between requests is known: so many, or twice as many as are running.
_RECENT = 8


def _logit(p: Any) -> Any:
    return np.log(p) - np.log1p(-p)


def _probability(logit: Any) -> Any:
    return 1 / (1 + np.exp(-logit))


@dataclass
class Trials:
    """Decayed counts of one request: tokens tried, accepted, and how many were expected to be.

    ``offset`` says how much better than the average its acceptance is, in log-odds.
    """

    tried: float = 0.0
    accepted: float = 0.0
    expected: float = 0.0
    offset: float = 0.0

    def add(self, tried: int, accepted: int, expected: float, kinds: Sequence[float]) -> None:
        """Counts one draft.

        Requests are of kinds rather than scattered around a mean: two failures tell a foreign one. So the
        offset is the mean over the kinds, and over what the counts say by themselves, each weighted by how
        likely it makes the counts.

        Args:
            kinds: offsets that requests have.
        """
        decay = 0.5 ** (tried / _REQUEST_HALF_LIFE)
        self.tried = self.tried * decay + tried
        self.accepted = self.accepted * decay + accepted
        self.expected = self.expected * decay + expected
        mean = min(max(self.expected / self.tried, 0.01), 0.99)
        average, wrong = math.log(mean / (1 - mean)), self.tried - self.accepted
        own = (self.accepted + _REQUEST_PRIOR * mean) / (self.tried + _REQUEST_PRIOR)
        total = weighted = 0.0
        among = [(own, 1.0)]
        among += [(1 / (1 + math.exp(-average - o)), 1.0) for o in kinds]
        among += [(1 / (1 + math.exp(-average - o)), _RARITY) for o in _STRANGERS]
        for p, prior in among:
            likelihood = prior * p**self.accepted * (1 - p) ** wrong
            total += likelihood
            weighted += likelihood * p
        p = min(max(weighted / total if total else own, 0.005), 0.995)
        self.offset = math.log(p / (1 - p)) - average


class Predictor:
    """P(a draft token is accepted | those before it were), by cell and by request.

    A cell is whatever tells draft tokens apart: their position, the drafter's confidence, the length of a
    match. Each has a running average over all requests; a request shifts them by its own offset in log-odds
    as it shows how it differs.

    Args:
        prior: the averages before anything was seen, ``[cells]``.
        weight: trials that the prior counts for.
        groups: of each cell, from 0 on. A request has an offset for each group; what it shows in one says
            nothing of another. None puts all cells into one.
    """

    def __init__(
        self, prior: Sequence[float], weight: float = 6.0, groups: Sequence[int] | None = None
    ) -> None:
        self._logit_C = _logit(np.clip(np.asarray(prior, dtype=float), 0.005, 0.995))
        self._weight_C = np.full(len(self._logit_C), weight)
        self._group_C = np.zeros(len(prior), int) if groups is None else np.asarray(groups, int)
        self._num_groups = int(self._group_C.max()) + 1
        self._requests: dict[str, list[Trials]] = {}
        self._recent: list[list[float]] = []
        self._likely: np.ndarray | None = None
        #: Curves of requests that have shown nothing, by cells, until anything is learned.
        self._unknown: dict[bytes, list[float]] = {}
        #: Running mean of -log P(what happened): which of two predictors is the better one.
        self.loss = 0.0
        self.trials = 0

    def conditional(self, cells_BT: np.ndarray, requests: Sequence[str]) -> np.ndarray:
        """Probabilities ``[B, T]`` of the tokens in these cells, each given the ones before it."""
        known, nothing = self._requests, [Trials()] * self._num_groups
        offset_BG = np.array([[t.offset for t in known.get(r, nothing)] for r in requests])
        offset_BG = offset_BG.reshape(-1, self._num_groups)  # there may be no requests
        offset_BT = np.take_along_axis(offset_BG, self._group_C[cells_BT], axis=1)
        return _probability(self._logit_C[cells_BT] + offset_BT)

    def curves(self, cells_BT: np.ndarray, requests: Sequence[str]) -> np.ndarray:
        """Probabilities ``[B, T]`` that the first 1, 2, ... tokens of each request are all accepted.

        For a request that has shown nothing yet the mean over what requests are like.
        """
        out = np.cumprod(self.conditional(cells_BT, requests), axis=1)
        for i, request in enumerate(requests):
            if request not in self._requests:
                out[i] = self.curve(cells_BT[i], request)
        return out

    def curve(self, cells_T: np.ndarray, request: str) -> list[float]:
        """What :meth:`curves` gives for one request, as numbers: arrays are slow for so few."""
        of_request = self._requests.get(request)
        if of_request is None:
            key = cells_T.tobytes()
            if key not in self._unknown:
                self._unknown[key] = self.likely_curves(cells_T).mean(axis=0).tolist()
            return self._unknown[key]
        out, p = [], 1.0
        for logit, group in zip(
            self._logit_C[cells_T].tolist(), self._group_C[cells_T].tolist(), strict=True
        ):
            p /= 1 + math.exp(-logit - of_request[group].offset)
            out.append(p)
        return out

    def likely_curves(self, cells_T: np.ndarray) -> np.ndarray:
        """Curves that a request of which nothing is known may have, ``[kinds of requests, T]``."""
        offsets = self.likely_offsets()[:, self._group_C[cells_T]]
        return np.cumprod(_probability(self._logit_C[cells_T] + offsets), axis=1)

    def observe(self, cells_T: np.ndarray, num_accepted: int, request: str) -> None:
        """Learns from one draft: the first ``num_accepted`` were right, the next one was not.

        Averages learn what the request's offset does not explain (a logistic regression, token by token).
        Else those of late tokens would be the averages of good requests, since others do not get there.

        Args:
            cells_T: of the tokens whose fate is known: those accepted, and one more unless all were.
        """
        if len(cells_T) == 0:
            return
        self._unknown.clear()
        of_request = self._requests.get(request)
        if of_request is None:
            of_request = self._requests[request] = [Trials() for _ in range(self._num_groups)]
        seen: list[list[Any]] = [[0, 0, 0.0] for _ in of_request]
        decay = 0.5 ** (1 / _HALF_LIFE)
        for t, cell in enumerate(cells_T.tolist()):
            right = t < num_accepted
            average = float(self._logit_C[cell])
            group = int(self._group_C[cell])
            counts = seen[group]
            counts[0] += 1
            counts[1] += right
            counts[2] += 1 / (1 + math.exp(-average))
            p = 1 / (1 + math.exp(-average - of_request[group].offset))
            self.trials += 1
            surprise = -math.log(max(p if right else 1 - p, 1e-6))
            self.loss += (surprise - self.loss) / min(self.trials, _HALF_LIFE)
            weight = self._weight_C[cell] = self._weight_C[cell] * decay + 1
            step = (right - p) / (weight * max(p * (1 - p), 0.05))
            self._logit_C[cell] = min(max(average + step, -5.0), 5.0)
        kinds = self.likely_offsets()
        for group, (tried, accepted, expected) in enumerate(seen):
            if tried:
                of_request[group].add(tried, accepted, expected, kinds[:, group].tolist())

    def seen(self, request: str) -> bool:
        """Whether the request has shown anything yet."""
        return request in self._requests

    def forget(self, request: str) -> None:
        """The request has ended; its offset stays as one of those that requests have."""
        trials = self._requests.pop(request, None)
        if trials is not None and sum(t.tried for t in trials) >= 2:
            kept = max(_RECENT, 2 * (len(self._requests) + 1))
            self._recent = [*self._recent[1 - kept :], [t.offset for t in trials]]
            self._likely = None
            self._unknown.clear()

    def likely_offsets(self, num: int = 5) -> np.ndarray:
        """Offsets ``[kinds, groups]`` that a request of which nothing is known may have: quantiles of those
        seen, a request that is good in one group taken to be good in the others."""
        if self._likely is None:
            if len(self._recent) < 4:
                # Too few to know the spread.
                kinds = np.array([-1.5, 0.0, 1.5])
                self._likely = np.repeat(kinds[:, None], self._num_groups, axis=1)
            else:
                self._likely = np.quantile(self._recent, (np.arange(num) + 0.5) / num, axis=0)
        return self._likely


class Promises:
    """How much of what chosen drafts promised came true.

    Of many drafts those that promise most are chosen, and among them are more that promise too much than
    too little. Averages over all drafts cannot know that.
    """

    def __init__(self) -> None:
        self._promised = self._kept = _PROMISE_PRIOR

    def add(self, promised: float, kept: int) -> None:
        """Counts one verified draft: accepted tokens expected, and accepted."""
        decay = 0.5 ** (promised / _PROMISE_HALF_LIFE)
        self._promised = self._promised * decay + promised + (1 - decay) * _PROMISE_PRIOR
        self._kept = self._kept * decay + kept + (1 - decay) * _PROMISE_PRIOR

    @property
    def share(self) -> float:
        """What part of a promise to count on: all, unless fewer were kept than chance explains."""
        return min((self._kept + self._kept**0.5) / self._promised, 1.0)


#: Edges in the log-odds of the drafter's confidence.
_EDGES = np.array([-2.0, -1.2, -0.6, 0.0, 0.5, 1.0, 1.6, 2.3, 3.2, 4.4, 6.0])
#: Confidence taken at face value inside each cell, until acceptance says otherwise.
CONFIDENCE_PRIOR = tuple(1 / (1 + np.exp(-np.array([-3.0, *(_EDGES[:-1] + _EDGES[1:]) / 2, 7.0]))))


def confidence_cells(confidence: np.ndarray) -> np.ndarray:
    """Cells of the drafter's probabilities of the tokens that it drafted."""
    return np.searchsorted(_EDGES, _logit(np.clip(confidence, 1e-6, 1 - 1e-6)))
