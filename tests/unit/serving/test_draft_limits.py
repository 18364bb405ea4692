"""How much may be drafted for a request, and that the scheduler keeps to it; engines are in
test_sampling_fields.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")
from vllm import SamplingParams

from vllm_dflash.serving.draft_limits import adopt, request_limit


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


def adopted(made: Scheduler, v2: bool = False, positions: int = 100) -> Any:
    draft = SimpleNamespace(max_model_len=positions)
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=2),
        speculative_config=SimpleNamespace(draft_model_config=draft),
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
