"""The prompts of a benchmark: read and rendered as training reads and renders them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm_dflash.training.conversations import (
    Conversation,
    Rejected,
    load_conversations,
    reject_conversation,
)
from vllm_dflash.training.rejections import report_rejected
from vllm_dflash.training.rows import Data
from vllm_dflash.training.tokenization import prompt_token_ids
from vllm_dflash.verifier import Verifier


def load_requests(
    verifier: Verifier | str, data: Data, chat_template_kwargs: dict[str, Any], limit: int
) -> list[Conversation]:
    """Conversations of the data, each up to its last user turn."""
    return _load(verifier, data, chat_template_kwargs, limit)[0]


def load_prompts(
    verifier: Verifier | str,
    data: Data,
    chat_template_kwargs: dict[str, Any],
    limit: int,
    *,
    max_rejected: float = 1.0,
    rejected_path: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[list[int]]:
    """Prompts of the data as the server would tokenise them, up to each last user turn.

    Args:
        verifier: path or hub name, or that with the options it is served with.
        limit: of conversations.
        max_rejected: share of the rows that may be rejected.
        rejected_path: file that gets them, if there are any.
        say: prints a line for the user.

    Raises:
        ValueError: no prompt can be made, or too many rows are rejected.
    """
    requests, rejected = _load(verifier, data, chat_template_kwargs, limit)
    tokenizer = Verifier.of(verifier).load_tokenizer()
    prompts = []
    for request in requests:
        try:
            prompts.append(prompt_token_ids(tokenizer, request))
        except ValueError as error:
            rejected.append(reject_conversation(request, error))
    total = len(prompts) + len(rejected)
    if not prompts:
        raise ValueError(f"none of the {total} rows can be used: {rejected[-1].reason}")
    report_rejected(rejected, total, rejected_path if rejected else None, max_rejected, say)
    return prompts


def _load(
    verifier: Verifier | str, data: Data, chat_template_kwargs: dict[str, Any], limit: int
) -> tuple[list[Conversation], list[Rejected]]:
    Verifier.of(verifier).load_config()  # says what is wrong with the model before the data is read
    conversations, rejected = load_conversations(
        data, chat_template_kwargs=chat_template_kwargs or None, limit=limit
    )
    return [_request(conversation) for conversation in conversations], rejected


def _request(conversation: Conversation) -> Conversation:
    count = len(conversation.messages)
    while count and conversation.messages[count - 1]["role"] == "assistant":
        count -= 1
    return replace(conversation, messages=conversation.messages[:count])
