"""What a draft is worth: probabilities of acceptance, learned from what was accepted.

Shapes: B requests, T tokens of a draft, C cells, P probabilities that a request may have.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass
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
#: Ended requests by which the spread between requests is known: so many, or twice as many as are running.
_RECENT = 8


def _logit(p: Any) -> Any:
    return np.log(p) - np.log1p(-p)


def _probability(logit: Any) -> Any:
    odds = np.exp(-logit)
    odds += 1
    return 1 / odds


@dataclass(slots=True)
class RequestStats:
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


def _add_to_each(
    counts_3B: np.ndarray, seen_3B: Sequence[np.ndarray], kinds: np.ndarray
) -> list[np.ndarray]:
    """:meth:`RequestStats.add` for each of many requests, as arrays: one by one 256 take a millisecond.

    Args:
        counts_3B: what they have: tried, accepted, expected.
        seen_3B: what is added to that.

    Returns:
        Their four figures, ``[B]`` each.
    """
    counts_3B = counts_3B * 0.5 ** (seen_3B[0] / _REQUEST_HALF_LIFE) + np.stack(seen_3B)
    tried_B, accepted_B, expected_B = counts_3B
    mean_B = np.clip(expected_B / tried_B, 0.01, 0.99)
    average_B = _logit(mean_B)
    own_B = (accepted_B + _REQUEST_PRIOR * mean_B) / (tried_B + _REQUEST_PRIOR)
    others_PB = _probability(average_B + np.array([*kinds, *_STRANGERS])[:, None])
    p_PB = np.vstack([own_B, others_PB])
    prior_P = np.array([1.0] * (1 + len(kinds)) + [_RARITY] * len(_STRANGERS))
    wrong_B = tried_B - accepted_B
    likely_PB = prior_P[:, None] * np.exp(accepted_B * np.log(p_PB) + wrong_B * np.log1p(-p_PB))
    total_B = likely_PB.sum(axis=0)
    sure_B = total_B > 0
    p_B = (likely_PB * p_PB).sum(axis=0) / np.where(sure_B, total_B, 1.0)
    p_B = np.clip(np.where(sure_B, p_B, own_B), 0.005, 0.995)
    return [*counts_3B, _logit(p_B) - average_B]


class AcceptanceModel:
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
        #: The rows of requests in ``_stats_R4``, whose columns are the attributes of :class:`RequestStats`;
        #: row 0 is that of all that have shown nothing.
        self._rows: dict[str, int] = {}
        self._stats_R4 = np.zeros((1, 4))
        self._free: list[int] = []
        self._recent: list[float] = []
        self._likely: np.ndarray | None = None
        #: What :meth:`survival` was asked last, and its answer, until anything is learned: a step's two
        #: decisions are mostly about the same requests.
        self._asked: tuple[bytes, tuple[str, ...]] | None = None
        self._answer = np.empty((0, 0))
        #: Running mean of -log P(what happened): which of two predictors is the better one.
        self.loss = 0.0
        self.trials = 0

    def conditional(self, cells: np.ndarray, requests: Sequence[str]) -> np.ndarray:
        """Probabilities ``[B, T]`` of the tokens in these cells, each given the ones before it.

        Args:
            cells: ``[B, T]``, or ``[T]`` where all requests have the same ones.
        """
        offset_B = self._stats_R4[[self._rows.get(r, 0) for r in requests], 3]
        logit = self._logit_C[cells]
        # Token by token in memory: hundreds of requests are few rows then, of which numpy is fast.
        return _probability((logit[:, None] if cells.ndim == 1 else logit.T) + offset_B).T

    def survival(self, cells: np.ndarray, requests: Sequence[str]) -> np.ndarray:
        """Probabilities ``[B, T]`` that the first 1, 2, ... tokens of each request are all accepted.

        For a request that has shown nothing yet the mean over what requests are like; ``cells`` as for
        :meth:`conditional`. Not to be changed in place.
        """
        asked = (cells.tobytes(), tuple(requests))
        if asked == self._asked:
            return self._answer
        out = np.cumprod(self.conditional(cells, requests).T, axis=0).T
        new = [i for i, request in enumerate(requests) if request not in self._rows]
        if new and cells.ndim == 1:
            out[new] = self.likely_survival(cells).mean(axis=0)
        else:
            for i in new:
                out[i] = self.likely_survival(cells[i]).mean(axis=0)
        self._asked, self._answer = asked, out
        return out

    def likely_survival(self, cells_T: np.ndarray) -> np.ndarray:
        """:meth:`survival` of requests of which nothing is known, by what they may be like, ``[P, T]``."""
        offsets_P = self.likely_offsets()
        return np.cumprod(_probability(self._logit_C[cells_T] + offsets_P[:, None]), axis=1)

    def observe(self, cells_T: np.ndarray, num_accepted: int, request: str) -> None:
        """Learns from one draft: the first ``num_accepted`` were right, the next one was not.

        Averages learn what the request's offset does not explain (a logistic regression, token by token).
        Else those of late tokens would be the averages of good requests, since others do not get there.

        Args:
            cells_T: of the tokens whose fate is known: those accepted, and one more unless all were.
        """
        if len(cells_T) == 0:
            return
        self._asked = None
        row = self._row(request)
        of_request = RequestStats(*self._stats_R4[row].tolist())
        expected = 0.0
        decay = 0.5 ** (1 / _HALF_LIFE)
        for t, cell in enumerate(cells_T.tolist()):
            right = t < num_accepted
            average = float(self._logit_C[cell])
            expected += 1 / (1 + math.exp(-average))
            p = 1 / (1 + math.exp(-average - of_request.offset))
            self.trials += 1
            surprise = -math.log(max(p if right else 1 - p, 1e-6))
            self.loss += (surprise - self.loss) / min(self.trials, _HALF_LIFE)
            weight = self._weight_C[cell] = self._weight_C[cell] * decay + 1
            step = (right - p) / (weight * max(p * (1 - p), 0.05))
            self._logit_C[cell] = min(max(average + step, -5.0), 5.0)
        accepted = min(num_accepted, len(cells_T))
        of_request.add(len(cells_T), accepted, expected, self.likely_offsets().tolist())
        self._stats_R4[row] = astuple(of_request)

    def _row(self, request: str) -> int:
        """The request's row, a new one where it has none."""
        row = self._rows.get(request)
        if row is None:
            if not self._free:
                num_rows = len(self._stats_R4)
                self._stats_R4 = np.vstack([self._stats_R4, np.zeros_like(self._stats_R4)])
                self._free.extend(range(num_rows, 2 * num_rows))
            row = self._rows[request] = self._free.pop()
        return row

    def observe_batch(
        self, tried_B: np.ndarray, accepted_B: np.ndarray, requests: Sequence[str]
    ) -> None:
        """Learns what :meth:`observe` learns from a draft of each of some requests, in a fifth of the time.

        The averages move on once, not after each draft, and :attr:`loss` stays as it is. Cells are positions
        here: the token at position t is of cell t.

        Args:
            tried_B: tokens whose fate is known, 1 at least: those accepted, and one more unless all were.
            accepted_B: of them.
        """
        if not len(requests):
            return
        self._asked = None
        T = int(tried_B.max())
        rows = [self._row(request) for request in requests]
        state_4B = self._stats_R4[rows].T
        at_T = np.arange(T)
        tried_BT = at_T < tried_B[:, None]
        right_BT = at_T < accepted_B[:, None]
        logit_T, decay = self._logit_C[:T], 0.5 ** (1 / _HALF_LIFE)
        expected_B = tried_BT @ _probability(logit_T)
        p_BT = _probability(logit_T + state_4B[3][:, None])
        steps_BT = tried_BT * (right_BT - p_BT) / np.maximum(p_BT * (1 - p_BT), 0.05)
        left_T = decay ** tried_BT.sum(axis=0)
        self._weight_C[:T] = self._weight_C[:T] * left_T + (1 - left_T) / (1 - decay)
        moved_T = logit_T + steps_BT.sum(axis=0) / self._weight_C[:T]
        self._logit_C[:T] = np.clip(moved_T, -5.0, 5.0)
        self.trials += int(tried_B.sum())
        seen = (tried_B, accepted_B, expected_B)
        self._stats_R4[rows] = np.stack(
            _add_to_each(state_4B[:3], seen, self.likely_offsets()), axis=1
        )

    def seen(self, request: str) -> bool:
        """Whether the request has shown anything yet."""
        return request in self._rows

    def forget(self, request: str) -> None:
        """The request has ended; its offset stays as one of those that requests have."""
        row = self._rows.pop(request, None)
        if row is None:
            return
        tried, _, _, offset = self._stats_R4[row].tolist()
        self._stats_R4[row] = 0.0
        self._free.append(row)
        if tried >= 2:
            kept = max(_RECENT, 2 * (len(self._rows) + 1))
            self._recent = [*self._recent[1 - kept :], offset]
            self._likely = None
            self._asked = None

    def likely_offsets(self, num: int = 5) -> np.ndarray:
        """Offsets that a request of which nothing is known may have: quantiles of those seen."""
        if self._likely is None:
            if len(self._recent) < 4:
                # Too few to know the spread.
                self._likely = np.array([-1.5, 0.0, 1.5])
            else:
                self._likely = np.quantile(self._recent, (np.arange(num) + 0.5) / num)
        return self._likely


#: Edges in the log-odds of the drafter's confidence.
_EDGES = np.array([-2.0, -1.2, -0.6, 0.0, 0.5, 1.0, 1.6, 2.3, 3.2, 4.4, 6.0])
#: Confidence taken at face value inside each cell, until acceptance says otherwise.
CONFIDENCE_PRIOR = tuple(1 / (1 + np.exp(-np.array([-3.0, *(_EDGES[:-1] + _EDGES[1:]) / 2, 7.0]))))


def confidence_cells(confidence: np.ndarray) -> np.ndarray:
    """Cells of the drafter's probabilities of the tokens that it drafted."""
    return np.searchsorted(_EDGES, _logit(np.clip(confidence, 1e-6, 1 - 1e-6)))
