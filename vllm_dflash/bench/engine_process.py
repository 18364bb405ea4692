"""One serving engine in its own process, driven over a socket with JSON messages.

A benchmark that compares engines needs them alive at the same time (to measure them alternating)
and apart (one vLLM engine a process; plugins and compile caches are per process). So the parent
holds an :class:`EngineProcess` per engine, and the child (``python -m
vllm_dflash.bench.engine_process``) owns a vLLM ``AsyncLLM`` and measures where the tokens arrive.

The messages travel over a socket pair of their own: whatever vLLM prints goes to the log file and
cannot corrupt them. They are JSON, never pickle. The parent sends the spec first, then commands::

    parent -> child   {"model": ..., "engine_args": ..., "speculative_config": ...}
    child  -> parent  {"event": "ready", "startup_s": ..., "plugin_active": ...}
    parent -> child   {"cmd": "run", "prompts": [[...]], "max_tokens": [...], "concurrency": ..., ...}
    child  -> parent  {"event": "result", ...} or {"event": "error", "error": ...}
    parent -> child   {"cmd": "sleep"} or {"cmd": "wake"}
    child  -> parent  {"event": "asleep"} or {"event": "awake"}
    parent -> child   {"cmd": "stop"}

This module imports vLLM inside the child's functions only: the parent stays light.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from vllm_dflash import guard
from vllm_dflash.files import writing
from vllm_dflash.processes import start_guard, stopping

#: What a child gets unless the caller's environment or the spec says otherwise.
DEFAULT_ENV = {
    "VLLM_LOGGING_LEVEL": "WARNING",
    # vLLM's ngram proposer uses one numba thread, but numba makes as many as there are cores and
    # waits for the idle ones after each step: 40 times slower on two cores with a busy neighbour.
    "NUMBA_NUM_THREADS": "1",
}
#: Seconds a child that was told to stop has to do so by itself.
STOP_TIMEOUT_S = 20.0
#: Seconds between SIGTERM and SIGKILL for a child that cannot be told.
TERM_TIMEOUT_S = 5.0
#: How often a waiting parent looks whether the child still lives.
POLL_S = 0.2
LOG_TAIL_LINES = 30
#: The last line of a traceback, perhaps behind vLLM's log prefix.
ERROR_LINE = re.compile(r"(?:^|\] )((?:\w+\.)*\w*(?:Error|Exception): \S.*)$", re.MULTILINE)


@dataclass(frozen=True)
class EngineSpec:
    """What one engine is.

    Attributes:
        mode: short name for messages and reports.
        model: path or hub name of the verifier.
        engine_args: further fields of vLLM's ``AsyncEngineArgs``.
        speculative_config: as in ``--speculative-config``; None serves without speculation.
        env: environment of the child on top of the parent's; None unsets a variable.
        log_path: file that gets everything the child and its workers print.
    """

    mode: str
    model: str
    engine_args: Mapping[str, Any] = field(default_factory=dict)
    speculative_config: Mapping[str, Any] | None = None
    env: Mapping[str, str | None] = field(default_factory=dict)
    log_path: str | Path = "engine.log"

    def to_message(self) -> bytes:
        """The part that the child reads; ValueError for what JSON cannot carry."""
        speculative = self.speculative_config
        message = {
            "model": self.model,
            "engine_args": dict(self.engine_args),
            "speculative_config": None if speculative is None else dict(speculative),
        }
        try:
            return json.dumps(message).encode()
        except TypeError as error:
            raise ValueError(
                f"engine_args or speculative_config of {self.mode!r} cannot travel as JSON "
                f"({error}); use plain strings, numbers, lists and dicts"
            ) from error


@dataclass(frozen=True)
class SpecCounters:
    """Speculative counters, or the difference between two readings of them.

    Drafts are counted by vLLM. It also counts draft tokens as accepted that lie behind the end of a response;
    a run's accepted tokens are those delivered, see :mod:`vllm_dflash.modeling.acceptance`.
    """

    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_accepted_tokens_per_pos: tuple[int, ...] = ()

    def __add__(self, other: SpecCounters) -> SpecCounters:
        return self._combine(other, 1)

    def __sub__(self, other: SpecCounters) -> SpecCounters:
        return self._combine(other, -1)

    def _combine(self, other: SpecCounters, sign: int) -> SpecCounters:
        mine, theirs = self.num_accepted_tokens_per_pos, other.num_accepted_tokens_per_pos
        width = max(len(mine), len(theirs))
        mine += (0,) * (width - len(mine))
        theirs += (0,) * (width - len(theirs))
        return SpecCounters(
            self.num_drafts + sign * other.num_drafts,
            self.num_draft_tokens + sign * other.num_draft_tokens,
            self.num_accepted_tokens + sign * other.num_accepted_tokens,
            tuple(a + sign * b for a, b in zip(mine, theirs, strict=True)),
        )

    def delivered(self, tokens_per_step: Iterable[int]) -> SpecCounters:
        """The same drafts with the accepted tokens that were delivered.

        Args:
            tokens_per_step: delivered by each step of each request after its first token. Steps without a
                draft deliver one.
        """
        more = Counter(n - 1 for n in tokens_per_step)
        width = max([len(self.num_accepted_tokens_per_pos), *more])
        per_pos = tuple(sum(c for n, c in more.items() if n > k) for k in range(width))
        return replace(self, num_accepted_tokens=sum(per_pos), num_accepted_tokens_per_pos=per_pos)

    @property
    def acceptance_length(self) -> float | None:
        """Pooled tau: tokens delivered a step with a draft; None when nothing was drafted."""
        return 1 + self.num_accepted_tokens / self.num_drafts if self.num_drafts else None

    @property
    def draft_length(self) -> float | None:
        """Mean number of tokens that a draft had; None when nothing was drafted."""
        return self.num_draft_tokens / self.num_drafts if self.num_drafts else None

    @property
    def acceptance_per_position(self) -> list[float] | None:
        """Share of drafts whose token at each position was accepted."""
        if not self.num_drafts:
            return None
        return [n / self.num_drafts for n in self.num_accepted_tokens_per_pos]


@dataclass(frozen=True)
class RequestResult:
    """One request as its client saw it; times in seconds since it was sent."""

    ttft_s: float
    latency_s: float
    num_output_tokens: int
    output_token_ids: tuple[int, ...]
    finish_reason: str | None

    @property
    def tpot_s(self) -> float | None:
        """Seconds per output token after the first; None for outputs of one token."""
        if self.num_output_tokens < 2:
            return None
        return (self.latency_s - self.ttft_s) / (self.num_output_tokens - 1)


@dataclass(frozen=True)
class RunResult:
    """One closed-loop run; ``requests`` are in the order of the prompts."""

    requests: tuple[RequestResult, ...]
    wall_s: float
    counters: SpecCounters
    warmup: bool = False
    chosen: ChosenLengths | None = None

    @property
    def num_output_tokens(self) -> int:
        return sum(r.num_output_tokens for r in self.requests)

    @property
    def output_tokens_per_s(self) -> float:
        return self.num_output_tokens / self.wall_s

    @classmethod
    def from_message(cls, message: Mapping[str, Any]) -> RunResult:
        counters = dict(message["counters"])
        per_pos = tuple(counters.pop("num_accepted_tokens_per_pos"))
        requests = tuple(
            RequestResult(**{**r, "output_token_ids": tuple(r["output_token_ids"])})
            for r in message["requests"]
        )
        return cls(
            requests=requests,
            wall_s=message["wall_s"],
            counters=SpecCounters(**counters, num_accepted_tokens_per_pos=per_pos),
            warmup=message["warmup"],
            chosen=ChosenLengths(**message["chosen"]) if message.get("chosen") else None,
        )


@dataclass(frozen=True)
class ChosenLengths:
    """What the plugin chose during a run, where it chooses draft lengths.

    Attributes:
        lengths: how often each draft length was chosen for a request, 0 included.
        drafts: drafts that went to the verifier, by source (drafter, lookup).
        proposed, accepted, expected: their tokens, by source.
        steps, drafted_steps: verifier steps without prompts, and those with a draft pass.
        step_seconds, plain_seconds: spent on steps, and what plain ones would have taken for their tokens.
    """

    lengths: dict[str, float] = field(default_factory=dict)
    drafts: dict[str, float] = field(default_factory=dict)
    proposed: dict[str, float] = field(default_factory=dict)
    accepted: dict[str, float] = field(default_factory=dict)
    expected: dict[str, float] = field(default_factory=dict)
    steps: float = 0
    drafted_steps: float = 0
    step_seconds: float = 0
    plain_seconds: float = 0

    def __sub__(self, other: ChosenLengths) -> ChosenLengths:
        return self._combine(other, -1)

    def __add__(self, other: ChosenLengths) -> ChosenLengths:
        return self._combine(other, 1)

    def _combine(self, other: ChosenLengths, sign: int) -> ChosenLengths:
        values: dict[str, Any] = {}
        for f in fields(self):
            mine, theirs = getattr(self, f.name), getattr(other, f.name)
            if isinstance(mine, dict):
                keys = sorted({*mine, *theirs})
                values[f.name] = {k: mine.get(k, 0) + sign * theirs.get(k, 0) for k in keys}
            else:
                values[f.name] = mine + sign * theirs
        return ChosenLengths(**values)

    def tau(self, source: str) -> float | None:
        """Acceptance length of one source's drafts; None where it sent none."""
        drafts = self.drafts.get(source)
        return 1 + self.accepted[source] / drafts if drafts else None

    @property
    def estimated_speedup(self) -> float | None:
        """Over no speculation, by the measured costs of steps; None before the first step."""
        return self.plain_seconds / self.step_seconds if self.step_seconds else None


