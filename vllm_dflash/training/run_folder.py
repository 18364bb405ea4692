"""The folder of a run: configuration, versions, metrics, curves, and the state to resume from."""

from __future__ import annotations

import json
import os
import re
import sys
import weakref
from datetime import datetime
from pathlib import Path
from typing import Any

from vllm_dflash.environment import versions
from vllm_dflash.files import (
    ANY_FILES,
    MARK,
    atomic_write,
    claim_folder,
    lock_folder,
    mark_folder,
    remove_own,
    writing,
)
from vllm_dflash.renamed import run_config
from vllm_dflash.training.feature_store import read_index
from vllm_dflash.training.responses import check_log, response_logs

_STATE_FILE = re.compile(r"state-\d{8,}\.safetensors")
_SEAT_FILES = {"config.json", "model.safetensors"}
#: Everything that a run writes into its folder; --restart removes this and nothing else.
_OWN_FILES = (
    rf"(run|state)\.json|{_STATE_FILE.pattern}|metrics\.jsonl|curves\.png"
    r"|(responses|rejected)(-heldout)?\.jsonl|replica-\d+\.log"
    r"|features/(index\.json|features-\d{5,}\.safetensors)"
    rf"|seat/(config\.json|model\.safetensors|{re.escape(MARK)})|tensorboard/events\.out\.tfevents\..*"
)


class RunFolder:
    """``<output>-run/``: everything about a run but the drafter itself.

    One process at a time has it.

    Args:
        path: the folder, which :meth:`claim` has found good.
        config: what decides the result; a run that has a state must have the same to be resumed.
        restart: discards an earlier run.

    Raises:
        ValueError: the folder holds a run with another configuration, or is in use.
    """

    def __init__(self, path: Path, config: dict[str, Any], *, restart: bool = False) -> None:
        self.path = path
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
            lock = lock_folder(path)
            if lock is None:
                raise ValueError(f"another vllm-dflash train is at work in {path}; wait for it")
            weakref.finalize(self, os.close, lock)
            if restart:
                remove_own(path, _OWN_FILES)
            file = path / "run.json"
            #: As JSON has it.
            self.config = config = json.loads(json.dumps(config))
            before = _read_run(file) if file.is_file() else {}
            if before and self._decided:
                self._compare(config, before["config"])
            mark_folder(path, "run")
            if before.get("config") != config:
                started = datetime.now().isoformat(timespec="seconds")
                run = {
                    "config": config,
                    "versions": versions(),
                    "argv": sys.argv,
                    "started": before.get("started", started),
                }
                atomic_write(file, json.dumps(run, indent=2) + "\n")
            seat = path / "seat"
            if seat.is_dir() and {p.name for p in seat.iterdir()} == _SEAT_FILES:
                # Written before there were marks; it is ours, being in here.
                mark_folder(seat, "drafter", whole=True)

    @staticmethod
    def claim(path: Path, inputs: dict[str, Any], *, restart: bool) -> None:
        """Checks before any work that the folder can be had, and that what is in it can be resumed.

        Raises:
            ValueError: it is not ours, or a file in it is damaged.
        """
        names = _OWN_FILES if restart else ANY_FILES
        claim_folder(path, "run", "-o", label="run folder", inputs=inputs, names=names, link=True)
        if restart or not path.exists():
            return
        if (path / "run.json").exists():
            _read_run(path / "run.json")
        elif (path / "state.json").exists():
            raise ValueError(f"{path / 'run.json'} is gone, but there is a state; {_DISCARD}")
        if (state := _read_state(path)) is not None:
            _check_state_file(path / state["file"])
        for log in response_logs(path / "responses.jsonl"):
            check_log(log, _DISCARD)
        if (index := path / "features" / "index.json").is_file():
            read_index(index)

    @staticmethod
    def setting(path: Path, key: str) -> Any:
        """What the run in a folder has for a setting; None where there is no run."""
        file = path / "run.json"
        return _read_run(file)["config"].get(key) if file.is_file() else None

    @property
    def _decided(self) -> bool:
        """Whether there is something that other settings would not have led to. Responses say themselves what
        they depend on; a run that failed before its first step may be tried with other settings."""
        return self.state() is not None or self.features.exists()

    def _compare(self, config: dict[str, Any], before: dict[str, Any]) -> None:
        differs = sorted(k for k in config | before if config.get(k) != before.get(k))
        if differs:
            key = differs[0]
            raise ValueError(
                f"{self.path} holds a run with {key} = {before.get(key)!r}, not {config.get(key)!r}: "
                "repeat its settings to resume it, or give another -o (or --restart to discard it); "
                f"--responses {self.responses} with another -o keeps its responses"
            )

    @property
    def started(self) -> datetime:
        """When the run was first started, in the local time of then."""
        file = self.path / "run.json"
        started = json.loads(file.read_text()).get("started")
        if started is None:  # a run of an older version
            return datetime.fromtimestamp(file.stat().st_mtime)
        return datetime.fromisoformat(started)

    @property
    def responses(self) -> Path:
        return self.path / "responses.jsonl"

    @property
    def features(self) -> Path:
        """Features recorded while the responses were generated."""
        return self.path / "features"

    @property
    def rejected(self) -> Path:
        return self.path / "rejected.jsonl"

    @property
    def rejected_heldout(self) -> Path:
        return self.path / "rejected-heldout.jsonl"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def curves(self) -> Path:
        return self.path / "curves.png"

    # -- state -----------------------------------------------------------------------------------

    def state(self) -> dict[str, Any] | None:
        """The newest complete state, None at the start of a run."""
        return _read_state(self.path)

    def new_state_file(self, step: int) -> Path:
        """Where the learner writes the state of ``step``; :meth:`commit_state` makes it count."""
        return self.path / f"state-{step:08d}.safetensors"

    def commit_state(self, step: int, extra: dict[str, Any]) -> None:
        """Makes a written state the one to resume from and removes older ones."""
        file = self.new_state_file(step)
        atomic_write(
            self.path / "state.json", json.dumps({"step": step, "file": file.name, **extra})
        )
        for old in self.path.iterdir():
            if old != file and _STATE_FILE.fullmatch(old.name):
                old.unlink()

    # -- metrics ---------------------------------------------------------------------------------

    def cut_metrics(self, step: int) -> None:
        """Drops the metrics of steps that will be run again."""
        if self.metrics.is_file():
            kept = [line for line in self._metric_lines() if _parsed(line).get("step", step) < step]
            atomic_write(self.metrics, "".join(line + "\n" for line in kept))

    def append_metrics(self, rows: list[dict[str, Any]]) -> None:
        with writing(self.metrics), self.metrics.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)

    def read_metrics(self) -> list[dict[str, Any]]:
        if not self.metrics.is_file():
            return []
        return [_parsed(line) for line in self._metric_lines() if line]

    def _metric_lines(self) -> list[str]:
        return self.metrics.read_text(errors="replace").splitlines()


