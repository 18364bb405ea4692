"""Draft lengths chosen a step ahead: runs of a model world, whose outcomes come late."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest

from vllm_dflash.draft_length.acceptance import Predictor, Promises
from vllm_dflash.draft_length.ahead import Ahead, Lengths, Slot
from vllm_dflash.draft_length.cost import StepCost
from vllm_dflash.draft_length.totals import DRAFTER

K = 7
ENDLESS = 10**9


@dataclass
class Step:
    """One step of the world."""

    ids: list[int]
    chosen: Lengths
    accepted: list[int]
    seconds: float
    even: bool
    passed: bool
    drafting: bool


class World:
    """A device whose steps cost what was calibrated, times ``slow``, and drafts of known quality.

    Args:
        acceptance: probability that a token of request ``i`` is accepted in step ``n`` if those before are.
        requests: at any time; a request that ends is followed by another one.
        per_token, draft: seconds of a token and of a draft pass, where a step of one token takes one.
        uneven: seconds that a step costs more where requests have different numbers of tokens.
        late: outcomes of so many steps are not known when the next one is scheduled.
        max_tokens: of a request.
        graphs: lengths that are no uneven batch beside 0 and all; ``known`` whether the policy is told.
    """

    def __init__(
        self,
        acceptance: Callable[[int, int], float],
        *,
        requests: int = 1,
        per_token: float = 0.01,
        draft: float = 0.2,
        slow: float = 1.0,
        uneven: float = 0.0,
        late: int = 1,
        max_tokens: int = ENDLESS,
        graphs: tuple[int, ...] = (),
        known: bool = True,
    ) -> None:
        self.acceptance, self.uneven, self.late = acceptance, uneven, late
        self.max_tokens = max_tokens
        self.rng = np.random.default_rng(0)
        seconds = np.array([1.0, 1.0 + 511 * per_token])
        even = graphs if known else ()
        self.policy = Ahead(StepCost([1, 512], seconds, draft=(draft, 0.0)), K, even)
        self.even = {0, K, *graphs}
        self.truth = StepCost([1, 512], slow * seconds, draft=(slow * draft, 0.0))
        self.ids = list(range(requests))
        self.written = dict.fromkeys(self.ids, 0)
        self.steps: list[Step] = []
        self._drafted: set[int] = set()
        self._flying: deque[Step] = deque()

    def run(self, count: int) -> World:
        for _ in range(count):
            step = self._schedule()
            self.steps.append(step)
            self._flying.append(step)
            while len(self._flying) > self.late:
                self._deliver(self._flying.popleft())
        return self

    def _slots(self, drafted: Callable[[int], int]) -> list[Slot]:
        left = {i: max(self.max_tokens - self.written[i] - 2, 0) for i in self.ids}
        return [Slot(str(i), 100, drafted(i), left[i]) for i in self.ids]

    def _schedule(self) -> Step:
        policy, B = self.policy, len(self.ids)
        drafted = self._drafted & set(self.ids)
        chosen = policy.lengths(self._slots(lambda i: K * (i in drafted)))
        assert all(n == 0 or i in drafted for i, n in zip(self.ids, chosen.lengths, strict=True))
        drafting = policy.draft(self._slots(lambda i: K))
        even = len(set(chosen.lengths)) == 1 and set(chosen.lengths) <= self.even
        accepted = [self._accepted(i, n) for i, n in zip(self.ids, chosen.lengths, strict=True)]
        passed = bool(self._drafted)
        seconds = float(self.truth.step(B + sum(chosen.lengths), B, 0)) + self.uneven * (not even)
        seconds += self.truth.draft(B) * passed
        step = Step(list(self.ids), chosen, accepted, seconds, even, passed, drafting)
        self._drafted = set(self.ids) if drafting else set()
        for i, n in zip(step.ids, accepted, strict=True):
            self.written[i] += n + 1
        return step

    def _accepted(self, request: int, length: int) -> int:
        right = self.rng.random(length) < self.acceptance(request, len(self.steps))
        return length if right.all() else int(np.argmin(right))

    def _deliver(self, step: Step) -> None:
        policy = self.policy
        rows = zip(step.ids, step.chosen.lengths, step.accepted, strict=True)
        seen = []
        for row, (i, length, accepted) in enumerate(rows):
            if i in self.ids:
                promised = float(step.chosen.promised_BK[row, :length].sum())
                policy.count(bool(length), length, accepted, promised)
                seen.append((str(i), length, accepted, promised))
        policy.observe(*(zip(*seen, strict=True) if seen else ([],) * 4))
        policy.observe_step(
            num_requests=len(step.ids),
            drafts=sum(step.chosen.lengths),
            context=0.0,
            emitted=len(step.ids) + sum(step.accepted),
            seconds=step.seconds,
            even=step.even,
            drafted=step.passed if step.passed == step.drafting else None,
        )
        for i in [i for i in self.ids if self.written[i] >= self.max_tokens]:
            policy.forget([str(i)])
            new = max(self.written) + 1
            self.ids[self.ids.index(i)] = new
            self.written[new] = 0

    # -- what came of it

    def speed(self, since: int = 0) -> float:
        """Over that of the same device without speculation."""
        steps = self.steps[since:]
        tokens = sum(len(s.ids) + sum(s.accepted) for s in steps)
        B = len(self.ids)
        plain = float(self.truth.step(B, B, 0)) / B
        return tokens * plain / sum(s.seconds for s in steps)

    def drafted(self, since: int = 0, until: int | None = None) -> float:
        """Share of steps that ended with a draft pass."""
        steps = self.steps[since:until]
        return sum(s.drafting for s in steps) / len(steps)

    def mean_length(self, which: Callable[[int], bool] = lambda i: True, since: int = 0) -> float:
        lengths = [
            n
            for s in self.steps[since:]
            for i, n in zip(s.ids, s.chosen.lengths, strict=True)
            if which(i)
        ]
        return sum(lengths) / len(lengths)


def fixed_speed(acceptance: float, requests: int, per_token: float, draft: float) -> float:
    """What always drafting and verifying all gives, over no speculation."""
    tokens = sum(acceptance**k for k in range(K + 1))
    step = 1 + (requests - 1) * per_token
    return tokens * step / (step + requests * K * per_token + draft)


@pytest.mark.parametrize("late", [0, 1])
@pytest.mark.parametrize("requests", [1, 16])
def test_it_drafts_where_that_pays(requests, late) -> None:
    world = World(lambda i, n: 0.9, requests=requests, late=late).run(600)
    assert world.drafted(100) > 0.97
    assert world.mean_length(since=100) > 6
    assert world.speed(100) > 0.97 * fixed_speed(0.9, requests, 0.01, 0.2)


@pytest.mark.parametrize("late", [0, 1])
@pytest.mark.parametrize("requests", [1, 16])
def test_it_stops_where_that_does_not_pay(requests, late) -> None:
    world = World(lambda i, n: 0.03, requests=requests, late=late).run(1500)
    assert 0 < world.drafted(300) < 0.05
    assert world.speed(300) > 0.985
    assert world.speed() > 0.95


@pytest.mark.parametrize(
    ("requests", "draft", "max_tokens"),
    [(1, 0.2, 100), (1, 1.0, 100), (1, 3.0, 100), (1, 1.0, ENDLESS), (8, 3.0, 100), (64, 1.0, 100)],
)
def test_looking_for_what_is_not_there_costs_next_to_nothing(requests, draft, max_tokens) -> None:
    """A drafter of which nothing is right, passes as long as several steps (a verifier bound by launches),
    and ever new requests that might be unlike those before: the start included less than a hundredth."""
    world = World(
        lambda i, n: 0.01, requests=requests, per_token=0.002, draft=draft, max_tokens=max_tokens
    ).run(2000 if requests < 64 else 1000)
    assert world.speed(300) > 0.994
    assert world.speed() > 0.99


def test_dear_tokens_make_short_drafts() -> None:
    """Where a token costs a fifth of a step, only the first ones of a fair draft pay."""
    world = World(lambda i, n: 0.75, requests=4, per_token=0.2, draft=0.02).run(800)
    assert 0.5 < world.mean_length(since=200) < 4
    assert world.speed(200) > max(1.0, fixed_speed(0.75, 4, 0.2, 0.02))


def test_each_request_by_what_it_shows() -> None:
    """Of a batch with good and bad requests, the bad ones' drafts are not verified."""
    world = World(lambda i, n: 0.95 if i % 2 else 0.05, requests=4, per_token=0.1, draft=0.1)
    world.run(600)
    assert world.mean_length(lambda i: i % 2 == 1, since=150) > 5
    assert world.mean_length(lambda i: i % 2 == 0, since=150) < 1


