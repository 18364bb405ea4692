"""Every value that cannot mean anything ends in one line that names its option, before an engine starts."""

from __future__ import annotations

import json
import os
import shutil
import sys
import typing
from pathlib import Path

import pytest
import typer

from helpers import tiny
from vllm_dflash.bounds import DTYPES
from vllm_dflash.cli import app, main
from vllm_dflash.files import MARK
from vllm_dflash.training.run_folder import RunFolder


@pytest.fixture(scope="module")
def drafter(models, verifier) -> Path:
    return tiny.make_drafter(models / "values-drafter", verifier)


@pytest.fixture
def command(tmp_path, verifier, drafter, prompts_file, monkeypatch):
    """A good command line of each command; its outputs go to ``tmp_path/out``."""
    monkeypatch.chdir(tmp_path)
    data = ("--data", prompts_file)
    return {
        "train": ("train", verifier, *data, "-o", "out/d", "--holdout", "0.1", *tiny.TRAIN_ARGS),
        "eval": ("eval", verifier, drafter, *data, "-o", "out/r.json", "--max-len", "160"),
        "bench": ("bench", verifier, drafter, *data, "-o", "out/b", "--modes", "none,plugin"),
        "convert": ("convert", drafter, "-o", "out/c", "--to", "zlab"),
    }


def spread(command: str, option: str, values: str) -> list[tuple[str, str, str]]:
    return [(command, option, value) for value in values.split()]


#: Commands, options and values; the line names the option.
VALUES = [
    *spread("train", "--lr", "nan inf 0 -1 1e30"),
    *spread("train", "--epochs", "0 nan inf -1 1e12"),
    *spread("train", "--max-steps", "0 -5 99999999999"),
    *spread("train", "--holdout", "1 2 -1 nan"),
    *spread("train", "--max-len", "0 4 -1 8"),
    *spread("train", "--max-tokens", "0 -1 160 100000"),
    *spread("train", "--temperature", "-1 nan inf 1e9"),
    *spread("train", "--top-p", "0 -0.5 1.5 nan"),
    *spread("train", "--top-k", "-7 99999999999"),
    *spread("train", "--dtype", "foo fp8 float64"),
    *spread("train", "--weight-decay", "-1 nan inf"),
    *spread("train", "--warmup-ratio", "-0.1 2 nan"),
    *spread("train", "--min-lr", "-1 3 nan"),
    *spread("train", "--max-grad-norm", "0 -1 nan"),
    *spread("train", "--ema-decay", "1 2 -0.1 nan"),
    *spread("train", "--alpha", "9 -1 nan"),
    *spread("train", "--max-skipped", "3 -1 nan"),
    *spread("train", "--num-anchors", "0 -1 99999999999"),
    *spread("train", "--batch-size", "0 -1"),
    *spread("train", "--seed", "-1 99999999999999999999"),
    *spread("train", "--feature-gib", "0 -1 nan inf"),
    *spread("train", "--eval-every", "0 -1"),
    *spread("train", "--save-minutes", "-1 nan"),
    *spread("train", "--max-rejected", "-0.1 1.5 nan"),
    *spread("eval", "--max-rejected", "-0.1 1.5 nan"),
    *spread("train", "--max-num-seqs", "0 -1 1000000"),
    *spread("train", "--tensor-parallel-size", "0 -1 3 1000000"),
    *spread("train", "--limit", "0 -1"),
    *spread("train", "--num-layers", "0 -1 99999999999999999999"),
    *spread("train", "--num-target-layers", "0 -1 99"),
    *spread("train", "--hidden-size", "0 -8 33 99999999"),
    *spread("train", "--intermediate-size", "0 -1 99999999999"),
    *spread("train", "--num-heads", "0 -1 99999999"),
    *spread("train", "--num-kv-heads", "0 -1"),
    *spread("train", "--head-dim", "0 -2 99999999"),
    *spread("train", "--draft-vocab", "0 -1"),
    *spread("train", "--mask-token-id", "-1 100000 0"),
    *spread("train", "--sliding-window", "8 0 -1"),
    *spread("train", "--layer-types", "sliding, banana"),
    *spread("train", "--target-layer-ids", "a , 1,,2"),
    *spread("train", "--loss", "foo"),
    *spread("train", "--optimizer", "sgd"),
    *spread("train", "--autocast", "fp8"),
    *spread("train", "--checkpoint-format", "gguf"),
    *spread("train", "--gamma", "-1 0 nan 4"),  # 4: the default loss has none
    *spread("train", "--chat-template-kwargs", "{ [1]"),
    *spread("train", "--engine-args", 'x [1] {"model":"m"} {"tensor_parallel_size":"two"}'),
    *spread("eval", "--num-speculative-tokens", "0 -1 99"),
    *spread("eval", "--concurrency", "0 -1 99999999"),
    *spread("eval", "--max-tokens", "0 -1 160"),
    *spread("eval", "--max-len", "0 1 8"),
    *spread("eval", "--limit", "0 -1"),
    *spread("eval", "--dtype", "foo"),
    *spread("eval", "--tensor-parallel-size", "0 3"),
    *spread("bench", "--modes", "foo none,none none,,plugin"),
    *spread("bench", "--concurrency", "0 -1 a 1,1 1,"),
    *spread("bench", "--num-prompts", "0 -1 1000"),
    *spread("bench", "--repeats", "0 -1"),
    *spread("bench", "--max-tokens", "0 -1"),
    *spread("bench", "--temperature", "-1 nan inf"),
    *spread("bench", "--num-speculative-tokens", "0 -1 99"),
    *spread("bench", "--max-model-len", "0 -1 5"),
    *spread("bench", "--dtype", "foo"),
    *spread("bench", "--engine-args", "x [1]"),
]


