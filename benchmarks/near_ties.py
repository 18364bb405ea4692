"""In bf16, is every token that differs from decoding without speculation a near tie of the verifier?

    python benchmarks/near_ties.py VERIFIER DRAFTER --data heldout.jsonl [--num 32] [-o FILE]

Serves the same prompts without speculation and with the drafter (greedy, bf16); at the first difference of
each pair of outputs takes the gap between the two tokens' logits from transformers in fp32. For scale: bf16
has 8 bits of mantissa, so logits around 20 are 0.06 to 0.12 apart.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from vllm_dflash.bench.config import BenchConfig
from vllm_dflash.bench.engine_process import EngineProcess
from vllm_dflash.bench.prompts import load_prompts
from vllm_dflash.bench.report import write_json
from vllm_dflash.bench.runner import engine_spec
from vllm_dflash.environment import describe_machine, versions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("verifier")
    parser.add_argument("drafter")
    parser.add_argument("--data", required=True)
    parser.add_argument("--num", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=200)
    parser.add_argument("--concurrency", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()

    prompts = load_prompts(args.verifier, args.data, {}, args.num)
    outputs = {}
    with tempfile.TemporaryDirectory() as scratch:
        config = BenchConfig(
            verifier=args.verifier,
            drafter=args.drafter,
            modes=("none", "plugin"),
            concurrencies=(args.concurrency,),
            dtype="bfloat16",
            max_model_len=max(map(len, prompts)) + args.max_tokens + 32,
            enforce_eager=True,
            out_dir=Path(scratch),
        )
        for mode in config.modes:
            with EngineProcess(engine_spec(config, mode)) as engine:
                engine.start()
                engine.wait_ready()
                run = engine.run(prompts, max_tokens=args.max_tokens, concurrency=args.concurrency)
            outputs[mode] = [r.output_token_ids for r in run.requests]

    model = AutoModelForCausalLM.from_pretrained(args.verifier, dtype=torch.float32)
    differences = []
    for i, (plain, ours) in enumerate(zip(outputs["none"], outputs["plugin"], strict=True)):
        if plain == ours:
            continue
        pairs = zip(plain, ours, strict=False)
        at = next((k for k, (a, b) in enumerate(pairs) if a != b), min(len(plain), len(ours)))
        context = torch.tensor([[*prompts[i], *plain[:at]]])
        with torch.no_grad():
            logits = model(context).logits[0, -1]
        top = logits.topk(2).values
        differences.append(
            {
                "prompt": i,
                "position": at,
                "gap": float((logits[plain[at]] - logits[ours[at]]).abs()),
                "top2_gap": float(top[0] - top[1]),
                "top_logit": float(top[0]),
            }
        )
    report = {
        "verifier": Path(args.verifier).name,
        "prompts": len(prompts),
        "concurrency": args.concurrency,
        "output_tokens": sum(map(len, outputs["none"])),
        "differences": differences,
        "versions": versions(),
        "machine": describe_machine(),
    }
    Console().print(report)
    if args.output:
        write_json(report, args.output)


if __name__ == "__main__":
    main()
