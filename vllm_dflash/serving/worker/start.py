"""What happens once a worker can run steps: they are measured, and the engine core asks for the costs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from vllm_dflash.serving.patching import replaced


def _drafter(runner: Any) -> Any:
    """Our proposer or speculator, or what vLLM has in its place."""
    return getattr(runner, "drafter", None) or getattr(runner, "speculator", None)


def tensor_parallel_group() -> Any:
    """vLLM's ``GroupCoordinator`` of this worker's tensor parallel ranks."""
    # Deferred: the engine core imports this module, and has none.
    from vllm.distributed.parallel_state import get_tp_group

    return get_tp_group()


def stateless_groups(ports: tuple[int, int], rank: int, size: int) -> tuple[Any, Any]:
    """Process groups of this machine's workers of several engines, beside vLLM's own of each engine.

    Returns once all of them are there.

    Args:
        ports: free ones on this machine, the same for all.
        rank, size: of this worker, and of the group.

    Returns:
        A group for the host's tensors and one for the device's; on a CPU they are one.
    """
    from vllm.distributed.utils import stateless_init_torch_distributed_process_group
    from vllm.platforms import current_platform

    def group(port: int, backend: str) -> Any:
        return stateless_init_torch_distributed_process_group(
            "127.0.0.1", port, rank, size, backend
        )

    of_host = group(ports[0], "gloo")
    if current_platform.is_cpu():
        return of_host, of_host
    return of_host, group(ports[1], current_platform.dist_backend)


def wrap_warm_up(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps ``compile_or_warm_up_model`` of vLLM's workers: our drafter measures what steps cost.

    That is the first moment at which the engine can run steps, and the last before requests come. vLLM's GPU
    worker goes on to watch for kernels that are compiled later, so just before that.
    """

    @functools.wraps(original)
    def compile_or_warm_up_model(self):
        runner, measured = self.model_runner, False

        def measure() -> None:
            nonlocal measured
            drafter_measures = getattr(_drafter(runner), "measure", None)
            if drafter_measures is not None and not measured:
                measured = True
                # Dummy steps are no load that experts are to be balanced by.
                with getattr(getattr(runner, "eplb", None), "suppress", nullcontext)():
                    drafter_measures(runner)

        watch = getattr(self, "_maybe_activate_jit_monitor", None)
        if watch is None:
            out = original(self)
        else:

            def measure_and_watch() -> None:
                measure()
                watch()

            with replaced(self, "_maybe_activate_jit_monitor", measure_and_watch):
                out = original(self)
        measure()
        return out

    return compile_or_warm_up_model


def step_cost(worker: Any) -> dict[str, Any] | None:
    """Asked by the engine core: what steps cost this worker; None where that is not known."""
    cost = getattr(_drafter(worker.model_runner), "step_cost", None)
    return None if cost is None else cost.as_dict()


def choose_lengths(worker: Any) -> None:
    """Told by the engine core: every worker knows what steps cost, draft lengths are chosen from now on.

    The V2 speculator follows the schedule in any case.
    """
    choose = getattr(_drafter(worker.model_runner), "choose_lengths", None)
    if choose is not None:
        choose()
