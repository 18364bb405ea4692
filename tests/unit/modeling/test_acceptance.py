"""The replayed draft-and-verify walk, against a simulated engine."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.acceptance import drafts_of
from vllm_dflash.modeling.acceptance import (
    Acceptance,
    full_length_tau,
    full_length_tau_bound,
    walk,
)


def simulate(response: list[int], drafts: list[list[int]], num_draft_tokens: int):
    """A serving engine, token by token: returns how many tokens every verify step delivered.

    ``drafts[i]`` is what the drafter proposes when response token i is the last one emitted. The
    verifier is greedy, so what it samples is ``response`` whatever was drafted.
    """
    emitted, steps = response[:1], []  # the prefill samples the first token
    while len(emitted) < len(response):
        proposal = drafts[len(emitted) - 1][:num_draft_tokens]
        before = len(emitted)
        for token in proposal:
            if len(emitted) == len(response) or token != response[len(emitted)]:
                break
            emitted.append(token)
        if len(emitted) < len(response):
            emitted.append(response[len(emitted)])  # the bonus token
        steps.append(len(emitted) - before)
    assert emitted == response
    return steps


@st.composite
def runs(draw):
    length, block = draw(st.integers(0, 24)), draw(st.integers(1, 6))
    token = st.integers(0, 2)  # few, so that long runs are accepted
    response = draw(st.lists(token, min_size=length, max_size=length))
    drafts = [draw(st.lists(token, min_size=block, max_size=block)) for _ in response]
    right = draw(st.floats(0, 1))
    for i, draft in enumerate(drafts):
        if draw(st.floats(0, 1)) < right:
            ahead = response[i + 1 : i + 1 + block]
            draft[: len(ahead)] = ahead
    return response, drafts, block


@given(runs())
@settings(max_examples=200)
def test_walk_is_what_the_engine_does(run):
    response, drafts, block = run
    matches = [
        [d == t for d, t in zip(drafts[i], response[i + 1 :], strict=False)]
        for i in range(max(len(response) - 1, 0))
    ]
    got, steps = walk(matches, block), simulate(response, drafts, block)
    assert got.num_drafts == len(steps)
    # Tokens delivered after the first, without a correction at the end.
    assert got.num_drafts + got.num_accepted == max(len(response) - 1, 0)
    assert got.tau == pytest.approx(sum(steps) / len(steps) if steps else 1)
    assert got.accepted_per_position == [
        sum(n > k + 1 for n in steps) for k in range(block if steps else 0)
    ]
    assert sum(got.position_rates) == pytest.approx(got.tau - 1)


def test_tokens_behind_the_end_do_not_count():
    """A response of 4 tokens, all drafts right: a step delivers the 3 that are left, of 7 drafted."""
    got = walk([[True] * 7] * 3, 7)
    assert (got.num_drafts, got.num_accepted, got.tau) == (1, 2, 3.0)
    assert got.position_rates == [1.0, 1.0, 0, 0, 0, 0, 0]
    # All that lies inside the response was right; what lies behind it says nothing of the drafter.
    assert got.compared_per_position == [1, 1, 1, 0, 0, 0, 0]
    assert got.conditional_rates == [1.0, 1.0, 1.0, 0, 0, 0, 0]
    # One token is left, which a step without a draft delivers just so.
    last = walk([[True]], 7)
    assert (last.num_drafts, last.num_accepted, last.tau) == (1, 0, 1.0)


def test_full_length_tau_does_not_depend_on_lengths():
    """Short responses and short drafts give what long ones do."""
    true = [0.8, 0.6, 0.5, 0.5]
    want = full_length_tau(true)
    assert want == pytest.approx(1 + 0.8 + 0.48 + 0.24 + 0.12)
    rng = random.Random(0)
    long, short = Acceptance(), Acceptance()
    for length, out in ((400, long), (6, short)):
        for _ in range(40_000 // length):
            rows = [[rng.random() < rate for rate in true] for _ in range(length - 1)]
            out.merge(walk(rows, 4))
    assert short.tau < long.tau - 0.2
    for out in (long, short):
        assert full_length_tau(out.conditional_rates) == pytest.approx(want, rel=0.03)


def test_the_bound_is_above_and_comes_near():
    rng = random.Random(1)
    true = [0.5, 0.4, 0.3]
    widths = []
    for count in (0, 100, 10_000, 100_000):
        bound = full_length_tau_bound(*drafts_of(true, count, rng))
        widths.append(bound - full_length_tau(true))
    assert widths == sorted(widths, reverse=True)
    assert 0 < widths[-1] < 0.06
    # Nothing accepted in 500 drafts: still not quite sure that nothing is.
    assert 1 < full_length_tau_bound([500, 0, 0], [0, 0, 0]) < 1.2


def test_all_right_and_all_wrong():
    perfect = walk([[True] * 3] * 8, 3)
    assert (perfect.num_drafts, perfect.num_accepted, perfect.tau) == (2, 6, 4.0)
    assert perfect.conditional_rates == [1.0, 1.0, 1.0]
    assert perfect.position_rates == [1.0, 1.0, 1.0]
    useless = walk([[False, True, True]] * 8, 3)
    assert (useless.num_drafts, useless.num_accepted, useless.tau) == (8, 0, 1.0)
    assert useless.position_rates == [0.0, 0.0, 0.0]


def test_fewer_draft_tokens_than_the_table_has():
    assert walk([[True] * 5] * 6, 2).accepted_per_position == [2, 2]


def test_nothing_to_draft():
    empty = walk([], 3)
    assert empty.tau == 1.0
    assert empty.as_dict() == {
        "tau": 1.0,
        "num_drafts": 0,
        "num_accepted": 0,
        "position_rates": [],
        "conditional_rates": [],
    }


def test_tau_is_pooled_not_averaged():
    short = Acceptance()
    short.add_draft(3, 3)
    long = Acceptance()
    for _ in range(9):
        long.add_draft(0, 5)
    total = Acceptance()
    for part in (short, long):
        total.merge(part)
    assert total.tau == pytest.approx(1 + 3 / 10)
    assert total.accepted_per_position == [1, 1, 1, 0, 0]
    assert total.position_rates == pytest.approx([0.1, 0.1, 0.1, 0, 0])
    assert (short.num_drafts, long.num_drafts) == (1, 9)


@given(st.lists(st.lists(st.integers(0, 4), max_size=8), max_size=5))
def test_pooling_is_counting_together(parts):
    together, merged = Acceptance(), Acceptance()
    for part in parts:
        one = Acceptance()
        for accepted in part:
            one.add_draft(accepted, 4)
            together.add_draft(accepted, 4)
        merged.merge(one)
    assert merged == together
    assert 1 <= merged.tau <= 5
