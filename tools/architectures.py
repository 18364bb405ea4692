"""Which verifiers work? A tiny random model of each architecture, served and trained; one row each.

    python tools/architectures.py [MODEL_TYPE ...] [-o FILE] [--docs docs/user/verifiers.md]

Compares the features of vLLM's engine with Hugging Face's hidden states (fp32, prompts in chunks, several
requests a step), greedy output with the drafter against output without it, and runs 20 training steps.
With ``--docs`` the table between the markers of that file is replaced. Rows of other architectures that FILE
has stay. Uses the checkout's tests/.

vLLM imports torchvision for Qwen3.5, which beside a CPU torch takes a detour:

    pip install --no-deps --target TV torchvision==0.28.0
    PYTHONPATH=tests/helpers/torchvision_on_cpu:TV python tools/architectures.py
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.console import Console

from vllm_dflash.bench.report import markdown_table, replace_between_markers, write_json
from vllm_dflash.environment import describe_machine, versions

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from helpers import tiny, verifiers  # noqa: E402


def row_of(model_type: str, base: Path, prompts_file: Path, prompts: list[list[int]]) -> dict:
    folder = base / model_type
    folder.mkdir()
    shutil.copytree(base / "tokenizer", folder / "tokenizer")
    began = time.perf_counter()
    try:
        row = verifiers.examine(model_type, folder, prompts_file, prompts, train=True)
    except Exception as error:  # a row says so; the others go on
        row = {
            "architecture": model_type,
            "model_type": model_type,
            "path": "failed",
            "reason": f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}",
        }
    shutil.rmtree(folder)
    return {**row, "seconds": round(time.perf_counter() - began, 1)}


def kept(output: Path | None, new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of an earlier run in ``output`` that the new ones do not replace; ValueError from another vLLM."""
    if output is None or not output.exists():
        return []
    old = json.loads(output.read_text())
    if old["versions"] != versions():
        raise ValueError(f"{output} was made with {old['versions']}; write to another file")
    again = {row["model_type"] for row in new}
    return [row for row in old["rows"] if row["model_type"] not in again]


def shown(row: dict[str, Any]) -> dict[str, Any]:
    """The row with what its table says of lossless output."""
    ties = row.get("lossless") is False and row.get("tokens_beyond_rounding") == 0
    return {**row, "lossless": "but for ties"} if ties else row


def cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    if isinstance(value, float):
        return f"{value:.0e}"
    return "" if value is None else str(value)


def table(rows: list[dict[str, Any]], where: str) -> str:
    """Markdown; ``where`` names the run."""
    columns = {
        "architecture": "architecture",
        "dtype": "dtype",
        "path": "path",
        "feature_max_abs_diff": "features differ by",
        "rounding_max_abs_diff": "rounding alone",
        "lossless": "lossless",
        "ngram": "vLLM's n-gram lossless",
        "train_smoke": "trains",
        "reason": "reason",
    }
    ordered = sorted(map(shown, rows), key=lambda r: (r["path"], r["architecture"]))
    return f"{where}\n\n{markdown_table(columns, ordered, cell)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model_types", nargs="*", help="default: all of tests/helpers/verifiers.py")
    parser.add_argument("--jobs", type=int, default=2, help="architectures at a time")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--docs", type=Path)
    args = parser.parse_args()
    unknown = sorted(set(args.model_types) - set(verifiers.ARCHITECTURES))
    if unknown:
        parser.error(f"unknown: {unknown}; known are {', '.join(verifiers.ARCHITECTURES)}")
    console = Console(width=200)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch)
        tiny.make_verifier(base / "tokenizer")
        prompts_file = tiny.write_prompts(base / "prompts.jsonl", 24)
        prompts = tiny.prompt_ids(base / "tokenizer", prompts_file, 6)
        work = partial(row_of, base=base, prompts_file=prompts_file, prompts=prompts)
        with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
            for row in pool.map(work, args.model_types or verifiers.ARCHITECTURES):
                rows.append(row)
                console.print(row)
    rows = kept(args.output, rows) + rows
    have = versions()
    where = f"vLLM {have['vllm']}, transformers {have['transformers']}, CPU."
    if args.output:
        result = {"benchmark": "architectures", "machine": describe_machine(), "versions": have}
        write_json({**result, "rows": rows}, args.output)
    if args.docs:
        replace_between_markers(args.docs, "architectures", table(rows, where))
    console.print(table(rows, where), markup=False)


if __name__ == "__main__":
    main()
