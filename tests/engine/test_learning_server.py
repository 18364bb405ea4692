"""A vLLM server that learns: what it answers, what it serves after a swap, a kill, a restart."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file, save_file

from helpers import tiny
from helpers.api_server import Server, serving

pytestmark = [pytest.mark.engine, pytest.mark.long]
TOKENS = 4
FIXED = {"method": "dflash", "num_speculative_tokens": TOKENS, "dflash_draft_length": "fixed"}
#: A tiny model learns little at a rate for real ones.
LEARN = {"dflash_learn_lr": 0.01, "dflash_learn_slice_ms": 50}


def complete(server: Server, seed: int, tokens: int = 24, **xargs: Any) -> str:
    body = {
        "model": "model",
        "prompt": tiny.sentence(random.Random(seed), 12),
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "vllm_xargs": xargs,
    }
    request = urllib.request.Request(
        f"{server.url}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.loads(answer.read())["choices"][0]["text"]


def complete_all(server: Server, seeds: range, tokens: int = 24, **xargs: Any) -> list[str]:
    with ThreadPoolExecutor(6) as pool:
        return list(pool.map(lambda seed: complete(server, seed, tokens, **xargs), seeds))


def status(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "status.json").read_text())


def learned(folder: Path, **wanted: int) -> dict[str, Any]:
    """The status once nothing is done any more and the figures are at least as wanted."""
    end = time.monotonic() + 480
    before = status(folder)
    while time.monotonic() < end:
        time.sleep(3)
        now = status(folder)
        assert now["state"] == "learning", now
        still = now["slices"] == before["slices"] and now["to_learn"] == 0
        if still and all(now[k] >= n for k, n in wanted.items()):
            return now
        before = now
    raise AssertionError(before)


def acceptance(server: Server) -> tuple[float, float]:
    """Drafts and accepted tokens of requests that nobody learns from."""
    names = [f"vllm:spec_decode_num_{n}_total" for n in ("drafts", "accepted_tokens")]
    before = server.counters()
    for seed in range(900, 912):  # one by one: the same batches each time
        complete(server, seed, dflash_learn="false")
    after = server.counters()
    return tuple(after[n] - before[n] for n in names)  # type: ignore[return-value]


@pytest.fixture(scope="module")
def verifier(tmp_path_factory) -> Path:
    return tiny.make_verifier(tmp_path_factory.mktemp("learning") / "verifier")


@pytest.fixture(scope="module")
def answers(verifier, tmp_path_factory) -> list[str]:
    """Of a server without speculation."""
    with serving(verifier, tmp_path_factory.mktemp("plain") / "s") as server:
        return complete_all(server, range(160))


@pytest.mark.parametrize("runner", ["v1", "v2"])
@pytest.mark.parametrize("everything", [False, True], ids=["decode", "all"])
def test_a_swap_puts_every_weight_in_place(verifier, tmp_path, everything, runner):
    drafter = tiny.make_drafter(tmp_path / "drafter", verifier)
    job = {"verifier": str(verifier), "drafter": str(drafter), "everything": everything}
    out = tiny.engine_job({**job, "runner": runner}, tmp_path, module="helpers.learning_job")
    assert {k: v for k, v in out["after"].items() if v > 1e-5} == {}
    # With it, these would have differed.
    changed = {"qkv", "o", "gate_up", "down", "norms"} | (
        {"fc", "context"} if everything else set()
    )
    assert {k for k, v in out["before"].items() if v > 1e-3} == changed
    assert out["same_addresses"]
    assert out["embedding_kept"]
    of_context = [n for n in out["learned"] if "k_proj" in n or n.startswith(("fc", "hidden_norm"))]
    assert bool(of_context) == everything


def test_a_swap_serves_what_a_restart_serves(verifier, answers, tmp_path):
    folder = tmp_path / "learn"
    spec = {**FIXED, **LEARN, "model": "auto", "dflash_learn": str(folder)}
    with serving(verifier, tmp_path / "s", speculative=spec) as server:
        before = acceptance(server)
        got = complete_all(server, range(100), dflash_source="test")
        learned(folder, captured=100)
        # While weights are swapped between requests' steps, too.
        got += complete_all(server, range(100, 160), dflash_source="test")
        now = learned(folder, captured=160, promotions=1)
        after = acceptance(server)
        metrics = server.counters()
        shown = tiny.cli("learn", "status", folder).stdout
    assert got == answers
    assert after[1] / after[0] > before[1] / before[0]
    assert now["version"] >= 1
    assert set(now["replay"]["sources"]) == {"test"}, "those with dflash_learn false are left out"
    assert metrics["vllm_dflash:learn_promotions_total"] == now["promotions"]
    assert "promotions, rollbacks" in shown
    served = folder / "versions" / f"{now['version']:06d}"
    with serving(
        verifier, tmp_path / "again", speculative={**FIXED, "model": str(served)}
    ) as fresh:
        assert acceptance(fresh) == after


def test_the_v2_runner_learns(verifier, answers, tmp_path):
    """Its kernels are interpreted, in every process of the server: short answers, and a version by hand."""
    folder = tmp_path / "learn"
    spec = {**FIXED, **LEARN, "model": "auto", "dflash_learn": str(folder)}
    with serving(verifier, tmp_path / "s", speculative=spec, v2=True) as server:
        got = complete_all(server, range(40), tokens=12)
        now = learned(folder, captured=40)
        first, other = (folder / "versions" / f"{n:06d}" for n in (0, now["version"] + 1))
        shutil.copytree(first, other)
        with ThreadPoolExecutor(1) as pool:
            more = pool.submit(complete_all, server, range(40, 60), tokens=12)
            tiny.cli("learn", "promote", folder, str(int(other.name)))
            got += more.result()
        assert status(folder)["version"] == int(other.name)
    assert [a[: len(g)] for a, g in zip(answers[:60], got, strict=True)] == got
    assert sum(map(bool, got)) > 50
    assert now["extracted"] >= 30
    assert now["steps"] > 150
    assert now["not_extracted"] == now["skipped_sequences"] == 0


def test_two_ranks_learn(verifier, answers, trained, tmp_path):
    """Each has its shard of a version's weights, while requests run, too."""
    folder, two = tmp_path / "learn", ("--tensor-parallel-size", "2")
    spec = {**FIXED, **LEARN, "model": str(trained.drafter), "dflash_learn": str(folder)}
    with serving(verifier, tmp_path / "s", *two, speculative=spec) as server:
        got = complete_all(server, range(40))
        now = learned(folder, captured=40)
        other = tmp_path / "other"
        shutil.copytree(folder / "versions" / "000000", other)
        weights = load_file(other / "model.safetensors")
        for name, weight in weights.items():
            if "o_proj" in name or "mlp" in name:
                weight.mul_(0.8)
        save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
        shutil.copytree(other, folder / "versions" / f"{now['version'] + 1:06d}")
        with ThreadPoolExecutor(1) as pool:
            more = pool.submit(complete_all, server, range(40, 100))
            tiny.cli("learn", "promote", folder, str(now["version"] + 1))
            got += more.result()
        assert status(folder)["version"] == now["version"] + 1
        after = acceptance(server)
    assert got == answers[:100]
    assert after[1] > 5, "weights that are mixed up draft what chance accepts, one token or two"
    assert now["steps"] > 10
    assert now["skipped_sequences"] == 0
    with serving(
        verifier, tmp_path / "again", *two, speculative={**FIXED, "model": str(other)}
    ) as fresh:
        assert acceptance(fresh) == after


