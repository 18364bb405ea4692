"""Which sequences are held out, which each step sees, which are extracted together: functions of the seed."""

from __future__ import annotations

import hashlib
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from vllm_dflash.training.prefixes import PrefixTree
from vllm_dflash.training.tokenization import Example


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
    """The rank that records, keeps and trains on a sequence: by its tokens alone, in every step and run.

    Replicas have :func:`balanced_owners`.
    """
    return int(content_key(token_ids), 16) % ranks


def epoch_steps(
    keys: Sequence[str], sequences: int, seed: int, epoch: int
) -> list[tuple[str, ...]]:
    """One epoch: every key once, shuffled by (seed, epoch), ``sequences`` to a step."""
    order = list(keys)
    random.Random(f"{seed}/epoch/{epoch}").shuffle(order)
    return [tuple(order[i : i + sequences]) for i in range(0, len(order), sequences)]


def run_steps(
    keys: Sequence[str], sequences: int, seed: int, total_steps: int
) -> list[tuple[str, ...]]:
    """The steps of a run: those of as many epochs as it takes."""
    steps: list[tuple[str, ...]] = []
    epoch = 0
    while len(steps) < total_steps:
        steps += epoch_steps(keys, sequences, seed, epoch)
        epoch += 1
    return steps[:total_steps]


#: Times that :func:`balanced_owners` goes over all sequences; more change nothing that counts.
_SWEEPS = 5


def balanced_owners(
    steps: Sequence[Sequence[str]], work: Mapping[str, int], ranks: int
) -> dict[str, int]:
    """A rank for each sequence of the steps, such that the ranks have alike to do in each of them.

    Makes the sum of the squares of what each rank has to do in each step small: sequence by sequence, each
    goes where least is to be done in the steps that it is in, and of several such ranks to the one that has
    least to do in all.

    Args:
        steps: keys of every step.
        work: of each sequence in a step.
        ranks: how many there are.
    """
    steps_of: defaultdict[str, list[int]] = defaultdict(list)
    for i, step in enumerate(steps):
        for key in step:
            steps_of[key].append(i)
    total, loads = [0] * ranks, [[0] * ranks for _ in steps]
    owners: dict[str, int] = {}

    def place(key: str) -> bool:
        """Whether that changed its rank."""
        there = [total, *(loads[i] for i in steps_of[key])]
        before = owners.get(key)
        if before is not None:
            for load in there:
                load[before] -= work[key]

        def order(rank: int) -> tuple[int, bool, int]:
            return sum(load[rank] for load in there[1:]), rank != before, total[rank]

        rank = owners[key] = min(range(ranks), key=order)
        for load in there:
            load[rank] += work[key]
        return rank != before

    for step in steps:
        for key in sorted(step, key=lambda k: -work[k]):
            if key not in owners:
                place(key)
    for _ in range(_SWEEPS):
        if not sum(place(key) for key in steps_of):
            break
    return owners


def plan_windows(
    sequences: Mapping[str, Sequence[int]],
    *,
    sequences_per_step: int,
    seed: int,
    total_steps: int,
    max_rows: int,
    block_size: int,
    owners: Mapping[str, int] | None = None,
) -> list[Window]:
    """Cuts a run into windows of at most ``max_rows`` rows of features on each rank.

    When all sequences fit at once there is one window. A window's sequences are always extracted together,
    in this order, so a resumed run sees the same features bit for bit.

    Args:
        sequences: token ids of every sequence.
        block_size: see :class:`PrefixTree`; rows that sequences share count once.
        owners: which rank keeps a sequence's features; None if there is one rank.
    """
    steps = run_steps(list(sequences), sequences_per_step, seed, total_steps)
    if max(rows_by_rank(sequences, block_size, owners).values(), default=0) <= max_rows:
        return [Window(0, tuple(steps))]
    windows: list[Window] = []
    current: list[tuple[str, ...]] = []
    held = _Held(block_size, owners)
    first = 0
    for i, step in enumerate(steps):
        held.add(step, sequences)
        if current and max(held.rows.values()) > max_rows:
            windows.append(Window(first, tuple(current)))
            current, first, held = [], i, _Held(block_size, owners)
            held.add(step, sequences)
        current.append(step)
    windows.append(Window(first, tuple(current)))
    return windows


def rows_by_rank(
    sequences: Mapping[str, Sequence[int]],
    block_size: int,
    owners: Mapping[str, int] | None = None,
) -> Counter[int]:
    """Rows of features that each rank keeps; sequences that ``owners`` lacks are rank 0's."""
    held = _Held(block_size, owners)
    held.add(sequences, sequences)
    return held.rows


def first_that_fit(
    sequences: Mapping[str, Sequence[int]],
    *,
    max_rows: int,
    block_size: int,
    owners: Mapping[str, int] | None = None,
) -> list[str]:
    """The first of the sequences whose features fit into ``max_rows`` rows on each rank; at least one."""
    held = _Held(block_size, owners)
    keys: list[str] = []
    for key in sequences:
        held.add([key], sequences)
        if keys and max(held.rows.values()) > max_rows:
            break
        keys.append(key)
    return keys


def keep_back(
    examples: list[Example], openings: Mapping[str, str], share: float, most: int, seed: int
) -> tuple[list[Example], list[Example]]:
    """Examples to train on and to hold out: a dialogue, with all its copies and turns, is one or the other.

    Args:
        openings: by a conversation's id, what tells its dialogue from others. Where the smallest dialogue has
            more than a quarter of all conversations, each of them counts as one.
        share: of the conversations, to hold out.
        most: conversations to hold out. A dialogue that has more is held out where none has fewer.
    """

    def conversation(example: Example) -> str:
        return example.id.rsplit("#", 1)[0]

    names = sorted({conversation(e) for e in examples})
    room = min(most, round(share * len(names)))
    kept: set[str] = set()
    for dialogue in (lambda name: openings.get(name, name), lambda name: name):
        groups: dict[str, list[str]] = {}
        for name in names:
            groups.setdefault(dialogue(name), []).append(name)
        order = list(groups)
        random.Random(f"{seed}/holdout").shuffle(order)
        for group in order:
            if len(kept) + len(groups[group]) <= room:
                kept.update(groups[group])
        smallest = min(groups.values(), key=len)
        if room and not kept and len(smallest) <= len(names) / 4:
            kept.update(smallest)
        if kept:
            break
    if len(kept) == len(names):
        return examples, []
    held = [e for e in examples if conversation(e) in kept]
    return [e for e in examples if conversation(e) not in kept], held


class _Held:
    """Rows kept on each rank as sequences come."""

    def __init__(self, block_size: int, owners: Mapping[str, int] | None) -> None:
        self.rows: Counter[int] = Counter()
        self._owners = owners or {}
        self._trees: defaultdict[int, PrefixTree] = defaultdict(lambda: PrefixTree(block_size))
        self._keys: set[str] = set()

    def add(self, keys: Iterable[str], sequences: Mapping[str, Sequence[int]]) -> None:
        for key in keys:
            if key not in self._keys:
                self._keys.add(key)
                rank = self._owners.get(key, 0)
                piece = self._trees[rank].add(key, sequences[key])
                self.rows[rank] += piece.end - piece.start
