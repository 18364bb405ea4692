"""Builds what a release consists of and checks it: an sdist, a wheel for CPUs, one with CUDA kernels.

    make wheels                     # or: python tools/wheels.py [--cuda | --no-cuda] [--serve] [-o dist]

The sdist comes first, and the wheels are built from it. ``dist/`` gets the sdist, ``dist/cpu`` the wheel with
the C++ extension. Where there is an nvcc, ``dist/cu<major>`` gets the one with CUDA kernels, too; it takes
neither a GPU nor a torch with CUDA. Both wheels have the same name, for different indices. Each is checked:

* ``auditwheel`` gives it the oldest manylinux tag that it fits; torch's libraries are not bundled.
* ``torch-abi-audit`` and ``abi3audit``: only the stable ABIs of torch and Python.
* ``twine check --strict``: metadata and README.
* In a fresh virtual environment, which sees this one's torch and vLLM but has the plugin from the wheel
  alone, the compiled ops load and run, and the entry point is found.
* With ``--serve`` vLLM's server starts there with a tiny drafter and answers.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import urllib.request
import venv
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from helpers import installs  # noqa: E402
from vllm_dflash.ops import build  # noqa: E402

#: Libraries that come with torch, not with the wheel.
TORCH_LIBRARIES = ("libtorch*.so*", "libc10*.so*")
CPP, CUDA = "vllm_dflash/_C.abi3.so", "vllm_dflash/_C_cuda.abi3.so"
ENTRY_POINT = """
from importlib.metadata import entry_points, version
import vllm_dflash
(point,) = entry_points(group="vllm.general_plugins", name="dflash")
point.load()
print(vllm_dflash.__version__, version("vllm-dflash"), vllm_dflash.__file__)
"""


def say(text: str) -> None:
    print(text, flush=True)


def run(*command: str | Path) -> str:
    return installs.run(*command, env=installs.environment())


def build_sdist(out: Path) -> Path:
    """The sdist; it must hold every tracked file that a build reads."""
    run(installs.tool("pyproject-build"), "--sdist", "-o", out, ROOT)
    (sdist,) = out.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    listed = subprocess.run(
        ["git", "ls-files", *installs.TREE], cwd=ROOT, check=True, capture_output=True, text=True
    )
    if missing := sorted(set(listed.stdout.splitlines()) - held):
        raise RuntimeError(f"{sdist.name} lacks {', '.join(missing)}")
    return sdist


def build_wheel(sdist: Path, out: Path, scratch: Path, cuda: bool) -> Path:
    """A wheel of the sdist with its manylinux tag, in ``out``."""
    raw = scratch / f"raw-{out.name}"
    env = {"VLLM_DFLASH_BUILD": "require", "VLLM_DFLASH_CUDA": str(int(cuda))}
    kept = {n: os.environ[n] for n in ("CUDA_HOME", "TORCH_CUDA_ARCH_LIST") if n in os.environ}
    wheel, _ = installs.pip_wheel(sdist, raw, "--no-build-isolation", **env, **kept)
    assert wheel is not None
    excluded = [arg for library in TORCH_LIBRARIES for arg in ("--exclude", library)]
    run(installs.tool("auditwheel"), "repair", *excluded, "-w", out, wheel)
    (repaired,) = out.glob("*.whl")
    return repaired


def check_files(wheel: Path, cuda: bool) -> None:
    if "-cp310-abi3-manylinux" not in wheel.name:
        raise RuntimeError(f"{wheel.name} is not for Python 3.10 and newer on any Linux")
    names = installs.names(wheel)
    wanted = {CPP, "vllm_dflash/py.typed", "vllm_dflash/csrc/bindings.cpp"} | (
        {CUDA} if cuda else set()
    )
    if missing := wanted - names:
        raise RuntimeError(f"{wheel.name} lacks {', '.join(sorted(missing))}")
    if not cuda and CUDA in names:
        raise RuntimeError(f"{wheel.name} is for CPUs and holds {CUDA}")
    if bundled := [name for name in names if ".libs/" in name]:
        raise RuntimeError(f"{wheel.name} bundles {', '.join(bundled)}")


def check_abi(wheel: Path, scratch: Path) -> None:
    folder = installs.unpack(wheel, scratch / f"unpacked-{wheel.parent.name}")
    for library in sorted(folder.glob("vllm_dflash/*.so")):
        say(run(installs.tool("torch-abi-audit"), "--check", "both", library).strip())
        run(installs.tool("abi3audit"), "--strict", library)


def fresh_environment(wheel: Path, folder: Path) -> Path:
    """Python of a new environment with the wheel; everything else is this environment's."""
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    purelib = Path(
        run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    )
    # A path in a .pth file comes after the environment's own packages, and .pth files that lie there
    # (an editable install of the plugin) are not read.
    (purelib / "parent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", wheel)
    return python


