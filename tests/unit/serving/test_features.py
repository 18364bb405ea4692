"""Recording features per request, whatever the scheduler makes of the batches."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_dflash.serving.worker.features.recorder import (
    BrokenFeatures,
    FeatureRecorder,
    check_features,
)
from vllm_dflash.serving.worker.features.verifier import FinalStates

WIDTH = 3


def feature(key: str, position: int, width: int = WIDTH) -> list[float]:
    """What the verifier computes at a position of a request."""
    return [ord(key[0]) + position / 8 + i / 64 for i in range(width)]


def rows_of(key: str, length: int, width: int = WIDTH) -> torch.Tensor:
    return torch.tensor([feature(key, p, width) for p in range(length)])


def step(
    recorder,
    *parts,
    suffix: str = "-0a1b2c3d",
    rejected=None,
    padding: int = 0,
    known: bool = False,
) -> None:
    """One verifier step: parts are (key, first position, number of rows).

    Where positions are ``known`` on the CPU those on the device are not to be read.
    """
    starts, positions, features = [0], [], []
    num_rejected = rejected or [0] * len(parts)
    for (key, first, count), bad in zip(parts, num_rejected, strict=True):
        positions += range(first, first + count)
        features += [feature(key, p) for p in range(first, first + count - bad)]
        features += [[-1.0] * WIDTH] * bad  # rejected drafts have features, of tokens never kept
        starts.append(starts[-1] + count)
    features += [[float("nan")] * WIDTH] * padding
    recorder.observe(
        request_ids=[key + suffix for key, _, _ in parts],
        query_start_loc=torch.tensor(starts, dtype=torch.int32),
        positions=torch.tensor([-1] * len(features) if known else positions + [0] * padding),
        features_TF=torch.tensor(features),
        num_rejected=None if rejected is None else torch.tensor(rejected, dtype=torch.int32),
        num_computed=np.array([first for _, first, _ in parts]) if known else None,
    )


def watching(**lengths: int) -> FeatureRecorder:
    recorder = FeatureRecorder()
    recorder.watch(lengths)
    return recorder


def assert_recorded(recorder, key: str, length: int) -> None:
    features, final = recorder.take(key)
    assert torch.equal(features, rows_of(key, length))
    assert final is None


def test_one_prefill():
    recorder = watching(a=5)
    step(recorder, ("a", 0, 5), padding=3)
    assert_recorded(recorder, "a", 5)


def test_chunks_of_interleaved_requests():
    recorder = watching(a=7, b=4, c=2)
    step(recorder, ("a", 0, 3), ("other", 0, 6))
    step(recorder, ("b", 0, 2), ("a", 3, 3), ("c", 0, 2))
    step(recorder, ("other", 6, 1), ("a", 6, 1), ("b", 2, 2))
    for key, length in (("c", 2), ("a", 7), ("b", 4)):
        assert_recorded(recorder, key, length)


def test_nothing_waits_for_the_device():
    """Tensors without data, whose values nobody can ask for; rows beyond the watched are left out."""
    recorder = watching(a=3, b=2)
    recorder.final_states = SimpleNamespace(last=torch.empty(6, 2, device="meta"))
    for first in (0, 2):
        recorder.observe(
            ["a-0a1b2c3d", "other", "b"],
            np.array([0, 2, 4, 6]),
            torch.empty(6, dtype=torch.int64, device="meta"),
            torch.empty(6, WIDTH, device="meta"),
            None,
            np.array([first, 7, first]),
        )
    assert all(filled.all() for filled in recorder._filled.values())
    assert recorder._finals["a"].shape == (3, 2)


def test_preemption_and_recomputation():
    recorder = watching(a=6)
    step(recorder, ("a", 0, 4))
    step(recorder, ("a", 0, 3))  # preempted, starts anew in other chunks
    step(recorder, ("a", 3, 3))
    assert_recorded(recorder, "a", 6)


def test_decoding_with_rejected_drafts():
    recorder = watching(a=8, b=4)
    step(recorder, ("a", 0, 3), ("b", 0, 2), rejected=[0, 0])
    step(recorder, ("a", 3, 4), ("b", 2, 4), rejected=[2, 4 - 1])  # a keeps 3, 4; b keeps 2
    step(recorder, ("b", 3, 1), ("a", 5, 4), rejected=[0, 0])  # a goes beyond what is watched
    assert_recorded(recorder, "a", 8)
    assert_recorded(recorder, "b", 4)


def test_all_rows_rejected():
    recorder = watching(a=2)
    step(recorder, ("a", 0, 2), rejected=[2])
    with pytest.raises(ValueError, match="no features"):
        recorder.take("a")


@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 12))
@settings(max_examples=60)
def test_any_schedule(seed, num_requests, longest):
    rng = random.Random(seed)
    keys = "abcd"[:num_requests]
    lengths = {k: rng.randint(2, longest + 1) for k in keys}
    recorder = watching(**lengths)
    done = dict.fromkeys(keys, 0)
    while any(done[k] < lengths[k] for k in keys):
        running = [k for k in keys if rng.random() < 0.7] or list(keys)
        rng.shuffle(running)
        parts, rejected = [], []
        for k in running:
            if rng.random() < 0.1:
                done[k] = 0
            count = rng.randint(1, 5)
            parts.append((k, done[k], count))
            rejected.append(rng.randint(0, count - 1))
            done[k] += count - rejected[-1]
        padding, known = rng.randint(0, 2), rng.random() < 0.5
        step(recorder, *parts, rejected=rejected, padding=padding, known=known)
    for k in keys:
        assert_recorded(recorder, k, lengths[k])


# ---- request ids ----


@pytest.mark.parametrize("suffix", ["-0a1b2c3d", ""])
def test_ids_with_and_without_vllms_suffix(suffix):
    recorder = watching(a=2)
    step(recorder, ("a", 0, 2), suffix=suffix)
    assert_recorded(recorder, "a", 2)


def test_other_requests_are_not_taken_for_watched_ones():
    recorder = watching(a=2)
    for suffix in ("-0a1b2c3", "-0a1b2c3d4", "x0a1b2c3d", "-0a1b2c3d-0a1b2c3d", "b"):
        step(recorder, ("a", 0, 2), suffix=suffix)
    with pytest.raises(ValueError, match="no features were recorded for a"):
        recorder.take("a")


def test_keys_that_end_in_something_like_the_suffix():
    recorder = FeatureRecorder()
    recorder.watch({"a-00000000": 2, "a": 3})
    step(recorder, ("a-00000000", 0, 2))
    step(recorder, ("a", 0, 3), suffix="-11111111")
    assert torch.equal(recorder.take("a-00000000")[0], rows_of("a", 2))
    assert torch.equal(recorder.take("a")[0], rows_of("a", 3))


# ---- taking ----


@pytest.mark.parametrize("missing", [0, 2, 4])
def test_missing_rows(missing):
    recorder = watching(a=5)
    for position in range(5):
        if position != missing:
            step(recorder, ("a", position, 1))
    with pytest.raises(ValueError, match="1 of 5 feature rows of a were not recorded"):
        recorder.take("a")


def test_requests_that_ended_early():
    recorder = watching(a=9, b=9)
    step(recorder, ("a", 0, 4), ("b", 0, 4))
    assert torch.equal(recorder.take("a", 4)[0], rows_of("a", 4))
    with pytest.raises(ValueError, match="1 of 5 feature rows of b"):
        recorder.take("b", 5)


def test_more_rows_wanted_than_watched():
    recorder = watching(a=3)
    step(recorder, ("a", 0, 5))
    with pytest.raises(ValueError, match="5 feature rows of a wanted, 3 were watched"):
        recorder.take("a", 5)


def test_taken_requests_are_forgotten():
    recorder = watching(a=3, b=3)
    step(recorder, ("a", 0, 3))
    recorder.take("a")
    with pytest.raises(ValueError, match="no features"):
        recorder.take("b")
    for key in ("a", "b"):
        step(recorder, (key, 0, 3))
        with pytest.raises(ValueError, match=f"no features were recorded for {key}"):
            recorder.take(key)
    recorder.watch({"a": 2})
    step(recorder, ("a", 0, 2))
    assert_recorded(recorder, "a", 2)


def test_clear():
    recorder = watching(a=3)
    step(recorder, ("a", 0, 3))
    recorder.clear()
    step(recorder, ("a", 0, 3))
    with pytest.raises(ValueError, match="no features"):
        recorder.take("a")


def test_recorded_rows_are_copies():
    recorder, features = watching(a=2), rows_of("a", 2)
    recorder.observe(["a"], np.array([0, 2]), torch.arange(2), features, None)
    features.zero_()  # vLLM reuses its buffers
    assert_recorded(recorder, "a", 2)


def test_positions_of_mrope_and_numpy_offsets():
    recorder = watching(a=3)
    positions = torch.stack((torch.arange(3), torch.zeros(3), torch.zeros(3))).long()
    recorder.observe(["a"], np.array([0, 3], dtype=np.int32), positions, rows_of("a", 3), None)
    assert_recorded(recorder, "a", 3)


def test_dtype_is_the_verifiers():
    recorder = watching(a=3)
    recorder.observe(["a"], np.array([0, 3]), torch.arange(3), rows_of("a", 3).bfloat16(), None)
    assert recorder.take("a")[0].dtype == torch.bfloat16


# ---- final states ----


def test_final_states_follow_the_features():
    class Runner:
        execute_model_state = None

        def execute_model(self, x):
            self.execute_model_state = None if x is None else SimpleNamespace(hidden_states=x)
            return "output"

    runner = Runner()
    recorder = watching(a=4, b=2)
    recorder.final_states = FinalStates(runner)
    for parts in ([("a", 0, 2), ("b", 0, 2)], [("a", 2, 3)]):
        rows = [feature(k, p, 2) for k, first, n in parts for p in range(first, first + n)]
        padding = [[9.0, 9.0]]  # of a CUDA graph larger than the batch
        assert runner.execute_model(torch.tensor(rows + padding)) == "output"
        step(recorder, *parts)
    for key, length in (("a", 4), ("b", 2)):
        features, final = recorder.take(key)
        assert torch.equal(features, rows_of(key, length))
        assert torch.equal(final, rows_of(key, length, width=2))
    runner.execute_model(None)  # nothing was scheduled
    assert recorder.final_states.last is None


def test_final_states_are_cut_with_the_features():
    recorder = watching(a=6)
    recorder.final_states = SimpleNamespace(last=rows_of("a", 4, width=2))
    step(recorder, ("a", 0, 4))
    assert torch.equal(recorder.take("a", 4)[1], rows_of("a", 4, width=2))


def test_rows_of_a_cached_prefix_may_be_missing():
    recorder = watching(a=6, b=6)
    recorder.final_states = SimpleNamespace(last=torch.cat([rows_of("a", 6, 2)[3:]] * 2))
    step(recorder, ("a", 3, 3), ("b", 3, 3))
    features, final = recorder.take("a", 6, start=4)
    assert torch.equal(features, rows_of("a", 6)[4:])
    assert torch.equal(final, rows_of("a", 6, width=2)[4:])
    with pytest.raises(ValueError, match="1 of 4 feature rows of b were not recorded"):
        recorder.take("b", 6, start=2)


def test_tokens_are_those_of_the_rows_wanted():
    tokens = [1, 2, 3, 4, 5, 6, 7, 7, 7, 7, 7, 7]
    recorder = watching(a=12)
    recorder.observe(["a"], np.array([0, 12]), torch.arange(12), torch.ones(12, WIDTH), None)
    # One token behind row 6: its states may be equal.
    features, _ = recorder.take("a", 12, token_ids=tokens, start=6)
    assert len(features) == 6


# ---- features that cannot be real ----


LAYERS = (1, 9, 17)


def good(length: int = 40, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Features of three layers of 16."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(length, 3 * 16, generator=generator).to(dtype)


def columns(layer: int) -> slice:
    return slice(LAYERS.index(layer) * 16, LAYERS.index(layer) * 16 + 16)


def zero_layer(x):
    x[:, columns(9)] = 0


def zero_rows(x):
    x[30:, columns(17)] = 0


def one_zero_row(x):
    x[8, columns(1)] = 0


def constant_layer(x):
    x[:, columns(9)] = x[0, columns(9)]


def constant_run(x):
    x[20:28, columns(17)] = 0.5


def chunk_twice(x):
    x[16:32, columns(9)] = x[:16, columns(9)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (zero_layer, "^zero behind verifier layer 9 \\(40 of 40 rows"),
        (zero_rows, "^zero behind verifier layer 17 \\(10 of 40 rows, 30 to 39"),
        (one_zero_row, "^zero behind verifier layer 1 \\(1 of 40 rows, 8 to 8"),
        (constant_layer, "^the same at every position behind verifier layer 9$"),
        (
            constant_run,
            "^repeated behind verifier layer 17 .7 of 40 rows, 21 to 27.: row 21 is row 20",
        ),
        (
            chunk_twice,
            "^repeated behind verifier layer 9 .16 of 40 rows, 16 to 31.: row 16 is row 0",
        ),
    ],
)
def test_broken_features(fault, message, dtype):
    features = good(dtype=dtype)
    check_features(features, LAYERS, range(40))
    fault(features)
    with pytest.raises(BrokenFeatures, match=message):
        check_features(features, LAYERS, range(40))


def test_states_of_equal_tokens_may_be_equal():
    features = good()
    features[1:12, columns(1)] = features[0, columns(1)]  # a prompt that repeats one token
    features[24:32, columns(1)] = features[
        32:40, columns(1)
    ]  # a phrase twice, behind a convolution
    tokens = [7] * 12 + list(range(100, 120)) + list(range(112, 120))
    check_features(features, LAYERS, tokens)
    check_features(features[:12, columns(1)], (1,), tokens)
    features[33, columns(1)] = features[0, columns(1)]  # two tokens with one embedding
    check_features(features, LAYERS, tokens)


def test_a_first_token_without_embedding():
    features = good()
    features[0] = 0
    check_features(features, LAYERS, range(40))


def test_short_sequences():
    for length in (1, 2):
        check_features(torch.ones(length, 3))
    with pytest.raises(BrokenFeatures, match=r"^the same at every position$"):
        check_features(torch.ones(4, 3))
    with pytest.raises(BrokenFeatures, match=r"^zero"):
        check_features(torch.zeros(1, 3))


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_features_that_are_not_finite_fail_their_sequence_only(value):
    features = good()
    features[3, 20] = value
    with pytest.raises(
        ValueError, match=r"^not finite behind verifier layer 9 .1 of 40 rows"
    ) as caught:
        check_features(features, LAYERS, range(40))
    assert not isinstance(caught.value, BrokenFeatures)


@pytest.mark.parametrize("value", [0.0, 7.0, float("nan")])
def test_unreal_features_are_not_handed_over(value):
    recorder = watching(a=4)
    recorder.observe(["a"], np.array([0, 4]), torch.arange(4), torch.full((4, 3), value), None)
    with pytest.raises(ValueError, match="features of a are"):
        recorder.take("a")
