"""A field of a dataclass of settings is an option of the commands that take it."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import pytest
import typer
from typer.testing import CliRunner

from vllm_dflash.bounds import count, int_list, one_or_all
from vllm_dflash.cli import app
from vllm_dflash.settings import build, check, option, parsed, takes
from vllm_dflash.training.config import DrafterShape


@dataclass(frozen=True)
class Settings:
    data: str | tuple[str, ...] = option(MISSING, "Files.", parse=one_or_all, given_as=list[str])
    size: int | None = option(None, "How large.", "-s", "--the-size", bound=count(1, 9))
    color: Literal["red", "blue"] = option("red", "Which.", choices=("red", "blue"))
    ids: tuple[int, ...] = option((1, 2), "Which ones.", parse=int_list)
    strict: bool = option(False, "No mercy.")
    causal: bool | None = option(None, "Or not.")
    hidden: int = option(3, bound=count())
    plain: int = 4

    def __post_init__(self) -> None:
        check(self)


@pytest.fixture
def run():
    made: list[Settings] = []
    small = typer.Typer()

    @small.command()
    @takes(Settings)
    def command(name: str, last: int = 7, **options: Any) -> None:
        """Help."""
        made.append(build(Settings, options, plain=last))

    def invoke(*args: str) -> Any:
        result = CliRunner().invoke(small, args, env={"COLUMNS": "200"})
        return made.pop() if made else result

    return invoke


def test_a_command_takes_the_fields_of_its_settings(run) -> None:
    assert run("x", "--data", "a") == Settings("a", plain=7)
    args = "x --data a --data b -s 5 --color blue --ids 4,5 --strict --no-causal --last 8"
    assert run(*args.split()) == Settings(("a", "b"), 5, "blue", (4, 5), True, False, 3, 8)
    for wrong in ("--hidden=3", "--plain=3", "--no-strict", "--size=3"):
        assert run("x", "--data", "a", wrong).exit_code == 2
    assert run("x").exit_code == 2  # no data
    text = run("--help").stdout
    for part in ("--the-size", "How large.", "[default: 1,2]", "[default: red]", "--no-causal"):
        assert part in text
    assert "hidden" not in text


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ("-s 10", "--the-size is 10; give a whole number at least 1 and at most 9"),
        ("--color green", "--color is 'green'; allowed are red and blue"),
        ("--ids 1,x", "--ids is '1,x'; give whole numbers separated by commas"),
    ],
)
def test_errors_name_the_option(run, args, said) -> None:
    assert str(run("x", "--data", "a", *args.split()).exception) == said


def test_a_field_without_an_option_is_called_by_its_name() -> None:
    with pytest.raises(ValueError, match=r"^hidden is 0; give a whole number at least 1$"):
        Settings("a", hidden=0)


def test_only_what_a_command_took_is_read() -> None:
    assert parsed(Settings, {"ids": "3", "color": "blue", "else": 1}) == {
        "color": "blue",
        "ids": (3,),
    }


def test_train_and_plan_take_every_shape() -> None:
    """A mask token makes no difference to a plan."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    shape = {field.name for field in fields(DrafterShape)}
    for name, without in {"train": set(), "plan": {"mask_token_id"}}.items():
        assert shape - {param.name for param in commands[name].params} == without


def test_the_command_line_loads_no_torch() -> None:
    code = "import sys, vllm_dflash.cli; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
