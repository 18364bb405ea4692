"""A drafter with fewer positions than the server's requests have tokens: no drafts beyond them, all live."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from helpers import tiny
from vllm_dflash.config import FULL, SLIDING

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


def changed(drafter: Path, folder: Path, **config: Any) -> Path:
    """A drafter with another config.json."""
    to = folder / f"drafter-{len(list(folder.glob('drafter-*')))}"
    shutil.copytree(drafter, to)
    raw = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(raw | config))
    return to


@pytest.fixture(scope="module")
def runs(prompts) -> list[dict[str, Any]]:
    return cases(prompts)


def cases(prompts: list[list[int]], max_tokens: int = 40) -> list[dict[str, Any]]:
    """Prompts longer than the drafter's limit, some that cross it while decoding, short ones beside them."""
    rng = random.Random(5)

    def long(tokens: int) -> list[int]:
        return [token for _ in range(20) for token in rng.choice(prompts)][-tokens:]

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
    return {name: [o[0]["token_ids"] for o in run["outputs"]] for name, run in out["runs"].items()}


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
    # Short requests are drafted for beside a long one, and later.
    assert drafted["mixed"] + drafted.get("again", 0) > 0
    assert sum(drafted.values()) > drafted["crossing"]
    assert max(last.values()) < limit, last
    assert out["log"].count(f"drafts nothing beyond {limit} tokens") == 1


#: Seconds of a step, of a token more, of a draft pass.
CHEAP = [1.0, 0.001, 0.001]
ROPE: dict[str, Any] = {"rope_theta": 10000.0, "factor": 2.0}
YARN = {**ROPE, "rope_type": "yarn", "original_max_position_embeddings": DRAFTER // 2}
DYNAMIC = {**ROPE, "rope_type": "dynamic"}
LONG = pytest.mark.long


@pytest.mark.parametrize(
    ("lengths", "drafter", "speculative", "engine"),
    [
        ("any", {}, {}, {"num_gpu_blocks_override": 16}),
        ("scheduled", {}, {}, {}),
        pytest.param("fixed", {}, {}, {}, marks=LONG),
        pytest.param("fixed async", {}, {}, {}, marks=LONG),
        # The user's own limit, with a drafter that could go on.
        pytest.param(
            "any", {"max_position_embeddings": 512}, {"max_model_len": DRAFTER}, {}, marks=LONG
        ),
        # vLLM takes these for drafters of 400 and 200 tokens; their tables have 100 rows.
        pytest.param(
            "any", {"max_position_embeddings": 400, "rope_parameters": YARN}, {}, {}, marks=LONG
        ),
        pytest.param("fixed", {"rope_parameters": DYNAMIC}, {"dflash_ops": False}, {}, marks=LONG),
        pytest.param(
            "any",
            {"layer_types": [SLIDING, SLIDING], "sliding_window": 24, "use_sliding_window": True},
            {"draft_sample_method": "probabilistic"},
            {},
            marks=LONG,
        ),
        pytest.param(
            "scheduled",
            {"layer_types": [SLIDING, FULL], "sliding_window": 24, "use_sliding_window": True},
            {},
            {},
            marks=LONG,
        ),
    ],
    ids=[
        "auto, few blocks",
        "scheduler's",
        "fixed",
        "fixed, async",
        "the user's limit",
        "yarn",
        "dynamic, without ops",
        "sliding, sampled drafts",
        "sliding and full",
    ],
)
def test_no_draft_beyond(
    lengths, drafter, speculative, engine, trained, runs, folder, plain
) -> None:
    """Same text, whatever chooses the lengths, and whatever says how many positions the drafter has."""
    given = changed(trained.drafter, folder, **{"max_position_embeddings": DRAFTER} | drafter)
    if "fixed" in lengths:
        speculative = {**speculative, "dflash_draft_length": "fixed"}
    job: dict[str, Any] = {"random_lengths": "fixed" not in lengths, "costs": CHEAP}
    job["async"] = lengths in ("scheduled", "fixed async")
    out = served(trained, given, runs, folder, speculative=speculative, engine=engine, **job)
    check(out, plain)
    preempted = out["counters"]["vllm:num_preemptions_total"]
    assert (preempted > 0) == ("num_gpu_blocks_override" in engine)


@LONG
def test_steps_are_measured_with_few_positions(trained, runs, folder, plain) -> None:
    """40 positions, fewer than the dummy steps have context; the policy as it is."""
    given = changed(trained.drafter, folder, max_position_embeddings=40)
    out = served(trained, given, runs, folder)
    assert tokens(out) == plain
    assert max(run["last_draft"] for run in out["runs"].values()) < 40
    assert "fixed number" not in out["log"]
    assert sum(out["lengths"]["lengths"][1:]) > 0


@LONG
@pytest.mark.parametrize(
    ("speculative", "job"),
    [
        ({}, {"random_lengths": True, "async": True}),
        pytest.param(
            {"dflash_ops": False, "dflash_draft_length": "fixed"}, {}, marks=pytest.mark.slow
        ),
    ],
    ids=["scheduler's", "fixed, without ops"],
)
def test_the_v2_runner(speculative, job, trained, prompts, folder) -> None:
    """Where stock vLLM reads behind the drafter's rotary table, which ends the engine."""
    given = changed(trained.drafter, folder, max_position_embeddings=DRAFTER)
    by_name = {run["name"]: run for run in cases(prompts, max_tokens=12)}
    long, short, crossing = (by_name["mixed"]["prompts"][i] for i in (0, 1, 4))
    runs = [
        {**by_name["beyond"], "prompts": [long]},
        {**by_name["crossing"], "prompts": [crossing]},
        {**by_name["mixed"], "prompts": [long, short, crossing]},
    ]
    engine = {"engine": {"model": str(trained.verifier), **ENGINE}, "runs": runs}
    plain = tokens(tiny.engine_job(engine, folder))
    out = served(
        trained, given, runs, folder, speculative=speculative, runner="v2", costs=CHEAP, **job
    )
    assert out["runner"].startswith("vllm.v1.worker.cpu.model_runner")
    check(out, plain)


@LONG
def test_training_and_evaluation(trained, folder) -> None:
    """Begun from a drafter with few positions, and evaluated: nothing beyond is learned or counted."""
    given = changed(trained.drafter, folder, max_position_embeddings=80)
    data = ("--data", trained.prompts)
    out = folder / "further"
    done = tiny.cli(
        "train", trained.verifier, *data, "--init-from", given, "-o", out, "--max-steps", "3",
        "--dtype", "float32", "--autocast", "float32", "--max-len", "160", "--max-tokens", "48",
    )  # fmt: skip
    assert "conversations are cut to 77 tokens, not 160" in done.stderr
    assert json.loads((out / "config.json").read_text())["max_position_embeddings"] == 80
    figures = folder / "eval.json"
    done = tiny.cli(
        "eval", trained.verifier, out, *data, "--engine", "-o", figures,
        "--max-tokens", "48", "--dtype", "float32", "--max-len", "160",
        "--engine-args", '{"enforce_eager": true}',
    )  # fmt: skip
    assert "conversations are cut to 71 tokens, not 160" in done.stderr
    got = json.loads(figures.read_text())
    assert got["offline"]["skipped"] == {}
    assert got["offline"]["num_drafts"] > 0
    assert got["engine"]["num_drafts"] > 0
