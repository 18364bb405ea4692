"""Which implementation of the ops runs here: compiled ahead, compiled now, Triton, or plain PyTorch.

Per device the best that is there: for CPU tensors C++ or PyTorch, for CUDA tensors CUDA, Triton or
PyTorch. An extension comes from the install (AOT) or is compiled from the same sources on first use
(JIT). Whatever is chosen, ``torch.ops.vllm_dflash.*`` exists with the same schemas, one log line says
what it is, and :class:`Loaded` keeps why nothing better is.
"""

from __future__ import annotations

import importlib
import logging
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from vllm_dflash.environment import gpu_capabilities
from vllm_dflash.ops import build, fake, jit, reference
from vllm_dflash.ops.schemas import NAMESPACE, SCHEMAS

logger = logging.getLogger("vllm.vllm_dflash.ops")

#: One of FORCED: use this or raise, so that nobody measures or tests something else by accident.
ENV_OPS = "VLLM_DFLASH_OPS"
#: cuda, triton: for CUDA tensors; cpp: for CPU tensors; torch: for both.
FORCED = ("cuda", "cpp", "triton", "torch")

# Symbolic links resolved: a strict editable install is a tree of links.
PACKAGE = Path(__file__).resolve().parents[1]

_lock = threading.RLock()
_loaded: Loaded | None = None
#: Registrations end with their objects.
_libraries: list[torch.library.Library] = []


@dataclass(frozen=True)
class Reason:
    """Why one way to an implementation is closed."""

    #: cpp, cuda or triton.
    mode: str
    #: AOT, JIT, or empty where there is but one way.
    way: str
    #: First line: what is missing and the way out. Then the original exception or compiler output.
    text: str

    @property
    def summary(self) -> str:
        return self.text.partition("\n")[0]

    def __str__(self) -> str:
        return ": ".join(filter(None, (self.way, self.text)))


@dataclass(frozen=True)
class Loaded:
    """What runs when an op is called in this process."""

    #: For CPU tensors: cpp or torch.
    cpu: str
    #: For CUDA tensors: cuda, triton or torch; None if this torch has no GPU support.
    cuda: str | None
    #: AOT or JIT; None where nothing compiled is used.
    cpu_origin: str | None = None
    cuda_origin: str | None = None
    #: GPU codes in the CUDA extension: ``sm_90``, ``compute_120``.
    codes: tuple[str, ...] = ()
    reasons: tuple[Reason, ...] = ()

    @property
    def mode(self) -> str:
        """Of the device that serves: the GPU where there is one."""
        return self.cpu if self.cuda is None else self.cuda

    @property
    def origin(self) -> str | None:
        return self.cpu_origin if self.cuda is None else self.cuda_origin

    @property
    def degraded(self) -> bool:
        """Whether something better was looked for and not found."""
        return self.origin is None and bool(self._closed())

    def describe(self) -> str:
        """One line for the log: ``vllm-dflash ops: cuda (AOT, sm_90)``, ``... triton (no nvcc: ...)``."""
        if self.origin is not None:
            note = ", ".join((self.origin, ",".join(self.codes))) if self.codes else self.origin
        else:
            note = "; ".join(self._closed()) or f"{ENV_OPS}={self.mode}"
        return f"vllm-dflash ops: {self.mode} ({note})"

    def _closed(self) -> list[str]:
        """Why the serving device has nothing better, in short."""
        better = ("cpp",) if self.cuda is None else ("cuda", "triton")
        reasons = [r for r in self.reasons if r.mode in better]
        # Of the two ways to an extension the later one says what to do, unless it is switched off.
        later = {r.mode for r in reasons if r.way == "JIT" and r.summary != f"{jit.ENV_JIT}=0"}
        return [r.summary for r in reasons if r.way != "AOT" or r.mode not in later]


def load() -> Loaded:
    """Makes ``torch.ops.vllm_dflash.*`` callable; the first call decides for the process.

    The first call may compile, for seconds (C++) to a minute (CUDA): not inside a CUDA graph capture.

    Raises:
        ValueError: a variable has an unknown value.
        RuntimeError: ``VLLM_DFLASH_OPS`` asks for what is not there.
    """
    global _loaded
    if _loaded is None:
        with _lock:
            if _loaded is None:
                loaded = _load(forced())
                fake.register()
                logger.log(logging.WARNING if loaded.degraded else logging.INFO, loaded.describe())
                _loaded = loaded
    return _loaded


def forced() -> str | None:
    """Value of ``VLLM_DFLASH_OPS``."""
    value = os.environ.get(ENV_OPS)
    if value and value not in FORCED:
        raise ValueError(
            f"{ENV_OPS} is {value!r}; allowed are {', '.join(FORCED)}, or unset for the best"
        )
    return value or None


