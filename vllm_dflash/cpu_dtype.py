"""What dtype ``auto`` is on a CPU: the one that its instructions are for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_dflash.checkpoint import weight_bytes
from vllm_dflash.environment import available_bytes, cpu_has_bfloat16, on_cpu
from vllm_dflash.verifier import Verifier

#: Share of the memory that is left which the weights may take.
_WEIGHTS_SHARE = 0.5
#: vLLM's kernels of these layers (GDN) are for bfloat16 only on a CPU.
_BFLOAT16_LAYERS = "linear_attention"


def verifier_dtype(
    dtype: str, verifier: Verifier, hf_config: Any, engine_args: Mapping[str, Any]
) -> str:
    """``float32`` in place of ``auto`` on a CPU without bfloat16 instructions, where 16 bits are emulated.

    ``auto`` stays for verifiers that run in 16 bits only (quantised ones, GDN layers) and where the weights
    would take more than half of the memory that is left.

    Args:
        dtype: as vLLM's ``--dtype``; all but ``auto`` stay.
        hf_config: transformers' configuration of the verifier.
        engine_args: the user's further ``EngineArgs``; a dtype or a quantisation among them stays.
    """
    if dtype != "auto" or not on_cpu() or cpu_has_bfloat16():
        return dtype
    text = hf_config.get_text_config()
    quantised = getattr(hf_config, "quantization_config", None) or engine_args.get("quantization")
    if "dtype" in engine_args or quantised:
        return dtype
    if _BFLOAT16_LAYERS in (getattr(text, "layer_types", None) or ()):
        return dtype
    on_disk = weight_bytes(verifier.model) or 0
    stored = str(getattr(hf_config, "dtype", None) or getattr(text, "dtype", None))
    wide = on_disk if stored.endswith("float32") else 2 * on_disk
    return dtype if wide > _WEIGHTS_SHARE * available_bytes() else "float32"


def float32_sentence(asked: str, dtype: str) -> str | None:
    """What to tell users whose ``auto`` became float32; None where nothing changed."""
    if asked == dtype:
        return None
    return (
        "the verifier runs in float32, the faster dtype on a CPU without bfloat16 instructions "
        "(--dtype bfloat16 for that)"
    )
