"""Conversations to train on, read from files, Hugging Face datasets or a server's own log.

Every row of the input ends in exactly one of two places: a :class:`Conversation` or a
:class:`Rejected` that says why. One bad row never stops a run, and no row disappears silently.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Generator, Iterable
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vllm_dflash.files import atomic_path

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
#: Message fields that chat templates read, besides role and content.
MESSAGE_FIELDS = ("tool_calls", "tool_call_id", "name", "reasoning")
TEXT_PART_TYPES = ("text", "input_text", "output_text")
#: A response with another finish reason (abort, content_filter...) is not the verifier's own text.
FINISH_REASONS = (None, "stop", "length", "tool_calls", "function_call")
#: Arguments of ``apply_chat_template`` that a row must not set through chat_template_kwargs.
RESERVED_TEMPLATE_KWARGS = frozenset(
    {
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversation",
        "max_length",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "tokenize",
        "tokenizer_kwargs",
        "tools",
        "truncation",
    }
)
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
FILE_SUFFIXES = (".jsonl", ".json", ".ndjson", ".txt", ".gz", ".csv", ".parquet")


@dataclass(frozen=True)
class Conversation:
    """One conversation in OpenAI's message format.

    Attributes:
        id: Unique in its data set and stable between runs.
        messages: Messages with at least ``role`` and ``content`` (text or a list of text parts).
        source: What the conversation is filed under in reports, by default the file's name.
        tools: OpenAI tool definitions that the chat template renders.
        chat_template_kwargs: As the server's request field, e.g. ``{"enable_thinking": False}``.
        unfinished: The last (assistant) message was cut by a length limit, so the verifier never
            generated the end of turn that the chat template prints after it.
        line: Row of the input, from 1.
    """

    id: str
    messages: tuple[dict, ...]
    source: str
    tools: tuple[dict, ...] | None = None
    chat_template_kwargs: dict = field(default_factory=dict)
    unfinished: bool = False
    line: int = 0


@dataclass(frozen=True)
class Rejected:
    """A row that is not trained on.

    Attributes:
        line: Row of the input, from 1.
        reason: Why, in words for the person who owns the data.
        row: The row's original text (of a conversation rejected later, its content as JSON).
    """

    line: int
    reason: str
    row: str


def reject_conversation(conversation: Conversation, reason: object) -> Rejected:
    """The :class:`Rejected` of a conversation that a later step (its chat template) refuses."""
    content = _content_of(conversation)
    row = json.dumps({"id": conversation.id, **content}, ensure_ascii=False, default=str)
    return Rejected(conversation.line, str(reason), row)


def write_rejected(path: Path, rejected: Iterable[Rejected]) -> None:
    """Replaces ``path`` by exactly these rejects, one JSON object a line, in one atomic step.

    Callers that reject more rows later pass the whole list again.
    """
    with atomic_path(path) as partial, partial.open("w", encoding="ascii") as file:
        for reject in rejected:
            line = {"line": reject.line, "reason": reject.reason, "row": reject.row}
            file.write(json.dumps(line) + "\n")


def load_conversations(
    data: str | Path,
    *,
    rejected_path: Path | None = None,
    chat_template_kwargs: dict | None = None,
    limit: int | None = None,
    split: str = "train",
) -> tuple[list[Conversation], list[Rejected]]:
    """Reads conversations; rows that cannot be used are returned (and written) with a reason.

    Accepted rows: ``{"messages": [...]}``, ShareGPT's ``{"conversations": [...]}``,
    ``{"prompt": ..., "response": ...}`` and logged traffic ``{"request": ..., "response": ...}``;
    each with optional ``id``, ``source``, ``tools`` and ``chat_template_kwargs``.

    Args:
        data: A JSONL file, a ``.json`` file holding one array, or the name of a Hugging Face
            data set (``org/name``) if no such file exists.
        rejected_path: Where to write the rejected rows; replaced if it exists.
        chat_template_kwargs: For every conversation; a row's own kwargs override them one by one.
        limit: Stop reading after this many usable conversations.
        split: Split of a Hugging Face data set.

    Raises:
        ValueError: No such data, or no usable row in it.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; give at least 1, or None to read everything")
    default_kwargs = _checked_template_kwargs(chat_template_kwargs)
    source, rows = _open_rows(data, limit=limit, split=split)

    conversations: list[Conversation] = []
    rejected: list[Rejected] = []
    seen_ids: set[str] = set()
    # A data set that is streamed holds a connection: let go of it when the limit stops us early.
    with closing(rows):
        for line, text, row in rows:
            try:
                decoded = _decode_json(row) if isinstance(row, bytes) else row
                conversation = _parse_row(decoded, line, source, default_kwargs)
            except (ValueError, RecursionError) as error:
                rejected.append(Rejected(line, str(error), text))
                continue
            conversation = replace(conversation, id=_unique_id(conversation, seen_ids))
            seen_ids.add(conversation.id)
            conversations.append(conversation)
            if len(conversations) == limit:
                break

    if rejected_path is not None:
        write_rejected(rejected_path, rejected)
    if not conversations:
        raise ValueError(_nothing_usable(data, rejected))
    return conversations, rejected


