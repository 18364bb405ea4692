"""Fixtures shared by the tests that start engines."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import settings

pytest.register_assert_rewrite("helpers")

from helpers import tiny  # noqa: E402
from helpers.refusal import Refused  # noqa: E402
from helpers.trained import ARGS, Trained, cached, load  # noqa: E402

# The tests share their cores with the engines they start: an example may take any time.
torch.set_num_threads(1)
settings.register_profile("shared cores", deadline=None)
settings.load_profile("shared cores")


@pytest.fixture
def refused(monkeypatch, capsys) -> Refused:
    return Refused(monkeypatch, capsys)


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def verifier(models) -> Path:
    return tiny.make_verifier(models / "verifier")


@pytest.fixture(scope="session")
def prompts_file(models) -> Path:
    return tiny.write_prompts(models / "prompts.jsonl", 24)


@pytest.fixture(scope="session")
def trained(request, models) -> Trained:
    """Two layers, block 8, a draft vocabulary; learned its 24 prompts by heart.

    Kept in ``.pytest_cache`` for as long as nothing that decides the result changes.
    """
    cache = getattr(request.config, "cache", None)  # absent with -p no:cacheprovider
    store = models / "trained" if cache is None else Path(cache.mkdir("trained"))
    store.mkdir(exist_ok=True)
    return load(cached(store, ARGS), models, ARGS)


@pytest.fixture(scope="session")
def prompts(verifier, prompts_file) -> list[list[int]]:
    """The prompts as token ids."""
    return tiny.prompt_ids(verifier, prompts_file)
