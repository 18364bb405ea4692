"""Prefixes that token sequences share (a system prompt, examples): each is extracted and kept once.

Of several sequences that begin alike, the first keeps the rows of the common prefix; the others keep the
rest and read the prefix there. Pure functions of the sequences and their order, so that a resumed run shares
the same.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import NamedTuple


class Piece(NamedTuple):
    """The rows of a sequence that are kept under its own key: ``[start, end)``.

    Attributes:
        parent: key of the sequence whose first ``start`` rows are this one's, None where ``start`` is 0.
    """

    parent: str | None
    start: int
    end: int


class PrefixTree:
    """Sequences in the order in which they are extracted.

    Args:
        block_size: tokens in a block of the verifier's KV cache; whole blocks are shared.
    """

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self._first: dict[bytes, str] = {}
        self._whole: dict[bytes, str] = {}

    def add(self, key: str, token_ids: Sequence[int]) -> Piece:
        """What of a sequence is not in those before.

        The last token has no row: nothing is anchored behind it. The piece has at least one, since vLLM
        computes the last token of a prompt anew; it is empty where one earlier sequence is the same.
        """
        rows = array("q", token_ids[:-1])
        end, size = len(rows), self.block_size
        same = self._whole.setdefault(blake2b(rows.tobytes(), digest_size=16).digest(), key)
        if same != key:
            return Piece(same, end, end)
        parent, start = None, 0
        for at, digest in prefix_digests(rows, size):
            first = self._first.setdefault(digest, key)
            if first != key and at < end:
                parent, start = first, at
        return Piece(parent, start, end)


def prefix_digests(token_ids: Sequence[int], block_size: int) -> Iterator[tuple[int, bytes]]:
    """Every prefix of whole blocks: its length, and a digest of its tokens."""
    rows, digest = array("q", token_ids), b""
    for at in range(block_size, len(rows) + 1, block_size):
        block = rows[at - block_size : at].tobytes()
        digest = blake2b(digest + block, digest_size=16).digest()
        yield at, digest


def pieces_of(sequences: Mapping[str, Sequence[int]], block_size: int | None) -> dict[str, Piece]:
    """A piece for each sequence; with ``block_size`` None nothing is shared."""
    if block_size is None:
        return {key: Piece(None, 0, len(ids) - 1) for key, ids in sequences.items()}
    tree = PrefixTree(block_size)
    return {key: tree.add(key, ids) for key, ids in sequences.items()}


def parts(pieces: Mapping[str, Piece], key: str) -> list[tuple[str, int]]:
    """Where the rows of a sequence are: keys, first part first, and the row before which each part ends."""
    out = []
    at: str | None = key
    end = pieces[key].end
    while at is not None:
        piece = pieces[at]
        if end > piece.start:
            out.append((at, end))
        at, end = piece.parent, min(end, piece.start)
    return out[::-1]


def rows_wanted(pieces: Mapping[str, Piece], keys: Iterable[str]) -> dict[str, int]:
    """Up to which row each sequence's own rows are needed to have all of ``keys``; others are left out."""
    wanted: dict[str, int] = {}
    for key in keys:
        for at, end in parts(pieces, key):
            wanted[at] = max(wanted.get(at, 0), end)
    return wanted
