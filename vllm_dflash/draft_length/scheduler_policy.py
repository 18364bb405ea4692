"""Draft lengths where the scheduler decides: a draft pass is for the whole batch, drafts stay on the device.

Two decisions a step, both from what earlier steps have shown: whether the step ends with a draft pass
(:meth:`SchedulerPolicy.should_draft`), and how many of the tokens drafted by the last pass are verified with
each request (:meth:`SchedulerPolicy.verify_lengths`). With asynchronous scheduling the outcome of the step
before is not known yet. Learns from verified drafts only: drafted token ids do not get here.

Shapes: B requests, K draft tokens of a request, M = 0..B * K draft tokens of the batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm_dflash.draft_length.acceptance import AcceptanceModel
from vllm_dflash.draft_length.allocate import DraftBudget, assign_draft_budget
from vllm_dflash.draft_length.cost import StepCost
from vllm_dflash.draft_length.counters import DRAFTER, Counters
from vllm_dflash.draft_length.explore import HORIZON, MARGIN, Exploration

#: Drafts of a step that are learned from; of more each has its turn in one of two steps, of three, ...
_TAUGHT = 64
#: Requests that are learned from one by one, which is faster than arrays for so few.
_FEW = 2
#: Weight of a new observation in what uneven batches cost more.
_UNEVEN_RATE = 0.1
#: What is left of it after a step without one, so that it is looked at again.
_UNEVEN_KEPT = 0.999


@dataclass(frozen=True)
class Batch:
    """The requests of a step.

    Attributes:
        ids: vLLM's, ``[B]``.
        context: tokens that all of them have in the cache.
        drafted: draft tokens that there are for each, or will be, ``[B]``.
        most: how many can be of use to each at most, which may be near its end, ``[B]``.
    """

    ids: Sequence[str]
    context: float
    drafted: Sequence[int]
    most: Sequence[int]


@dataclass(frozen=True)
class VerifyLengths:
    """Draft tokens to verify.

    Attributes:
        lengths: of each request.
        predicted_BK: probabilities that its first 1, 2, ... are all accepted.
    """

    lengths: tuple[int, ...]
    predicted_BK: np.ndarray


@dataclass(frozen=True)
class _Value:
    """What drafts of a batch are worth and cost.

    Attributes:
        caps_B: most draft tokens of use.
        survival_BK: :attr:`VerifyLengths.predicted_BK`.
        seconds_M: of the step with so many draft tokens; ``passed`` of a draft pass.
        best: the lengths to choose.
    """

    caps_B: np.ndarray
    survival_BK: np.ndarray
    seconds_M: np.ndarray
    passed: float
    best: DraftBudget


class SchedulerPolicy:
    """Chooses, a step ahead, whether to draft and how much of the drafts to verify.

    Args:
        cost: of steps and draft passes.
        num_tokens: K, the tokens of a draft.
        even_lengths: draft tokens that there are full CUDA graphs for where all requests have as many, beside
            0 and all.
    """

    def __init__(self, cost: StepCost, num_tokens: int, even_lengths: Sequence[int] = ()) -> None:
        self.cost, self.num_tokens, self.even_lengths = cost, num_tokens, tuple(even_lengths)
        self.by_position = AcceptanceModel([0.7] * num_tokens)
        self.counters = Counters(cost, num_tokens)
        self.exploration = Exploration()
        #: Seconds that a step costs more where requests have different numbers of tokens: vLLM's full CUDA
        #: graphs are for equal ones.
        self.uneven = 0.0
        self._num_uneven = 0
        self._tried: set[str] = set()
        self._probing: set[str] = set()
        #: What :meth:`_value` was asked last, and its answer.
        self._asked: tuple[Any, ...] = ()
        self._answer: _Value | None = None

    # -- decisions

    def should_draft(self, batch: Batch) -> bool:
        """Whether to end the step with a draft pass.

        Args:
            batch: the requests that go on after it, with what a draft could be of use for.
        """
        if not any(map(min, batch.most, batch.drafted)):
            return False
        B, explore, trials = len(batch.ids), self.exploration, self.by_position.trials
        explore.earn(self.cost.verify_one(B, batch.context, 0))
        ids = set(batch.ids)
        if explore.stands(ids, trials, self.pass_seconds(B)):
            return False
        drafting = self._pays(batch)
        if not drafting:
            explore.decided_against(ids, trials)
        return drafting

    def _pays(self, batch: Batch) -> bool:
        """Whether a draft pass pays, or is made to see whether it does."""
        B, value, explore = len(batch.ids), self._value(batch), self.exploration
        plain = B / value.seconds_M[0]
        M = int(np.minimum(self._probe_length(B), value.caps_B).sum())
        probe = value.passed + float(value.seconds_M[M] - value.seconds_M[0])
        explore.budget = min(explore.budget, 2 * probe)
        if value.best.rate > MARGIN * plain:
            explore.returned(value.passed, value.passed)
            self._tried.update(batch.ids)
            return True
        new = [i for i, name in enumerate(batch.ids) if name not in self._tried and value.caps_B[i]]
        if probe <= explore.budget:
            probed = batch.ids
        # On credit, but not for ever: each request may promise to be unlike all those before it.
        elif new and explore.budget > -probe and self._worth_trying(batch, new, value, plain, M):
            probed = [batch.ids[i] for i in new]
        else:
            return False
        explore.spend(probe)  # observe_step() pays it back
        self._tried.update(probed)
        self._probing.update(probed)
        return True

    def verify_lengths(self, batch: Batch) -> VerifyLengths:
        """How many of their draft tokens go to the verifier."""
        B = len(batch.ids)
        if not any(batch.drafted):
            return VerifyLengths((0,) * B, np.zeros((B, self.num_tokens)))
        value = self._value(batch)
        lengths = value.best.lengths
        if value.best.rate <= MARGIN * B / float(value.seconds_M[0] + value.passed):
            lengths = (0,) * B
        if self._probing:
            tried_B = np.array([name in self._probing for name in batch.ids])
            probed_B = np.minimum(self._probe_length(B), value.caps_B)
            lengths = tuple(np.where(tried_B, np.maximum(lengths, probed_B), lengths).tolist())
            self._probing.difference_update(batch.ids)
        return VerifyLengths(lengths, value.survival_BK)

    def _value(self, batch: Batch) -> _Value:
        B, K = len(batch.ids), self.num_tokens
        caps = batch.drafted
        if min(batch.most) < max(caps):
            caps = list(map(min, caps, batch.most))
        # A step's two decisions are mostly about the same requests with whole drafts each; the few tokens of
        # context between them change nothing.
        asked = (self.by_position.trials, self.cost.steps, caps, batch.drafted, batch.ids)
        if self._answer is not None and asked == self._asked:
            return self._answer
        caps_B = np.array(caps)
        survival_BK = self.by_position.survival(np.arange(K), batch.ids)
        if caps_B.min() < K:
            survival_BK = survival_BK * (np.arange(K) < caps_B[:, None])
        seconds_M = self.cost.verify(B, batch.context, B * K)
        seconds_M[1:] += self.uneven
        if len(set(batch.drafted)) == 1 and (M := sum(batch.drafted)):
            seconds_M[M] -= self.uneven
        passed = self.pass_seconds(B)
        best = self._choose(batch, survival_BK, seconds_M + passed)
        self._asked = asked
        self._answer = _Value(caps_B, survival_BK, seconds_M, passed, best)
        return self._answer

    def _choose(self, batch: Batch, survival_BK: np.ndarray, seconds_M: np.ndarray) -> DraftBudget:
        """The best lengths, or as many for all requests where that comes close."""
        B = len(batch.ids)
        best = assign_draft_budget(survival_BK, seconds_M)
        most = min(batch.drafted)
        for length in self.even_lengths:
            if length >= most:  # all of them are a choice as it is
                break
            tokens = B + float(survival_BK[:, :length].sum())
            seconds = float(seconds_M[B * length]) - self.uneven
            if MARGIN * tokens / seconds > best.rate:
                best = DraftBudget((length,) * B, tokens, seconds)
        return best

    def pass_seconds(self, num_requests: int) -> float:
        """Seconds of a draft pass for so many requests."""
        return self.cost.draft(num_requests * (self.num_tokens + 1))

    def _probe_length(self, num_requests: int) -> int:
        """Tokens that a request's draft is tried with: the more requests, the fewer of each say enough."""
        return min(self.num_tokens, 1 + self.num_tokens // num_requests)

    def _worth_trying(
        self, batch: Batch, new: Sequence[int], value: _Value, plain: float, M: int
    ) -> bool:
        """Whether a draft for requests of which nothing is known is worth what it may lead to.

        Args:
            new: their indices.
            plain: tokens per second without drafts.
            M: draft tokens of all requests that would be verified.
        """
        price = plain * float(value.seconds_M[M] - value.seconds_M[0]) / M
        draft = plain * value.passed
        # [kinds of requests, K]: what each kind would gain a step.
        likely = self.by_position.likely_survival(np.arange(self.num_tokens))
        chances = np.maximum(likely - price, 0)
        known = np.delete(value.survival_BK, new, axis=0)
        gains = np.maximum(known - price, 0).sum() - draft
        gains = gains + sum(chances[:, : value.caps_B[i]].sum(axis=1) for i in new)
        steps = min(HORIZON, max(batch.most[i] for i in new))
        return bool(np.maximum(gains, 0).mean() * steps > draft + price * M)

    # -- what happened

    def count(self, drafts: int, tokens: int, accepted: int) -> None:
        """Counts drafts that were verified, as vLLM does: their tokens, and those accepted."""
        self.counters.verified(DRAFTER, drafts, tokens, accepted)

    def observe(
        self,
        requests: Sequence[str],
        lengths: Sequence[int] | np.ndarray,
        accepted: Sequence[int] | np.ndarray,
        predicted: np.ndarray,
    ) -> None:
        """Learns from the requests of a step, once it is done.

        Args:
            lengths: draft tokens of each that were verified.
            accepted: of them.
            predicted: how many were to be, by :attr:`VerifyLengths.predicted_BK`, ``[B]``.
        """
        lengths_B = np.asarray(lengths, dtype=int)
        self.counters.chose(lengths_B)
        drafted = np.flatnonzero(lengths_B)
        if not len(drafted):
            return
        accepted_B = np.asarray(accepted)[drafted]
        tried_B = np.minimum(accepted_B + 1, lengths_B[drafted])
        predicted_B = np.asarray(predicted)[drafted]
        self.counters.expected[DRAFTER] += float(predicted_B.sum())
        self.counters.compare_batch(tried_B, accepted_B)
        turns = -(-len(drafted) // _TAUGHT)
        turn = slice(self.counters.steps % turns, None, turns)
        ids = [requests[i] for i in drafted[turn].tolist()]
        tried_B, accepted_B = tried_B[turn], accepted_B[turn]
        if len(ids) > _FEW:
            self.by_position.observe_batch(tried_B, accepted_B, ids)
            return
        for name, tried, right in zip(ids, tried_B.tolist(), accepted_B.tolist(), strict=True):
            self.by_position.observe(np.arange(tried), right, name)

    def observe_step(
        self,
        *,
        num_requests: int,
        drafts: int,
        context: float,
        emitted: int,
        seconds: float,
        even: bool,
        drafted: bool | None,
    ) -> None:
        """Learns from a step without prompt chunks.

        Args:
            num_requests: requests of the step; drafts, emitted: draft tokens verified and tokens put out.
            context: tokens that they had in the cache.
            seconds: between the outputs of the step before and its own.
            even: whether all requests had none or all of their draft tokens verified.
            drafted: whether a draft pass is part of ``seconds``; None where that is not sure.
        """
        B = num_requests
        self.uneven *= _UNEVEN_KEPT
        passed = self.pass_seconds(B) if drafted else 0.0
        self.counters.add(emitted, B, context, seconds, drafts, passed)
        # What the tokens brought counts against what their probing cost.
        brought = max(emitted - B, 0) / B * self.cost.verify_one(B, context, 0)
        self.exploration.budget += brought
        self.exploration.returned(brought, self.pass_seconds(B))
        if drafted is None:
            return
        step = self.cost.verify_one(B, context, drafts)
        uneven = 0.0
        if not even:
            self._num_uneven += 1
            rate = max(_UNEVEN_RATE, 1 / (self._num_uneven + 2))
            extra = min(max(seconds - step - passed, 0.0), step)
            uneven = self.uneven = self.uneven + rate * (extra - self.uneven)
        ratio = seconds / (step + uneven + passed)
        self.cost.observe_step(B + drafts, B, context, ratio * step, drafts)
        if drafted:
            self.cost.observe_draft(B * (self.num_tokens + 1), ratio * passed)

    def forget(self, request_ids: Iterable[str]) -> None:
        """These requests have ended."""
        self._answer = None
        for request in request_ids:
            self.by_position.forget(request)
            self._tried.discard(request)
            self._probing.discard(request)
