"""How the engines of a benchmark share a device: the plan, and both ways of taking turns."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from test_bench import CPU_ENV, PROMPTS, FakeEngine, bench_config, fake_engine, tiny_llama
from transformers import LlamaConfig, Qwen3Config

from vllm_dflash import environment
from vllm_dflash.bench import engine_process, runner, sharing
from vllm_dflash.bench.config import BenchConfig
from vllm_dflash.bench.runner import plan_run, run_bench
from vllm_dflash.bench.sharing import Device, Sharing, plan_sharing
from vllm_dflash.checkpoint import weight_bytes

__all__ = ["fake_engine", "tiny_llama"]  # fixtures
GIB = 2**30
QWEN3_8B = LlamaConfig(
    hidden_size=4096,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=40960,
    dtype="bfloat16",
)


def h100(host: int = 200) -> Device:
    return Device("GPU", 80 * GIB, 78 * GIB, host * GIB, True)


def plan(monkeypatch, gib: float | None, device: Device, count: int = 4, **args: Any) -> Sharing:
    size = None if gib is None else int(gib * GIB)
    monkeypatch.setattr(sharing, "weight_bytes", lambda model: size)
    wanted = args.pop("wanted", "auto")
    return plan_sharing(wanted, [["model"]] * count, QWEN3_8B, 4, 1024, args, device)


@pytest.mark.parametrize(
    ("config", "args", "of_a_token"),
    [
        (QWEN3_8B, {}, 36 * 2 * 8 * 128 * 2),
        (QWEN3_8B, {"dtype": "float32"}, 36 * 2 * 8 * 128 * 4),
        (QWEN3_8B, {"kv_cache_dtype": "fp8_e4m3"}, 36 * 2 * 8 * 128),
        (QWEN3_8B, {"tensor_parallel_size": 2}, 36 * 2 * 4 * 128 * 2),
        # Served in 16 bits, whatever it was saved in.
        (LlamaConfig(dtype="float32"), {}, 32 * 2 * 4096 * 2),
    ],
)
def test_key_value_bytes_of_requests_in_flight(monkeypatch, config, args, of_a_token) -> None:
    monkeypatch.setattr(sharing, "weight_bytes", lambda model: 0)
    made = plan_sharing("auto", [["model"]] * 2, config, 8, 40960, args, h100())
    assert f"KV cache {8 * 40960 * of_a_token / GIB:.1f}," in made.sentence


def test_sliding_layers_hold_a_window(monkeypatch) -> None:
    """The cache is counted as the trainer's plan counts it."""
    monkeypatch.setattr(sharing, "weight_bytes", lambda model: 0)
    config = Qwen3Config(
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=128,
        hidden_size=1024,
        layer_types=["sliding_attention"] * 3 + ["full_attention"],
        use_sliding_window=True,
        sliding_window=1024,
        dtype="bfloat16",
    )
    args = {"max_num_batched_tokens": 1024}
    made = plan_sharing("auto", [["model"]] * 2, config, 64, 40960, args, h100())
    assert f"KV cache {64 * (3 * 2048 + 40960) * 4096 / GIB:.1f}," in made.sentence


@pytest.mark.parametrize(
    ("gib", "device", "kind"),
    [
        (1.2, h100(), "together"),
        (15.3, h100(), "sleep"),
        (15.3, h100(host=60), "restart"),  # asleep they need 61 GiB of host memory
        (15.3, Device("GPU", 140 * GIB, 139 * GIB, 200 * GIB, True), "together"),
        (58.5, h100(1000), "restart"),
        (None, h100(), "restart"),
        (None, Device("CPU", 23 * GIB, 20 * GIB, 20 * GIB, False), "together"),
        (0.3, Device("CPU", 23 * GIB, 20 * GIB, 20 * GIB, False), "together"),
        (3.0, Device("CPU", 23 * GIB, 12 * GIB, 12 * GIB, False), "restart"),
    ],
)
def test_what_fits_decides(monkeypatch, gib, device, kind) -> None:
    made = plan(monkeypatch, gib, device)
    assert made.kind == kind
    assert "4 engines of " in made.sentence
    assert ("may not do" in made.sentence) == (gib == 58.5)
    assert made.engine_args.get("enable_sleep_mode", False) == (kind == "sleep")
    share = made.engine_args["gpu_memory_utilization"] * device.total
    # Those alive at a time find their shares free.
    beside = {"together": 3 * share, "sleep": 3 * sharing.ASLEEP_BYTES, "restart": 0}[kind]
    assert 0.95 * 0.85 * device.free < share + beside <= 0.85 * device.free


