"""Which requests to draft for, how, and how many tokens of it to have verified: one decision a step.

The caller shows every step's requests and the tokens that they have so far (:meth:`Policy.plan`), runs the
drafter for those that the plan names, and gets the lengths (:meth:`Policy.settle`). Whatever was drafted,
verified, in part or not at all, is compared with the text that the verifier goes on to write, so that drafts
that were not sent to the verifier are evidence like the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field

import numpy as np

from vllm_dflash.draft_length.acceptance import (
    CONFIDENCE_PRIOR,
    Predictor,
    Promises,
    confidence_cells,
)
from vllm_dflash.draft_length.choice import Choice, choose
from vllm_dflash.draft_length.cost import StepCost
from vllm_dflash.draft_length.pace import Pace
from vllm_dflash.draft_length.totals import DRAFTER, LOOKUP, Totals

#: Lengths of a match that are told apart; longer ones count as the last.
MATCHES = (2, 3, 4, 5)
#: How much more a step with drafts must promise than one without, and one with a draft pass than one with
#: matches alone. Estimates are off by as much.
MARGIN = 1.02
#: Share of the time that may go into drafts made only to see whether drafting pays again. Each of them lowers
#: it by a factor, down to a least share, while draft passes do not even bring in so much of what they cost.
PROBE_SHARE, PROBE_DECAY, LEAST_PROBE_SHARE, HOPELESS = 0.005, 0.8, 0.0015, 0.1
#: Steps that a request's first draft is taken to be of use for.
HORIZON = 20
#: Steps for which a verdict against the drafter stands while nothing is known anew but what steps cost.
REST = 32
#: Share of its requests that must still be there.
_ENOUGH_LEFT = 0.75
#: Trials after which the drafter's confidence is believed, if it foretold acceptance so much better.
_ENOUGH, _BETTER = 64, 0.97


@dataclass(slots=True)
class Request:
    """One request of a step that can take a draft.

    Attributes:
        id: vLLM's.
        tokens: all its tokens, the one just sampled (the anchor) last, ``[n]``.
        most: draft tokens that it may have at most.
        match: prompt lookup's draft, ``[<= K]``; empty where nothing matches.
        match_len: tokens of the context that matched.
    """

    id: str
    tokens: np.ndarray
    most: int
    match: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    match_len: int = 0


@dataclass(frozen=True)
class Plan:
    """What to do before the next step.

    Attributes:
        requests: those of the step.
        allowed_BK: whether a request may have so many draft tokens, bool.
        drafting: indices of those to run the drafter for, ascending.
        lookups_BK: of each request, the probabilities that prompt lookup's first tokens are all accepted.
        seconds_M: of a step with 0, 1, ... draft tokens (of those that may be chosen), without a draft pass.
        looked_up: the choice among lookups alone.
    """

    requests: Sequence[Request]
    allowed_BK: np.ndarray
    drafting: tuple[int, ...]
    lookups_BK: np.ndarray
    seconds_M: np.ndarray
    looked_up: Choice


@dataclass(frozen=True)
class Draft:
    """What one request gets: the first ``length`` tokens of its source's draft.

    Attributes:
        expected: of each of them the probability that it is accepted.
    """

    source: str
    length: int
    expected: tuple[float, ...] = ()


@dataclass
class _Block:
    """A draft whose fate is not known yet: it would start at index ``start`` of the request's tokens."""

    start: int
    tokens: np.ndarray
    learners: Sequence[tuple[Predictor, np.ndarray]]
    source: str
    length: int
    promised: float
    expected: float
    #: Tokens whose fate is in the totals already.
    counted: int = 0


