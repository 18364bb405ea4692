"""README's chart is drawn from the demo's figures that README names."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT / "tools"))

import demo_chart  # noqa: E402


@pytest.fixture
def report() -> dict:
    (name,) = set(
        re.findall(r"benchmarks/results/demo_[\w.-]+\.json", (ROOT / "README.md").read_text())
    )
    return json.loads((ROOT / name).read_text())


def test_the_chart_is_of_the_figures_that_readme_names(report) -> None:
    drawn = demo_chart.draw(report)
    assert (ROOT / "docs/img/demo.svg").read_text() == drawn, "run tools/demo_chart.py on that file"


def test_the_chart_has_a_bar_and_a_figure_for_each_point(report) -> None:
    root = ElementTree.fromstring(demo_chart.draw(report))
    bars = [float(e.get("width")) for e in root.iter() if e.tag.endswith("rect")][1:]
    texts = " ".join(e.text for e in root.iter() if e.tag.endswith("text"))
    speeds = [
        point["output_tokens_per_s"]["median"]
        for number in report["modes"]["none"]
        for point in (points[number] for points in report["modes"].values())
    ]
    assert len(bars) == len(speeds)
    assert max(b / s for b, s in zip(sorted(bars), sorted(speeds), strict=True)) == pytest.approx(
        min(b / s for b, s in zip(sorted(bars), sorted(speeds), strict=True)), rel=0.01
    )
    for speed in speeds:
        assert f"{speed:.0f} tokens/s" in texts


def test_a_report_without_all_modes_is_refused(report) -> None:
    del report["modes"]["none"]
    with pytest.raises(ValueError, match="lacks the modes none"):
        demo_chart.draw(report)
