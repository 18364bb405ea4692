"""Prompts, responses and loss masks, with real tokenizers and the usual chat templates."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from functools import cache
from itertools import pairwise
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from vllm_dflash.training.conversations import Conversation
from vllm_dflash.training.tokenization import (
    Example,
    Turn,
    eos_token_ids,
    fit_examples,
    merge_turns,
    on_policy_examples,
    prompt_token_ids,
    split_turns,
)
from vllm_dflash.verifier import Verifier

CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for message in messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/...') }}{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
QWEN3 = """\
{%- if tools %}{{- '<|im_start|>system\\n# Tools\\n' }}
{%- for tool in tools %}{{- tool | tojson }}{%- endfor %}{{- '<|im_end|>\\n' }}{%- endif %}
{%- set ns = namespace(last_query=0) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{%- set ns.last_query = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- set content = message.content %}
        {%- set reasoning = message.reasoning_content or '' %}
        {%- if '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last_query %}
            {{- '<think>\\n' + reasoning + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- content }}
        {%- for call in message.tool_calls or [] %}
            {{- '<tool_call>' + call.function.name }}{{- call.function.arguments | tojson }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + '[/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}"
    "{% endfor %}"
)
#: Loops over content parts, so vLLM hands it a list of parts instead of text.
PARTS = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

#: Template, bos, eos, further end-of-turn tokens as generation_config.json has them.
FAMILIES = {
    "chatml": (CHATML, "<|endoftext|>", "<|im_end|>", []),
    "llama3": (LLAMA3, "<|begin_of_text|>", "<|end_of_text|>", ["<|eot_id|>"]),
    "gemma": (GEMMA, "<bos>", "<eos>", ["<end_of_turn>"]),
    "qwen3": (QWEN3, "<|endoftext|>", "<|im_end|>", ["<|endoftext|>"]),
    "mistral": (MISTRAL, "<s>", "</s>", []),
    "parts": (PARTS, "<|endoftext|>", "<|im_end|>", []),
    # Shows how many parts it was given.
    "marked_parts": (PARTS.replace("part.text", "'|' + part.text"), "<s>", "<|im_end|>", []),
}
END_OF_TURN = {
    "chatml": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "gemma": "<end_of_turn>",
    "qwen3": "<|im_end|>",
    "mistral": "</s>",
    "parts": "<|im_end|>",
}
KEEP_HISTORY = ["chatml", "llama3", "gemma", "mistral", "parts"]
SPECIAL_TOKENS = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"),
    *("<|start_header_id|>", "<|end_header_id|>"),
    *("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
    *("<s>", "</s>", "[INST]", "[/INST]"),
]
CORPUS = ["the cat sat on the mat", "a helpful assistant answers the user", "system\nuser\n\nmodel"]


@cache
def build_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """A tiny byte-level BPE with the family's template; like Llama's, its encode() adds BOS."""
    template, bos, eos, _ = FAMILIES[family]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=alphabet,
        special_tokens=SPECIAL_TOKENS,
        show_progress=False,
    )
    core.train_from_iterator(CORPUS, trainer)
    # Qwen's think markers are added tokens but not special ones: they survive decoding.
    core.add_tokens([AddedToken(text, special=False) for text in ("<think>", "</think>")])
    core.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, core.token_to_id(bos))]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token=bos, eos_token=eos)
    tokenizer.chat_template = template
    return tokenizer


def eos_ids_of(family: str) -> frozenset[int]:
    tokenizer = build_tokenizer(family)
    configured = tokenizer.convert_tokens_to_ids(FAMILIES[family][3])
    return eos_token_ids(tokenizer, {"eos_token_id": configured})


def conversation_of(*texts: str, system: str | None = None, **fields) -> Conversation:
    """Alternating user and assistant messages."""
    messages = [{"role": "system", "content": system}] if system else []
    for number, text in enumerate(texts):
        messages.append({"role": ("user", "assistant")[number % 2], "content": text})
    return Conversation(**{"id": "c", "source": "test", "messages": tuple(messages)} | fields)


def masked_text(tokenizer, example: Example) -> str:
    return tokenizer.decode(
        [t for t, m in zip(example.token_ids, example.loss_mask, strict=True) if m]
    )


def num_spans(example: Example) -> int:
    mask = example.loss_mask
    return sum(now and not before for before, now in zip((False, *mask), mask, strict=False))


