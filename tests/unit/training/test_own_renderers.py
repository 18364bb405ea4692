"""Verifiers whose chats vLLM's server renders with code of its own, not with a Jinja template."""

from __future__ import annotations

import json
import shutil
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_responses import Verifier as Engine
from test_responses import load_rows, logged_trajectory, run
from test_tokenization import conversation_of, masked_text

from vllm_dflash.bench.prompts import load_prompts
from vllm_dflash.training.conversations import Conversation
from vllm_dflash.training.prepare import check_prompts
from vllm_dflash.training.replies import FinishedReply, MarkedReplies
from vllm_dflash.training.tokenization import (
    eos_token_ids,
    keep_date,
    on_policy_examples,
    prompt_token_ids,
)
from vllm_dflash.training.vocab import choose_mask_token
from vllm_dflash.verifier import Verifier

pytest.importorskip("vllm")
mistral_common = pytest.importorskip("mistral_common")

TOOL = {
    "type": "function",
    "function": {"name": "look_up", "description": "a page", "parameters": {"type": "object"}},
}
CALL = {
    "id": "abcdefghi",
    "type": "function",
    "function": {"name": "look_up", "arguments": '{"page": 1}'},
}
CALLED = (
    {"role": "system", "content": "Be brief"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "found", "tool_call_id": "abcdefghi"},
)


def change_config(path: Path, **changes) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.fixture(scope="module", params=["tekken", "sentencepiece"])
def mistral(request, models, verifier) -> Path:
    """A folder as Mistral's official ones: consolidated weights, and no tokenizer that transformers reads."""
    path = models / f"mistral-{request.param}"
    shutil.copytree(verifier, path)
    for file in [*path.glob("tokenizer*"), path / "chat_template.jinja"]:
        file.unlink()
    data = Path(mistral_common.__file__).parent / "data"
    if request.param == "tekken":
        shutil.copy(data / "tekken_240911.json", path / "tekken.json")
    else:
        shutil.copy(
            data / "mistral_instruct_tokenizer_241114.model.v7", path / "tokenizer.model.v7"
        )
    shutil.copy(path / "model.safetensors", path / "consolidated.safetensors")
    change_config(path, model_type="mistral", vocab_size=131072)
    return path


@pytest.fixture(scope="module")
def deepseek(models, verifier) -> Path:
    """The tokenizer of a DeepSeek V3.2: transformers reads it, and it has no template."""
    path = models / "deepseek-v32"
    shutil.copytree(verifier, path)
    (path / "chat_template.jinja").unlink()
    change_config(path, max_position_embeddings=8192)  # of the tools it prints a long text
    return path


@pytest.mark.parametrize(
    ("model_type", "asked"),
    [
        ("deepseek_v32", True),
        ("deepseek_v4", True),
        ("kimi_k3", True),
        ("inkling", True),
        ("gpt_oss", True),
        ("mistral3", True),
        ("llama", False),
        ("qwen3", False),
    ],
)
def test_vllm_is_asked_about_models_it_may_render_itself(monkeypatch, model_type, asked):
    config = SimpleNamespace(model_type=model_type)
    monkeypatch.setattr(Verifier, "load_config", lambda self: config)
    assert Verifier("m")._asks_vllm() is asked


def text(tokenizer, ids) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False)


def test_mistrals_prompts_are_those_of_its_own_tokenizer(mistral):
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    tokenizer = Verifier(str(mistral)).load_tokenizer()
    given = next(f for f in mistral.iterdir() if f.name in ("tekken.json", "tokenizer.model.v7"))
    own = MistralTokenizer.from_file(str(given))
    for messages, tools in ((CALLED, (TOOL,)), (CALLED[:2], None)):
        request = ChatCompletionRequest.from_openai(messages=list(messages), tools=tools)
        expected = own.encode_chat_completion(request).tokens
        assert prompt_token_ids(tokenizer, Conversation("c", messages, "s", tools)) == expected


def test_mistrals_verifier_is_usable_everywhere(mistral, tmp_path):
    given = Verifier(str(mistral))
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"prompt": "hi"}) + "\n")
    conversations = load_rows(tmp_path, [{"prompt": "hi"}])
    check_prompts(given, conversations, {})
    tokenizer = given.load_tokenizer()
    (prompt,) = load_prompts(given, data, {}, 1)
    assert prompt == prompt_token_ids(tokenizer, conversations[0])
    assert text(tokenizer, prompt).startswith("<s>[INST]")
    mask = choose_mask_token(tokenizer, len(tokenizer))
    assert mask in tokenizer.all_special_ids
    assert mask not in prompt_token_ids(tokenizer, Conversation("c", CALLED, "s", (TOOL,)))


def test_mistrals_dialogues_are_generated_and_read(mistral, tmp_path):
    tokenizer = Verifier(str(mistral)).load_tokenizer()
    eos = tokenizer.eos_token_id

    class End(Engine):
        def default(self, prompt):
            words = self.reply.format(sum(prompt) % 97)
            return [*tokenizer.encode(words, add_special_tokens=False), eos]

    conversation = conversation_of("hi", "old", "go on", "old")
    (example,), rejected = run([conversation], End(), tmp_path, tokenizer)
    assert rejected == []
    assert (
        example.token_ids.count(eos) == sum(example.loss_mask[i] for i in ends(example, eos)) == 2
    )

    # On policy the replies end as Mistral ends them.
    (example,) = on_policy_examples(tokenizer, conversation, eos_token_ids(tokenizer, None), 1000)
    shown = masked_text(tokenizer, example).replace("\u2581", "")  # SentencePiece's space
    assert shown == "old</s>old</s>"
    cut = conversation_of("hi", "the cat sat", unfinished=True)
    (example,) = on_policy_examples(tokenizer, cut, eos_token_ids(tokenizer, None), 1000)
    assert eos not in example.token_ids


