"""How the extensions are compiled: tools, flags, commands. One home for ``setup.py`` and run time.

Standard library only and no import of torch or of this package: ``setup.py`` loads this file by its
path, in an isolated build that has neither. What is needed of torch is its files. The extensions use
torch's stable ABI (``TORCH_TARGET``) and Python's (``PY_LIMITED_API``), so what is built here loads
beside any newer torch.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

#: Where the torch to build against is, if it is not the one of this Python.
ENV_TORCH_DIR = "VLLM_DFLASH_TORCH_DIR"
#: auto: without a compiler, install without extension; require: an error; off: never compile.
ENV_BUILD = "VLLM_DFLASH_BUILD"
#: auto: CUDA kernels if this torch has CUDA; 1: in any case; 0: never.
ENV_CUDA = "VLLM_DFLASH_CUDA"

CPP = "_C"
CUDA = "_C_cuda"
#: File that says what was built, from what, and why the rest was not; beside the extensions.
RECORD = "_build.json"

#: Oldest torch at run time, 2.10, as torch's headers want it.
TORCH_TARGET = "0x020a000000000000"
MIN_TORCH = (2, 10)
#: Oldest Python, 3.10.
PY_LIMITED_API = "0x030a0000"
DEFINES = (f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", f"-DPy_LIMITED_API={PY_LIMITED_API}")
MIN_CUDA = (12, 0)
#: One nvcc takes up to this much memory.
GIB_PER_JOB = 4


class BuildError(RuntimeError):
    """Why an extension cannot be built. The first line is the reason and the way out, the rest is detail."""


def choice(env: Mapping[str, str], name: str, allowed: Sequence[str]) -> str:
    """Value of an environment variable; the first allowed one where it is unset or empty."""
    value = env.get(name) or allowed[0]
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; allowed are {', '.join(allowed)}")
    return value


# --- what is on this machine ---------------------------------------------------------------------


@dataclass(frozen=True)
class Torch:
    """Files of a torch, which need not be importable."""

    root: Path
    version: str
    #: CUDA version it was built with.
    cuda: str | None

    @property
    def include(self) -> Path:
        return self.root / "include"

    @property
    def lib(self) -> Path:
        return self.root / "lib"


def find_torch(env: Mapping[str, str]) -> Torch:
    """The torch to build against: ``VLLM_DFLASH_TORCH_DIR``, this Python's, or the installed one.

    pip's isolated builds run the target environment's interpreter with a filtered ``sys.path``: torch
    cannot be imported there, but its files lie where they were. uv's isolated builds are a separate
    environment.
    """
    if given := env.get(ENV_TORCH_DIR):
        return read_torch(Path(given))
    # Not find_spec("torch.version"): that would import torch.
    spec = importlib.util.find_spec("torch")
    places = [] if spec is None or spec.origin is None else [Path(spec.origin).parent]
    for packages in (sysconfig.get_path("platlib"), site.getusersitepackages()):
        places.append(Path(packages) / "torch")
    for place in places:
        if (place / "version.py").is_file():
            return read_torch(place)
    raise BuildError(
        "no torch: install it first and build with --no-build-isolation, or set "
        f"{ENV_TORCH_DIR} to its folder\nlooked in {', '.join(map(str, places))}"
    )


def read_torch(root: Path) -> Torch:
    """Version and CUDA version of the torch in a folder, from the text of its ``version.py``."""
    try:
        text = (root / "version.py").read_text()
    except OSError as error:
        raise BuildError(f"no torch in {root}: {error}") from error
    values = dict(
        re.findall(r"^(__version__|cuda)\b[^=\n]*=\s*(?:'([^']*)'|None)", text, flags=re.MULTILINE)
    )
    version = values.get("__version__", "")
    number = re.match(r"(\d+)\.(\d+)", version)
    if number is None:
        raise BuildError(f"{root / 'version.py'} has no version of torch")
    if (int(number[1]), int(number[2])) < MIN_TORCH:
        raise BuildError(
            f"torch {version} is too old: the extensions need {'.'.join(map(str, MIN_TORCH))} or newer"
        )
    torch = Torch(root, version, values.get("cuda") or None)
    if not (torch.include / "torch/csrc/stable/library.h").is_file():
        raise BuildError(
            f"torch {version} in {root} has no C++ headers (include/torch/csrc/stable)"
        )
    return torch


@dataclass(frozen=True)
class Cuda:
    """A CUDA toolkit."""

    home: Path
    version: tuple[int, int]

    @property
    def nvcc(self) -> Path:
        return self.home / "bin" / "nvcc"

    @property
    def version_text(self) -> str:
        return ".".join(map(str, self.version))

    @property
    def lib(self) -> Path:
        for name in ("lib64", "lib", f"targets/{platform.machine()}-linux/lib"):
            if (self.home / name / "libcudart_static.a").is_file():
                return self.home / name
        raise BuildError(f"the CUDA toolkit in {self.home} has no libcudart_static.a")


def find_cuda(env: Mapping[str, str], torch: Torch) -> Cuda:
    """A toolkit of the major version of torch's CUDA (any, if torch has none).

    ``CUDA_HOME`` decides where it is set. ``nvcc`` on the PATH comes last: it may be a wrapper script
    outside its toolkit.
    """
    major = None if torch.cuda is None else int(torch.cuda.partition(".")[0])
    # Seen in the wild: CUDA_HOME=:/usr/local/cuda, from an empty variable in a shell profile.
    given = (env.get("CUDA_HOME") or env.get("CUDA_PATH") or "").strip(":")
    if given:
        homes = [Path(given)]
    else:
        homes = [Path("/usr/local/cuda"), *sorted(torch.root.parent.glob("nvidia/cu*"))]
        if found := shutil.which("nvcc", path=env.get("PATH")):
            homes.append(Path(found).resolve().parents[1])
    wrong: list[str] = []
    for home in homes:
        version = _nvcc_version(home)
        if version is None or not (home / "include" / "cuda_runtime.h").is_file():
            continue
        if version < MIN_CUDA:
            wrong.append(f"CUDA {version[0]}.{version[1]} in {home} is too old")
        elif major is not None and version[0] != major:
            wrong.append(f"CUDA {version[0]}.{version[1]} in {home}, but torch is for {torch.cuda}")
        else:
            return Cuda(home, version)
    wanted = "12 or newer" if major is None else str(major)
    if wrong:
        raise BuildError(f"no fitting nvcc: {'; '.join(wrong)}; set CUDA_HOME to a CUDA {wanted}")
    if given:
        raise BuildError(f"no nvcc: CUDA_HOME is {given!r}, which holds no CUDA toolkit")
    raise BuildError(f"no nvcc: set CUDA_HOME to a CUDA {wanted} or install a CUDA wheel")


def _nvcc_version(home: Path) -> tuple[int, int] | None:
    try:
        done = subprocess.run(
            [home / "bin" / "nvcc", "--version"], capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(r"release (\d+)\.(\d+)", done.stdout)
    return None if found is None else (int(found[1]), int(found[2]))


def find_cxx(env: Mapping[str, str]) -> tuple[str, ...]:
    """The C++ compiler's command: ``CXX`` (it may hold options), else the first one on the PATH."""
    if not sys.platform.startswith("linux"):
        raise BuildError(f"the extensions are built on Linux only, this is {sys.platform}")
    path = env.get("PATH")
    if given := env.get("CXX"):
        words = shlex.split(given)
        if not words or shutil.which(words[0], path=path) is None:
            raise BuildError(f"no C++ compiler: CXX is {given!r}, which is not on the PATH")
        return tuple(words)
    for name in ("g++", "c++", "clang++"):
        if shutil.which(name, path=path):
            return (name,)
    raise BuildError("no C++ compiler: install g++ (10 or newer) or set CXX")


