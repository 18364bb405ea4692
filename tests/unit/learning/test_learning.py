"""What a server that learns does, without a server: replay, disk, gate, versions, rounds, commands."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import stat
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from helpers import tiny
from vllm_dflash.learning import loop as loop_module
from vllm_dflash.learning.control import read_status, rows, send
from vllm_dflash.learning.gate import MIN_CONVERSATIONS, judge, ratio_interval, tau
from vllm_dflash.learning.loop import Learning, Settings
from vllm_dflash.learning.replay import Conversation, Reservoir, ShardReader, Shards
from vllm_dflash.learning.versions import Versions
from vllm_dflash.learning.watch import Reading, between, is_plot, plot
from vllm_dflash.learning.worker import anchors_that_fit
from vllm_dflash.serving.frontend.learning_metrics import LearningCollector

ROOT = Path(__file__).parents[3]


def conversation(i: int, source: str = "", length: int = 20, prompt: int = 8) -> Conversation:
    rng = random.Random(f"{i}/{source}")
    return Conversation(tuple(rng.randrange(1000) for _ in range(length)), prompt, source, float(i))


# -- replay --------------------------------------------------------------------------------------


def test_reservoir_keeps_old_and_new_within_its_bound():
    kept = Reservoir(capacity=100 * 20)
    for i in range(2000):
        kept.add(conversation(i))
        assert kept.num_tokens() <= 2000
    times = sorted(c.time for c in kept)
    assert len(times) == 100
    assert times[-50:] == list(range(1950, 2000))
    # The sample of what was before is spread over its time: a third of it, give or take.
    early = sum(t < 650 for t in times[:50])
    assert 8 <= early <= 26


def test_reservoir_leaves_a_source_its_place_beside_a_flood():
    kept = Reservoir(capacity=100 * 20)
    for i in range(40):
        kept.add(conversation(i, "few"))
    for i in range(3000):
        kept.add(conversation(i, "flood"))
    sources = [c.source for c in kept]
    assert sources.count("few") >= 20


def test_reservoir_counts_a_conversation_once():
    kept = Reservoir(capacity=1000)
    assert kept.add(conversation(1))
    assert not kept.add(conversation(1))
    assert not kept.add(conversation(2, length=600)), "longer than what there is room for"
    assert len(kept) == 1


def test_a_prompt_is_held_out_whatever_the_response():
    sides = {}
    for i in range(400):
        c = conversation(i)
        again = Conversation((*c.token_ids[:8], 1, 2, 3), 8)
        assert again.held_out == c.held_out
        sides[i] = c.held_out
    assert 25 <= sum(sides.values()) <= 80


# -- disk ----------------------------------------------------------------------------------------


def shards(folder: Path, **given) -> Shards:
    return Shards(folder, **{"max_bytes": 10**6, "max_age": 1e12, **given})


def test_shards_are_read_back_and_belong_to_their_owner(tmp_path):
    written = [conversation(i, "x") for i in range(5)]
    disk = shards(tmp_path / "c")
    for c in written:
        disk.put(c)
    disk.flush()
    assert list(shards(tmp_path / "c").read()) == written
    for path in (tmp_path / "c").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "c").stat().st_mode) == 0o700


@pytest.mark.parametrize("cut", [2, 30, 100])
def test_a_shard_that_was_cut_off_loses_one_conversation(tmp_path, cut):
    disk = shards(tmp_path)
    for i in range(5):
        disk.put(conversation(i))
    disk.flush()
    file = next(tmp_path.iterdir())
    file.write_bytes(file.read_bytes()[:-cut])
    again = shards(tmp_path)
    assert [c.time for c in again.read()] == [0, 1, 2, 3]
    # A kill leaves such an end; what comes later is whole.
    again.put(conversation(9))
    again.flush()
    assert [c.time for c in shards(tmp_path).read()] == [0, 1, 2, 3, 9]


def test_a_damaged_line_is_counted_and_left_out(tmp_path):
    disk = shards(tmp_path)
    for i in range(3):
        disk.put(conversation(i))
    disk.flush()
    file = next(tmp_path.iterdir())
    file.write_bytes(file.read_bytes().replace(b'"time": 1.0', b'"time": 7.0'))
    again = shards(tmp_path)
    assert [c.time for c in again.read()] == [0, 2]
    assert again.damaged == 1


def test_shards_stay_inside_their_size_and_age(tmp_path, monkeypatch):
    monkeypatch.setattr(Shards, "SHARD_BYTES", 2000)
    disk = shards(tmp_path, max_bytes=10_000)
    for i in range(300):
        disk.put(conversation(i))
    disk.flush()
    assert sum(f.stat().st_size for f in tmp_path.iterdir()) <= 12_000
    assert max(c.time for c in disk.read()) == 299
    for file in tmp_path.iterdir():
        os.utime(file, (1, 1))
    late = shards(tmp_path, max_age=3600.0)
    assert list(tmp_path.iterdir()) == []
    late.put(conversation(300))
    late.flush()
    assert list(late.read()) == [], "it says that it is of 1970"


def test_a_full_disk_is_counted_and_never_raises(tmp_path, monkeypatch):
    disk = shards(tmp_path)

    def full(conversation):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk, "_write", full)
    disk.put(conversation(0))
    disk.flush()
    assert disk.dropped == 1


def in_a_process(code: str, *args: object, seconds: float | None = None) -> None:
    """Runs it, and SIGKILLs it after so many seconds since it has begun."""
    command = [sys.executable, "-c", code, *map(str, args)]
    process = subprocess.Popen(command, env=tiny.environment(), stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"begun\n"
        if seconds is not None:
            time.sleep(seconds)
            process.kill()
        assert process.wait(60) == (0 if seconds is None else -signal.SIGKILL)
    finally:
        process.kill()
        process.wait()


WRITER = """
import itertools, resource, sys
from pathlib import Path
from vllm_dflash.learning.replay import Conversation, Shards
Shards.SHARD_BYTES = 40_000
if len(sys.argv) > 2:  # a disk that takes so many bytes of a file
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
shards = Shards(Path(sys.argv[1]), 10**9, 1e12)
print("begun", flush=True)
for i in itertools.count(1) if len(sys.argv) < 3 else range(1, 31):
    shards.put(Conversation(tuple(range(i, i + 500)), 8, "", float(i)))
    shards.flush()
