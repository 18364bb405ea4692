"""How the engines of a benchmark share a device: side by side, asleep between turns, or started for each.

The plan is made before anything starts, from the sizes of the weights and the KV cache of the requests in
flight. What an engine needs beyond them (activations, CUDA graphs, the device's context) is a share set
aside, not a computation: a benchmark that takes turns needlessly is slower, not wrong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_dflash.checkpoint import weight_bytes
from vllm_dflash.environment import available_bytes, gpu_memory, total_bytes
from vllm_dflash.training.verifier_memory import kv_bytes

#: Share of what is free on the device that the engines take together.
MEMORY_SHARE = 0.85
#: Share of an engine's memory that is neither weights nor KV cache.
SET_ASIDE = 0.25
#: What an engine that sleeps keeps on the device: its context and its graphs.
ASLEEP_BYTES = 3 * 2**30
_GIB = 2**30
_BYTES = {"float32": 4, "float": 4, "float16": 2, "half": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Device:
    """Where the engines run; sizes in bytes.

    Attributes:
        name: for messages.
        total, free: memory of one GPU, or of the machine.
        host: free host memory.
        gpu: whether it is one.
    """

    name: str
    total: int
    free: int
    host: int
    gpu: bool

    @classmethod
    def here(cls) -> Device:
        """The GPU with the least free memory of those that this process may use; else the CPU."""
        free, gpus = available_bytes(), gpu_memory()
        if gpus:
            most, least = min(gpus, key=lambda gpu: gpu[1])
            return cls("GPU", most, least, free, True)
        return cls("CPU", total_bytes(), free, free, False)


@dataclass(frozen=True)
class Sharing:
    """The plan.

    Attributes:
        kind: one of :data:`~vllm_dflash.bench.config.SHARING`.
        engine_args: what every engine gets for it.
        sentence: the plan in words.
    """

    kind: str
    engine_args: Mapping[str, Any] = field(default_factory=dict)
    sentence: str = ""


def needed_model_len(
    longest_prompt: int, max_tokens: int, draft_tokens: int, verifier_config: Any
) -> int | None:
    """``max_model_len`` for prompts and outputs with room for a draft; None where it is up to the model.

    vLLM stops drafting for a batch that comes within a draft of it.
    """
    needed = longest_prompt + max_tokens + 2 * (draft_tokens + 1)
    limit = getattr(verifier_config.get_text_config(), "max_position_embeddings", None)
    return needed if limit is None or needed <= limit else None


def kv_itemsize(verifier_config: Any, dtype: str, kv_cache_dtype: str = "auto") -> int:
    """Bytes of a cached value."""
    return 1 if kv_cache_dtype.startswith("fp8") else _dtype_bytes(verifier_config, dtype)


def _stored_bytes(verifier_config: Any) -> int:
    own = str(getattr(verifier_config, "dtype", None) or "bfloat16").removeprefix("torch.")
    return _BYTES.get(own, 2)


def _dtype_bytes(verifier_config: Any, dtype: str) -> int:
    # vLLM serves what was saved in float32 in 16 bits, unless told otherwise.
    return _BYTES.get(dtype, min(_stored_bytes(verifier_config), 2))


def plan_sharing(
    wanted: str,
    models: Sequence[Sequence[str | Path]],
    verifier_config: Any,
    requests: int,
    tokens: int,
    engine_args: Mapping[str, Any],
    device: Device,
) -> Sharing:
    """How engines share a device.

    Args:
        wanted: one of :data:`~vllm_dflash.bench.config.SHARING`, or ``auto``: the first of them that fits.
        models: folders or hub names that each engine loads.
        verifier_config: transformers' configuration of the verifier.
        requests: in flight at most, which the KV cache of an engine has to hold.
        tokens: of each at most.
        engine_args: of vLLM; those count that say how large the cache is.
        device: where they run.

    Raises:
        ValueError: ``sleep`` on a machine without a GPU.
    """
    if wanted == "sleep" and not device.gpu:
        raise ValueError(
            "--sharing is 'sleep', which vLLM has on GPUs only; give restart or together"
        )
    ranks = int(engine_args.get("tensor_parallel_size", 1))
    count = len(models)
    sizes = [[weight_bytes(model) for model in engine] for engine in models]
    dtype = engine_args.get("dtype", "auto")
    # float32 weights take twice what a file of 16 bits has.
    wider = max(1, _dtype_bytes(verifier_config, dtype) // _stored_bytes(verifier_config))
    known = [
        wider * sum(s for s in engine if s is not None) for engine in sizes if None not in engine
    ]
    itemsize = kv_itemsize(verifier_config, dtype, engine_args.get("kv_cache_dtype", "auto"))
    step = engine_args.get("max_num_batched_tokens", tokens)
    kv = requests * kv_bytes(verifier_config.get_text_config(), tokens, step, ranks, itemsize)
    # Free of what others hold, so that the shares of all are really there.
    budget = MEMORY_SHARE * device.free
    if len(known) < count:
        # Side by side is what fails when it does not fit.
        kind, size = ("restart" if device.gpu else "together"), "weights of unknown size"
        needed = None
    else:
        weights = max(known) // ranks
        needed = (weights + kv) / (1 - SET_ASIDE)
        size = (
            f"{_gib(needed)} GiB (weights {_gib(weights)}, KV cache {_gib(kv)}, the rest set aside)"
        )
        if count == 1 or count * needed <= budget:
            kind = "together"
        elif (
            device.gpu
            and needed + (count - 1) * ASLEEP_BYTES <= budget
            and sum(known) <= MEMORY_SHARE * device.host
        ):
            kind = "sleep"
        else:
            kind = "restart"
    kind = kind if wanted == "auto" else wanted
    if kind == "together":
        share = budget / count
    elif kind == "sleep":
        share = budget - (count - 1) * ASLEEP_BYTES
    else:
        share = budget
    ways = {
        "together": "all at once",
        "sleep": "one at a time, the others asleep in host memory",
        "restart": "one at a time, started anew for each turn",
    }
    text = f"{count} engines of {size} on a {device.name} with {_gib(device.free)} GiB free: {ways[kind]}"
    if needed is not None and needed > share:
        text += f"; {_gib(share)} GiB for each may not do"
    given: dict[str, Any] = {"gpu_memory_utilization": int(1000 * share / device.total) / 1000}
    if kind == "sleep":
        given["enable_sleep_mode"] = True
    return Sharing(kind, given, text)


def _gib(size: float) -> str:
    return f"{size / _GIB:.1f}"
