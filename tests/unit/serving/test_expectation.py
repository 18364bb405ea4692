"""What a drafter's training measured beside what a server accepts: reading it, showing it, warning once."""

from __future__ import annotations

import json
import logging
import os
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from helpers.acceptance import drafts_of
from vllm_dflash.draft_length.cost import StepCost
from vllm_dflash.draft_length.scheduler_policy import SchedulerPolicy
from vllm_dflash.modeling.acceptance import Acceptance, full_length_tau, rates
from vllm_dflash.serving import expectation
from vllm_dflash.serving.draft_stats import DraftStats, figures
from vllm_dflash.serving.expectation import AcceptanceWatch, read_expectation
from vllm_dflash.serving.frontend.metrics import AcceptanceCollector

RATES = [0.8, 0.7, 0.6]


def held_out(curve: list[float], drafts: int = 1000, **sources: Any) -> dict[str, Any]:
    return {
        "tau": 2.0,
        "num_drafts": drafts,
        "conditional_rates": curve,
        "sources": {
            name: {"num_drafts": n, "conditional_rates": c} for name, (c, n) in sources.items()
        },
    }


def write(folder: Path, training: Any) -> str:
    (folder / "dflash_training.json").write_text(
        training if isinstance(training, str) else json.dumps(training)
    )
    return str(folder)


@pytest.fixture
def warnings(caplog, monkeypatch):
    monkeypatch.setattr(expectation.logger, "propagate", True)
    caplog.set_level(logging.WARNING, expectation.logger.name)
    return lambda: [r.getMessage() for r in caplog.records]


def test_expected_tau_is_that_of_as_many_tokens_as_are_served(tmp_path) -> None:
    held = held_out(RATES, code=([0.9, 0.9, 0.9], 500), chat=([0.3, 0.2, 0.1], 400), odd=([0.0], 3))
    drafter = write(tmp_path, {"tau_heldout": held})
    got = read_expectation(drafter, None, 2)
    assert got.taus == pytest.approx(
        {"all": 1 + 0.8 + 0.56, "code": 1 + 0.9 + 0.81, "chat": 1 + 0.3 + 0.06, "odd": 1.0}
    )
    assert next(iter(got.taus)) == "all"
    # Three drafts say nothing.
    assert got.lowest == pytest.approx(got.taus["chat"])
    longer = read_expectation(drafter, None, 7)
    assert longer.taus["all"] == pytest.approx(1 + 0.8 + 0.56 + 0.336)


def test_older_files_have_shares_of_drafts_only(tmp_path) -> None:
    held = {"tau": 2.3, "num_drafts": 50, "position_rates": [0.8, 0.4, 0.1], "sources": {}}
    got = read_expectation(write(tmp_path, {"tau_heldout": held}), None, 3)
    assert got.taus == pytest.approx({"all": 2.3})


def test_nothing_to_expect_is_no_word(tmp_path, warnings, monkeypatch) -> None:
    assert read_expectation(str(tmp_path), None, 3) is None
    write(tmp_path, {"tau_heldout": None, "steps": 5})
    assert read_expectation(str(tmp_path), None, 3) is None
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("org/never-downloaded", "s3://bucket/drafter", "a b", "/no/such/folder"):
        assert read_expectation(name, None, 3) is None
    assert warnings() == []


def test_the_hubs_cache_is_looked_at(tmp_path, monkeypatch) -> None:
    snapshot = tmp_path / "models--org--drafter" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    write(snapshot, {"tau_heldout": held_out(RATES)})
    (tmp_path / "models--org--drafter" / "refs").mkdir()
    (tmp_path / "models--org--drafter" / "refs" / "main").write_text("abc")
    import huggingface_hub

    look = huggingface_hub.try_to_load_from_cache
    monkeypatch.setattr(
        huggingface_hub,
        "try_to_load_from_cache",
        lambda *args, **kwargs: look(*args, **kwargs, cache_dir=tmp_path),
    )
    for revision in (None, "abc"):
        assert read_expectation("org/drafter", revision, 3).taus["all"] > 2
    assert read_expectation("org/drafter", "other", 3) is None


@pytest.mark.parametrize(
    "training",
    [
        "{",
        "[" * 100_000,
        "\0",
        {"tau_heldout": 3},
        {"tau_heldout": {}},
        {"tau_heldout": {"conditional_rates": [2.0], "num_drafts": 1}},
        {"tau_heldout": {"conditional_rates": ["x"], "num_drafts": 1}},
        {"tau_heldout": {"conditional_rates": [0.5], "num_drafts": "many"}},
        {"tau_heldout": {"position_rates": [None], "num_drafts": 1}},
        {"tau_heldout": held_out(RATES) | {"sources": [1]}},
        {"tau_heldout": held_out(RATES) | {"sources": {"a": None}}},
    ],
)
def test_a_broken_file_is_said_and_does_no_harm(tmp_path, warnings, training) -> None:
    assert read_expectation(write(tmp_path, training), None, 3) is None
    (text,) = warnings()
    assert "dflash_training.json cannot be read" in text
    assert len(text) < 400 + len(str(tmp_path))


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["sources", "conditional_rates", "position_rates", "num_drafts", "tau"]
            ),
            inner,
        )
    ),
    max_leaves=12,
)


@given(JSON)
@settings(max_examples=300)
def test_any_file_is_read_or_not(tmp_path_factory, held) -> None:
    folder = tmp_path_factory.mktemp("any")
    got = read_expectation(write(folder, {"tau_heldout": held}), None, 3)
    assert got is None or 1 <= got.lowest <= got.taus["all"] <= 4


