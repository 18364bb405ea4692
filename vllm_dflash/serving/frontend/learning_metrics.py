"""What a learning server does, as Prometheus metrics, read from its folder at every scrape.

Counters are ``vllm_dflash:learn_<name>_total``, gauges ``vllm_dflash:learn_<name>``; docs/user/learning.md
says what each is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

_PREFIX = "vllm_dflash:learn_"
_COUNTERS = {
    "captured": "Finished requests kept to learn from.",
    "duplicates": "Finished requests with the tokens of one that is kept.",
    "unusable": "Finished requests that are too long, or from disk and of another server.",
    "extracted": "Conversations whose features were computed.",
    "not_extracted": "Conversations whose features could not be used.",
    "gave_way": "Times that computing them gave way to a client's request.",
    "steps": "Optimizer steps.",
    "anchors": "Blocks trained on.",
    "slices": "Pieces of work between the engine's steps.",
    "seconds": "Spent on them.",
    "comparisons": "Candidates compared with the drafter that serves.",
    "promotions": "Candidates that came to serve.",
    "rollbacks": "Versions that went back.",
    "not_written": "Candidates that would have come to serve, had there been room on the disk.",
    "skipped_sequences": "Sequences left out of a step for values that are not finite.",
    "written_dropped": "Conversations that the disk was too slow or too full for.",
    "written_damaged": "Lines on disk that could not be read.",
}

#: tau of a version on a source's requests is 1 + accepted tokens / drafts.
_BY_SOURCE = {
    "drafts": "Drafts of the drafter that were verified.",
    "accepted_tokens": "Tokens of them that were accepted.",
}


def latest_status(folder: Path) -> dict[str, Any] | None:
    """The latest figures of the server that learns in a folder; None where there are none."""
    try:
        return json.loads((folder / "status.json").read_text())
    except FileNotFoundError:
        return None


class LearningCollector:
    """Args: the server's ``dflash_learn`` folder."""

    _name = "vllm_dflash:learning"

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def describe(self) -> list[Any]:
        """No names ahead of the figures, which may come late."""
        return []

    def collect(self) -> Iterator[Any]:
        """Called by Prometheus for each scrape."""
        status = latest_status(self.folder)
        if status is None:
            return
        for name, text in _COUNTERS.items():
            yield CounterMetricFamily(_PREFIX + name, text, value=status.get(name, 0))
        for key, text in _BY_SOURCE.items():
            family = CounterMetricFamily(_PREFIX + key, text, labels=["version", "source"])
            for row in status.get("served", ()):  # a server of an older version wrote none
                family.add_metric([str(row["version"]), row["source"]], row[key])
            yield family
        state = GaugeMetricFamily(f"{_PREFIX}state", "1 for the state it is in.", labels=["state"])
        for name in ("learning", "paused", "failed"):
            state.add_metric([name], float(status["state"] == name))
        yield state
        gauges = {
            "version": ("Version of the drafter that serves; 0 is the given one.", "version"),
            "to_learn": ("Visits of conversations that are still to come.", "to_learn"),
            "longest_slice_seconds": ("Longest slice since start.", "longest_slice_seconds"),
        }
        for name, (text, key) in gauges.items():
            yield GaugeMetricFamily(_PREFIX + name, text, value=status[key])
        kept = GaugeMetricFamily(
            f"{_PREFIX}conversations", "Conversations kept.", labels=["part", "source"]
        )
        for part in ("replay", "held_out"):
            for source, number in status[part]["sources"].items():
                kept.add_metric([part, source], number)
        yield kept
        tau = GaugeMetricFamily(
            f"{_PREFIX}held_out_acceptance_length",
            "tau on held-out conversations when the version was promoted.",
            labels=["version"],
        )
        for event in status["history"]:
            if "tau_after" in event:
                tau.add_metric([str(event["version"])], event["tau_after"])
        yield tau