@pytest.mark.parametrize(("name", "option", "value"), VALUES, ids="=".join)
def test_bad_value(refused, command, tmp_path, name, option, value) -> None:
    line = refused(*command[name], f"{option}={value}")
    assert option in line, line
    assert len(line) < 400
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["train", "eval", "bench"])
def test_a_word_for_a_number_is_wrong_usage_in_one_line(refused, command, name) -> None:
    line = refused(*command[name], "--max-tokens", "many", code=2)
    assert "--max-tokens" in line


@pytest.mark.parametrize("value", ['{"no_such_key":1}', '{"max-num-seqs":4}'])
@pytest.mark.parametrize("name", ["train", "eval", "bench"])
def test_engine_arguments_that_vllm_does_not_know(refused, command, name, value) -> None:
    line = refused(*command[name], "--engine-args", value)
    assert "--engine-args" in line
    assert next(iter(json.loads(value))) in line


def test_dtypes_are_those_of_vllm() -> None:
    from vllm.config.model import ModelDType

    assert set(DTYPES) == set(typing.get_args(ModelDType))


def test_empty_and_contradictory(refused, command, tmp_path, drafter) -> None:
    line = refused(*command["train"], "--num-heads", "3", "--num-kv-heads", "2")
    assert "--num-heads, --num-kv-heads" in line
    line = refused(*command["train"], "--engine-args", '{"max_model_len": 100}')
    assert "--engine-args has max_model_len 100" in line
    assert "--modes" in refused(*command["bench"], "--modes", "")
    assert "--target-layer-ids" in refused(*command["train"], "--target-layer-ids", "")
    sliding = ("--layer-types", "sliding,full")
    assert "sliding_window" in refused(*command["train"], *sliding)
    line = refused(*command["train"], "--target-layer-ids", "0,1", "--num-target-layers", "3")
    assert "--target-layer-ids" in line
    line = refused(*command["eval"], "--responses", "r.jsonl", "--on-policy")
    assert "--responses" in line
    line = refused(*command["eval"], "--responses", "out/r.json")
    assert "--responses" in line
    line = refused(*command["train"], "--cache-features", "out/d/cache")
    assert "--cache-features" in line
    # A drafter keeps its shape: what is given beside it must be that.
    start = (*command["train"], "--init-from", drafter)
    for option, value in {"--num-layers": "9", "--block-size": "16", "--draft-vocab": "64"}.items():
        assert f"{option} is {value}" in refused(*start, option, value)
    assert "does not exist" in refused(*command["train"], "--init-from", "nowhere")
    assert os.listdir(tmp_path) == []


