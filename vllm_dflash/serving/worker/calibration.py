"""What a step costs on this machine: measured at start by dummy steps, kept for the next start."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from vllm import envs
from vllm.distributed.parallel_state import get_tp_group
from vllm.platforms import current_platform

from vllm_dflash import __version__
from vllm_dflash.draft_length.cost import StepCost

logger = logging.getLogger("vllm.vllm_dflash")
#: Numbers of tokens that are measured; costs between them are taken to be on straight lines.
_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_ROUNDS = 5
#: Other load only ever adds time, so the fast rounds count.
_QUANTILE = 0.25
_CONTEXT = 1024


class Runs(Protocol):
    """The dummy steps of one runner.

    Attributes:
        vllm_config: vLLM's.
        width: query tokens of a request in a draft pass.
        draft_has_step: whether :meth:`draft` also runs the verifier for as many tokens as the pass has.
    """

    vllm_config: Any
    width: int
    draft_has_step: bool

    def step(self, num_tokens: int, context: int = 0, blocks: bool = False) -> Callable[[], None]:
        """A step of the verifier: one token a request, or a block each, with a context of so many tokens."""

    def draft(self, num_requests: int) -> Callable[[], None]:
        """A draft pass."""


class RunsV1:
    """Dummy steps of vLLM's V1 runner.

    Args:
        proposer: ours, with its runner.
    """

    draft_has_step = False

    def __init__(self, proposer: Any) -> None:
        self.proposer, self.vllm_config = proposer, proposer.vllm_config
        self.width = proposer.max_query_len

    def step(self, num_tokens: int, context: int = 0, blocks: bool = False) -> Callable[[], None]:
        """See :class:`Runs`."""
        proposer, runner = self.proposer, self.proposer.runner
        rows = num_tokens
        if self.vllm_config.lora_config is not None:
            # vLLM maps as many rows of logits to adapters as the dummy step has requests; what more cost
            # shows while serving.
            most = self.vllm_config.scheduler_config.max_num_seqs
            rows = min(num_tokens // self.width if blocks else num_tokens, most)
        attention: dict[str, Any] = {}
        if context:
            attention = {"force_attention": True, "profile_seq_lens": context}

        def run() -> None:
            proposer.dummy_drafts = False
            try:
                hidden, _ = runner._dummy_run(
                    num_tokens,
                    skip_eplb=True,
                    randomize_inputs=True,
                    uniform_decode=blocks,
                    **attention,
                )
            finally:
                proposer.dummy_drafts = True
            _compute_logits(runner.model, hidden[:rows], self.vllm_config)

        return run

    def draft(self, num_requests: int) -> Callable[[], None]:
        """See :class:`Runs`."""
        proposer = self.proposer

        def run() -> None:
            proposer.dummy_run(num_requests * self.width)
            drafted = num_requests * proposer.num_speculative_tokens
            proposer.model.greedy_draft_tokens(proposer.hidden_states[:drafted], confidence=True)

        return run


class RunsV2:
    """Dummy steps of vLLM's V2 runner, which end with a draft pass unless ours leaves it out.

    Args:
        runner: vLLM's, with our speculator.
    """

    draft_has_step = True

    def __init__(self, runner: Any) -> None:
        self.runner, self.vllm_config = runner, runner.vllm_config
        self.width = runner.decode_query_len

    def step(self, num_tokens: int, context: int = 0, blocks: bool = False) -> Callable[[], None]:
        """See :class:`Runs`."""
        return self._run(num_tokens, context, blocks, drafts=False)

    def draft(self, num_requests: int) -> Callable[[], None]:
        """See :class:`Runs`."""
        return self._run(num_requests * self.width, 0, True, drafts=True)

    def _run(self, num_tokens: int, context: int, blocks: bool, drafts: bool) -> Callable[[], None]:
        runner = self.runner

        def run() -> None:
            runner.speculator.dummy_drafts = drafts
            try:
                hidden, sampled = runner._dummy_run(
                    num_tokens,
                    skip_eplb=True,
                    randomize_inputs=True,
                    uniform_decode=blocks,
                    context_len=context,
                )
            finally:
                runner.speculator.dummy_drafts = True
                # vLLM leaves it disabled where a dummy step fails, and this server goes on.
                runner.kv_connector.set_disabled(False)
            # A row of logits for each request is what vLLM maps to adapters.
            lora = self.vllm_config.lora_config is not None
            rows = sampled if lora else hidden[:num_tokens]
            _compute_logits(runner.model, rows, self.vllm_config)

        return run


def _compute_logits(model: Any, hidden: Tensor, vllm_config: Any) -> None:
    """Logits of all rows ``[n, H]``, no more at once than vLLM's memory profile has: one a sequence."""
    for rows in hidden.split(vllm_config.scheduler_config.max_num_seqs):
        model.compute_logits(rows)


def costs_file(vllm_config: Any) -> Path:
    """Where the measured costs of this configuration on this machine are kept, beside vLLM's own caches."""
    machine = (
        current_platform.get_device_name(),
        os.environ.get("OMP_NUM_THREADS", ""),
        len(os.sched_getaffinity(0)),
        torch.get_num_threads(),
    )
    scheduler = vllm_config.scheduler_config
    spec = vllm_config.speculative_config
    parts = (
        __version__,
        torch.__version__,
        vllm_config.compute_hash(),
        str(vllm_config.model_config.model),
        str(spec.model),
        spec.num_speculative_tokens,
        scheduler.max_num_seqs,
        machine,
    )
    key = hashlib.sha256(repr(parts).encode()).hexdigest()[:20]
    return Path(envs.VLLM_CACHE_ROOT) / "vllm_dflash" / "step_costs" / f"{key}.json"