# No markup characters: what looks like a special token is one, in serving as in training.
texts = (
    st.text(st.sampled_from("abc teh.,!?'\n\t0189é漢🙂"), min_size=1, max_size=20)
    .map(str.strip)
    .filter(bool)
)
dialogs = st.integers(1, 3).flatmap(lambda n: st.lists(texts, min_size=2 * n, max_size=2 * n))


@pytest.mark.parametrize("family", KEEP_HISTORY)
@settings(max_examples=25)
@given(dialog=dialogs, with_system=st.booleans())
def test_mask_covers_exactly_the_replies_and_their_end_of_turn(family, dialog, with_system):
    tokenizer = build_tokenizer(family)
    system = "Be brief" if with_system and family not in ("gemma", "mistral") else None
    conversation = conversation_of(*dialog, system=system)

    (example,) = on_policy_examples(tokenizer, conversation, eos_ids_of(family), max_len=10_000)

    space = " " if family == "mistral" else ""
    expected = [space + reply + END_OF_TURN[family] for reply in dialog[1::2]]
    assert masked_text(tokenizer, example) == "".join(expected)
    assert num_spans(example) == len(expected)
    served = tokenizer.apply_chat_template(list(conversation.messages), tokenize=False)
    trained = tokenizer.decode(example.token_ids)
    # Nothing is missing but the newline after the last end of turn, which nobody generates.
    assert trained == served.removesuffix("\n")
    bos = FAMILIES[family][1]
    assert trained.count(bos) == (1 if "bos_token" in FAMILIES[family][0] else 0)


