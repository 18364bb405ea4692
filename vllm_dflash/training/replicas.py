"""Data parallel training on one machine: several engines, each with its own devices, that learn as one.

The first replica is the engine of the trainer's own process, the others have a process each
(:mod:`vllm_dflash.training.replica`). Responses and extraction are shared out among them, and what they
record stays where it is: a sequence belongs to one rank of one replica. The ranks of all replicas
train together (:class:`~vllm_dflash.training.ranks.Ranks`).
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import torch

from vllm_dflash.environment import gpu_memory
from vllm_dflash.files import writing
from vllm_dflash.processes import start_guard
from vllm_dflash.training.config import EngineOptions, SamplingOptions
from vllm_dflash.training.engine import VerifierEngine
from vllm_dflash.training.replica import CANCEL, DONE, FAILED, ITEM
from vllm_dflash.training.responses import GenerationRequest, GenerationResult
from vllm_dflash.verifier import Verifier

T = TypeVar("T")
#: Seconds that the other replicas may take to start once the first one has.
START_S = 900.0
#: Seconds in which the trainer must have noticed that a replica is gone: a device may be waiting for it.
NOTICE_S = 60.0
#: Seconds that a replica has to end when asked, and then when told.
CLOSE_S, TERM_S = 15.0, 5.0
_GONE = "gone"


class Others:
    """The replicas that have a process of their own, by their numbers, from 1 on.

    Args:
        command: starts one; the number of its socket is added.
        folder: gets ``replica-<number>.log``.
    """

    def __init__(self, command: Sequence[str], folder: Path) -> None:
        self._command, self._folder = list(command), folder
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._sockets: dict[int, Connection] = {}
        self._inbox: queue.Queue[tuple[int, str, Any]] = queue.Queue()
        self._noticed = threading.Event()
        self._failures: dict[int, str] = {}
        #: Those that have not answered yet.
        self.busy: set[int] = set()

    def start(self, number: int, environment: Mapping[str, str], *arguments: Any) -> None:
        """Starts a replica, which answers once when it is there; its process gets the arguments."""
        ours, theirs = multiprocessing.Pipe()
        with writing(self._log(number)), self._log(number).open("wb") as log, theirs:
            self._processes[number] = subprocess.Popen(
                [*self._command, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=dict(environment),
                pass_fds=(theirs.fileno(),),
                # Ctrl-C is for the trainer, which tells them.
                start_new_session=True,
            )
        self._sockets[number] = ours
        threading.Thread(target=self._listen, args=(number, ours), daemon=True).start()
        self.busy.add(number)
        self._send(number, arguments)

    def _log(self, number: int) -> Path:
        return self._folder / f"replica-{number}.log"

    def _listen(self, number: int, conn: Connection) -> None:
        try:
            with suppress(EOFError, OSError):
                while True:
                    kind, value = conn.recv()
                    if kind == FAILED:
                        self._failures[number] = value.message
                    self._inbox.put((number, kind, value))
        finally:
            self._inbox.put((number, _GONE, None))
        if not self._noticed.wait(NOTICE_S):
            # The trainer is stuck in what it does with that replica. The guard ends what it leaves.
            print(f"error: {self._death(number)}", file=sys.stderr, flush=True)
            os._exit(1)

    def _death(self, number: int) -> str:
        with suppress(subprocess.TimeoutExpired):
            self._processes[number].wait(TERM_S)
        code = self._processes[number].returncode
        how = "closed its socket" if code is None else f"ended with exit code {code}"
        if code is not None and code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
        elif number in self._failures:
            how = f"failed with {self._failures[number]}"
        return (
            f"replica {number} {how} (its output: {self._log(number)}); the other replicas are stopped. What "
            "is saved is good: the same command resumes"
        )

    def _send(self, number: int, message: Any) -> None:
        with suppress(OSError):  # that it is gone is in the inbox
            self._sockets[number].send(message)

    def ask(self, questions: Mapping[int, tuple[Any, ...]]) -> None:
        """Asks some replicas, which begin at once.

        Args:
            questions: method and arguments, by the replica's number.
        """
        for number, question in questions.items():
            self.busy.add(number)
            self._send(number, question)

    def items(self, *, wait: bool) -> Iterator[Any]:
        """What those asked have given one by one so far, or until all have finished."""
        for _, kind, value in self._messages(wait):
            if kind == ITEM:
                yield value

    def answers(self, timeout: float | None = None) -> dict[int, Any]:
        """Their answers, when all have finished.

        Raises:
            ValueError: what one of them raised as such.
            RuntimeError: another failure, or one is gone or late.
        """
        return {n: v for n, kind, v in self._messages(True, timeout) if kind == DONE}

    def _messages(self, wait: bool, timeout: float | None = None) -> Iterator[tuple[int, str, Any]]:
        end = None if timeout is None else time.monotonic() + timeout
        while self.busy:
            left = None if end is None else max(0.0, end - time.monotonic())
            try:
                number, kind, value = self._inbox.get(wait, left)
            except queue.Empty:
                if not wait:
                    return
                late = ", ".join(map(str, sorted(self.busy)))
                raise RuntimeError(
                    f"no answer from replica {late} in {timeout:.0f} s (its output: "
                    f"{self._log(min(self.busy))})"
                ) from None
            if kind == _GONE:
                self._inbox.put((number, kind, value))
                raise RuntimeError(self._death(number))
            if kind != ITEM:
                self.busy.discard(number)
            if kind == FAILED:
                if value.by_user:
                    raise value.error()
                raise RuntimeError(
                    f"replica {number} failed with {value.message} (its output: {self._log(number)})"
                )
            yield number, kind, value

    def settle(self, timeout: float = NOTICE_S) -> None:
        """Waits for answers that nobody needs any more; RuntimeError where a replica is gone or late."""
        self.ask(dict.fromkeys(self.busy, CANCEL))
        end = time.monotonic() + timeout
        while self.busy:
            before = len(self.busy)
            try:
                self.answers(end - time.monotonic())
            except (ValueError, RuntimeError):
                if len(self.busy) == before:  # none that failed: gone or late
                    raise

    def close(self) -> None:
        """Ends the replicas: those that wait for a question by themselves, others at once."""
        self._noticed.set()
        for number, process in self._processes.items():
            if number in self.busy:
                process.terminate()
            else:
                self._send(number, None)
        for number, process in self._processes.items():
            for seconds, harder in ((CLOSE_S, process.terminate), (TERM_S, process.kill)):
                with suppress(subprocess.TimeoutExpired):
                    process.wait(seconds)
                    break
                harder()
            process.wait()
            self._sockets[number].close()


class Replicas(VerifierEngine):
    """The first of several engines that train together, with which the others are used as it is."""

    def __init__(
        self,
        verifier: Verifier | str,
        drafter: str | Path,
        options: EngineOptions,
        count: int,
        folder: Path,
        memory: Mapping[str, Any] | None = None,
    ) -> None:
        """Starts all engines.

        Args:
            verifier, drafter, options, memory: of each engine, as for :class:`VerifierEngine`.
            count: how many there are.
            folder: keeps what the others print.

        Raises:
            RuntimeError: one did not start, or not in ``START_S`` seconds.
        """
        start_guard()
        self.count, self._ranks_of_one = count, options.ranks
        self._owners: dict[str, int] = {}
        self.others = Others([sys.executable, "-m", "vllm_dflash.training.replica"], folder)
        before = dict(os.environ)
        own, *environments = replica_environments(count, options.ranks)
        try:
            for number, environment in enumerate(environments, start=1):
                self.others.start(number, environment, verifier, drafter, options, memory)
            os.environ.update(own)
            if "OMP_NUM_THREADS" in own:
                torch.set_num_threads(int(own["OMP_NUM_THREADS"]))
            super().__init__(verifier, drafter, options, memory=memory)
            self._environment = before
            self.others.answers(START_S)
            ports = free_ports()
            self.others.ask({n: ("join", ports, n, count) for n in range(1, count)})
            self.join(ports, 0, count)
            self.others.answers()
        except BaseException:
            self.others.close()
            raise

    def call_ranks(self, command: str, *args: Any) -> list[Any]:
        """A command of the sessions of all replicas; the answers of their ranks, in their order."""
        self.others.settle()  # an extraction that was left early
        self.others.ask(dict.fromkeys(range(1, self.count), ("call_ranks", command, *args)))
        try:
            own = super().call_ranks(command, *args)
            answers = self.others.answers()
        except Exception:
            # An error of one rank is one of all; if a replica is gone, that is the error to tell.
            self.others.settle()
            raise
        return [*own, *(answer for n in sorted(answers) for answer in answers[n])]

    def register(
        self,
        examples: Sequence[tuple[str, list[int], list[bool], str]],
        owners: Mapping[str, int],
    ) -> None:
        self._owners = dict(owners)
        super().register(examples, owners)

    def generator(
        self, sampling: SamplingOptions
    ) -> Callable[[list[GenerationRequest]], Iterator[GenerationResult]]:
        own = super().generator(sampling)

        def generate(requests: list[GenerationRequest]) -> Iterator[GenerationResult]:
            shares = {n: requests[n :: self.count] for n in range(self.count)}
            questions = {
                n: ("generate", part, sampling) for n, part in shares.items() if n and part
            }
            mine = {r.key for r in shares[0]}
            for result in self._shared(own(shares[0]), questions):
                if result.key not in mine:
                    self.generated.tokens += len(result.token_ids)
                    self.generated.finished += 1
                    self.generated.finished_tokens += len(result.token_ids)
                yield result

        return generate

    def extract(self, examples: Mapping[str, Sequence[int]]) -> Iterator[tuple[str, str | None]]:
        """As of one engine; each extracts the sequences that its ranks own."""
        shares: dict[int, dict[str, Sequence[int]]] = {n: {} for n in range(self.count)}
        for key, ids in examples.items():
            shares[self._owners[key] // self._ranks_of_one][key] = ids
        questions = {n: ("extract", part) for n, part in shares.items() if n and part}
        yield from self._shared(super().extract(shares[0]), questions)

    def _shared(self, own: Iterator[T], questions: Mapping[int, tuple[Any, ...]]) -> Iterator[T]:
        """What this engine gives one by one, and the others when they are asked."""
        self.others.ask(questions)
        try:
            for item in own:
                yield item
                yield from self.others.items(wait=False)
            yield from self.others.items(wait=True)
        except (Exception, GeneratorExit):
            self.others.settle()
            raise

    def close(self) -> None:
        self.others.close()
        super().close()


def free_ports() -> tuple[int, int]:
    """Two ports of this machine that nobody listens on."""
    with (
        socket.create_server(("127.0.0.1", 0)) as one,
        socket.create_server(("127.0.0.1", 0)) as two,
    ):
        return one.getsockname()[1], two.getsockname()[1]


def replica_environments(count: int, ranks: int) -> list[dict[str, str]]:
    """The environment of each replica's process: its own devices, or its part of the cores.

    Args:
        count: of replicas.
        ranks: of each.

    Raises:
        ValueError: there are too few devices.
    """
    devices = visible_devices()
    if devices and len(devices) < count * ranks:
        raise ValueError(
            f"--data-parallel-size {count} with {ranks} ranks each needs {count * ranks} GPUs, here are "
            f"{len(devices)}"
        )
    environments = [dict(os.environ) for _ in range(count)]
    for number, environment in enumerate(environments):
        if devices:
            own = devices[number * ranks : (number + 1) * ranks]
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(own)
        else:
            threads = max(1, torch.get_num_threads() // count)
            environment.setdefault("OMP_NUM_THREADS", str(threads))
    return environments


def visible_devices() -> list[str]:
    """The GPUs that CUDA shows to this process, as ``CUDA_VISIBLE_DEVICES`` names them."""
    num_gpus = len(gpu_memory()) if torch.version.cuda else 0
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",") if given and num_gpus else [str(i) for i in range(num_gpus)]
