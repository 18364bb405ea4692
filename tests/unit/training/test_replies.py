"""Replies as history: answer and thinking apart, as a server's reasoning parser splits them."""

from __future__ import annotations

import pytest
from test_tokenization import conversation_of

from helpers import tiny
from vllm_dflash.training.replies import FinishedReply, MarkedReplies, ParsedReplies
from vllm_dflash.training.responses import GenerationResult, regenerate
from vllm_dflash.training.tokenization import prompt_token_ids

#: Reads reasoning_content, prints it behind the last question only, and opens the thinking itself.
TEMPLATE = """
{%- set last = namespace(user=-1) -%}
{%- for m in messages -%}
{%- if m['role'] == 'user' -%}{%- set last.user = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for m in messages -%}
{{ '<|im_start|>' + m['role'] + '\n' }}
{%- if m['role'] == 'assistant' and m['reasoning_content'] and loop.index0 > last.user -%}
{{ 'START' + m['reasoning_content'] + 'END' }}
{%- endif -%}
{{ m['content'] + '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\nSTART' }}{%- endif -%}"""
MARKERS = [("<think>", "</think>"), ("<seed:think>", "</seed:think>"), ("[THINK]", "[/THINK]")]


def tokenizer_of(start="<think>", end="</think>", *, kind="plain"):
    """The markers are spelled, tokens, or special tokens, which a reply's text leaves out."""
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace("START", start).replace("END", end)
    if kind == "special":
        tokenizer.add_special_tokens({"additional_special_tokens": [start, end]})
    elif kind == "added":
        tokenizer.add_tokens([start, end])
    return tokenizer


def message_of(tokenizer, text, *, prompt="", reason="stop", to_message=None):
    ids = tokenizer.encode(
        text + ("<|im_end|>" if reason == "stop" else ""), add_special_tokens=False
    )
    prompt_ids = tokenizer.encode(prompt, add_special_tokens=False)
    reply = FinishedReply(conversation_of("hi", "old"), 1, prompt_ids, ids, reason)
    return (to_message or MarkedReplies(tokenizer))(reply)


@pytest.mark.parametrize("kind", ["plain", "added", "special"])
@pytest.mark.parametrize(("start", "end"), MARKERS)
def test_second_prompt_is_that_of_a_client_behind_a_reasoning_parser(tmp_path, kind, start, end):
    tokenizer = tokenizer_of(start, end, kind=kind)
    replies = {"c#0": f"two plus two is four{end}4<|im_end|>", "c#1": f"4 + 3{end}7<|im_end|>"}
    prompts = {}

    def generate(requests):
        for request in requests:
            prompts[request.key] = request.prompt_token_ids
            ids = tokenizer.encode(replies[request.key], add_special_tokens=False)
            yield GenerationResult(request.key, ids, "stop")

    conversation = conversation_of("add 2 and 2", "old", "and 3 more", "old")
    examples, rejected = regenerate(
        [conversation], tokenizer, generate, tmp_path / "r.jsonl", fingerprint={}, max_len=500
    )
    assert (len(examples), rejected) == (2, [])
    second = tokenizer.decode(prompts["c#1"])
    assert "<|im_start|>assistant\n4<|im_end|>" in second
    assert "two plus two" not in second
    assert prompts["c#1"] == prompt_token_ids(
        tokenizer, conversation_of("add 2 and 2", "4", "and 3 more")
    )


@pytest.mark.parametrize("kind", ["plain", "added", "special"])
@pytest.mark.parametrize(
    ("text", "reasoning", "content"),
    [
        ("so</think>\n\n4", "so", "\n\n4"),
        ("<think>\nso\n</think>4", "\nso\n", "4"),
        ("4", None, "4"),
        ("<think></think>4", None, "4"),
        ("a</think>b</think>c", "a", "b</think>c"),
    ],
)
def test_split_at_the_first_end_marker(kind, text, reasoning, content):
    if kind == "special" and "</think>" in content:
        pytest.skip("a special marker in the answer is no text")
    message = message_of(tokenizer_of(kind=kind), text)
    expected = {"role": "assistant", "content": content}
    assert message == expected | ({"reasoning": reasoning} if reasoning else {})


@pytest.mark.parametrize("kind", ["plain", "added", "special"])
@pytest.mark.parametrize(
    ("text", "prompt", "why"),
    [
        ("<think>so", "", "before its thinking did"),
        ("so", "<|im_start|>assistant\n<think>\n", "before its thinking did"),
        ("so</think>\n", "", "without text"),
    ],
)
def test_replies_that_no_client_can_send_back(kind, text, prompt, why):
    with pytest.raises(ValueError, match=why):
        message_of(tokenizer_of(kind=kind), text, prompt=prompt, reason="length")


def test_closed_thinking_in_the_prompt_is_no_open_one():
    tokenizer = tokenizer_of()
    message = message_of(tokenizer, "4", prompt="assistant\n<think>\n\n</think>\n\n")
    assert message == {"role": "assistant", "content": "4"}


def test_unknown_special_tokens_stop_a_dialogue_with_a_word(tmp_path):
    tokenizer = tiny.make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|channel|>", "<|message|>"]})
    ids = tokenizer.encode("<|channel|>analysis<|message|>hm<|im_end|>", add_special_tokens=False)

    def generate(requests):
        yield from (GenerationResult(request.key, ids, "stop") for request in requests)

    conversations = [conversation_of("hi", "old", "go on", "old", id=f"c{n}") for n in range(3)]
    said = []
    examples, rejected = regenerate(
        conversations, tokenizer, generate, tmp_path / "r.jsonl",
        fingerprint={}, max_len=500, say=said.append,
    )  # fmt: skip
    assert (len(examples), rejected) == (3, [])  # the first replies are kept
    (line,) = said
    assert line.startswith("3 of 3 dialogues end before their last turn: ")
    for part in ("<|channel|>", "<|message|>", "--reasoning-parser"):
        assert part in line


# ---- vLLM's own parsers ----


@pytest.mark.parametrize("name", ["deepseek_r1", "qwen3"])
def test_a_named_parser_splits_as_vllm_does(name):
    tokenizer = tokenizer_of(kind="added")
    parsed = ParsedReplies(name, tokenizer)
    for text in ("so</think>\n\n4", "<think>so</think>4"):
        expected = message_of(tokenizer, text)
        assert message_of(tokenizer, text, to_message=parsed) == expected
    # These verifiers always think: a reply without the end marker is all thinking.
    with pytest.raises(ValueError, match="without text"):
        message_of(tokenizer, "so", to_message=parsed)


def test_a_parser_that_vllm_does_not_have_or_that_cannot_read_the_tokenizer():
    with pytest.raises(ValueError, match=r"--reasoning-parser is 'nope'; vLLM has .*qwen3"):
        ParsedReplies("nope", tokenizer_of())
    with pytest.raises(ValueError, match="--reasoning-parser deepseek_r1 cannot be used here"):
        ParsedReplies("deepseek_r1", tokenizer_of())
