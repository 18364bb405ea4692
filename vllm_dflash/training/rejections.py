"""What the user is told of rows that are not trained on: how many, for which reasons, where they are kept."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from vllm_dflash.training.conversations import Rejected, write_rejected

#: Kinds of reasons that are told one by one.
MAX_KINDS = 5
#: What differs between reasons of one kind: numbers and what is quoted.
_DETAIL = re.compile(r"\d+|'[^']*'|\"[^\"]*\"")


def count_reasons(reasons: Iterable[str]) -> list[tuple[int, str]]:
    """How often each kind of reason occurs, with its first example, most frequent first."""
    kinds: dict[str, tuple[int, str]] = {}
    for reason in reasons:
        kind = _DETAIL.sub("", reason)[:80]
        count, example = kinds.get(kind, (0, reason))
        kinds[kind] = (count + 1, example)
    return sorted(kinds.values(), key=lambda counted: -counted[0])


def check_rejected(
    rejected: Sequence[Rejected], total: int, path: Path | None, max_share: float
) -> None:
    """Refuses data of which too much is rejected, and then keeps the rejected rows in ``path``.

    Args:
        rejected: all of them so far.
        total: rows that were read, the rejected ones included.
        path: replaced if they are too many; None keeps nothing.
        max_share: of the rows that may be rejected (``--max-rejected``).

    Raises:
        ValueError: more are rejected.
    """
    if not rejected or len(rejected) <= max_share * total:
        return
    if path is not None:
        write_rejected(path, rejected)
    raise ValueError(
        f"{_head(rejected, total, path)}, more than --max-rejected {max_share:g} allows: "
        f"{'; '.join(_lines(rejected))}. Mend the data, or allow more (--max-rejected 1 allows all)"
    )


def report_rejected(
    rejected: Sequence[Rejected],
    total: int,
    path: Path | None,
    max_share: float,
    say: Callable[[str], None],
) -> None:
    """Keeps the rejected rows in ``path`` and says how many there are and why.

    Takes and raises what :func:`check_rejected` does; ``say`` prints a line for the user, and ``path`` is
    replaced whether there are any or not.
    """
    check_rejected(rejected, total, path, max_share)
    if path is not None:
        write_rejected(path, rejected)
    if rejected:
        say(f"{_head(rejected, total, path)}:")
        for line in _lines(rejected):
            say(f"  {line}")


def _head(rejected: Sequence[Rejected], total: int, path: Path | None) -> str:
    kept = "" if path is None else f", kept in {path}"
    are = "is" if len(rejected) == 1 else "are"
    return f"{len(rejected)} of {total} rows {are} rejected{kept}"


def _lines(rejected: Sequence[Rejected]) -> list[str]:
    counted = count_reasons(_one_line(reject.reason) for reject in rejected)
    first = {_one_line(reject.reason): reject for reject in reversed(rejected)}
    lines = []
    for count, reason in counted[:MAX_KINDS]:
        at = f"{first[reason].file} row {first[reason].line}".strip()
        lines.append(
            f"{count} x {reason} ({at})" if count == 1 else f"{count} x {reason} (first {at})"
        )
    if len(counted) > MAX_KINDS:
        lines.append(f"{sum(count for count, _ in counted[MAX_KINDS:])} x other reasons")
    return lines


def _one_line(reason: str) -> str:
    return " ".join(reason.split())