# -- the parent's side -------------------------------------------------------------------------


class EngineProcess:
    """A serving engine in a child process.

    Leaving the context, or the parent's death by any cause, ends the child and its workers: the
    child watches the socket, and its processes form a session of their own that is ended together
    (so that a Ctrl-C reaches the parent alone, which then closes what it started).

    Every way the child can fail raises RuntimeError with the last lines of its log.
    """

    def __init__(self, spec: EngineSpec) -> None:
        self.spec = spec
        self.log_path = Path(spec.log_path)
        #: The child's ``ready`` message: start-up time and whether the plugin was loaded.
        self.info: dict[str, Any] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._conn: Connection | None = None
        # A child that is building its engine or running prompts reads no commands.
        self._busy = False

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Starts the child and returns at once; :meth:`wait_ready` waits for the engine."""
        if self._process is not None:
            raise RuntimeError(f"engine {self.spec.mode!r} was started already")
        message = self.spec.to_message()
        start_guard()
        with writing(self.log_path):
            self.log_path.parent.mkdir(parents=True, exist_ok=True)
            self.log_path.touch()
        self._conn, child_conn = multiprocessing.Pipe(duplex=True)
        with self.log_path.open("wb") as log, child_conn:
            fd = child_conn.fileno()
            self._process = subprocess.Popen(
                [sys.executable, "-m", "vllm_dflash.bench.engine_process", "--fd", str(fd)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment(),
                pass_fds=(fd,),
                start_new_session=True,
            )
        self._busy = True
        self._send(message)

    def wait_ready(self, timeout: float = 1800.0) -> dict[str, Any]:
        """Waits until the engine can serve.

        Returns:
            ``startup_s``, the seconds from the import of vLLM to the engine's readiness, and
            ``plugin_active``, whether the vllm-dflash plugin was loaded in the child.
        """
        if not self.info:
            self.info = self._receive(timeout, "ready", "starting")
        return self.info

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int | Sequence[int],
        concurrency: int = 1,
        temperature: float = 0.0,
        ignore_eos: bool = False,
        warmup: bool = False,
        timeout: float = 3600.0,
    ) -> RunResult:
        """Sends the prompts in order, keeping ``concurrency`` of them in flight.

        Args:
            prompts: token ids of each prompt.
            max_tokens: output tokens a prompt at most; one number for all, or one for each.
            concurrency: requests in flight; the next is sent when one finishes.
            temperature: 0 is greedy. Above it outputs differ from run to run: requests carry no
                seed, since per-request seeds can kill vLLM's CPU engine.
            ignore_eos: generate ``max_tokens`` even past the end of the text.
            warmup: marks the result as not measured.
            timeout: seconds after which the engine counts as hung.
        """
        if not prompts or not all(prompts):
            raise ValueError(
                f"{len(prompts)} prompts given, "
                f"{sum(not p for p in prompts)} of them empty; give at least one, all with tokens"
            )
        limits = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else list(max_tokens)
        if len(limits) != len(prompts):
            raise ValueError(f"{len(limits)} max_tokens given for {len(prompts)} prompts")
        for name, value in (("max_tokens", min(limits)), ("concurrency", concurrency)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        self.wait_ready()
        command = {
            "cmd": "run",
            "prompts": [list(map(int, p)) for p in prompts],
            "max_tokens": limits,
            "concurrency": concurrency,
            "temperature": temperature,
            "ignore_eos": ignore_eos,
            "warmup": warmup,
        }
        self._busy = True
        self._send(json.dumps(command).encode())
        return RunResult.from_message(self._receive(timeout, "result", "running"))

    def sleep(self, timeout: float = 600.0) -> None:
        """Moves the weights to host memory and drops the KV cache; needs ``enable_sleep_mode``."""
        self._ask("sleep", "asleep", timeout)

    def wake(self, timeout: float = 600.0) -> None:
        """Undoes :meth:`sleep`."""
        self._ask("wake", "awake", timeout)

    def _ask(self, command: str, event: str, timeout: float) -> None:
        self.wait_ready()
        self._busy = True
        self._send(json.dumps({"cmd": command}).encode())
        self._receive(timeout, event, f"told to {command}")

    def close(self) -> None:
        """Ends the child and everything it started. Safe to call at any time, and again."""
        process = self._process
        if process is None:
            return
        family: set[guard.Process] = set()
        if process.poll() is None:
            family = guard.below(process.pid)
            if stopping():
                timeout = 0.0
            elif self._busy:
                _signal_group(process.pid, signal.SIGTERM)
                timeout = TERM_TIMEOUT_S
            else:
                with contextlib.suppress(OSError, RuntimeError):
                    self._send(b'{"cmd": "stop"}')
                timeout = STOP_TIMEOUT_S
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout)
        process.kill()
        process.wait()
        # vLLM's core and workers may outlive the child; what frees their shared memory goes last.
        guard.end(family, 0 if stopping() else guard.GRACE_S)
        _signal_group(process.pid, signal.SIGKILL)
        if self._conn is not None:
            self._conn.close()

    def log_tail(self, num_lines: int = LOG_TAIL_LINES) -> str:
        """The last lines that the child printed, headed by the first error among all of them.

        vLLM's processes pass errors on ("see root cause above"), so the first one is the cause.
        """
        try:
            text = self.log_path.read_text(errors="replace")
        except OSError as error:
            return f"(no log: {error})"
        tail = "\n".join(text.rstrip().splitlines()[-num_lines:])
        first = ERROR_LINE.search(text)
        return f"first error: {first[1]}\n...\n{tail}" if first else tail

    def _environment(self) -> dict[str, str]:
        changes: dict[str, str | None] = dict(self.spec.env)
        env = {**DEFAULT_ENV, **os.environ}
        env |= {k: v for k, v in changes.items() if v is not None}
        return {k: v for k, v in env.items() if changes.get(k, "") is not None}

    def _send(self, message: bytes) -> None:
        if self._conn is None or self._conn.closed:
            raise RuntimeError(f"engine {self.spec.mode!r} is not running; call start() first")
        try:
            self._conn.send_bytes(message)
        except OSError:
            raise self._death("writing to it") from None

    def _receive(self, timeout: float, event: str, doing: str) -> dict[str, Any]:
        if self._conn is None or self._process is None or self._conn.closed:
            raise RuntimeError(f"engine {self.spec.mode!r} is not running; call start() first")
        deadline = time.monotonic() + timeout
        # The end of the socket alone is no proof of death: forked workers hold it open too.
        while not self._conn.poll(POLL_S):
            if self._process.poll() is not None and not self._conn.poll(0):
                raise self._death(doing)
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"engine {self.spec.mode!r} gave no answer in {timeout:.0f} s while {doing}; "
                    f"the end of its log {self.log_path}:\n{self.log_tail()}"
                )
        try:
            message = json.loads(self._conn.recv_bytes())
        except (EOFError, OSError):
            raise self._death(doing) from None
        self._busy = False
        if message["event"] == "error":
            raise RuntimeError(
                f"engine {self.spec.mode!r} failed while {doing}: {message['error']}; "
                f"the end of its log {self.log_path}:\n{self.log_tail()}"
            )
        if message["event"] != event:
            raise RuntimeError(
                f"engine {self.spec.mode!r} answered {message['event']!r} instead of {event!r} "
                f"while {doing} (log: {self.log_path})"
            )
        return message

    def _death(self, doing: str) -> RuntimeError:
        assert self._process is not None
        # The socket may break a moment before the process can be waited for.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(TERM_TIMEOUT_S)
        return RuntimeError(
            f"engine {self.spec.mode!r} died while {doing} (exit status "
            f"{self._process.returncode}); the end of its log {self.log_path}:\n{self.log_tail()}"
        )


def _signal_group(pid: int, signum: signal.Signals) -> None:
    """Signals the session that a child leads; no error when nothing of it is left."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signum)


