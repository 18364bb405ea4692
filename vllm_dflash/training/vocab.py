"""Token choices made before training: the mask token and the draft vocabulary."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

_RESERVED = re.compile(r"mask|reserved|unused|extra_|dummy|placeholder", re.IGNORECASE)


def choose_mask_token(
    tokenizer: Any, vocab_size: int, avoid: Iterable[int] = (), given: int | None = None
) -> int:
    """An id of the verifier's vocabulary that ordinary text never contains.

    In this order: the tokenizer's own mask token; a special token reserved by name; the first embedding row
    behind the tokenizer's last token (as Qwen3's public drafters use); a special token that the chat
    template does not print.

    Args:
        avoid: further ids that must not be taken (the verifier's pad and eos tokens).
        given: the user's choice, only checked.

    Raises:
        ValueError: ``given`` is the pad token or out of range, or there is no candidate.
    """
    pad = tokenizer.pad_token_id
    taken = {
        t
        for t in (
            tokenizer.bos_token_id,
            tokenizer.eos_token_id,
            getattr(tokenizer, "unk_token_id", None),
            pad,
            *avoid,
        )
        if t is not None
    }
    if given is not None:
        if not 0 <= given < vocab_size:
            raise ValueError(
                f"--mask-token-id {given} is outside the vocabulary 0..{vocab_size - 1}"
            )
        if given in taken:
            raise ValueError(
                f"--mask-token-id {given} is the verifier's pad, bos, eos or unk token; a mask token "
                "that text can contain ruins acceptance, choose a reserved one"
            )
        return given
    own = getattr(tokenizer, "mask_token_id", None)
    if own is not None and own not in taken and own < vocab_size:
        return own
    special = {
        token_id: text
        for token_id, text in _special_tokens(tokenizer)
        if token_id not in taken and token_id < vocab_size
    }
    reserved = [i for i, text in sorted(special.items()) if _RESERVED.search(text)]
    if reserved:
        return reserved[0]
    if len(tokenizer) < vocab_size:
        return len(tokenizer)
    template = getattr(tokenizer, "chat_template", None)
    printed = str(template) if template else ""
    unused = [i for i, text in sorted(special.items()) if text not in printed]
    if unused:
        return unused[-1]
    raise ValueError(
        "the verifier's vocabulary has no reserved token to use as mask; name one that text never "
        "contains with --mask-token-id"
    )


def _special_tokens(tokenizer: Any) -> list[tuple[int, str]]:
    added = getattr(tokenizer, "added_tokens_decoder", None)
    if added is None:  # Mistral's own tokenizer
        return list(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    return [(token_id, str(token)) for token_id, token in added.items() if token.special]


def choose_draft_vocab(
    responses: Iterable[Sequence[int]],
    prompts: Iterable[Sequence[int]],
    size: int,
    vocab_size: int,
    always: Iterable[int] = (),
) -> tuple[list[int], float]:
    """The ``size`` ids that the verifier generates most, ascending, and their share of the responses.

    Room that the responses leave is filled from the prompts, then from the lowest ids (in a BPE
    vocabulary the most frequent merges).

    Raises:
        ValueError: ``size`` is not within 1..vocab_size.
    """
    if not 1 <= size <= vocab_size:
        raise ValueError(
            f"--draft-vocab {size} is outside 1..{vocab_size}, the verifier's vocabulary"
        )
    counts = Counter(t for ids in responses for t in ids)
    chosen = dict.fromkeys(t for t in always if t < vocab_size)
    # Ties go to the lower id, so that the choice does not depend on the order of the data.
    for source in (counts, Counter(t for ids in prompts for t in ids)):
        for token, _ in sorted(source.items(), key=lambda item: (-item[1], item[0])):
            chosen.setdefault(token)
    ids = list(chosen)[:size]
    have = set(ids)
    ids += [t for t in range(vocab_size) if t not in have][: size - len(ids)]
    covered = sum(counts[t] for t in ids) / max(counts.total(), 1)
    return sorted(ids), covered