def num_jobs(env: Mapping[str, str]) -> int:
    """``MAX_JOBS``, else as many compilers as there are cores and memory for."""
    if given := env.get("MAX_JOBS"):
        if not given.isdecimal() or int(given) < 1:
            raise ValueError(f"MAX_JOBS is {given!r}; give a whole number of at least 1")
        return int(given)
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    try:
        available = re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        available = None
    if available is not None:
        cores = min(cores, int(available[1]) // (GIB_PER_JOB * 2**20))
    return max(cores, 1)


# --- GPU architectures ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Arch:
    """One entry of ``TORCH_CUDA_ARCH_LIST``: ``9.0``, ``9.0a``, ``10.0f``, ``12.0f+PTX``."""

    number: int
    suffix: str = ""
    ptx: bool = False

    @property
    def codes(self) -> tuple[str, ...]:
        """What ends up in the binary: ``sm_90a``, ``compute_120``."""
        # PTX of a family or a single chip would not run on anything newer, and that is what PTX is for.
        ptx = (f"compute_{self.number}",) if self.ptx else ()
        return (f"sm_{self.number}{self.suffix}", *ptx)


def parse_archs(text: str) -> tuple[Arch, ...]:
    """Entries separated by semicolons, commas or blanks."""
    archs = []
    for entry in re.split(r"[;,\s]+", text.strip(";, \t\n")):
        found = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if found is None:
            raise ValueError(
                f"TORCH_CUDA_ARCH_LIST is {text!r}: {entry!r} is not an architecture such as 9.0, "
                "9.0a or 12.0+PTX"
            )
        archs.append(Arch(int(found[1] + found[2]), found[3], bool(found[4])))
    return tuple(dict.fromkeys(archs))


def default_archs(cuda: Cuda) -> tuple[Arch, ...]:
    """Ampere and newer, as far as the toolkit knows them."""
    if cuda.version >= (12, 9):
        return parse_archs("8.0 9.0 10.0f 12.0f+PTX")
    if cuda.version >= (12, 8):
        return parse_archs("8.0 9.0 10.0 12.0+PTX")
    return parse_archs("8.0 9.0+PTX")


def covers(codes: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether a binary with these codes runs on a GPU of this compute capability."""
    device = capability[0] * 10 + capability[1]
    for code in codes:
        kind, number, suffix = re.fullmatch(r"(sm|compute)_(\d+)([af]?)", code).groups()  # type: ignore[union-attr]
        arch = int(number)
        if suffix == "a":
            fits = arch == device
        elif kind == "compute" and not suffix:
            fits = arch <= device
        else:
            fits = arch // 10 == device // 10 and arch <= device
        if fits:
            return True
    return False


# --- sources and commands ------------------------------------------------------------------------


def sources(csrc: Path, name: str) -> tuple[Path, ...]:
    """Source files of an extension, relative to the folder that holds ``csrc``."""
    found = (
        [*csrc.glob("*.cpp"), *csrc.glob("cpu/*.cpp")]
        if name == CPP
        else [*csrc.glob("cuda/*.cu"), *csrc.glob("cuda/*.cpp")]
    )
    if not found:
        raise BuildError(f"{csrc} has no sources of {name}")
    return tuple(sorted(path.relative_to(csrc.parent) for path in found))


def digest(csrc: Path, name: str) -> str:
    """Hash of everything an extension is compiled from."""
    folder = "cpu" if name == CPP else "cuda"
    found = {csrc.parent / path for path in sources(csrc, name)}
    for pattern in ("*.h", "*.cuh"):
        found |= {*csrc.glob(pattern), *csrc.glob(f"{folder}/{pattern}")}
    total = hashlib.sha256()
    for path in sorted(found):
        data = path.read_bytes()
        total.update(f"{path.relative_to(csrc).as_posix()} {len(data)}\n".encode() + data)
    return total.hexdigest()


@dataclass(frozen=True)
class Recipe:
    """How one extension is compiled: every command, without where its outputs go."""

    name: str
    csrc: Path
    torch: Torch
    sources: tuple[Path, ...]
    compiler: tuple[str, ...]
    #: One line that tells two versions of the compiler apart.
    compiler_version: str
    flags: tuple[str, ...]
    #: Include folders; apart from the flags because their place does not change what is built.
    includes: tuple[str, ...]
    linker: tuple[str, ...]
    libraries: tuple[str, ...]
    #: ``sm_90``, ``compute_120``...; none for C++.
    codes: tuple[str, ...] = ()

    @property
    def filename(self) -> str:
        return f"{self.name}.abi3.so"

    def key(self) -> str:
        """Hash of all that decides what comes out."""
        parts = (
            digest(self.csrc, self.name),
            self.torch.version,
            self.compiler_version,
            *self.compiler[1:],
            *self.flags,
            *self.codes,
            platform.machine(),
        )
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]

    def compile_command(self, source: Path, output: Path) -> list[str]:
        return [*self.compiler, *self.flags, *self.includes, "-c", str(source), "-o", str(output)]

    def link_command(self, objects: Sequence[Path], output: Path) -> list[str]:
        # The libraries come after the objects that need them: ld reads from left to right.
        return [*self.linker, *map(str, objects), "-o", str(output), *self.libraries]


def cpp_recipe(csrc: Path, torch: Torch, env: Mapping[str, str]) -> Recipe:
    """Schemas and CPU kernels."""
    cxx = find_cxx(env)
    flags = ("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", *DEFINES)
    return Recipe(
        name=CPP,
        csrc=csrc,
        torch=torch,
        sources=sources(csrc, CPP),
        compiler=cxx,
        compiler_version=_version_line(cxx),
        flags=(*flags, *shlex.split(env.get("CXXFLAGS", ""))),
        includes=(*_includes(torch), _short_names(torch)),
        linker=(*cxx, "-shared", *shlex.split(env.get("LDFLAGS", ""))),
        libraries=(f"-L{torch.lib}", "-ltorch_cpu", "-lc10"),
    )


def cuda_recipe(
    csrc: Path, torch: Torch, env: Mapping[str, str], archs: Sequence[Arch] | None = None
) -> Recipe:
    """CUDA kernels. ``archs`` None: ``TORCH_CUDA_ARCH_LIST``, else all that the toolkit knows."""
    cxx = find_cxx(env)
    cuda = find_cuda(env, torch)
    if archs is None:
        listed = env.get("TORCH_CUDA_ARCH_LIST", "").strip()
        archs = parse_archs(listed) if listed else default_archs(cuda)
    codes = tuple(dict.fromkeys(code for arch in archs for code in arch.codes))
    gencodes = (f"-gencode=arch=compute_{code.partition('_')[2]},code={code}" for code in codes)
    # USE_CUDA: without it torch's stable headers hide the CUDA half of their functions.
    flags = ("-std=c++20", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "-DUSE_CUDA", *DEFINES)
    host = () if len(cxx) > 1 or env.get("NVCC_CCBIN") else (f"-ccbin={cxx[0]}",)
    return Recipe(
        name=CUDA,
        csrc=csrc,
        torch=torch,
        sources=sources(csrc, CUDA),
        compiler=(str(cuda.nvcc),),
        compiler_version=f"nvcc {cuda.version_text}, {_version_line(cxx)}",
        flags=(*flags, *host, *gencodes),
        includes=(
            *_includes(torch),
            "-isystem",
            str(cuda.home / "include"),
            f"-Xcompiler={_short_names(torch)}",
        ),
        linker=(*cxx, "-shared", *shlex.split(env.get("LDFLAGS", ""))),
        libraries=(
            f"-L{torch.lib}",
            # torch's CUDA half is reached through libtorch.so, which ld would drop by --as-needed.
            "-Wl,--push-state,--no-as-needed",
            "-ltorch",
            "-Wl,--pop-state",
            "-ltorch_cpu",
            "-lc10",
            # Static, so that one build serves every minor version, and hidden, so that it stays
            # apart from torch's.
            f"-L{cuda.lib}",
            "-Wl,--exclude-libs,libcudart_static.a",
            "-lcudart_static",
            "-ldl",
            "-lrt",
            "-lpthread",
        ),
        codes=codes,
    )


def _includes(torch: Torch) -> tuple[str, ...]:
    # csrc is relative, and commands run in its parent, for the same reason as _short_names.
    return ("-Icsrc", "-isystem", str(torch.include), "-isystem", sysconfig.get_path("include"))


def _short_names(torch: Torch) -> str:
    """No path of the machine that built a wheel in the error messages of that wheel."""
    return f"-ffile-prefix-map={torch.include}=torch"


def _version_line(cxx: Sequence[str]) -> str:
    try:
        done = subprocess.run([*cxx, "--version"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"the C++ compiler {shlex.join(cxx)} does not run: {error}") from error
    return next(iter(done.stdout.splitlines()), "")


# --- running them --------------------------------------------------------------------------------


def run(
    recipe: Recipe, output: Path, temp: Path, *, jobs: int, timeout: float | None = None
) -> None:
    """Compiles and links; ``output`` appears when it is whole.

    Raises:
        BuildError: with the failed command and the end of what it printed.
    """
    temp.mkdir(parents=True, exist_ok=True)
    cwd = recipe.csrc.parent
    # Two files of one name in different folders must not share an object.
    objects = [temp.resolve() / f"{'_'.join(source.parts)}.o" for source in recipe.sources]
    commands = [
        recipe.compile_command(source, target)
        for source, target in zip(recipe.sources, objects, strict=True)
    ]
    with ThreadPoolExecutor(max(1, min(jobs, len(commands)))) as pool:
        futures = [pool.submit(_run_command, command, cwd, timeout) for command in commands]
        try:
            for future in futures:
                future.result()
        except BaseException:
            for future in futures:
                future.cancel()
            raise
    linked = temp.resolve() / recipe.filename
    _run_command(recipe.link_command(objects, linked), cwd, timeout)
    output.parent.mkdir(parents=True, exist_ok=True)
    # Another file system is possible, a half-written extension under the final name is not.
    partial = output.with_name(output.name + ".partial")
    shutil.copyfile(linked, partial)
    partial.chmod(0o755)
    partial.replace(output)


def _run_command(command: Sequence[str], cwd: Path, timeout: float | None) -> None:
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            timeout=timeout,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
    except subprocess.TimeoutExpired as error:
        raise BuildError(
            f"{command[0]} did not end within {timeout:.0f} s\n{shlex.join(command)}"
        ) from error
    except OSError as error:
        raise BuildError(f"{command[0]} does not run: {error}") from error
    if done.returncode == 0:
        return
    errors = (x for x in done.stdout.splitlines() if re.search(r"\b(error|fatal)\b", x, re.I))
    reason = next(errors, f"exit code {done.returncode}").strip()
    if done.returncode in (-9, 137):
        reason += " (killed; with too little memory set MAX_JOBS=1)"
    tail = "\n".join(done.stdout.splitlines()[-60:])
    raise BuildError(f"compiling failed: {reason}\n{shlex.join(command)}\n{tail}")


# --- what was built ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Built:
    """One extension in a :class:`Record`."""

    digest: str
    codes: tuple[str, ...]
    torch: str
    compiler: str


@dataclass(frozen=True)
class Record:
    """What an install compiled, and why the rest is not there."""

    built: dict[str, Built]
    #: Not wanted, or of no use with the torch of the install.
    left_out: dict[str, str]
    #: Wanted, but it could not be built.
    failed: dict[str, str]

    def write(self, package: Path) -> None:
        package.mkdir(parents=True, exist_ok=True)
        (package / RECORD).write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, package: Path) -> Record:
        """Of an installed package; empty where nothing was written."""
        try:
            values = json.loads((package / RECORD).read_text())
        except FileNotFoundError:
            return cls({}, {}, {})
        built = values.pop("built").items()
        return cls(
            {name: Built(**{**b, "codes": tuple(b["codes"])}) for name, b in built}, **values
        )


def install(csrc: Path, package: Path, temp: Path, env: Mapping[str, str]) -> Record:
    """Builds into a package folder what ``VLLM_DFLASH_BUILD`` and ``VLLM_DFLASH_CUDA`` ask for.

    Raises:
        BuildError: something that was required cannot be built.
    """
    build = choice(env, ENV_BUILD, ("auto", "require", "off"))
    cuda = choice(env, ENV_CUDA, ("auto", "1", "0"))
    required = {CPP: build == "require", CUDA: build == "require" or cuda == "1"}
    record = Record({}, {}, {})
    for name, must in required.items():
        # A build folder is reused between installs: nothing of an earlier one may get into this.
        (package / f"{name}.abi3.so").unlink(missing_ok=True)
        if build == "off":
            record.left_out[name] = f"{ENV_BUILD}=off"
            continue
        if name == CUDA and cuda == "0":
            record.left_out[name] = f"{ENV_CUDA}=0"
            continue
        try:
            torch = find_torch(env)
            if name == CUDA and cuda == "auto" and torch.cuda is None:
                record.left_out[name] = f"torch {torch.version} has no CUDA"
                continue
            recipe = (cpp_recipe if name == CPP else cuda_recipe)(csrc, torch, env)
            run(recipe, package / recipe.filename, temp / name, jobs=num_jobs(env))
        except BuildError as error:
            if must:
                raise
            record.failed[name] = str(error)
        else:
            built = Built(digest(csrc, name), recipe.codes, torch.version, recipe.compiler_version)
            record.built[name] = built
    record.write(package)
    return record
