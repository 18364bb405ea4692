"""benchmarks/gpu_smoke.py: parts that fail, hang or find something wrong; `make rehearse` runs them."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path

import pytest

from vllm_dflash import guard

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
from smoke import learner, models, run, serving, speed, training
from smoke.rows import STATES, Context, Row, Unavailable
from smoke.run import Part

#: Stands for gpu_smoke.py: what it does depends on the part.
SCRIPT = """
import json, os, subprocess, sys, time
part = sys.argv[sys.argv.index("--part") + 1]
def row(state):
    row = {"part": part, "case": "a", "state": state, "note": "", "figures": {"n": 1.5}}
    print(json.dumps(row), flush=True)
if part == "good":
    row("ok")
if part == "wrong":
    row("ok"); row("wrong")
if part == "crash":
    row("ok"); sys.exit("CUDA error: an illegal memory access")
if part == "hang":
    row("ok")
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    open(sys.argv[sys.argv.index("-o") + 1] + "/child", "w").write(str(child.pid))
    time.sleep(60)
"""


@pytest.fixture
def parts(tmp_path, monkeypatch):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    monkeypatch.setattr(run, "SCRIPT", script)
    monkeypatch.setattr(run, "check_machine", lambda rehearse: None)
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def use(*names: str) -> Path:
        given = tuple(Part(name, 3 if name == "hang" else 60) for name in names)
        monkeypatch.setattr(run, "PARTS", given)
        return tmp_path / "out"

    return use


def report(folder: Path, *args: str) -> tuple[int, list[Row]]:
    with pytest.raises(SystemExit) as done:
        run.main(["-o", str(folder), *args])
    rows = json.loads((folder / "report.json").read_text())["rows"]
    return done.value.code, [Row(**row) for row in rows]


def test_parts_that_fail_do_not_stop_the_others(parts, capfd) -> None:
    folder = parts("crash", "hang", "silent", "wrong", "good")
    began = time.monotonic()
    code, rows = report(folder)
    assert time.monotonic() - began < 40
    assert code == 1
    assert [(r.part, r.state) for r in rows] == [
        ("crash", "failed"),
        ("hang", "failed"),
        ("silent", "failed"),
        ("wrong", "wrong"),
        ("crash", "ok"),
        ("hang", "ok"),
        ("wrong", "ok"),
        ("good", "ok"),
    ]
    assert "exit code 1: CUDA error: an illegal memory access" in rows[0].note
    assert "ended after 3 s" in rows[1].note
    assert rows[2].note.startswith("it found nothing")
    # What a part has started is gone, in whatever session.
    assert guard.look(int((folder / "child").read_text())) is None
    out = capfd.readouterr().out.splitlines()
    # Each row is a line of JSON at once, the table comes last.
    assert [json.loads(line)["part"] for line in out[:8]].count("hang") == 2
    assert "crash" in next(line for line in out[8:] if "failed" in line)
    assert "8 findings, 4 bad" in "\n".join(out)


def test_all_is_well(parts) -> None:
    assert report(parts("good"))[0] == 0


def test_no_time_is_left(parts) -> None:
    code, rows = report(parts("good", "wrong"), "--minutes", "0.01")
    assert code == 1
    assert [row.note for row in rows] == ["no time left of 0.01 min"] * 2


def test_without_a_gpu_it_says_how_to_rehearse(monkeypatch) -> None:
    monkeypatch.setattr(run, "describe_machine", lambda: {"gpus": []})
    with pytest.raises(SystemExit, match="--rehearse runs on the CPU"):
        run.main([])
    with pytest.raises(SystemExit):
        run.main(["--parts", "ops,magic"])


@pytest.mark.parametrize("part", [serving, training, speed])
def test_parts_say_that_vllm_is_missing(monkeypatch, tmp_path, part) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    context = Context("a", tmp_path, True, time.monotonic() + 60, lambda line: None)
    with pytest.raises(Unavailable, match="vllm is not installed"):
        part.run(context)
    assert not list(tmp_path.iterdir())


def test_processes_on_the_v2_runner_are_known_by_vllms_log() -> None:
    log = "12 vllm.x Using V2 Model Runner\n13 vllm.x Using FLASH_ATTN\n14 vllm.y Using V2 Model Runner\n"
    assert training._V2.findall(log) == ["12", "14"]


def test_states_and_ranks() -> None:
    rows = [Row("p", str(i), state) for i, state in enumerate(reversed(STATES))]
    assert [row.state for row in run.ranked(rows)] == list(STATES)
    with pytest.raises(ValueError, match="'good'"):
        Row("p", "c", "good")


def test_arithmetic_of_a_step() -> None:
    """Of Qwen3-8B's drafter at 512 anchors: 47 T in the layers, 19 in the head, 2 in the context."""
    shape = learner.SHAPES[0]
    assert shape.flops(512) / 1e12 == pytest.approx(47.4 + 19.1 + 2.3 + 3.2, rel=0.01)
    # Fixed but for the context, which 512 anchors share.
    assert shape.flops(1024) - shape.flops(512) == pytest.approx(
        shape.flops(512) - 2.32e12, rel=0.01
    )


