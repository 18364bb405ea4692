"""What the demo does on machines of other speeds."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "demo"))
import budget


def rates(slowness: float) -> budget.Rates:
    return budget.Rates(ticket=0.3 * slowness, step=0.1 * slowness, start=10 * slowness)


def training_minutes(found: budget.Rates, tickets: int, steps: int, heldout: int = 32) -> float:
    prepared = (tickets + heldout) * found.ticket
    return (found.start + prepared + steps * found.step) / 60


def test_a_fast_machine_does_the_whole_demo():
    assert budget.size_training(24, rates(1.0), 32, None, None) == (700, 2400)
    assert budget.size_benchmark(12, start=40) == (True, 12)


@pytest.mark.parametrize("slowness", [2.0, 5.0])
@pytest.mark.parametrize("minutes", [15, 24])
def test_training_takes_half_of_the_minutes(slowness, minutes):
    tickets, steps = budget.size_training(minutes, rates(slowness), 32, None, None)
    assert tickets / 700 == pytest.approx(steps / 2400, rel=0.02)
    took = training_minutes(rates(slowness), tickets, steps)
    assert took == pytest.approx(minutes / 2, rel=0.02)


def test_the_user_s_numbers_win_and_the_rest_fits():
    slow = rates(5.0)
    assert budget.size_training(24, slow, 32, 700, 2400) == (700, 2400)
    tickets, steps = budget.size_training(24, slow, 32, None, 600)
    assert steps == 600
    assert training_minutes(slow, tickets, steps) == pytest.approx(12, rel=0.02)
    tickets, steps = budget.size_training(24, slow, 32, 200, None)
    assert tickets == 200
    assert training_minutes(slow, tickets, steps) == pytest.approx(12, rel=0.02)


def test_there_is_always_something_to_do():
    assert budget.size_training(1, rates(10.0), 32, None, None) == (32, 100)
    assert budget.size_benchmark(-3, start=200) == (False, 4)


def test_engines_compile_where_half_of_the_rest_is_enough():
    assert budget.size_benchmark(10, start=75)[0]
    assert not budget.size_benchmark(10, start=76)[0]


def test_the_report_says_what_was_cut():
    whole = {"train_sequences": 700, "steps": 2400, "prompts": 12, "repeats": 3, "compiled": True}
    assert budget.cuts(whole) == []
    less = {**whole, "steps": 900, "repeats": 1, "compiled": False}
    assert budget.cuts(less) == ["900 of 2400 steps", "1 of 3 repeats", "engines not compiled"]
