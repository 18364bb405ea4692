"""Drafter layouts from the command line to the engine: trained, saved, evaluated, served."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers import tiny
from helpers.parity import Reference, check_drafts, drafted
from helpers.verifiers import make

pytestmark = pytest.mark.engine
LAYOUTS = {
    "mixed, narrow": (
        "--num-layers", "3", "--layer-types", "sliding,full,sliding", "--sliding-window", "24",
        "--hidden-size", "48", "--head-dim", "64", "--draft-vocab", "300",
    ),
    "from anchor": ("--sample-from-anchor", "--block-size", "7", "--num-kv-heads", "2"),
    "causal, wide": ("--causal", "--hidden-size", "96", "--num-heads", "3", "--num-kv-heads", "3"),
    "not causal": (
        "--layer-types", "sliding,sliding", "--sliding-window", "24", "--no-causal",
        "--checkpoint-format", "speculators",
    ),
}  # fmt: skip
#: Verifiers that vLLM has no Eagle3 interface for; the others are Llamas.
FAMILIES = {"gemma": "gemma3_text", "glm": "glm4"}


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(n, marks=pytest.mark.long if n == "mixed, narrow" else pytest.mark.slow)
        for n in (*LAYOUTS, *FAMILIES)
    ],
)
def test_trains_and_serves(layout, verifier, prompts_file, prompts, tmp_path, capsys) -> None:
    """Acceptance grows, tau offline is the engine's, and the engine's drafts are the PyTorch drafter's."""
    args = [*tiny.TRAIN_ARGS, "--max-steps", "300", "--lr", "4e-3", "--num-anchors", "48"]
    args += ["--batch-size", "2"]
    if layout in FAMILIES:
        verifier = make(tmp_path / "verifier", FAMILIES[layout], verifier)
    drafter = tmp_path / "drafter"
    tiny.cli(
        "train", verifier, "--data", prompts_file, "-o", drafter, *args, *LAYOUTS.get(layout, ())
    )
    # On the training prompts: what is compared is the engine with PyTorch, not how well it generalises.
    tiny.cli(
        "eval", verifier, drafter, "--data", prompts_file, "--engine", "-o", tmp_path / "eval.json",
        "--dtype", "float32", "--max-len", "192", "--max-tokens", "96", "--concurrency", "4",
        "--engine-args", '{"enforce_eager": true}',
    )  # fmt: skip
    got = json.loads((tmp_path / "eval.json").read_text())
    offline, engine = got["offline"], got["engine"]
    with capsys.disabled():
        print(f"\n{layout}: tau offline {offline['tau']:.3f}, engine {engine['tau']:.3f}")
    assert offline["tau"] > 1.3
    # The engine also counts what it accepts beyond a response's end.
    assert engine["tau"] == pytest.approx(offline["tau"], rel=0.02)
    assert engine["num_drafts"] == pytest.approx(offline["num_drafts"], rel=0.01)
    out = drafted(verifier, drafter, prompts[:6], tmp_path)
    reference = Reference(verifier, drafter)
    assert check_drafts(out, reference, reference.config.num_speculative_tokens) > 300
    assert Path(out["runner"].replace(".", "/")).name == "cpu_model_runner"
