"""A command ends with everything that it started, whatever ends it, and says one line when a signal does."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers import tiny
from vllm_dflash import guard, processes

#: A process with two children in sessions of their own, with a child each; the second child ends, and what
#: it leaves no longer shows whose it is. So are engines whose process was killed.
ANCESTOR = """
import subprocess, sys, time
from vllm_dflash.processes import start_guard
start_guard()
start_guard()  # one is enough
child = r'''
import subprocess, sys, time
p = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(99)"])
print(f"{p.pid}\\n", end="", flush=True)  # in one piece: they share a pipe
time.sleep(%d)
'''
for life in (99, 3):
    p = subprocess.Popen([sys.executable, "-c", child % life], start_new_session=True)
    print(f"{p.pid}\\n", end="", flush=True)
p.wait()
print("ready", flush=True)
time.sleep(99)
"""


def running(pid: int) -> bool:
    return guard.look(pid) is not None


def gone(pids: list[int], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while any(map(running, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not any(map(running, pids))


@pytest.mark.parametrize("sig", [signal.SIGKILL, signal.SIGTERM])
def test_the_guard_ends_what_a_killed_process_leaves(sig) -> None:
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(99)"])
    process = subprocess.Popen(
        [sys.executable, "-c", ANCESTOR], stdout=subprocess.PIPE, text=True, env=tiny.environment()
    )
    try:
        assert process.stdout is not None
        pids = []
        while (line := process.stdout.readline().strip()) != "ready":
            pids.append(int(line))
        assert len(pids) == 4
        assert sum(map(running, pids)) == 3
        process.send_signal(sig)
        process.wait()
        assert gone(pids, 15)
        assert bystander.poll() is None
    finally:
        for one in (process, bystander):
            one.kill()
            one.wait()


def test_the_guard_goes_with_a_process_that_left_nothing() -> None:
    script = (
        "import subprocess; from vllm_dflash import processes as p; real = subprocess.Popen\n"
        "def popen(*a, **k):\n    made = real(*a, **k); print(made.pid); return made\n"
        "subprocess.Popen = popen; p.start_guard()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=tiny.environment()
    )
    assert gone([int(done.stdout)], 10), done.stderr


def test_another_process_with_the_same_id_is_not_the_one_that_was_watched() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(99)"])
    try:
        found = guard.look(child.pid)
        assert found is not None
        assert guard.descendants({found[0]}) == {found[0]}
        assert guard.descendants({guard.Process(child.pid, "1")}) == set()
        guard.end({guard.Process(child.pid, "1")})
        assert child.poll() is None
    finally:
        child.kill()
        child.wait()


STOPPED = """
import os, signal, sys, time
from vllm_dflash import cli, checkpoint
{setup}
def wait(*a):
    print("ready", flush=True)
    {wait}
checkpoint.read_config = wait
sys.argv = ["vllm-dflash", "inspect", "x"]
cli.main()
"""


def stopped(sig: int, setup: str = "", wait: str = "time.sleep(60)", twice: bool = False):
    script = STOPPED.format(setup=setup, wait=wait)
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=tiny.environment(),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n", process.communicate()
    process.send_signal(sig)
    if twice:
        time.sleep(0.5)
        process.send_signal(sig)
    _, err = process.communicate(timeout=30)
    return process.returncode, err


@pytest.mark.parametrize("sig", processes.STOP_SIGNALS)
def test_a_signal_is_one_line_and_its_exit_code(sig) -> None:
    assert stopped(sig) == (128 + sig, f"stopped by {sig.name}\n")


def test_what_may_not_swallow_a_signal_does_not() -> None:
    """Code that goes on after any exception, as libraries have."""
    wait = "\n    ".join(
        ["for _ in range(600):", "  try: time.sleep(0.1)", "  except Exception: pass"]
    )
    assert stopped(signal.SIGTERM, wait=wait)[0] == 143
    stubborn = wait.replace("Exception", "BaseException")
    assert stopped(signal.SIGTERM, wait=stubborn, twice=True)[0] == 143
    late = "from vllm_dflash import processes; processes.STOP_TIMEOUT_S = 1"
    assert stopped(signal.SIGTERM, setup=late, wait=stubborn)[0] == 143


def test_an_ignored_signal_stays_ignored() -> None:
    """As nohup has it."""
    setup = "signal.signal(signal.SIGHUP, signal.SIG_IGN)"
    code, err = stopped(signal.SIGHUP, setup=setup, wait="time.sleep(2); raise ValueError('done')")
    assert (code, err) == (1, "error: done\n")


# -- whole commands ------------------------------------------------------------------------------


def is_guard(process: guard.Process) -> bool:
    try:
        return b"guard.py" in Path(f"/proc/{process.pid}/cmdline").read_bytes()
    except OSError:
        return True


@pytest.mark.engine
@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "sig", "processes_first", "seconds"),
    [
        ("bench", signal.SIGKILL, 3, 1),  # the engine core is building
        ("bench", signal.SIGTERM, 3, 1),
        ("eval", signal.SIGTERM, 0, 3),  # in the command's own process
        ("train", signal.SIGINT, 0, 3),
    ],
)
def test_no_process_outlives_its_command(
    tmp_path, verifier, prompts_file, name, sig, processes_first, seconds
) -> None:
    """Signals while an engine starts, some seconds after the command said so or, where ``processes_first``
    are given, started so many."""
    drafter = tiny.make_drafter(tmp_path / "drafter", verifier)
    common = ("--data", prompts_file, "--dtype", "float32")
    args = {
        "bench": ("bench", verifier, drafter, *common, "-o", tmp_path / "b", "--modes", "none"),
        "eval": ("eval", verifier, drafter, *common, "--max-len", "160", "--engine"),
        "train": ("train", verifier, *common, "-o", tmp_path / "d", *tiny.TRAIN_ARGS),
    }[name]
    process = subprocess.Popen(
        tiny.cli_command(*args),
        env=tiny.environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 200
        seen: set[guard.Process] = set()
        said = ""
        while not processes_first and "starting the verifier" not in said:
            assert process.stderr is not None
            line = process.stderr.readline()
            assert line, said
            said += line
        while process.poll() is None and time.monotonic() < deadline:
            seen |= guard.below(process.pid)
            if sum(not is_guard(p) for p in seen) >= processes_first:
                break
            time.sleep(0.2)
        time.sleep(seconds)
        seen |= guard.below(process.pid)
        assert process.poll() is None
        process.send_signal(sig)
        _, rest = process.communicate(timeout=60)
        err = said + rest
        assert process.returncode == (-sig if sig == signal.SIGKILL else 128 + sig), err
        if sig != signal.SIGKILL:
            lines = [line for line in err.splitlines() if "stopped by" in line]
            assert len(lines) == 1, err
            assert signal.Signals(sig).name in lines[0]
            assert "Traceback" not in err
        assert gone([p.pid for p in seen if not is_guard(p)], 15)
    finally:
        process.kill()
        process.wait()
