"""Draft tokens that the verifier has seen, by source: counted in the engine core, where vLLM counts them.

Only the scheduler knows what became of a draft: trimmed for a budget or a grammar, dropped with a request
that was preempted, verified for one that had been aborted meanwhile. The worker knows where it came from.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from typing import Any

from vllm_dflash.draft_length.counters import DRAFTER, LOOKUP
from vllm_dflash.serving.draft_stats import StatsFile
from vllm_dflash.serving.patching import specialise

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


def name_sources(draft_token_ids: Any, sent: Mapping[str, Sent]) -> None:
    """In a worker: the V1 runner's draft tokens take along where they come from, by request."""
    setattr(draft_token_ids, _SENT, dict(sent))


def source_of(request: Any) -> str:
    """Where a request's latest draft came from; the drafter, where nobody named it."""
    sent: Sent | None = getattr(request, _SENT, None)
    return DRAFTER if sent is None else sent.source


class SourceCounts:
    """In the engine core: counts what vLLM counts, by the sources that the workers name.

    Args:
        scheduler: vLLM's, to become one that counts.
        file: gets the counts.
    """

    def __init__(self, scheduler: Any, file: StatsFile) -> None:
        self.scheduler, self.file = scheduler, file
        self.counts: dict[str, dict[str, float]] = {
            key: {DRAFTER: 0, LOOKUP: 0} for key in ("drafts", "proposed", "accepted", "expected")
        }
        count_verified(scheduler, self.count)

    def count(self, name: str, proposed: int, accepted: int) -> None:
        """See :func:`count_verified`."""
        sent: Sent | None = getattr(self.scheduler.requests[name], _SENT, None)
        if sent is None:
            return
        counts = self.counts
        counts["drafts"][sent.source] += 1
        counts["proposed"][sent.source] += proposed
        counts["accepted"][sent.source] += accepted
        counts["expected"][sent.source] += sum(sent.expected[:proposed])
        self.file.put(lambda: counts)


def count_verified(scheduler: Any, count: Callable[[str, int, int], None]) -> None:
    """Has a scheduler tell of each draft that was verified.

    Args:
        scheduler: vLLM's; its class is changed.
        count: gets the request's id, how many draft tokens were verified, and how many of them accepted.
    """
    if specialise(scheduler, "vllm_dflash.serving.verified:counting"):
        scheduler.count_verified = (*scheduler.count_verified, count)


def counting(cls: type) -> type:
    """A subclass of one of vLLM's schedulers that tells of verified drafts, and keeps their sources."""
    names = tuple(inspect.signature(cls.make_spec_decoding_stats).parameters)[1:]  # type: ignore[attr-defined]

    class Counting(cls):  # type: ignore[valid-type,misc]
        count_verified: tuple[Callable[[str, int, int], None], ...] = ()
        #: Requests whose next draft tokens nobody drafted: they say nothing of the drafter.
        padded: Set[str] = frozenset()

        def make_spec_decoding_stats(self, *args: Any, **kwargs: Any) -> Any:
            # vLLM's call has keywords, and comes for each request of each step.
            given = {**dict(zip(names, args, strict=False)), **kwargs} if args else kwargs
            name, invalid = given["request_id"], given.get("num_invalid_spec_tokens") or {}
            if name in self.padded:
                self.padded -= {name}
                return given["spec_decoding_stats"]
            # Those that a grammar excluded were filled in only to keep their number.
            proposed = given["num_draft_tokens"] - invalid.get(name, 0)
            for count in self.count_verified:
                count(name, proposed, given["num_accepted_tokens"])
            return super().make_spec_decoding_stats(*args, **kwargs)

        def update_draft_token_ids(self, draft_token_ids: Any) -> None:
            super().update_draft_token_ids(draft_token_ids)
            for name, sent in getattr(draft_token_ids, _SENT, {}).items():
                request = self.requests.get(name)
                if request is not None:
                    setattr(request, _SENT, sent)

    Counting.__name__ = Counting.__qualname__ = cls.__name__
    Counting.__module__ = cls.__module__
    return Counting
