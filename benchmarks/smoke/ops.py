"""Part 1: the seams in vLLM, and every op against float64 arithmetic."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from smoke.rows import Context, Unavailable, last_line, need

GPU_OPS = Path(__file__).parents[1] / "gpu_ops.py"
#: Most tokens of a check in a rehearsal; the big cases take minutes on a CPU.
REHEARSED_TOKENS = 33


def run(context: Context) -> None:
    """One row for each implementation of the ops, one for the seams."""
    for mode in ("cpp",) if context.rehearse else ("cuda", "triton"):
        check_ops(context, mode)
    check_seams(context)


def check_ops(context: Context, mode: str) -> None:
    out = context.folder / f"gpu_ops-{mode}.json"
    command = [sys.executable, str(GPU_OPS), "--checks-only", "--out", str(out)]
    if context.rehearse:
        command += ["--largest", str(REHEARSED_TOKENS)]
    done = subprocess.run(
        command, env={**os.environ, "VLLM_DFLASH_OPS": mode}, capture_output=True, text=True
    )
    print(done.stdout, done.stderr)
    if not out.is_file():
        context.say(mode, "failed", last_line(done.stderr))
        return
    report = json.loads(out.read_text())
    checks = report["checks"]
    wrong = [f"{c['op']} {c['case']}: {c['problem']}" for c in checks["wrong"]]
    context.check(mode, "; ".join(wrong)[:400], checks=checks["run"], ops=report["ops"])


def check_seams(context: Context) -> None:
    """Whether the places in vLLM that the plugin needs are there."""
    try:
        need("vllm")
    except Unavailable as reason:
        context.say("seams", "unavailable", str(reason))
        return
    from vllm_dflash.serving import patching

    found = patching.probe()
    missing = {name: what for name, what in found.items() if what != "ok"}
    context.check("seams", json.dumps(missing)[:400] if missing else "", seams=len(found))
