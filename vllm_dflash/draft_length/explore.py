"""When to draft although it is not expected to pay, and when not even to look whether it does."""

from __future__ import annotations

from collections.abc import Set

#: How much more a step with drafts must promise than one without: estimates are off by as much.
MARGIN = 1.02
#: Share of the time that may go into drafts made only to see whether drafting pays again. Each of them lowers
#: it by a factor, down to the least, while passes do not bring in a tenth of what they cost.
PROBE_SHARE, PROBE_DECAY, LEAST_PROBE_SHARE, RETURNED = 0.005, 0.8, 0.0015, 0.1
#: Steps that a request's first draft is taken to be of use for.
HORIZON = 20
#: Steps for which a decision against drafting stands while nothing is known anew but what steps cost.
_STANDS = 32
#: Share of its requests that must still be there.
_ENOUGH_LEFT = 0.75


class Exploration:
    """The seconds that probes may take, and the last decision against drafting.

    Attributes:
        budget: seconds earned and not spent.
    """

    def __init__(self) -> None:
        self.budget = 0.0
        self._share = PROBE_SHARE
        self._requests: Set[str] = frozenset()
        self._matched: Set[str] = frozenset()
        self._trials = 0
        self._left = 0

    def earn(self, seconds: float) -> None:
        """A step of so many seconds without speculation adds its share to the budget."""
        self.budget += self._share * seconds

    def spend(self, seconds: float) -> None:
        """A probe is made."""
        self.budget -= seconds
        self._share = max(PROBE_DECAY * self._share, LEAST_PROBE_SHARE)

    def returned(self, seconds: float, cost: float) -> None:
        """A draft pass brings in so many seconds, or may, and costs so many."""
        if seconds > RETURNED * cost:
            self._share = PROBE_SHARE

    def decided_against(
        self, requests: Set[str], trials: int, matched: Set[str] = frozenset()
    ) -> None:
        """A look found that drafting does not pay.

        Args:
            requests: of the step; ``matched`` those with a match.
            trials: how much was known.
        """
        self._requests, self._matched, self._trials = requests, matched, trials
        self._left = _STANDS

    def stands(
        self, requests: Set[str], trials: int, probe: float, matched: Set[str] = frozenset()
    ) -> bool:
        """Whether the decision against drafting holds in this step: looking costs time, too.

        It holds while nothing was learned, no request has come, few have left, no match that spoke against
        drafting has ended, and the budget does not suffice for a probe.

        Args:
            probe: seconds of one.
        """
        self._left -= 1
        return (
            self._left >= 0
            and trials == self._trials
            and requests <= self._requests
            and len(requests) >= _ENOUGH_LEFT * len(self._requests)
            and self._matched & requests <= matched
            and self.budget < probe
        )
