"""Replicas without an engine: the group of their ranks, sharing out, questions and answers, and faults."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_dflash import guard
from vllm_dflash.training import replicas as module
from vllm_dflash.training.config import EngineOptions, SamplingOptions, TrainConfig
from vllm_dflash.training.engine import Generated, VerifierEngine
from vllm_dflash.training.prefixes import pieces_of
from vllm_dflash.training.ranks import Failure, Ranks
from vllm_dflash.training.replica import CANCEL, DONE, FAILED, ITEM, serve
from vllm_dflash.training.replica_group import ReplicaGroup
from vllm_dflash.training.replicas import Others, Replicas, replica_environments
from vllm_dflash.training.responses import GenerationRequest, GenerationResult
from vllm_dflash.verifier import Verifier

# -- the group ---------------------------------------------------------------------------------------


def _member(rank: int, store: str, answers: Any) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=3
    )
    # Not all of the world, so that a rank of the group is none of the world.
    group = torch.distributed.new_group([1, 2])
    if rank == 0:
        return
    ranks = Ranks(ReplicaGroup(group, group))
    generator = torch.Generator().manual_seed(rank)
    summed, sent = torch.randn(5, 3, generator=generator), torch.full((4,), float(rank))
    own = summed.clone()
    ranks.sum([summed])
    ranks.broadcast([sent], 1)
    answers.put(
        (ranks.rank, ranks.size, ranks.gather(own.tolist()), summed.tolist(), sent.tolist())
    )


@pytest.mark.thorough
def test_ranks_of_a_group_that_is_not_the_world(tmp_path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vllm_dflash.training.session"])
    answers = context.Queue()
    members = [
        context.Process(target=_member, args=(r, str(tmp_path / "store"), answers), daemon=True)
        for r in range(3)
    ]
    for member in members:
        member.start()
    first, second = sorted(answers.get(timeout=120) for _ in range(2))
    for member in members:
        member.join(timeout=120)
    assert [first[0], second[0]] == [0, 1]
    assert first[1:] == second[1:]
    size, parts, summed, sent = first[1:]
    assert size == 2
    assert torch.equal(torch.tensor(parts[0]) + torch.tensor(parts[1]), torch.tensor(summed))
    assert sent == [2.0] * 4


# -- a replica's process -----------------------------------------------------------------------------


class Engine:
    """In the place of a ``VerifierEngine``."""

    def __init__(self) -> None:
        self.ended: list[str] = []

    def call_ranks(self, command: str, *args: Any) -> list[Any]:
        if command == "fail":
            raise args[0]
        return [(command, *args)]

    def extract(self, examples: dict[str, list[int]]) -> Iterator[tuple[str, None]]:
        try:
            for key in examples:
                yield key, None
        finally:
            self.ended.append("extract")

    def generator(self, sampling: SamplingOptions) -> Any:
        return lambda requests: (f"{r}/{sampling.max_tokens}" for r in requests)


def answers_to(*questions: Any) -> tuple[list[Any], Engine]:
    asked: queue.Queue[Any] = queue.Queue()
    sent: list[Any] = []
    engine = Engine()
    for question in (*questions, None):
        asked.put(question)
    serve(engine, asked, sent.append)
    return sent, engine


def test_a_replica_answers_in_order() -> None:
    sent, _ = answers_to(
        ("call_ranks", "stored", ["a"]),
        ("call_ranks", "fail", ValueError("a bad value")),
        ("call_ranks", "fail", KeyError("x")),
        CANCEL,  # of what has ended
        ("call_ranks", "digest"),
    )
    assert sent == [
        (DONE, [("stored", ["a"])]),
        (FAILED, Failure("a bad value", True)),
        (FAILED, Failure("KeyError: 'x'", False)),
        (DONE, [("digest",)]),
    ]


def test_a_replica_gives_items_until_it_is_asked_something_else() -> None:
    asked: queue.Queue[Any] = queue.Queue()
    sent: list[Any] = []
    engine = Engine()

    def send(message: Any) -> None:
        sent.append(message)
        if message == (ITEM, ("b", None)):
            asked.put(CANCEL)
            asked.put(("call_ranks", "keep"))
        if message[0] == DONE:
            asked.put(("generate", [1, 2], SamplingOptions(max_tokens=7)))
            asked.put(None)

    asked.put(("extract", {key: [1, 2] for key in "abcd"}))
    serve(engine, asked, send)
    assert sent[:3] == [(ITEM, ("a", None)), (ITEM, ("b", None)), (DONE, None)]
    assert sent[3] == (DONE, [("keep",)])
    assert engine.ended == ["extract"]
    assert (ITEM, "1/7") in sent


@pytest.mark.thorough
def test_a_replica_ends_with_the_trainer() -> None:
    """Whatever it is doing; vLLM's engine core would go on."""
    script = """
import queue, threading, time
from multiprocessing import Pipe
from vllm_dflash.training import replica
ours, theirs = Pipe()
threading.Thread(target=replica._listen, args=(theirs, queue.Queue()), daemon=True).start()
ours.close()
time.sleep(100)
"""
    assert subprocess.run([sys.executable, "-c", script], timeout=90).returncode == 1


