"""Gradient noise as a table, as sentences and as a picture."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from pipeline.noise.components import Estimate
from pipeline.noise.run import Comparison, Noise

SHARED, OWN, BALANCED = "#b4552d", "#2d6cb4", "#7a7a7a"
COLOURS = {"instance": SHARED, "example": OWN, "balanced": BALANCED}


def print_noise(noise: Noise, console: Console) -> None:
    """Components, both comparisons, and what they mean."""
    total = sum(part.value for part in (noise.examples, noise.masks, noise.interaction))
    console.print(f"{noise.recipe} at {noise.adapter}, p = {noise.rate}, {noise.parameters:,} parameters")
    table = Table(title="One example's gradient under one mask")
    for heading in ("component", "variance", "95 % interval", "share"):
        table.add_column(heading, justify="left" if heading == "component" else "right")
    names = {"examples, V_x": noise.examples, "masks, V_m": noise.masks, "interaction, V_xm": noise.interaction}
    for name, part in names.items():
        table.add_row(name, _number(part.value), _interval(part), f"{part.value / total:.0%}")
    console.print(table)
    console.print(_compared(noise.equal_examples, f"A step's gradient: equal examples, B = {noise.effort.examples}"))
    console.print(_compared(noise.equal_compute, f"A step's gradient: equal compute, {noise.effort.passes} rows"))
    for line in in_words(noise):
        console.print(line)


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
        interval = f"95 % interval {_examples(batch.low)} to {_examples(batch.high)}"
        lines.append(
            f"One mask per example (1 pass) is as quiet as {instances} shared masks ({instances} passes) from "
            f"{_examples(batch.examples)} examples per micro-batch on ({interval})."
        )
    quietest = min(noise.equal_compute, key=lambda one: one.measured.value)
    lines.append(
        f"At equal compute the quietest measured is {quietest.setting.name} with {quietest.setting.examples} examples; "
        f"{_spread(noise.equal_compute)}."
    )
    quietest = min(noise.equal_examples, key=lambda one: one.measured.value)
    lines.append(
        f"At equal examples it is {quietest.setting.name}, at {quietest.setting.instances} passes; "
        f"{_spread(noise.equal_examples)}."
    )
    return lines


def _examples(count: float) -> str:
    return "infinitely many" if math.isinf(count) else f"{count:.0f}"


def _spread(comparisons: list[Comparison]) -> str:
    ordered = sorted(comparisons, key=lambda one: one.measured.value)
    ratio = ordered[-1].measured.value / ordered[0].measured.value
    return f"the noisiest, {ordered[-1].setting.name}, has {ratio:.2f} times its variance"


def plot(noise: Noise, file: Path) -> None:
    """Measured variance with intervals, and the formula's as a line, for both comparisons."""
    figure = Figure(figsize=(8.4, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw(left, noise.equal_examples, f"equal examples: B = {noise.effort.examples}")
    _draw(right, noise.equal_compute, f"equal compute: {noise.effort.passes} rows per step")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    with rc_context({"svg.fonttype": "none"}):  # text, not outlines
        figure.savefig(file)


def _draw(axes: Axes, comparisons: list[Comparison], title: str) -> None:
    for place, one in enumerate(reversed(comparisons)):
        colour = COLOURS[one.setting.sampling]
        error = [[one.measured.value - one.measured.low], [one.measured.high - one.measured.value]]
        label = "measured, 95 %" if place == 0 else None
        axes.errorbar(one.measured.value, place, xerr=error, fmt="o", color=colour, capsize=3, label=label)
        if one.predicted is not None:
            label = "formula" if place == 0 else None
            axes.plot([one.predicted.value] * 2, [place - 0.35, place + 0.35], color=colour, alpha=0.6, label=label)
    names = [f"{one.setting.name}, B = {one.setting.examples}" for one in reversed(comparisons)]
    axes.set_yticks(range(len(comparisons)), names)
    axes.set_xlim(left=0)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("variance of the step's gradient", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
