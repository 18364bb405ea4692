"""Outputs: what is not ours is never touched, and the next write settles what a kill left."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import tiny
from vllm_dflash import files
from vllm_dflash.files import (
    ANY_FILES,
    MARK,
    atomic_folder,
    atomic_path,
    atomic_write,
    claim_file,
    claim_folder,
    lock_folder,
    mark_folder,
    remove_own,
)


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder, hidden files too; None for folders."""
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() if p.is_file() else None
        for p in folder.rglob("*")
    }


def write(folder: Path, **contents: str) -> Path:
    with atomic_folder(folder) as new:
        for name, text in contents.items():
            (new / name).write_text(text)
    return folder


# -- whose an output is --------------------------------------------------------------------------


def foreign_file(path: Path) -> None:
    path.write_text("thesis")


def foreign_folder(path: Path) -> None:
    (path / "sub").mkdir(parents=True)
    (path / "thesis.txt").write_text("thesis")


def hidden_only(path: Path) -> None:
    path.mkdir()
    (path / ".git").mkdir()


def link_to_folder(path: Path) -> None:
    foreign_folder(path.with_name("behind"))
    path.symlink_to("behind")


def dangling_link(path: Path) -> None:
    path.symlink_to("nowhere")


def unmarked_drafter(path: Path) -> None:
    write(path, **{"config.json": "{}", "model.safetensors": "w"})
    (path / MARK).unlink()


def another_file_beside(path: Path) -> None:
    write(path, **{"config.json": "{}"})
    (path / "notes.txt").write_text("mine")


def a_folder_beside(path: Path) -> None:
    write(path, **{"config.json": "{}"})
    (path / "sub").mkdir()


def changed_since(path: Path) -> None:
    write(path, **{"config.json": "{}"})
    (path / "config.json").write_text("[]")


def damaged_mark(path: Path) -> None:
    write(path, **{"config.json": "{}"})
    (path / MARK).write_text("{")


def a_benchmark(path: Path) -> None:
    path.mkdir()
    mark_folder(path, "bench")
    (path / "report.json").write_text("{}")


def earlier_drafter_and_more(path: Path) -> None:
    earlier_drafter(path)
    (path / "README.md").write_text("mine")


def earlier_drafter(path: Path) -> None:
    """As versions without a mark wrote it."""
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_text("w")
    training = {"verifier": "v", "steps": 3, "versions": {}}
    (path / "dflash_training.json").write_text(json.dumps(training))


FOREIGN = [
    foreign_file, foreign_folder, hidden_only, link_to_folder, dangling_link, unmarked_drafter,
    another_file_beside, a_folder_beside, changed_since, damaged_mark, a_benchmark,
    earlier_drafter_and_more,
]  # fmt: skip


