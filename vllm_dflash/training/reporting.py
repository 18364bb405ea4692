"""What a run shows while it works: progress bars, the numbers beside them, TensorBoard."""

from __future__ import annotations

import importlib.util
import json
import shlex
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

#: Steps over which the shown loss, accuracy and tau are averaged.
_WINDOW = 200
#: Draft positions of which the accuracy is shown.
_POSITIONS = 4
#: Held-out sequences below which their tau says little.
_FEW_HELD_OUT = 10
#: Steps before which the time left is not told.
_FIRST_STEPS = 5
#: Between two lines of progress where the console is no terminal, which shows no bars.
LINE_SECONDS = 20.0


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def _rate(count: float, seconds: float) -> str:
    rate = count / seconds
    return f"{rate:.0f}" if rate >= 10 else f"{rate:.2g}"


def _left(done: float, planned: float, seconds: float, words: str = "") -> str:
    """Time left at the pace so far, as words; empty where it is not known."""
    if not done or done >= planned:
        return ""
    return f", {words}{_duration(seconds * (planned - done) / done)} left"


class _Bar(Progress):
    """A bar, and below it whole what a line of the log would say beside the count."""

    def __init__(self, console: Console, text: Callable[[], str], *columns: Any) -> None:
        self._text = text
        begin, end = SpinnerColumn(), TextColumn("so far")
        columns = (begin, TextColumn("{task.description}"), *columns, TimeElapsedColumn(), end)
        # What is done leaves one line, said by its stage.
        super().__init__(*columns, console=console, transient=True, disable=not console.is_terminal)

    def get_renderables(self) -> Iterator[RenderableType]:
        yield from super().get_renderables()
        if text := self._text():
            yield Text(f"  {text}", style="dim")


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
        # Paths and the user's data may hold brackets, which are no markup.
        self.console.print(text, highlight=False, markup=False, emoji=False, soft_wrap=True)

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

        with _Bar(self.console, lambda: "") as bar, self._lines(line):
            bar.add_task(name, total=None)
            yield
        self.say(f"{name}: done in {time.monotonic() - started:.0f} s")

    @contextmanager
    def progress(
        self, name: str, unit: str, generated: Callable[[int], tuple[int, float]] | None = None
    ) -> Iterator[Callable[[int, int], None]]:
        """A stage that counts; gives a function of (done, planned). Its first call says what was done before.

        Args:
            generated: for units that are long texts: of the units that were or will be made here, the tokens
                so far and about how many they will be.
        """
        started = time.monotonic()
        before: int | None = None
        reached, of = 0, 0

        def pace() -> str:
            seconds = time.monotonic() - started
            done, planned = reached - (before or 0), of - (before or 0)
            if generated is None:
                return f"{_rate(done, seconds)} {unit}/s{_left(done, planned, seconds)}"
            tokens, expected = generated(planned)
            # Until the first is finished, expected is the most that there can be.
            left = _left(tokens, expected, seconds, "" if done else "at most ")
            return f"{tokens} tokens, {_rate(tokens, seconds)} tokens/s{left}"

        def line() -> str:
            count = f"{reached} of {of} {unit}" if of else "at its beginning"
            return f"{name}: {count}, {pace()}"

        columns = BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn(unit)
        with _Bar(self.console, pace, *columns) as bar, self._lines(line):
            task = bar.add_task(name, total=None)

            def update(done: int, planned: int) -> None:
                nonlocal before, reached, of
                before = done if before is None else before
                reached, of = done, planned
                bar.update(task, completed=done, total=planned)

            yield update
        took = time.monotonic() - started
        if reached:
            made = reached - (before or 0)
            kept = f", {before} from before" if before else ""
            rate = f" ({_rate(made, took)} {unit}/s)" if made else ""
            self.say(f"{name}: {reached} {unit} in {_duration(took)}{rate}{kept}")

    def terms(self, block_tokens: int, num_held_out: int) -> None:
        """Says what the figures of training mean.

        Args:
            block_tokens: draft tokens of a block.
            num_held_out: held-out sequences.
        """
        self.say(
            f"tau: mean number of tokens that a step of the verifier yields, 1 without a drafter and at most "
            f"{block_tokens + 1} with this one. In training, loss (a block's), accuracy (of draft tokens 1 "
            f"to {min(_POSITIONS, block_tokens)}, each by itself) and tau~ are means of the last {_WINDOW} "
            "steps or of all so far, for drafts at random places; held-out tau walks through responses as "
            "serving does"
        )
        if not num_held_out:
            self.say(
                "nothing is held out, so there will be no held-out tau (--holdout, --eval-data)"
            )
        elif num_held_out < _FEW_HELD_OUT:
            self.say(
                f"held-out tau will be rough, of so few sequences ({num_held_out}): more data, a larger "
                "--holdout or --eval-data help"
            )

    @contextmanager
    def training(
        self, first: int, total: int
    ) -> Iterator[Callable[[list[dict[str, Any]], float], None]]:
        """The training bar; gives a function of (metric rows, seconds they took)."""
        started = time.monotonic()
        done, figures = first, ""

        def pace() -> str:
            seconds = time.monotonic() - started
            made = done - first
            # The first steps also wait for features.
            left = _left(made, total - first, seconds) if made >= _FIRST_STEPS else ""
            return f"{_rate(made, seconds)} steps/s{left}{figures}"

        def line() -> str:
            return f"training: step {done} of {total}, {pace()}"

        columns = BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("steps")
        with _Bar(self.console, pace, *columns) as bar, self._lines(line):
            task = bar.add_task("training", total=total, completed=first)

            def report(rows: list[dict[str, Any]], seconds: float) -> None:
                nonlocal done, figures
                rows = [r for r in rows if "loss" in r]
                self._recent.extend(rows)
                done, figures = done + len(rows), self._figures(rows, seconds)
                bar.update(task, advance=len(rows))
                if self._board is not None:
                    for row in rows:
                        for name in ("loss", "lr", "grad_norm"):
                            self._board.add_scalar(name, row[name], row["step"])

            yield report
        if total > first:
            self.say(f"training: {total} of {total} steps, {_duration(time.monotonic() - started)}")

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
        shown = "/".join(f"{100 * a:.0f}" for a in accuracy[:_POSITIONS])
        rate = sum(r["tokens"] for r in rows) / max(seconds, 1e-3)
        held = "" if self._tau is None else f", held-out tau {self._tau:.2f}"
        return f", {rate:.0f} tokens/s, loss {loss:.3f}, accuracy {shown} %, tau~{tau:.2f}{held}"

    def evaluated(self, step: int, tau: float) -> None:
        self._tau = tau
        self.say(f"step {step}: held-out tau {tau:.3f}")
        if self._board is not None:
            self._board.add_scalar("heldout_tau", tau, step)

    def finished(self, output: Path, summary: dict[str, Any], curves: Path | None) -> None:
        """Closing lines of a run: where the drafter is, how good, and what can be done with it."""
        if self._board is not None:
            self._board.close()
        minutes = summary["minutes"]
        self.say(
            f"drafter written to {output} (responses {minutes['responses']:.1f} min, features "
            f"{minutes['extract']:.1f} min, training {minutes['train']:.1f} min)"
        )
        if held := summary["tau_heldout"]:
            rates = ", ".join(f"{100 * rate:.0f}" for rate in held["position_rates"])
            self.say(
                f"held-out tau {held['tau']:.3f} of at most {len(held['position_rates']) + 1}: a bound of "
                "the speed-up, which bench measures; share of drafts whose first 1, 2, ... tokens were all "
                f"accepted: {rates} %"
            )
        if curves is not None:
            self.say(f"curves: {curves}")
        verifier, drafter = shlex.quote(summary["verifier"]), shlex.quote(str(output))
        served = shlex.quote(json.dumps({"method": "dflash", "model": str(output)}))
        for what, command in (
            ("acceptance", f"vllm-dflash eval {verifier} {drafter} --engine --data YOUR-TEST-DATA"),
            ("speed", f"vllm-dflash bench {verifier} {drafter} --data YOUR-TEST-DATA"),
            ("serving", f"vllm serve {verifier} --speculative-config {served}"),
        ):
            self.say(f"next, {what}: {command}")
