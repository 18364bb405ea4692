"""``vllm-dflash learn``: commands to a server that learns, left in its folder."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from vllm_dflash.learning.versions import leave_command
from vllm_dflash.serving.frontend.learning_metrics import latest_status

COMMANDS = ("status", "pause", "resume", "promote", "rollback")


def read_status(folder: Path) -> dict[str, Any]:
    """What the server in this folder does.

    Raises:
        ValueError: no server learns there.
    """
    status = latest_status(folder)
    if status is None:
        raise ValueError(
            f"no server learns in {folder} now; name the folder that it was given as dflash_learn"
        )
    return status


def send(folder: Path, command: str, version: int | None = None, seconds: float = 10.0) -> bool:
    """Leaves a command for the server.

    Returns:
        Whether the server has taken it within so many seconds.

    Raises:
        ValueError: no server learns there, or the command is none.
    """
    if command not in COMMANDS[1:]:
        raise ValueError(f"{command!r} is no command; there are {', '.join(COMMANDS)}")
    if (command == "promote") != (version is not None):
        raise ValueError("promote takes the number of a version, the other commands take none")
    status = read_status(folder)
    if version is not None and not (folder / "versions" / f"{version:06d}").is_dir():
        there = sorted(int(p.name) for p in (folder / "versions").glob("[0-9]*"))
        raise ValueError(f"there is no version {version} in {folder}; there are {there}")
    if status["state"] == "failed":
        raise ValueError(f"the server has stopped learning ({status['error']}); restart it")
    file = leave_command(folder, command, version=version)
    deadline = time.monotonic() + seconds
    while file.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def rows(status: dict[str, Any]) -> dict[str, str]:
    """The status in words."""
    served, history = status["version"], status["history"]
    out = {
        "state": status["state"] + (f": {status['error']}" if status["error"] else ""),
        "version that serves": f"{served}" + (" (the given drafter)" if served == 0 else ""),
        "conversations": f"{status['replay']['conversations']} to learn from, "
        f"{status['held_out']['conversations']} held out",
        "sources": ", ".join(
            f"{n or '(none)'}: {k}" for n, k in status["replay"]["sources"].items()
        )
        or "none yet",
        "learned": f"{status['steps']} steps, {status['anchors']} blocks, {status['seconds']:.0f} s in "
        f"{status['slices']} slices, the longest {1000 * status['longest_slice_seconds']:.0f} ms",
        "still to learn": f"{status['to_learn']} visits of conversations",
        "left out": f"{status['duplicates']} told twice, {status['unusable']} not usable, "
        f"{status['not_extracted']} without features, {status['written_dropped']} not written, "
        f"{status['written_damaged']} damaged on disk",
        "last comparison": status["last_comparison"] or "none yet",
        "served tau": ", ".join(
            f"{1 + row['accepted_tokens'] / row['drafts']:.2f} on {row['source'] or '(none)'}"
            for row in status["served"]
            if row["version"] == served
        )
        or "no drafts yet",
        "promotions, rollbacks": f"{status['promotions']}, {status['rollbacks']}",
    }
    for event in history[-5:]:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event["time"]))
        taus = (
            f", tau {event['tau_before']:.3f} -> {event['tau_after']:.3f}"
            if "tau_after" in event
            else ""
        )
        reason = f", {event['reason']}" if event.get("reason") else ""
        out[when] = f"version {event['version']} {event['event']}{taus}{reason}"
    return out
