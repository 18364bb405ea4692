"""Two real processes over gloo, without an engine: what one rank cannot do, none has done."""

from __future__ import annotations

import math
import multiprocessing
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_learner import make_learner, make_sample, snapshot

from vllm_dflash.training.learner import Learner
from vllm_dflash.training.plan import owner, plan_windows, rows_by_rank
from vllm_dflash.training.ranks import Ranks
from vllm_dflash.training.session import TrainingSession

SIZE = 2


class Group:
    """What ``Ranks`` reads of vLLM's ``GroupCoordinator``."""

    def __init__(self, rank: int) -> None:
        self.world_size, self.rank_in_group = SIZE, rank
        self.cpu_group = torch.distributed.group.WORLD

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        torch.distributed.all_reduce(tensor)
        return tensor


def _worker(rank: int, store: str, name: str, answers: Any) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=SIZE
    )
    answers.put((rank, globals()[name](Ranks(Group(rank)))))


def on_two_ranks(name: str, tmp_path) -> list[Any]:
    """The answers of a function of this module, which each process calls with its ``Ranks``."""
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    workers = [
        context.Process(
            target=_worker, args=(r, str(tmp_path / "store"), name, answers), daemon=True
        )
        for r in range(SIZE)
    ]
    for worker in workers:
        worker.start()
    got = sorted(answers.get(timeout=120) for _ in workers)
    for worker in workers:
        worker.join(timeout=120)
    assert [w.exitcode for w in workers] == [0, 0]
    return [answer for _, answer in got]


def outcome(ranks: Ranks, work: Any) -> str:
    try:
        with ranks.together():
            work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "done"


def _failures(ranks: Ranks) -> list[str]:
    def fail(rank: int, error: Exception, collectives: int) -> None:
        """One rank fails, the others have collectives ahead of them."""
        for i in range(3):
            if i == collectives and ranks.rank == rank:
                raise error
            ranks.sum([torch.ones(2)])

    out = [
        outcome(ranks, lambda r=r, n=n: fail(r, ValueError("a bad value"), n))
        for r in range(SIZE)
        for n in range(3)
    ]
    out.append(outcome(ranks, lambda: fail(1, KeyError("x"), 1)))

    def both() -> None:
        raise ValueError("both")

    out.append(outcome(ranks, both))

    def at_the_end() -> None:
        if ranks.rank == 0:
            raise OSError("disk full")

    out.append(outcome(ranks, at_the_end))
    total = torch.tensor([1.0 + ranks.rank])
    out.append(outcome(ranks, lambda: ranks.sum([total])))
    return [*out, str(total.tolist()), str(ranks.gather(ranks.rank))]


def test_an_error_of_one_rank_is_one_of_all(tmp_path) -> None:
    first, second = on_two_ranks("_failures", tmp_path)
    value = ["ValueError: a bad value"] * 6
    end = ["ValueError: both"]
    assert first == [
        *value,
        "RuntimeError: rank 1 failed with KeyError: 'x'",
        *end,
        "OSError: disk full",
        "done", "[3.0]", "[0, 1]",
    ]  # fmt: skip
    assert second == [
        *value,
        "KeyError: 'x'",
        *end,
        "RuntimeError: rank 0 failed with OSError: disk full",
        "done", "[3.0]", "[0, 1]",
    ]  # fmt: skip


def _learner(ranks: Ranks | None, **hparams: Any) -> Learner:
    learner = make_learner(**hparams)
    learner.ranks = ranks or Ranks()
    return learner


#: Samples of each step by rank: balanced, lopsided, only the second rank's, none.
PARTS = [([1, 2], [3]), ([4], [5, 6, 7]), ([], [8]), ([], [])]


def _steps(ranks: Ranks) -> Any:
    out = []
    for hparams in ({}, {"loss": "kl", "optimizer": "muon", "ema": 0.9, "clip": 0.01}):
        learner = _learner(ranks, **hparams)
        rows = [
            learner.step(i, [make_sample(s, final=True) for s in part[ranks.rank]])
            for i, part in enumerate(PARTS)
        ]
        out.append((rows, {n: p.tolist() for n, p in snapshot(learner).items()}))
    return out


def test_steps_of_two_ranks_equal_those_of_one(tmp_path) -> None:
    answers = on_two_ranks("_steps", tmp_path)
    assert answers[0] == answers[1]
    for hparams, (rows, weights) in zip(
        ({}, {"loss": "kl", "optimizer": "muon", "ema": 0.9, "clip": 0.01}), answers[0], strict=True
    ):
        alone = _learner(None, **hparams)
        start = snapshot(alone)
        want = [
            alone.step(i, [make_sample(s, final=True) for part in parts for s in part])
            for i, parts in enumerate(PARTS)
        ]
        for row, expected in zip(rows, want, strict=True):
            assert row.keys() == expected.keys()
            for key, value in expected.items():
                assert row[key] == pytest.approx(value, rel=1e-5), key
        for name, value in snapshot(alone).items():
            # Summed in another order; the optimizer makes the difference larger where gradients are small.
            moved = float((value - start[name]).abs().max())
            torch.testing.assert_close(
                torch.tensor(weights[name]), value, rtol=0, atol=0.02 * moved
            )


def _bad(ranks: Ranks) -> Any:
    learner = _learner(ranks)
    learner.step(0, [make_sample(1 + ranks.rank)])
    before = snapshot(learner)
    sample = make_sample(3 + ranks.rank)
    if ranks.rank == 1:
        sample = replace(sample, features_TF=sample.features_TF * math.inf)
    row = learner.step(1, [sample])
    same = all(torch.equal(v, before[n]) for n, v in snapshot(learner).items())
    again = learner.step(2, [make_sample(5 + ranks.rank)])
    return row["bad"], same, again["bad"], {n: v.tolist() for n, v in snapshot(learner).items()}


def test_a_step_that_is_bad_on_one_rank_is_skipped_on_all(tmp_path) -> None:
    first, second = on_two_ranks("_bad", tmp_path)
    assert first == second
    assert first[:3] == (["s4"], True, [])


def _drift(ranks: Ranks) -> list[str]:
    session = TrainingSession.__new__(TrainingSession)
    session.ranks, session.learner = ranks, _learner(ranks)
    out = [outcome(ranks, session._check_ranks)]
    if ranks.rank == 1:
        with torch.no_grad():
            session.learner.drafter.norm.weight[0].nextafter_(torch.tensor(2.0))
    out.append(outcome(ranks, session._check_ranks))
    return out


def test_weights_that_drift_apart_are_noticed(tmp_path) -> None:
    for same, differ in on_two_ranks("_drift", tmp_path):
        assert same == "done"
        assert differ.startswith("RuntimeError: the drafter's weights differ between ranks")


def test_owners_share_the_sequences_and_windows_fit_every_rank() -> None:
    ids = {f"k{i}": [i, i + 1, i * i, *range(8)] for i in range(200)}
    owners = {k: owner(t, 4) for k, t in ids.items()}
    held = rows_by_rank(ids, 16, owners)
    assert sorted(held) == [0, 1, 2, 3]
    assert max(held.values()) < 2 * min(held.values())
    assert {owner(t, 1) for t in ids.values()} == {0}
    windows = plan_windows(
        ids,
        sequences_per_step=3,
        seed=0,
        total_steps=150,
        max_rows=100,
        block_size=16,
        owners=owners,
    )
    assert len(windows) > 1
    for window in windows:
        kept = rows_by_rank({k: ids[k] for k in window.keys}, 16, owners)
        assert max(kept.values()) <= 100
        assert sum(kept.values()) > 100 or window is windows[-1]
