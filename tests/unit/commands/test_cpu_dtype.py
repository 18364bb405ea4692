"""dtype ``auto`` on a CPU without bfloat16 instructions, in every command that starts an engine."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest

from helpers import tiny
from vllm_dflash import cpu_dtype
from vllm_dflash.bench.engine_process import EngineProcess
from vllm_dflash.cli import main
from vllm_dflash.training.engine import VerifierEngine
from vllm_dflash.verifier import Verifier

GIB = 2**30


@pytest.fixture
def old_cpu(monkeypatch):
    """A CPU without the instructions, with 8 GiB left; the verifier's weights take 2."""
    monkeypatch.setattr(cpu_dtype, "on_cpu", lambda: True)
    monkeypatch.setattr(cpu_dtype, "cpu_has_bfloat16", lambda: False)
    monkeypatch.setattr(cpu_dtype, "available_bytes", lambda: 8 * GIB)
    monkeypatch.setattr(cpu_dtype, "weight_bytes", lambda model: 2 * GIB)
    return monkeypatch


def hf_config(**fields):
    config = SimpleNamespace(**{"dtype": "bfloat16", **fields})
    config.get_text_config = lambda: config
    return config


def resolve(dtype="auto", engine_args=None, **fields):
    config = hf_config(**fields)
    return cpu_dtype.verifier_dtype(dtype, Verifier("some/model"), config, engine_args or {})


def test_auto_is_float32_where_16_bits_are_emulated(old_cpu) -> None:
    assert resolve() == "float32"


@pytest.mark.parametrize(("name", "value"), [("on_cpu", False), ("cpu_has_bfloat16", True)])
def test_other_machines_keep_auto(old_cpu, name, value) -> None:
    old_cpu.setattr(cpu_dtype, name, lambda: value)
    assert resolve() == "auto"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_user_s_dtype_wins(old_cpu, dtype) -> None:
    assert resolve(dtype) == dtype
    assert resolve(engine_args={"dtype": dtype}) == "auto"


def test_verifiers_of_16_bits_keep_auto(old_cpu) -> None:
    assert resolve(quantization_config={"quant_method": "awq"}) == "auto"
    assert resolve(engine_args={"quantization": "awq"}) == "auto"
    assert resolve(layer_types=["linear_attention", "full_attention"]) == "auto"
    assert resolve(layer_types=["full_attention"]) == "float32"


def test_float32_must_fit(old_cpu) -> None:
    old_cpu.setattr(cpu_dtype, "available_bytes", lambda: 8 * GIB - 2)
    assert resolve() == "auto"
    assert resolve(dtype="float32") == "float32"
    old_cpu.setattr(cpu_dtype, "weight_bytes", lambda model: 3 * GIB)
    assert resolve() == "auto"
    # As it is stored already.
    config = hf_config(dtype="torch.float32")
    assert cpu_dtype.verifier_dtype("auto", Verifier("some/model"), config, {}) == "float32"


class Started(Exception):
    """An engine would start with this dtype."""


@pytest.fixture
def starts(old_cpu, capsys):
    """Runs a command up to its engine; the engine's dtype and what was said before."""
    old_cpu.setattr(cpu_dtype, "weight_bytes", lambda model: 1)
    found = []

    def verifier_engine(self, verifier, drafter, options, *args, **kwargs):
        found.append(options.dtype)
        raise ValueError("an engine starts")

    def engine_process(self):
        found.append(self.spec.engine_args["dtype"])
        raise RuntimeError("an engine starts")

    old_cpu.setattr(VerifierEngine, "__init__", verifier_engine)
    old_cpu.setattr(EngineProcess, "start", engine_process)

    def run(*args):
        found.clear()
        old_cpu.setattr(sys, "argv", ["vllm-dflash", *map(str, args)])
        with pytest.raises(SystemExit):
            main()
        (dtype,) = set(found)
        return dtype, capsys.readouterr().err

    return run


SENTENCE = "the verifier runs in float32"
LENGTHS = ("--max-len", "160", "--max-tokens", "48", "--dtype", "auto")


def test_train_and_the_run_that_it_resumes(starts, old_cpu, verifier, prompts_file, tmp_path):
    train = ("train", verifier, "--data", prompts_file, "-o", tmp_path / "d", "--num-layers", "1")
    train += ("--block-size", "8", *LENGTHS)
    dtype, said = starts(*train)
    assert dtype == "float32"
    assert SENTENCE in said
    run = json.loads((tmp_path / "d-run" / "run.json").read_text())
    assert run["config"]["engine.dtype"] == "float32"
    # On any machine, and with whatever memory is left, the run goes on as it began.
    old_cpu.setattr(cpu_dtype, "cpu_has_bfloat16", lambda: True)
    assert starts(*train)[0] == "float32"
    dtype, said = starts(*train, "--restart")
    assert dtype == "auto"
    assert SENTENCE not in said
    old_cpu.setattr(cpu_dtype, "cpu_has_bfloat16", lambda: False)
    assert starts(*train)[0] == "auto"


def test_eval_and_bench(starts, verifier, prompts_file, tmp_path):
    drafter = tiny.make_drafter(tmp_path / "drafter", verifier)
    for command in ("eval", "bench"):
        args = [command, verifier, drafter, "--data", prompts_file]
        lengths = LENGTHS
        if command == "bench":
            args += ["-o", tmp_path / "bench", "--num-prompts", "2"]
            lengths = LENGTHS[2:]
        dtype, said = starts(*args, *lengths)
        assert dtype == "float32", said
        assert SENTENCE in said
        dtype, said = starts(*args, *lengths[:-1], "bfloat16")
        assert dtype == "bfloat16"
        assert SENTENCE not in said
