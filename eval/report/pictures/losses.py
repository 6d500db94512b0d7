"""Loss curves of the training run."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from eval.report.overfitting import Curve
from eval.report.svg import DETERMINISTIC, ENSEMBLE, LINE, MUTED, SETTINGS, axes_in


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
            colour, thickness, marker = styles[curve.name]
            axes.plot(curve.steps, curve.losses, color=colour, linewidth=thickness, marker=marker, markersize=3.6)
        axes.grid(axis="y", color=LINE, linewidth=0.7)
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
