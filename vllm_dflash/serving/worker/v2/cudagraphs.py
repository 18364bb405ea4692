"""Full CUDA graphs of the V2 runner for steps with few draft tokens, or none."""

from __future__ import annotations

import copy
import functools
import sys
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from vllm.config.compilation import CUDAGraphMode

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
                original(self)
        finally:
            self.vllm_config = config
        if self._capture_descs.get(CUDAGraphMode.FULL):
            _thin_out(self, {n + 1 for n in support.graph_lengths(config)})
            _offer_every_length(self)

    return _init_candidates


def _thin_out(manager: Any, lengths: set[int]) -> None:
    """Leaves full graphs of these lengths for as many requests as vLLM has sizes, and for the most requests.

    vLLM makes one for each number of tokens that it has sizes for. A step of two tokens a request needs no
    finer steps in its requests than one of one token: with 256 requests that is 132 graphs, not 214, for
    drafts of 15 tokens.
    """
    sizes = set(manager.compilation_config.cudagraph_capture_sizes)
    kept, seen = [], set()
    for desc in manager._capture_descs[CUDAGraphMode.FULL]:  # largest first
        kind = desc.uniform_token_count, desc.num_ubatches, desc.num_active_loras
        if desc.uniform_token_count not in lengths or desc.num_reqs in sizes or kind not in seen:
            kept.append(desc)
        seen.add(kind)
    manager._capture_descs[CUDAGraphMode.FULL] = kept


def _offer_every_length(manager: Any) -> None:
    """Offers each number of tokens the next larger full graph of every length.

    vLLM offers those of the next larger graph and of no other: with several lengths a step gets a full graph
    only where that one happens to be of its own.
    """
    offered = defaultdict(list)
    start: dict[tuple[Any, ...], int] = defaultdict(int)
    for desc in reversed(manager._capture_descs[CUDAGraphMode.FULL]):  # smallest first
        kind = desc.uniform_token_count, desc.num_ubatches, desc.num_active_loras
        for num_tokens in range(start[kind], desc.num_tokens + 1):
            offered[num_tokens, desc.num_active_loras].append(desc)
        start[kind] = desc.num_tokens + 1
    for key, descs in manager._candidates.items():
        offered[key] += [d for d in descs if d.cg_mode != CUDAGraphMode.FULL]
    manager._candidates = dict(offered)


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
