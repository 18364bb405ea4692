"""Draft lengths that the scheduler chooses: on vLLM's V2 runner, interpreted, and on V1 scheduled ahead."""

from __future__ import annotations

from pathlib import Path

import pytest
from vllm import envs

from helpers import tiny
from helpers.parity import Reference, check_drafts, drafted

pytestmark = pytest.mark.engine
MAX_TOKENS = 20
#: Seconds of a step, of a token more, of a draft pass.
CHEAP, DEAR = (1.0, 0.001, 0.001), (1.0, 1.0, 5.0)
SCHEDULERS = pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("v2-lengths")


@pytest.fixture(scope="module")
def plain(trained, prompts, folder) -> list[list[int]]:
    """What the verifier says alone, on the V1 runner."""
    job = {
        "engine": {"model": str(trained.verifier), "max_model_len": 192, "max_num_seqs": 4},
        "runs": [greedy(prompts)],
    }
    return token_ids(tiny.engine_job(job, folder))


def greedy(prompts) -> dict:
    params = {"temperature": 0.0, "max_tokens": MAX_TOKENS, "ignore_eos": True}
    return {"name": "run", "prompts": prompts[:6], "params": params, "concurrency": 4}


def token_ids(out) -> list[list[int]]:
    assert "error" not in out, out
    return [o[0]["token_ids"] for o in out["runs"]["run"]["outputs"]]


def served(
    trained, folder, run, asynchronous, *, costs=CHEAP, engine=None, runner="v2", env=None, **job
) -> dict:
    speculative = {"method": "dflash", "model": str(trained.drafter)}
    speculative |= job.pop("speculative", {})
    given = {
        "model": str(trained.verifier),
        "max_model_len": 192,
        "max_num_seqs": 4,
        "enable_prefix_caching": False,
        "speculative_config": speculative,
        **(engine or {}),
    }
    job |= {"engine": given, "runner": runner, "async": asynchronous, "costs": costs, "runs": [run]}
    out = tiny.engine_job(
        job, folder, timeout=900, env={"VLLM_LOGGING_LEVEL": "INFO", **(env or {})}
    )
    assert "error" not in out, out
    assert out["batches"] == 1 + asynchronous
    return out


@pytest.mark.parametrize(
    ("runner", "asynchronous"),
    [("v2", False), ("v2", True), ("v1", True)],
    ids=["V2 sync", "V2 async", "V1 async"],
)
def test_lengths_and_pauses_change_nothing(
    runner, asynchronous, trained, prompts, folder, plain
) -> None:
    """Random lengths, now and then no draft pass: outputs are the verifier's, later drafts PyTorch's."""
    out = drafted(
        trained.verifier,
        trained.drafter,
        prompts[:6],
        folder,
        runner=runner,
        max_tokens=MAX_TOKENS,
        random_lengths=True,
        job={"async": asynchronous, "costs": CHEAP},
    )
    assert out["batches"] == 1 + asynchronous
    name = "AsyncScheduler" if asynchronous else "Scheduler"
    assert out["scheduler"] == f"vllm_dflash.serving.engine_core.scheduler.{name}"
    assert token_ids(out) == plain
    figures = out["lengths"]
    assert figures["steps"] > 15
    assert 0.2 * figures["steps"] < figures["drafted_steps"] < 0.9 * figures["steps"]
    assert all(n > 0 for n in figures["lengths"])
    assert check_drafts(out, Reference(trained.verifier, trained.drafter), 7) > 150
    counters = out["runs"]["run"]["counters"]
    accepted = counters["vllm:spec_decode_num_accepted_tokens_total"]
    assert 0 < figures["accepted"]["drafter"] <= accepted
    assert figures["proposed"]["drafter"] <= counters["vllm:spec_decode_num_draft_tokens_total"]


