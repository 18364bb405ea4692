"""The benchmark: aggregation, error paths, files, and one real engine process."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from rich.console import Console

from vllm_dflash import guard
from vllm_dflash.bench import engine_process, report, runner
from vllm_dflash.bench.config import ADAPTIVE, MODES, BenchConfig
from vllm_dflash.bench.engine_process import (
    ChosenLengths,
    EngineProcess,
    EngineSpec,
    RequestResult,
    RunResult,
    SpecCounters,
)
from vllm_dflash.bench.runner import engine_spec, run_bench

PROMPTS = [[1, 2, 3], [4, 5], [6, 7, 8], [9]]
CPU_ENV = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}


def request(token_ids: tuple[int, ...] = (1, 2, 3), ttft_s=0.1, latency_s=0.5) -> RequestResult:
    return RequestResult(ttft_s, latency_s, len(token_ids), token_ids, "length")


NO_COUNTERS = SpecCounters()


def run_result(wall_s: float, counters=NO_COUNTERS, *requests: RequestResult) -> RunResult:
    return RunResult(requests or (request(), request((4, 5, 6))), wall_s, counters)


class FakeEngine:
    """Answers like EngineProcess; speeds and faults are set per mode."""

    wall_s: ClassVar[dict[str, list[float]]] = {}
    fail_start: ClassVar[set[str]] = set()
    fail_run: ClassVar[dict[str, int]] = {}
    plugin_active: ClassVar[dict[str, bool]] = {"plugin": True}
    log: ClassVar[list[tuple[str, str]]] = []

    def __init__(self, spec: EngineSpec) -> None:
        self.spec = spec
        self.log_path = Path(spec.log_path)
        self.num_runs = 0
        self.closed = False

    def start(self) -> None:
        self.log.append((self.spec.mode, "start"))

    def wait_ready(self, timeout: float) -> dict[str, Any]:
        if self.spec.mode in self.fail_start:
            raise RuntimeError(f"engine {self.spec.mode!r} died while starting\n[red] boom")
        active = self.plugin_active.get(self.spec.mode, False)
        return {"startup_s": 1.5, "plugin_active": active}

    def run(self, prompts, *, max_tokens, concurrency, warmup, **_: Any) -> RunResult:
        assert not self.closed
        if warmup:
            return run_result(1.0)
        self.log.append((self.spec.mode, f"run {concurrency}"))
        if self.num_runs == self.fail_run.get(self.spec.mode, -1):
            raise RuntimeError(f"engine {self.spec.mode!r} died while running")
        walls = self.wall_s.get(self.spec.mode, [1.0])
        wall_s = walls[self.num_runs % len(walls)]
        self.num_runs += 1
        counters = SpecCounters() if self.spec.mode == "none" else SpecCounters(10, 20, 12, (8, 4))
        last = 99 if self.spec.mode == "ngram" else 3
        requests = [request((i, 2, last if i == 0 else 3)) for i in range(len(prompts))]
        return run_result(wall_s, counters, *requests)

    def close(self) -> None:
        if not self.closed:
            self.log.append((self.spec.mode, "close"))
        self.closed = True


@pytest.fixture
def fake_engine(monkeypatch) -> type[FakeEngine]:
    for name, value in {
        "wall_s": {},
        "fail_start": set(),
        "fail_run": {},
        "plugin_active": {"plugin": True},
        "log": [],
    }.items():
        monkeypatch.setattr(FakeEngine, name, value)
    return FakeEngine


def bench_config(tmp_path: Path, **changes: Any) -> BenchConfig:
    fields: dict[str, Any] = {
        "verifier": "some/verifier",
        "drafter": "some/drafter",
        "num_speculative_tokens": 2,
        "concurrencies": (1, 2),
        "num_prompts": 4,
        "repeats": 2,
        "settle_s": 0.0,
        "out_dir": tmp_path,
    }
    return BenchConfig(**fields | changes)


# -- figures -----------------------------------------------------------------------------------


def test_tau_is_pooled_over_drafts_not_averaged_over_runs():
    # 1 + 3/2 and 1 + 0/8: the mean of the two would be 1.75.
    runs = [run_result(1.0, SpecCounters(2, 4, 3, (2, 1))), run_result(1.0, SpecCounters(8, 16, 0))]
    figures = runner.summarize(runs, None, 0.0)
    assert figures["tau"] == pytest.approx(1.3)
    assert figures["num_drafts"] == 10
    assert figures["acceptance_per_position"] == pytest.approx([0.2, 0.1])


def test_no_drafts_no_tau():
    figures = runner.summarize([run_result(1.0)], None, 0.0)
    assert figures["tau"] is None
    assert figures["acceptance_per_position"] is None
    assert figures["over_none"] is None
    assert figures["num_differing_from_none"] is None


def test_counters_subtract_and_add_with_unequal_widths():
    after, before = SpecCounters(5, 10, 4, (3, 1)), SpecCounters()
    assert after - before == after
    assert after - SpecCounters(2, 4, 1, (1, 0)) == SpecCounters(3, 6, 3, (2, 1))
    assert before + after == after


def test_accepted_tokens_are_those_delivered():
    """vLLM counts what it accepts behind the end of a response, too."""
    vllms = SpecCounters(4, 12, 9, (3, 3, 3))
    # Two requests; two steps without a draft, one cut off at its end.
    got = vllms.delivered([4, 1, 1, 2, 1, 3])
    assert got == SpecCounters(4, 12, 6, (3, 2, 1))
    assert got.acceptance_length == pytest.approx(1 + 6 / 4)
    assert SpecCounters(0, 0, 0, (0, 0)).delivered([]) == SpecCounters(0, 0, 0, (0, 0))


def test_steps_are_seen_where_results_arrive():
    class Processor:
        def process_outputs(self, outputs, timestamp=None, **kwargs):
            return len(outputs), timestamp, kwargs

    def output(name, *tokens):
        return SimpleNamespace(request_id=name, new_token_ids=list(tokens))

    processor = Processor()
    steps = engine_process._watch_steps(processor)
    assert processor.process_outputs([output("a", 1), output("b", 2)], 7, stats=3) == (
        2,
        7,
        {"stats": 3},
    )
    processor.process_outputs([output("a", 3, 4, 5), output("b")])
    processor.process_outputs([output("a", 6)])
    assert steps == {"a": [1, 3, 1], "b": [1]}


def test_speed_median_and_spread():
    # Six tokens a run.
    figures = runner.summarize([run_result(w) for w in (3.0, 1.0, 2.0)], None, 0.0)
    assert figures["output_tokens_per_s"] == {
        "raw": [2.0, 6.0, 3.0],
        "median": 3.0,
        "min": 2.0,
        "max": 6.0,
    }
    assert figures["num_output_tokens"] == [6, 6, 6]


def test_ratio_is_of_medians_and_its_spread_of_repeats():
    # Medians 20 and 10; the repeats' own ratios are 3, 2 and 0.5.
    ratio = runner.speed_ratio([30.0, 20.0, 10.0], [10.0, 10.0, 20.0])
    assert ratio == {"ratio": 2.0, "min": 0.5, "max": 3.0}


def test_ratio_uses_shared_repeats_only():
    assert runner.speed_ratio([30.0], [10.0, 1000.0]) == {"ratio": 3.0, "min": 3.0, "max": 3.0}


def test_latency_percentiles_pool_requests_and_skip_single_tokens():
    requests = (
        request((1, 2, 3), ttft_s=0.1, latency_s=0.3),
        request((1, 2, 3), ttft_s=0.2, latency_s=0.6),
        request((1,), ttft_s=0.9, latency_s=0.9),
    )
    figures = runner.summarize([run_result(1.0, SpecCounters(), *requests)], None, 0.0)
    assert figures["ttft_ms_p50"] == pytest.approx(200)
    assert figures["tpot_ms_p50"] == pytest.approx(150)
    only_single = runner.summarize([run_result(1.0, SpecCounters(), requests[2])], None, 0.0)
    assert only_single["tpot_ms_p50"] is None


def test_differing_prompts_are_counted_for_greedy_only():
    same, other = run_result(1.0), run_result(1.0, SpecCounters(), request(), request((4, 5, 7)))
    figures = runner.summarize([same, other], [other], 0.0)
    assert figures["num_differing_from_none"] == 1
    assert figures["num_unstable"] == 1
    sampled = runner.summarize([same, other], [other], 0.7)
    assert sampled["num_differing_from_none"] is None
    assert sampled["num_unstable"] is None


# -- engines of the modes ----------------------------------------------------------------------


def test_modes_differ_in_speculation_and_plugin_only(tmp_path):
    config = bench_config(tmp_path, env={"A": "1"}, engine_args={"seed": 5})
    specs = {mode: engine_spec(config, mode) for mode in (*MODES, ADAPTIVE)}
    assert len({json.dumps(dict(s.engine_args), sort_keys=True) for s in specs.values()}) == 1
    assert specs["none"].engine_args["max_num_seqs"] == 2
    assert specs["none"].engine_args["seed"] == 5
    assert specs["none"].engine_args["gpu_memory_utilization"] * 4 <= runner.MEMORY_SHARE
    assert specs["none"].speculative_config is None
    assert specs["ngram"].speculative_config["num_speculative_tokens"] == 2
    assert specs["stock"].speculative_config == specs["plugin"].speculative_config
    assert specs["plugin"].speculative_config["method"] == "dflash"
    plugins = {mode: s.env["VLLM_PLUGINS"] for mode, s in specs.items()}
    assert plugins == {"none": "", "ngram": "", "stock": "", "plugin": "dflash", "adaptive": ""}
    switch = {"enable_adaptive_verification": True}
    assert specs["adaptive"].speculative_config == specs["stock"].speculative_config | switch
    assert all(s.env["A"] == "1" for s in specs.values())


def test_engine_args_win_over_fields(tmp_path):
    config = bench_config(tmp_path, engine_args={"max_num_seqs": 7}, max_model_len=64)
    args = engine_spec(config, "none").engine_args
    assert (args["max_num_seqs"], args["max_model_len"]) == (7, 64)


def test_draft_length_comes_from_the_drafter(tmp_path):
    drafter = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 8,
        "vocab_size": 16,
        "block_size": 8,
        "dflash_config": {"target_layer_ids": [0], "mask_token_id": 3},
    }
    (tmp_path / "config.json").write_text(json.dumps(drafter))
    config = bench_config(tmp_path, drafter=str(tmp_path), num_speculative_tokens=None)
    assert engine_spec(config, "plugin").speculative_config["num_speculative_tokens"] == 7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modes": ("none", "eagle")}, "eagle"),
        ({"modes": ()}, "modes"),
        ({"modes": ("none", "none")}, "each once"),
        ({"concurrencies": (0,)}, "--concurrency"),
        ({"concurrencies": (4, 4)}, "--concurrency"),
        ({"dtype": "fp8"}, "--dtype"),
        ({"repeats": 0}, "--repeats is 0"),
        ({"minutes": 0}, "--minutes is 0"),
        ({"temperature": -1.0}, "--temperature"),
        ({"temperature": float("nan")}, "--temperature"),
        ({"settle_s": -1.0}, "settle_s"),
        ({"drafter": None}, "need a drafter"),
        ({"num_speculative_tokens": 0}, "--num-speculative-tokens is 0"),
    ],
)
def test_bad_config_is_refused_by_name(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        bench_config(tmp_path, **changes)


def test_chosen_lengths_are_pooled_and_told() -> None:
    one = ChosenLengths(
        lengths={"0": 6, "1": 0, "2": 4},
        drafts={"drafter": 4, "lookup": 0},
        proposed={"drafter": 8, "lookup": 0},
        accepted={"drafter": 6, "lookup": 0},
        expected={"drafter": 5.5, "lookup": 0},
        steps=10,
        drafted_steps=4,
        step_seconds=2,
        plain_seconds=3,
    )
    runs = [RunResult((), 1.0, SpecCounters(), chosen=c) for c in (one, one + one - one, None)]
    pooled = runner.chosen_lengths(runs)
    assert pooled["lengths"] == {"0": 12, "1": 0, "2": 8}
    assert pooled["estimated_speedup"] == pytest.approx(1.5)
    assert runner.tau_by_source(runs) == {"drafter": 2.5, "lookup": None}
    assert runner.tau_by_source(runs[2:]) is None
    assert runner.chosen_lengths(runs[2:]) is None
    again = RunResult.from_message(json.loads(json.dumps(asdict(runs[0]))))
    assert again.chosen == one
    told = {"modes": {"plugin": {"concurrency": {"4": {"chosen": pooled}}}, "none": {}}}
    (line,) = report.chosen_lines(told)
    assert "0:60% 1:0% 2:40%" in line
    assert "drafter 12 of 16 tokens accepted, 11 expected; estimated 1.50x" in line


def test_ngram_without_any_draft_length(tmp_path):
    config = bench_config(
        tmp_path, modes=("none", "ngram"), drafter=None, num_speculative_tokens=None
    )
    with pytest.raises(ValueError, match="num_speculative_tokens is not given"):
        engine_spec(config, "ngram")


def test_none_alone_needs_no_drafter(tmp_path):
    config = bench_config(tmp_path, modes=("none",), drafter=None, num_speculative_tokens=None)
    assert engine_spec(config, "none").speculative_config is None


# -- the run -----------------------------------------------------------------------------------


def test_run_alternates_and_reports(tmp_path, fake_engine):
    fake_engine.wall_s |= {"none": [2.0], "plugin": [1.0]}
    config = bench_config(tmp_path, modes=("none", "ngram", "plugin"))
    said: list[str] = []
    result = run_bench(config, PROMPTS, said.append, engine_factory=fake_engine)
    assert runner.failed_modes(result) == []
    assert [e for e in fake_engine.log if e[1] == "run 1"] == [
        (m, "run 1") for m in ("none", "ngram", "plugin", "ngram", "plugin", "none")
    ]
    # All engines are up before the first measurement, and all are closed.
    assert [what for _, what in fake_engine.log[:3]] == ["start"] * 3
    assert {m for m, what in fake_engine.log if what == "close"} == {"none", "ngram", "plugin"}
    ours = result["modes"]["plugin"]["concurrency"]["2"]
    assert ours["over_none"] == {"ratio": 2.0, "min": 2.0, "max": 2.0}
    assert ours["tau"] == pytest.approx(2.2)
    assert ours["num_differing_from_none"] == 0
    assert result["modes"]["ngram"]["concurrency"]["1"]["num_differing_from_none"] == 1
    assert result["modes"]["none"]["startup_s"] == 1.5
    assert result["versions"]["vllm_dflash"]
    assert result["machine"]["cores"] >= 1
    assert len(said) == 3 + 3 * 2 * 2
    json.dumps(result)


@pytest.mark.parametrize(("minutes", "repeats"), [(None, 5), (14, 4), (11, 3), (4, 1), (0.1, 1)])
def test_repeats_fit_the_minutes(tmp_path, fake_engine, monkeypatch, minutes, repeats):
    """Starting takes a minute, a repeat of both concurrencies three."""
    clock = [0.0]
    measure, start = runner._measure, fake_engine.start
    monkeypatch.setattr(runner.time, "monotonic", lambda: clock[0])

    def starting(self) -> None:
        clock[0] += 60
        start(self)

    def measuring(*args: Any) -> None:
        clock[0] += 180
        measure(*args)

    monkeypatch.setattr(fake_engine, "start", starting)
    monkeypatch.setattr(runner, "_measure", measuring)
    config = bench_config(tmp_path, modes=("none",), repeats=5, minutes=minutes)
    said: list[str] = []
    result = run_bench(config, PROMPTS, said.append, engine_factory=fake_engine)
    for figures in result["modes"]["none"]["concurrency"].values():
        assert len(figures["output_tokens_per_s"]["raw"]) == repeats
    assert (f"{repeats} of 5 repeats" in said[-1]) == (repeats < 5)
    assert result["config"]["repeats"] == repeats


def test_mode_that_does_not_start_is_left_out(tmp_path, fake_engine):
    fake_engine.fail_start.add("stock")
    result = run_bench(bench_config(tmp_path), PROMPTS, engine_factory=fake_engine)
    assert runner.failed_modes(result) == ["stock"]
    assert "died while starting" in result["errors"]["stock"]
    assert result["modes"]["stock"]["concurrency"] == {}
    assert result["modes"]["plugin"]["concurrency"]["1"]["over_none"]["ratio"] == 1.0


def test_mode_that_dies_on_the_way_keeps_what_it_measured(tmp_path, fake_engine):
    # Runs 0 and 1 are the first repeat at both concurrencies.
    fake_engine.fail_run["none"] = 2
    result = run_bench(bench_config(tmp_path), PROMPTS, engine_factory=fake_engine)
    assert runner.failed_modes(result) == ["none"]
    none, ours = (result["modes"][m]["concurrency"]["1"] for m in ("none", "plugin"))
    assert len(none["output_tokens_per_s"]["raw"]) == 1
    assert len(ours["output_tokens_per_s"]["raw"]) == 2
    assert ours["over_none"]["ratio"] == 1.0


def test_plugin_in_the_wrong_state_fails_the_mode(tmp_path, fake_engine):
    fake_engine.plugin_active = {"stock": True}
    result = run_bench(bench_config(tmp_path), PROMPTS, engine_factory=fake_engine)
    assert runner.failed_modes(result) == ["plugin", "stock"]
    assert "is not active in mode 'plugin'" in result["errors"]["plugin"]
    assert "is active in mode 'stock'" in result["errors"]["stock"]


def test_interrupt_closes_every_engine(tmp_path, fake_engine, monkeypatch):
    def interrupt(*_: Any, **__: Any) -> RunResult:
        raise KeyboardInterrupt

    monkeypatch.setattr(fake_engine, "run", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_bench(bench_config(tmp_path), PROMPTS, engine_factory=fake_engine)
    assert [e for e in fake_engine.log if e[1] == "close"] == [("none", "close")]


@pytest.mark.parametrize(
    ("prompts", "changes", "message"),
    [
        (PROMPTS[:2], {}, "2 prompts given, --num-prompts is 4"),
        ([[1], [], [2], [3]], {}, "prompt 1 is empty"),
        (PROMPTS, {"max_tokens": 10, "max_model_len": 12}, "prompt 0 has 3 tokens"),
    ],
)
def test_bad_prompts_are_refused_before_any_engine(
    tmp_path, fake_engine, prompts, changes, message
):
    with pytest.raises(ValueError, match=message):
        run_bench(bench_config(tmp_path, **changes), prompts, engine_factory=fake_engine)
    assert fake_engine.log == []


# -- files -------------------------------------------------------------------------------------


@pytest.fixture
def bench_report(tmp_path, fake_engine) -> dict[str, Any]:
    fake_engine.wall_s |= {"none": [2.0, 2.2], "plugin": [1.0, 1.3]}
    fake_engine.fail_start.add("stock")
    return run_bench(bench_config(tmp_path), PROMPTS, engine_factory=fake_engine)


def test_json_is_written_whole_or_not_at_all(tmp_path, bench_report):
    path = report.write_json(bench_report, tmp_path / "deep" / "bench.json")
    assert json.loads(path.read_text()) == json.loads(json.dumps(bench_report))
    with pytest.raises(ValueError, match="JSON"):
        report.write_json({"speed": float("nan")}, path)
    assert json.loads(path.read_text())["modes"]
    assert os.listdir(path.parent) == ["bench.json"]


def test_png(tmp_path, bench_report):
    path = report.write_png(bench_report, tmp_path / "bench.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_png_of_nothing(tmp_path):
    with pytest.raises(ValueError, match="nothing to draw"):
        report.write_png({"modes": {"none": {}}, "errors": {"none": "boom"}}, tmp_path / "x.png")
    assert os.listdir(tmp_path) == []


def test_printed_report(bench_report):
    ours = bench_report["modes"]["plugin"]["concurrency"]["1"]
    assert ours["tau_by_source"] is None
    ours["tau_by_source"] = {"drafter": None, "lookup": 3.25}
    console = Console(width=80, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    report.print_report(bench_report, console)
    text = console.export_text()
    for part in (
        "verifier with drafter, K = 2",
        "plugin",
        "2.20",
        "mode stock failed",
        "[red] boom",
    ):
        assert part in text
    assert "…" not in text
    assert "differ: prompts whose output is not that of mode none" in text
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.strip()}
    # What the plugin drafted, by source: of the two, only lookup did.
    assert rows["drafter"] == ["-"]
    assert rows["lookup"] == ["3.25"]
    assert "12.0-12.0" in text


# -- engine processes --------------------------------------------------------------------------


def spec(tmp_path: Path, **changes: Any) -> EngineSpec:
    fields: dict[str, Any] = {"mode": "none", "model": "m", "log_path": tmp_path / "e.log"}
    return EngineSpec(**fields | changes)


def test_child_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("BENCH_KEPT", "1")
    monkeypatch.setenv("BENCH_UNSET", "1")
    monkeypatch.delenv("VLLM_LOGGING_LEVEL", raising=False)
    env = EngineProcess(spec(tmp_path, env={"BENCH_UNSET": None, "NEW": "2"}))._environment()
    assert env["BENCH_KEPT"] == "1"
    assert env["NEW"] == "2"
    assert "BENCH_UNSET" not in env
    assert env["VLLM_LOGGING_LEVEL"] == "WARNING"


def test_spec_must_travel_as_json(tmp_path):
    with pytest.raises(ValueError, match="cannot travel as JSON"):
        spec(tmp_path, engine_args={"dtype": object()}).to_message()


def test_engine_that_is_not_started(tmp_path):
    engine = EngineProcess(spec(tmp_path))
    with pytest.raises(RuntimeError, match="call start"):
        engine.wait_ready()
    with pytest.raises(ValueError, match="concurrency is 0"):
        engine.run([[1]], max_tokens=1, concurrency=0)
    with pytest.raises(ValueError, match="1 of them empty"):
        engine.run([[1], []], max_tokens=1)
    engine.close()


@pytest.fixture
def fake_child(tmp_path, monkeypatch):
    """Makes the next child run the given script instead of vLLM."""

    def use(script: str) -> None:
        path = tmp_path / "python"
        path.write_text(f"#!{sys.executable}\n{script}")
        path.chmod(0o755)
        monkeypatch.setattr(engine_process.sys, "executable", str(path))

    return use


def test_death_of_the_child_shows_its_log(tmp_path, fake_child):
    fake_child("import sys; print('first'); sys.exit('no such model')")
    with EngineProcess(spec(tmp_path)) as engine:
        engine.start()
        with pytest.raises(RuntimeError, match=r"(?s)exit status 1.*e\.log.*no such model") as info:
            engine.wait_ready(timeout=30)
    assert "first" in str(info.value)


def test_silent_child_times_out_and_is_ended(tmp_path, fake_child, monkeypatch):
    fake_child("import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)")
    monkeypatch.setattr(engine_process, "TERM_TIMEOUT_S", 0.5)
    engine = EngineProcess(spec(tmp_path))
    engine.start()
    with pytest.raises(RuntimeError, match="gave no answer in 0 s while starting"):
        engine.wait_ready(timeout=0.1)
    engine.close()
    with pytest.raises(ProcessLookupError):
        os.kill(engine.pid, 0)
    engine.close()


def test_a_stopped_command_does_not_wait_for_its_engines(tmp_path, fake_child, monkeypatch):
    """Not for the child, and not for what the child has started in a session of its own."""
    fake_child(
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "script = 'import time; time.sleep(60)'\n"
        f"core = subprocess.Popen([{sys.executable!r}, '-c', script], start_new_session=True)\n"
        "print(core.pid, flush=True); time.sleep(60)"
    )
    monkeypatch.setattr(engine_process, "stopping", lambda: True)
    monkeypatch.setattr(engine_process, "TERM_TIMEOUT_S", 60)
    engine = EngineProcess(spec(tmp_path))
    engine.start()
    while not engine.log_path.read_text().strip():
        time.sleep(0.05)
    began = time.monotonic()
    engine.close()
    assert time.monotonic() - began < 20
    for pid in (engine.pid, int(engine.log_path.read_text())):
        assert guard.look(pid) is None


def test_log_tail_leads_with_the_first_error(tmp_path):
    engine = EngineProcess(spec(tmp_path))
    assert "no log" in engine.log_tail()
    cause = "RuntimeError: Unsupported head_dim=16"
    lines = [
        f"(Worker pid=7) ERROR 11-23 19:35:18 [multiproc_executor.py:1063] {cause}",
        *["noise"] * 100,
        "vllm.v1.engine.exceptions.EngineDeadError: see above",
    ]
    engine.log_path.write_text("\n".join(lines) + "\n")
    tail = engine.log_tail(num_lines=2).splitlines()
    assert tail == [f"first error: {cause}", "...", "noise", lines[-1]]


ECHO_CHILD = """
import json, sys
from multiprocessing.connection import Connection
conn = Connection(int(sys.argv[-1]))
conn.recv_bytes()
print("noise on stdout", flush=True)
conn.send_bytes(json.dumps({"event": "ready", "startup_s": 0, "plugin_active": False}).encode())
while True:
    try:
        command = json.loads(conn.recv_bytes())
    except EOFError:
        break
    if command["cmd"] == "stop":
        break
    conn.send_bytes(json.dumps({"event": "error", "error": "prompt too long"}).encode())
