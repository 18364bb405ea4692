"""Conversations to token ids and loss mask, exactly as vLLM's OpenAI server tokenizes them.

A drafter is trained on the token sequences it will meet when served. So every prompt goes through
the serving chat template with ``add_generation_prompt=True``, turn by turn, and a response is never
found by searching for role markers: it is what follows the prompt.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache, partial
from typing import Any, NamedTuple

from vllm_dflash.training.conversations import Conversation

#: A response of one token has nothing to draft: the first token is the anchor of the first block.
MIN_RESPONSE_TOKENS = 2


@dataclass(frozen=True)
class Example:
    """One training sequence.

    Attributes:
        id: ``<conversation id>#<number>``.
        source: As the conversation's.
        token_ids: Prompt and responses as the verifier sees them.
        loss_mask: True exactly on tokens that the verifier generates, its end-of-turn token
            included; the newline that some templates print after it is not generated.
    """

    id: str
    source: str
    token_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]

    @property
    def num_response_tokens(self) -> int:
        return sum(self.loss_mask)


class Turn(NamedTuple):
    """What one request to the server looks like: its prompt, and the tokens generated for it."""

    prompt_ids: Sequence[int]
    response_ids: Sequence[int]


# ---- the serving chat template ----


def prompt_token_ids(
    tokenizer: Any, conversation: Conversation, num_messages: int | None = None
) -> list[int]:
    """Token ids of the prompt that asks for the reply to the first ``num_messages`` messages.

    The tokenizer has the server's template (:meth:`~vllm_dflash.verifier.Verifier.with_template`), or the
    server's own code (its ``server_prompts``).

    Raises:
        ValueError: The server refuses the conversation.
    """
    return _chat_token_ids(tokenizer, conversation, num_messages, add_generation_prompt=True)


def check_template(tokenizer: Any, conversations: Iterable[Conversation]) -> None:
    """ValueError unless the chat template can print at least one of the conversations' prompts."""
    reasons: dict[str, None] = {}
    for conversation in conversations:
        turns = response_turns(conversation)
        try:
            prompt_token_ids(tokenizer, conversation, turns[0] if turns else None)
            return
        except ValueError as error:
            reasons.setdefault(str(error))
    if reasons:
        raise ValueError(f"none of the conversations can be used: {'; '.join(list(reasons)[:3])}")


def keep_date(tokenizer: Any, moment: datetime) -> None:
    """Has chat templates that print the date print that of ``moment``, whatever day it is.

    A run that is resumed on another day would otherwise ask, and train on, other prompts.
    """
    if _is_harmony(tokenizer):
        os.environ.setdefault("VLLM_SYSTEM_START_DATE", moment.strftime("%Y-%m-%d"))
    if "strftime_now" in str(getattr(tokenizer, "chat_template", None) or ""):
        # A template's variable hides the function of the same name that transformers gives it.
        tokenizer.apply_chat_template = partial(
            tokenizer.apply_chat_template, strftime_now=moment.strftime
        )


def eos_token_ids(tokenizer: Any, generation_config: dict | None) -> frozenset[int]:
    """Ids at which vLLM stops: the tokenizer's eos and those of ``generation_config.json``."""
    ids = {getattr(tokenizer, "eos_token_id", None)}
    configured = (generation_config or {}).get("eos_token_id")
    ids.update(configured if isinstance(configured, (list, tuple)) else [configured])
    return frozenset(token_id for token_id in ids if token_id is not None)


def _is_harmony(tokenizer: Any) -> bool:
    return getattr(getattr(tokenizer, "server_prompts", None), "is_harmony", False)


def _chat_token_ids(
    tokenizer: Any,
    conversation: Conversation,
    num_messages: int | None,
    *,
    add_generation_prompt: bool,
) -> list[int]:
    """Token ids of the first ``num_messages`` messages as the server renders them."""
    server_prompts = getattr(tokenizer, "server_prompts", None)
    if server_prompts is None:
        return _template_token_ids(
            tokenizer, conversation, num_messages, add_generation_prompt=add_generation_prompt
        )
    try:
        return server_prompts(
            conversation.messages[:num_messages],
            conversation.tools,
            conversation.chat_template_kwargs,
            add_generation_prompt=add_generation_prompt,
        )
    except Exception as error:  # encodings of models raise what they like, as templates do
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"vLLM's server refuses the conversation: {reason}") from error


