"""Which sequences each step sees: every epoch complete, windows within their budget, the same every time."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_dflash.training.plan import epoch_steps, plan_windows


@given(
    count=st.integers(1, 40),
    sequences=st.integers(1, 7),
    total=st.integers(1, 150),
    budget=st.integers(1, 400),
    seed=st.integers(0, 5),
)
def test_windows_cover_the_run_within_budget(count, sequences, total, budget, seed):
    keys = [f"k{i}" for i in range(count)]
    tokens = {k: 5 + i % 17 for i, k in enumerate(keys)}
    windows = plan_windows(
        keys, tokens, sequences=sequences, seed=seed, total_steps=total, max_tokens=budget
    )
    steps = [step for window in windows for step in window.steps]
    assert len(steps) == total
    assert [w.first_step for w in windows] == [
        sum(len(x.steps) for x in windows[:i]) for i in range(len(windows))
    ]
    per_epoch = -(-count // sequences)
    for epoch in range(total // per_epoch):
        seen = [k for step in steps[epoch * per_epoch : (epoch + 1) * per_epoch] for k in step]
        assert sorted(seen) == sorted(keys)
    for window in windows:
        fits = sum(tokens[k] for k in window.keys) <= budget
        assert fits or len(window.steps) == 1


def test_everything_that_fits_is_one_window():
    keys = [f"k{i}" for i in range(10)]
    windows = plan_windows(
        keys, dict.fromkeys(keys, 3), sequences=2, seed=0, total_steps=50, max_tokens=30
    )
    assert len(windows) == 1
    assert sorted(windows[0].keys) == sorted(keys)


def test_epochs_are_shuffled_differently_and_reproducibly():
    keys = [f"k{i}" for i in range(30)]
    assert epoch_steps(keys, 1, 0, 0) == epoch_steps(keys, 1, 0, 0)
    assert epoch_steps(keys, 1, 0, 0) != epoch_steps(keys, 1, 0, 1)
    assert epoch_steps(keys, 1, 0, 0) != epoch_steps(keys, 1, 1, 0)


@pytest.mark.parametrize("end", [1, 7, 13])
def test_a_longer_run_starts_like_a_shorter_one(end):
    keys = [f"k{i}" for i in range(5)]
    tokens = dict.fromkeys(keys, 10)

    def steps(total):
        windows = plan_windows(keys, tokens, sequences=1, seed=3, total_steps=total, max_tokens=25)
        return [s for w in windows for s in w.steps]

    assert steps(20)[:end] == steps(end)
