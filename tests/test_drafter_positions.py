"""A drafter with fewer positions than the server's requests have tokens: nothing is drafted beyond, all live."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny

pytestmark = pytest.mark.engine
SERVER, DRAFTER = 224, 100
ENGINE: dict[str, Any] = {
    "max_model_len": SERVER,
    "max_num_seqs": 6,
    "enable_prefix_caching": True,
    "block_size": 32,
    # Long prompts come in pieces, one of which crosses the drafter's end.
    "max_num_batched_tokens": 72,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("positions")


def changed(drafter: Path, to: Path, **config: Any) -> Path:
    """A drafter with another config.json."""
    shutil.copytree(drafter, to)
    raw = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(raw | config))
    return to


@pytest.fixture(scope="module")
def short(trained, folder) -> Path:
    return changed(trained.drafter, folder / "short", max_position_embeddings=DRAFTER)


@pytest.fixture(scope="module")
def runs(prompts) -> list[dict[str, Any]]:
    return cases(prompts)


def cases(prompts: list[list[int]], max_tokens: int = 40) -> list[dict[str, Any]]:
    """Prompts longer than the drafter's limit, some that cross it while decoding, short ones beside them."""
    rng = random.Random(5)

    def long(tokens: int) -> list[int]:
        joined = sum((rng.choice(prompts) for _ in range(20)), [])
        return joined[-tokens:]

    params = {"temperature": 0.0, "max_tokens": max_tokens, "ignore_eos": True}
    beyond = [long(n) for n in (150, 101, 129)]
    crossing = [long(n) for n in (DRAFTER - 1, DRAFTER - 8, DRAFTER - 30, DRAFTER)]
    full = {**params, "max_tokens": SERVER}
    mixed = [beyond[0], *prompts[:3], crossing[1], prompts[3]]

    def run(name: str, given: list[list[int]], concurrency: int = 6, params=params) -> dict:
        return {"name": name, "prompts": given, "params": params, "concurrency": concurrency}

    return [
        run("beyond", beyond, 2),
        run("crossing", crossing, 1),
        run("mixed", mixed),
        run("again", mixed),  # from the prefix cache
        run("to the server's end", [prompts[0], long(90)], params=full),
        run("after", prompts[:4]),
    ]


def tokens(out: dict[str, Any]) -> dict[str, list[list[int]]]:
    assert "error" not in out, out
    return {
        name: [o[0]["token_ids"] for o in run["outputs"]] for name, run in out["runs"].items()
    }


@pytest.fixture(scope="module")
def plain(trained, runs, folder) -> dict[str, list[list[int]]]:
    job = {"engine": {"model": str(trained.verifier), **ENGINE}, "runs": runs}
    return tokens(tiny.engine_job(job, folder))


def served(trained, drafter, runs, folder, *, speculative=None, engine=None, **job) -> dict:
    spec = {"method": "dflash", "model": str(drafter), **(speculative or {})}
    given = {
        "model": str(trained.verifier),
        **ENGINE,
        "speculative_config": spec,
        **(engine or {}),
    }
    return tiny.engine_job({"engine": given, "runs": runs, **job}, folder, timeout=900)


def check(out: dict[str, Any], plain: dict[str, Any], limit: int = DRAFTER) -> None:
    assert tokens(out) == plain
    drafted = {
        name: run["counters"].get("vllm:spec_decode_num_draft_tokens_total", 0)
        for name, run in out["runs"].items()
    }
    last = {name: run["last_draft"] for name, run in out["runs"].items()}
    assert drafted["beyond"] == 0
    assert all(drafted[name] > 0 for name in ("mixed", "again", "after")), drafted
    assert max(last.values()) < limit, last
    assert out["log"].count(f"drafts nothing beyond {limit} tokens") == 1


CHEAP = [1.0, 0.001, 0.001]


@pytest.mark.parametrize(
    ("lengths", "asynchronous"),
    [("any", False), ("fixed", False), ("any", True), ("fixed", True)],
    ids=["auto", "fixed", "scheduler's", "fixed async"],
)
def test_no_draft_beyond(lengths, asynchronous, trained, short, runs, folder, plain) -> None:
    """Same text, and short requests are drafted for beside a long one."""
    speculative = {"dflash_draft_length": "fixed"} if lengths == "fixed" else {}
    job = {"random_lengths": lengths == "any", "async": asynchronous, "costs": CHEAP}
    out = served(trained, short, runs, folder, speculative=speculative, **job)
    check(out, plain)
