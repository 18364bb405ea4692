"""Part 5: Qwen3-8B's shape with dummy weights: ms a step in each mode, a profile, and calibration's costs.

Nothing that the dummy drafter drafts is accepted, so tokens a second of the drafting modes are the worst
case: chosen lengths should come near to no speculation at all.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

from transformers import AutoConfig

from smoke.engine import Engine
from smoke.models import (
    QWEN3_8B,
    TINY_DRAFT,
    VOCAB,
    make_drafter,
    make_verifier,
    random_prompts,
    write_shapes,
)
from smoke.rows import Context, need
from vllm_dflash.bench.sharing import Device
from vllm_dflash.training import verifier_memory

DRAFT = 15
MODES: dict[str, dict[str, Any] | None] = {
    "none": None,
    "ours fixed": {"dflash_draft_length": "fixed"},
    "ours auto": {},
    "stock": {},
    "adaptive": {"enable_adaptive_verification": True},
}
PROMPT, OUTPUT = 256, 96
#: In flight.
BATCHES = (1, 8, 32)
#: What an engine needs beyond weights and KV cache, in GiB: activations, graphs, the device's context.
BESIDE = 3.0
_GIB = 2**30


def run(context: Context) -> None:
    """A row for each mode, one for the profile and one for the costs."""
    need("vllm")
    if context.rehearse:  # vLLM's CPU backend packs weights away before dummy ones are fused
        verifier = make_verifier(context.folder / "qwen3", "qwen3")
        drafter = make_drafter(context.folder / "qwen3-drafter", verifier)
    else:
        verifier, drafter = write_shapes(context.folder)
    gib, device = engine_gib(str(verifier), context.rehearse), Device.here()
    at_once = max(1, int(0.95 * device.free / _GIB / gib)) if not context.rehearse else 2
    names, results, costs = list(MODES), {}, []
    for first in range(0, len(names), at_once):
        group = names[first : first + at_once]
        engines: dict[str, Engine] = {}
        for mode in group:
            if context.rehearse and mode == "adaptive":
                context.say(
                    mode, "unavailable", "vLLM has it on the V2 runner only, V1 is rehearsed"
                )
                continue
            given = config(mode, verifier, drafter, gib * _GIB / device.total, context.rehearse)
            log = context.folder / "logs" / f"speed-{mode.replace(' ', '_')}.log"
            engines[mode] = Engine(mode, given, log)
        try:
            with ThreadPoolExecutor(len(group)) as pool:
                ready = {m: pool.submit(_ready, e, context.left_s) for m, e in engines.items()}
                about = {mode: future.result() for mode, future in ready.items()}
            for mode, engine in engines.items():
                results[mode] = measure(context, mode, engine, about[mode])
                costs = about[mode].get("costs") or costs
        finally:
            for engine in engines.values():
                engine.close()
    compare(context, results, costs)


def engine_gib(verifier: str, rehearse: bool) -> float:
    """Of one engine: weights of both models in 16 bits, KV cache of the largest batch, and the rest."""
    if rehearse:
        return 0.5
    shape = AutoConfig.from_pretrained(verifier)
    hidden, width = QWEN3_8B["hidden_size"], QWEN3_8B["head_dim"]
    heads = 2 * (QWEN3_8B["num_attention_heads"] + QWEN3_8B["num_key_value_heads"])
    layer = hidden * width * heads + 3 * hidden * QWEN3_8B["intermediate_size"]
    weights = (shape.num_hidden_layers + 5) * layer + (2 * shape.vocab_size + 5 * hidden) * hidden
    return (2 * weights + kv_bytes(shape)) / _GIB + BESIDE


def kv_bytes(shape: Any) -> int:
    """KV cache of verifier and drafter for the largest batch, with room for drafts and whole blocks."""
    tokens, layers = PROMPT + OUTPUT + 3 * (DRAFT + 1), shape.num_hidden_layers
    of_one = verifier_memory.kv_bytes(shape, tokens, budget=tokens, ranks=1)
    return 2 * max(BATCHES) * of_one * (layers + 5) // layers


def config(
    mode: str, verifier: Any, drafter: Any, utilization: float, rehearse: bool
) -> dict[str, Any]:
    """Of an :class:`Engine`."""
    speculative, added = None, MODES[mode]
    if added is not None:
        speculative = {"method": "dflash", "model": str(drafter), "num_speculative_tokens": DRAFT}
        speculative |= added
        if mode.startswith("ours"):
            # Dummy weights need not look like a drafter's.
            speculative["dflash_check"] = False
    shape = AutoConfig.from_pretrained(verifier)
    engine: dict[str, Any] = {
        "model": str(verifier),
        "load_format": "dummy",
        "dtype": "bfloat16",
        "max_model_len": 1024,
        "max_num_seqs": max(BATCHES),
        "max_num_batched_tokens": 2048,
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
        "disable_log_stats": False,
        "gpu_memory_utilization": min(round(utilization, 3), 0.9),
        "kv_cache_memory_bytes": kv_bytes(shape),
        "speculative_config": speculative,
        # The sizes that are measured, not all fifty: capturing them is most of a start.
        "compilation_config": {
            "cudagraph_capture_sizes": sorted(
                {n * w for n in (1, 2, 4, 8, 16, 32) for w in (1, 16)}
            )
        },
    }
    if rehearse:
        engine |= {"enforce_eager": True, "kv_cache_memory_bytes": 2**26, "max_model_len": 256}
        engine |= {"max_num_seqs": 4, "max_num_batched_tokens": 256}
        del engine["compilation_config"], engine["load_format"]
        if speculative is not None:
            speculative["num_speculative_tokens"] = TINY_DRAFT
    return {
        "engine": engine,
        "plugin": mode.startswith("ours"),
        "interpreted": False,
        "record": False,
    }


def _ready(engine: Engine, seconds: float) -> dict[str, Any]:
    try:
        return engine.answer(seconds)
    except RuntimeError as error:
        return {"error": str(error)}


def measure(context: Context, mode: str, engine: Engine, about: dict[str, Any]) -> dict[int, Any]:
    """Reports a mode; returns what it said, by number of requests."""
    if "error" in about:
        alone = mode in ("none", "stock", "adaptive")
        context.say(mode, "unavailable" if alone else "failed", about["error"])
        return {}
    figures: dict[str, Any] = {k: about[k] for k in ("start_s", "v2", "async", "graphs")}
    results: dict[int, Any] = {}
    vocab = VOCAB if context.rehearse else QWEN3_8B["vocab_size"]
    try:
        for batch in (1, 2) if context.rehearse else BATCHES:
            prompt = 16 if context.rehearse else PROMPT
            command = {
                "name": f"{mode}-{batch}",
                "prompts": random_prompts(batch, (prompt, prompt), vocab),
                "max_tokens": 12 if context.rehearse else OUTPUT,
                "concurrency": batch,
            }
            # What is met for the first time is not measured.
            for _ in range(2):
                answer = engine.ask(command, context.left_s)
            results[batch] = answer
            figures[f"ms a step at {batch}"] = answer["step_ms"]
            figures[f"tokens/s at {batch}"] = answer["tokens_per_s"]
        context.say(mode, "ok", **figures)
        if mode == "ours fixed":
            command = {"profile": True, "prompts": command["prompts"]}
            context.say(f"profile of {mode}", "ok", **_profile(engine.ask(command, context.left_s)))
    except RuntimeError as error:
        context.say(mode, "failed", str(error), **figures)
    return results


def _profile(answer: dict[str, Any]) -> dict[str, Any]:
    return {name: answer[name] for name in ("step_ms", "busy", "kernels")}


def compare(
    context: Context, results: dict[str, dict[int, Any]], costs: list[dict[str, Any]]
) -> None:
    """Chosen lengths beside no speculation, and calibration's costs beside measured steps."""
    none, auto, fixed = (results.get(m, {}) for m in ("none", "ours auto", "ours fixed"))
    batches = [b for b in none if b in auto]
    if batches:
        shares = {
            f"at {b}": round(auto[b]["tokens_per_s"] / none[b]["tokens_per_s"], 3) for b in batches
        }
        context.say("auto over none", "ok", **shares)
    if not costs:
        context.say("costs", "unavailable", "calibration gave none")
        return
    for cost in costs:
        batch = cost["requests"]
        measured = {"calibrated_step_ms": round(cost["step_ms"], 3)}
        measured["calibrated_draft_ms"] = round(cost["draft_ms"], 3)
        if batch in none:
            measured["measured_step_ms"] = none[batch]["step_ms"]
        if batch in fixed and batch in none:
            measured["measured_drafting_step_ms"] = fixed[batch]["step_ms"]
        context.say(f"costs at {batch}", "ok", **measured)