def _template_token_ids(
    tokenizer: Any,
    conversation: Conversation,
    num_messages: int | None,
    *,
    add_generation_prompt: bool,
) -> list[int]:
    tools = [_serving_tool(tool) for tool in conversation.tools or ()] or None
    template = _chat_template(tokenizer, tools)
    messages = _serving_messages(conversation.messages[:num_messages], template)
    try:
        token_ids = tokenizer.apply_chat_template(
            messages,
            **conversation.chat_template_kwargs,
            tools=tools,
            # An engine's tokenizer renders with copies of itself, which do not know a template it was given.
            chat_template=template,
            add_generation_prompt=add_generation_prompt,
            tokenize=True,
            # transformers 5 returns a BatchEncoding by default. Either way special tokens are not
            # added again, so a template that prints BOS gives one BOS.
            return_dict=False,
        )
    except Exception as error:  # templates raise jinja2 errors, TypeError, KeyError...
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"the chat template refuses the conversation: {reason}") from error
    if isinstance(token_ids, Mapping):
        token_ids = token_ids["input_ids"]
    return list(token_ids)


def _chat_template(tokenizer: Any, tools: list[dict] | None) -> str:
    try:
        return tokenizer.get_chat_template(tools=tools)
    except ValueError as error:
        raise ValueError(
            "the verifier's tokenizer has no chat template; give the one that the server uses "
            f"(--chat-template). The tokenizer says: {error}"
        ) from error


def _serving_tool(tool: dict) -> dict:
    """The definition as vLLM's request schema writes it out: known fields, in this order."""
    given = tool["function"]
    function = {"name": given["name"]}
    function |= {key: given.get(key) for key in ("description", "parameters")}
    optional = ("strict", "defer_loading")
    function |= {key: given[key] for key in optional if given.get(key) is not None}
    return {"type": "function", "function": function}


def _serving_messages(messages: Iterable[dict], template: str) -> list[dict]:
    """Messages in the form in which vLLM's server hands them to this chat template."""
    as_parts = _reads_content_parts(template)
    served = [_serving_message(message, as_parts) for message in messages]
    knows_developer = "'developer'" in template or '"developer"' in template
    if not knows_developer and any(message["role"] == "developer" for message in served):
        return _merge_system_messages(served)
    return served


def _serving_message(message: dict, as_parts: bool) -> dict:
    served = dict(message)
    content = message["content"]
    if as_parts and message["role"] != "tool":
        if isinstance(content, str):
            # vLLM makes no part of content that is absent (a message of tool calls only).
            absent = not content and message["role"] == "assistant"
            content = [] if absent else [{"type": "text", "text": content}]
        served["content"] = content
    elif isinstance(content, list):
        served["content"] = "\n".join(part["text"] for part in content)
    if "reasoning" in message:
        served["reasoning_content"] = message["reasoning"]  # older templates read this name
    if "tool_calls" in message:
        served["tool_calls"] = [_serving_tool_call(call) for call in message["tool_calls"]]
    return served


def _serving_tool_call(call: dict) -> dict:
    """Arguments as an object: clients send JSON text, templates want a mapping."""
    arguments = call["function"].get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except json.JSONDecodeError:
            arguments = {}
    if not isinstance(arguments, dict):
        arguments = {}
    return {**call, "function": {**call["function"], "arguments": arguments}}


def _merge_system_messages(messages: list[dict]) -> list[dict]:
    """Turns developer messages into system ones and merges all of them into the first place."""
    system_roles = ("system", "developer")
    system = [message for message in messages if message["role"] in system_roles]
    others = [message for message in messages if message["role"] not in system_roles]
    if len(system) == 1 and messages[0] is system[0]:
        return [{**system[0], "role": "system"}, *others]
    texts = [_text(message["content"]) for message in system]
    merged = "\n\n".join(text for text in texts if text)
    return [{"role": "system", "content": merged}, *others]


def _text(content: str | list[dict]) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content)


@lru_cache(maxsize=32)
def _reads_content_parts(template: str) -> bool:
    """True if the template loops over a message's content, so that vLLM passes a list of parts."""
    import jinja2
    from jinja2 import nodes
    from transformers.utils import chat_template_utils

    try:
        # transformers' own environment: templates use extensions that plain Jinja does not know.
        environment = chat_template_utils._compile_jinja_template(template).environment
        loops = environment.parse(template).find_all(nodes.For)
    except jinja2.TemplateError:
        return False  # applying the template will say what is wrong with it

    def is_content(node: nodes.Node | None) -> bool:
        if isinstance(node, (nodes.Filter, nodes.Test)):
            return is_content(node.node)
        if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const):
            return node.arg.value == "content"
        if isinstance(node, nodes.Getattr):
            return node.attr == "content"
        return isinstance(node, nodes.Name) and node.name == "content"

    return any(is_content(loop.iter) for loop in loops)


# ---- responses that the data brings along ----


def response_turns(conversation: Conversation) -> list[int]:
    """Indices of the assistant messages that answer someone.

    A greeting that comes before the first user message is written by the application, not by the
    verifier, so it is context. So are the replies in a logged prompt: clients leave out thinking, and the
    request that each of them answered is a row of its own.
    """
    roles = [message["role"] for message in conversation.messages]
    first_user = roles.index("user") if "user" in roles else len(roles)
    start = max(first_user, conversation.num_history)
    return [i for i, role in enumerate(roles) if role == "assistant" and i >= start]


