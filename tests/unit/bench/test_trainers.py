"""benchmarks/trainers.py: core-minutes to the same tau."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))

import trainers


def row(trainer: str, minutes: float, tau: float, seed: int = 0, core_minutes: float | None = None):
    return {
        "trainer": trainer,
        "recipe": "r",
        "minutes": minutes,
        "seed": seed,
        "tau": tau,
        "core_minutes": minutes if core_minutes is None else core_minutes,
    }


def test_a_curve_is_the_mean_of_the_seeds():
    rows = [
        row("a", 4, 3.0),
        row("a", 1, 2.0, 0, 0.9),
        row("a", 1, 2.5, 1, 1.1),
        row("b", 1, 9.0),
    ]
    assert trainers.curve(rows, "a", "r") == [(pytest.approx(1.0), 2.25), (4.0, 3.0)]


def test_minutes_are_between_the_points_by_their_logarithm():
    points = [(1.0, 2.0), (4.0, 3.0), (16.0, 3.5)]
    assert trainers.minutes_for(points, 2.5) == pytest.approx(2.0)
    assert trainers.minutes_for(points, 3.0) == pytest.approx(4.0)
    assert trainers.minutes_for(points, 3.25) == pytest.approx(8.0)
    assert trainers.minutes_for(points, 1.5) == 1.0  # an upper bound
    assert trainers.minutes_for(points, 3.6) is None


def test_the_summary_compares_each_recipe_of_ours_with_each_of_theirs():
    rows = [row("speculators", 4, 3.0), row("speculators", 16, 4.0)]
    rows += [row("vllm-dflash", 1, 2.0), row("vllm-dflash", 4, 3.5)]
    speed = [
        {"trainer": "speculators", "recipe": "r", "anchors_per_s": 50.0},
        {"trainer": "vllm-dflash", "recipe": "r", "anchors_per_s": 150.0},
    ]
    (found,) = trainers.summary({"rows": rows, "speed": speed})
    assert found["anchors_per_s_ratio"] == 3.0
    first, second = found["points"]
    # tau 3.0 lies at two thirds between 1 and 4 minutes.
    assert first["core_minutes_ratio_at_equal_tau"] == pytest.approx(4 ** (2 / 3) / 4)
    assert second["core_minutes_ratio_at_equal_tau"] is None
