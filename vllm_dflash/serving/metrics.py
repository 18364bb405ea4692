"""Prometheus metrics of the drafter, beside vLLM's own speculative counters.

* ``vllm_dflash:drafter_info{drafter, num_speculative_tokens}``: 1.
* ``vllm_dflash:acceptance_length{drafter}``: pooled tau since start, ``1 + accepted / drafts``.
"""

from __future__ import annotations

import prometheus_client

_PREFIX = "vllm_dflash:"


def drafter_metrics_class(base: type) -> type:
    """Subclass of vLLM's ``SpecDecodingProm`` that also exports the drafter's name and tau.

    Does nothing more than ``base`` for other methods and without speculation.
    """

    class DrafterProm(base):  # type: ignore[misc, valid-type]
        def __init__(self, speculative_config, labelnames, per_engine_labelvalues, *args, **kwargs):
            super().__init__(
                speculative_config, labelnames, per_engine_labelvalues, *args, **kwargs
            )
            self._tau = None
            if speculative_config is None or speculative_config.method != "dflash":
                return
            # As vLLM does with its own: an earlier engine of this process may have left them, and
            # registering a name twice raises.
            registry = prometheus_client.REGISTRY
            for collector in list(registry._collector_to_names):
                if str(getattr(collector, "_name", "")).startswith(_PREFIX):
                    registry.unregister(collector)
            drafter = str(speculative_config.model)
            info = prometheus_client.Gauge(
                f"{_PREFIX}drafter_info",
                "The DFlash drafter that is served.",
                [*labelnames, "drafter", "num_speculative_tokens"],
                multiprocess_mode="mostrecent",
            )
            tau = prometheus_client.Gauge(
                f"{_PREFIX}acceptance_length",
                "Tokens per verify step, bonus token included, since start (pooled).",
                [*labelnames, "drafter"],
                multiprocess_mode="mostrecent",
            )
            tokens = str(speculative_config.num_speculative_tokens)
            for values in per_engine_labelvalues.values():
                info.labels(*values, drafter, tokens).set(1)
            self._tau = {i: tau.labels(*v, drafter) for i, v in per_engine_labelvalues.items()}
            self._totals = dict.fromkeys(per_engine_labelvalues, (0, 0))

        def observe(self, spec_decoding_stats, engine_idx: int = 0):
            super().observe(spec_decoding_stats, engine_idx)
            if self._tau is None:
                return
            drafts, accepted = self._totals[engine_idx]
            drafts += spec_decoding_stats.num_drafts
            accepted += spec_decoding_stats.num_accepted_tokens
            self._totals[engine_idx] = (drafts, accepted)
            if drafts:
                self._tau[engine_idx].set(1 + accepted / drafts)

    return DrafterProm
