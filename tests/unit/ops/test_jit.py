"""Compiling at run time, without a compiler: who tries, and when again."""

from __future__ import annotations

import os
import time
from types import SimpleNamespace

import pytest

from vllm_dflash.ops import build, jit


def test_a_failed_compilation_is_not_tried_at_every_start(monkeypatch, tmp_path) -> None:
    """An nvcc without its headers is found, runs for a while and fails; for another one the key changes."""
    monkeypatch.setenv(jit.ENV_CACHE, str(tmp_path))
    recipe = SimpleNamespace(key=lambda: "key", filename="_C.so", name="_C")
    tried = []

    def run(recipe, target, temp, **options) -> None:
        tried.append(target)
        if len(tried) < 3:
            raise build.BuildError("no header")
        target.write_text("library")

    monkeypatch.setattr(build, "run", run)
    with pytest.raises(build.BuildError, match=r"^no header$"):
        jit._cached(recipe)
    failure = tmp_path / "key" / "failed.txt"
    for _ in range(3):
        with pytest.raises(build.BuildError, match=r"no header\n\(remembered; delete .*failed.txt"):
            jit._cached(recipe)
    assert len(tried) == 1
    # A day later what was missing may be there.
    then = time.time() - jit.FAILURE_STANDS_S - 1
    os.utime(failure, (then, then))
    with pytest.raises(build.BuildError, match=r"^no header$"):
        jit._cached(recipe)
    failure.unlink()
    assert jit._cached(recipe).read_text() == "library"
    assert len(tried) == 3
    assert jit._cached(recipe).read_text() == "library"
