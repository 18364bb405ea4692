"""What a training step takes on this machine, and what its parts are worth: milliseconds, alternating.

    python benchmarks/learner_step.py [--shapes demo 0.6b] [--steps 15] [--threads N] [-o FILE]

Arms: the step as it is; with the attention spelled out instead of fused; in the other autocast. Weights and
features are random. ``ONEDNN_MAX_CPU_ISA`` in the environment masks instructions of the CPU.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from vllm_dflash.bench.report import write_json
from vllm_dflash.config import DrafterConfig
from vllm_dflash.environment import describe_machine, versions
from vllm_dflash.modeling import drafter
from vllm_dflash.training.config import Hyperparameters
from vllm_dflash.training.learner import Learner, Sample, SharedHead
from vllm_dflash.training.ranks import Ranks

#: Width, MLP, query heads, KV heads, head size, vocabulary, draft vocabulary, layers, block, anchors, tokens.
SHAPES = {
    "tiny": (64, 128, 2, 1, 32, 384, 384, 2, 8, 16, 100),
    "demo": (576, 1536, 9, 3, 64, 49152, 8192, 2, 8, 32, 590),
    "0.6b": (1024, 3072, 16, 8, 128, 151936, 16384, 5, 16, 64, 1024),
}
OTHER = {"bfloat16": "float32", "float32": "bfloat16"}


def spelled_out(q_NQD: Tensor, k_GSD: Tensor, v_GSD: Tensor, bias_MP: Tensor) -> Tensor:
    """``modeling.attention.attend`` by matrix products and a softmax in fp32."""
    groups, keys, dim = k_GSD.shape
    scores = torch.matmul(q_NQD.reshape(groups, -1, dim) * dim**-0.5, k_GSD.transpose(1, 2))
    weights = (scores.float() + bias_MP[:, :keys]).softmax(-1).to(v_GSD.dtype)
    return torch.matmul(weights, v_GSD).view(q_NQD.shape)


def make_learner(
    shape: str, autocast: str, ranks: Ranks | None = None, **hparams: Any
) -> tuple[Learner, Callable[..., Sample]]:
    """A learner, and a function that makes a sequence for it: by its name, and its length where that is not
    the shape's."""
    hidden, mlp, heads, kv_heads, head_dim, vocab, draft, layers, block, anchors, tokens = SHAPES[
        shape
    ]
    config = DrafterConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=mlp,
        vocab_size=vocab,
        draft_vocab_size=draft,
        draft_block_size=block,
        target_layer_ids=(1, 2, 3, 4, 5),
        mask_token_id=5,
        target_hidden_size=hidden,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(vocab, hidden, generator=generator).mul_(0.02).bfloat16()
    learner = Learner(
        config,
        Hyperparameters(num_anchors=anchors, autocast=autocast, **hparams),
        SharedHead(embedding, embedding, torch.arange(draft)),
        1000,
        ranks=ranks,
    )

    def sample(key: str, tokens: int = tokens) -> Sample:
        features = torch.randn(tokens, config.num_features, generator=generator).bfloat16()
        ids = torch.randint(10, draft, (tokens + 1,), generator=generator).tolist()
        return Sample(key, ids, [i > tokens // 6 for i in range(tokens + 1)], features)

    return learner, sample


def make(shape: str, autocast: str) -> Callable[[int], None]:
    """A function that runs one step."""
    learner, sample = make_learner(shape, autocast)
    one = sample("s")
    return lambda step: learner.step(step, [one]) and None


def measure(shape: str, steps: int, autocast: str) -> dict[str, Any]:
    fused = drafter.attend
    step, other = make(shape, autocast), make(shape, OTHER[autocast])
    arms = {
        "as it is": (step, fused),
        "attention spelled out": (step, spelled_out),
        OTHER[autocast]: (other, fused),
    }
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for i in range(steps + 2):
        for name, (run, attend) in arms.items():
            drafter.attend = attend
            started = time.perf_counter()
            run(i)
            if i >= 2:
                seconds[name].append(time.perf_counter() - started)
    drafter.attend = fused
    base = seconds["as it is"]
    return {
        name: {
            "ms": round(1e3 * median(times), 1),
            "ratio": round(median(t / b for t, b in zip(times, base, strict=True)), 3),
        }
        for name, times in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["demo", "0.6b"])
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--autocast", choices=OTHER, default="bfloat16")
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    isa = os.environ.get("ONEDNN_MAX_CPU_ISA")
    result: dict[str, Any] = {
        "threads": args.threads,
        "autocast": args.autocast,
        "onednn_max_cpu_isa": isa,
        "shapes": {s: measure(s, args.steps, args.autocast) for s in args.shapes},
        "machine": describe_machine(),
        "versions": versions(),
    }
    Console().print(result["shapes"])
    if args.output:
        write_json(result, args.output)


if __name__ == "__main__":
    main()
