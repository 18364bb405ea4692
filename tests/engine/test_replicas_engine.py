"""Data parallel training by whole commands: as one replica, from one to two, and after a replica's death."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from test_tensor_parallel import largest_difference, metrics, train_args
from test_train_engine import metric_steps, same_weights, stop_at

from helpers import tiny
from vllm_dflash import guard

pytestmark = [pytest.mark.engine, pytest.mark.long]
STEPS = 60
#: What the weights of different numbers of replicas may differ by; they are of the order of 0.1.
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("replicas")


def command(trained, out: Path, replicas: int, *more: str) -> list[str]:
    # Evaluations bound how many steps a call has, and so when a run can be stopped.
    args = ("--data-parallel-size", str(replicas), "--eval-every", "5", *more)
    return train_args(trained, out, 1, *args, steps=STEPS)


@pytest.fixture(scope="module")
def whole(trained, folder) -> dict[int, Any]:
    """Runs of one and of two replicas from their start to their end."""
    return {n: tiny.cli(*command(trained, folder / f"whole-{n}", n)) for n in (1, 2)}


def test_two_replicas_train_as_one(whole, folder, capsys) -> None:
    assert "2 ranks share each step by sequence" in whole[2].stderr
    one, two = (metrics(folder / f"whole-{n}") for n in (1, 2))
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name in ("step", "anchors", "tokens", "valid", "bad", "lr"):
            assert a.get(name) == b.get(name), name
        for name in ("loss", "grad_norm"):
            assert a.get(name, 0) == pytest.approx(b.get(name, 0), rel=1e-3), name
    difference = largest_difference(folder / "whole-1", folder / "whole-2")
    with capsys.disabled():
        print(f"\nlargest difference of a weight after {STEPS} steps: {difference:.1e}")
    assert difference < TOLERANCE
    # What the second one printed is not on the console.
    assert (folder / "whole-2-run" / "replica-1.log").stat().st_size > 0


def test_a_run_goes_on_with_more_replicas(trained, whole, folder) -> None:
    out = folder / "more"
    before = tiny.cli_command(*command(trained, out, 1, "--save-minutes", "0"))
    code, err = stop_at(before, folder / "more-run", 10, signal.SIGTERM)
    assert code == 143, err
    done = tiny.cli(*command(trained, out, 2))
    assert "resuming at step" in done.stderr
    assert metric_steps(folder / "more-run") == metric_steps(folder / "whole-1-run")
    assert largest_difference(folder / "whole-1", out) < TOLERANCE


def killed_replica(command: list[str], run: Path, step: int) -> tuple[int, str, set[guard.Process]]:
    """Kills the second replica's process once a run has done a step.

    Returns:
        The command's exit code and what it said, and all processes that it had.
    """
    process = subprocess.Popen(
        command,
        env=tiny.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 240
        while max(metric_steps(run), default=-1) < step and time.monotonic() < deadline:
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.05)
        seen = guard.below(process.pid)
        (replica,) = (
            p.pid
            for p in seen
            if b"training.replica" in Path(f"/proc/{p.pid}/cmdline").read_bytes()
        )
        os.kill(replica, signal.SIGKILL)
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
        process.wait()
    return process.returncode, err, seen


def test_a_run_whose_replica_is_killed_resumes_bit_for_bit(trained, whole, folder) -> None:
    out, run = folder / "killed", folder / "killed-run"
    args = command(trained, out, 2, "--save-minutes", "0")
    code, err, seen = killed_replica(tiny.cli_command(*args), run, 10)
    assert code == 1, err
    (error,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "replica 1 was killed by SIGKILL" in error
    assert str(run / "replica-1.log") in error
    assert "the same command resumes" in error
    assert not out.exists()
    deadline = time.monotonic() + 15
    while (left := guard.descendants(seen)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left
    done = tiny.cli(*args)
    assert "resuming at step" in done.stderr
    assert metric_steps(run) == metric_steps(folder / "whole-2-run")
    assert same_weights(folder / "whole-2", out)
