"""Verifiers of many architectures: features are Hugging Face's, output is theirs alone, training runs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers import tiny, verifiers
from helpers.parity import drafted

pytestmark = pytest.mark.engine
#: Without vLLM's Eagle3 interface; the others are native or come through the Transformers backend.
TAPPED = (
    "glm4", "gpt2", "gemma3_text", "mixtral", "olmoe", "cohere", "stablelm", "idefics3",
    "granitemoehybrid", "falcon_h1",
)  # fmt: skip
NATIVE = ("qwen3", "phi3", "qwen3_moe", "olmo2", "starcoder2", "gemma2", "nemotron_h", "qwen3_next")
MARKS = {"glm4": (), "gpt2": pytest.mark.long, "nemotron_h": pytest.mark.long}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("verifiers")


@pytest.fixture(scope="module")
def table(folder, verifier) -> Path:
    shutil.copytree(verifier, folder / "tokenizer")
    return folder


@pytest.mark.parametrize(
    "model_type",
    [pytest.param(m, marks=MARKS.get(m, pytest.mark.slow)) for m in (*TAPPED, *NATIVE)],
)
def test_features_and_output(model_type, prompts_file, prompts, table) -> None:
    row = verifiers.examine(model_type, table, prompts_file, prompts[:6], train=False)
    assert row["path"] == ("tap" if model_type in TAPPED else "native"), row
    if model_type in verifiers.BF16:
        assert row["feature_max_abs_diff"] < 1.5 * row["rounding_max_abs_diff"] < 0.1, row
        assert row["tokens_beyond_rounding"] == 0, row
    else:
        assert row["feature_max_abs_diff"] < 1e-4, row
        assert row["lossless"], row


@pytest.mark.parametrize(
    "model_type",
    [
        pytest.param("nemotron_h", marks=pytest.mark.long),
        pytest.param("falcon_h1", marks=pytest.mark.slow),
    ],
)
def test_hybrids_with_drafts_of_any_length(model_type, verifier, prompts, folder) -> None:
    """Steps without drafts between steps with some: recurrent states go on from the accepted token."""
    path = verifiers.make(folder / f"{model_type}-any", model_type, verifier)
    drafter = tiny.make_drafter(folder / f"{model_type}-any-drafter", path)
    runs = [
        drafted(path, drafter, prompts[:8], folder, max_tokens=48, random_lengths=random)
        for random in (False, True)
    ]
    assert runs[0]["sequences"] == runs[1]["sequences"]
    figures = runs[1]["lengths"]
    assert min(figures["lengths"]) > 0
    assert 0 < figures["drafted_steps"] < figures["steps"]
    # Draft passes never pay: the drafter's context waits while cache blocks pass to other layers.
    job = {"costs": [0.01, 0.01, 1.0]}
    none = drafted(
        path, drafter, prompts[:8], folder, max_tokens=48, job=job, dflash_draft_length="auto"
    )
    assert none["sequences"] == runs[0]["sequences"]
    assert none["lengths"]["drafted_steps"] < none["lengths"]["steps"] / 2


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["gpt2", "nemotron_h", "granitemoehybrid"])
def test_training(model_type, verifier, prompts_file, folder) -> None:
    """gpt2 has tied embeddings that vLLM knows as transformer.wte, and no lm_head of its own."""
    path = verifiers.make(folder / f"{model_type}-train", model_type, verifier)
    out = folder / f"{model_type}-trained"
    args = (*tiny.TRAIN_ARGS, "--max-steps", "300", "--lr", "4e-3", "--num-anchors", "48")
    args += ("--batch-size", "2", "--eval-data", prompts_file, "--eval-every", "150")
    tiny.cli("train", path, "--data", prompts_file, "-o", out, *args)
    summary = json.loads((out / "dflash_training.json").read_text())
    assert not summary["skipped"]
    # The prompts it learned by heart.
    assert summary["tau_heldout"]["tau"] > 1.5


BROKEN = """
import sys
from vllm_dflash import cli
from vllm_dflash.serving.worker.features.recorder import FeatureRecorder

observe = FeatureRecorder.observe

def broken(self, *, features_TF, **step):
    features_TF = features_TF.clone()
    features_TF[:, 64:128] = 0
    observe(self, features_TF=features_TF, **step)

FeatureRecorder.observe = broken
cli.main()
"""


def test_broken_extraction_stops_training(verifier, prompts_file, folder) -> None:
    args = ("train", verifier, "--data", prompts_file, "-o", folder / "never", *tiny.TRAIN_ARGS)
    done = subprocess.run(
        [sys.executable, "-c", BROKEN, *map(str, args)],
        env=tiny.environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 1, done.stderr
    assert "are zero behind verifier layer 2 (" in done.stderr
    assert not (folder / "never").exists()


@pytest.mark.slow
def test_v2_runner(verifier, prompts, folder) -> None:
    path = verifiers.make(folder / "glm4-v2", "glm4", verifier)
    drafter = tiny.make_drafter(folder / "glm4-v2-drafter", path)
    out = drafted(path, drafter, prompts[:4], folder, max_tokens=8, runner="v2")
    assert out["tap"]
    assert out["runner"].startswith("vllm.v1.worker.cpu.model_runner")


def test_what_cannot_be_tapped_names_the_way_out() -> None:
    from types import SimpleNamespace as N

    from torch import nn

    from vllm_dflash.serving.worker.features.layer_hooks import adapt_verifier

    def config(layers: int = 4, stages: int = 1, **speculative) -> N:
        return N(
            parallel_config=N(pipeline_parallel_size=stages, use_ubatching=False),
            speculative_config=N(disable_padded_drafter_batch=False, **speculative),
            model_config=N(get_total_num_hidden_layers=lambda: layers, get_hidden_size=lambda: 8),
        )

    class Verifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    device = torch.device("cpu")
    for given, message in (
        (config(stages=2), "pipeline-parallel-size"),
        (
            config(layers=5),
            "cannot find the 5 decoder layers of Verifier.*--model-impl transformers",
        ),
        (config(), "cannot find the token embedding of Verifier"),
    ):
        with pytest.raises(ValueError, match=message):
            adapt_verifier(Verifier(), given, device)
