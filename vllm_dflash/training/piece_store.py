"""Features of sequences that share prefixes: rows are kept once, and put together when they are read."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from vllm_dflash.training.feature_store import FeatureStore
from vllm_dflash.training.prefixes import Piece, parts, rows_wanted


class PieceStore:
    """Features by sequence, over a store of their pieces."""

    def __init__(self, store: FeatureStore) -> None:
        self.store = store
        self._pieces: dict[str, Piece] = {}

    def put(
        self, key: str, piece: Piece, features_TF: Tensor | None, final_TH: Tensor | None = None
    ) -> None:
        """Keeps a sequence's own rows, from ``piece.start`` on; None where the piece is empty.

        Those of its parent may come later. Rows may end before ``piece.end`` where only a prefix of the
        sequence is read.
        """
        if features_TF is not None:
            self.store.put(key, features_TF, final_TH)
        self._pieces[key] = piece

    def __contains__(self, key: str) -> bool:
        """Whether all rows are at hand, those that the sequence shares included."""
        at: str | None = key
        while at is not None:
            if at not in self._pieces:
                return False
            at = self._pieces[at].parent
        return True

    def get(self, key: str) -> tuple[Tensor, Tensor | None]:
        """Features ``[T, F]`` and final states ``[T, H]``; KeyError when rows are missing."""
        features, finals = [], []
        for at, end in parts(self._pieces, key):
            feature_rows, final_rows = self.store.get(at)
            own = end - self._pieces[at].start
            features.append(feature_rows[:own])
            if final_rows is not None:
                finals.append(final_rows[:own])
        return _joined(features), _joined(finals) if finals else None

    def keep(self, keys: Iterable[str]) -> None:
        """Frees the memory of all sequences but these and what they share."""
        kept = {key for key in keys if key in self}
        wanted = rows_wanted(self._pieces, kept)
        self._pieces = {k: p for k, p in self._pieces.items() if k in wanted or k in kept}
        self.store.keep(wanted)


def _joined(rows: list[Tensor]) -> Tensor:
    if len(rows) == 1:
        return rows[0]
    # A device reads the whole by itself where it can read the parts so.
    shape = (sum(map(len, rows)), rows[0].shape[1])
    out = torch.empty(shape, dtype=rows[0].dtype, pin_memory=rows[0].is_pinned())
    return torch.cat(rows, out=out)