def _nothing_usable(data: str | Path, rejected: list[Rejected]) -> str:
    if not rejected:
        return f"{data} is empty: it holds no row to train on"
    reasons = "; ".join(f"row {reject.line}: {reject.reason}" for reject in rejected[:3])
    return f"{data} has no usable conversation, all {len(rejected)} rows were rejected. {reasons}"


# ---- rows: (line number, original text, the row itself or its JSON as bytes) ----

Row = tuple[int, str, Any]
Rows = Generator[Row, None, None]


def _open_rows(data: str | Path, *, limit: int | None, split: str) -> tuple[str, Rows]:
    """Returns the default source name and an iterator over the rows."""
    path = Path(data).expanduser()
    if path.is_dir():
        raise ValueError(
            f"{data} is a folder; give one JSONL file (`cat {data}/*.jsonl > all.jsonl`)"
        )
    if path.exists():
        return path.name, _json_rows(path) if path.suffix == ".json" else _jsonl_rows(path)
    name = str(data)
    if HUB_NAME.fullmatch(name) and path.suffix.lower() not in FILE_SUFFIXES:
        return name, _hub_rows(name, split=split, streaming=limit is not None)
    raise ValueError(
        f"no file {data}; give a JSONL file of conversations or the name of a Hugging Face data "
        "set (org/name)"
    )


def _jsonl_rows(path: Path) -> Rows:
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            raw = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
            if raw.strip():  # a blank line is no row: editors leave one at the end
                text = raw.decode("utf-8", errors="backslashreplace").rstrip("\r\n")
                yield number, text, raw


def _decode_json(raw: bytes) -> Any:
    try:
        return json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from error
    except RecursionError as error:
        raise ValueError("JSON nested too deeply") from error


def _json_rows(path: Path) -> Rows:
    try:
        rows = _decode_json(path.read_bytes().removeprefix(b"\xef\xbb\xbf") or b"[]")
    except ValueError as error:
        raise ValueError(f"{path}: {error}; for one row a line, name it .jsonl") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path} holds a {type(rows).__name__}; a .json file must hold one array")
    yield from _rows_of(rows)


def _hub_rows(name: str, *, split: str, streaming: bool) -> Rows:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"no file {name}, and to read it as a Hugging Face data set the `datasets` package is "
            "needed: pip install 'vllm-dflash[train]'"
        ) from error
    try:
        yield from _rows_of(datasets.load_dataset(name, split=split, streaming=streaming))
    except Exception as error:  # the hub's clients raise a dozen unrelated classes
        raise ValueError(
            f"no file {name}, and reading split {split!r} of that Hugging Face data set failed: "
            f"{type(error).__name__}: {error}. Check the name and the network, or give a JSONL file"
        ) from error


def _rows_of(rows: Iterable[Any]) -> Rows:
    for number, row in enumerate(rows, start=1):
        text = json.dumps(row, ensure_ascii=False, default=str)
        yield number, text, row


# ---- one row -> one conversation ----