def test_tensor_parallel_ranks_share_the_weights(monkeypatch) -> None:
    assert plan(monkeypatch, 30, h100(), 2).kind == "sleep"
    assert plan(monkeypatch, 30, h100(), 2, tensor_parallel_size=2).kind == "together"


def test_weights_in_float32_take_twice_their_file(monkeypatch) -> None:
    device = Device("CPU", 23 * GIB, 20 * GIB, 20 * GIB, False)
    assert plan(monkeypatch, 2.0, device, dtype="bfloat16").kind == "together"
    made = plan(monkeypatch, 2.0, device, dtype="float32")
    assert made.kind == "restart"
    assert "weights 4.0" in made.sentence


def test_what_is_asked_for_wins_where_it_is_possible(monkeypatch) -> None:
    assert plan(monkeypatch, 58.5, h100(), wanted="together").kind == "together"
    assert plan(monkeypatch, 1.2, h100(), wanted="restart").kind == "restart"
    cpu = Device("CPU", GIB, GIB, GIB, False)
    with pytest.raises(ValueError, match="--sharing is 'sleep', which vLLM has on GPUs only"):
        plan(monkeypatch, 1.2, cpu, wanted="sleep")
    with pytest.raises(ValueError, match="--sharing is 'turns'"):
        BenchConfig("v", modes=("none",), sharing="turns")


def test_weights_on_disk(tmp_path) -> None:
    assert weight_bytes(tmp_path) is None
    for name, size in (("model-1.safetensors", 100), ("model-2.safetensors", 50), ("x.bin", 7)):
        (tmp_path / name).write_bytes(bytes(size))
    assert weight_bytes(tmp_path) == 150


def test_lengths_follow_from_the_prompts(tmp_path) -> None:
    config = bench_config(tmp_path, num_prompts=2, max_tokens=100)
    prompts = [[1] * 20, [1] * 30, [1] * 5000]
    device = Device("CPU", GIB, GIB, GIB, False)
    made, _ = plan_run(config, prompts, QWEN3_8B, device)
    assert made.max_model_len == 30 + 100 + 2 * 3
    given = bench_config(tmp_path, max_model_len=512)
    assert plan_run(given, prompts, QWEN3_8B, device)[0].max_model_len == 512
    extra = bench_config(tmp_path, engine_args={"max_model_len": 400})
    assert plan_run(extra, prompts, QWEN3_8B, device)[0].max_model_len is None
    short = LlamaConfig(max_position_embeddings=100)
    assert plan_run(config, prompts, short, device)[0].max_model_len is None  # up to the model


class Sleeper(FakeEngine):
    """Refuses to run while another is awake."""

    awake: ClassVar[set[str]] = set()

    def start(self) -> None:
        super().start()
        assert not self.awake
        self.awake.add(self.spec.mode)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        assert self.awake == {self.spec.mode}
        return super().run(*args, **kwargs)

    def sleep(self) -> None:
        self.log.append((self.spec.mode, "sleep"))
        self.awake.remove(self.spec.mode)

    def wake(self) -> None:
        assert not self.awake
        self.log.append((self.spec.mode, "wake"))
        self.awake.add(self.spec.mode)

    def close(self) -> None:
        self.awake.discard(self.spec.mode)
        super().close()


