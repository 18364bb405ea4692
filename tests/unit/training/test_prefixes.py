"""Which rows sequences share, and features put together from what is kept."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_dflash.training.feature_store import FeatureStore
from vllm_dflash.training.piece_store import PieceStore
from vllm_dflash.training.prefixes import Piece, parts, pieces_of, rows_wanted

#: Few tokens and short blocks, so that sequences share much.
SEQUENCES = st.lists(st.lists(st.integers(0, 1), min_size=2, max_size=24), min_size=1, max_size=12)


def named(sequences: list[list[int]]) -> dict[str, list[int]]:
    return {f"k{i}": ids for i, ids in enumerate(sequences)}


@given(sequences=SEQUENCES, block_size=st.integers(1, 5))
def test_parts_are_the_sequence(sequences, block_size) -> None:
    examples = named(sequences)
    pieces = pieces_of(examples, block_size)
    order = list(examples)
    for key, ids in examples.items():
        got, end = [], 0
        for at, until in parts(pieces, key):
            assert pieces[at].start == end
            got += examples[at][end:until]
            end = until
        assert got == ids[:-1]
        if pieces[key].parent is not None:
            assert order.index(pieces[key].parent) < order.index(key)


@given(sequences=SEQUENCES, block_size=st.integers(1, 5))
def test_only_whole_blocks_are_shared_and_each_is_kept_once(sequences, block_size) -> None:
    examples = named(sequences)
    pieces = pieces_of(examples, block_size)
    seen: set[tuple[int, ...]] = set()
    for key, ids in examples.items():
        rows, piece = ids[:-1], pieces[key]
        known = [i for i in range(block_size, len(rows), block_size) if tuple(rows[:i]) in seen]
        if piece.start < piece.end:
            assert piece.start == max(known, default=0)
        else:
            assert rows in [examples[k][:-1] for k in examples if k != key]
        seen |= {tuple(rows[:i]) for i in range(block_size, len(rows) + 1, block_size)}


@given(sequences=SEQUENCES, block_size=st.integers(1, 5), data=st.data())
def test_rows_wanted_are_enough_and_no_more(sequences, block_size, data) -> None:
    pieces = pieces_of(named(sequences), block_size)
    own = data.draw(st.lists(st.sampled_from(list(pieces)), unique=True))
    wanted = rows_wanted(pieces, own)
    needed = [part for key in own for part in parts(pieces, key)]
    assert wanted == {at: max(end for a, end in needed if a == at) for at, _ in needed}


def test_nothing_is_shared_without_a_cache() -> None:
    pieces = pieces_of({"a": [1, 2, 3], "b": [1, 2, 3]}, None)
    assert pieces == {"a": Piece(None, 0, 2), "b": Piece(None, 0, 2)}


def features_of(ids: list[int], width: int) -> torch.Tensor:
    """Rows that depend on all tokens so far, as a verifier's do."""
    return torch.tensor(ids, dtype=torch.float64).add(1).cumsum(0)[:, None] / torch.arange(
        1, width + 1
    )


def filled(examples: dict[str, list[int]], block_size: int = 2) -> PieceStore:
    store = PieceStore(FeatureStore(2**40))
    for key, piece in pieces_of(examples, block_size).items():
        rows = examples[key][:-1]
        if piece.start == piece.end:
            store.put(key, piece, None)
        else:
            features, final = (features_of(rows, width)[piece.start :] for width in (6, 2))
            store.put(key, piece, features, final)
    return store


@given(sequences=SEQUENCES, block_size=st.integers(1, 5), data=st.data())
def test_features_are_put_together(sequences, block_size, data) -> None:
    examples = named(sequences)
    store = filled(examples, block_size)
    kept = data.draw(st.lists(st.sampled_from(list(examples)), unique=True, min_size=1))
    store.keep(kept)
    for key in kept:
        assert key in store
        features, final = store.get(key)
        assert torch.equal(features, features_of(examples[key][:-1], 6))
        assert torch.equal(final, features_of(examples[key][:-1], 2))


def test_memory_is_freed() -> None:
    store = filled({"a": [1, 1, 1, 5, 5], "b": [1, 1, 1, 6, 6], "c": [1, 1, 7, 7, 7], "d": [9, 9]})
    store.keep(["c"])
    assert "c" in store
    assert "b" not in store
    assert "d" not in store
    assert "a" in store.store  # c's prefix
    assert "b" not in store.store
    with pytest.raises(KeyError):
        store.get("b")


def test_a_missing_prefix_is_noticed() -> None:
    store = PieceStore(FeatureStore(2**40))
    store.put("b", Piece("a", 2, 3), torch.ones(1, 4))
    assert "b" not in store
    store.put("a", Piece(None, 0, 4), torch.zeros(2, 4))  # read as a prefix only
    assert "b" in store
    assert store.get("b")[0].tolist() == [[0] * 4, [0] * 4, [1] * 4]