"""


def test_protocol_ignores_what_the_child_prints_and_reports_errors(tmp_path, fake_child):
    fake_child(ECHO_CHILD)
    with EngineProcess(spec(tmp_path)) as engine:
        engine.start()
        assert engine.wait_ready(timeout=30)["plugin_active"] is False
        with pytest.raises(RuntimeError, match="failed while running: prompt too long"):
            engine.run([[1]], max_tokens=1)
    assert "noise" in engine.log_tail()
    assert engine._process is not None
    assert engine._process.returncode == 0


def test_child_goes_when_the_parent_vanishes(tmp_path, monkeypatch):
    """The real child's watch on the socket, without vLLM: the parent's end is just closed."""
    script = (
        "import json, queue, threading, time\n"
        "from vllm_dflash.bench import engine_process as e\n"
        "import sys\n"
        "e.TERM_TIMEOUT_S = 0.2\n"
        "conn = e.Connection(int(sys.argv[-1])); conn.recv_bytes()\n"
        "q = queue.SimpleQueue()\n"
        "threading.Thread(target=e._read_commands, args=(conn, q), daemon=True).start()\n"
        "assert q.get() == {'cmd': 'stop'}\n"
        "time.sleep(60)\n"
    )
    path = tmp_path / "python"
    path.write_text(f"#!{sys.executable}\n{script}")
    path.chmod(0o755)
    monkeypatch.setattr(engine_process.sys, "executable", str(path))
    monkeypatch.setenv("PYTHONPATH", str(Path(engine_process.__file__).parents[2]))
    engine = EngineProcess(spec(tmp_path))
    engine.start()
    assert engine._conn is not None
    assert engine._process is not None
    engine._conn.close()
    assert engine._process.wait(timeout=30) == -9
    engine.close()


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory) -> Path:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    pytest.importorskip("vllm")
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("tiny_llama")
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        # Heads of 32: vLLM's CPU attention has no kernel for smaller ones.
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.mark.engine
def test_real_engine(tmp_path, tiny_llama):
    """ngram, so that the speculative counters move; random tiny models repeat themselves."""
    engine_args = {
        "dtype": "float32",
        "max_model_len": 256,
        "max_num_seqs": 2,
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
    }
    ngram = {
        "method": "ngram",
        "num_speculative_tokens": 3,
        "prompt_lookup_max": 3,
        "prompt_lookup_min": 1,
    }
    prompts = [[i, 7, i, 7, i, 7] for i in range(10, 15)]
    engine_spec = EngineSpec(
        mode="ngram",
        model=str(tiny_llama),
        engine_args=engine_args,
        speculative_config=ngram,
        env={**CPU_ENV, "VLLM_PLUGINS": ""},
        log_path=tmp_path / "ngram.log",
    )
    with EngineProcess(engine_spec) as engine:
        engine.start()
        info = engine.wait_ready(timeout=300)
        assert info["plugin_active"] is False
        first = engine.run(prompts, max_tokens=24, concurrency=2, ignore_eos=True)
        second = engine.run(prompts, max_tokens=24, concurrency=2, ignore_eos=True)
        with pytest.raises(RuntimeError, match="failed while running"):
            engine.run([[1] * 300], max_tokens=4)
        third = engine.run(prompts[:1], max_tokens=1)
        pid = engine.pid
    assert [r.output_token_ids for r in first.requests] == [
        r.output_token_ids for r in second.requests
    ]
    assert [r.num_output_tokens for r in first.requests] == [24] * len(prompts)
    assert {r.finish_reason for r in first.requests} == {"length"}
    for result in (first, second):
        assert result.num_output_tokens == 24 * len(prompts)
        assert result.wall_s > max(r.latency_s for r in result.requests)
        assert all(0 < r.ttft_s < r.latency_s for r in result.requests)
        counters = result.counters
        assert counters.num_drafts > 0
        assert len(counters.num_accepted_tokens_per_pos) == 3
        assert sum(counters.num_accepted_tokens_per_pos) == counters.num_accepted_tokens
        assert counters.num_accepted_tokens <= counters.num_draft_tokens
    assert first.counters == second.counters
    assert third.counters == SpecCounters(num_accepted_tokens_per_pos=(0, 0, 0))
    # The session of the child, vLLM's workers included, is gone.
    for _ in range(50):
        try:
            os.killpg(pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.1)
    else:
        pytest.fail(f"processes of session {pid} are left")


def test_a_table_in_a_document(tmp_path) -> None:
    rows = [{"a": 1, "b": "x|y"}, {"a": 2}]
    table = report.markdown_table({"a": "A", "b": "B"}, rows, lambda v: "" if v is None else str(v))
    assert table == "| A | B |\n|---|---|\n| 1 | x\\|y |\n| 2 |  |"
    file = tmp_path / "doc.md"
    file.write_text("before\n<!-- t:begin -->\nold\n<!-- t:end -->\nafter\n")
    for _ in range(2):
        report.replace_between_markers(file, "t", table)
        assert file.read_text() == f"before\n<!-- t:begin -->\n{table}\n<!-- t:end -->\nafter\n"
    with pytest.raises(ValueError, match=r"lacks the lines <!-- u:begin -->"):
        report.replace_between_markers(file, "u", table)
