"""The drafter that many engine tests share, trained once for given sources and kept between test runs."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

import vllm_dflash
from helpers import tiny
from vllm_dflash.environment import versions

#: Results kept, of the sources they were last used with: a branch or two beside main.
KEPT = 4
ARGS = (
    *tiny.TRAIN_ARGS, "--draft-vocab", "256", "--lr", "4e-3", "--num-anchors", "48", "--batch-size", "2",
    "--max-steps", "300", "--holdout", "0.1", "--eval-every", "150",
)  # fmt: skip


@dataclass(frozen=True)
class Trained:
    """A drafter made by ``vllm-dflash train``, and what it was made from."""

    verifier: Path
    prompts: Path
    drafter: Path
    run: Path
    args: tuple[str, ...]
    output: str

    @property
    def summary(self) -> dict:
        return json.loads((self.drafter / "dflash_training.json").read_text())


def digest(args: Sequence[str]) -> str:
    """Of all that decides the result: sources and where they lie, tiny models, arguments, versions."""
    package = Path(vllm_dflash.__file__).parent
    files = [Path(__file__), Path(tiny.__file__)]
    for folder in (package, package.parent / "csrc"):
        files += (p for p in folder.rglob("*") if p.suffix in {".py", ".cpp", ".h", ".cu", ".cuh"})
    out = hashlib.sha256(json.dumps([list(args), versions()]).encode())
    for file in sorted(files):
        out.update(f"\0{file.relative_to(file.anchor)}\0".encode())
        out.update(file.read_bytes())
    return out.hexdigest()[:16]


def make(folder: Path, args: Sequence[str]) -> None:
    """Verifier, prompts, drafter, run folder and what the command printed, in a new folder."""
    verifier = tiny.make_verifier(folder / "verifier")
    prompts = tiny.write_prompts(folder / "prompts.jsonl", 24)
    done = tiny.cli("train", verifier, "--data", prompts, "-o", folder / "drafter", *args)
    (folder / "output.txt").write_text(done.stderr)


def cached(store: Path, args: Sequence[str]) -> Path:
    """The folder of :func:`make` in ``store``; made by one process while the others wait.

    A folder is used only once it has its ``output.txt``, the last file: a killed run leaves none.
    """
    folder = store / digest(args)
    with FileLock(store / "lock"):
        if not (folder / "output.txt").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            make(folder, args)
        folder.touch()
        known = sorted((p for p in store.iterdir() if p.is_dir()), key=lambda p: p.stat().st_mtime)
        for old in known[:-KEPT]:
            shutil.rmtree(old)
    return folder


def load(made: Path, into: Path, args: Sequence[str]) -> Trained:
    """The result with a drafter and a run folder of the caller's own, which tests may go on with."""
    drafter = Path(shutil.copytree(made / "drafter", into / "drafter"))
    run = Path(shutil.copytree(made / "drafter-run", into / "drafter-run"))
    output = (made / "output.txt").read_text()
    return Trained(made / "verifier", made / "prompts.jsonl", drafter, run, tuple(args), output)
