"""How many draft tokens pay: the choice against brute force, what is learned, runs of a model world."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.worlds import K, WorkerWorld, fixed_rate, made
from vllm_dflash.draft_length.acceptance import (
    CONFIDENCE_PRIOR,
    AcceptanceModel,
    confidence_cells,
)
from vllm_dflash.draft_length.allocate import assign_draft_budget
from vllm_dflash.draft_length.cost import StepCost
from vllm_dflash.draft_length.counters import DRAFTER, LOOKUP, Counters
from vllm_dflash.draft_length.worker_policy import Request, WorkerPolicy
from vllm_dflash.modeling.acceptance import rates


def brute_force(curves, seconds_M):
    """The most expected tokens a second of any combination of lengths."""
    best = -np.inf
    for lengths in itertools.product(*(range(len(c) + 1) for c in curves)):
        tokens = sum(1 + c[:n].sum() for c, n in zip(curves, lengths, strict=True))
        best = max(best, tokens / seconds_M[sum(lengths)])
    return best


probabilities = st.lists(st.floats(0.01, 1.0), min_size=0, max_size=4)


@settings(max_examples=200)
@given(
    st.lists(probabilities, min_size=1, max_size=4),
    st.floats(0.0, 0.5),
    st.lists(st.floats(0.0, 0.3), min_size=17, max_size=17),
)
def test_choice_is_the_best_of_all(conditional, draft_pass, slopes) -> None:
    """Whatever the acceptance, and whatever increasing cost."""
    curves = [np.cumprod(p) for p in conditional]
    padded = np.zeros((len(curves), 4))
    for row, curve in zip(padded, curves, strict=True):
        row[: len(curve)] = curve
    seconds = 1.0 + draft_pass + np.concatenate(([0.0], np.cumsum(slopes[:16])))
    seconds = seconds[: padded.size + 1]
    got = assign_draft_budget(padded, seconds)
    assert got.rate == pytest.approx(brute_force(curves, seconds))
    tokens = sum(1 + c[:n].sum() for c, n in zip(curves, got.lengths, strict=True))
    assert got.tokens == pytest.approx(tokens)
    assert got.seconds == seconds[sum(got.lengths)]


def test_choice_explains_itself() -> None:
    certain, hopeless = np.full(4, 0.99).cumprod(), np.full(4, 0.05).cumprod()
    flat, steep = np.ones(9), 1.0 + np.arange(9)
    both = np.stack([certain, hopeless])
    assert assign_draft_budget(both, flat).lengths == (4, 4)  # free tokens: all that may help
    assert assign_draft_budget(both, 1 + 0.2 * np.arange(9)).lengths == (4, 0)
    assert assign_draft_budget(both, steep).lengths == (0, 0)
    assert assign_draft_budget(np.zeros((2, 4)), flat).lengths == (0, 0)
    assert assign_draft_budget(np.empty((0, 4)), flat[:1]).lengths == ()


# -- acceptance


def test_model_finds_averages_and_requests() -> None:
    rng = np.random.default_rng(0)
    model = AcceptanceModel([0.5] * 3)
    truth = {"good": 0.9, "bad": 0.3}
    for _ in range(300):
        for name, p in truth.items():
            right = rng.random(3) < p
            accepted = 3 if right.all() else int(np.argmin(right))
            model.observe(np.arange(min(accepted + 1, 3)), accepted, name)
    for name, p in truth.items():
        assert model.conditional(np.array([[0, 1, 2]]), [name]) == pytest.approx(p, abs=0.12)
    (new,) = model.survival(np.array([[0, 1, 2]]), ["new"])
    new = new[1:] / new[:-1]
    assert (new > 0.35).all()
    assert (new < 0.95).all()
    offsets = model.likely_offsets()
    assert len(offsets) >= 3
    model.forget("good")
    assert not model.seen("good")
    assert model.seen("bad")


def test_one_refusal_is_no_verdict() -> None:
    model = AcceptanceModel([0.8] * K)
    positions = np.arange(K)[None]
    before = model.survival(positions, ["r"])
    model.observe(np.array([0]), 0, "r")
    after = model.survival(positions, ["r"])
    assert (after < before).all()
    assert after[0, 0] > 0.3


def test_confidence_cells_are_ordered_and_all_have_a_prior() -> None:
    cells = confidence_cells(np.array([0.0, 0.02, 0.3, 0.5, 0.9, 0.999, 1.0]))
    assert (np.diff(cells) >= 0).all()
    assert cells[0] == 0
    assert cells[-1] == len(CONFIDENCE_PRIOR) - 1
    assert list(CONFIDENCE_PRIOR) == sorted(CONFIDENCE_PRIOR)


def test_a_better_model_has_the_smaller_loss() -> None:
    rng = np.random.default_rng(1)
    knows, guesses = AcceptanceModel(CONFIDENCE_PRIOR), AcceptanceModel([0.5])
    for _ in range(300):
        confidence = rng.choice([0.05, 0.95])
        right = int(rng.random() < confidence)
        knows.observe(confidence_cells(np.array([confidence])), right, "r")
        guesses.observe(np.array([0]), right, "r")
    assert knows.loss < 0.6 * guesses.loss


# -- costs


def test_costs_between_and_beyond_what_was_measured() -> None:
    cost = made(per_context=1e-4, per_pair=1e-5, overhead=0.5)
    assert cost.step(3, 3, 0) == pytest.approx(0.5 + 1.06)
    assert cost.step(200, 3, 0) == pytest.approx(0.5 + 5.0, rel=0.01)
    assert cost.step(8, 4, 1000) == pytest.approx(0.5 + 1.16 + 0.1 + 0.02)
    assert cost.step(np.array([1, 2]), 1, 0) == pytest.approx([1.52, 1.54])
    assert cost.draft(8) == pytest.approx(0.108)


def test_a_slower_machine_slows_everything_alike() -> None:
    cost = made()
    before = cost.step(np.array([1, 8, 64]), 1, 0)
    for _ in range(200):
        cost.observe_step(8, 1, 0, 2 * 1.16)
    after = cost.step(np.array([1, 8, 64]), 1, 0)
    assert after[1] == pytest.approx(2 * before[1], rel=0.02)
    assert after / before == pytest.approx(after[1] / before[1], rel=0.35)


def test_a_wrong_knot_is_put_right_and_outliers_are_not_believed() -> None:
    cost = made()
    rng = np.random.default_rng(2)
    truth = {1: 1.02, 8: 1.9, 16: 2.4}
    for i in range(1500):
        n = (1, 8, 16)[i % 3]
        held_up = 30.0 if rng.random() < 0.03 else 1.0
        cost.observe_step(n, 1, 0, truth[n] * held_up * rng.normal(1, 0.03))
    got = {n: float(cost.step(n, 1, 0)) for n in truth}
    assert got[8] / got[1] == pytest.approx(truth[8] / truth[1], rel=0.08)
    assert got[16] / got[1] == pytest.approx(truth[16] / truth[1], rel=0.08)


def test_pauses_while_idle_are_not_overhead() -> None:
    cost = made()
    rng = np.random.default_rng(3)
    for _ in range(600):
        cost.observe_overhead(60.0 if rng.random() < 0.1 else 0.05)
    assert 0.03 < cost.overhead < 0.12


def test_costs_survive_a_file() -> None:
    cost = made(per_context=1e-4, per_pair=1e-5, overhead=0.2)
    cost.observe_step(8, 2, 100, 3.0)
    again = StepCost.from_dict(json.loads(json.dumps(cost.as_dict())))
    for n in (1, 5, 100):
        assert again.step(n, 2, 50) == pytest.approx(float(cost.step(n, 2, 50)))
    assert again.draft(16) == pytest.approx(cost.draft(16))


@pytest.mark.parametrize(
    "broken",
    [
        {},
        {"tokens": [1, 2], "seconds": [1.0]},
        {"tokens": [2, 1]},
        {"seconds": [1.0, float("nan")]},
        {"overhead": -1},
        {"draft": "none"},
    ],
)
def test_files_that_are_no_costs(broken) -> None:
    good = StepCost([1, 2], [1.0, 1.1]).as_dict()
    raw = good | broken if broken else {}
    with pytest.raises(ValueError, match="not the costs of a step"):
        StepCost.from_dict(raw)


# -- whole runs


WORLDS = {
    "good drafts, cheap tokens": ([0.85] * 2, 0.01),
    "good drafts, dear tokens": ([0.85] * 4, 0.2),
    "bad drafts, cheap tokens": ([0.2] * 2, 0.01),
    "bad drafts, dear tokens": ([0.2] * 8, 0.2),
    "middling": ([0.6] * 4, 0.08),
    "mixed, dear tokens": ([0.9, 0.1] * 4, 0.1),
    "one request": ([0.75], 0.02),
    "one bad request": ([0.15], 0.05),
    "middling, dear check": ([0.6] * 4, 0.08),
    "bad drafts, dear check": ([0.3] * 8, 0.02),
}


@pytest.mark.thorough
@pytest.mark.parametrize("name", WORLDS)
def test_never_slower_than_none_or_the_best_fixed_length(name) -> None:
    """The bounds of the benchmark, in a world whose costs and acceptance are known."""
    quality, slope = WORLDS[name]
    cost = made(lambda n: 1 + slope * n, draft=(0.06, 0.002))
    cost.check = 0.2 if "dear check" in name else 0.0  # to be learned
    rates = []
    for seed in range(3):
        learned = made(lambda n: 1 + slope * n, draft=(0.06, 0.002))
        rates.append(WorkerWorld(WorkerPolicy(learned, K), cost, quality, seed=seed).run(1200))
    fixed = [fixed_rate(cost, quality, n) for n in range(K + 1)]
    assert min(rates) >= 0.98 * fixed[0]
    assert min(rates) >= 0.96 * max(fixed)
    if name.startswith("mixed"):
        assert min(rates) >= 1.1 * max(fixed)


def test_cost_of_checking_is_told_from_that_of_tokens() -> None:
    rng = np.random.default_rng(0)
    cost = made(lambda n: 1 + 0.05 * n)
    for _ in range(400):
        drafts = int(rng.integers(0, 5))
        seconds = 1 + 0.05 * (8 + drafts) + 0.25 * (drafts > 0)
        cost.observe_step(8 + drafts, 8, 0, seconds * rng.normal(1, 0.02), drafts)
    seconds_M = cost.verify(8, 0, 4)
    assert seconds_M[0] == pytest.approx(1.4, rel=0.03)
    assert seconds_M[1:] == pytest.approx(1.65 + 0.05 * np.arange(1, 5), rel=0.03)
    assert cost.check == pytest.approx(0.25, abs=0.1)
    again = StepCost.from_dict(json.loads(json.dumps(cost.as_dict())))
    assert again.verify(8, 0, 4) == pytest.approx(seconds_M)


def test_a_verdict_stands_while_nothing_new_is_known(monkeypatch) -> None:
    """Looking costs time in every step; but new requests, and probes that are due, are looked at at once."""
    cost = made(lambda n: 1 + 0.2 * n, draft=(0.5, 0.01))
    policy = WorkerPolicy(cost, K)
    looked = []
    look = policy._draft_for
    monkeypatch.setattr(policy, "_draft_for", lambda *a: looked.append(1) or look(*a))
    policy.by_position._logit_C[:] = -4.0
    for name in "ab":
        policy.by_position.observe(np.array([0]), 0, name)

    def plan(*names):
        requests = [Request(name, np.arange(20), K) for name in names]
        policy.allocate(policy.plan(requests), None, None)

    for _ in range(8):
        plan("a", "b")
    assert len(looked) == 1
    plan("a")
    assert len(looked) == 2
    plan("a")
    assert len(looked) == 2
    policy.by_position.observe(np.array([0]), 1, "a")
    plan("a")
    assert len(looked) == 3
    policy.exploration.budget = 10.0
    plan("a")
    assert len(looked) == 4
    policy.exploration.budget = 0.0
    # One of four leaves; two have left; another one comes.
    for names, times in (("abcd", 5), ("abcd", 5), ("abc", 5), ("ab", 6), ("ae", 7)):
        plan(*names)
        assert len(looked) == times


def test_confidence_is_used_where_it_helps() -> None:
    quality, cost = [0.6] * 4, made(lambda n: 1 + 0.15 * n, draft=(0.05, 0.001))
    rates = {}
    for confident in (False, True):
        policy = WorkerPolicy(made(lambda n: 1 + 0.15 * n, draft=(0.05, 0.001)), K)
        rates[confident] = WorkerWorld(policy, cost, quality, confident=confident).run(800)
        assert policy.use_confidence == confident
    assert rates[True] > 1.15 * rates[False]


def test_drafting_stops_and_comes_back() -> None:
    cost = made(lambda n: 1 + 0.1 * n, draft=(0.1, 0.002))
    policy = WorkerPolicy(made(lambda n: 1 + 0.1 * n, draft=(0.1, 0.002)), K)
    world = WorkerWorld(policy, cost, [0.05] * 4)
    world.run(400)
    passes, seconds = world.passes, world.seconds
    world.run(400)
    spent = (world.passes - passes) * cost.draft(4 * (K + 1)) / (world.seconds - seconds)
    assert 0 < spent < 0.02  # it goes on looking, cheaply
    recent = [n for lengths in world.lengths for n in lengths[-300:]]
    assert np.mean(recent) < 0.1
    world.quality = [0.9] * 4
    for _ in range(200):
        world.step()
    assert np.mean([lengths[-20:] for lengths in world.lengths]) > 2


@pytest.mark.thorough
@pytest.mark.parametrize("quality", [0.9, 0.5, 0.05])
def test_acceptance_by_position_does_not_depend_on_the_lengths_chosen(quality) -> None:
    """Drafts are counted by position as far as the text behind them goes, verified or not."""
    cost = made(lambda n: 1 + 0.1 * n, draft=(0.1, 0.002))
    policy = WorkerPolicy(made(lambda n: 1 + 0.1 * n, draft=(0.1, 0.002)), K)
    WorkerWorld(policy, cost, [quality] * 4).run(3000)
    totals = policy.counters
    assert totals.compared[0] >= totals.drafts[DRAFTER] > 0
    # Drafts of all lengths are compared in full: as many reach a position as were right before it, but for
    # the ends of requests.
    for before, compared in zip(totals.right, totals.compared[1:], strict=False):
        assert compared == pytest.approx(before, rel=0.05, abs=4)
    by_position = rates(totals.compared, totals.right)
    for rate, compared in zip(by_position, totals.compared, strict=True):
        error = (quality * (1 - quality) / max(compared, 1)) ** 0.5
        assert rate == pytest.approx(quality, abs=4 * error)


def test_lookup_is_preferred_where_it_is_better() -> None:
    cost = made(lambda n: 1 + 0.05 * n, draft=(0.1, 0.002))
    policy = WorkerPolicy(made(lambda n: 1 + 0.05 * n, draft=(0.1, 0.002)), K)
    world = WorkerWorld(policy, cost, [0.3, 0.3, 0.9, 0.9], lookup=[1.0, 0.0, 0.0, 1.0])
    world.run(600)
    totals = policy.counters
    assert totals.proposed[LOOKUP] > 0
    assert totals.proposed[DRAFTER] > 0
    assert totals.accepted[LOOKUP] > 0.95 * totals.proposed[LOOKUP]
    # A request with a sure match needs no draft pass.
    assert np.mean(world.lengths[0][-100:]) == pytest.approx(K, abs=0.5)
    for source in (DRAFTER, LOOKUP):
        assert totals.accepted[source] == pytest.approx(totals.expected[source], rel=0.1)
    assert totals.speedup > 1.2


def test_estimated_speed_is_one_without_drafts_whatever_the_noise() -> None:
    """Costs are typical ones, and noise only ever adds."""
    rng = np.random.default_rng(0)
    policy, truth = WorkerPolicy(made(), K), made()
    for _ in range(2000):
        seconds = float(truth.step(4, 4, 100)) * (1 + rng.exponential(0.15))
        policy.cost.observe_step(4, 4, 100, seconds)
        policy.counters.add(4, 4, 100, seconds)
    assert policy.counters.speedup == pytest.approx(1.0, abs=0.03)
    before = policy.counters.plain_seconds, policy.counters.seconds
    for _ in range(2000):
        verified = float(truth.verify(4, 100, 8)[-1]) * (1 + rng.exponential(0.15))
        policy.cost.observe_step(12, 4, 100, verified, 8)
        policy.counters.add(8, 4, 100, verified + 0.1, 8, 0.1)
    plain, spent = policy.counters.plain_seconds - before[0], policy.counters.seconds - before[1]
    want = 2 * 1.08 / (1.24 + 0.1 / 1.15)
    assert plain / spent == pytest.approx(want, rel=0.05)


def test_prompts_take_as_long_in_both() -> None:
    totals = Counters(made(lambda n: 1 + 0.1 * n), K)
    totals.add_prompts(2, 0.0, seconds=5.0)
    assert totals.speedup == 1.0
    # Four drafts took 0.4 s of it, and two that were accepted save a plain step of the two requests.
    totals.add_prompts(2, 0.0, seconds=5.4, drafts=4, accepted=2, draft_seconds=0.1)
    assert totals.seconds == pytest.approx(10.5)
    assert totals.plain_seconds == pytest.approx(5.0 + 5.0 + 1.2)


def test_a_step_whose_requests_are_all_at_their_end() -> None:
    for whole_batch in (False, True):
        policy = WorkerPolicy(made(), K, whole_batch)
        plan = policy.plan([])
        assert plan.drafting == ()
        assert policy.allocate(plan, None, None) == []
        assert np.isfinite(plan.seconds_M).all()
        assert plan.seconds_M[0] > 0


def test_all_or_none() -> None:
    cost = made(lambda n: 1 + 0.05 * n)
    policy = WorkerPolicy(cost, K, whole_batch=True)
    tokens = np.arange(1, 30)
    requests = [Request(f"r{i}", tokens, K) for i in range(3)]
    assert policy.plan(requests).drafting in ((), (0, 1, 2))


def test_limits_are_kept() -> None:
    policy = WorkerPolicy(made(lambda n: 1 + 0.001 * n, draft=(0.001, 0.0)), K)
    requests = [Request("a", np.arange(1, 30), 2), Request("b", np.arange(1, 30), 0)]
    for most in (None, 1, 0):
        plan = policy.plan(requests, most)
        drafts = np.ones((len(plan.drafting), K), dtype=int)
        got = policy.allocate(plan, drafts, np.full(drafts.shape, 0.9))
        assert got[0].length <= (2 if most is None else most)
        assert got[1].length == 0
        assert (most != 0) or plan.drafting == ()