def split_turns(
    tokenizer: Any, conversation: Conversation, eos_token_ids: frozenset[int]
) -> list[Turn]:
    """Prompt and response of every assistant turn, for responses that are trusted as they are.

    The response ends right after the last end-of-turn token that the template prints for the turn.
    If it prints none (or the response is marked unfinished, whose end of turn was never generated),
    the response is kept without one, and without the white space at its end, which is the
    template's.

    Raises:
        ValueError: No assistant turn, or one that is not a continuation of its prompt.
    """
    turns = []
    # Harmony prints a reply only as history, without its thinking; the template prints it as generated.
    render = _template_token_ids if _is_harmony(tokenizer) else _chat_token_ids
    for index in response_turns(conversation):
        printed = render(tokenizer, conversation, index, add_generation_prompt=True)
        full = render(tokenizer, conversation, index + 1, add_generation_prompt=False)
        if full[: len(printed)] != printed:
            raise ValueError(
                f"message {index}: the chat template does not print this response as a "
                "continuation of its prompt, so it is not what the verifier generated (thinking "
                "removed from the data?); train without --on-policy to have it generated anew"
            )
        is_last = index == len(conversation.messages) - 1
        unfinished = conversation.unfinished and is_last
        rest = full[len(printed) :]
        prompt = prompt_token_ids(tokenizer, conversation, index)
        turns.append(Turn(prompt, _cut_response(tokenizer, rest, eos_token_ids, unfinished)))
    if not turns:
        raise ValueError(
            "no assistant turn; --on-policy trains on the responses in the data, without it the "
            "verifier writes them"
        )
    return turns


def _cut_response(
    tokenizer: Any, rest: list[int], eos_token_ids: frozenset[int], unfinished: bool
) -> list[int]:
    ends = [i for i, token_id in enumerate(rest) if token_id in eos_token_ids]
    if ends and not unfinished:
        return rest[: ends[-1] + 1]
    response = rest[: ends[-1]] if ends else list(rest)
    while response and not tokenizer.decode(response[-1:]).strip():
        response.pop()
    return response


def on_policy_examples(
    tokenizer: Any, conversation: Conversation, eos_token_ids: frozenset[int], max_len: int
) -> list[Example]:
    """Examples of a conversation whose responses the verifier itself wrote (``--on-policy``).

    Raises:
        ValueError: The conversation cannot be trained on; the message is the reason.
    """
    turns = split_turns(tokenizer, conversation, eos_token_ids)
    return fit_examples(merge_turns(turns, conversation), max_len)


# ---- turns -> sequences ----


def merge_turns(turns: Iterable[Turn], conversation: Conversation) -> list[Example]:
    """Successive turns of one conversation as few sequences, each exactly what serving sees.

    A turn joins the running sequence if its prompt extends that sequence token for token. Otherwise
    (the template rewrote the history, for instance by removing thinking from earlier turns) it
    starts a sequence of its own.
    """
    sequences: list[tuple[list[int], list[bool]]] = []
    for prompt, response in turns:
        prompt, response = list(prompt), list(response)
        if not sequences or prompt[: len(sequences[-1][0])] != sequences[-1][0]:
            sequences.append(([], []))
        token_ids, loss_mask = sequences[-1]
        num_context = len(prompt) - len(token_ids)
        token_ids[:] = prompt + response
        loss_mask += [False] * num_context + [True] * len(response)
    return [
        Example(f"{conversation.id}#{number}", conversation.source, tuple(ids), tuple(mask))
        for number, (ids, mask) in enumerate(sequences)
    ]


def fit_examples(examples: Iterable[Example], max_len: int) -> list[Example]:
    """Cuts examples to ``max_len`` tokens and leaves out those with too little response left.

    Raises:
        ValueError: Nothing of the conversation is left; the message is the reason.
    """
    kept: list[Example] = []
    reasons: list[str] = []
    for example in examples:
        start = example.loss_mask.index(True) if True in example.loss_mask else None
        token_ids, loss_mask = example.token_ids[:max_len], example.loss_mask[:max_len]
        num_response_tokens = sum(loss_mask)
        if num_response_tokens >= MIN_RESPONSE_TOKENS:
            kept.append(Example(example.id, example.source, token_ids, loss_mask))
        elif start is not None and start >= max_len:
            reasons.append(f"the first response starts at token {start}, max_len is {max_len}")
        else:
            reasons.append(
                f"only {num_response_tokens} response tokens within max_len {max_len}; at least "
                f"{MIN_RESPONSE_TOKENS} are needed"
            )
    if not kept:
        raise ValueError("; ".join(reasons) or "no response to train on")
    return kept
