"""What the numbers and words that a user gives may be; errors name the option.

The dataclasses of settings declare their bounds and check them when they are made, so that the command line
and callers of the functions get the same refusals.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

#: What vLLM's --dtype takes.
DTYPES = ("auto", "half", "float16", "bfloat16", "float", "float32")
#: vLLM's counters and sizes are 32 bits wide.
MOST = 2**31 - 1


@dataclass(frozen=True)
class Bound:
    """A range of finite numbers.

    Attributes:
        low, high: the least and the greatest value.
        above, below: values that the number must stay off.
        whole: whether only whole numbers are.
    """

    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    whole: bool = False

    def holds(self, value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, int if self.whole else (int, float)):
            return False
        return (
            math.isfinite(value)
            and (self.low is None or value >= self.low)
            and (self.high is None or value <= self.high)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def describe(self) -> str:
        ends = {
            "at least": self.low,
            "above": self.above,
            "at most": self.high,
            "below": self.below,
        }
        words = [f"{word} {end:g}" for word, end in ends.items() if end is not None and end != MOST]
        return ("a whole number" if self.whole else "a number") + (
            f" {' and '.join(words)}" if words else ""
        )


def count(low: int = 1, high: int = MOST) -> Bound:
    """Whole numbers from ``low`` on."""
    return Bound(low=low, high=high, whole=True)


SHARE = Bound(low=0, high=1)
POSITIVE = Bound(above=0)


def check_bounds(
    settings: Any, bounds: Mapping[str, Bound], options: Mapping[str, str] | None = None
) -> None:
    """Checks fields of a settings object; None is a value not given.

    Args:
        options: the option of a field, where it is not ``--`` and the field's name.

    Raises:
        ValueError: names the option, the value, and what it may be.
    """
    for name, bound in bounds.items():
        value = getattr(settings, name)
        if value is not None and not bound.holds(value):
            option = (options or {}).get(name) or option_of(name)
            raise ValueError(f"{option} is {value!r}; give {bound.describe()}")


def check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """ValueError unless a word is one of those allowed."""
    if value not in allowed:
        raise ValueError(
            f"{option_of(name)} is {value!r}; allowed are {', '.join(allowed[:-1])} and {allowed[-1]}"
        )


def option_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def json_object(name: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} {text!r} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{name} {text!r} is not a JSON object")
    return value


def int_list(name: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"{name} is {text!r}; give whole numbers separated by commas") from error


def words(name: str, text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


def one_or_all(name: str, names: list[str]) -> str | tuple[str, ...] | None:
    """A single name as it is, so that a run of one file keeps its identity."""
    return (names[0] if len(names) == 1 else tuple(names)) if names else None
