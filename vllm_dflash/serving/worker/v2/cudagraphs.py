"""Full CUDA graphs of the V2 runner for steps with few draft tokens, or none."""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable
from typing import Any

from vllm_dflash.serving import support
from vllm_dflash.serving.patching import replaced


def wrap_init_candidates(original: Callable[..., Any]) -> Callable[..., Any]:
    """Has vLLM capture the verifier's decode graphs for one token a request too, and for a few.

    With a drafter it captures them for ``num_speculative_tokens + 1`` each, or for the lengths in a
    batch-size table. A step for which nothing was drafted would run without a full graph, slower than
    without speculation. So where the scheduler chooses, such a table is put in for the while, with a zero
    and the lengths that choices are rounded to (:func:`~vllm_dflash.serving.support.graph_lengths`); not
    for verifiers whose layers cannot be captured so (:func:`_all_or_nothing`).
    """

    @functools.wraps(original)
    def _init_candidates(self):
        config = self.vllm_config
        if not support.scheduler_chooses(config) or _all_or_nothing(config):
            return original(self)
        spec = copy.copy(config.speculative_config)
        spec.num_speculative_tokens_per_batch_size = spec.num_speculative_tokens_per_batch_size or [
            (1, 1, spec.num_speculative_tokens)
        ]
        self.vllm_config = copy.copy(config)
        self.vllm_config.speculative_config = spec
        more = [0, *support.graph_lengths(config)]
        module: Any = sys.modules[original.__module__]
        lengths = module.build_dynamic_sd_schedule_lookup
        name = "build_dynamic_sd_schedule_lookup"
        try:
            with replaced(module, name, lambda *a, **k: [*lengths(*a, **k), *more]):
                return original(self)
        finally:
            self.vllm_config = config

    return _init_candidates


def _all_or_nothing(vllm_config: Any) -> bool:
    """Whether vLLM can capture decode graphs for ``num_speculative_tokens + 1`` tokens a request only.

    The metadata builders of Mamba and short-convolution layers assert that. Their other steps run in
    piecewise graphs, whose recurrent layers are not captured.
    """
    from vllm.model_executor.layers.mamba.abstract import MambaBase
    from vllm.v1.attention.backends.mamba_attn import BaseMambaAttentionMetadataBuilder

    layers = vllm_config.compilation_config.static_forward_context.values()
    return any(
        issubclass(layer.get_attn_backend().get_builder_cls(), BaseMambaAttentionMetadataBuilder)
        for layer in layers
        if isinstance(layer, MambaBase)
    )
