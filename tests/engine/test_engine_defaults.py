"""How the trainer's engine runs where nothing is asked of it: on a GPU it generates as fast as vLLM can."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

from helpers.plan_shapes import SHAPES
from vllm_dflash.cli import app
from vllm_dflash.training import engine as engine_module
from vllm_dflash.training.config import EngineOptions, SamplingOptions
from vllm_dflash.training.engine import VerifierEngine

pytestmark = pytest.mark.engine


class Seen(Exception):
    pass


class SeenArgs:
    """In place of vLLM's ``EngineArgs``: ends the start with what it was given."""

    def __init__(self, **given) -> None:
        raise Seen(given)


def given(monkeypatch, options: EngineOptions, *, cpu: bool, memory=None) -> dict:
    import vllm
    from vllm.platforms import current_platform

    monkeypatch.setattr(engine_module, "start_guard", lambda: None)
    monkeypatch.setattr(vllm, "EngineArgs", SeenArgs)
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: cpu)
    before = dict(os.environ)
    try:
        with pytest.raises(Seen) as seen:
            VerifierEngine("v", "d", options, memory=memory)
    finally:
        engine_module._restore(before)
    return seen.value.args[0]


def test_on_a_gpu_responses_are_generated_with_graphs_and_many_at_once(monkeypatch) -> None:
    args = given(monkeypatch, EngineOptions(), cpu=False)
    assert args["enforce_eager"] is False
    assert args["max_num_seqs"] == 256
    # vLLM's own: on.
    assert args.get("enable_prefix_caching") in (None, True)
    assert args.get("async_scheduling") in (None, True)
    for name in ("compilation_config", "cudagraph_capture_sizes"):
        assert name not in args
    assert given(monkeypatch, EngineOptions(), cpu=True)["enforce_eager"] is True
    for cpu in (True, False):
        asked = EngineOptions(enforce_eager=not cpu, max_num_seqs=7)
        args = given(monkeypatch, asked, cpu=cpu)
        assert (args["enforce_eager"], args["max_num_seqs"]) == (not cpu, 7)


def test_the_plan_sizes_the_engine(monkeypatch) -> None:
    """Of the sequences that may run at once the KV cache holds as many as fit; vLLM lets the others wait."""
    plan = SHAPES[1].plan()
    args = given(monkeypatch, EngineOptions(), cpu=False, memory=plan.engine_args())
    assert args["kv_cache_memory_bytes"] == plan.kv_cache
    assert args["gpu_memory_utilization"] == plan.engine_args()["gpu_memory_utilization"]
    assert args["max_num_seqs"] == 256


@pytest.mark.parametrize("command", ["train", "eval"])
def test_the_commands_take_these_defaults(command, monkeypatch, tmp_path) -> None:
    """No option of a command is another default than the engine's."""
    from typer.testing import CliRunner

    from vllm_dflash.training import evaluate, trainer

    def seen(config, reporter):
        raise Seen(config.engine)

    monkeypatch.setattr(trainer, "train", seen)
    monkeypatch.setattr(evaluate, "evaluate", seen)
    names = ["v", "--data", "rows.jsonl", "-o", str(tmp_path / "out")]
    if command == "eval":
        names = ["v", "d", "--data", "rows.jsonl"]
    done = CliRunner().invoke(app, [command, *names])
    assert isinstance(done.exception, Seen), done.output
    assert done.exception.args[0] == EngineOptions()


class Engine:
    """In place of vLLM's engine: finishes what it gets, and keeps it."""

    def __init__(self, shares_prefixes: bool = True) -> None:
        self.requests: dict = {}
        self._todo: list = []
        self._shares = shares_prefixes
        self.vllm_config = SimpleNamespace(cache_config=SimpleNamespace(block_size=4))

    def add_request(self, key, prompt, params) -> None:
        self.requests[key] = (prompt["prompt_token_ids"], params)
        self._todo.append(key)

    def has_unfinished_requests(self) -> bool:
        return bool(self._todo)

    def step(self) -> list:
        done, self._todo = self._todo, []
        tokens = SimpleNamespace(token_ids=[1], finish_reason="stop")
        return [SimpleNamespace(request_id=k, finished=True, outputs=[tokens]) for k in done]

    def reset_prefix_cache(self) -> bool:
        return self._shares

    def collective_rpc(self, method, args) -> list:
        return [{} if args[0] == "collect" else None]


def made(engine: Engine) -> VerifierEngine:
    out = VerifierEngine.__new__(VerifierEngine)
    out.engine, out._recording = engine, False
    out.generated = engine_module.Generated()
    return out


def test_the_prefix_cache_is_read_while_generating_and_not_while_extracting() -> None:
    engine = Engine()
    shared, verifier = list(range(8)), made(engine)
    examples = {"a": [*shared, 20, 21, 22], "b": [*shared, 30, 31, 32], "c": [40, 41, 42]}
    assert dict(verifier.extract(examples)) == dict.fromkeys(examples)
    skips = {key: params.skip_reading_prefix_cache for key, (_, params) in engine.requests.items()}
    # "b" goes on from what this very extraction has computed of "a", from where its own rows begin.
    assert skips == {"a": True, "b": False, "c": True}
    alone = Engine(shares_prefixes=False)
    assert dict(made(alone).extract(examples)) == dict.fromkeys(examples)
    assert all(params.skip_reading_prefix_cache for _, params in alone.requests.values())

    generating = Engine()
    requests = [SimpleNamespace(key=k, prompt_token_ids=v) for k, v in examples.items()]
    results = list(made(generating).generator(SamplingOptions())(requests))
    assert [r.key for r in results] == list(examples)
    assert not any(p.skip_reading_prefix_cache for _, p in generating.requests.values())
