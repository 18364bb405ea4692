"""The drafters that a server has learned: kept with their figures, one of them promoted."""

from __future__ import annotations

import json
import logging
import shutil
import time
from pathlib import Path
from typing import Any

from vllm_dflash.checkpoint import check_weights, read_config
from vllm_dflash.config import DrafterConfig
from vllm_dflash.files import atomic_folder, atomic_write, claim_folder, mark_folder

logger = logging.getLogger("vllm.vllm_dflash")
#: Version of the drafter that the user gave.
GIVEN = 0
#: Versions kept, the promoted one and the one before it among them.
KEPT = 5
_STATE = "state.json"
#: What a folder holds besides our mark.
FILES = r"(state|status)\.json|(versions|conversations|commands)(/.*)?|status\.[0-9]+"


def leave_command(folder: Path, command: str, **args: Any) -> Path:
    """The file of a command for the server that learns in a folder; it is gone once that has taken it."""
    commands = folder / "commands"
    commands.mkdir(exist_ok=True, mode=0o700)
    file = commands / f"{time.time_ns():020d}.json"
    atomic_write(file, json.dumps({"command": command, **args}))
    return file


def copy_version(source: Path, target: Path) -> None:
    """Copies the files of a checkpoint; ``target`` is whole or not there."""
    with atomic_folder(target) as folder:
        for pattern in ("*.json", "*.safetensors", "*.pt"):
            for file in source.glob(pattern):
                shutil.copyfile(file, folder / file.name)


def hand_over(version: Path, folder: Path, **figures: Any) -> tuple[Path, Path]:
    """Copies a version into the folder of another server, and leaves the command to promote it.

    Returns:
        The version there, and the command, which is gone once it is taken.
    """
    versions = folder / "versions"
    number = 1 + max((int(p.name) for p in versions.glob("[0-9]*")), default=GIVEN)
    there = versions / f"{number:06d}"
    copy_version(version, there)
    return there, leave_command(folder, "promote", version=number, figures=figures)


class Versions:
    """Drafters in ``folder/versions``; ``folder/state.json`` says which one serves.

    A version is written whole before it is named in the state, and the state is replaced whole: a kill at any
    time leaves a version that was promoted.

    Raises:
        ValueError: the folder is not one of ours.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        claim_folder(folder, "learning", "dflash_learn", names=FILES, link=True)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        mark_folder(folder, "learning")
        self.state: dict[str, Any] = {"promoted": GIVEN, "history": []}
        file = folder / _STATE
        if file.is_file():
            try:
                self.state |= json.loads(file.read_text())
            except ValueError as error:
                raise ValueError(
                    f"{file} is damaged ({error}); delete it to begin with the given drafter again"
                ) from error

    @property
    def promoted(self) -> int:
        return int(self.state["promoted"])

    @property
    def history(self) -> list[dict[str, Any]]:
        """What happened, the latest last."""
        return self.state["history"]

    def path(self, version: int) -> Path:
        return self.folder / "versions" / f"{version:06d}"

    def there(self) -> list[int]:
        """Numbers of the versions on disk."""
        return sorted(int(p.name) for p in self.path(0).parent.glob("[0-9]*") if p.is_dir())

    def usable(self, version: int) -> bool:
        """Whether its files can be loaded; a warning says why not."""
        path = self.path(version)
        try:
            check_weights(path, DrafterConfig.from_dict(read_config(path)))
        except (ValueError, OSError) as error:
            logger.warning(
                "vllm-dflash: version %d of the drafter cannot be used: %s", version, error
            )
            return False
        return True

    def to_serve(self, given: str | None) -> str | None:
        """The drafter to start with: the one promoted, or the latest that served before and is whole; the
        user's where there is none."""
        promoted = self.promoted
        order = [promoted, *reversed(self.served())]
        for version in (v for v in order if v in self.there()):
            if self.usable(version):
                if version != promoted:
                    self._record("fallback", version)
                return str(self.path(version))
        if promoted != GIVEN:
            self._record("fallback", GIVEN)
        return given

    def learned(self) -> tuple[float, int]:
        """Until when conversations were learned from, for the promoted version or in vain; visits to come.

        A time in the future is of a clock that was wrong, and says nothing.
        """
        place = self.state.get("learned", {})
        until = float(place.get("until", 0.0))
        return (until, int(place["to_learn"])) if 0 < until <= time.time() else (0.0, 0)

    def note_learned(self, until: float, to_learn: int) -> None:
        """Keeps what :meth:`learned` says."""
        self._write({**self.state, "learned": {"until": until, "to_learn": to_learn}})

    def _write(self, state: dict[str, Any]) -> None:
        atomic_write(self.folder / _STATE, json.dumps(state, indent=1) + "\n")
        self.state = state

    def next_number(self) -> int:
        """Of a new version."""
        return 1 + max([self.promoted, *self.there()])

    def switch(self, version: int, event: str, figures: dict[str, Any] | None = None) -> None:
        """Goes to a version that is on disk.

        Raises:
            ValueError: it is not there, or cannot be loaded.
        """
        self.check(version)
        self._record(event, version, figures)

    def check(self, version: int) -> None:
        """ValueError if a version is not there, or cannot be loaded."""
        if version not in self.there() or not self.usable(version):
            raise ValueError(
                f"there is no version {version} in {self.folder}; there are {self.there()}"
            )

    def served(self) -> list[int]:
        """Versions that have served, the latest last; what a kill left half written never has."""
        return [GIVEN, *(e["version"] for e in self.history)]

    def previous(self) -> int | None:
        """The version that served before the one promoted, if it is on disk."""
        there, now = set(self.there()), self.promoted
        return next((v for v in reversed(self.served()) if v != now and v in there), None)

    def _record(self, event: str, version: int, figures: dict[str, Any] | None = None) -> None:
        entry = {"event": event, "version": version, "time": time.time(), **(figures or {})}
        history = [*self.history, entry][-200:]
        self._write({**self.state, "promoted": version, "history": history})
        kept = {version, self.previous(), GIVEN, *self.there()[-KEPT:]}
        for other in self.there():
            if other not in kept:
                shutil.rmtree(self.path(other), ignore_errors=True)
