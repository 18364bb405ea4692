"""Whether draft lengths are chosen, by whom, and why not; asked in every process, with the same answer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from vllm_dflash.options import DRAFTER_ARCH, HEAD_ARCH, Options

#: Draft tokens a request with full CUDA graphs of their own: steps of 2, 4 and 8 tokens a request.
_GRAPH_LENGTHS = (1, 3, 7)


def is_ours(speculative_config: Any) -> bool:
    """Whether the drafter is served with a class of ours."""
    draft = getattr(speculative_config, "draft_model_config", None)
    return draft is not None and not {DRAFTER_ARCH, HEAD_ARCH}.isdisjoint(draft.architectures or ())


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
    if not is_ours(spec):
        return f"vLLM serves {spec.model} with a drafter class of its own"
    if parallel.data_parallel_size > 1:
        return "data parallel engines must draft in step"
    if parallel.distributed_executor_backend == "external_launcher" and parallel.world_size > 1:
        return (
            "external_launcher runs a scheduler for each rank, and choices follow each rank's clock"
        )
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


def not_of_ours(original: Callable[..., bool]) -> Callable[..., bool]:
    """Wraps a question of ``VllmConfig`` about drafters that vLLM refuses on the V1 runner.

    Our proposer serves those of our classes there. vLLM 0.33 asks it, too, where it cannot watermark drafts.
    """

    @functools.wraps(original)
    def asked(self):
        served = is_ours(self.speculative_config) and not getattr(self, "watermark_config", None)
        return not served and original(self)

    return asked
