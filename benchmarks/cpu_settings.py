"""What settings of the process gain in ``vllm-dflash train`` on a CPU, each by itself.

    python benchmarks/cpu_settings.py VERIFIER [--dtype float32] [--arms plain,malloc] [--rounds 2] [-o FILE]

Each arm trains on the demo's traffic with its variables set from the start of the process, and with what the
command would set by itself left out; the arms take turns. Seconds of responses, extraction and training are
those of the run's summary; page faults and the kernel's share of the processor's time are the process's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from vllm_dflash.bench.report import write_json
from vllm_dflash.environment import describe_machine, versions

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "demo"))
import tickets  # noqa: E402

_TRIM, _MMAP = {"MALLOC_TRIM_THRESHOLD_": str(2**40)}, {"MALLOC_MMAP_THRESHOLD_": str(32 * 2**20)}
_OPENMP = {"LD_PRELOAD": str(Path(sys.prefix) / "lib" / "libiomp5.so")}  # of intel-openmp
#: Variables of each arm, beside those that the engine sets for itself.
ARMS: dict[str, dict[str, str]] = {
    "plain": {},
    "trim": _TRIM,
    "mmap": _MMAP,
    "malloc": _TRIM | _MMAP,
    "malloc-no-mmap": _TRIM | {"MALLOC_MMAP_MAX_": "0"},
    "openmp": _OPENMP,
    "malloc-openmp": _TRIM | _MMAP | _OPENMP,
    "bind": {"VLLM_CPU_OMP_THREADS_BIND": "auto"},
}
_MAIN = """
from vllm_dflash import environment
environment.set_cpu_defaults = lambda: None
from vllm_dflash.cli import main
main()
"""


def train(
    verifier: Path, data: tuple[Path, Path], out: Path, arm: str, dtype: str, steps: int
) -> dict[str, Any]:
    """Trains once; seconds, page faults and tau."""
    command = (
        sys.executable, "-c", _MAIN, "train", verifier.resolve(), "-o", out,
        "--data", data[0], "--eval-data", data[1], "--dtype", dtype,
        "--max-len", "1024", "--max-tokens", "256", "--num-layers", "2", "--block-size", "8",
        "--draft-vocab", "8192", "--lr", "1.5e-3", "--num-anchors", "32", "--max-steps", str(steps),
    )  # fmt: skip
    process = subprocess.Popen(
        list(map(str, command)), env={**os.environ, **ARMS[arm]}, stdout=subprocess.DEVNULL
    )
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"training ended with {os.waitstatus_to_exitcode(status)}")
    summary = json.loads((out / "dflash_training.json").read_text())
    seconds = {k: 60 * summary["minutes"][k] for k in ("responses", "extract", "train")}
    return {
        **seconds,
        "all": sum(seconds.values()),
        "page_faults": used.ru_minflt,
        "user_s": used.ru_utime,
        "kernel_s": used.ru_stime,
        "peak_gib": used.ru_maxrss / 2**20,
        "tau": summary["tau_heldout"]["tau"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("verifier", type=Path)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--train", type=int, default=24, help="training tickets")
    parser.add_argument("--heldout", type=int, default=4, help="held-out tickets")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()

    arms = args.arms.split(",")
    runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    report = {
        "benchmark": "cpu_settings",
        "verifier": args.verifier.name,
        "dtype": args.dtype,
        "isa": os.environ.get("ONEDNN_MAX_CPU_ISA"),
        "tickets": {"train": args.train, "heldout": args.heldout},
        "steps": args.steps,
        "arms": {arm: sorted(ARMS[arm]) for arm in arms},
        "runs": runs,
        "versions": versions(),
        "machine": describe_machine(),
    }
    with tempfile.TemporaryDirectory() as scratch:
        data = tickets.write(Path(scratch) / "data", args.train, args.heldout, seed=0)
        for i in range(args.rounds):
            for arm in arms if i % 2 == 0 else reversed(arms):
                out = Path(scratch) / f"{arm}-{i}"
                runs[arm].append(train(args.verifier, data, out, arm, args.dtype, args.steps))
                Console().print(arm, runs[arm][-1], soft_wrap=True)
                if args.output:
                    write_json(report, args.output)
    seconds = {arm: median(run["all"] for run in runs[arm]) for arm in arms}
    report["seconds"] = seconds
    if "plain" in arms:
        report["gain"] = {arm: 1 - s / seconds["plain"] for arm, s in seconds.items()}
    Console().print(seconds, report.get("gain"))
    if args.output:
        write_json(report, args.output)


if __name__ == "__main__":
    main()
