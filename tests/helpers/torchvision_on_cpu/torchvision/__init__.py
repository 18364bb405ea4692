"""Makes PyPI's torchvision, a CUDA build, importable beside a CPU torch; the real one takes its place.

Its compiled ops do not load there, and it declares fakes for two of them all the same, which torch
refuses. vLLM imports torchvision for the processors of Qwen3.5 and never calls the ops. Put this folder's
parent before the folder of the real one on ``PYTHONPATH``.
"""

import importlib
import sys
from pathlib import Path

import torch

for _op in ("nms", "qnms"):
    torch.library.define(
        f"torchvision::{_op}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
    )
_here = Path(__file__).resolve().parents[1]
_path = sys.path[:]
sys.path[:] = [p for p in _path if Path(p or ".").resolve() != _here]
del sys.modules["torchvision"]
importlib.invalidate_caches()
importlib.import_module("torchvision")
sys.path[:] = _path
