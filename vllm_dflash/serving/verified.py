"""Draft tokens that the verifier has seen, by source: counted in the engine core, where vLLM counts them.

Only the scheduler knows what became of a draft: trimmed for a budget or a grammar, dropped with a request
that was preempted, verified for one that had been aborted meanwhile. The worker knows where it came from.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vllm_dflash.draft_length.counters import DRAFTER, LOOKUP
from vllm_dflash.serving.draft_stats import StatsFile

_SENT = "_dflash_sent"


@dataclass(frozen=True)
class Sent:
    """A draft on its way to the scheduler.

    Attributes:
        source: drafter or lookup.
        expected: of each token the probability that it is accepted.
    """

    source: str
    expected: tuple[float, ...]


def name_sources(runner: Any, sent: Callable[[], Mapping[str, Sent]]) -> None:
    """In a worker: the V1 runner's draft tokens take along where they come from.

    Args:
        sent: gives the latest drafts by request.
    """
    take = runner.take_draft_token_ids

    def take_draft_token_ids() -> Any:
        drafts = take()
        if drafts is not None:
            setattr(drafts, _SENT, dict(sent()))
        return drafts

    runner.take_draft_token_ids = take_draft_token_ids


def count_by_source(scheduler: Any, file: StatsFile) -> None:
    """In the engine core: counts what vLLM counts, by the sources that the workers name."""
    counts: dict[str, dict[str, float]] = {
        key: {DRAFTER: 0, LOOKUP: 0} for key in ("drafts", "proposed", "accepted", "expected")
    }
    update = scheduler.update_draft_token_ids

    def update_draft_token_ids(draft_token_ids: Any) -> None:
        update(draft_token_ids)
        for name, sent in getattr(draft_token_ids, _SENT, {}).items():
            request = scheduler.requests.get(name)
            if request is not None:
                setattr(request, _SENT, sent)

    def count(name: str, proposed: int, accepted: int) -> None:
        sent: Sent | None = getattr(scheduler.requests[name], _SENT, None)
        if sent is None:
            return
        counts["drafts"][sent.source] += 1
        counts["proposed"][sent.source] += proposed
        counts["accepted"][sent.source] += accepted
        counts["expected"][sent.source] += sum(sent.expected[:proposed])
        file.put(lambda: counts)

    scheduler.update_draft_token_ids = update_draft_token_ids
    scheduler.make_spec_decoding_stats = counting(scheduler.make_spec_decoding_stats, count)


def counting(
    make: Callable[..., Any], count: Callable[[str, int, int], None]
) -> Callable[..., Any]:
    """Wraps a scheduler's ``make_spec_decoding_stats``, which vLLM calls for each draft that was verified.

    Args:
        make: of the scheduler.
        count: gets the request's id, how many draft tokens were verified, and how many of them accepted.
    """
    signature = inspect.signature(make)

    @functools.wraps(make)
    def make_spec_decoding_stats(*args: Any, **kwargs: Any) -> Any:
        # vLLM's call has keywords, and comes for each request of each step.
        given = kwargs if "request_id" in kwargs else signature.bind(*args, **kwargs).arguments
        name, invalid = given["request_id"], given.get("num_invalid_spec_tokens") or {}
        # Those that a grammar excluded were filled in only to keep their number.
        proposed = given["num_draft_tokens"] - invalid.get(name, 0)
        count(name, proposed, given["num_accepted_tokens"])
        return make(*args, **kwargs)

    return make_spec_decoding_stats