@pytest.mark.long
@SCHEDULERS
def test_few_blocks(asynchronous, trained, prompts, folder, plain) -> None:
    """Preempted requests, prompts in chunks, cached prefixes."""
    engine = {
        "block_size": 32,
        "num_gpu_blocks_override": 8,
        "enable_prefix_caching": True,
        "max_num_batched_tokens": 64,
    }
    out = served(trained, folder, greedy(prompts), asynchronous, engine=engine, random_lengths=True)
    assert token_ids(out) == plain
    assert out["counters"]["vllm:num_preemptions_total"] > 0


def test_it_drafts_if_that_pays(trained, prompts, folder, plain) -> None:
    """The policy itself, by the costs that the workers hand over."""
    steps = {}
    for costs in (CHEAP, DEAR):
        out = served(trained, folder, greedy(prompts), True, costs=costs)
        assert token_ids(out) == plain
        assert "chooses draft lengths in the scheduler" in out["log"]
        assert "drafts a fixed number" not in out["log"]
        figures = out["lengths"]
        steps[costs] = figures["drafted_steps"] / figures["steps"]
        scraped = out["runs"]["run"]["counters"]["vllm_dflash:steps_total"]
        assert 0 < scraped <= figures["steps"]
    assert steps[CHEAP] > 0.8
    assert steps[DEAR] < 0.2


@pytest.mark.long
@SCHEDULERS
def test_structured_output(asynchronous, trained, prompts, folder) -> None:
    """Drafts are checked against a grammar; requests without one are in the same batch."""
    grammar = {"structured_outputs": {"regex": "(red|blue|green) (cat|dog) [a-f]{6}"}}
    params = [
        {"temperature": 0.0, "max_tokens": 16, **(grammar if i % 2 else {"ignore_eos": True})}
        for i in range(4)
    ]
    run = {**greedy(prompts[:4]), "params": params}
    out = served(trained, folder, run, asynchronous, random_lengths=True)
    alone = tiny.engine_job(
        {
            "engine": {"model": str(trained.verifier), "max_model_len": 192, "max_num_seqs": 4},
            "runs": [run],
        },
        folder,
    )
    assert token_ids(out) == token_ids(alone)
    assert out["lengths"]["proposed"]["drafter"] > 0


def test_the_users_table_is_a_limit(trained, prompts, folder, plain) -> None:
    """vLLM's own choice by batch size goes on top: no more than it says, none where it says so."""
    table = {"num_speculative_tokens_per_batch_size": [[1, 2, 3], [3, 4, 0]]}
    out = served(trained, folder, greedy(prompts), True, speculative=table)
    assert token_ids(out) == plain
    lengths = out["lengths"]["lengths"]
    assert sum(lengths[1:4]) > 0
    assert sum(lengths[4:]) == 0


def test_a_scheduler_of_the_user(trained, prompts, folder, plain) -> None:
    """It stays, lengths stay fixed, and the log says so."""
    engine = {"scheduler_cls": "helpers.own_scheduler.OwnScheduler"}
    out = served(trained, folder, greedy(prompts), False, engine=engine)
    assert token_ids(out) == plain
    assert out["scheduler"] == "helpers.own_scheduler.OwnScheduler"
    assert "drafts a fixed number of tokens: the scheduler is helpers.own_scheduler" in out["log"]
    assert "lengths" not in out


@pytest.mark.parametrize("runner", ["v1", pytest.param("v2", marks=pytest.mark.slow)])
def test_steps_are_measured(runner, trained, prompts, folder, plain) -> None:
    """Dummy steps and draft passes; on V2 a minute of them, interpreted."""
    cache = folder / f"cache-{runner}"
    cache.mkdir()
    # What vLLM knows of its models takes it as long as the rest.
    known = Path(envs.VLLM_CACHE_ROOT, "modelinfos")
    known.mkdir(parents=True, exist_ok=True)
    (cache / "modelinfos").symlink_to(known)
    env = {"VLLM_CACHE_ROOT": str(cache)}
    run = greedy(prompts)
    out = served(trained, folder, run, True, costs=None, runner=runner, env=env)
    assert "measured its steps in" in out["log"]
    assert token_ids(out) == plain
    assert out["lengths"]["steps"] > 0
