"""The order of the house (tools/house.py): kept by the package, and seen to be broken where it is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


def house(*args: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "house.py"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def made(tmp_path: Path, files: dict[str, str]) -> Path:
    root = tmp_path / "vllm_dflash"
    for name, text in {"__init__.py": "", **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.thorough
def test_the_package_is_in_order() -> None:
    done = house("--check")
    assert (done.stdout, done.returncode) == ("the house is in order\n", 0)


def test_figures(tmp_path) -> None:
    root = made(
        tmp_path,
        {
            "options.py": "from typing import Any\nA = 1\nB = (2, -3.5)\nC = 'x'\nD = True\nE: Any = 2 * 3\n",
            "ops/__init__.py": "def f(x: 'Any') -> None: ...\n",
        },
    )
    rows = [line.split() for line in house(root).stdout.splitlines()]
    assert ["(root)", "2", "6", "3", "1", "0"] in rows
    assert ["ops", "1", "1", "0", "0", "0"] in rows
    assert ["all", "3", "7", "3", "1", "0"] in rows


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (
            {"ops/a.py": "from vllm_dflash.ops import b\n",
             "ops/b.py": "def f():\n    from vllm_dflash.ops.a import g\n"},
            "import circle: ops.a ops.b",
        ),
        ({"files.py": "def f():\n    import vllm_dflash.training.loop\n", "training/loop.py": ""},
         "arrow back up: files -> training.loop"),
        ({"training/loop.py": "from vllm_dflash.bench.engine_process import x\n",
          "bench/engine_process.py": "x = 1\n",
          "serving/a.py": "from vllm_dflash.bench import engine_process\n"},
         "arrow back up: serving.a -> bench.engine_process"),
        ({"novelty/a.py": ""}, "not in ORDER: novelty"),
        ({"serving/a.py": "def f(x):\n    x.__class__ = int\n"},
         "patch outside the table: serving/a.py:2 x.__class__"),
        ({"serving/a.py": "def f(x):\n    def g(): ...\n    x.y.run, z = g, 1\n"},
         "patch outside the table: serving/a.py:3 x.y.run"),
        ({"serving/a.py": "def f(x):\n    setattr(x, 'run', lambda: 1)\n"},
         "patch outside the table: serving/a.py:2 x"),
        ({"serving/a.py": "def w(g):\n    def h(): ...\n    return h\n\ndef f(x):\n    x.run = w(x.run)\n"},
         "patch outside the table: serving/a.py:6 x.run"),
    ],
)  # fmt: skip
def test_what_must_not_be(files, said, tmp_path) -> None:
    done = house("--check", made(tmp_path, files))
    assert (done.stdout.splitlines(), done.returncode) == ([said], 1)


@pytest.mark.parametrize(
    "text",
    [
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from vllm_dflash.cli import app\n",
        "class C:\n    def count(self): ...\n\ndef f(x, count):\n    x.count = count\n",
        "class C:\n    def f(self):\n        self.run = lambda: 1\n",
        "def f(x):\n    x.limit = 3\n    setattr(x, 'name', x.limit)\n",
    ],
)
def test_what_may_be(text, tmp_path) -> None:
    done = house("--check", made(tmp_path, {"serving/a.py": text, "cli.py": "app = 1\n"}))
    assert done.returncode == 0, done.stdout
