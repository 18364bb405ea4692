"""Reading conversations: formats, rejects, identity."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
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
        {"conversation_id": "1", "model": "vicuna-13b", "conversation": [USER, REPLY], "turn": 1},
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
    (GOOD | {"tools": [{"title": "x"}]}, "a tool must be"),
    (GOOD | {"tools": "[{"}, "tools is a str that is no JSON"),
    (GOOD | {"system": {"a": 1}}, "system has content of type dict"),
    (GOOD | {"images": ["scan.png"]}, r"the row has images \(\['scan.png'\]\)"),
    (GOOD | {"video": {"path": "a.mp4"}}, "the row has video"),
    ({"messages": [USER | {"audio": "a.wav"}, REPLY]}, "message 0 has audio"),
    (
        {"images": [], "messages": [USER | {"content": "<image>\nread it"}, REPLY]},
        "message 0 has the placeholder <image>",
    ),
    (
        {"system": "brief", "messages": [{"role": "system", "content": "long"}, USER]},
        "the row's system is not the system message of its messages",
    ),
    ({"system": "brief", "request": {"messages": [USER]}}, "the logged request's messages"),
    (
        {
            "conversations": [
                {"from": "human", "value": "x"},
                {"from": "function_call", "value": "f(x)"},
            ]
        },
        "message 1 is a str that is no JSON",
    ),
    (
        {
            "conversations": [
                {"from": "human", "value": "x"},
                {"from": "function_call", "value": "{}"},
            ]
        },
        "names no function",
    ),
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


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
    with pytest.raises(ValueError, match="is a folder without data"):
        load_conversations(tmp_path)
    with pytest.raises(ValueError, match=r"no file matches .*\*\.jsonl"):
        load_conversations(tmp_path / "*.jsonl")
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


# ---- a system text beside the messages, media ----


@pytest.mark.parametrize("key", ["system", "system_prompt"])
@pytest.mark.parametrize(
    "row",
    [
        GOOD,
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
        {"prompt": "hi", "response": "hello"},
    ],
)
def test_system_beside_the_messages_becomes_the_first_one(tmp_path, key, row):
    conversation = load_one(tmp_path, row | {key: "Be terse.", "images": [], "audio": None})
    assert conversation.messages == ({"role": "system", "content": "Be terse."}, USER, REPLY)


@pytest.mark.parametrize("text", ["", " \n", None, "Be terse."])
def test_system_that_says_nothing_new_changes_nothing(tmp_path, text):
    messages = [{"role": "system", "content": "Be terse."}, USER, REPLY]
    assert load_one(tmp_path, {"system": text, "messages": messages}).messages == tuple(messages)


def test_placeholders_are_text_where_rows_have_no_media(tmp_path):
    message = USER | {"content": "what does <video> do in HTML?"}
    assert load_one(tmp_path, {"messages": [message]}).messages == (message,)


# ---- tools ----

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
DEFINITION = {"name": "weather", "description": "of a city", "parameters": SCHEMA}
WEATHER = {"type": "function", "function": DEFINITION}


@pytest.mark.parametrize(
    "tools",
    [
        [WEATHER],
        json.dumps([WEATHER]),
        [json.dumps(WEATHER)],
        [DEFINITION],
        [{"type": "function", **DEFINITION}],
        [DEFINITION | {"parameters": json.dumps(SCHEMA)}],
    ],
)
def test_tools_in_every_form(tmp_path, tools):
    assert load_one(tmp_path, GOOD | {"tools": tools}).tools == (WEATHER,)


@pytest.mark.parametrize("tools", ["", "[]", "null", " ", []])
def test_no_tools_in_every_form(tmp_path, tools):
    assert load_one(tmp_path, GOOD | {"tools": tools}).tools is None


def test_sharegpts_function_calls_and_their_results(tmp_path):
    calls = [{"name": "weather", "arguments": {"city": c}} for c in ("Oslo", "Rome")]
    row = {
        "conversations": [
            {"from": "human", "value": "Oslo and Rome?"},
            {"from": "function_call", "value": json.dumps(calls)},
            {"from": "observation", "value": "12"},
            {"from": "tool_response", "value": "25"},
            {"from": "function_call", "value": json.dumps(calls[0])},
            {"from": "observation", "value": "13"},
            {"from": "gpt", "value": "12, 25."},
        ]
    }
    messages = load_one(tmp_path, row).messages
    assert [m["role"] for m in messages] == [
        "user", "assistant", "tool", "tool", "assistant", "tool", "assistant",
    ]  # fmt: skip
    assert [c["function"] for c in messages[1]["tool_calls"]] == calls
    # Clients always send ids; Mistral's template wants nine letters and digits.
    ids = [call["id"] for m in messages for call in m.get("tool_calls", ())]
    assert [m["tool_call_id"] for m in messages if m["role"] == "tool"] == ids
    assert len(set(ids)) == 3
    assert all(len(i) == 9 and i.isalnum() for i in ids)


def test_openais_older_function_call(tmp_path):
    call = {"name": "weather", "arguments": '{"city": "Oslo"}'}
    row = {"messages": [USER, {"role": "assistant", "content": None, "function_call": call}]}
    (made,) = load_one(tmp_path, row).messages[1]["tool_calls"]
    assert made["function"] == call


def with_nulls(schema_nulls=True):
    """A row as a dump of Arrow's writes it, each object with the members of all others."""
    properties = {"city": {"type": "string", "enum": None}, "days": None}
    schema = {**SCHEMA, "properties": properties if schema_nulls else SCHEMA["properties"]}
    arguments = {"city": "Oslo", "days": None}
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    return {
        "tools": [{"type": "function", "function": DEFINITION | {"parameters": schema}}],
        "messages": [USER, {"role": "assistant", "content": None, "tool_calls": [call]}],
    }


