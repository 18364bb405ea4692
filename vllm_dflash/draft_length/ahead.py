"""Draft lengths where the scheduler decides: a draft pass is for the whole batch, drafts stay on the device.

Two decisions a step, both from what earlier steps have shown: whether the step ends with a draft pass
(:meth:`Ahead.draft`), and how many of the tokens that the last pass drafted go to the verifier with each
request (:meth:`Ahead.lengths`). With asynchronous scheduling the outcome of the step before is not known yet.

Only what was verified teaches (:meth:`Ahead.observe`); :class:`Policy` can also compare drafts that were not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from vllm_dflash.draft_length.choice import Choice, choose
from vllm_dflash.draft_length.cost import StepCost
from vllm_dflash.draft_length.policy import (
    HOPELESS,
    HORIZON,
    LEAST_PROBE_SHARE,
    MARGIN,
    PROBE_DECAY,
    PROBE_SHARE,
    REST,
    Policy,
)
from vllm_dflash.draft_length.totals import DRAFTER

#: Probes of new requests that can be made before any has brought something.
_PROBES_OWED = 2
#: Probes that can be made in a row on what earlier ones, and drafts that paid, have brought.
_PROBES_KEPT = 6
#: So many drafts are learned from one by one: arrays are slow for so few.
_FEW = 2
#: Drafts of a step that are learned from; of more each has its turn in one of two steps, of three, ...
_TAUGHT = 64
#: Weight of a new observation in what uneven batches cost more.
_UNEVEN_RATE = 0.1
#: What is left of it after a step without one, so that it is looked at again.
_UNEVEN_KEPT = 0.999


class Slot(NamedTuple):
    """One request of a step; there may be hundreds, so a plain tuple.

    Attributes:
        id: vLLM's.
        context: tokens that it has in the cache.
        drafted: draft tokens that there are for it.
        most: how many can be of use at most: the request may be near its end.
    """

    id: str
    context: int
    drafted: int
    most: int


@dataclass(frozen=True)
class Lengths:
    """Draft tokens to verify.

    Attributes:
        lengths: of each request.
        promised_BK: probabilities that its first 1, 2, ... are all accepted, ``[B, K]``, before what promises
            are worth is taken into account.
    """

    lengths: tuple[int, ...]
    promised_BK: np.ndarray


class Ahead(Policy):
    """Chooses, a step ahead, whether to draft and how much of the drafts to verify.

    Args:
        cost: of steps and draft passes.
        num_tokens: K, the tokens of a draft.
        even_lengths: draft tokens that there are full CUDA graphs for where all requests have as many, beside
            0 and all.
    """

    def __init__(self, cost: StepCost, num_tokens: int, even_lengths: Sequence[int] = ()) -> None:
        super().__init__(cost, num_tokens, together=True)
        self.even_lengths = tuple(even_lengths)
        #: Seconds that a step costs more where requests have different numbers of tokens: vLLM's full CUDA
        #: graphs are for equal ones.
        self.uneven = 0.0
        self._num_uneven = 0
        self._tried: set[str] = set()
        self._probing: set[str] = set()

    # -- decisions

    def draft(self, slots: Sequence[Slot]) -> bool:
        """Whether to end the step with a draft pass.

        Args:
            slots: the requests that go on after it, with what a draft could be of use for.
        """
        B = len(slots)
        if not any(min(s.most, s.drafted) > 0 for s in slots):
            return False
        context = float(sum(s.context for s in slots))
        self._credit += self._probe_share * self.cost.verify_one(B, context, 0)
        ids = {s.id for s in slots}
        if self._rests(ids):
            return False
        drafting = self._pays(slots)
        if not drafting:
            self._verdict, self._rest = (ids, self._trials()), REST
        return drafting

    def _pays(self, slots: Sequence[Slot]) -> bool:
        """Whether a draft pass pays, or is made to see whether it does."""
        B = len(slots)
        caps_B, promised_BK, seconds_M = self._batch(slots)
        curves_BK = promised_BK * self.promises[DRAFTER].share
        passed = self.pass_seconds(B)
        plain = B / seconds_M[0]
        verified = np.minimum(self._probe_length(B), caps_B)
        M = int(verified.sum())
        probe = passed + float(seconds_M[M] - seconds_M[0])
        self._credit = min(self._credit, _PROBES_KEPT * probe)
        if self._choose(slots, curves_BK, seconds_M + passed).rate > MARGIN * plain:
            self._probe_share = PROBE_SHARE
            self._tried.update(s.id for s in slots)
            return True
        if probe <= self._credit:
            self._pay(probe)
            self._try(slots)
            return True
        new = [i for i, s in enumerate(slots) if s.id not in self._tried and caps_B[i]]
        # On credit, but not for ever: each request may promise to be unlike all those before it.
        if new and self._credit > -_PROBES_OWED * probe:
            args = (caps_B, curves_BK, plain, passed, seconds_M, M)
            if self._worth_trying(slots, new, *args):
                self._pay(probe)
                self._try([slots[i] for i in new])
                return True
        return False

    def _pay(self, probe: float) -> None:
        """For a draft made to see what it brings; :meth:`observe_step` pays that back."""
        self._credit -= probe
        self._probe_share = max(PROBE_DECAY * self._probe_share, LEAST_PROBE_SHARE)

    def lengths(self, slots: Sequence[Slot]) -> Lengths:
        """How many of their draft tokens go to the verifier.

        Args:
            slots: the requests of the step.
        """
        B = len(slots)
        if not any(s.drafted for s in slots):
            return Lengths((0,) * B, np.zeros((B, self.num_tokens)))
        caps_B, promised_BK, seconds_M = self._batch(slots)
        curves_BK = promised_BK * self.promises[DRAFTER].share
        passed = self.pass_seconds(B)
        choice = self._choose(slots, curves_BK, seconds_M + passed)
        lengths = choice.lengths
        if choice.rate <= MARGIN * B / float(seconds_M[0] + passed):
            lengths = (0,) * B
        if self._probing:
            tried_B = np.array([s.id in self._probing for s in slots])
            probed_B = np.minimum(self._probe_length(B), caps_B)
            lengths = tuple(np.where(tried_B, np.maximum(lengths, probed_B), lengths).tolist())
            self._probing.difference_update(s.id for s in slots)
        return Lengths(tuple(map(min, lengths, [s.drafted for s in slots])), promised_BK)

    def _choose(
        self, slots: Sequence[Slot], curves_BK: np.ndarray, seconds_M: np.ndarray
    ) -> Choice:
        """The best lengths, or as many for all requests where that comes close."""
        B, best = len(slots), choose(curves_BK, seconds_M)
        most = min(s.drafted for s in slots)
        for length in self.even_lengths:
            if length >= most:  # all of them are a choice as it is
                break
            tokens = B + float(curves_BK[:, :length].sum())
            seconds = float(seconds_M[B * length]) - self.uneven
            if MARGIN * tokens / seconds > best.rate:
                best = Choice((length,) * B, tokens, seconds)
        return best

    def _batch(self, slots: Sequence[Slot]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Most tokens of use ``[B]``, probabilities ``[B, K]``, seconds of 0, 1, ... draft tokens in all."""
        B, K = len(slots), self.num_tokens
        ids, contexts, drafted, most = zip(*slots, strict=True)
        caps_B = np.minimum(drafted, most)
        curves_BK = self.by_position.curves(np.arange(K), ids)
        curves_BK = curves_BK * (np.arange(K) < caps_B[:, None])
        seconds_M = self.cost.verify(B, float(sum(contexts)), B * K)
        seconds_M[1:] += self.uneven
        if len(set(drafted)) == 1 and (M := sum(drafted)):
            seconds_M[M] -= self.uneven
        return caps_B, curves_BK, seconds_M

    def _probe_length(self, num_requests: int) -> int:
        """Tokens that a request's draft is tried with: the more requests, the fewer of each say enough."""
        return min(self.num_tokens, 1 + self.num_tokens // num_requests)

    def _try(self, slots: Sequence[Slot]) -> None:
        self._tried.update(s.id for s in slots)
        self._probing.update(s.id for s in slots)

    def _worth_trying(
        self,
        slots: Sequence[Slot],
        new: Sequence[int],
        caps_B: np.ndarray,
        curves_BK: np.ndarray,
        plain: float,
        passed: float,
        seconds_M: np.ndarray,
        M: int,
    ) -> bool:
        """Whether a draft for requests of which nothing is known is worth what it may lead to."""
        K = self.num_tokens
        price = plain * float(seconds_M[M] - seconds_M[0]) / M
        draft = plain * passed
        # [kinds of requests, K]: what each kind would gain a step.
        chances = np.maximum(self.by_position.likely_curves(np.arange(K)) - price, 0)
        known = np.delete(curves_BK, new, axis=0)
        gains = np.maximum(known - price, 0).sum() - draft
        gains = gains + sum(chances[:, : caps_B[i]].sum(axis=1) for i in new)
        steps = min(HORIZON, max(slots[i].most for i in new))
        return bool(np.maximum(gains, 0).mean() * steps > draft + price * M)

    # -- what happened

    def count(self, drafts: int, tokens: int, accepted: int, promised: float) -> None:
        """Counts drafts that were verified: their tokens, those accepted, and how many were to be by
        :attr:`Lengths.promised_BK`."""
        self.totals.drafts[DRAFTER] += drafts
        self.totals.proposed[DRAFTER] += tokens
        self.totals.accepted[DRAFTER] += accepted
        self.totals.expected[DRAFTER] += promised * self.promises[DRAFTER].share

    def observe(
        self,
        requests: Sequence[str],
        lengths: Sequence[int],
        accepted: Sequence[int],
        promised: Sequence[float],
    ) -> None:
        """Learns from the requests of a step, once it is done.

        Args:
            lengths: draft tokens of each that were verified.
            accepted: of them.
            promised: how many were to be, by :attr:`Lengths.promised_BK`.
        """
        for length, times in Counter(lengths).items():
            self.totals.lengths[length] += times
        drafted = np.flatnonzero(lengths)
        if not len(drafted):
            return
        accepted_B = np.asarray(accepted)[drafted]
        tried_B = np.minimum(accepted_B + 1, np.asarray(lengths)[drafted])
        self.promises[DRAFTER].add(np.asarray(promised)[drafted], accepted_B)
        self.totals.compare_batch(tried_B, accepted_B)
        turns = -(-len(drafted) // _TAUGHT)
        turn = slice(self.totals.steps % turns, None, turns)
        drafted, tried_B, accepted_B = drafted[turn], tried_B[turn], accepted_B[turn]
        ids = [requests[i] for i in drafted.tolist()]
        if len(ids) <= _FEW:
            for request, tried, right in zip(
                ids, tried_B.tolist(), accepted_B.tolist(), strict=True
            ):
                self.by_position.observe(np.arange(tried), right, request)
        else:
            self.by_position.observe_batch(tried_B, accepted_B, ids)

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
        self.totals.add(emitted, B, context, seconds, drafts, passed)
        # What the tokens brought counts against what their probing cost.
        brought = max(emitted - B, 0) / B * self.cost.verify_one(B, context, 0)
        self._credit += brought
        if brought > HOPELESS * self.pass_seconds(B):
            self._probe_share = PROBE_SHARE
        if drafted is None:
            return
        step = float(self.cost.verify(B, context, drafts)[-1])
        uneven = 0.0
        if not even:
            self._num_uneven += 1
            rate = max(_UNEVEN_RATE, 1 / (self._num_uneven + 2))
            extra = float(np.clip(seconds - step - passed, 0.0, step))
            uneven = self.uneven = self.uneven + rate * (extra - self.uneven)
        ratio = seconds / (step + uneven + passed)
        self.cost.observe_step(B + drafts, B, context, ratio * step, drafts)
        if drafted:
            self.cost.observe_draft(B * (self.num_tokens + 1), ratio * passed)

    def forget(self, request_ids: Iterable[str]) -> None:
        request_ids = list(request_ids)
        super().forget(request_ids)
        self._tried.difference_update(request_ids)
        self._probing.difference_update(request_ids)
