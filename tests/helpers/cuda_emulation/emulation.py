"""Builds and loads the CUDA kernels for the host: ``torch.ops.vllm_dflash_emulated.*`` on CPU tensors.

Same sources (csrc/cuda/*.cu and *.cuh) and same argument lists as on a GPU; what differs is in this folder.
The library is kept in build/cuda_emulation under a hash of all that went into it.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shlex
from dataclasses import dataclass
from pathlib import Path

import torch

from vllm_dflash.ops import build
from vllm_dflash.ops.schemas import SCHEMAS

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
NAMESPACE = "vllm_dflash_emulated"
#: More compiler options, such as -fsanitize=address (which wants its runtime in LD_PRELOAD).
ENV_FLAGS = "VLLM_DFLASH_EMULATION_FLAGS"

_library: list[torch.library.Library] = []


@dataclass(frozen=True)
class Emulation:
    """The loaded library: the ops and what the emulator tells."""

    ops: object
    lib: ctypes.CDLL

    def set_order(self, seed: int) -> None:
        """Order of blocks and threads from now on; 0: ascending."""
        self.lib.vd_emulation_seed(ctypes.c_uint64(seed))

    @property
    def launches(self) -> int:
        return self.lib.vd_emulation_launches()

    @property
    def last(self) -> str:
        """Kind and size of the last launch."""
        return self.lib.vd_emulation_last().decode()


@functools.cache
def load() -> Emulation:
    """Compiles if need be (about half a minute) and registers the ops, once a process.

    Raises:
        build.BuildError: there is no C++ compiler or no CUDA toolkit, or the sources do not compile.
    """
    recipe = _recipe()
    path = ROOT / "build" / "cuda_emulation" / f"{_key(recipe)}.so"
    if not path.is_file():
        build.run(recipe, path, path.with_suffix(""), jobs=build.num_jobs(os.environ))
    library = torch.library.Library(NAMESPACE, "DEF")
    _library.append(library)
    for op, schema in SCHEMAS.items():
        library.define(op + schema)
    torch.ops.load_library(path)
    lib = ctypes.CDLL(str(path))
    lib.vd_emulation_launches.restype = ctypes.c_int64
    lib.vd_emulation_last.restype = ctypes.c_char_p
    return Emulation(getattr(torch.ops, NAMESPACE), lib)


def _recipe() -> build.Recipe:
    torch_files = build.find_torch(os.environ)
    cxx = build.find_cxx(os.environ)
    include = cuda_include()
    sources = [*(ROOT / "csrc/cuda").glob("*.cu"), *HERE.glob("*.cpp")]
    return build.Recipe(
        name="emulated",
        csrc=ROOT / "csrc",
        torch=torch_files,
        sources=tuple(sorted(path.relative_to(ROOT) for path in sources)),
        compiler=cxx,
        compiler_version=" ".join(cxx),
        flags=(
            "-std=c++20",
            "-O1",
            "-g1",
            "-fPIC",
            # As nvcc sees them: vectors over memory that has another type.
            "-fno-strict-aliasing",
            # A*B+C in one rounding or two is the compiler's choice on a GPU; here it is always two.
            "-ffp-contract=off",
            "-Wall",
            "-Wno-unknown-pragmas",
            "-DVD_CUDA_EMULATED",
            # Some of the tests' batches count as large, so that both ways through the heads are taken.
            "-DVD_STORE_FEW_WARPS=24",
            *build.DEFINES,
            *shlex.split(os.environ.get(ENV_FLAGS, "")),
        ),
        includes=(
            f"-I{HERE}",
            f"-I{HERE / 'include'}",
            "-isystem",
            str(torch_files.include),
            "-isystem",
            str(include),
            "-include",
            "cuda_runtime.h",
            "-x",
            "c++",
        ),
        linker=(*cxx, "-shared", *shlex.split(os.environ.get(ENV_FLAGS, ""))),
        libraries=(f"-L{torch_files.lib}", "-ltorch_cpu", "-lc10"),
    )


def cuda_include() -> Path:
    """Headers of a CUDA toolkit or of NVIDIA's wheels; nothing of it is run, so any version does."""
    home = (os.environ.get("CUDA_HOME") or "").strip(":")
    packages = build.find_torch(os.environ).root.parent
    places = [Path(home)] if home else []
    places += [Path("/usr/local/cuda"), *sorted(packages.glob("nvidia/cu*"))]
    for place in places:
        names = ("cuda_bf16.h", "cuda_fp8.h", "vector_functions.h")
        if all((place / "include" / name).is_file() for name in names):
            return place / "include"
    raise build.BuildError(f"no CUDA headers in {', '.join(map(str, places))}: set CUDA_HOME")


def _key(recipe: build.Recipe) -> str:
    total = hashlib.sha256(
        f"{recipe.torch.version} {recipe.flags} {recipe.compiler_version}".encode()
    )
    headers = [*(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc/cuda").glob("*.*h"), *HERE.rglob("*.h")]
    for path in sorted([*headers, *(ROOT / source for source in recipe.sources)]):
        total.update(path.name.encode() + path.read_bytes())
    return total.hexdigest()[:24]
