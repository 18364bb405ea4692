"""What a part finds out: rows, each printed as a line of JSON at once."""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: Worst first: what did not run, what gave a wrong result, what cannot run here, what is as it should be.
STATES = ("failed", "wrong", "unavailable", "ok")


@dataclass(frozen=True)
class Row:
    """One finding.

    Attributes:
        part, case: what was tried.
        state: one of :data:`STATES`.
        note: why it is not ``ok``.
        figures: what was measured.
    """

    part: str
    case: str
    state: str
    note: str = ""
    figures: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.state not in STATES:
            raise ValueError(f"state is {self.state!r}; it must be one of {', '.join(STATES)}")

    def to_json(self) -> str:
        return json.dumps(vars(self), allow_nan=False)


@dataclass
class Context:
    """What a part works with.

    Attributes:
        part: its name.
        folder: for models, logs and results; shared by the parts.
        rehearse: whether this is a CPU and only the way through matters.
        deadline: of ``time.monotonic()``, when the part is ended.
        write: takes a row's line of JSON.
    """

    part: str
    folder: Path
    rehearse: bool
    deadline: float
    write: Callable[[str], None]

    def say(self, case: str, state: str, note: str = "", **figures: Any) -> None:
        """Reports a row."""
        self.write(Row(self.part, case, state, note, figures).to_json())

    def check(self, case: str, problem: str, **figures: Any) -> None:
        """Reports a row that is ``wrong`` if there is a problem."""
        self.say(case, "wrong" if problem else "ok", problem, **figures)

    @property
    def left_s(self) -> float:
        """Seconds until the part is ended."""
        return self.deadline - time.monotonic()


class Unavailable(Exception):
    """What a part needs is not here; the message says what."""


def need(module: str) -> None:
    """Raises Unavailable where a package is not installed."""
    if importlib.util.find_spec(module) is None:
        raise Unavailable(f"{module} is not installed")


def last_line(text: str) -> str:
    """The last line of an error that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:400] if lines else "no message"
