"""What the commands write: checked before any work, replaced whole, and nothing else is ever removed.

A folder is an output of ours if it is absent, empty, or bears our mark: a small file ``.vllm-dflash.json``
that says what the folder is and, where the folder is replaced as a whole, the SHA-256 of every file in it.
vLLM, transformers and speculators read past it. Folders that earlier versions wrote without one are known
by their files (:func:`owner_of`).

New content is written in a *staging folder* beside its target, ``.<name>.vllm-dflash-<random>``, and renamed
into place. Its writer holds a lock on it; one that nobody holds was left by a kill, and the next write of the
same target settles it (:func:`sweep`).
"""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from vllm_dflash import __version__

MARK = ".vllm-dflash.json"
#: Paths that a command reads: one, several, or none.
Inputs = str | os.PathLike[str] | Iterable[str | os.PathLike[str]] | None
Kind = Literal["drafter", "run", "bench", "features", "model", "learning"]
#: For :func:`claim_folder`: whatever else lies in the folder, since nothing there will be replaced.
ANY_FILES = ".*"

_STAGING = ".vllm-dflash-"
_NEW, _PREVIOUS = "new", "previous"
#: What a drafter's folder held before there was a mark.
_EARLIER_DRAFTER = ("config.json", "dflash_training.json", "model.safetensors")
#: Errors of the disk or of permissions: the path is what the user needs to know.
_WRITE_ERRORS = frozenset(
    getattr(errno, name)
    for name in "ENOSPC EDQUOT EFBIG EIO EROFS EACCES EPERM ENAMETOOLONG ENOTDIR".split()
)


# -- whose a folder is ---------------------------------------------------------------------------


def owner_of(folder: Path) -> Kind | None:
    """What a folder of ours is; None for one that we did not write.

    Without a mark, these are ours: a run folder and a benchmark with their ``run.json`` and ``report.json``,
    a cache of features, and a drafter that holds the three files of a training run. One that an earlier
    ``convert`` wrote has nothing to tell it from other people's checkpoints.
    """
    if (kind := _read_mark(folder).get("kind")) is not None:
        return kind
    if set(_EARLIER_DRAFTER) <= {p.name for p in folder.iterdir()}:
        file, keys = folder / "dflash_training.json", ("verifier", "steps", "versions")
        return "drafter" if _holds(file, keys) else None
    if _holds(folder / "run.json", ("config", "versions", "argv")):
        return "run"
    if _holds(folder / "report.json", ("versions", "machine", "config", "errors", "modes")):
        return "bench"
    if all(re.fullmatch("[0-9a-f]{12}", p.name) and p.is_dir() for p in folder.iterdir()):
        return "features"
    return None


def _holds(file: Path, keys: Iterable[str]) -> bool:
    """Whether a file is a JSON object with these keys."""
    try:
        return set(keys) <= json.loads(file.read_bytes()).keys()
    except (OSError, ValueError, AttributeError):
        return False


def _read_mark(folder: Path) -> dict[str, Any]:
    try:
        mark = json.loads((folder / MARK).read_bytes())
    except (OSError, ValueError):
        return {}
    return mark if isinstance(mark, dict) else {}


def _own_files(folder: Path) -> dict[str, str | None]:
    """Names of a whole folder's files that we wrote, each with its SHA-256 where that is known."""
    if (folder / MARK).is_file():
        listed = _read_mark(folder).get("sha256")
        return dict(listed) if isinstance(listed, dict) else {}
    return dict.fromkeys(_EARLIER_DRAFTER)


def _foreign(folder: Path) -> list[str]:
    """Files of a folder, replaced as a whole, that we did not write or that were changed since."""
    own = _own_files(folder)
    found = []
    for path in sorted(folder.iterdir()):
        if path.name == MARK:
            continue
        if path.name not in own or path.is_symlink() or not path.is_file():
            found.append(path.name)
        elif own[path.name] not in (None, _sha256(path)):
            found.append(f"{path.name} (changed since)")
    return found


def _files(folder: Path) -> Iterator[str]:
    """Paths within of everything in a folder but its subfolders; links are not followed."""
    for root, folders, files in os.walk(folder):
        links = [name for name in folders if (Path(root) / name).is_symlink()]
        for name in sorted([*files, *links]):
            yield (Path(root) / name).relative_to(folder).as_posix()


