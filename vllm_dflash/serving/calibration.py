"""What a step costs on this machine: measured at start by dummy steps, kept for the next start."""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vllm_dflash.draft_length.cost import StepCost

logger = logging.getLogger("vllm.vllm_dflash")
#: Numbers of tokens that are measured; costs between them are taken to be on straight lines.
_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_ROUNDS = 5
#: Other load only ever adds time, so the fast rounds count.
_QUANTILE = 0.25
_CONTEXT = 1024


def measured(proposer: Any, path: Path) -> StepCost:
    """The costs kept at ``path``, else measured now and kept there.

    Every rank of a tensor parallel engine must get here: the dummy steps are joint work.
    """
    kept = _read(path)
    if proposer.vllm_config.parallel_config.tensor_parallel_size > 1:
        from vllm.distributed.parallel_state import get_tp_group

        # A rank on a fresh disk would measure alone.
        kept = get_tp_group().broadcast_object(kept)
    if kept is not None:
        return kept
    began = time.perf_counter()
    cost = calibrate(proposer)
    write(cost, path)
    logger.info(
        "vllm-dflash measured its steps in %.1f s: %.1f ms for 1 token, %.1f ms for %d; a draft pass %.1f ms",
        time.perf_counter() - began,
        1e3 * float(cost.step(1, 1, 0)),
        1e3 * float(cost.step(int(cost.tokens_N[-1]), 1, 0)),
        cost.tokens_N[-1],
        1e3 * cost.draft(proposer.max_query_len),
    )
    return cost


def _read(path: Path) -> StepCost | None:
    try:
        return StepCost.from_dict(json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except ValueError as error:
        logger.warning("vllm-dflash measures its steps anew: %s: %s", path, error)
        return None


def write(cost: StepCost, path: Path) -> None:
    """Keeps costs for the next start, which takes longer where they cannot be kept."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, prefix=path.stem, delete=False
        ) as part:
            json.dump(cost.as_dict(), part)
        os.replace(part.name, path)
    except OSError as error:
        logger.warning("vllm-dflash cannot keep the measured costs of its steps: %s", error)


@torch.inference_mode()
def calibrate(proposer: Any) -> StepCost:
    """Times dummy steps of the verifier and dummy draft passes."""
    runner = proposer.runner
    config = proposer.vllm_config
    requests = config.scheduler_config.max_num_seqs
    most = min(requests * proposer.max_query_len, config.scheduler_config.max_num_batched_tokens)
    sizes = sorted({*(n for n in _TOKENS if n < most), most})
    context = min(_CONTEXT, config.model_config.max_model_len // 2)
    batch = min(requests, 8)
    wide = min(batch * proposer.max_query_len, most)

    def step(num_tokens: int, **attention: Any) -> Callable[[], None]:
        rows = num_tokens
        if config.lora_config is not None:
            # vLLM maps as many rows of logits to adapters as the dummy step has requests; what more cost
            # shows while serving.
            blocks = attention.get("uniform_decode", False)
            rows = min(num_tokens // proposer.max_query_len if blocks else num_tokens, requests)

        def run() -> None:
            proposer.dummy_drafts = False
            try:
                hidden, _ = runner._dummy_run(
                    num_tokens, skip_eplb=True, randomize_inputs=True, **attention
                )
            finally:
                proposer.dummy_drafts = True
            runner.model.compute_logits(hidden[:rows])

        return run

    def draft(num_requests: int) -> Callable[[], None]:
        def run() -> None:
            queries = num_requests * proposer.max_query_len
            proposer.dummy_run(queries)
            drafted = num_requests * proposer.num_speculative_tokens
            proposer.model.greedy_draft_tokens(proposer.hidden_states[:drafted], confidence=True)

        return run

    jobs: dict[Any, Callable[[], None]] = {n: step(n) for n in sizes}
    # One token a request, then a block of them, both with context: the cost of a token of context, and
    # of a pair of a token and one.
    near = {"force_attention": True, "profile_seq_lens": proposer.max_query_len}
    far = {"force_attention": True, "profile_seq_lens": context}
    jobs |= {
        "narrow, near": step(batch, **near),
        "narrow, far": step(batch, **far),
        "wide, near": step(wide, uniform_decode=True, **near),
        "wide, far": step(wide, uniform_decode=True, **far),
        "draft 1": draft(1),
        "draft all": draft(batch),
    }
    seconds = {name: _quantile(times) for name, times in _alternating(jobs).items()}
    blocks = wide / proposer.max_query_len
    narrow = max(seconds["narrow, far"] - seconds["narrow, near"], 0.0)
    wider = max(seconds["wide, far"] - seconds["wide, near"], 0.0)
    # seconds = (per_context + per_pair * tokens of a request) * context of all requests
    one = narrow / (batch * context)
    block = wider / (blocks * context)
    per_pair = max((block - one) / max(proposer.max_query_len - 1, 1), 0.0)
    per_context = max(one - per_pair, 0.0)
    queries = (batch - 1) * proposer.max_query_len
    per_query = (seconds["draft all"] - seconds["draft 1"]) / queries if queries else 0.0
    per_query = max(per_query, 0.0)
    fixed = max(seconds["draft 1"] - per_query * proposer.max_query_len, 1e-6)
    return StepCost(
        sizes,
        [seconds[n] for n in sizes],
        per_context=per_context,
        per_pair=per_pair,
        draft=(fixed, per_query),
        max_tokens=most,
    )


def _alternating(jobs: dict[Any, Callable[[], None]]) -> dict[Any, list[float]]:
    """Times of each job; in turns, so that a neighbour who wakes up slows all of them alike."""
    for run in jobs.values():
        run()
    times: dict[Any, list[float]] = {name: [] for name in jobs}
    for _ in range(_ROUNDS):
        for name, run in jobs.items():
            torch.accelerator.synchronize()
            began = time.perf_counter()
            run()
            torch.accelerator.synchronize()
            times[name].append(time.perf_counter() - began)
    return times


def _quantile(times: list[float]) -> float:
    return float(np.quantile(times, _QUANTILE))
