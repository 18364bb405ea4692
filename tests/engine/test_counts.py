"""Draft tokens proposed and accepted: our figures and vLLM's are the same once the engine is idle."""

from __future__ import annotations

from typing import Any

import pytest

from helpers import tiny

pytestmark = pytest.mark.engine
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "size": {"type": "integer"}},
    "required": ["name", "size"],
    "additionalProperties": False,
}


def mixed(prompts: list[list[int]]) -> list[dict[str, Any]]:
    """Requests that end in every way, at different lengths, beside each other."""
    base: dict[str, Any] = {"temperature": 0.0, "max_tokens": 40}
    kinds: list[dict[str, Any]] = [
        {"ignore_eos": True},
        {"stop": ["g", "e", "\u0120"]},
        {"max_tokens": 3},
        {"max_tokens": 9, "ignore_eos": True},
        {"structured_outputs": {"json": SCHEMA}},
        {"structured_outputs": {"regex": "(red|blue) (cat|dog) [a-f]{6}"}},
        {"temperature": 0.8},
        {"stop_token_ids": [97, 215, 257]},
    ]
    params = [base | kinds[i % len(kinds)] for i in range(len(prompts))]
    run = {"prompts": prompts, "params": params, "concurrency": 6}
    # What repeats itself is what prompt lookup drafts for.
    again = {**run, "prompts": [(p * 5)[:110] for p in prompts], "name": "repeated"}
    return [
        {**run, "name": "aborted", "abort": [0, 7]},
        {**run, "name": "cut", "cut": [0, 5]},
        {**again, "cut": [0, 6]},
        {**again, "name": "cached"},
    ]


@pytest.mark.parametrize(
    "asynchronous",
    [
        pytest.param(False, id="proposer"),
        pytest.param(True, id="scheduler", marks=pytest.mark.long),
    ],
)
def test_ours_are_vllms(asynchronous, trained, prompts, tmp_path) -> None:
    """Few blocks, so that some are preempted, and few tokens a step, so that some drafts are trimmed."""
    engine = {
        "model": str(trained.verifier),
        "max_model_len": 192,
        "max_num_seqs": 6,
        "block_size": 32,
        "num_gpu_blocks_override": 14,
        "max_num_batched_tokens": 40,
        "enable_prefix_caching": True,
        "speculative_config": {"method": "dflash", "model": str(trained.drafter)},
    }
    job = {"engine": engine, "runs": mixed(prompts), "random_lengths": True}
    job |= {"async": asynchronous, "costs": [1.0, 0.001, 0.001]}
    out = tiny.engine_job(job, tmp_path)
    assert "error" not in out, out
    counters = out["counters"]
    drafted = counters["vllm:spec_decode_num_draft_tokens_total"]
    accepted = counters["vllm:spec_decode_num_accepted_tokens_total"]
    assert counters["vllm_dflash:proposed_tokens_total"] == drafted
    assert counters["vllm_dflash:accepted_tokens_total"] == accepted
    drafts = counters["vllm:spec_decode_num_drafts_total"]
    assert counters["vllm_dflash:drafts_total"] == drafts
    assert accepted > 100
    assert counters["vllm:num_preemptions_total"] > 0
    assert [run["outputs"][0] is None for run in out["runs"].values()] == [True, True, True, False]
    if not asynchronous:
        assert min(out["served"]["accepted"].values()) > 0  # from both sources