def _parsed(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        # The last line of a killed run may be cut short; its step is run again.
        return {}
    return row if isinstance(row, dict) else {}


# -- what is read back, which a full disk or an editor may have damaged ---------------------------

_DISCARD = "give another -o, or --restart to discard the run"


def _read_run(file: Path) -> dict[str, Any]:
    run = _read_object(file)
    if not isinstance(run.get("config"), dict):
        raise ValueError(f"{file} is damaged (it has no config); {_DISCARD}")
    return run | {"config": run_config(run["config"])}


def _read_state(folder: Path) -> dict[str, Any] | None:
    file = folder / "state.json"
    if not file.is_file():
        return None
    state = _read_object(file)
    name = state.get("file")
    if (
        type(state.get("step")) is not int
        or not (isinstance(name, str) and _STATE_FILE.fullmatch(name))
        or not all(isinstance(state.get(key, {}), dict) for key in ("bad", "seconds"))
    ):
        raise ValueError(f"{file} is damaged (it names no state to resume from); {_DISCARD}")
    if not (folder / name).is_file():
        raise ValueError(f"{file} names {name}, which is gone; {_DISCARD}")
    return state


def _read_object(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}); {_DISCARD}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} is damaged (a {type(value).__name__}, no object); {_DISCARD}")
    return value


def _check_state_file(file: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as handle:
            handle.keys()
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is damaged ({error}); {_DISCARD}") from error
