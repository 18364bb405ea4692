"""Draft lengths that the scheduler chooses: on vLLM's V2 runner, and wherever scheduling is asynchronous.

Drafts stay on the device there: each step the scheduler says how many tokens of its draft go to the verifier
with each request, and whether the step ends with a draft pass at all (``num_spec_tokens_to_schedule``).
Both are vLLM's own quantities; here they follow
:class:`~vllm_dflash.draft_length.scheduler_policy.SchedulerPolicy`. All of this runs in the engine core.

Shapes: B requests of a step, K draft tokens of a request.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm_dflash.draft_length.cost import StepCost
from vllm_dflash.draft_length.scheduler_policy import Batch, SchedulerPolicy
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
        #: Requests that may have any number of draft tokens, from now on to their end.
        self._unlimited: set[str] = set()
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
        # Requests that were not running have tokens there that nobody drafted (draft_limits.adopt).
        lengths = [len(drafts.get(name, ())) if name in self._rows else 0 for name in scheduled]
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
        ids = [r.request_id for r in requests]
        tokens_B = np.array(tokens)
        computed_B = np.array([r.num_computed_tokens for r in requests]) + tokens_B
        # Each step brings a token at least, and the verifier's own is the last one.
        end_B = np.array(
            [r.max_tokens - r.num_output_tokens - (r.num_output_placeholders > 0) for r in requests]
        )
        left_B = np.minimum(end_B - (tokens_B > 0), self.limit - computed_B) - 1
        most = np.maximum(left_B, 0).tolist()
        if self.scheduler.scored:  # nobody has drafts then
            most = [0] * len(ids)
        if not self._unlimited.issuperset(ids):
            for i, request in enumerate(requests):
                if request.request_id in self._unlimited:
                    continue
                limit = draft_limits.request_limit(
                    request.sampling_params,
                    request.num_output_tokens,
                    request.num_output_placeholders,
                )
                if limit is None:
                    self._unlimited.add(request.request_id)
                else:
                    most[i] = min(most[i], limit)
        return Batch(ids, float(computed_B.sum()), drafted, most)

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
        :func:`~vllm_dflash.serving.verified.count_verified`."""
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
        self._unlimited.difference_update(request_ids)
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


def adopt(scheduler: Any, vllm_config: Any, cost: StepCost) -> None:
    """Turns one of vLLM's schedulers into one that chooses draft lengths; the instance is changed.

    Args:
        cost: what steps take the workers.
    """
    if not specialise(scheduler, "vllm_dflash.serving.engine_core.scheduler:choosing"):
        return
    policy = SchedulerPolicy(cost, scheduler.num_spec_tokens, support.graph_lengths(vllm_config))
    limit = draft_limits.position_limit(vllm_config.speculative_config, scheduler.max_model_len)
    lengths = EngineLengths(scheduler, policy, make_stats(vllm_config), limit)
    scheduler.draft_lengths = lengths
    count_verified(scheduler, lengths.verified)
    logger.info("vllm-dflash chooses draft lengths in the scheduler")
