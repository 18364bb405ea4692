"""``make demo``: train a drafter for a real small verifier on narrow traffic, serve it, measure.

    python demo/run.py [--minutes 25] [--out demo/out] [--train 700] [--steps 2400]

It only calls the public commands (``vllm-dflash train``, ``eval``, ``bench``) and puts their results together
in ``report.json`` and ``report.png``. On a slow machine it does less, and says what it left out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))
import budget
import fetch_verifier
import tickets

from vllm_dflash.bench.report import write_json, write_png
from vllm_dflash.environment import describe_machine, versions

HERE = Path(__file__).parent
CONSOLE = Console(stderr=True)
LENGTHS = ("--max-len", "1024", "--max-tokens", "256")
#: The run that the machine's rates are taken from.
PROBE_TICKETS, PROBE_STEPS = 48, 40


def call(*command: str | Path, **environment: str) -> float:
    """Runs a vllm-dflash command, with variables added; returns the minutes it took."""
    line = [str(part) for part in command]
    CONSOLE.rule(" ".join(["vllm-dflash", *line])[:120])
    started = time.monotonic()
    executable = Path(sys.executable).with_name("vllm-dflash")
    subprocess.run([str(executable), *line], check=True, env={**environment, **os.environ})
    return (time.monotonic() - started) / 60


def train(verifier: Path, data: Path, drafter: Path, steps: int, *heldout: str | Path) -> dict:
    """Trains a drafter; the run's summary, with the seconds that it took beyond its three stages."""
    minutes = call(
        "train", verifier, "--data", data, "-o", drafter, *heldout, *LENGTHS,
        "--num-layers", "2", "--block-size", "8", "--draft-vocab", "8192",
        "--lr", "1.5e-3", "--num-anchors", "32", "--max-steps", str(steps),
    )  # fmt: skip
    summary = json.loads((drafter / "dflash_training.json").read_text())
    return {**summary, "start_s": 60 * (minutes - sum(summary["minutes"].values()))}


def measure(verifier: Path) -> budget.Rates:
    """This machine's rates, by training on a few tickets."""
    with tempfile.TemporaryDirectory() as scratch:
        data, _ = tickets.write(Path(scratch) / "data", PROBE_TICKETS, 1, seed=1)
        found = train(verifier, data, Path(scratch) / "drafter", PROBE_STEPS, "--holdout", "0")
    seconds = {name: 60 * minutes for name, minutes in found["minutes"].items()}
    return budget.Rates(
        ticket=(seconds["responses"] + seconds["extract"]) / PROBE_TICKETS,
        step=seconds["train"] / PROBE_STEPS,
        start=found["start_s"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE / "out")
    parser.add_argument("--model", type=Path, default=HERE / "model" / "SmolLM2-135M-Instruct")
    parser.add_argument("--minutes", type=float, default=25, help="what is cut to fit")
    parser.add_argument("--train", type=int, help="training tickets; default: what fits, up to 700")
    parser.add_argument("--heldout", type=int, default=32, help="held-out tickets")
    parser.add_argument("--steps", type=int, help="default: what fits, up to 2400")
    parser.add_argument("--repeats", type=int, help="default: what fits, up to 3")
    parser.add_argument("--prompts", type=int, help="served tickets; default: what fits, up to 12")
    args = parser.parse_args()

    started = time.monotonic()

    def left() -> float:
        return args.minutes - (time.monotonic() - started) / 60

    out: Path = args.out
    drafter = out / "drafter"
    verifier = fetch_verifier.fetch(args.model)
    num_train, steps, resume = args.train, args.steps, []
    if num_train is None or steps is None:
        asked = {"minutes": args.minutes, "train": args.train, "steps": args.steps}
        sized = out / "sized.json"
        before = json.loads(sized.read_text()) if sized.is_file() else {}
        if before.get("asked") == asked:  # an interrupted demo goes on
            num_train, steps = before["tickets"], before["train_steps"]
        else:
            rates, resume = measure(verifier), ["--restart"]
            num_train, steps = budget.size_training(left(), rates, args.heldout, num_train, steps)
            sizes = {"asked": asked, "tickets": num_train, "train_steps": steps}
            write_json({**sizes, "seconds": asdict(rates)}, sized)
    data = tickets.write(out / "data", num_train, args.heldout, seed=0)
    training = train(verifier, data[0], drafter, steps, "--eval-data", data[1], *resume)
    served = ("--data", data[1], "--engine", "-o", out / "eval.json")
    call("eval", verifier, drafter, *served, *LENGTHS)
    evaluation = json.loads((out / "eval.json").read_text())
    compiles, prompts = budget.size_benchmark(left(), evaluation["engine"]["startup_s"])
    prompts = min(args.prompts or prompts, args.heldout)
    call(
        "bench", verifier, drafter, "--data", data[1], "-o", out / "bench", "--concurrency", "1,4",
        "--num-prompts", str(prompts), "--repeats", str(args.repeats or budget.REPEATS),
        "--max-tokens", "256", "--max-model-len", "1024",
        *(() if args.repeats else ("--minutes", f"{max(left(), 0.1):.2f}")),
        *(() if compiles else ("--enforce-eager",)),
        VLLM_CPU_KVCACHE_SPACE="1",
    )  # fmt: skip
    bench = json.loads((out / "bench" / "report.json").read_text())
    report = summarize(bench, evaluation, training, (time.monotonic() - started) / 60)
    report["minutes_asked"] = args.minutes
    report["cut"] = budget.cuts(report)
    write_json(report, out / "report.json")
    write_png(bench, out / "report.png")
    show(report, out)


def summarize(bench: dict, evaluation: dict, training: dict, total_minutes: float) -> dict:
    """The demo's figures; ``speedup`` is ours over no speculation at concurrency 1."""
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
        "dtype": bench["config"]["dtype"],
        "prompts": bench["config"]["num_prompts"],
        "repeats": bench["config"]["repeats"],
        "compiled": not bench["config"]["enforce_eager"],
        "speedup": figures["plugin"]["1"]["over_none"]["ratio"],
        "modes": figures,
        "machine": describe_machine(),
        "onednn_max_cpu_isa": os.environ.get("ONEDNN_MAX_CPU_ISA"),
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
    if report["cut"]:
        less = f"{report['minutes_asked']:g} minutes: {', '.join(report['cut'])}"
        console.print(f"cut to fit {less}", highlight=False)
    console.print(f"{out / 'report.json'}  {out / 'report.png'}", highlight=False)


if __name__ == "__main__":
    main()