def arguments_of(conversation):
    return conversation.messages[1]["tool_calls"][0]["function"]["arguments"]


def test_nulls_of_arrow_leave_tools_and_arguments(tmp_path):
    conversation = load_one(tmp_path, with_nulls())
    assert conversation.tools == (WEATHER,)
    assert arguments_of(conversation) == {"city": "Oslo"}


def test_nulls_that_are_meant_stay(tmp_path):
    # No schema has nulls of Arrow's, so the argument's is the model's own.
    row = with_nulls(schema_nulls=False)
    default = {"type": ["string", "null"], "default": None, "enum": ["a", None]}
    row["tools"][0]["function"]["parameters"]["properties"] = {"city": default}
    conversation = load_one(tmp_path, row)
    assert conversation.tools == tuple(row["tools"])
    assert arguments_of(conversation) == {"city": "Oslo", "days": None}
    # A client's request was rendered as it came.
    request = with_nulls()
    logged = load_one(tmp_path, {"request": request})
    assert logged.tools == tuple(request["tools"])
    assert arguments_of(logged) == {"city": "Oslo", "days": None}


def test_arrow_rows_lose_all_nulls(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    other = {"tools": [], "messages": [USER | {"name": "x"}], "images": ["a.png"]}
    clean = with_nulls(schema_nulls=False)
    del clean["messages"][1]["tool_calls"][0]["function"]["arguments"]["days"]
    rows = [clean, other, {"messages": [USER, REPLY], "chat_template_kwargs": {"a": 1}}]
    columns = {name: [row.get(name) for row in rows] for row in rows for name in row}
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    conversations, (reject,) = load_conversations(tmp_path / "rows.parquet")
    assert conversations[0].messages == load_one(tmp_path, clean).messages
    assert conversations[0].tools == (WEATHER,)
    assert conversations[0].chat_template_kwargs == {}
    assert conversations[1].messages == (USER, REPLY)
    assert "images" in reject.reason


# ---- kinds of files, several of them ----


def questions(*numbers):
    return [{"messages": [{"role": "user", "content": f"question {n}"}]} for n in numbers]


def lines_of(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def asked(data, **options):
    conversations, rejected = load_conversations(data, **options)
    assert rejected == []
    return [c.messages[0]["content"].removeprefix("question ") for c in conversations]


def write_zstd(path, raw):
    pyarrow = pytest.importorskip("pyarrow")
    with pyarrow.output_stream(str(path), compression="zstd") as file:
        file.write(raw)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.jsonl.gz", lambda path, raw: path.write_bytes(gzip.compress(raw))),
        ("a.jsonl.bz2", lambda path, raw: path.write_bytes(bz2.compress(raw))),
        ("a.jsonl.xz", lambda path, raw: path.write_bytes(lzma.compress(raw))),
        ("a.jsonl.zst", write_zstd),
        ("A.JSONL.GZ", lambda path, raw: path.write_bytes(gzip.compress(raw))),
        # Two members behind each other, and a name that hides what it is.
        (
            "a.jsonl",
            lambda path, raw: path.write_bytes(gzip.compress(raw[:61]) + gzip.compress(raw[61:])),
        ),
    ],
)
def test_compressed_lines(tmp_path, name, write):
    write(tmp_path / name, lines_of(questions(0, 1)))
    assert asked(tmp_path / name) == ["0", "1"]