def check_fresh_install(python: Path, scratch: Path) -> None:
    # Not in the checkout, whose package would come first.
    output = installs.run(python, "-c", ENTRY_POINT, env=installs.environment(), cwd=scratch)
    mine, theirs, file = output.split()[-3:]
    if mine != theirs or not Path(file).is_relative_to(python.parents[1]):
        raise RuntimeError(f"imported {file} of version {mine}, installed was {theirs}")
    # The wheel's own extension or an error: no compiler on the path and nothing cached.
    empty = scratch / "empty"
    empty.mkdir(exist_ok=True)
    state = installs.probe(empty, python=python, VLLM_DFLASH_OPS="cpp", VLLM_DFLASH_JIT="0")
    say(f"  {state['line']}, an op ran")
    if state["origin"] != "AOT":
        raise RuntimeError(f"the wheel's extension is not what runs: {state}")


def check_server(python: Path, scratch: Path) -> None:
    """A server in the fresh environment answers one request with drafts."""
    from helpers import api_server, tiny

    os.environ.pop("PYTHONPATH", None)  # the server is to see the wheel's package
    models = scratch / "models"
    verifier = tiny.make_verifier(models / "verifier")
    drafter = tiny.make_drafter(models / "drafter", verifier)
    speculative = {"method": "dflash", "model": str(drafter), "dflash_draft_length": "fixed"}
    with api_server.serving(
        verifier, scratch / "server", speculative=speculative, python=python
    ) as server:
        body = json.dumps({"model": "model", "prompt": "the cat", "max_tokens": 16}).encode()
        request = urllib.request.Request(
            f"{server.url}/v1/completions", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            tokens = json.load(answer)["usage"]["completion_tokens"]
        drafts = server.counters()["vllm:spec_decode_num_drafts_total"]
    say(f"  a server answered with {tokens} tokens in {drafts:.0f} drafts")
    if not drafts:
        raise RuntimeError("the server drafted nothing")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cuda = parser.add_mutually_exclusive_group()
    cuda.add_argument("--cuda", action="store_true", help="fail without nvcc")
    cuda.add_argument("--no-cuda", action="store_true", help="the wheel for CPUs only")
    parser.add_argument("--serve", action="store_true", help="start a server, too")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "dist", help="replaced")
    args = parser.parse_args(arguments)
    out: Path = args.output.resolve()
    kinds = {"cpu": False}
    try:
        toolkit = build.find_cuda(os.environ, build.find_torch(os.environ))
        if not args.no_cuda:
            kinds[f"cu{toolkit.version[0]}"] = True
    except build.BuildError as error:
        if args.cuda:
            parser.error(str(error))
        say(f"no CUDA wheel: {error}")
    if out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        sdist = build_sdist(out)
        say(f"{sdist.relative_to(out)}: {sdist.stat().st_size / 1024:.0f} KiB")
        for folder, with_cuda in kinds.items():
            wheel = build_wheel(sdist, out / folder, scratch, with_cuda)
            say(f"{wheel.relative_to(out)}: {wheel.stat().st_size / 1024:.0f} KiB")
            check_files(wheel, with_cuda)
            check_abi(wheel, scratch)
            python = fresh_environment(wheel, scratch / f"venv-{folder}")
            check_fresh_install(python, scratch)
            if args.serve and not with_cuda:
                check_server(python, scratch)
        built = [sdist, *sorted(out.glob("*/*.whl"))]
        say(run(installs.tool("twine"), "check", "--strict", *built).strip())
    say(f"version {version('vllm-dflash')} in this environment; all checks passed")


if __name__ == "__main__":
    main()
