"""Reading conversations: formats, rejects, identity."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_dflash.training.conversations import (
    Conversation,
    Rejected,
    load_conversations,
    reject_conversation,
    write_rejected,
)

USER = {"role": "user", "content": "hi"}
REPLY = {"role": "assistant", "content": "hello"}
GOOD = {"messages": [USER, REPLY]}
TOOL = {"type": "function", "function": {"name": "look_up"}}
CALL = {"id": "1", "type": "function", "function": {"name": "look_up", "arguments": "{}"}}


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def load_one(tmp_path, row, **options) -> Conversation:
    conversations, rejected = load_conversations(
        write_rows(tmp_path / "data.jsonl", [row]), **options
    )
    assert rejected == []
    (conversation,) = conversations
    return conversation


@pytest.mark.parametrize(
    "row",
    [
        GOOD,
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
        {"conversations": [{"from": "USER", "value": "hi"}, {"from": "model", "value": "hello"}]},
        {"conversations": [USER, REPLY]},
        {"prompt": "hi", "response": "hello"},
        {"prompt": "hi", "completion": "hello"},
        {"prompt": [USER], "completion": [REPLY]},
        {"request": {"messages": [USER]}, "response": {"choices": [{"message": REPLY}]}},
        # Columns that Hugging Face's datasets fill with null.
        {"messages": [USER | {"tool_calls": None, "name": None}, REPLY], "tools": None, "id": None},
    ],
)
def test_every_format_gives_the_same_messages(tmp_path, row):
    conversation = load_one(tmp_path, row)
    assert conversation.messages == (USER, REPLY)
    assert conversation.source == "data.jsonl"
    assert (conversation.tools, conversation.chat_template_kwargs) == (None, {})
    assert not conversation.unfinished


@pytest.mark.parametrize(
    "row", [{"prompt": "hi"}, {"request": {"messages": [USER]}}, {"messages": [USER]}]
)
def test_response_is_optional(tmp_path, row):
    assert load_one(tmp_path, row).messages == (USER,)


def test_roles_and_fields_that_templates_read_are_kept(tmp_path):
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "be"}, "brief"]},
        {"role": "system", "content": ""},
        USER | {"unknown": 1},
        {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "hm"},
        {"role": "tool", "content": "", "tool_call_id": "1", "name": "look_up"},
    ]
    row = {"messages": messages, "source": "chat", "tools": [TOOL], "id": 7}
    conversation = load_one(tmp_path, row)
    parts = [{"type": "text", "text": "be"}, {"type": "text", "text": "brief"}]
    assert conversation.messages == (
        {"role": "developer", "content": parts},
        {"role": "system", "content": ""},
        USER,
        {"role": "assistant", "content": "", "tool_calls": [CALL], "reasoning": "hm"},
        {"role": "tool", "content": "", "tool_call_id": "1", "name": "look_up"},
    )
    assert (conversation.id, conversation.source, conversation.tools) == ("7", "chat", (TOOL,))


def test_logged_request_carries_what_the_server_gave_its_template(tmp_path):
    request = {
        "messages": [USER],
        "tools": [TOOL],
        "chat_template_kwargs": {"a": 1, "b": 1},
        "reasoning_effort": "none",
        "temperature": 0.3,
    }
    row = {"request": request, "chat_template_kwargs": {"b": 2}}
    conversation = load_one(tmp_path, row, chat_template_kwargs={"a": 0, "z": 0})
    assert conversation.tools == (TOOL,)
    assert conversation.chat_template_kwargs == {
        "a": 1,
        "b": 2,
        "z": 0,
        "reasoning_effort": "none",
        "enable_thinking": False,
    }


def test_response_cut_by_a_length_limit_is_marked(tmp_path):
    choice = {"message": REPLY, "finish_reason": "length"}
    row = {"request": {"messages": [USER]}, "response": {"choices": [choice]}}
    assert load_one(tmp_path, row).unfinished


BAD_ROWS = [
    ("{", "not JSON"),
    ('{"messages": [', "not JSON"),
    ("[" * 100_000, "nested too deeply"),
    ('{"prompt": "\\ud800"}', "no valid Unicode"),
    ("3", "the row is a int"),
    ({}, "no 'messages'"),
    ({"text": "hi"}, r"the row has \['text'\]"),
    ({"messages": "hi"}, "messages is a str"),
    ({"messages": []}, "no user turn"),
    ({"messages": [REPLY]}, "no user turn"),
    ({"messages": ["hi"]}, "message 0 is a str"),
    ({"messages": [USER, {"role": "robot", "content": "x"}]}, "message 1 has the unknown role"),
    ({"messages": [{"role": ["user"], "content": "x"}]}, "unknown role"),
    ({"messages": [{"role": "user"}]}, r"message 0 \(user\) has empty content"),
    ({"messages": [{"role": "user", "content": " \n"}]}, "empty content"),
    ({"messages": [USER, {"role": "assistant", "content": None}]}, "empty content"),
    ({"messages": [USER, REPLY | {"content": "", "tool_calls": []}]}, "empty content"),
    ({"messages": [{"role": "user", "content": 3}]}, "content of type int"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "'image_url'"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "part without text"),
    ({"messages": [USER, REPLY | {"tool_calls": ["x"]}]}, "names no function"),
    ({"messages": [USER, REPLY | {"tool_calls": "x"}]}, "not a list"),
    ({"messages": [USER, REPLY | {"reasoning": 3}]}, "reasoning that is not text"),
    ({"conversations": [{"from": "robot", "value": "x"}]}, "unknown role 'robot'"),
    ({"conversations": [{"from": "human", "value": None}]}, "empty content"),
    ({"prompt": ""}, "empty content"),
    ({"prompt": "hi", "response": 3}, "response is a int"),
    (GOOD | {"tools": "x"}, "tools is a str"),
    (GOOD | {"tools": [{"name": "x"}]}, "a tool must be"),
    (GOOD | {"chat_template_kwargs": "x"}, "chat_template_kwargs is a str"),
    (GOOD | {"chat_template_kwargs": {"tokenize": False}}, "must not set"),
    ({"request": {"prompt": "hi"}}, "request.messages is a NoneType"),
    ({"request": {"messages": [USER], "chat_template": "x"}}, "its own chat template"),
    ({"request": {"messages": [USER, REPLY], "continue_final_message": True}}, "continues its"),
    ({"request": {"messages": [USER]}, "response": {"error": "x"}}, "no choices"),
    ({"request": {"messages": [USER]}, "response": {"choices": [{}]}}, "no message"),
    (
        {
            "request": {"messages": [USER]},
            "response": {"choices": [{"message": REPLY, "finish_reason": "abort"}]},
        },
        "finish_reason is 'abort'",
    ),
]


@pytest.mark.parametrize(("row", "reason"), BAD_ROWS)
def test_bad_row_is_rejected_with_its_reason_and_the_others_survive(tmp_path, row, reason):
    text = row if isinstance(row, str) else json.dumps(row)
    path, rejected_path = tmp_path / "data.jsonl", tmp_path / "run" / "rejected.jsonl"
    path.write_text("\n".join([json.dumps(GOOD), text, json.dumps(GOOD)]), encoding="utf-8")

    conversations, rejected = load_conversations(path, rejected_path=rejected_path)

    assert [conversation.line for conversation in conversations] == [1, 3]
    (reject,) = rejected
    assert (reject.line, reject.row) == (2, text)
    with pytest.raises(ValueError, match=reason):
        raise ValueError(reject.reason)
    (written,) = map(json.loads, rejected_path.read_text().splitlines())
    assert written == {"line": 2, "reason": reject.reason, "row": text}


def test_bytes_that_are_no_utf8_are_rejected(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"prompt": "\xff"}\n' + json.dumps(GOOD).encode())
    conversations, (reject,) = load_conversations(path)
    assert len(conversations) == 1
    assert reject.reason.startswith("not UTF-8")
    assert reject.row == '{"prompt": "\\xff"}'


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    picks=st.lists(st.sampled_from([GOOD, {"prompt": "x"}, *(row for row, _ in BAD_ROWS)])),
    limit=st.one_of(st.none(), st.integers(1, 4)),
)
def test_every_row_is_either_accepted_or_rejected(tmp_path, picks, limit):
    path = tmp_path / "data.jsonl"
    lines = [pick if isinstance(pick, str) else json.dumps(pick) for pick in picks]
    path.write_text("".join(f"{line}\n\n" for line in lines), encoding="utf-8")
    rejected_path = tmp_path / "rejected.jsonl"
    good = [n for n, pick in enumerate(picks) if pick in (GOOD, {"prompt": "x"})]
    if not good:
        with pytest.raises(ValueError, match=r"is empty|all \d+ rows were rejected\. row 1: "):
            load_conversations(path, rejected_path=rejected_path, limit=limit)
        assert len(rejected_path.read_text().splitlines()) == len(picks)
        return

    conversations, rejected = load_conversations(path, rejected_path=rejected_path, limit=limit)

    kept = good[:limit]
    num_read = kept[-1] + 1 if len(kept) == limit else len(picks)
    assert len(conversations) + len(rejected) == num_read
    assert [conversation.line for conversation in conversations] == [2 * n + 1 for n in kept]
    assert len({conversation.id for conversation in conversations}) == len(conversations)
    written = [Rejected(**json.loads(line)) for line in rejected_path.read_text().splitlines()]
    assert written == rejected


def test_ids_are_the_rows_own_or_stable_hashes(tmp_path):
    other = {"messages": [USER]}
    rows = [GOOD, GOOD | {"id": "mine"}, other, GOOD, other | {"conversation_id": "mine"}]
    first, _ = load_conversations(write_rows(tmp_path / "a.jsonl", rows))
    ids = [conversation.id for conversation in first]
    assert ids[1] == "mine"
    assert ids[3] == f"{ids[0]}#2"  # the same content again
    assert ids[4] == f"{ids[2]}#2"  # its own id was taken
    assert len(set(ids)) == len(ids)
    # Another order, another file: the same content keeps its id.
    again, _ = load_conversations(write_rows(tmp_path / "b.jsonl", [other, GOOD]))
    assert [conversation.id for conversation in again] == [ids[2], ids[0]]


def test_template_kwargs_and_tools_are_part_of_the_identity(tmp_path):
    rows = [GOOD, GOOD | {"tools": [TOOL]}, GOOD | {"chat_template_kwargs": {"a": 1}}]
    conversations, _ = load_conversations(write_rows(tmp_path / "a.jsonl", rows))
    assert not any("#" in conversation.id for conversation in conversations)


def test_json_array_and_byte_order_mark(tmp_path):
    array = tmp_path / "data.json"
    array.write_text(json.dumps([GOOD, {}, GOOD]))
    conversations, (reject,) = load_conversations(array)
    assert [conversation.line for conversation in conversations] == [1, 3]
    assert (reject.line, reject.row) == (2, "{}")

    lines = tmp_path / "data.jsonl"
    lines.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n")
    conversations, rejected = load_conversations(lines)
    assert (len(conversations), rejected) == (1, [])


@pytest.mark.parametrize(("text", "reason"), [('{"a": 1}', "holds a dict"), ("{}\n{}", "not JSON")])
def test_json_file_that_is_no_array_is_an_error(tmp_path, text, reason):
    path = tmp_path / "data.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=reason):
        load_conversations(path)


@pytest.mark.parametrize("name", ["nowhere/data.jsonl", "nowhere", "/a/b/c", "data.parquet"])
def test_missing_file_is_one_clear_error(name):
    with pytest.raises(ValueError, match=f"no file {name}"):
        load_conversations(name)


def test_unusable_arguments_name_the_way_out(tmp_path):
    with pytest.raises(ValueError, match="is a folder; give one JSONL file"):
        load_conversations(tmp_path)
    path = write_rows(tmp_path / "data.jsonl", [GOOD])
    with pytest.raises(ValueError, match="limit is 0"):
        load_conversations(path, limit=0)
    with pytest.raises(ValueError, match="must not set"):
        load_conversations(path, chat_template_kwargs={"tools": []})


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_empty_file_is_named(tmp_path, suffix):
    path = tmp_path / f"data.{suffix}"
    path.touch()
    with pytest.raises(ValueError, match=rf"data\.{suffix} is empty"):
        load_conversations(path)


def test_hub_data_set_is_read_row_by_row(monkeypatch):
    calls = []

    def load_dataset(name, **options):
        calls.append((name, options))
        return [GOOD, {"text": "x"}, GOOD, GOOD]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    conversations, (reject,) = load_conversations("org/name", split="test", limit=2)
    assert [conversation.line for conversation in conversations] == [1, 3]
    assert conversations[0].source == "org/name"
    assert reject.row == '{"text": "x"}'
    load_conversations("org/name")
    assert calls == [
        ("org/name", {"split": "test", "streaming": True}),  # a limit need not download it all
        ("org/name", {"split": "train", "streaming": False}),
    ]


def test_hub_errors_say_what_to_do(monkeypatch):
    def load_dataset(name, **options):
        raise ConnectionError("unreachable")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(ValueError, match=r"ConnectionError: unreachable\. Check the name and"):
        load_conversations("org/name")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'vllm-dflash\[train\]'"):
        load_conversations("org/name")


def test_rejects_of_later_steps_are_written_with_the_first_ones(tmp_path):
    conversation = load_one(tmp_path, GOOD | {"id": "mine"})
    reject = reject_conversation(conversation, ValueError("no system role"))
    assert (reject.line, reject.reason) == (1, "no system role")
    assert json.loads(reject.row)["messages"] == [USER, REPLY]
    path = tmp_path / "rejected.jsonl"
    write_rejected(path, [reject])
    write_rejected(path, [Rejected(9, "x", "\ud800"), reject])
    assert [json.loads(line)["line"] for line in path.read_text().splitlines()] == [9, 1]


def test_failed_write_leaves_the_old_rejects_and_no_litter(tmp_path):
    path = tmp_path / "rejected.jsonl"
    write_rejected(path, [Rejected(1, "x", "y")])
    before = path.read_text()

    def dying():
        yield Rejected(2, "x", "y")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_rejected(path, dying())
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]
