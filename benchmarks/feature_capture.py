"""Are features cheaper taken while responses are generated than by a prefill afterwards? And are they equal?

    python benchmarks/feature_capture.py VERIFIER --data prompts.jsonl [--num 64] [--repeats 3] [-o FILE]

Times, alternating in one engine: plain generation, generation with features recorded, and the prefill of
the finished conversations; and compares the features of the two ways row by row.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

from rich.console import Console

from vllm_dflash.bench.prompts import load_prompts
from vllm_dflash.bench.report import write_json
from vllm_dflash.environment import describe_machine, versions
from vllm_dflash.training.config import (
    DrafterShape,
    EngineOptions,
    Hyperparameters,
    SamplingOptions,
    TrainConfig,
)
from vllm_dflash.training.engine import VerifierEngine, write_seat
from vllm_dflash.training.planning import drafter_config
from vllm_dflash.training.responses import GenerationRequest
from vllm_dflash.verifier import Verifier


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("verifier")
    parser.add_argument("--data", required=True)
    parser.add_argument("--num", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()

    prompts = load_prompts(args.verifier, args.data, {}, args.num)
    config = TrainConfig(
        Verifier(args.verifier), args.data, Path("unused"), shape=DrafterShape(num_layers=1)
    )
    drafter = drafter_config(config, Verifier(args.verifier).load_config())
    longest = max(map(len, prompts)) + args.max_tokens
    with tempfile.TemporaryDirectory() as scratch:
        engine = VerifierEngine(
            args.verifier,
            write_seat(drafter, Path(scratch) / "seat"),
            # The rows of a cached prefix are recorded with another request.
            EngineOptions(args.dtype, longest, extra={"enable_prefix_caching": False}),
        )
    engine.call("begin", drafter.to_dict(), Hyperparameters().as_dict(), None, 1, None, None)
    generate = engine.generator(SamplingOptions(max_tokens=args.max_tokens))
    seconds: dict[str, list[float]] = {"generate": [], "generate_recording": [], "prefill": []}
    for repeat in range(args.repeats):
        requests = {f"{repeat}-{i}": ids for i, ids in enumerate(prompts)}
        began = time.perf_counter()
        list(generate([GenerationRequest(f"plain-{k}", ids) for k, ids in requests.items()]))
        seconds["generate"].append(time.perf_counter() - began)

        began = time.perf_counter()
        most = {k: (None, 0, len(ids) + args.max_tokens) for k, ids in requests.items()}
        engine.call("watch", most)
        results = list(generate([GenerationRequest(k, ids) for k, ids in requests.items()]))
        whole = {r.key: [*requests[r.key], *r.token_ids] for r in results}
        engine.call("register", [(k, ids, [True] * len(ids), "") for k, ids in whole.items()])
        failed = engine.call("collect", {k: len(ids) - 1 for k, ids in whole.items()})
        seconds["generate_recording"].append(time.perf_counter() - began)
        if failed:
            raise RuntimeError(f"features were not recorded: {failed}")
        recorded = engine.call("digest", list(whole))

        began = time.perf_counter()
        for key, problem in engine.extract(whole):
            if problem:
                raise RuntimeError(f"{key}: {problem}")
        seconds["prefill"].append(time.perf_counter() - began)
        prefilled = engine.call("digest", list(whole))
    tokens = sum(map(len, whole.values()))
    report = {
        "verifier": Path(args.verifier).name,
        "sequences": len(whole),
        "tokens": tokens,
        "generated_tokens": tokens - sum(map(len, prompts)),
        "seconds": seconds,
        "recording_over_plain": median(seconds["generate_recording"]) / median(seconds["generate"]),
        "prefill_tokens_per_s": tokens / median(seconds["prefill"]),
        "prefill_over_generate": median(seconds["prefill"]) / median(seconds["generate"]),
        "sequences_with_equal_bits": sum(recorded[k] == prefilled[k] for k in whole),
        "versions": versions(),
        "machine": describe_machine(),
    }
    Console().print(report)
    if args.output:
        write_json(report, args.output)


if __name__ == "__main__":
    main()
