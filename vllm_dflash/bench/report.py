"""What a benchmark leaves behind: a table for the terminal, a JSON file, a picture.

The figures come from :func:`vllm_dflash.bench.runner.run_bench`; nothing is computed here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from vllm_dflash.files import atomic_path

#: One colour per mode in every picture; distinguishable with red-green blindness.
MODE_COLORS = {
    "none": "#8c8c8c",
    "ngram": "#e69f00",
    "stock": "#56b4e9",
    "plugin": "#0072b2",
    "adaptive": "#009e73",
}
#: What the modes are, for readers of a picture.
_MODE_NAMES = {
    "none": "none (no speculation)",
    "ngram": "ngram (vLLM's)",
    "stock": "stock (vLLM's dflash)",
    "plugin": "plugin (vllm-dflash)",
    "adaptive": "adaptive (vLLM's)",
}
NO_VALUE = "-"
LEGEND = """\
output tok/s, over none: median of the runs, then the least and the greatest.
tau: tokens delivered a step with a draft; below "plugin" those of the drafter's drafts and of prompt lookup's
(- where it sent none). differ: prompts whose output is not that of mode none (in bf16 near ties do that)"""


# -- files -------------------------------------------------------------------------------------


def write_json(report: Mapping[str, Any] | list[Any], path: str | Path) -> Path:
    """Writes the report, a row a line; readers see the old file or the whole new one.

    Raises:
        ValueError: a figure is NaN or infinite, which would make it unreadable for everything but Python.
    """
    path = Path(path)
    text = _lines(report, "", nested=isinstance(report, Mapping)) + "\n"
    with atomic_path(path) as temporary:
        temporary.write_text(text)
    return path


def _lines(value: Any, indent: str, nested: bool = False) -> str:
    """JSON with a line for each entry of what holds records, and of what holds those if ``nested``."""

    def compact(item: Any) -> str:
        return json.dumps(item, allow_nan=False)

    def show(item: Any) -> str:
        return _lines(item, f"{indent} ") if nested else compact(item)

    if isinstance(value, Mapping) and (
        nested or any(isinstance(v, Mapping) for v in value.values())
    ):
        left, right, items = "{", "}", [f"{compact(k)}: {show(v)}" for k, v in value.items()]
    elif isinstance(value, list) and any(isinstance(v, Mapping) for v in value):
        left, right, items = "[", "]", [compact(v) for v in value]
    else:
        return compact(value)
    inner = ",\n".join(f"{indent} {item}" for item in items)
    return f"{left}\n{inner}\n{indent}{right}"


def markdown_table(
    columns: Mapping[str, str], rows: Iterable[Mapping[str, Any]], show: Callable[[Any], str] = str
) -> str:
    """Markdown of the rows' values under their columns, by key; ``show`` makes a cell of a value."""
    lines = [f"| {' | '.join(columns.values())} |", "|---" * len(columns) + "|"]
    for row in rows:
        cells = (show(row.get(key)).replace("|", "\\|") for key in columns)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def replace_between_markers(path: Path, name: str, text: str) -> None:
    """Puts a text between the lines ``<!-- name:begin -->`` and ``<!-- name:end -->`` of a file.

    Raises:
        ValueError: the file lacks them.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    old = path.read_text()
    if begin not in old or end not in old:
        raise ValueError(f"{path} lacks the lines {begin} and {end}, between which the table goes")
    head, tail = old.split(begin)[0], old.split(end)[1]
    with atomic_path(path) as temporary:
        temporary.write_text(f"{head}{begin}\n{text}\n{end}{tail}")


def write_png(report: Mapping[str, Any], path: str | Path) -> Path:
    """Bars of output tokens per second by concurrency and mode, labelled with speed-up and tau.

    Raises:
        ValueError: no mode has a single figure.
        RuntimeError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise RuntimeError(
            "the picture needs matplotlib: pip install 'vllm-dflash[train]'"
        ) from error
    # No display is needed, and the process's own choice of backend stays as it is.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    modes = [m for m, entry in report["modes"].items() if entry.get("concurrency")]
    if not modes:
        raise ValueError(
            f"nothing to draw: no mode was measured (errors: {sorted(report['errors'])})"
        )
    groups = sorted({int(c) for m in modes for c in report["modes"][m]["concurrency"]})
    width = 0.8 / len(modes)
    num_bars = len(groups) * len(modes)
    with matplotlib.rc_context({"font.size": 11}):
        figure = Figure(figsize=(max(7.0, 0.95 * num_bars + 1.5), 5.0), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        for i, mode in enumerate(modes):
            points = report["modes"][mode]["concurrency"]
            at = [g for g in groups if str(g) in points]
            figures = [points[str(g)] for g in at]
            speeds = [f["output_tokens_per_s"] for f in figures]
            medians = [s["median"] for s in speeds]
            bars = axes.bar(
                [groups.index(g) + (i - (len(modes) - 1) / 2) * width for g in at],
                medians,
                0.92 * width,
                label=_MODE_NAMES.get(mode, mode),
                color=MODE_COLORS.get(mode),
                # Whiskers are the extremes of the repeats.
                yerr=[
                    [s["median"] - s["min"] for s in speeds],
                    [s["max"] - s["median"] for s in speeds],
                ],
                error_kw={"elinewidth": 1, "capsize": 2, "ecolor": "#404040"},
            )
            axes.bar_label(bars, [_bar_label(f) for f in figures], padding=3, fontsize=10)
        axes.set_xticks(range(len(groups)), [str(g) for g in groups])
        axes.set_xlabel(
            "requests in flight\n(x: speed over no speculation; τ: tokens a step with a draft; whiskers: "
            "slowest and fastest run)"
        )
        axes.set_ylabel("output tokens / s")
        # Room for the labels, whose lines are a share of the height.
        axes.margins(y=0.08 + 0.06 * max(text.get_text().count("\n") for text in axes.texts))
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(
            frameon=False, ncols=(len(modes) + 1) // 2, loc="lower left", bbox_to_anchor=(0, 1)
        )
        figure.suptitle(f"{_title(report)}\n{_subtitle(report)}", fontsize=11)
        path = Path(path)
        with atomic_path(path) as temporary:
            figure.savefig(temporary, dpi=150, format="png")
    return path


def _bar_label(figures: Mapping[str, Any]) -> str:
    lines = [f"{figures['output_tokens_per_s']['median']:.0f}"]
    # A mode without drafts is the baseline: its 1.00x says nothing.
    if figures["over_none"] and figures["tau"] is not None:
        lines.insert(0, f"{figures['over_none']['ratio']:.2f}x")
    if figures["tau"] is not None:
        lines.append(f"τ {figures['tau']:.2f}")
        # Beside prompt lookup's drafts the whole says little of the drafter.
        sources = figures.get("tau_by_source") or {}
        lines += [f"{name} {tau:.2f}" for name, tau in sources.items() if tau is not None]
    return "\n".join(lines)


def _title(report: Mapping[str, Any]) -> str:
    config = report["config"]
    drafter = Path(config["drafter"]).name if config["drafter"] else None
    title = f"{Path(config['verifier']).name}"
    if drafter:
        title += f" with {drafter}"
    if config["num_speculative_tokens"]:
        title += f", K = {config['num_speculative_tokens']}"
    return title


def _subtitle(report: Mapping[str, Any]) -> str:
    machine, config = report["machine"], report["config"]
    gpus = machine["gpus"]
    where = f"{len(gpus)} x {gpus[0]}" if gpus else f"{machine['cpu']}, {machine['cores']} cores"
    return (
        f"{where}; vLLM {report['versions']['vllm']}; {config['num_prompts']} prompts, "
        f"median of {config['repeats']}"
    )


# -- terminal ----------------------------------------------------------------------------------


def make_table(report: Mapping[str, Any]) -> Table:
    """The figures, one row per concurrency and mode: median, then min and max of the repeats."""
    # Little padding and few lines: it has to fit 80 columns.
    table = Table(
        title=_title(report),
        caption=_subtitle(report),
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=0,
    )
    table.add_column("in\nflight", justify="right")
    table.add_column("mode")
    for name in ("output tok/s", "over none"):
        table.add_column(name, justify="right", min_width=len("98.7-103.0"))
    for name in ("tau", "TTFT\nms", "TPOT\nms", "differ"):
        table.add_column(name, justify="right")
    modes = report["modes"]
    groups = sorted({int(c) for entry in modes.values() for c in entry.get("concurrency", {})})
    for group in groups:
        for mode, entry in modes.items():
            figures = entry.get("concurrency", {}).get(str(group))
            if figures is None:
                continue
            speed, ratio = figures["output_tokens_per_s"], figures["over_none"]
            table.add_row(
                str(group),
                mode,
                f"{_speed(speed['median'])} {_speed(speed['min'])}-{_speed(speed['max'])}",
                f"{ratio['ratio']:.2f}x {ratio['min']:.2f}-{ratio['max']:.2f}"
                if ratio and mode != "none"
                else NO_VALUE,
                _number(figures["tau"], 2),
                _number(figures["ttft_ms_p50"], 1),
                _number(figures["tpot_ms_p50"], 1),
                _number(figures["num_differing_from_none"] if mode != "none" else None, 0),
            )
            for source, tau in (figures.get("tau_by_source") or {}).items():
                table.add_row("", f"  {source}", "", "", _number(tau, 2))
        table.add_section()
    return table


def chosen_lines(report: Mapping[str, Any]) -> list[str]:
    """One line for each mode and concurrency where draft lengths were chosen."""
    lines = []
    for mode, entry in report["modes"].items():
        for concurrency, figures in entry.get("concurrency", {}).items():
            chosen = figures.get("chosen")
            if not chosen or not sum(chosen["lengths"].values()):
                continue
            total = sum(chosen["lengths"].values())
            shares = " ".join(f"{k}:{n / total:.0%}" for k, n in chosen["lengths"].items())
            sources = "; ".join(
                f"{source} {chosen['accepted'][source]:.0f} of {tokens:.0f} tokens accepted, "
                f"{chosen['expected'][source]:.0f} expected"
                for source, tokens in chosen["proposed"].items()
                if tokens
            )
            speedup = chosen["estimated_speedup"]
            lines.append(
                f"{mode}, {concurrency} in flight: draft lengths {shares}; {sources or 'no drafts'}; "
                f"estimated {_number(speedup, 2)}x no speculation"
            )
    return lines


def print_report(report: Mapping[str, Any], console: Console | None = None) -> None:
    """Prints the table and what failed."""
    console = console or Console()
    if any(entry.get("concurrency") for entry in report["modes"].values()):
        console.print(make_table(report))
        console.print(LEGEND, highlight=False, soft_wrap=True)
        for line in chosen_lines(report):
            console.print(line, highlight=False)
    for mode, message in report["errors"].items():
        # Messages quote logs, whose brackets are not markup.
        console.print(f"mode {mode} failed: {message}", style="red", markup=False)


def _speed(tokens_per_s: float) -> str:
    return f"{tokens_per_s:.0f}" if tokens_per_s >= 100 else f"{tokens_per_s:.1f}"


def _number(value: float | None, digits: int) -> str:
    return NO_VALUE if value is None else f"{value:.{digits}f}"