def _unlike(folder: Path, names: str) -> list[str]:
    """Files of a folder that are neither our mark nor named as ours are."""
    if names == ANY_FILES:
        return []
    return [
        n
        for n in _files(folder)
        if n != MARK and (not re.fullmatch(names, n) or (folder / n).is_symlink())
    ]


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def mark_folder(folder: Path, kind: Kind, *, whole: bool = False) -> None:
    """Writes our mark; with ``whole`` it lists the files, and nothing else belongs to the folder."""
    mark: dict[str, Any] = {"written_by": f"vllm-dflash {__version__}", "kind": kind}
    if whole:
        mark["sha256"] = {p.name: _sha256(p) for p in sorted(folder.iterdir()) if p.name != MARK}
        (folder / MARK).write_text(json.dumps(mark, indent=2) + "\n")
    elif _read_mark(folder).get("kind") != kind:
        atomic_write(folder / MARK, json.dumps(mark, indent=2) + "\n")


# -- claims: before any work ---------------------------------------------------------------------


def claim_folder(
    path: Path,
    kind: Kind,
    option: str,
    *,
    label: str | None = None,
    inputs: Mapping[str, Inputs] | None = None,
    names: str | None = None,
    link: bool = False,
) -> None:
    """Checks that an output folder can be written and holds nothing but what we wrote there before.

    Puts right what a killed command left of it. Does not make it.

    Args:
        path: the folder.
        kind: what it will be.
        option: the option that named it, for messages.
        label: what it is called, where that is not the option.
        inputs: folders and files that the command reads, by what they are: the output must not be one of
            them or lie inside one.
        names: regular expression of the files (by their path within) that the folder may hold besides our
            mark; None for one that is replaced as a whole, which holds exactly what its mark lists.
        link: whether it may be a symbolic link to a folder; not for one that is replaced.

    Raises:
        ValueError: what is wrong with it, in one line that names it.
    """
    who, way_out = f"{label or option} {path}", f"give another {option}"
    _check_place(path, who, way_out, inputs or {}, link)
    sweep(path)
    if path.exists():
        if not path.is_dir():
            raise ValueError(f"{who} is a file, not a folder; it is left as it is: {way_out}")
        if names is None and os.path.ismount(path):
            raise ValueError(
                f"{who} is the root of a disk, which cannot be replaced; name a folder in it"
            )
        sweep_inside(path)
        _check_ours(path, who, way_out, kind, names)
    inside = names is not None and path.is_dir()
    _check_writable(path if inside else path.parent, path, who)


def _check_ours(path: Path, who: str, way_out: str, kind: Kind, names: str | None) -> None:
    other: list[str] = []
    try:
        entries = sorted(p.name for p in path.iterdir())
        if not entries:
            return
        owner = owner_of(path)
        if owner == kind:
            other = _foreign(path) if names is None else _unlike(path, names)
    except OSError as error:
        raise ValueError(f"{who} cannot be read: {error.strerror}") from error
    way_out = f"nothing was touched: {way_out}, or move it away yourself"
    if owner is None:
        raise ValueError(
            f"{who} is not empty ({_some(entries)}) and not an output of vllm-dflash (it has no valid "
            f"{MARK}); {way_out}"
        )
    if owner != kind:
        raise ValueError(f"{who} holds a {owner} of vllm-dflash, no {kind}; {way_out}")
    if other:
        raise ValueError(
            f"{who} also holds files that vllm-dflash did not write: {_some(other)}; {way_out}"
        )


def claim_file(
    path: Path,
    option: str,
    is_ours: Callable[[Path], bool],
    *,
    inputs: Mapping[str, Inputs] | None = None,
    link: bool = False,
) -> None:
    """Checks that an output file can be written, and that what it may replace is ours.

    Raises:
        ValueError: what is wrong with it, in one line that names it.
    """
    who, way_out = f"{option} {path}", f"give another {option}"
    _check_place(path, who, way_out, inputs or {}, link)
    sweep(path)
    if path.exists():
        if path.is_dir():
            raise ValueError(f"{who} is a folder; give the name of a file")
        if not path.is_file():
            raise ValueError(f"{who} is no ordinary file; {way_out}")
        if path.stat().st_size and not is_ours(path):
            raise ValueError(
                f"{who} exists and was not written by this command; it is left as it is: {way_out}, or "
                "move it away yourself"
            )
    _check_writable(path.parent, path, who)


