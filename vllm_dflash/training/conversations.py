"""Conversations to train on, read from files, Hugging Face datasets or a server's own log.

Every row of the input ends in exactly one of two places: a :class:`Conversation` or a
:class:`Rejected` that says why. One bad row never stops a run, and no row disappears silently.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vllm_dflash.files import atomic_path
from vllm_dflash.training.rows import (
    Data,
    Row,
    as_list,
    data_files,
    decode_json,
    holds_rejects,
    open_rows,
)
from vllm_dflash.training.tools import (
    checked_tools,
    drop_nulls,
    function_calls,
    has_arrows_nulls,
    json_text,
    quoted,
    with_call_ids,
    without_nulls,
)

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
    "tool_response": "tool",
}
#: ShareGPT's speaker of a turn that is a call (or a list of calls) as JSON text.
CALL_SPEAKER = "function_call"
#: Message fields that chat templates read, besides role and content.
MESSAGE_FIELDS = ("tool_calls", "tool_call_id", "name", "reasoning")
#: Fields that hold what a drafter is not trained on, in rows and in messages.
MEDIA_FIELDS = ("images", "image", "videos", "video", "audios", "audio")
MEDIA_PLACEHOLDER = re.compile(r"<(?:image|video|audio)>|<\|(?:image|video|audio)\|>")
#: Where a row keeps its messages; the last name is that of LMSYS-Chat and WildChat.
MESSAGE_COLUMNS = ("messages", "conversations", "conversation")
SYSTEM_FIELDS = ("system", "system_prompt")
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
#: Longest reason of a rejected row, in characters.
MAX_REASON = 300


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
        num_history: So many messages are the prompt as it was sent, whose earlier replies stay as they
            are: a response comes after them. 0 where every reply of the conversation is a response.
        line: Row of the input, from 1.
        file: The file it comes from, where the data has several.
    """

    id: str
    messages: tuple[dict, ...]
    source: str
    tools: tuple[dict, ...] | None = None
    chat_template_kwargs: dict = field(default_factory=dict)
    unfinished: bool = False
    num_history: int = 0
    line: int = 0
    file: str = ""


@dataclass(frozen=True)
class Rejected:
    """A row that is not trained on.

    Attributes:
        line: Row of the input, from 1.
        reason: Why, in words for the person who owns the data.
        row: The row's original text (of a conversation rejected later, its content as JSON).
        file: The file it comes from, where the data has several.
    """

    line: int
    reason: str
    row: str
    file: str = ""

    def __post_init__(self) -> None:
        if len(self.reason) > MAX_REASON:
            # A template may quote the whole conversation.
            cut = f"{self.reason[: MAX_REASON - 40]}... ({len(self.reason)} characters)"
            object.__setattr__(self, "reason", cut)


def reject_conversation(conversation: Conversation, reason: object) -> Rejected:
    """The :class:`Rejected` of a conversation that a later step (its chat template) refuses."""
    content = _content_of(conversation)
    row = json.dumps({"id": conversation.id, **content}, ensure_ascii=False, default=str)
    return Rejected(conversation.line, str(reason), row, conversation.file)


def write_rejected(path: Path, rejected: Iterable[Rejected]) -> None:
    """Replaces ``path`` by exactly these rejects, one JSON object a line, in one atomic step.

    Callers that reject more rows later pass the whole list again.

    Raises:
        ValueError: ``path`` holds something else.
    """
    if path.exists() and not holds_rejects(path):
        raise ValueError(
            f"{path}, where rejected rows are kept, exists and holds something else; move it away"
        )
    with atomic_path(path) as partial, partial.open("w", encoding="ascii") as file:
        for reject in rejected:
            line = {"line": reject.line, "reason": reject.reason, "row": reject.row}
            line |= {"file": reject.file} if reject.file else {}
            file.write(json.dumps(line) + "\n")