def _load(mode: str | None) -> Loaded:
    has_gpu = torch.version.cuda is not None or torch.version.hip is not None
    if mode == "torch":
        _define()
        _implement(reference, "CPU")
        if has_gpu:
            _implement(reference, "CUDA")
        return Loaded("torch", "torch" if has_gpu else None)
    jit.allowed()  # refuses an unknown value also where nothing needs compiling
    if mode in ("cuda", "triton") and not has_gpu:
        text = f"torch {torch.__version__} has no CUDA: install a CUDA build of it"
        raise _absent(mode, [Reason(mode, "", text)])

    reasons: list[Reason] = []
    cpp = _extension(build.CPP, reasons)
    if cpp is None and mode == "cpp":
        raise _absent(mode, reasons)
    cuda, kernels = None, None
    if has_gpu:
        # Not even loaded where Triton is asked for: its kernels would be in the way.
        cuda = None if mode == "triton" else _extension(build.CUDA, reasons)
        if cuda is None and mode == "cuda":
            raise _absent(mode, reasons)
        if cuda is None:
            kernels = _triton(reasons)
        if kernels is None and mode == "triton":
            raise _absent(mode, reasons)

    # Nothing is registered from Python before all is decided: after an error load() can be tried again.
    if cpp is None:
        _define()
        _implement(reference, "CPU")
    if has_gpu and cuda is None:
        _implement(kernels or reference, "CUDA")
    return Loaded(
        cpu="torch" if cpp is None else "cpp",
        cuda=None if not has_gpu else "cuda" if cuda else "triton" if kernels else "torch",
        cpu_origin=cpp.origin if cpp else None,
        cuda_origin=cuda.origin if cuda else None,
        codes=cuda.codes if cuda else (),
        reasons=tuple(reasons),
    )


def _triton(reasons: list[Reason]) -> ModuleType | None:
    try:
        return importlib.import_module("vllm_dflash.ops.triton_kernels")
    except ImportError as error:
        text = f"no Triton: `pip install triton` brings it\n{type(error).__name__}: {error}"
        reasons.append(Reason("triton", "", text))
        return None


# --- extensions ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Extension:
    origin: str
    codes: tuple[str, ...]


def _extension(name: str, reasons: list[Reason]) -> _Extension | None:
    """Loads an extension, and compiles it if it has to; adds to ``reasons`` what stood in the way."""
    mode = "cpp" if name == build.CPP else "cuda"
    capabilities = [] if name == build.CPP else gpu_capabilities()
    for origin, find in (("AOT", _installed), ("JIT", _compiled)):
        try:
            path, codes = find(name, capabilities)
            torch.ops.load_library(path)
        except build.BuildError as error:
            reasons.append(Reason(mode, origin, str(error)))
        except OSError as error:
            # The dynamic linker's words are in the cause: torch only says which file it was.
            text = f"{name} does not load: {error.__cause__ or error}"
            text += f"\n{type(error).__name__}: {error}"
            reasons.append(Reason(mode, origin, text))
        else:
            return _Extension(origin, codes)
    return None


def _installed(name: str, capabilities: list[tuple[int, int]]) -> tuple[Path, tuple[str, ...]]:
    record = build.Record.read(PACKAGE)
    path = PACKAGE / f"{name}.abi3.so"
    built = record.built.get(name)
    if built is None or not path.is_file():
        why = (record.left_out | record.failed).get(name)
        raise build.BuildError(f"{path.name} is not in this install" + (f": {why}" if why else ""))
    folder = csrc()
    # In a checkout the sources may have changed since.
    if folder is not None and built.digest != build.digest(folder, name):
        raise build.BuildError(
            f"{path.name} was built from other sources than csrc/ holds now; "
            "`pip install -e . --no-build-isolation` rebuilds it"
        )
    if capabilities and not any(build.covers(built.codes, c) for c in capabilities):
        gpus = ", ".join(f"sm_{major}{minor}" for major, minor in capabilities)
        raise build.BuildError(
            f"{path.name} was built for {','.join(built.codes)}, the GPU is {gpus}"
        )
    return path, built.codes


def _compiled(name: str, capabilities: list[tuple[int, int]]) -> tuple[Path, tuple[str, ...]]:
    if name == build.CUDA and torch.version.cuda is None:
        raise build.BuildError(f"torch {torch.__version__} is for ROCm")
    folder = csrc()
    if folder is None:
        raise build.BuildError(f"the sources are missing: {PACKAGE / 'csrc'}")
    return jit.compiled(name, folder, capabilities)


def csrc() -> Path | None:
    """The sources: inside an installed package, beside it in a checkout."""
    for folder in (PACKAGE / "csrc", PACKAGE.parent / "csrc"):
        if (folder / "params.h").is_file():
            return folder
    return None


def _absent(mode: str, reasons: list[Reason]) -> RuntimeError:
    why = "\n".join(f"  {reason}" for reason in reasons if reason.mode == mode)
    return RuntimeError(
        f"{ENV_OPS}={mode}, but that is not available:\n{why}\n"
        f"Unset {ENV_OPS} to use the best there is; docs/user/install.md says how to get more."
    )


# --- ops without extension -----------------------------------------------------------------------


def _define() -> None:
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    _libraries.append(library)
    for op, schema in SCHEMAS.items():
        library.define(op + schema)


def _implement(functions: ModuleType, key: str) -> None:
    library = torch.library.Library(NAMESPACE, "IMPL")
    _libraries.append(library)
    for op in SCHEMAS:
        library.impl(op, getattr(functions, op), key)