print(shards.dropped)
"""


def test_a_killed_writer_loses_nothing_that_was_written(tmp_path):
    for attempt in range(3):
        in_a_process(WRITER, tmp_path, seconds=0.3 + 0.1 * attempt)
    read = shards(tmp_path, max_bytes=10**9)
    numbers = [int(c.time) for c in read.read()]
    starts = [i for i, n in enumerate(numbers) if n == 1]
    assert len(starts) == 3
    for start, end in pairwise([*starts, len(numbers)]):
        assert numbers[start:end] == list(range(1, end - start + 1))
    assert len(numbers) > 30
    assert read.damaged <= 3


def test_a_disk_that_takes_no_more_loses_what_did_not_fit(tmp_path):
    in_a_process(WRITER, tmp_path, 30_000)
    read = shards(tmp_path)
    numbers = [int(c.time) for c in read.read()]
    assert numbers == list(range(1, len(numbers) + 1))
    assert 3 < len(numbers) < 30
    assert read.damaged <= 1
    read.put(conversation(99))  # there is room again
    read.flush()
    assert [c.time for c in shards(tmp_path).read()][-1] == 99


# -- gate ----------------------------------------------------------------------------------------


def counts(rng: random.Random, keys: list[str], mean: float) -> dict[str, tuple[int, int]]:
    return {k: (40, sum(rng.random() < mean for _ in range(40))) for k in keys}


def test_a_better_candidate_passes_and_noise_mostly_does_not():
    keys = [str(i) for i in range(40)]
    passed = {0.0: 0, 0.2: 0}
    for trial in range(60):
        rng = random.Random(trial)
        before = counts(rng, keys, 0.4)
        for lift in passed:
            passed[lift] += judge(before, counts(rng, keys, 0.4 + lift), {}).better
    assert passed[0.2] == 60
    assert passed[0.0] <= 6


def test_a_worse_candidate_is_known_as_worse():
    keys = [str(i) for i in range(40)]
    rng = random.Random(0)
    verdict = judge(counts(rng, keys, 0.5), counts(rng, keys, 0.2), {})
    assert verdict.worse
    assert not verdict.better


def test_few_conversations_decide_nothing():
    keys = [str(i) for i in range(MIN_CONVERSATIONS - 1)]
    rng = random.Random(0)
    verdict = judge(counts(rng, keys, 0.1), counts(rng, keys, 0.9), {})
    assert not verdict.better
    assert str(MIN_CONVERSATIONS) in verdict.reason


def test_a_big_source_must_not_lose():
    flood, mine = [f"f{i}" for i in range(60)], [f"m{i}" for i in range(20)]
    rng = random.Random(0)
    before = counts(rng, flood + mine, 0.4)
    after = counts(rng, flood, 0.8) | counts(rng, mine, 0.2)
    assert judge(before, after, {}).better
    verdict = judge(before, after, {"source 'mine'": mine})
    assert not verdict.better
    assert "mine" in verdict.reason


def test_the_interval_holds_the_ratio():
    rng = random.Random(1)
    keys = [str(i) for i in range(50)]
    before, after = counts(rng, keys, 0.3), counts(rng, keys, 0.5)
    low, high = ratio_interval(list(before.values()), list(after.values()))
    ratio = tau(list(after.values())) / tau(list(before.values()))
    assert low < ratio < high
    assert high - low < 0.2


# -- versions ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drafter(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("drafter")
    verifier = tiny.make_verifier(folder / "verifier")
    return tiny.make_drafter(folder / "drafter", verifier)


def copied(drafter: Path):
    import shutil

    return lambda path: shutil.copytree(drafter, path)


def test_versions_survive_a_restart_and_are_bounded(tmp_path, drafter):
    versions = Versions(tmp_path / "learn")
    assert versions.to_serve("given") == "given"
    copied(drafter)(versions.path(0))
    for i in range(9):
        number = versions.next_number()
        assert number == i + 1
        copied(drafter)(versions.path(number))
        versions.switch(number, "promoted", {"steps": i})
    assert versions.there() == [0, 5, 6, 7, 8, 9]
    again = Versions(tmp_path / "learn")
    assert again.promoted == 9
    assert again.to_serve("given") == str(again.path(9))


def test_a_version_that_was_killed_half_way_is_not_served(tmp_path, drafter):
    versions = Versions(tmp_path / "learn")
    for number in (1, 2):
        copied(drafter)(versions.path(number))
        versions.switch(number, "promoted")
    (versions.path(2) / "model.safetensors").write_bytes(b"cut off")
    again = Versions(tmp_path / "learn")
    assert again.to_serve("given") == str(again.path(1))
    assert again.promoted == 1
    (versions.path(1) / "config.json").unlink()
    last = Versions(tmp_path / "learn")
    assert last.to_serve("given") == "given"
    assert last.promoted == 0


def test_a_kill_before_the_state_leaves_the_version_before(tmp_path, drafter):
    versions = Versions(tmp_path / "learn")
    copied(drafter)(versions.path(1))
    versions.switch(1, "promoted")
    copied(drafter)(versions.path(2))
    again = Versions(tmp_path / "learn")
    assert again.to_serve("given") == str(again.path(1))
    assert again.next_number() == 3
    with pytest.raises(ValueError, match="no version 7"):
        again.switch(7, "promoted")


SWITCHER = """
import itertools, sys
from pathlib import Path
from vllm_dflash.learning.versions import Versions, copy_version
versions = Versions(Path(sys.argv[1]))
for i in itertools.count():
    number = versions.next_number()
    copy_version(Path(sys.argv[2]), versions.path(number))
    versions.switch(number, "promoted", {"steps": i})
    if i == 0:
        print("begun", flush=True)
    if i % 3 == 2:
        versions.switch(versions.previous(), "rolled back")