# -- the child's side --------------------------------------------------------------------------


def _read_commands(conn: Connection, commands: queue.SimpleQueue[dict[str, Any]]) -> None:
    """Thread: hands on the parent's commands; when the parent is gone, sees that we go too."""
    while True:
        try:
            command = json.loads(conn.recv_bytes())
        except (EOFError, OSError):
            commands.put({"cmd": "stop"})
            time.sleep(TERM_TIMEOUT_S)
            # Still here: the main thread is building the engine or running prompts.
            if os.getpgrp() == os.getpid():
                _signal_group(os.getpid(), signal.SIGKILL)
            os._exit(1)
        commands.put(command)


def _counters(prefix: str) -> Iterator[tuple[str, dict[str, str], float]]:
    """Name without ``prefix`` and ``_total``, labels and value of this process' Prometheus counters."""
    from prometheus_client import REGISTRY

    suffix = "_total"
    for metric in REGISTRY.collect():
        if metric.name.startswith(prefix):
            for sample in metric.samples:
                if sample.name.endswith(suffix):
                    yield sample.name[len(prefix) : -len(suffix)], sample.labels, sample.value


def _speculative_counters() -> SpecCounters:
    """vLLM's counters as this process knows them, summed over the engines (data parallelism)."""
    totals: dict[str, int] = {}
    per_pos: dict[int, int] = {}
    for name, labels, value in _counters("vllm:spec_decode_"):
        if name == "num_accepted_tokens_per_pos":
            pos = int(labels["position"])
            per_pos[pos] = per_pos.get(pos, 0) + int(value)
        else:
            totals[name] = totals.get(name, 0) + int(value)
    return SpecCounters(
        num_drafts=totals.get("num_drafts", 0),
        num_draft_tokens=totals.get("num_draft_tokens", 0),
        num_accepted_tokens=totals.get("num_accepted_tokens", 0),
        num_accepted_tokens_per_pos=tuple(per_pos[i] for i in sorted(per_pos)),
    )


