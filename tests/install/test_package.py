"""What pip makes of the sources, with and without compiler, torch, isolation."""

from __future__ import annotations

import email
import json
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import torch

from helpers import installs
from helpers.installs import ROOT

CPP, CUDA = "vllm_dflash/_C.abi3.so", "vllm_dflash/_C_cuda.abi3.so"


def csrc_files() -> set[str]:
    return {f"vllm_dflash/{p.relative_to(ROOT)}" for p in (ROOT / "csrc").rglob("*") if p.is_file()}


def undefined_symbols(library: Path) -> list[str]:
    command = [installs.tool("nm"), "-DC", "--undefined-only", str(library)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def needed(library: Path) -> set[str]:
    command = [installs.tool("readelf"), "-d", str(library)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return {line.partition("[")[2].rstrip("]") for line in lines if "(NEEDED)" in line}


def check_abi(library: Path) -> None:
    """Only torch's stable ABI and Python's, whatever else the compiler would have taken."""
    assert not [s for s in undefined_symbols(library) if "at::" in s or "c10::" in s]
    env = installs.environment()
    audit = installs.run(installs.tool("torch-abi-audit"), "--check", "both", library, env=env)
    assert "Min torch:   2.10.0" in audit, audit
    report = installs.run(installs.tool("abi3audit"), "--strict", "-v", library, env=env)
    assert "0 ABI version mismatches and 0 ABI violations" in " ".join(report.split()), report


def test_wheel(wheel):
    assert "-cp310-abi3-linux" in wheel.name
    files = installs.names(wheel)
    assert csrc_files() | {CPP, "vllm_dflash/_build.json"} <= files
    assert (CUDA in files) == (torch.version.cuda is not None)
    with zipfile.ZipFile(wheel) as archive:
        info = next(name for name in files if name.endswith(".dist-info/WHEEL"))
        tags = email.message_from_bytes(archive.read(info))
        assert tags["Root-Is-Purelib"] == "false"
        assert str(Path.home()).encode() + b"/" not in archive.read(CPP), (
            "a path of the build machine"
        )


def test_wheel_works_anywhere(installed):
    check_abi(installed / CPP)
    assert needed(installed / CPP) <= {
        "libtorch_cpu.so", "libc10.so", "libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6",
        "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1",
    }  # fmt: skip


def test_installed_wheel_is_loaded_as_it_is(installed, tmp_path):
    state = installs.probe(installed, VLLM_DFLASH_CACHE=tmp_path, CXX="/bin/false")
    assert (state["cpu"], state["origin"]) == ("cpp", "AOT")
    assert state["line"] == "vllm-dflash ops: cpp (AOT)"
    assert state["log"] == [state["line"]]
    assert Path(state["package"]).is_relative_to(installed)
    assert list(tmp_path.iterdir()) == []


def test_no_compiler(pure):
    wheel, output = pure
    assert wheel.name.endswith("-py3-none-any.whl")
    assert csrc_files() <= installs.names(wheel)
    assert not {CPP, CUDA} & installs.names(wheel)
    assert output.count("WITHOUT _C: no C++ compiler: install g++") == 1
    assert "VLLM_DFLASH_BUILD=require makes it an error" in output


@pytest.mark.parametrize(
    ("env", "parts"),
    [
        ({"CXX": "/bin/false"}, ("WITHOUT _C", "compiling failed: exit code 1")),
        ({"CXX": "no-such-compiler"}, ("WITHOUT _C", "CXX is 'no-such-compiler'")),
        ({"VLLM_DFLASH_BUILD": "off"}, ("left out _C: VLLM_DFLASH_BUILD=off",)),
    ],
    ids=["compiler fails", "compiler absent", "off"],
)
def test_pure_wheel_says_why(tree, tmp_path, env, parts):
    # As if an earlier build had left its outputs in the tree.
    stale = tree / "build" / f"lib.linux-x86_64-cpython-3{sys.version_info.minor}" / "vllm_dflash"
    stale.mkdir(parents=True)
    (stale / "_C_cuda.abi3.so").write_text("of an earlier build")
    wheel, output = installs.pip_wheel(tree, tmp_path, "--no-build-isolation", **env)
    assert wheel is not None
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not {CPP, CUDA} & installs.names(wheel)
    for part in parts:
        assert part in output
    with zipfile.ZipFile(wheel) as archive:
        assert parts[-1].rpartition(": ")[2] in archive.read("vllm_dflash/_build.json").decode()


@pytest.mark.parametrize(
    ("env", "parts"),
    [
        (
            {"VLLM_DFLASH_BUILD": "require", "CXX": "no-such"},
            ("no C++ compiler", "VLLM_DFLASH_BUILD=auto"),
        ),
        ({"VLLM_DFLASH_BUILD": "require", "VLLM_DFLASH_TORCH_DIR": "/no"}, ("no torch in /no",)),
        ({"VLLM_DFLASH_BUILD": "yes"}, ("VLLM_DFLASH_BUILD is 'yes'", "auto, require, off")),
        ({"VLLM_DFLASH_CUDA": "on"}, ("VLLM_DFLASH_CUDA is 'on'", "auto, 1, 0")),
    ],
    ids=["no compiler", "no torch", "unknown build", "unknown cuda"],
)
def test_refused(tree, tmp_path, env, parts):
    wheel, output = installs.pip_wheel(tree, tmp_path, "--no-build-isolation", code=1, **env)
    assert wheel is None
    for part in parts:
        assert part in output


@pytest.mark.slow
def test_cuda_is_asked_for_without_toolkit(tree, tmp_path):
    # CXX is fine: C++ comes first and takes its seconds.
    env = {"VLLM_DFLASH_CUDA": "1", "CUDA_HOME": str(tmp_path)}
    wheel, output = installs.pip_wheel(tree, tmp_path, "--no-build-isolation", code=1, **env)
    assert wheel is None
    assert f"no nvcc: CUDA_HOME is '{tmp_path}'" in output


@pytest.mark.slow
@pytest.mark.skipif(not installs.HAS_NVCC, reason="needs nvcc, no GPU")
def test_cuda_wheel_from_any_torch(tree, tmp_path):
    """Compiled and linked against whatever torch is here, a CPU one too."""
    env = {
        "VLLM_DFLASH_CUDA": "1",
        "VLLM_DFLASH_BUILD": "require",
        "TORCH_CUDA_ARCH_LIST": "9.0;12.0+PTX",
    }
    wheel, _ = installs.pip_wheel(tree, tmp_path, "--no-build-isolation", **env)
    assert wheel is not None
    folder = installs.unpack(wheel, tmp_path / "installed")
    built = json.loads((folder / "vllm_dflash/_build.json").read_text())["built"]
    assert built["_C_cuda"]["codes"] == ["sm_90", "sm_120", "compute_120"]
    check_abi(folder / CUDA)
    assert "libtorch.so" in needed(folder / CUDA), "torch's CUDA half is reached through it"
    assert not [lib for lib in needed(folder / CUDA) if "cuda" in lib]


@pytest.mark.slow
def test_isolated(tree, tmp_path):
    """pip's build environment has no torch, but its interpreter's site-packages has."""
    wheel, output = installs.pip_wheel(tree, tmp_path, VLLM_DFLASH_BUILD="require")
    assert wheel is not None
    assert CPP in installs.names(wheel), output


@pytest.mark.slow
def test_sdist(tree, tmp_path):
    env = installs.environment(VLLM_DFLASH_BUILD="off")
    command = (installs.tool("pyproject-build"), "--sdist", "-o", tmp_path / "sdist", tree)
    installs.run(*command, env=env)
    sdist = next((tmp_path / "sdist").glob("*.tar.gz"))
    wheel, output = installs.pip_wheel(sdist, tmp_path, VLLM_DFLASH_BUILD="require")
    assert wheel is not None
    assert csrc_files() | {CPP} <= installs.names(wheel), output


@pytest.fixture
def other_python(tmp_path) -> Path:
    """An environment that sees this one's packages but installs into its own."""
    folder = tmp_path / "venv"
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    purelib = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(installs.run(python, "-c", purelib, env=installs.environment()).strip())
    (packages / "parent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


@pytest.mark.slow
def test_editable(tree, tmp_path, other_python):
    install = (sys.executable, "-m", "pip", "--python", other_python, "install", "-v", "--no-deps")
    env = installs.environment(VLLM_DFLASH_BUILD="require")
    installs.run(*install, "--no-build-isolation", "-e", tree, env=env)
    assert (tree / CPP).is_file()
    state = installs.probe(tmp_path, python=other_python, VLLM_DFLASH_JIT="0")
    assert (state["line"], state["package"]) == (
        "vllm-dflash ops: cpp (AOT)",
        str(tree / "vllm_dflash"),
    )
    # Whoever edits the sources gets what the sources say, or is told.
    with (tree / "csrc/bindings.cpp").open("a") as file:
        file.write("// changed\n")
    state = installs.probe(tmp_path, python=other_python, VLLM_DFLASH_JIT="0")
    assert "_C.abi3.so was built from other sources than csrc/ holds now" in state["line"]
    state = installs.probe(tmp_path, python=other_python, VLLM_DFLASH_CACHE=tmp_path)
    assert state["line"] == "vllm-dflash ops: cpp (JIT)"
    # And an install without extension leaves none behind.
    env = installs.environment(VLLM_DFLASH_BUILD="off")
    installs.run(*install, "--no-build-isolation", "-e", tree, env=env)
    assert not (tree / CPP).exists()


@pytest.mark.slow
def test_no_torch(tree, tmp_path):
    folder = tmp_path / "venv"
    venv.create(folder, with_pip=True)
    wheel, output = installs.pip_wheel(tree, tmp_path, python=folder / "bin" / "python")
    assert wheel is not None
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "WITHOUT _C: no torch: install it first" in output


@pytest.mark.slow
def test_uv(tree, tmp_path):
    """uv's build environment is a separate one: only without isolation there is a torch in it."""
    env = installs.environment()
    installs.run(
        sys.executable, "-m", "pip", "install", "-q", "--target", tmp_path / "uv", "uv", env=env
    )
    uv = tmp_path / "uv" / "bin" / "uv"
    command = (uv, "pip", "install", "--no-deps", "--no-cache", "--python", sys.executable)
    for args, built in (((), False), (("--no-build-isolation",), True)):
        target = tmp_path / f"built-{built}"
        installs.run(*command, *args, "--target", target, tree, env=env)
        assert (target / CPP).is_file() == built
        assert (target / "vllm_dflash/csrc/bindings.cpp").is_file()
