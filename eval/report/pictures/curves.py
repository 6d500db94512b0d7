"""Scores against the number of members, and against what they cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from eval.report.svg import LINE, SETTINGS, SYSTEM_STYLE, WIDE, axes_at, plain


@dataclass(frozen=True)
class MemberCurve:
    """One system's score after its first members; a single model is one point."""

    system: str
    members: list[int]
    scores: list[float]
    cost: float | None
    """Time of all members against the deterministic adapter's; a part of the members is taken as that part of it."""

    @property
    def costs(self) -> list[float]:
        """At each point; empty where no times are known."""
        return [] if self.cost is None else [self.cost * n / self.members[-1] for n in self.members]


LEFT, GAP, TITLE, HEIGHT, BELOW = 0.6, 0.55, 0.3, 1.45, 0.5


def curves_figure(curves: Mapping[str, Sequence[MemberCurve]], width: float) -> Figure:
    """A panel per metric against members and, where times are known, against cost; on a phone the two are side by side.

    Args:
        curves: by the metric's words.
        width: in inches.
    """
    kinds = ["members", *(["cost"] if any(one.cost is not None for found in curves.values() for one in found) else [])]
    by_metric = width == WIDE and len(curves) > 1
    across, down = (len(curves), len(kinds)) if by_metric else (len(kinds), len(curves))
    side = min(3.4, (width - LEFT - 0.1 - (across - 1) * GAP) / across)
    block = TITLE + HEIGHT + BELOW
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(width, down * block))
        for i, (metric, found) in enumerate(curves.items()):
            for j, kind in enumerate(kinds):
                column, row = (i, j) if by_metric else (j, i)
                axes = axes_at(figure, LEFT + column * (side + GAP), row * block + TITLE, side, HEIGHT)
                draw_curves(axes, found, kind)
                if j == 0:
                    axes.set_title(plain(metric), fontsize=9.5, loc="left")
    return figure


def draw_curves(axes: Axes, curves: Sequence[MemberCurve], kind: str) -> None:
    """One panel. A single model is a marker, with a thin line across to compare with."""
    for one in curves:
        style = SYSTEM_STYLE[one.system]
        places = one.members if kind == "members" else one.costs
        if not places:
            continue
        if len(places) == 1:
            axes.axhline(one.scores[0], color=style.colour, linewidth=0.9, linestyle=(0, (4, 3)))
        axes.plot(
            places,
            one.scores,
            color=style.colour,
            linewidth=1.5,
            marker=style.marker,
            markersize=3.8,
            markerfacecolor=style.filling,
        )
    axes.grid(axis="y", color=LINE, linewidth=0.7)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
    axes.set_xlabel("members" if kind == "members" else "cost, times the adapter")
    left = 0.5 if kind == "members" else 0.0
    axes.set_xlim(left, axes.get_xlim()[1])
