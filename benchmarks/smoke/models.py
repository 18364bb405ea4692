"""Random models made here: tiny ones that run anywhere, and the shape of a real one without weights."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

VOCAB = 384
#: Draft tokens a step of the tiny drafters.
TINY_DRAFT = 7
_COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": VOCAB,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 2,
}
#: Verifiers by name: transformers' type and what differs. The hybrid has two Mamba-2 layers.
VERIFIERS: dict[str, dict[str, Any]] = {
    "qwen3": {"model_type": "qwen3"},
    "mamba2": {
        "model_type": "nemotron_h",
        "num_hidden_layers": 6,
        "hybrid_override_pattern": "M*-M*-",
        "ssm_state_size": 16,
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "n_groups": 2,
        "chunk_size": 16,
        "time_step_min": 1e-9,
    },
}
QWEN3_8B: dict[str, Any] = {
    "model_type": "qwen3",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "hidden_act": "silu",
    "attention_bias": False,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}


def make_verifier(path: Path, name: str) -> Path:
    """A random verifier in float32 whose greedy output wanders; made once."""
    if path.exists():
        return path
    from transformers import AutoConfig, AutoModelForCausalLM

    changes = dict(VERIFIERS[name])
    config = AutoConfig.for_model(changes.pop("model_type"), **{**_COMMON, **changes})
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() != 2:
                continue  # norms, convolutions, decays
            if "embed" in name or "lm_head" in name:
                weight.normal_(std=0.4 if "lm_head" in name else 1.4)
            else:
                weight.normal_(std=0.8 * weight.shape[1] ** -0.5)
    model.save_pretrained(path)
    return path


def make_drafter(path: Path, verifier: Path) -> Path:
    """A random drafter of two layers for a verifier; made once.

    All layers norm their keys alike: vLLM's own drafter on a CPU takes the first one's weight for all.
    """
    if path.exists():
        return path
    from helpers import tiny

    tiny.make_drafter(path, verifier, draft_block_size=TINY_DRAFT + 1)
    file = path / "model.safetensors"
    weights = load_file(file)
    norms = sorted(name for name in weights if name.endswith("k_norm.weight"))
    for name in norms:
        weights[name] = weights[norms[0]].clone()
    save_file(weights, file, metadata={"format": "pt"})
    return path


def write_shapes(folder: Path) -> tuple[Path, Path]:
    """Configurations of Qwen3-8B and a drafter for it, to be served with ``load_format="dummy"``."""
    drafter = {
        "architectures": ["DFlashDraftModel"],
        "num_hidden_layers": 5,
        "block_size": 16,
        "num_target_layers": 36,
        "dflash_config": {"target_layer_ids": [1, 9, 17, 25, 33], "mask_token_id": 5},
    }
    verifier = {"architectures": ["Qwen3ForCausalLM"], "num_hidden_layers": 36}
    for name, changes in (("verifier", verifier), ("drafter", drafter)):
        path = folder / "shapes" / name
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.json").write_text(json.dumps({**QWEN3_8B, **changes}, indent=2))
    return folder / "shapes" / "verifier", folder / "shapes" / "drafter"


def random_prompts(count: int, lengths: tuple[int, int], vocab: int) -> list[list[int]]:
    """Token ids; the same on every machine."""
    rng = random.Random(1)
    return [[rng.randrange(10, vocab) for _ in range(rng.randint(*lengths))] for _ in range(count)]
