"""Mends what vLLM's V1 runner gets wrong for single requests of a batch while others have drafts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor
from vllm.v1.sample.rejection_sampler import RejectionSampler

from vllm_dflash.serving.patching import replaced, specialise


def mend(runner: Any) -> None:
    """Mends a V1 runner with a drafter, once its batch is laid out."""
    holder = runner.input_batch.thinking_budget_state_holder
    if holder is not None:
        specialise(holder, "vllm_dflash.serving.worker.v1.thinking_budget:ThinkingBudgets")
    if type(runner.rejection_sampler) is RejectionSampler:
        specialise(runner.rejection_sampler, "vllm_dflash.serving.worker.v1.sampler:Sampler")


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

        with replaced(sampler, "gather_logprobs", gather):
            return super()._get_logprobs_tensors(*args, **kwargs)
