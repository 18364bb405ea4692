"""Part 4: the public commands, on a tiny verifier: `train`, then `eval --engine` on what it made.

`eval` starts two engines after each other and is told to give each more than half of the GPU: the second can
only start if the first one's memory has come back.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from helpers import tiny
from smoke.rows import Context, last_line, need
from vllm_dflash.environment import gpu_memory

#: Of the GPU, for each of eval's engines.
MORE_THAN_HALF = 0.6
POLL_S = 0.3
_GIB = 2**30
_V2 = re.compile(r"^(\d+) .*Using V2 Model Runner", re.MULTILINE)


def run(context: Context) -> None:
    """A row for each command."""
    need("vllm")
    folder = context.folder / "training"
    folder.mkdir(exist_ok=True)
    verifier, prompts = folder / "verifier", folder / "prompts.jsonl"
    if not verifier.exists():
        tiny.make_verifier(verifier)
    tiny.write_prompts(prompts, 12 if context.rehearse else 24)
    steps = 4 if context.rehearse else 30
    train = ["train", verifier, "--data", prompts, "-o", folder / "drafter", *tiny.TRAIN_ARGS]
    train += ["--max-steps", steps, "--num-anchors", 16, "--batch-size", 2, "--lr", "2e-3"]
    done = command(context, folder, "train", train)
    if done["problem"]:
        context.say("train", "failed", done["problem"], **done["figures"])
        return
    made = (folder / "drafter" / "model.safetensors").is_file()
    context.check("train", "" if made else "no drafter was written", **done["figures"])
    measure = ["eval", verifier, folder / "drafter", "--data", prompts, "--engine"]
    measure += ["-o", folder / "eval.json", "--dtype", "float32", "--max-len", 160]
    measure += ["--max-tokens", 32, "--limit", 6]
    if not context.rehearse:
        measure += ["--engine-args", json.dumps({"gpu_memory_utilization": MORE_THAN_HALF})]
    done = command(context, folder, "eval", measure)
    if done["problem"]:
        context.say("eval --engine", "failed", done["problem"], **done["figures"])
        return
    result = json.loads((folder / "eval.json").read_text())
    taus = {name: round(result[name]["tau"], 3) for name in ("offline", "engine")}
    problem = ""
    # The serving engine is another process than the command.
    if not context.rehearse and set(done["figures"]["v2_pids"]) <= {done["pid"]}:
        problem = "the engine that served did not say that it is the V2 runner"
    context.check("eval --engine", problem, **taus, **done["figures"])


def command(context: Context, folder: Path, name: str, args: list[Any]) -> dict[str, Any]:
    """Runs ``vllm-dflash``.

    Returns:
        ``problem``, ``pid``, and ``figures``: ``v2_pids`` (processes that log the V2 runner) and, on a GPU,
        GiB in use before, at most and after.
    """
    log = folder / f"{name}-vllm.log"
    log.unlink(missing_ok=True)
    logging = folder / f"{name}-logging.json"
    logging.write_text(json.dumps(_logging(log)))
    env = {**os.environ, "VLLM_LOGGING_CONFIG_PATH": str(logging), "VLLM_LOGGING_LEVEL": "INFO"}
    if context.rehearse:
        env |= tiny.CPU_ENV | {"VLLM_LOGGING_LEVEL": "INFO"}
    before, done = _used(), threading.Event()
    most = [before]

    def watch() -> None:
        while not done.wait(POLL_S):
            most[0] = max(most[0], _used())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    with (folder / f"{name}.log").open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-c", "from vllm_dflash.cli import main; main()", *map(str, args)],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=env,
        )
        code = process.wait()
    done.set()
    watcher.join()
    text = log.read_text(errors="replace") if log.exists() else ""
    figures: dict[str, Any] = {"v2_pids": sorted({int(pid) for pid in _V2.findall(text)})}
    problem = ""
    if code:
        problem = f"exit code {code}: {last_line((folder / f'{name}.log').read_text())}"
    if gpu_memory():
        after = _used()
        figures["gib_before_most_after"] = [round(n, 1) for n in (before, most[0], after)]
        if not problem and after > before + 1:
            problem = f"{after - before:.1f} GiB are still in use after the command"
    return {"problem": problem, "pid": process.pid, "figures": figures}


def _used() -> float:
    """GiB in use on the fullest GPU; 0 without one."""
    return max(((total - free) / _GIB for total, free in gpu_memory()), default=0.0)


def _logging(path: Path) -> dict[str, Any]:
    """A configuration for Python's logging: vLLM's messages of all processes, with their ids, in a file."""
    handler = {"class": "logging.FileHandler", "filename": str(path), "formatter": "pid"}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"pid": {"format": "%(process)d %(name)s %(message)s"}},
        "handlers": {"file": handler},
        "loggers": {"vllm": {"handlers": ["file"], "level": "INFO", "propagate": False}},
    }