def _parse_row(row: Any, line: int, source: str, template_kwargs: dict) -> Conversation:
    """Raises ValueError with the reason for a row that cannot be used."""
    if not isinstance(row, dict):
        raise ValueError(f"the row is a {type(row).__name__}, not a JSON object")
    tools, unfinished = row.get("tools"), False
    template_kwargs = dict(template_kwargs)
    if isinstance(row.get("request"), dict):
        messages, unfinished = _logged_messages(row["request"], row.get("response"))
        tools = row["request"].get("tools") if tools is None else tools
        template_kwargs.update(_request_template_kwargs(row["request"]))
    elif row.get("messages") is not None:
        messages = _messages(row["messages"], "messages")
    elif row.get("conversations") is not None:
        messages = _messages(row["conversations"], "conversations")
    elif row.get("prompt") is not None:
        messages = _prompt_messages(row)
    else:
        raise ValueError(
            "no 'messages', 'conversations', 'prompt' or 'request' field; the row has "
            f"{sorted(map(str, row))}"
        )
    template_kwargs.update(_checked_template_kwargs(row.get("chat_template_kwargs")))
    if not any(message["role"] == "user" for message in messages):
        raise ValueError(f"no user turn; roles are {[message['role'] for message in messages]}")

    row_source = row.get("source")
    row_id = next((row[key] for key in ("id", "conversation_id") if row.get(key) is not None), "")
    conversation = Conversation(
        id=str(row_id) if isinstance(row_id, (str, int)) else "",
        messages=tuple(messages),
        source=row_source if isinstance(row_source, str) and row_source else source,
        tools=_checked_tools(tools),
        chat_template_kwargs=template_kwargs,
        unfinished=unfinished,
        line=line,
    )
    _check_unicode(conversation)
    return conversation


def _logged_messages(request: dict, response: Any) -> tuple[list[dict], bool]:
    """Messages of a logged chat completion, its reply appended, and whether that was cut short."""
    if request.get("continue_final_message") or request.get("add_generation_prompt") is False:
        raise ValueError("the request continues its last message instead of asking for a new one")
    if request.get("chat_template"):
        raise ValueError("the request brings its own chat template; training uses the verifier's")
    messages = _messages(request.get("messages"), "request.messages")
    if response is None:
        return messages, False
    choices = response.get("choices") if isinstance(response, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise ValueError(
            "the response has no choices; leave 'response' out to train on the request"
        )
    finish_reason = choices[0].get("finish_reason")
    if finish_reason not in FINISH_REASONS:
        raise ValueError(f"the response's finish_reason is {finish_reason!r}")
    reply = choices[0].get("message")
    if not isinstance(reply, dict):
        raise ValueError("the response's first choice has no message")
    number = len(messages)
    messages.append(_message({"role": "assistant", **reply}, f"response message {number}"))
    return messages, finish_reason == "length"


def _request_template_kwargs(request: dict) -> dict:
    """The request fields that vLLM's server hands to the chat template."""
    kwargs = _checked_template_kwargs(request.get("chat_template_kwargs"))
    effort = request.get("reasoning_effort")
    if effort not in (None, "auto"):
        # As vLLM: asking for an effort also switches thinking, unless the request says otherwise.
        kwargs["reasoning_effort"] = effort
        kwargs.setdefault("enable_thinking", effort != "none")
    if request.get("documents") is not None:
        kwargs["documents"] = request["documents"]
    return kwargs


def _checked_template_kwargs(kwargs: Any) -> dict:
    if kwargs is None:
        return {}
    if not isinstance(kwargs, dict):
        raise ValueError(f"chat_template_kwargs is a {type(kwargs).__name__}, not an object")
    if reserved := sorted(RESERVED_TEMPLATE_KWARGS & kwargs.keys()):
        raise ValueError(f"chat_template_kwargs must not set {reserved}")
    return dict(kwargs)


def _checked_tools(tools: Any) -> tuple[dict, ...] | None:
    if not tools:
        return None
    if not isinstance(tools, (list, tuple)):
        raise ValueError(f"tools is a {type(tools).__name__}, not a list of tool definitions")
    for tool in tools:
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError('a tool must be {"type": "function", "function": {"name": ...}}')
    return tuple(tools)


def _prompt_messages(row: dict) -> list[dict]:
    messages = _text_or_messages(row["prompt"], role="user", name="prompt")
    answer = next(
        (row[key] for key in ("response", "completion") if row.get(key) is not None), None
    )
    if answer is not None:
        messages += _text_or_messages(answer, role="assistant", name="response")
    return messages


def _text_or_messages(value: Any, *, role: str, name: str) -> list[dict]:
    if isinstance(value, str):
        return [_message({"role": role, "content": value}, name)]
    return _messages(value, name)


def _messages(value: Any, name: str) -> list[dict]:
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{name} is a {type(value).__name__}, not a list of messages")
    return [_message(item, f"message {number}") for number, item in enumerate(value)]


def _message(item: Any, name: str) -> dict:
    """One checked message, with only the fields that a chat template reads."""
    if not isinstance(item, dict):
        raise ValueError(f"{name} is a {type(item).__name__}, not an object")
    if "role" not in item and "from" in item:
        speaker = item["from"]
        role = SHAREGPT_ROLES.get(speaker.lower()) if isinstance(speaker, str) else None
        value = item.get("value")
    else:
        speaker = role = item.get("role")
        value = item.get("content")
    if role not in ROLES:
        raise ValueError(f"{name} has the unknown role {speaker!r}; known are {list(ROLES)}")

    message = {"role": role, "content": _content(value, name)}
    message |= {key: item[key] for key in MESSAGE_FIELDS if item.get(key) is not None}
    # The deprecated name of the field; vLLM's server renames it in the same way.
    if item.get("reasoning_content") is not None:
        message.setdefault("reasoning", item["reasoning_content"])
    _check_message_fields(message, name)
    # A tool may return nothing and a system prompt may be blank; a turn that says nothing is an
    # error in the data.
    says_something = _has_text(message["content"]) or (
        role == "assistant" and (message.get("tool_calls") or _has_text(message.get("reasoning")))
    )
    if role in ("user", "assistant") and not says_something:
        raise ValueError(f"{name} ({role}) has empty content")
    return message


def _check_message_fields(message: dict, name: str) -> None:
    for key in ("tool_call_id", "name", "reasoning"):
        if not isinstance(message.get(key, ""), str):
            raise ValueError(f"{name} has a {key} that is not text: {message[key]!r}")
    calls = message.get("tool_calls", [])
    if not isinstance(calls, (list, tuple)):
        raise ValueError(f"{name} has tool_calls that are not a list: {calls!r}")
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f"{name} has a tool call that names no function: {call!r}")
    if not calls:
        message.pop("tool_calls", None)


