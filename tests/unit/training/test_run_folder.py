"""The run folder: same settings resume, others are refused, killed writes cost only their last line."""

import pytest

from vllm_dflash.training.curves import draw_curves
from vllm_dflash.training.run_folder import RunFolder


def with_state(folder):
    folder.new_state_file(3).write_bytes(b"")
    folder.commit_state(3, {})


def test_the_same_settings_reopen_and_others_are_named(tmp_path):
    with_state(RunFolder(tmp_path, {"lr": 0.1, "layers": (1, 2)}))
    RunFolder(tmp_path, {"lr": 0.1, "layers": [1, 2]})
    with pytest.raises(ValueError, match=r"lr = 0\.1, not 0\.2.*--responses .*responses\.jsonl"):
        RunFolder(tmp_path, {"lr": 0.2, "layers": [1, 2]})


def test_before_a_first_state_a_run_may_be_tried_with_other_settings(tmp_path):
    """As after running out of memory; what it has generated stays."""
    first = RunFolder(tmp_path, {"feature_gib": 60.0})
    first.responses.write_text('{"fingerprint": {}}\n')
    started = first.started
    del first  # with its lock
    second = RunFolder(tmp_path, {"feature_gib": 20.0})
    assert RunFolder.setting(tmp_path, "feature_gib") == 20.0
    assert second.responses.is_file()
    assert second.started == started
    second.features.mkdir()  # recorded for what the settings say
    del second
    with pytest.raises(ValueError, match=r"feature_gib = 20\.0, not 10\.0"):
        RunFolder(tmp_path, {"feature_gib": 10.0})


def test_only_a_committed_state_counts_and_older_ones_go(tmp_path):
    folder = RunFolder(tmp_path, {})
    assert folder.state() is None
    folder.new_state_file(5).write_bytes(b"half")
    assert folder.state() is None
    folder.commit_state(5, {"bad": {}})
    folder.new_state_file(9).write_bytes(b"x")
    assert folder.state()["step"] == 5
    folder.commit_state(9, {"bad": {"a": "nan"}})
    assert folder.state() == {"step": 9, "file": "state-00000009.safetensors", "bad": {"a": "nan"}}
    assert [f.name for f in tmp_path.glob("state-*.safetensors")] == ["state-00000009.safetensors"]


def test_a_state_that_is_gone_is_an_error_with_the_way_out(tmp_path):
    folder = RunFolder(tmp_path, {})
    folder.new_state_file(5).write_bytes(b"x")
    folder.commit_state(5, {})
    folder.new_state_file(5).unlink()
    with pytest.raises(ValueError, match="--restart"):
        folder.state()


def test_metrics_of_steps_that_run_again_are_dropped(tmp_path):
    folder = RunFolder(tmp_path, {})
    folder.append_metrics([{"step": s, "loss": 1.0} for s in range(6)])
    with folder.metrics.open("a") as file:
        file.write('{"step": 6, "lo')
    folder.cut_metrics(4)
    assert [r["step"] for r in folder.read_metrics()] == [0, 1, 2, 3]


@pytest.mark.parametrize("held", [None, {"tau": 1.7, "position_rates": [0.5, 0.2]}])
def test_curves_are_drawn(tmp_path, held):
    folder = RunFolder(tmp_path, {})
    assert draw_curves(folder.read_metrics(), held, "none", folder.curves) is None
    row = {"loss": 2.0, "accepted": 3, "anchors": 4, "right": [3, 1], "valid": [4, 2]}
    folder.append_metrics([{"step": s, **row} for s in range(3)] + [{"step": 2, "tau": 1.7}])
    path = draw_curves(folder.read_metrics(), held, "drafter", folder.curves)
    assert path is not None
    assert path.read_bytes().startswith(b"\x89PNG")
