"""``curves.png`` of a run: loss, tau and accuracy over the steps, and where held-out drafts end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_dflash.files import atomic_path

#: Points of a curve; each is the mean of the steps between two.
_POINTS = 200


def draw_curves(
    rows: Sequence[Mapping[str, Any]], held: Mapping[str, Any] | None, title: str, path: Path
) -> Path | None:
    """Draws a run's metrics.

    Args:
        rows: of ``metrics.jsonl``: steps with their loss, evaluations with their tau.
        held: the last evaluation, None where nothing was held out.
        title: above all.
        path: the PNG to write.

    Returns:
        The path; None without matplotlib or without a step.
    """
    steps = [row for row in rows if "loss" in row]
    try:
        import matplotlib
    except ImportError:
        return None
    if not steps:
        return None
    # No display is needed, and the process's own choice of backend stays as it is.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    size = max(1, len(steps) // _POINTS)
    groups = [steps[i : i + size] for i in range(0, len(steps), size)]
    at = [group[-1]["step"] + 1 for group in groups]
    with matplotlib.rc_context({"font.size": 11, "axes.titlesize": 12}):
        figure = Figure(figsize=(10, 7), layout="constrained")
        FigureCanvasAgg(figure)
        (loss, tau), (accuracy, held_out) = figure.subplots(2, 2)
        loss.plot(at, [sum(row["loss"] for row in group) / len(group) for group in groups])
        loss.set(title="training loss (log scale)", xlabel="step", ylabel="loss", yscale="log")
        loss.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        loss.yaxis.set_major_formatter("{x:g}")
        loss.yaxis.set_minor_formatter(NullFormatter())
        _draw_tau(tau, at, groups, [row for row in rows if "tau" in row])
        _draw_accuracy(accuracy, at, groups, matplotlib.colormaps["viridis_r"])
        if held is None:
            held_out.remove()
        else:
            _draw_positions(held_out, held)
        for axes in figure.axes:
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.25)
            axes.set_axisbelow(True)
        figure.suptitle(title)
        with atomic_path(path) as temporary:
            figure.savefig(temporary, dpi=110, format="png")
    return path


def _draw_tau(axes: Any, at: list[int], groups: list, evaluations: list) -> None:
    taus = [1 + _share(group, "accepted", "anchors") for group in groups]
    axes.plot(at, taus, label="training data, random places", alpha=0.6)
    if evaluations:
        found = [row["step"] + 1 for row in evaluations], [row["tau"] for row in evaluations]
        axes.plot(*found, "o-", label="held out, as served", markersize=4)
    axes.set(title="tau", xlabel="step", ylabel="tokens / verifier step")
    axes.legend(frameon=False)


def _draw_accuracy(axes: Any, at: list[int], groups: list, colors: Any) -> None:
    num_positions = len(groups[-1][-1]["right"])
    for k in range(num_positions):
        right, valid = (
            [sum(row[name][k] for row in group) for group in groups] for name in ("right", "valid")
        )
        shares = [100 * r / max(v, 1) for r, v in zip(right, valid, strict=True)]
        # From first to last, so that their order shows.
        axes.plot(
            at, shares, color=colors(0.1 + 0.9 * k / max(num_positions - 1, 1)), label=f"{k + 1}"
        )
    axes.set(title="accuracy in training", xlabel="step", ylabel="right tokens, %", ylim=(0, 100))
    axes.legend(
        title="draft token", ncols=1 + num_positions // 17, frameon=False, handlelength=1,
        loc="center left", bbox_to_anchor=(1, 0.5), fontsize=9, title_fontsize=9,
    )  # fmt: skip


def _draw_positions(axes: Any, held: Mapping[str, Any]) -> None:
    shares = [100 * rate for rate in held["position_rates"]]
    bars = axes.bar(range(1, len(shares) + 1), shares, color="#0072b2")
    axes.bar_label(bars, [f"{share:.0f}" for share in shares], padding=2, fontsize=9)
    axes.set(
        title=f"held-out drafts at the end: tau {held['tau']:.2f}",
        xlabel="draft token",
        ylabel="drafts accepted up to it, %",
        ylim=(0, 109),
        xticks=range(1, len(shares) + 1),
        yticks=range(0, 101, 20),
    )


def _share(rows: Sequence[Mapping[str, Any]], top: str, bottom: str) -> float:
    return sum(row[top] for row in rows) / max(sum(row[bottom] for row in rows), 1)
