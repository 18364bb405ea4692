"""When the scheduler chooses draft lengths, and how measured costs get to it; engines are in
test_scheduler_lengths.py."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from vllm_dflash.draft_length.cost import StepCost
from vllm_dflash.serving import handover, scheduler, speculative_config
from vllm_dflash.serving.draft_stats import engine_name


def config(*, v2=True, asynchronous=True, cls=None, options=None, **changes) -> SimpleNamespace:
    parallel = {"data_parallel_size": 1, "pipeline_parallel_size": 1}
    spec = {"method": "dflash", "model": "drafter", "dflash_stats": "name"}
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
    assert scheduler.chooses(config())
    assert scheduler.chooses(config(asynchronous=False))
    assert scheduler.chooses(config(v2=False))
    # There the V1 proposer does.
    assert not scheduler.wanted(config(v2=False, asynchronous=False))
    assert not scheduler.wanted(config(options={"draft_length": "fixed"}))
    assert not scheduler.wanted(config(method="eagle3"))
    assert not scheduler.wanted(SimpleNamespace(speculative_config=None))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"data_parallel_size": 2}, "data parallel"),
        ({"pipeline_parallel_size": 2}, "pipeline stages"),
        ({"cls": "mine.Own"}, "the scheduler is mine.Own"),
        (
            {"draft_model_config": SimpleNamespace(architectures=["LiLiCorrDraftModel"])},
            "drafter class of its own",
        ),
        ({"enable_adaptive_verification": True}, "adaptive verification"),
        ({"dflash_stats": None}, "not made by EngineArgs"),
    ],
)
def test_where_it_does_not(changes, reason) -> None:
    assert scheduler.wanted(config(**changes))
    assert reason in scheduler.unsupported(config(**changes))
    assert not scheduler.chooses(config(**changes))


def test_data_parallel_engines_have_names_of_their_own(tmp_path, monkeypatch) -> None:
    """Those of a dense model share a configuration but for their index; both give before one takes."""
    monkeypatch.setattr(handover, "stats_file", lambda name: tmp_path / f"{name}.json")
    engines = [config(), config()]
    for index, one in enumerate(engines):
        one.parallel_config.data_parallel_index = index
    costs = [StepCost([1, 8], [1.0 + i, 2.0 + i], draft=(0.25, 0.0)) for i in range(2)]
    for one, cost in zip(engines, costs, strict=True):
        handover.give(engine_name(one), cost)
    for one, cost in zip(engines, costs, strict=True):
        got = handover.take(engine_name(one))
        assert got is not None
        assert got.as_dict() == cost.as_dict()


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


def test_costs_get_there_once(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(handover, "stats_file", lambda name: tmp_path / f"{name}.json")
    assert handover.take("a") is None
    cost = StepCost([1, 8], [1.0, 2.0], draft=(0.25, 0.0))
    handover.give("a", cost)
    got = handover.take("a")
    assert got is not None
    assert got.as_dict() == cost.as_dict()
    assert handover.take("a") is None
    assert list(tmp_path.iterdir()) == []