def _content(value: Any, name: str) -> str | list[dict]:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{name} has content of type {type(value).__name__}, not text")
    parts = []
    for part in value:
        if isinstance(part, dict) and part.get("type") not in TEXT_PART_TYPES:
            raise ValueError(
                f"{name} has a part of type {part.get('type')!r}; only text is trained on"
            )
        text = part.get("text") if isinstance(part, dict) else part
        if not isinstance(text, str):
            raise ValueError(f"{name} has a content part without text: {part!r}")
        parts.append({"type": "text", "text": text})
    return parts


def _has_text(content: Any) -> bool:
    if isinstance(content, list):
        return any(part["text"].strip() for part in content)
    return bool(content and content.strip())


# ---- identity ----


def _content_of(conversation: Conversation) -> dict[str, Any]:
    return {
        "messages": conversation.messages,
        "tools": conversation.tools,
        "chat_template_kwargs": conversation.chat_template_kwargs,
    }


def _check_unicode(conversation: Conversation) -> None:
    try:
        text = json.dumps(_content_of(conversation), ensure_ascii=False, default=str)
        (text + conversation.id + conversation.source).encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"the text is no valid Unicode (a lone surrogate): {error}") from error


def _unique_id(conversation: Conversation, seen_ids: set[str]) -> str:
    """The row's own id, else (or if taken) a hash of its content, with #2... for duplicates."""
    if conversation.id and conversation.id not in seen_ids:
        return conversation.id
    content = json.dumps(_content_of(conversation), sort_keys=True, default=str)
    digest = hashlib.sha1(content.encode("ascii"), usedforsecurity=False).hexdigest()[:16]
    unique, number = digest, 1
    while unique in seen_ids:
        number += 1
        unique = f"{digest}#{number}"
    return unique
