"""The conversations that a server learns from: a bounded store that holds old traffic and new."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import queue
import random
import threading
import time
import zlib
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

#: One conversation in so many is held out: candidates are compared on those, none is trained on them.
HELD_OUT_ONE_IN = 8
#: How keys of conversations begin, and ids of the requests that compute their features.
KEY = "dflash-learn-"
_DAY = 86400.0

logger = logging.getLogger("vllm.vllm_dflash")


@dataclass(frozen=True)
class Conversation:
    """A finished request.

    Attributes:
        token_ids: prompt and response.
        num_prompt_tokens: how many of them are the prompt.
        source: where the request said it came from, "" where it did not.
        time: seconds since the epoch at which it finished.
    """

    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    source: str = ""
    time: float = 0.0

    @cached_property
    def key(self) -> str:
        """Of its tokens."""
        return KEY + _hash(self.token_ids)[:24]

    @cached_property
    def held_out(self) -> bool:
        """By the hash of the prompt: what is sampled twice for one prompt is on one side."""
        prompt = self.token_ids[: self.num_prompt_tokens]
        return int(_hash(prompt)[:8], 16) % HELD_OUT_ONE_IN == 0

    def head(self, tokens: int) -> Conversation:
        """The same with so many tokens of the response at most, and the one behind them."""
        return replace(self, token_ids=self.token_ids[: self.num_prompt_tokens + tokens + 1])

    @property
    def loss_mask(self) -> list[bool]:
        return [i >= self.num_prompt_tokens for i in range(len(self.token_ids))]


def _hash(token_ids: Sequence[int]) -> str:
    return hashlib.sha256(",".join(map(str, token_ids)).encode()).hexdigest()


class Reservoir:
    """At most ``capacity`` tokens of conversations: half are the latest, half a sample of all before.

    The sample of a source is uniform over its time (reservoir sampling). Where there is no room the source
    that has most gives way, so that one client that sends much does not drive out the others.
    """

    def __init__(self, capacity: int, seed: int = 0) -> None:
        self.capacity = capacity
        self._recent: deque[Conversation] = deque()
        self._old: dict[str, list[Conversation]] = {}
        self._seen: Counter[str] = Counter()
        self._keys: set[str] = set()
        self._tokens: Counter[bool] = Counter()  # of the recent ones (True) and the old ones
        self._random = random.Random(seed)

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[Conversation]:
        for source in self._old.values():
            yield from source
        yield from self._recent

    def recent(self) -> set[str]:
        """Keys of the latest conversations, which are not yet sampled from."""
        return {c.key for c in self._recent}

    def num_tokens(self) -> int:
        return sum(self._tokens.values())

    def add(self, conversation: Conversation) -> bool:
        """Whether it is new; one with the same tokens as another is not kept twice."""
        if conversation.key in self._keys or len(conversation.token_ids) > self.capacity // 2:
            return False
        self._keys.add(conversation.key)
        self._recent.append(conversation)
        self._tokens[True] += len(conversation.token_ids)
        while self._tokens[True] > self.capacity // 2:
            self._sample(self._recent.popleft())
        return True

    def _sample(self, conversation: Conversation) -> None:
        size, source = len(conversation.token_ids), conversation.source
        self._tokens[True] -= size
        self._seen[source] += 1
        own = self._old.setdefault(source, [])
        # Of a source that is sampled already, as many stay of each time as of any other.
        share = len(own) / self._seen[source]
        full = self._tokens[False] + size > self.capacity // 2
        if full and self._largest() == source and self._random.random() > share:
            self._keys.discard(conversation.key)
            return
        own.append(conversation)
        self._tokens[False] += size
        while self._tokens[False] > self.capacity // 2:
            most = self._old[self._largest()]
            others = len(most) - (most is own)  # not the one that came
            dropped = most.pop(self._random.randrange(max(1, others)))
            self._tokens[False] -= len(dropped.token_ids)
            self._keys.discard(dropped.key)

    def _largest(self) -> str:
        return max(self._old, key=lambda s: sum(len(c.token_ids) for c in self._old[s]))


class ShardReader:
    """Reads the files of a :class:`Shards`, also while it is written.

    Attributes:
        damaged: lines that could not be read.
    """

    def __init__(self, folder: Path, max_age: float) -> None:
        self.folder, self.max_age, self.damaged = folder, max_age, 0
        self._read: dict[str, int] = {}

    def read(self) -> Iterator[Conversation]:
        """What has come since the last one that was given, oldest first."""
        for file in shard_files(self.folder):
            name = file.name
            try:
                with file.open("rb") as opened:
                    if opened.seek(0, os.SEEK_END) < self._read.get(name, 0):
                        del self._read[name]  # another one of that name
                    opened.seek(self._read.setdefault(name, 0))
                    # A line without its end is still being written.
                    *lines, _ = opened.read().split(b"\n")
            except FileNotFoundError:
                continue  # grown too old
            for line in lines:
                self._read[name] += len(line) + 1
                if not line:
                    continue
                checksum, _, text = line.partition(b" ")
                if checksum != _checksum(text):
                    self.damaged += 1
                    continue
                raw = json.loads(text)
                if time.time() - raw["time"] <= self.max_age:
                    yield Conversation(**{**raw, "token_ids": tuple(raw["token_ids"])})


def shard_files(folder: Path) -> list[Path]:
    """Oldest first."""
    return sorted(folder.glob("[0-9]*.jsonl"), key=lambda f: int(f.stem))


class Shards:
    """Conversations on disk, in append-only files of one checksummed line each, readable by their owner only.

    A thread writes. Serving never waits for the disk: what does not fit into the queue, or cannot be written,
    is counted in ``dropped`` and forgotten.

    Args:
        folder: of the files.
        max_bytes: of all files; the oldest file goes first.
        max_age: seconds after which a file goes.
    """

    SHARD_BYTES = 4 * 2**20

    def __init__(self, folder: Path, max_bytes: int, max_age: float, waiting: int = 1024) -> None:
        self.folder, self.max_bytes, self.max_age = folder, max_bytes, max_age
        self.dropped = 0
        self._reader = ShardReader(folder, max_age)
        self._queue: queue.Queue[Conversation] = queue.Queue(waiting)
        self._begun = time.time()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._prune(None)
        self._number = 1 + max((int(f.stem) for f in shard_files(folder)), default=0)
        threading.Thread(target=self._run, name="dflash-learn-shards", daemon=True).start()

    @property
    def damaged(self) -> int:
        return self._reader.damaged

    def read(self) -> Iterator[Conversation]:
        """All that can be read, oldest first."""
        return self._reader.read()

    def put(self, conversation: Conversation) -> None:
        try:
            self._queue.put_nowait(conversation)
        except queue.Full:
            self.dropped += 1

    def _run(self) -> None:
        while True:
            conversation = self._queue.get()
            try:
                self._write(conversation)
            except (OSError, TypeError, ValueError) as error:
                # A full disk, for which the next one may find room, or what a filter made of it.
                if not self.dropped:
                    logger.warning("vllm-dflash cannot keep a conversation on disk: %s", error)
                self.dropped += 1
            self._queue.task_done()

    def _write(self, conversation: Conversation) -> None:
        fields = ("token_ids", "num_prompt_tokens", "source", "time")
        text = json.dumps({name: getattr(conversation, name) for name in fields}).encode()
        file = self.folder / f"{self._number:06d}.jsonl"
        # A line that a full disk or a kill cut short ends here, and only that one is lost.
        line = b"\n" + _checksum(text) + b" " + text + b"\n"
        with open(os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "ab") as opened:
            opened.write(line)
            size = opened.tell()
        # A file of a day at most: files go as a whole.
        if size >= self.SHARD_BYTES or time.time() - self._begun > _DAY:
            self._begun = time.time()
            self._number += 1
        self._prune(file)

    def _prune(self, current: Path | None) -> None:
        files = [(f, f.stat()) for f in shard_files(self.folder)]
        total = sum(s.st_size for _, s in files)
        for file, stat in files:
            old = time.time() - stat.st_mtime > self.max_age
            if file != current and (old or total > self.max_bytes):
                file.unlink()
                total -= stat.st_size

    def flush(self) -> None:
        """Waits until all that was put is written."""
        self._queue.join()


def _checksum(text: bytes) -> bytes:
    return f"{zlib.crc32(text):08x}".encode()


def as_example(conversation: Conversation) -> tuple[str, list[int], list[bool], str]:
    """As ``TrainingSession.register`` takes it."""
    c = conversation
    return c.key, list(c.token_ids), c.loss_mask, c.source


def describe(reservoir: Reservoir) -> dict[str, Any]:
    """How many conversations and tokens there are, and of which sources."""
    sources = Counter(c.source for c in reservoir)
    return {
        "conversations": len(reservoir),
        "tokens": reservoir.num_tokens(),
        "sources": dict(sources),
    }