"""


def test_a_kill_in_the_middle_of_versions_leaves_one_that_served(tmp_path, drafter):
    """Whether it wrote one, named it, or removed an old one."""
    versions = Versions(tmp_path / "learn")
    copied(drafter)(versions.path(0))
    for attempt in range(5):
        in_a_process(SWITCHER, tmp_path / "learn", drafter, seconds=0.2 + 0.037 * attempt)
        again = Versions(tmp_path / "learn")
        promoted = again.promoted
        assert promoted > 0
        assert again.to_serve("given") == str(again.path(promoted)), "nothing was fallen back from"
        assert (again.path(promoted) / "model.safetensors").read_bytes() == (
            drafter / "model.safetensors"
        ).read_bytes()
        assert again.promoted == promoted


def test_a_folder_of_others_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"mine\.txt"):
        Versions(tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_a_damaged_state_names_itself(tmp_path):
    Versions(tmp_path / "learn")
    (tmp_path / "learn" / "state.json").write_text("{")
    with pytest.raises(ValueError, match=r"state\.json is damaged"):
        Versions(tmp_path / "learn")


# -- rounds --------------------------------------------------------------------------------------


class FakeEngine:
    """An engine whose drafter gets better, or worse, by each step that it learns."""

    def __init__(self, drafter: Path, gain: float) -> None:
        self.drafter, self.gain = drafter, gain
        self.quality = {"served": 0.2, "candidate": 0.2}
        self.learning: Learning | None = None
        self.calls: list[str] = []
        self.known: set[str] = set()
        self._job: object = None
        self._parts = 0

    def call(self, command, *args):
        self.calls.append(command)
        return getattr(self, command, lambda *a: None)(*args)

    def submit(self, key, token_ids):
        self.known.add(key)
        assert self.learning is not None
        self.learning.extracted(key)

    def write(self, path):
        copied(self.drafter)(path)

    def written(self, wait):
        return True

    def collect(self, ends):
        return {}

    def learn(self, steps):
        self.quality["candidate"] = max(0.0, self.quality["candidate"] + self.gain * len(steps))
        assert {k for _, keys in steps for k in keys} <= self.known
        self._job, self._parts = [{"anchors": 4, "bad": []} for _ in steps], len(steps)

    def count(self, which, keys):
        assert set(keys) <= self.known
        rng = random.Random(f"{which}/{len(self.calls)}")
        quality = self.quality.get(which, 0.2)
        made = {}
        for key in keys:
            accepted = sum(rng.random() < quality for _ in range(100))
            made[key] = (100, accepted, accepted)
        self._job, self._parts = made, 1

    def advance(self, seconds):
        self._parts -= 1
        return self._job if self._parts <= 0 else None

    def swap(self):
        self.quality["served"] = self.quality["candidate"]

    def restore(self):
        self.quality["candidate"] = self.quality["served"]

    def load(self, path):
        self.quality = dict.fromkeys(self.quality, 0.2)
        self._parts = 10**9  # the work under way is gone, and never finishes


def make(tmp_path: Path, drafter: Path, gain: float, **given) -> tuple[Learning, FakeEngine]:
    engine = FakeEngine(drafter, gain)
    settings = Settings(slice_ms=50, share=0.0, tokens=20_000)
    learning = Learning(Versions(tmp_path / "learn"), engine, settings, **given)
    engine.learning = learning
    return learning, engine


def feed(learning: Learning, start: int, number: int, source: str = "") -> None:
    for i in range(start, start + number):
        learning.finished(conversation(i, source))


def run(learning: Learning) -> None:
    idle = 0
    while idle < 3:  # waiting for the engine looks idle, too
        idle = 0 if learning.slice() else idle + 1
    assert not learning.failed


def test_what_is_learned_comes_to_serve(tmp_path, drafter):
    learning, engine = make(tmp_path, drafter, gain=0.01)
    feed(learning, 0, 120)
    run(learning)
    status = learning.status()
    assert status["promotions"] >= 1
    assert learning.versions.promoted == status["version"] >= 1
    assert engine.quality["served"] > 0.3
    assert status["to_learn"] < 4
    assert status["steps"] == 6 * (120 - status["held_out"]["conversations"])
    assert not learning.slice(), "nothing is left to do"


def test_nothing_held_out_is_trained_on(tmp_path, drafter):
    learning, engine = make(tmp_path, drafter, gain=0.0)
    trained: set[str] = set()
    learn = engine.learn

    def noted(steps):
        trained.update(k for _, keys in steps for k in keys)
        learn(steps)

    engine.learn = noted  # type: ignore[method-assign]
    feed(learning, 0, 200)
    run(learning)
    held = {c.key for c in learning.held_out}
    assert len(held) >= MIN_CONVERSATIONS
    assert trained
    assert not trained & held


def test_what_gets_worse_is_never_served(tmp_path, drafter):
    learning, engine = make(tmp_path, drafter, gain=-0.01)
    for start in range(0, 400, 100):
        feed(learning, start, 100)
        run(learning)
    assert learning.status()["promotions"] == 0
    assert "restore" in engine.calls
    assert engine.quality["served"] == 0.2


def test_a_version_that_new_traffic_likes_less_goes_back(tmp_path, drafter):
    learning, engine = make(tmp_path, drafter, gain=0.01)
    feed(learning, 0, 120)
    run(learning)
    assert learning.versions.promoted >= 1
    engine.gain, engine.quality = 0.0, {"served": 0.05, "candidate": 0.05}
    feed(learning, 1000, 300)
    run(learning)
    assert learning.status()["rollbacks"] >= 1
    assert "rolled back" in {e["event"] for e in learning.versions.history}
    assert engine.quality["served"] == 0.2


def test_a_version_goes_back_when_its_served_acceptance_falls(tmp_path, drafter, monkeypatch):
    learning, engine = make(tmp_path, drafter, gain=0.01)
    feed(learning, 0, 120)
    run(learning)
    before = learning.versions.promoted
    for _ in range(loop_module._LIVE_DRAFTS):
        learning.verified(7, 0)
    learning.slice()
    assert learning.versions.promoted < before
    assert "load" in engine.calls
    assert "first draft tokens" in learning.versions.history[-1]["reason"]


def test_an_error_ends_the_learning_and_not_the_server(tmp_path, drafter):
    learning, engine = make(tmp_path, drafter, gain=0.01)

    def broken(steps):
        raise RuntimeError("out of memory")

    engine.learn = broken  # type: ignore[method-assign]
    feed(learning, 0, 120)
    while learning.slice() or not learning.failed:
        pass
    status = learning.status()
    assert status["state"] == "failed"
    assert "out of memory" in status["error"]
    feed(learning, 200, 5)
    assert not learning.slice()


def test_a_disk_that_is_full_for_a_while_costs_no_candidate(tmp_path, drafter):
    learning, engine = make(tmp_path, drafter, gain=0.01)
    answers = [True, "no space left on device"]  # the given drafter is written first

    def written(wait):
        return answers.pop(0) if answers else True

    def write(path):
        if len(answers) != 1:
            copied(drafter)(path)

    engine.written, engine.write = written, write  # type: ignore[method-assign]
    feed(learning, 0, 120)
    run(learning)
    status = learning.status()
    assert status["not_written"] == 1
    assert status["promotions"] >= 1
    assert engine.quality["served"] > 0.3


def test_a_conversation_without_features_is_left_out(tmp_path, drafter):
    learning, engine = make(tmp_path, drafter, gain=0.01)
    bad = set()

    def collect(ends):
        failed = {k: "not finite" for k in ends if int(k[-1], 16) < 4}
        bad.update(failed)
        return failed

    engine.collect = collect  # type: ignore[method-assign]
    learn = engine.learn

    def noted(steps):
        assert not {k for _, keys in steps for k in keys} & bad
        learn(steps)

    engine.learn = noted  # type: ignore[method-assign]
    feed(learning, 0, 120)
    run(learning)
    assert bad
    assert learning.status()["not_extracted"] >= len(bad)


def test_what_is_on_disk_is_learned_from_after_a_restart(tmp_path, drafter):
    Versions(tmp_path / "learn")
    learning, _ = make(tmp_path, drafter, 0.01, shards=shards(tmp_path / "learn" / "conversations"))
    feed(learning, 0, 60)
    assert learning.shards is not None
    learning.shards.flush()
    again, engine = make(
        tmp_path, drafter, 0.01, shards=shards(tmp_path / "learn" / "conversations")
    )
    assert again.status()["captured"] == 60
    run(again)
    assert "learn" in engine.calls


def test_a_restart_goes_on_where_learning_was(tmp_path, drafter):
    """By the version that serves; what was learned since then went with the process."""
    Versions(tmp_path / "learn")
    folder = tmp_path / "learn" / "conversations"
    learning, _ = make(tmp_path, drafter, 0.002, shards=shards(folder))
    assert learning.shards is not None
    feed(learning, 1, 120)
    run(learning)
    feed(learning, 200, 120)
    learning.shards.flush()
    assert learning.versions.history[-1]["event"] == "promoted"
    again, _ = make(tmp_path, drafter, 0.002, shards=shards(folder))
    assert again.status()["captured"] == 240
    new = sum(not conversation(i).held_out for i in range(200, 320))
    _, to_come = learning.versions.learned()
    assert again.status()["to_learn"] == 6 * new + to_come
    run(again)
    assert again.status()["steps"] < 6 * new + to_come + 6
    # A clock that was in the future when that was written.
    state = json.loads((tmp_path / "learn" / "state.json").read_text())
    state["learned"]["until"] = 1e12
    (tmp_path / "learn" / "state.json").write_text(json.dumps(state))
    last, _ = make(tmp_path, drafter, 0.002, shards=shards(folder))
    assert last.status()["to_learn"] == 6 * sum(
        not conversation(i).held_out for i in (*range(1, 121), *range(200, 320))
    )


def test_one_that_learns_for_another_goes_on_after_a_restart(tmp_path, drafter):
    kept = shards(tmp_path / "kept")
    for i in range(1, 121):
        kept.put(conversation(i))
    kept.flush()
    file = next((tmp_path / "kept").glob("*.jsonl"))
    file.write_bytes(file.read_bytes().replace(b'"time": 7.0', b'"time": 8.0'))
    for attempt in range(2):
        reader = ShardReader(tmp_path / "kept", 1e12)
        learning, _ = make(tmp_path, drafter, 0.002, reader=reader)
        to_come = learning.versions.learned()[1]
        for arrived in reader.read():
            learning.arrivals.put(arrived)
        run(learning)
        status = learning.status()
        assert status["captured"] == 119
        assert status["written_damaged"] == 1
        visits = to_come if attempt else 6 * status["replay"]["conversations"]
        assert status["steps"] == visits
        assert "1 damaged on disk" in rows(status)["left out"]


def test_the_share_of_a_busy_server(tmp_path, drafter):
    learning, _ = make(tmp_path, drafter, 0.01)
    learning.settings = Settings(slice_ms=100, share=0.2, tokens=1000)
    due = sum(learning.owe(0.01) for _ in range(4000))  # 40 s of work
    assert due * 0.1 / (40 + due * 0.1) == pytest.approx(0.2, rel=0.05)


@pytest.mark.parametrize("jump", [-1e6, 1e6])
def test_a_clock_that_jumps_harms_nothing(tmp_path, drafter, jump):
    now = [0.0]

    def clock() -> float:
        now[0] += 0.001 if len(engine.calls) % 50 else jump
        return now[0]

    learning, engine = make(tmp_path, drafter, 0.01, clock=clock)
    feed(learning, 0, 120)
    run(learning)
    assert learning.status()["promotions"] >= 1


# -- commands ------------------------------------------------------------------------------------


def left(learning: Learning, *commands: dict) -> None:
    folder = learning.versions.folder / "commands"
    folder.mkdir(exist_ok=True)
    for i, command in enumerate(commands):
        (folder / f"{i:04d}.json").write_text(json.dumps(command))


def test_commands_are_carried_out_in_their_order(tmp_path, drafter):
    learning, _ = make(tmp_path, drafter, gain=0.01)
    left(learning, {"command": "pause"})
    feed(learning, 0, 120)
    assert not learning.slice()
    assert learning.status()["state"] == "paused"
    left(learning, {"command": "resume"})
    run(learning)
    version = learning.versions.promoted
    assert version >= 1
    left(learning, {"command": "rollback"}, {"command": "promote", "version": version})
    learning.slice()
    assert [e["event"] for e in learning.versions.history[-2:]] == [
        "rolled back",
        "promoted",
    ]
    assert learning.versions.promoted == version
    left(learning, {"command": "promote", "version": 99})
    learning.slice()
    (learning.versions.folder / "commands" / "9.json").write_text("{")
    learning.slice()
    assert learning.versions.promoted == version
    assert not learning.failed
    # Learning goes on from there.
    feed(learning, 500, 60)
    run(learning)
    assert learning.status()["to_learn"] < 4


def test_one_server_learns_for_another(tmp_path, drafter):
    """What one keeps on disk another learns from; what that promotes serves here, on trial."""
    versions = Versions(tmp_path / "kept")
    kept = Shards(tmp_path / "kept" / "conversations", 2**20, 10**6)
    settings = Settings(slice_ms=50, share=0.0, tokens=20_000, trains=False)
    engine = FakeEngine(drafter, 0.0)
    server = Learning(versions, engine, settings, kept)
    engine.learning = server
    run(server)  # keeps the given drafter
    other, _ = make(tmp_path, drafter, gain=0.0004)
    other.settings = replace(other.settings, source=tmp_path / "kept")
    reader = ShardReader(tmp_path / "kept" / "conversations", 10**12)
    for lot in (0, 120):
        feed(server, lot, 120)
        run(server)
        kept.flush()
        for arrived in reader.read():
            other.arrivals.put(arrived)
        run(other)
    assert other.status()["captured"] == 240
    assert server.status()["steps"] == 0
    server.commanded = True
    server.attend()
    assert server.versions.promoted > 0
    mine, learned = (v.versions.path(v.versions.promoted) for v in (server, other))
    assert (mine / "model.safetensors").read_bytes() == (learned / "model.safetensors").read_bytes()
    assert server.versions.history[-1]["tau_after"] > server.versions.history[-1]["tau_before"]
    for _ in range(1000):
        server.verified(4, 0)
        server.attend()
    assert server.versions.history[-1]["event"] == "rolled back"
    # What is not taken yet gives way to what is learned later; the other one goes back, too.
    feed(server, 400, 240)
    kept.flush()
    for arrived in reader.read():
        other.arrivals.put(arrived)
    run(other)
    assert len(list((tmp_path / "kept" / "commands").iterdir())) == 1
    server.commanded = True
    server.attend()
    assert server.versions.history[-1]["event"] == "promoted"
    for _ in range(1000):  # good enough: the trial is over
        server.verified(4, 4)
        server.attend()
    for _ in range(10_000):
        server.verified(4, 0)
        server.attend()
    assert server.versions.history[-1]["event"] == "promoted"
    left(other, {"command": "rollback"})
    run(other)
    server.commanded = True
    server.attend()
    mine, learned = (v.versions.path(v.versions.promoted) for v in (server, other))
    assert (mine / "model.safetensors").read_bytes() == (learned / "model.safetensors").read_bytes()
    assert not server.failed


def test_a_reader_goes_on_where_it_was(tmp_path):
    kept = shards(tmp_path)
    for i in range(6):
        kept.put(conversation(i))
    kept.flush()
    reader = ShardReader(tmp_path, 10**12)
    first = reader.read()
    got = [next(first).key for _ in range(2)]  # and something goes wrong
    got += [c.key for c in reader.read()]
    assert got == [conversation(i).key for i in range(6)]
    (file,) = tmp_path.glob("*.jsonl")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])  # the old one is gone, and its name given again
    again = [c.key for c in reader.read()]
    assert again == got[: len(again)] != []


@pytest.mark.parametrize(
    ("anchors", "took", "fit"),
    [(64, 0.3, 32), (16, 0.3, 16), (16, 0.01, 32), (64, 0.01, 64), (32, 0.09, 32)],
)
def test_parts_fit_into_a_slice(anchors, took, fit):
    assert anchors_that_fit(anchors, took, 0.1) == fit


def test_a_busy_server_obeys_and_takes_back(tmp_path, drafter):
    """Between its steps: it may never have a slice for it."""
    learning, engine = make(tmp_path, drafter, gain=0.01)
    feed(learning, 0, 120)
    run(learning)
    version = learning.versions.promoted
    assert version > 0
    for _ in range(1000):  # much worse than the comparison promised
        learning.verified(4, 0)
        learning.attend()
    assert learning.versions.promoted != version
    assert learning.versions.history[-1]["event"] == "rolled back"
    assert engine.calls.count("load") == 1
    left(learning, {"command": "promote", "version": version})
    learning.attend()
    assert learning.versions.promoted != version, "nobody has told it"
    learning.commanded = True
    learning.attend()
    assert learning.versions.promoted == version


def test_a_command_in_the_middle_of_work_leaves_nothing_hanging(tmp_path, drafter):
    learning, engine = make(tmp_path, drafter, gain=0.01)
    feed(learning, 0, 120)
    run(learning)
    feed(learning, 200, 60)
    while engine.calls[-1] != "advance":
        learning.slice()
    left(learning, {"command": "rollback"})
    run(learning)
    assert learning.status()["to_learn"] < 4


def test_served_drafts_are_counted_by_version_and_source(tmp_path, drafter):
    learning, _ = make(tmp_path, drafter, gain=0.01)
    for source in ("a", "b", "a"):
        learning.verified(4, 3, source)
    learning.verified(0, 0, "a")
    first = learning.status()["served"]
    assert first == [
        {"version": 0, "source": "a", "drafts": 2, "accepted_tokens": 6},
        {"version": 0, "source": "b", "drafts": 1, "accepted_tokens": 3},
    ]
    assert rows(learning.status())["served tau"] == "4.00 on a, 4.00 on b"
    feed(learning, 0, 120)
    run(learning)
    learning.verified(4, 1, "a")
    now = learning.status()["served"]
    assert now[:2] == first
    assert now[2]["version"] == learning.versions.promoted > 0
    for i in range(100):
        learning.verified(4, 1, f"client {i}")
    assert len({row["source"] for row in learning.status()["served"]}) <= 33


def test_a_conversation_too_long_for_the_gaps_does_not_keep_others_waiting(tmp_path, drafter):
    learning, engine = make(tmp_path, drafter, gain=0.01)
    tried: list[str] = []

    def submit(key, token_ids):
        long = int(key[-1], 16) < 2
        if long:
            tried.append(key)
        else:
            engine.known.add(key)
        learning.extracted(key, complete=not long)

    engine.submit = submit  # type: ignore[method-assign]
    feed(learning, 0, 120)
    run(learning)
    status = learning.status()
    assert status["promotions"] >= 1
    assert status["gave_way"] == len(tried) >= 3
    assert all(tried[i : i + 3] == [tried[i]] * 3 for i in range(0, len(tried), 3))


def test_what_gave_way_is_still_to_be_learned(tmp_path, drafter):
    learning, engine = make(tmp_path, drafter, gain=0.01)
    busy = True

    def submit(key, token_ids):
        if not busy:
            engine.known.add(key)
        learning.extracted(key, complete=not busy)

    engine.submit = submit  # type: ignore[method-assign]
    feed(learning, 0, 120)
    for _ in range(2000):
        learning.slice()
    by_day = learning.status()
    assert by_day["steps"] == by_day["comparisons"] == 0 < by_day["to_learn"]
    busy = False
    run(learning)
    assert learning.status()["steps"] >= by_day["to_learn"]


def test_extraction_takes_steps_of_a_slice(tmp_path, drafter):
    now = [0.0]
    learning, engine = make(tmp_path, drafter, gain=0.01, clock=lambda: now[0])

    def submit(key, token_ids):
        engine.known.add(key)
        now[0] += len(token_ids) * 0.001 + 0.005
        learning.extracted(key)

    engine.submit = submit  # type: ignore[method-assign]
    feed(learning, 0, 12)
    run(learning)
    assert learning.chunk == int(19 * 0.05 / 0.024)  # of a slice of 50 ms
    now[0] += 1.0
    learning.waiting, learning._submitted = "x", now[0]
    now[0] += 1000.0
    learning.extracted("x")
    assert learning.chunk == 16, "the least"
    learning.stepped(0.7)
    assert learning.status()["longest_slice_seconds"] == 0.7


def test_sources_that_clients_name_are_bounded(tmp_path, drafter):
    learning, _ = make(tmp_path, drafter, gain=0.01)
    for i in range(300):
        learning.finished(conversation(i, f"source {i}"))
    assert len(learning.status()["replay"]["sources"]) <= 33


def test_commands_reach_the_folder_of_a_server_only(tmp_path):
    with pytest.raises(ValueError, match="no server learns"):
        send(tmp_path, "pause")
    (tmp_path / "status.json").write_text(json.dumps({"state": "learning", "error": ""}))
    assert read_status(tmp_path)["state"] == "learning"
    assert not send(tmp_path, "pause", seconds=0.2)
    written = [json.loads(f.read_text()) for f in (tmp_path / "commands").glob("*.json")]
    assert written == [{"command": "pause", "version": None}]
    with pytest.raises(ValueError, match="there is no version 3"):
        send(tmp_path, "promote", 3)
    with pytest.raises(ValueError, match="promote takes"):
        send(tmp_path, "promote")
    with pytest.raises(ValueError, match="no command"):
        send(tmp_path, "stop")


# -- watch ---------------------------------------------------------------------------------------


def test_watch_shows_the_time_between_two_readings(tmp_path):
    names = {
        "vllm:spec_decode_num_drafts_total": 10.0,
        "vllm:spec_decode_num_accepted_tokens_total": 15.0,
        "vllm:generation_tokens_total": 100.0,
        "vllm_dflash:step_seconds_total": 2.0,
        "vllm_dflash:plain_seconds_total": 3.0,
        "vllm_dflash:learn_version": 1.0,
    }
    later = {**{n: 3 * v for n, v in names.items()}, "vllm_dflash:learn_version": 2.0}
    row = between(Reading(0.0, names), Reading(10.0, later))
    assert row.tau == 2.5
    assert row.tokens_per_s == 20.0
    assert row.speedup == 1.5
    assert row.version == 2
    still = between(Reading(10.0, later), Reading(20.0, later))
    assert still.tau is None
    assert still.speedup is None
    plot([row, still], tmp_path / "w.png")
    assert is_plot(tmp_path / "w.png")


def test_metrics_are_those_of_the_page_and_the_dashboard(tmp_path, drafter):
    learning, _ = make(tmp_path, drafter, gain=0.01)
    feed(learning, 0, 120)
    run(learning)
    learning.verified(4, 2, "chat")
    collector = LearningCollector(tmp_path / "learn")
    assert list(collector.collect()) == []
    (tmp_path / "learn" / "status.json").write_text(json.dumps(learning.status()))
    names = {sample.name for family in collector.collect() for sample in family.samples}
    names = {n for n in names if not n.endswith("_created")}
    shown = set(
        re.findall(r"vllm_dflash:learn_\w+", (ROOT / "dashboards/learning.json").read_text())
    )
    assert shown <= names
    page = (ROOT / "docs/user/learning.md").read_text()
    for name in names:
        assert name.removeprefix("vllm_dflash:") in page
