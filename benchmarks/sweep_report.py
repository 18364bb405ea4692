"""A sweep's table, its lines of summary and its plot."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from sweep_figures import CONTEXTS, OURS, TRAFFIC, fixed_modes, over, speeds

from vllm_dflash.bench.report import MODE_COLORS
from vllm_dflash.bench.runner import speed_ratio
from vllm_dflash.files import atomic_path


def make_table(report: Mapping[str, Any]) -> Table:
    table = Table(
        title="output tokens/s: none's, then times none's (range of the repeats)",
        caption="same: outputs equal to none's. ~: short, but the bound lies within the spread",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for name in ("context", "traffic", "in flight", "none", "ngram", "best K", "table", "ours"):
        table.add_column(name, justify="left" if name in ("context", "traffic") else "right")
    for name in ("over best K", "over one K", "tau", "drafted", "same", "bounds"):
        table.add_column(name, justify="left" if name == "bounds" else "right")
    last = None
    for row in report["rows"]:
        if last not in (None, (row["context"], row["traffic"])):
            table.add_section()
        last = (row["context"], row["traffic"])
        modes = row["modes"]
        best = row["best_fixed"]
        figures = modes.get(OURS, {})
        short = [
            name.replace("_", " ") + ("~" if v["within_spread"] else "")
            for name, v in row["verdicts"].items()
            if v and not v["met"]
        ]
        table.add_row(
            row["context"],
            row["traffic"],
            str(row["concurrency"]),
            f"{median(speeds(row, 'none')):.1f}" if "none" in modes else "-",
            *(_times(over(row, "none", m) if m else None) for m in ("ngram",)),
            f"{best} {_times(over(row, 'none', best))}" if best else "-",
            _times(over(row, "none", "table")),
            _times(row["ours_over_none"], True),
            _times(row["ours_over_best_fixed"], True),
            _times(row["ours_over_best_single_fixed"]),
            _figure(figures.get("tau"), ".2f"),
            f"{_figure(figures.get('draft_length'), '.1f')} x {_figure(figures.get('draft_share'), '.0%')}",
            _figure(figures.get("identical_to_none"), ".0%"),
            ("short: " + ", ".join(short)) if short else "met" if OURS in modes else "-",
        )
    return table


def _times(ratio: Mapping[str, float] | None, with_range: bool = False) -> str:
    if ratio is None:
        return "-"
    return f"{ratio['ratio']:.2f}" + (
        f" {ratio['min']:.2f}-{ratio['max']:.2f}" if with_range else ""
    )


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def summary_lines(report: Mapping[str, Any]) -> list[str]:
    """A line a bound: how many points meet it."""
    lines = []
    for name, s in report["summary"].items():
        if name == "identical":
            lines.append(
                f"outputs identical to none's at {s['met']} of {s['points']} points, "
                f"lowest share {s['lowest']:.0%}"
            )
            continue
        where = {"ngram": " where ngram is the fastest other mode"}.get(name, "")
        lines.append(
            f"ours >= {s['bound']:g} x {name.replace('_', ' ')}: {s['met']} of {s['points']} points{where}, "
            f"{s['within_spread']} more within the spread; lowest {s['lowest']:.2f}"
        )
    if report["mixed"]:
        ours = report["mixed"]["ours"]
        lines.append(
            f"mixed traffic as a whole: {ours['ratio']:.2f} ({ours['min']:.2f}-{ours['max']:.2f}) x "
            f"{report['mixed']['best_single_fixed']}, the best single K; bound {ours['bound']:g} "
            f"{'met' if ours['met'] else 'short'}"
        )
    if report["not_measured"]:
        lines.append(
            f"not measured: {len(report['not_measured'])} points; --resume goes on with them"
        )
    return lines


def write_png(report: Mapping[str, Any], path: Path) -> None:
    """Speed over none by requests in flight: a panel a traffic and context, a line a mode."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [r for r in report["rows"] if "none" in r["modes"]]
    if not rows:
        raise ValueError("nothing to draw: no point has a run without speculation")
    contexts = [c for c in CONTEXTS if any(r["context"] == c for r in rows)]
    traffic = [t for t in TRAFFIC if any(r["traffic"] == t for r in rows)]
    modes = [m for m in report["modes"] if any(m in r["modes"] for r in rows)]
    fixed = fixed_modes(dict.fromkeys(modes))
    ticks = sorted({r["concurrency"] for r in rows})
    settings = report["settings"]
    with matplotlib.rc_context({"font.size": 9}):
        size = (max(6.0, 3.2 * len(traffic) + 1.2), 2.7 * len(contexts) + 1.0)
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(
            len(contexts), len(traffic), sharex=True, sharey="row", squeeze=False
        )
        lines = {}
        for i, context in enumerate(contexts):
            for j, kind in enumerate(traffic):
                axes = panels[i][j]
                here = [r for r in rows if r["context"] == context and r["traffic"] == kind]
                for mode in modes:
                    color = MODE_COLORS.get(mode, "#009e73")
                    if mode in fixed:
                        color = matplotlib.colormaps["RdPu"](
                            0.3 + 0.6 * fixed.index(mode) / len(fixed)
                        )
                    at = [r for r in here if mode in r["modes"]]
                    ratios = [speed_ratio(speeds(r, mode), speeds(r, "none")) for r in at]
                    middle = [r["ratio"] for r in ratios]
                    bold = mode == OURS
                    (lines[mode],) = axes.plot(
                        [r["concurrency"] for r in at],
                        middle,
                        color=color,
                        linewidth=2.2 if bold else 1.1,
                        linestyle="--" if mode in fixed else "-",
                        marker="o" if bold else ".",
                        zorder=3 if bold else 2,
                    )
                    if bold:
                        low, high = [r["min"] for r in ratios], [r["max"] for r in ratios]
                        axes.fill_between(
                            [r["concurrency"] for r in at], low, high, color=color, alpha=0.15
                        )
                axes.set_xscale("log", base=2)
                axes.set_xticks(ticks, [str(t) for t in ticks])
                axes.set_title(f"{kind}, {context} context", fontsize=9)
                axes.spines[["top", "right"]].set_visible(False)
        for axes in panels[-1]:
            axes.set_xlabel("requests in flight")
        for row_axes in panels:
            row_axes[0].set_ylabel("tokens/s over none")
            row_axes[0].set_ylim(bottom=0)
        figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=len(lines))
        where = ", ".join(report["machine"]["gpus"]) or report["machine"]["cpu"]
        figure.suptitle(
            f"{settings['verifier']} with {settings['drafter']}\n{where}; vLLM {report['versions']['vllm']}",
            fontsize=10,
        )
        with atomic_path(path) as temporary:
            figure.savefig(temporary, dpi=150, format="png")


def show(report: Mapping[str, Any], console: Console) -> None:
    if report["rows"]:
        console.print(make_table(report))
    for line in summary_lines(report):
        console.print(line, highlight=False, markup=False)
    for mode, message in report["errors"].items():
        console.print(f"mode {mode} failed: {message}", style="red", markup=False)
