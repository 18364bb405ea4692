"""From the user's file to training examples, with the verifier's engine in between."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


def rejection_summary(rejected: Sequence[Rejected], most: int = 3, width: int = 100) -> str:
    """One line on the rows that are not used: ``2 rows not used (row 3: not JSON ...; row 9: ...)``."""
    reasons = []
    for reject in rejected[:most]:
        reason = " ".join(reject.reason.split())
        reason = reason if len(reason) <= width else f"{reason[:width]}..."
        reasons.append(f"row {reject.line}: {reason}")
    if len(rejected) > most:
        reasons.append(f"and {len(rejected) - most} more")
    rows = "1 row" if len(rejected) == 1 else f"{len(rejected)} rows"
    return f"{rows} not used ({'; '.join(reasons)})"


def prepare_examples(
    engine: VerifierEngine,
    verifier: str,
    conversations: list[Conversation],
    rejected: list[Rejected],
    *,
    on_policy: bool,
    sampling: SamplingOptions,
    responses_path: Path,
    rejected_path: Path | None,
    max_len: int,
    progress: Progress | None = None,
) -> tuple[list[Example], list[Rejected]]:
    """Responses (regenerated, or with ``on_policy`` those of the data) as token sequences.

    Args:
        rejected: rows that the reader of the data refused.
        rejected_path: file that gets all rows that are not used; None for none.

    Returns:
        The examples, and all rows that are not used.

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
    unused = [*rejected, *later]
    if rejected_path is not None:
        write_rejected(rejected_path, unused)
    if not examples:
        reasons = sorted({r.reason for r in later})[:3]
        where = f" (all of them in {rejected_path})" if rejected_path is not None else ""
        raise ValueError(
            f"none of the {len(conversations)} conversations can be used: {'; '.join(reasons)}{where}"
        )
    return examples, unused