@pytest.mark.parametrize("requests", [1, 8])
def test_it_comes_back(requests) -> None:
    """Bad text, then good text: probes notice, and pay for the next ones."""
    world = World(lambda i, n: 0.9 if n >= 1000 else 0.03, requests=requests).run(2000)
    assert world.drafted(500, 1000) < 0.05
    back = next(n for n in range(1000, 2000) if all(s.drafting for s in world.steps[n : n + 20]))
    assert back < 1400
    assert world.drafted(back) > 0.95
    assert world.speed(back + 50) > 0.95 * fixed_speed(0.9, requests, 0.01, 0.2)


def test_new_requests_are_tried() -> None:
    """Good and bad requests in turn: what the last one was like does not decide for the next."""
    world = World(lambda i, n: 0.95 if i % 2 else 0.03, max_tokens=120).run(3000)
    assert world.mean_length(lambda i: i % 2 == 1) > 5
    assert world.mean_length(lambda i: i % 2 == 0) < 1.5
    assert world.speed() > 1.2


def test_wrong_costs_are_mended() -> None:
    """Calibrated for a device on which tokens are free, run on one where they are not."""
    world = World(lambda i, n: 0.5, requests=8, per_token=0.0, draft=0.0)
    world.truth = StepCost([1, 512], [1.0, 1.0 + 511 * 0.25], draft=(0.3, 0.0))
    world.run(1500)
    assert world.speed(700) > 0.95


