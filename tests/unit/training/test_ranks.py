"""Two real processes over gloo, without an engine: what one rank cannot do, none has done."""

from __future__ import annotations

import math
import multiprocessing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_learner import CONFIG, HPARAMS, make_learner, make_sample, snapshot

from vllm_dflash.training import ranks as module
from vllm_dflash.training.config import StepLayout
from vllm_dflash.training.learner import Learner
from vllm_dflash.training.memory import learner_memory
from vllm_dflash.training.plan import owner, plan_windows, rows_by_rank
from vllm_dflash.training.ranks import Ranks, checksum
from vllm_dflash.training.session import TrainingSession
from vllm_dflash.training.sharding import shards
from vllm_dflash.training.trainer import save_pause

SIZE = 2


class Group:
    """What ``Ranks`` reads of vLLM's ``GroupCoordinator``."""

    def __init__(self, rank: int, folder: Path) -> None:
        self.sizes: list[int] = []
        self.folder = folder  # of the test
        self.world_size, self.rank_in_group = SIZE, rank
        self.cpu_group = torch.distributed.group.WORLD

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        self.sizes.append(tensor.numel())
        torch.distributed.all_reduce(tensor)
        return tensor

    def broadcast(self, tensor: torch.Tensor, src: int) -> torch.Tensor:
        self.sizes.append(tensor.numel())
        torch.distributed.broadcast(tensor, src)
        return tensor


def _worker(rank: int, store: str, name: str, answers: Any) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=SIZE
    )
    answers.put((rank, globals()[name](Ranks(Group(rank, Path(store).parent)))))


