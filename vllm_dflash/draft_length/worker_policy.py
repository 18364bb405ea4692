"""Draft lengths where the worker decides: which requests to draft for, from which source, how many tokens.

The caller shows every step's requests and the tokens that they have so far (:meth:`WorkerPolicy.plan`), runs
the drafter for those that the plan names, and gets the lengths (:meth:`WorkerPolicy.allocate`). Whatever was
drafted, verified, in part or not at all, is compared with the text that the verifier goes on to write. So
drafts that were not sent to the verifier are evidence like the others.

Shapes: B requests, K draft tokens of a request, M = 0..B * K draft tokens of the batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from vllm_dflash.draft_length.acceptance import (
    CONFIDENCE_PRIOR,
    AcceptanceModel,
    confidence_cells,
)
from vllm_dflash.draft_length.allocate import DraftBudget, assign_draft_budget
from vllm_dflash.draft_length.cost import StepCost
from vllm_dflash.draft_length.counters import DRAFTER, LOOKUP, Counters
from vllm_dflash.draft_length.explore import HORIZON, MARGIN, Exploration

#: Lengths of a match that are told apart; longer ones count as the last.
MATCHES = (2, 3, 4, 5)
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
    """

    requests: Sequence[Request]
    allowed_BK: np.ndarray
    drafting: tuple[int, ...]
    lookups_BK: np.ndarray
    seconds_M: np.ndarray


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
class _PendingDraft:
    """A draft whose fate is not known yet: it would start at index ``start`` of the request's tokens."""

    start: int
    tokens: np.ndarray
    learners: Sequence[tuple[AcceptanceModel, np.ndarray]]
    source: str
    length: int
    expected: float
    #: Tokens whose fate is in the counters already.
    counted: int = 0


