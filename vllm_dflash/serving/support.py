"""Whether draft lengths are chosen, by whom, and why not; asked in every process, with the same answer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from vllm_dflash.options import DRAFTER_ARCH, Options

#: Draft tokens a request with full CUDA graphs of their own: steps of 2, 4 and 8 tokens a request.
_GRAPH_LENGTHS = (1, 3, 7)


def requested(vllm_config: Any) -> bool:
    """Whether draft lengths are to be chosen."""
    spec = vllm_config.speculative_config
    if spec is None or spec.method != "dflash":
        return False
    return Options.from_additional_config(vllm_config.additional_config).draft_length == "auto"


def by_scheduler(vllm_config: Any) -> bool:
    """Whether the engine core's scheduler is to choose, as it must where drafts stay on the device; else the
    V1 proposer does."""
    return bool(vllm_config.use_v2_model_runner or vllm_config.scheduler_config.async_scheduling)


def unsupported_reason(vllm_config: Any) -> str | None:
    """Why draft lengths cannot be chosen; None where they can."""
    spec, parallel = vllm_config.speculative_config, vllm_config.parallel_config
    if DRAFTER_ARCH not in (spec.draft_model_config.architectures or ()):
        return f"vLLM serves {spec.model} with a drafter class of its own"
    if parallel.data_parallel_size > 1:
        return "data parallel engines must draft in step"
    if not by_scheduler(vllm_config):
        if spec.disable_padded_drafter_batch:
            return "disable_padded_drafter_batch gives the proposer other batches"
        return None
    if getattr(spec, "enable_adaptive_verification", False):
        # The scheduler would count tokens that were not verified as wrong.
        return "vLLM's adaptive verification chooses what of them is verified"
    if parallel.pipeline_parallel_size > 1:
        return "with pipeline stages a step's requests are not those of the step before"
    if vllm_config.scheduler_config.scheduler_cls is not None:
        return f"the scheduler is {vllm_config.scheduler_config.scheduler_cls}, not vLLM's"
    return None


def enabled(vllm_config: Any) -> bool:
    """Whether draft lengths are chosen, if it is known what steps cost."""
    return requested(vllm_config) and unsupported_reason(vllm_config) is None


def scheduler_chooses(vllm_config: Any) -> bool:
    """:func:`enabled`, and :func:`by_scheduler`."""
    return enabled(vllm_config) and by_scheduler(vllm_config)


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


def serve_several_kv_groups(original: Callable[..., bool]) -> Callable[..., bool]:
    """Wraps ``VllmConfig._dflash_needs_multi_kv_group``: never for our drafter class.

    vLLM refuses such drafters on the V1 runner; our proposer there serves those of our class.
    """

    @functools.wraps(original)
    def _dflash_needs_multi_kv_group(self):
        draft = getattr(self.speculative_config, "draft_model_config", None)
        ours = draft is not None and DRAFTER_ARCH in (draft.architectures or ())
        return not ours and original(self)

    return _dflash_needs_multi_kv_group
