"""upstream/: patches apply to the vLLM they are for; their own tests fail without and pass with them."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from helpers import vllm_overlay, vllm_versions
from helpers.vllm_overlay import PATCHED_VERSION, PATCHES, ROOT
from vllm_dflash.serving import upstream
from vllm_dflash.serving.seams import SEAMS


def files(patch: Path) -> list[str]:
    return re.findall(r"^\+\+\+ b/(\S+)$", patch.read_text(), re.MULTILINE)


def its_test(patch: Path) -> str:
    (file,) = (f for f in files(patch) if f.startswith("tests/"))
    return file


@pytest.mark.parametrize("patch", PATCHES, ids=lambda p: p.stem)
def test_a_patch_says_what_it_mends(patch) -> None:
    message = patch.read_text().partition("\n---\n")[0]
    assert re.search(r"^Subject: \[PATCH\] \[Bugfix\]", message, re.MULTILINE)
    for part in ("What a user sees: ", "Cause:", "Fix: "):
        assert f"\n{part}" in message
    assert f"({patch.name})" in (ROOT / "upstream/README.md").read_text()


def test_seams_name_patches() -> None:
    named = {n for s in SEAMS for n in re.findall(r"upstream/([\w-]+)\.patch", s.upstream)}
    # No seams: the first two are mended in the drafter class that the plugin registers, the last one in
    # the configuration that it makes.
    unnamed = {"dflash-k-norm-cpu", "dflash-own-window", "speculators-causality"}
    assert {p.stem for p in PATCHES} == named | unnamed == set(upstream.PATCHES)


@pytest.fixture(scope="module")
def trees(tmp_path_factory) -> dict[str, Path]:
    """That vLLM as released and with all patches, both with the patches' tests."""
    out = {}
    for kind in ("released", "patched"):
        folder = vllm_overlay.overlay(PATCHED_VERSION, tmp_path_factory.mktemp("upstream") / kind)
        for patch in PATCHES:
            vllm_overlay.apply(patch, folder, "--include=tests/*")
            if kind == "patched":
                vllm_overlay.apply(patch, folder, "--include=vllm/*")
        out[kind] = folder
    return out


@pytest.mark.slow
@pytest.mark.parametrize("patch", PATCHES, ids=lambda p: p.stem)
def test_each_applies_by_itself(patch, tmp_path) -> None:
    source = vllm_versions.source(PATCHED_VERSION)
    for name in files(patch):
        if name.startswith("vllm/"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / name, tmp_path / name)
    vllm_overlay.apply(patch, tmp_path)
    for name in files(patch):
        ast.parse((tmp_path / name).read_text())


def outcomes(folder: Path, report: Path) -> dict[str, set[str]]:
    """By test file: what became of its tests."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir=tests"]
    done = subprocess.run(
        [*command, f"--junitxml={report}", "tests"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode in (0, 1), done.stdout[-3000:] + done.stderr[-3000:]
    out: dict[str, set[str]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        bad = {n.tag for n in case if n.tag in ("failure", "error", "skipped")}
        file = f"{(case.get('classname') or '').replace('.', '/')}.py"
        out.setdefault(f"tests/{file.removeprefix('tests/')}", set()).update(bad or {"passed"})
    return out


@pytest.mark.slow
@pytest.mark.parametrize("patch", PATCHES, ids=lambda p: p.stem)
def test_env_knows_it_by_source(patch, trees) -> None:
    known = upstream.PATCHES[patch.stem]
    assert f"vllm/{known.file}" in files(patch)
    assert upstream.state(known, trees["released"] / "vllm") == "not in"
    assert upstream.state(known, trees["patched"] / "vllm") == "in"


@pytest.mark.slow
def test_their_tests_fail_without_and_pass_with_them(trees, tmp_path) -> None:
    files = {its_test(p) for p in PATCHES}
    released = outcomes(trees["released"], tmp_path / "released.xml")
    assert {f for f, seen in released.items() if "failure" in seen} == files
    assert not {f for f, seen in released.items() if seen & {"error", "skipped"}}
    patched = outcomes(trees["patched"], tmp_path / "patched.xml")
    assert patched == {f: {"passed"} for f in files}