def test_uneven_batches_are_avoided_where_they_cost_more() -> None:
    """Where full CUDA graphs are for equal lengths, it is all or none, whichever is better."""
    kwargs = {"requests": 4, "per_token": 0.05, "draft": 0.1}
    some = World(lambda i, n: 0.95 if i % 2 else 0.6, **kwargs).run(800)
    none = World(lambda i, n: 0.95 if i % 2 else 0.6, uneven=0.8, **kwargs).run(800)
    uneven = lambda world: np.mean([not s.even for s in world.steps[300:]])  # noqa: E731
    assert uneven(some) > 0.5
    assert uneven(none) < 0.2
    assert none.policy.uneven > 0.2


def test_lengths_are_rounded_to_those_with_graphs() -> None:
    """Fair drafts of which the first tokens pay, in batches that cost more where requests differ."""
    kwargs = {"requests": 8, "per_token": 0.06, "draft": 0.02, "uneven": 0.4, "graphs": (1, 3)}
    quality = lambda i, n: (0.7, 0.75, 0.8)[i % 3]  # noqa: E731
    rounded = World(quality, **kwargs).run(800)
    free = World(quality, known=False, **kwargs).run(800)
    lengths = {s.chosen.lengths for s in rounded.steps[300:]}
    assert (3,) * 8 in lengths or (1,) * 8 in lengths
    assert np.mean([s.even for s in rounded.steps[300:]]) > 0.9
    assert rounded.speed(300) > 1.05 * max(free.speed(300), 1.0)
    # Where requests differ more than the graphs are worth, each has its own.
    kwargs |= {"uneven": 0.05}
    apart = World(lambda i, n: 0.95 if i % 2 else 0.05, **kwargs).run(600)
    assert apart.mean_length(lambda i: i % 2 == 1, since=150) > 4
    assert apart.mean_length(lambda i: i % 2 == 0, since=150) < 1


def test_no_draft_is_longer_than_the_request() -> None:
    world = World(lambda i, n: 1.0, max_tokens=20, late=0).run(300)
    assert world.policy.totals.accepted[DRAFTER] > 0
    for step in world.steps:
        assert max(step.chosen.lengths) <= K
    assert all(n <= world.max_tokens + 1 for n in world.written.values())


