"""The CUDA extension compiles and links without a GPU or a CUDA torch, and its kernels fit the registers.

One nvcc call a file makes the code of all architectures, as a release build does. What came out is kept in
build/cuda_compiles under a hash of all that went into it, so only the first run after a change takes long.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from vllm_dflash.ops import build

ROOT = Path(__file__).resolve().parents[2]
#: Ampere, Hopper and the two families of Blackwell.
ARCHS = {"sm_80": "8.0", "sm_90a": "9.0a", "sm_100f": "10.0f", "sm_120f": "12.0f"}
SOURCES = [path.name for path in sorted((ROOT / "csrc/cuda").glob("*.cu"))]
VERBOSE = ("-Xptxas=-v", "--threads", "2")

try:
    CUDA = build.find_cuda(os.environ, build.find_torch(os.environ))
    MISSING = ""
except build.BuildError as error:
    MISSING = str(error)

pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"no CUDA compiler: {MISSING}")


def recipe() -> build.Recipe:
    archs = [a for a in ARCHS.values() if CUDA.version >= (12, 9) or not a.endswith("f")]
    return build.cuda_recipe(
        ROOT / "csrc", build.find_torch(os.environ), os.environ, build.parse_archs(" ".join(archs))
    )


def compiled(source: str) -> tuple[Path, str]:
    """The object of a source file, and what the assembler said about it."""
    made = recipe()
    folder = ROOT / "build" / "cuda_compiles" / made.key()
    output, log = folder / f"{source}.o", folder / f"{source}.log"
    if not (output.is_file() and log.is_file()):
        folder.mkdir(parents=True, exist_ok=True)
        path = Path("csrc/cuda") / source
        command = made.compile_command(path, output.with_suffix(".part"))
        if path.suffix == ".cu":
            command[1:1] = VERBOSE
        began = time.monotonic()
        done = subprocess.run(
            command,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=900,
            preexec_fn=lambda: os.nice(19),
        )
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
        log.write_text(f"{done.stdout}{done.stderr}\n{time.monotonic() - began:.1f} s\n")
        output.with_suffix(".part").rename(output)
    return output, log.read_text()


def kernels(log: str, arch: str) -> dict[str, dict[str, int]]:
    """Per kernel (mangled name) of an architecture: stack, spills and registers."""
    pattern = (
        r"Compiling entry function '(\S+)' for '(\S+)'(?s:.*?)"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads(?s:.*?)"
        r"Used (\d+) registers"
    )
    return {
        name: {
            "stack": int(stack),
            "stores": int(stores),
            "loads": int(loads),
            "registers": int(registers),
        }
        for name, code, stack, stores, loads, registers in re.findall(pattern, log)
        if code == arch
    }


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("source", SOURCES)
def test_compiles_without_spills(source, arch):
    if arch.endswith("f") and CUDA.version < (12, 9):
        pytest.skip(f"CUDA {CUDA.version_text} does not know {arch}")
    _, log = compiled(source)
    assert "warning" not in log.lower(), log
    found = kernels(log, arch)
    assert found, f"no kernel was compiled for {arch}:\n{log}"
    bad = {name: k for name, k in found.items() if k["stack"] or k["stores"] or k["loads"]}
    assert not bad


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize(
    ("source", "kernel", "accesses"),
    [
        ("store_context_kv.cu", r"store_context_kv_kernelI13__nv_bfloat16S\w*_E", {"STG.E.128"}),
        (
            "store_context_kv.cu",
            r"store_context_kv_kernelI13__nv_bfloat16NS0_10Float8E4M3E",
            {"STG.E.64"},
        ),
        (
            "tap_hidden_states.cu",
            r"tap_hidden_states_kernelI13__nv_bfloat16Li8E",
            {"STG.E.128", "STG.E.U16"},
        ),
    ],
    ids=["keys and values", "float8", "tap"],
)
def test_stores_are_wide(source, kernel, accesses, arch):
    """nvcc was seen to split 16-byte stores; the 2-byte ones are for the columns behind the last vector."""
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        pytest.skip("no cuobjdump: neither the toolkit nor triton has it")
    output, _ = compiled(source)
    done = subprocess.run(
        [cuobjdump, "--dump-sass", "--gpu-architecture", arch, output],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    functions = re.split(r"Function : ", done.stdout)[1:]
    chosen = [text for text in functions if re.search(kernel, text.partition("\n")[0])]
    assert chosen, [text.partition("\n")[0] for text in functions]
    for text in chosen:
        assert set(re.findall(r"STG\.[A-Z0-9.]+", text)) == accesses
        assert not re.search(r"\b(LDL|STL)\b", text), "uses local memory"


def find_cuobjdump() -> str | None:
    for place in (
        CUDA.home / "bin",
        *build.find_torch(os.environ).root.parent.glob("triton/backends/nvidia/bin"),
    ):
        if (place / "cuobjdump").is_file():
            return str(place / "cuobjdump")
    return shutil.which("cuobjdump")


def test_links(tmp_path):
    """The extension exports its init function only, and needs nothing of torch that is not stable."""
    made = recipe()
    objects = [compiled(source.name)[0] for source in made.sources]
    library = tmp_path / made.filename
    done = subprocess.run(
        made.link_command(objects, library), cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    symbols = subprocess.run(
        ["nm", "-DC", library], capture_output=True, text=True, check=True
    ).stdout
    exported = re.findall(r" T (\S+)", symbols)
    assert exported == ["PyInit__C_cuda"]
    unstable = re.findall(r" U ((?:at|c10)::.*)", symbols)
    assert not unstable
    needed = subprocess.run(
        ["readelf", "-d", library], capture_output=True, text=True, check=True
    ).stdout
    # ld drops it unless told otherwise, and then torch's CUDA half is not found.
    assert "[libtorch.so]" in needed
    assert "libcudart" not in needed
