"""The same training on both of vLLM's model runners; the V2 runner's kernels are interpreted."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_train_engine import metric_steps, same_weights, stop_at

from helpers import tiny

pytestmark = [pytest.mark.engine, pytest.mark.long]

STEPS = 300  # many more than the steps of one call to the workers
ARGS = (
    *tiny.TRAIN_ARGS, "--max-tokens", "16", "--lr", "2e-3", "--num-anchors", "16", "--batch-size", "2",
    "--max-steps", str(STEPS), "--holdout", "0.25", "--eval-every", "150",
)  # fmt: skip


def features(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.rglob("*.safetensors"))
    return {f"{f.stem}/{k}": v for f in files for k, v in load_file(f).items()}


def test_v2_trains_what_v1_trains(verifier, tmp_path) -> None:
    """Responses, features, metrics and weights are V1's to rounding; what is stopped resumes bit for bit."""
    data = tiny.write_prompts(tmp_path / "prompts.jsonl", 8)

    def train(name: str) -> list[str | Path]:
        cache = ("--cache-features", tmp_path / f"{name}-cache")
        return ["train", verifier, "--data", data, "-o", tmp_path / name, *cache, *ARGS]

    for v2, name in ((False, "v1"), (True, "v2")):
        done = tiny.cli(*train(name), v2=v2)
        assert ("using the V1 model runner" in done.stdout) != v2

    responses = [(tmp_path / f"{n}-run" / "responses.jsonl").read_text() for n in ("v1", "v2")]
    assert sorted(responses[0].splitlines()) == sorted(responses[1].splitlines())
    v1, v2 = (features(tmp_path / f"{n}-cache") for n in ("v1", "v2"))
    assert v1.keys() == v2.keys()
    assert sum(len(x) for x in v1.values()) > 300
    for key, value in v1.items():
        torch.testing.assert_close(v2[key], value, rtol=1e-5, atol=1e-5)
    v1, v2 = (load_file(tmp_path / n / "model.safetensors") for n in ("v1", "v2"))
    for key, value in v1.items():
        torch.testing.assert_close(v2[key], value, rtol=1e-4, atol=1e-5)
    tau = [
        json.loads((tmp_path / n / "dflash_training.json").read_text())["tau_heldout"]
        for n in ("v1", "v2")
    ]
    assert tau[0]["num_drafts"] == tau[1]["num_drafts"] > 10

    resumed = [*train("resumed"), "--save-minutes", "0"]
    code, err = stop_at(
        tiny.cli_command(*resumed, v2=True), tmp_path / "resumed-run", 8, signal.SIGTERM
    )
    assert code == 128 + signal.SIGTERM, err
    stopped = json.loads((tmp_path / "resumed-run" / "state.json").read_text())["step"]
    assert 8 < stopped < STEPS
    assert f"resuming at step {stopped}" in tiny.cli(*resumed, v2=True).stderr
    assert metric_steps(tmp_path / "resumed-run") == list(range(STEPS))
    assert same_weights(tmp_path / "resumed", tmp_path / "v2")
