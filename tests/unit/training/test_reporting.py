"""What a command shows where its output goes to a file: lines, often enough, whole."""

from __future__ import annotations

import io
import re
import shlex
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from vllm_dflash.training import reporting
from vllm_dflash.training.engine import Generated, VerifierEngine
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
    assert lines[-1] == "starting the verifier: done in 0 s"


def test_progress_says_count_rate_and_time_left(log) -> None:
    with reporter(log).progress("extracting", unit="tokens") as update:
        time.sleep(0.12)
        update(0, 12)
        update(3, 12)
        time.sleep(0.12)
    lines = log.getvalue().splitlines()
    assert lines[0].startswith("extracting: at its beginning, 0 tokens/s")
    told = [line for line in lines if line.startswith("extracting: 3 of 12 tokens, ")]
    assert told
    assert re.search(r", \d+ tokens/s, \d+ s left$", told[0])
    assert "3 tokens in 0 s" in lines[-1]


def test_responses_are_measured_in_tokens_from_the_first_one_on(log) -> None:
    """Hundreds are under way before the first is finished."""
    tokens = 50

    def generated(requests: int) -> tuple[int, float]:
        return tokens, 100.0 * requests

    with reporter(log).progress("responses", "responses", generated) as update:
        update(2, 12)
        time.sleep(0.12)
        under_way = log.getvalue().splitlines()[-1]
        tokens = 300
        update(4, 12)
        time.sleep(0.12)
        later = log.getvalue().splitlines()[-1]
    assert re.fullmatch(
        r"responses: 2 of 12 responses, 50 tokens, \d+ tokens/s, at most \d s left", under_way
    )
    assert re.fullmatch(r"responses: 4 of 12 responses, 300 tokens, \d+ tokens/s, \d s left", later)
    # What an earlier run left is not this one's speed.
    last = log.getvalue().splitlines()[-1]
    assert last.endswith(" responses/s), 2 from before")
    assert float(re.search(r"\(([\d.]+) ", last)[1]) < 2 / 0.2


def test_training_lines_are_whole(log) -> None:
    """Longer than the 80 columns that a console without a terminal is taken to have."""
    with reporter(log).training(0, 1000) as report:
        report([{**ROW, "step": i} for i in range(5)], 0.5)
        time.sleep(0.12)
    line = next(line for line in log.getvalue().splitlines() if "step 5" in line)
    assert line.startswith("training: step 5 of 1000, ")
    assert re.search(r"\d steps/s, \d+ s left, 1000 tokens/s, ", line)
    assert line.endswith("loss 2.500, accuracy 75/25 %, tau~2.50")
    assert "e+" not in line
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


def test_a_narrow_terminal_cuts_no_figure(log) -> None:
    """What does not fit beside the bar is below it, on as many lines as it takes."""
    terminal = reporter(log, terminal=True)
    terminal.evaluated(4, 1.234)
    with terminal.training(12000, 120000) as report:
        report([{**ROW, "step": i} for i in range(5)], 0.5)
        time.sleep(0.2)
    shown = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", log.getvalue())
    assert "\u2026" not in shown
    last = " ".join(shown[shown.rindex("12005/120000") :].split())
    for part in ("0:00:0", "1000 tokens/s", "accuracy 75/25 %", "tau~2.50", "held-out tau 1.23"):
        assert part in last


def test_brackets_of_paths_and_data_are_no_markup(log) -> None:
    text = "no [/INST] in [red]a.jsonl[/red] :smile:"
    reporter(log).say(text)
    assert log.getvalue() == text + "\n"


@pytest.mark.parametrize("curves", [None, Path("d-run/curves.png")])
def test_the_end_says_where_how_good_and_what_next(log, curves) -> None:
    held = {"tau": 1.5, "position_rates": [0.4, 0.1]}
    minutes = {"responses": 1.0, "extract": 0.5, "train": 2.0}
    summary = {"verifier": "org/my model", "tau_heldout": held, "minutes": minutes}
    reporter(log).finished(Path("d"), summary, curves)
    lines = log.getvalue().splitlines()
    assert lines[0].startswith("drafter written to d (")
    assert "held-out tau 1.500" in lines[1]
    assert lines[1].endswith("40, 10 %")
    assert ("curves: d-run/curves.png" in lines) == (curves is not None)
    commands = [shlex.split(line.split(": ", 1)[1]) for line in lines if line.startswith("next, ")]
    assert [c[:3] for c in commands] == [
        ["vllm-dflash", "eval", "org/my model"],
        ["vllm-dflash", "bench", "org/my model"],
        ["vllm", "serve", "org/my model"],
    ]
    assert commands[2][4] == '{"method": "dflash", "model": "d"}'


@pytest.mark.parametrize(("held_out", "said"), [(0, "nothing is held out"), (3, "(3)"), (10, None)])
def test_figures_are_explained_and_few_held_out_sequences_told(log, held_out, said) -> None:
    reporter(log).terms(7, held_out)
    lines = log.getvalue().splitlines()
    assert "at most 8" in lines[0]
    assert [said in line for line in lines[1:]] == ([True] if said else [])


class TwoRequests:
    """An LLMEngine that brings a token of each request a step: one of 2 tokens, one of 3."""

    def __init__(self) -> None:
        self.steps = 0

    def add_request(self, key, prompt, params) -> None:
        pass

    def has_unfinished_requests(self) -> bool:
        return self.steps < 3

    def step(self) -> list:
        self.steps += 1
        return [
            SimpleNamespace(
                request_id=key,
                finished=self.steps == length,
                outputs=[SimpleNamespace(token_ids=[7] * self.steps)],
            )
            for key, length in (("a", 2), ("b", 3))
            if self.steps <= length
        ]


def test_tokens_of_unfinished_requests_count() -> None:
    engine = object.__new__(VerifierEngine)
    engine.engine, engine.generated = TwoRequests(), Generated()
    assert engine.generated.expected(2, 100) == (0, 200)
    done = engine._run([("a", [1], None), ("b", [1], None)])
    assert next(done).request_id == "a"
    assert engine.generated.expected(2, 100) == (3, 4)
    assert next(done).request_id == "b"
    assert engine.generated.expected(2, 100) == (5, 5)
