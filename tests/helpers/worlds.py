"""Model worlds: a verifier and a drafter of known cost and acceptance, for tests and benchmarks/ablation.py.

Shapes: B requests, K draft tokens.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from vllm_dflash.draft_length.cost import StepCost
from vllm_dflash.draft_length.counters import LOOKUP
from vllm_dflash.draft_length.scheduler_policy import Batch, SchedulerPolicy, VerifyLengths
from vllm_dflash.draft_length.worker_policy import Request

K = 7
ENDLESS = 10**9


def made(tokens_s=lambda n: 1 + 0.02 * n, draft=(0.1, 0.001), **kwargs) -> StepCost:
    tokens = (1, 2, 4, 8, 16, 32, 64, 128)
    return StepCost(tokens, [tokens_s(n) for n in tokens], draft=draft, **kwargs)


class WorkerWorld:
    """A verifier that writes random text, a drafter that foretells each token with a probability.

    Args:
        quality: of each request of the batch; ended requests are followed by one of the same quality.
        confident: whether the drafter knows when it will be right.
        lookup: how often each request has a match; ``matches_hold`` is how often one is right at all, else it
            is wrong from its first token.
        kinds: qualities that new requests have, drawn at random; None for that of the one before.
    """

    def __init__(
        self,
        policy,
        cost,
        quality,
        length=120,
        confident=False,
        seed=0,
        lookup=None,
        matches_hold=1.0,
        kinds=None,
    ):
        self.matches_hold, self.kinds = matches_hold, kinds
        self.other_rng = np.random.default_rng(seed + 1000)
        self.policy, self.cost, self.quality = policy, cost, list(quality)
        self.length, self.confident, self.lookup = length, confident, lookup
        self.rng = np.random.default_rng(seed)
        self.count = itertools.count()
        self.seconds = self.tokens = 0.0
        self.running = [self._new() for _ in quality]
        self.lengths: list[list[int]] = [[] for _ in quality]
        self.passes = self.steps = 0

    def _new(self):
        text = self.rng.integers(1, 10**6, self.length + 20 + K)
        return {"id": f"r{next(self.count)}", "text": text, "done": 20}

    def step(self) -> None:
        for i, r in enumerate(self.running):
            if r["done"] >= self.length:
                self.policy.forget([r["id"]])
                self.running[i] = self._new()
                if self.kinds is not None:
                    self.quality[i] = float(self.other_rng.choice(self.kinds))
        requests, B = [], len(self.running)
        for i, r in enumerate(self.running):
            done = r["done"]
            match = np.empty(0, dtype=np.int64)
            if self.lookup and self.rng.random() < self.lookup[i]:
                match = r["text"][done : done + K].copy()
                if self.other_rng.random() >= self.matches_hold:
                    match[:] = 0
            requests.append(Request(r["id"], r["text"][:done], K, match, 5 if len(match) else 0))
        plan = self.policy.plan(requests)
        drafts = confidence = None
        if plan.drafting:
            drafts, confidence = [], []
            for i in plan.drafting:
                r = self.running[i]
                right = self.rng.random(K) < self.quality[i]
                truth = r["text"][r["done"] : r["done"] + K]
                drafts.append(np.where(right, truth, 0))
                known = np.where(right, 0.97, 0.1) if self.confident else np.full(K, 0.5)
                confidence.append(known)
            drafts, confidence = np.array(drafts), np.array(confidence)
        chosen = self.policy.allocate(plan, drafts, confidence)
        total = B + sum(d.length for d in chosen)
        context = sum(len(r.tokens) for r in requests)
        seconds_M = self.cost.verify(B, context, total - B)
        verify = float(seconds_M[-1]) * self.rng.normal(1, 0.03)
        draft = self.cost.draft(len(plan.drafting) * (K + 1)) if plan.drafting else 0.0
        emitted = 0
        for i, (r, d) in enumerate(zip(self.running, chosen, strict=True)):
            truth = r["text"][r["done"] : r["done"] + d.length]
            given = (
                requests[i].match
                if d.source == LOOKUP
                else (drafts[plan.drafting.index(i)] if d.length else truth)
            )
            same = given[: d.length] == truth
            accepted = d.length if same.all() else int(np.argmin(same))
            r["done"] += accepted + 1
            emitted += accepted + 1
            self.lengths[i].append(d.length)
        self.policy.cost.observe_step(total, B, context, verify, total - B)
        self.policy.counters.add(emitted, B, context, verify + draft, total - B, draft)
        self.seconds += verify + draft
        self.tokens += emitted
        self.passes += bool(plan.drafting)
        self.steps += 1

    def run(self, steps: int) -> float:
        """Tokens per second, of the latter half."""
        for _ in range(steps // 2):
            self.step()
        seconds, tokens = self.seconds, self.tokens
        for _ in range(steps // 2):
            self.step()
        return (self.tokens - tokens) / (self.seconds - seconds)


def fixed_rate(cost, quality, length, context=70):
    """Tokens per second of a fixed draft length for all, in expectation."""
    B = len(quality)
    tokens = sum(1 + np.cumprod(np.full(length, q)).sum() for q in quality)
    seconds = float(cost.verify(B, context * B, B * length)[-1])
    return tokens / (seconds + (cost.draft(B * (K + 1)) if length else 0))


@dataclass
class Step:
    """One step of the world."""

    ids: list[int]
    chosen: VerifyLengths
    accepted: list[int]
    seconds: float
    even: bool
    passed: bool
    drafting: bool


class SchedulerWorld:
    """A device whose steps cost what was calibrated, times ``slow``, and drafts of known quality.

    Args:
        acceptance: probability that a token of request ``i`` is accepted in step ``n`` if those before are.
        requests: at any time; a request that ends is followed by another one.
        per_token, draft: seconds of a token and of a draft pass, where a step of one token takes one.
        uneven: seconds that a step costs more where requests have different numbers of tokens.
        late: outcomes of so many steps are not known when the next one is scheduled.
        max_tokens: of a request.
        graphs: lengths that are no uneven batch beside 0 and all; ``known`` whether the policy is told.
    """

    def __init__(
        self,
        acceptance: Callable[[int, int], float],
        *,
        requests: int = 1,
        per_token: float = 0.01,
        draft: float = 0.2,
        slow: float = 1.0,
        uneven: float = 0.0,
        late: int = 1,
        max_tokens: int = ENDLESS,
        graphs: tuple[int, ...] = (),
        known: bool = True,
        seed: int = 0,
    ) -> None:
        self.acceptance, self.uneven, self.late = acceptance, uneven, late
        self.max_tokens = max_tokens
        self.rng = np.random.default_rng(seed)
        seconds = np.array([1.0, 1.0 + 511 * per_token])
        even = graphs if known else ()
        self.policy = SchedulerPolicy(StepCost([1, 512], seconds, draft=(draft, 0.0)), K, even)
        self.even = {0, K, *graphs}
        self.truth = StepCost([1, 512], slow * seconds, draft=(slow * draft, 0.0))
        self.ids = list(range(requests))
        self.written = dict.fromkeys(self.ids, 0)
        self.steps: list[Step] = []
        self._drafted: set[int] = set()
        self._flying: deque[Step] = deque()

    def run(self, count: int) -> SchedulerWorld:
        for _ in range(count):
            step = self._schedule()
            self.steps.append(step)
            self._flying.append(step)
            while len(self._flying) > self.late:
                self._deliver(self._flying.popleft())
        return self

    def batch(self, drafted: Callable[[int], int] = lambda i: K) -> Batch:
        """The requests as the policy sees them; ``drafted`` tokens each."""
        left = [max(self.max_tokens - self.written[i] - 2, 0) for i in self.ids]
        ids = [str(i) for i in self.ids]
        return Batch(ids, 100.0 * len(ids), [drafted(i) for i in self.ids], left)

    def _schedule(self) -> Step:
        policy, B = self.policy, len(self.ids)
        drafted = self._drafted & set(self.ids)
        chosen = policy.verify_lengths(self.batch(lambda i: K * (i in drafted)))
        assert all(n == 0 or i in drafted for i, n in zip(self.ids, chosen.lengths, strict=True))
        drafting = policy.should_draft(self.batch())
        even = len(set(chosen.lengths)) == 1 and set(chosen.lengths) <= self.even
        accepted = [self._accepted(i, n) for i, n in zip(self.ids, chosen.lengths, strict=True)]
        passed = bool(self._drafted)
        seconds = float(self.truth.step(B + sum(chosen.lengths), B, 0)) + self.uneven * (not even)
        seconds += self.truth.draft(B) * passed
        step = Step(list(self.ids), chosen, accepted, seconds, even, passed, drafting)
        self._drafted = set(self.ids) if drafting else set()
        for i, n in zip(step.ids, accepted, strict=True):
            self.written[i] += n + 1
        return step

    def _accepted(self, request: int, length: int) -> int:
        right = self.rng.random(length) < self.acceptance(request, len(self.steps))
        return length if right.all() else int(np.argmin(right))

    def _deliver(self, step: Step) -> None:
        policy = self.policy
        rows = zip(step.ids, step.chosen.lengths, step.accepted, strict=True)
        seen = []
        for row, (i, length, accepted) in enumerate(rows):
            if i in self.ids:
                predicted = float(step.chosen.predicted_BK[row, :length].sum())
                policy.count(bool(length), length, accepted)
                seen.append((str(i), length, accepted, predicted))
        policy.observe(*(zip(*seen, strict=True) if seen else ([],) * 4))
        policy.observe_step(
            num_requests=len(step.ids),
            drafts=sum(step.chosen.lengths),
            context=0.0,
            emitted=len(step.ids) + sum(step.accepted),
            seconds=step.seconds,
            even=step.even,
            drafted=step.passed if step.passed == step.drafting else None,
        )
        for i in [i for i in self.ids if self.written[i] >= self.max_tokens]:
            policy.forget([str(i)])
            new = max(self.written) + 1
            self.ids[self.ids.index(i)] = new
            self.written[new] = 0

    # -- what came of it

    def speed(self, since: int = 0) -> float:
        """Over that of the same device without speculation."""
        steps = self.steps[since:]
        tokens = sum(len(s.ids) + sum(s.accepted) for s in steps)
        B = len(self.ids)
        plain = float(self.truth.step(B, B, 0)) / B
        return tokens * plain / sum(s.seconds for s in steps)

    def drafted(self, since: int = 0, until: int | None = None) -> float:
        """Share of steps that ended with a draft pass."""
        steps = self.steps[since:until]
        return sum(s.drafting for s in steps) / len(steps)

    def mean_length(self, which: Callable[[int], bool] = lambda i: True, since: int = 0) -> float:
        lengths = [
            n
            for s in self.steps[since:]
            for i, n in zip(s.ids, s.chosen.lengths, strict=True)
            if which(i)
        ]
        return sum(lengths) / len(lengths)


def fixed_speed(acceptance: float, requests: int, per_token: float, draft: float) -> float:
    """What always drafting and verifying all gives, over no speculation."""
    tokens = sum(acceptance**k for k in range(K + 1))
    step = 1 + (requests - 1) * per_token
    return tokens * step / (step + requests * K * per_token + draft)
