"""Gradient noise as a table, as sentences and as a picture."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from rich.console import Console
from rich.table import Table

from pipeline.noise.components import Estimate
from pipeline.noise.run import Comparison, Noise

SHARED, OWN, BALANCED = "#b4552d", "#2d6cb4", "#7a7a7a"
COLOURS = {"instance": SHARED, "balanced": BALANCED, "example": OWN}
BELOW_ZERO = "No variance is below 0; an unbiased estimate of one, and its interval, may be."


def print_noise(noise: Noise, console: Console) -> None:
    """Components, both comparisons, and what they mean."""
    total = sum(part.value for part in (noise.examples, noise.masks, noise.interaction))
    console.print(title(noise))
    table = Table(title="One example's gradient under one mask")
    for heading in ("component", "variance", "95 % interval", "share"):
        table.add_column(heading, justify="left" if heading == "component" else "right")
    names = {"examples, V_x": noise.examples, "masks, V_m": noise.masks, "interaction, V_xm": noise.interaction}
    for name, part in names.items():
        table.add_row(name, _number(part.value), _interval(part), f"{round(100 * part.value / total)} %")
    console.print(table)
    console.print(_compared(noise.equal_examples, f"A step's gradient: equal examples, B = {noise.effort.examples}"))
    console.print(_compared(noise.equal_compute, f"A step's gradient: equal compute, {noise.effort.passes} rows"))
    shown = [*names.values(), *(one.measured for one in [*noise.equal_examples, *noise.equal_compute])]
    if any(estimate.low < 0 for estimate in shown):
        console.print(BELOW_ZERO)
    for line in in_words(noise):
        console.print(line)


def title(noise: Noise) -> str:
    """Recipe, adapter, rate or range of rates, size."""
    low, high = noise.rates
    rates = f"p = {low}" if low == high else f"p = {low} to {high}, by layer"
    return f"{noise.recipe}, adapter {noise.adapter}, {rates}, {noise.parameters:,} parameters"


def _compared(comparisons: list[Comparison], title: str) -> Table:
    table = Table(title=title)
    for heading in ("masks", "B", "rows", "formula", "measured", "95 % interval", "ratio"):
        table.add_column(heading, justify="left" if heading == "masks" else "right")
    for one in comparisons:
        ratio = "-" if one.predicted is None else f"{one.measured.value / one.predicted.value:.2f}"
        guess = "-" if one.predicted is None else _number(one.predicted.value)
        setting = one.setting
        table.add_row(
            *(setting.name, str(setting.examples), str(setting.passes)),
            *(guess, _number(one.measured.value), _interval(one.measured), ratio),
        )
    return table


def _number(value: float) -> str:
    return f"{value:.4g}"


def _interval(estimate: Estimate) -> str:
    return f"{_number(estimate.low)} to {_number(estimate.high)}"


def in_words(noise: Noise) -> list[str]:
    """Which sampling is quieter here."""
    lines = []
    for instances, batch in noise.break_even.items():
        interval = f"95 % interval {_batch_size(batch.low)} to {_batch_size(batch.high)}"
        where = "at no batch size" if math.isinf(batch.examples) else f"from {batch.examples:.0f} examples on"
        lines.append(
            f"One mask per example (1 pass) is as quiet as {instances} shared masks ({instances} passes) {where}, "
            f"per micro-batch ({interval})."
        )
    lines.append(f"At equal compute the quietest measured is {_quietest(noise.equal_compute)}.")
    lines.append(f"At equal examples it is {_quietest(noise.equal_examples)}.")
    return lines


def _batch_size(count: float) -> str:
    return "no batch size" if math.isinf(count) else f"{count:.0f}"


def _quietest(comparisons: list[Comparison]) -> str:
    """The quietest, those whose intervals overlap with its own, and how far the noisiest is from it."""
    first, *others = sorted(comparisons, key=lambda one: one.measured.value)
    last = others[-1]
    near = [one for one in others if one.measured.low <= first.measured.high]
    names = "any other" if near == others else ", ".join(one.setting.name for one in near)
    return (
        f"{first.setting.name}, B = {first.setting.examples}"
        f"{f', not separated from {names} (intervals overlap)' if near else ''}; "
        f"the noisiest, {last.setting.name}, has {last.measured.value / first.measured.value:.2f} times its variance"
    )


def plot(noise: Noise, file: Path) -> None:
    """Measured variance with intervals, and the formula's as a line, for both comparisons.

    What reaches below 0 is drawn to the axis and ends in a caret there.
    """
    figure = Figure(figsize=(8.6, 4.0), layout=ConstrainedLayoutEngine(w_pad=0.1))
    figure.suptitle(title(noise), fontsize=9)
    left, right = figure.subplots(1, 2)
    _draw(left, noise.equal_examples, f"equal examples: B = {noise.effort.examples}")
    _draw(right, noise.equal_compute, f"equal compute: {noise.effort.passes} rows per step")
    figure.legend(handles=_legend(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    with rc_context({"svg.fonttype": "none"}):  # text, not outlines
        figure.savefig(file)


def _legend() -> list[Line2D]:
    """By columns: colours above, signs below."""
    words = {"instance": "N masks for all", "balanced": "N balanced masks for all", "example": "n masks per example"}
    colours = [Line2D([], [], color=colour, linewidth=4, label=words[kind]) for kind, colour in COLOURS.items()]
    signs = [
        Line2D([], [], color="black", marker="o", label="measured, 95 % interval"),
        Line2D([], [], color="black", marker="|", markersize=12, linestyle="", alpha=0.6, label="formula"),
        Line2D([], [], color="black", marker="<", linestyle="", label="reaches below 0"),
    ]
    return [line for pair in zip(colours, signs, strict=True) for line in pair]


def _draw(axes: Axes, comparisons: list[Comparison], title: str) -> None:
    for place, one in enumerate(reversed(comparisons)):
        colour = COLOURS[one.setting.sampling]
        low, value, high = max(one.measured.low, 0.0), one.measured.value, one.measured.high
        axes.plot([low, high], [place, place], color=colour)
        axes.plot(value, place, "o", color=colour)
        axes.plot(high, place, "|", color=colour, markersize=8)
        axes.plot(low, place, "<" if one.measured.low < 0 else "|", color=colour, markersize=8, clip_on=False)
        if one.predicted is not None and one.predicted.value >= 0:
            axes.plot([one.predicted.value] * 2, [place - 0.35, place + 0.35], color=colour, alpha=0.6)
        elif one.predicted is not None:
            axes.plot(0, place + 0.3, "<", color=colour, alpha=0.6, clip_on=False)
    names = [f"{one.setting.name}, B = {one.setting.examples}" for one in reversed(comparisons)]
    axes.set_yticks(range(len(comparisons)), names)
    axes.set_xlim(left=0)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("variance of the step's gradient", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
