"""Draft lengths that the scheduler chooses: on vLLM's V2 runner, and wherever scheduling is asynchronous.

Drafts stay on the device there: each step the scheduler says how many tokens of its draft go to the verifier
with each request, and whether the step ends with a draft pass at all (``num_spec_tokens_to_schedule``).
Both are vLLM's own quantities; here they follow :class:`~vllm_dflash.draft_length.ahead.Ahead`.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm_dflash.draft_length.ahead import Ahead, Slot
from vllm_dflash.options import Options
from vllm_dflash.serving import draft_limits, handover
from vllm_dflash.serving.draft_stats import (
    DraftStats,
    StatsFile,
    engine_name,
    make_stats,
    stats_file,
    verified_file,
)
from vllm_dflash.serving.seams import is_ours
from vllm_dflash.serving.verified import count_by_source, counting

logger = logging.getLogger("vllm.vllm_dflash")
#: Draft tokens a request with full CUDA graphs of their own: steps of 2, 4 and 8 tokens a request.
_GRAPH_LENGTHS = (1, 3, 7)


def wanted(vllm_config: Any) -> bool:
    """Whether draft lengths are to be chosen and the V1 proposer will not do it."""
    spec = vllm_config.speculative_config
    if spec is None or spec.method != "dflash":
        return False
    if not (vllm_config.use_v2_model_runner or vllm_config.scheduler_config.async_scheduling):
        return False
    return Options.from_additional_config(vllm_config.additional_config).draft_length == "auto"


def unsupported(vllm_config: Any) -> str | None:
    """Why the scheduler cannot choose; None where it can. The same in the engine core and its workers."""
    spec, parallel = vllm_config.speculative_config, vllm_config.parallel_config
    if not is_ours(spec):
        return f"vLLM serves {spec.model} with a drafter class of its own"
    if getattr(spec, "enable_adaptive_verification", False):
        # The scheduler would count tokens that were not verified as wrong.
        return "vLLM's adaptive verification chooses what of them is verified"
    if parallel.data_parallel_size > 1:
        return "data parallel engines must draft in step"
    if parallel.pipeline_parallel_size > 1:
        return "with pipeline stages a step's requests are not those of the step before"
    if vllm_config.scheduler_config.scheduler_cls is not None:
        return f"the scheduler is {vllm_config.scheduler_config.scheduler_cls}, not vLLM's"
    if getattr(spec, "dflash_stats", None) is None:
        return "its speculative configuration was not made by EngineArgs"
    return None


def chooses(vllm_config: Any) -> bool:
    """Whether the scheduler chooses draft lengths, if it learns what steps cost."""
    return wanted(vllm_config) and unsupported(vllm_config) is None


def graph_lengths(vllm_config: Any) -> tuple[int, ...]:
    """Draft tokens a request that full CUDA graphs are for on the V2 runner, beside 0 and all.

    Not with recurrent layers, whose graphs are made for all draft tokens, nor beside a batch-size table of
    the user's, which has lengths of its own.
    """
    spec = vllm_config.speculative_config
    if (
        not vllm_config.use_v2_model_runner
        or vllm_config.model_config.is_hybrid
        or not vllm_config.compilation_config.cudagraph_mode.has_full_cudagraphs()
        or spec.num_speculative_tokens_per_batch_size
    ):
        return ()
    return tuple(n for n in _GRAPH_LENGTHS if n < spec.num_speculative_tokens)


@dataclass(frozen=True)
class _Step:
    """A step that has been scheduled and is not done.

    Attributes:
        scheduled: when, by the clock.
        lengths: draft tokens by request, and its row of ``promised``.
        promised: how many of a row's first 0, 1, ... draft tokens are expected to be accepted; the last row
            is for requests of which nothing was promised.
        context: tokens of all requests in the cache.
        tokens: scheduled altogether.
        even: whether all requests had none or all of their draft tokens, or as many as there are graphs for.
        drafting: whether it ends with a draft pass.
    """

    scheduled: float
    lengths: dict[str, tuple[int, int]]
    promised: list[list[float]]
    context: float
    tokens: int
    even: bool
    drafting: bool


class EngineLengths:
    """What the scheduler knows, for the policy; what the policy says, for the scheduler.

    Args:
        scheduler: vLLM's.
        policy: chooses.
        stats: where the figures go.
        limit: tokens of a request behind which nothing is drafted.
    """

    def __init__(self, scheduler: Any, policy: Ahead, stats: DraftStats, limit: int) -> None:
        self.scheduler, self.policy, self.stats, self.limit = scheduler, policy, stats, limit
        #: Draft tokens of each request that the latest step ends with.
        self.num_drafted = policy.num_tokens
        self._rows: dict[str, int] = {}
        self._promised = [[0.0] * (policy.num_tokens + 1)]
        self._in_flight: dict[int, _Step] = {}
        self._updated = 0.0
        self._step: _Step | None = None
        self._drafted: bool | None = None
        #: Drafts of the step that is taken in, their tokens, those accepted, and those promised to be.
        self._verified = [0, 0, 0, 0.0]

    def trim(self) -> None:
        """Before a step is scheduled: leaves each request as much of its draft as is to be verified."""
        running = [r for r in self.scheduler.running if not r.is_prefill_chunk]
        self._rows, self._promised = {}, [[0.0] * (self.policy.num_tokens + 1)]
        if not any(r.spec_token_ids for r in running):
            return
        slots = [self._slot(r, len(r.spec_token_ids)) for r in running]
        chosen = self.policy.lengths(slots)
        self._rows = {r.request_id: row for row, r in enumerate(running)}
        promised = np.zeros((len(running) + 1, self.policy.num_tokens + 1))
        np.cumsum(chosen.promised_BK, axis=1, out=promised[:-1, 1:])
        self._promised = promised.tolist()
        for request, length in zip(running, chosen.lengths, strict=True):
            if length < len(request.spec_token_ids):
                # Not in place: vLLM's asynchronous scheduler gives all requests one list.
                request.spec_token_ids = list(request.spec_token_ids[:length])

    def scheduled(self, output: Any) -> None:
        """After a step has been scheduled: whether it ends with a draft pass."""
        scheduler = self.scheduler
        if not output.num_scheduled_tokens:
            return
        drafts = output.scheduled_spec_decode_tokens
        limit = output.num_spec_tokens_to_schedule
        slots, lengths, context, even = [], {}, 0, set()
        for name, tokens in output.num_scheduled_tokens.items():
            request = scheduler.requests[name]
            length = len(drafts.get(name, ()))
            lengths[name] = (length, self._rows.get(name, -1))
            even.add(length)
            context += request.num_computed_tokens
            known = request.num_tokens + request.num_output_placeholders
            if request.num_computed_tokens + tokens >= known:
                slots.append(self._slot(request, limit, tokens))
        drafting = limit > 0 and self.policy.draft(slots)
        if not drafting:
            output.num_spec_tokens_to_schedule = 0
        before, self.num_drafted = self.num_drafted, limit if drafting else 0
        self._in_flight[id(output)] = _Step(
            scheduled=time.perf_counter(),
            lengths=lengths,
            promised=self._promised,
            context=float(context),
            tokens=output.total_num_scheduled_tokens,
            even=len(even) == 1 and even <= {0, before, *self.policy.even_lengths},
            drafting=drafting,
        )

    def _slot(self, request: Any, drafted: int, tokens: int = 0) -> Slot:
        """A request as the policy sees it.

        Args:
            drafted: draft tokens that it has, or will have.
            tokens: those of the step just scheduled, where it is about the drafts behind that.
        """
        # Each step brings a token at least, and the verifier's own is the last one.
        coming = (tokens > 0) + (request.num_output_placeholders > 0)
        most = request.max_tokens - request.num_output_tokens - coming - 1
        context = request.num_computed_tokens + tokens
        most = min(most, self.limit - context - 1)
        limit = draft_limits.request_limit(
            request.sampling_params, request.num_output_tokens, request.num_output_placeholders
        )
        most = most if limit is None else min(most, limit)
        return Slot(request.request_id, context, drafted, max(most, 0))

    def done(self, output: Any, result: Any) -> None:
        """Before a step's result is taken in: learns from it."""
        now = time.perf_counter()
        step = self._step = self._in_flight.pop(id(output), None)
        if step is None:
            return
        invalid = output.num_invalid_spec_tokens or {}
        emitted = drafts = accepted = 0
        names: list[str] = []
        lengths: list[int] = []
        kept: list[int] = []
        promised: list[float] = []
        sampled = result.sampled_token_ids
        for name, (length, row_of) in step.lengths.items():
            request = self.scheduler.requests.get(name)
            row = result.req_id_to_index.get(name)
            if request is None or request.is_finished() or row is None or not sampled:
                continue
            tokens = len(sampled[row])
            if not tokens:  # part of a prompt
                continue
            emitted += tokens
            accepted += tokens - 1
            drafts += length
            # What a grammar excluded is in the step, but no evidence.
            checked = length - invalid.get(name, 0)
            names.append(name)
            lengths.append(checked)
            kept.append(tokens - 1)
            promised.append(step.promised[row_of][checked])
        self.policy.observe(names, lengths, kept, promised)
        requests = len(step.lengths)
        seconds = now - max(self._updated, step.scheduled)
        self.policy.totals.drafted_steps += step.drafting
        if step.tokens == requests + drafts and emitted >= requests:
            # The pass of this step or of the one before is in between, by how the device works.
            sure = self._drafted == step.drafting
            self.policy.observe_step(
                num_requests=requests,
                drafts=drafts,
                context=step.context,
                emitted=emitted,
                seconds=seconds,
                even=step.even,
                drafted=step.drafting if sure else None,
            )
        else:
            passed = self.policy.pass_seconds(requests) if step.drafting else 0.0
            self.policy.totals.add_prompts(
                requests, step.context, max(seconds - passed, 0.0), drafts, accepted, passed
            )
        self._updated, self._drafted = now, step.drafting

    def verified(self, name: str, length: int, accepted: int) -> None:
        """While a step's result is taken in, of each request with draft tokens; see
        :func:`~vllm_dflash.serving.verified.counting`."""
        counts = self._verified
        counts[0] += 1
        counts[1] += length
        counts[2] += accepted
        if self._step is not None:
            counts[3] += self._step.promised[self._step.lengths[name][1]][length]

    def publish(self) -> None:
        """Once a step's result has been taken in."""
        if self._verified[0]:
            self.policy.count(*self._verified)  # type: ignore[arg-type]
            self._verified = [0, 0, 0, 0.0]
        self.stats.update(self.policy)

    def forget(self, request_ids: Iterable[str]) -> None:
        """These requests have ended."""
        self.policy.forget(request_ids)