def test_totals() -> None:
    world = World(lambda i, n: 0.8, requests=2, late=0).run(200)
    totals = world.policy.totals
    assert totals.steps == 200
    assert totals.tokens == sum(2 + sum(s.accepted) for s in world.steps)
    assert totals.proposed[DRAFTER] == sum(sum(s.chosen.lengths) for s in world.steps)
    assert totals.accepted[DRAFTER] == sum(sum(s.accepted) for s in world.steps)
    assert totals.expected[DRAFTER] == pytest.approx(totals.accepted[DRAFTER], rel=0.15)
    assert sum(totals.lengths) == 400
    assert totals.speedup == pytest.approx(world.speed(), rel=0.02)


def test_nothing_to_choose() -> None:
    policy = World(lambda i, n: 0.9).policy
    assert policy.lengths([]).lengths == ()
    assert not policy.draft([])
    assert not policy.draft([Slot("a", 10, K, 0)])
    assert policy.lengths([Slot("a", 10, 0, 50)]).lengths == (0,)


def test_a_batch_teaches_what_its_requests_teach_one_by_one() -> None:
    """The same outcomes, learned from as arrays and one after the other: the same averages and curves."""
    rng = np.random.default_rng(0)
    together, apart = Predictor([0.7] * K), Predictor([0.7] * K)
    ids = [str(i) for i in range(64)]
    quality = rng.choice([0.2, 0.6, 0.9], size=64)
    for step in range(30):
        lengths = rng.integers(1, K + 1, 64)
        right = rng.random((64, K)) < quality[:, None]
        accepted = np.minimum(np.where(right.all(axis=1), K, right.argmin(axis=1)), lengths)
        tried = np.minimum(accepted + 1, lengths)
        together.observe_batch(tried, accepted, ids)
        for n, right_n, request in zip(tried.tolist(), accepted.tolist(), ids, strict=True):
            apart.observe(np.arange(n), right_n, request)
        for predictor in (together, apart):
            predictor.forget(ids[step])
    assert together.trials == apart.trials
    curves = [p.curves(np.arange(K), ids) for p in (together, apart)]
    assert curves[0] == pytest.approx(curves[1], abs=0.02)
    assert together.likely_offsets() == pytest.approx(apart.likely_offsets(), abs=0.2)


def test_hundreds_of_requests_are_told_apart() -> None:
    """Learned from by turns: the good ones' drafts are verified, the bad ones' are not."""
    world = World(
        lambda i, n: 0.95 if i % 2 else 0.05, requests=256, per_token=0.002, draft=0.1
    ).run(60)
    assert world.mean_length(lambda i: i % 2 == 1, since=20) > 4
    assert world.mean_length(lambda i: i % 2 == 0, since=20) < 0.3


def test_promises_in_one_go_are_those_one_by_one() -> None:
    rng = np.random.default_rng(0)
    promised, kept = rng.random(300) * 5, rng.integers(0, 4, 300)
    batch, single = Promises(), Promises()
    batch.add(promised, kept)
    for p, k in zip(promised.tolist(), kept.tolist(), strict=True):
        single.add(p, k)
    assert batch.share == pytest.approx(single.share, rel=1e-9)


def test_hundreds_of_requests_take_little_time() -> None:
    """Of the engine core's thread: decisions and learning at 256 requests; benchmarks/policy_cost.py has the
    figures, one by one learning alone takes three times the bound."""
    world = World(lambda i, n: 0.8, requests=256, per_token=0.001, draft=0.1).run(10)
    policy, step = world.policy, world.steps[-1]
    promised = [
        float(p[:n].sum())
        for p, n in zip(step.chosen.promised_BK, step.chosen.lengths, strict=True)
    ]
    outcomes = [str(i) for i in step.ids], step.chosen.lengths, step.accepted, promised
    slots, spent = world._slots(lambda i: K), []
    for _ in range(20):
        began = time.thread_time()
        policy.lengths(slots)
        policy.draft(slots)
        policy.observe(*outcomes)
        spent.append(time.thread_time() - began)
    one_by_one = []
    for _ in range(5):
        began = time.thread_time()
        for request, n, accepted in zip(*outcomes[:3], strict=True):
            policy.by_position.observe(np.arange(min(accepted + 1, n)), accepted, request)
        one_by_one.append(time.thread_time() - began)
    assert min(spent) < 0.7 * min(one_by_one)