def is_json_with(*keys: str) -> Callable[[Path], bool]:
    """For :func:`claim_file`: JSON objects with these keys are ours."""
    return lambda path: _holds(path, keys)


def _check_place(
    path: Path,
    who: str,
    way_out: str,
    inputs: Mapping[str, Inputs],
    link: bool,
) -> None:
    if str(path).startswith("~"):
        raise ValueError(f"{who} begins with ~, which no shell replaced; write it out")
    if path.is_symlink() and not (link and path.exists()):
        raise ValueError(
            f"{who} is a symbolic link (to {os.readlink(path)}); it is left as it is: name the place itself"
        )
    if path.name == "..":
        raise ValueError(f"{who} ends in ..; give it by its own name")
    real = path.resolve()
    # expanduser leaves ~ as it is where nobody knows the home folder.
    home = Path(os.path.expanduser("~")) if os.path.expanduser("~") != "~" else None
    for place, what in ((Path.cwd(), "the current folder"), (home, "the home folder")):
        if place is None:
            continue
        place = place.resolve()
        if real == place or real in place.parents:
            held = "is" if real == place else "holds"
            raise ValueError(f"{who} {held} {what}; give a folder of its own")
    named = [
        (what, one)
        for what, given in inputs.items()
        for one in ([given] if isinstance(given, (str, os.PathLike)) else given or ())
    ]
    for what, given in named:
        if not os.path.exists(given):
            continue  # the name of a model on the hub
        source = Path(given).resolve()
        if real == source:
            raise ValueError(f"{who} is {what} itself; {way_out}")
        if source in real.parents:
            raise ValueError(f"{who} lies inside {what} {given}; {way_out}")
    for parent in real.parents:
        config = parent / "config.json"
        if _holds(config, ("model_type",)) or _holds(config, ("architectures",)):
            raise ValueError(f"{who} lies inside the model {parent}; {way_out}")
    for parent in path.parents:
        if parent.exists():
            if not parent.is_dir():
                raise ValueError(f"{who} cannot be made: {parent} is a file")
            break


def _check_writable(folder: Path, path: Path, who: str) -> None:
    """Tries it: permissions, read-only disks and /proc do not show in the mode alone."""
    missing = [p for p in (folder, *folder.parents) if not p.exists()]
    made: list[Path] = []
    try:
        for parent in reversed(missing):
            parent.mkdir()
            made.append(parent)
        made.append(Path(tempfile.mkdtemp(prefix=f".{path.name}{_STAGING}", dir=folder)))
    except OSError as error:
        raise ValueError(f"{who} cannot be written: {error.strerror} ({folder})") from error
    finally:
        for created in reversed(made):
            created.rmdir()


def _some(names: list[str], most: int = 4) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


# -- writing -------------------------------------------------------------------------------------


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Errors of the disk, safetensors' own among them, become an OSError that names path and disk."""
    try:
        yield
    except Exception as error:
        reason = _disk_error(error)
        if reason is None:
            raise
        raise OSError(f"{path} cannot be written: {reason}{_free_space(Path(path))}") from error


def _disk_error(error: Exception) -> str | None:
    if isinstance(error, OSError):
        return error.strerror if error.errno in _WRITE_ERRORS else None
    # safetensors reports "... I/O error: No space left on device (os error 28)".
    if type(error).__name__ == "SafetensorError" and "I/O error" in str(error):
        return str(error).rpartition("I/O error: ")[2]
    return None


def _free_space(path: Path) -> str:
    place = next((p for p in (path, *path.absolute().parents) if p.exists()), None)
    if place is None:
        return ""
    mount = next(p for p in (place.absolute(), *place.absolute().parents) if os.path.ismount(p))
    free = shutil.disk_usage(place).free
    return f" ({free / 2**20:.1f} MiB free on the disk at {mount})"


