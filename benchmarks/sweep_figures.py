"""What a sweep's runs amount to: the figures of a point, the best fixed K, verdicts. No engine is needed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import geometric_mean, median
from typing import Any

from vllm_dflash.bench.engine_process import RunResult
from vllm_dflash.bench.runner import speed_ratio, summarize

TRAFFIC = ("own", "foreign", "mixed")
CONTEXTS = ("short", "long")
OURS = "ours"
#: Modes of the plugin besides the fixed ones, and what they add to its defaults.
OUR_MODES: dict[str, dict[str, Any]] = {OURS: {}, "ours-no-lookup": {"dflash_lookup": "off"}}
FIXED = re.compile(r"k([1-9]\d*)")
#: What ours has to reach over each of these, as a ratio of output speed; over ngram where ngram is the
#: fastest of the other modes.
BOUNDS = {"none": 0.98, "best_fixed": 0.97, "best_single_fixed": 1.1, "ngram": 1.0}


@dataclass(frozen=True)
class Point:
    """What is measured at a time."""

    concurrency: int
    traffic: str
    context: str

    def __str__(self) -> str:
        return f"{self.traffic}, {self.context} context, {self.concurrency} in flight"

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Point:
        return cls(row["concurrency"], row["traffic"], row["context"])


def identical_share(results: Sequence[RunResult], base: Sequence[RunResult]) -> float | None:
    """Share of requests that got the same tokens as in the same repeat of the other mode."""
    same = [
        a.output_token_ids == b.output_token_ids
        for mine, theirs in zip(results, base, strict=False)
        for a, b in zip(mine.requests, theirs.requests, strict=True)
    ]
    return sum(same) / len(same) if same else None


def draft_share(results: Sequence[RunResult]) -> float | None:
    """Share of a request's decode steps that verified a draft, nearly.

    A step gives a token besides the accepted ones. What the end of a text cuts off was accepted, too, which
    makes the share a little too large.
    """
    accepted, drafts, decoded = 0, 0, 0
    for result in results:
        accepted += result.counters.num_accepted_tokens
        drafts += result.counters.num_drafts
        decoded += result.num_output_tokens - len(result.requests)  # prefill gives the first
    return min(1.0, drafts / (decoded - accepted)) if decoded > accepted else None


def make_row(
    point: Point, prompts: Sequence[Sequence[int]], results: Mapping[str, list[RunResult]]
) -> dict[str, Any]:
    """All figures of a point that need no other point."""
    none = results.get("none") or []
    modes = {}
    for mode, runs in results.items():
        if runs:
            modes[mode] = summarize(runs, none, 0.0) | {
                "draft_share": draft_share(runs),
                "identical_to_none": identical_share(runs, none),
            }
    lengths = [len(p) for p in prompts]
    row: dict[str, Any] = {
        "concurrency": point.concurrency,
        "traffic": point.traffic,
        "context": point.context,
        "num_requests": len(prompts),
        "prompt_tokens": {"min": min(lengths), "median": median(lengths), "max": max(lengths)},
        "modes": modes,
    }
    fixed = fixed_modes(modes)
    row["best_fixed"] = max(fixed, key=lambda m: median(speeds(row, m)), default=None)
    others = [m for m in modes if m not in OUR_MODES]
    row["fastest_other"] = max(others, key=lambda m: median(speeds(row, m)), default=None)
    for name in ("none", "ngram", "table"):
        row[f"ours_over_{name}"] = over(row, name)
    row["ours_over_best_fixed"] = over(row, row["best_fixed"])
    return row


def fixed_modes(modes: Mapping[str, Any]) -> list[str]:
    return [m for m in modes if FIXED.fullmatch(m)]


def speeds(row: Mapping[str, Any], mode: str) -> list[float]:
    return row["modes"][mode]["output_tokens_per_s"]["raw"]


def over(row: Mapping[str, Any], mode: str | None, ours: str = OURS) -> dict[str, float] | None:
    """Ours over another mode: ratio of the medians, range of the repeats' own."""
    if mode not in row["modes"] or ours not in row["modes"]:
        return None
    assert mode is not None
    return speed_ratio(speeds(row, ours), speeds(row, mode))


def verdict(ratio: Mapping[str, float] | None, bound: float) -> dict[str, Any] | None:
    """``within_spread``: short, but one repeat by itself was not."""
    if ratio is None:
        return None
    met = ratio["ratio"] >= bound
    return {"bound": bound, **ratio, "met": met, "within_spread": not met and ratio["max"] >= bound}


def finish(report: dict[str, Any]) -> dict[str, Any]:
    """The figures across points: the best single K of the mixed ones, verdicts, counts. In place."""
    rows: list[dict[str, Any]] = report["rows"]
    rows.sort(
        key=lambda r: (CONTEXTS.index(r["context"]), TRAFFIC.index(r["traffic"]), r["concurrency"])
    )
    mixed = [r for r in rows if r["traffic"] == "mixed" and OURS in r["modes"]]
    report["mixed"] = single = single_fixed(mixed)
    for row in rows:
        best = single["best_single_fixed"] if single and row in mixed else None
        row["ours_over_best_single_fixed"] = over(row, best)
        row["verdicts"] = {
            name: verdict(row[f"ours_over_{name}"], bound)
            for name, bound in BOUNDS.items()
            if name != "ngram" or row["fastest_other"] == "ngram"
        }
    summary: dict[str, Any] = {}
    for name in BOUNDS:
        verdicts = [v for row in rows if (v := row["verdicts"].get(name))]
        if verdicts:
            summary[name] = {
                "bound": BOUNDS[name],
                "points": len(verdicts),
                "met": sum(v["met"] for v in verdicts),
                "within_spread": sum(v["within_spread"] for v in verdicts),
                "lowest": min(v["ratio"] for v in verdicts),
            }
    shares = [row["modes"][OURS]["identical_to_none"] for row in rows if OURS in row["modes"]]
    shares = [s for s in shares if s is not None]
    if shares:
        summary["identical"] = {
            "points": len(shares),
            "met": shares.count(1.0),
            "lowest": min(shares),
        }
    report["summary"] = summary
    return report


def single_fixed(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The one K that is best over all of the rows, and ours over it.

    Over points of very different speeds the mean is geometric: all count alike.
    """
    fixed = (
        [m for m in fixed_modes(rows[0]["modes"]) if all(m in r["modes"] for r in rows)]
        if rows
        else []
    )
    if not fixed:
        return None
    means = {m: geometric_mean(median(speeds(r, m)) for r in rows) for m in fixed}
    best = max(fixed, key=means.__getitem__)
    pairs = [list(zip(speeds(r, OURS), speeds(r, best), strict=False)) for r in rows]
    repeats = [geometric_mean(a / b for a, b in column) for column in zip(*pairs, strict=False)]
    ratio = geometric_mean(r["ratio"] for row in rows if (r := over(row, best)))
    return {
        "points": len(rows),
        "best_single_fixed": best,
        "fixed_tokens_per_s": means,
        "ours": verdict(
            {"ratio": ratio, "min": min(repeats), "max": max(repeats)}, BOUNDS["best_single_fixed"]
        ),
    }
