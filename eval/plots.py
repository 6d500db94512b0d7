"""The report's pictures: matplotlib figures, written as inline SVG whose colours follow the page's theme.

Every colour is a stand-in that ``inline_svg`` replaces by a CSS variable, so one picture serves light,
dark and print. Text stays text: it takes the page's font and can be searched and read aloud.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from eval.overfitting import Curve
from eval.scores import ScoreRow

# Stand-in colour -> CSS variable of report.css.
THEME = {
    "#010101": "var(--ink)",
    "#020202": "var(--muted)",
    "#030303": "var(--line)",
    "#040404": "var(--base)",
    "#050505": "var(--deterministic)",
    "#060606": "var(--ensemble)",
    "#070707": "var(--paper)",
}
INK, MUTED, LINE, BASE, DETERMINISTIC, ENSEMBLE, PAPER = THEME
SYSTEM_STYLE = {
    "base": (BASE, "o", PAPER),
    "deterministic": (DETERMINISTIC, "s", DETERMINISTIC),
    "ensemble": (ENSEMBLE, "D", ENSEMBLE),
}  # colour, marker (told apart in grey print), marker's filling
SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "lora-dropout",  # ids of clip paths and markers repeat from run to run
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "axes.unicode_minus": True,
}
WIDE, NARROW = 7.6, 4.0  # inches: the same text on a page's column and on a phone, of which CSS shows one
MOST_ROWS = 16


def inline_svg(figure: Figure, name: str) -> str:
    """The figure as an ``<svg>`` element without ids that another picture on the page could share."""
    buffer = io.StringIO()
    with matplotlib.rc_context(SETTINGS):
        figure.savefig(
            buffer,
            format="svg",
            transparent=True,
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg, count=2)  # implied inside HTML
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = svg.replace("url(#", f"url(#{name}-").replace('xlink:href="#', f'href="#{name}-')
    for stand_in, variable in THEME.items():
        svg = svg.replace(stand_in, variable)
    return svg.replace("<svg", '<svg aria-hidden="true"', 1).strip()  # the table and the words say the same


def axes_in(width: float, height: float, left: float, right: float) -> tuple[Figure, Axes]:
    """Axes of this height in a figure of this width, with these margins (inches) and room for an axis below.

    Fixed margins, not a tight crop: equal widths give equal text sizes on the page.
    """
    below, above = 0.48, 0.06
    whole = height + below + above
    figure = Figure(figsize=(width, whole))
    return figure, figure.add_axes((left / width, below / whole, (width - left - right) / width, height / whole))


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


def both_widths(draw: Callable[[float], Figure], name: str) -> str:
    """The picture for a page and for a phone, as two ``<svg>`` elements with the classes ``wide`` and ``narrow``."""
    return "\n".join(
        inline_svg(draw(width), f"{name}-{kind}").replace("<svg", f'<svg class="{kind}"', 1)
        for kind, width in (("wide", WIDE), ("narrow", NARROW))
    )


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
