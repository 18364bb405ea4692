"""The store of the shared drafter: made once, made again after a kill or a change, and not hoarded."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers import trained


@pytest.fixture
def made(monkeypatch) -> list[Path]:
    """Folders that were made, by a stand-in that takes no time."""
    folders: list[Path] = []

    def make(folder: Path, args) -> None:
        for name in ("drafter", "drafter-run"):
            (folder / name).mkdir(parents=True)
        (folder / "drafter" / "weights").write_text(" ".join(args))
        (folder / "output.txt").write_text("written")
        folders.append(folder)

    monkeypatch.setattr(trained, "make", make)
    return folders


def test_store_makes_once(tmp_path, made) -> None:
    first = trained.cached(tmp_path, ["--lr", "1"])
    assert trained.cached(tmp_path, ["--lr", "1"]) == first
    assert made == [first]
    assert trained.cached(tmp_path, ["--lr", "2"]) != first


def test_store_makes_again_what_a_killed_run_left(tmp_path, made) -> None:
    folder = trained.cached(tmp_path, ["a"])
    (folder / "output.txt").unlink()
    (folder / "half").touch()
    trained.cached(tmp_path, ["a"])
    assert made == [folder, folder]
    assert not (folder / "half").exists()


def test_store_follows_the_sources(tmp_path, made, monkeypatch) -> None:
    package = tmp_path / "tree" / "vllm_dflash"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("one = 1\n")
    monkeypatch.setattr(trained.vllm_dflash, "__file__", str(package / "__init__.py"))
    first = trained.digest(["a"])
    (package / "loss.py").write_text("two = 2\n")
    second = trained.digest(["a"])
    (package / "loss.py").write_text("two = 3\n")
    assert len({first, second, trained.digest(["a"])}) == 3


def test_store_keeps_the_last_used(tmp_path, made) -> None:
    folders = [trained.cached(tmp_path, [str(i)]) for i in range(trained.KEPT + 2)]
    assert [f.is_dir() for f in folders] == [False, False] + [True] * trained.KEPT


def test_loaded_copies_are_the_callers_own(tmp_path, made) -> None:
    store = trained.cached(tmp_path / "store", ["a"])
    copy = trained.load(store, tmp_path / "mine", ["a"])
    (copy.drafter / "weights").write_text("changed")
    assert (store / "drafter" / "weights").read_text() == "a"
    assert (copy.output, copy.args, copy.verifier) == ("written", ("a",), store / "verifier")
