"""benchmarks/results: one rule for names, a row a line, and a report that links each file."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from vllm_dflash.bench.report import write_json

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"
FILES = sorted(RESULTS.glob("*.json"))
NAME = re.compile(
    r"[a-z0-9-]+_(fp32|bf16|mixed|any)_[a-z0-9-]+_\d{4}-\d\d-\d\d(_[a-z0-9-]+)?\.json"
)


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.name)
def test_name_and_lines_of_a_result(file, tmp_path) -> None:
    rule = "<what>_<dtype>_<hardware>_<date>[_<part>].json, hyphens within a part"
    assert NAME.fullmatch(file.name), f"{file.name}: {rule}"
    again = write_json(json.loads(file.read_text()), tmp_path / "again.json")
    assert file.read_text() == again.read_text(), f"{file.name} is not as write_json writes it"


def test_every_result_is_in_a_report() -> None:
    text = "".join(p.read_text() for p in RESULTS.glob("*.md"))
    linked = set(re.findall(r"\]\(([^)]+\.json)\)", text))
    assert linked == {f.name for f in FILES}


def test_a_report_has_a_row_a_line(tmp_path) -> None:
    report = {
        "machine": {"cpu": "x", "gpus": []},
        "modes": {"none": {"speed": [1, 2]}, "ours": {"speed": [3, 4]}},
        "rows": [{"k": 1, "v": {"a": 1}}, {"k": 2, "v": {"a": 2}}],
        "rates": [0.5, 0.25],
        "empty": [],
    }
    file = write_json(report, tmp_path / "report.json")
    assert json.loads(file.read_text()) == report
    assert file.read_text().splitlines()[1:] == [
        ' "machine": {"cpu": "x", "gpus": []},',
        ' "modes": {',
        '  "none": {"speed": [1, 2]},',
        '  "ours": {"speed": [3, 4]}',
        " },",
        ' "rows": [',
        '  {"k": 1, "v": {"a": 1}},',
        '  {"k": 2, "v": {"a": 2}}',
        " ],",
        ' "rates": [0.5, 0.25],',
        ' "empty": []',
        "}",
    ]
    rows = write_json([{"a": 1}, {"a": 2}], tmp_path / "rows.json")
    assert rows.read_text() == '[\n {"a": 1},\n {"a": 2}\n]\n'
