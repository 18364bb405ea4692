"""What the demo does on machines of other speeds."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[3] / "demo"))
import budget
import run


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


class Commands:
    """Stands for the vllm-dflash commands: takes so long, and leaves what they leave."""

    def __init__(self, monkeypatch, slowness: float) -> None:
        self.slowness, self.seconds, self.lines = slowness, 0.0, []
        monkeypatch.setattr(run, "call", self)
        monkeypatch.setattr(run.time, "monotonic", lambda: self.seconds)
        monkeypatch.setattr(run.fetch_verifier, "fetch", lambda path: path)
        monkeypatch.setattr(run, "write_png", lambda report, path: None)

    def __call__(self, *command, **environment) -> float:
        line = [str(part) for part in command]
        self.lines.append(line)
        return getattr(self, line[0])(line) / 60

    def value(self, line, name) -> str:
        return line[line.index(name) + 1]

    def write(self, path: Path, content: dict) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))

    def train(self, line) -> float:
        tickets = len(Path(self.value(line, "--data")).read_text().splitlines())
        steps = int(self.value(line, "--max-steps"))
        seconds = {"responses": 0.2 * tickets, "extract": 0.1 * tickets, "train": 0.1 * steps}
        minutes = {name: s * self.slowness / 60 for name, s in seconds.items()}
        summary = {"minutes": minutes, "train_sequences": tickets, "steps": steps}
        self.write(Path(self.value(line, "-o")) / "dflash_training.json", summary)
        took = 60 * sum(minutes.values()) + 10 * self.slowness
        self.seconds += took
        return took

    def eval(self, line) -> float:
        found = {"tau": 4.7, "position_rates": [0.5], "startup_s": 40 * self.slowness}
        self.write(Path(self.value(line, "-o")), {"offline": found, "engine": found})
        self.seconds += 90 * self.slowness
        return 90 * self.slowness

    def bench(self, line) -> float:
        repeats = int(self.value(line, "--repeats"))
        figures = {
            "output_tokens_per_s": {"raw": [9.0] * repeats, "median": 9.0},
            "over_none": {"ratio": 3.0, "min": 3.0, "max": 3.0},
            "tau": 4.7,
        }
        config = {
            "dtype": "auto",
            "repeats": repeats,
            "num_prompts": int(self.value(line, "--num-prompts")),
            "enforce_eager": "--enforce-eager" in line,
        }
        modes = {m: {"concurrency": {"1": figures, "4": figures}} for m in ("none", "plugin")}
        self.write(Path(self.value(line, "-o")) / "report.json", {"config": config, "modes": modes})
        self.seconds += 300
        return 300


def demo(monkeypatch, out: Path, *args: str) -> dict:
    monkeypatch.setattr(sys, "argv", ["run.py", "--out", str(out), *args])
    run.main()
    return json.loads((out / "report.json").read_text())


def test_a_fast_machine_shows_all_of_it(monkeypatch, tmp_path):
    commands = Commands(monkeypatch, 0.8)
    report = demo(monkeypatch, tmp_path)
    assert report["cut"] == []
    assert (report["train_sequences"], report["steps"]) == (700, 2400)
    _, train, _, bench = commands.lines
    assert "--restart" in train
    assert "--enforce-eager" not in bench
    assert not any("--dtype" in line for line in commands.lines)


def test_a_slow_machine_says_what_it_cut_and_goes_on_with_its_sizes(monkeypatch, tmp_path, capsys):
    commands = Commands(monkeypatch, 4.0)
    report = demo(monkeypatch, tmp_path, "--minutes", "20")
    assert report["train_sequences"] < 500
    assert "engines not compiled" in report["cut"]
    assert "cut to fit 20 minutes" in capsys.readouterr().out
    bench = commands.lines[-1]
    assert "--enforce-eager" in bench
    assert float(commands.value(bench, "--minutes")) < 10
    # An interrupted demo is resumed with the sizes that it has, whatever the machine does now.
    commands = Commands(monkeypatch, 1.0)
    again = demo(monkeypatch, tmp_path, "--minutes", "20")
    assert again["train_sequences"] == report["train_sequences"]
    assert [line[0] for line in commands.lines] == ["train", "eval", "bench"]
    assert "--restart" not in commands.lines[0]


def test_sizes_that_are_given_are_not_measured(monkeypatch, tmp_path):
    commands = Commands(monkeypatch, 9.0)
    sizes = ("--train", "40", "--steps", "7", "--repeats", "2", "--prompts", "5")
    report = demo(monkeypatch, tmp_path, *sizes)
    assert [line[0] for line in commands.lines] == ["train", "eval", "bench"]
    assert (report["train_sequences"], report["steps"], report["repeats"]) == (40, 7, 2)
    assert "--minutes" not in commands.lines[-1]
    assert commands.value(commands.lines[-1], "--num-prompts") == "5"
