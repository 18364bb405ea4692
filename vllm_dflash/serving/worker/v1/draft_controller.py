"""Draft lengths on vLLM's V1 runner: feeds the policy what the proposer sees, carries out what it decides.

vLLM's V1 runner without asynchronous scheduling takes drafts as lists, of any length for each request. So a
step here is: what was emitted and how long it took, a plan, the draft pass for those it names (or none: the
context's K/V is then kept for later), the lengths, the lists.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.distributed.parallel_state import get_tp_group

from vllm_dflash.draft_length.cost import StepCost
from vllm_dflash.draft_length.counters import DRAFTER
from vllm_dflash.draft_length.worker_policy import Plan, Request, WorkerPolicy
from vllm_dflash.serving.draft_limits import request_limit
from vllm_dflash.serving.draft_stats import DraftStats, make_stats
from vllm_dflash.serving.verified import Sent
from vllm_dflash.serving.worker.v1.deferred_context import DeferredContext
from vllm_dflash.serving.worker.v1.lookup import PromptLookup
from vllm_dflash.serving.worker.v1.step_clock import StepClock, StepDone

_NO_MATCH = np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class _Look:
    """What was decided for the next step; batch rows of the plan's requests, and those to run the drafter
    for."""

    plan: Plan
    rows: list[int]
    drafting: list[int]


class DraftLengths:
    """Chooses sources and lengths of drafts for one proposer.

    Args:
        proposer: ours, with its KV cache laid out.
        cost: measured, or a guess to start from.
        lookup: prompt lookup, or None.
        stats: where the figures go, or None.
    """

    def __init__(
        self, proposer: Any, cost: StepCost, lookup: PromptLookup | None, stats: DraftStats | None
    ) -> None:
        self.proposer = proposer
        self.num_tokens = proposer.max_query_len - (not proposer.sample_from_anchor)
        # Drafts that are sampled come with their probabilities, a row for every request.
        self.together = bool(proposer._enable_probabilistic_draft_probs)
        self.policy = WorkerPolicy(cost, self.num_tokens, self.together)
        self.lookup = None if self.together else lookup
        self.stats = stats
        self.context = DeferredContext(proposer)
        self.clock = StepClock()
        self._group = _tensor_parallel_group()
        #: The latest drafts by request.
        self.sent: dict[str, Sent] = {}
        self._looked: _Look | None = None
        self._requests: set[str] = set()

    @property
    def alone(self) -> bool:
        """Whether there are no ranks beside this one, with which it decides in :meth:`propose`."""
        return self._group is None

    def before_step(self, scheduler_output: Any) -> None:
        """A step of the runner begins."""
        self.clock.start()
        self.context.before_step(scheduler_output)

    def propose(self, propose: Callable[..., Tensor], **kwargs: Any) -> list[list[int]]:
        """In place of ``DFlashProposer.propose``, whose keywords these are.

        Args:
            propose: vLLM's own, for the requests of ``proposer.draft_rows``.

        Returns:
            Draft tokens of each request of the batch.
        """
        proposer, metadata = self.proposer, kwargs["common_attn_metadata"]
        num_requests = metadata.batch_size()
        look, self._looked = self._looked, None
        self.sent = {}
        if look is None and (self._group is None or self._group.rank_in_group == 0):
            rejected = kwargs.get("num_rejected_tokens_gpu")
            look = self._look(
                kwargs["next_token_ids"].tolist(),
                [0] * num_requests if rejected is None else rejected.tolist(),
                metadata,
                kwargs["num_speculative_tokens"],
            )
        drafting = [] if look is None else look.drafting
        if self._group is not None:
            # Draft passes are joint work of the ranks, whose clocks differ: the first one decides.
            drafting = self._group.broadcast_object(drafting)
        began = time.perf_counter()
        drafted: Tensor | None = None
        proposer.confidence = None
        if drafting:
            waited = self.context.flush_for(drafting)
            whole = len(drafting) == num_requests
            proposer.draft_rows = None if whole else torch.tensor(drafting, device=proposer.device)
            try:
                drafted = propose(**{**kwargs, "num_speculative_tokens": self.num_tokens})
            finally:
                proposer.draft_rows = None
        else:
            self.context.add(
                kwargs["target_hidden_states"],
                kwargs["next_token_ids"],
                kwargs["target_positions"],
                metadata,
                kwargs.get("num_rejected_tokens_gpu"),
            )
        if look is None:
            return [[] for _ in range(num_requests)]
        tokens = None if drafted is None else drafted.cpu().numpy()
        confidence = proposer.confidence
        if tokens is not None and confidence is not None:
            confidence = confidence.float().cpu().numpy().reshape(tokens.shape)
        seconds = time.perf_counter() - began
        if drafting and not waited:
            # Rows that waited would else have been written at another time: they are not the pass's cost.
            self.policy.cost.observe_draft(len(drafting) * proposer.max_query_len, seconds)
        return self._finish(look, tokens, confidence, seconds, num_requests)

    def plain_step(
        self,
        sampled_token_ids: Tensor,
        hidden_states: list[Tensor],
        positions: Tensor,
        metadata: Any,
        most: int,
    ) -> list[list[int]] | None:
        """In place of all that vLLM does to propose, after a step without draft tokens.

        Args:
            sampled_token_ids: ``[B, 1]``.
            hidden_states: the verifier's, of each layer ``[T, H]``.
            positions: ``[T]`` or ``[3, T]``.
            metadata: vLLM's ``CommonAttentionMetadata`` of the step.
            most: how many draft tokens the next step may have.

        Returns:
            The drafts of each request, or None to have the step go vLLM's way.
        """
        proposer, num_requests = self.proposer, metadata.batch_size()
        runner = proposer.runner
        if metadata.num_actual_tokens != num_requests or not proposer.drafting:
            return None
        self.sent = {}
        if runner.discard_request_mask.np[:num_requests].any():
            return None
        tokens = sampled_token_ids[:, 0].tolist()
        look = self._look(tokens, [0] * num_requests, metadata, most)
        if look.drafting:
            self._looked = look
            return None
        began = time.perf_counter()
        features = proposer.take_features(hidden_states, positions, metadata, None)
        # Nobody drafts behind them, so any tokens will do for anchors.
        anchors = runner.input_ids.gpu[:num_requests]
        self.context.add(features, anchors, positions, metadata, None)
        return self._finish(look, None, None, time.perf_counter() - began, num_requests)

    def _look(self, anchors: list[int], num_rejected: list[int], metadata: Any, most: int) -> _Look:
        rows, requests = self._observe(anchors, num_rejected, metadata)
        plan = self.policy.plan(requests, min(most, self.num_tokens))
        drafting = [rows[i] for i in plan.drafting]
        if self.together and drafting:
            drafting = list(range(len(anchors)))
        return _Look(plan, rows, drafting)

    def _finish(
        self,
        look: _Look,
        tokens: np.ndarray | None,
        confidence: np.ndarray | None,
        seconds: float,
        num_requests: int,
    ) -> list[list[int]]:
        """Drafts of each request of the batch; ``seconds`` of the draft pass, or for the context alone."""
        out = self._settle(look, tokens, confidence, num_requests)
        self._note(seconds, bool(look.drafting))
        return out

    def _settle(
        self,
        look: _Look,
        tokens: np.ndarray | None,
        confidence: np.ndarray | None,
        num_requests: int,
    ) -> list[list[int]]:
        plan, rows, drafting = look.plan, look.rows, look.drafting
        of_plan = [drafting.index(rows[i]) for i in plan.drafting] if tokens is not None else []
        drafts = self.policy.allocate(
            plan,
            None if tokens is None else tokens[of_plan],
            None if confidence is None else confidence[of_plan],
        )
        out: list[list[int]] = [[] for _ in range(num_requests)]
        row_of = dict(zip(plan.drafting, of_plan, strict=True))
        for i, (row, draft) in enumerate(zip(rows, drafts, strict=True)):
            if not draft.length:
                continue
            self.sent[plan.requests[i].id] = Sent(draft.source, draft.expected)
            if draft.source == DRAFTER and tokens is not None:
                out[row] = tokens[row_of[i], : draft.length].tolist()
            else:
                out[row] = plan.requests[i].match[: draft.length].tolist()
        return out

    def _observe(
        self, anchors: list[int], num_rejected: list[int], metadata: Any
    ) -> tuple[list[int], list[Request]]:
        """Accounts for the step that is done; the batch rows that can take a draft, and their requests."""
        now = time.perf_counter()
        proposer = self.proposer
        runner, num_requests = proposer.runner, len(anchors)
        batch = runner.input_batch
        discarded = runner.discard_request_mask.np[:num_requests].tolist()
        lengths = batch.num_tokens_no_spec[:num_requests].tolist()
        drafts = batch.spec_token_ids
        rows, requests = [], []
        emitted = context = num_accepted = num_drafts = 0
        limit = batch.token_ids_cpu.shape[1]
        for row, request_id in enumerate(batch.req_ids[:num_requests]):
            if discarded[row]:
                continue
            accepted = len(drafts[row]) - num_rejected[row]
            end = lengths[row] + accepted + 1
            emitted += accepted + 1
            num_accepted += accepted
            num_drafts += len(drafts[row])
            context += end
            if end >= limit:
                continue
            # Where vLLM's bookkeeping writes it right after this.
            batch.token_ids_cpu[row, end - 1] = anchors[row]
            tokens = batch.token_ids_cpu[row, :end]
            state = runner.requests[request_id]
            most = proposer.max_model_len - end - 1
            written = end - state.num_prompt_tokens
            if state.sampling_params is not None and state.sampling_params.max_tokens:
                # The last token is the verifier's own.
                most = min(most, state.sampling_params.max_tokens - written - 1)
            allowed = request_limit(state.sampling_params, written)
            most = most if allowed is None else min(most, allowed)
            most = max(0, min(most, self.num_tokens))
            match, match_len = _NO_MATCH, 0
            if self.lookup is not None and most > 0:
                match, match_len = self.lookup.draft(tokens, most)
            rows.append(row)
            requests.append(Request(request_id, tokens, most, match, match_len))
        decoding = emitted >= num_requests and metadata.max_query_len <= self.num_tokens + 1
        if decoding:
            num_drafts = metadata.num_actual_tokens - num_requests
        self._step = StepDone(
            decoding, num_requests, context, emitted, num_drafts, num_accepted, 0.0
        )
        self._time(now)
        self._forget(set(batch.req_ids[:num_requests]))
        return rows, requests

    def _time(self, now: float) -> None:
        cost, clock, step = self.policy.cost, self.clock, self._step
        if clock.ended:
            cost.observe_overhead(clock.began - clock.ended)
        if not clock.began:
            return
        step.seconds = now - clock.began
        if step.decoding:
            tokens = step.num_requests + step.drafts
            cost.observe_step(tokens, step.num_requests, step.context, step.seconds, step.drafts)

    def _note(self, draft_seconds: float, drafted: bool) -> None:
        counters, step = self.policy.counters, self._step
        if step.seconds and step.decoding:
            seconds = step.seconds + self.policy.cost.overhead + draft_seconds
            counters.add(
                step.emitted, step.num_requests, step.context, seconds, step.drafts, draft_seconds
            )
        elif step.seconds:
            counters.add_prompts(
                step.num_requests,
                step.context,
                step.seconds,
                step.drafts,
                step.accepted,
                draft_seconds,
            )
        counters.drafted_steps += drafted
        if self.stats is not None:
            self.stats.update(counters)
        self.clock.ended = time.perf_counter()

    def _forget(self, present: set[str]) -> None:
        self.policy.forget(self._requests - present)
        self._requests = present


def _tensor_parallel_group() -> Any:
    group = get_tp_group()
    return group if group.world_size > 1 else None


def make(proposer: Any, cost: StepCost) -> DraftLengths:
    """Draft lengths for a proposer whose engine can run steps."""
    lookup = None
    if proposer._options.lookup == "auto":
        lookup = PromptLookup(proposer.max_model_len)
    return DraftLengths(proposer, cost, lookup, make_stats(proposer.vllm_config))