def on_two_ranks(name: str, tmp_path) -> list[Any]:
    """The answers of a function of this module, which each process calls with its ``Ranks``."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vllm_dflash.training.session"])  # torch and vLLM, once
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


def _sums(ranks: Ranks) -> Any:
    """Sums in buckets of 10 fp32 elements, those by themselves, and how many elements went at once."""
    module._BUCKET_BYTES = 40
    generator = torch.Generator().manual_seed(ranks.rank)
    shapes = [(3, 2), (), (3,), (4, 4), (2, 5), (1,), (0,), (2,)]
    made = [torch.randn(s, generator=generator) * 10.0**i for i, s in enumerate(shapes)]
    made.append(torch.arange(4) + ranks.rank)
    made.append(torch.randn(3, 4, generator=generator).t())  # gradients need not be contiguous
    together = [t.clone() for t in made]
    ranks._group.sizes.clear()
    ranks.sum(together)
    sizes = list(ranks._group.sizes)
    for tensor in made:
        torch.distributed.all_reduce(whole := tensor.contiguous())
        tensor.copy_(whole)
    return sizes, all(map(torch.equal, together, made)), [t.tolist() for t in together]


def test_sums_in_buckets_equal_those_one_by_one(tmp_path) -> None:
    first, second = on_two_ranks("_sums", tmp_path)
    assert first == second
    sizes, equal, _ = first
    assert sizes == [10, 16, 10, 3, 4, 12]
    assert equal


def test_checksum_sees_every_bit_and_place() -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(300, generator=generator),
        torch.randn(7, 5, generator=generator).bfloat16().t(),
        torch.randint(0, 9, (40,), generator=generator),
    ]
    seen = {checksum(tensors)}

    def new(changed: list[torch.Tensor]) -> None:
        got = checksum(changed)
        assert got not in seen
        seen.add(got)

    for i in (0, 1, 128, 299):
        for bit in (0, 13, 31):
            flipped = tensors[0].clone()
            flipped.view(torch.int32)[i] ^= torch.tensor(-(2**31) if bit == 31 else 1 << bit).int()
            new([flipped, *tensors[1:]])
    new([tensors[0].flip(0), *tensors[1:]])
    new([tensors[1], tensors[0], tensors[2]])
    new([tensors[0], tensors[1].t(), tensors[2]])
    new([*tensors, torch.ones(1)])
    assert checksum([*tensors, tensors[0], torch.empty(0)]) == checksum(tensors)
    assert checksum(t.clone() for t in tensors) == checksum(tensors)
    assert checksum([]) == "0" * 16


def test_checksum_of_many_chunks(monkeypatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", 64)
    x = torch.arange(1000.0)
    moved = x.clone()
    moved[64:128], moved[128:192] = x[128:192], x[64:128]
    assert checksum([x]) != checksum([moved])
    assert checksum([x.clone()]) == checksum([x])


def _learner(ranks: Ranks | None, **hparams: Any) -> Learner:
    return make_learner(ranks=ranks, **hparams)


#: Samples of each step by rank: balanced, lopsided, only the second rank's, none.
PARTS = [([1, 2], [3]), ([4], [5, 6, 7]), ([], [8]), ([], [])]


def _steps(ranks: Ranks) -> Any:
    out = []
    for hparams in (
        {},
        {"loss": "kl", "optimizer": "muon", "ema_decay": 0.9, "max_grad_norm": 0.01},
    ):
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
        ({}, {"loss": "kl", "optimizer": "muon", "ema_decay": 0.9, "max_grad_norm": 0.01}),
        answers[0],
        strict=True,
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


#: Every optimizer and its extras, clipped.
SHARDED: tuple[dict[str, Any], ...] = (
    {"max_grad_norm": 0.01, "weight_decay": 0.1},
    {"optimizer": "muon", "ema_decay": 0.9, "max_grad_norm": 0.01},
)


def _train(learner: Learner, steps: range) -> list[Any]:
    rank = learner.ranks.rank
    return [learner.step(i, [make_sample(s) for s in PARTS[i % len(PARTS)][rank]]) for i in steps]


def _digest(learner: Learner) -> str:
    return checksum((*snapshot(learner).values(), *learner.weights().values()))


def _sharded(ranks: Ranks) -> Any:
    return _same_bits(ranks), _resumed(ranks)


def _same_bits(ranks: Ranks) -> Any:
    """Figures, weights and the parameters with state: sharded, then each rank with all of it."""
    out = []
    for hparams in SHARDED:
        sharded, whole = _learner(ranks, **hparams), _learner(None, **hparams)
        whole.ranks = ranks  # gradients are summed, the optimizer is as that of one rank
        rows = [_train(learner, range(7)) for learner in (sharded, whole)]
        names = dict(sharded.drafter.named_parameters())
        held = {
            name: sum(t.nbytes for key, t in optimizer.state[names[name]].items() if key != "step")
            for kind, optimizer in sharded.optimizers.items()
            for name in sharded._optimizer_names[kind]
        }
        assert sum(len(o.state) for o in sharded.optimizers.values()) == len(held)
        out.append((rows, _digest(sharded), _digest(whole), held))
    return out


def _resumed(ranks: Ranks) -> Any:
    out = []
    for i, hparams in enumerate(SHARDED):
        file = ranks._group.folder / f"state-{i}.safetensors"
        straight = _learner(ranks, **hparams)
        _train(straight, range(3))
        straight.save_state(file)
        ranks.gather(None)  # it is there
        resumed = _learner(ranks, **hparams)
        _train(resumed, range(2))  # whatever it did before is replaced
        resumed.load_state(file)
        rows = [_train(learner, range(3, 7)) for learner in (straight, resumed)]
        out.append((str(rows[0]) == str(rows[1]), _digest(straight), _digest(resumed)))
    return out


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> tuple[Path, list[Any]]:
    folder = tmp_path_factory.mktemp("sharded")
    return folder, on_two_ranks("_sharded", folder)


def test_sharded_optimizers_give_the_same_bits(sharded) -> None:
    first, second = (steps for steps, _ in sharded[1])
    for hparams, one, other in zip(SHARDED, first, second, strict=True):
        rows, weights, unsharded, held = one
        assert min(row["grad_norm"] for row in rows[0][:3]) > hparams["max_grad_norm"]
        assert str(rows[0]) == str(rows[1]) == str(other[0][0])
        assert weights == unsharded == other[1]
        # Each parameter's state is on one rank, and they share as the plan says.
        parts = (held, other[3])
        trained = {n for n, p in make_learner().drafter.named_parameters() if p.requires_grad}
        assert held.keys().isdisjoint(other[3])
        assert held.keys() | other[3].keys() == trained
        sizes = [sum(part.values()) for part in parts]
        hp = replace(HPARAMS, **hparams)
        alone, planned = (
            learner_memory(CONFIG, hp, StepLayout(), 64, ranks=n).optimizer for n in (1, 2)
        )
        assert max(sizes) == planned < 0.55 * alone
        assert sum(sizes) == alone


def test_state_of_sharded_optimizers_is_saved_whole(sharded) -> None:
    folder, ((_, first), (_, second)) = sharded
    assert first == second
    for i, (hparams, (same, straight, resumed)) in enumerate(zip(SHARDED, first, strict=True)):
        assert same
        assert straight == resumed
        # The file is as one rank writes it: any number of ranks reads it.
        file, again = folder / f"state-{i}.safetensors", folder / "again.safetensors"
        alone = make_learner(**hparams)
        alone.load_state(file)
        alone.save_state(again)
        want, got = load_file(file), load_file(again)
        trained = [n for n, p in alone.drafter.named_parameters() if p.requires_grad]
        assert all(any(k.endswith(f".{n}.step") or k == f"muon.{n}.momentum_buffer" for k in want)
                   for n in trained)  # fmt: skip
        assert want.keys() == got.keys()
        assert all(torch.equal(want[k], got[k]) for k in want)


def test_ranks_without_parameters_of_a_kind() -> None:
    """More ranks than parameters: those left over have no optimizer, and can learn."""
    drafter = make_learner().drafter
    parts = shards(drafter, "muon", 40)
    names = [n for part in parts for n in part]
    assert len(names) == len(set(names)) < 40
    assert {} in parts
    group = SimpleNamespace(world_size=40, rank_in_group=39)
    assert make_learner(ranks=Ranks(group), optimizer="muon").optimizers == {}
    assert shards(drafter, "muon", 3) == shards(make_learner(seed=4).drafter, "muon", 3)


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


def test_saving_takes_its_share_of_the_time_at_most() -> None:
    assert save_pause(300, 2) == 300
    assert save_pause(300, 30) == pytest.approx(1000)
    assert save_pause(300, 600) == 3600
    assert save_pause(0, 5) == 0


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
