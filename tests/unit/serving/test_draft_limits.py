"""How much may be drafted for a request, and that the scheduler keeps to it; engines are in
test_sampling_fields.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")
from vllm import SamplingParams
from vllm.v1.request import RequestStatus

from vllm_dflash.draft_length.cost import StepCost
from vllm_dflash.draft_length.scheduler_policy import SchedulerPolicy
from vllm_dflash.serving.draft_limits import adopt, request_limit
from vllm_dflash.serving.engine_core.scheduler import EngineLengths
from vllm_dflash.serving.patching import specialise
from vllm_dflash.serving.verified import count_verified


@pytest.mark.parametrize(
    ("params", "written", "coming", "limit"),
    [
        ({}, 3, 0, None),
        ({"temperature": 0.0, "seed": 1}, 3, 0, None),
        ({"temperature": 0.7, "seed": 1}, 3, 0, 0),
        ({"temperature": 0.7, "seed": 0}, 3, 0, 0),
        ({"min_tokens": 10}, 3, 0, 5),
        ({"min_tokens": 10}, 9, 0, 0),
        ({"min_tokens": 10}, 10, 0, None),
        # With a step under way its tokens may or may not come.
        ({"min_tokens": 10}, 3, 4, 1),
        ({"min_tokens": 10}, 7, 4, 0),
    ],
)
def test_limits(params, written, coming, limit) -> None:
    assert request_limit(SamplingParams(max_tokens=64, **params), written, coming) == limit


def test_pooling_has_none() -> None:
    assert request_limit(None, 0) is None


class Scheduler:
    """What is used of vLLM's."""

    num_spec_tokens, max_model_len = 4, 300

    def __init__(self) -> None:
        self.requests: dict[str, Any] = {}
        self.running: list[Any] = []
        self.dynamic_sd_lookup: list[int] | None = None

    def add_request(self, request: Any) -> None:
        self.requests[request.request_id] = request
        self.running.append(request)

    def _update_after_schedule(self, scheduler_output: Any) -> None:
        self.placeholders = [-1] * scheduler_output.num_spec_tokens_to_schedule

    def update_draft_token_ids(self, draft_token_ids: Any) -> None:
        self.drafts = draft_token_ids

    def schedule(self) -> dict[str, int]:
        return {r.request_id: len(r.spec_token_ids) for r in self.running}


def adopted(made: Any, v2: bool = False, positions: int = 100, sample: str = "greedy") -> Any:
    draft = SimpleNamespace(max_model_len=positions)
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=2),
        speculative_config=SimpleNamespace(draft_model_config=draft, draft_sample_method=sample),
        use_v2_model_runner=v2,
    )
    adopt(made, config)
    return made


def scheduler(v2: bool = False) -> Any:
    return adopted(Scheduler(), v2)


def request(name: str, drafts: list[int], computed: int = 20, **params: Any) -> Any:
    return SimpleNamespace(
        request_id=name,
        sampling_params=SamplingParams(max_tokens=64, **params),
        num_computed_tokens=computed,
        num_output_tokens=3,
        num_output_placeholders=0,
        spec_token_ids=drafts,
        is_prefill_chunk=False,
    )


def test_the_scheduler_keeps_to_them() -> None:
    made = scheduler()
    assert (type(made).__name__, type(made).__module__) == ("Scheduler", __name__)
    assert made.dynamic_sd_lookup == [4, 4, 4]
    shared = [-1] * 4
    made.add_request(request("greedy", shared, temperature=0.0))
    made.add_request(request("seeded", shared, seed=1))
    made.add_request(request("least", shared, min_tokens=7))
    assert made.schedule() == {"greedy": 4, "seeded": 0, "least": 2}
    assert shared == [-1] * 4


def test_no_draft_lies_beyond_the_drafters_positions() -> None:
    made, shared = scheduler(), [1, 2, 3, 4]
    for computed in (90, 96, 98, 99, 150):
        made.add_request(request(str(computed), shared, computed, temperature=0.0))
    assert made.schedule() == {"90": 4, "96": 3, "98": 1, "99": 0, "150": 0}
    assert shared == [1, 2, 3, 4]


