"""The table on the terminal, and the picture."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from pipeline.benchmark.result import Result, Row, plain_words
from pipeline.benchmark.statistics import Timing
from pipeline.preflight.estimate import in_words

OURS, STOCK, INK = "#2f6f8f", "#9a9a9a", "#333333"


def duration(seconds: float) -> str:
    """Three significant digits with a unit."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _timed(timing: Timing) -> str:
    """Median, and half the distance of the quartiles."""
    return f"{duration(timing.median)} ± {50 * (timing.quartiles[1] - timing.quartiles[0]) / timing.median:.0f} %"


def _ratio(row: Row) -> Text:
    low, high = row.whole.ratio_interval
    return Text(f"{row.whole.ratio:.2f}", style="bold") + Text(f" {low:.2f} to {high:.2f}", style="dim")


def table(result: Result) -> RenderableType:
    """One row per variant, at most 120 columns; ratios of the other phases than the last are in the JSON alone."""
    phases = list(result.reference.phases)
    grid = Table(box=None, pad_edge=False, header_style="dim")
    grid.add_column("variant", no_wrap=True)
    for phase in phases:
        grid.add_column(phase.replace("forward+", "+ "), justify="right", no_wrap=True)
    grid.add_column(f"ratio, {result.interval_name}", justify="right", no_wrap=True)
    grid.add_column("tokens/s", justify="right", no_wrap=True)
    grid.add_column("memory", justify="right", no_wrap=True)
    for row in result.rows:
        grid.add_row(
            row.variant.label,
            *(_timed(timing) for timing in row.phases.values()),
            _ratio(row),
            f"{row.tokens_per_second:,.0f}",
            in_words(row.peak_bytes),
        )
    return Group(Text(in_three_lines(result)), Text(), grid, Text(), *(Text(line) for line in plain_words(result)))


def in_three_lines(result: Result) -> str:
    """What was measured, and how."""
    found = result.conditions
    layers = "" if found["level"] == "layer" else f", {found['layers']} layers"
    recompute = (
        ""
        if found["level"] == "layer"
        else (", activation checkpointing" if found["activation_checkpointing"] else ", no activation checkpointing")
    )
    ranges = ", range: least to most" if result.interval_name == "range" else ""
    threads = f"{found['threads']} thread{'' if found['threads'] == 1 else 's'}"
    return (
        f"{found['model']}{layers}, {found['quantization']} base, {found['dtype']}, rank {found['rank']}, "
        f"{found['rows']} rows x {found['tokens_per_row']:.0f} tokens{recompute}\n{found['device']}, "
        f"{threads}\n{found['rounds']} interleaved rounds, medians ± half the quartiles' distance{ranges}"
    )


def print_result(result: Result) -> None:
    """On standard output, in full width: a terminal breaks long lines better than a table loses columns."""
    Console(width=max(Console().width, 170), soft_wrap=True).print(table(result))


def draw(result: Result, file: Path) -> None:
    """Ratios with their intervals as dots on a line, peak memory beside them; the file's suffix decides the format."""
    rows = result.rows[::-1]
    figure = Figure(figsize=(8.6, 1.5 + 0.36 * len(rows)), layout=ConstrainedLayoutEngine(w_pad=0.12))
    time, memory = figure.subplots(1, 2, sharey=True, width_ratios=[3, 2])
    phase = list(result.reference.phases)[-1]
    largest = max(row.peak_bytes for row in rows)
    unit, unit_bytes = ("GiB", 2**30) if largest >= 2**30 else ("MiB", 2**20)
    for place, row in enumerate(rows):
        colour = STOCK if row.variant.stock else OURS
        low, high = row.whole.ratio_interval
        time.plot([low, high], [place, place], color=colour, linewidth=2.2, solid_capstyle="butt", alpha=0.6)
        time.plot(row.whole.ratio, place, "o", color=colour, markersize=6)
        time.annotate(
            f"{row.whole.ratio:.2f}",
            (high, place),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            color=INK,
        )
        size = row.peak_bytes / unit_bytes
        memory.barh(place, size, height=0.55, color=colour)
        memory.annotate(
            f"{size:.2f}" if size < 10 else f"{size:.0f}",
            (size, place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            color=INK,
        )
    time.axvline(1.0, color=STOCK, linewidth=0.8, zorder=0)
    time.set_yticks(range(len(rows)), [row.variant.label for row in rows])
    time.set_xlim(0, 1.12 * max(row.whole.ratio_interval[1] for row in rows))
    what = "a training step" if phase == "step" else phase
    time.set_xlabel(f"time of {what} / plain LoRA's, {result.interval_name}", fontsize=9)
    memory.set_xlim(0, 1.35 * largest / unit_bytes)
    memory.set_xlabel(f"peak memory, {unit}", fontsize=9)
    for axes in (time, memory):
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.tick_params(labelsize=9)
    figure.suptitle(in_three_lines(result), fontsize=8.5, color=INK, x=0.01, ha="left")
    figure.savefig(file, dpi=160)
