"""Where rows come from: files of several kinds, folders, patterns, Hugging Face data sets.

Nothing here knows what a row means; :mod:`vllm_dflash.training.conversations` does.
"""

from __future__ import annotations

import bz2
import glob
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

Data = str | Path | Sequence[str | Path]

HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?:/(?P<subset>[^/:]+))?(?::(?P<split>.+))?")
#: Endings that are read; each may be followed by one of a compression.
LINES, ARRAY, PARQUET = (".jsonl", ".ndjson"), ".json", ".parquet"
COMPRESSED = (".gz", ".zst", ".zstd", ".bz2", ".xz")
OTHER_FILES = (".txt", ".csv", ".tsv", ".arrow", ".xlsx", ".zip", ".tar", ".pkl", ".md")
_PARQUET_MAGIC = b"PAR1"
_GLOB_CHARACTERS = "*?["


@dataclass(frozen=True)
class Row:
    """One row of the data.

    Attributes:
        source: what its conversation is filed under: the file's name, its folder's, the data set's.
        line: number of the row in it, from 1.
        text: the row as it stands there, or as JSON.
        value: the row, or its JSON as bytes.
        from_arrow: it comes from Arrow, which gives every object the members of all others, as nulls.
        file: the file's name, the data set's.
    """

    source: str
    line: int
    text: str
    value: Any
    from_arrow: bool = False
    file: str = ""


Rows = Generator[Row, None, None]


def as_list(data: Data) -> list[str]:
    """The ``--data`` of a command as a list, whether one or several are given."""
    return [str(data)] if isinstance(data, (str, Path)) else [str(one) for one in data]


def data_files(data: Data) -> list[Path]:
    """The local files that the data is read from, none for Hugging Face data sets."""
    return [path for one in as_list(data) for path in _local_files(one) or []]


def open_rows(data: Data, *, streaming: bool = False, split: str = "train") -> Rows:
    """All rows of the data, one source after the other.

    Args:
        data: Names of files, folders, patterns (``data/*.jsonl``) or Hugging Face data sets
            (``org/name``, ``org/name:split``, ``org/name/subset:split``), one or several.
        streaming: A data set is read as it comes, not downloaded first.
        split: Of Hugging Face data sets that name none.

    Raises:
        ValueError: There is no such data, at once; or it cannot be read, when it is.
    """
    opened = [_open(one, streaming, split) for one in as_list(data)]
    if not opened:
        raise ValueError("no data is given; name a file of conversations")
    return _chain(opened)


def decode_json(raw: bytes) -> Any:
    """The value of a row's JSON; ValueError says what is wrong with it."""
    try:
        return json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from error
    except RecursionError as error:
        raise ValueError("JSON nested too deeply") from error


def _chain(opened: Iterable[Iterable[Row]]) -> Rows:
    for rows in opened:
        yield from rows


def _open(one: str, streaming: bool, split: str) -> Rows:
    if _is_saved(Path(one).expanduser()):
        return _hub_rows(one, None, split=split, streaming=streaming)
    paths = _local_files(one)
    if paths is not None:
        # The shards of a folder are one source in reports.
        folder = Path(one).expanduser()
        sources = [folder.resolve().name if folder.is_dir() else path.name for path in paths]
        return _chain(_file_rows(p, s) for p, s in zip(paths, sources, strict=True))
    at, _, of = one.rpartition(":")
    if at and Path(at).expanduser().is_dir():
        # A data set's folder, as it lies on the Hub or as `datasets` saved it.
        return _hub_rows(at, None, split=of, streaming=streaming)
    match = HUB_NAME.fullmatch(one)
    if match and not _is_file_name(match["subset"] or match["name"]):
        return _hub_rows(
            match["name"], match["subset"], split=match["split"] or split, streaming=streaming
        )
    raise ValueError(
        f"no file {one}; give a file of conversations (JSONL, JSON, Parquet), a folder of them, or the "
        "name of a Hugging Face data set (org/name, org/name:split, org/name/subset:split)"
    )


