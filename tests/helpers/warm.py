"""Starts processes that have vLLM imported already.

To import vLLM costs several times what a tiny engine does. So a fork server, one of each pytest process,
imports it once, and these processes are forks of it. Our plugin is not imported there:
each loads it itself, and hands it on to the engines and workers that it starts.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

#: What subprocesses find this package by.
TESTS = Path(__file__).parents[1]
_servers: dict[bool, forkserver.ForkServer] = {}


def python_path() -> str:
    """``PYTHONPATH`` with this package."""
    return os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH"))))


class Process:
    """``python command``, in a process group of its own; to be used as ``subprocess.Popen`` is.

    Args:
        command: a module, a script or ``-c`` and code, and its arguments.
        env: all variables. What is read when vLLM is imported it has from the first call, but for the
            logging's level.
        out: file for the standard output.
        err: the same for errors; may be the same file.
        v2: with the V2 runner, interpreted; :func:`helpers.interpreted_v2.install` then sets variables.
    """

    def __init__(
        self,
        command: Sequence[str],
        env: Mapping[str, str],
        out: Path,
        err: Path,
        v2: bool = False,
    ) -> None:
        if (server := _servers.get(v2)) is None:
            server = _servers[v2] = forkserver.ForkServer()
            server.set_forkserver_preload([f"helpers.preload{'_v2' if v2 else ''}"])
        with mock.patch.dict(os.environ, {**env, "PYTHONPATH": python_path()}, clear=True):
            server.ensure_running()
        context = multiprocessing.get_context("forkserver")
        args = (list(command), dict(env), str(out), str(err))
        self.args = command
        self._process = context.Process(target=_run, args=args)
        with mock.patch.object(forkserver, "connect_to_new_process", server.connect_to_new_process):
            self._process.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self._process.exitcode

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()


def run(
    command: Sequence[str], env: Mapping[str, str], timeout: float, v2: bool = False
) -> subprocess.CompletedProcess[str]:
    """The same to its end: exit code and what it wrote, as ``subprocess.run`` gives them."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        process = Process(command, env, out, err, v2)
        try:
            code = process.wait(timeout)
        except BaseException:
            process.kill()
            raise
        return subprocess.CompletedProcess(command, code, out.read_text(), err.read_text())


def _run(command: list[str], env: dict[str, str], out: str, err: str) -> None:
    os.setsid()
    os.environ.clear()
    os.environ.update(env)
    for number, name in ((1, out), (2, err)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), number)
    # The fork server passes over what it cannot import.
    assert "helpers.preload" in sys.modules
    # vLLM read its logging's level when it was imported.
    sys.modules["vllm.logger"]._configure_vllm_root_logger()
    # On a CPU vLLM starts engines and workers in new interpreters. Forks of this one have imported it.
    context = multiprocessing.get_context
    multiprocessing.get_context = lambda method=None: context(
        "fork" if method == "spawn" else method
    )
    # An engine that ends thaws what was frozen before it, and collects all of that.
    gc.unfreeze = lambda: None
    if command[0] == "-c":
        sys.argv = ["-c", *command[2:]]
        exec(command[1], {"__name__": "__main__"})
        return
    sys.argv = command
    if os.sep in command[0]:
        runpy.run_path(command[0], run_name="__main__")
    else:
        runpy.run_module(command[0], run_name="__main__", alter_sys=True)
