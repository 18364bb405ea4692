"""The command line: bad input ends in one clear line, a full disk harms nothing, small commands work.

Only the full-disk test starts an engine; everything else is refused before one is needed.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import vllm_dflash
from helpers import tiny
from vllm_dflash.checkpoint import convert, read_config
from vllm_dflash.cli import _quiet_engine, app
from vllm_dflash.config import DrafterConfig


@pytest.fixture(scope="module")
def drafter(models, verifier) -> Path:
    return tiny.make_drafter(models / "cli-drafter", verifier, draft_vocab_size=64)


def test_no_such_verifier(refused, tmp_path, prompts_file) -> None:
    line = refused("train", tmp_path / "nowhere", "--data", prompts_file, "-o", tmp_path / "out")
    assert "nowhere" in line
    assert "does not exist" in line
    assert not (tmp_path / "out").exists()
    (tmp_path / "folder").mkdir()
    line = refused("train", tmp_path / "folder", "--data", prompts_file, "-o", tmp_path / "out")
    assert "config.json" in line


def test_no_such_data_and_empty_data(refused, tmp_path, verifier) -> None:
    line = refused("train", verifier, "--data", tmp_path / "no.jsonl", "-o", tmp_path / "out")
    assert "no.jsonl" in line
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    line = refused("train", verifier, "--data", empty, "-o", tmp_path / "out")
    assert "empty.jsonl" in line
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"messages": []}\nnot json\n')
    line = refused("train", verifier, "--data", bad, "-o", tmp_path / "out")
    assert "bad.jsonl" in line


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        (("--loss", "mse"), ("loss", "mse", "dpace")),
        (("--optimizer", "sgd"), ("optimizer", "sgd")),
        (("--lr", "-1"), ("lr", "-1")),
        (("--checkpoint-format", "gguf"), ("--checkpoint-format", "gguf", "zlab")),
        (("--engine-args", "{bad"), ("--engine-args", "{bad", "JSON")),
        (("--chat-template-kwargs", "[1]"), ("--chat-template-kwargs", "[1]", "object")),
        (("--target-layer-ids", "1,x"), ("--target-layer-ids", "1,x")),
        (("--target-layer-ids", "1,9"), ("target_layer_ids", "9", "0..3")),
        (("--target-layer-ids", "2,1"), ("target_layer_ids", "ascending")),
        (("--block-size", "1"), ("block_size", "1")),
        (("--draft-vocab", "100000"), ("draft_vocab_size", "100000", "384")),
        (("--mask-token-id", "0"), ("--mask-token-id", "0")),
        (("--mask-token-id", "9999"), ("--mask-token-id", "9999", "383")),
        (
            ("--head", "dflash2", "--draft-vocab", "64", "--checkpoint-format", "speculators"),
            ("speculators", "draft vocabulary", "z-lab"),
        ),
        (("--on-policy", "--responses", "r.jsonl"), ("--responses", "--on-policy")),
    ],
    ids=lambda x: "=".join(x) if x and x[0].startswith("--") and len(x) == 2 else "",
)
def test_bad_settings(refused, tmp_path, verifier, prompts_file, more, parts) -> None:
    line = refused("train", verifier, "--data", prompts_file, "-o", tmp_path / "out", *more)
    for part in parts:
        assert part in line, (part, line)
    assert not (tmp_path / "out").exists()


def test_unknown_option_and_command(verifier) -> None:
    done = tiny.cli("train", verifier, "--no-such-option", code=2)
    assert "--no-such-option" in done.stderr
    assert "Traceback" not in done.stderr
    assert "no-such-command" in tiny.cli("no-such-command", code=2).stderr


def test_drafter_of_another_verifier(refused, tmp_path, prompts_file, drafter) -> None:
    other = tiny.make_verifier(tmp_path / "other", hidden=96, vocab=400)
    data = ("--data", prompts_file)
    for command in (
        ("eval", other, drafter, *data),
        ("train", other, *data, "-o", tmp_path / "out", "--init-from", drafter),
        ("inspect", drafter, other),
    ):
        line = refused(*command)
        assert "does not fit" in line
        assert "hidden size is 96" in line


def test_broken_checkpoints(refused, tmp_path, verifier, prompts_file, drafter) -> None:
    half = tmp_path / "half"
    shutil.copytree(drafter, half)
    file = half / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    data = ("--data", prompts_file)
    for command in (
        ("eval", verifier, half, *data),
        ("train", verifier, *data, "-o", tmp_path / "out", "--init-from", half),
        ("inspect", half),
        ("convert", half, "-o", tmp_path / "out", "--to", "zlab"),
    ):
        line = refused(*command)
        assert "cut short" in line, command
        assert "model.safetensors" in line
    assert not (tmp_path / "out").exists()
    (half / "config.json").write_text("{")
    assert "not valid JSON" in refused("inspect", half)
    assert "does not exist" in refused("inspect", tmp_path / "nothing")


def test_eval_wants_tokens_within_the_block(refused, verifier, prompts_file, drafter) -> None:
    line = refused("eval", verifier, drafter, "--data", prompts_file, "-k", "8")
    assert "8" in line
    assert "1..7" in line


def test_output_that_cannot_be_written(refused, tmp_path, verifier, prompts_file) -> None:
    (tmp_path / "file").write_text("in the way")
    line = refused("train", verifier, "--data", prompts_file, "-o", tmp_path / "file" / "drafter")
    assert "file" in line
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.thorough
def test_inspect(verifier, drafter) -> None:
    out = tiny.cli("inspect", drafter, verifier).stdout
    for part in (
        "z-lab",
        "[0, 2, 3]",
        "[1, 3, 4]",
        "7 speculative tokens",
        "drafts from 64",
        "fits",
    ):
        assert part in out
    assert "complete and finite" in out


def inspected(folder, tmp_path, dflash=None, **changes) -> str:
    """What ``inspect`` prints of a copy with other keys, None for absent; line breaks are spaces."""
    copy = tmp_path / f"copy-{len(list(tmp_path.iterdir()))}"
    shutil.copytree(folder, copy)
    raw = json.loads((copy / "config.json").read_text()) | changes
    if dflash:
        raw["dflash_config"] |= dflash
    raw = {k: v for k, v in raw.items() if v is not None}
    (copy / "config.json").write_text(json.dumps(raw))
    result = CliRunner().invoke(app, ["inspect", str(copy)], env={"COLUMNS": "400"})
    return " ".join(f"{result.stdout} {result.exception or ''}".replace("│", " ").split())


def test_inspect_says_what_decides_acceptance(drafter, tmp_path) -> None:
    """Causality and window of each layer, the rotary base, and what vLLM or another reader does otherwise."""
    assert "attention 2 x full, bidirectional" in inspected(drafter, tmp_path)
    assert "rope_theta" in inspected(drafter, tmp_path)
    kinds = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
    mixed = inspected(drafter, tmp_path, **kinds, use_sliding_window=True)
    assert "1 x sliding over 16 tokens, causal; 1 x full, bidirectional" in mixed
    off = inspected(drafter, tmp_path, **kinds)
    assert "no known number of tokens" in off
    assert "use_sliding_window true" in off
    assert "block size not stated" in inspected(drafter, tmp_path, block_size=None)
    assert "num_anchors: not read by vLLM" in inspected(
        drafter, tmp_path, dflash={"num_anchors": 3}
    )
    quantised = inspected(drafter, tmp_path, quantization_config={"quant_method": "fp8"})
    assert "quantised (fp8)" in quantised
    assert "complete" not in quantised
    convert(drafter, tmp_path / "spec", "speculators")
    raw = read_config(tmp_path / "spec")
    layers = {**raw["transformer_layer_config"], **kinds}
    spec = inspected(
        tmp_path / "spec",
        tmp_path,
        transformer_layer_config=layers,
        sliding_window_non_causal=False,
    )
    assert "1 x sliding over 16 tokens, causal; 1 x full, bidirectional" in spec
    assert "vLLM 0.33 and older read them as causal" in spec
    assert "from the anchor by speculators" in spec


@pytest.mark.thorough
def test_convert_there_and_back(refused, tmp_path, drafter) -> None:
    tiny.cli("convert", drafter, "-o", tmp_path / "spec", "--to", "speculators")
    assert read_config(tmp_path / "spec")["speculators_model_type"] == "dflash"
    tiny.cli("convert", tmp_path / "spec", "-o", tmp_path / "back", "--to", "zlab")
    a, b = (DrafterConfig.from_dict(read_config(p)) for p in (drafter, tmp_path / "back"))
    assert a == b
    weights = [(p / "model.safetensors").read_bytes() for p in (drafter, tmp_path / "back")]
    assert weights[0] == weights[1]
    line = refused("convert", drafter, "-o", tmp_path / "x", "--to", "gguf")
    assert "gguf" in line
    assert "itself" in refused("convert", drafter, "-o", drafter, "--to", "zlab")
    assert "complete and finite" in tiny.cli("inspect", drafter).stdout


@pytest.mark.engine
def test_env() -> None:
    out = tiny.cli("env").stdout
    assert "plugin" in out
    assert "vllm-dflash ops: " in out
    seams = [line for line in out.splitlines() if "vllm." in line and " ok" in line]
    assert len(seams) >= 4, out


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("tmpfs cannot be mounted here")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_errors_of_the_disk_name_path_and_disk(refused, small_disk, drafter) -> None:
    (small_disk / "filler").write_bytes(b"0" * (1024 * 1024 - 40_000))
    line = refused("convert", drafter, "-o", small_disk / "out", "--to", "zlab")
    assert f"{small_disk / 'out'} cannot be written: No space left on device" in line
    assert f"MiB free on the disk at {small_disk}" in line
    assert os.listdir(small_disk) == ["filler"]
    line = refused("convert", drafter, "-o", small_disk, "--to", "zlab")
    assert f"-o {small_disk}" in line
    (small_disk / "filler").unlink()
    assert "root of a disk" in refused("convert", drafter, "-o", small_disk, "--to", "zlab")


@pytest.mark.engine
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small tmpfs")
def test_full_disk_leaves_the_old_drafter(tmp_path, trained) -> None:
    """The run itself is on a disk with room, the finished drafter no longer fits on its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True
    ).returncode:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        run = tmp_path / "run"
        run.mkdir()
        (disk / "drafter-run").symlink_to(run)
        shutil.copytree(trained.drafter, disk / "drafter")
        before = (disk / "drafter" / "model.safetensors").read_bytes()
        (disk / "filler").write_bytes(b"0" * (1024 * 1024 - len(before) - 100_000))
        args = (
            "train", trained.verifier, "--data", trained.prompts, "-o", disk / "drafter",
            *tiny.TRAIN_ARGS, "--draft-vocab", "256", "--max-steps", "2",
        )  # fmt: skip
        done = tiny.cli(*args, code=1)
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, done.stderr
        assert "space" in errors[0].lower() or "enospc" in errors[0].lower(), errors
        assert (disk / "drafter" / "model.safetensors").read_bytes() == before
        assert sorted(p.name for p in disk.iterdir()) == ["drafter", "drafter-run", "filler"]
        # With room again the same command only has to write the drafter.
        (disk / "filler").unlink()
        done = tiny.cli(*args)
        assert "resuming at step 2" in done.stderr
        summary = json.loads((disk / "drafter" / "dflash_training.json").read_text())
        assert summary["steps"] == 2
    finally:
        subprocess.run(["umount", disk], check=True)


