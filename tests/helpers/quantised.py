"""Quantised copies of a tiny Llama, in the formats of public checkpoints; weights rounded to nearest."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

GROUP = 32
_WEIGHTS = {"type": "int", "symmetric": True, "dynamic": False}
_COMPRESSED = {
    "int8": {
        "format": "int-quantized",
        "weights": {**_WEIGHTS, "num_bits": 8, "strategy": "channel"},
        "input_activations": {
            "type": "int", "symmetric": True, "dynamic": True, "num_bits": 8, "strategy": "token",
        },
    },
    "int4": {
        "format": "pack-quantized",
        "weights": {**_WEIGHTS, "num_bits": 4, "strategy": "group", "group_size": GROUP},
        "input_activations": None,
    },
}  # fmt: skip


def _pack(values: Tensor) -> Tensor:
    """Eight 4-bit values of the last dimension in an int32, the first one lowest."""
    shifts = torch.arange(0, 32, 4)
    packed = (values.long().unflatten(-1, (-1, 8)) << shifts).sum(-1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).int()


def _round(weight: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """Whole numbers ``[N, K]`` and their scales ``[N, K / group]``."""
    grouped = weight.unflatten(-1, (-1, group))
    scale = grouped.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    return (grouped / scale).round().flatten(-2), scale.squeeze(-1)


def quantise(source: Path, path: Path, scheme: str, exact: Path | None = None) -> Path:
    """Quantises all linear layers but lm_head.

    Args:
        scheme: ``int8`` (W8A8) or ``int4`` (both compressed-tensors), or ``awq``.
        exact: folder for a plain copy that has the weights which the quantised one stands for.
    """
    shutil.copytree(source, path)
    out, plain = {}, {}
    for name, weight in load_file(source / "model.safetensors").items():
        plain[name] = weight
        if not name.endswith("_proj.weight"):
            out[name] = weight
            continue
        module = name.removesuffix(".weight")
        bits = 8 if scheme == "int8" else 4
        group = weight.shape[1] if scheme == "int8" else GROUP
        whole, scale = _round(weight, bits, group)
        plain[name] = whole * scale.repeat_interleave(group, dim=1)
        if scheme == "int8":
            out[f"{module}.weight"] = whole.to(torch.int8)
            out[f"{module}.weight_scale"] = scale
        elif scheme == "int4":
            out[f"{module}.weight_packed"] = _pack(whole + 8)
            out[f"{module}.weight_scale"] = scale
            out[f"{module}.weight_shape"] = torch.tensor(weight.shape)
        else:
            order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
            columns = (whole + 8).T.unflatten(-1, (-1, 8))[..., order].flatten(-2)
            out[f"{module}.qweight"] = _pack(columns)
            out[f"{module}.qzeros"] = _pack(torch.full_like(scale.T, 8))
            out[f"{module}.scales"] = scale.T.contiguous()
    config = json.loads((source / "config.json").read_text())
    if exact is not None:
        shutil.copytree(source, exact)
        save_file(plain, exact / "model.safetensors", {"format": "pt"})
    quantisation: dict[str, Any]
    if scheme == "awq":
        quantisation = {
            "quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm",
        }  # fmt: skip
    else:
        made = dict(_COMPRESSED[scheme])
        quantisation = {
            "quant_method": "compressed-tensors",
            "format": made.pop("format"),
            "quantization_status": "compressed",
            "ignore": ["lm_head"],
            "config_groups": {"group_0": {"targets": ["Linear"], **made}},
        }
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": quantisation}))
    save_file(out, path / "model.safetensors", {"format": "pt"})
    return path
