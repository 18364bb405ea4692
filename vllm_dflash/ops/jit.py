"""Compiling the extensions at run time, for installs that came without them; kept in a cache.

A wheel may hold no extension although a compiler is there: built by an isolated uv, or cached by pip
from before torch was installed. It does hold ``csrc/``.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from vllm_dflash.ops import build

logger = logging.getLogger("vllm.vllm_dflash.ops")

#: 0: never compile at run time.
ENV_JIT = "VLLM_DFLASH_JIT"
#: Folder of what was compiled at run time; default ``~/.cache/vllm_dflash``.
ENV_CACHE = "VLLM_DFLASH_CACHE"
#: A compiler that takes longer hangs.
COMPILE_TIMEOUT_S = 1800
#: How long a failure is remembered: what the compiler lacked may have been installed since.
FAILURE_STANDS_S = 24 * 3600


def cache_root() -> Path:
    if given := os.environ.get(ENV_CACHE):
        return Path(given)
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given) / "vllm_dflash"
    try:
        return Path.home() / ".cache" / "vllm_dflash"
    except RuntimeError as error:
        # A container's user without an entry in /etc/passwd.
        raise build.BuildError(f"no cache folder: set {ENV_CACHE}\n{error}") from error


def allowed() -> bool:
    return build.choice(os.environ, ENV_JIT, ("1", "0")) == "1"


def compiled(
    name: str, csrc: Path, capabilities: list[tuple[int, int]]
) -> tuple[Path, tuple[str, ...]]:
    """An extension from the cache, compiled first where it is not there, and its GPU codes.

    Args:
        capabilities: compute capabilities of this machine's GPUs, for the CUDA kernels.

    Raises:
        BuildError: it is switched off, something is missing, or the compiler failed.
    """
    if not allowed():
        raise build.BuildError(f"{ENV_JIT}=0")
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        # A minute of host work inside a capture, and other streams' work in it would break the graph.
        raise build.BuildError("nothing is compiled during CUDA graph capture; call load() before")
    here = build.Torch(Path(torch.__file__).parent, torch.__version__, torch.version.cuda)
    if name == build.CPP:
        recipe = build.cpp_recipe(csrc, here, os.environ)
    else:
        recipe = build.cuda_recipe(csrc, here, os.environ, _archs(capabilities))
    try:
        return _cached(recipe), recipe.codes
    except OSError as error:
        raise build.BuildError(
            f"cannot write to {cache_root()}: {error}; set {ENV_CACHE} to a folder that can be written"
        ) from error


def _archs(capabilities: list[tuple[int, int]]) -> tuple[build.Arch, ...] | None:
    """This machine's GPUs only; None, for ``TORCH_CUDA_ARCH_LIST``, where they are not known.

    The list comes second: vLLM's container images set it to all that vLLM is built for.
    """
    if capabilities:
        return tuple(build.Arch(major * 10 + minor) for major, minor in sorted(set(capabilities)))
    if not os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip():
        raise build.BuildError("no GPU found to compile for: set TORCH_CUDA_ARCH_LIST, e.g. to 9.0")
    return None


def _cached(recipe: build.Recipe) -> Path:
    """One process compiles, the others wait for it; a failure is theirs too, and for a day everybody's: a
    compiler that lacks a header would be tried by every process at every start."""
    folder = cache_root() / recipe.key()
    target, failure = folder / recipe.filename, folder / "failed.txt"
    if target.is_file():
        return target
    # Only this user may write where libraries are loaded from.
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with _locked(folder / "lock"):
        if target.is_file():
            return target
        if failure.is_file() and time.time() - failure.stat().st_mtime < FAILURE_STANDS_S:
            raise build.BuildError(
                f"{failure.read_text()}\n(remembered; delete {failure} to try again)"
            )
        logger.info("vllm-dflash: compiling %s into %s (once)", recipe.name, folder)
        temp = folder / "objects"
        shutil.rmtree(temp, ignore_errors=True)
        try:
            jobs = build.num_jobs(os.environ)
            build.run(recipe, target, temp, jobs=jobs, timeout=COMPILE_TIMEOUT_S)
        except build.BuildError as error:
            failure.write_text(str(error))
            raise
        finally:
            shutil.rmtree(temp, ignore_errors=True)
        failure.unlink(missing_ok=True)
    return target


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a file lock, which the kernel frees even if its process is killed."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("vllm-dflash: another process is compiling the ops, waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
