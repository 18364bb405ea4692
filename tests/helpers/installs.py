"""Trees to build from, pip, and processes that load what was built."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
#: What a build reads; the rest of a checkout it does not need.
TREE = (
    "csrc",
    "vllm_dflash",
    "setup.py",
    "pyproject.toml",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
    "CHANGELOG.md",
)
#: Variables that decide what is built or loaded.
DECIDING = (
    "CUDA_HOME",
    "CUDA_PATH",
    "CXX",
    "CXXFLAGS",
    "LDFLAGS",
    "MAX_JOBS",
    "TORCH_CUDA_ARCH_LIST",
    "PYTHONPATH",
)
HAS_NVCC = Path("/usr/local/cuda/bin/nvcc").exists() or bool(
    shutil.which("nvcc") or os.environ.get("CUDA_HOME")
)


def environment(**values: str | Path) -> dict[str, str]:
    """The caller's, without what decides, plus ``values``."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in DECIDING and not name.startswith("VLLM_DFLASH")
    }
    return kept | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"} | {k: str(v) for k, v in values.items()}


def copy_tree(target: Path) -> Path:
    target.mkdir(parents=True)
    for name in TREE:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("*.so", "_build.json", "__pycache__", "*.partial")
            shutil.copytree(ROOT / name, target / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, target)
    return target


def run(*command: str | Path, env: dict[str, str], code: int = 0, cwd: Path | None = None) -> str:
    """Output and errors of a command, whose exit code must be ``code`` (1: any but 0)."""
    done = subprocess.run(
        list(map(str, command)), env=env, cwd=cwd, text=True, timeout=900,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert min(done.returncode, 1) == code, f"exit code {done.returncode}\n{done.stdout}"
    return done.stdout


def pip_wheel(
    tree: Path,
    to: Path,
    *args: str,
    python: Path | str = sys.executable,
    code: int = 0,
    **env: str | Path,
) -> tuple[Path | None, str]:
    """The wheel that ``pip wheel`` makes of a tree, and what pip printed."""
    command = (
        python,
        "-m",
        "pip",
        "wheel",
        "-v",
        "--no-deps",
        "--no-cache-dir",
        "-w",
        to,
        *args,
        tree,
    )
    output = run(*command, env=environment(**env), code=code)
    return next(iter(sorted(to.glob("*.whl"))), None), output


def unpack(wheel: Path, to: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(to)
    return to


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def tool(name: str) -> str:
    """A command of the ``dev`` extra."""
    places = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    found = shutil.which(name, path=places)
    assert found is not None, f"{name} is missing: pip install -e '.[dev]'"
    return found


#: Loads the ops, calls one, prints what is in use. ``{before}`` runs first.
PROBE = """
import json, logging, sys
lines = []
handler = logging.Handler()
handler.emit = lambda record: lines.append(record.getMessage())
logger = logging.getLogger("vllm.vllm_dflash.ops")
logger.addHandler(handler)
logger.setLevel(logging.INFO)
import torch
{before}
from vllm_dflash.ops.load import describe_ops
from vllm_dflash.ops.load import PACKAGE, load
from vllm_dflash.ops.schemas import SCHEMAS
loaded = load()
out = torch.zeros(3, 8)
torch.ops.vllm_dflash.tap_hidden_states(out, torch.ones(2, 4), torch.ones(2, 4), 4)
keys = [k for k in ("CPU", "CUDA", "Meta") if all(
    torch._C._dispatch_has_kernel_for_dispatch_key("vllm_dflash::" + op, k) for op in SCHEMAS)]
print(json.dumps(dict(
    package=str(PACKAGE), line=loaded.describe(), cpu=loaded.cpu, cuda=loaded.cuda, origin=loaded.origin,
    reasons=[[r.mode, r.way, r.text] for r in loaded.reasons], same=load() is loaded, sum=out.sum().item(),
    keys=keys, log=lines, env=describe_ops())))
"""


def start(
    folder: Path, *, before: str = "", python: Path | str = sys.executable, **env: str | Path
) -> subprocess.Popen:
    """A process that loads the ops of the package in ``folder``."""
    return subprocess.Popen(
        [str(python), "-c", PROBE.format(before=before)],
        env=environment(PYTHONPATH=folder, **env), cwd=folder, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(process: subprocess.Popen) -> dict:
    out, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors
    state = json.loads(out.splitlines()[-1])
    assert state["sum"] == 16
    assert state["same"]
    assert state["env"]["ops"] == state["line"]
    return state


def probe(folder: Path, **options: str | Path) -> dict:
    return finish(start(folder, **options))