def test_every_option_is_explained_and_those_of_train_are_grouped() -> None:
    for name, command in typer.main.get_command(app).commands.items():
        for option in command.params:
            assert option.help, (name, option.name)
        if name == "train":
            options = [p for p in command.params if p.param_type_name == "option"]
            loose = [p.name for p in options if getattr(p, "rich_help_panel", "") is None]
            assert loose == ["output"]


#: Of other commands; serving/ and ops/ speak of vLLM's and the compilers', renamed.py of old ones.
OTHERS_OPTIONS = {"--speculative-config", "--help", "--format", "--query-gpu", "--id", "--fd"}
OTHERS_OPTIONS |= {"--no-deps", "--worker-extension-cls"}


def test_options_that_messages_speak_of_exist() -> None:
    commands = typer.main.get_command(app).commands.values()
    options = {name for command in commands for option in command.params for name in option.opts}
    spoken = {}
    package = Path(vllm_dflash.__file__).parent
    for file in package.rglob("*.py"):
        if file.relative_to(package).parts[0] in ("serving", "ops", "renamed.py"):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                for name in re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", node.value):
                    spoken[name] = f"{file.name}:{node.lineno}"
    assert len(spoken) > 50
    unknown = {name: at for name, at in spoken.items() if name not in options | OTHERS_OPTIONS}
    assert unknown == {}


def test_the_console_is_left_to_the_command_unless_asked(monkeypatch) -> None:
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "INFO")
    monkeypatch.delenv("TORCH_CPP_LOG_LEVEL", raising=False)
    _quiet_engine()
    assert os.environ["VLLM_LOGGING_LEVEL"] == "INFO"
    assert os.environ["TORCH_CPP_LOG_LEVEL"] == "ERROR"


def test_shell_completion(tmp_path) -> None:
    done = tiny.cli(
        env={
            "_VLLM_DFLASH_COMPLETE": "complete_bash",
            "COMP_WORDS": "vllm-dflash tr",
            "COMP_CWORD": "1",
        }
    )
    assert done.stdout.split() == ["train"]
