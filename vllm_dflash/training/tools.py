"""Tool definitions and calls of a row, brought to OpenAI's form."""

from __future__ import annotations

import json
from typing import Any

#: Members of a JSON schema in which null means something.
_NULL_IS_A_VALUE = frozenset({"default", "const", "example"})


def quoted(value: Any, limit: int = 80) -> str:
    """``repr`` for messages: short whatever the value."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 20]}... ({len(text)} characters)"


def json_text(value: Any, name: str) -> Any:
    """The value itself, or what it says where it is JSON text, as many data sets store what is nested."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{name} is a str that is no JSON: {quoted(value)}") from error


def drop_nulls(value: Any) -> Any:
    """The value without members that are null, at any depth; lists keep theirs."""
    if isinstance(value, dict):
        return {key: drop_nulls(member) for key, member in value.items() if member is not None}
    if isinstance(value, (list, tuple)):
        return [drop_nulls(member) for member in value]
    return value


def checked_tools(tools: Any) -> tuple[dict, ...] | None:
    """Definitions as ``{"type": "function", "function": {...}}``; None where there are none.

    Raises:
        ValueError: What is wrong with them.
    """
    tools = json_text(tools, "tools")
    if not tools:
        return None
    if not isinstance(tools, (list, tuple)):
        raise ValueError(f"tools is a {type(tools).__name__}, not a list of tool definitions")
    return tuple(_checked_tool(json_text(tool, "a tool")) for tool in tools)


def _checked_tool(tool: Any) -> dict:
    if isinstance(tool, dict) and "function" not in tool and isinstance(tool.get("name"), str):
        # The definition alone; "type" is then that of the Responses API.
        tool = {"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}}
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError('a tool must be {"type": "function", "function": {"name": ...}}')
    if isinstance(function.get("parameters"), str):
        parameters = json_text(function["parameters"], f"the parameters of {function['name']}")
        tool = {**tool, "function": {**function, "parameters": parameters}}
    return tool


def has_arrows_nulls(tools: tuple[dict, ...] | None) -> bool:
    """True if a schema of the tools has members that are null, as only a dump from Arrow writes them."""
    return any(_null_inside(tool["function"].get("parameters")) for tool in tools or ())


def _null_inside(schema: Any) -> bool:
    if isinstance(schema, dict):
        members = {k: v for k, v in schema.items() if k not in _NULL_IS_A_VALUE}
        return any(member is None or _null_inside(member) for member in members.values())
    return isinstance(schema, (list, tuple)) and any(_null_inside(part) for part in schema)


def without_nulls(message: dict) -> dict:
    """A message whose tool calls have lost what is null."""
    calls = message.get("tool_calls")
    return message if not calls else {**message, "tool_calls": drop_nulls(calls)}


# ---- calls ----


def function_calls(value: Any, name: str) -> list[dict]:
    """OpenAI's ``tool_calls`` of a turn that is written as ``{"name": ..., "arguments": ...}`` or a list.

    Raises:
        ValueError: It is not.
    """
    calls = json_text(value, name)
    calls = calls if isinstance(calls, list) else [calls]
    for call in calls:
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            raise ValueError(f"{name} is a function call that names no function: {quoted(value)}")
    return [
        {
            "type": "function",
            "function": {"name": call["name"], "arguments": call.get("arguments") or {}},
        }
        for call in calls
    ]


def with_call_ids(messages: list[dict]) -> list[dict]:
    """Gives calls without an id one, and the results that follow in their order the same.

    Clients always send both, and some templates (Mistral's) insist on nine letters and digits.
    """
    out, waiting, count = [], [], 0
    for message in messages:
        if message["role"] == "assistant":
            calls = []
            for call in message.get("tool_calls", ()):
                if call.get("id") is None:
                    call, count = {"id": f"call{count:05d}", **call}, count + 1
                calls.append(call)
            waiting = [call["id"] for call in calls]
            message = {**message, "tool_calls": calls} if calls else message
        elif message["role"] == "tool" and "tool_call_id" not in message and waiting:
            message = {**message, "tool_call_id": waiting.pop(0)}
        out.append(message)
    return out
