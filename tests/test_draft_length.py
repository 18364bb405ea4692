"""How many draft tokens pay: the choice against brute force, what is learned, runs of a model world."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import K, WorkerWorld, fixed_rate, made

from vllm_dflash.draft_length import policy as policies
from vllm_dflash.draft_length.acceptance import (
    CONFIDENCE_PRIOR,
    Predictor,
    Promises,
    confidence_cells,
)
from vllm_dflash.draft_length.choice import choose
from vllm_dflash.draft_length.cost import StepCost
from vllm_dflash.draft_length.doze import Doze
from vllm_dflash.draft_length.pace import Pace
from vllm_dflash.draft_length.policy import Policy, Request
from vllm_dflash.draft_length.totals import DRAFTER, LOOKUP, Totals
from vllm_dflash.modeling.acceptance import rates


def brute_force(curves, seconds_M, worth):
    """The most that any combination of lengths is worth, by its expected tokens and its seconds."""
    best = -np.inf
    for lengths in itertools.product(*(range(len(c) + 1) for c in curves)):
        tokens = sum(1 + c[:n].sum() for c, n in zip(curves, lengths, strict=True))
        best = max(best, worth(tokens, seconds_M[sum(lengths)]))
    return best


probabilities = st.lists(st.floats(0.01, 1.0), min_size=0, max_size=4)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(probabilities, min_size=1, max_size=4),
    st.floats(0.0, 0.5),
    st.lists(st.floats(0.0, 0.3), min_size=17, max_size=17),
    st.floats(0.0, 5.0),
)
def test_choice_is_the_best_of_all(conditional, draft_pass, slopes, price) -> None:
    """Whatever the acceptance, and whatever increasing cost."""
    curves = [np.cumprod(p) for p in conditional]
    padded = np.zeros((len(curves), 4))
    for row, curve in zip(padded, curves, strict=True):
        row[: len(curve)] = curve
    seconds = 1.0 + draft_pass + np.concatenate(([0.0], np.cumsum(slopes[:16])))
    seconds = seconds[: padded.size + 1]
    got = choose(padded, seconds)
    assert got.rate == pytest.approx(brute_force(curves, seconds, lambda n, s: n / s))
    priced = choose(padded, seconds, price)
    best = brute_force(curves, seconds, lambda n, s: n - price * s)
    assert priced.worth(price) == pytest.approx(best)
    tokens = sum(1 + c[:n].sum() for c, n in zip(curves, got.lengths, strict=True))
    assert got.tokens == pytest.approx(tokens)
    assert got.seconds == seconds[sum(got.lengths)]


def test_choice_explains_itself() -> None:
    certain, hopeless = np.full(4, 0.99).cumprod(), np.full(4, 0.05).cumprod()
    flat, steep = np.ones(9), 1.0 + np.arange(9)
    both = np.stack([certain, hopeless])
    assert choose(both, flat).lengths == (4, 4)  # free tokens: all that may help
    assert choose(both, 1 + 0.2 * np.arange(9)).lengths == (4, 0)
    assert choose(both, steep).lengths == (0, 0)
    assert choose(np.zeros((2, 4)), flat).lengths == (0, 0)
    assert choose(np.empty((0, 4)), flat[:1]).lengths == ()


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_shortcuts_change_no_choice(seed) -> None:
    """Where nothing can pay it is not tried what pays most; the choices are those without that."""

    def decide(short: bool):
        rng = np.random.default_rng(seed)
        num = int(rng.integers(1, 6))
        slope, fixed = rng.uniform(0.01, 0.6), rng.uniform(0.05, 3)
        policy = Policy(made(lambda n: 1 + slope * n, draft=(fixed, 0.01)), K)
        for predictor in (policy.by_position, policy.by_match):
            level = rng.uniform(-5, 3)
            predictor._logit_C[:] = rng.normal(level, 0.5, len(predictor._logit_C))
            for i in range(num):
                if rng.random() < 0.7:
                    predictor.observe(np.arange(1), int(rng.integers(2)), str(i))
        requests = [
            Request(
                str(i), np.arange(30), K, np.arange(rng.integers(0, K)), int(rng.integers(2, 6))
            )
            for i in range(num)
        ]
        with pytest.MonkeyPatch.context() as patch:
            if not short:
                patch.setattr(Policy, "_may_pay", lambda *args: True)
                patch.setattr(policies, "_bound", lambda *args: np.inf)
            plan = policy.plan(requests)
            drafts = policy.settle(plan, np.zeros((len(plan.drafting), K), int), None)
        return plan.drafting, drafts, policy._probe_share, policy._credit

    assert decide(True) == decide(False)


def test_a_rare_good_step_is_used_longer() -> None:
    """Three plain steps to one with a match, of which 0 to 7 tokens are right: the best length is that with
    the least time for each token of all four steps, not of its own."""
    policy = Policy(made(lambda n: 1 + 0.3 * (n - 1), draft=(9.0, 0.0)), K)
    text, done, lengths, shorter, seconds = np.arange(10000), 20, [], [], np.empty(0)
    for step in range(1600):
        matches, right = step % 4 == 0, 3 * step // 4 % 8
        match = text[done : done + K] + 50000 * (np.arange(K) >= right) if matches else text[:0]
        plan = policy.plan([Request("r", text[:done], K, match, 2 if matches else 0)])
        (draft,) = policy.settle(plan, None, None)
        done += 1 + min(draft.length, right)
        if matches:
            lengths.append(draft.length)
            seconds = plan.seconds_M
            shorter.append(choose(plan.lookups_BK, seconds).lengths[0])
    curve = 1 - np.arange(1, K + 1) / 8
    rates = [(4 + curve[:n].sum()) / (3 * seconds[0] + seconds[n]) for n in range(K + 1)]
    assert np.mean(lengths[-200:]) == pytest.approx(int(np.argmax(rates)), abs=0.8)
    assert np.mean(shorter[-200:]) < np.mean(lengths[-200:]) - 0.5


def test_pace() -> None:
    pace = Pace()
    assert pace.of(["a", "b"]) == 2
    for _ in range(200):
        pace.add("slow", 1.0, 1.1)
        pace.add("fast", 3.0, 1.2)
    assert pace.of(["fast"]) == pytest.approx(2.5, rel=0.1)
    assert pace.of(["slow"]) == pytest.approx(1.0, abs=0.2)
    assert 1.2 < pace.of(["new"]) < 2.3  # like the average of all
    pace.forget("fast")
    assert pace.of(["fast"]) == pace.of(["new"])


# -- acceptance


def test_predictor_finds_averages_and_requests() -> None:
    rng = np.random.default_rng(0)
    predictor = Predictor([0.5] * 3)
    truth = {"good": 0.9, "bad": 0.3}
    for _ in range(300):
        for name, p in truth.items():
            right = rng.random(3) < p
            accepted = 3 if right.all() else int(np.argmin(right))
            predictor.observe(np.arange(min(accepted + 1, 3)), accepted, name)
    for name, p in truth.items():
        assert predictor.conditional(np.array([[0, 1, 2]]), [name]) == pytest.approx(p, abs=0.12)
    (new,) = predictor.curves(np.array([[0, 1, 2]]), ["new"])
    new = new[1:] / new[:-1]
    assert (new > 0.35).all()
    assert (new < 0.95).all()
    offsets = predictor.likely_offsets()
    assert len(offsets) >= 3
    predictor.forget("good")
    assert not predictor.seen("good")
    assert predictor.seen("bad")


def test_what_fails_at_once_may_hold_for_long() -> None:
    """A request whose matches are wrong two times in three, and right to the end where they are not."""
    rng = np.random.default_rng(0)
    prior, cells = [0.6, 0.9, 0.9], np.arange(3)
    apart, alike = Predictor(prior, groups=[0, 1, 1]), Predictor(prior)
    for _ in range(100):
        right = 3 if rng.random() < 0.3 else 0
        other = next((i for i, p in enumerate((0.95, 0.8, 0.8)) if rng.random() > p), 3)
        for predictor in (apart, alike):
            predictor.observe(cells[: right + 1], right, "r")
            predictor.observe(cells[: other + 1], other, "other")
    first, _, third = apart.curves(cells[None], ["r"])[0]
    assert first == pytest.approx(0.3, abs=0.12)
    assert third > 0.8 * first
    assert third > alike.curves(cells[None], ["r"])[0, 2]
    assert apart.likely_offsets().shape[1] == 2
    for name in ("r", "other"):
        apart.forget(name)
    assert apart.curves(cells[None], ["new"]).shape == (1, 3)


def test_one_refusal_is_no_verdict() -> None:
    predictor = Predictor([0.8] * K)
    positions = np.arange(K)[None]
    before = predictor.curves(positions, ["r"])
    predictor.observe(np.array([0]), 0, "r")
    after = predictor.curves(positions, ["r"])
    assert (after < before).all()
    assert after[0, 0] > 0.3


def test_confidence_cells_are_ordered_and_all_have_a_prior() -> None:
    cells = confidence_cells(np.array([0.0, 0.02, 0.3, 0.5, 0.9, 0.999, 1.0]))
    assert (np.diff(cells) >= 0).all()
    assert cells[0] == 0
    assert cells[-1] == len(CONFIDENCE_PRIOR) - 1
    assert list(CONFIDENCE_PRIOR) == sorted(CONFIDENCE_PRIOR)


def test_a_better_predictor_has_the_smaller_loss() -> None:
    rng = np.random.default_rng(1)
    knows, guesses = Predictor(CONFIDENCE_PRIOR), Predictor([0.5])
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


@pytest.mark.parametrize("name", WORLDS)
def test_never_slower_than_none_or_the_best_fixed_length(name) -> None:
    """The bounds of the benchmark, in a world whose costs and acceptance are known."""
    quality, slope = WORLDS[name]
    cost = made(lambda n: 1 + slope * n, draft=(0.06, 0.002))
    cost.check = 0.2 if "dear check" in name else 0.0  # to be learned
    rates = []
    for seed in range(3):
        learned = made(lambda n: 1 + slope * n, draft=(0.06, 0.002))
        rates.append(WorkerWorld(Policy(learned, K), cost, quality, seed=seed).run(1200))
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


def test_promises_that_are_not_kept_count_for_less() -> None:
    kept, broken = Promises(), Promises()
    assert kept.share == 1
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(500):
        kept.add(0.6, int(rng.random() < 0.6))
        broken.add(0.6, int(rng.random() < 0.3))
        shares.append(kept.share)
    assert np.mean(shares) > 0.97
    assert broken.share == pytest.approx(0.55, abs=0.12)


def test_a_verdict_stands_while_nothing_new_is_known(monkeypatch) -> None:
    """Looking costs time in every step; but new requests, and probes that are due, are looked at at once."""
    cost = made(lambda n: 1 + 0.2 * n, draft=(0.5, 0.01))
    policy = Policy(cost, K)
    looked = []
    look = policy._draft_for
    monkeypatch.setattr(policy, "_draft_for", lambda *a: looked.append(1) or look(*a))
    policy.by_position._logit_C[:] = -4.0
    for name in "ab":
        policy.by_position.observe(np.array([0]), 0, name)

    def plan(*names):
        requests = [Request(name, np.arange(20), K) for name in names]
        policy.settle(policy.plan(requests), None, None)

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
    policy._credit = 10.0
    plan("a")
    assert len(looked) == 4
    policy._credit = 0.0
    # One of four leaves; two have left; another one comes.
    for names, times in (("abcd", 5), ("abcd", 5), ("abc", 5), ("ab", 6), ("ae", 7)):
        plan(*names)
        assert len(looked) == times


def test_dozes_while_nothing_is_found() -> None:
    def looks(doze, gain, effort, steps) -> float:
        looked = 0
        for _ in range(steps):
            if not doze.skips():
                looked += 1
                doze.note(gain, effort)
        return looked / steps

    assert looks(Doze(), 0.2, 0.05, 300) == 1
    doze = Doze()
    looks(doze, 0.0, 0.05, 500)
    assert looks(doze, 0.0, 0.05, 400) < 0.2
    # It is awake again within two naps, and stays so.
    looks(doze, 0.5, 0.05, 140)
    assert looks(doze, 0.5, 0.05, 100) == 1
    # Rare finds that pay in all keep it awake.
    rng = np.random.default_rng(0)
    rare, skipped = Doze(), 0
    for _ in range(2000):
        if rare.skips():
            skipped += 1
        else:
            rare.note(0.6 * (rng.random() < 0.1), 0.035)
    assert skipped < 100
    held_up = Doze()
    looks(held_up, 0.1, 0.03, 100)
    held_up.note(0.1, 30.0)
    assert looks(held_up, 0.1, 0.03, 50) == 1


def test_confidence_is_used_where_it_helps() -> None:
    quality, cost = [0.6] * 4, made(lambda n: 1 + 0.15 * n, draft=(0.05, 0.001))
    rates = {}
    for confident in (False, True):
        policy = Policy(made(lambda n: 1 + 0.15 * n, draft=(0.05, 0.001)), K)
        rates[confident] = WorkerWorld(policy, cost, quality, confident=confident).run(800)
        assert policy.believes_confidence == confident
    assert rates[True] > 1.15 * rates[False]


def test_drafting_stops_and_comes_back() -> None:
    cost = made(lambda n: 1 + 0.1 * n, draft=(0.1, 0.002))
    policy = Policy(made(lambda n: 1 + 0.1 * n, draft=(0.1, 0.002)), K)
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


@pytest.mark.parametrize("quality", [0.9, 0.5, 0.05])
def test_acceptance_by_position_does_not_depend_on_the_lengths_chosen(quality) -> None:
    """Drafts are counted by position as far as the text behind them goes, verified or not."""
    cost = made(lambda n: 1 + 0.1 * n, draft=(0.1, 0.002))
    policy = Policy(made(lambda n: 1 + 0.1 * n, draft=(0.1, 0.002)), K)
    WorkerWorld(policy, cost, [quality] * 4).run(3000)
    totals = policy.totals
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
    policy = Policy(made(lambda n: 1 + 0.05 * n, draft=(0.1, 0.002)), K)
    world = WorkerWorld(policy, cost, [0.3, 0.3, 0.9, 0.9], lookup=[1.0, 0.0, 0.0, 1.0])
    world.run(600)
    totals = policy.totals
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
    policy, truth = Policy(made(), K), made()
    for _ in range(2000):
        seconds = float(truth.step(4, 4, 100)) * (1 + rng.exponential(0.15))
        policy.cost.observe_step(4, 4, 100, seconds)
        policy.totals.add(4, 4, 100, seconds)
    assert policy.totals.speedup == pytest.approx(1.0, abs=0.03)
    before = policy.totals.plain_seconds, policy.totals.seconds
    for _ in range(2000):
        verified = float(truth.verify(4, 100, 8)[-1]) * (1 + rng.exponential(0.15))
        policy.cost.observe_step(12, 4, 100, verified, 8)
        policy.totals.add(8, 4, 100, verified + 0.1, 8, 0.1)
    plain, spent = policy.totals.plain_seconds - before[0], policy.totals.seconds - before[1]
    want = 2 * 1.08 / (1.24 + 0.1 / 1.15)
    assert plain / spent == pytest.approx(want, rel=0.05)


def test_prompts_take_as_long_in_both() -> None:
    totals = Totals(made(lambda n: 1 + 0.1 * n), K)
    totals.add_prompts(2, 0.0, seconds=5.0)
    assert totals.speedup == 1.0
    # Four drafts took 0.4 s of it, and two that were accepted save a plain step of the two requests.
    totals.add_prompts(2, 0.0, seconds=5.4, drafts=4, accepted=2, draft_seconds=0.1)
    assert totals.seconds == pytest.approx(10.5)
    assert totals.plain_seconds == pytest.approx(5.0 + 5.0 + 1.2)


def test_a_step_whose_requests_are_all_at_their_end() -> None:
    for together in (False, True):
        policy = Policy(made(), K, together)
        plan = policy.plan([])
        assert plan.drafting == ()
        assert policy.settle(plan, None, None) == []
        assert np.isfinite(plan.seconds_M).all()
        assert plan.seconds_M[0] > 0


def test_all_or_none() -> None:
    cost = made(lambda n: 1 + 0.05 * n)
    policy = Policy(cost, K, together=True)
    tokens = np.arange(1, 30)
    requests = [Request(f"r{i}", tokens, K) for i in range(3)]
    assert policy.plan(requests).drafting in ((), (0, 1, 2))


def test_limits_are_kept() -> None:
    policy = Policy(made(lambda n: 1 + 0.001 * n, draft=(0.001, 0.0)), K)
    requests = [Request("a", np.arange(1, 30), 2), Request("b", np.arange(1, 30), 0)]
    for most in (None, 1, 0):
        plan = policy.plan(requests, most)
        drafts = np.ones((len(plan.drafting), K), dtype=int)
        got = policy.settle(plan, drafts, np.full(drafts.shape, 0.9))
        assert got[0].length <= (2 if most is None else most)
        assert got[1].length == 0
        assert (most != 0) or plan.drafting == ()
