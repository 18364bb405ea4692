"""Prometheus metrics of the drafter, beside vLLM's own speculative counters.

* ``vllm_dflash:drafter_info{drafter, num_speculative_tokens}``: 1.
* ``vllm_dflash:acceptance_length{drafter}``: pooled tau since start, ``1 + accepted / drafts``, of drafts of
  all sources and lengths, as vLLM counts them.
* ``vllm_dflash:drafter_acceptance_length{drafter}``: what tau the drafter's drafts would have if all had
  ``num_speculative_tokens`` tokens, by the acceptance of their positions since start, and
  ``vllm_dflash:expected_acceptance_length{drafter, source}``: the same on held-out data of its training,
  where that is known (:mod:`vllm_dflash.serving.expectation`).

Where draft lengths are chosen, read from the worker's figures (:mod:`vllm_dflash.serving.draft_stats`) at
every scrape:

* ``vllm_dflash:steps_total``, ``vllm_dflash:drafted_steps_total``: steps, those with a draft pass.
* ``vllm_dflash:draft_length_total{length}``: how often each length was chosen for a request.
* ``vllm_dflash:drafts_total{source}``: drafts that went to the verifier.
* ``vllm_dflash:proposed_tokens_total{source}``, ``vllm_dflash:accepted_tokens_total{source}``,
  ``vllm_dflash:expected_tokens_total{source}``: draft tokens by source (drafter, lookup).
* ``vllm_dflash:step_seconds_total``, ``vllm_dflash:plain_seconds_total``: spent on steps, and what their
  tokens would have taken without speculation by the measured costs (steps with prompts the same in both);
  ``vllm_dflash:estimated_speedup``: their ratio.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import prometheus_client
from fastapi import Response
from prometheus_client import multiprocess
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from vllm_dflash.modeling.acceptance import full_length_tau, rates
from vllm_dflash.serving import patching
from vllm_dflash.serving.draft_stats import engine_of, read_stats, stats_file
from vllm_dflash.serving.expectation import AcceptanceWatch, Expectation, read_expectation
from vllm_dflash.serving.frontend.learning_metrics import LearningCollector

_PREFIX = "vllm_dflash:"
_TAU_TEXT = "Tokens per verify step, bonus token included, since start (pooled)."


class DraftLengthCollector:
    """The latest figures of a server's engines, as Prometheus metrics.

    Args:
        names: labels that vLLM gives every metric.
        engines: their values, and the file with the engine's figures.
    """

    #: As Prometheus' own metrics have it: what :func:`drafter_metrics_class` finds ours by.
    _name = f"{_PREFIX}draft_lengths"

    def __init__(self, names: Sequence[str], engines: Sequence[tuple[list[str], Path]]) -> None:
        self.names, self.engines = list(names), engines

    def describe(self) -> list[Any]:
        """No names ahead of the figures, which may come late."""
        return []

    def collect(self) -> Iterator[Any]:
        """Called by Prometheus for each scrape."""
        read = [(values, read_stats(path)) for values, path in self.engines]
        known = [(values, raw) for values, raw in read if raw is not None]
        if not known:
            return

        def counter(key: str, text: str, name: str | None = None, label: str | None = None) -> Any:
            labels = [*self.names, label] if label else self.names
            family = CounterMetricFamily(_PREFIX + (name or key), text, labels=labels)
            for values, raw in known:
                if label is None:
                    family.add_metric(values, raw[key])
                    continue
                given = raw[key]
                rows = given.items() if isinstance(given, dict) else enumerate(given)
                for part, value in rows:
                    family.add_metric([*values, str(part)], value)
            return family

        yield counter("steps", "Verifier steps without prompt chunks.")
        yield counter("drafted_steps", "Steps before which the drafter ran.")
        yield counter(
            "lengths", "How often each draft length was chosen.", "draft_length", "length"
        )
        yield counter("drafts", "Drafts sent to the verifier.", label="source")
        for key, text in (
            ("proposed", "Draft tokens sent to the verifier."),
            ("accepted", "Draft tokens accepted."),
            ("expected", "Draft tokens expected to be accepted."),
        ):
            yield counter(key, text, f"{key}_tokens", "source")
        yield counter("seconds", "Spent on those steps.", "step_seconds")
        yield counter("plain_seconds", "What their tokens would have taken without speculation.")
        speedup = GaugeMetricFamily(
            f"{_PREFIX}estimated_speedup",
            "Estimated speed over no speculation since start.",
            labels=self.names,
        )
        for values, raw in known:
            if raw["seconds"]:
                speedup.add_metric(values, raw["plain_seconds"] / raw["seconds"])
        if speedup.samples:
            yield speedup


class AcceptanceCollector:
    """Served and expected acceptance of the drafter, comparable, as Prometheus metrics.

    Args:
        names: labels that vLLM gives every metric, ``engines`` their values by engine.
        drafter: folder or hub name.
        num_tokens: K, the most tokens of a draft.
        paths: the engines' files, where draft lengths may be chosen; then their counts are the drafter's own.
        expectation: of the drafter's training.
    """

    _name = f"{_PREFIX}drafter_acceptance"

    def __init__(
        self,
        names: Sequence[str],
        engines: Mapping[int, Sequence[object]],
        drafter: str,
        num_tokens: int,
        paths: Mapping[int, Path],
        expectation: Expectation | None,
    ) -> None:
        self.names, self.engines = list(names), engines
        self.drafter, self.paths, self.expectation = drafter, paths, expectation
        self.watch = AcceptanceWatch(expectation)
        self._counts = {i: ([0] * num_tokens, [0] * num_tokens) for i in engines}

    def observe(self, stats: Any, engine: int) -> None:
        """Counts the drafts of one step, where all are of one length."""
        length, rest = divmod(stats.num_draft_tokens, stats.num_drafts or 1)
        compared, right = self._counts[engine]
        if not stats.num_drafts or rest or length > len(compared):
            return  # drafts of several lengths: where each of them ended is not known
        accepted = stats.num_accepted_tokens_per_pos
        for k in range(length):
            compared[k] += accepted[k - 1] if k else stats.num_drafts
            right[k] += accepted[k]
        if not any(p.exists() for p in self.paths.values()):  # else engines watch their own counts
            columns = zip(*self._counts.values(), strict=True)
            self.watch.look(*([sum(c) for c in zip(*rows, strict=True)] for rows in columns))

    def describe(self) -> list[Any]:
        """No names ahead of the figures, which may come late."""
        return []

    def collect(self) -> Iterator[Any]:
        """Called by Prometheus for each scrape."""
        served = GaugeMetricFamily(
            f"{_PREFIX}drafter_acceptance_length",
            "Acceptance length of full-length drafts by the served acceptance of their positions.",
            labels=[*self.names, "drafter"],
        )
        expected = GaugeMetricFamily(
            f"{_PREFIX}expected_acceptance_length",
            "The same on held-out data of the drafter's training.",
            labels=[*self.names, "drafter", "source"],
        )
        for engine, values in self.engines.items():
            raw = read_stats(self.paths[engine]) if engine in self.paths else None
            labels = [*map(str, values), self.drafter]
            compared, right = (raw["compared"], raw["right"]) if raw else self._counts[engine]
            if compared[0]:
                served.add_metric(labels, full_length_tau(rates(compared, right)))
            for source, tau in (self.expectation.taus if self.expectation else {}).items():
                expected.add_metric([*labels, source], tau)
        yield served
        if self.expectation:
            yield expected


class PooledAcceptance:
    """``vllm_dflash:acceptance_length`` of a server with several API processes.

    Each process sees some of the steps only; the sums of vLLM's counters have them all.

    Args:
        names: labels that vLLM gives every metric, ``engines`` their values by engine.
        drafter: folder or hub name.
    """

    _name = f"{_PREFIX}acceptance_length"

    def __init__(
        self, names: Sequence[str], engines: Mapping[int, Sequence[object]], drafter: str
    ) -> None:
        self.names, self.engines, self.drafter = list(names), engines, drafter

    def describe(self) -> list[Any]:
        """No names ahead of the figures, which may come late."""
        return []

    def collect(self) -> Iterator[Any]:
        """Called by Prometheus for each scrape."""
        registry = prometheus_client.CollectorRegistry()
        multiprocess.MultiProcessCollector(registry)
        tau = GaugeMetricFamily(self._name, _TAU_TEXT, labels=[*self.names, "drafter"])
        for values in self.engines.values():
            labels = dict(zip(self.names, map(str, values), strict=True))
            drafts, accepted = (
                registry.get_sample_value(f"vllm:spec_decode_num_{name}_total", labels) or 0
                for name in ("drafts", "accepted_tokens")
            )
            if drafts:
                tau.add_metric([*map(str, values), self.drafter], 1 + accepted / drafts)
        yield tau


_COLLECTORS = (DraftLengthCollector, AcceptanceCollector, PooledAcceptance, LearningCollector)


class _OfThisProcess:
    """Our collectors, for a registry that has only what Prometheus shares between processes.

    They read files, which say the same in each process.
    """

    def describe(self) -> list[Any]:
        """No names ahead of the figures."""
        return []

    def collect(self) -> Iterator[Any]:
        for collector in list(prometheus_client.REGISTRY._collector_to_names):
            if isinstance(collector, _COLLECTORS):
                yield from collector.collect()


def wrap_metrics_route(original):
    """Wraps vLLM's ``attach_router`` of ``/metrics``: with several API processes ours are there, too."""

    @functools.wraps(original)
    def attach_router(app):
        if several_processes():
            registry = prometheus_client.CollectorRegistry()
            multiprocess.MultiProcessCollector(registry)
            registry.register(_OfThisProcess())

            # Before vLLM's of that path, which makes a registry without ours for each request.
            @app.get("/metrics", include_in_schema=False)
            def metrics() -> Response:
                return Response(
                    prometheus_client.generate_latest(registry),
                    media_type=prometheus_client.CONTENT_TYPE_LATEST,
                )

        original(app)

    return attach_router


