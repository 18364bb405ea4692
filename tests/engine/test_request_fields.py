"""Every field of vLLM's completion and chat requests gives with a drafter what it gives without one: over
HTTP, streamed and not, many in flight, with streams that break off."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import msgspec
import pytest

from helpers.api_server import Server, alike, ask, leave, serving

pytest.importorskip("vllm")
from vllm.entrypoints.generate.base.protocol import StreamOptions
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.sampling_params import SamplingParams, StructuredOutputsParams

pytestmark = pytest.mark.engine

STOPS = [97, 215, 257, 260, 265, 270]
#: A third of the vocabulary: a request stops right behind its min_tokens.
MANY = list(range(6, 384, 3))
GRAMMAR = 'root ::= ("a " | "the ") ("red" | "blue") " " [a-z]{3,12}'
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "size": {"type": "integer"}},
    "required": ["name", "size"],
    "additionalProperties": False,
}
TAG = {
    "type": "structural_tag",
    "format": {
        "type": "tag",
        "begin": "a ",
        "content": {"type": "json_schema", "json_schema": SCHEMA},
        "end": " b",
    },
}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": SCHEMA}}
    for name in ("see", "eat")
]
SAMPLED = {"temperature": 0.8, "seed": 3}

#: What is sent to check a field, on top of a greedy request.
BOTH: dict[str, list[dict[str, Any]]] = {
    "model": [{}],
    "temperature": [{}, SAMPLED],
    "seed": [SAMPLED | {"seed": 42}, SAMPLED | {"seed": 2**63 - 1}],
    "n": [SAMPLED | {"n": 3}, {"n": 2, "temperature": 1.0, "top_k": 1}],
    "top_p": [SAMPLED | {"top_p": 0.7}],
    "top_k": [SAMPLED | {"top_k": 10}, {"temperature": 1.0, "top_k": 1}],
    "frequency_penalty": [{"frequency_penalty": 0.5}, SAMPLED | {"frequency_penalty": 1.5}],
    "presence_penalty": [{"presence_penalty": 1.5}, {"presence_penalty": -1.0}],
    "repetition_penalty": [{"repetition_penalty": 1.3}],
    "bad_words": [{"bad_words": ["a", "the", "red cat"]}],
    "allowed_token_ids": [{"allowed_token_ids": list(range(97, 140))}],
    "stop": [{"stop": ["g"]}, {"stop": ["e", "\u0120", "the"]}],
    "include_stop_str_in_output": [{"stop": ["g", "e"], "include_stop_str_in_output": True}],
    "stop_token_ids": [{"stop_token_ids": STOPS}],
    "ignore_eos": [{"ignore_eos": True, "max_tokens": 70}],
    "min_tokens": [{"min_tokens": n, "stop_token_ids": MANY} for n in (5, 6, 8, 9, 12, 13)],
    "max_tokens": [{"max_tokens": n} for n in (1, 2, 5, 90)],
    "skip_special_tokens": [{"skip_special_tokens": False}],
    "spaces_between_special_tokens": [
        {"spaces_between_special_tokens": False, "skip_special_tokens": False}
    ],
    "truncate_prompt_tokens": [{"truncate_prompt_tokens": 3}, {"truncate_prompt_tokens": -1}],
    "truncation_side": [{"truncate_prompt_tokens": 4, "truncation_side": "right"}],
    "add_special_tokens": [{"add_special_tokens": False}],
    "prompt_logprobs": [{"prompt_logprobs": 2}],
    "echo": [{"echo": True}],
    "return_token_ids": [{"return_token_ids": True}],
    "return_tokens_as_token_ids": [{"return_tokens_as_token_ids": True}],
    "stream": [{}],
    "stream_options": [{"stream_options": {"include_usage": True, "continuous_usage_stats": True}}],
    "stream_interval": [{"stream_interval": 5}],
    "use_beam_search": [{"use_beam_search": True, "n": 3, "max_tokens": 10}],
    "length_penalty": [{"use_beam_search": True, "n": 2, "length_penalty": 0.2, "max_tokens": 8}],
    "priority": [{"priority": -1}, {"priority": 5}],
    "cache_salt": [{"cache_salt": "salt"}],
    "vllm_xargs": [{"vllm_xargs": {"anything": 1}}],
    "repetition_detection": [
        {"repetition_detection": {"max_pattern_size": 4, "min_count": 2}, "max_tokens": 90}
    ],
    "thinking_token_budget": [
        *({"thinking_token_budget": n, "max_tokens": 40} for n in (-1, 0, 1, 7, 12, 20)),
        SAMPLED | {"thinking_token_budget": 9},
    ],
    "response_format": [
        {"response_format": {"type": "json_object"}, "max_tokens": 60},
        {"response_format": TAG, "max_tokens": 60},
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "thing", "schema": SCHEMA},
            },
            "max_tokens": 60,
        },
    ],
    "structured_outputs": [
        {"structured_outputs": {"json": SCHEMA}, "max_tokens": 60},
        {"structured_outputs": {"json_object": True, "disable_any_whitespace": True}},
        {"structured_outputs": {"regex": "(cat|dog) [a-z]{3,9} [0-9]+"}},
        {"structured_outputs": {"regex": "[ -~]{20,40}"}, "logprobs": True},
        {"structured_outputs": {"choice": ["a red house", "a red river"]}},
        {"structured_outputs": {"grammar": GRAMMAR}},
        {"structured_outputs": {"structural_tag": json.dumps(TAG)}},
        SAMPLED | {"structured_outputs": {"regex": "[ -~]{20,40}"}},
    ],
}
COMPLETIONS: dict[str, list[dict[str, Any]]] = {
    "prompt": [{"prompt": [9, 88, 94, 278]}, {"prompt": ["the cat", "a dog runs and"]}],
    "echo": [{"echo": True, "logprobs": 2}, {"echo": True, "max_tokens": 0}],
    "logprobs": [{"logprobs": 0}, {"logprobs": 3}, SAMPLED | {"logprobs": 1}],
    "logprob_token_ids": [{"logprobs": 2, "logprob_token_ids": [97, 260]}],
}
CHAT: dict[str, list[dict[str, Any]]] = {
    "messages": [{}],
    "max_completion_tokens": [{"max_completion_tokens": 9}],
    "logprobs": [{"logprobs": True}],
    "top_logprobs": [{"logprobs": True, "top_logprobs": 3}],
    "logprob_token_ids": [{"logprobs": True, "top_logprobs": 2, "logprob_token_ids": [97, 260]}],
    "tools": [{"tools": TOOLS}],
    "tool_choice": [
        {"tools": TOOLS, "tool_choice": "required", "max_tokens": 80},
        {"tools": TOOLS, "tool_choice": "none"},
        {
            "tools": TOOLS,
            "tool_choice": {"type": "function", "function": {"name": "eat"}},
            "max_tokens": 60,
        },
    ],
    "parallel_tool_calls": [
        {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 80}
    ],
    "reasoning_effort": [{"reasoning_effort": "low"}],
    "include_reasoning": [{"include_reasoning": False}],
    "add_generation_prompt": [{"add_generation_prompt": False}],
    "continue_final_message": [
        {
            "messages": [
                {"role": "user", "content": "the cat"},
                {"role": "assistant", "content": "a red"},
            ],
            "add_generation_prompt": False,
            "continue_final_message": True,
        }
    ],
    "documents": [{"documents": [{"title": "a", "text": "b"}]}],
    "chat_template": [{"chat_template": "{{ messages[0]['content'] }} and"}],
    "chat_template_kwargs": [{"chat_template_kwargs": {"unused": 1}}],
    "return_prompt_text": [{"return_prompt_text": True}],
}
#: vLLM answers 400 to these where there is a drafter of any kind.
REFUSED: dict[str, dict[str, Any]] = {
    "min_p": {"temperature": 1.0, "min_p": 0.1},
    "logit_bias": {"logit_bias": {"97": 5}},
}
#: Fields that have no say in what is generated, each with the reason.
WITHOUT_INFLUENCE = {
    "user": "ignored by vLLM",
    "suffix": "for models that fill in the middle; vLLM refuses it for others",
    "request_id": "a name",
    "session_id": "a name",
    "watermarking": "needs an engine with a watermark, which vLLM refuses beside parallel drafting",
    "prompt_embeds": "a prompt; needs --enable-prompt-embeds",
    "routed_experts_prompt_start": "which routing data come back; needs --enable-return-routed-experts",
    "return_token_offsets": "for the render endpoints",
    "mm_payload": "for the render endpoints",
    "return_mm_kwargs": "for the render endpoints",
    "kv_transfer_params": "for KV connectors",
    "ec_transfer_params": "for encoder-cache connectors",
    "media_io_kwargs": "how images and sounds are read",
    "mm_processor_kwargs": "how images and sounds are read",
}
#: Fields of SamplingParams that requests do not have under that name.
ENGINE_ONLY = {
    "prompt_logprob_token_ids": "offline; about the prompt",
    "prompt_logprob_start": "offline; about the prompt",
    "flat_logprobs": "the shape of results",
    "detokenize": "no text",
    "output_kind": "set by stream",
    "skip_clone": "internal",
    "output_text_buffer_length": "internal",
    "extra_args": "vllm_xargs, which no sampler of vLLM's reads",
    "skip_reading_prefix_cache": "where the prompt's cache comes from",
    "trace_decode_token_ids": "vLLM refuses it beside a drafter",
}
FIELDS = {"completions": COMPLETIONS, "chat": CHAT}
CLASSES = {"completions": CompletionRequest, "chat": ChatCompletionRequest}


@pytest.mark.parametrize("api", FIELDS)
def test_every_field_is_known(api) -> None:
    """A field that a new vLLM brings fails here: add it to one of the lists above."""
    known = {*BOTH, *FIELDS[api], *REFUSED, *WITHOUT_INFLUENCE}
    assert set(CLASSES[api].model_fields) - known == set()
    assert {*BOTH, *FIELDS[api]} & (REFUSED.keys() | WITHOUT_INFLUENCE.keys()) == set()


def test_every_sampling_parameter_is_known() -> None:
    known = {*BOTH, *COMPLETIONS, *REFUSED, *WITHOUT_INFLUENCE, *ENGINE_ONLY}
    names = {f.name for f in msgspec.structs.fields(SamplingParams)}
    assert {n for n in names if not n.startswith("_")} - known == set()


def test_every_option_of_streams_and_grammars_is_known() -> None:
    assert set(StreamOptions.model_fields) == {"include_usage", "continuous_usage_stats"}
    kinds = {"json", "regex", "choice", "grammar", "json_object", "structural_tag"}
    details = {"disable_any_whitespace", "disable_additional_properties", "whitespace_pattern"}
    names = {n for n in StructuredOutputsParams.__dataclass_fields__ if not n.startswith("_")}
    assert names - kinds - details == set()
    assert (
        kinds == {k for v in BOTH["structured_outputs"] for k in v["structured_outputs"]} - details
    )


# -- over HTTP


def requests(api: str, prompts: list[Any]) -> dict[str, dict[str, Any]]:
    """A body for every variant of every field that this vLLM knows, streamed and not; by name."""
    out: dict[str, dict[str, Any]] = {}
    for fields in (BOTH, FIELDS[api]):
        for field, variants in fields.items():
            if field not in CLASSES[api].model_fields:
                continue
            for i, variant in enumerate(variants):
                prompt = prompts[len(out) // 2 % len(prompts)]
                body = {"model": "model", "temperature": 0.0, "max_tokens": 40, **variant}
                given = {"messages": prompt} if api == "chat" else {"prompt": prompt[-1]["content"]}
                body = given | {"return_token_ids": True} | body
                # vLLM streams neither of these.
                once = "prompt_logprobs" in body or "use_beam_search" in body
                for stream in (False,) if once else (False, True):
                    more = {"stream": stream} if stream else {}
                    if stream and "stream_options" not in body:
                        more["stream_options"] = {"include_usage": True}
                    if not stream and "stream_options" in body:
                        continue
                    out[f"{api} {field} {i}{' streamed' * stream}"] = body | more
    return out


def path(name: str) -> str:
    return "/v1/chat/completions" if name.startswith("chat") else "/v1/completions"


async def _all(server: Server, prompts: list[Any], concurrency: int) -> dict[str, dict[str, Any]]:
    bodies = {**requests("completions", prompts), **requests("chat", prompts)}
    # vLLM garbles the log probabilities of others beside these, drafter or not.
    scored = {n: bodies.pop(n) for n in list(bodies) if " logprob_token_ids " in n}
    answers: dict[str, dict[str, Any]] = {}
    limit = asyncio.Semaphore(concurrency)
    timeout = aiohttp.ClientTimeout(total=300)
    async with aiohttp.ClientSession(server.url, timeout=timeout) as session:

        async def one(name: str, body: dict[str, Any]) -> None:
            async with limit:
                answers[name] = await ask(session, path(name), body)

        async def cut(name: str, body: dict[str, Any], chunks: int) -> None:
            async with limit:
                assert await leave(session, path(name), body, chunks) == chunks

        work = [one(n, b) for n, b in bodies.items()]
        long: dict[str, Any] = {"model": "model", "max_tokens": 90, "ignore_eos": True}
        for i, prompt in enumerate(prompts):
            # Greedy, sampled, with a budget: hung up after 1 to 4 chunks.
            more = ({"temperature": 0.0}, SAMPLED, {"temperature": 0.0, "thinking_token_budget": 9})
            body = long | {"messages": prompt} | more[i % 3]
            work.insert(i * len(work) // len(prompts), cut("chat", body, 1 + i % 4))
        await asyncio.gather(*work)
        await asyncio.gather(*(one(n, b) for n, b in scored.items()))
        for name, change in REFUSED.items():
            for api in FIELDS:
                given = {"messages": prompts[0]} if api == "chat" else {"prompt": "the cat"}
                answers[f"{api} {name} 0"] = await ask(
                    session, path(api), {"model": "model", "max_tokens": 3, **given, **change}
                )
    return answers


def answers(verifier, prompts_file, folder, concurrency: int = 24, **serve: Any):
    """All answers of a server, and its counters afterwards."""
    prompts = [json.loads(line)["messages"] for line in prompts_file.read_text().splitlines()]
    args = ("--max-model-len", "224", "--max-num-seqs", "16", "--scheduling-policy", "priority")
    args += (
        "--reasoning-config",
        json.dumps(
            {"reasoning_start_str": "<|im_start|>assistant", "reasoning_end_str": " the cat"}
        ),
    )
    args += ("--trust-request-chat-template", "--enable-auto-tool-choice")
    args += ("--tool-call-parser", "pythonic")
    with serving(verifier, folder, *args, **serve) as server:
        got = asyncio.run(_all(server, prompts, concurrency))
        counters = server.counters()
    log = server.log.read_text()
    assert "Traceback" not in log, log[-6000:]
    return got, counters


@pytest.fixture(scope="module")
def plain(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fields") / "none"
    return answers(trained.verifier, trained.prompts, folder)[0]


@pytest.mark.long
@pytest.mark.parametrize("lengths", ["any", "fixed"])
def test_answers_as_without_a_drafter(trained, plain, tmp_path, lengths) -> None:
    spec = {"method": "dflash", "model": str(trained.drafter)}
    if lengths == "fixed":
        spec["dflash_draft_length"] = "fixed"
    got, counters = answers(
        trained.verifier,
        trained.prompts,
        tmp_path / "ours",
        speculative=spec,
        random_lengths=lengths == "any",
    )
    assert counters["vllm:spec_decode_num_accepted_tokens_total"] > 200
    assert counters["vllm:num_requests_running"] == counters["vllm:num_requests_waiting"] == 0
    assert got.keys() == plain.keys()
    for name in REFUSED:
        for api in FIELDS:
            message = got.pop(f"{api} {name} 0")["error"]["message"]
            assert "not yet supported with speculative decoding" in message
    different = [name for name in got if not alike(got[name], plain[name])]
    assert different == []


@pytest.mark.long
def test_the_answers_are_not_empty(plain) -> None:
    """Guards the guard: nothing but what vLLM fails at by itself is an error."""
    errors = {name: a["error"]["message"] for name, a in plain.items() if "error" in a}
    # To a structural tag in a chat vLLM answers 500 without a drafter, too.
    assert errors.keys() <= {"chat response_format 1"}, errors
    plain = {name: answer for name, answer in plain.items() if name not in errors}
    for name, answer in plain.items():
        assert answer["choices"], name
        assert all(c["finish_reason"] for c in answer["choices"]), name