@contextmanager
def atomic_folder(target: str | Path, kind: Kind = "drafter") -> Iterator[Path]:
    """A new folder that takes the place of ``target``, marked as ours, only when the block succeeds.

    An error or a full disk leaves ``target`` as it was and nothing beside it. After a kill the next
    write or claim of the same target does that.

    Raises:
        ValueError: ``target`` is no output of ours (:func:`claim_folder` tells that beforehand).
    """
    target = Path(target)
    with _staging(target) as staging, writing(target):
        new, previous = staging / _NEW, staging / _PREVIOUS
        new.mkdir()
        yield new
        mark_folder(new, kind, whole=True)
        for file in new.iterdir():
            _sync(file)
        if target.is_symlink() or (target.exists() and not target.is_dir()):
            raise ValueError(f"{target} is no folder any more; it is left as it is")
        if target.exists() and any(target.iterdir()):
            _check_ours(target, f"output {target}", "give another one", kind, None)
            os.replace(target, previous)
        # When this fails or is interrupted, leaving the staging folder puts the previous one back.
        os.replace(new, target)


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A path beside ``path``, of the same name, whose file takes its place when the block succeeds."""
    path = Path(path)
    with _staging(path) as staging, writing(path):
        yield staging / path.name
        _sync(staging / path.name)
        os.replace(staging / path.name, path)


def atomic_write(path: str | Path, text: str) -> None:
    """Writes a text file so that a crash leaves either the old content or the new."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _sync(file: Path) -> None:
    with file.open("rb") as handle:
        os.fsync(handle.fileno())


# -- staging folders -----------------------------------------------------------------------------


@contextmanager
def _staging(target: Path) -> Iterator[Path]:
    """A folder beside ``target``, locked while in use and gone afterwards."""
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        sweep(target)
        while True:
            folder = Path(tempfile.mkdtemp(prefix=f".{target.name}{_STAGING}", dir=target.parent))
            lock = lock_folder(folder)
            if lock is not None and folder.exists():
                break
            # A sweep took it for a leftover before it was locked.
    try:
        yield folder
    finally:
        try:
            _settle(folder, target)
        finally:
            os.close(lock)


def lock_folder(folder: Path, *, sure: bool = False) -> int | None:
    """Locks a folder for as long as the returned file descriptor is open; None if another holds it.

    Where the file system has no locks every writer gets one; with ``sure`` nobody does.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if sure or isinstance(error, BlockingIOError):
            os.close(handle)
            return None
    return handle


def sweep(target: Path) -> None:
    """Settles what killed writers of ``target`` left beside it; a live writer's folder stays."""
    for found in target.parent.glob(f".{glob.escape(target.name)}{_STAGING}????????"):
        _sweep_one(found, target)


def sweep_inside(folder: Path) -> None:
    """The same for everything in a folder of ours."""
    for found in folder.glob(f".*{_STAGING}????????"):
        _sweep_one(found, folder / found.name[1:].rpartition(_STAGING)[0])


def _sweep_one(folder: Path, target: Path) -> None:
    try:
        if folder.is_symlink() or not {p.name for p in folder.iterdir()} <= {
            _NEW,
            _PREVIOUS,
            target.name,
        }:
            return  # no staging folder
        lock = lock_folder(folder, sure=True)
    except (FileNotFoundError, NotADirectoryError):
        return  # gone meanwhile, or a file of somebody's
    if lock is None:
        return
    try:
        _settle(folder, target)
    finally:
        os.close(lock)


def _settle(staging: Path, target: Path) -> None:
    """Puts a folder that was moved away back, or removes it if its successor stands; removes the rest."""
    previous = staging / _PREVIOUS
    if previous.exists():
        if target.exists():
            _discard(previous)
        else:
            os.replace(previous, target)
    for name in {_NEW, target.name}:
        path = staging / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    staging.rmdir()


def _discard(folder: Path) -> None:
    """Removes a folder that was replaced: the files that we wrote, the mark last."""
    for name in (*_own_files(folder), MARK):
        (folder / name).unlink(missing_ok=True)
    try:
        folder.rmdir()
    except OSError as error:
        raise ValueError(
            f"{folder} holds files that vllm-dflash did not write ({_some(os.listdir(folder))}); they were "
            "put into a drafter's folder while it was replaced: move them away"
        ) from error


def remove_own(folder: Path, names: str) -> None:
    """Removes the files of a folder of ours that a regular expression names, then the mark.

    Subfolders go when nothing is left in them. :func:`claim_folder` tells beforehand what else there is.
    """
    pattern = re.compile(names)
    for name in list(_files(folder)):
        if pattern.fullmatch(name) and not (folder / name).is_symlink():
            (folder / name).unlink()
    for root, _, _ in os.walk(folder, topdown=False):
        if Path(root) != folder and not os.listdir(root):
            os.rmdir(root)
    (folder / MARK).unlink(missing_ok=True)
