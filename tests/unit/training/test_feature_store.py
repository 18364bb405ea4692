"""Features in memory and in the cache folder."""

from __future__ import annotations

import errno
import json
import os

import pytest
import torch

from vllm_dflash.training import feature_store
from vllm_dflash.training.feature_store import FeatureStore

#: Bytes of one entry made by ``entry``.
ENTRY = 4 * 6 * 4


def entry(seed: int, rows: int = 4, width: int = 6) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def fill(store: FeatureStore, *seeds: int) -> None:
    for seed in seeds:
        store.put(f"k{seed}", entry(seed))


def shards(folder) -> list[str]:
    return sorted(f.name for f in folder.glob("*.safetensors"))


def has(store: FeatureStore, *seeds: int) -> bool:
    return all(torch.equal(store.get(f"k{s}")[0], entry(s)) for s in seeds)


def test_memory_only():
    store = FeatureStore(10 * ENTRY)
    final = entry(9, width=3)
    store.put("a", entry(1), final)
    store.put("b", entry(2))
    assert "a" in store
    assert "c" not in store
    features, states = store.get("a")
    assert torch.equal(features, entry(1))
    assert torch.equal(states, final)
    assert store.get("b")[1] is None
    with pytest.raises(KeyError, match="c"):
        store.get("c")
    store.flush()  # nowhere to


def test_the_least_recently_used_goes_first():
    store = FeatureStore(3 * ENTRY)
    fill(store, 1, 2, 3)
    store.get("k1")
    fill(store, 4)
    assert [f"k{s}" in store for s in (1, 2, 3, 4)] == [True, False, True, True]
    store.put("k3", entry(3))  # again: no new bytes
    assert [f"k{s}" in store for s in (1, 3, 4)] == [True, True, True]
    fill(store, 5)
    assert [f"k{s}" in store for s in (1, 3, 4, 5)] == [False, True, True, True]


def test_replaced_entries_are_counted_once():
    store = FeatureStore(3 * ENTRY)
    store.put("a", entry(1, rows=8))
    store.put("a", entry(2))
    fill(store, 3, 4)
    assert "a" in store
    assert torch.equal(store.get("a")[0], entry(2))


def test_one_entry_is_always_kept():
    store = FeatureStore(0)
    fill(store, 1)
    assert has(store, 1)
    fill(store, 2)
    assert "k1" not in store
    assert has(store, 2)


def test_final_states_count_against_the_budget():
    store = FeatureStore(2 * ENTRY)
    store.put("a", entry(1), entry(2))
    store.put("b", entry(3))
    assert "a" not in store


def test_cache_serves_what_memory_dropped_and_later_runs(tmp_path):
    folder = tmp_path / "deep" / "cache"
    store = FeatureStore(ENTRY, folder)
    final = entry(7, width=2)
    store.put("a/b#0", entry(1), final)
    fill(store, 2, 3)
    store.flush()
    fill(store, 4)
    store.flush()
    assert shards(folder) == ["features-00000.safetensors", "features-00001.safetensors"]
    for reader in (store, FeatureStore(ENTRY, folder)):
        assert has(reader, 2, 3, 4)
        features, states = reader.get("a/b#0")
        assert torch.equal(features, entry(1))
        assert torch.equal(states, final)
        assert "k9" not in reader


def test_entries_not_yet_written_are_at_hand(tmp_path):
    store = FeatureStore(ENTRY, tmp_path)
    fill(store, 1, 2, 3)
    assert shards(tmp_path) == []
    assert "k1" in store
    assert has(store, 1, 2, 3)


def test_full_shards_are_written_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_store, "SHARD_BYTES", 2 * ENTRY)
    store = FeatureStore(ENTRY, tmp_path)
    fill(store, 1, 2, 3)
    assert len(shards(tmp_path)) == 1
    assert has(FeatureStore(ENTRY, tmp_path), 1, 2)
    assert "k3" not in FeatureStore(ENTRY, tmp_path)


def test_cached_entries_are_not_written_again(tmp_path):
    first = FeatureStore(9 * ENTRY, tmp_path)
    fill(first, 1)
    first.flush()
    second = FeatureStore(9 * ENTRY, tmp_path)
    fill(second, 1)
    second.flush()
    assert shards(tmp_path) == ["features-00000.safetensors"]
    fill(second, 2)
    second.flush()
    assert shards(tmp_path) == ["features-00000.safetensors", "features-00001.safetensors"]
    assert has(FeatureStore(ENTRY, tmp_path), 1, 2)


def test_features_of_any_dtype_and_layout(tmp_path):
    store = FeatureStore(0, tmp_path)
    store.put("a", entry(1).t().bfloat16())
    store.flush()
    got = FeatureStore(0, tmp_path).get("a")[0]
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, entry(1).t().bfloat16())


def test_full_disk_loses_nothing_written_before(tmp_path, monkeypatch):
    store = FeatureStore(ENTRY, tmp_path)
    fill(store, 1)
    store.flush()
    before = sorted(os.listdir(tmp_path))

    def half(tensors, file):
        file.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    fill(store, 2)
    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", half)
        with pytest.raises(OSError, match="No space"):
            store.flush()
    assert sorted(os.listdir(tmp_path)) == before
    assert has(FeatureStore(ENTRY, tmp_path), 1)
    assert has(store, 1, 2)
    store.flush()  # there is room again
    assert has(FeatureStore(ENTRY, tmp_path), 1, 2)


def test_deleted_shards_are_extracted_again(tmp_path):
    store = FeatureStore(ENTRY, tmp_path)
    for seed in (1, 2):
        fill(store, seed)
        store.flush()
    (tmp_path / "features-00000.safetensors").unlink()
    again = FeatureStore(ENTRY, tmp_path)
    assert "k1" not in again
    assert has(again, 2)
    fill(again, 1)
    again.flush()
    fill(again, 3)
    again.flush()
    assert has(FeatureStore(ENTRY, tmp_path), 1, 2, 3)


def test_damaged_index(tmp_path):
    (tmp_path / "index.json").write_text('{"k1": "fea')
    with pytest.raises(ValueError, match=r"index\.json is damaged.*delete"):
        FeatureStore(ENTRY, tmp_path)


def test_index_names_the_shard_of_every_key(tmp_path):
    store = FeatureStore(ENTRY, tmp_path)
    fill(store, 1, 2)
    store.flush()
    index = json.loads((tmp_path / "index.json").read_text())
    assert index == dict.fromkeys(("k1", "k2"), "features-00000.safetensors")
