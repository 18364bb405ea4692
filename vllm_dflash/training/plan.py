"""Which sequences each step sees, and which are extracted together. Pure functions of the seed."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Window:
    """Consecutive steps whose features are at hand at the same time.

    Attributes:
        first_step: index of the first step.
        steps: keys of every step.
    """

    first_step: int
    steps: tuple[tuple[str, ...], ...]

    @property
    def end(self) -> int:
        return self.first_step + len(self.steps)

    @property
    def keys(self) -> list[str]:
        """The window's sequences, in the order in which they are first needed."""
        return list(dict.fromkeys(k for step in self.steps for k in step))


def content_key(token_ids: Sequence[int]) -> str:
    """What features belong to: the tokens, not the name. A cache made from other responses under the same
    names is never taken for these."""
    return hashlib.sha256(",".join(map(str, token_ids)).encode()).hexdigest()[:24]


def owner(token_ids: Sequence[int], ranks: int) -> int:
    """The rank that records, keeps and trains on a sequence: by its tokens alone, in every step and run."""
    return int(content_key(token_ids), 16) % ranks


def epoch_steps(
    keys: Sequence[str], sequences: int, seed: int, epoch: int
) -> list[tuple[str, ...]]:
    """One epoch: every key once, shuffled by (seed, epoch), ``sequences`` to a step."""
    order = list(keys)
    random.Random(f"{seed}/epoch/{epoch}").shuffle(order)
    return [tuple(order[i : i + sequences]) for i in range(0, len(order), sequences)]


def plan_windows(
    keys: Sequence[str],
    num_tokens: dict[str, int],
    *,
    sequences: int,
    seed: int,
    total_steps: int,
    max_tokens: int,
    owners: Mapping[str, int] | None = None,
) -> list[Window]:
    """Cuts a run into windows of at most ``max_tokens`` tokens of features on each rank.

    ``owners`` says which rank keeps a sequence's features; None if there is one rank.

    When all sequences fit at once there is one window. A window's sequences are always extracted together,
    in this order, so a resumed run sees the same features bit for bit.
    """
    steps: list[tuple[str, ...]] = []
    epoch = 0
    while len(steps) < total_steps:
        steps += epoch_steps(keys, sequences, seed, epoch)
        epoch += 1
    steps = steps[:total_steps]
    owners = owners or {}

    def largest(held: Iterable[str]) -> int:
        return max(tokens_by_rank({k: num_tokens[k] for k in held}, owners).values(), default=0)

    if largest(keys) <= max_tokens:
        return [Window(0, tuple(steps))]
    windows: list[Window] = []
    current: list[tuple[str, ...]] = []
    held: set[str] = set()
    first = 0
    for i, step in enumerate(steps):
        grown = held | set(step)
        if current and largest(grown) > max_tokens:
            windows.append(Window(first, tuple(current)))
            current, first, grown = [], i, set(step)
        current.append(step)
        held = grown
    windows.append(Window(first, tuple(current)))
    return windows


def tokens_by_rank(num_tokens: Mapping[str, int], owners: Mapping[str, int]) -> Counter[int]:
    """Tokens whose features each rank keeps; sequences that ``owners`` lacks are rank 0's."""
    held: Counter[int] = Counter()
    for key, tokens in num_tokens.items():
        held[owners.get(key, 0)] += tokens
    return held
