"""Measured costs on their way from a worker to the engine core; vLLM has no way for a plugin's figures."""

from __future__ import annotations

import atexit
import json
import os
from pathlib import Path

from vllm_dflash.draft_length.cost import StepCost
from vllm_dflash.serving.draft_stats import stats_file


def _path(name: str) -> Path:
    return stats_file(name).with_suffix(".costs.json")


def give(name: str, cost: StepCost) -> None:
    """Leaves the costs for the engine called ``name``."""
    path = _path(name)
    part = path.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(cost.as_dict()))
    os.replace(part, path)
    atexit.register(path.unlink, missing_ok=True)


def take(name: str) -> StepCost | None:
    """The costs, once; None where there are none."""
    path = _path(name)
    try:
        text = path.read_text()
    except FileNotFoundError:
        return None
    path.unlink(missing_ok=True)
    return StepCost.from_dict(json.loads(text))