def choosing(cls: type) -> type:
    """A subclass of one of vLLM's schedulers that follows an :class:`EngineLengths`."""

    class Choosing(cls):  # type: ignore[valid-type,misc]
        draft_lengths: Any = None  # an EngineLengths

        def schedule(self, *args: Any, **kwargs: Any) -> Any:
            self.draft_lengths.trim()
            return super().schedule(*args, **kwargs)

        def _update_after_schedule(self, scheduler_output: Any) -> None:
            self.draft_lengths.scheduled(scheduler_output)
            super()._update_after_schedule(scheduler_output)
            self.draft_lengths.forget(scheduler_output.finished_req_ids)

        def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
            self.draft_lengths.done(scheduler_output, model_runner_output)
            out = super().update_from_output(scheduler_output, model_runner_output)
            self.draft_lengths.publish()
            return out

        def update_draft_token_ids(self, draft_token_ids: Any) -> None:
            # vLLM 0.31 names as many as ever behind a step without a draft pass.
            if self.draft_lengths.num_drafted:
                super().update_draft_token_ids(draft_token_ids)

    Choosing.__name__ = Choosing.__qualname__ = cls.__name__
    return Choosing


def adopt(scheduler: Any, vllm_config: Any) -> None:
    """Turns one of vLLM's schedulers into one that chooses draft lengths; the instance is changed.

    The costs of steps come from the workers, which have measured them by now. Without, lengths stay fixed.
    """
    spec = vllm_config.speculative_config
    name = engine_name(vllm_config)
    cost = None if name is None else handover.take(name)
    if cost is None:
        logger.warning("vllm-dflash drafts a fixed number of tokens: its workers sent no costs")
        return
    policy = Ahead(cost, scheduler.num_spec_tokens, graph_lengths(vllm_config))
    stats = make_stats(vllm_config)
    scheduler.__class__ = choosing(type(scheduler))
    limit = draft_limits.position_limit(spec, scheduler.max_model_len)
    lengths = scheduler.draft_lengths = EngineLengths(scheduler, policy, stats, limit)
    scheduler.make_spec_decoding_stats = counting(
        scheduler.make_spec_decoding_stats, lengths.verified
    )
    logger.info("vllm-dflash chooses draft lengths in the scheduler")


def wrap_init(original: Any) -> Any:
    """Wraps ``Scheduler.__init__``; schedulers of other engines are as they were."""

    @functools.wraps(original)
    def init(self, vllm_config, *args, **kwargs):
        original(self, vllm_config, *args, **kwargs)
        spec = vllm_config.speculative_config
        if spec is None or spec.method != "dflash":
            return
        draft_limits.adopt(self, vllm_config)
        if not wanted(vllm_config):
            name = engine_name(vllm_config)
            alone = vllm_config.parallel_config.data_parallel_size == 1
            if name is not None and alone:
                count_by_source(self, StatsFile(verified_file(stats_file(name))))
            return
        reason = unsupported(vllm_config)
        if reason:
            logger.warning("vllm-dflash drafts a fixed number of tokens: %s", reason)
        else:
            adopt(self, vllm_config)

    return init
