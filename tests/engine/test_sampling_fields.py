"""Each field of ``SamplingParams`` gives with a drafter what it gives without: requests of all kinds in one
batch. What clients send over HTTP is in test_request_fields.py."""

from __future__ import annotations

from typing import Any

import pytest

from helpers import tiny

pytestmark = pytest.mark.engine
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 40}
SAMPLED: dict[str, Any] = {"temperature": 0.7, "max_tokens": 40}
#: The chat template ends in the start, so that every answer begins with thinking.
REASONING = {"reasoning_start_str": "<|im_start|>assistant", "reasoning_end_str": " the cat"}
TOKENS = [97, 98, 260]
#: Tokens in a block of the KV cache. A request of which all but a token is cached has its first step padded.
BLOCK = 32
CASES: dict[str, dict[str, Any]] = {
    "greedy": GREEDY,
    "temperature, top_k, top_p, seed": SAMPLED | {"seed": 5, "top_k": 20, "top_p": 0.9},
    "seed, another": SAMPLED | {"seed": 1},
    "seed and penalties": SAMPLED | {"seed": 7, "repetition_penalty": 1.3, "presence_penalty": 1.0},
    "seed, n": SAMPLED | {"seed": 9, "n": 3},
    "seed and min_tokens": SAMPLED | {"seed": 11, "min_tokens": 12},
    "seed and a budget": SAMPLED | {"seed": 3, "thinking_token_budget": 15},
    "seed and a grammar": SAMPLED | {"seed": 13, "structured_outputs": {"regex": "[a-z ]{9,20}"}},
    "seed and logprobs": SAMPLED | {"seed": 15, "logprobs": 2},
    "stop_token_ids": GREEDY | {"stop_token_ids": [97, 215, 257, 260, 265, 270]},
    "min_tokens": GREEDY | {"min_tokens": 9},
    "repetition_penalty": GREEDY | {"repetition_penalty": 1.3},
    "frequency_penalty, presence_penalty": GREEDY
    | {"frequency_penalty": 0.5, "presence_penalty": -0.5},
    "bad_words": GREEDY | {"bad_words": ["a", "the", "red cat"]},
    "allowed_token_ids": GREEDY | {"allowed_token_ids": list(range(97, 140))},
    "logprobs": GREEDY | {"logprobs": 3},
    "prompt_logprobs": GREEDY | {"prompt_logprobs": 2},
    # Of two tokens no four are without a repetition.
    "repetition_detection": GREEDY
    | {
        "repetition_detection": {"max_pattern_size": 4, "min_count": 2},
        "allowed_token_ids": [20, 30],
    },
    "stop, include_stop_str_in_output": GREEDY
    | {"stop": ["g", "\u0120"], "include_stop_str_in_output": True},
    "max_tokens": GREEDY | {"max_tokens": 1},
    "ignore_eos": GREEDY | {"ignore_eos": True, "max_tokens": 60},
    "structured_outputs": GREEDY | {"structured_outputs": {"regex": "[ -~]{20,40}"}},
    **{
        f"thinking_token_budget {b}": GREEDY | {"thinking_token_budget": b}
        for b in (0, 1, 5, 8, 20)
    },
}
NAMES = list(CASES)


def runs(prompts: list[list[int]]) -> list[dict[str, Any]]:
    """All kinds in one batch, on two prompts each; and those that ask for given log probabilities, beside
    which vLLM garbles those of others, drafter or not."""
    mixed = [prompts[(i + 7 * k) % len(prompts)] for k in range(2) for i in range(len(CASES))]
    a_block_more = [p[: BLOCK + 1] for p in prompts if len(p) > BLOCK][:4]
    scored = GREEDY | {"max_tokens": 20, "logprob_token_ids": TOKENS}
    return [
        {"name": "known", "prompts": prompts, "params": GREEDY, "concurrency": 12},
        {"name": "mixed", "prompts": mixed, "params": [*CASES.values()] * 2, "concurrency": 12},
        {
            "name": "logprob_token_ids",
            "prompts": prompts[:9],
            "params": [scored, GREEDY, GREEDY | {"logprobs": 2}] * 3,
            "concurrency": 9,
        },
        *(
            {"name": n, "prompts": a_block_more, "params": SAMPLED | {"seed": 1}, "concurrency": 2}
            for n in ("a block and a token", "again")
        ),
    ]


def ends(known: dict[str, Any], prompts: list[list[int]]) -> tuple[dict[str, Any], list[list[int]]]:
    """A run whose requests end at ``min_tokens`` or soon after, and the tokens of each: stopped by one that
    the greedy answer has there for the first time."""
    asked, params, tokens = [], [], []
    for prompt, output in zip(prompts, known["outputs"], strict=True):
        answer = output[0]["token_ids"]
        for at in range(4, min(len(answer), 24)):
            if answer[at] not in answer[:at]:
                stop = {"stop_token_ids": [answer[at]], "min_tokens": at - at % 2}
                asked.append(prompt)
                params.append(GREEDY | stop)
                tokens.append(answer[: at + 1])
    run = {"name": "ends", "prompts": asked, "params": params, "concurrency": 12}
    return run, tokens


