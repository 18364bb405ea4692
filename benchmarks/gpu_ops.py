"""Are the ops right on this machine, and how fast beside the calls of vLLM that they replace?

    python benchmarks/gpu_ops.py [--out FILE] [--checks-only] [--rounds 9]

First every op is compared with float64 arithmetic (integers: with the reference) over shapes and dtypes. Then
the machine's copy bandwidth is measured, and ours and the stock sequence take turns: called from Python
("eager"), replayed from a CUDA graph ("graph"), and replayed behind a write of half a GiB that leaves nothing
useful in the L2 cache ("cold"). Stock is vLLM's own kernels where vLLM imports, else the same steps in
PyTorch; our Triton fallback is timed, too. Reported are medians over the rounds, and the median and the range
of stock's time divided by ours in the same round. GB/s counts every input once and every output once.

Without a GPU the checks and small timings run on the CPU, and nothing is said about a GPU. A second run under
compute-sanitizer with --checks-only finds bad memory accesses.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from vllm_dflash import ops
from vllm_dflash.bench.report import write_json
from vllm_dflash.environment import describe_machine, versions
from vllm_dflash.ops import reference

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
KV_BLOCK = 16
#: Where the axes of vLLM's logical caches [L layers, B blocks, H heads, N tokens of a block, C: keys beside
#: values] lie in memory, outermost first, by vLLM's names (``KVCacheLayout``); the first is its default.
KV_LAYOUTS = {"LBNHC": (0, 1, 3, 2, 4), "LBHNC": (0, 1, 2, 3, 4), "BLNHC": (1, 0, 3, 2, 4)}
FLUSH_BYTES = 2**29
Call = Callable[[], None]


@dataclass(frozen=True)
class Model:
    """Shapes of a drafter."""

    name: str
    layers: int
    heads: int
    head_size: int
    hidden: int
    taps: int


#: The second is Gemma-like; its drafter's own config was not at hand.
MODELS = (Model("Qwen3-8B", 5, 8, 128, 4096, 5), Model("gemma-4-31B, assumed", 5, 16, 256, 5376, 5))


def call(function: Callable[..., None], case: dict[str, Any]) -> None:
    """A function that has the parameters of an op, with a case's values; None for those left out."""
    function(*[case.get(name) for name in inspect.signature(function).parameters])


def our_op(op: str) -> Callable[[dict[str, Any]], None]:
    ops.load()
    target = getattr(torch.ops.vllm_dflash, op)
    names = [argument.name for argument in target.default._schema.arguments]
    return lambda case: target(*[case.get(name) for name in names])


# --- cases ---------------------------------------------------------------------------------------


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=DEVICE, dtype=torch.float32).to(dtype)


