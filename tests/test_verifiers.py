"""Verifiers of many architectures: features are Hugging Face's, output is theirs alone, training runs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tiny
import torch
import verifiers
from test_parity import drafted

pytestmark = pytest.mark.engine
#: Without vLLM's Eagle3 interface; the others are native or come through the Transformers backend.
TAPPED = ("glm4", "gpt2", "gemma3_text", "mixtral", "olmoe", "cohere", "stablelm", "idefics3")
NATIVE = ("qwen3", "phi3", "qwen3_moe", "olmo2", "starcoder2", "gemma2")
DEFAULT = ("glm4", "gpt2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("verifiers")


@pytest.fixture(scope="module")
def table(folder, verifier) -> Path:
    shutil.copytree(verifier, folder / "tokenizer")
    return folder


@pytest.mark.parametrize(
    "model_type",
    [pytest.param(m, marks=() if m in DEFAULT else pytest.mark.slow) for m in (*TAPPED, *NATIVE)],
)
def test_features_and_output(model_type, prompts_file, prompts, table) -> None:
    row = verifiers.examine(model_type, table, prompts_file, prompts[:6], train=False)
    assert row["path"] == ("tap" if model_type in TAPPED else "native"), row
    assert row["feature_max_abs_diff"] < 1e-4, row
    assert row["lossless"], row


@pytest.mark.slow
def test_training_on_a_tapped_verifier(verifier, prompts_file, folder) -> None:
    """One with tied embeddings that vLLM knows as transformer.wte, and no lm_head of its own."""
    path = verifiers.make(folder / "gpt2-train", "gpt2", verifier)
    args = (*tiny.TRAIN_ARGS, "--max-steps", "20", "--lr", "2e-3", "--anchors", "16")
    tiny.cli("train", path, "--data", prompts_file, "-o", folder / "trained", *args)
    assert (folder / "trained" / "model.safetensors").exists()


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

    from vllm_dflash.serving.adapter import adapt_verifier

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
