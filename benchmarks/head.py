"""What DFlash 2's head is worth at equal training time: acceptance and speed with it and without, by seed.

    python benchmarks/head.py VERIFIER -o RESULT.json [--minutes 5] [--seeds 3] [--conversations 500]

Two kinds of traffic: the demo's tickets, and functions of the Python standard library to write from their
signature and docstring, read from the interpreter's own sources. The verifier answers all prompts once. Then
each arm trains for as many steps as fit into the minutes, by the time that its own steps take, and serves the
held-out prompts. Arms: no head; the head; the head with free codebooks (``--free``).
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from vllm_dflash.bench.report import write_json
from vllm_dflash.environment import describe_machine, versions

ROOT = Path(__file__).parents[1]
ARMS: dict[str, list[str]] = {
    "without": [],
    "with": ["--head", "dflash2"],
    "free": ["--head", "dflash2", "--codebooks", "free"],
}
#: Steps by which the time of one is measured.
_PROBE_STEPS = 24
_MODULES = "ast argparse calendar collections csv datetime difflib fractions functools heapq json "
_MODULES += "logging random shutil statistics string tarfile textwrap typing urllib zipfile"


def code_prompts(count: int, seed: int) -> list[dict[str, Any]]:
    """Requests to write documented functions of the standard library."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = [
        file
        for name in _MODULES.split()
        for file in [folder / f"{name}.py", *sorted((folder / name).glob("*.py"))]
        if file.is_file()
    ]
    asks = []
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            doc = ast.get_docstring(node) if isinstance(node, ast.FunctionDef) else None
            if isinstance(node, ast.FunctionDef) and doc and 40 < len(doc) < 600:
                head = f'def {node.name}({ast.unparse(node.args)}):\n    """{doc}"""'
                asks.append(f"Write this Python function:\n\n```python\n{head}\n```")
    asks = sorted(set(asks))
    if len(asks) < count:
        raise SystemExit(f"the standard library here has {len(asks)} functions, {count} are wanted")
    random.Random(seed).shuffle(asks)
    return [{"source": "code", "messages": [{"role": "user", "content": a}]} for a in asks[:count]]


def ticket_prompts(count: int, seed: int, folder: Path) -> list[dict[str, Any]]:
    script = [sys.executable, str(ROOT / "demo" / "tickets.py"), str(folder)]
    sizes = ["--train", str(count), "--heldout", "1", "--seed", str(seed)]
    said = subprocess.run([*script, *sizes], check=True, capture_output=True, text=True).stdout
    return [json.loads(line) for line in Path(said.split()[0]).read_text().splitlines()]


def answered(verifier: str, rows: list[dict[str, Any]], max_tokens: int, path: Path) -> Path:
    """The rows with the verifier's greedy answers behind them, as a file; kept if it is there."""
    if path.is_file():
        return path
    from vllm import LLM, SamplingParams

    engine = LLM(verifier, max_model_len=1024, enable_prefix_caching=True)
    prompts = [[m for m in row["messages"] if m["role"] != "assistant"] for row in rows]
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    outputs = engine.chat(prompts, sampling)  # type: ignore[arg-type]
    lines = []
    for row, prompt, out in zip(rows, prompts, outputs, strict=True):
        answer = {"role": "assistant", "content": out.outputs[0].text}
        lines.append(json.dumps({**row, "messages": [*prompt, answer]}) + "\n")
    path.write_text("".join(lines))
    return path


def run(*args: str | Path) -> None:
    subprocess.run([Path(sys.executable).with_name("vllm-dflash"), *map(str, args)], check=True)


def step_seconds(summary: Path) -> float:
    """Seconds of a training step, by a run's own account."""
    said = json.loads((summary / "dflash_training.json").read_text())
    return 60 * said["minutes"]["train"] / said["steps"]


