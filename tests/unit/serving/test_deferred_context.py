"""Which rows of context that waits are written, and when: with a stand-in for the proposer, no engine."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

from vllm_dflash import ops
from vllm_dflash.serving.worker.v1 import deferred_context
from vllm_dflash.serving.worker.v1.deferred_context import DeferredContext

BLOCK = 4


class Model:
    """Writes down the slots that are stored, and the features stored there."""

    def __init__(self) -> None:
        self.written: list[list[int]] = []
        self.cache: dict[int, float] = {}

    def combine_hidden_states(self, features: torch.Tensor) -> torch.Tensor:
        return features

    def precompute_and_store_context_kv(self, states, positions, slots) -> None:
        kept = slots != ops.PAD_SLOT
        self.written.append(slots[kept].tolist())
        self.cache |= dict(zip(slots[kept].tolist(), states[kept, 0].tolist(), strict=True))


class World:
    """Requests of a batch; a request's slots are its own hundred, a token's feature is its slot."""

    def __init__(
        self, prefix_caching: bool = True, groups: int = 1, connector=None, sliding: bool = False
    ) -> None:
        self.model = Model()
        sizes = {"block_size": BLOCK, "num_kv_heads": 1, "head_size": 8, "dtype": torch.float32}
        spec = (
            SlidingWindowSpec(**sizes, sliding_window=8) if sliding else FullAttentionSpec(**sizes)
        )
        group = SimpleNamespace(kv_cache_spec=spec)
        self.runner = SimpleNamespace(
            requests={},
            uses_mrope=False,
            input_batch=SimpleNamespace(req_ids=[], num_tokens_no_spec=[]),
            kv_cache_config=SimpleNamespace(kv_cache_groups=[group] * groups),
        )
        self.proposer = SimpleNamespace(
            runner=self.runner,
            model=self.model,
            kv_groups=SimpleNamespace(single=True),
            max_query_len=3,
            vllm_config=SimpleNamespace(
                kv_transfer_config=connector,
                cache_config=SimpleNamespace(enable_prefix_caching=prefix_caching),
            ),
        )
        self.lens: dict[str, int] = {}
        self.context = DeferredContext(self.proposer)

    def step(self, *requests: str, tokens: int = 1) -> None:
        slots: list[int] = []
        for r in requests:
            self.runner.requests.setdefault(r, None)
            begin = self.lens.get(r, 0)
            slots += range(100 * int(r) + begin, 100 * int(r) + begin + tokens)
            self.lens[r] = begin + tokens
        batch = self.runner.input_batch
        batch.req_ids, batch.num_tokens_no_spec = list(requests), [self.lens[r] for r in requests]
        at = torch.tensor(slots)
        metadata = SimpleNamespace(
            slot_mapping=at,
            query_start_loc_cpu=torch.arange(0, len(slots) + 1, tokens, dtype=torch.int32),
        )
        features = at[:, None].float().repeat(1, 8)
        self.context.add(features, at[: len(requests)], at % 100, metadata, None)

    def scheduled(self, new=(), blocks=(), ended=(), preempted=(), resumed=()) -> None:
        """What the runner is told before a step."""
        self.context.before_step(
            SimpleNamespace(
                scheduled_new_reqs=[SimpleNamespace(req_id=r) for r in new],
                scheduled_cached_reqs=SimpleNamespace(
                    new_block_ids=list(blocks), resumed_req_ids=set(resumed)
                ),
                finished_req_ids=set(ended),
                preempted_req_ids=set(preempted),
            )
        )

    def end(self, request: str) -> None:
        del self.runner.requests[request]


def test_ended_requests_leave_their_full_blocks() -> None:
    world = World()
    world.step("1", "2", tokens=3)
    for _ in range(7):
        world.step("1", "2")
    assert world.model.written == []
    assert world.context.waiting == 20
    world.end("1")
    world.step("2", "3")
    # Ten tokens: two full blocks of four.
    assert world.model.written == [list(range(100, 108))]
    assert world.context.waiting == 12
    world.context.flush()
    assert sorted(world.model.cache) == [*range(100, 108), *range(200, 211), 300]
    assert all(slot == feature for slot, feature in world.model.cache.items())
    assert world.context.waiting == 0


def test_a_draft_pass_needs_the_rows_of_its_requests() -> None:
    world = World()
    world.step("1", "2", "3", tokens=6)
    world.end("3")
    world.runner.input_batch.req_ids = ["2", "1"]
    world.runner.input_batch.num_tokens_no_spec = [6, 4]
    world.context.flush_for([0])
    # Of the other one its full block, which the second may share.
    assert world.model.written == [[300, 301, 302, 303], [100, 101, 102, 103, *range(200, 206)]]
    world.step("2", "1")
    # The pass writes rows of both behind those that wait: another block may be full by then.
    world.runner.input_batch.num_tokens_no_spec = [7, 7]
    world.context.flush_for([0])
    assert world.model.written[2:] == [[104, 105, 206, 106]]
    assert world.context.waiting == 0


def test_without_prefix_caching_they_leave_nothing() -> None:
    world = World(prefix_caching=False)
    world.step("1", "2", tokens=9)
    world.end("1")
    world.end("2")
    world.step("3")
    assert world.model.written == []
    assert world.context.waiting == 1


def test_preempted_requests_leave_everything() -> None:
    world = World()
    world.step("1", "2", tokens=5)
    world.step("2")
    assert world.model.written == [[100, 101, 102, 103, 104]]
    world.step("2", "1")
    assert world.context.waiting == 5 + 1 + 2


@pytest.mark.parametrize(
    "change", [{"preempted": "1"}, {"resumed": "1"}, {"ended": "1", "new": "1"}]
)
def test_blocks_that_change_hands_at_once(change) -> None:
    """Preempted and resumed in one step, or ended and another of the same name: the batch looks the same."""
    world = World()
    world.step("1", "2", tokens=3)
    world.scheduled(new=["3"], ended=["4"], blocks=[([7],)])
    assert world.model.written == []
    world.scheduled(**{name: list(ids) for name, ids in change.items()})
    assert world.model.written == [[100, 101, 102, 200, 201, 202]]


@pytest.mark.parametrize("kind", [{"groups": 2}, {"sliding": True}])
def test_blocks_that_may_pass_on_while_requests_run(kind) -> None:
    world = World(**kind)
    world.step("1", "2", tokens=3)
    world.end("1")
    world.step("2")
    assert world.model.written == [[100, 101, 102, 200, 201, 202]]
    world.scheduled(blocks=[None])
    assert len(world.model.written) == 1
    world.scheduled(blocks=[([7],)])
    assert world.model.written[1:] == [[203]]


def test_no_more_wait_than_there_is_room_for(monkeypatch) -> None:
    monkeypatch.setattr(deferred_context, "_BYTES", 16 * 8 * 4)
    world = World()
    for _ in range(8):
        world.step("1", "2")
    assert world.model.written == []
    # No gaps: the oldest quarter is written.
    world.step("1", "2")
    assert world.model.written == [[100, 200, 101, 201]]
    assert world.context.waiting == 14
    # Gaps are closed first.
    world.end("1")
    world.step("2")
    assert world.model.written[1:] == [[102, 103, 104, 105, 106, 107]]
    for _ in range(6):
        world.step("2")
    assert len(world.model.written) == 2
    assert world.context.waiting == 7 + 7
    # More than a quarter of the room at once: everything.
    world.step("2", "3", tokens=3)
    assert world.context.waiting == 0
    world.step("2", "3")
    world.context.flush()
    assert sorted(world.model.cache) == [*range(100, 108), *range(200, 220), *range(300, 304)]
    assert all(slot == feature for slot, feature in world.model.cache.items())


def test_a_connector_gets_rows_at_once() -> None:
    world = World(connector=object())
    world.step("1", "2")
    assert world.model.written == [[100, 200]]