@pytest.mark.parametrize("kind", ["sleep", "restart"])
def test_one_engine_at_a_time(tmp_path, fake_engine, monkeypatch, kind) -> None:
    monkeypatch.setattr(Sleeper, "awake", set())
    fake_engine.wall_s |= {"none": [2.0], "plugin": [1.0]}
    config = bench_config(tmp_path, modes=("none", "plugin"), sharing=kind)
    result = run_bench(config, PROMPTS, engine_factory=Sleeper)
    assert result["errors"] == {}
    assert result["sharing"]["kind"] == kind
    turn = {
        "sleep": lambda mode, c: [(mode, "wake"), (mode, f"run {c}"), (mode, "sleep")],
        "restart": lambda mode, c: [(mode, f"run {c}")],
    }[kind]
    log = [entry for entry in Sleeper.log if kind == "sleep" or entry[1].startswith("run")]
    if kind == "sleep":
        order = [("none", 1), ("plugin", 1), ("plugin", 2), ("none", 2)]
        order += [("plugin", 1), ("none", 1), ("none", 2), ("plugin", 2)]
        assert log[:4] == [
            ("none", "start"),
            ("none", "sleep"),
            ("plugin", "start"),
            ("plugin", "sleep"),
        ]
        assert log[4:-2] == [entry for mode, c in order for entry in turn(mode, c)]
    else:
        order = [("none", 1), ("none", 2), ("plugin", 1), ("plugin", 2)]
        order += [("plugin", 1), ("plugin", 2), ("none", 1), ("none", 2)]
        assert log == [entry for mode, c in order for entry in turn(mode, c)]
        assert Sleeper.log.count(("plugin", "start")) == Sleeper.log.count(("plugin", "close")) == 2
    assert not Sleeper.awake
    ours = result["modes"]["plugin"]["concurrency"]
    assert {c: f["over_none"]["ratio"] for c, f in ours.items()} == {"1": 2.0, "2": 2.0}


def test_a_mode_that_fails_in_its_turn_is_left_out(tmp_path, fake_engine, monkeypatch) -> None:
    monkeypatch.setattr(Sleeper, "awake", set())
    fake_engine.fail_start.add("stock")
    config = bench_config(tmp_path, modes=("none", "stock", "plugin"), sharing="restart")
    result = run_bench(config, PROMPTS, engine_factory=Sleeper)
    assert runner.failed_modes(result) == ["stock"]
    assert Sleeper.log.count(("stock", "start")) == 1
    assert len(result["modes"]["plugin"]["concurrency"]["2"]["output_tokens_per_s"]["raw"]) == 2
    assert not Sleeper.awake


def test_the_child_sleeps_and_wakes() -> None:
    called: list[Any] = []

    async def sleep(level: int) -> None:
        called.append(level)

    async def wake_up() -> None:
        called.append("awake")

    engine = SimpleNamespace(sleep=sleep, wake_up=wake_up)
    replies = [
        asyncio.run(engine_process._answer(engine, {}, 1, {"cmd": cmd}))
        for cmd in ("sleep", "wake")
    ]
    assert replies == [{"event": "asleep"}, {"event": "awake"}]
    assert called == [1, "awake"]


def test_memory_of_gpus(tmp_path, monkeypatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        '#!/bin/sh\necho "81559 MiB, 81000 MiB"\necho "81559 MiB, 500 MiB"\necho $@ >&2\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert environment.gpu_memory() == [
        (81559 * 2**20, 81000 * 2**20),
        (81559 * 2**20, 500 * 2**20),
    ]
    assert Device.here().free == 500 * 2**20
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert environment.gpu_memory() == []
    here = Device.here()
    assert here.name == "CPU"
    assert 0 < here.free <= here.total


@pytest.mark.engine
@pytest.mark.long
def test_engines_started_for_each_turn(tmp_path, tiny_llama: Path) -> None:
    """Real ones, on a machine that is said to have room for one."""
    config = BenchConfig(
        str(tiny_llama),
        num_speculative_tokens=3,
        modes=("none", "ngram"),
        concurrencies=(1, 2),
        num_prompts=3,
        repeats=2,
        max_tokens=24,
        ignore_eos=True,
        dtype="float32",
        enforce_eager=True,
        out_dir=tmp_path,
        engine_args={"skip_tokenizer_init": True},
        env=CPU_ENV,
        settle_s=0.0,
    )
    prompts = [[i, 7, i, 7, i, 7] for i in range(10, 13)]
    model = LlamaConfig.from_pretrained(tiny_llama)
    room = Device("CPU", 2**20, 2**19, GIB, False)
    said: list[str] = []
    result = run_bench(config, prompts, said.append, verifier_config=model, device=room)
    assert result["errors"] == {}
    assert "one at a time, started anew for each turn" in said[0]
    assert said.count("none: starting the engine") == 2
    assert result["config"]["max_model_len"] == 6 + 24 + 2 * 4
    for mode in ("none", "ngram"):
        for figures in result["modes"][mode]["concurrency"].values():
            assert figures["num_output_tokens"] == [72, 72]
            assert figures["num_differing_from_none"] == 0
    assert result["modes"]["ngram"]["concurrency"]["2"]["num_drafts"] > 0
    json.dumps(result)
