"""From the user's file to training examples, with the verifier's engine in between."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
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
from vllm_dflash.training.responses import regenerate
from vllm_dflash.training.tokenization import Example, eos_token_ids, on_policy_examples

Progress = Callable[[int, int], None]


def verifier_eos(engine: VerifierEngine, verifier: str) -> frozenset[int]:
    """Tokens that end the verifier's turn, from its generation config and tokenizer."""
    from transformers import GenerationConfig

    try:
        generation = GenerationConfig.from_pretrained(verifier).to_dict()
    except OSError:
        # A verifier without generation_config.json; the tokenizer's eos is what vLLM uses then too.
        generation = None
    return eos_token_ids(engine.tokenizer, generation)


def prepare_examples(
    engine: VerifierEngine,
    verifier: str,
    conversations: list[Conversation],
    rejected: list[Rejected],
    *,
    on_policy: bool,
    sampling: SamplingOptions,
    responses_path: Path,
    rejected_path: Path,
    max_len: int,
    progress: Progress | None = None,
) -> list[Example]:
    """Responses (regenerated, or with ``on_policy`` those of the data) as token sequences.

    Rejected conversations are added to ``rejected_path``.

    Raises:
        ValueError: nothing is left to train on.
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
        fingerprint: dict[str, Any] = {"verifier": verifier, **asdict(sampling)}
        examples, later = regenerate(
            conversations,
            tokenizer,
            engine.generator(sampling),
            responses_path,
            fingerprint=fingerprint,
            max_len=max_len,
            on_progress=progress,
        )
    write_rejected(rejected_path, [*rejected, *later])
    if not examples:
        reasons = sorted({r.reason for r in later})[:3]
        raise ValueError(
            f"none of the {len(conversations)} conversations can be used: {'; '.join(reasons)} "
            f"(all of them in {rejected_path})"
        )
    return examples