def test_compressed_array(tmp_path):
    path = tmp_path / "a.json.gz"
    path.write_bytes(gzip.compress(json.dumps(questions(0, 1)).encode()))
    assert asked(path) == ["0", "1"]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.parquet", "a.csv", "a.jsonl"])
def test_damaged_and_foreign_files_are_named(tmp_path, name):
    path = tmp_path / name
    packed = gzip.compress(lines_of(questions(*range(99))))
    path.write_bytes({".gz": packed[:-20], ".jsonl": b"PK\x03\x04zip"}.get(path.suffix, b"a,b\n"))
    with pytest.raises(ValueError, match=name):
        load_conversations(path)


@pytest.mark.parametrize("cut", [1, 2])
@pytest.mark.parametrize("name", ["gz", "bz2", "xz", "zst"])
def test_a_compressed_file_that_was_cut_is_not_read_as_a_shorter_one(tmp_path, name, cut):
    raw = lines_of(questions(*range(5000)))
    path = tmp_path / f"a.jsonl.{name}"
    pack = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
    if name == "zst":
        write_zstd(path, raw)
    else:
        path.write_bytes(pack[name](raw))
    size = path.stat().st_size
    os.truncate(path, size - 1 if cut == 1 else size // 2)
    with pytest.raises(ValueError, match="cannot be read"):
        load_conversations(path)


def test_parquet(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.Table.from_pylist(questions(0, 1)), tmp_path / "rows.parquet")
    assert asked(tmp_path / "rows.parquet") == ["0", "1"]
    assert asked(tmp_path / "rows.parquet", limit=1) == ["0"]


def test_several_files_patterns_and_folders(tmp_path):
    (tmp_path / "part").mkdir()
    write_rows(tmp_path / "part" / "b.jsonl", questions(1))
    (tmp_path / "part" / "c.jsonl.gz").write_bytes(gzip.compress(lines_of(questions(2))))
    (tmp_path / "part" / "dataset_infos.json").write_text("{}")
    (tmp_path / "part" / "README.md").write_text("about")
    hidden = tmp_path / "part" / ".ipynb_checkpoints"
    hidden.mkdir()
    write_rows(hidden / "b-checkpoint.jsonl", questions(1))
    write_rows(tmp_path / "part" / ".d.jsonl", questions(3))
    array = tmp_path / "a.json"
    array.write_text(json.dumps(questions(0)))
    assert asked(tmp_path / "part") == ["1", "2"]
    assert asked(str(tmp_path / "part" / "*.jsonl*")) == ["1", "2"]
    assert asked([array, tmp_path / "part"]) == ["0", "1", "2"]
    conversations, _ = load_conversations([array, tmp_path / "part"], limit=3)
    assert [c.source for c in conversations] == ["a.json", "part", "part"]


def test_rejects_of_several_files_name_theirs(tmp_path):
    paths = [write_rows(tmp_path / f"{n}.jsonl", [GOOD, {"text": n}]) for n in "ab"]
    kept = tmp_path / "rejected.jsonl"
    conversations, rejected = load_conversations(paths, rejected_path=kept)
    assert len({c.id for c in conversations}) == 2
    assert [(r.file, r.line) for r in rejected] == [("a.jsonl", 2), ("b.jsonl", 2)]
    assert [json.loads(line)["file"] for line in kept.read_text().splitlines()] == [
        "a.jsonl",
        "b.jsonl",
    ]
    assert reject_conversation(conversations[1], "x").file == "b.jsonl"


@pytest.mark.parametrize(
    ("data", "which", "split"),
    [
        ("org/name", ("org/name",), "train"),
        ("org/name:train_sft", ("org/name",), "train_sft"),
        ("org/name:train[:10%]", ("org/name",), "train[:10%]"),
        ("org/name/main:test", ("org/name", "main"), "test"),
        ("org/name/main", ("org/name", "main"), "train"),
    ],
)
def test_hub_names_say_split_and_subset(monkeypatch, data, which, split):
    calls = []

    def load_dataset(*names, **options):
        calls.append((names, options["split"]))
        return [GOOD]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    conversations, _ = load_conversations(data)
    assert calls == [(which, split)]
    assert conversations[0].source == data.partition(":")[0]


def test_folder_with_a_split_is_a_data_set(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    write_rows(folder / "train.jsonl", questions(0, 1))
    write_rows(folder / "test.jsonl", questions(2))
    assert asked(f"{folder}:test") == ["2"]


def test_what_datasets_saved_to_disk(tmp_path):
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset.from_list([with_nulls(schema_nulls=False), *questions(1)])
    one.save_to_disk(str(tmp_path / "one"))
    conversations, _ = load_conversations(tmp_path / "one")
    assert conversations[1].messages == ({"role": "user", "content": "question 1"},)
    assert arguments_of(conversations[0]) == {"city": "Oslo"}
    several = datasets.DatasetDict(
        train_sft=datasets.Dataset.from_list(questions(0)),
        test_sft=datasets.Dataset.from_list(questions(1)),
    )
    several.save_to_disk(str(tmp_path / "several"))
    assert asked(f"{tmp_path / 'several'}:test_sft") == ["1"]
    with pytest.raises(ValueError, match="reading split 'train' of that Hugging Face data set"):
        load_conversations(tmp_path / "several")


def test_pictures_of_a_data_set_are_never_opened(monkeypatch):
    datasets = pytest.importorskip("datasets")
    picture = {"bytes": b"no picture", "path": "a.png"}
    rows = [{**GOOD, "images": [picture]}, {**GOOD, "images": []}, {**GOOD, "images": None}]
    features = datasets.Features(
        {
            "messages": [{name: datasets.Value("string") for name in ("role", "content")}],
            "images": datasets.Sequence(datasets.Image()),
        }
    )
    made = datasets.Dataset.from_list(rows, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, **options: made)
    conversations, (reject,) = load_conversations("org/name")
    assert len(conversations) == 2
    assert "images" in reject.reason
    assert "<10 bytes>" in reject.row


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "x" * 100_000, "content": "y"}]},
        {"messages": [USER, REPLY | {"tool_calls": "x" * 100_000}]},
        {"messages": [{"role": "user", "content": [{"type": "x" * 100_000}]}]},
        {"x" * 100_000: 1},
        GOOD | {"images": ["x" * 100_000]},
    ],
)
def test_reasons_are_short(tmp_path, row):
    _, (reject,) = load_conversations(write_rows(tmp_path / "a.jsonl", [GOOD, row]))
    assert len(reject.reason) <= 300
    assert len(reject.row) > 100_000


def test_what_was_rejected_before_is_no_data(tmp_path):
    """Rejected rows lie beside an output, which may be where a pattern or a folder finds them."""
    good = json.dumps({"prompt": "a", "response": "b"}) + "\n"
    (tmp_path / "rows.jsonl").write_text(good + "broken\n")
    _, rejected = load_conversations(str(tmp_path / "rows.jsonl"))
    write_rejected(tmp_path / "x.rejected.jsonl", rejected)
    for data in (str(tmp_path), str(tmp_path / "*.jsonl")):
        conversations, again = load_conversations(data)
        assert (len(conversations), len(again)) == (1, 1)
    (tmp_path / "y.rejected.jsonl").write_text(good)
    with pytest.raises(ValueError, match="holds something else"):
        write_rejected(tmp_path / "y.rejected.jsonl", rejected)
    assert (tmp_path / "y.rejected.jsonl").read_text() == good


def test_a_pipe_is_named(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="write it to a file"):
        load_conversations(str(tmp_path / "pipe"))