def measured(runs: Runs, path: Path) -> StepCost:
    """The costs kept at ``path``, else measured now and kept there.

    Every rank of a tensor parallel engine must get here: the dummy steps are joint work.
    """
    kept = _read(path)
    if runs.vllm_config.parallel_config.tensor_parallel_size > 1:
        # A rank on a fresh disk would measure alone.
        kept = get_tp_group().broadcast_object(kept)
    if kept is not None:
        return kept
    began = time.perf_counter()
    try:
        cost = calibrate(runs)
    finally:
        if torch.accelerator.is_available():
            # The allocator would keep what dummy steps took from NCCL, cuBLAS and other processes.
            torch.accelerator.empty_cache()
    write(cost, path)
    logger.info(
        "vllm-dflash measured its steps in %.1f s: %.1f ms for 1 token, %.1f ms for %d; a draft pass %.1f ms",
        time.perf_counter() - began,
        1e3 * float(cost.step(1, 1, 0)),
        1e3 * float(cost.step(int(cost.tokens_N[-1]), 1, 0)),
        cost.tokens_N[-1],
        1e3 * cost.draft(runs.width),
    )
    return cost


def measured_if_possible(runs: Runs, path: Path) -> StepCost | None:
    """:func:`measured`; None where that fails on this rank.

    A server that could draft a fixed number of tokens must not end for want of a better number. The log has
    the error.
    """
    try:
        return measured(runs, path)
    except Exception:
        logger.exception("vllm-dflash cannot measure its steps and drafts a fixed number of tokens")
        return None


def _read(path: Path) -> StepCost | None:
    try:
        return StepCost.from_dict(json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
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
def calibrate(runs: Runs) -> StepCost:
    """Times dummy steps of the verifier and dummy draft passes."""
    config, width = runs.vllm_config, runs.width
    requests = config.scheduler_config.max_num_seqs
    most = min(requests * width, config.scheduler_config.max_num_batched_tokens)
    sizes = sorted({*(n for n in _TOKENS if n < most), most})
    context = min(_CONTEXT, config.model_config.max_model_len // 2)
    batch = min(requests, 8)
    wide = max(min(batch * width, most // width * width), width)
    step, draft = runs.step, runs.draft
    blocks = wide // width
    jobs: dict[Any, Callable[[], None]] = {n: step(n) for n in sizes}
    # One token a request, then a block of them, both with context: the cost of a token of context, and
    # of a pair of a token and one.
    jobs |= {
        "narrow, near": step(batch, width),
        "narrow, far": step(batch, context),
        "wide, near": step(wide, width, blocks=True),
        "wide, far": step(wide, context, blocks=True),
        "draft 1": draft(1),
        "draft all": draft(blocks),
    }
    if runs.draft_has_step:
        jobs |= {"block 1": step(width, blocks=True), "block all": step(wide, blocks=True)}
    seconds = {name: _quantile(times) for name, times in _alternating(jobs).items()}
    if runs.draft_has_step:
        for name in ("1", "all"):
            seconds[f"draft {name}"] = max(seconds[f"draft {name}"] - seconds[f"block {name}"], 0.0)
    narrow = max(seconds["narrow, far"] - seconds["narrow, near"], 0.0)
    wider = max(seconds["wide, far"] - seconds["wide, near"], 0.0)
    # seconds = (per_context + per_pair * tokens of a request) * context of all requests
    one = narrow / (batch * context)
    block = wider / (blocks * context)
    per_pair = max((block - one) / max(width - 1, 1), 0.0)
    per_context = max(one - per_pair, 0.0)
    queries = (blocks - 1) * width
    per_query = (seconds["draft all"] - seconds["draft 1"]) / queries if queries else 0.0
    per_query = max(per_query, 0.0)
    fixed = max(seconds["draft 1"] - per_query * width, 1e-6)
    return StepCost(
        sizes,
        [seconds[n] for n in sizes],
        per_context=per_context,
        per_pair=per_pair,
        draft=(fixed, per_query),
        max_tokens=most,
    )


def all_ranks(well: bool) -> bool:
    """Whether all tensor parallel ranks say so; joint work of theirs."""
    group = get_tp_group()
    if group.world_size == 1:
        return well
    said: list[Any] = [None] * group.world_size
    torch.distributed.all_gather_object(said, well, group=group.cpu_group)
    return all(said)


def _seconds(run: Callable[[], None]) -> float:
    """How long one job takes.

    Raises:
        RuntimeError: it failed on some rank. All ranks agree on that before the next one, in which those that
            are well would wait for the others forever.
    """
    failure: Exception | None = None
    began = time.perf_counter()
    try:
        torch.accelerator.synchronize()
        began = time.perf_counter()
        run()
        torch.accelerator.synchronize()
    except Exception as error:
        failure = error
    seconds = time.perf_counter() - began
    if not all_ranks(failure is None):
        what = "a dummy step failed" if failure else "a dummy step failed on another rank"
        raise RuntimeError(what) from failure
    return seconds


def _alternating(jobs: dict[Any, Callable[[], None]]) -> dict[Any, list[float]]:
    """Times of each job; in turns, so that a neighbour who wakes up slows all of them alike."""
    for run in jobs.values():
        _seconds(run)
    times: dict[Any, list[float]] = {name: [] for name in jobs}
    for _ in range(_ROUNDS):
        for name, run in jobs.items():
            times[name].append(_seconds(run))
    return times


def _quantile(times: list[float]) -> float:
    return float(np.quantile(times, _QUANTILE))
