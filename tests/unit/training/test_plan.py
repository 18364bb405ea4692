"""Which sequences each step sees: every epoch complete, windows within their budget, the same every time."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_dflash.training.conversations import Conversation, opening_digest
from vllm_dflash.training.plan import (
    balanced_owners,
    epoch_steps,
    first_that_fit,
    keep_back,
    plan_windows,
    rows_by_rank,
    run_steps,
)
from vllm_dflash.training.tokenization import Example


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


def test_the_first_that_fit_are_as_many_as_the_fullest_rank_holds():
    sequences = apart({"a": 4, "b": 4, "c": 4, "d": 4})
    fit = {"block_size": 4}
    assert first_that_fit(sequences, max_rows=12, **fit) == ["a", "b", "c"]
    assert first_that_fit(sequences, max_rows=3, **fit) == ["a"]  # or nothing could be done
    owners = {"a": 0, "b": 1, "c": 0, "d": 0}
    assert first_that_fit(sequences, max_rows=8, owners=owners, **fit) == ["a", "b", "c"]
    assert first_that_fit({}, max_rows=8, **fit) == []


def logged(name, *texts):
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    return Conversation(name, tuple(messages), "log")


def held_names(conversations, share=0.2, most=1000):
    examples = [
        Example(f"{c.id}#{turn}", "log", (1, 2), (False, True))
        for c in conversations
        for turn in (0, 1)
    ]
    openings = {c.id: opening_digest(c) for c in conversations}
    train, held = keep_back(examples, openings, share, most, seed=0)
    assert sorted(e.id for e in (*train, *held)) == sorted(e.id for e in examples)
    return ({e.id.rsplit("#", 1)[0] for e in part} for part in (train, held))


def test_copies_and_requests_of_one_dialogue_are_not_on_both_sides():
    """A log has the same prompt many times, and a dialogue once for each of its requests."""
    rows = [logged(f"copy {i}", f"prompt {i % 50}") for i in range(200)]
    rows += [logged(f"long {i}", f"start {i % 20}", *["text"] * (2 * (i // 20))) for i in range(60)]
    dialogue = {c.id: c.messages[0]["content"] for c in rows}
    train, held = held_names(rows)
    assert 0 < len(held) <= 0.2 * len(rows)
    assert {dialogue[n] for n in train}.isdisjoint(dialogue[n] for n in held)


def test_long_dialogues_are_not_on_both_sides():
    """Ten, of which none has as few requests as are to be held out."""
    rows = [
        logged(f"{i} {n}", f"start {i}", *["text"] * (2 * n)) for i in range(10) for n in range(9)
    ]
    train, held = held_names(rows, share=0.05)
    assert len(held) == 9
    assert {n.split()[0] for n in train}.isdisjoint(n.split()[0] for n in held)


def test_where_all_begin_alike_conversations_are_held_out():
    train, held = held_names([logged(f"row {i}", "Hi", "Hello", f"text {i}") for i in range(50)])
    assert (len(train), len(held)) == (40, 10)
    train, held = held_names([logged("one", "Hi")])
    assert (len(train), len(held)) == (1, 0)


def test_balanced_owners_give_the_ranks_alike_to_do() -> None:
    rng = random.Random(0)
    work = {f"train/{i}": rng.randint(50, 512) for i in range(400)}

    def speedup(owners: dict[str, int], ranks: int) -> float:
        """Over one rank, where each step waits for the rank with most to do."""
        longest = 0
        for step in steps:
            loads = [0] * ranks
            for key in step:
                loads[owners[key]] += work[key]
            longest += max(loads)
        return sum(work[k] for step in steps for k in step) / longest

    for ranks, sequences, least in ((2, 8, 1.7), (4, 16, 3.2), (4, 32, 3.5)):
        steps = run_steps(list(work), sequences, 0, 6 * 400 // sequences)
        owners = balanced_owners(steps, work, ranks)
        assert owners.keys() == work.keys()
        assert set(owners.values()) == set(range(ranks))
        by_chance = {key: rng.randrange(ranks) for key in work}
        assert speedup(owners, ranks) > max(least, 1.1 * speedup(by_chance, ranks))
        assert owners == balanced_owners(steps, work, ranks)
    # One sequence a step: nothing to share, but each keeps its part of the features.
    steps = run_steps(list(work), 1, 0, 800)
    parts = Counter[int]()
    for key, rank in balanced_owners(steps, work, 4).items():
        parts[rank] += work[key]
    assert max(parts.values()) < 1.01 * sum(parts.values()) / 4
