"""What a run shows while it works: progress bars, the numbers beside them, TensorBoard."""

from __future__ import annotations

import importlib.util
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

#: Steps over which the shown loss, accuracy and tau are averaged.
_WINDOW = 200
#: Between two lines of progress where the console is no terminal, which shows no bars.
LINE_SECONDS = 20.0


def _left(done: int, planned: int | None, seconds: float) -> str:
    """Time left at the pace so far, as words; empty where it is not known."""
    if not planned or not done or done >= planned:
        return ""
    left = seconds * (planned - done) / done
    return f", {left / 60:.0f} min left" if left >= 90 else f", {left:.0f} s left"


class Reporter:
    """Console progress of a training run: bars, or a line now and then where they cannot be seen."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._board: Any = None
        self._recent: deque[dict[str, Any]] = deque(maxlen=_WINDOW)
        self._tau: float | None = None

    def check(self, config: Any) -> None:
        """ValueError where the run asks for a TensorBoard log and the package is not there."""
        if config.tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise ValueError(
                "--tensorboard needs the tensorboard package: pip install 'vllm-dflash[tensorboard]'"
            )

    def open(self, folder: Any, config: Any) -> None:
        """Starts the TensorBoard log where the run asks for one."""
        if not config.tensorboard:
            return
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(folder.path / "tensorboard"))

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)

    def table(self, title: str, rows: Sequence[Sequence[str]]) -> None:
        """Rows of text in columns, the last one figures."""
        table = Table(title=title, show_header=False, title_justify="left")
        for i in range(len(rows[0])):
            table.add_column(overflow="fold", justify="right" if i == len(rows[0]) - 1 else "left")
        for row in rows:
            table.add_row(*row)
        self.console.print(table)

    @contextmanager
    def _lines(self, text: Callable[[], str]) -> Iterator[None]:
        """Says ``text()`` every :data:`LINE_SECONDS` meanwhile, unless the console is a terminal."""
        if self.console.is_terminal:
            yield
            return
        over = threading.Event()

        def speak() -> None:
            while not over.wait(LINE_SECONDS):
                self.say(text())

        speaker = threading.Thread(target=speak, daemon=True)
        speaker.start()
        try:
            yield
        finally:
            over.set()
            speaker.join()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A stage without a measure of progress."""
        started = time.monotonic()
        if not self.console.is_terminal:
            self.say(f"{name} ...")

        def line() -> str:
            return f"{name}: {time.monotonic() - started:.0f} s so far"

        with self.console.status(name), self._lines(line):
            yield
        self.say(f"{name}: {time.monotonic() - started:.0f} s")

    def _bar(self, *columns: Any) -> Progress:
        return Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            *columns,
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )

    @contextmanager
    def progress(self, name: str, unit: str) -> Iterator[Callable[[int, int], None]]:
        """A stage that counts; gives a function of (done, planned)."""
        started = time.monotonic()
        reached, of = 0, 0

        def line() -> str:
            seconds = time.monotonic() - started
            left = _left(reached, of, seconds)
            return f"{name}: {reached} of {of or '?'} {unit}, {reached / seconds:.1f}/s{left}"

        with self._bar(TextColumn("{task.fields[rate]}")) as bar, self._lines(line):
            task = bar.add_task(name, total=None, rate="")

            def update(done: int, planned: int) -> None:
                nonlocal reached, of
                reached, of = done, planned
                rate = done / max(time.monotonic() - started, 1e-3)
                bar.update(task, completed=done, total=planned, rate=f"{rate:.1f} {unit}/s")

            yield update
        took = time.monotonic() - started
        if reached:
            self.say(f"{name}: {reached} {unit} in {took:.0f} s ({reached / took:.1f}/s)")

    @contextmanager
    def training(
        self, first: int, total: int
    ) -> Iterator[Callable[[list[dict[str, Any]], float], None]]:
        """The training bar; gives a function of (metric rows, seconds they took)."""
        started = time.monotonic()
        done, figures = first, ""

        def line() -> str:
            seconds = time.monotonic() - started
            left = _left(done - first, total - first, seconds)
            return f"training: step {done} of {total}{left} {figures}".rstrip()

        with self._bar(TextColumn("{task.fields[figures]}")) as bar, self._lines(line):
            task = bar.add_task("training", total=total, completed=first, figures="")

            def report(rows: list[dict[str, Any]], seconds: float) -> None:
                nonlocal done, figures
                rows = [r for r in rows if "loss" in r]
                self._recent.extend(rows)
                done, figures = done + len(rows), self._figures(rows, seconds)
                bar.update(task, advance=len(rows), figures=figures)
                if self._board is not None:
                    for row in rows:
                        for name in ("loss", "lr", "grad_norm"):
                            self._board.add_scalar(name, row[name], row["step"])

            yield report

    def _figures(self, rows: list[dict[str, Any]], seconds: float) -> str:
        recent = self._recent
        if not recent:
            return ""
        loss = sum(r["loss"] for r in recent) / len(recent)
        blocks = sum(r["anchors"] for r in recent)
        tau = 1 + sum(r["accepted"] for r in recent) / max(blocks, 1)
        accuracy = [
            sum(r["right"][k] for r in recent) / max(sum(r["valid"][k] for r in recent), 1)
            for k in range(len(recent[-1]["right"]))
        ]
        shown = "/".join(f"{100 * a:.0f}" for a in accuracy[:4])
        rate = sum(r["tokens"] for r in rows) / max(seconds, 1e-3)
        held = "" if self._tau is None else f" held-out tau {self._tau:.2f}"
        return f"loss {loss:.3f} acc {shown}% tau~{tau:.2f}{held} {rate:.0f} tok/s"

    def evaluated(self, step: int, tau: float) -> None:
        self._tau = tau
        self.say(f"step {step}: held-out tau {tau:.3f}")
        if self._board is not None:
            self._board.add_scalar("heldout_tau", tau, step)

    def finished(self, output: Path, summary: dict[str, Any], curves: Path | None) -> None:
        """Closing lines of a run."""
        if self._board is not None:
            self._board.close()
        held = summary["tau_heldout"]
        minutes = summary["minutes"]
        self.say(
            f"drafter written to {output}"
            + (f", held-out tau {held['tau']:.3f}" if held else "")
            + f" (responses {minutes['responses']:.1f} min, features {minutes['extract']:.1f} min, "
            f"training {minutes['train']:.1f} min)"
        )
        if curves is not None:
            self.say(f"curves: {curves}")
