"""When to stop looking for drafts for some steps: the search itself takes time on the step's path."""

from __future__ import annotations

#: Share of the latest look in the running averages. Finds may be rare and large: one match in ten steps that
#: saves half a step is worth more than the search, and is not seen in the last sixteen steps.
_RATE = 1 / 100
#: Looks between two naps at least.
_LOOKS = 6
#: Steps of the shortest nap and of the longest one.
_NAPS = (4, 64)


class Doze:
    """Weighs what was found lately against what the search cost.

    In a small model's step of ten milliseconds the search is several per cent. Traffic in which there is
    nothing to find must not pay them in every step; one look in a few then notices when that changes.

    Attributes:
        gain: running mean of the expected gain in tokens per second, 0.1 for a tenth more.
        effort: running mean of the search's time as a share of a step without speculation.
    """

    def __init__(self) -> None:
        self.gain, self.effort = 1.0, 0.0
        self._looks = self._left = 0
        self._nap = _NAPS[0]

    def skips(self) -> bool:
        """Whether the coming step goes without a look."""
        self._left = max(self._left - 1, -1)
        return self._left >= 0

    def note(self, gain: float, effort: float) -> None:
        """Counts one look."""
        self.gain += _RATE * (gain - self.gain)
        # A look that was held up by something else is no costlier.
        self.effort += _RATE * (min(effort, 2 * self.effort + 0.05) - self.effort)
        self._looks += 1
        if self.gain >= self.effort:
            self._nap = _NAPS[0]
        elif self._looks >= _LOOKS:
            self._looks, self._left = 0, self._nap
            self._nap = min(2 * self._nap, _NAPS[1])