@pytest.mark.parametrize("make", FOREIGN, ids=lambda f: f.__name__)
def test_what_is_not_ours_is_refused_and_stays(tmp_path, make) -> None:
    target = tmp_path / "out"
    make(target)
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=r"^-o .*out") as info:
        claim_folder(target, "drafter", "-o")
    assert "\n" not in str(info.value)
    # The same at the moment of replacing, when the work is done.
    with pytest.raises((ValueError, OSError)), atomic_folder(target) as new:
        (new / "config.json").write_text("new")
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (another_file_beside, "notes.txt"),
        (a_folder_beside, "sub"),
        (changed_since, "config.json (changed since)"),
        (earlier_drafter_and_more, "README.md"),
        (foreign_folder, "thesis.txt"),
        (a_benchmark, "bench"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_the_line_names_what_is_in_the_way(tmp_path, make, word) -> None:
    make(tmp_path / "out")
    with pytest.raises(ValueError) as info:  # noqa: PT011 - the words are below
        claim_folder(tmp_path / "out", "drafter", "-o")
    assert word in str(info.value)


@pytest.mark.parametrize(
    "make", [None, Path.mkdir, earlier_drafter], ids=["absent", "empty", "an earlier one"]
)
def test_ours_absent_and_empty_are_replaced(tmp_path, make) -> None:
    target = tmp_path / "out"
    if make is not None:
        make(target)
    for text in ("one", "two"):
        claim_folder(target, "drafter", "-o")
        write(target, **{"config.json": text})
        assert (target / "config.json").read_text() == text
    assert sorted(os.listdir(target)) == [MARK, "config.json"]
    assert os.listdir(tmp_path) == ["out"]


def test_places_that_no_output_may_take(tmp_path, monkeypatch) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (tmp_path / "here" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "below")
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    cases = {
        "": "current folder", ".": "current folder", "..": "'..'|\\.\\.", "/": "current folder",
        "../../here": "current folder", "~": "shell", "~/x": "shell", str(tmp_path): "current",
        str(tmp_path / "home"): "home folder", str(model): "the verifier itself",
        str(model / "x"): "inside the verifier", str(model / "a/b"): "inside the verifier",
        str(tmp_path / "file/x"): "is a file", "/proc/nope/x": "cannot be written",
        "/dev/null/x": "is a file", "x" * 250: "cannot be written|too long",
    }  # fmt: skip
    before = tree(tmp_path)
    for place, words in cases.items():
        with pytest.raises((ValueError, OSError), match=words):
            claim_folder(Path(place), "drafter", "-o", inputs={"the verifier": str(model)})
    for place in (
        "",
        "/",
        "~/x.json",
        str(model),
        str(tmp_path / "file"),
        "/proc/nope/x",
        "/dev/null",
    ):
        with pytest.raises(ValueError, match=r"^-o "):
            claim_file(Path(place), "-o", files.is_json_with("verifier"))
    assert tree(tmp_path) == before


def test_a_result_of_ours_is_replaced_and_no_other_file(tmp_path) -> None:
    file = tmp_path / "r.json"
    ours = files.is_json_with("verifier", "offline")
    for text in ("thesis", "[1]", '{"verifier": 1}', "\xff"):
        file.write_text(text)
        with pytest.raises(ValueError, match="not written by this command"):
            claim_file(file, "-o", ours)
    for text in ("", '{"verifier": 1, "offline": 2}'):
        file.write_text(text)
        claim_file(file, "-o", ours)
    (tmp_path / "link").symlink_to(file)
    with pytest.raises(ValueError, match="symbolic link"):
        claim_file(tmp_path / "link", "-o", ours)


def test_only_named_files_of_a_folder_are_removed(tmp_path) -> None:
    folder = tmp_path / "run"
    (folder / "seat").mkdir(parents=True)
    mark_folder(folder, "run")
    names = r"a\.json|seat/b\.json"
    for name in ("a.json", "seat/b.json"):
        (folder / name).write_text("ours")
    claim_folder(folder, "run", "-o", names=names)
    for name in ("seat/mine.txt", "other"):
        (folder / name).write_text("mine")
    with pytest.raises(ValueError, match=r"other, seat/mine\.txt"):
        claim_folder(folder, "run", "-o", names=names)
    claim_folder(folder, "run", "-o", names=ANY_FILES)
    remove_own(folder, names)
    assert sorted(tree(folder)) == ["other", "seat", "seat/mine.txt"]


def test_a_run_whose_mark_was_cut_is_still_known(tmp_path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text('{"config": {}, "versions": {}, "argv": []}')
    (tmp_path / "run" / MARK).write_text("{")
    claim_folder(tmp_path / "run", "run", "-o", names=ANY_FILES)
    mark_folder(tmp_path / "run", "run")
    assert json.loads((tmp_path / "run" / MARK).read_text())["kind"] == "run"


# -- writes that end early -----------------------------------------------------------------------


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_atomic_write(tmp_path, monkeypatch) -> None:
    file = tmp_path / "a" / "b.json"
    atomic_write(file, "old")
    assert file.read_text() == "old"
    assert file.stat().st_mode & 0o777 == 0o666 & ~_umask()
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(
        OSError, match=r"b\.json cannot be written: No space .* MiB free on the disk at /"
    ):
        atomic_write(file, "new")
    assert file.read_text() == "old"
    assert os.listdir(tmp_path / "a") == ["b.json"]


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def test_a_full_disk_is_named_for_safetensors_too(tmp_path) -> None:
    from safetensors import SafetensorError

    text = "Error while serializing: I/O error: No space left on device (os error 28)"
    with (
        pytest.raises(OSError, match=r"state\.x cannot be written: No space"),
        atomic_path(tmp_path / "state.x"),
    ):
        raise SafetensorError(text)
    with pytest.raises(SafetensorError, match="header"), atomic_path(tmp_path / "state.x"):
        raise SafetensorError("header too large")


KILLED = """
import os, signal, sys
from pathlib import Path
from vllm_dflash import files

name, nth, target = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
calls = 0

def wrap(real):
    def called(*args, **kwargs):
        global calls
        if kwargs.pop("watched", True):
            calls += 1
            if calls == nth:
                os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    return called

place = {"replace": os, "fsync": os, "mkdtemp": files.tempfile, "unlink": Path, "rmdir": Path,
         "write_text": Path, "flock": files.fcntl}[name]
setattr(place, name, wrap(getattr(place, name)))
with files.atomic_folder(target) as new:
    (new / "config.json").write_text("new")
    (new / "model.safetensors").write_text("new")
print("alive")
"""


@pytest.mark.parametrize("existed", [True, False], ids=["over an old one", "new"])
@pytest.mark.parametrize(
    ("call", "nth", "after"),
    [
        ("flock", 1, "old"),  # the staging folder stands, not yet locked
        ("write_text", 1, "old"),
        ("write_text", 2, "old"),
        ("write_text", 3, "old"),  # before the mark
        ("fsync", 2, "old"),
        ("replace", 1, "old"),  # before the old one is moved away
        ("replace", 2, "old"),  # between the two renames
        ("unlink", 1, "new"),  # while the old one is removed
        ("unlink", 2, "new"),
        ("unlink", 3, "new"),
        ("rmdir", 1, "new"),
    ],
)
def test_the_next_write_settles_what_a_kill_left(tmp_path, existed, call, nth, after) -> None:
    target = tmp_path / "drafter"
    if existed:
        write(target, **{"config.json": "old", "model.safetensors": "old"})
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, call, str(nth), str(target)],
        capture_output=True, text=True, env=tiny.environment(),
    )  # fmt: skip
    if killed.returncode == 0:
        assert not existed, killed.stderr  # there is less to do for a new one
        assert killed.stdout == "alive\n"
    else:
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert any(files._STAGING in p.name for p in tmp_path.iterdir()) or call == "rmdir"
    # What is there by then is whole: the claim at the start of the next command restores it.
    claim_folder(target, "drafter", "-o")
    assert os.listdir(tmp_path) == (["drafter"] if target.exists() else [])
    if existed or target.exists():
        want = "new" if not existed else after
        assert {p.read_text() for p in target.iterdir() if p.name != MARK} == {want}
    write(target, **{"config.json": "again"})
    assert os.listdir(tmp_path) == ["drafter"]
    assert sorted(os.listdir(target)) == [MARK, "config.json"]


def test_a_live_writer_and_other_peoples_files_stay(tmp_path) -> None:
    target = tmp_path / "d"
    other = tmp_path / ".d.vllm-dflash-mybackup"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    named = tmp_path / ".d.vllm-dflash-abcdefgh"
    named.write_text("a file")
    with atomic_folder(target) as new:
        (new / "config.json").write_text("first")
        write(target, **{"config.json": "second"})
        claim_folder(target, "drafter", "-o")
        assert (new / "config.json").read_text() == "first"
    assert (target / "config.json").read_text() == "first"
    assert sorted(os.listdir(tmp_path)) == sorted([other.name, named.name, "d"])
    assert (other / "thesis.txt").read_text() == "mine"


def test_one_lock_a_folder(tmp_path) -> None:
    held = lock_folder(tmp_path)
    assert held is not None
    assert lock_folder(tmp_path) is None
    os.close(held)
    again = lock_folder(tmp_path, sure=True)
    assert again is not None
    os.close(again)
