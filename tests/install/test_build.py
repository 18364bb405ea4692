"""Tools, architectures and commands, without compiling."""

from __future__ import annotations

import ast
import os
import sys
from pathlib import Path

import pytest

from vllm_dflash.ops import build, jit


def make_torch(root: Path, version: str = "2.13.0+cu130", cuda: str | None = "13.0") -> Path:
    header = root / "include/torch/csrc/stable/library.h"
    header.parent.mkdir(parents=True)
    header.touch()
    (root / "version.py").write_text(
        "from typing import Optional\n"
        f"__all__ = ['__version__', 'cuda']\n__version__ = {version!r}\n"
        f"debug = False\ncuda: Optional[str] = {cuda!r}\ngit_version = 'abc'\nhip: Optional[str] = None\n"
    )
    return root


def make_cuda(home: Path, version: str) -> Path:
    for folder in ("bin", "include", "lib"):
        (home / folder).mkdir(parents=True)
    (home / "include/cuda_runtime.h").touch()
    (home / "lib/libcudart_static.a").touch()
    nvcc = home / "bin/nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V{version}.1'\n")
    nvcc.chmod(0o755)
    return home


def test_setup_can_load_it_without_anything_installed():
    tree = ast.parse(Path(build.__file__).read_text())
    found = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    found |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in found} <= sys.stdlib_module_names


def test_torch_is_read_not_imported(tmp_path):
    torch = build.find_torch({build.ENV_TORCH_DIR: str(make_torch(tmp_path / "torch"))})
    assert (torch.version, torch.cuda) == ("2.13.0+cu130", "13.0")
    assert build.read_torch(make_torch(tmp_path / "cpu", "2.10.0+cpu", None)).cuda is None
    # Without the variable: the one of this environment.
    import torch as real

    found = build.find_torch({})
    assert (found.version, found.cuda) == (real.__version__, real.version.cuda)


def test_torch_that_cannot_be_used(tmp_path):
    with pytest.raises(build.BuildError, match=r"torch 2\.9\.1 is too old.* 2\.10"):
        build.read_torch(make_torch(tmp_path / "old", "2.9.1"))
    with pytest.raises(build.BuildError, match="no torch in"):
        build.read_torch(tmp_path / "nothing")
    make_torch(tmp_path / "torch")
    (tmp_path / "torch/include/torch/csrc/stable/library.h").unlink()
    with pytest.raises(build.BuildError, match="no C\\+\\+ headers"):
        build.read_torch(tmp_path / "torch")


def test_cuda_home_decides(tmp_path):
    torch = build.Torch(tmp_path, "2.13.0+cu130", "13.0")
    home = make_cuda(tmp_path / "cuda", "13.1")
    cuda = build.find_cuda({"CUDA_HOME": f":{home}"}, torch)
    assert (cuda.home, cuda.version, cuda.lib) == (home, (13, 1), home / "lib")
    with pytest.raises(build.BuildError, match="no nvcc: CUDA_HOME is '/no/cuda'"):
        build.find_cuda({"CUDA_HOME": "/no/cuda"}, torch)
    old = make_cuda(tmp_path / "old", "12.8")
    with pytest.raises(
        build.BuildError, match=r"CUDA 12\.8 in .*, but torch is for 13\.0; set CUDA_HOME"
    ):
        build.find_cuda({"CUDA_HOME": str(old)}, torch)
    # A CPU torch compiles with any toolkit that knows C++20.
    cpu = build.Torch(tmp_path, "2.13.0+cpu", None)
    assert build.find_cuda({"CUDA_HOME": str(old)}, cpu).version == (12, 8)
    ancient = make_cuda(tmp_path / "ancient", "11.8")
    with pytest.raises(build.BuildError, match=r"CUDA 11\.8 in .* is too old"):
        build.find_cuda({"CUDA_HOME": str(ancient)}, cpu)


def test_wrapper_script_is_not_a_toolkit(tmp_path):
    """nvcc on the PATH may be a script elsewhere; nvidia's wheels lie beside torch."""
    packages = tmp_path / "site-packages"
    torch = build.Torch(packages / "torch", "2.13.0+cu990", "99.0")
    wrapper = make_cuda(tmp_path / "wrapped", "99.0")
    (wrapper / "include/cuda_runtime.h").unlink()
    env = {"PATH": str(wrapper / "bin")}
    with pytest.raises(build.BuildError, match="CUDA 99"):
        build.find_cuda(env, torch)
    home = make_cuda(packages / "nvidia/cu99", "99.0")
    assert build.find_cuda(env, torch).home == home


