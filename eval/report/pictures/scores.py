"""Dots and whiskers: the primary metric of every task."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from eval.report.svg import LINE, SETTINGS, SYSTEM_STYLE, axes_in, cut, plain
from eval.report.tables import shown_task
from eval.scores import ScoreRow

MOST_ROWS = 16


def scores_figure(rows: Sequence[ScoreRow], width: float) -> Figure:
    """Dots and 95 % whiskers, one band per task and metric; all rows share the percent axis. Width in inches."""
    systems = max(len(row.scores) for row in rows)
    height = 0.34 + 0.12 * max(2, systems)  # inches: a line of text, then a line per system
    with matplotlib.rc_context(SETTINGS):
        figure, axes = axes_in(width, height * len(rows), left=0.05, right=0.1)
        for band, row in enumerate(rows):
            if band:
                axes.axhline(band - 0.5, color=LINE, linewidth=0.7)
            for line, (system, found) in enumerate(row.scores.items()):
                y = band - 0.5 + (0.3 + 0.12 * (line + (systems - len(row.scores)) / 2)) / height
                style = SYSTEM_STYLE[system]
                if found.low is not None and found.high is not None:
                    ends = [100 * found.low, 100 * found.high]
                    axes.plot(ends, [y, y], color=style.colour, linewidth=1.6, solid_capstyle="butt")
                axes.plot(
                    [100 * found.value],
                    [y],
                    marker=style.marker,
                    markersize=5.2,
                    color=style.colour,
                    markerfacecolor=style.filling,
                    markeredgewidth=1.3,
                    linestyle="",
                )
            y = band - 0.5 + 0.06 / height
            axes.text(0.008, y, band_label(row, rows), transform=axes.get_yaxis_transform(), va="top")
        axes.set_yticks([])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.grid(axis="x", color=LINE, linewidth=0.7)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("score, %")
    return figure


def band_label(row: ScoreRow, rows: Sequence[ScoreRow]) -> str:
    """The task, and the metric where the rows have several; long names are cut."""
    several = len({other.metric for other in rows}) > 1
    task = shown_task(row.task)
    return plain(cut(f"{task}, {row.metric}" if several else task, 48))
