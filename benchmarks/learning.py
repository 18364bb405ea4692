"""A server that learns from its traffic, by a seeded client over HTTP.

    python benchmarks/learning.py drift VERIFIER DRAFTER --own A.jsonl --foreign B.jsonl --test B-test.jsonl
    python benchmarks/learning.py cold VERIFIER --own A.jsonl --test A-test.jsonl
    python benchmarks/learning.py cost|waiting VERIFIER DRAFTER --own A.jsonl
    python benchmarks/learning.py swaps VERIFIER DRAFTER --own A.jsonl --requests 5000

``drift``: the drafter was trained on traffic A and the server gets traffic B. tau on B's test prompts (never
learned from) is read from vLLM's counters after each lot of requests, drafts all of full length. With
``--weights off --requests 0`` it measures a drafter that does not learn. ``cold``: from ``"model": "auto"``,
tokens/s beside a server without speculation that takes turns. ``cost``: full load, learning on and off in
turns in one server. ``waiting``: the same of times to the first token, at half load.
``swaps``: a version is put in place every few seconds while requests run, and every answer is compared with
that of a server without speculation, in fp32.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import signal
import socket
import statistics
import string
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from vllm_dflash.bench.report import write_json
from vllm_dflash.environment import describe_machine, set_cpu_defaults, versions
from vllm_dflash.learning.control import send

_WAIT = 900.0
#: Seconds between the turns of two servers: a worker polls for its next batch for a second after the last.
_SETTLE = 2.0
#: ``messages``, and ``temperature`` and ``source`` where they are not 0 and "".
Prompt = dict[str, Any]


class Server:
    """``vllm serve`` in a process of its own.

    Args:
        speculative: its speculative configuration, None for none.
        args: further options.
    """

    def __init__(
        self, verifier: str, speculative: dict[str, Any] | None, args: Sequence[str]
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", verifier]
        command += [
            "--served-model-name",
            "model",
            "--port",
            str(port),
            "--host",
            "127.0.0.1",
            *args,
        ]
        if speculative is not None:
            command += ["--speculative-config", json.dumps(speculative)]
        self.log = tempfile.NamedTemporaryFile("w+", suffix=".log")  # noqa: SIM115
        self.process = subprocess.Popen(
            command, stdout=self.log, stderr=subprocess.STDOUT, start_new_session=True
        )
        deadline = time.monotonic() + _WAIT
        while True:
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
                return
            except (urllib.error.URLError, OSError):
                if self.process.poll() is not None or time.monotonic() > deadline:
                    self.close()
                    tail = Path(self.log.name).read_text()[-3000:]
                    raise RuntimeError(f"the server did not start:\n{tail}") from None
                time.sleep(1)

    def ask(self, prompt: Prompt, max_tokens: int, learn: bool = True) -> dict[str, Any]:
        """The answer's text, its tokens, and the seconds that it took; ``error`` where it failed."""
        xargs = {"dflash_learn": str(learn).lower(), "dflash_source": prompt.get("source", "")}
        body = {
            "model": "model",
            "messages": prompt["messages"],
            "max_tokens": max_tokens,
            "temperature": prompt.get("temperature", 0),
            "vllm_xargs": xargs,
        }
        request = urllib.request.Request(
            f"{self.url}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        started = time.monotonic()
        try:
            with urllib.request.urlopen(request, timeout=600) as answer:
                raw = json.loads(answer.read())
        except (urllib.error.URLError, OSError) as error:
            return {"error": str(error), "text": "", "tokens": 0, "seconds": 0.0}
        return {
            "text": raw["choices"][0]["message"]["content"],
            "tokens": raw["usage"]["completion_tokens"],
            "seconds": time.monotonic() - started,
        }

    def ask_all(
        self, prompts: Sequence[Prompt], max_tokens: int, concurrency: int, learn: bool = True
    ) -> list[dict[str, Any]]:
        with ThreadPoolExecutor(concurrency) as pool:
            return list(pool.map(lambda p: self.ask(p, max_tokens, learn), prompts))

    def first_tokens(
        self, prompts: Sequence[Prompt], max_tokens: int, rate: float, seed: int, learn: bool
    ) -> list[float]:
        """Seconds until the first token of each request; so many arrive a second, by a Poisson process."""
        rng = random.Random(seed)

        def ask(prompt: Prompt) -> float:
            body = {
                "model": "model",
                "messages": prompt["messages"],
                "max_tokens": max_tokens,
                "temperature": 0,
                "stream": True,
                "vllm_xargs": {"dflash_learn": str(learn).lower()},
            }
            request = urllib.request.Request(
                f"{self.url}/v1/chat/completions",
                json.dumps(body).encode(),
                {"Content-Type": "application/json"},
            )
            started, first = time.monotonic(), None
            with urllib.request.urlopen(request, timeout=600) as answer:
                for line in answer:
                    if first is None and b'"content":"' in line and b'"content":""' not in line:
                        first = time.monotonic() - started
            if first is None:
                raise RuntimeError("an answer without a token")
            return first

        with ThreadPoolExecutor(64) as pool:
            jobs = []
            for prompt in prompts:
                time.sleep(rng.expovariate(rate))
                jobs.append(pool.submit(ask, prompt))
            return [job.result() for job in jobs]

    def counters(self) -> dict[str, float]:
        """Sums of the metrics over their labels."""
        out: dict[str, float] = {}
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=60) as answer:
            for line in answer.read().decode().splitlines():
                if not line.startswith("#"):
                    name, value = line.split("{")[0].split()[0], line.rsplit(" ", 1)[1]
                    out[name] = out.get(name, 0.0) + float(value)
        return out

    def tau(self, prompts: Sequence[Prompt], max_tokens: int, concurrency: int) -> float:
        """Of these prompts, which are not learned from."""
        before = self.counters()
        self.ask_all(prompts, max_tokens, concurrency, learn=False)
        after = self.counters()
        drafts, accepted = (
            after[f"vllm:spec_decode_num_{n}_total"] - before[f"vllm:spec_decode_num_{n}_total"]
            for n in ("drafts", "accepted_tokens")
        )
        return 1 + accepted / drafts if drafts else 1.0

    def memory_gib(self) -> float:
        """Resident, of all its processes."""
        server = psutil.Process(self.process.pid)
        processes = [server, *server.children(recursive=True)]
        return round(sum(p.memory_info().rss for p in processes) / 2**30, 2)

    def close(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(60)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


@contextmanager
def serving(
    verifier: str, speculative: dict[str, Any] | None, args: Sequence[str]
) -> Iterator[Server]:
    server = Server(verifier, speculative, args)
    try:
        yield server
    finally:
        server.close()


def load_prompts(path: Path) -> list[Prompt]:
    """Messages up to the last user turn of each row."""
    out = []
    for line in path.read_text().splitlines():
        messages = json.loads(line)["messages"]
        last = max(i for i, m in enumerate(messages) if m["role"] == "user")
        out.append({"messages": messages[: last + 1]})
    return out


def nonsense(number: int, seed: int) -> list[Prompt]:
    """What one client floods a server with: noise, answered at a temperature that makes noise of it."""
    rng = random.Random(seed)

    def word() -> str:
        return "".join(rng.choices(string.ascii_letters + string.digits, k=rng.randint(2, 9)))

    return [
        {
            "messages": [{"role": "user", "content": " ".join(word() for _ in range(30))}],
            "temperature": 2.0,
            "source": "flood",
        }
        for _ in range(number)
    ]


def wait_until_learned(folder: Path, seconds: float = 600) -> dict[str, Any]:
    """The server's status once it has nothing left to learn, and to compare."""
    deadline, slices = time.monotonic() + seconds, -1
    while True:
        time.sleep(3.0)
        status: dict[str, Any] = json.loads((folder / "status.json").read_text())
        idle = status["slices"] == slices and status["to_learn"] == 0
        if idle or status["state"] != "learning" or time.monotonic() > deadline:
            return status
        slices = status["slices"]


def drift(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row a measurement: requests of B so far, tau on both test sets."""
    own, foreign, test = (load_prompts(p) for p in (args.own, args.foreign, args.test))
    random.Random(args.seed).shuffle(foreign)
    earlier = load_prompts(args.own_traffic) if args.own_traffic else []
    num_own, num_noise = (
        int(args.requests * share) for share in (args.share_own, args.share_noise)
    )
    foreign = foreign[: args.requests - num_own - num_noise]
    # Other prompts of A than those that come first.
    foreign += earlier[len(earlier) - num_own :] + nonsense(num_noise, args.seed)
    random.Random(args.seed).shuffle(foreign)
    own = own[: len(test)]
    learn = args.folder / f"learn-{args.weights}"
    shutil.rmtree(learn, ignore_errors=True)
    spec = {"method": "dflash", "model": args.drafter, "dflash_draft_length": "fixed"}
    if args.weights != "off":
        spec |= {"dflash_learn": str(learn), "dflash_learn_weights": args.weights}
    spec |= json.loads(args.options)
    rows, failed = [], 0
    with serving(args.verifier, spec, args.engine) as server:

        def measure(requests: int) -> None:
            status = wait_until_learned(learn) if rows and learn.is_dir() else {}
            rows.append(
                {
                    "traffic_kind": "drift",
                    "weights": args.weights,
                    "requests_b": requests,
                    "seconds": round(time.monotonic() - started, 1),
                    "tau_a": round(server.tau(own, args.max_tokens, args.concurrency), 4),
                    "tau_b": round(server.tau(test, args.max_tokens, args.concurrency), 4),
                    "version": status.get("version", 0),
                    "steps": status.get("steps", 0),
                    "learn_seconds": round(status.get("seconds", 0), 1),
                    "longest_slice_ms": round(1000 * status.get("longest_slice_seconds", 0)),
                    "promotions": status.get("promotions", 0),
                    "rollbacks": status.get("rollbacks", 0),
                    "error": status.get("error", ""),
                    "requests_failed": failed,
                    "memory_gib": server.memory_gib(),
                    "disk_mib": disk_mib(learn),
                }
            )
            print(json.dumps(rows[-1]), flush=True)

        server.ask_all(test[:4], args.max_tokens, args.concurrency, learn=False)
        started = time.monotonic()
        measure(0)
        # The traffic that the drafter knows comes first.
        if args.requests_own:
            answers = server.ask_all(
                earlier[: args.requests_own], args.max_tokens, args.concurrency
            )
            failed += sum("error" in a for a in answers)
            measure(0)
        for at in range(0, len(foreign), args.lot):
            lot = foreign[at : at + args.lot]
            failed += sum(
                "error" in a for a in server.ask_all(lot, args.max_tokens, args.concurrency)
            )
            measure(at + len(lot))
    return rows


def cold(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row a lot of requests: tokens/s with and without, taking turns."""
    own, test = load_prompts(args.own)[: args.requests], load_prompts(args.test)
    learn = args.folder / "learn-cold"
    shutil.rmtree(learn, ignore_errors=True)
    spec = {
        "method": "dflash",
        "model": "auto",
        "dflash_learn": str(learn),
        "dflash_learn_weights": "all",
        **json.loads(args.options),
    }
    rows: list[dict[str, Any]] = []
    with (
        serving(args.verifier, None, args.engine) as plain,
        serving(args.verifier, spec, args.engine) as server,
    ):
        for one in (plain, server):
            one.ask_all(test, args.max_tokens, args.concurrency, learn=False)
        started = time.monotonic()
        for at in range(0, len(own) + 1, args.lot):
            status = wait_until_learned(learn) if at else {}
            ratios, taus = [], 0.0
            for repeat in range(args.repeats):
                speeds = {}
                for one in (server, plain) if repeat % 2 else (plain, server):
                    time.sleep(_SETTLE)
                    begun = time.monotonic()
                    answers = one.ask_all(test, args.max_tokens, args.concurrency, learn=False)
                    speeds[one] = sum(a["tokens"] for a in answers) / (time.monotonic() - begun)
                ratios.append(speeds[server] / speeds[plain])
            counted = server.counters()
            taus = counted.get("vllm_dflash:drafter_acceptance_length", 1.0)
            rows.append(
                {
                    "traffic_kind": "cold start",
                    "requests": at,
                    "seconds": round(time.monotonic() - started, 1),
                    "speed_ratio": round(statistics.median(ratios), 3),
                    "speed_ratio_lowest": round(min(ratios), 3),
                    "speed_ratio_highest": round(max(ratios), 3),
                    "tau_since_start": round(taus, 3),
                    "version": status.get("version", 0),
                    "steps": status.get("steps", 0),
                    "promotions": status.get("promotions", 0),
                    "error": status.get("error", ""),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
            server.ask_all(own[at : at + args.lot], args.max_tokens, args.concurrency)
    return rows


@contextmanager
def learning(args: argparse.Namespace) -> Iterator[tuple[Server, Path]]:
    """A server that learns, warm. Prompts come twice, so that nothing may be cached."""
    learn = args.folder / f"learn-{args.what}"
    shutil.rmtree(learn, ignore_errors=True)
    spec = {"method": "dflash", "model": args.drafter, **json.loads(args.options)}
    spec["dflash_learn"] = str(learn)
    engine = [*args.engine, "--no-enable-prefix-caching"]
    with serving(args.verifier, spec, engine) as server:
        server.ask_all(load_prompts(args.own)[:16], args.max_tokens, args.concurrency)
        yield server, learn


def in_turns(learn: Path, repeat: int) -> Iterator[str]:
    """``on`` and ``off``, in an order that alternates; learning is resumed and paused for it."""
    for name in ("off", "on") if repeat % 2 else ("on", "off"):
        send(learn, "resume" if name == "on" else "pause", seconds=60)
        yield name


def interval(logs: Sequence[float]) -> tuple[float, float, float]:
    """Geometric mean of ratios given as logarithms, and its 95 % interval by a bootstrap over pairs."""
    values = np.asarray(logs)
    draws = np.random.default_rng(0).choice(values, (4000, len(values))).mean(axis=1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return tuple(round(float(np.exp(x)), 4) for x in (values.mean(), low, high))  # type: ignore[return-value]


def cost(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row a pair of windows with the same requests under full load, learning on and off; one of all pairs.

    Off: paused, and the requests stay out of what is learned from.
    """
    own, rows, logs = load_prompts(args.own)[16:], [], []
    with learning(args) as (server, learn):
        for repeat in range(args.repeats):
            row: dict[str, Any] = {"traffic_kind": "cost", "repeat": repeat}
            prompts = own[repeat * args.requests : (repeat + 1) * args.requests]
            for name in in_turns(learn, repeat):
                begun = time.monotonic()
                answers = server.ask_all(
                    prompts, args.max_tokens, args.concurrency, learn=name == "on"
                )
                seconds = time.monotonic() - begun
                row[f"tokens_per_s_{name}"] = round(sum(a["tokens"] for a in answers) / seconds, 2)
            row["ratio"] = round(row["tokens_per_s_on"] / row["tokens_per_s_off"], 4)
            logs.append(math.log(row["ratio"]))
            rows.append(row | slices(learn))
            print(json.dumps(rows[-1]), flush=True)
    mean, low, high = interval(logs)
    rows.append({"traffic_kind": "cost", "ratio": mean, "ratio_low": low, "ratio_high": high})
    print(json.dumps(rows[-1]), flush=True)
    return rows


def waiting(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row a pair of windows: times to the first token, learning on and off; one of all windows.

    Requests arrive at ``--rate``, or at half of what the server can do.
    """
    own, rows = load_prompts(args.own)[16:], []
    times: dict[str, list[float]] = {"on": [], "off": []}

    def percentiles(name: str, seconds: Sequence[float]) -> dict[str, int]:
        return {
            f"ttft_ms_p{share}_{name}": round(1000 * float(np.percentile(seconds, share)))
            for share in (50, 90, 99)
        }

    with learning(args) as (server, learn):
        send(learn, "pause", seconds=60)
        begun = time.monotonic()
        server.ask_all(own[:48], args.max_tokens, 8, learn=False)
        rate = args.rate or round(0.5 * 48 / (time.monotonic() - begun), 3)
        for repeat in range(args.repeats):
            row: dict[str, Any] = {"traffic_kind": "waiting", "repeat": repeat, "rate": rate}
            prompts = own[repeat * args.requests : (repeat + 1) * args.requests]
            for name in in_turns(learn, repeat):
                got = server.first_tokens(
                    prompts, args.max_tokens, rate, args.seed + repeat, learn=name == "on"
                )
                times[name] += got
                row |= percentiles(name, got)
            rows.append(row | slices(learn))
            print(json.dumps(rows[-1]), flush=True)
    rows.append({"traffic_kind": "waiting", "rate": rate, "requests": len(times["on"])})
    for name, seconds in times.items():
        rows[-1] |= percentiles(name, seconds)
    print(json.dumps(rows[-1]), flush=True)
    return rows


def slices(learn: Path) -> dict[str, Any]:
    status = json.loads((learn / "status.json").read_text())
    longest = round(1000 * status["longest_slice_seconds"])
    return {n: status[n] for n in ("steps", "slices", "error")} | {"longest_slice_ms": longest}


def disk_mib(folder: Path) -> float:
    return round(sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) / 2**20, 1)


class Swapper(threading.Thread):
    """Puts the versions of a learning server in place, one after the other, while it serves.

    Attributes:
        swapped: how often each version came to serve, by the server's own status.
        memory, disk: GiB of its processes and MiB of its folder, at each swap.
    """

    def __init__(self, server: Server, learn: Path, every: float) -> None:
        super().__init__(daemon=True)
        self.server, self.learn, self.every = server, learn, every
        self.swapped: Counter[int] = Counter()
        self.memory: list[float] = []
        self.disk: list[float] = []
        self.error: Exception | None = None
        self._end = threading.Event()

    def run(self) -> None:
        try:
            while not self._end.wait(self.every):
                versions = sorted(int(p.name) for p in (self.learn / "versions").iterdir())
                self._swap(versions[self.swapped.total() % len(versions)])
        except Exception as error:  # raised again by stop()
            self.error = error

    def _swap(self, version: int) -> None:
        send(self.learn, "promote", version, seconds=60)
        deadline = time.monotonic() + 60
        while json.loads((self.learn / "status.json").read_text())["version"] != version:
            if time.monotonic() > deadline:
                raise RuntimeError(f"version {version} does not come to serve")
            time.sleep(0.2)
        self.swapped[version] += 1
        self.memory.append(self.server.memory_gib())
        self.disk.append(disk_mib(self.learn))

    def stop(self) -> None:
        self._end.set()
        self.join()
        if self.error is not None:
            raise self.error


def swaps(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row a lot: requests that failed, and answers other than those without speculation."""
    prompts = load_prompts(args.own)
    random.Random(args.seed).shuffle(prompts)
    prompts = [prompts[i % len(prompts)] for i in range(args.requests)]
    learn = args.folder / "learn-swaps"
    shutil.rmtree(learn, ignore_errors=True)
    engine = [*args.engine, "--dtype", "float32"]
    spec = {"method": "dflash", "model": args.drafter, "dflash_learn": str(learn)}
    spec |= json.loads(args.options)
    with serving(args.verifier, None, engine) as plain:
        distinct = {json.dumps(p): p for p in prompts}
        answers = plain.ask_all(list(distinct.values()), args.max_tokens, args.concurrency)
        right = {key: a["text"] for key, a in zip(distinct, answers, strict=True)}
    other = failed = done = 0
    rows = []
    with serving(args.verifier, spec, engine) as server:
        # Enough that a dozen are held out, so that something can be promoted.
        server.ask_all(prompts[: args.requests_own], args.max_tokens, args.concurrency)
        learned = wait_until_learned(learn, args.learn_seconds)
        if len(list((learn / "versions").iterdir())) < 2:
            raise RuntimeError(
                f"nothing was promoted, so there is no other version to put in place: {learned}"
            )
        begun, swapper = time.monotonic(), Swapper(server, learn, args.swap_seconds)
        swapper.start()
        while done < len(prompts):
            lot = prompts[done : done + args.lot]
            for prompt, answer in zip(
                lot, server.ask_all(lot, args.max_tokens, args.concurrency), strict=True
            ):
                failed += "error" in answer
                other += answer["text"] != right[json.dumps(prompt)]
            done += len(lot)
            swapped = dict(sorted(swapper.swapped.items()))
            rows.append(
                {
                    "traffic_kind": "swaps",
                    "requests": done,
                    "requests_failed": failed,
                    "outputs_changed": other,
                    "swaps": sum(swapped.values()),
                    "swaps_by_version": {str(v): n for v, n in swapped.items()},
                    "seconds": round(time.monotonic() - begun, 1),
                    "memory_gib": server.memory_gib(),
                    "memory_gib_highest": max(swapper.memory, default=0.0),
                    "disk_mib_highest": max(swapper.disk, default=0.0),
                    "promotions_by_itself": learned["promotions"],
                    "error": json.loads((learn / "status.json").read_text())["error"],
                }
            )
            print(json.dumps(rows[-1]), flush=True)
        swapper.stop()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=("drift", "cold", "cost", "waiting", "swaps"))
    parser.add_argument("verifier")
    parser.add_argument("drafter", nargs="?")
    parser.add_argument("--own", type=Path, required=True)
    parser.add_argument("--own-traffic", type=Path, help="what the server gets of A")
    parser.add_argument("--requests-own", type=int, default=64, help="of A, before B or swaps come")
    parser.add_argument("--share-own", type=float, default=0.0, help="of --requests that are of A")
    parser.add_argument(
        "--share-noise", type=float, default=0.0, help="that are a flood of nonsense"
    )
    parser.add_argument("--foreign", type=Path)
    parser.add_argument("--test", type=Path)
    parser.add_argument("--requests", type=int, default=320)
    parser.add_argument("--lot", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--rate", type=float, default=0.0, help="requests that arrive a second")
    parser.add_argument("--swap-seconds", type=float, default=5.0, help="between two swaps")
    parser.add_argument(
        "--learn-seconds", type=float, default=600.0, help="at most, before the swaps begin"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--weights", default="decode", help="dflash_learn_weights; off does not learn"
    )
    parser.add_argument("--options", default="{}", help="JSON of more speculative options")
    parser.add_argument(
        "--engine", nargs="*", default=["--enforce-eager", "--max-model-len", "2048"]
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()) / "dflash-learning"
    )
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    set_cpu_defaults(kv_gib=1)
    runs = {"drift": drift, "cold": cold, "cost": cost, "waiting": waiting, "swaps": swaps}
    rows = runs[args.what](args)
    if args.output is not None:
        settings = {
            k: str(v) if isinstance(v, Path) else v
            for k, v in vars(args).items()
            if k
            in (
                "what",
                "requests",
                "lot",
                "max_tokens",
                "concurrency",
                "weights",
                "seed",
                "engine",
                "options",
                "requests_own",
                "share_own",
                "share_noise",
                "swap_seconds",
            )
        }
        report = {
            "machine": describe_machine(),
            "versions": versions(),
            "config": settings,
            "rows": rows,
        }
        write_json(report, args.output)


if __name__ == "__main__":
    main()
