"""How fast requests have been going: what a token is worth that need not be generated later."""

from __future__ import annotations

from collections.abc import Iterable

#: Times of plain steps after which what a request did counts half, and those that all requests' mean counts.
_HALF_LIFE, _PRIOR = 60.0, 20.0
_DECAY = 0.5 ** (1 / _HALF_LIFE)


class Pace:
    """Tokens of requests per time of a step without speculation: 1 without it, 2 for twice as fast.

    A step's own tokens per second are the wrong thing to maximise where steps differ. In one that has a long
    match they are high, and would make the match's last tokens, which cost little, look as if they cost
    much. What those tokens save is the time that the request would else take for them, at its usual pace.
    """

    def __init__(self) -> None:
        self._all = [_PRIOR, _PRIOR]
        self._requests: dict[str, list[float]] = {}

    def add(self, request: str, tokens: float, time: float) -> None:
        """Counts a step: ``tokens`` that were to come, in ``time`` steps without speculation."""
        counts = self._requests.get(request)
        if counts is None:
            counts = self._requests[request] = [0.0, 0.0]
        for of in (counts, self._all):
            of[0] = of[0] * _DECAY + tokens
            of[1] = of[1] * _DECAY + time

    def of(self, requests: Iterable[str]) -> float:
        """The sum of the requests' paces, each 1 at least."""
        mean, total = self._all[0] / self._all[1], 0.0
        for request in requests:
            tokens, time = self._requests.get(request, (0.0, 0.0))
            total += max((tokens + _PRIOR * mean) / (time + _PRIOR), 1.0)
        return total

    def forget(self, request: str) -> None:
        """The request has ended."""
        self._requests.pop(request, None)