def test_another_server_learns(verifier, answers, tmp_path):
    """One serves and keeps, the other one, elsewhere, learns."""
    drafter = tiny.make_drafter(tmp_path / "drafter", verifier, draft_vocab_size=300)
    serves, learns = tmp_path / "serves", tmp_path / "learns"
    spec = {**FIXED, "model": str(drafter), "dflash_learn": str(serves)}
    spec |= {"dflash_learn_weights": "none", "dflash_learn_store": "disk"}
    other = {**FIXED, **LEARN, "model": str(drafter), "dflash_learn": str(learns)}
    other["dflash_learn_from"] = str(serves)
    with serving(verifier, tmp_path / "s", speculative=spec) as server:
        before = acceptance(server)
        got = complete_all(server, range(110))
        with serving(verifier, tmp_path / "o", speculative=other) as learner:
            learned(learns, captured=110, promotions=1)
            engines = learner.engines()
            assert engines
            for process in engines:
                process.kill()
        end = time.monotonic() + 20  # it looks every second or so
        while status(serves)["version"] < 1 and time.monotonic() < end:
            time.sleep(0.2)
        got += complete_all(server, range(110, 160))
        now = status(serves)
        after = acceptance(server)
    assert got == answers
    assert after[1] / after[0] > before[1] / before[0] + 0.05
    assert now["steps"] == now["extracted"] == 0
    assert now["version"] >= 1
    assert now["history"][-1]["tau_after"] > now["history"][-1]["tau_before"]