def ends(example, eos) -> list[int]:
    return [i for i, token_id in enumerate(example.token_ids) if token_id == eos]


def test_mistrals_calls_are_not_put_back_as_text(mistral):
    tokenizer = Verifier(str(mistral)).load_tokenizer()
    calls = tokenizer.convert_tokens_to_ids("[TOOL_CALLS]")
    ids = [calls, *tokenizer.encode("x", add_special_tokens=False), tokenizer.eos_token_id]
    reply = FinishedReply(conversation_of("hi"), 1, [], ids, "stop")
    with pytest.raises(ValueError, match=r"special tokens \(\[TOOL_CALLS\]\)"):
        MarkedReplies(tokenizer)(reply)


def test_mistrals_server_refuses_what_it_cannot_render(mistral):
    tokenizer = Verifier(str(mistral)).load_tokenizer()
    with pytest.raises(ValueError, match=r"server refuses the conversation: .*chat_template"):
        prompt_token_ids(tokenizer, conversation_of("hi", chat_template_kwargs={"a": 1}))
    # A logged effort, with the switch that vLLM sets by it.
    effort = {"reasoning_effort": "high", "enable_thinking": True}
    prompt = prompt_token_ids(tokenizer, conversation_of("hi", chat_template_kwargs=effort))
    assert prompt == prompt_token_ids(tokenizer, conversation_of("hi"))


@pytest.mark.parametrize("thinking", [False, True])
def test_deepseeks_prompts_are_those_of_vllms_encoding(deepseek, thinking):
    from vllm.tokenizers.deepseek_v32_encoding import encode_messages

    tokenizer = Verifier(str(deepseek), tokenizer_mode="deepseek_v32").load_tokenizer()
    kwargs = {"thinking": True} if thinking else {}
    conversation = conversation_of("hi", "old", "go on", chat_template_kwargs=kwargs)
    printed = encode_messages(
        list(conversation.messages),
        thinking_mode="thinking" if thinking else "chat",
        drop_thinking=True,
    )
    expected = tokenizer.encode(printed, add_special_tokens=False)
    assert prompt_token_ids(tokenizer, conversation) == expected
    called = Conversation("c", CALLED, "s", (TOOL,), kwargs)
    assert "look_up" in text(tokenizer, prompt_token_ids(tokenizer, called))


def test_deepseeks_agent_is_learned_turn_by_turn(deepseek, tmp_path):
    given = Verifier(str(deepseek), tokenizer_mode="deepseek_v32")
    conversations = load_rows(tmp_path, logged_trajectory(3))
    check_prompts(given, conversations, {})
    tokenizer = given.load_tokenizer()
    engine = Engine(tokenizer=tokenizer)
    examples, rejected = run(conversations, engine, tmp_path, tokenizer)
    assert (len(examples), rejected) == (3, [])
    assert len({tuple(prompt) for prompt in engine.prompts.values()}) == 3


def test_a_mode_that_is_asked_for_is_vllms(verifier, tmp_path):
    given, rest = Verifier.from_options(str(verifier), {"tokenizer_mode": "deepseek_v32"})
    assert (given.engine_args()["tokenizer_mode"], rest) == ("deepseek_v32", {})
    conversations = load_rows(tmp_path, [{"prompt": "hi"}])
    prompt = prompt_token_ids(given.load_tokenizer(), conversations[0])
    assert prompt != prompt_token_ids(Verifier(str(verifier)).load_tokenizer(), conversations[0])
    check_prompts(Verifier(str(verifier)), conversations, {"tokenizer_mode": "deepseek_v32"})
    with pytest.raises(ValueError, match=r"tokenizer of .* cannot be read: .*nope"):
        check_prompts(Verifier(str(verifier)), conversations, {"tokenizer_mode": "nope"})


# ---- gpt-oss ----


@pytest.fixture
def gpt_oss(monkeypatch, models, verifier):
    """A model of that type, and what Harmony was asked to print: its vocabulary is not at hand."""
    from vllm.renderers import online_renderer

    path = models / "gpt-oss"
    if not path.exists():
        shutil.copytree(verifier, path)
        change_config(path, model_type="gpt_oss")
    printed = []

    def render(messages):
        printed.append([message.to_dict() for message in messages])
        return [7, len(messages)]

    monkeypatch.setattr(online_renderer, "render_for_completion", render)
    return path, printed


def test_gpt_oss_is_asked_through_harmony(gpt_oss, monkeypatch, tmp_path):
    monkeypatch.delenv("VLLM_SYSTEM_START_DATE", raising=False)
    path, printed = gpt_oss
    tokenizer = Verifier(str(path)).load_tokenizer()
    keep_date(tokenizer, datetime(2024, 2, 29))
    conversation = Conversation("c", CALLED, "s", (TOOL,), {"reasoning_effort": "low"})
    assert prompt_token_ids(tokenizer, conversation) == [7, len(printed[0])]
    roles = [message["role"] for message in printed[0]]
    assert roles == ["system", "developer", "user", "assistant", "tool"]
    system = json.dumps(printed[0][0])
    assert "2024-02-29" in system
    assert "ow" in system  # the effort, however Harmony spells it
    monkeypatch.delenv("VLLM_SYSTEM_START_DATE")


def test_gpt_oss_takes_responses_of_the_data_from_its_template(gpt_oss):
    path, _ = gpt_oss
    tokenizer = Verifier(str(path)).load_tokenizer()
    (example,) = on_policy_examples(
        tokenizer, conversation_of("hi", "hello"), eos_token_ids(tokenizer, None), 100
    )
    assert example.token_ids[:2] == (7, 2)
    assert masked_text(tokenizer, example) == "hello<|im_end|>"