@settings(max_examples=25)
@given(dialog=dialogs)
def test_thinking_off_trains_each_turn_on_the_prompt_that_serving_sends(dialog):
    tokenizer = build_tokenizer("qwen3")
    conversation = conversation_of(*dialog, chat_template_kwargs={"enable_thinking": False})
    examples = on_policy_examples(tokenizer, conversation, eos_ids_of("qwen3"), max_len=10_000)

    # The empty think block is in the prompt and vanishes from the history: no turn can be merged.
    assert [example.id for example in examples] == [f"c#{n}" for n in range(len(dialog) // 2)]
    for number, example in enumerate(examples):
        assert masked_text(tokenizer, example) == dialog[2 * number + 1] + "<|im_end|>"
        prompt = example.token_ids[: example.loss_mask.index(True)]
        assert list(prompt) == prompt_token_ids(tokenizer, conversation, 2 * number + 1)
        assert tokenizer.decode(prompt).endswith("assistant\n<think>\n\n</think>\n\n")
        assert num_spans(example) == 1


@pytest.mark.parametrize("where", ["content", "reasoning"])
@settings(max_examples=15)
@given(dialog=dialogs, thought=texts)
def test_thinking_is_generated_in_its_turn_and_absent_from_later_prompts(where, dialog, thought):
    tokenizer = build_tokenizer("qwen3")
    conversation = conversation_of(*dialog)
    messages = []
    for message in conversation.messages:
        if message["role"] == "assistant":
            think = f"<think>\n{thought}\n</think>\n\n"
            extra = {"reasoning": thought} if where == "reasoning" else {}
            prefix = think if where == "content" else ""
            message = message | {"content": prefix + message["content"]} | extra
        messages.append(message)
    conversation = replace(conversation, messages=tuple(messages))

    examples = on_policy_examples(tokenizer, conversation, eos_ids_of("qwen3"), max_len=10_000)

    assert len(examples) == len(dialog) // 2
    for number, example in enumerate(examples):
        reply = dialog[2 * number + 1]
        expected = f"<think>\n{thought}\n</think>\n\n{reply}<|im_end|>"
        assert masked_text(tokenizer, example) == expected
        prompt = example.token_ids[: example.loss_mask.index(True)]
        assert "<think>" not in tokenizer.decode(prompt)


def test_response_that_does_not_continue_its_prompt_is_refused():
    tokenizer = build_tokenizer("qwen3")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>"
    )
    # As thinking-only models: the prompt opens the thought, which the data no longer holds.
    tokenizer.chat_template = CHATML.replace(
        "'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>\n'"
    )
    with pytest.raises(ValueError, match=r"message 1: .*continuation of its prompt"):
        split_turns(tokenizer, conversation_of("hi", "hello"), eos_ids_of("qwen3"))


def test_template_that_refuses_is_a_value_error_with_its_own_words():
    for family, words in (("gemma", "System role not"), ("mistral", "Only user and assistant")):
        with pytest.raises(ValueError, match=words):
            prompt_token_ids(build_tokenizer(family), conversation_of("hi", system="Be brief"))


def test_tokenizer_without_a_template_is_named():
    core = build_tokenizer("chatml").backend_tokenizer
    with pytest.raises(ValueError, match="no chat template"):
        prompt_token_ids(PreTrainedTokenizerFast(tokenizer_object=core), conversation_of("hi"))


def test_an_engines_tokenizer_renders_with_the_servers_template():
    """vLLM makes it safe for threads: methods go to copies, which were made before it got a template."""
    hf = pytest.importorskip("vllm.tokenizers.hf")
    tokenizer = hf.maybe_make_thread_pool(deepcopy(build_tokenizer("chatml")))
    given = CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n\n'")
    Verifier("m", chat_template=given).with_template(tokenizer)
    prompt = prompt_token_ids(tokenizer, conversation_of("hi"))
    assert tokenizer.decode(prompt).endswith("<|im_start|>assistant\n\n")


@pytest.mark.parametrize("family", KEEP_HISTORY)
def test_unfinished_response_has_no_end_of_turn(family):
    tokenizer, eos_ids = build_tokenizer(family), eos_ids_of(family)
    cut = conversation_of("hi", "the cat sat", unfinished=True)
    (turn,) = split_turns(tokenizer, cut, eos_ids)
    assert tokenizer.decode(turn.response_ids).strip() == "the cat sat"
    # Only the last response was cut; the one before it did end.
    longer = conversation_of("hi", "the cat", "go on", "the mat", unfinished=True)
    first, _ = split_turns(tokenizer, longer, eos_ids)
    assert first.response_ids[-1] in eos_ids


def test_unknown_end_of_turn_keeps_the_response_without_the_templates_newline():
    tokenizer = build_tokenizer("gemma")  # its <end_of_turn> is only in generation_config.json
    conversation = conversation_of("hi", "the cat")
    (turn,) = split_turns(tokenizer, conversation, eos_token_ids(tokenizer, None))
    assert tokenizer.decode(turn.response_ids) == "the cat<end_of_turn>"


def test_greeting_before_the_first_user_message_is_context():
    messages = (
        {"role": "assistant", "content": "welcome"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "the cat"},
    )
    conversation = Conversation("c", messages, "test")
    tokenizer = build_tokenizer("chatml")
    (example,) = on_policy_examples(tokenizer, conversation, eos_ids_of("chatml"), 1000)
    assert masked_text(tokenizer, example) == "the cat<|im_end|>"
    assert "welcome" in tokenizer.decode(example.token_ids)


def test_conversation_without_a_response_is_refused_on_policy():
    with pytest.raises(ValueError, match="no assistant turn"):
        on_policy_examples(build_tokenizer("chatml"), conversation_of("hi"), frozenset(), 100)


def test_eos_ids_come_from_tokenizer_and_generation_config():
    tokenizer = SimpleNamespace(eos_token_id=7)
    assert eos_token_ids(tokenizer, None) == {7}
    assert eos_token_ids(tokenizer, {"eos_token_id": 8}) == {7, 8}
    assert eos_token_ids(tokenizer, {"eos_token_id": [0, 9]}) == {0, 7, 9}
    assert eos_token_ids(SimpleNamespace(eos_token_id=None), {}) == frozenset()


# ---- merging and cutting, on arbitrary token ids ----

CONVERSATION = conversation_of("hi")
ids = st.lists(st.integers(0, 3), min_size=1, max_size=4)


@settings(max_examples=100)
@given(steps=st.lists(st.tuples(st.booleans(), ids, ids), min_size=1, max_size=5))
def test_every_turn_is_found_again_in_the_merged_sequences(steps):
    turns, sequence = [], []
    for extends, context, response in steps:
        prompt = [*sequence, *context] if extends else context
        turns.append(Turn(prompt, response))
        sequence = prompt + response
    examples = merge_turns(turns, CONVERSATION)

    assert sum(example.num_response_tokens for example in examples) == sum(
        len(turn.response_ids) for turn in turns
    )
    remaining = list(turns)
    for example in examples:
        assert len(example.token_ids) == len(example.loss_mask)
        end = 0
        # Each sequence consists of the next turns in order, each with exactly its prompt before it.
        while end < len(example.token_ids):
            prompt, response = remaining.pop(0)
            start, end = len(prompt), len(prompt) + len(response)
            assert list(example.token_ids[:end]) == prompt + response
            assert all(example.loss_mask[start:end])
    assert not remaining
    # A sequence was only begun where the prompt did not extend the one before.
    assert len(examples) == 1 + sum(
        now.prompt_ids[: len(before.prompt_ids) + len(before.response_ids)]
        != [*before.prompt_ids, *before.response_ids]
        for before, now in pairwise(turns)
    )


def test_merge_masks_every_response_of_the_sequence():
    turns = [Turn([1, 2], [3, 4]), Turn([1, 2, 3, 4, 5], [6]), Turn([1, 9], [7, 8])]
    first, second = merge_turns(turns, CONVERSATION)
    assert (first.id, first.token_ids) == ("c#0", (1, 2, 3, 4, 5, 6))
    assert first.loss_mask == (False, False, True, True, False, True)
    assert (second.id, second.token_ids) == ("c#1", (1, 9, 7, 8))
    assert second.loss_mask == (False, False, True, True)


@settings(max_examples=100)
@given(prompt=ids, response=ids, max_len=st.integers(1, 10))
def test_fit_cuts_at_max_len_or_says_why_not(prompt, response, max_len):
    (example,) = merge_turns([Turn(prompt, response)], CONVERSATION)
    left = min(max_len, len(prompt) + len(response)) - len(prompt)
    if left >= 2:
        (fitted,) = fit_examples([example], max_len)
        assert fitted.token_ids == tuple(prompt + response)[:max_len]
        assert fitted.num_response_tokens == left
    elif len(prompt) >= max_len:
        with pytest.raises(ValueError, match=f"starts at token {len(prompt)}, max_len is"):
            fit_examples([example], max_len)
    else:
        with pytest.raises(ValueError, match=f"only {left} response tokens"):
            fit_examples([example], max_len)


# ---- the same tokens as vLLM's server ----

TOOL = {
    "function": {"parameters": {"type": "object"}, "name": "look_up", "x": 1},
    "type": "function",
}
CALL = {"id": "1", "type": "function", "function": {"name": "look_up", "arguments": '{"a": 1}'}}
PARTS_CONTENT = [{"type": "text", "text": "the cat"}, {"type": "text", "text": "sat"}]
SERVED = {
    "plain": [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "hi"}],
    "parts": [{"role": "user", "content": PARTS_CONTENT}],
    "developer": [{"role": "developer", "content": "Be"}, {"role": "user", "content": "hi"}],
    "developers": [
        {"role": "system", "content": "Be"},
        {"role": "user", "content": "hi"},
        {"role": "developer", "content": PARTS_CONTENT},
    ],
    "tools": [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning": "hm"},
        {"role": "tool", "content": PARTS_CONTENT, "tool_call_id": "1"},
    ],
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", SERVED)
def test_prompt_is_the_one_that_vllm_serves(family, name):
    hf = pytest.importorskip("vllm.renderers.hf")
    chat_utils = pytest.importorskip("vllm.renderers.chat_utils")
    exceptions = pytest.importorskip("vllm.exceptions")
    protocol = pytest.importorskip("vllm.entrypoints.openai.chat_completion.protocol")
    tokenizer = build_tokenizer(family)
    config = SimpleNamespace(
        multimodal_config=None,
        enable_prompt_embeds=False,
        revision=None,
        code_revision=None,
        trust_remote_code=False,
    )
    tools = (TOOL,) if name == "tools" else None
    kwargs = {"enable_thinking": False, "unknown": 1}
    # As load_conversations() reads them: absent content is empty.
    loaded = [message | {"content": message["content"] or ""} for message in SERVED[name]]
    conversation = Conversation("c", tuple(deepcopy(loaded)), "test", tools, kwargs)

    content_format = hf._detect_content_format(tokenizer.chat_template, default="string")
    messages, *_ = chat_utils.parse_chat_messages(deepcopy(SERVED[name]), config, content_format)

    def serve() -> list[int]:
        dumped = [protocol.ChatCompletionToolsParam(**tool).model_dump() for tool in tools or ()]
        return hf.safe_apply_chat_template(
            config,
            tokenizer,
            messages,
            tools=dumped or None,
            chat_template=tokenizer.chat_template,
            add_generation_prompt=True,
            **kwargs,
        )

    if family in ("gemma", "mistral") and name != "parts":  # they know user and assistant only
        with pytest.raises(exceptions.VLLMValidationError):
            serve()
        with pytest.raises(ValueError, match="refuses the conversation"):
            prompt_token_ids(tokenizer, conversation)
        return
    assert prompt_token_ids(tokenizer, conversation) == serve()
    assert list(conversation.messages) == loaded  # rendering changes nothing in the data
