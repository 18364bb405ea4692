"""What of the demo fits a number of minutes on this machine: pure arithmetic on what was measured."""

from __future__ import annotations

from dataclasses import dataclass

#: The whole demo.
TICKETS, STEPS, PROMPTS, REPEATS = 700, 2400, 12, 3
#: Share of the minutes in which the drafter is trained; the rest is for serving.
_TRAINING_SHARE = 0.5
#: Engines of the benchmark, and what of its minutes their compilation may take.
_ENGINES, _START_SHARE = 4, 0.5
#: Minutes of serving from which all prompts are measured.
_SERVING_MINUTES = 6.0


@dataclass(frozen=True)
class Rates:
    """Seconds on this machine, from a short training run.

    Attributes:
        ticket: to answer a ticket and to extract its features.
        step: of training.
        start: until a training run has its engine.
    """

    ticket: float
    step: float
    start: float


def size_training(
    minutes: float, rates: Rates, heldout: int, tickets: int | None, steps: int | None
) -> tuple[int, int]:
    """Tickets and steps that fit: all, or the same share of both.

    Args:
        minutes: that are left for the demo.
        heldout: tickets that are answered besides.
        tickets, steps: the user's own; None for what fits.
    """
    left = 60 * minutes * _TRAINING_SHARE - rates.start - heldout * rates.ticket
    left -= (tickets or 0) * rates.ticket + (steps or 0) * rates.step
    wanted = (0 if tickets else TICKETS) * rates.ticket + (0 if steps else STEPS) * rates.step
    share = min(1.0, max(left, 0) / wanted) if wanted else 1.0
    return tickets or max(32, int(TICKETS * share)), steps or max(100, int(STEPS * share))


def size_benchmark(minutes: float, start: float) -> tuple[bool, int]:
    """Whether the benchmark's engines compile, and how many prompts they get.

    Args:
        minutes: that are left for it.
        start: seconds that an engine took to start, compilation included.
    """
    compiles = _ENGINES * start <= 60 * minutes * _START_SHARE
    share = min(1.0, max(minutes, 0) / _SERVING_MINUTES)
    return compiles, max(4, int(PROMPTS * share))


def cuts(report: dict) -> list[str]:
    """What a report shows less of than the whole demo, in words."""
    whole = {"train_sequences": ("tickets", TICKETS), "steps": ("steps", STEPS)}
    whole |= {"prompts": ("prompts", PROMPTS), "repeats": ("repeats", REPEATS)}
    found = [
        f"{report[name]} of {most} {word}"
        for name, (word, most) in whole.items()
        if report[name] < most
    ]
    return found + ([] if report["compiled"] else ["engines not compiled"])
