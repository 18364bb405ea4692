"""Which sequences each step sees, and which are extracted together. Pure functions of the seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
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
) -> list[Window]:
    """Cuts a run into windows of at most ``max_tokens`` tokens of features.

    When all sequences fit at once there is one window. A window's sequences are always extracted together,
    in this order, so a resumed run sees the same features bit for bit.
    """
    steps: list[tuple[str, ...]] = []
    epoch = 0
    while len(steps) < total_steps:
        steps += epoch_steps(keys, sequences, seed, epoch)
        epoch += 1
    steps = steps[:total_steps]
    if sum(num_tokens[k] for k in keys) <= max_tokens:
        return [Window(0, tuple(steps))]
    windows: list[Window] = []
    current: list[tuple[str, ...]] = []
    held: set[str] = set()
    first = 0
    for i, step in enumerate(steps):
        grown = held | set(step)
        if current and sum(num_tokens[k] for k in grown) > max_tokens:
            windows.append(Window(first, tuple(current)))
            current, first, grown = [], i, set(step)
        current.append(step)
        held = grown
    windows.append(Window(first, tuple(current)))
    return windows