def kv_case(
    tokens: int,
    *,
    layers: int,
    heads: int,
    head_size: int,
    dtype: torch.dtype = torch.bfloat16,
    cache_dtype: torch.dtype | None = None,
    rope_dtype: torch.dtype | None = None,
    rotary_dim: int | None = None,
    is_neox: bool = True,
    layout: str = "LBNHC",
    value_scale: float = 1.0,
    skipped: float = 0.0,
) -> dict[str, Any]:
    """Arguments of store_context_kv, as ``serving.context_kv`` gives them for vLLM's paged caches.

    Key and value caches are views ``[blocks, 16, heads, head_size]`` of one cache, in one of KV_LAYOUTS.
    """
    cache_dtype, rotary_dim = cache_dtype or dtype, head_size if rotary_dim is None else rotary_dim
    generator = torch.Generator().manual_seed(tokens)
    blocks = -(-tokens // KV_BLOCK) + 3
    shape, physical = (layers, blocks, heads, KV_BLOCK, 2 * head_size), KV_LAYOUTS[layout]
    storage = torch.empty([shape[axis] for axis in physical], dtype=cache_dtype, device=DEVICE)
    caches = storage.permute([physical.index(axis) for axis in range(5)])
    for layer, cache in enumerate(caches):
        cache.copy_(random(*cache.shape, dtype=torch.bfloat16, seed=layer).to(cache_dtype))
    pairs = [cache.transpose(1, 2).split(head_size, dim=-1) for cache in caches]
    order = torch.randperm(blocks, generator=generator)
    token = torch.arange(tokens)
    slots = order[token // KV_BLOCK] * KV_BLOCK + token % KV_BLOCK
    slots[torch.rand(tokens, generator=generator) < skipped] = -1
    slots = slots.to(DEVICE)
    rows = max(tokens, 64) + 8
    angles = torch.arange(rows)[:, None] * 10000.0 ** (
        -torch.arange(0, max(rotary_dim, 1), 2) / max(rotary_dim, 1)
    )
    angles = angles[:, : rotary_dim // 2]
    scales = torch.linspace(0.5, 1.5, layers, device=DEVICE) if cache_dtype in FLOAT8 else None
    return {
        "kv": random(tokens, layers, 2, heads, head_size, dtype=dtype, seed=99),
        "k_norm_weights": (1 + 0.2 * random(layers, head_size, dtype=torch.float32, seed=98)).to(
            dtype
        ),
        "eps": 1e-6,
        "positions": (token + 5).to(DEVICE),
        "cos_sin_cache": torch.cat([angles.cos(), angles.sin()], -1).to(
            DEVICE, rope_dtype or dtype
        ),
        "is_neox": is_neox,
        "value_scale": value_scale,
        "slots": [slots] * layers,
        "key_caches": [key for key, _ in pairs],
        "value_caches": [value for _, value in pairs],
        "key_scales": scales,
        "value_scales": scales,
    }


def block_case(
    lens: list[int],
    rejected: list[int],
    *,
    draft_tokens: int = 15,
    groups: int = 1,
    max_tokens: int = 0,
    max_requests: int = 0,
) -> dict[str, Any]:
    """Arguments of build_block as the V2 runner gives them; outputs hold -77 and have room for the maxima."""
    generator = torch.Generator().manual_seed(len(lens))
    B, T, K = len(lens), sum(lens), draft_tokens
    starts = torch.randint(0, 1000, (B,), generator=generator).tolist()
    longest = max([s + n for s, n in zip(starts, lens, strict=True)], default=1) + K + 1
    width = -(-longest // KV_BLOCK)
    states = B + 5

    def ints(*shape: int, high: int) -> Tensor:
        return torch.randint(0, high, shape, generator=generator, dtype=torch.int32).to(DEVICE)

    most = max(B, max_requests)

    def out(n: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.full((n,), -77, dtype=dtype, device=DEVICE)

    positions = [torch.arange(s, s + n) for s, n in zip(starts, lens, strict=True)]
    return {
        "anchor_ids": ints(states, high=150000),
        "target_positions": torch.cat([*positions, torch.empty(0, dtype=torch.int64)]).to(DEVICE),
        "query_start_loc": torch.tensor([0, *lens]).cumsum(0).int().to(DEVICE),
        "num_rejected": torch.tensor(rejected, dtype=torch.int32, device=DEVICE),
        "request_index": torch.randperm(states, generator=generator)[:B].int().to(DEVICE),
        "num_sampled": ints(B, high=3),
        "prefill_ids": ints(states, high=150000),
        "temperature": torch.rand(states, generator=generator).to(DEVICE),
        "seeds": ints(states, high=2**31 - 1).long(),
        "block_tables": [ints(B, width, high=5000) for _ in range(groups)],
        "kv_block_sizes": [KV_BLOCK] * groups,
        "num_draft_tokens": K,
        "mask_token_id": 151669,
        "max_model_len": longest,
        "sample_from_anchor": False,
        "input_ids": out(max(B * (K + 1), max_tokens), torch.int32),
        "query_positions": out(max(B * (K + 1), max_tokens)),
        "query_slots": torch.full((groups, max(B * (K + 1), max_tokens)), -77, device=DEVICE),
        "query_slot_rows": list(range(groups)),
        "context_positions": out(max(T, max_tokens)),
        "context_slots": torch.full((groups, max(T, max_tokens)), -77, device=DEVICE),
        "sample_indices": out(most * K),
        "block_start_loc": out(most + 1, torch.int32),
        "block_seq_lens": out(most, torch.int32),
        "sample_positions": out(most * K),
        "sample_requests": out(most * K),
        "temperature_out": torch.full((states,), -77.0, device=DEVICE),
        "seeds_out": torch.full((states,), -77, device=DEVICE),
    }


# --- checks --------------------------------------------------------------------------------------


@dataclass
class Check:
    """One comparison; ``problem`` is empty where the op is right."""

    op: str
    case: str
    problem: str
    #: |out - exact| / |exact|, of all elements together.
    error: float = 0.0


def check_all(largest: int = sys.maxsize) -> list[Check]:
    """All checks of at most ``largest`` tokens."""
    return [*check_build_block(largest), *check_tap(largest), *check_store(largest)]


def check_build_block(largest: int) -> Iterator[Check]:
    run = our_op("build_block")
    generator = torch.Generator().manual_seed(0)
    ragged = torch.randint(0, 700, (40,), generator=generator).tolist()
    batches = {
        "1 x 1": [1],
        "256 x 8": [8] * 256,
        "1 x 32768": [32768],
        "ragged": ragged,
        "3000 small": [i % 3 for i in range(3000)],
        "empty": [],
    }
    for (name, lens), groups, room in itertools.product(batches.items(), (1, 3), (0, 60000)):
        if sum(lens) > largest:
            continue
        case = block_case(
            lens,
            [n * 2 // 3 for n in lens],
            groups=groups,
            max_tokens=room,
            max_requests=room // 15,
        )
        want = {k: _cpu(v) for k, v in case.items()}
        call(reference.build_block, want)
        run(case)
        wrong = [
            k
            for k, v in case.items()
            if isinstance(v, Tensor) and not torch.equal(v.cpu(), want[k])
        ]
        yield Check(
            "build_block",
            f"{name}, {groups} groups, room {room}",
            f"differs: {wrong}" if wrong else "",
        )


def check_tap(largest: int) -> Iterator[Check]:
    run = our_op("tap_hidden_states")
    for dtype, tokens, width, plain in itertools.product(
        FLOATS, (1, 7, 5000), (4096, 5376, 577, 100), (0, 1)
    ):
        if tokens > largest:
            continue
        hidden, residual = (random(tokens, width, dtype=dtype, seed=i) for i in range(2))
        features = random(tokens + 1, 2 * width + 8, dtype=dtype, seed=2)
        want = features.clone()
        exact = hidden.double() if plain else hidden.double() + residual.double()
        want[:tokens, width : 2 * width] = exact.to(dtype)
        run(
            {
                "features": features,
                "hidden": hidden,
                "residual": None if plain else residual,
                "column": width,
            }
        )
        # Rounded once, so at most the neighbour where float64 and float32 fall on two sides of a tie.
        off = (features.double() - want.double()).abs() > torch.finfo(
            dtype
        ).eps * want.double().abs()
        name = f"{tokens} x {width} {_short(dtype)}{', plain' if plain else ''}"
        yield Check(
            "tap_hidden_states", name, "differs" if off.any() else "", _relative(features, want)
        )


def check_store(largest: int) -> Iterator[Check]:
    shapes = [
        {"layers": 5, "heads": 8, "head_size": 128},
        {"layers": 5, "heads": 16, "head_size": 256, "layout": "LBHNC"},
        {"layers": 3, "heads": 1, "head_size": 64, "is_neox": False},
        {"layers": 2, "heads": 3, "head_size": 128, "rotary_dim": 32},
        {"layers": 2, "heads": 5, "head_size": 80, "layout": "BLNHC"},
        {"layers": 2, "heads": 2, "head_size": 96, "rotary_dim": 24, "is_neox": False},
        {"layers": 1, "heads": 2, "head_size": 576, "rotary_dim": 64, "layout": "LBHNC"},
    ]
    for dtype, shape, tokens in itertools.product(FLOATS, shapes, (1, 33, 1500)):
        if tokens > largest:
            continue
        for cache_dtype in (dtype, *FLOAT8):
            options = {
                **shape,
                "dtype": dtype,
                "cache_dtype": cache_dtype,
                "skipped": 0.2,
                "value_scale": 0.7,
            }
            options["rope_dtype"] = torch.float32 if tokens == 33 else dtype
            yield check_store_case(tokens, options)


def check_store_case(tokens: int, options: dict[str, Any]) -> Check:
    run = our_op("store_context_kv")
    case = kv_case(tokens, **options)
    before = [cache.clone() for cache in (*case["key_caches"], *case["value_caches"])]
    run(case)
    first = [cache.clone() for cache in (*case["key_caches"], *case["value_caches"])]
    problem, errors = "", []
    slots = case["slots"][0]
    used = slots[slots >= 0]
    for i, (got, old, (token, exact)) in enumerate(
        zip(first, before, exact_rows(case), strict=True)
    ):
        stored = got[used // KV_BLOCK, used % KV_BLOCK].double()
        want = exact[token]
        info = torch.finfo(got.dtype)
        want = want.clamp(-info.max, info.max)
        # Half a unit in the last place, half a step of the subnormals, and float32's error before rounding.
        float32 = 3e-6 if got.dtype in FLOAT8 else 1e-6
        bound = (
            (0.5 * info.eps + float32) * want.abs()
            + 0.5 * info.smallest_normal * info.eps
            + float32
        )
        if ((stored - want).abs() > bound).any() or not stored.isfinite().all():
            problem = f"cache {i} differs by up to {float((stored - want).abs().max()):.3g}"
        errors.append(float((stored - want).norm() / want.norm().clamp(min=1e-30)))
        rest = torch.ones(got.shape[:2], dtype=torch.bool, device=DEVICE)
        rest[used // KV_BLOCK, used % KV_BLOCK] = False
        if not torch.equal(got[rest].view(torch.uint8), old[rest].view(torch.uint8)):
            problem = f"cache {i} changed where no token was stored"
    run(case)
    again = (*case["key_caches"], *case["value_caches"])
    if not all(torch.equal(_bytes(a), _bytes(b)) for a, b in zip(first, again, strict=True)):
        problem = "a second run gave something else"
    text = " ".join(
        f"{k}={_short(v) if isinstance(v, torch.dtype) else v}" for k, v in options.items()
    )
    return Check("store_context_kv", f"tokens={tokens} {text}", problem, max(errors))


def exact_rows(case: dict[str, Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """Per cache, keys of all layers first: the tokens that are stored, and float64 rows of all tokens."""
    kv = case["kv"].double()
    cos, sin = case["cos_sin_cache"][case["positions"]].double()[:, None].chunk(2, -1)
    token = (case["slots"][0] >= 0).nonzero().flatten()
    for which, scales in ((0, case["key_scales"]), (1, case["value_scales"])):
        for layer in range(kv.shape[1]):
            x = kv[:, layer, which]
            if which == 0:
                x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + case["eps"])
                x = reference._rotate(
                    x * case["k_norm_weights"][layer].double(), cos, sin, case["is_neox"]
                )
            else:
                x = x * case["value_scale"]
            yield token, x if scales is None else x / scales[layer].double()


def _cpu(value: Any) -> Any:
    if isinstance(value, list):
        return [_cpu(v) for v in value]
    return value.cpu().clone() if isinstance(value, Tensor) else value


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def _relative(out: Tensor, want: Tensor) -> float:
    return float((out.double() - want.double()).norm() / want.double().norm())


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- what ours replaces --------------------------------------------------------------------------


def vllm_kernels() -> tuple[Any, Any, str]:
    """vLLM's custom ops, its Triton kernel that builds the block, and where stock comes from."""
    if not ON_GPU:
        return None, None, "PyTorch"
    try:
        from vllm import _custom_ops

        torch.ops._C.rms_norm  # noqa: B018 - raises where the compiled half is missing
        torch.ops._C_cache_ops.reshape_and_cache_flash  # noqa: B018
    except Exception as error:
        return None, None, f"PyTorch (vLLM does not import: {type(error).__name__}: {error})"
    try:
        from vllm.v1.worker.gpu.spec_decode.dflash.speculator import _prepare_dflash_inputs_kernel
    except Exception as error:
        return _custom_ops, None, f"vLLM; build_block: PyTorch ({type(error).__name__}: {error})"
    return _custom_ops, _prepare_dflash_inputs_kernel, "vLLM"


def stock_store(case: dict[str, Any], kernels: Any) -> Call:
    """What vLLM's precompute_and_store_context_kv does behind its GEMM."""
    kv, weights, eps, slots = case["kv"], case["k_norm_weights"], case["eps"], case["slots"][0]
    T, L, _, N, D = kv.shape
    positions, cos_sin = case["positions"], case["cos_sin_cache"]
    one = torch.ones(1, device=DEVICE)

    def run_vllm() -> None:
        all_kv = kv.permute(2, 1, 0, 3, 4).contiguous()
        keys = torch.empty_like(all_kv[0])
        kernels.rms_norm(keys, all_kv[0], weights, eps)
        kernels.rotary_embedding(
            positions.repeat(L), keys.view(L * T, N * D), None, D, cos_sin, case["is_neox"]
        )
        for layer in range(L):
            key_cache, value_cache = case["key_caches"][layer], case["value_caches"][layer]
            kind = "auto"
            if key_cache.dtype in FLOAT8:
                kind = "fp8_e4m3" if key_cache.dtype == torch.float8_e4m3fn else "fp8_e5m2"
                key_cache, value_cache = key_cache.view(torch.uint8), value_cache.view(torch.uint8)
            scale = one if case["key_scales"] is None else case["key_scales"][layer : layer + 1]
            kernels.reshape_and_cache_flash(
                keys[layer], all_kv[1, layer], key_cache, value_cache, slots, kind, scale, scale
            )

    def run_torch() -> None:
        all_kv = kv.permute(2, 1, 0, 3, 4).contiguous()
        keys = torch.nn.functional.rms_norm(all_kv[0], (D,), eps=eps) * weights[:, None, None]
        cos, sin = cos_sin[positions][None, :, None].chunk(2, -1)
        a, b = keys.chunk(2, -1)
        keys = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
        block, offset = slots // KV_BLOCK, slots % KV_BLOCK
        for layer in range(L):
            for cache, rows in (
                (case["key_caches"], keys[layer]),
                (case["value_caches"], all_kv[1, layer]),
            ):
                target, new = cache[layer], rows.to(cache[layer].dtype)
                if target.dtype in FLOAT8:
                    target, new = target.view(torch.uint8), new.view(torch.uint8)
                target[block, offset] = new

    return run_torch if kernels is None else run_vllm


def stock_build_block(case: dict[str, Any], kernel: Any) -> Call:
    if kernel is None:
        return lambda: call(reference.build_block, case)
    B, K = case["query_start_loc"].numel() - 1, case["num_draft_tokens"]
    longest = case["target_positions"].numel() // max(B, 1) + K + 1
    size = min(256, 1 << (longest - 1).bit_length())
    order = (
        "input_ids query_positions block_start_loc block_seq_lens @query context_positions @context "
        "sample_indices sample_positions sample_requests temperature_out seeds_out target_positions "
        "query_start_loc request_index anchor_ids prefill_ids num_sampled num_rejected temperature seeds "
        "@table"
    ).split()

    def run() -> None:
        for group, table in enumerate(case["block_tables"]):
            special = {
                "@query": case["query_slots"][group],
                "@context": case["context_slots"][group],
                "@table": table,
            }
            kernel[(B, -(-longest // size))](
                *[special.get(name, case.get(name)) for name in order],
                table.stride(0),
                case["mask_token_id"],
                KV_BLOCK,
                K + 1,
                K,
                case["block_seq_lens"].numel(),
                case["query_slots"].shape[1],
                case["max_model_len"],
                0,
                SAMPLE_FROM_ANCHOR=False,
                PAD_SLOT_ID=-1,
                CP_SIZE=1,
                CP_INTERLEAVE=1,
                BLOCK_SIZE=size,
            )

    return run


def triton_kernels() -> Any:
    if not ON_GPU:
        return None
    try:
        from vllm_dflash.ops import triton_kernels
    except ImportError:
        return None
    return triton_kernels


# --- timing --------------------------------------------------------------------------------------


@dataclass
class Timing:
    """Figures of one op, shape and mode. Times in microseconds a call."""

    op: str
    model: str
    tokens: int
    mode: str
    bytes: int
    #: Median over the rounds, per contender; what failed is missing and named in ``failed``.
    micros: dict[str, float] = field(default_factory=dict)
    gbps: float = 0.0
    copy_share: float | None = None
    #: Stock's time divided by ours, per round: median, least, most.
    speedup: tuple[float, float, float] | None = None
    failed: dict[str, str] = field(default_factory=dict)


def seconds(run: Call, inner: int) -> float:
    """Of one of ``inner`` calls that follow each other."""
    if not ON_GPU:
        began = time.perf_counter()
        for _ in range(inner):
            run()
        return (time.perf_counter() - began) / inner
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(inner):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3 / inner


def cold_seconds(run: Call, flush: Tensor, inner: int) -> float:
    """Median of calls that each find the L2 cache full of something else."""
    pairs = []
    for _ in range(inner):
        # The write also lets the host run ahead, so that the time between the events is the device's.
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return median(start.elapsed_time(end) for start, end in pairs) * 1e-3


def captured(run: Call, calls: int) -> Call:
    """A replay of a CUDA graph of some calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    return graph.replay


def compare(
    base: dict[str, Any], contenders: dict[str, Call], rounds: int, copy_gbps: float | None
) -> list[Timing]:
    """All modes of one op and shape; ``contenders`` has "ours" and, to compare with, "stock"."""
    failed: dict[str, str] = {}
    single: dict[str, float] = {}
    for name, run in contenders.items():
        try:
            for _ in range(3):
                run()
            single[name] = seconds(run, 3)
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    results = []
    for mode in ("eager", "graph", "cold") if ON_GPU else ("eager",):
        timing = Timing(**base, mode=mode, failed=dict(failed))
        measures: dict[str, Callable[[], float]] = {}
        for name in single:
            # Blocks of a millisecond or more: events tick in half microseconds.
            inner = max(3, min(100, int(1.5e-3 / single[name]) + 1))
            try:
                measures[name] = _measure(contenders[name], mode, inner)
                measures[name]()
            except Exception as error:
                measures.pop(name, None)
                timing.failed[name] = (
                    f"{mode}: {type(error).__name__}: {str(error).splitlines()[0][:200]}"
                )
        times: dict[str, list[float]] = {name: [] for name in measures}
        for turn in range(rounds):
            for name in measures if turn % 2 == 0 else reversed(measures):
                times[name].append(measures[name]())
        timing.micros = {name: median(values) * 1e6 for name, values in times.items()}
        if "ours" in times:
            timing.gbps = timing.bytes / median(times["ours"]) * 1e-9
            timing.copy_share = timing.gbps / copy_gbps if copy_gbps else None
            if "stock" in times:
                ratios = [s / o for s, o in zip(times["stock"], times["ours"], strict=True)]
                timing.speedup = (median(ratios), min(ratios), max(ratios))
        results.append(timing)
    return results


def _measure(run: Call, mode: str, inner: int) -> Callable[[], float]:
    if mode == "eager":
        return lambda: seconds(run, inner)
    if mode == "graph":
        replay = captured(run, inner)
        replay()
        return lambda: seconds(replay, 1) / inner
    replay = captured(run, 1)
    return lambda: cold_seconds(replay, _flush(), 5)


_flush_buffer: list[Tensor] = []


def _flush() -> Tensor:
    if not _flush_buffer:
        _flush_buffer.append(torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=DEVICE))
    return _flush_buffer[0]


def copy_bandwidth() -> float:
    """GB/s of a large copy within the device, bytes read and written."""
    size = 2**32 if ON_GPU else 2**27
    source = torch.empty(size // 4, device=DEVICE).normal_()
    target = torch.empty_like(source)
    target.copy_(source)
    times = [seconds(lambda: target.copy_(source), 3) for _ in range(9)]
    return 2 * size / median(times) * 1e-9


def time_all(rounds: int, copy_gbps: float, kernels: Any, block_kernel: Any) -> Iterator[Timing]:
    tokens_list = (1, 16, 256, 4096, 32768) if ON_GPU else (1, 16, 256)
    share = copy_gbps if ON_GPU else None
    triton = triton_kernels()
    for model, tokens in itertools.product(MODELS, tokens_list):
        for cache_dtype in (torch.bfloat16, torch.float8_e4m3fn):
            yield from time_store(model, tokens, cache_dtype, rounds, share, kernels, triton)
        yield from time_tap(model, tokens, rounds, share, triton)
        if ON_GPU:
            torch.cuda.empty_cache()
    for tokens in tokens_list:
        yield from time_build_block(tokens, rounds, share, block_kernel, triton)


def time_store(
    model: Model,
    tokens: int,
    cache_dtype: torch.dtype,
    rounds: int,
    copy: float | None,
    kernels: Any,
    triton: Any,
) -> list[Timing]:
    case = kv_case(
        tokens,
        layers=model.layers,
        heads=model.heads,
        head_size=model.head_size,
        cache_dtype=cache_dtype,
    )
    ours = our_op("store_context_kv")
    contenders: dict[str, Call] = {"ours": lambda: ours(case), "stock": stock_store(case, kernels)}
    if triton is not None:
        contenders["triton"] = lambda: call(triton.store_context_kv, case)
    elements = case["kv"].numel()
    moved = elements * (2 + cache_dtype.itemsize) + tokens * (16 + 2 * model.head_size)
    name = "store_context_kv" + (" to float8" if cache_dtype in FLOAT8 else "")
    return compare(
        {"op": name, "model": model.name, "tokens": tokens, "bytes": moved},
        contenders,
        rounds,
        copy,
    )


def time_tap(
    model: Model, tokens: int, rounds: int, copy: float | None, triton: Any
) -> list[Timing]:
    """All taps of a forward pass; stock adds each and joins them at the end."""
    H = model.hidden
    rows = [random(tokens, H, dtype=torch.bfloat16, seed=i) for i in range(2 * model.taps)]
    pairs = list(zip(rows[::2], rows[1::2], strict=True))
    features = torch.empty(tokens, model.taps * H, dtype=torch.bfloat16, device=DEVICE)
    op = torch.ops.vllm_dflash.tap_hidden_states

    def ours() -> None:
        for i, (hidden, residual) in enumerate(pairs):
            op(features, hidden, residual, i * H)

    def stock() -> None:
        torch.cat([hidden + residual for hidden, residual in pairs], dim=-1)

    contenders: dict[str, Call] = {"ours": ours, "stock": stock}
    if triton is not None:

        def by_triton() -> None:
            for i, (hidden, residual) in enumerate(pairs):
                triton.tap_hidden_states(features, hidden, residual, i * H)

        contenders["triton"] = by_triton
    base = {"op": f"{model.taps} x tap_hidden_states", "model": model.name, "tokens": tokens}
    return compare({**base, "bytes": model.taps * tokens * H * 2 * 3}, contenders, rounds, copy)


def time_build_block(
    tokens: int, rounds: int, copy: float | None, kernel: Any, triton: Any
) -> list[Timing]:
    """1 token: one request; 16: one; then 16 and 256 requests of 16, and one prompt of 32768."""
    requests = {256: 16, 4096: 256}.get(tokens, 1)
    lens = [tokens // requests] * requests
    case = block_case(lens, [n // 2 for n in lens], max_tokens=max(8192, tokens), max_requests=256)
    ours = our_op("build_block")
    contenders: dict[str, Call] = {
        "ours": lambda: ours(case),
        "stock": stock_build_block(case, kernel),
    }
    if triton is not None:
        contenders["triton"] = lambda: call(triton.build_block, case)
    outputs = (
        "_out",
        "input_ids",
        "query_",
        "context_",
        "sample_",
        "block_start_loc",
        "block_seq_lens",
    )
    moved = tokens * 8 + sum(
        v.numel() * v.element_size()
        for k, v in case.items()
        if isinstance(v, Tensor) and any(o in k for o in outputs)
    )
    base = {
        "op": "build_block",
        "model": f"{requests} x {tokens // requests}",
        "tokens": tokens,
        "bytes": moved,
    }
    return compare(base, contenders, rounds, copy)


# --- report --------------------------------------------------------------------------------------


def print_timings(timings: list[Timing]) -> None:
    names = ("ours", "stock", "triton")
    head = f"{'op':28}{'model':22}{'tokens':>7} {'mode':6}{'MB':>9}" + "".join(
        f"{n + ' us':>11}" for n in names
    )
    print(head + f"{'GB/s':>8}{'of copy':>9}  stock / ours")
    for t in timings:
        row = f"{t.op:28}{t.model:22}{t.tokens:>7} {t.mode:6}{t.bytes / 1e6:>9.2f}"
        row += "".join(f"{t.micros[n]:>11.1f}" if n in t.micros else f"{'-':>11}" for n in names)
        row += f"{t.gbps:>8.0f}" + (
            f"{t.copy_share:>9.0%}" if t.copy_share is not None else f"{'-':>9}"
        )
        row += "  {:.2f} ({:.2f} to {:.2f})".format(*t.speedup) if t.speedup else "  -"
        print(row)
    problems = {
        f"{t.op} {t.model} {t.tokens} {name}: {why}"
        for t in timings
        for name, why in t.failed.items()
    }
    for problem in sorted(problems):
        print("failed:", problem)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out",
        "-o",
        type=Path,
        help="JSON file, such as benchmarks/results/ops_bf16_h100_DATE.json",
    )
    parser.add_argument("--checks-only", action="store_true")
    parser.add_argument(
        "--largest", type=int, default=sys.maxsize, help="leave out checks of more tokens than this"
    )
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    # Measuring a fallback by accident would be worse than an error.
    if ON_GPU:
        os.environ.setdefault("VLLM_DFLASH_OPS", "cuda")
    torch.set_grad_enabled(False)

    began = time.monotonic()
    print(ops.load().describe(), flush=True)
    checks = check_all(args.largest)
    bad = [check for check in checks if check.problem]
    for check in bad:
        print(f"WRONG {check.op} {check.case}: {check.problem}")
    worst = {op: max(c.error for c in checks if c.op == op) for op in {c.op: None for c in checks}}
    print(
        f"{len(checks)} checks, {len(bad)} wrong, {time.monotonic() - began:.0f} s; largest error {worst}",
        flush=True,
    )
    report: dict[str, Any] = {
        "versions": versions(),
        "machine": describe_machine(),
        "cuda": torch.version.cuda,
        "device": torch.cuda.get_device_name() if ON_GPU else "cpu",
        "ops": ops.load().describe(),
        "checks": {"run": len(checks), "wrong": [asdict(c) for c in bad], "largest_error": worst},
    }
    timings: list[Timing] = []
    if not args.checks_only:
        kernels, block_kernel, stock = vllm_kernels()
        copy_gbps = copy_bandwidth()
        print(f"stock: {stock}\ncopy: {copy_gbps:.0f} GB/s", flush=True)
        timings = list(time_all(args.rounds, copy_gbps, kernels, block_kernel))
        report |= {"stock": stock, "copy_gbps": copy_gbps, "timings": [asdict(t) for t in timings]}
        report["gpu_measured"] = ON_GPU
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(report, args.out)
    print(f"{time.monotonic() - began:.0f} s in all")
    if timings:
        print_timings(timings)
    if not ON_GPU:
        print("There is no GPU here: the figures are the CPU's, and the GPU part is unmeasured.")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
