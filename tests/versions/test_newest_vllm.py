"""The newest supported vLLM without a CPU wheel, run: its Python sources over the installed kernels."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from helpers import vllm_versions

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import versions

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def newest(tmp_path_factory) -> versions.Overlay:
    supported = vllm_versions.newest_of_each_minor(
        vllm_versions.released(vllm_versions.GPU), vllm_versions.supported()
    )
    if supported[-1] in vllm_versions.released(vllm_versions.CPU):
        pytest.skip(f"vLLM {supported[-1]} has a CPU wheel, which `make versions` runs")
    environment = versions.Overlay(tmp_path_factory.mktemp("newest"), supported[-1])
    environment.make()
    return environment


def test_it_is_what_is_imported(newest) -> None:
    assert newest.imported() == newest.version


@pytest.fixture(scope="module")
def results(newest) -> dict[str, dict[str, Any]]:
    """All columns in one session of pytest, which trains their drafter once."""
    return newest.run()


@pytest.mark.parametrize("column", versions.RUN)
def test_on_the_newest(results, column) -> None:
    assert results[column]["failed"] == {}
    assert results[column]["passed"] > 0
