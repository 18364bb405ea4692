"""What is said of rejected rows, and when they are too many."""

from __future__ import annotations

import json

import pytest

from vllm_dflash.training.conversations import Rejected
from vllm_dflash.training.rejections import check_rejected, count_reasons, report_rejected

REJECTED = [
    *(Rejected(n, f"message {n} has the unknown role 'r{n}'", "{}") for n in range(3)),
    Rejected(9, "not JSON: line 1 column 50", "{"),
]


def test_reasons_of_one_kind_are_counted_together():
    assert count_reasons(r.reason for r in REJECTED) == [
        (3, "message 0 has the unknown role 'r0'"),
        (1, "not JSON: line 1 column 50"),
    ]


def test_they_are_said_and_kept(tmp_path):
    said, path = [], tmp_path / "rejected.jsonl"
    report_rejected(REJECTED, 8, path, 0.5, said.append)
    assert said == [
        f"4 of 8 rows are rejected, kept in {path}:",
        "  3 x message 0 has the unknown role 'r0' (first row 0)",
        "  1 x not JSON: line 1 column 50 (row 9)",
    ]
    assert [json.loads(line)["line"] for line in path.read_text().splitlines()] == [0, 1, 2, 9]
    report_rejected([], 8, path, 0.5, said.append)
    assert len(said) == 3
    assert path.read_text() == ""


def test_many_kinds_are_summed_up():
    said = []
    letters = [Rejected(1, f"reason {letter}", "") for letter in "abcdefg"]
    report_rejected(letters, 100, None, 0.5, said.append)
    assert said[0] == "7 of 100 rows are rejected:"
    assert said[-1] == "  2 x other reasons"


def test_too_many_are_an_error_that_says_where_they_are_and_the_way_out(tmp_path):
    path = tmp_path / "rejected.jsonl"
    with pytest.raises(ValueError, match=r"--max-rejected 0\.5") as error:
        report_rejected(REJECTED, 7, path, 0.5, pytest.fail)
    for part in ("4 of 7 rows", str(path), "3 x message 0", "--max-rejected 1 allows all"):
        assert part in str(error.value)
    assert len(path.read_text().splitlines()) == 4
    path.unlink()
    check_rejected(REJECTED, 8, path, 0.5)
    assert not path.exists()
