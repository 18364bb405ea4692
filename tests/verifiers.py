"""Tiny random verifiers of many architectures, in float32."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

_COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 384,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 2,
}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_chunk_size": 16}
_GDN = {
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_conv_kernel_dim": 4,
}
#: model_type -> changes to the common configuration.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "phi3": {"original_max_position_embeddings": 512},
    "qwen3_moe": {**_MOE, "decoder_sparse_step": 1, "norm_topk_prob": True},
    "gemma3_text": {"sliding_window": 32, "query_pre_attn_scalar": 32, "tie_word_embeddings": True},
    "gemma2": {"sliding_window": 32, "query_pre_attn_scalar": 32, "tie_word_embeddings": True},
    "glm4": {"partial_rotary_factor": 0.5},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2},
    "olmo2": {},
    "gpt2": {
        "n_embd": 64, "n_layer": 4, "n_head": 2, "n_inner": 128, "n_positions": 512,
        "vocab_size": 384, "tie_word_embeddings": True, "eos_token_id": 2, "bos_token_id": None,
    },
    "cohere": {"tie_word_embeddings": True, "logit_scale": 1.0, "num_key_value_heads": 2},
    "starcoder2": {"tie_word_embeddings": False},
    "stablelm": {"partial_rotary_factor": 0.5, "num_key_value_heads": 2},
    # Hybrids: recurrent layers and attention. Hugging Face clamps Nemotron-H's time steps to at least
    # time_step_min, vLLM does not.
    "nemotron_h": {
        "hybrid_override_pattern": "M*-M*-", "ssm_state_size": 16, "mamba_num_heads": 8, "mamba_head_dim": 16,
        "n_groups": 2, "chunk_size": 16, "time_step_min": 1e-9,
    },
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"] * 2, "num_local_experts": 4, "num_experts_per_tok": 2,
        "shared_intermediate_size": 64, "attention_multiplier": 0.2, "position_embedding_type": "rope",
        **_MAMBA, "mamba_n_groups": 1,
    },
    "falcon_h1": {"mamba_d_ssm": 128, **_MAMBA},
    "qwen3_next": {
        **_MOE, "shared_expert_intermediate_size": 64, **_GDN,
        "layer_types": ["linear_attention", "full_attention"] * 2, "full_attention_interval": 2,
    },
}  # fmt: skip


def make(path: Path, model_type: str, tokenizer: Path, seed: int = 3) -> Path:
    """A random model of an architecture with the tokenizer of another folder.

    Weights as in ``tiny.make_verifier``: large enough that greedy output wanders.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    changes = ARCHITECTURES[model_type]
    given = changes if "n_embd" in changes else {**_COMMON, **changes}
    config = AutoConfig.for_model(model_type, dtype="float32", **given)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name or "ln_" in name or weight.dim() < 2:
                continue
            embeds = weight.shape[0] == 384
            weight.normal_(std=0.5 if embeds else 0.8 * weight.shape[-1] ** -0.5)
    model.save_pretrained(path)
    GenerationConfig(eos_token_id=2, pad_token_id=0).save_pretrained(path)
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
    ):
        if (tokenizer / name).exists():
            shutil.copy(tokenizer / name, path / name)
    return path