# -- outputs -------------------------------------------------------------------------------------

FOLDERS = {"train": "-o", "bench": "-o", "convert": "-o"}


def precious(tmp_path: Path) -> Path:
    folder = tmp_path / "precious"
    (folder / "sub").mkdir(parents=True)
    (folder / "thesis.txt").write_text("thesis")
    (tmp_path / "afile.txt").write_text("thesis")
    (tmp_path / "link").symlink_to("precious")
    return folder


def listing(folder: Path) -> dict[str, bytes | None]:
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in folder.rglob("*")
    }


@pytest.mark.parametrize("name", FOLDERS)
def test_outputs_that_are_not_ours(
    refused, command, tmp_path, name, verifier, drafter, monkeypatch
) -> None:
    """Each is one line that names the path, and everything stays as it is."""
    precious(tmp_path)
    marked = tiny.make_drafter(tmp_path / "marked", verifier)
    (marked / "notes.txt").write_text("mine")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    before, models = listing(tmp_path), listing(verifier.parent)
    outs = [
        "precious",
        "afile.txt",
        "link",
        "marked",
        "afile.txt/x",
        "/proc/nope/x",
        ".",
        "..",
        "/",
        "~",
    ]
    outs += ["", tmp_path, verifier, verifier / "new", verifier.parent, drafter / "new"]
    if name != "train":  # which may replace a drafter of ours that it does not read
        outs.append(drafter)
    for out in outs:
        line = refused(*command[name], "-o", out)
        assert f"{FOLDERS[name]} {Path(out)}" in line, (out, line)
    assert listing(tmp_path) == before
    assert listing(verifier.parent) == models


def test_result_files_that_are_not_ours(refused, command, tmp_path, prompts_file, verifier) -> None:
    precious(tmp_path)
    before, data = listing(tmp_path), prompts_file.read_bytes()
    outs = ["precious", "afile.txt", "link", "link/../afile.txt", "afile.txt/x", "/proc/x/y.json"]
    for out in [*outs, "", ".", "/", "/dev/null", prompts_file, verifier / "r.json"]:
        assert "-o " in refused(*command["eval"], "-o", out), out
        assert "--responses" in refused(*command["eval"], "--responses", out) or out == "link", out
        assert "--html" in refused(*command["eval"], "--html", out), out
    assert listing(tmp_path) == before
    assert prompts_file.read_bytes() == data


def test_feature_caches_that_are_not_ours(
    refused, command, tmp_path, prompts_file, verifier
) -> None:
    precious(tmp_path)
    before = listing(tmp_path)
    for place in (
        "precious",
        "afile.txt",
        prompts_file,
        verifier,
        verifier / "x",
        "/proc/x",
        "",
        "out/d",
    ):
        assert "--cache-features" in refused(*command["train"], "--cache-features", place), place
    cache = tmp_path / "cache"
    index = cache / "0123456789ab" / "index.json"
    index.parent.mkdir(parents=True)
    for text in ("{", "[]", '{"a": 1}', '{"a": "../../x"}'):
        index.write_text(text)
        assert "index.json is damaged" in refused(*command["train"], "--cache-features", cache)
    shutil.rmtree(cache)
    assert listing(tmp_path) == before


# -- run folders ---------------------------------------------------------------------------------


def test_a_run_folder_of_somebody_is_left_alone(refused, command, tmp_path) -> None:
    run = tmp_path / "out" / "d-run"
    run.mkdir(parents=True)
    for name, text in {"thesis.txt": "t", "run.json": "{}", "responses.jsonl": "mine"}.items():
        (run / name).write_text(text)
    before = listing(tmp_path)
    for more in ((), ("--restart",)):
        line = refused(*command["train"], *more)
        assert "out/d-run" in line
        assert "thesis.txt" in line
    shutil.rmtree(run)
    (tmp_path / "out" / "d-run").write_text("a file")
    assert "d-run is a file" in refused(*command["train"], "--restart")
    assert before


