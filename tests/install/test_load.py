"""Which implementation is taken, what is said about it, and that forcing an absent one raises."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch

from helpers import installs

NO_GPU_TORCH = torch.version.cuda is None and torch.version.hip is None
#: A torch with CUDA as far as the loader can tell; its CUDA kernels cannot be loaded.
CUDA_TORCH = "torch.version.cuda = '13.0'"
NO_TRITON = "sys.modules['triton'] = None"


def test_no_extension_and_nothing_compiled(pure_installed):
    state = installs.probe(pure_installed, VLLM_DFLASH_JIT="0")
    assert (state["cpu"], state["origin"]) == ("torch", None)
    assert state["line"] == (
        "vllm-dflash ops: torch (_C.abi3.so is not in this install: no C++ compiler: "
        "install g++ (10 or newer) or set CXX; VLLM_DFLASH_JIT=0)"
    )
    assert state["log"] == [state["line"]]
    assert state["keys"][0] == "CPU"
    assert state["keys"][-1] == "Meta"


def test_no_extension_and_no_compiler(pure_installed, tmp_path, no_compiler):
    state = installs.probe(pure_installed, VLLM_DFLASH_CACHE=tmp_path, PATH=no_compiler)
    assert state["line"] == (
        "vllm-dflash ops: torch (no C++ compiler: install g++ (10 or newer) or set CXX)"
    )


def test_compiled_on_first_use_by_one_of_many_processes(pure_installed, tmp_path):
    env = {"VLLM_DFLASH_CACHE": tmp_path, "CXXFLAGS": "-O0"}
    states = [installs.finish(p) for p in [installs.start(pure_installed, **env) for _ in range(3)]]
    assert {state["line"] for state in states} == {"vllm-dflash ops: cpp (JIT)"}
    said = [line for state in states for line in state["log"]]
    assert sum("compiling _C into" in line for line in said) == 1
    (folder,) = tmp_path.iterdir()
    assert sorted(p.name for p in folder.iterdir()) == ["_C.abi3.so", "lock"]
    assert folder.stat().st_mode & 0o077 == 0
    # From now on no compiler is needed but to name the entry in the cache.
    state = installs.probe(pure_installed, VLLM_DFLASH_OPS="cpp", **env)
    assert state["log"] == ["vllm-dflash ops: cpp (JIT)"]


def test_failing_compiler(pure_installed, tmp_path):
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\necho 'x.cpp:1: error: no luck'\n[ \"$1\" = --version ]\n")
    compiler.chmod(0o755)
    state = installs.probe(pure_installed, VLLM_DFLASH_CACHE=tmp_path / "cache", CXX=compiler)
    assert state["line"] == "vllm-dflash ops: torch (compiling failed: x.cpp:1: error: no luck)"
    assert "-std=c++20" in state["env"]["no cpp JIT"], "the command is kept"


def test_cache_that_cannot_be_written(pure_installed, tmp_path):
    (tmp_path / "file").write_text("in the way")
    state = installs.probe(pure_installed, VLLM_DFLASH_CACHE=tmp_path / "file")
    assert "cannot write to" in state["line"]
    assert "set VLLM_DFLASH_CACHE" in state["line"]


def test_forced_torch_does_not_load_the_extension(installed):
    before = "torch.ops.load_library = None"
    state = installs.probe(installed, VLLM_DFLASH_OPS="torch", before=before)
    assert state["line"] == "vllm-dflash ops: torch (VLLM_DFLASH_OPS=torch)"
    assert state["cpu"] == "torch"


def test_library_that_does_not_load(installed, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(installed, folder)
    (folder / "vllm_dflash/_C.abi3.so").write_text("not a library")
    state = installs.probe(folder, VLLM_DFLASH_JIT="0")
    assert "_C does not load: " in state["line"]
    assert "invalid ELF header" in state["line"] or "file too short" in state["line"]


REFUSALS = """
import os, sys, json
import torch
from vllm_dflash.ops.load import load
said = {}
for name, value in json.loads(sys.argv[1]):
    os.environ[name] = value
    try:
        said[f"{name}={value}"] = f"loaded {load()}"
    except Exception as error:
        said[f"{name}={value}"] = f"{type(error).__name__}: {error}"
    del os.environ[name]
