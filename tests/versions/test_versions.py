"""tools/versions.py without environments: its tests exist, its table says what ran."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

TESTS = Path(__file__).parents[1]
sys.path.insert(0, str(TESTS.parent / "tools"))

import versions  # noqa: E402


@pytest.mark.parametrize("column", versions.RUN)
def test_what_it_runs_exists(column) -> None:
    for test in versions.RUN[column]:
        file, _, name = test.partition("::")
        tree = ast.parse((TESTS / file).read_text())
        functions = {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}
        assert not name or name.partition("[")[0] in functions, test


def results(*skip: str) -> ElementTree.ElementTree:
    """A run in which one test of each column passes; the second of the first column fails."""
    cases = []
    for column, tests in versions.RUN.items():
        if column not in skip:
            file, _, name = tests[0].partition("::")
            name = name or "test_any"
            cases.append(
                f'<testcase classname="tests.{file[:-3].replace("/", ".")}" name="{name}"/>'
            )
    bad = '<testcase classname="tests.engine.test_lossless" name="test_greedy_output_is_the_verifiers[x]">'
    cases.append(f'{bad}<failure message="AssertionError: 1 != 2">long</failure></testcase>')
    return ElementTree.ElementTree(ElementTree.fromstring(f"<s>{''.join(cases)}</s>"))


def test_results_by_column() -> None:
    got = versions.by_column(results())
    name = "engine/test_lossless.py::test_greedy_output_is_the_verifiers[x]"
    assert got["greedy output"] == {"passed": 1, "failed": {name: "AssertionError: 1 != 2"}}
    assert got["training"] == {"passed": 1, "failed": {}}
    with pytest.raises(RuntimeError, match="no test ran for tapped, V2 runner"):
        versions.by_column(results("tapped", "V2 runner"))


def test_the_table() -> None:
    common = {"supported": True, "num_requirements": 5, "problems": {}, "changes": []}
    ran = {
        "installed": {"torch": "2.1", "transformers": "5.2"},
        "run": versions.by_column(results()),
    }
    rows = [
        {**common, "vllm": "0.31.0", **ran},
        {**common, "vllm": "0.34.0", "supported": False, "problems": {"vllm has no x": ["a.py:1"]}},
    ]
    first, second = versions.table(rows).splitlines()[2:]
    assert "| 0.31.0 | 2.1 | 5.2 | 5 hold | **1 of 2 fail** | 1 pass |" in first
    assert "| 0.34.0 (not supported) | not run | not run | **1 broken** | not run |" in second
    (third,) = versions.table([{**common, "vllm": "0.35.0", "error": "pip: no"}]).splitlines()[2:]
    assert "| 0.35.0 | not run | not run | 5 hold | **does not start** |" in third
    assert [versions.fits(row) for row in rows] == [False, False]
    assert not versions.fits({**common, "vllm": "0.35.0", "error": "pip: no"})
    assert versions.fits({**common, "vllm": "0.33.0"})
