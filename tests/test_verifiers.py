"""Verifiers of many architectures: features are Hugging Face's, output is theirs alone, training runs."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
import verifiers
from test_parity import drafted

pytestmark = pytest.mark.engine
#: Without vLLM's Eagle3 interface; the others are native or come through the Transformers backend.
TAPPED: tuple[str, ...] = ("glm4", "gpt2", "gemma3_text", "mixtral", "olmoe", "cohere", "stablelm")
NATIVE: tuple[str, ...] = ("qwen3", "phi3", "qwen3_moe", "olmo2", "starcoder2")
#: With recurrent layers, whose kernels run in float32 on the CPU.
HYBRID = ("nemotron_h", "granitemoehybrid", "falcon_h1")
TAPPED += HYBRID[1:]
NATIVE += HYBRID[:1]
DEFAULT = ("glm4", "gpt2", "nemotron_h")
MAX_TOKENS = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("verifiers")


def reference(
    verifier: Path, token_ids: list[int], layers: list[int], dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hugging Face's states behind the given layers ``[T, L * H]`` and logits ``[T, V]``, in float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(verifier, dtype=dtype).eval()
    with torch.no_grad():
        out = model(torch.tensor([token_ids]), output_hidden_states=True)
    states = torch.cat([out.hidden_states[i + 1] for i in layers], dim=-1)[0]
    return states.float(), out.logits[0].float()


def hidden_states(verifier: Path, token_ids: list[int], layers: list[int]) -> torch.Tensor:
    return reference(verifier, token_ids, layers)[0]


@pytest.mark.parametrize(
    "model_type",
    [pytest.param(m, marks=() if m in DEFAULT else pytest.mark.slow) for m in (*TAPPED, *NATIVE)],
)
def test_features_and_output(model_type, verifier, prompts, folder) -> None:
    path = verifiers.make(folder / model_type, model_type, verifier)
    layers = 1 if model_type in HYBRID else 2
    drafter = tiny.make_drafter(folder / f"{model_type}-drafter", path, num_hidden_layers=layers)
    engine = {"max_num_batched_tokens": 64}
    out = drafted(path, drafter, prompts[:6], folder, engine=engine, max_tokens=MAX_TOKENS)
    if model_type in TAPPED:
        assert out["tap"]
    raw = json.loads((drafter / "config.json").read_text())
    # Hugging Face has no state behind the last layer without the final norm.
    last = raw["num_target_layers"] - 1
    layers = [i for i in raw["dflash_config"]["target_layer_ids"] if i < last]
    assert len(layers) >= 2
    for i in range(6):
        got = out["features"][f"run:{i}"][:, : len(layers) * 64]
        want = hidden_states(path, out["sequences"][f"run:{i}"], layers)[: len(got)]
        torch.testing.assert_close(got, want, rtol=1e-5, atol=3e-5)
    job = {
        "engine": {"model": str(path), "max_model_len": 192, "max_num_seqs": 4},
        "runs": [
            {
                "name": "run",
                "prompts": prompts[:6],
                "params": {"temperature": 0.0, "max_tokens": MAX_TOKENS, "ignore_eos": True},
                "concurrency": 4,
            }
        ],
    }
    plain = tiny.engine_job(job, folder)
    for i, output in enumerate(plain["runs"]["run"]["outputs"]):
        assert out["sequences"][f"run:{i}"] == prompts[i] + output[0]["token_ids"]


@pytest.mark.slow
def test_gdn_in_bf16(verifier, prompts, folder) -> None:
    """vLLM's GDN kernels on the CPU are bf16 only: the bound is what bf16 costs Hugging Face's model itself."""
    path = verifiers.make(folder / "qwen3_next", "qwen3_next", verifier)
    drafter = tiny.make_drafter(folder / "qwen3_next-drafter", path, num_hidden_layers=1)
    engine = {"max_num_batched_tokens": 64, "dtype": "bfloat16"}
    out = drafted(path, drafter, prompts[:6], folder, engine=engine, max_tokens=MAX_TOKENS)
    layers = [0, 2]
    errors, bounds = [], []
    for i in range(6):
        key = f"run:{i}"
        tokens, start = out["sequences"][key], out["prompt_lens"][key]
        got = out["features"][key][:, : 2 * 64].float()
        want, logits = reference(path, tokens, layers)
        rounded, rounded_logits = reference(path, tokens, layers, torch.bfloat16)
        errors.append((got - want[: len(got)]).pow(2).mean().sqrt())
        bounds.append((rounded - want).pow(2).mean().sqrt())
        noise = (rounded_logits - logits).abs().max()
        for p in range(start, len(tokens)):
            row = logits[p - 1]
            assert row.max() - row[tokens[p]] <= 2 * noise, (key, p)
    assert max(bounds) < 0.2
    assert sum(errors) <= 1.1 * sum(bounds)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["gpt2", "nemotron_h", "granitemoehybrid"])
def test_training(model_type, verifier, prompts_file, folder) -> None:
    """gpt2 has tied embeddings that vLLM knows as transformer.wte, and no lm_head of its own."""
    path = verifiers.make(folder / f"{model_type}-train", model_type, verifier)
    out = folder / f"{model_type}-trained"
    args = (*tiny.TRAIN_ARGS, "--max-steps", "300", "--lr", "4e-3", "--anchors", "48")
    args += ("--sequences", "2", "--eval-data", prompts_file, "--eval-every", "150")
    tiny.cli("train", path, "--data", prompts_file, "-o", out, *args)
    summary = json.loads((out / "dflash_training.json").read_text())
    assert not summary["skipped"]
    # The prompts it learned by heart.
    assert summary["tau_heldout"]["tau"] > 1.5


BROKEN = """
import sys
from vllm_dflash import cli
from vllm_dflash.serving.features import FeatureRecorder

observe = FeatureRecorder.observe

def broken(self, request_ids, query_start_loc, positions, features_TF, num_rejected):
    features_TF = features_TF.clone()
    features_TF[:, 64:128] = 0
    observe(self, request_ids, query_start_loc, positions, features_TF, num_rejected)

FeatureRecorder.observe = broken
cli.main()
"""


@pytest.mark.slow
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


def test_layers_that_return_summed_states_are_known() -> None:
    """Layers that set ``residual`` anew for themselves: what they return has it in it already."""
    from vllm.model_executor import models

    from vllm_dflash.serving.adapter import _SUMMED

    found = set()
    for file in Path(models.__path__[0]).glob("*.py"):
        source = file.read_text()
        if "SupportsEagle3" in source:
            continue
        for layer in ast.walk(ast.parse(source)):
            if not isinstance(layer, ast.ClassDef) or "DecoderLayer" not in layer.name:
                continue
            forward = next((f for f in layer.body if getattr(f, "name", "") == "forward"), None)
            if forward is None:
                continue
            anew = {ast.unparse(s) for s in forward.body} & {"residual = hidden_states"}
            returned = [ast.unparse(n) for n in ast.walk(forward) if isinstance(n, ast.Return)]
            forgotten = "residual = None" in {ast.unparse(s) for s in forward.body}
            if anew and "return (hidden_states, residual)" in returned and not forgotten:
                found.add(layer.name)
    assert len(found) > 4
    assert found <= _SUMMED


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