@pytest.fixture
def run_folder(tmp_path) -> Path:
    from safetensors.torch import save_file

    run = tmp_path / "out" / "d-run"
    folder = RunFolder(run, {"a": 1})
    save_file({}, folder.new_state_file(3))
    folder.commit_state(3, {"bad": {}, "seconds": {}})
    (run / "responses.jsonl").write_text('{"fingerprint": {}}\n')
    folder.append_metrics([{"step": 1, "loss": 1.0}])
    return run


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *[("run.json", text) for text in ('{"config": {', "{}", "[]", "3", '{"config": 3}', "\0")],
        *[("state.json", text) for text in ('{"step": 3', "{}", "[]", '{"step": 3, "file": "x"}')],
        ("state.json", '{"step": "3", "file": "state-00000003.safetensors"}'),
        ("state.json", '{"step": 9, "file": "state-00000009.safetensors"}'),
        ("state-00000003.safetensors", "cut"),
        ("responses.jsonl", "thesis"),
        ("responses.jsonl", "thesis\n"),
        ("responses.jsonl", "[1]\n"),
    ],
)
def test_a_damaged_run_is_named_with_the_way_out(refused, command, run_folder, name, text) -> None:
    (run_folder / name).write_text(text)
    before = listing(run_folder)
    line = refused(*command["train"])
    assert name in line
    assert "--restart" in line
    assert listing(run_folder) == before


def test_restart_removes_only_what_a_run_writes(refused, command, run_folder, tmp_path) -> None:
    (run_folder / "notes.txt").write_text("mine")
    before = listing(run_folder)
    assert "notes.txt" in refused(*command["train"], "--restart")
    # A bad value beside it costs nothing.
    (run_folder / "notes.txt").unlink()
    assert "no.jsonl" in refused(*command["train"], "--restart", "--data", "no.jsonl")
    before.pop("notes.txt")
    assert listing(run_folder) == before
    (run_folder / "run.json").write_text("damaged")
    again = RunFolder(run_folder, {"a": 2}, restart=True)
    assert sorted(p.name for p in run_folder.iterdir()) == [MARK, "run.json"]
    with pytest.raises(ValueError, match="at work"):
        RunFolder(run_folder, {"a": 2})
    assert again.state() is None


# -- models that are none ------------------------------------------------------------------------


@pytest.mark.parametrize("config", [None, "", "{", "[]", "3", "{}", '{"model_type": "nothing"}'])
def test_folders_that_are_not_models(refused, command, tmp_path, config) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    if config is not None:
        (folder / "config.json").write_text(config)
    for name in ("train", "eval", "bench"):
        first, _, *rest = command[name]
        assert "folder" in refused(first, folder, *rest)
    for name in ("eval", "bench"):
        first, model, _, *rest = command[name]
        assert refused(first, model, folder, *rest)
    assert refused("inspect", folder)
    assert refused("convert", folder, "-o", "out", "--to", "zlab")


# -- the options themselves ----------------------------------------------------------------------


def test_every_option_says_what_it_is() -> None:
    without = [
        f"{name} {param.name}"
        for name, command in typer.main.get_command(app).commands.items()  # type: ignore[attr-defined]
        for param in command.params
        if param.name != "help" and not getattr(param, "help", None)
    ]
    assert without == []


@pytest.mark.parametrize("name", ["eval", "bench"])
def test_errors_name_options_that_exist(name) -> None:
    out = tiny.cli(name, "--help").stdout
    assert "-k" in out
    assert "--num-speculative-tokens" in out


def test_nothing_is_read_from_standard_input(refused, command, tmp_path, monkeypatch) -> None:
    """A library that asks finds the end of the input, not the user's terminal."""
    read, written = os.pipe()
    os.write(written, b"y\n" * 9)
    saved = os.dup(0)
    os.dup2(read, 0)
    try:
        refused(*command["train"], "--lr", "nan")
        assert os.read(0, 1) == b""
    finally:
        os.dup2(saved, 0)
        for fd in (read, written, saved):
            os.close(fd)


def test_an_unexpected_error_is_one_line_too(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["vllm-dflash", "inspect", "x"])
    monkeypatch.setattr("vllm_dflash.checkpoint.read_config", lambda *_: {}[0])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    assert capsys.readouterr().err.startswith("error: unexpected KeyError: 0")
