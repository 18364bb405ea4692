"""Mends what vLLM's V1 runner gets wrong for single requests of a batch while others have drafts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor
from vllm.v1.sample.rejection_sampler import RejectionSampler

from vllm_dflash.serving.thinking_budget import ThinkingBudgets


def mend(runner: Any) -> None:
    """Mends a V1 runner with a drafter, once its batch is laid out."""
    holder = runner.input_batch.thinking_budget_state_holder
    if holder is not None:
        holder.__class__ = ThinkingBudgets
        holder._forced = {}
    if type(runner.rejection_sampler) is RejectionSampler:
        runner.rejection_sampler.__class__ = Sampler
    if runner.device.type == "cpu":
        keep_generators_of_prompt_chunks(runner)


class Sampler(RejectionSampler):
    """vLLM's, with the log probabilities of ``logprob_token_ids``, which it loses.

    If another request of the batch wants log probabilities, vLLM's ends the engine instead.
    """

    _token_ids: dict[int, list[int]] | None = None
    _num_requests = 0

    def forward(
        self, metadata: Any, draft_probs: Tensor | None, logits: Tensor, sampling_metadata: Any
    ) -> Any:
        self._token_ids = sampling_metadata.logprob_token_ids
        self._num_requests = len(metadata.num_draft_tokens)
        if self._token_ids:
            sampling_metadata = replace(
                sampling_metadata,
                logprob_token_ids=None,
                max_num_logprobs=sampling_metadata.max_num_logprobs or 0,
            )
        return super().forward(metadata, draft_probs, logits, sampling_metadata)

    def _get_logprobs_tensors(self, *args: Any, **kwargs: Any) -> Any:
        if not self._token_ids:
            return super()._get_logprobs_tensors(*args, **kwargs)
        sampler, of_request = self.sampler, self._token_ids

        def gather(logprobs: Tensor, num_logprobs: int, token_ids: Tensor) -> Any:
            # Rows here are positions, so many for each request.
            num_positions = len(token_ids) // self._num_requests
            of_row = {
                request * num_positions + i: ids
                for request, ids in of_request.items()
                for i in range(num_positions)
            }
            return sampler.gather_specific_token_logprobs(logprobs, of_row, token_ids)

        sampler.gather_logprobs = gather  # type: ignore[method-assign]
        try:
            return super()._get_logprobs_tensors(*args, **kwargs)
        finally:
            del sampler.gather_logprobs


def keep_generators_of_prompt_chunks(runner: Any) -> None:
    """Lets requests with a ``seed`` have their prompts processed in chunks on the CPU.

    vLLM samples behind each chunk too, throws the token away and turns the request's generator back, which
    ends the engine where generators have no offset, as on the CPU. Here such a token comes from the global
    generator.
    """
    sample, take_in = runner._sample, runner._bookkeeping_sync
    kept: dict[int, Any] = {}

    def _sample(*args: Any, **kwargs: Any) -> Any:
        batch = runner.input_batch
        for row in runner.discard_request_mask.np[: batch.num_reqs].nonzero()[0].tolist():
            if row in batch.generators:
                kept[row] = batch.generators.pop(row)
        return sample(*args, **kwargs)

    def _bookkeeping_sync(*args: Any, **kwargs: Any) -> Any:
        try:
            return take_in(*args, **kwargs)
        finally:
            runner.input_batch.generators.update(kept)
            kept.clear()

    runner._sample, runner._bookkeeping_sync = _sample, _bookkeeping_sync
