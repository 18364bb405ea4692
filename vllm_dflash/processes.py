"""How a command ends: by a signal with one line, and with everything it started. It never asks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vllm_dflash import guard

#: What asks a command to end. One that its caller has it ignore (nohup, a shell's background) stays ignored.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
#: Seconds that a command which was asked to end may take to close its engines.
STOP_TIMEOUT_S = 30.0

_guarded: int | None = None
_stopping = False


class Stopped(BaseException):
    """A signal asked the command to end. No Exception: nothing on its way may take it for a failure."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


class Interrupted(Exception):
    """A signal arrived; what is done is saved and the same command resumes."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum


def stopping() -> bool:
    """Whether a signal has asked the command to end: what is left has seconds to do so."""
    return _stopping


@contextmanager
def stop_by_signal() -> Iterator[None]:
    """A first SIGINT, SIGTERM or SIGHUP raises :class:`Stopped` where the block is; a second ends at once."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python delivers signals to the main thread only
        return
    global _stopping
    seen: list[int] = []

    def handler(signum: int, frame: object) -> None:
        global _stopping
        if seen:
            os._exit(128 + signum)
        seen.append(signum)
        _stopping = True
        # Code that swallows what is raised in it (a destructor) must not keep the command alive.
        late = threading.Timer(STOP_TIMEOUT_S, os._exit, (128 + signum,))
        late.daemon = True
        late.start()
        raise Stopped(signum)

    before = {s: h for s in STOP_SIGNALS if (h := signal.getsignal(s)) != signal.SIG_IGN}
    for signum in before:
        signal.signal(signum, handler)
    try:
        yield
    finally:
        _stopping = False
        for signum, old in before.items():
            signal.signal(signum, old)


def close_stdin() -> None:
    """Standard input becomes empty, here and for what is started from here: no library can ask on it."""
    null = os.open(os.devnull, os.O_RDONLY)
    if null == 0:  # it was closed
        os.set_inheritable(0, True)
        return
    os.dup2(null, 0)
    os.close(null)


def start_guard() -> None:
    """Sees to it that what this process starts ends with it, however it ends; once for each process."""
    global _guarded
    if _guarded == os.getpid():
        return
    me = guard.look(os.getpid())
    if me is None:
        return  # no /proc here
    subprocess.Popen(
        [
            sys.executable,
            "-I",
            "-S",
            str(Path(guard.__file__)),
            str(me[0].pid),
            me[0].start_time,
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        # A signal to the command's group is not for it.
        start_new_session=True,
    )
    _guarded = os.getpid()
