"""Which requests to draft for, how, and how many tokens of it to have verified: one decision a step.

The caller shows every step's requests and the tokens that they have so far (:meth:`Policy.plan`), runs the
drafter for those that the plan names, and gets the lengths (:meth:`Policy.settle`). Whatever was drafted,
verified, in part or not at all, is compared with the text that the verifier goes on to write, so that drafts
that were not sent to the verifier are evidence like the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from vllm_dflash.draft_length.acceptance import CONFIDENCE_PRIOR, Predictor, confidence_cells
from vllm_dflash.draft_length.choice import Choice, choose
from vllm_dflash.draft_length.cost import StepCost

DRAFTER, LOOKUP = "drafter", "lookup"
#: Lengths of a match that are told apart; longer ones count as the last.
MATCHES = (2, 3, 4, 5)
#: How much more a step with the drafter must promise than one without. Estimates are off by as much.
_MARGIN = 1.02
#: Share of the time that may go into drafts made only to see whether drafting pays again.
_PROBE_SHARE = 0.005
#: Steps that a request's first draft is taken to be of use for.
_HORIZON = 20
#: Steps that took longer than so many plain ones say nothing of speculation.
_HELD_UP = 10.0
#: Trials after which the drafter's confidence is believed, if it foretold acceptance so much better.
_ENOUGH, _BETTER = 64, 0.97


@dataclass(frozen=True)
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
        most: draft tokens that each may have.
        drafting: indices of those to run the drafter for, ascending.
        lookups: of each request, the probabilities that prompt lookup's first tokens are all accepted.
        seconds_M: of a step with 0, 1, ... draft tokens, without a draft pass.
        expected: the choice that the plan was made for.
    """

    requests: Sequence[Request]
    most: Sequence[int]
    drafting: tuple[int, ...]
    lookups: Sequence[np.ndarray]
    seconds_M: np.ndarray
    expected: Choice


@dataclass(frozen=True)
class Draft:
    """What one request gets: the first ``length`` tokens of its source's draft."""

    source: str
    length: int


@dataclass
class _Block:
    """A draft whose fate is not known yet: it would start at index ``start`` of the request's tokens."""

    start: int
    tokens: np.ndarray
    learners: Sequence[tuple[Predictor, np.ndarray]]
    source: str
    length: int
    expected: float


