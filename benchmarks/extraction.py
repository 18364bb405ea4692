"""Feature extraction: vLLM's engine with our recorder against Transformers' forward, tokens a second.

    python benchmarks/extraction.py VERIFIER --data prompts.jsonl [--num 64] [--rounds 5] [-o FILE]

Both read the same sequences of mixed length (log-uniform between --min-len and --max-len) and keep the
states behind the same layers in memory. Transformers runs them one by one and in padded batches of similar
length; the faster counts. The arms alternate; the figure is the ratio of medians.
"""

from __future__ import annotations

import argparse
import math
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from rich.console import Console

from vllm_dflash.bench.prompts import load_prompts
from vllm_dflash.bench.report import write_json
from vllm_dflash.environment import describe_machine, versions
from vllm_dflash.training.config import DrafterShape, EngineOptions, Hyperparameters, TrainConfig
from vllm_dflash.training.engine import VerifierEngine, write_seat
from vllm_dflash.training.planning import drafter_config
from vllm_dflash.verifier import Verifier


def sequences(prompts: list[list[int]], num: int, low: int, high: int) -> dict[str, list[int]]:
    """Text of the prompts, end to end, cut into sequences."""
    rng, out = random.Random(0), {}
    text = [t for ids in prompts for t in ids]
    for i in range(num):
        length = round(math.exp(rng.uniform(math.log(low), math.log(high))))
        start = rng.randrange(max(1, len(text) - length))
        out[f"s{i}"] = text[start : start + length]
    return out


def transformers_arm(
    verifier: str, dtype: str, layers: tuple[int, ...], batch_size: int
) -> Callable[[dict[str, list[int]]], None]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(verifier, dtype=getattr(torch, dtype)).eval()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)

    @torch.inference_mode()
    def extract(examples: dict[str, list[int]]) -> None:
        kept = []
        order = sorted(examples.values(), key=len)
        for i in range(0, len(order), batch_size):
            group = order[i : i + batch_size]
            longest = len(group[-1])
            ids = torch.zeros(len(group), longest, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, tokens in enumerate(group):
                ids[row, : len(tokens)] = torch.tensor(tokens)
                mask[row, : len(tokens)] = 1
            # No padding, no mask: the faster attention.
            given = {} if len(group) == 1 else {"attention_mask": mask.to(device)}
            output = model.model(
                ids.to(device), output_hidden_states=True, use_cache=False, **given
            )
            states = torch.cat([output.hidden_states[layer + 1] for layer in layers], dim=-1)
            kept += [states[row, : len(tokens)].clone() for row, tokens in enumerate(group)]

    return extract


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("verifier")
    parser.add_argument("--data", required=True)
    parser.add_argument("--num", type=int, default=64)
    parser.add_argument("--min-len", type=int, default=32)
    parser.add_argument("--max-len", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=8, help="of Transformers")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()

    prompts = load_prompts(args.verifier, args.data, {}, 10**6)
    examples = sequences(prompts, args.num, args.min_len, args.max_len)
    tokens = sum(map(len, examples.values()))
    config = TrainConfig(
        Verifier(args.verifier), args.data, Path("unused"), shape=DrafterShape(num_layers=1)
    )
    drafter = drafter_config(config, Verifier(args.verifier).load_config())
    with tempfile.TemporaryDirectory() as scratch:
        engine = VerifierEngine(
            args.verifier,
            write_seat(drafter, Path(scratch) / "seat"),
            EngineOptions(dtype=args.dtype, max_len=args.max_len),
        )
    engine.call("begin", drafter.to_dict(), Hyperparameters().as_dict(), None, 1, None, None)

    def ours(given: dict[str, list[int]]) -> None:
        engine.call(
            "register", [(k, ids, [True] * len(ids), "benchmark") for k, ids in given.items()]
        )
        failed = [reason for _, reason in engine.extract(given) if reason is not None]
        if failed:
            raise RuntimeError(f"{len(failed)} sequences failed: {failed[0]}")
        engine.call("keep", [])

    layers = drafter.target_layer_ids
    arms: dict[str, Callable[[dict[str, list[int]]], None]] = {
        "vllm-dflash": ours,
        "transformers, one by one": transformers_arm(args.verifier, args.dtype, layers, 1),
        f"transformers, batches of {args.batch_size}": transformers_arm(
            args.verifier, args.dtype, layers, args.batch_size
        ),
    }
    rates: dict[str, list[float]] = {name: [] for name in arms}
    for round_ in range(args.rounds + 1):
        for name, extract in arms.items():
            began = time.perf_counter()
            extract(examples)
            if round_:  # the first is for warming up
                rates[name].append(tokens / (time.perf_counter() - began))
    engine.close()
    medians = {name: median(values) for name, values in rates.items()}
    best = max((n for n in arms if n != "vllm-dflash"), key=medians.__getitem__)
    pairs = [a / b for a, b in zip(rates["vllm-dflash"], rates[best], strict=True)]
    ratio = medians["vllm-dflash"] / medians[best]
    console = Console()
    for name, value in medians.items():
        console.print(f"{name}: {value:.0f} tokens/s", markup=False)
    console.print(
        f"ours over {best}: {ratio:.2f} ({min(pairs):.2f}-{max(pairs):.2f})", markup=False
    )
    if args.output:
        result = {
            "benchmark": "extraction",
            "machine": describe_machine(),
            "versions": versions(),
            "config": {**vars(args), "output": None, "tokens": tokens, "layers": list(layers)},
            "tokens_per_second": rates,
            "medians": medians,
            "ours_over_transformers": ratio,
            "spread": [min(pairs), max(pairs)],
        }
        write_json(result, args.output)


if __name__ == "__main__":
    main()