# -- the trainer's side ------------------------------------------------------------------------------

CHILD = """
import os, signal, sys, time
from multiprocessing.connection import Connection
conn = Connection(int(sys.argv[1]))
print("as the replica prints", flush=True)
(how,) = conn.recv()
if how == "late":
    time.sleep(100)
if how == "exit":
    sys.exit(3)
if how == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
conn.send(("done", how))
while (question := conn.recv()) is not None:
    name, *args = question
    if name == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "stuck":
        time.sleep(100)
    for item in args:
        conn.send(("item", item))
    if name != "cancel":
        conn.send(("done", name))
if how == "deaf":
    time.sleep(100)
"""


@pytest.fixture
def others(tmp_path, monkeypatch) -> Iterator[Others]:
    monkeypatch.setattr(module, "CLOSE_S", 3.0)
    monkeypatch.setattr(module, "TERM_S", 0.5)
    started = Others([sys.executable, "-c", CHILD], tmp_path)
    yield started
    started.close()
    assert not any(guard.look(p.pid) for p in started._processes.values())


def test_answers_and_items_of_several(others, tmp_path) -> None:
    for number in (1, 2):
        others.start(number, os.environ, "well")
    assert others.answers(60) == {1: "well", 2: "well"}
    others.ask({1: ("one", "a", "b"), 2: ("two", "c")})
    assert sorted(others.items(wait=True)) == ["a", "b", "c"]
    others.ask({2: ("again",)})
    assert others.answers() == {2: "again"}
    others.ask({1: ("left", "x", "y")})
    others.settle()
    others.ask({1: ("next",)})
    assert others.answers() == {1: "next"}
    assert (tmp_path / "replica-1.log").read_text() == "as the replica prints\n"


@pytest.mark.parametrize(
    ("how", "question", "message"),
    [
        ("exit", None, r"replica 2 ended with exit code 3 \(its output: .*replica-2.log"),
        ("well", ("kill",), "replica 2 was killed by SIGKILL .*the same command resumes"),
        ("late", None, r"no answer from replica 2 in 1 s \(its output: .*replica-2.log"),
    ],
)
def test_a_replica_that_is_gone_or_late_is_named(others, how, question, message) -> None:
    others.start(2, os.environ, how)
    others.start(3, os.environ, "well")
    if question is not None:
        others.answers(60)
        # What is gone is told before what others, which wait for it, will never say.
        others.ask({3: ("stuck",), 2: question})
    with pytest.raises(RuntimeError, match=message):
        others.answers(1.0 if how == "late" else 60)


@pytest.mark.parametrize(
    ("failure", "error", "message"),
    [
        (Failure("a bad value", True), ValueError, "^a bad value$"),
        (Failure("KeyError: 'x'", False), RuntimeError, "replica 1 failed with KeyError: 'x' "),
    ],
)
def test_a_failure_of_a_replica_is_raised(others, failure, error, message) -> None:
    pipes = {n: multiprocessing.Pipe() for n in (1, 2)}
    others._sockets = {n: ours for n, (ours, _) in pipes.items()}
    others.busy = {1, 2}
    others._inbox.put((1, FAILED, failure))
    others._inbox.put((2, DONE, None))
    with pytest.raises(error, match=message):
        others.answers()
    others.settle()
    assert others.busy == set()


def test_one_that_does_not_listen_is_killed(others) -> None:
    others.start(1, os.environ, "deaf")
    others.answers(60)
    module.CLOSE_S = 0.5
    others.close()
    assert others._processes[1].returncode == -signal.SIGKILL