class WorkerPolicy:
    """Chooses sources and lengths of drafts for most expected tokens per second.

    Args:
        cost: of steps and draft passes.
        num_tokens: K, the most draft tokens of a request.
        whole_batch: draft for all requests or for none.
    """

    def __init__(self, cost: StepCost, num_tokens: int, whole_batch: bool = False) -> None:
        self.cost, self.num_tokens, self.whole_batch = cost, num_tokens, whole_batch
        self.by_position = AcceptanceModel([0.7] * num_tokens)
        self.by_confidence = AcceptanceModel(CONFIDENCE_PRIOR)
        # The first token behind a short match is a guess; the ones behind it follow it.
        first = (0.35, 0.5, 0.6, 0.75)
        self.by_match = AcceptanceModel([p for f in first for p in (f, *[0.85] * (num_tokens - 1))])
        self.counters = Counters(cost, num_tokens)
        self.exploration = Exploration()
        self._pending: dict[str, list[_PendingDraft]] = {}

    # -- before the draft pass

    def plan(self, requests: Sequence[Request], most: int | None = None) -> Plan:
        """Decides for which requests the drafter runs.

        Args:
            requests: of the coming step.
            most: draft tokens of a request at most, where the step has a limit of its own.
        """
        for request in requests:
            if request.id in self._pending:
                self._learn(request)
        B, K = len(requests), self.num_tokens
        context = float(sum(len(r.tokens) for r in requests))
        plain = self.cost.verify_one(B, context, 0)
        explore, probe = self.exploration, self.pass_seconds(B)
        explore.earn(plain)
        explore.budget = min(explore.budget, 2 * probe)
        ids = {r.id for r in requests}
        matched = [i for i, r in enumerate(requests) if len(r.match)]
        with_match = {requests[i].id for i in matched}
        trials = self.by_position.trials + self.by_match.trials
        stands = explore.stands(ids, trials, probe, with_match)
        if stands and not matched:
            nothing_BK = np.zeros((B, K))
            return Plan(requests, nothing_BK > 0, (), nothing_BK, np.array([plain]))
        limit = K if most is None else min(most, K)
        caps_B = np.array([min(r.most, limit) for r in requests], dtype=int)
        allowed_BK = np.arange(K) < caps_B[:, None]
        seconds_M = self.cost.verify(B, context, B * K)
        lookups_BK = self._match_survival(requests, matched) * allowed_BK
        drafting: list[int] = []
        if not stands:
            drafting = self._draft_for(requests, lookups_BK, allowed_BK, seconds_M)
            if not drafting:
                explore.decided_against(ids, trials, with_match)
        return Plan(requests, allowed_BK, tuple(sorted(drafting)), lookups_BK, seconds_M)

    def _draft_for(
        self,
        requests: Sequence[Request],
        lookups_BK: np.ndarray,
        allowed_BK: np.ndarray,
        seconds_M: np.ndarray,
    ) -> list[int]:
        """Indices of the requests to run the drafter for."""
        B = len(requests)
        positions_K = np.arange(self.num_tokens)
        drafts_BK = self.by_position.survival(positions_K, [r.id for r in requests])
        drafts_BK = drafts_BK * allowed_BK
        best = assign_draft_budget(lookups_BK, seconds_M)
        drafting: list[int] = []
        value_B = drafts_BK.sum(axis=1) - lookups_BK.sum(axis=1)
        order = np.argsort(-value_B, kind="stable")[: int((value_B > 0).sum())]
        margin, plain = MARGIN, best.rate
        for size in _sizes(len(order), self.whole_batch):
            chosen = order[:size]
            survival_BK = lookups_BK.copy()
            survival_BK[chosen] = drafts_BK[chosen]
            passed = self.pass_seconds(B if self.whole_batch else size)
            budget = assign_draft_budget(survival_BK, seconds_M + passed)
            self.exploration.returned(budget.tokens / plain - (budget.seconds - passed), passed)
            if budget.rate > margin * best.rate:
                best, drafting, margin = budget, chosen.tolist(), 1.0
        caps_B = allowed_BK.sum(axis=1)
        drafting += self._probes(requests, drafting, lookups_BK, caps_B, best, seconds_M)
        if self.whole_batch and drafting:
            drafting = list(range(B))
        return drafting

    def pass_seconds(self, num_requests: int) -> float:
        """Seconds of a draft pass for so many requests."""
        return self.cost.draft(num_requests * (self.num_tokens + 1)) if num_requests else 0.0

    def _match_cells(self, match_len: int) -> np.ndarray:
        kind = min(max(match_len, MATCHES[0]), MATCHES[-1]) - MATCHES[0]
        return kind * self.num_tokens + np.arange(self.num_tokens)

    def _match_survival(self, requests: Sequence[Request], matched: Sequence[int]) -> np.ndarray:
        """``[B, K]``, 0 behind the end of a match."""
        out = np.zeros((len(requests), self.num_tokens))
        if matched:
            cells = np.stack([self._match_cells(requests[i].match_len) for i in matched])
            survival = self.by_match.survival(cells, [requests[i].id for i in matched])
            lengths = np.array([len(requests[i].match) for i in matched])
            held = np.arange(self.num_tokens) < lengths[:, None]
            out[matched] = survival * held
        return out

    def _probes(
        self,
        requests: Sequence[Request],
        drafting: Sequence[int],
        lookups_BK: np.ndarray,
        caps_B: np.ndarray,
        best: DraftBudget,
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
        if cost <= self.exploration.budget:
            self.exploration.spend(cost)
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
        likely = self.by_position.likely_survival(np.arange(self.num_tokens))
        chances = np.maximum(likely - price, 0)
        out = []
        for i in new:
            instead = np.maximum(lookups_BK[i] - price, 0).sum()
            gains = chances[:, : caps_B[i]].sum(axis=1) - instead - draft
            steps = min(HORIZON, requests[i].most)
            if np.maximum(gains, 0).mean() * steps > draft:
                out.append(i)
        return out

    def _waiting(self, request: str, source: str) -> bool:
        return any(p.source == source for p in self._pending.get(request, ()))

    # -- behind it

    def allocate(
        self, plan: Plan, drafts: np.ndarray | None, confidence: np.ndarray | None
    ) -> list[Draft]:
        """Sources and lengths for the requests of the plan.

        Args:
            drafts: what the drafter drafted, ``[len(plan.drafting), K]``; None if it did not run.
            confidence: its probability of each, or None where it is not known.
        """
        B, K = len(plan.requests), self.num_tokens
        survival_BK = plan.lookups_BK
        rows = list(plan.drafting)
        if not rows and not survival_BK.any():
            self.counters.lengths[0] += B
            return [Draft(LOOKUP, 0)] * B
        cells = None if confidence is None else confidence_cells(confidence)
        by_drafter = np.zeros(B, dtype=bool)
        if rows:
            ids = [plan.requests[i].id for i in rows]
            if cells is not None and self.use_confidence:
                drafted = self.by_confidence.survival(cells, ids)
            else:
                drafted = self.by_position.survival(np.arange(K), ids)
            drafted = drafted * plan.allowed_BK[rows]
            by_drafter[rows] = drafted.sum(axis=1) > survival_BK[rows].sum(axis=1)
            survival_BK = survival_BK.copy()
            survival_BK[rows] = np.where(by_drafter[rows][:, None], drafted, survival_BK[rows])
        # The draft pass is spent either way.
        seconds_M = plan.seconds_M + self.pass_seconds(len(rows))
        budget = assign_draft_budget(survival_BK, seconds_M)
        lengths = budget.lengths
        if budget.rate < MARGIN * B / float(seconds_M[0]):
            lengths = (0,) * B
        out = []
        row_of = {i: row for row, i in enumerate(rows)}
        for i, request in enumerate(plan.requests):
            length = lengths[i]
            chances = tuple(survival_BK[i, :length].tolist())
            draft = Draft(DRAFTER if by_drafter[i] else LOOKUP, length, chances)
            out.append(draft)
            self.counters.lengths[length] += 1
            if i in row_of and drafts is not None:
                learners = [(self.by_position, np.arange(K))]
                if cells is not None:
                    learners.append((self.by_confidence, cells[row_of[i]]))
                self._await(request, DRAFTER, drafts[row_of[i]], learners, draft)
            if len(request.match):
                learners = [(self.by_match, self._match_cells(request.match_len))]
                self._await(request, LOOKUP, request.match, learners, draft)
        return out

    @property
    def use_confidence(self) -> bool:
        """Whether the drafter's confidence has foretold acceptance better than position has."""
        known, by = self.by_confidence, self.by_position
        return bool(known.trials >= _ENOUGH and known.loss < _BETTER * by.loss)

    def _await(
        self,
        request: Request,
        source: str,
        tokens: np.ndarray,
        learners: Sequence[tuple[AcceptanceModel, np.ndarray]],
        draft: Draft,
    ) -> None:
        used = draft.source == source and draft.length > 0
        if not used and self._waiting(request.id, source):
            return  # one unverified draft at a time says enough
        pending = _PendingDraft(
            start=len(request.tokens),
            tokens=np.array(tokens),
            learners=learners,
            source=source,
            length=draft.length if used else 0,
            expected=sum(draft.expected) if used else 0.0,
        )
        self._pending.setdefault(request.id, []).append(pending)

    def _learn(self, request: Request) -> None:
        """Compares drafts of earlier steps with the text that followed."""
        undecided = []
        for draft in self._pending.pop(request.id):
            came = request.tokens[draft.start : draft.start + len(draft.tokens)]
            same = came == draft.tokens[: len(came)]
            right = len(came) if same.all() else int(np.argmin(same))
            if draft.source == DRAFTER:
                self.counters.compare(draft.counted, right, wrong=right < len(came))
                draft.counted = right
            if draft.length:
                # As many as were verified are in the text by now, or the one in the place of a wrong one is.
                accepted = min(right, draft.length)
                self.counters.verified(draft.source, 1, draft.length, accepted)
                self.counters.expected[draft.source] += draft.expected
                draft.length = 0
            if right == len(came) < len(draft.tokens):
                undecided.append(draft)
                continue
            for model, cells in draft.learners:
                model.observe(cells[: right + 1], right, request.id)
        if undecided:
            self._pending[request.id] = undecided

    def forget(self, request_ids: Iterable[str]) -> None:
        """These requests have ended."""
        for request in request_ids:
            self._pending.pop(request, None)
            for model in (self.by_position, self.by_confidence, self.by_match):
                model.forget(request)


def _sizes(candidates: int, whole_batch: bool) -> list[int]:
    """Numbers of requests to try drafting for."""
    if whole_batch or candidates <= 2:
        return [candidates] if whole_batch and candidates else list(range(1, candidates + 1))
    return sorted({1, candidates // 2, candidates})
