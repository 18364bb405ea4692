"""Draft lengths that the scheduler chooses: on vLLM's V2 runner, and wherever scheduling is asynchronous.

Drafts stay on the device there: each step the scheduler says how many tokens of its draft go to the verifier
with each request, and whether the step ends with a draft pass at all (``num_spec_tokens_to_schedule``).
Both are vLLM's own quantities; here they follow :class:`~vllm_dflash.draft_length.ahead.Ahead`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm_dflash.draft_length.ahead import Ahead, Slot
from vllm_dflash.draft_length.cost import StepCost
from vllm_dflash.serving import draft_limits, support
from vllm_dflash.serving.draft_stats import DraftStats, make_stats
from vllm_dflash.serving.patching import specialise
from vllm_dflash.serving.verified import count_verified

logger = logging.getLogger("vllm.vllm_dflash")


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
        :func:`~vllm_dflash.serving.verified.count_verified`."""
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


def adopt(scheduler: Any, vllm_config: Any, cost: StepCost) -> None:
    """Turns one of vLLM's schedulers into one that chooses draft lengths; the instance is changed.

    Args:
        cost: what steps take the workers.
    """
    if not specialise(scheduler, "vllm_dflash.serving.scheduler:choosing"):
        return
    policy = Ahead(cost, scheduler.num_spec_tokens, support.graph_lengths(vllm_config))
    limit = draft_limits.position_limit(vllm_config.speculative_config, scheduler.max_model_len)
    lengths = EngineLengths(scheduler, policy, make_stats(vllm_config), limit)
    scheduler.draft_lengths = lengths
    count_verified(scheduler, lengths.verified)
    logger.info("vllm-dflash chooses draft lengths in the scheduler")