def _is_file_name(name: str) -> bool:
    endings = (*LINES, ARRAY, PARQUET, *COMPRESSED, *OTHER_FILES)
    return name.lower().endswith(endings)


def _local_files(one: str) -> list[Path] | None:
    """The files of a name, a pattern or a folder; None where it is nothing local."""
    path = Path(one).expanduser()
    if path.is_dir():
        return _folder_files(path)
    if path.is_file():
        return [path]
    if path.exists():
        raise ValueError(
            f"{path} is a pipe or a device, which is read once only; write it to a file"
        )
    if any(character in one for character in _GLOB_CHARACTERS):
        found = sorted(map(Path, glob.glob(str(path), recursive=True)))
        files = [match for match in found if match.is_file() and not _is_leftover(match)]
        if files:
            return files
        if not HUB_NAME.fullmatch(one):  # whose split may be a slice: org/name:train[:1000]
            raise ValueError(f"no file matches {one}")
    return None


def _is_leftover(path: Path) -> bool:
    """Rows that an earlier command rejected, beside the data that a pattern or a folder names."""
    return path.name.endswith("rejected.jsonl") and holds_rejects(path)


def holds_rejects(path: Path) -> bool:
    """Whether a file begins with a row that we rejected, as ``write_rejected`` keeps it, or is empty."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        line = file.readline()
    try:
        return not line or {"line", "reason", "row"} <= json.loads(line).keys()
    except (ValueError, AttributeError):
        return False


def _is_saved(folder: Path) -> bool:
    """True for a folder that ``datasets`` wrote with ``save_to_disk``."""
    one = all((folder / name).is_file() for name in ("state.json", "dataset_info.json"))
    return one or (folder / "dataset_dict.json").is_file()


def _folder_files(folder: Path) -> list[Path]:
    if _is_saved(folder):
        return sorted(folder.rglob("*.arrow"))
    inside = sorted(
        path
        for path in folder.rglob("*")
        # Hidden are caches and checkpoints of notebooks, too: copies of what lies beside them.
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
        and not _is_leftover(path)
    )
    kinds = [_kind(path) for path in inside]
    # Files of metadata are .json, too: they are read only where nothing else holds data.
    rows = [p for p, kind in zip(inside, kinds, strict=True) if kind in (*LINES, PARQUET)]
    rows = rows or [p for p, kind in zip(inside, kinds, strict=True) if kind == ARRAY]
    if not rows:
        raise ValueError(
            f"{folder} is a folder without data; it holds no .jsonl, .json or .parquet file"
        )
    return rows


def _kind(path: Path) -> str:
    """The file's ending in small letters, without that of a compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


# ---- files ----


def _file_rows(path: Path, source: str) -> Rows:
    for row in _read_file(path, source):
        yield replace(row, file=path.name)


def _read_file(path: Path, source: str) -> Rows:
    try:
        with path.open("rb") as file:
            start = file.read(8)
        if start.startswith(_PARQUET_MAGIC) or _kind(path) == PARQUET:
            yield from _parquet_rows(path, source)
            return
        if start.startswith(b"PK\x03\x04") or _kind(path) in (".csv", ".tsv", ".xlsx", ".arrow"):
            raise ValueError(
                f"{path} is of a kind that is not read; give JSONL, JSON or Parquet "
                "(datasets.load_dataset(...).to_json(...) writes JSONL)"
            )
        with _opener(path, start)(path) as file:
            if _kind(path) == ARRAY:
                yield from _array_rows(path, file.read(), source)
            else:
                yield from _line_rows(file, source)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"{path} cannot be read: {error or type(error).__name__}") from error


def _opener(path: Path, start: bytes) -> Callable[[Path], IO[bytes]]:
    """How to open a file, by its first bytes: names lie."""
    openers: dict[bytes, Callable[[Path], Any]] = {
        b"\x1f\x8b": gzip.open,
        b"BZh": bz2.open,
        b"\xfd7zXZ\x00": lzma.open,
        b"\x28\xb5\x2f\xfd": _open_zstd,
    }
    for magic, opener in openers.items():
        if start.startswith(magic):
            return opener
    return lambda path: path.open("rb")


