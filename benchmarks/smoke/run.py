"""Runs the parts, each in a process of its own, and prints what they found."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from smoke.rows import STATES, Context, Row, Unavailable, last_line
from vllm_dflash import guard
from vllm_dflash.bench.report import write_json
from vllm_dflash.environment import describe_machine, set_cpu_defaults, versions
from vllm_dflash.processes import start_guard

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu_smoke.py"


@dataclass(frozen=True)
class Part:
    """A module of this package with ``run(context)``, and the seconds it may take."""

    name: str
    seconds: float


#: Those that need no vLLM come first. Together more than ten minutes: most end early.
PARTS = (
    Part("ops", 90),
    Part("learner", 100),
    Part("serving", 220),
    Part("training", 150),
    Part("speed", 220),
)
#: A rehearsal's limits are so many times as long.
REHEARSAL_PATIENCE = 6


def run_part(part: Part, seconds: float, folder: Path, rehearse: bool) -> list[Row]:
    """Runs a part; prints its rows as they come, and one more if it failed or found nothing."""
    command = [sys.executable, str(SCRIPT), "--part", part.name, "-o", str(folder)]
    command += ["--seconds", str(seconds), *(["--rehearse"] if rehearse else [])]
    log_path = folder / "logs" / f"{part.name}.log"
    log_path.parent.mkdir(parents=True, exist_ok=True)
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    rows: list[Row] = []
    deadline = time.monotonic() + seconds
    with log_path.open("w") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
        )
        assert process.stdout is not None
        threading.Thread(target=_read, args=(process.stdout, lines), daemon=True).start()
        timed_out = False
        while True:
            try:
                line = lines.get(timeout=max(deadline - time.monotonic(), 0.01))
            except queue.Empty:
                timed_out = True
                break
            if line is None:
                break
            print(line, flush=True)
            rows.append(Row(**json.loads(line)))
        family = guard.below(process.pid)
        if not timed_out:
            process.wait(10)
        process.kill()
        code = process.wait()
        guard.end(family, 0)
    problem = ""
    if timed_out:
        problem = f"ended after {seconds:.0f} s"
    elif code:
        problem = f"exit code {code}: {last_line(log_path.read_text(errors='replace'))}"
    elif not rows:
        problem = "it found nothing"
    if problem:
        row = Row(part.name, "the part", "failed", f"{problem} (log: {log_path})")
        print(row.to_json(), flush=True)
        rows.append(row)
    return rows


def _read(stream: Any, lines: queue.SimpleQueue[str | None]) -> None:
    for line in stream:
        lines.put(line.rstrip("\n"))
    lines.put(None)


def child(name: str, folder: Path, rehearse: bool, seconds: float) -> None:
    """A part's process: rows go to what was standard output, all else to standard error."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def write(line: str) -> None:
        print(line, file=answers, flush=True)

    context = Context(name, folder, rehearse, time.monotonic() + seconds, write)
    try:
        run: Callable[[Context], None] = importlib.import_module(f"smoke.{name}").run
        run(context)
    except Unavailable as reason:
        context.say("the part", "unavailable", str(reason))
    except Exception as error:
        traceback.print_exc()
        context.say("the part", "failed", f"{type(error).__name__}: {last_line(str(error))}")


def ranked(rows: Sequence[Row]) -> list[Row]:
    """Worst news first; otherwise in the order in which they came."""
    return sorted(rows, key=lambda row: STATES.index(row.state))


def print_table(rows: Sequence[Row], console: Console) -> None:
    table = Table("part", "case", "state", "figures")
    for row in ranked(rows):
        figures = ", ".join(f"{name} {_short(value)}" for name, value in row.figures.items())
        cells = (row.part, row.case, row.state, "; ".join(filter(None, (row.note, figures))))
        # Messages have brackets, which are not markup.
        table.add_row(*map(Text, cells))
    console.print(table, highlight=False)


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return json.dumps(value) if isinstance(value, (dict, list)) else str(value)


def check_machine(rehearse: bool) -> None:
    """What must hold before any part runs.

    Raises:
        SystemExit: there is no GPU.
    """
    if rehearse:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        set_cpu_defaults(kv_gib=1)
        return
    if not describe_machine()["gpus"]:
        sys.exit("there is no NVIDIA GPU here (nvidia-smi finds none); --rehearse runs on the CPU")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(description=importlib.import_module("__main__").__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("-o", "--output", type=Path, help="folder for logs, models and report.json")
    parser.add_argument(
        "--minutes", type=float, help="for all parts (default: 10; of a rehearsal, 60)"
    )
    parser.add_argument("--parts", default=",".join(names), help="some of them, comma separated")
    parser.add_argument("--rehearse", action="store_true", help="tiny, on the CPU")
    parser.add_argument("--part", choices=names, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=600, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    unknown = sorted(set(args.parts.split(",")) - set(names))
    if unknown:
        parser.error(f"--parts has {', '.join(unknown)}; there are {', '.join(names)}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``gpu_smoke.py``; exits with 1 if a part failed or found something wrong."""
    args = parse(argv)
    if args.part:
        child(args.part, args.output, args.rehearse, args.seconds)
        return
    check_machine(args.rehearse)
    folder = (args.output or Path(tempfile.mkdtemp(prefix="gpu-smoke-"))).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    os.environ["HF_HUB_OFFLINE"] = "1"
    start_guard()
    began, minutes = time.monotonic(), args.minutes or (60 if args.rehearse else 10)
    # A machine that also does other things is slow, but a rehearsal is to come to its end.
    patience = REHEARSAL_PATIENCE if args.rehearse else 1
    rows: list[Row] = []
    seconds: dict[str, float] = {}
    for part in (p for p in PARTS if p.name in args.parts.split(",")):
        left = 60 * minutes - (time.monotonic() - began)
        if left < 5:
            rows.append(Row(part.name, "the part", "failed", f"no time left of {minutes} min"))
            continue
        start = time.monotonic()
        rows += run_part(part, min(part.seconds * patience, left), folder, args.rehearse)
        seconds[part.name] = round(time.monotonic() - start, 1)
    report = {
        "versions": versions(),
        "machine": describe_machine(),
        "rehearsal": args.rehearse,
        "seconds": seconds,
        "rows": [vars(row) for row in ranked(rows)],
    }
    write_json(report, folder / "report.json")
    console = Console(width=None if sys.stdout.isatty() else 160)
    print_table(rows, console)
    bad = sum(row.state in ("failed", "wrong") for row in rows)
    took = ", ".join(f"{name} {s:.0f} s" for name, s in seconds.items())
    console.print(
        f"{len(rows)} findings, {bad} bad; {took}; {folder / 'report.json'}", soft_wrap=True
    )
    if args.rehearse:
        console.print("A rehearsal on the CPU: nothing is said about a GPU.")
    sys.exit(1 if bad else 0)