def test_a_table_of_the_user_stays() -> None:
    made = Scheduler()
    made.dynamic_sd_lookup = [4, 3, 1]
    adopted(made)
    assert made.dynamic_sd_lookup == [4, 3, 1]


@pytest.mark.parametrize("v2", [False, True])
def test_given_log_probabilities(v2) -> None:
    """On the V2 runner nobody has drafts while such a request is in the engine."""
    made = scheduler(v2)
    made.add_request(request("greedy", [1, 2], temperature=0.0))
    assert made.schedule() == {"greedy": 2}
    made.add_request(request("scored", [3, 4], temperature=0.0, logprob_token_ids=[5]))
    assert made.schedule() == ({"greedy": 0, "scored": 0} if v2 else {"greedy": 2, "scored": 2})
    made.requests.pop("scored")
    made.running.pop()
    made.running[0].spec_token_ids = [1, 2]
    assert made.schedule() == {"greedy": 2}


def test_no_step_drafts_while_features_are_recorded() -> None:
    scheduler = adopted(Scheduler())
    for drafting, drafts, num_drafts in (
        (True, "first", 4),
        (False, "second", 0),
        (True, "third", 4),
    ):
        scheduler.drafting, scheduler.drafts = drafting, None
        output = SimpleNamespace(num_spec_tokens_to_schedule=4)
        scheduler._update_after_schedule(output)
        scheduler.update_draft_token_ids(drafts)
        assert output.num_spec_tokens_to_schedule == len(scheduler.placeholders) == num_drafts
        assert scheduler.drafts == (drafts if drafting else None)


class Connector:
    """A KV connector by which all but a prompt's last token comes from another server."""

    def get_num_new_matched_tokens(self, request: Any, num_computed: int) -> tuple[int, bool]:
        return request.num_tokens - 1 - num_computed, False

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, None]:
        return False, None

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


