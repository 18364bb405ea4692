"""Ends what a process has started, once that process is gone: ``python guard.py PID START_TIME``.

SIGKILL leaves a command no time to end its engines, and vLLM's engine core does not notice that its parent
is gone. So a process that starts engines starts this one too (:func:`vllm_dflash.processes.start_guard`). It
remembers all descendants while their ancestor lives, since orphans no longer show whose they are.

It reads ``/proc`` and imports nothing but the standard library: it is run by its path.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from typing import NamedTuple

#: Seconds between two looks.
TICK_S = 0.5
#: Seconds in which orphans may end by themselves: vLLM's workers and our engine processes notice.
GRACE_S = 3.0


class Process(NamedTuple):
    """A process; its start time tells it from a later one with the same id."""

    pid: int
    start_time: str


def look(pid: int) -> tuple[Process, int] | None:
    """A process that runs and its parent's id; None for one that is gone or a zombie."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The name in parentheses may hold anything; the fields begin behind it.
            fields = file.read().decode(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    state, parent, start_time = fields[0], int(fields[1]), fields[19]
    return None if state in "ZX" else (Process(pid, start_time), parent)


def children() -> dict[int, list[Process]]:
    """All running processes by their parent's id."""
    found: dict[int, list[Process]] = {}
    for name in os.listdir("/proc"):
        if name.isdecimal() and (seen := look(int(name))) is not None:
            found.setdefault(seen[1], []).append(seen[0])
    return found


def below(pid: int) -> set[Process]:
    """What a process and its descendants have started and still runs."""
    found = look(pid)
    return set() if found is None else descendants({found[0]}) - {found[0]}


def descendants(roots: set[Process]) -> set[Process]:
    """The given processes, where they still run, and everything below them but this one."""
    started, me = children(), os.getpid()
    alive = {p for processes in started.values() for p in processes}
    todo = [p for p in roots if p in alive]
    found: set[Process] = set()
    while todo:
        process = todo.pop()
        if process.pid != me and process not in found:
            found.add(process)
            todo += started.get(process.pid, [])
    return found


def is_tracker(process: Process) -> bool:
    """Whether it is multiprocessing's tracker, which frees shared memory once its users are gone."""
    try:
        with open(f"/proc/{process.pid}/cmdline", "rb") as file:
            return b"resource_tracker" in file.read()
    except OSError:
        return False


def end(orphans: set[Process], grace_s: float = GRACE_S) -> None:
    """Waits for the orphans, kills those that stay, and last the trackers."""
    deadline = time.monotonic() + grace_s
    while (orphans := descendants(orphans)) and time.monotonic() < deadline:
        time.sleep(0.1)
    for trackers_too in (False, True):
        for process in orphans:
            if trackers_too or not is_tracker(process):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
        deadline = time.monotonic() + GRACE_S
        while (orphans := descendants(orphans)) and time.monotonic() < deadline:
            time.sleep(0.1)


def main(pid: int, start_time: str) -> None:
    """Waits for the end of a process, then ends what is left of its descendants."""
    ancestor = Process(pid, start_time)
    seen: set[Process] = set()
    while (found := look(pid)) is not None and found[0] == ancestor:
        seen = descendants(seen | {ancestor}) - {ancestor}
        time.sleep(TICK_S)
    end(seen)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
