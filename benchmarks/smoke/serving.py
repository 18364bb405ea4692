"""Part 3: are outputs the verifier's own and drafts stock's, on the V2 runner as it serves?

Every mode serves the same prompts in float32 at several concurrencies, the largest beyond what the graphs
hold, with prompts cut into chunks. Several engines start together: they are small, compiling takes longest.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from smoke.engine import Engine
from smoke.models import TINY_DRAFT, VOCAB, make_drafter, make_verifier, random_prompts
from smoke.rows import Context, need

#: What each mode adds to ``--speculative-config``; None: no speculation.
MODES: dict[str, dict[str, Any] | None] = {
    "none": None,
    "stock": {},
    "ours fixed": {"dflash_draft_length": "fixed"},
    "ours auto": {},
    "ours without ops": {"dflash_draft_length": "fixed", "dflash_ops": False},
}
#: What is served: verifier, further engine arguments, modes.
SETS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "qwen3": ("qwen3", {}, tuple(MODES)),
    "mamba2 hybrid": ("mamba2", {}, ("none", "stock", "ours fixed", "ours auto")),
    "qwen3, fp8 KV": (
        "qwen3",
        {"kv_cache_dtype": "fp8"},
        ("none", "stock", "ours fixed", "ours auto"),
    ),
}
#: What is rehearsed of the sets behind the first.
REHEARSED = ("none", "ours fixed")
#: Share of drafts that may differ from stock's: near ties, which another order of sums decides.
NEAR_TIES = 0.01


def run(context: Context) -> None:
    """Per set: a row for each engine and one for drafts."""
    need("vllm")
    for name, (verifier_name, extra, modes) in SETS.items():
        if context.rehearse and name != "qwen3":
            modes = REHEARSED
        verifier = make_verifier(context.folder / verifier_name, verifier_name)
        drafter = make_drafter(context.folder / f"{verifier_name}-drafter", verifier)
        engine = {**engine_args(context.rehearse), "model": str(verifier), **extra}
        configs = {mode: config(engine, mode, str(drafter), context.rehearse) for mode in modes}
        report(context, name, serve_all(context, name, configs))


def engine_args(rehearse: bool) -> dict[str, Any]:
    """Of every engine; graphs, runner and scheduling are vLLM's defaults."""
    args: dict[str, Any] = {
        "dtype": "float32",
        "max_model_len": 512,
        "max_num_seqs": 64,
        "max_num_batched_tokens": 1024,
        "enable_prefix_caching": False,
        "skip_tokenizer_init": True,
        "disable_log_stats": False,
        "gpu_memory_utilization": 0.08,
        "kv_cache_memory_bytes": 2**30,
    }
    if rehearse:
        args |= {"max_model_len": 128, "max_num_seqs": 4, "max_num_batched_tokens": 64}
        args |= {"enforce_eager": True, "kv_cache_memory_bytes": 2**26}
    return args


def config(engine: dict[str, Any], mode: str, drafter: str, interpreted: bool) -> dict[str, Any]:
    """Of an :class:`Engine`."""
    added = MODES[mode]
    speculative = None
    if added is not None:
        speculative = {"method": "dflash", "model": drafter, "num_speculative_tokens": TINY_DRAFT}
        speculative |= added
    return {
        "engine": {**engine, "speculative_config": speculative},
        "plugin": mode.startswith("ours"),
        "interpreted": interpreted,
        "record": mode in ("stock", "ours fixed", "ours without ops"),
    }


def serve_all(
    context: Context, name: str, configs: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """By mode what the engine is and said, or ``{"error": ...}``; a few engines at a time."""
    cores = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(max(2, cores // 3)) as pool:
        futures = {
            mode: pool.submit(serve_one, context, f"{name}, {mode}", given)
            for mode, given in configs.items()
        }
        return {mode: future.result() for mode, future in futures.items()}


def serve_one(context: Context, name: str, given: dict[str, Any]) -> dict[str, Any]:
    log = context.folder / "logs" / f"serving-{name.replace(', ', '-').replace(' ', '_')}.log"
    engine = Engine(name, given, log)
    try:
        about = engine.answer(context.left_s)
        outputs, drafts, accepted = {}, {}, 0.0
        for concurrency, count, length in loads(context.rehearse):
            command = {
                "name": str(concurrency),
                "prompts": random_prompts(count, length, VOCAB),
                "max_tokens": 6 if context.rehearse else 48,
                "concurrency": concurrency,
            }
            answer = engine.ask(command, context.left_s)
            outputs[concurrency] = answer["outputs"]
            accepted += answer["num_accepted"]
            for draft in answer["drafts"]:
                drafts[f"{concurrency}/{draft['key']}", draft["anchor"]] = draft
        return {**about, "outputs": outputs, "drafts": drafts, "accepted": accepted}
    except RuntimeError as error:
        return {"error": str(error)}
    finally:
        engine.close()


def loads(rehearse: bool) -> list[tuple[int, int, tuple[int, int]]]:
    """Requests in flight, prompts, and the lengths of those."""
    if rehearse:
        return [(1, 1, (8, 12)), (3, 3, (10, 40))]
    return [(1, 4, (16, 300)), (8, 16, (16, 300)), (40, 60, (16, 300))]


def report(context: Context, name: str, results: dict[str, dict[str, Any]]) -> None:
    """Says what came of a set."""
    plain = results["none"]
    for mode, result in results.items():
        case = f"{name}, {mode}"
        if "error" in result:
            # What vLLM alone refuses is no fault of ours.
            alone = mode in ("none", "stock") or "error" in plain
            context.say(case, "unavailable" if alone else "failed", result["error"])
            continue
        about = {key: result[key] for key in ("start_s", "v2", "async", "graphs") if key in result}
        problems = []
        if not result["v2"]:
            problems.append("served by the V1 runner")
        if mode.startswith("ours") and not (result["proposer"] or "").startswith("vllm_dflash"):
            problems.append(f"drafted by {result['proposer']}")
        if "outputs" in plain:
            pairs = [
                (mine, its)
                for concurrency, outputs in result["outputs"].items()
                for mine, its in zip(outputs, plain["outputs"][concurrency], strict=True)
            ]
            differing = sum(mine != its for mine, its in pairs)
            about |= {"outputs": len(pairs), "differ_from_none": differing}
            if differing:
                problems.append(f"{differing} of {len(pairs)} outputs differ from no speculation's")
        context.check(case, "; ".join(problems), **about, accepted=result.get("accepted", 0))
    for mode in ("ours fixed", "ours without ops"):
        if "drafts" in results.get(mode, {}) and "drafts" in results.get("stock", {}):
            compare_drafts(context, f"{name}, drafts of {mode}", results[mode], results["stock"])


def compare_drafts(
    context: Context, case: str, ours: dict[str, Any], stock: dict[str, Any]
) -> None:
    """Drafts behind the same token at the same place must be the same."""
    both = [(draft, stock["drafts"].get(key)) for key, draft in ours["drafts"].items()]
    pairs = [(o["drafts"], s["drafts"]) for o, s in both if s and s["token"] == o["token"]]
    differing = sum(o != s for o, s in pairs)
    problem = ""
    if not pairs:
        problem = "no draft of ours is at a place where stock drafted"
    elif differing > NEAR_TIES * len(pairs):
        problem = f"{differing} of {len(pairs)} drafts differ from stock's"
    context.check(case, problem, drafts=len(pairs), differ_from_stock=differing)