@dataclass
class Totals:
    """Counts since start, by source where they differ.

    Attributes:
        steps: verifier steps without prompt chunks.
        drafted_steps: those before which the drafter ran.
        tokens, seconds: emitted by those steps, and spent on them, draft passes included.
        plain_seconds: what the same tokens would have taken without speculation, by the measured costs.
        lengths: how often each draft length was chosen, ``[K + 1]``.
        proposed, accepted, expected: draft tokens by source; without those of requests' last steps.
    """

    steps: int = 0
    drafted_steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    plain_seconds: float = 0.0
    lengths: list[int] = field(default_factory=list)
    proposed: dict[str, int] = field(default_factory=lambda: {DRAFTER: 0, LOOKUP: 0})
    accepted: dict[str, int] = field(default_factory=lambda: {DRAFTER: 0, LOOKUP: 0})
    expected: dict[str, float] = field(default_factory=lambda: {DRAFTER: 0.0, LOOKUP: 0.0})

    @property
    def speedup(self) -> float | None:
        """Estimated speed over that without speculation; None before the first step."""
        return self.plain_seconds / self.seconds if self.seconds else None


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
        self.by_match = Predictor([p for f in first for p in (f, *[0.85] * (num_tokens - 1))])
        self.totals = Totals(lengths=[0] * (num_tokens + 1))
        self._blocks: dict[str, list[_Block]] = {}
        self._credit = 0.0

    # -- before the draft pass

    def plan(self, requests: Sequence[Request], most: int | None = None) -> Plan:
        """Decides for which requests the drafter runs.

        Args:
            requests: of the coming step.
            most: draft tokens of a request at most, where the step has a limit of its own.
        """
        for request in requests:
            self._learn(request)
        limit = self.num_tokens if most is None else min(most, self.num_tokens)
        B = len(requests)
        context = float(sum(len(r.tokens) for r in requests))
        caps = [min(r.most, limit) for r in requests]
        seconds_M = self.cost.step(np.arange(B, B + sum(caps) + 1), B, context)
        lookups = [self._match_curve(r)[:cap] for r, cap in zip(requests, caps, strict=True)]
        drafts = [
            self.by_position.curve(range(cap), r.id) for r, cap in zip(requests, caps, strict=True)
        ]
        best = choose(lookups, seconds_M)
        drafting: tuple[int, ...] = ()
        self._credit = min(self._credit + _PROBE_SHARE * best.seconds, 2 * self._pass_seconds(B))
        worth = np.array([d.sum() - m.sum() for d, m in zip(drafts, lookups, strict=True)])
        order = [int(i) for i in np.argsort(-worth, kind="stable") if worth[i] > 0]
        margin = _MARGIN
        for size in _sizes(len(order), self.together, B):
            chosen = order[:size] if not self.together else range(B)
            curves = list(lookups)
            for i in chosen:
                curves[i] = drafts[i] if worth[i] > 0 else lookups[i]
            choice = choose(curves, seconds_M + self._pass_seconds(len(chosen)))
            if choice.rate > margin * best.rate:
                best, drafting, margin = choice, tuple(sorted(chosen)), 1.0
        probes = self._probes(requests, drafting, lookups, caps, best, seconds_M)
        if probes and self.together:
            probes = tuple(range(B))
        return Plan(requests, caps, tuple(sorted({*drafting, *probes})), lookups, seconds_M, best)

    def _pass_seconds(self, num_requests: int) -> float:
        return self.cost.draft(num_requests * (self.num_tokens + 1)) if num_requests else 0.0

    def _match_cells(self, request: Request) -> np.ndarray:
        kind = min(max(request.match_len, MATCHES[0]), MATCHES[-1]) - MATCHES[0]
        return kind * self.num_tokens + np.arange(len(request.match))

    def _match_curve(self, request: Request) -> np.ndarray:
        if len(request.match) == 0:
            return np.empty(0)
        return self.by_match.curve(self._match_cells(request), request.id)

    def _probes(
        self,
        requests: Sequence[Request],
        drafting: Sequence[int],
        lookups: Sequence[np.ndarray],
        caps: Sequence[int],
        best: Choice,
        seconds_M: np.ndarray,
    ) -> tuple[int, ...]:
        """Requests to draft for although it is not expected to pay: what it shows may."""
        waiting = {
            r for r, blocks in self._blocks.items() if any(b.source == DRAFTER for b in blocks)
        }
        left = [
            i
            for i, r in enumerate(requests)
            if i not in drafting and caps[i] > 0 and r.id not in waiting
        ]
        if not left:
            return ()
        # What a token costs now, in tokens.
        M = sum(best.lengths)
        price = best.rate * float(seconds_M[min(M + 1, len(seconds_M) - 1)] - seconds_M[M])
        alone = best.rate * self._pass_seconds(1)
        unknown = []
        # [kinds of requests, K]: what each kind would gain a step.
        chances = self.by_position.likely_curves(range(self.num_tokens))
        for i in left:
            if self.by_position.seen(requests[i].id):
                continue
            instead = np.maximum(lookups[i] - price, 0).sum()
            gains = np.maximum(chances[:, : caps[i]] - price, 0).sum(-1) - instead - alone
            steps = min(_HORIZON, requests[i].most)
            if np.maximum(gains, 0).mean() * steps > alone:
                unknown.append(i)
        cost = self._pass_seconds(len(drafting) + len(left)) - self._pass_seconds(len(drafting))
        if cost <= self._credit:
            self._credit -= cost
            return tuple(left)
        return tuple(unknown)

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
        curves = list(plan.lookups)
        sources = [LOOKUP] * B
        rows = {i: row for row, i in enumerate(plan.drafting)}
        cells = None if confidence is None else confidence_cells(confidence)
        for i, row in rows.items():
            request = plan.requests[i]
            if cells is not None and self.believes_confidence:
                curve = self.by_confidence.curve(cells[row], request.id)
            else:
                curve = self.by_position.curve(range(K), request.id)
            curve = curve[: plan.most[i]]
            if curve.sum() > curves[i].sum():
                curves[i], sources[i] = curve, DRAFTER
        choice = choose(curves, plan.seconds_M + self._pass_seconds(len(rows)))
        out = [Draft(s, n) for s, n in zip(sources, choice.lengths, strict=True)]
        for i, (request, draft) in enumerate(zip(plan.requests, out, strict=True)):
            self.totals.lengths[draft.length] += 1
            expected = float(curves[i][: draft.length].sum())
            if i in rows and drafts is not None:
                learners = [(self.by_position, np.arange(K))]
                if cells is not None:
                    learners.append((self.by_confidence, cells[rows[i]]))
                self._await(request, DRAFTER, drafts[rows[i]], learners, draft, expected)
            if len(request.match):
                learners = [(self.by_match, self._match_cells(request))]
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
        blocks = self._blocks.setdefault(request.id, [])
        if not used and any(b.source == source for b in blocks):
            return  # one unverified draft at a time says enough
        block = _Block(
            start=len(request.tokens),
            tokens=np.array(tokens),
            learners=learners,
            source=source,
            length=draft.length if used else 0,
            expected=expected if used else 0.0,
        )
        blocks.append(block)

    def _learn(self, request: Request) -> None:
        """Compares drafts of earlier steps with the text that followed."""
        blocks = self._blocks.get(request.id)
        if not blocks:
            return
        known = request.tokens
        undecided = []
        for block in blocks:
            came = known[block.start : block.start + len(block.tokens)]
            same = came == block.tokens[: len(came)]
            right = len(came) if same.all() else int(np.argmin(same))
            if block.length:
                # As many as were verified are in the text by now, or the one in the place of a wrong one is.
                self.totals.proposed[block.source] += block.length
                self.totals.expected[block.source] += block.expected
                self.totals.accepted[block.source] += min(right, block.length)
                block.length = 0
            if right == len(came) < len(block.tokens):
                undecided.append(block)
                continue
            for predictor, cells in block.learners:
                predictor.observe(cells[: right + 1], right, request.id)
        self._blocks[request.id] = undecided

    def forget(self, request_ids: Iterable[str]) -> None:
        """These requests have ended."""
        for request in request_ids:
            self._blocks.pop(request, None)
            for predictor in (self.by_position, self.by_confidence, self.by_match):
                predictor.forget(request)

    def account(self, num_tokens: int, num_requests: int, context: float, seconds: float) -> None:
        """Counts a step that emitted ``num_tokens`` and took ``seconds``, its draft pass included."""
        plain = float(self.cost.step(num_requests, num_requests, context))
        self.totals.steps += 1
        self.totals.tokens += num_tokens
        # A step that took much longer was held up by something else.
        self.totals.seconds += min(seconds, _HELD_UP * plain)
        self.totals.plain_seconds += plain * num_tokens / num_requests


def _sizes(candidates: int, together: bool, batch: int) -> list[int]:
    """Numbers of requests to try drafting for."""
    if candidates == 0:
        return []
    if together:
        return [batch]
    quarters = {1, candidates, *(candidates * q // 4 for q in (1, 2, 3))}
    return (
        sorted(n for n in quarters if n > 0) if candidates > 4 else list(range(1, candidates + 1))
    )