def several_processes() -> bool:
    """Whether vLLM's metrics are shared by several API processes."""
    return "PROMETHEUS_MULTIPROC_DIR" in os.environ


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
            tokens = str(speculative_config.num_speculative_tokens)
            for values in per_engine_labelvalues.values():
                info.labels(*values, drafter, tokens).set(1)
            self._tau = {}
            if several_processes():
                patching.apply("several API processes")
                registry.register(PooledAcceptance(labelnames, per_engine_labelvalues, drafter))
            else:
                tau = prometheus_client.Gauge(
                    f"{_PREFIX}acceptance_length", _TAU_TEXT, [*labelnames, "drafter"]
                )
                self._tau = {i: tau.labels(*v, drafter) for i, v in per_engine_labelvalues.items()}
            self._totals = dict.fromkeys(per_engine_labelvalues, (0, 0))
            name = getattr(speculative_config, "dflash_stats", None)
            engines = per_engine_labelvalues
            paths = {} if name is None else {i: stats_file(engine_of(name, i)) for i in engines}
            learn = getattr(speculative_config, "dflash_learn", None)
            if learn is not None:
                registry.register(LearningCollector(Path(learn)))
            if paths:
                rows = [([str(v) for v in engines[i]], path) for i, path in paths.items()]
                registry.register(DraftLengthCollector(labelnames, rows))
            num_tokens = speculative_config.num_speculative_tokens
            revision = getattr(speculative_config, "revision", None)
            self._acceptance = AcceptanceCollector(
                labelnames,
                per_engine_labelvalues,
                drafter,
                num_tokens,
                paths,
                read_expectation(drafter, revision, num_tokens),
            )
            # vLLM's adaptive verification leaves out tokens that its counts have: by position they say
            # nothing of the drafter.
            self._by_position = not getattr(
                speculative_config, "enable_adaptive_verification", False
            )
            if paths or not several_processes():  # its own counts would be of one process
                registry.register(self._acceptance)

        def observe(self, spec_decoding_stats, engine_idx: int = 0):
            super().observe(spec_decoding_stats, engine_idx)
            if self._tau is None:
                return
            drafts, accepted = self._totals[engine_idx]
            drafts += spec_decoding_stats.num_drafts
            accepted += spec_decoding_stats.num_accepted_tokens
            self._totals[engine_idx] = (drafts, accepted)
            if drafts and self._tau:
                self._tau[engine_idx].set(1 + accepted / drafts)
            if self._by_position:
                self._acceptance.observe(spec_decoding_stats, engine_idx)

    return DrafterProm
