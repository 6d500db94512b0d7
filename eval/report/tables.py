"""Rows and cells as both templates print them: equal text in HTML and in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from eval.analysis.analyse import OVERALL
from eval.analysis.schema import Bin, CalibrationError, CurvePoint, Estimate, TaskAnalysis
from eval.numbers import FIXED_SPACE, MINUS, number, p_text
from eval.scores import EceRow, Score, ScoreRow, interval_text, metric_name, value_text

COVERAGES = (0.5, 0.8, 0.9)


@dataclass(frozen=True)
class Cell:
    """A value, and what stands small below it."""

    text: str
    small: str = ""


@dataclass(frozen=True)
class Row:
    """A line of a table with a column per system."""

    task: str
    words: str
    """What is measured, with its unit."""
    better: str
    """``higher``, ``lower`` or nothing."""
    documents: int | None
    cells: dict[str, Cell]
    """By system; some may be missing."""


def shown_task(task: str) -> str:
    """Its name, or what the joint analysis is of."""
    return "all choice tasks together" if task == OVERALL else task


@dataclass(frozen=True)
class Grid:
    """A plain table of numbers."""

    title: str
    head: list[str]
    rows: list[list[str]]


def score_row(row: ScoreRow) -> Row:
    """A score with its interval."""
    return Row(
        task=shown_task(row.task),
        words=row.metric + (", %" if row.percent else ""),
        better={True: "higher", False: "lower", None: ""}[row.higher_is_better],
        documents=row.documents,
        cells={
            system: Cell(value_text(one, row.percent, unit=False), interval_text(one, row.percent))
            for system, one in row.scores.items()
        },
    )


def ece_row(row: EceRow, documents: int | None) -> Row:
    """A calibration error beside what a calibrated model would show, never with an interval."""
    cells = {system: ece_cell(error) for system, error in row.errors.items()}
    return Row(shown_task(row.task), f"{row.metric}, %", "lower", documents, cells)


def ece_cell(error: CalibrationError) -> Cell:
    """``7.8``, and below it ``calibrated: 1.2 to 4.9; p < 0.001``, which may break at its colon and semicolon."""
    band = f"{number(100 * error.band_low, 1)} to {number(100 * error.band_high, 1)};"
    p = p_text(error.p_value)
    return Cell(number(100 * error.value, 1), " ".join(["calibrated:", *(_fixed(text) for text in (band, p))]))


def _fixed(text: str) -> str:
    return text.replace(" ", FIXED_SPACE)


def fact_rows(task: str, analysed: Mapping[str, TaskAnalysis]) -> list[Row]:
    """What is known of the systems on one task beside their scores."""
    by_system = {system: facts(analysis) for system, analysis in analysed.items()}
    words = dict.fromkeys(word for found in by_system.values() for word in found)
    return [
        Row(shown_task(task), word, "", None, {s: f[word] for s, f in by_system.items() if word in f}) for word in words
    ]


def facts(analysis: TaskAnalysis) -> dict[str, Cell]:
    """Risk among the most confident, temperature, entropies, Jensen gap, parts of the Brier score, by their words."""
    found = {}
    for coverage in COVERAGES if analysis.risk_coverage else ():
        risk = min(analysis.risk_coverage, key=lambda point: abs(point[0] - coverage))[1]
        found[f"wrong among the most confident {100 * coverage:.0f} %, %"] = Cell(number(100 * risk, 1))
    if analysis.temperature:
        folds = analysis.temperature.folds
        extent = f"{min(folds):.2f} to {max(folds):.2f} over {len(folds)} folds"
        found["own temperature"] = Cell(f"{sum(folds) / len(folds):.2f}", extent)
    if analysis.ece:
        found["squared calibration error, debiased"] = Cell(number(analysis.ece.debiased_squared, 4))
    if analysis.brier_parts:
        parts = analysis.brier_parts
        found["Brier score: reliability (0 is best)"] = Cell(number(parts.reliability, 4))
        found["Brier score: resolution (more is better)"] = Cell(number(parts.resolution, 4))
        found["Brier score: uncertainty of the task"] = Cell(number(parts.uncertainty, 4))
        found["Brier score: spread within bins"] = Cell(number(parts.within_bin, 4))
    if analysis.entropy:
        found["total entropy, nats"] = Cell(number(analysis.entropy.total, 3))
        found["expected entropy of a member, nats"] = Cell(number(analysis.entropy.expected, 3))
        found["mutual information: members' disagreement, nats"] = Cell(number(analysis.entropy.mutual_information, 4))
    for key, one in analysis.confidences.items():
        words = metric_name(key).replace(",", ", ")
        found[f"ECE, confidence {words}, %"] = ece_cell(one.ece)
        found |= {f"{metric_name(name)}, confidence {words}": estimate_cell(e) for name, e in one.metrics.items()}
    for key, estimate in analysis.sampled_subjects.items():
        found[f"{metric_name(key)}, as if subjects were a sample (sensitivity)"] = estimate_cell(estimate)
    if analysis.jensen:
        gap = analysis.jensen
        found["Jensen gap per token, nats"] = Cell(
            number(gap.per_token, 4), f"least {gap.least:.0e}".replace("-", MINUS)
        )
        if gap.choice_level is not None:
            found["Jensen gap of the right choice, nats"] = Cell(number(gap.choice_level, 4))
    return found


def estimate_cell(found: Estimate) -> Cell:
    """The value with its unit, and its interval."""
    score = Score(found.value, found.low, found.high, found.interval)
    return Cell(value_text(score, found.percent), interval_text(score, found.percent))


def bin_grid(label: str, bins: Sequence[Bin]) -> Grid:
    """The bars of a reliability diagram."""
    return Grid(
        f"Reliability: {label}",
        ["confidence, %", "documents", "mean confidence, %", "right, %", "Wilson interval"],
        [
            [
                f"{100 * one.low:.1f} to {100 * one.high:.1f}",
                str(one.count),
                number(100 * one.confidence, 1),
                number(100 * one.accuracy, 1),
                f"{number(100 * one.accuracy_low, 1)} to {number(100 * one.accuracy_high, 1)}",
            ]
            for one in bins
        ],
    )


def curve_grid(label: str, curve: Sequence[CurvePoint], shown: Sequence[str], percent: Mapping[str, bool]) -> Grid:
    """Scores of the first members.

    Args:
        label: of the system.
        curve: its points.
        shown: the metrics, where there are such.
        percent: metrics that are shown times 100.
    """
    keys = [key for key in dict.fromkeys(shown) if any(key in point.scores for point in curve)]
    return Grid(
        f"First members: {label}",
        ["members", *(curve_words(key, percent) for key in keys)],
        [[str(point.members), *(curve_number(key, point.scores.get(key), percent) for key in keys)] for point in curve],
    )


def curve_words(key: str, percent: Mapping[str, bool]) -> str:
    """The metric of a curve, with its unit."""
    if key == "ece":
        return "ECE, %"
    return metric_name(key) + (", %" if percent.get(key) else "")


def curve_number(key: str, value: float | None, percent: Mapping[str, bool]) -> str:
    """One decimal for percentages, four for others."""
    if value is None:
        return "-"
    return number(100 * value, 1) if key == "ece" or percent.get(key) else number(value, 4)
