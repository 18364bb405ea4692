"""What a step costs: seconds by tokens in the batch and by context, measured, refined while serving."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

#: Numbers of tokens at which the step's cost is kept; straight lines between them.
_KNOTS = (
    *range(1, 8), *range(8, 16, 2), *range(16, 32, 4), *range(32, 64, 8), *range(64, 128, 16),
    *range(128, 257, 32),
)  # fmt: skip
#: A step as far off as this factor is as much evidence as one that is farther: neighbours on the machine, a
#: page fault, a garbage collection.
_BELIEVED = math.log(1.35)
#: Share of a surprise that is put down to the whole machine being faster or slower now.
_MACHINE_RATE = 0.05
#: Share of a surprising second that is put down to verifying drafts at all, in steps that do.
_CHECK_RATE = 0.1
#: Observations that a calibrated knot counts for.
_KNOT_WEIGHT = 8.0
#: Observations after which a knot's old ones count no more.
_KNOT_MEMORY = 60.0


def knots(max_tokens: int) -> np.ndarray:
    """The numbers of tokens, ascending, up to ``max_tokens`` and by doubling beyond the table."""
    out = [n for n in _KNOTS if n < max_tokens]
    while out and out[-1] * 2 < max_tokens and out[-1] >= _KNOTS[-1]:
        out.append(out[-1] * 2)
    return np.array([*out, max_tokens])


class StepCost:
    """Seconds of the verifier's step and of a draft pass.

    A step with N tokens of B requests that see S tokens of context altogether costs
    ``machine * (base(N) + per_context * S + per_pair * N / B * S)``, and ``machine * check`` more where any
    of them are drafts (vLLM's rejection sampler instead of its plain one); a draft pass with Q query tokens
    ``machine * (draft_fixed + per_query * Q)``. All but the form is measured. ``machine`` follows the speed
    of the machine from step to step, so that other load moves all costs together and choices, which depend
    on their ratios, stay.

    Args:
        tokens: numbers of tokens that were measured, ascending.
        seconds: of steps with so many tokens and next to no context.
        per_context: seconds for each token of context of the batch.
        per_pair: seconds for each pair of a token and a token of its context.
        draft: seconds of a draft pass: fixed, and for each query token.
        overhead: seconds between steps: scheduling, sampling, messages.
        check: seconds that a step with drafts takes longer than one with as many tokens and none.
    """

    def __init__(
        self,
        tokens: Sequence[int],
        seconds: Sequence[float],
        *,
        per_context: float = 0.0,
        per_pair: float = 0.0,
        draft: tuple[float, float] = (0.0, 0.0),
        overhead: float = 0.0,
        check: float = 0.0,
        max_tokens: int = 0,
    ) -> None:
        self.tokens_N = knots(max(max_tokens, int(tokens[-1])))
        self._knots: list[int] = self.tokens_N.tolist()
        self.base_N = np.maximum(_interpolate(self.tokens_N, tokens, seconds), 1e-7)
        self.per_context, self.per_pair = per_context, per_pair
        self.draft_fixed, self.per_query = draft
        self.overhead, self.check = overhead, check
        self.machine = 1.0
        self._seen_N = np.full(len(self.tokens_N), _KNOT_WEIGHT)
        self.steps = 0
        self._asked: tuple[int, int, int] | None = None
        self._tokens_M = self._base_M = np.empty(0)

    def step(self, num_tokens: Any, num_requests: int, context: float) -> Any:
        """Seconds of steps without drafts with these numbers of tokens (a number or an array of them)."""
        return self._with_context(self._base(num_tokens), num_tokens, num_requests, context)

    def _with_context(self, base: Any, num_tokens: Any, num_requests: int, context: float) -> Any:
        fixed = self.machine * self.per_context * context + self.overhead
        per_token = self.machine * self.per_pair / max(num_requests, 1) * context
        return self.machine * base + (fixed + per_token * num_tokens)

    def _base(self, num_tokens: Any) -> Any:
        if not isinstance(num_tokens, int):
            return _interpolate(num_tokens, self.tokens_N, self.base_N)
        # One number, as each step asks for several times: an array costs more than it holds.
        i = bisect.bisect_left(self._knots, num_tokens)
        if i == len(self._knots):
            return float(_interpolate(num_tokens, self.tokens_N, self.base_N))
        high = float(self.base_N[i])
        if i == 0 or self._knots[i] == num_tokens:
            return high
        before, low = self._knots[i - 1], float(self.base_N[i - 1])
        return low + (high - low) * (num_tokens - before) / (self._knots[i] - before)

    def verify_one(self, num_requests: int, context: float, num_drafts: int) -> float:
        """Seconds of a step with so many draft tokens in the whole batch."""
        seconds = float(self.step(num_requests + num_drafts, num_requests, context))
        return seconds + (self.machine * self.check if num_drafts else 0.0)

    def verify(self, num_requests: int, context: float, max_drafts: int) -> np.ndarray:
        """Seconds of a step with 0, 1, ... ``max_drafts`` draft tokens in the whole batch.

        They do not fall: what was measured may, by noise, and would make useless tokens look welcome.
        """
        # A step's two decisions ask for the same numbers of tokens; only steps change what those cost.
        asked = (num_requests, max_drafts, self.steps)
        if asked != self._asked:
            tokens_M = np.arange(num_requests, num_requests + max_drafts + 1, dtype=float)
            self._asked, self._tokens_M, self._base_M = asked, tokens_M, self._base(tokens_M)
        seconds_M = self._with_context(self._base_M, self._tokens_M, num_requests, context)
        seconds_M[1:] += self.machine * self.check
        if (seconds_M[1:] < seconds_M[:-1]).any():
            np.maximum.accumulate(seconds_M, out=seconds_M)
        return seconds_M

    def draft(self, num_queries: float) -> float:
        """Seconds of a draft pass."""
        return self.machine * (self.draft_fixed + self.per_query * num_queries)

    def observe_step(
        self,
        num_tokens: int,
        num_requests: int,
        context: float,
        seconds: float,
        num_drafts: int = 0,
    ) -> None:
        """Learns from a step that took ``seconds`` without draft pass and overhead.

        Args:
            num_tokens: of the step, ``num_drafts`` of them drafts.
        """
        if num_tokens > self._knots[-1] or seconds <= 0:
            return
        self.steps += 1
        want = float(self.step(num_tokens, num_requests, context)) - self.overhead
        if num_drafts:
            checked = want + self.machine * self.check
            late = checked * _surprise(seconds, checked)
            self.check = max(self.check + _CHECK_RATE * late / self.machine, 0.0)
            want += self.machine * self.check
        surprise = _surprise(seconds, want)
        self.machine *= math.exp(_MACHINE_RATE * surprise)
        i = bisect.bisect_left(self._knots, num_tokens)
        if self._knots[i] == num_tokens or i == 0:
            near = [(i, 1.0)]
        else:
            low, high = self._knots[i - 1], self._knots[i]
            share = (num_tokens - low) / (high - low)
            near = [(i - 1, 1 - share), (i, share)]
        # The surprise is the attention's and the rest's by their shares of the step.
        base = self.machine * self._base(num_tokens)
        rest = min(base / want, 1.0)
        for knot, share in near:
            self._seen_N[knot] = min(self._seen_N[knot] + share, _KNOT_MEMORY)
            self.base_N[knot] *= math.exp(rest * share * surprise / self._seen_N[knot])
        factor = math.exp((1 - rest) * surprise / _KNOT_MEMORY)
        self.per_context *= factor
        self.per_pair *= factor

    def observe_draft(self, num_queries: int, seconds: float) -> None:
        """Learns from a draft pass."""
        want = self.draft(num_queries)
        if want <= 0 or seconds <= 0:
            return
        factor = math.exp(_surprise(seconds, want) / 20)
        self.draft_fixed *= factor
        self.per_query *= factor

    def observe_overhead(self, seconds: float) -> None:
        """Learns from a pause between steps. Pauses while nothing is asked for are long, and weigh little:
        the estimate goes up by a small step and down by a larger one."""
        if self.overhead == 0:
            self.overhead = min(seconds, 0.2 * float(self.base_N[0]))
        rate = 0.03 if seconds > self.overhead else 0.07
        self.overhead *= 1 + rate * max(-1.0, min(seconds / max(self.overhead, 1e-7) - 1, 1.0))

    def as_dict(self) -> dict[str, Any]:
        """For JSON; the machine's present speed is part of the costs."""
        return {
            "tokens": self.tokens_N.tolist(),
            "seconds": (self.base_N * self.machine).tolist(),
            "per_context": self.per_context * self.machine,
            "per_pair": self.per_pair * self.machine,
            "draft": [self.draft_fixed * self.machine, self.per_query * self.machine],
            "overhead": self.overhead,
            "check": self.check * self.machine,
        }

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> StepCost:
        """ValueError where the dictionary is not one of :meth:`as_dict`'s."""
        try:
            tokens = [int(n) for n in raw["tokens"]]
            numbers = [float(s) for s in raw["seconds"]]
            fixed, per_query = (float(x) for x in raw["draft"])
            rest: dict[str, Any] = {
                k: float(raw[k]) for k in ("per_context", "per_pair", "overhead", "check")
            }
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not the costs of a step: {error!r}") from error
        every = [*numbers, fixed, per_query, *rest.values()]
        ascending = all(a < b for a, b in itertools.pairwise(tokens))
        if (
            not tokens
            or len(tokens) != len(numbers)
            or not ascending
            or not np.isfinite(every).all()
        ):
            raise ValueError(f"not the costs of a step: {len(tokens)} numbers of tokens, {every}")
        if min(every) < 0:
            raise ValueError(f"not the costs of a step: {min(every)} seconds")
        return cls(tokens, numbers, draft=(fixed, per_query), **rest)


def _surprise(seconds: float, want: float) -> float:
    """How much longer than wanted, as a logarithm; as much as is believed."""
    return max(-_BELIEVED, min(math.log(seconds / want), _BELIEVED))


def _interpolate(at: Any, tokens: Any, seconds: Any) -> Any:
    """Straight lines between what was measured, the last one going on behind it."""
    tokens, seconds = np.asarray(tokens, dtype=float), np.asarray(seconds, dtype=float)
    inside = np.interp(at, tokens, seconds)
    if len(tokens) < 2 or np.max(at) <= tokens[-1]:
        return inside
    slope = max((seconds[-1] - seconds[-2]) / (tokens[-1] - tokens[-2]), 0.0)
    return inside + np.maximum(np.asarray(at) - tokens[-1], 0) * slope