@pytest.fixture(scope="module")
def vllm_config(verifier) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    config = EngineArgs(
        model=str(verifier),
        max_model_len=128,
        max_num_seqs=8,
        speculative_config={"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 2},
    ).create_engine_config()
    config.cache_config.num_gpu_blocks = 64
    return config


def decode_node(vllm_config: Any, **adopt_with: Any) -> Any:
    """vLLM's scheduler on a server whose prompts were computed by another."""
    import torch
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    spec = FullAttentionSpec(block_size=16, num_kv_heads=1, head_size=8, dtype=torch.float32)
    cache = KVCacheConfig(64, [], [KVCacheGroupSpec(["layer"], spec)])
    made = AsyncScheduler(vllm_config, cache, StructuredOutputManager(vllm_config), 16)
    made.connector = Connector()
    return adopted(made, **adopt_with) if adopt_with else made


def arrives(scheduler: Any, name: str, **params: Any) -> None:
    from vllm.v1.request import Request

    params = SamplingParams(max_tokens=16, **params)
    scheduler.add_request(Request(name, list(range(10, 19)), params, None))


def scheduled(scheduler: Any) -> dict[str, int]:
    return dict(scheduler.schedule().num_scheduled_tokens)


def test_new_requests_have_as_many_tokens_as_the_others(vllm_config) -> None:
    """Else every step in which one comes would leave vLLM's full CUDA graphs."""
    for scheduler in (decode_node(vllm_config), decode_node(vllm_config, v2=True)):
        arrives(scheduler, "first")
        assert scheduled(scheduler) == {"first": 5}
        arrives(scheduler, "second")
        assert scheduled(scheduler) == {"first": 5, "second": 5}


def test_what_nobody_drafted_is_not_counted(vllm_config) -> None:
    scheduler, counted = decode_node(vllm_config, v2=True), []
    scheduler.log_stats = True
    count_verified(scheduler, lambda *verified: counted.append(verified))
    arrives(scheduler, "first")
    scheduler.schedule()
    stats = None
    for _ in range(2):
        stats = scheduler.make_spec_decoding_stats(stats, 4, 1, None, "first")
    assert counted == [("first", 4, 1)]
    assert stats.num_drafts == 1


@pytest.mark.parametrize(
    "adopt_with",
    [{"v2": False}, {"v2": True, "sample": "probabilistic"}],
    ids=["V1 runner", "sampled drafts"],
)
def test_new_requests_verify_nothing_that_was_not_drafted(vllm_config, adopt_with) -> None:
    scheduler = decode_node(vllm_config, **adopt_with)
    arrives(scheduler, "first")
    assert scheduled(scheduler) == {"first": 1}


@pytest.mark.parametrize(
    "params",
    [{"seed": 1}, {"min_tokens": 8}, {"logprob_token_ids": [5]}],
    ids=lambda p: next(iter(p)),
)
def test_nor_where_that_would_change_text(vllm_config, params) -> None:
    scheduler = decode_node(vllm_config, v2=True)
    arrives(scheduler, "first", **params)
    assert scheduled(scheduler) == {"first": 1}
    scheduler.finish_requests("first", RequestStatus.FINISHED_ABORTED)
    arrives(scheduler, "second")
    assert scheduled(scheduler) == {"second": 5}


def test_nor_beside_others_with_fewer(vllm_config) -> None:
    scheduler = decode_node(vllm_config, v2=True)
    arrives(scheduler, "first")
    scheduler.schedule()
    scheduler.requests["first"].spec_token_ids = [-1]
    arrives(scheduler, "second")
    assert scheduled(scheduler) == {"first": 2, "second": 1}


def test_nor_while_features_are_recorded(vllm_config) -> None:
    scheduler = decode_node(vllm_config, v2=True)
    scheduler.drafting = False
    arrives(scheduler, "first")
    assert scheduled(scheduler) == {"first": 1}


def choosing(vllm_config: Any) -> tuple[Any, SchedulerPolicy]:
    """A scheduler that chooses lengths, to which any draft is worth its time, and its policy."""
    made = decode_node(vllm_config, v2=True)
    assert specialise(made, "vllm_dflash.serving.engine_core.scheduler:choosing")
    policy = SchedulerPolicy(StepCost([1, 64], [1.0, 1.001], draft=(1e-3, 0.0)), 4)
    made.draft_lengths = EngineLengths(made, policy, SimpleNamespace(), 100)
    return made, policy


def test_tokens_that_nobody_drafted_teach_nothing(vllm_config) -> None:
    scheduler, policy = choosing(vllm_config)
    lengths = scheduler.draft_lengths
    arrives(scheduler, "first")
    for trials in (0, 1):  # then there is a draft
        output = scheduler.schedule()
        assert output.num_scheduled_tokens == {"first": 5}
        done = SimpleNamespace(sampled_token_ids=[[7]], req_id_to_index={"first": 0})
        lengths.on_output(output, done)
        assert policy.by_position.trials == trials


@pytest.mark.parametrize("chooses", [False, True], ids=["fixed", "auto"])
def test_no_draft_pass_for_drafts_that_would_be_dropped(vllm_config, chooses) -> None:
    scheduler = choosing(vllm_config)[0] if chooses else decode_node(vllm_config, v2=True)
    arrives(scheduler, "first")
    assert scheduler.schedule().num_spec_tokens_to_schedule == 4
    arrives(scheduler, "scored", logprob_token_ids=[5])
    output = scheduler.schedule()
    assert output.num_scheduled_tokens == {"first": 1, "scored": 1}
    assert output.num_spec_tokens_to_schedule == 0
    if chooses:
        assert scheduler.draft_lengths.num_drafted == 0
    scheduler.finish_requests("scored", RequestStatus.FINISHED_ABORTED)
    assert scheduler.schedule().num_spec_tokens_to_schedule == 4
