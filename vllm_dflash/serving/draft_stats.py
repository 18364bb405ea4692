"""Figures of the chosen draft lengths: to the log once a minute, and to the server's ``/metrics``.

The policy works in a worker or in the engine core (``support.by_scheduler``), metrics are served by another
process. vLLM has no way for a plugin's figures from the one to the other, so they go through a small file
that is replaced now and then. What the verifier made of the drafts is counted in the engine core
(:mod:`vllm_dflash.serving.verified`), which has such a file, too, where the policy is in a worker.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_dflash.draft_length.counters import DRAFTER, LOOKUP, Counters
from vllm_dflash.serving.expectation import AcceptanceWatch, read_expectation

logger = logging.getLogger("vllm.vllm_dflash")
_LOG_SECONDS = 60.0
_FILE_SECONDS = 0.2


def engine_of(server: str, index: int) -> str:
    """The name of one of a server's engines."""
    return f"{server}-{index}"


def engine_name(vllm_config: Any) -> str | None:
    """What an engine's files are called; the same in its core, its workers and the server's API processes.

    Data parallel engines share a configuration but for their index, which they keep when vLLM makes those of
    dense models independent.

    Returns:
        None where draft lengths are not chosen, or the configuration was not made by EngineArgs.
    """
    name = getattr(vllm_config.speculative_config, "dflash_stats", None)
    if name is None:
        return None
    return engine_of(name, getattr(vllm_config.parallel_config, "data_parallel_index", 0))


def stats_file(name: str) -> Path:
    """Where the figures of the engine called ``name`` are."""
    return Path(tempfile.gettempdir()) / f"vllm_dflash_{os.getuid()}_{name}.json"


def verified_file(path: Path) -> Path:
    """Where the engine core's counts are, beside the figures at ``path``."""
    return path.with_suffix(".verified.json")


def read_stats(path: Path) -> dict[str, Any] | None:
    """The latest figures, with the engine core's counts; None where there are none yet."""
    values = _read(path)
    return None if values is None else values | (_read(verified_file(path)) or {})


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None


class StatsFile:
    """A file with the latest of the figures that it is given, which are written by a thread.

    Steps need not wait for that, and when the engine has nothing to do the last figures are there, too.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._make: Callable[[], dict[str, Any]] = dict
        self._given = threading.Event()
        self._lock = threading.Lock()
        self._closed = False
        atexit.register(self._remove)
        threading.Thread(target=self._run, name=path.name, daemon=True).start()

    def put(self, make: Callable[[], dict[str, Any]]) -> None:
        """There are new figures; the thread calls ``make`` for them, so that most steps need not."""
        self._make = make
        self._given.set()

    def _run(self) -> None:
        while not self._closed:
            self._given.wait()
            self._given.clear()
            try:
                self._write(self._make())
            except OSError as error:
                # A full disk: the next ones may find room.
                logger.warning("vllm-dflash cannot write its figures: %s", error)
            time.sleep(_FILE_SECONDS)

    def _write(self, values: dict[str, Any]) -> None:
        part = self.path.with_suffix(f".{os.getpid()}")
        with self._lock:
            if not self._closed:
                part.write_text(json.dumps(values))
                os.replace(part, self.path)

    def _remove(self) -> None:
        with self._lock:
            self._closed = True
            self.path.unlink(missing_ok=True)


def make_stats(vllm_config: Any) -> DraftStats:
    """Of an engine that chooses draft lengths."""
    spec = vllm_config.speculative_config
    name = engine_name(vllm_config)
    expectation = read_expectation(
        str(spec.model), getattr(spec, "revision", None), spec.num_speculative_tokens
    )
    return DraftStats(stats_file(name) if name else None, AcceptanceWatch(expectation))


class DraftStats:
    """Publishes a policy's counters.

    Args:
        path: of :func:`stats_file`, or None for the log only.
        watch: compares the drafter's acceptance with that of its training, or None.
    """

    def __init__(self, path: Path | None, watch: AcceptanceWatch | None = None) -> None:
        self.watch = watch
        self._file = None if path is None else StatsFile(path)
        self._logged = time.monotonic()
        self._before: dict[str, Any] | None = None

    def update(self, counters: Counters) -> None:
        """Called once a step; cheap unless the log is due."""
        if self._file is not None:
            self._file.put(lambda: figures(counters))
        now = time.monotonic()
        if now - self._logged >= _LOG_SECONDS:
            self._logged = now
            after = figures(counters)
            if self._file is not None:
                after |= _read(verified_file(self._file.path)) or {}
            logger.info("vllm-dflash: %s", sentence(after, self._before))
            self._before = after
        if self.watch is not None:
            self.watch.look(counters.compared, counters.right)


def figures(counters: Counters) -> dict[str, Any]:
    """Counters as plain numbers."""
    single = ("steps", "drafted_steps", "tokens", "seconds", "plain_seconds")
    lists = ("lengths", "compared", "right")
    by_source = ("drafts", "proposed", "accepted", "expected")
    return {
        **{name: getattr(counters, name) for name in single},
        **{name: list(getattr(counters, name)) for name in lists},
        **{name: dict(getattr(counters, name)) for name in by_source},
    }


def sentence(after: dict[str, Any], before: dict[str, Any] | None) -> str:
    """One line on what happened between two readings."""

    def since(key: str, part: str | int | None = None) -> float:
        old = before[key] if before else None
        if part is None:
            return after[key] - (old or 0)
        return after[key][part] - (old[part] if old else 0)

    lengths = [since("lengths", k) for k in range(len(after["lengths"]))]
    drafts = sum(lengths)
    mean = sum(k * n for k, n in enumerate(lengths)) / drafts if drafts else 0.0
    sources = []
    for source in (DRAFTER, LOOKUP):
        proposed = since("proposed", source)
        if proposed:
            sources.append(
                f"{source}: {proposed:.0f} tokens proposed, {since('accepted', source):.0f} accepted, "
                f"{since('expected', source):.0f} expected"
            )
    seconds = since("seconds")
    speed = f"{since('plain_seconds') / seconds:.2f}x" if seconds else "unknown"
    return (
        f"{since('steps'):.0f} steps, drafts for {since('drafted_steps'):.0f}; mean draft length {mean:.2f}; "
        f"{'; '.join(sources) or 'nothing proposed'}; estimated speed over no speculation {speed}"
    )
