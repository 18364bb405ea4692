"""The prompts of a benchmark: read and rendered as training reads and renders them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm_dflash.training.conversations import Conversation, load_conversations
from vllm_dflash.training.rejections import report_rejected
from vllm_dflash.training.rows import Data
from vllm_dflash.training.tokenization import prompt_token_ids
from vllm_dflash.verifier import Verifier


def load_requests(
    verifier: Verifier | str, data: Data, chat_template_kwargs: dict[str, Any], limit: int
) -> list[Conversation]:
    """Conversations of the data, each up to its last user turn."""
    Verifier.of(verifier).load_config()  # says what is wrong with the model before the data is read
    conversations, _ = load_conversations(
        data, chat_template_kwargs=chat_template_kwargs or None, limit=limit
    )
    return [_request(conversation) for conversation in conversations]


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
        limit: of prompts: rows that cannot be rendered do not count.
        max_rejected: share of the rows that may be rejected.
        rejected_path: file that gets them, if there are any.
        say: prints a line for the user.

    Raises:
        ValueError: no prompt can be made, or too many rows are rejected.
    """
    verifier = Verifier.of(verifier)
    verifier.load_config()  # says what is wrong with the model before the data is read
    tokenizer = verifier.load_tokenizer()
    prompts: list[list[int]] = []

    def render(conversation: Conversation) -> None:
        prompts.append(prompt_token_ids(tokenizer, _request(conversation)))

    _, rejected = load_conversations(
        data, chat_template_kwargs=chat_template_kwargs or None, limit=limit, accept=render
    )
    total = len(prompts) + len(rejected)
    report_rejected(rejected, total, rejected_path if rejected else None, max_rejected, say)
    return prompts


def _request(conversation: Conversation) -> Conversation:
    messages, count = conversation.messages, len(conversation.messages)
    while count > conversation.num_history and messages[count - 1]["role"] == "assistant":
        count -= 1
    return replace(conversation, messages=messages[:count])