def load_conversations(
    data: Data,
    *,
    rejected_path: Path | None = None,
    chat_template_kwargs: dict | None = None,
    limit: int | None = None,
    split: str = "train",
    accept: Callable[[Conversation], object] | None = None,
) -> tuple[list[Conversation], list[Rejected]]:
    """Reads conversations; rows that cannot be used are returned (and written) with a reason.

    Accepted rows: ``{"messages": [...]}``, ShareGPT's ``{"conversations": [...]}`` (or ``conversation``),
    ``{"prompt": ..., "response": ...}`` and logged traffic ``{"request": ..., "response": ...}``;
    each with optional ``id``, ``source``, ``system``, ``tools`` and ``chat_template_kwargs``.

    Args:
        data: As for :func:`~vllm_dflash.training.rows.open_rows`: files, folders, patterns, names of
            Hugging Face data sets.
        rejected_path: Where to write the rejected rows; replaced if it exists.
        chat_template_kwargs: For every conversation; a row's own kwargs override them one by one.
        limit: Stop reading after this many usable conversations.
        split: Split of Hugging Face data sets whose name says none.
        accept: Called with each conversation; a ValueError of it rejects the row.

    Raises:
        ValueError: No such data, or no usable row in it.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; give at least 1, or None to read everything")
    default_kwargs = _checked_template_kwargs(chat_template_kwargs)
    rows = open_rows(data, streaming=limit is not None, split=split)
    several = len(as_list(data)) > 1 or len(data_files(data)) > 1

    conversations: list[Conversation] = []
    rejected: list[Rejected] = []
    seen_ids: set[str] = set()
    # A data set that is streamed holds a connection: let go of it when the limit stops us early.
    with closing(rows):
        for row in rows:
            file = row.file if several else ""
            try:
                conversation = _parse_row(_row_value(row), row.line, row.source, default_kwargs)
                if accept is not None:
                    accept(conversation)
            except (ValueError, RecursionError) as error:
                rejected.append(Rejected(row.line, str(error), row.text, file))
                continue
            conversation = replace(conversation, id=_unique_id(conversation, seen_ids), file=file)
            seen_ids.add(conversation.id)
            conversations.append(conversation)
            if len(conversations) == limit:
                break

    if rejected_path is not None:
        write_rejected(rejected_path, rejected)
    if not conversations:
        raise ValueError(_nothing_usable(data, rejected))
    return conversations, rejected


def _nothing_usable(data: Data, rejected: list[Rejected]) -> str:
    data = ", ".join(as_list(data))
    if not rejected:
        return f"{data} is empty: it holds no row to train on"
    reasons = "; ".join(f"row {reject.line}: {reject.reason}" for reject in rejected[:3])
    return f"{data} has no usable conversation, all {len(rejected)} rows were rejected. {reasons}"


# ---- one row -> one conversation ----


def _row_value(row: Row) -> Any:
    value = decode_json(row.value) if isinstance(row.value, bytes) else row.value
    return drop_nulls(value) if row.from_arrow else value


def _parse_row(row: Any, line: int, source: str, template_kwargs: dict) -> Conversation:
    """Raises ValueError with the reason for a row that cannot be used."""
    if not isinstance(row, dict):
        raise ValueError(f"the row is a {type(row).__name__}, not a JSON object")
    _check_media(row, "the row")
    tools, unfinished = row.get("tools"), False
    history: list[dict] = []
    template_kwargs = dict(template_kwargs)
    is_logged = isinstance(row.get("request"), dict)
    if is_logged:
        history, replies, unfinished = _logged_messages(row["request"], row.get("response"))
        tools = row["request"].get("tools") if tools is None else tools
        template_kwargs.update(_request_template_kwargs(row["request"]))
    elif columns := [name for name in MESSAGE_COLUMNS if _holds_messages(row, name)]:
        replies = _messages(row[columns[0]], columns[0])
    elif row.get("prompt") is not None:
        history, replies = _prompt_messages(row)
    else:
        raise ValueError(
            "no 'messages', 'conversations', 'prompt' or 'request' field; the row has "
            f"{sorted(map(str, row))}"
        )
    messages = _with_system([*history, *replies], row, is_logged)
    _check_placeholders(messages, row)
    tools = checked_tools(tools)
    if has_arrows_nulls(tools) and not is_logged:
        # Written from Arrow to JSON: its nulls stand for members that are absent. What a client sent to
        # a server was rendered with its nulls.
        tools, messages = _drop_nulls_of_tools(tools, messages)
    template_kwargs.update(_checked_template_kwargs(row.get("chat_template_kwargs")))
    if not any(message["role"] == "user" for message in messages):
        raise ValueError(f"no user turn; roles are {[message['role'] for message in messages]}")

    row_source = row.get("source")
    row_id = next((row[key] for key in ("id", "conversation_id") if row.get(key) is not None), "")
    conversation = Conversation(
        id=str(row_id) if isinstance(row_id, (str, int)) else "",
        messages=tuple(messages),
        source=row_source if isinstance(row_source, str) and row_source else source,
        tools=tools,
        chat_template_kwargs=template_kwargs,
        unfinished=unfinished,
        num_history=len(messages) - len(replies) if history else 0,
        line=line,
    )
    _check_unicode(conversation)
    return conversation


def _logged_messages(request: dict, response: Any) -> tuple[list[dict], list[dict], bool]:
    """Messages of a logged chat completion, its reply (if any), and whether that was cut short."""
    if request.get("continue_final_message") or request.get("add_generation_prompt") is False:
        raise ValueError("the request continues its last message instead of asking for a new one")
    if request.get("chat_template"):
        raise ValueError("the request brings its own chat template; training uses the verifier's")
    messages = _messages(request.get("messages"), "request.messages")
    if response is None:
        return messages, [], False
    choices = response.get("choices") if isinstance(response, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise ValueError(
            "the response has no choices; leave 'response' out to train on the request"
        )
    finish_reason = choices[0].get("finish_reason")
    if finish_reason not in FINISH_REASONS:
        raise ValueError(f"the response's finish_reason is {quoted(finish_reason)}")
    reply = choices[0].get("message")
    if not isinstance(reply, dict):
        raise ValueError("the response's first choice has no message")
    reply = _message({"role": "assistant", **reply}, f"response message {len(messages)}")
    return messages, [reply], finish_reason == "length"


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


def _check_media(item: dict, name: str) -> None:
    for key in MEDIA_FIELDS:
        if item.get(key):
            raise ValueError(f"{name} has {key} ({quoted(item[key])}); only text is trained on")


def _check_placeholders(messages: list[dict], row: dict) -> None:
    """Refuses text that speaks of a picture which the row had a place for, but not the picture."""
    if not any(key in row for key in MEDIA_FIELDS):
        return
    for number, message in enumerate(messages):
        if found := MEDIA_PLACEHOLDER.search(_text_of(message["content"])):
            raise ValueError(
                f"message {number} has the placeholder {found[0]}; only text is trained on"
            )


def _text_of(content: str | list[dict]) -> str:
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def _with_system(messages: list[dict], row: dict, is_logged: bool) -> list[dict]:
    """The messages, a system text that stands beside them in front.

    Raises:
        ValueError: There are two that differ: which of them was used, nobody can tell.
    """
    for key in SYSTEM_FIELDS:
        content = _content(row.get(key), key)
        if not _has_text(content):
            continue
        own = [_text_of(m["content"]) for m in messages if m["role"] in ("system", "developer")]
        if _text_of(content) in own:
            continue
        if own or is_logged:
            where = "the logged request's messages" if is_logged else "its messages"
            raise ValueError(
                f"the row's {key} is not the system message of {where}; keep the one that was used"
            )
        messages = [{"role": "system", "content": content}, *messages]
    return messages


def _drop_nulls_of_tools(
    tools: tuple[dict, ...] | None, messages: list[dict]
) -> tuple[tuple[dict, ...] | None, list[dict]]:
    return (
        tuple(drop_nulls(tool) for tool in tools or ()) or None,
        [without_nulls(message) for message in messages],
    )


def _prompt_messages(row: dict) -> tuple[list[dict], list[dict]]:
    """Messages of a prompt and of the response to it, if there is one."""
    prompt = _text_or_messages(row["prompt"], role="user", name="prompt")
    answer = next(
        (row[key] for key in ("response", "completion") if row.get(key) is not None), None
    )
    if answer is None:
        return prompt, []
    return prompt, _text_or_messages(answer, role="assistant", name="response")


def _text_or_messages(value: Any, *, role: str, name: str) -> list[dict]:
    if isinstance(value, str):
        return [_message({"role": role, "content": value}, name)]
    return _messages(value, name)


def _holds_messages(row: dict, name: str) -> bool:
    value = row.get(name)
    if name == "conversation" and not isinstance(value, (list, tuple)):
        # Elsewhere it is what the row's conversation is called.
        return isinstance(value, str) and value.lstrip().startswith("[")
    return value is not None


def _messages(value: Any, name: str) -> list[dict]:
    value = json_text(value, name)
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{name} is a {type(value).__name__}, not a list of messages")
    messages = [_message(item, f"message {number}") for number, item in enumerate(value)]
    if any(isinstance(item, dict) and _speaker(item) == CALL_SPEAKER for item in value):
        messages = with_call_ids(messages)
    return messages


def _speaker(item: dict) -> Any:
    """Who says a message, in small letters where it is text: OpenAI's ``role`` or ShareGPT's ``from``."""
    speaker = item["role"] if "role" in item else item.get("from")
    return speaker.lower() if isinstance(speaker, str) else speaker


def _message(item: Any, name: str) -> dict:
    """One checked message, with only the fields that a chat template reads."""
    if not isinstance(item, dict):
        raise ValueError(f"{name} is a {type(item).__name__}, not an object")
    _check_media(item, name)
    is_sharegpt = "role" not in item and "from" in item
    value = item.get("value") if is_sharegpt else item.get("content")
    speaker = _speaker(item)
    if speaker == CALL_SPEAKER:
        return {"role": "assistant", "content": "", "tool_calls": function_calls(value, name)}
    role = SHAREGPT_ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        known = [*SHAREGPT_ROLES, CALL_SPEAKER] if is_sharegpt else list(ROLES)
        given = item["from"] if is_sharegpt else item.get("role")
        raise ValueError(f"{name} has the unknown role {quoted(given)}; known are {known}")

    message = {"role": role, "content": _content(value, name)}
    message |= {key: item[key] for key in MESSAGE_FIELDS if item.get(key) is not None}
    if item.get("function_call") and not message.get("tool_calls"):  # OpenAI's older name
        message["tool_calls"] = function_calls(item["function_call"], name)
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
            raise ValueError(f"{name} has a {key} that is not text: {quoted(message[key])}")
    calls = message.get("tool_calls", [])
    if not isinstance(calls, (list, tuple)):
        raise ValueError(f"{name} has tool_calls that are not a list: {quoted(calls)}")
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f"{name} has a tool call that names no function: {quoted(call)}")
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
                f"{name} has a part of type {quoted(part.get('type'))}; only text is trained on"
            )
        text = part.get("text") if isinstance(part, dict) else part
        if not isinstance(text, str):
            raise ValueError(f"{name} has a content part without text: {quoted(part)}")
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


def opening_digest(conversation: Conversation) -> str:
    """Digest of what a dialogue begins with, up to its first reply: the same of copies, and of every request
    that a server has logged of one dialogue."""
    opening = []
    for message in conversation.messages:
        if message["role"] == "assistant":
            break
        opening.append(message)
    content = json.dumps([opening, conversation.tools], sort_keys=True, default=str)
    return hashlib.sha1(content.encode("ascii"), usedforsecurity=False).hexdigest()
