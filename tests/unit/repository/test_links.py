"""Links and pictures of the Markdown files lead somewhere; a heading, where they name one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PAGES = sorted(
    p
    for folder in (".", "docs", "tests", "benchmarks")
    for p in ROOT.joinpath(folder).glob("*.md" if folder == "." else "**/*.md")
)
LINK = re.compile(r"\[[^]]*\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """GitHub's anchors of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def test_there_are_pages() -> None:
    assert {"README.md", "CONTRIBUTING.md", "serving.md", "log.md"} <= {p.name for p in PAGES}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_of_a_page(page) -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
    for link in LINK.findall(text):
        if link.startswith(("http://", "https://")):
            continue
        path, _, heading = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        assert not heading or heading in anchors(target), link


@pytest.mark.parametrize("page", [p for p in PAGES if "results" in p.parts], ids=lambda p: p.name)
def test_reports_name_question_setup_and_caveats(page) -> None:
    if page.name != "README.md":
        text = page.read_text()
        for part in ("**Question.**", "**Setup.**", "**Caveats.**", "**Files.**", "\n|---"):
            assert part in text, part
