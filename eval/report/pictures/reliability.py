"""Reliability diagrams: accuracy against confidence, a panel per system."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from scipy.stats import binom

from eval.analysis.schema import Bin
from eval.report.svg import BAND, INK, LINE, MUTED, SETTINGS, SYSTEM_STYLE, WIDE, Style, axes_at, plain

LARGEST_PANEL = 2.6  # inches
LEFT, GAP, TITLE, COUNTS, BELOW = 0.52, 0.22, 0.3, 0.6, 0.5


def calibrated_range(one: Bin) -> tuple[float, float]:
    """95 % range of a bin's accuracy if every answer were right with the bin's mean confidence: binomial quantiles.

    Bröcker and Smith 2007, *Increasing the reliability of reliability diagrams*; the spread of confidences inside a bin
    is neglected, which makes the range a little too wide.
    """
    ends = binom.ppf([0.025, 0.975], one.count, min(1.0, max(0.0, one.confidence))) / one.count
    return float(ends[0]), float(ends[1])


def reliability_figure(bins: Mapping[str, Sequence[Bin]], labels: Mapping[str, str], width: float) -> Figure:
    """A panel per system: bins with Wilson bars over the range of a calibrated model, and how many documents each has.

    Args:
        bins: by system, not empty.
        labels: titles.
        width: in inches; on a phone two panels stand side by side.
    """
    columns = min(len(bins), (4 if len(bins) == 4 else 3) if width == WIDE else 2)
    rows = math.ceil(len(bins) / columns)
    side = min(LARGEST_PANEL, (width - LEFT - 0.1 - (columns - 1) * GAP) / columns)
    height = min(side, 2.1)
    block = TITLE + height + COUNTS + BELOW
    left_end = min(0.5, *(one.low for found in bins.values() for one in found))
    bottom = min(min(one.accuracy_low, calibrated_range(one)[0]) for found in bins.values() for one in found)
    most = max(one.count for found in bins.values() for one in found)
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(width, rows * block))
        for place, (system, found) in enumerate(bins.items()):
            left = LEFT + (place % columns) * (side + GAP)
            top = (place // columns) * block + TITLE
            axes = axes_at(figure, left, top, side, height)
            counts = axes_at(figure, left, top + height, side, COUNTS)
            draw_bins(axes, found, SYSTEM_STYLE[system])
            draw_counts(counts, found, most)
            axes.set_title(plain(labels[system]), fontsize=9.5, loc="left", color=INK)
            for one in (axes, counts):
                one.set_xlim(left_end - 0.01, 1.01)
                one.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5]))
            axes.set_ylim(math.floor(4 * bottom) / 4 - 0.02, 1.02)
            axes.tick_params(labelbottom=False, length=0)
            counts.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.0f}"))
            counts.set_xlabel("confidence, %")
            if place % columns:
                axes.tick_params(labelleft=False)
            else:
                axes.set_ylabel("right, %")
    return figure


def draw_bins(axes: Axes, bins: Sequence[Bin], style: Style) -> None:
    """The diagonal, the range of a calibrated model as a box, accuracy with its Wilson interval."""
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
    lows, highs = zip(*(calibrated_range(one) for one in bins), strict=True)
    heights = [high - low for low, high in zip(lows, highs, strict=True)]
    middles, widths = places(bins)
    axes.bar(middles, heights, widths, bottom=lows, color=BAND, linewidth=0, zorder=0.5)
    confidences = [one.confidence for one in bins]
    ends = [one.accuracy_low for one in bins], [one.accuracy_high for one in bins]
    axes.vlines(confidences, *ends, color=style.colour, linewidth=1.2)
    axes.plot(
        confidences,
        [one.accuracy for one in bins],
        linestyle="",
        marker=style.marker,
        markersize=4.4,
        color=style.colour,
        markerfacecolor=style.filling,
        markeredgewidth=1.1,
    )
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100"])
    axes.grid(axis="y", color=LINE, linewidth=0.5)
    axes.spines["bottom"].set_color(LINE)


def places(bins: Sequence[Bin]) -> tuple[list[float], list[float]]:
    """(middles, widths) of bars."""
    return [(one.low + one.high) / 2 for one in bins], [one.high - one.low for one in bins]


def draw_counts(axes: Axes, bins: Sequence[Bin], most: int) -> None:
    """How many documents each bin has, as a bar with its number."""
    middles, widths = places(bins)
    axes.bar(middles, [one.count for one in bins], widths, color=LINE, linewidth=0)
    for middle, one in zip(middles, bins, strict=True):
        axes.text(middle, one.count, f" {one.count}", rotation=90, fontsize=6.5, ha="center", va="bottom", color=MUTED)
    axes.set_ylim(0, 1.9 * most)  # room for the numbers
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