@pytest.mark.thorough
def test_a_trainer_that_waits_on_a_device_for_a_dead_replica_ends(tmp_path) -> None:
    """Nothing raises there: a collective of the GPU that never completes."""
    script = f"""
import os, sys, time
from pathlib import Path
from vllm_dflash.training import replicas
replicas.NOTICE_S = 0.5
others = replicas.Others([sys.executable, "-c", {CHILD!r}], Path({str(tmp_path)!r}))
others.start(1, os.environ, "well")
others.answers(60)
others.ask({{1: ("kill",)}})
time.sleep(100)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=90
    )
    assert done.returncode == 1
    (line,) = [x for x in done.stderr.splitlines() if x.startswith("error: ")]
    assert "replica 1 was killed by SIGKILL" in line


# -- sharing out -------------------------------------------------------------------------------------


class Asked:
    """In the place of ``Others``: everything is answered at once."""

    def __init__(self) -> None:
        self.questions: dict[int, tuple[Any, ...]] = {}
        self.busy: set[int] = set()
        self.settled = 0

    def ask(self, questions: dict[int, tuple[Any, ...]]) -> None:
        self.questions, self.busy = dict(questions), set(questions)

    def items(self, *, wait: bool) -> Iterator[Any]:
        if wait:
            for name, part, *_ in self.questions.values():
                for one in part:
                    yield (
                        (one, None)
                        if name == "extract"
                        else GenerationResult(one.key, [7] * 3, "stop")
                    )
            self.busy = set()

    def answers(self, timeout: float | None = None) -> dict[int, Any]:
        self.busy = set()
        return {n: [n] for n in reversed(self.questions)}

    def settle(self) -> None:
        self.settled += bool(self.busy)
        self.busy = set()


def make_replicas(count: int, ranks: int = 1) -> Replicas:
    made = object.__new__(Replicas)
    made.count, made._ranks_of_one, made.others = count, ranks, Asked()
    made.generated = Generated()
    return made


@pytest.mark.parametrize(("count", "ranks"), [(2, 1), (4, 1), (2, 2)])
def test_each_sequence_is_extracted_by_its_owners_replica(count, ranks, monkeypatch) -> None:
    made = make_replicas(count, ranks)
    own: dict[str, list[int]] = {}

    def extract(self: Any, examples: dict[str, list[int]]) -> Iterator[tuple[str, None]]:
        own.update(examples)
        yield from ((key, None) for key in examples)

    monkeypatch.setattr(VerifierEngine, "extract", extract)
    examples = {f"train/{i}": [i, i + 1, 5] for i in range(40)}
    owners = {key: i % (count * ranks) for i, key in enumerate(examples)}
    monkeypatch.setattr(VerifierEngine, "call", lambda self, *args: None)
    made.register([], owners)
    got = list(made.extract(examples))
    assert sorted(got) == sorted((key, None) for key in examples)
    shares = {n: q[1] for n, q in made.others.questions.items()} | {0: own}
    assert sorted(shares) == list(range(count))
    for number, share in shares.items():
        assert share
        for key, ids in share.items():
            assert ids is examples[key]
            assert owners[key] // ranks == number


def test_an_extraction_that_is_left_is_settled(monkeypatch) -> None:
    made = make_replicas(2)
    made._owners = {f"train/{i}": i % 2 for i in range(20)}
    monkeypatch.setattr(
        VerifierEngine, "extract", lambda self, examples: iter([(k, None) for k in examples])
    )
    items = made.extract({f"train/{i}": [i, i + 1, 5] for i in range(20)})
    next(items)
    items.close()
    assert made.others.settled == 1
    # Left without being closed, as by what raises in the loop over it: settled before the next command.
    left = made.extract({f"train/{i}": [i, i + 1, 5] for i in range(20)})
    next(left)
    monkeypatch.setattr(VerifierEngine, "call_ranks", lambda self, command, *args: [0])
    assert made.call_ranks("save_state") == [0, 1]
    assert made.others.settled == 2


def test_responses_are_shared_out_and_counted(monkeypatch) -> None:
    made = make_replicas(3)
    mine: list[str] = []

    def generate(requests: list[GenerationRequest]) -> Iterator[GenerationResult]:
        mine.extend(r.key for r in requests)
        yield from (GenerationResult(r.key, [7], "stop") for r in requests)

    monkeypatch.setattr(VerifierEngine, "generator", lambda self, sampling: generate)
    requests = [GenerationRequest(str(i), [i]) for i in range(10)]
    got = list(made.generator(SamplingOptions())(requests))
    assert sorted(r.key for r in got) == sorted(r.key for r in requests)
    assert mine == ["0", "3", "6", "9"]
    assert made.generated == Generated(tokens=18, finished=6, finished_tokens=18)
    # A round of one.
    assert [r.key for r in made.generator(SamplingOptions())(requests[:1])] == ["0"]
    assert made.others.questions == {}


def test_what_an_engines_requests_bring_is_asked_of_that_engine_alone(monkeypatch) -> None:
    """Extraction and recording by the first replica must not reach the others, which do their own."""
    # Importing it takes longer than all of this module.
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=SimpleNamespace))
    made = make_replicas(2)
    asked: list[tuple[str, str]] = []

    def collective_rpc(method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        asked.append((method, args[0]))
        return [{}]

    scheduler, done = SimpleNamespace(drafting=True), SimpleNamespace(token_ids=[7])
    cache = SimpleNamespace(hash_block_size=16, block_size=16)
    made.engine = SimpleNamespace(
        collective_rpc=collective_rpc,
        reset_prefix_cache=lambda: True,
        add_request=lambda *args: None,
        has_unfinished_requests=iter((True, False)).__next__,
        step=lambda: [SimpleNamespace(request_id="train/0", outputs=[done], finished=True)],
        abort_request=lambda keys: None,
        vllm_config=SimpleNamespace(cache_config=cache),
        engine_core=SimpleNamespace(engine_core=SimpleNamespace(scheduler=scheduler)),
    )
    examples = {"train/0": [1, 2, 3]}
    assert list(made._extract(examples, pieces_of(examples, None))) == [("train/0", None)]
    made.draft(False)
    assert asked == [("vllm_dflash_own", c) for c in ("watch", "collect", "flush", "drafting")]
    assert made.others.questions == {}


# -- settings ----------------------------------------------------------------------------------------


def make_config(**changes: Any) -> TrainConfig:
    return TrainConfig(Verifier("v"), data="d.jsonl", output=Path("out"), **changes)


def test_the_number_of_replicas_is_not_what_decides_the_weights() -> None:
    one, four = make_config(), make_config(data_parallel_size=4)
    assert one.identity() == four.identity()
    assert make_config(
        data_parallel_size=4, engine=EngineOptions(tensor_parallel_size=2)
    ).ranks == 8  # fmt: skip


def test_what_replicas_cannot_do_is_refused(monkeypatch) -> None:
    with pytest.raises(ValueError, match="--data-parallel-size"):
        make_config(data_parallel_size=0)
    with pytest.raises(ValueError, match=r"--features-from generation .*--data-parallel-size 2"):
        make_config(data_parallel_size=2, features_from="generation")
    with pytest.raises(ValueError, match=r"nnodes is 2.*this machine"):
        EngineOptions(extra={"nnodes": 2})
    with pytest.raises(ValueError, match=r"data_parallel_size is 2.*--data-parallel-size"):
        EngineOptions(extra={"data_parallel_size": 2})
    monkeypatch.setattr(module, "visible_devices", lambda: ["0", "1", "2"])
    with pytest.raises(ValueError, match="2 with 2 ranks each needs 4 GPUs, here are 3"):
        replica_environments(2, 2)


def test_devices_and_cores_are_divided(monkeypatch) -> None:
    monkeypatch.setattr(module, "visible_devices", lambda: ["4", "5", "6", "7"])
    devices = [e["CUDA_VISIBLE_DEVICES"] for e in replica_environments(2, 2)]
    assert devices == ["4,5", "6,7"]
    monkeypatch.setattr(module, "visible_devices", lambda: [])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [e["OMP_NUM_THREADS"] for e in replica_environments(2, 1)] == ["3", "3"]
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert replica_environments(2, 1)[1]["OMP_NUM_THREADS"] == "5"


def test_visible_devices_keep_their_names(monkeypatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(module, "gpu_memory", lambda: [(1, 1)] * 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert module.visible_devices() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b")
    assert module.visible_devices() == ["GPU-a", "GPU-b"]
    monkeypatch.setattr(module, "gpu_memory", lambda: [])
    assert module.visible_devices() == []
