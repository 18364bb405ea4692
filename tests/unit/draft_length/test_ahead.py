"""Draft lengths chosen a step ahead: runs of a model world, whose outcomes come late."""

from __future__ import annotations

import time

import numpy as np
import pytest

from helpers.worlds import ENDLESS, K, SchedulerWorld, fixed_speed
from vllm_dflash.draft_length import scheduler_policy
from vllm_dflash.draft_length.acceptance import AcceptanceModel
from vllm_dflash.draft_length.cost import StepCost
from vllm_dflash.draft_length.counters import DRAFTER
from vllm_dflash.draft_length.scheduler_policy import Batch


@pytest.mark.parametrize("late", [0, 1])
@pytest.mark.parametrize("requests", [1, 16])
def test_it_drafts_where_that_pays(requests, late) -> None:
    world = SchedulerWorld(lambda i, n: 0.9, requests=requests, late=late).run(600)
    assert world.drafted(100) > 0.97
    assert world.mean_length(since=100) > 6
    assert world.speed(100) > 0.97 * fixed_speed(0.9, requests, 0.01, 0.2)


@pytest.mark.parametrize("late", [0, 1])
@pytest.mark.parametrize("requests", [1, 16])
def test_it_stops_where_that_does_not_pay(requests, late) -> None:
    world = SchedulerWorld(lambda i, n: 0.03, requests=requests, late=late).run(1500)
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
    world = SchedulerWorld(
        lambda i, n: 0.01, requests=requests, per_token=0.002, draft=draft, max_tokens=max_tokens
    ).run(2000 if requests < 64 else 1000)
    assert world.speed(300) > 0.994
    assert world.speed() > 0.99


def test_dear_tokens_make_short_drafts() -> None:
    """Where a token costs a fifth of a step, only the first ones of a fair draft pay."""
    world = SchedulerWorld(lambda i, n: 0.75, requests=4, per_token=0.2, draft=0.02).run(800)
    assert 0.5 < world.mean_length(since=200) < 4
    assert world.speed(200) > max(1.0, fixed_speed(0.75, 4, 0.2, 0.02))


def test_each_request_by_what_it_shows() -> None:
    """Of a batch with good and bad requests, the bad ones' drafts are not verified."""
    world = SchedulerWorld(
        lambda i, n: 0.95 if i % 2 else 0.05, requests=4, per_token=0.1, draft=0.1
    )
    world.run(600)
    assert world.mean_length(lambda i: i % 2 == 1, since=150) > 5
    assert world.mean_length(lambda i: i % 2 == 0, since=150) < 1


@pytest.mark.parametrize("requests", [1, pytest.param(8, marks=pytest.mark.thorough)])
def test_it_comes_back(requests) -> None:
    """Bad text, then good text: probes notice, and pay for the next ones."""
    world = SchedulerWorld(lambda i, n: 0.9 if n >= 1000 else 0.03, requests=requests).run(2000)
    assert world.drafted(500, 1000) < 0.05
    back = next(n for n in range(1000, 2000) if all(s.drafting for s in world.steps[n : n + 20]))
    assert back < 1400
    assert world.drafted(back) > 0.95
    assert world.speed(back + 50) > 0.95 * fixed_speed(0.9, requests, 0.01, 0.2)


def test_new_requests_are_tried() -> None:
    """Good and bad requests in turn: what the last one was like does not decide for the next."""
    world = SchedulerWorld(lambda i, n: 0.95 if i % 2 else 0.03, max_tokens=120).run(3000)
    assert world.mean_length(lambda i: i % 2 == 1) > 5
    assert world.mean_length(lambda i: i % 2 == 0) < 1.5
    assert world.speed() > 1.2


def test_wrong_costs_are_mended() -> None:
    """Calibrated for a device on which tokens are free, run on one where they are not."""
    world = SchedulerWorld(lambda i, n: 0.5, requests=8, per_token=0.0, draft=0.0)
    world.truth = StepCost([1, 512], [1.0, 1.0 + 511 * 0.25], draft=(0.3, 0.0))
    world.run(1500)
    assert world.speed(700) > 0.95


def test_uneven_batches_are_avoided_where_they_cost_more() -> None:
    """Where full CUDA graphs are for equal lengths, it is all or none, whichever is better."""
    kwargs = {"requests": 4, "per_token": 0.05, "draft": 0.1}
    some = SchedulerWorld(lambda i, n: 0.95 if i % 2 else 0.6, **kwargs).run(800)
    none = SchedulerWorld(lambda i, n: 0.95 if i % 2 else 0.6, uneven=0.8, **kwargs).run(800)
    uneven = lambda world: np.mean([not s.even for s in world.steps[300:]])  # noqa: E731
    assert uneven(some) > 0.5
    assert uneven(none) < 0.2
    assert none.policy.uneven > 0.2


def test_lengths_are_rounded_to_those_with_graphs() -> None:
    """Fair drafts of which the first tokens pay, in batches that cost more where requests differ."""
    kwargs = {"requests": 8, "per_token": 0.06, "draft": 0.02, "uneven": 0.4, "graphs": (1, 3)}
    quality = lambda i, n: (0.7, 0.75, 0.8)[i % 3]  # noqa: E731
    rounded = SchedulerWorld(quality, **kwargs).run(800)
    free = SchedulerWorld(quality, known=False, **kwargs).run(800)
    lengths = {s.chosen.lengths for s in rounded.steps[300:]}
    assert (3,) * 8 in lengths or (1,) * 8 in lengths
    assert np.mean([s.even for s in rounded.steps[300:]]) > 0.9
    assert rounded.speed(300) > 1.05 * max(free.speed(300), 1.0)
    # Where requests differ more than the graphs are worth, each has its own.
    kwargs |= {"uneven": 0.05}
    apart = SchedulerWorld(lambda i, n: 0.95 if i % 2 else 0.05, **kwargs).run(600)
    assert apart.mean_length(lambda i: i % 2 == 1, since=150) > 4
    assert apart.mean_length(lambda i: i % 2 == 0, since=150) < 1


