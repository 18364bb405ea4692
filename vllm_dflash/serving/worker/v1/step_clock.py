"""When the V1 runner's steps begin and end, and what was done in one."""

from __future__ import annotations

import time
from dataclasses import dataclass


class StepClock:
    """When the runner's present step began, and when the last one let go."""

    def __init__(self) -> None:
        self.began = self.ended = 0.0

    def start(self) -> None:
        """A step begins."""
        self.began = time.perf_counter()


@dataclass(slots=True)
class StepDone:
    """The step that is done.

    Attributes:
        decoding: whether it had no prompt chunks.
        num_requests, context: its requests, and their tokens altogether.
        emitted, drafts, accepted: tokens put out, draft tokens verified and accepted, of all requests.
        seconds: that it took; 0 where that is not known.
    """

    decoding: bool
    num_requests: int
    context: int
    emitted: int
    drafts: int
    accepted: int
    seconds: float
