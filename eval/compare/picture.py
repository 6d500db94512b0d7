"""The forest plot: every tested difference with its interval, one panel per unit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from eval.compare.schema import Comparison, Difference, MethodDifference
from eval.compare.words import is_shown
from eval.report.svg import DETERMINISTIC, ENSEMBLE, INK, LINE, PAPER, SETTINGS, Picture, axes_in, cut, picture, plain

MOST_ROWS = 24
ROW = 0.46
"""Inches."""


@dataclass(frozen=True)
class Bar:
    """One line of the plot."""

    label: str
    difference: float
    low: float | None
    high: float | None
    shown: bool
    """Filled: a difference at the 5 % level of the family."""


@dataclass(frozen=True)
class Panel:
    """Differences in one unit."""

    title: str
    unit: str
    bars: list[Bar]
    picture: Picture


def panels(comparison: Comparison) -> list[Panel]:
    """The primary metrics of the family, by unit: percentages share an axis, other metrics have one each."""
    by_unit: dict[tuple[str, str], list[Bar]] = {}
    pairs = {(one.first, one.second) for one in comparison.tasks}
    several = len(pairs | {(one.first, one.second) for one in comparison.method_differences}) > 1
    for task in comparison.tasks:
        if task.in_family:
            _add(by_unit, task.task, f"{task.second} minus {task.first}" if several else "", task.differences[0])
    for found in comparison.method_differences:
        if found.primary and found.in_family:
            _add(by_unit, found.task, f"{found.second} minus {found.first}" if several else "", found)
    return [
        Panel(title, unit, bars, picture(partial(forest_figure, bars[:MOST_ROWS], unit), f"differences-{number}"))
        for number, ((title, unit), bars) in enumerate(by_unit.items())
    ]


def _add(by_unit: dict[tuple[str, str], list[Bar]], task: str, pair: str, found: Difference | MethodDifference) -> None:
    if found.difference is None:
        return
    scale = 100 if found.percent else 1
    low, high = (None if end is None else scale * end for end in (found.low, found.high))
    title, unit = (
        ("scores in percent", "difference, points") if found.percent else (found.name, f"{found.name}, difference")
    )
    label = f"{task}: {pair}" if pair else task
    bar = Bar(label, scale * found.difference, low, high, is_shown(found.adjusted_p))
    by_unit.setdefault((title, unit), []).append(bar)


def forest_figure(bars: Sequence[Bar], unit: str, width: float) -> Figure:
    """Points and 95 % intervals around the line of no difference. Width in inches."""
    with matplotlib.rc_context(SETTINGS):
        figure, axes = axes_in(width, ROW * len(bars), left=0.08, right=0.12)
        axes.axvline(0, color=INK, linewidth=1.0)
        for band, bar in enumerate(bars):
            if band:
                axes.axhline(band - 0.5, color=LINE, linewidth=0.7)
            colour = ENSEMBLE if bar.shown else DETERMINISTIC
            y = band + 0.16
            if bar.low is not None and bar.high is not None:
                axes.plot([bar.low, bar.high], [y, y], color=colour, linewidth=1.7, solid_capstyle="butt")
            axes.plot(
                [bar.difference],
                [y],
                marker="D" if bar.shown else "o",
                markersize=5.6,
                color=colour,
                markerfacecolor=ENSEMBLE if bar.shown else PAPER,
                markeredgewidth=1.4,
                linestyle="",
            )
            label = plain(cut(bar.label, int(width * 14)))
            axes.text(0.005, band - 0.44, label, transform=axes.get_yaxis_transform(), va="top")
        reach = 1.08 * max(abs(end) for bar in bars for end in (bar.low, bar.high, bar.difference) if end is not None)
        axes.set_xlim(-(reach or 1.0), reach or 1.0)
        axes.set_ylim(len(bars) - 0.5, -0.5)
        axes.set_yticks([])
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
        axes.grid(axis="x", color=LINE, linewidth=0.7)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(unit)
    return figure