def served(
    verifier, drafter, prompts, folder, lengths: str, more: Any = (), **engine: Any
) -> dict[str, Any]:
    """One engine's outputs; ``lengths``: none, fixed, any, or scheduled, which is any a step ahead."""
    engine = {
        "model": str(verifier),
        "max_model_len": 192,
        "max_num_seqs": 16,
        "enable_prefix_caching": False,
        "reasoning_config": REASONING,
        **engine,
    }
    job: dict[str, Any] = {"engine": engine, "runs": [*runs(prompts), *more]}
    if lengths != "none":
        option = "fixed" if lengths == "fixed" else "auto"
        engine["speculative_config"] = {
            "method": "dflash",
            "model": str(drafter),
            "dflash_draft_length": option,
        }
        job["random_lengths"] = lengths != "fixed"
    if lengths == "scheduled":
        job |= {"async": True, "costs": [1.0, 0.001, 0.001]}
    out = tiny.engine_job(job, folder)
    assert "error" not in out, out["error"]
    if lengths != "none":
        assert out["counters"]["vllm:spec_decode_num_accepted_tokens_total"] > 100
        assert out["batches"] == 1 + (lengths == "scheduled")
    return out["runs"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fields")


@pytest.fixture(scope="module")
def plain(trained, prompts, folder) -> dict[str, Any]:
    return served(trained.verifier, None, prompts, folder, "none")


def differences(got: dict[str, Any], want: dict[str, Any], run: str) -> list[str]:
    """Names of the requests of a run whose answers differ."""
    known = {"mixed": NAMES * 2, "logprob_token_ids": ["scored", "plain", "garbled"] * 3}
    names = known.get(run, ["greedy" if run == "known" else "seed"] * len(want[run]["outputs"]))
    pairs = zip(names, got[run]["outputs"], want[run]["outputs"], strict=True)
    return [
        name
        for name, outputs, wanted in pairs
        for a, b in zip(outputs, wanted, strict=True)
        if not (a["token_ids"] == b["token_ids"] if name == "garbled" else alike(a, b))
    ]


def alike(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two outputs are the same, with log probabilities within 1e-3."""
    if a.keys() != b.keys():
        return False
    for key in a:
        if not key.endswith("logprobs"):
            if a[key] != b[key]:
                return False
            continue
        for x, y in zip(a[key], b[key], strict=True):
            # Given tokens that a request did not ask for are at -inf.
            x, y = ({t: p for t, p in z if p > -1e30} for z in (x, y))
            if x.keys() != y.keys() or any(abs(x[t] - y[t]) > 1e-3 for t in x):
                return False
    return True


@pytest.mark.parametrize(
    "lengths", ["any", *(pytest.param(x, marks=pytest.mark.long) for x in ("fixed", "scheduled"))]
)
def test_as_without_a_drafter(trained, prompts, folder, plain, lengths) -> None:
    until, tokens = ends(plain["known"], prompts)
    assert len(tokens) > 100
    out = served(trained.verifier, trained.drafter, prompts, folder, lengths, more=[until])
    for run in plain:
        assert differences(out, plain, run) == []
    assert [o[0]["token_ids"] for o in out["ends"]["outputs"]] == tokens


def test_the_cases_are_not_empty(plain, prompts) -> None:
    """Guards the guards: what the fields do can be seen."""
    found: dict[str, list[Any]] = {}
    for name, outputs in zip(NAMES * 2, plain["mixed"]["outputs"], strict=True):
        found.setdefault(name, []).append(outputs)
    assert all(len(o) == len({tuple(c["token_ids"]) for c in o}) == 3 for o in found["seed, n"])
    assert all(o[0]["stop"] == "repetition_detected" for o in found["repetition_detection"])
    for name in ("thinking_token_budget 0", "thinking_token_budget 8"):
        assert all(" the cat" in o[0]["text"] for o in found[name])
    assert all(len(o[0]["prompt_logprobs"]) > 5 for o in found["prompt_logprobs"])
    scored = plain["logprob_token_ids"]["outputs"][::3]
    assert all({*TOKENS} <= {t for t, _ in step} for o in scored for step in o[0]["logprobs"])


@pytest.mark.long
def test_behind_chunks_caches_and_preemption(trained, prompts, folder, plain) -> None:
    """Prompts in chunks, which end vLLM's CPU engine for want of a generator's offset; prefixes from the
    cache, whose requests vLLM pads with draft tokens; too few blocks for the batch."""
    out = served(
        trained.verifier,
        trained.drafter,
        prompts,
        folder,
        "any",
        enable_prefix_caching=True,
        block_size=BLOCK,
        max_num_batched_tokens=64,
        num_gpu_blocks_override=16,
    )
    counters = out["mixed"]["counters"]
    assert counters["vllm:num_preemptions_total"] > 0
    assert counters["vllm:prefix_cache_hits_total"] > 0
    for run in plain:
        assert differences(out, plain, run) == []
