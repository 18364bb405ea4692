"""Which sequences each step sees: every epoch complete, windows within their budget, the same every time."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_dflash.training.plan import epoch_steps, plan_windows, rows_by_rank


def apart(tokens: dict[str, int]) -> dict[str, list[int]]:
    """Sequences of so many rows that share nothing."""
    return {k: [i + 1000] * (n + 1) for i, (k, n) in enumerate(tokens.items())}


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
        apart(tokens),
        sequences_per_step=sequences,
        seed=seed,
        total_steps=total,
        max_rows=budget,
        block_size=4,
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
        apart(dict.fromkeys(keys, 3)),
        sequences_per_step=2,
        seed=0,
        total_steps=50,
        max_rows=30,
        block_size=4,
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
        windows = plan_windows(
            apart(tokens),
            sequences_per_step=1,
            seed=3,
            total_steps=total,
            max_rows=25,
            block_size=4,
        )
        return [s for w in windows for s in w.steps]

    assert steps(20)[:end] == steps(end)


def test_shared_rows_count_once_in_a_window():
    prompt = list(range(50))
    sequences = {f"k{i}": [*prompt, i, i, i, i] for i in range(10)}
    # 48 rows in whole blocks, and 5 more each.
    assert rows_by_rank(sequences, 4) == {0: 48 + 10 * 5}
    assert rows_by_rank(sequences, 100) == {0: 10 * 53}
    windows = plan_windows(
        sequences, sequences_per_step=2, seed=0, total_steps=9, max_rows=48 + 4 * 5, block_size=4
    )
    assert [len(w.steps) for w in windows[:4]] == [2, 2, 2, 2]
    for window in windows:
        assert rows_by_rank({k: sequences[k] for k in window.keys}, 4)[0] <= 48 + 4 * 5


def test_each_rank_keeps_the_prefixes_of_its_own_sequences():
    sequences = {f"k{i}": [*range(8), 50 + i, 60] for i in range(6)}
    owners = {k: i % 2 for i, k in enumerate(sequences)}
    assert rows_by_rank(sequences, 4, owners) == {0: 8 + 3, 1: 8 + 3}
