"""Verifiers with LoRA adapters: the drafter serves beside them, and is not trained with one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import tiny
from vllm_dflash.training.config import EngineOptions
from vllm_dflash.training.engine import VerifierEngine

RANK = 4


def make_adapter(path: Path, verifier: Path) -> Path:
    """A random adapter of the attention projections in peft's format, strong enough to be seen."""
    path.mkdir()
    torch.manual_seed(7)
    weights = {}
    for name, weight in load_file(verifier / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if module.endswith(("q_proj", "v_proj")):
            n, k = weight.shape
            prefix = f"base_model.model.{module}"
            weights[f"{prefix}.lora_A.weight"] = torch.randn(RANK, k) * k**-0.5
            weights[f"{prefix}.lora_B.weight"] = torch.randn(n, RANK)
    save_file(weights, path / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": RANK, "bias": "none",
        "target_modules": ["q_proj", "v_proj"], "base_model_name_or_path": str(verifier),
    }  # fmt: skip
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


@pytest.mark.engine
@pytest.mark.long
def test_output_is_the_adapted_verifiers(verifier, prompts, tmp_path) -> None:
    """One request at a time: vLLM 0.32's CPU kernels give a step's adapter to all its requests."""
    adapter = make_adapter(tmp_path / "adapter", verifier)
    drafter = tiny.make_drafter(tmp_path / "drafter", verifier)
    job = {
        "engine": {
            "model": str(verifier),
            "max_model_len": 192,
            "max_num_seqs": 4,
            "enable_lora": True,
            "max_lora_rank": 8,
        },
        "runs": [
            {
                "name": "run",
                "prompts": prompts[:6],
                "params": {"temperature": 0.0, "max_tokens": 16, "ignore_eos": True},
                "lora": [str(adapter) if i % 2 else None for i in range(6)],
                "concurrency": 1,
            }
        ],
    }
    alone = tiny.engine_job(job, tmp_path)["runs"]["run"]["outputs"]
    job["engine"]["speculative_config"] = {"method": "dflash", "model": str(drafter)}
    out = tiny.engine_job(job, tmp_path)
    assert "runs" in out, (out.get("error"), out["log"][-2500:])
    assert out["runs"]["run"]["outputs"] == alone
    job["runs"][0]["lora"] = [None] * 6
    without = tiny.engine_job(job, tmp_path)["runs"]["run"]["outputs"]
    tokens = [[o[0]["token_ids"] for o in outputs] for outputs in (alone, without)]
    assert [a == b for a, b in zip(*tokens, strict=True)] == [True, False] * 3


def test_training_with_adapters_names_the_way_out(verifier) -> None:
    options = EngineOptions(extra={"enable_lora": True})
    with pytest.raises(ValueError, match="merge the adapter into the verifier"):
        VerifierEngine(str(verifier), "drafter", options)