def _open_zstd(path: Path) -> Any:
    try:
        import pyarrow
    except ImportError as error:
        raise ValueError(
            f"{path} is compressed with zstd; to read it: pip install 'vllm-dflash[train]'"
        ) from error
    # Not zstandard, whose reader takes a file that was cut for one that ends.
    return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))


def _line_rows(file: Iterable[bytes], source: str) -> Rows:
    for number, raw in enumerate(file, start=1):
        raw = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
        if raw.strip():  # a blank line is no row: editors leave one at the end
            text = raw.decode("utf-8", errors="backslashreplace").rstrip("\r\n")
            yield Row(source, number, text, raw)


def _array_rows(path: Path, raw: bytes, source: str) -> Rows:
    try:
        rows = decode_json(raw.removeprefix(b"\xef\xbb\xbf") or b"[]")
    except ValueError as error:
        raise ValueError(f"{path}: {error}; for one row a line, name it .jsonl") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path} holds a {type(rows).__name__}; a .json file must hold one array")
    yield from _objects(rows, source)


def _parquet_rows(path: Path, source: str) -> Rows:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(
            f"{path} is a Parquet file; to read it: pip install 'vllm-dflash[train]'"
        ) from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            batches = (batch.to_pylist() for batch in file.iter_batches(batch_size=256))
            yield from _objects((row for rows in batches for row in rows), source, from_arrow=True)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} cannot be read as Parquet: {error}") from error


# ---- Hugging Face data sets ----


def _hub_rows(name: str, subset: str | None, *, split: str, streaming: bool) -> Rows:
    shown = name if subset is None else f"{name}/{subset}"
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"no file {shown}, and to read it as a Hugging Face data set the `datasets` package is "
            "needed: pip install 'vllm-dflash[train]'"
        ) from error
    which = [name] if subset is None else [name, subset]
    try:
        if _is_saved(Path(name).expanduser()):
            data_set = datasets.load_from_disk(str(Path(name).expanduser()))
            if isinstance(data_set, dict):
                data_set = data_set[split]
        else:
            data_set = datasets.load_dataset(*which, split=split, streaming=streaming)
        yield from _objects(_without_media(data_set), shown, from_arrow=True)
    except Exception as error:  # the hub's clients raise a dozen unrelated classes
        first = " ".join(str(error).split())
        missing = "" if Path(name).expanduser().exists() else f"no file {shown}, and "
        raise ValueError(
            f"{missing}reading split {split!r} of that Hugging Face data set failed: "
            f"{type(error).__name__}: {first}. Check the name and the network; a split or subset is "
            "named as org/name:split or org/name/subset:split; or give a file"
        ) from error


def _without_media(data_set: Any) -> Any:
    """The data set with its pictures, sounds... as bytes: rows that have any are rejected, unopened."""
    for name, feature in (getattr(data_set, "features", None) or {}).items():
        undecoded = _undecoded(feature)
        if undecoded != feature:
            data_set = data_set.cast_column(name, undecoded)
    return data_set


def _undecoded(feature: Any) -> Any:
    if isinstance(feature, dict):
        return {name: _undecoded(member) for name, member in feature.items()}
    if isinstance(feature, list):
        return [_undecoded(member) for member in feature]
    if hasattr(feature, "feature"):  # a list of them
        return replace(feature, feature=_undecoded(feature.feature))
    if getattr(feature, "decode", False) is True and type(feature).__name__ != "Json":
        return replace(feature, decode=False)
    return feature


def _objects(rows: Iterable[Any], source: str, from_arrow: bool = False) -> Iterator[Row]:
    for number, row in enumerate(rows, start=1):
        text = json.dumps(row, ensure_ascii=False, default=_plain)
        yield Row(source, number, text, row, from_arrow, file=source)


def _plain(value: Any) -> str:
    """What JSON cannot hold, for the list of rejected rows."""
    return f"<{len(value)} bytes>" if isinstance(value, bytes) else str(value)
