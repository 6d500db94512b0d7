"""The report's pictures as matplotlib figures, for ``svg.py`` to draw."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from eval.report.overfitting import Curve
from eval.report.svg import DETERMINISTIC, ENSEMBLE, LINE, MUTED, SETTINGS, SYSTEM_STYLE, axes_in
from eval.scores import ScoreRow

MOST_ROWS = 16


def scores_figure(rows: Sequence[ScoreRow], width: float) -> Figure:
    """Dots and 95 % whiskers, one band per task and metric; all rows share the percent axis. Width in inches."""
    with matplotlib.rc_context(SETTINGS):
        figure, axes = axes_in(width, 0.6 * len(rows), left=0.05, right=0.1)
        for band, row in enumerate(rows):
            if band:
                axes.axhline(band - 0.5, color=LINE, linewidth=0.7)
            for place, (system, found) in enumerate(row.scores.items()):
                y = band + 0.14 + 0.21 * (place - (len(row.scores) - 1) / 2)
                colour, marker, filling = SYSTEM_STYLE[system]
                if found.low is not None and found.high is not None:
                    axes.plot(
                        [100 * found.low, 100 * found.high], [y, y], color=colour, linewidth=1.6, solid_capstyle="butt"
                    )
                axes.plot(
                    [100 * found.value],
                    [y],
                    marker=marker,
                    markersize=5.6,
                    color=colour,
                    markerfacecolor=filling,
                    markeredgewidth=1.4,
                    linestyle="",
                )
            axes.text(0.008, band - 0.43, band_label(row, rows), transform=axes.get_yaxis_transform(), va="top")
        axes.set_yticks([])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.grid(axis="x", color=LINE, linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("score, %")
    return figure


def band_label(row: ScoreRow, rows: Sequence[ScoreRow]) -> str:
    """The task, and the metric where one task shows several; long names are cut."""
    several = sum(other.task == row.task for other in rows) > 1
    label = f"{row.task}, {row.metric}" if several else row.task
    label = label if len(label) <= 48 else label[:47] + "…"
    return label.replace("$", r"\$")  # matplotlib would read a pair of dollars as mathematics


def logarithmic(curves: Sequence[Curve]) -> bool:
    """Whether the largest loss is more than four times the smallest."""
    losses = [loss for curve in curves for loss in curve.losses]
    return 0 < 4 * min(losses) < max(losses)


def losses_figure(curves: Sequence[Curve], width: float) -> Figure:
    """Training loss (thin), probe and validation loss (dots) against the optimizer step, labelled at their ends.

    Width in inches. The loss axis is logarithmic where the first losses would flatten the rest.
    """
    styles = {
        "training batches": (MUTED, 1.0, ""),
        "training probe": (DETERMINISTIC, 1.6, "s"),
        "validation": (ENSEMBLE, 1.6, "D"),
    }
    with matplotlib.rc_context(SETTINGS):
        figure, axes = axes_in(width, 2.5, left=0.6, right=1.15)
        for curve in curves:
            colour, width, marker = styles[curve.name]
            axes.plot(curve.steps, curve.losses, color=colour, linewidth=width, marker=marker, markersize=3.6)
        axes.grid(axis="y", color=LINE, linewidth=0.7)
        axes.set_axisbelow(True)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
        axes.set_xlabel("optimizer step")
        axes.set_xlim(left=0, right=1.02 * max(curve.steps[-1] for curve in curves))
        if logarithmic(curves):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(FuncFormatter(lambda loss, _: f"{loss:g}"))
        else:
            axes.yaxis.set_major_locator(MaxNLocator(nbins=6))
        axes.set_ylabel("loss, nats per token")
        _label_ends(axes, curves, {name: style[0] for name, style in styles.items()})
    return figure


def _label_ends(axes: Axes, curves: Sequence[Curve], colours: dict[str, str]) -> None:
    """Each curve's name right of the axes, at its last value, moved apart where two names would touch."""
    ends = {
        curve.name: float(axes.transLimits.transform(axes.transScale.transform((0, curve.losses[-1])))[1])
        for curve in curves
    }  # heights as parts of the axes
    at = -1.0
    for name in sorted(ends, key=ends.__getitem__):
        at = max(ends[name], at + 0.075)
        axes.text(1.01, at, name, transform=axes.transAxes, va="center", color=colours[name])
