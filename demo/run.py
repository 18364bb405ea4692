"""``make demo``: train a drafter for a real small verifier on narrow traffic, serve it, measure.

    python demo/run.py [--out demo/out] [--train 700] [--steps 2400]

It only calls the public commands (``vllm-dflash train``, ``eval``, ``bench``) and puts their results together
in ``report.json`` and ``report.png``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))
import fetch_verifier
import tickets

from vllm_dflash.bench.report import write_json, write_png
from vllm_dflash.environment import describe_machine, set_cpu_defaults, versions

HERE = Path(__file__).parent
CONSOLE = Console(stderr=True)


def call(*command: str | Path) -> float:
    """Runs a vllm-dflash command; returns the minutes it took."""
    line = [str(part) for part in command]
    CONSOLE.rule(" ".join(["vllm-dflash", *line])[:120])
    started = time.monotonic()
    executable = Path(sys.executable).with_name("vllm-dflash")
    subprocess.run([str(executable), *line], check=True)
    return (time.monotonic() - started) / 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE / "out")
    parser.add_argument("--model", type=Path, default=HERE / "model" / "SmolLM2-135M-Instruct")
    parser.add_argument("--train", type=int, default=700, help="training tickets")
    parser.add_argument("--heldout", type=int, default=32, help="held-out tickets")
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=12, help="held-out tickets served per run")
    args = parser.parse_args()

    started = time.monotonic()
    set_cpu_defaults()  # the same for every mode that is measured
    out: Path = args.out
    drafter = out / "drafter"
    verifier = fetch_verifier.fetch(args.model)
    train_data, heldout = tickets.write(out / "data", args.train, args.heldout, seed=0)

    common = ("--dtype", "bfloat16", "--max-len", "1024", "--max-tokens", "256")
    call(
        "train", verifier, "--data", train_data, "-o", drafter, "--eval-data", heldout, *common,
        "--num-layers", "2", "--block-size", "8", "--draft-vocab", "8192",
        "--lr", "1.5e-3", "--num-anchors", "32", "--max-steps", str(args.steps),
    )  # fmt: skip
    call("eval", verifier, drafter, "--data", heldout, "--engine", "-o", out / "eval.json", *common)
    call(
        "bench", verifier, drafter, "--data", heldout, "-o", out / "bench", "--concurrency", "1,4",
        "--num-prompts", str(args.prompts), "--repeats", str(args.repeats), "--max-tokens", "256",
        "--max-model-len", "1024", "--dtype", "bfloat16",
    )  # fmt: skip

    bench = json.loads((out / "bench" / "report.json").read_text())
    evaluation = json.loads((out / "eval.json").read_text())
    training = json.loads((drafter / "dflash_training.json").read_text())
    report = summarize(bench, evaluation, training, (time.monotonic() - started) / 60)
    write_json(report, out / "report.json")
    write_png(bench, out / "report.png")
    show(report, out)


def summarize(bench: dict, evaluation: dict, training: dict, total_minutes: float) -> dict:
    """The demo's figures; ``speedup`` is the plugin over no speculation at concurrency 1."""
    figures = {
        mode: {
            concurrency: {
                "output_tokens_per_s": f["output_tokens_per_s"],
                "over_none": f.get("over_none"),
                "tau": f.get("tau"),
            }
            for concurrency, f in entry["concurrency"].items()
        }
        for mode, entry in bench["modes"].items()
    }
    minutes = training["minutes"]
    return {
        "verifier": "SmolLM2-135M-Instruct",
        "train_minutes": minutes["extract"] + minutes["train"],
        "response_minutes": minutes["responses"],
        "total_minutes": total_minutes,
        "train_sequences": training["train_sequences"],
        "steps": training["steps"],
        "tau_offline": evaluation["offline"]["tau"],
        "tau_engine": evaluation["engine"]["tau"],
        "position_rates": evaluation["offline"]["position_rates"],
        "speedup": figures["plugin"]["1"]["over_none"]["ratio"],
        "modes": figures,
        "machine": describe_machine(),
        "versions": versions(),
    }


def show(report: dict, out: Path) -> None:
    table = Table(
        "", "tokens/s", "over none", "tau", title="SmolLM2-135M-Instruct, tickets to JSON"
    )
    for concurrency in next(iter(report["modes"].values())):
        for mode, entry in report["modes"].items():
            f = entry[concurrency]
            over = f["over_none"]
            table.add_row(
                f"{mode}, concurrency {concurrency}",
                f"{f['output_tokens_per_s']['median']:.1f}",
                f"{over['ratio']:.2f}x ({over['min']:.2f}-{over['max']:.2f})" if over else "",
                f"{f['tau']:.2f}" if f["tau"] else "",
            )
    console = Console()
    console.print(table)
    console.print(
        f"trained in {report['train_minutes']:.1f} min (responses {report['response_minutes']:.1f} min), "
        f"tau {report['tau_offline']:.2f} teacher-forced, {report['tau_engine']:.2f} served; "
        f"{report['speedup']:.2f}x at concurrency 1. All of it took {report['total_minutes']:.1f} min.",
        highlight=False,
    )
    console.print(f"{out / 'report.json'}  {out / 'report.png'}", highlight=False)


if __name__ == "__main__":
    main()