def _chosen_lengths() -> ChosenLengths | None:
    """The plugin's figures of chosen draft lengths; None where it does not choose them."""
    values: dict[str, Any] = {}
    for name, labels, value in _counters("vllm_dflash:"):
        name = {"draft_length": "lengths"}.get(name, name.removesuffix("_tokens"))
        label = labels.get("length") or labels.get("source")
        if label is None:
            values[name] = value
        else:
            values.setdefault(name, {})[label] = value
    return ChosenLengths(**values) if values else None


def _watch_steps(output_processor: Any) -> dict[str, list[int]]:
    """Tokens that each step of each request delivers from now on, by vLLM's id of the request.

    They are read where a step's results reach the front end, cut off at the end of the response. A client
    can get those of two steps at once.
    """
    from vllm_dflash.serving import patching

    steps: dict[str, list[int]] = {}
    process = output_processor.process_outputs

    def process_outputs(engine_core_outputs: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        for output in engine_core_outputs:
            if output.new_token_ids:
                steps.setdefault(output.request_id, []).append(len(output.new_token_ids))
        return process(engine_core_outputs, *args, **kwargs)

    patching.replace(output_processor, "process_outputs", process_outputs)
    return steps


async def _generate(
    engine: Any,
    request_id: str,
    prompt: list[int],
    max_tokens: int,
    command: Mapping[str, Any],
) -> RequestResult:
    """Sends one request and times its tokens."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=command["temperature"],
        ignore_eos=command["ignore_eos"],
        # Text is not needed, and turning tokens into it costs every mode the same.
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )
    token_ids: list[int] = []
    finish_reason = None
    first = last = start = time.perf_counter()
    async for output in engine.generate({"prompt_token_ids": prompt}, params, request_id):
        completion = output.outputs[0]
        last = time.perf_counter()
        if completion.token_ids and not token_ids:
            first = last
        token_ids.extend(completion.token_ids)
        finish_reason = completion.finish_reason
    return RequestResult(
        ttft_s=first - start,
        latency_s=last - start,
        num_output_tokens=len(token_ids),
        output_token_ids=tuple(token_ids),
        finish_reason=finish_reason,
    )


async def _run(
    engine: Any, steps: dict[str, list[int]], run_id: int, command: Mapping[str, Any]
) -> RunResult:
    """The closed loop: each of ``concurrency`` clients takes the next prompt when it is free.

    Args:
        steps: of :func:`_watch_steps`.
    """
    prompts: list[list[int]] = command["prompts"]
    results: list[RequestResult | None] = [None] * len(prompts)
    todo: Iterator[tuple[int, list[int]]] = iter(enumerate(prompts))

    async def client() -> None:
        for i, prompt in todo:
            limit = command["max_tokens"][i]
            results[i] = await _generate(engine, f"run{run_id}-{i}", prompt, limit, command)

    steps.clear()
    before, chosen_before = _speculative_counters(), _chosen_lengths()
    start = time.perf_counter()
    tasks = [asyncio.create_task(client()) for _ in range(command["concurrency"])]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    wall_s = time.perf_counter() - start
    # AsyncLLM records a step's statistics before it wakes the clients, so all of them are in.
    counters = _speculative_counters() - before
    # A request's first token comes with its prompt.
    counters = counters.delivered(n for request in steps.values() for n in request[1:])
    # The worker publishes a few times a second: the last steps count in the next run.
    chosen = _chosen_lengths()
    if chosen is not None:
        chosen -= chosen_before or ChosenLengths()
    done = tuple(r for r in results if r)
    return RunResult(done, wall_s, counters, bool(command["warmup"]), chosen)


async def _answer(
    engine: Any, steps: dict[str, list[int]], run_id: int, command: Mapping[str, Any]
) -> dict[str, Any]:
    """Follows a command other than ``stop``."""
    if command["cmd"] == "sleep":
        await engine.sleep(level=1)
        return {"event": "asleep"}
    if command["cmd"] == "wake":
        await engine.wake_up()
        return {"event": "awake"}
    return {"event": "result", **asdict(await _run(engine, steps, run_id, command))}


async def _serve(
    spec: Mapping[str, Any], conn: Connection, commands: queue.SimpleQueue[dict[str, Any]]
) -> None:
    """Builds the engine, says so, and answers commands until told to stop."""
    start = time.perf_counter()
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    args = AsyncEngineArgs(
        **{
            "model": spec["model"],
            "speculative_config": spec["speculative_config"],
            **spec["engine_args"],
            # The speculative counters are statistics.
            "disable_log_stats": False,
        }
    )
    # The context decides vLLM's default batch sizes: those of `vllm serve`.
    engine = AsyncLLM.from_engine_args(args, usage_context=UsageContext.OPENAI_API_SERVER)
    reply: dict[str, Any] = {
        "event": "ready",
        "startup_s": time.perf_counter() - start,
        "plugin_active": "vllm_dflash.plugin" in sys.modules,
    }
    steps = _watch_steps(engine.output_processor)
    try:
        run_id = 0
        while True:
            conn.send_bytes(json.dumps(reply).encode())
            command = await asyncio.to_thread(commands.get)
            if command["cmd"] == "stop":
                return
            run_id += 1
            try:
                reply = await _answer(engine, steps, run_id, command)
            except Exception as error:
                # The engine may be fine (a prompt was too long): the parent decides.
                traceback.print_exc()
                reply = {"event": "error", "error": f"{type(error).__name__}: {error}"}
    finally:
        engine.shutdown()


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the child; not for users."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fd", type=int, required=True, help="socket inherited from the parent")
    fd = parser.parse_args(argv).fd
    os.set_inheritable(fd, False)
    conn = Connection(fd)
    spec = json.loads(conn.recv_bytes())
    commands: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_read_commands, args=(conn, commands), daemon=True).start()
    # BrokenPipeError: the parent went away, nobody is left to tell.
    with contextlib.suppress(BrokenPipeError):
        asyncio.run(_serve(spec, conn, commands))


if __name__ == "__main__":
    main()
