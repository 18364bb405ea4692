"""Tiny random verifiers of many architectures, in float32."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from helpers import tiny
from helpers.parity import drafted

MAX_TOKENS = 16

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
    "mistral": {"sliding_window": 32},
    "qwen2": {},
    "qwen2_moe": {
        **_MOE, "shared_expert_intermediate_size": 64, "decoder_sparse_step": 1, "norm_topk_prob": True,
    },
    "granite": {"logits_scaling": 2.0, "residual_multiplier": 0.5},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma": {"tie_word_embeddings": True},
    "gemma4_text": {
        "sliding_window": 32, "tie_word_embeddings": True, "num_kv_shared_layers": 0, "global_head_dim": 64,
        "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
        "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 384,
    },
    "gemma3n_text": {
        "sliding_window": 32, "tie_word_embeddings": True, "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": 384, "laurel_rank": 16,
        "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
        "intermediate_size": [128] * 4, "activation_sparsity_pattern": [0.0] * 4,
    },
    "glm4_moe": {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "n_shared_experts": 1,
        "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "partial_rotary_factor": 0.5,
    },
    "exaone4": {
        "sliding_window": 32, "num_key_value_heads": 2,
        "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
    },
    "cohere2": {
        # vLLM's window is wider by one, on purpose: wide enough here for neither to matter.
        "tie_word_embeddings": True, "logit_scale": 1.0, "num_key_value_heads": 2, "sliding_window": 512,
        "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
    },
    "ernie4_5": {"use_bias": False},
    "falcon": {
        "new_decoder_architecture": False, "multi_query": True, "parallel_attn": True, "bias": False,
        # vLLM's is always four times as wide.
        "alibi": False, "ffn_hidden_size": 256, "head_dim": None, "num_key_value_heads": None,
        "num_kv_heads": 1,
    },
    "bloom": {"n_layer": 4, "n_head": 2, "tie_word_embeddings": True},
    "gptj": {
        "n_embd": 64, "n_layer": 4, "n_head": 2, "n_inner": 128, "n_positions": 512, "rotary_dim": 16,
        "vocab_size": 384, "tie_word_embeddings": False, "eos_token_id": 2, "bos_token_id": None,
    },
    "opt": {
        "ffn_dim": 128, "word_embed_proj_dim": 64, "do_layer_norm_before": True, "tie_word_embeddings": True,
    },
    "nemotron": {"partial_rotary_factor": 0.5},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 32},
    "apertus": {},
    "hyperclovax": {},
    "arcee": {},
    "smollm3": {},
    "minicpm3": {
        "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32,
        "v_head_dim": 32, "num_key_value_heads": 2, "dim_model_base": 64,
    },
    "idefics3": {
        "text_config": {**_COMMON, "model_type": "llama"},
        "vision_config": {
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 28, "patch_size": 14,
        },
        "image_token_id": 5, "scale_factor": 2, "pad_token_id": 0, "tie_word_embeddings": False,
    },
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
    "qwen3_5_text": {
        **_GDN, "layer_types": ["linear_attention", "full_attention"] * 2, "full_attention_interval": 2,
    },
    "qwen3_5_moe_text": {
        **_MOE, "shared_expert_intermediate_size": 64, **_GDN,
        "layer_types": ["linear_attention", "full_attention"] * 2, "full_attention_interval": 2,
    },
}  # fmt: skip
#: With recurrent layers: vLLM's own n-gram speculation is tried on them (``ngram``: lossless, or its error).
HYBRIDS = {
    "nemotron_h",
    "granitemoehybrid",
    "falcon_h1",
    "qwen3_next",
    "qwen3_5_text",
    "qwen3_5_moe_text",
}
#: vLLM's GDN kernels on the CPU know no other: features are compared with what rounding costs Hugging Face.
BF16 = {"qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"}
_TAG = "<|reserved_0|>"
#: What vLLM reads beside the configuration to start a multimodal model: file -> contents, or changes to it.
PROCESSORS: dict[str, dict[str, dict[str, Any]]] = {
    "idefics3": {
        "preprocessor_config.json": {
            "image_processor_type": "Idefics3ImageProcessorPil",
            "size": {"longest_edge": 28}, "max_image_size": {"longest_edge": 28},
        },
        "processor_config.json": {"processor_class": "Idefics3Processor", "image_seq_len": 1},
        "tokenizer_config.json": {
            "extra_special_tokens": dict.fromkeys(
                ("image_token", "fake_image_token", "global_image_tag", "end_of_utterance_token"), _TAG
            ),
        },
    }
}  # fmt: skip


def auto_class(model_type: str) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if model_type in PROCESSORS else AutoModelForCausalLM


def make(
    path: Path, model_type: str, tokenizer: Path, seed: int = 3, head_std: float | None = None
) -> Path:
    """A random model of an architecture with the tokenizer of another folder.

    Weights as in ``tiny.make_verifier``: large enough that greedy output wanders. ``head_std`` is that of
    the embedding and lm_head.
    """
    from transformers import AutoConfig, GenerationConfig

    changes = ARCHITECTURES[model_type]
    own = {"n_embd", "d_model", "text_config"}
    given = changes if own & set(changes) else {**_COMMON, **changes}
    given = {
        k: v
        for k, v in given.items()
        if v is not None or k not in ("head_dim", "num_key_value_heads")
    }
    config = AutoConfig.for_model(model_type, dtype="float32", **given)
    torch.manual_seed(seed)
    model = auto_class(model_type).from_config(config).float()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name or "ln_" in name or weight.dim() != 2:
                continue
            if weight.shape[0] == 384:
                # Tied embeddings predict the token they embed unless the layers outweigh them.
                weight.normal_(std=head_std or (0.02 if config.tie_word_embeddings else 0.5))
            else:
                weight.normal_(std=0.8 * weight.shape[-1] ** -0.5)
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
    for name, contents in PROCESSORS.get(model_type, {}).items():
        file = path / name
        old = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(old | contents))
    return path


def reference(
    verifier: Path, token_ids: list[int], layers: list[int], dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hugging Face's states behind the given layers ``[T, L * H]`` and logits ``[T, V]``, as float32."""
    model_type = json.loads((verifier / "config.json").read_text())["model_type"]
    # sdpa leaves out Gemma 2's soft cap.
    model = (
        auto_class(model_type)
        .from_pretrained(verifier, dtype=dtype, attn_implementation="eager")
        .eval()
    )
    with torch.no_grad():
        out = model(torch.tensor([token_ids]), output_hidden_states=True)
    states = torch.cat([out.hidden_states[i + 1] for i in layers], dim=-1)[0]
    return states.float(), out.logits[0].float()


