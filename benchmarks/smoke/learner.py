"""Part 2: a training step at the shapes of real drafters, with a random head. Needs no vLLM."""

from __future__ import annotations

import gc
import math
import re
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from smoke.rows import Context, last_line
from vllm_dflash.config import DrafterConfig
from vllm_dflash.training.config import Hyperparameters
from vllm_dflash.training.learner import Learner, Sample, SharedHead

LAYERS, BLOCK, TAPS = 5, 16, 5
STEPS = 4
#: Names of attention kernels and operators.
ATTENTION = re.compile(r"attention|attn|fmha|flash|flex", re.IGNORECASE)
#: SDPA's fallback, which keeps all scores.
MATH = re.compile(r"_scaled_dot_product_attention_math")
_GIB = 2**30


@dataclass(frozen=True)
class Shape:
    """A drafter's, by its verifier."""

    name: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tokens: int = 3072
    anchors: tuple[int, ...] = (64, 128, 512)

    @property
    def head_width(self) -> int:
        return self.heads * self.head_dim

    def flops(self, anchors: int) -> float:
        """Of a step by arithmetic, multiplications and additions, nothing recomputed.

        Three passes (forward, and backward by input and by weight); two over the head, which is frozen.
        Anchors are spread over the sequence, so a block sees half of it on average.
        """
        rows = anchors * BLOCK
        kv = 2 * self.hidden * self.kv_heads * self.head_dim
        layer = 2 * self.hidden * self.head_width + kv + 3 * self.hidden * self.intermediate
        context = LAYERS * kv + TAPS * self.hidden * self.hidden
        attention = 12 * rows * self.head_width * (self.tokens / 2 + BLOCK) * LAYERS
        return (
            6 * LAYERS * layer * rows
            + 6 * context * self.tokens
            + attention
            + 4 * self.vocab * self.hidden * anchors * (BLOCK - 1)
        )


SHAPES = (
    Shape("Qwen3-8B", 4096, 12288, 32, 8, 128, 151936),
    Shape("gemma-4-31B", 5376, 21504, 32, 16, 128, 262144),
)
TINY = (Shape("tiny", 64, 128, 4, 2, 32, 512, 96, (2, 4)),)


def run(context: Context) -> None:
    """A row for each shape and number of anchors."""
    device = "cpu" if context.rehearse else "cuda"
    # As vLLM does in the process that trains: cuDNN's attention would be a figure of something else.
    torch.backends.cuda.enable_cudnn_sdp(False)
    peak = matmul_flops(device)
    for shape in TINY if context.rehearse else SHAPES:
        for anchors in shape.anchors:
            case = f"{shape.name}, {anchors} anchors"
            try:
                measure(context, case, shape, anchors, device, peak)
            except torch.OutOfMemoryError as error:
                used = torch.cuda.max_memory_allocated() / _GIB
                context.say(case, "failed", last_line(str(error)), peak_gib=round(used, 1))
            except Exception as error:
                context.say(case, "failed", f"{type(error).__name__}: {last_line(str(error))}")
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()


def matmul_flops(device: str) -> float:
    """FLOP/s of a large bf16 matrix product on this machine: what MFU is a share of."""
    size = 8192 if device == "cuda" else 256
    a = torch.randn(size, size, dtype=torch.bfloat16, device=device)
    times = []
    for _ in range(8):
        _wait(device)
        began = time.perf_counter()
        a @ a
        _wait(device)
        times.append(time.perf_counter() - began)
    return 2 * size**3 / statistics.median(times)


def measure(
    context: Context, case: str, shape: Shape, anchors: int, device: str, peak: float
) -> None:
    learner, sample = make(shape, anchors, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = []
    for step in range(STEPS):
        _wait(device)
        began = time.perf_counter()
        metrics = learner.step(step, [sample])
        _wait(device)
        times.append(time.perf_counter() - began)
    # Before the profiler, which keeps memory of its own.
    memory = _memory(device)
    kernels, math_backend = attention_kernels(learner, sample, device)
    seconds = statistics.median(times[1:])
    problem = ""
    if not math.isfinite(metrics["loss"]) or metrics["loss"] <= 0:
        problem = f"loss is {metrics['loss']}"
    elif math_backend and device == "cuda":
        problem = "attention takes SDPA's math backend: fp32, all scores kept"
    context.check(
        case,
        problem,
        **memory,
        ms=round(1e3 * seconds, 1),
        anchors_per_s=round(anchors / seconds),
        mfu=round(shape.flops(anchors) / seconds / peak, 3),
        matmul_tflops=round(peak / 1e12, 1),
        attention=kernels,
        loss=round(metrics["loss"], 3),
    )


def make(shape: Shape, anchors: int, device: str) -> tuple[Learner, Sample]:
    """A learner and a conversation whose first sixth is prompt; all of it random."""
    config = DrafterConfig(
        hidden_size=shape.hidden,
        num_hidden_layers=LAYERS,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.intermediate,
        vocab_size=shape.vocab,
        draft_block_size=BLOCK,
        target_layer_ids=tuple(range(1, 8 * TAPS, 8)),
        mask_token_id=5,
        num_target_layers=8 * TAPS,
        target_hidden_size=shape.hidden,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        max_position_embeddings=40960,
        verifier=shape.name,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    dtype = torch.bfloat16
    head = torch.randn(shape.vocab, shape.hidden, dtype=dtype, device=device) * 0.02
    settings = Hyperparameters(num_anchors=anchors)
    learner = Learner(config, settings, SharedHead(head, head, None), 100, device)
    features = torch.randn(shape.tokens, config.num_features, dtype=dtype, device=device)
    tokens = torch.randint(10, shape.vocab, (shape.tokens + 1,)).tolist()
    prompt = shape.tokens // 6
    mask = [False] * prompt + [True] * (shape.tokens + 1 - prompt)
    return learner, Sample("random", tokens, mask, features)


def attention_kernels(
    learner: Learner, sample: Sample, device: str
) -> tuple[dict[str, float], bool]:
    """Milliseconds by attention kernel (on a CPU: operator) of a step, the five longest, and whether
    SDPA's math backend ran."""
    activities = [ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiled:
        learner.step(STEPS, [sample])
        _wait(device)
    events: list[tuple[str, float]] = []
    for event in profiled.key_averages():
        cuda = event.self_device_time_total
        events.append((event.key, cuda if device == "cuda" else event.self_cpu_time_total))
    math_backend = any(MATH.search(name) for name, _ in events)
    longest = sorted((e for e in events if ATTENTION.search(e[0]) and e[1]), key=lambda e: -e[1])
    return {name[:80]: round(micros / 1e3, 3) for name, micros in longest[:5]}, math_backend


def _memory(device: str) -> dict[str, Any]:
    if device != "cuda":
        return {}
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return {"peak_gib": round(allocated / _GIB, 1), "reserved_gib": round(reserved / _GIB, 1)}


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