def test_no_draft_is_longer_than_the_request() -> None:
    world = SchedulerWorld(lambda i, n: 1.0, max_tokens=20, late=0).run(300)
    assert world.policy.counters.accepted[DRAFTER] > 0
    for step in world.steps:
        assert max(step.chosen.lengths) <= K
    assert all(n <= world.max_tokens + 1 for n in world.written.values())


def test_totals() -> None:
    world = SchedulerWorld(lambda i, n: 0.8, requests=2, late=0).run(200)
    totals = world.policy.counters
    assert totals.steps == 200
    assert totals.tokens == sum(2 + sum(s.accepted) for s in world.steps)
    assert totals.proposed[DRAFTER] == sum(sum(s.chosen.lengths) for s in world.steps)
    assert totals.accepted[DRAFTER] == sum(sum(s.accepted) for s in world.steps)
    assert totals.expected[DRAFTER] == pytest.approx(totals.accepted[DRAFTER], rel=0.15)
    assert sum(totals.lengths) == 400
    assert totals.speedup == pytest.approx(world.speed(), rel=0.02)


def test_nothing_to_choose() -> None:
    policy = SchedulerWorld(lambda i, n: 0.9).policy
    assert policy.verify_lengths(Batch([], 0.0, [], [])).lengths == ()
    assert not policy.should_draft(Batch([], 0.0, [], []))
    assert not policy.should_draft(Batch(["a"], 10.0, [K], [0]))
    assert policy.verify_lengths(Batch(["a"], 10.0, [0], [50])).lengths == (0,)


def test_a_batch_teaches_what_its_requests_teach_one_by_one() -> None:
    """The same outcomes, learned from as arrays and one after the other: the same averages and curves."""
    rng = np.random.default_rng(0)
    together, apart = AcceptanceModel([0.7] * K), AcceptanceModel([0.7] * K)
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
        for model in (together, apart):
            model.forget(ids[step])
    assert together.trials == apart.trials
    curves = [p.survival(np.arange(K), ids) for p in (together, apart)]
    assert curves[0] == pytest.approx(curves[1], abs=0.02)
    assert together.likely_offsets() == pytest.approx(apart.likely_offsets(), abs=0.2)


def test_hundreds_of_requests_are_told_apart() -> None:
    """Learned from by turns: the good ones' drafts are verified, the bad ones' are not."""
    world = SchedulerWorld(
        lambda i, n: 0.95 if i % 2 else 0.05, requests=256, per_token=0.002, draft=0.1
    ).run(60)
    assert world.mean_length(lambda i: i % 2 == 1, since=20) > 4
    assert world.mean_length(lambda i: i % 2 == 0, since=20) < 0.3


def test_a_step_looks_once_for_the_best_lengths(monkeypatch) -> None:
    """Whether to draft follows from what the lengths were chosen by, while the step's drafts are whole."""
    looks = []
    look = scheduler_policy.assign_draft_budget
    monkeypatch.setattr(
        scheduler_policy, "assign_draft_budget", lambda *a: looks.append(None) or look(*a)
    )
    world = SchedulerWorld(lambda i, n: 0.9, requests=4).run(100)
    before = len(looks)
    assert world.run(50).drafted(100) == 1
    assert len(looks) == before + 50
    policy, few = world.policy, world.batch()
    policy.should_draft(few)
    # Others of them, near their end, or of another number: looked at anew.
    for other in (
        Batch(few.ids[:3], few.context, few.drafted[:3], few.most[:3]),
        Batch(few.ids, few.context, few.drafted, [2, *few.most[1:]]),
        Batch(few.ids, few.context, [2, *few.drafted[1:]], few.most),
    ):
        before = len(looks)
        policy.should_draft(other)
        assert len(looks) == before + 1
    lengths = policy.verify_lengths(Batch(few.ids, few.context, few.drafted, [2, 0, K, K])).lengths
    assert lengths[0] <= 2 < max(lengths)
    assert lengths[1] == 0


def test_hundreds_of_requests_take_little_time() -> None:
    """Of the engine core's thread: decisions and learning at 256 requests; benchmarks/policy_cost.py has the
    figures, one by one learning alone takes three times the bound."""
    world = SchedulerWorld(lambda i, n: 0.8, requests=256, per_token=0.001, draft=0.1).run(10)
    policy, step = world.policy, world.steps[-1]
    promised = [
        float(p[:n].sum())
        for p, n in zip(step.chosen.predicted_BK, step.chosen.lengths, strict=True)
    ]
    outcomes = [str(i) for i in step.ids], step.chosen.lengths, step.accepted, promised
    batch, spent = world.batch(), []
    for _ in range(20):
        began = time.thread_time()
        policy.verify_lengths(batch)
        policy.should_draft(batch)
        policy.observe(*outcomes)
        spent.append(time.thread_time() - began)
    one_by_one = []
    for _ in range(5):
        began = time.thread_time()
        for request, n, accepted in zip(*outcomes[:3], strict=True):
            policy.by_position.observe(np.arange(min(accepted + 1, n)), accepted, request)
        one_by_one.append(time.thread_time() - began)
    assert min(spent) < 0.7 * min(one_by_one)