def test_kills_and_commands(verifier, answers, tmp_path):
    folder = tmp_path / "learn"
    spec = {**FIXED, **LEARN, "model": "auto", "dflash_learn": str(folder)}
    spec["dflash_learn_store"] = "disk"
    for attempt in range(3):
        # Killed while it learns, whatever it is at.
        with serving(verifier, tmp_path / f"s{attempt}", speculative=spec) as server:
            seeds = range(50 * attempt, 50 * attempt + 50)
            assert complete_all(server, seeds) == [answers[s] for s in seeds]
            time.sleep(1 + attempt)
            engines = server.engines()
            assert engines
            for process in engines:
                process.kill()
            psutil.wait_procs(engines, timeout=30)
    with serving(verifier, tmp_path / "last", speculative=spec) as server:
        now = learned(folder, promotions=0)
        assert now["captured"] >= 120, "conversations of before are read from disk"
        assert complete_all(server, range(40)) == answers[:40]
        learned(folder)
        version = status(folder)["version"]
        other = version + 1
        shutil.copytree(
            folder / "versions" / f"{version:06d}", folder / "versions" / f"{other:06d}"
        )
        tiny.cli("learn", "promote", folder, str(other))
        end = time.monotonic() + 20
        while status(folder)["version"] != other and time.monotonic() < end:
            time.sleep(0.2)
        assert status(folder)["version"] == other
        assert complete_all(server, range(40)) == answers[:40]
        # Of another drafter, and not finite: what serves stays, and learning goes on.
        foreign, sick = (folder / "versions" / f"{other + i:06d}" for i in (1, 2))
        tiny.make_drafter(foreign, verifier, num_hidden_layers=2)
        shutil.copytree(folder / "versions" / f"{other:06d}", sick)
        weights = load_file(sick / "model.safetensors")
        weights["norm.weight"][3] = float("nan")
        save_file(weights, sick / "model.safetensors", metadata={"format": "pt"})
        for version in (foreign, sick):
            tiny.cli("learn", "promote", folder, str(int(version.name)))
        time.sleep(2)
        now = status(folder)
        assert (now["version"], now["state"]) == (other, "learning"), now
        assert complete_all(server, range(40)) == answers[:40]
        assert tiny.cli("learn", "pause", folder).returncode == 0
        end = time.monotonic() + 20
        while status(folder)["state"] != "paused" and time.monotonic() < end:
            time.sleep(0.2)
        assert status(folder)["state"] == "paused"


def test_a_full_folder_and_a_filter_do_not_touch_the_answers(verifier, answers, tmp_path):
    (tmp_path / "hooks").mkdir()
    (tmp_path / "hooks" / "myhook.py").write_text(
        "def keep(conversation):\n"
        "    if conversation.source == 'secret':\n"
        "        return None\n"
        "    if conversation.source == 'broken':\n"
        "        raise RuntimeError('in the hook')\n"
        "    return conversation\n"
    )
    folder = tmp_path / "learn"
    spec = {**FIXED, **LEARN, "model": "auto", "dflash_learn": str(folder)}
    spec["dflash_learn_filter"] = "myhook:keep"
    paths = os.pathsep.join([str(tmp_path / "hooks"), os.environ.get("PYTHONPATH", "")])
    with serving(
        verifier, tmp_path / "s", speculative=spec, environment={"PYTHONPATH": paths}
    ) as server:
        got = []
        for n, source in ((0, "secret"), (10, "broken"), (20, "mine")):
            got += complete_all(server, range(n, n + 10), dflash_source=source)
        learned(folder, captured=10)
        now = status(folder)
    assert got == answers[:30]
    kept = {**now["replay"]["sources"], **now["held_out"]["sources"]}
    assert set(kept) == {"mine"}
    assert now["captured"] == 10


def test_conversations_come_in_steps_of_a_slice(verifier, answers, tmp_path):
    """In a millisecond not a whole one fits: each is computed in parts, beside requests, too."""
    folder = tmp_path / "learn"
    spec = {**FIXED, **LEARN, "model": "auto", "dflash_learn": str(folder)}
    spec |= {"dflash_learn_slice_ms": 1, "dflash_learn_share": 0.5}
    with serving(verifier, tmp_path / "s", speculative=spec) as server:
        got = complete_all(server, range(60), tokens=90)
        now = learned(folder, captured=60)
    assert [g[: len(a)] for g, a in zip(got, answers[:60], strict=True)] == answers[:60]
    kept = sum(now["replay"]["sources"].values())
    assert now["extracted"] >= kept > 30, now
    assert now["not_extracted"] == now["skipped_sequences"] == 0
    assert now["steps"] > 200


def test_a_server_that_cannot_learn_says_so(verifier, tmp_path):
    spec = {**FIXED, "model": "auto", "dflash_learn": str(tmp_path / "learn")}
    code = (
        "from vllm import EngineArgs\n"
        f"EngineArgs(model={str(verifier)!r}, speculative_config={spec!r}, pipeline_parallel_size=2)"
        ".create_engine_config()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=tiny.environment(), capture_output=True, text=True
    )
    assert done.returncode
    assert "dflash_learn is set and pipeline_parallel_size is 2" in done.stderr
