"""Where drafting ends: a drafter has only so many positions, and drafts must not change what is said."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from vllm_dflash.serving.patching import specialise

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams

#: RoPE types whose table vLLM makes from ``original_max_position_embeddings``.
_FROM_ORIGINAL = {"yarn", "deepseek_yarn", "deepseek_llama_scaling"}


def position_limit(speculative_config: Any, max_model_len: int) -> int:
    """Tokens of a request behind which nothing is drafted; the same in the engine core and its workers.

    The least of the server's limit, the drafter's own ``max_model_len`` (from its checkpoint, or
    ``max_model_len`` of the speculative configuration), and the rows of its rotary table.

    Args:
        speculative_config: vLLM's, of method dflash.
        max_model_len: the server's.
    """
    draft = speculative_config.draft_model_config
    own = getattr(draft, "max_model_len", None)
    rows = rotary_positions(getattr(draft, "hf_config", None))
    return min(n for n in (max_model_len, own, rows) if n is not None)


def rotary_positions(hf_config: Any) -> int | None:
    """Rows of the rotary table that vLLM makes for a drafter; None where its config does not tell.

    Not always the length that vLLM derives: that has the factor of dynamic and NTK scaling in it, whose
    tables do not grow with it, and takes YaRN's ``max_position_embeddings`` as it stands.
    """
    positions = getattr(hf_config, "max_position_embeddings", None)
    rope = getattr(hf_config, "rope_parameters", None) or {}
    kind, factor = rope.get("rope_type"), rope.get("factor") or 1.0
    original = rope.get("original_max_position_embeddings")
    if kind in _FROM_ORIGINAL and original is not None:
        return math.ceil(original * factor)
    if kind == "linear" and positions is not None:
        return math.ceil(positions * factor)
    return positions


def request_limit(params: SamplingParams | None, written: int, coming: int = 0) -> int | None:
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
    if params.seed is not None and params.sampling_type.name == "RANDOM_SEED":
        return 0
    if written < params.min_tokens:
        # Short of it by a token even with all drafts and the one behind them.
        return max(0, params.min_tokens - 2 - written - coming)
    return None


def limiting(cls: type) -> type:
    """A subclass of one of vLLM's schedulers that has no draft token verified beyond the limits."""

    class Limiting(cls):  # type: ignore[valid-type,misc]
        #: No draft token is verified at this position or behind it.
        position_limit: int
        #: Requests with ``logprob_token_ids`` on the V2 runner, whose rejection sampler does not return them:
        #: while there are any, nobody has drafts. None on the V1 runner, whose sampler is mended.
        scored: set[str] | None = None
        #: Whether a new request may ever verify draft tokens that nobody drafted, see :func:`adopt`.
        may_pad = False
        #: Where ``dynamic_sd_lookup`` is this and not None, it does not.
        unpadded: list[int]
        #: Requests whose text would be another, see :func:`request_limit`.
        limited: set[str]
        #: Requests whose next verified draft tokens nobody drafted.
        padded: set[str]
        #: False ends every step without a draft pass.
        drafting = True

        def add_request(self, request: Any, *args: Any, **kwargs: Any) -> None:
            super().add_request(request, *args, **kwargs)
            params = request.sampling_params
            if self.may_pad and request_limit(params, 0) is not None:
                self.limited.add(request.request_id)
            if self.scored is not None and params is not None and params.logprob_token_ids:
                self.scored.add(request.request_id)

        def schedule(self, *args: Any, **kwargs: Any) -> Any:
            if self.scored:
                self.scored &= self.requests.keys()
            for request in self.running:
                drafts = request.spec_token_ids
                if not drafts:
                    continue
                most = max(self.position_limit - request.num_computed_tokens - 1, 0)
                limit = request_limit(
                    request.sampling_params,
                    request.num_output_tokens,
                    request.num_output_placeholders,
                )
                most = 0 if self.scored else most if limit is None else min(most, limit)
                if most < len(drafts):
                    # Not in place: vLLM's asynchronous scheduler gives all requests one list.
                    request.spec_token_ids = list(drafts[:most])
            if not self.may_pad:
                return super().schedule(*args, **kwargs)
            self.limited &= self.requests.keys()
            self.padded &= self.requests.keys()
            self.dynamic_sd_lookup = None if self._pads() else self.unpadded
            if self.dynamic_sd_lookup is not None or len(self.running) == len(self.requests):
                return super().schedule(*args, **kwargs)  # nobody comes who could be padded
            running = {r.request_id for r in self.running}
            out = super().schedule(*args, **kwargs)
            self.padded |= out.scheduled_spec_decode_tokens.keys() - running
            return out

        def _drafts(self) -> bool:
            return self.drafting and not self.scored

        def _pads(self) -> bool:
            """Whether new requests verify as many draft tokens as the others, though none were drafted."""
            if self.limited or not self._drafts():
                return False
            decoding = (r for r in self.running if not r.is_prefill_chunk)
            return all(len(r.spec_token_ids) == self.num_spec_tokens for r in decoding)

        def _update_after_schedule(self, scheduler_output: Any) -> None:
            if not self._drafts():
                scheduler_output.num_spec_tokens_to_schedule = 0
            super()._update_after_schedule(scheduler_output)

        def update_draft_token_ids(self, draft_token_ids: Any) -> None:
            # vLLM 0.31 names as many as ever on the V2 runner.
            if self._drafts():
                super().update_draft_token_ids(draft_token_ids)

    Limiting.__name__ = Limiting.__qualname__ = cls.__name__
    Limiting.__module__ = cls.__module__
    return Limiting


def adopt(scheduler: Any, vllm_config: Any) -> bool:
    """Turns one of vLLM's schedulers into one that keeps to the limits, or returns False; the instance is
    changed."""
    if not specialise(scheduler, "vllm_dflash.serving.draft_limits:limiting"):
        return False
    v2, spec = vllm_config.use_v2_model_runner, vllm_config.speculative_config
    if getattr(scheduler, "dynamic_sd_lookup", ()) is None:
        # With None vLLM fills up the first step of a request of whose prompt a token is left (the rest is
        # cached, or came from another server) with draft tokens that nobody drafted: beside full drafts of
        # the others the step keeps its CUDA graph. Text stays what it is where drafts count as certain, not
        # where they are compared with what they were drawn by. The V1 runner has -1 for them, no token.
        most = vllm_config.scheduler_config.max_num_seqs
        scheduler.unpadded = [scheduler.num_spec_tokens] * (most + 1)
        scheduler.dynamic_sd_lookup = scheduler.unpadded
        scheduler.may_pad = v2 and spec.draft_sample_method == "greedy"
    scheduler.limited, scheduler.padded = set(), set()
    scheduler.scored = set() if v2 else None
    scheduler.position_limit = position_limit(spec, scheduler.max_model_len)
    return True