def test_an_engine_of_the_real_shape(tmp_path) -> None:
    """8.2 B and 1 B parameters in 16 bits, the KV cache of 32 requests, 3 GiB beside."""
    verifier, drafter = models.write_shapes(tmp_path)
    gib = speed.engine_gib(str(verifier), rehearse=False)
    assert gib == pytest.approx((8.19e9 + 1.05e9) * 2 / 2**30 + 4.0 + speed.BESIDE, rel=0.03)
    assert json.loads((drafter / "config.json").read_text())["num_hidden_layers"] == 5


def test_chosen_lengths_and_costs_are_compared_with_what_was_measured(tmp_path) -> None:
    lines: list[str] = []
    context = Context("speed", tmp_path, True, time.monotonic() + 60, lines.append)
    results = {
        "none": {1: {"step_ms": 7.0, "tokens_per_s": 140.0}},
        "ours auto": {1: {"step_ms": 7.2, "tokens_per_s": 133.0}},
        "ours fixed": {1: {"step_ms": 9.5, "tokens_per_s": 110.0}},
    }
    costs = [{"requests": n, "step_ms": 6.8, "draft_ms": 2.0} for n in (1, 8)]
    speed.compare(context, results, costs)
    rows = said(lines)
    assert rows["auto over none"].figures == {"at 1": 0.95}
    one = {"calibrated_step_ms": 6.8, "calibrated_draft_ms": 2.0}
    assert rows["costs at 8"].figures == one
    measured = {"measured_step_ms": 7.0, "measured_drafting_step_ms": 9.5}
    assert rows["costs at 1"].figures == one | measured
    speed.compare(context, {"none": {}}, [])
    assert said(lines)["costs"].state == "unavailable"


def said(rows: list[str]) -> dict[str, Row]:
    return {row.case: row for row in (Row(**json.loads(line)) for line in rows)}


def served(outputs, drafts=(), proposer="vllm_dflash.serving", **changes):
    return {
        "v2": True,
        "proposer": proposer,
        "outputs": {1: outputs},
        "drafts": {("1/a", at): {"token": 3, "drafts": list(d)} for at, d in enumerate(drafts)},
        **changes,
    }


def test_differences_are_found(tmp_path) -> None:
    lines: list[str] = []
    context = Context("serving", tmp_path, True, time.monotonic() + 60, lines.append)
    results = {
        "none": served([[1, 2], [3, 4]], proposer=None),
        "stock": served([[1, 2], [3, 4]], [[1, 1], [2, 2]], proposer="vllm"),
        "ours fixed": served([[1, 2], [3, 5]], [[1, 1], [2, 3]]),
        "ours auto": served([[1, 2], [3, 4]], v2=False),
        "ours without ops": served([[1, 2], [3, 4]], [[1, 1], [2, 2]], proposer="vllm"),
    }
    serving.report(context, "set", results)
    rows = said(lines)
    assert {case: row.state for case, row in rows.items()} == {
        "set, none": "ok",
        "set, stock": "ok",
        "set, ours fixed": "wrong",
        "set, ours auto": "wrong",
        "set, ours without ops": "wrong",
        "set, drafts of ours fixed": "wrong",
        "set, drafts of ours without ops": "ok",
    }
    assert rows["set, ours fixed"].note == "1 of 2 outputs differ from no speculation's"
    assert rows["set, ours auto"].note == "served by the V1 runner"
    assert rows["set, ours without ops"].note == "drafted by vllm"
    assert rows["set, drafts of ours fixed"].note == "1 of 2 drafts differ from stock's"


def test_what_vllm_alone_refuses_is_unavailable(tmp_path) -> None:
    lines: list[str] = []
    context = Context("serving", tmp_path, True, time.monotonic() + 60, lines.append)
    serving.report(context, "a", {"none": {"error": "no"}, "ours auto": {"error": "no"}})
    serving.report(context, "b", {"none": served([[1]]), "ours auto": {"error": "no"}})
    states = {case: row.state for case, row in said(lines).items()}
    assert states == {
        "a, none": "unavailable",
        "a, ours auto": "unavailable",
        "b, none": "ok",
        "b, ours auto": "failed",
    }