class Policy:
    """Chooses sources and lengths of drafts for most expected tokens per second.

    Args:
        cost: of steps and draft passes.
        num_tokens: K, the most draft tokens of a request.
        together: draft for all requests or for none.
    """

    def __init__(self, cost: StepCost, num_tokens: int, together: bool = False) -> None:
        self.cost, self.num_tokens, self.together = cost, num_tokens, together
        self.by_position = Predictor([0.7] * num_tokens)
        self.by_confidence = Predictor(CONFIDENCE_PRIOR)
        # The first token behind a short match is a guess; the ones behind it follow it.
        first = (0.35, 0.5, 0.6, 0.75)
        # How often a request's matches fail at once does not tell how long the others hold.
        self.by_match = Predictor(
            [p for f in first for p in (f, *[0.85] * (num_tokens - 1))],
            groups=[g for _ in first for g in (0, *[1] * (num_tokens - 1))],
        )
        self.pace = Pace()
        self.promises = {DRAFTER: Promises(), LOOKUP: Promises()}
        self.totals = Totals(cost, num_tokens)
        self._blocks: dict[str, list[_Block]] = {}
        self._credit = 0.0
        self._probe_share = PROBE_SHARE
        # The requests and the state of knowledge for which the drafter was found not to pay, the requests
        # of them that had matches then, and for how many more steps that stands.
        self._verdict: tuple[Set[str], int] | None = None
        self._matched: Set[str] = frozenset()
        #: By how much faster than without speculation the latest plan promised to be, 0.1 for a tenth.
        self.gain = 0.0
        self._rest = 0

    # -- before the draft pass

    def plan(self, requests: Sequence[Request], most: int | None = None, steps: int = 1) -> Plan:
        """Decides for which requests the drafter runs.

        Args:
            requests: of the coming step.
            most: draft tokens of a request at most, where the step has a limit of its own.
            steps: since the last plan.
        """
        for request in requests:
            if request.id in self._blocks:
                self._learn(request)
        B, K = len(requests), self.num_tokens
        ids = {r.id for r in requests}
        context = float(sum(len(r.tokens) for r in requests))
        plain = self.cost.verify_one(B, context, 0)
        earned = steps * self._probe_share * plain
        self._credit = min(self._credit + earned, 2 * self.pass_seconds(B))
        matched = {i for i, r in enumerate(requests) if len(r.match)}
        matched_ids = {requests[i].id for i in matched}
        rests = self._rests(ids, matched_ids)
        best = Choice((0,) * B, float(B), plain)
        if rests and not matched:
            nothing_BK = np.zeros((B, K))
            return Plan(requests, nothing_BK > 0, (), nothing_BK, np.array([plain]), best)
        limit = K if most is None else min(most, K)
        caps_B = np.array([min(r.most, limit) for r in requests], dtype=int)
        allowed_BK = np.arange(K) < caps_B[:, None]
        seconds_M = self.cost.verify(B, context, B * K)
        lookups_BK = self._match_curves(requests, matched) * allowed_BK
        if matched and _bound(lookups_BK, seconds_M) > best.rate:
            best = choose(lookups_BK, seconds_M)
        drafting: list[int] = []
        if not rests:
            drafting = self._draft_for(requests, lookups_BK, allowed_BK, best, seconds_M)
            if not drafting:
                self._matched = matched_ids
                self._verdict, self._rest = (ids, self._trials()), REST
        return Plan(requests, allowed_BK, tuple(sorted(drafting)), lookups_BK, seconds_M, best)

    def _rests(self, ids: Set[str], matched: Set[str] = frozenset()) -> bool:
        """Whether it is known without looking that the drafter does not pay: looking costs, too.

        Beside matches the drafter is worth less, so a verdict holds where there are as many and more. It
        holds when some requests have left, too.
        """
        self._rest -= 1
        if self._verdict is None or self._rest < 0:
            return False
        of, trials = self._verdict
        same = trials == self._trials() and ids <= of and len(ids) >= _ENOUGH_LEFT * len(of)
        known = same and self._matched & ids <= matched
        return known and self._credit < self.pass_seconds(len(ids))

    def _trials(self) -> int:
        """How much is known of what the drafter is worth beside the matches that there were."""
        return self.by_position.trials + (self.by_match.trials if self._matched else 0)

    def _draft_for(
        self,
        requests: Sequence[Request],
        lookups_BK: np.ndarray,
        allowed_BK: np.ndarray,
        best: Choice,
        seconds_M: np.ndarray,
    ) -> list[int]:
        """Indices of the requests to run the drafter for; ``best`` is the choice without it."""
        B = len(requests)
        positions_K = np.arange(self.num_tokens)
        drafts_BK = self.by_position.curves(positions_K, [r.id for r in requests])
        drafts_BK = drafts_BK * (allowed_BK * self.promises[DRAFTER].share)
        drafting: list[int] = []
        drafted_B, looked_up_B = drafts_BK.sum(axis=1), lookups_BK.sum(axis=1)
        worth_B = drafted_B - looked_up_B
        order = np.argsort(-worth_B, kind="stable")[: int((worth_B > 0).sum())]
        sizes = {
            n: self.pass_seconds(B if self.together else n)
            for n in _sizes(len(order), self.together)
        }
        margin, without, recovered = MARGIN, best, 0.0
        if not self._may_pay(sizes, drafted_B[order], looked_up_B, best, seconds_M):
            sizes = {}
        for size, passed in sizes.items():
            chosen = order[:size]
            curves_BK = lookups_BK.copy()
            curves_BK[chosen] = drafts_BK[chosen]
            choice = choose(curves_BK, seconds_M + passed)
            gained = choice.worth(without.rate) - without.worth(without.rate)
            recovered = max(recovered, 1 + gained / (without.rate * passed)) if passed else 1.0
            if choice.rate > margin * best.rate:
                best, drafting, margin = choice, chosen.tolist(), 1.0
        if recovered >= HOPELESS:
            self._probe_share = PROBE_SHARE
        caps_B = allowed_BK.sum(axis=1)
        drafting += self._probes(requests, drafting, lookups_BK, caps_B, best, seconds_M)
        if self.together and drafting:
            drafting = list(range(B))
        return drafting

    def _may_pay(
        self,
        sizes: Mapping[int, float],
        drafted_B: np.ndarray,
        looked_up_B: np.ndarray,
        best: Choice,
        seconds_M: np.ndarray,
    ) -> bool:
        """Whether some draft pass would pay, or nearly, if all its tokens were verified in the time of one.

        Where drafting is hopeless this saves trying what is worth verifying.

        Args:
            sizes: numbers of requests to draft for and what that takes, in seconds.
            drafted_B: expected tokens of the drafter, in the order in which requests would be drafted for.
            looked_up_B: of prompt lookup, of all requests.
        """
        most, least = len(looked_up_B) + float(looked_up_B.sum()), float(seconds_M[:2][-1])
        for size, passed in sizes.items():
            drafted = float(drafted_B[:size].sum())
            pays = most + drafted > MARGIN * best.rate * (least + passed)
            if pays or drafted > HOPELESS * best.rate * passed:
                return True
        return False

    def pass_seconds(self, num_requests: int) -> float:
        """Seconds of a draft pass for so many requests."""
        return self.cost.draft(num_requests * (self.num_tokens + 1)) if num_requests else 0.0

    def _match_cells(self, match_len: int) -> np.ndarray:
        kind = min(max(match_len, MATCHES[0]), MATCHES[-1]) - MATCHES[0]
        return kind * self.num_tokens + np.arange(self.num_tokens)

    def _match_curves(self, requests: Sequence[Request], matched: Iterable[int]) -> np.ndarray:
        """``[B, K]``, 0 behind the end of a match."""
        out = np.zeros((len(requests), self.num_tokens))
        share = self.promises[LOOKUP].share
        for i in matched:
            request, n = requests[i], len(requests[i].match)
            curve = self.by_match.curve(self._match_cells(request.match_len), request.id)
            out[i, :n] = [share * p for p in curve[:n]]
        return out

    def _probes(
        self,
        requests: Sequence[Request],
        drafting: Sequence[int],
        lookups_BK: np.ndarray,
        caps_B: np.ndarray,
        best: Choice,
        seconds_M: np.ndarray,
    ) -> list[int]:
        """Requests to draft for although it is not expected to pay: what it shows may."""
        left = [
            i
            for i, r in enumerate(requests)
            if i not in drafting and caps_B[i] > 0 and not self._waiting(r.id, DRAFTER)
        ]
        if not left:
            return []
        before = self.pass_seconds(len(drafting))
        cost = self.pass_seconds(len(drafting) + len(left)) - before
        if cost <= self._credit:
            self._credit -= cost
            self._probe_share = max(PROBE_DECAY * self._probe_share, LEAST_PROBE_SHARE)
            return left
        new = [i for i in left if not self.by_position.seen(requests[i].id)]
        if not new:
            return []
        # What a token costs now, and a draft, in tokens. The first one of a batch costs more than the next.
        chosen, last = sum(best.lengths), len(seconds_M) - 1
        M = max(chosen, 1)
        price = best.rate * float(seconds_M[min(M + 1, last)] - seconds_M[min(M, last)])
        first = 0.0 if chosen else best.rate * float(seconds_M[1] - seconds_M[0]) - price
        draft = best.rate * (self.pass_seconds(len(drafting) + 1) - before) + max(first, 0.0)
        # [kinds of requests, K]: what each kind would gain a step.
        chances = np.maximum(self.by_position.likely_curves(np.arange(self.num_tokens)) - price, 0)
        out = []
        for i in new:
            instead = np.maximum(lookups_BK[i] - price, 0).sum()
            gains = chances[:, : caps_B[i]].sum(axis=1) - instead - draft
            steps = min(HORIZON, requests[i].most)
            if np.maximum(gains, 0).mean() * steps > draft:
                out.append(i)
        return out

    def _waiting(self, request: str, source: str) -> bool:
        return any(b.source == source for b in self._blocks.get(request, ()))

    # -- behind it

    def settle(
        self, plan: Plan, drafts: np.ndarray | None, confidence: np.ndarray | None
    ) -> list[Draft]:
        """Sources and lengths for the requests of the plan.

        Args:
            drafts: what the drafter drafted, ``[len(plan.drafting), K]``; None if it did not run.
            confidence: its probability of each, or None where it is not known.
        """
        B, K = len(plan.requests), self.num_tokens
        curves_BK = plan.lookups_BK
        rows = list(plan.drafting)
        if not rows and not curves_BK.any():
            self.totals.lengths[0] += B
            self.gain = 0.0
            for request in plan.requests:
                self.pace.add(request.id, 1.0, 1.0)
            return [Draft(LOOKUP, 0)] * B
        cells = None if confidence is None else confidence_cells(confidence)
        by_drafter = np.zeros(B, dtype=bool)
        if rows:
            ids = [plan.requests[i].id for i in rows]
            if cells is not None and self.believes_confidence:
                drafted = self.by_confidence.curves(cells, ids)
            else:
                drafted = self.by_position.curves(np.arange(K), ids)
            drafted = drafted * plan.allowed_BK[rows] * self.promises[DRAFTER].share
            by_drafter[rows] = drafted.sum(axis=1) > curves_BK[rows].sum(axis=1)
            curves_BK = curves_BK.copy()
            curves_BK[rows] = np.where(by_drafter[rows][:, None], drafted, curves_BK[rows])
        # The draft pass is spent either way.
        passed = self.pass_seconds(len(rows))
        price = self.pace.of(r.id for r in plan.requests) / float(plan.seconds_M[0])
        choice = choose(curves_BK, plan.seconds_M + passed) if rows else plan.looked_up
        none = Choice((0,) * B, float(B), float(plan.seconds_M[0] + passed))
        if choice.rate < MARGIN * none.rate:
            choice = none
        elif choice.rate > price:
            # A better step than most: what its last tokens save is time at the usual pace.
            choice = choose(curves_BK, plan.seconds_M + passed, price)
        time = choice.seconds / float(plan.seconds_M[0])
        self.gain = choice.rate * float(plan.seconds_M[0]) / B - 1
        out = []
        row_of = {i: row for row, i in enumerate(rows)}
        for i, request in enumerate(plan.requests):
            length = choice.lengths[i]
            chances = tuple(curves_BK[i, :length].tolist())
            draft = Draft(DRAFTER if by_drafter[i] else LOOKUP, length, chances)
            out.append(draft)
            self.totals.lengths[length] += 1
            expected = sum(chances)
            self.pace.add(request.id, 1 + expected, time)
            if i in row_of and drafts is not None:
                learners = [(self.by_position, np.arange(K))]
                if cells is not None:
                    learners.append((self.by_confidence, cells[row_of[i]]))
                self._await(request, DRAFTER, drafts[row_of[i]], learners, draft, expected)
            if len(request.match):
                learners = [(self.by_match, self._match_cells(request.match_len))]
                self._await(request, LOOKUP, request.match, learners, draft, expected)
        return out

    @property
    def believes_confidence(self) -> bool:
        """Whether the drafter's confidence has foretold acceptance better than position has."""
        known, by = self.by_confidence, self.by_position
        return bool(known.trials >= _ENOUGH and known.loss < _BETTER * by.loss)

    def _await(
        self,
        request: Request,
        source: str,
        tokens: np.ndarray,
        learners: Sequence[tuple[Predictor, np.ndarray]],
        draft: Draft,
        expected: float,
    ) -> None:
        used = draft.source == source and draft.length > 0
        if not used and self._waiting(request.id, source):
            return  # one unverified draft at a time says enough
        block = _Block(
            start=len(request.tokens),
            tokens=np.array(tokens),
            learners=learners,
            source=source,
            length=draft.length if used else 0,
            promised=expected / self.promises[source].share if used else 0.0,
            expected=expected if used else 0.0,
        )
        self._blocks.setdefault(request.id, []).append(block)

    def _learn(self, request: Request) -> None:
        """Compares drafts of earlier steps with the text that followed."""
        blocks = self._blocks.pop(request.id)
        known = request.tokens
        undecided = []
        for block in blocks:
            came = known[block.start : block.start + len(block.tokens)]
            same = came == block.tokens[: len(came)]
            right = len(came) if same.all() else int(np.argmin(same))
            if block.source == DRAFTER:
                self.totals.compare(block.counted, right, wrong=right < len(came))
                block.counted = right
            if block.length:
                self.totals.drafts[block.source] += 1
                # As many as were verified are in the text by now, or the one in the place of a wrong one is.
                self.totals.proposed[block.source] += block.length
                self.totals.expected[block.source] += block.expected
                self.totals.accepted[block.source] += min(right, block.length)
                self.promises[block.source].add(block.promised, min(right, block.length))
                block.length = 0
            if right == len(came) < len(block.tokens):
                undecided.append(block)
                continue
            for predictor, cells in block.learners:
                predictor.observe(cells[: right + 1], right, request.id)
        if undecided:
            self._blocks[request.id] = undecided

    def forget(self, request_ids: Iterable[str]) -> None:
        """These requests have ended."""
        for request in request_ids:
            self._blocks.pop(request, None)
            self.pace.forget(request)
            for predictor in (self.by_position, self.by_confidence, self.by_match):
                predictor.forget(request)


def _bound(curves_BK: np.ndarray, seconds_M: np.ndarray) -> float:
    """A rate that no choice with drafts exceeds: all of them for the time of one."""
    return (len(curves_BK) + float(curves_BK.sum())) / float(seconds_M[:2][-1])


def _sizes(candidates: int, together: bool) -> list[int]:
    """Numbers of requests to try drafting for."""
    if together or candidates <= 2:
        return [candidates] if together and candidates else list(range(1, candidates + 1))
    return sorted({1, candidates // 2, candidates})