# None of these stands in the way of a later call.
said["then"] = load().describe()
print(json.dumps(said))
"""


@pytest.mark.skipif(not NO_GPU_TORCH, reason="torch has CUDA")
def test_forced_ones_that_are_absent_raise(installed):
    asked = [
        ("VLLM_DFLASH_OPS", "cuda"),
        ("VLLM_DFLASH_OPS", "triton"),
        ("VLLM_DFLASH_OPS", "fastest"),
        ("VLLM_DFLASH_JIT", "maybe"),
    ]
    out = installs.run(
        sys.executable, "-c", REFUSALS, json.dumps(asked), cwd=installed,
        env=installs.environment(PYTHONPATH=installed),
    )  # fmt: skip
    said = json.loads(out.splitlines()[-1])
    for value in ("cuda", "triton"):
        text = said[f"VLLM_DFLASH_OPS={value}"]
        assert text.startswith(f"RuntimeError: VLLM_DFLASH_OPS={value}, but that is not available")
        assert f"torch {torch.__version__} has no CUDA" in text
        assert "Unset VLLM_DFLASH_OPS" in text
    assert said["VLLM_DFLASH_OPS=fastest"].startswith(
        "ValueError: VLLM_DFLASH_OPS is 'fastest'; allowed are cuda, cpp, triton, torch"
    )
    assert said["VLLM_DFLASH_JIT=maybe"].startswith("ValueError: VLLM_DFLASH_JIT is 'maybe'")
    assert said["then"] == "vllm-dflash ops: cpp (AOT)"


def test_forced_cpp_that_is_absent_raises(pure_installed):
    process = installs.start(pure_installed, VLLM_DFLASH_OPS="cpp", VLLM_DFLASH_JIT="0")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "RuntimeError: VLLM_DFLASH_OPS=cpp, but that is not available" in errors
    assert "AOT: _C.abi3.so is not in this install: no C++ compiler" in errors
    assert "JIT: VLLM_DFLASH_JIT=0" in errors


@pytest.mark.skipif(not NO_GPU_TORCH, reason="torch has CUDA")
def test_triton_where_there_are_no_cuda_kernels(installed):
    pytest.importorskip("triton")
    state = installs.probe(
        installed, before=CUDA_TORCH, CUDA_HOME="/no/cuda", TORCH_CUDA_ARCH_LIST="9.0"
    )
    assert (state["cpu"], state["cuda"], state["origin"]) == ("cpp", "triton", None)
    assert state["line"] == (
        "vllm-dflash ops: triton (no nvcc: CUDA_HOME is '/no/cuda', which holds no CUDA toolkit)"
    )
    assert state["keys"] == ["CPU", "CUDA", "Meta"]
    assert [reason[:2] for reason in state["reasons"]] == [["cuda", "AOT"], ["cuda", "JIT"]]


@pytest.mark.skipif(not NO_GPU_TORCH, reason="torch has CUDA")
def test_torch_where_there_is_no_triton_either(installed):
    before = f"{CUDA_TORCH}; {NO_TRITON}"
    state = installs.probe(
        installed, before=before, CUDA_HOME="/no/cuda", TORCH_CUDA_ARCH_LIST="9.0"
    )
    assert (state["cpu"], state["cuda"]) == ("cpp", "torch")
    assert "no nvcc" in state["line"]
    assert "no Triton" in state["line"]
    assert state["keys"] == ["CPU", "CUDA", "Meta"]


OPCHECK = """
import torch
from vllm_dflash.ops.load import load
assert load().cpu == "torch", load()
args = (torch.zeros(3, 8), torch.ones(2, 4), torch.ones(2, 4), 4)
torch.library.opcheck(torch.ops.vllm_dflash.tap_hidden_states.default, args)
"""


def test_ops_registered_from_python_are_proper_ops(installed):
    env = installs.environment(PYTHONPATH=installed, VLLM_DFLASH_OPS="torch")
    installs.run(sys.executable, "-c", OPCHECK, env=env, cwd=installed)


def test_one_load_for_all_threads(installed):
    before = (
        "from concurrent.futures import ThreadPoolExecutor as P\n"
        "from vllm_dflash.ops.load import load\n"
        "with P(8) as p: found = list(p.map(lambda _: load(), range(8)))\n"
        "assert len(set(map(id, found))) == 1"
    )
    assert installs.probe(installed, before=before)["log"] == ["vllm-dflash ops: cpp (AOT)"]
