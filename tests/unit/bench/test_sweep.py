"""benchmarks/sweep.py: prompts, which K is best, verdicts, order of the runs, going on with a file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
from rich.console import Console
from test_bench import FakeEngine, request, run_result

from helpers.tiny import make_tokenizer
from vllm_dflash.bench import report as bench_report
from vllm_dflash.bench.config import BenchConfig
from vllm_dflash.bench.engine_process import RunResult, SpecCounters
from vllm_dflash.training.conversations import Conversation, load_conversations

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
import sweep
import sweep_figures
import sweep_report
from sweep import SweepConfig
from sweep_figures import Point

MODES = ("none", "ngram", "k1", "k3", "table", "ours")


class PointEngine(FakeEngine):
    """Tokens a second by mode and concurrency; the plugin is where it should be."""

    speed: ClassVar[dict[tuple[str, int], float]] = {}

    def wait_ready(self, timeout: float) -> dict[str, Any]:
        super().wait_ready(timeout)
        return {"startup_s": 1.0, "plugin_active": self.spec.env["VLLM_PLUGINS"] == "dflash"}

    def run(self, prompts, *, concurrency, warmup, **given: Any) -> RunResult:
        result = super().run(prompts, concurrency=concurrency, warmup=warmup, **given)
        wall_s = result.num_output_tokens / self.speed.get((self.spec.mode, concurrency), 10.0)
        return RunResult(result.requests, wall_s, result.counters, warmup)


@pytest.fixture
def engine(monkeypatch) -> type[PointEngine]:
    for name, value in (("speed", {}), ("log", []), ("fail_start", set()), ("fail_run", {})):
        monkeypatch.setattr(PointEngine, name, value)
    return PointEngine


def config(tmp_path: Path, **changes: Any) -> SweepConfig:
    bench = BenchConfig(
        "some/verifier",
        "some/drafter",
        num_speculative_tokens=7,
        repeats=2,
        settle_s=0.0,
        out_dir=tmp_path,
    )
    given = {"modes": MODES, "concurrencies": (1, 4), "contexts": ("short",), "traffic": ("mixed",)}
    return SweepConfig(bench, **given | changes)


def run(made: SweepConfig, engine: Any, report=None, save=lambda _: None) -> dict[str, Any]:
    def prompts(point, num):
        return [[1, 2, i + 1] for i in range(num)]

    report = report or sweep.new_report(made)
    return sweep.run_sweep(made, prompts, report, save, lambda _: None, engine_factory=engine)


# -- prompts -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


def chats(kind: str, num: int, system: str | None = None) -> list[Conversation]:
    first = ({"role": "system", "content": system},) if system else ()
    return [
        Conversation(
            f"{kind}{i}", (*first, {"role": "user", "content": f"{kind} number {i} please"}), kind
        )
        for i in range(num)
    ]


def test_mixed_traffic_takes_turns():
    assert sweep.interleave("abcd", "12345", 4) == ["a", "1", "b", "2"]
    assert sweep.interleave("abcd", "12345", 5) == ["a", "1", "b", "2", "c"]
    assert len(sweep.interleave("a", "12345", 6)) == 4  # too few, for the caller to see


@pytest.fixture(scope="module")
def earlier() -> list[Conversation]:
    conversations, rejected = load_conversations(sweep.EARLIER)
    assert not rejected
    return conversations


def test_a_long_context_is_earlier_turns_of_so_many_tokens(tokenizer, earlier):
    requests = {"own": chats("own", 4, "Be brief."), "foreign": chats("foreign", 4)}
    prompts = sweep.Prompts(requests, tokenizer, 4, earlier, 2048)
    for traffic in sweep.TRAFFIC:
        short = prompts.of(Point(2, traffic, "short"), 4)
        long = prompts.of(Point(2, traffic, "long"), 4)
        for a, b in zip(short, long, strict=True):
            assert 2048 <= len(b) - len(a) < 2048 + 700
            assert b[-8:] == a[-8:]  # the request is still the last thing
    own = prompts.of(Point(1, "own", "long"), 4)
    turns = [t.split("<|im_end|>")[0] for t in tokenizer.decode(own[0]).split("<|im_start|>")[1:]]
    roles = [turn.split("\n")[0] for turn in turns]
    assert roles == ["system", *["user", "assistant"] * (len(roles) // 2)]
    assert turns[0].endswith("Be brief.")
    assert turns[-2].endswith("own number 0 please")
    # All requests of a kind share it, for the prefix cache.
    assert all(ids[:2048] == own[0][:2048] for ids in own)


def test_a_short_supply_of_earlier_turns_is_used_again(tokenizer, earlier):
    requests = {"own": chats("own", 1)}
    ids = sweep.Prompts(requests, tokenizer, 1, earlier[:1], 2048).ids
    assert len(ids["own", "long"][0]) >= 2048 + len(ids["own", "short"][0])
    with pytest.raises(ValueError, match="end with an answer"):
        sweep.Prompts(requests, tokenizer, 1, requests["own"], 2048)


def test_too_few_prompts_are_refused_before_any_engine(tmp_path, tokenizer, earlier, engine):
    requests = {"own": chats("o", 9), "foreign": chats("f", 3)}
    prompts = sweep.Prompts(requests, tokenizer, 8, earlier, 16)
    made = config(tmp_path, traffic=("own", "foreign"))
    with pytest.raises(ValueError, match="foreign, short context, 1 in flight takes 8 prompts"):
        sweep.run_sweep(
            made, prompts.of, sweep.new_report(made), print, print, engine_factory=engine
        )
    assert engine.log == []


# -- engines -----------------------------------------------------------------------------------


def test_modes(tmp_path):
    made = config(tmp_path, modes=(*MODES, "stock", "adaptive", "ours-no-lookup"))
    specs = {mode: made.spec(mode) for mode in made.modes}
    drafter = {"method": "dflash", "model": "some/drafter", "num_speculative_tokens": 7}
    given = {mode: s.speculative_config for mode, s in specs.items()}
    assert given["none"] is None
    assert given["ngram"]["method"] == "ngram"
    assert given["ours"] == given["stock"] == drafter
    assert given["adaptive"] == drafter | {"enable_adaptive_verification": True}
    assert given["ours-no-lookup"] == drafter | {"dflash_lookup": "off"}
    assert given["k3"] == drafter | {"num_speculative_tokens": 3, "dflash_draft_length": "fixed"}
    table = [[1, 2, 7], [3, 4, 3], [5, 256, 1]]
    assert given["table"] == drafter | {"num_speculative_tokens_per_batch_size": table}
    plugin = {mode for mode, s in specs.items() if s.env["VLLM_PLUGINS"]}
    assert plugin == {"ours", "ours-no-lookup", "k1", "k3"}
    shares = {s.engine_args["gpu_memory_utilization"] for s in specs.values()}
    assert len(shares) == 1
    assert 8 * shares.pop() < 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modes": ("none", "k0")}, "mode 'k0' is unknown"),
        ({"modes": ("none", "none")}, "each once"),
        ({"traffic": ("strange",)}, "traffic is"),
        ({"contexts": ()}, "context is"),
        ({"concurrencies": (0,)}, "at least 1"),
    ],
)
def test_bad_config_is_refused_by_name(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **changes)


def test_runs_alternate_and_rotate(tmp_path, engine):
    made = config(tmp_path, modes=("none", "k1", "ours"), concurrencies=(4,))
    run(made, engine)
    measured = [mode for mode, what in engine.log if what == "run 4"]
    assert measured == ["none", "k1", "ours", "k1", "ours", "none"]
    assert [what for _, what in engine.log[:3]] == ["start"] * 3


# -- figures -----------------------------------------------------------------------------------


def test_best_fixed_a_point_and_one_for_all(tmp_path, engine):
    engine.speed |= {
        ("none", 1): 10.0, ("k1", 1): 12.0, ("k3", 1): 20.0, ("ngram", 1): 25.0, ("ours", 1): 24.0,
        ("none", 4): 40.0, ("k1", 4): 44.0, ("k3", 4): 16.0, ("ngram", 4): 20.0, ("ours", 4): 42.0,
    }  # fmt: skip
    report = run(config(tmp_path), engine)
    one, four = report["rows"]
    assert (one["best_fixed"], four["best_fixed"]) == ("k3", "k1")
    assert one["ours_over_best_fixed"]["ratio"] == pytest.approx(1.2)
    assert four["ours_over_best_fixed"]["ratio"] == pytest.approx(42 / 44)
    assert four["verdicts"]["best_fixed"]["met"] is False
    assert one["ours_over_none"]["ratio"] == pytest.approx(2.4)
    # sqrt(12 x 44) is above sqrt(20 x 16).
    assert report["mixed"]["best_single_fixed"] == "k1"
    assert report["mixed"]["ours"]["ratio"] == pytest.approx((24 / 12 * 42 / 44) ** 0.5)
    assert report["mixed"]["ours"]["met"]
    assert one["ours_over_best_single_fixed"]["ratio"] == pytest.approx(2.0)
    # ngram is judged where it wins.
    assert one["verdicts"]["ngram"]["met"] is False
    assert "ngram" not in four["verdicts"]
    assert report["summary"]["none"] == {
        "bound": 0.98, "points": 2, "met": 2, "within_spread": 0, "lowest": pytest.approx(1.05),
    }  # fmt: skip
    assert report["summary"]["best_fixed"]["met"] == 1
    # FakeEngine's ngram differs in one request of each run.
    assert one["modes"]["ngram"]["identical_to_none"] == pytest.approx(7 / 8)
    assert report["summary"]["identical"] == {"points": 2, "met": 2, "lowest": 1.0}


def test_short_but_within_the_spread():
    judged = sweep_figures.verdict({"ratio": 0.96, "min": 0.9, "max": 1.0}, 0.98)
    assert (judged["met"], judged["within_spread"]) == (False, True)
    judged = sweep_figures.verdict({"ratio": 0.96, "min": 0.9, "max": 0.97}, 0.98)
    assert (judged["met"], judged["within_spread"]) == (False, False)
    assert sweep_figures.verdict(None, 0.98) is None


def test_only_mixed_rows_have_a_single_fixed(tmp_path, engine):
    report = run(config(tmp_path, traffic=("own", "foreign")), engine)
    assert report["mixed"] is None
    assert all(row["ours_over_best_single_fixed"] is None for row in report["rows"])


def test_share_of_steps_with_a_draft():
    # 2 requests of 6 tokens, 10 of them decoded; 4 accepted, so 6 steps, 3 of which had a draft.
    six = tuple(range(6))
    runs = [run_result(1.0, SpecCounters(3, 9, 4, (3, 1)), request(six), request(six))]
    assert sweep_figures.draft_share(runs) == pytest.approx(0.5)
    assert sweep_figures.draft_share([run_result(1.0, SpecCounters(), request(six))]) == 0.0
    assert sweep_figures.draft_share([run_result(1.0, SpecCounters(), request((1,)))]) is None


# -- faults and files --------------------------------------------------------------------------


def test_a_mode_that_fails_is_left_out(tmp_path, engine):
    engine.fail_start.add("k3")
    engine.fail_run["none"] = 2  # at the second point
    report = run(config(tmp_path), engine)
    assert sorted(report["errors"]) == ["k3", "none"]
    one, four = report["rows"]
    assert "k3" not in one["modes"]
    assert one["best_fixed"] == "k1"
    assert "none" not in four["modes"]
    assert four["ours_over_none"] is None
    assert four["verdicts"]["none"] is None
    assert four["ours_over_best_fixed"]["ratio"] == 1.0
    sweep_report.show(report, Console(width=180, file=open("/dev/null", "w")))  # noqa: SIM115


def test_what_was_measured_survives_and_the_rest_follows(tmp_path, engine):
    path = tmp_path / "sweep.json"

    def save(report):
        bench_report.write_json(report, path)
        if len(report["rows"]) == 1:
            raise KeyboardInterrupt

    made = config(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run(made, engine, save=save)
    assert {mode for mode, what in engine.log if what == "close"} == set(MODES)
    report = sweep.load_report(path, made)
    assert report["not_measured"] == ["mixed, short context, 4 in flight"]
    engine.log.clear()
    report = run(made, engine, report)
    assert {what for _, what in engine.log} == {"start", "run 4", "close"}
    assert [row["concurrency"] for row in report["rows"]] == [1, 4]
    assert report["not_measured"] == []
    engine.log.clear()
    run(made, engine, report)
    assert engine.log == []
    # A new mode needs all modes of a point again: ratios are of runs beside each other.
    report = run(config(tmp_path, modes=(*MODES, "k5")), engine, report)
    assert all("k5" in row["modes"] for row in report["rows"])
    assert len(report["rows"]) == 2


def test_a_mode_that_always_fails_does_not_measure_a_point_again(tmp_path, engine):
    engine.fail_start.add("k3")
    report = run(config(tmp_path), engine)
    engine.log.clear()
    run(config(tmp_path), engine, report)
    assert {what for _, what in engine.log} == {"start", "close"}


def test_other_settings_do_not_go_on(tmp_path):
    path = tmp_path / "sweep.json"
    bench_report.write_json(sweep.new_report(config(tmp_path)), path)
    other = config(tmp_path)
    other.bench.max_tokens = 5
    with pytest.raises(ValueError, match=r"other settings: \{'max_tokens': 128\}"):
        sweep.load_report(path, other)


def test_time_is_up(tmp_path, engine):
    report = run(config(tmp_path, minutes=0.0), engine)
    assert report["rows"] == []


def test_table_picture_and_json(tmp_path, engine):
    report = run(config(tmp_path, contexts=("short", "long"), traffic=("own", "mixed")), engine)
    path = tmp_path / "sweep.json"
    bench_report.write_json(report, path)
    assert json.loads(path.read_text())["rows"][0]["ours_over_none"]["ratio"] == 1.0
    sweep_report.write_png(report, tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    console = Console(width=180, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    sweep_report.show(report, console)
    text = console.export_text()
    for part in ("k1 1.00", "short: best single fixed", "ours >= 0.98 x none: 8 of 8 points"):
        assert part in text
    with pytest.raises(ValueError, match="nothing to draw"):
        sweep_report.write_png(sweep.new_report(config(tmp_path)), tmp_path / "none.png")


def test_gpu_profile_gives_way_to_what_is_asked(tmp_path):
    line = [
        "v",
        "d",
        "--own",
        "o",
        "--foreign",
        "f",
        "--gpu",
        "--repeats",
        "5",
        "--minutes",
        "3",
        "-k",
        "7",
    ]
    args = sweep.parse(line)
    assert (args.minutes, args.repeats, args.concurrency) == (3.0, 5, "1,16,4")
    made = sweep.make_config(args, tmp_path)
    assert made.bench.engine_args == {"kv_cache_memory_bytes": 4 * 2**30}
    assert made.bench.startup_timeout_s == 180
    assert made.start_together == 8