def train_and_serve(
    verifier: str, arm: str, data: Path, held: Path, seed: int, minutes: float, folder: Path
) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    common: list[str | Path] = [verifier, "--data", data, "--on-policy"]
    recipe = [
        "--num-layers",
        "2",
        "--block-size",
        "8",
        "--draft-vocab",
        "8192",
        "--max-len",
        "1024",
    ]
    recipe += ["--num-anchors", "32", "--lr", "2e-3", "--seed", str(seed), *ARMS[arm]]
    train = ["train", *common, "--eval-data", held, *recipe]
    cache = ["--cache-features", data.with_suffix(".features")]
    run(*train, *cache, "-o", folder / "probe", "--max-steps", str(_PROBE_STEPS))
    seconds = step_seconds(folder / "probe")
    steps = max(1, round(60 * minutes / seconds))
    run(*train, *cache, "-o", folder / "drafter", "--max-steps", str(steps))
    result = folder / "eval.json"
    served = ["--engine", "--concurrency", "1", "--max-len", "1024", "-o", result]
    run("eval", verifier, folder / "drafter", held, "--on-policy", *served)
    got = json.loads(result.read_text())
    return {
        "steps": steps,
        "step_seconds": seconds,
        "tau_offline": got["offline"]["tau"],
        "tau": got["engine"]["tau"],
        "tokens_per_s": got["engine"]["output_tokens_per_s"],
        "selector_lift": got["offline"].get("selector_lift"),
        "selector_accuracy": got["offline"].get("selector_accuracy"),
    }


def row_of(traffic: str, seed: int, arms: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The figures of one traffic and seed; shares are of a step with the head."""
    without, with_head = arms["without"], arms["with"]
    # Tokens of a second are verify steps of a second times tau.
    serving = [arm["tokens_per_s"] / arm["tau"] for arm in (without, with_head)]
    return {
        "traffic": traffic,
        "seed": seed,
        "tau_without": without["tau"],
        "tau_with": with_head["tau"],
        "selector_lift": with_head["selector_lift"],
        "serving_share": 1 - serving[1] / serving[0],
        "training_share": 1 - without["step_seconds"] / with_head["step_seconds"],
        "speed_ratio": with_head["tokens_per_s"] / without["tokens_per_s"],
        "arms": arms,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("verifier")
    parser.add_argument(
        "--traffic", nargs="+", choices=("tickets", "code"), default=["tickets", "code"]
    )
    parser.add_argument("--conversations", type=int, default=500)
    parser.add_argument("--held-out", type=int, default=40)
    parser.add_argument("--minutes", type=float, default=5, help="Of training, each arm and seed.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--free", action="store_true", help="Also train with free codebooks.")
    parser.add_argument("--work", type=Path, help="Keeps answers, features and drafters.")
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    work = args.work or Path(tempfile.mkdtemp(prefix="vllm-dflash-head-"))
    names = [name for name in ARMS if name != "free" or args.free]
    rows = []
    for traffic in args.traffic:
        folder = work / traffic
        folder.mkdir(parents=True, exist_ok=True)
        count = args.conversations + args.held_out
        prompts = code_prompts(count, 0) if traffic == "code" else ticket_prompts(count, 0, folder)
        all_rows = answered(args.verifier, prompts, args.max_tokens, folder / "answered.jsonl")
        lines = all_rows.read_text().splitlines(keepends=True)
        data, held = folder / "data.jsonl", folder / "held.jsonl"
        data.write_text("".join(lines[: args.conversations]))
        held.write_text("".join(lines[args.conversations :]))
        for seed in range(args.seeds):
            arms = {
                name: train_and_serve(
                    args.verifier, name, data, held, seed, args.minutes, folder / f"{name}-{seed}"
                )
                for name in names
            }
            rows.append(row_of(traffic, seed, arms))
            write_json(
                args.output,
                {
                    "verifier": Path(args.verifier).name,
                    "minutes": args.minutes,
                    "conversations": args.conversations,
                    "machine": describe_machine(),
                    "versions": versions(),
                    "rows": rows,
                },
            )


if __name__ == "__main__":
    main()
