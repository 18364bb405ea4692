"""While vLLM's engine core starts: costs come from its workers, its scheduler becomes one of ours."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

from vllm_dflash.draft_length.cost import StepCost
from vllm_dflash.options import Options
from vllm_dflash.serving import draft_limits, patching, support
from vllm_dflash.serving.draft_stats import StatsFile, engine_name, stats_file, verified_file
from vllm_dflash.serving.engine_core import scheduler
from vllm_dflash.serving.verified import SourceCounts
from vllm_dflash.serving.worker.start import choose_lengths, step_cost

logger = logging.getLogger("vllm.vllm_dflash")
_FIXED = "vllm-dflash drafts a fixed number of tokens: %s"
#: On vLLM's KVCacheConfig, which goes from one of the functions below to the other.
_COST = "_dflash_step_cost"


def wrap_initialize_kv_caches(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps ``EngineCore._initialize_kv_caches``, after which the workers are warm.

    Every worker is asked what steps cost it. If all know, they are told that draft lengths are chosen from
    now on, and the scheduler that is made next gets the first one's figures. vLLM's executor carries that,
    so workers may be anywhere.
    """

    @functools.wraps(original)
    def _initialize_kv_caches(self, vllm_config, *args, **kwargs):
        if Options.from_additional_config(vllm_config.additional_config).learn:
            _learn(self)
        made = original(self, vllm_config, *args, **kwargs)
        if hasattr(self, "release_reserved"):
            self.release_reserved()
        if not support.requested(vllm_config):
            return made
        reason = support.unsupported_reason(vllm_config)
        if reason is None:
            costs = self.model_executor.collective_rpc(step_cost)
            if all(cost is not None for cost in costs):
                self.model_executor.collective_rpc(choose_lengths)
                setattr(made, _COST, StepCost.from_dict(costs[0]))
                return made
            reason = "its workers sent no costs"
        logger.warning(_FIXED, reason)
        return made

    return _initialize_kv_caches


def _learn(core: Any) -> None:
    """Has a server's engine core learn; one without a loop of its own (``LLM`` in this process) cannot."""
    if hasattr(core, "_process_input_queue"):
        if patching.specialise(core, "vllm_dflash.learning.engine_core:learning_core"):
            core.prepare_learning()
    else:
        logger.warning("vllm-dflash learns in servers only; dflash_learn has no effect here")


def wrap_scheduler_init(original: Callable[..., None]) -> Callable[..., None]:
    """Wraps ``Scheduler.__init__``; schedulers of other engines are as they were."""

    @functools.wraps(original)
    def init(self, vllm_config, *args, **kwargs):
        original(self, vllm_config, *args, **kwargs)
        spec = vllm_config.speculative_config
        if spec is None or spec.method != "dflash":
            return
        if draft_limits.adopt(self, vllm_config) and support.by_scheduler(vllm_config):
            cost = getattr(self.kv_cache_config, _COST, None)
            if cost is not None:
                scheduler.adopt(self, vllm_config, cost)
            return
        name = engine_name(vllm_config)
        if name is not None and vllm_config.parallel_config.data_parallel_size == 1:
            SourceCounts(self, StatsFile(verified_file(stats_file(name))))

    return init
