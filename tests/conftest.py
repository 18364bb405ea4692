"""Fixtures shared by the tests that start engines."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny
import torch
from refusal import Refused

# The tests share their cores with the engines they start.
torch.set_num_threads(1)


@dataclass(frozen=True)
class Trained:
    """A drafter made by ``vllm-dflash train``, and what it was made from."""

    verifier: Path
    prompts: Path
    drafter: Path
    run: Path
    args: tuple[str, ...]
    output: str

    @property
    def summary(self) -> dict:
        return json.loads((self.drafter / "dflash_training.json").read_text())


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
def trained(models, verifier, prompts_file) -> Trained:
    """Two layers, block 8, a draft vocabulary; learned its 24 prompts by heart."""
    out = models / "drafter"
    args = (*tiny.TRAIN_ARGS, "--draft-vocab", "256", "--lr", "4e-3", "--num-anchors", "48")
    args += ("--batch-size", "2", "--max-steps", "300", "--holdout", "0.1", "--eval-every", "150")
    done = tiny.cli("train", verifier, "--data", prompts_file, "-o", out, *args)
    return Trained(verifier, prompts_file, out, models / "drafter-run", args, done.stderr)


@pytest.fixture(scope="session")
def prompts(verifier, prompts_file) -> list[list[int]]:
    """The prompts as token ids."""
    return tiny.prompt_ids(verifier, prompts_file)
