"""Commands that must be refused, in one line and before an engine starts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from vllm_dflash.bench.engine_process import EngineProcess
from vllm_dflash.cli import main
from vllm_dflash.training.engine import VerifierEngine


class Refused:
    """Runs a command in this process that must fail before it starts an engine."""

    def __init__(self, monkeypatch, capsys) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, *args: str | Path, code: int = 1) -> str:
        """Its one line of error."""

        def engine(*_args, **_kwargs):
            raise AssertionError("a command that should be refused began to start an engine")

        self.monkeypatch.setattr(VerifierEngine, "__init__", engine)
        self.monkeypatch.setattr(EngineProcess, "start", engine)
        self.monkeypatch.setattr(sys, "argv", ["vllm-dflash", *map(str, args)])
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = self.capsys.readouterr()
        assert stop.value.code == code, out + err
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, err
        return lines[0]
