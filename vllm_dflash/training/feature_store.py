"""Features between the verifier's pass and the learner's steps: bounded memory, optional shards."""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from vllm_dflash.files import atomic_path, atomic_write
from vllm_dflash.training.host_memory import HostMemory

#: A cache shard is closed when it reaches this size.
SHARD_BYTES = 512 * 2**20
_Entry = tuple[Tensor, Tensor | None]


def read_index(index: Path) -> dict[str, str]:
    """Shard of each key, from a cache folder's ``index.json``.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        listed = json.loads(index.read_text())
        good = all(re.fullmatch(r"features-\d{5,}\.safetensors", n) for n in listed.values())
    except (ValueError, AttributeError, TypeError):
        good = False
    if not good:
        raise ValueError(
            f"the feature cache's {index} is damaged; delete {index.parent}, and its features are extracted "
            "again"
        )
    return listed


class FeatureStore:
    """Features by key in the host's memory, least recently used dropped beyond a memory budget.

    Args:
        budget: bytes kept in memory; at least one entry always is.
        cache_dir: folder of safetensors shards that keeps every entry for later epochs and runs;
            None keeps nothing on disk.
    """

    def __init__(self, budget: int, cache_dir: Path | None = None) -> None:
        self.budget, self.cache_dir = budget, cache_dir
        self._to_host = HostMemory()
        self._memory: OrderedDict[str, _Entry] = OrderedDict()
        self._bytes = 0
        self._pending: dict[str, _Entry] = {}
        self._pending_bytes = 0
        self._index: dict[str, str] = {}
        self._next_shard = 0
        if cache_dir is not None:
            cache_dir.mkdir(parents=True, exist_ok=True)
            index = cache_dir / "index.json"
            if index.is_file():
                listed = read_index(index)
                # Entries whose shard someone deleted are extracted again.
                there = {n for n in set(listed.values()) if (cache_dir / n).is_file()}
                self._index = {key: n for key, n in listed.items() if n in there}
                numbers = (int(n[len("features-") : -len(".safetensors")]) for n in listed.values())
                self._next_shard = 1 + max(numbers, default=-1)

    def __contains__(self, key: str) -> bool:
        return key in self._memory or key in self._pending or key in self._index

    def put(self, key: str, features_TF: Tensor, final_TH: Tensor | None = None) -> None:
        entry = (
            self._to_host(features_TF),
            None if final_TH is None else self._to_host(final_TH),
        )
        self._remember(key, entry)
        if self.cache_dir is not None and key not in self._index:
            self._pending[key] = entry
            self._pending_bytes += _size(entry)
            if self._pending_bytes >= SHARD_BYTES:
                self.flush()

    def get(self, key: str) -> _Entry:
        """The entry; KeyError when it is neither in memory nor cached."""
        if key in self._memory:
            self._memory.move_to_end(key)
            return self._memory[key]
        if key in self._pending:
            self._remember(key, self._pending[key])
            return self._pending[key]
        if key not in self._index or self.cache_dir is None:
            raise KeyError(key)
        from safetensors import safe_open

        with safe_open(self.cache_dir / self._index[key], framework="pt") as shard:
            features = shard.get_tensor(f"{key}/features")
            names = set(shard.keys())
            final = shard.get_tensor(f"{key}/final") if f"{key}/final" in names else None
        entry = (features, final)
        self._remember(key, entry)
        return entry

    def keep(self, keys: Iterable[str]) -> None:
        """Drops everything but these keys from memory; the cache folder keeps all."""
        wanted = set(keys)
        for key in [k for k in self._memory if k not in wanted]:
            self._bytes -= _size(self._memory.pop(key))

    def flush(self) -> None:
        """Writes what is pending as one shard.

        The index is replaced last: a crash before loses the pending entries, never older ones.
        """
        if not self._pending or self.cache_dir is None:
            return
        from safetensors.torch import save_file

        tensors: dict[str, Tensor] = {}
        for key, (features, final) in self._pending.items():
            tensors[f"{key}/features"] = features.cpu().contiguous()
            if final is not None:
                tensors[f"{key}/final"] = final.cpu().contiguous()
        name = f"features-{self._next_shard:05d}.safetensors"
        with atomic_path(self.cache_dir / name) as part:
            save_file(tensors, part)
        self._next_shard += 1
        self._index |= dict.fromkeys(self._pending, name)
        atomic_write(self.cache_dir / "index.json", json.dumps(self._index))
        self._pending, self._pending_bytes = {}, 0

    def _remember(self, key: str, entry: _Entry) -> None:
        old = self._memory.pop(key, None)
        if old is not None:
            self._bytes -= _size(old)
        self._memory[key] = entry
        self._bytes += _size(entry)
        while self._bytes > self.budget and len(self._memory) > 1:
            _, dropped = self._memory.popitem(last=False)
            self._bytes -= _size(dropped)


def _size(entry: _Entry) -> int:
    return sum(t.numel() * t.element_size() for t in entry if isinstance(t, torch.Tensor))