def test_compilers(tmp_path):
    for name in ("c++", "clang++"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    assert build.find_cxx({"PATH": str(tmp_path)}) == ("c++",)
    assert build.find_cxx({"PATH": str(tmp_path), "CXX": "clang++ -stdlib=libc++"}) == (
        "clang++",
        "-stdlib=libc++",
    )
    with pytest.raises(build.BuildError, match="no C\\+\\+ compiler: install g"):
        build.find_cxx({"PATH": str(tmp_path / "empty")})
    with pytest.raises(build.BuildError, match="CXX is 'icpx'"):
        build.find_cxx({"PATH": str(tmp_path), "CXX": "icpx"})


def test_jobs():
    assert build.num_jobs({"MAX_JOBS": "3"}) == 3
    assert 1 <= build.num_jobs({}) <= (os.cpu_count() or 1)
    for value in ("0", "-1", "many"):
        with pytest.raises(ValueError, match=f"MAX_JOBS is '{value}'"):
            build.num_jobs({"MAX_JOBS": value})


@pytest.mark.parametrize(
    ("text", "codes"),
    [
        ("9.0", ["sm_90"]),
        ("8.0;9.0a", ["sm_80", "sm_90a"]),
        ("8.0 9.0+PTX", ["sm_80", "sm_90", "compute_90"]),
        ("10.0f, 12.0f+PTX", ["sm_100f", "sm_120f", "compute_120"]),
        ("9.0;9.0; ", ["sm_90"]),
    ],
)
def test_archs(text, codes):
    assert [code for arch in build.parse_archs(text) for code in arch.codes] == codes


@pytest.mark.parametrize("text", ["Hopper", "90", "9.0b", "9.0+ptx", "9"])
def test_unknown_archs(text):
    with pytest.raises(ValueError, match="TORCH_CUDA_ARCH_LIST"):
        build.parse_archs(text)


@pytest.mark.parametrize(
    ("version", "codes"),
    [
        ((12, 4), ["sm_80", "sm_90", "compute_90"]),
        ((12, 8), ["sm_80", "sm_90", "sm_100", "sm_120", "compute_120"]),
        ((13, 0), ["sm_80", "sm_90", "sm_100f", "sm_120f", "compute_120"]),
    ],
)
def test_default_archs(version, codes):
    archs = build.default_archs(build.Cuda(Path("/cuda"), version))
    assert [code for arch in archs for code in arch.codes] == codes


@pytest.mark.parametrize(
    ("codes", "capability", "fits"),
    [
        (["sm_90"], (9, 0), True),
        (["sm_80"], (8, 9), True),
        (["sm_89"], (8, 6), False),
        (["sm_80"], (9, 0), False),
        (["sm_90a"], (9, 0), True),
        (["sm_100a"], (10, 3), False),
        (["sm_100f"], (10, 3), True),
        (["sm_100f"], (12, 0), False),
        (["compute_90"], (12, 0), True),
        (["compute_120"], (9, 0), False),
        (["sm_80", "compute_90"], (10, 0), True),
        ([], (9, 0), False),
    ],
)
def test_which_gpus_a_binary_runs_on(codes, capability, fits):
    assert build.covers(codes, capability) is fits


@pytest.fixture
def recipes(tmp_path):
    """Recipes of two extensions whose tools are stand-ins."""
    csrc = tmp_path / "src/csrc"
    for name in ("bindings.cpp", "params.h", "cpu/op.cpp", "cpu/op.h", "cuda/op.cu", "cuda/op.cuh"):
        (csrc / name).parent.mkdir(parents=True, exist_ok=True)
        (csrc / name).write_text(name)
    make_cuda(tmp_path / "cuda", "13.0")
    cxx = tmp_path / "g++"
    cxx.write_text("#!/bin/sh\necho g++ 12.2.0\n")
    cxx.chmod(0o755)
    torch = build.read_torch(make_torch(tmp_path / "torch"))
    env = {"CXX": str(cxx), "CUDA_HOME": str(tmp_path / "cuda"), "TORCH_CUDA_ARCH_LIST": "9.0a"}

    def make(**more):
        given = env | more
        return build.cpp_recipe(csrc, torch, given), build.cuda_recipe(csrc, torch, given)

    make.csrc = csrc
    return make


def test_commands(recipes):
    cpp, cuda = recipes()
    assert [str(s) for s in cpp.sources] == ["csrc/bindings.cpp", "csrc/cpu/op.cpp"]
    assert [str(s) for s in cuda.sources] == ["csrc/cuda/op.cu"]
    for recipe in (cpp, cuda):
        words = recipe.compile_command(recipe.sources[0], Path("x.o"))
        assert {"-DTORCH_TARGET_VERSION=0x020a000000000000", "-std=c++20", "-O3"} <= set(words)
        assert "-DPy_LIMITED_API=0x030a0000" in words
    words = cuda.compile_command(cuda.sources[0], Path("x.o"))
    assert {"-DUSE_CUDA", "-gencode=arch=compute_90a,code=sm_90a"} <= set(words)
    link = cuda.link_command([Path("x.o")], Path("x.so"))
    # Behind the objects and kept although nothing seems to need it; the runtime is inside.
    at = link.index("-ltorch")
    assert link[at - 1 : at + 2] == [
        "-Wl,--push-state,--no-as-needed",
        "-ltorch",
        "-Wl,--pop-state",
    ]
    assert link.index("x.o") < at
    assert "-lcudart_static" in link
    assert "-lcudart" not in link
    assert cpp.codes == ()
    assert cuda.codes == ("sm_90a",)


def test_key_follows_what_decides(recipes):
    keys = [recipe.key() for recipe in recipes()]
    assert keys == [recipe.key() for recipe in recipes()]
    assert keys[0] != recipes(CXXFLAGS="-march=native")[0].key()
    assert keys[1] != recipes(TORCH_CUDA_ARCH_LIST="8.0")[1].key()
    (recipes.csrc / "cuda/op.cuh").write_text("changed")
    after = [recipe.key() for recipe in recipes()]
    assert (after[0] == keys[0], after[1] == keys[1]) == (True, False)
    (recipes.csrc / "params.h").write_text("changed")
    assert recipes()[0].key() != keys[0]


def test_jit_compiles_for_the_gpus_that_are_there(monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.0 7.5 8.0 8.9 9.0 10.0 12.0")
    assert jit._archs([(9, 0), (9, 0)]) == (build.Arch(90),)
    assert jit._archs([]) is None, "the list decides"
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    with pytest.raises(build.BuildError, match="no GPU found to compile for"):
        jit._archs([])


def test_no_compiling_inside_a_graph_capture(monkeypatch, tmp_path):
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: True)
    with pytest.raises(build.BuildError, match="graph capture"):
        jit.compiled(build.CPP, tmp_path, [])
