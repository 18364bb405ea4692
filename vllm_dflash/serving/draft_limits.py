"""How much may be drafted for a request before drafts change what it says."""

from __future__ import annotations

from typing import Any

from vllm.sampling_params import SamplingParams, SamplingType


def draft_limit(params: SamplingParams | None, written: int, coming: int = 0) -> int | None:
    """Draft tokens that a request may have in its next step; None where any number will do.

    * ``seed``, sampled: verifying drafts draws other random numbers than sampling does, and as many as there
      are drafts. Without any vLLM draws what it draws without a drafter.
    * ``min_tokens``: vLLM's V1 sampler forbids a stop token behind the drafts if it is forbidden before them;
      scheduling asynchronously it allows one for good once the request would be long enough with all drafts.

    Args:
        params: of the request; None for pooling.
        written: its output tokens.
        coming: how many more there may be by then, where a step is under way.
    """
    if params is None:
        return None
    if params.sampling_type == SamplingType.RANDOM_SEED:
        return 0
    if written < params.min_tokens:
        # Short of it by a token even with all drafts and the one behind them.
        return max(0, params.min_tokens - 2 - written - coming)
    return None


def limiting(cls: type) -> type:
    """A subclass of one of vLLM's schedulers that keeps to :func:`draft_limit`."""

    class Limiting(cls):  # type: ignore[valid-type,misc]
        #: Requests with ``logprob_token_ids`` on the V2 runner, whose rejection sampler does not return them:
        #: while there are any, nobody has drafts. None on the V1 runner, whose sampler is mended.
        scored: set[str] | None = None

        def add_request(self, request: Any, *args: Any, **kwargs: Any) -> None:
            super().add_request(request, *args, **kwargs)
            params = request.sampling_params
            if self.scored is not None and params is not None and params.logprob_token_ids:
                self.scored.add(request.request_id)

        def schedule(self, *args: Any, **kwargs: Any) -> Any:
            if self.scored:
                self.scored &= self.requests.keys()
            for request in self.running:
                drafts = request.spec_token_ids
                if not drafts:
                    continue
                limit = draft_limit(
                    request.sampling_params,
                    request.num_output_tokens,
                    request.num_output_placeholders,
                )
                limit = 0 if self.scored else limit
                if limit is not None and limit < len(drafts):
                    # Not in place: vLLM's asynchronous scheduler gives all requests one list.
                    request.spec_token_ids = list(drafts[:limit])
            return super().schedule(*args, **kwargs)

    Limiting.__name__ = Limiting.__qualname__ = cls.__name__
    Limiting.__module__ = cls.__module__
    return Limiting


def adopt(scheduler: Any, vllm_config: Any) -> None:
    """Turns one of vLLM's schedulers into one that keeps to the limits; the instance is changed."""
    most = vllm_config.scheduler_config.max_num_seqs
    if scheduler.dynamic_sd_lookup is None:
        # Not None: else vLLM fills a new request's first step up with draft tokens that nobody drafted, and
        # verifies them.
        scheduler.dynamic_sd_lookup = [scheduler.num_spec_tokens] * (most + 1)
    scheduler.__class__ = limiting(type(scheduler))
    scheduler.scored = set() if vllm_config.use_v2_model_runner else None