def examine(
    model_type: str, folder: Path, prompts_file: Path, prompts: list[list[int]], train: bool
) -> dict[str, Any]:
    """Serves and trains with a tiny random model of an architecture; a row of the table in the docs.

    Args:
        folder: where the models go; ``folder / "tokenizer"`` has the tokenizer of the prompts.
        train: also 20 steps of ``vllm-dflash train``.

    Returns:
        ``dtype`` of the engine; ``path``: native (vLLM's Eagle3 interface), tap (our hooks) or refused,
        with the ``reason``; ``feature_max_abs_diff`` against Hugging Face in float32, and for bf16 engines
        ``rounding_max_abs_diff`` of Hugging Face in bf16 and ``tokens_beyond_rounding``, output that it
        finds worse than its best by more than rounding; ``lossless``: greedy output as without the drafter;
        ``distinct_tokens`` of that output.
    """
    verifier = make(folder / model_type, model_type, folder / "tokenizer")
    drafter = tiny.make_drafter(folder / f"{model_type}-drafter", verifier)
    raw = json.loads((verifier / "config.json").read_text())
    dtype = "bfloat16" if model_type in BF16 else "float32"
    row: dict[str, Any] = {
        "architecture": raw["architectures"][0],
        "model_type": model_type,
        "dtype": dtype,
    }
    run = {
        "name": "run",
        "prompts": prompts,
        "params": {"temperature": 0.0, "max_tokens": MAX_TOKENS, "ignore_eos": True},
        "concurrency": 4,
    }
    engine: dict[str, Any] = {"dtype": dtype}
    if model_type in PROCESSORS:
        engine["limit_mm_per_prompt"] = {"image": 0}
    same = {"model": str(verifier), "max_model_len": 192, "max_num_seqs": 4}
    plain = tiny.engine_job({"engine": same | engine, "runs": [run]}, folder)
    if "error" in plain:
        return {**row, "path": "refused", "reason": f"vLLM alone: {first_line(plain['error'])}"}
    # Prompts in chunks and several requests a step.
    out = drafted(
        verifier,
        drafter,
        prompts,
        folder,
        engine=engine | {"max_num_batched_tokens": 64},
        max_tokens=MAX_TOKENS,
    )
    if "error" in out:
        return {**row, "path": "refused", "reason": first_line(out["error"])}
    row |= {"path": "tap" if out["adapted"] else "native", "served_as": out["verifier"]}
    alone = [o[0]["token_ids"] for o in plain["runs"]["run"]["outputs"]]
    row["lossless"] = all(
        out["sequences"][f"run:{i}"] == prompt + tokens
        for i, (prompt, tokens) in enumerate(zip(prompts, alone, strict=True))
    )
    row["distinct_tokens"] = len({t for tokens in alone for t in tokens})
    raw = json.loads((drafter / "config.json").read_text())
    # Hugging Face has no state behind the last layer without the final norm.
    last = raw["num_target_layers"] - 1
    layers = [i for i in raw["dflash_config"]["target_layer_ids"] if i < last]
    width = len(layers) * raw["target_hidden_size"]
    differences, rounding, largest, wrong = [], [], 0.0, 0
    for i, prompt in enumerate(prompts):
        token_ids = out["sequences"][f"run:{i}"]
        got = out["features"][f"run:{i}"][:, :width].float()
        want, logits = reference(verifier, token_ids, layers)
        want = want[: len(got)]
        differences.append((got - want).abs().max().item())
        largest = max(largest, want.abs().max().item())
        if model_type not in BF16:
            continue
        rounded, rounded_logits = reference(verifier, token_ids, layers, torch.bfloat16)
        rounding.append((rounded[: len(got)] - want).abs().max().item())
        chosen = logits[len(prompt) - 1 : -1]
        short = (
            chosen.amax(-1) - chosen.gather(-1, torch.tensor([token_ids[len(prompt) :]]).T)[:, 0]
        )
        wrong += int((short > 2 * (rounded_logits - logits).abs().max()).sum())
    row |= {"feature_max_abs_diff": max(differences), "feature_max_abs": largest}
    if rounding:
        row |= {"rounding_max_abs_diff": max(rounding), "tokens_beyond_rounding": wrong}
    if model_type in HYBRIDS:
        ngram = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3}
        job = {"engine": same | engine, "runs": [run]}
        # Beside speculation, recurrent layers' prefix caching needs a Triton kernel.
        job["engine"] |= {"speculative_config": ngram, "enable_prefix_caching": False}
        try:
            outputs = tiny.engine_job(job, folder)["runs"]["run"]["outputs"]
            row["ngram"] = [o[0]["token_ids"] for o in outputs] == alone
        except AssertionError as error:
            row["ngram"] = str(error).strip().splitlines()[-1]
    if train:
        args = (
            *tiny.TRAIN_ARGS,
            "--dtype",
            engine.pop("dtype"),
            "--engine-args",
            json.dumps(engine),
            "--max-steps",
            "20",
            "--lr",
            "2e-3",
            "--num-anchors",
            "16",
        )
        trained = folder / f"{model_type}-trained"
        try:
            tiny.cli("train", verifier, "--data", prompts_file, "-o", trained, *args)
            row["train_smoke"] = (trained / "model.safetensors").exists()
        except AssertionError as error:
            row |= {"train_smoke": False, "reason": str(error).strip().splitlines()[-1]}
    return row


def first_line(text: str) -> str:
    return text.strip().splitlines()[0] if text.strip() else "no message"
