"""What a command shows where its output goes to a file: lines, often enough, whole."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from vllm_dflash.training import reporting
from vllm_dflash.training.reporting import Reporter

ROW = {"loss": 2.5, "anchors": 4, "accepted": 6, "right": [3, 1], "valid": [4, 4], "tokens": 100}


@pytest.fixture
def log(monkeypatch) -> io.StringIO:
    monkeypatch.setattr(reporting, "LINE_SECONDS", 0.05)
    return io.StringIO()


def reporter(log: io.StringIO, terminal: bool = False) -> Reporter:
    return Reporter(Console(file=log, width=80, force_terminal=terminal))


def test_a_stage_speaks_from_its_beginning(log) -> None:
    with reporter(log).stage("starting the verifier"):
        assert log.getvalue() == "starting the verifier ...\n"
        time.sleep(0.2)
    lines = log.getvalue().splitlines()
    assert lines[1] == "starting the verifier: 0 s so far"
    assert lines[-1] == "starting the verifier: 0 s"


def test_progress_says_count_rate_and_time_left(log) -> None:
    with reporter(log).progress("responses", unit="responses") as update:
        time.sleep(0.12)
        update(3, 12)
        time.sleep(0.12)
    lines = log.getvalue().splitlines()
    assert lines[0].startswith("responses: 0 of ? responses, 0.0/s")
    told = [line for line in lines if line.startswith("responses: 3 of 12 responses, ")]
    assert told
    assert told[0].endswith(" s left")
    assert "3 responses in 0 s" in lines[-1]


def test_training_lines_are_whole(log) -> None:
    """Longer than the 80 columns that a console without a terminal is taken to have."""
    with reporter(log).training(0, 1000) as report:
        report([{**ROW, "step": i} for i in range(5)], 0.5)
        time.sleep(0.12)
    line = next(line for line in log.getvalue().splitlines() if "step 5" in line)
    assert line.startswith("training: step 5 of 1000, ")
    assert "left loss 2.500 acc 75/25% tau~2.50 1000 tok/s" in line
    assert len(line) > 70


def test_a_terminal_gets_bars_and_no_lines(log) -> None:
    with reporter(log, terminal=True).progress("responses", unit="responses") as update:
        update(3, 12)
        time.sleep(0.12)
    assert "3 of 12" not in log.getvalue()
    assert "3/12" in log.getvalue()


def test_an_error_ends_the_lines(log) -> None:
    with pytest.raises(KeyError), reporter(log).stage("starting"):
        raise KeyError("x")
    told = log.getvalue()
    time.sleep(0.12)
    assert log.getvalue() == told
