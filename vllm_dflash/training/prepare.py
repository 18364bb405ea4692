"""From the user's file to training examples, with the verifier's engine in between."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from vllm_dflash.training.config import SamplingOptions
from vllm_dflash.training.conversations import (
    Conversation,
    Rejected,
    reject_conversation,
    write_rejected,
)
from vllm_dflash.training.engine import VerifierEngine
from vllm_dflash.training.rejections import report_rejected
from vllm_dflash.training.replies import ParsedReplies
from vllm_dflash.training.responses import regenerate
from vllm_dflash.training.tokenization import (
    Example,
    check_template,
    eos_token_ids,
    on_policy_examples,
)
from vllm_dflash.verifier import Verifier

Progress = Callable[[int, int], None]


def verifier_eos(engine: VerifierEngine, verifier: Verifier) -> frozenset[int]:
    """Tokens that end the verifier's turn, from its generation config and tokenizer, as vLLM has them."""
    return eos_token_ids(engine.tokenizer, verifier.load_generation_config())


def prepare_examples(
    engine: VerifierEngine,
    verifier: Verifier,
    conversations: list[Conversation],
    rejected: list[Rejected],
    *,
    on_policy: bool,
    sampling: SamplingOptions,
    responses_path: Path,
    rejected_path: Path | None,
    max_len: int,
    progress: Progress | None = None,
    max_rejected: float = 1.0,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[list[Example], list[Rejected]]:
    """Responses (regenerated, or with ``on_policy`` those of the data) as token sequences.

    Conversations rejected here are added to ``rejected_path``.

    Args:
        rejected: rows that were rejected before.
        max_rejected: share of all rows that may be.
        say: prints a line for the user.

    Returns:
        The examples, and all rows that are not used.

    Raises:
        ValueError: nothing is left to train on, or too much was rejected.
    """
    tokenizer = engine.tokenizer
    if on_policy:
        eos = verifier_eos(engine, verifier)
        examples, later = [], []
        for conversation in conversations:
            try:
                examples += on_policy_examples(tokenizer, conversation, eos, max_len)
            except ValueError as error:
                later.append(reject_conversation(conversation, error))
    else:
        weights = {n: v for n, v in verifier.identity().items() if n in ("verifier", "revision")}
        fingerprint: dict[str, Any] = {
            **weights,
            "weights": verifier.weights_version(),
            **asdict(sampling),
        }
        examples, later = regenerate(
            conversations,
            tokenizer,
            engine.generator(sampling),
            responses_path,
            fingerprint=fingerprint,
            max_len=max_len,
            on_progress=progress,
            to_message=engine.to_message,
            say=say,
        )
    unused = [*rejected, *later]
    if not examples:
        if rejected_path is not None:
            write_rejected(rejected_path, unused)
        reasons = sorted({r.reason for r in later})[:3]
        kept = "" if rejected_path is None else f" (all of them in {rejected_path})"
        raise ValueError(
            f"none of the {len(conversations)} conversations can be used: {'; '.join(reasons)}{kept}"
        )
    if later:
        total = len(conversations) + len(rejected)
        report_rejected(unused, total, rejected_path, max_rejected, say)
    return examples, unused


def check_prompts(
    verifier: Verifier, conversations: list[Conversation], engine_args: Mapping[str, Any]
) -> None:
    """Finds out without an engine that the verifier's chat template and parser can serve the data.

    Raises:
        ValueError: they cannot: no template, none that fits the data, no such parser.
    """
    mode = engine_args.get("tokenizer_mode")
    verifier = verifier if mode is None else replace(verifier, tokenizer_mode=mode)
    if verifier.reasoning_parser is not None:
        from vllm_dflash.serving.frontend.chat import check_parser_name

        check_parser_name(verifier.reasoning_parser)
    tokenizer = verifier.load_tokenizer()
    check_template(tokenizer, conversations)
    if verifier.reasoning_parser is not None:
        ParsedReplies(verifier.reasoning_parser, tokenizer)
