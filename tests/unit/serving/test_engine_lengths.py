"""What the scheduler tells the policy of its requests, many at once: with stand-ins, no engine."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
from vllm import SamplingParams

from vllm_dflash.draft_length.cost import StepCost
from vllm_dflash.draft_length.scheduler_policy import SchedulerPolicy
from vllm_dflash.serving import draft_limits
from vllm_dflash.serving.engine_core.scheduler import EngineLengths

K, LIMIT = 7, 300


def lengths(requests) -> EngineLengths:
    scheduler = SimpleNamespace(
        running=requests,
        requests={r.request_id: r for r in requests},
        num_spec_tokens=K,
        scored=set(),
    )
    policy = SchedulerPolicy(StepCost([1, 64], [1.0, 2.0], draft=(0.1, 0.0)), K)
    stats = SimpleNamespace(update=lambda counters: None)
    return EngineLengths(scheduler, policy, stats, LIMIT)  # type: ignore[arg-type]


def request(name: str, rng: random.Random) -> SimpleNamespace:
    given = rng.choice([{}, {}, {"seed": 1}, {"min_tokens": 20}, {"seed": 2, "temperature": 0.0}])
    return SimpleNamespace(
        request_id=name,
        sampling_params=SamplingParams(**{"temperature": 0.7, "max_tokens": 40, **given}),
        max_tokens=40,
        num_output_tokens=rng.randrange(41),
        num_output_placeholders=rng.randrange(3),
        num_computed_tokens=rng.choice([100, LIMIT - 3, LIMIT]),
    )


def most_of(request, scheduled: int) -> int:
    """Draft tokens that a request may have, told one by one."""
    written, coming = request.num_output_tokens, request.num_output_placeholders
    steps = (scheduled > 0) + (coming > 0)
    computed = request.num_computed_tokens + scheduled
    left = min(request.max_tokens - written - steps, LIMIT - computed) - 1
    limit = draft_limits.request_limit(request.sampling_params, written, coming)
    return max(left if limit is None else min(left, limit), 0)


def test_what_a_draft_can_be_of_use_for() -> None:
    rng = random.Random(0)
    requests = [request(str(i), rng) for i in range(60)]
    engine = lengths(requests)
    for step in range(30):
        scheduled = [step % 3 * rng.randrange(1, K + 2) for _ in requests]
        batch = engine._batch(requests, [K] * 60, scheduled)
        assert batch.ids == [r.request_id for r in requests]
        assert batch.context == sum(r.num_computed_tokens for r in requests) + sum(scheduled)
        assert batch.most == [most_of(r, n) for r, n in zip(requests, scheduled, strict=True)]
        for r in requests:
            r.num_output_tokens += rng.randrange(2)
    assert len({m > 0 for m in batch.most}) == 2
    # A name that comes again is another request's.
    again = request("0", rng)
    again.sampling_params, again.num_output_tokens = SamplingParams(max_tokens=40, min_tokens=30), 5
    engine.forget(["0"])
    assert engine._batch([again], [K], [0]).most == [most_of(again, 0)] != [40]


def test_limits_are_asked_for_while_there_are_any(monkeypatch) -> None:
    """A request's own limit ends for good: hundreds of others are not asked each step."""
    asked = []
    limit = draft_limits.request_limit
    monkeypatch.setattr(
        draft_limits, "request_limit", lambda p, *a: asked.append(p) or limit(p, *a)
    )
    plain, late = (request(name, random.Random(0)) for name in "ab")
    plain.sampling_params, late.sampling_params = SamplingParams(), SamplingParams(min_tokens=9)
    plain.num_output_tokens = late.num_output_tokens = 0
    engine = lengths([plain, late])
    for _ in range(5):
        engine._batch([plain, late], [K, K], [1, 1])
    assert len(asked) == 1 + 5
    late.num_output_tokens = 9
    for _ in range(5):
        engine._batch([plain, late], [K, K], [1, 1])
    assert len(asked) == 7
    assert np.all(np.array(engine._batch([plain, late], [K, K], [0, 0]).most) > 0)
