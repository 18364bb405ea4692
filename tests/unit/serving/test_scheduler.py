"""When the scheduler chooses draft lengths, and how measured costs get to it; engines are in
test_scheduler_lengths.py."""

from __future__ import annotations

import logging
import pickle
from types import SimpleNamespace

import pytest

from vllm_dflash.draft_length.cost import StepCost
from vllm_dflash.serving import support
from vllm_dflash.serving.engine_core import start as engine_core
from vllm_dflash.serving.frontend import speculative_config


@pytest.fixture
def warnings(caplog, monkeypatch):
    # vLLM's logger does not propagate.
    monkeypatch.setattr(engine_core.logger, "handlers", [caplog.handler])
    monkeypatch.setattr(engine_core.logger, "level", logging.WARNING)
    engine_core.logger.manager._clear_cache()  # type: ignore[attr-defined]
    return caplog


def config(*, v2=True, asynchronous=True, cls=None, options=None, **changes) -> SimpleNamespace:
    parallel = {"data_parallel_size": 1, "pipeline_parallel_size": 1, "world_size": 1}
    parallel["distributed_executor_backend"] = "mp"
    spec = {"method": "dflash", "model": "drafter", "dflash_stats": "name"}
    spec["disable_padded_drafter_batch"] = False
    spec["draft_model_config"] = SimpleNamespace(architectures=["DFlashDraftModel"])
    return SimpleNamespace(
        use_v2_model_runner=v2,
        scheduler_config=SimpleNamespace(async_scheduling=asynchronous, scheduler_cls=cls),
        additional_config={"vllm_dflash": options or {}},
        parallel_config=SimpleNamespace(
            **parallel | {k: changes.pop(k) for k in parallel if k in changes}
        ),
        speculative_config=SimpleNamespace(**(spec | changes)),
    )


def test_where_it_chooses() -> None:
    assert support.scheduler_chooses(config())
    assert support.scheduler_chooses(config(asynchronous=False))
    assert support.scheduler_chooses(config(v2=False))
    # There the V1 proposer does.
    assert not support.scheduler_chooses(config(v2=False, asynchronous=False))
    assert support.enabled(config(v2=False, asynchronous=False))
    assert not support.requested(config(options={"draft_length": "fixed"}))
    assert not support.requested(config(method="eagle3"))
    assert not support.requested(SimpleNamespace(speculative_config=None))
    padded = config(v2=False, asynchronous=False, disable_padded_drafter_batch=True)
    assert "other batches" in support.unsupported_reason(padded)
    assert support.enabled(config(**{**_LAUNCHED, "world_size": 1}))
    # Made without EngineArgs, so that no file for its figures has a name.
    assert support.scheduler_chooses(config(dflash_stats=None))


_LAUNCHED = {"distributed_executor_backend": "external_launcher", "world_size": 2}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"data_parallel_size": 2}, "data parallel"),
        ({"pipeline_parallel_size": 2}, "pipeline stages"),
        (_LAUNCHED, "a scheduler for each rank"),
        ({**_LAUNCHED, "v2": False, "asynchronous": False}, "a scheduler for each rank"),
        ({"cls": "mine.Own"}, "the scheduler is mine.Own"),
        (
            {"draft_model_config": SimpleNamespace(architectures=["LiLiCorrDraftModel"])},
            "drafter class of its own",
        ),
        ({"enable_adaptive_verification": True}, "adaptive verification"),
    ],
)
def test_where_it_does_not(changes, reason) -> None:
    assert support.requested(config(**changes))
    assert reason in support.unsupported_reason(config(**changes))
    assert not support.enabled(config(**changes))


def test_api_processes_know_the_servers_name(monkeypatch) -> None:
    """vLLM starts them beside the engines; each makes a configuration of its own."""
    monkeypatch.setenv(speculative_config._NAME_ENV, "of an earlier server")
    args = lambda n, rank: SimpleNamespace(_api_process_count=n, _api_process_rank=rank)  # noqa: E731
    name = speculative_config._server_name
    one, other = name(args(1, 0)), name(args(1, 0))
    server = name(args(2, -1))
    assert len({one, other, server}) == 3
    assert [name(args(2, 0)), name(args(2, 1))] == [server, server]
    assert name(args(1, 0)) != server


class Worker:
    """One of an engine's, wherever it runs; what it is asked and told."""

    def __init__(self, cost: StepCost | None) -> None:
        self.told: list[str] = []
        drafter = SimpleNamespace(step_cost=cost, choose_lengths=lambda: self.told.append("choose"))
        self.model_runner = SimpleNamespace(speculator=drafter)


class EngineCore:
    """As vLLM's: it asks its workers by an executor, and pickles functions on the way to them."""

    def __init__(self, workers: list[Worker]) -> None:
        self.workers = workers
        self.model_executor = self

    def collective_rpc(self, method):
        method = pickle.loads(pickle.dumps(method))
        return [pickle.loads(pickle.dumps(method(worker))) for worker in self.workers]

    def _initialize_kv_caches(self, vllm_config) -> SimpleNamespace:
        return SimpleNamespace(num_blocks=8)


def started(vllm_config, *costs) -> tuple[StepCost | None, list[list[str]]]:
    """The costs that the scheduler gets, and what the workers are told."""
    core = EngineCore([Worker(cost) for cost in costs])
    start = engine_core.wrap_initialize_kv_caches(EngineCore._initialize_kv_caches)
    made = start(core, vllm_config)
    assert made.num_blocks == 8
    return getattr(made, engine_core._COST, None), [w.told for w in core.workers]


def test_costs_get_to_the_scheduler() -> None:
    """The first worker's, and all workers begin."""
    costs = [StepCost([1, 8], [1.0 + i, 2.0 + i], draft=(0.25, 0.0)) for i in range(2)]
    got, told = started(config(), *costs)
    assert got is not None
    assert got.as_dict() == costs[0].as_dict()
    assert told == [["choose"], ["choose"]]


def test_lengths_stay_fixed_if_one_worker_has_no_costs(warnings) -> None:
    cost = StepCost([1, 8], [1.0, 2.0], draft=(0.25, 0.0))
    assert started(config(), cost, None) == (None, [[], []])
    assert "drafts a fixed number of tokens: its workers sent no costs" in warnings.text


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"data_parallel_size": 2}, "must draft in step"), ({"method": "eagle3"}, "")],
)
def test_workers_are_not_asked_where_lengths_are_fixed(changes, said, warnings) -> None:
    cost = StepCost([1, 8], [1.0, 2.0], draft=(0.25, 0.0))
    assert started(config(**changes), cost) == (None, [[]])
    assert said in warnings.text
    assert bool(warnings.records) == bool(said)
