"""Risk against coverage: how often the answers are wrong when only the most confident ones are given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from eval.report.svg import LINE, SETTINGS, SYSTEM_STYLE, axes_in

DASHES = {"base": (0, (1, 1.4)), "mc_dropout": (0, (5, 1.6)), "deep_ensemble": (0, (7, 1.5, 1.2, 1.5))}


def risk_coverage_figure(curves: Mapping[str, Sequence[tuple[float, float]]], width: float) -> Figure:
    """A line per system, marked at 20, 40, ... 100 % of the documents.

    Args:
        curves: by system, points (coverage, risk), both between 0 and 1, not empty.
        width: in inches.
    """
    with matplotlib.rc_context(SETTINGS):
        figure, axes = axes_in(width, 2.2, left=0.55, right=0.12)
        for system, points in curves.items():
            style = SYSTEM_STYLE[system]
            marked = {min(range(len(points)), key=lambda i: abs(points[i][0] - share / 5)) for share in range(1, 6)}
            axes.plot(
                [100 * coverage for coverage, _ in points],
                [100 * risk for _, risk in points],
                color=style.colour,
                linewidth=1.4,
                linestyle=DASHES.get(system, "-"),
                marker=style.marker,
                markersize=4.4,
                markerfacecolor=style.filling,
                markevery=sorted(marked),
            )
        axes.grid(axis="y", color=LINE, linewidth=0.7)
        axes.set_xlim(0, 101)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=[1, 2, 5, 10]))
        axes.set_xlabel("answered, most confident first, %")
        axes.set_ylabel("wrong among them, %")
    return figure
