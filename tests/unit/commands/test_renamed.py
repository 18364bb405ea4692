"""Names of the release before are taken for one more: flags, modes, and runs made with them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from vllm_dflash import renamed
from vllm_dflash.cli import app
from vllm_dflash.training import trainer
from vllm_dflash.training.run_folder import RunFolder

OLD = (
    "--layers 3 --features=4 --heads 2 --kv-heads 1 --anchors=9 --sequences 2 --clip 0.5 --warmup 0.1 "
    "--ema 0.9 --max-bad 0.2 --from d"
)
NEW = (
    "--num-layers 3 --num-target-layers=4 --num-heads 2 --num-kv-heads 1 --num-anchors=9 --batch-size 2 "
    "--max-grad-norm 0.5 --warmup-ratio 0.1 --ema-decay 0.9 --max-skipped 0.2 --init-from d"
)


def test_old_flags_say_the_same_and_their_new_names(monkeypatch) -> None:
    configs: list = []
    monkeypatch.setattr(trainer, "train", lambda config, reporter: configs.append(config))
    first = ("train", "v", "--data", "rows.jsonl", "-o", "out")
    old = CliRunner().invoke(app, [*first, *OLD.split()], catch_exceptions=False)
    assert old.stderr.count("\n") == 1
    for flag, new in renamed.FLAGS.items():
        assert f"{flag} is now {new}" in old.stderr
    assert CliRunner().invoke(app, [*first, *NEW.split()]).stderr == ""
    assert configs[0] == configs[1]
    assert (configs[0].hparams.num_anchors, configs[0].init_from) == (9, "d")


def test_only_the_new_flags_are_shown() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    shown = {flag for param in commands["train"].params for flag in param.opts}
    assert set(renamed.FLAGS.values()) <= shown
    assert not shown & set(renamed.FLAGS)


def test_an_error_about_an_old_flag_names_the_new(refused, tmp_path) -> None:
    args = ("train", "v", "--data", tmp_path / "rows.jsonl", "-o", tmp_path / "out")
    assert "--num-anchors is 0" in refused(*args, "--anchors", "0")
    assert "modes" in refused(
        "bench", "v", "d", "--data", "rows.jsonl", "--modes", "ours,plugin", "-o", tmp_path / "b"
    )


def test_a_run_made_with_old_names_is_the_same_run(tmp_path) -> None:
    old = {"hparams.anchors": 16, "shape.features": 5, "hparams.lr": 0.1, "feature_gib": 2.0}
    new = {"hparams.num_anchors": 16, "shape.num_target_layers": 5, "hparams.lr": 0.1}
    new["feature_gib"] = 2.0
    folder = RunFolder(tmp_path / "d-run", old)
    folder.new_state_file(3).write_bytes(b"")
    folder.commit_state(3, {})
    del folder  # with its lock
    assert RunFolder.setting(tmp_path / "d-run", "hparams.num_anchors") == 16
    with pytest.raises(ValueError, match=r"hparams\.num_anchors = 16, not 17"):
        RunFolder(tmp_path / "d-run", new | {"hparams.num_anchors": 17})
    folder = RunFolder(tmp_path / "d-run", new)
    (tmp_path / "d").mkdir()
    summary = {"config": old, "steps": 3}
    (tmp_path / "d" / trainer.TRAINING_FILE).write_text(json.dumps(summary))
    assert trainer.finished(tmp_path / "d", folder) == summary
    # Asked for in the other format it is not there yet.
    assert trainer.finished(tmp_path / "d", folder, "speculators") is None


def test_the_chart_reads_reports_with_the_old_mode() -> None:
    root = Path(__file__).parents[3]
    sys.path.insert(0, str(root / "tools"))
    import demo_chart

    for file in (root / "benchmarks" / "results").glob("demo_*.json"):
        report = json.loads(file.read_text())
        assert "ours" in report["modes"]
        assert "vllm-dflash, same drafter" in demo_chart.draw(report)
