"""Draft lengths that the scheduler chooses: on vLLM's V2 runner, and wherever scheduling is asynchronous.

Drafts stay on the device there: each step the scheduler says how many tokens of its draft go to the verifier
with each request, and whether the step ends with a draft pass at all (``num_spec_tokens_to_schedule``).
Both are vLLM's own quantities; here they follow
:class:`~vllm_dflash.draft_length.scheduler_policy.SchedulerPolicy`. All of this runs in the engine core.

Shapes: B requests of a step, K draft tokens of a request.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm_dflash.draft_length.scheduler_policy import Batch, SchedulerPolicy
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
from vllm_dflash.serving.seams import DRAFTER_ARCH
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
    if DRAFTER_ARCH not in (spec.draft_model_config.architectures or ()):
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
        names: its requests, ``[B]``.
        lengths_B: draft tokens of each.
        predicted_BK: how many of its first 0, 1, ... draft tokens will be accepted by prediction,
            ``[B, K + 1]``.
        context: tokens of all requests in the cache.
        tokens: scheduled altogether.
        even: whether all requests had none or all of their draft tokens, or as many as there are graphs for.
        drafting: whether it ends with a draft pass.
    """

    scheduled: float
    names: list[str]
    lengths_B: np.ndarray
    predicted_BK: np.ndarray
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

    def __init__(
        self, scheduler: Any, policy: SchedulerPolicy, stats: DraftStats, limit: int
    ) -> None:
        self.scheduler, self.policy, self.stats, self.limit = scheduler, policy, stats, limit
        #: Draft tokens of each request that the latest step ends with.
        self.num_drafted = policy.num_tokens
        #: Rows of ``_predicted`` by request; the last one is for requests of which nothing was predicted.
        self._rows: dict[str, int] = {}
        self._predicted = np.zeros((1, policy.num_tokens + 1))
        self._in_flight: dict[int, _Step] = {}
        self._updated = 0.0
        self._drafted: bool | None = None
        #: Drafts of the step that is taken in, their tokens, and those accepted.
        self._verified = [0, 0, 0]

    def before_schedule(self) -> None:
        """Leaves each request as much of its draft as is to be verified."""
        running = [r for r in self.scheduler.running if not r.is_prefill_chunk]
        drafted = [len(r.spec_token_ids) for r in running]
        self._rows, self._predicted = {}, np.zeros((1, self.policy.num_tokens + 1))
        if not any(drafted):
            return
        chosen = self.policy.verify_lengths(self._batch(running, drafted, [0] * len(running)))
        self._rows = {r.request_id: row for row, r in enumerate(running)}
        self._predicted = np.zeros((len(running) + 1, self.policy.num_tokens + 1))
        np.cumsum(chosen.predicted_BK, axis=1, out=self._predicted[:-1, 1:])
        for request, length, given in zip(running, chosen.lengths, drafted, strict=True):
            if length < given:
                # Not in place: vLLM's asynchronous scheduler gives all requests one list.
                request.spec_token_ids = list(request.spec_token_ids[:length])

    def after_schedule(self, output: Any) -> None:
        """Says whether the step that was scheduled ends with a draft pass."""
        scheduled = output.num_scheduled_tokens
        if not scheduled:
            return
        drafts, known = output.scheduled_spec_decode_tokens, self.scheduler.requests
        limit = output.num_spec_tokens_to_schedule
        lengths = [len(drafts.get(name, ())) for name in scheduled]
        requests = [known[name] for name in scheduled]
        context = sum([r.num_computed_tokens for r in requests])
        # Requests that go on after it: those of which nothing is left to compute but what it brings.
        going_on = [
            (r, tokens)
            for r, tokens in zip(requests, scheduled.values(), strict=True)
            if r.num_computed_tokens + tokens >= r.num_tokens + r.num_output_placeholders
        ]
        drafting = False
        if limit > 0 and going_on:
            decoding, tokens = zip(*going_on, strict=True)
            batch = self._batch(decoding, [limit] * len(decoding), tokens)
            drafting = self.policy.should_draft(batch)
        if not drafting:
            output.num_spec_tokens_to_schedule = 0
        before, self.num_drafted = self.num_drafted, limit if drafting else 0
        rows = [self._rows.get(name, -1) for name in scheduled]
        even = set(lengths)
        self._in_flight[id(output)] = _Step(
            scheduled=time.perf_counter(),
            names=list(scheduled),
            lengths_B=np.array(lengths),
            predicted_BK=self._predicted[rows],
            context=float(context),
            tokens=output.total_num_scheduled_tokens,
            even=len(even) == 1 and even <= {0, before, *self.policy.even_lengths},
            drafting=drafting,
        )

    def _batch(self, requests: Sequence[Any], drafted: list[int], tokens: Sequence[int]) -> Batch:
        """Requests as the policy sees them.

        Args:
            drafted: draft tokens that each has, or will have.
            tokens: of each in the step just scheduled, where it is about the drafts behind that; else 0.
        """
        ids, most, context = [], [], 0
        for request, scheduled in zip(requests, tokens, strict=True):
            written, coming = request.num_output_tokens, request.num_output_placeholders
            computed = request.num_computed_tokens + scheduled
            # Each step brings a token at least, and the verifier's own is the last one.
            steps = (scheduled > 0) + (coming > 0)
            left = min(request.max_tokens - written - steps, self.limit - computed) - 1
            limit = draft_limits.request_limit(request.sampling_params, written, coming)
            if limit is not None and limit < left:
                left = limit
            ids.append(request.request_id)
            most.append(left if left > 0 else 0)
            context += computed
        return Batch(ids, float(context), drafted, most)

    def on_output(self, output: Any, result: Any) -> None:
        """Before a step's result is taken in: learns from it."""
        now = time.perf_counter()
        step = self._in_flight.pop(id(output), None)
        if step is None:
            return
        at, sampled = [], []
        if result.sampled_token_ids:
            requests, rows = self.scheduler.requests, result.req_id_to_index
            for i, name in enumerate(step.names):
                request, row = requests.get(name), rows.get(name)
                if request is None or row is None or request.is_finished():
                    continue
                num_tokens = len(result.sampled_token_ids[row])
                if num_tokens:  # else part of a prompt
                    at.append(i)
                    sampled.append(num_tokens)
        lengths_B, accepted_B = step.lengths_B[at], np.array(sampled, dtype=int) - 1
        drafts, accepted = int(lengths_B.sum()), int(accepted_B.sum())
        names = [step.names[i] for i in at]
        if invalid := output.num_invalid_spec_tokens:
            # What a grammar excluded is in the step, but no evidence.
            lengths_B = lengths_B - [invalid.get(name, 0) for name in names]
        self.policy.observe(names, lengths_B, accepted_B, step.predicted_BK[at, lengths_B])
        num_requests = len(step.names)
        seconds = now - max(self._updated, step.scheduled)
        counters = self.policy.counters
        counters.drafted_steps += step.drafting
        emitted = accepted + len(at)
        if step.tokens == num_requests + drafts and emitted >= num_requests:
            # The pass of this step or of the one before is in between, by how the device works.
            sure = self._drafted == step.drafting
            self.policy.observe_step(
                num_requests=num_requests,
                drafts=drafts,
                context=step.context,
                emitted=emitted,
                seconds=seconds,
                even=step.even,
                drafted=step.drafting if sure else None,
            )
        else:
            passed = self.policy.pass_seconds(num_requests) if step.drafting else 0.0
            counters.add_prompts(
                num_requests, step.context, max(seconds - passed, 0.0), drafts, accepted, passed
            )
        self._updated, self._drafted = now, step.drafting

    def verified(self, name: str, length: int, accepted: int) -> None:
        """While a step's result is taken in, of each request with draft tokens; see
        :func:`~vllm_dflash.serving.verified.counting`."""
        counts = self._verified
        counts[0] += 1
        counts[1] += length
        counts[2] += accepted

    def publish(self) -> None:
        """Once a step's result has been taken in."""
        if self._verified[0]:
            self.policy.count(*self._verified)
            self._verified = [0, 0, 0]
        self.stats.update(self.policy.counters)

    def forget(self, request_ids: Iterable[str]) -> None:
        """These requests have ended."""
        self.policy.forget(request_ids)


def choosing(cls: type) -> type:
    """A subclass of one of vLLM's schedulers that follows an :class:`EngineLengths`."""

    class Choosing(cls):  # type: ignore[valid-type,misc]
        draft_lengths: Any = None  # an EngineLengths

        def schedule(self, *args: Any, **kwargs: Any) -> Any:
            self.draft_lengths.before_schedule()
            return super().schedule(*args, **kwargs)

        def _update_after_schedule(self, scheduler_output: Any) -> None:
            self.draft_lengths.after_schedule(scheduler_output)
            super()._update_after_schedule(scheduler_output)
            self.draft_lengths.forget(scheduler_output.finished_req_ids)

        def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
            self.draft_lengths.on_output(scheduler_output, model_runner_output)
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
    policy = SchedulerPolicy(cost, scheduler.num_spec_tokens, graph_lengths(vllm_config))
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
