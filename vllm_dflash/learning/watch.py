"""``vllm-dflash watch``: a learning server's acceptance and speed over time, from its ``/metrics``."""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

#: In the plot's metadata: only such files are replaced.
TITLE = "vllm-dflash watch"


@dataclass(frozen=True)
class Reading:
    """The metrics at one time.

    Attributes:
        seconds: since the first reading.
        values: sums of the metrics over their labels.
    """

    seconds: float
    values: dict[str, float]

    def get(self, name: str) -> float:
        return self.values.get(name, 0.0)


@dataclass(frozen=True)
class Row:
    """What happened between two readings; None where nothing did."""

    seconds: float
    tokens_per_s: float
    tau: float | None
    speedup: float | None
    version: int
    steps: int
    to_learn: int


def read(url: str, started: float) -> Reading:
    """Raises OSError where the server does not answer."""
    with urllib.request.urlopen(f"{url.rstrip('/')}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    values: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            values[sample.name] = values.get(sample.name, 0.0) + sample.value
    return Reading(time.monotonic() - started, values)


def between(before: Reading, after: Reading) -> Row:
    """The figures of the time between two readings."""

    def more(name: str) -> float:
        return after.get(name) - before.get(name)

    drafts = more("vllm:spec_decode_num_drafts_total")
    accepted = more("vllm:spec_decode_num_accepted_tokens_total")
    spent, plain = (more(f"vllm_dflash:{n}_seconds_total") for n in ("step", "plain"))
    return Row(
        after.seconds,
        more("vllm:generation_tokens_total") / max(after.seconds - before.seconds, 1e-9),
        1 + accepted / drafts if drafts else None,
        plain / spent if spent else None,
        int(after.get("vllm_dflash:learn_version")),
        int(after.get("vllm_dflash:learn_steps_total")),
        int(after.get("vllm_dflash:learn_to_learn")),
    )


def watch(url: str, every: float) -> Iterator[Row]:
    """A row every so many seconds, until the server stops answering.

    Raises:
        ValueError: it does not answer at first, or does not learn.
    """
    started = time.monotonic()
    try:
        before = read(url, started)
    except (OSError, ValueError) as error:
        raise ValueError(f"no server answers at {url} ({error})") from error
    if "vllm_dflash:learn_version" not in before.values:
        raise ValueError(
            f'the server at {url} does not learn; start it with "dflash_learn" in --speculative-config'
        )
    while True:
        time.sleep(every)
        try:
            after = read(url, started)
        except OSError:
            return
        yield between(before, after)
        before = after


def plot(rows: list[Row], path: Path) -> None:
    """tau and tokens/s over time, with a line where another version came to serve."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    tau, speed = figure.subplots(2, 1, sharex=True)
    minutes = [r.seconds / 60 for r in rows]
    tau.plot(minutes, [r.tau if r.tau is not None else float("nan") for r in rows], marker=".")
    tau.set_ylabel("tau (tokens a verify step)")
    speed.plot(minutes, [r.tokens_per_s for r in rows], marker=".", color="tab:green")
    speed.set_ylabel("tokens/s")
    speed.set_xlabel("minutes")
    for earlier, later in pairwise(rows):
        if later.version != earlier.version:
            for axes in (tau, speed):
                axes.axvline(later.seconds / 60, color="gray", linestyle=":")
            tau.annotate(f"v{later.version}", (later.seconds / 60, tau.get_ylim()[1]), fontsize=8)
    figure.savefig(path, dpi=120, metadata={"Title": TITLE})


def is_plot(path: Path) -> bool:
    """Whether a file is one of :func:`plot`."""
    return TITLE.encode() in path.read_bytes()[:4096]


def cells(row: Row) -> tuple[Any, ...]:
    """As they are shown."""
    return (
        f"{row.seconds:.0f} s",
        f"{row.tokens_per_s:.1f}",
        "-" if row.tau is None else f"{row.tau:.2f}",
        "-" if row.speedup is None else f"{row.speedup:.2f}x",
        row.version,
        row.steps,
        row.to_learn,
    )


HEADER = ("time", "tokens/s", "tau", "speed-up", "version", "steps", "to learn")
