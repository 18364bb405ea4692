"""Thinking budgets beside drafts, against vLLM's own state without a drafter; engines are in
test_request_fields.py."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")
from vllm.v1.sample.logits_processor.interface import BatchUpdate, MoveDirectionality
from vllm.v1.sample.thinking_budget_state import ThinkingBudgetStateHolder

from vllm_dflash.serving.worker.v1.thinking_budget import ThinkingBudgets

VOCAB = 6
MOST_DRAFTS = 4


@dataclass
class Written:
    """A request: what vLLM's batch knows of it, and what a verifier would say."""

    prompt: list[int]
    budget: int | None
    seed: int
    output: list[int] = field(default_factory=list)

    @property
    def params(self) -> Any:
        return SimpleNamespace(thinking_token_budget=self.budget)

    def logits(self, output: list[int]) -> torch.Tensor:
        """Logits ``[V]`` behind an output: any function of the tokens."""
        rng = random.Random(f"{self.seed} {self.prompt} {output}")
        return torch.tensor([rng.random() for _ in range(VOCAB)])


def holder(cls: type, start: list[int], end: list[int], num_drafts: int) -> Any:
    config: Any = SimpleNamespace(reasoning_start_token_ids=start, reasoning_end_token_ids=end)
    return cls(config, 8, num_drafts, torch.device("cpu"), False)


def joins(state: Any, row: int, request: Written) -> None:
    added = [(row, request.params, request.prompt, request.output)]
    state.sync_batch(BatchUpdate(8, removed=[], added=added, moved=[]))


def alone(request: Written, start: list[int], end: list[int], length: int) -> list[int]:
    """What vLLM writes for it without a drafter."""
    state = holder(ThinkingBudgetStateHolder, start, end, 0)
    told = Written(request.prompt, request.budget, request.seed)
    joins(state, 0, told)
    for _ in range(length):
        logits = told.logits(told.output)[None]
        state.update_state([told.output], [[]])
        told.output.append(int(state.apply_to_logits(logits, False, [[]]).argmax()))
    return told.output


def step(state: Any, rows: list[Written], drafts: list[list[int]]) -> None:
    """One step of a batch as the V1 runner's samplers take it, greedy."""
    written = [r.output for r in rows]
    bonus = torch.stack([r.logits([*r.output, *d]) for r, d in zip(rows, drafts, strict=True)])
    plain = not any(drafts)
    state.update_state(written, drafts)
    bonus = state.apply_to_logits(bonus, not plain, drafts)
    target = [
        r.logits([*r.output, *d[:i]])
        for r, d in zip(rows, drafts, strict=True)
        for i in range(len(d))
    ]
    verified = torch.stack(target) if target else torch.empty(0, VOCAB)
    if not plain:
        verified = state.apply_to_logits(verified, False, drafts)
    at = 0
    for row, (request, draft) in enumerate(zip(rows, drafts, strict=True)):
        best = verified[at : at + len(draft)].argmax(-1).tolist()
        at += len(draft)
        best.append(int(bonus[row].argmax()))
        accepted = next((i for i, d in enumerate(draft) if best[i] != d), len(draft))
        request.output.extend(best[: accepted + 1])


def wrong(cls: type, seed: int, preempt: bool = False) -> int:
    """Requests of a random batch whose output is not what they get without a drafter."""
    rng = random.Random(seed)
    start = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 2))]
    end = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 3))]
    length = 40
    waiting = []
    for _ in range(8):
        prompt = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 6))]
        if rng.random() < 0.5:
            prompt += start
        budget = rng.choice([None, 0, 1, 2, 5, 9, 20])
        waiting.append(Written(prompt, budget, rng.randrange(10**6)))
    want = {id(r): alone(r, start, end, length + MOST_DRAFTS) for r in waiting}
    everyone = list(waiting)
    state = holder(cls, start, end, MOST_DRAFTS)
    rows: list[Written] = []
    share = rng.choice([0.0, 0.3, 0.9])
    while waiting or rows:
        while waiting and len(rows) < 4:
            joins(state, len(rows), waiting[0])
            rows.append(waiting.pop(0))
        if len(rows) > 1 and rng.random() < 0.2:
            moved = [(0, 1, MoveDirectionality.SWAP)]
            state.sync_batch(BatchUpdate(len(rows), removed=[], added=[], moved=moved))
            rows[0], rows[1] = rows[1], rows[0]
        drafts = []
        for r in rows:
            coming = want[id(r)][len(r.output) :]
            draft = coming[: rng.randint(0, MOST_DRAFTS)] if rng.random() < share else []
            drafts.append([t if rng.random() < 0.8 else rng.randrange(VOCAB) for t in draft])
        step(state, rows, drafts)
        for row in reversed(range(len(rows))):
            if len(rows[row].output) < length:
                if not preempt or rng.random() < 0.9:
                    continue
                waiting.insert(0, rows[row])
            # The last row takes the place of one that leaves, which then no longer counts as removed.
            last = len(rows) - 1
            moved = [(last, row, MoveDirectionality.UNIDIRECTIONAL)] if row < last else []
            removed = [] if moved else [row]
            state.sync_batch(BatchUpdate(last, removed=removed, added=[], moved=moved))
            rows[row] = rows[last]
            rows.pop()
    return sum(r.output[:length] != want[id(r)][:length] for r in everyone)


@pytest.mark.parametrize("preempt", [False, True])
def test_each_request_as_without_a_drafter(preempt) -> None:
    assert sum(wrong(ThinkingBudgets, seed, preempt) for seed in range(24)) == 0


def test_a_row_does_not_inherit_a_budget() -> None:
    """The first of two rows, which has a budget, is done, and the second moves there: vLLM's state fails."""
    done, other = Written([1], 0, 0, [3]), Written([2], None, 0, [3])
    moved = [(1, 0, MoveDirectionality.UNIDIRECTIONAL)]
    for cls, forced in ((ThinkingBudgets, 0), (ThinkingBudgetStateHolder, 1)):
        state = holder(cls, [1], [2], 0)
        joins(state, 0, done)
        joins(state, 1, other)
        state.sync_batch(BatchUpdate(1, removed=[], added=[], moved=moved))
        state.update_state([other.output], [[]])
        logits = state.apply_to_logits(torch.zeros(1, VOCAB), False, [[]])
        assert int((logits > 1).sum()) == forced


def test_vllm_own_state_is_wrong_beside_drafts() -> None:
    """Guards the test above; once this fails, vLLM's own will do."""
    assert sum(wrong(ThinkingBudgetStateHolder, seed) for seed in range(24)) > 24


@pytest.mark.parametrize(
    ("tokens", "found"),
    [
        ([], [1]),
        ([1, 2, 1, 2, 3], [1, 2]),
        ([1, 2, 1], [1, 2]),
        ([2], [1, 2]),
        ([1, 1], []),
        ([3, 1], [1]),
    ],
)
def test_last_occurrence(tokens, found) -> None:
    want = ThinkingBudgetStateHolder._find_last_sequence_index(tokens, found)
    ours = holder(ThinkingBudgets, [1], [2], MOST_DRAFTS)
    assert ours._find_last_sequence_index(tokens, found) == want