def test_only_what_is_far_below_for_sure_is_told_and_once(tmp_path, warnings) -> None:
    drafter = write(tmp_path, {"tau_heldout": held_out(RATES, low=([0.5, 0.4, 0.3], 300))})
    expected = read_expectation(drafter, None, 3)
    rng = random.Random(0)
    # As expected of the lowest source, and somewhat below: never a word.
    for curve in ([0.5, 0.4, 0.3], [0.45, 0.35, 0.3]):
        watch = AcceptanceWatch(expected)
        for count in (100, 500, 2000, 50_000):
            watch.look(*drafts_of(curve, count, rng))
    assert warnings() == []
    # Far below, but few drafts.
    watch = AcceptanceWatch(expected)
    watch.look(*drafts_of([0.05, 0.1, 0.1], 499, rng))
    assert warnings() == []
    for count in (2000, 4000, 100_000):
        watch.look(*drafts_of([0.05, 0.1, 0.1], count, rng))
    (text,) = warnings()
    for part in (
        drafter,
        "acceptance length 1.0",
        "over 2000 drafts",
        "expected 2.70 all, 1.76 low",
    ):
        assert part in text
    for cause in (
        "Traffic unlike its training data",
        "chat template",
        "quantised",
        "mask_embedding",
    ):
        assert cause in text


def test_without_an_expectation_nothing_is_said(warnings) -> None:
    AcceptanceWatch(None).look([10_000, 0], [0, 0])
    assert warnings() == []


# -- what is served ------------------------------------------------------------------------------


def step(drafts: int, length: int, per_pos: list[int]) -> SimpleNamespace:
    return SimpleNamespace(
        num_drafts=drafts, num_draft_tokens=drafts * length, num_accepted_tokens_per_pos=per_pos
    )


def samples(collector) -> dict[str, float]:
    registry = CollectorRegistry()
    registry.register(collector)
    return {
        f"{s.name}{'/' + s.labels['source'] if 'source' in s.labels else ''}": s.value
        for m in registry.collect()
        for s in m.samples
    }


def test_shown_beside_each_other(tmp_path, warnings) -> None:
    """Drafts of one length and of two: the positions tell what whole drafts would give."""
    drafter = write(tmp_path, {"tau_heldout": held_out(RATES, a=(RATES, 10))})
    expected = read_expectation(drafter, None, 3)
    made = AcceptanceCollector(["model_name"], {0: ["m"]}, drafter, 3, {}, expected)
    assert set(samples(made)) == {
        "vllm_dflash:expected_acceptance_length/all",
        "vllm_dflash:expected_acceptance_length/a",
    }
    made.observe(step(0, 3, [0, 0, 0]), 0)
    made.observe(step(10, 3, [8, 4, 1]), 0)
    got = samples(made)
    assert got["vllm_dflash:drafter_acceptance_length"] == pytest.approx(1 + 1.3)
    assert got["vllm_dflash:expected_acceptance_length/all"] == pytest.approx(expected.taus["all"])
    # Steps with drafts of one token: only the first position learns from them.
    made.observe(step(10, 1, [4, 0, 0]), 0)
    got = samples(made)["vllm_dflash:drafter_acceptance_length"]
    assert got == pytest.approx(full_length_tau([12 / 20, 4 / 8, 1 / 4]))
    for _ in range(100):
        made.observe(step(10, 3, [0, 0, 0]), 0)
    assert len(warnings()) == 1


def test_where_lengths_are_chosen_the_workers_counts_are_shown(tmp_path, warnings) -> None:
    """vLLM's counters hold prompt lookup's drafts, too."""
    drafter = write(tmp_path, {"tau_heldout": held_out([0.9, 0.9])})
    file = tmp_path / "stats.json"
    expected = read_expectation(drafter, None, 2)
    made = AcceptanceCollector(["model_name"], {0: ["m"]}, drafter, 2, {0: file}, expected)
    file.write_text(json.dumps({"compared": [100, 40], "right": [40, 30]}))
    for _ in range(100):
        made.observe(step(10, 2, [0, 0]), 0)
    got = samples(made)["vllm_dflash:drafter_acceptance_length"]
    assert got == pytest.approx(1 + 0.4 + 0.4 * 0.75)
    assert warnings() == []  # that is the worker's to say


def test_the_worker_says_it(tmp_path, warnings) -> None:
    expected = read_expectation(write(tmp_path, {"tau_heldout": held_out([0.9] * 4)}), None, 4)
    policy = SchedulerPolicy(StepCost([1, 64], [1.0, 2.0], draft=(0.1, 0.0)), 4)
    stats = DraftStats(None, AcceptanceWatch(expected))
    rng = random.Random(3)
    want = Acceptance()
    for i in range(3000):
        # Lengths by chance, all accepted up to the first wrong one.
        length = rng.randint(0, 4)
        right = [rng.random() < 0.1 for _ in range(length)]
        accepted = right.index(False) if False in right else length
        policy.observe([f"r{i % 50}"], [length], [accepted], [0.2])
        if length:
            policy.count(1, length, accepted)
        want.add_compared(right, 4)
        stats.update(policy.counters)
    assert len(warnings()) == 1
    told = figures(policy.counters)
    assert told["compared"] == want.compared_per_position
    assert told["right"] == want.right_per_position
    assert full_length_tau(rates(told["compared"], told["right"])) == pytest.approx(1.11, abs=0.03)
    assert told["drafts"]["drafter"] == told["compared"][0]
    assert os.listdir(tmp_path) == ["dflash_training.json"]
