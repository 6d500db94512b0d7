"""What the report shows of one task: tables, pictures and mistakes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from eval.analysis.schema import Mistake, TaskAnalysis
from eval.report.notes import task_notes
from eval.report.pictures.curves import MemberCurve, curves_figure
from eval.report.pictures.reliability import reliability_figure
from eval.report.pictures.risk_coverage import risk_coverage_figure
from eval.report.svg import Picture, picture
from eval.report.tables import Grid, Row, bin_grid, curve_grid, curve_words, ece_row, fact_rows, score_row, shown_task
from eval.scores import SYSTEMS, Analyses, ScoreRow, ece_rows, score_text

FEWEST_DOCUMENTS = 20
"""A picture of fewer would show noise."""
MOST_DRAWN = 12
"""Tasks with pictures, so that the report stays small; the others have tables."""
CURVES = ("nll", "calibrated_nll", "ece")
"""Beside the primary metric: what a table of the first members shows."""


@dataclass(frozen=True)
class TaskSection:
    """A task that was analysed."""

    name: str
    headline: str
    """Its best score."""
    notes: list[str]
    rows: list[Row]
    """Scores and calibration errors."""
    facts: list[Row]
    reliability: Picture | None
    curves: Picture | None
    risk_coverage: Picture | None
    grids: list[Grid]
    """The numbers in the pictures."""
    mistakes: list[Mistake]
    mistaken: str
    """Label of the system that made them."""
    documents: str
    """How many, and how many are independent."""

    @property
    def pictures(self) -> list[Picture]:
        """Those that there are."""
        return [one for one in (self.reliability, self.curves, self.risk_coverage) if one is not None]


def task_section(
    task: str,
    rows: Sequence[ScoreRow],
    analyses: Analyses,
    labels: Mapping[str, str],
    times: Mapping[str, float],
    drawn: bool,
) -> TaskSection:
    """Gather it.

    Args:
        task: that at least one system has an analysis of.
        rows: its scores.
        analyses: of all systems.
        labels: words by system.
        times: of the systems against the deterministic adapter.
        drawn: with pictures, if there are enough documents.
    """
    analysed = {system: analyses[system][task] for system in SYSTEMS if task in analyses.get(system, {})}
    some = next(iter(analysed.values()))
    last = next((system for system in reversed(analysed) if analysed[system].mistakes), None)
    bins = {system: analysis.bins for system, analysis in analysed.items() if analysis.bins}
    risks = {system: analysis.risk_coverage for system, analysis in analysed.items() if analysis.risk_coverage}
    percent = {row.key: row.percent for row in rows}
    curves = member_curves(analysed, rows, times)
    enough = some.documents >= FEWEST_DOCUMENTS
    undrawn = "" if enough else f"Too few for pictures: they need {FEWEST_DOCUMENTS}."
    if enough and not drawn and (bins or curves or risks):
        undrawn = f"Without pictures: the first {MOST_DRAWN} tasks have them."
    drawn = drawn and enough
    return TaskSection(
        name=shown_task(task),
        headline=headline(rows[0], labels) if rows else "",
        notes=([undrawn] if undrawn else []) + task_notes(analyses, task, labels),
        rows=[score_row(row) for row in rows] + [ece_row(row, some.documents) for row in ece_rows(task, analyses)],
        facts=fact_rows(task, analysed),
        reliability=picture(partial(reliability_figure, bins, labels), f"reliability-{task}")
        if bins and drawn
        else None,
        curves=picture(
            partial(curves_figure, curves),
            f"curves-{task}",
            keyed(labels, (c.system for found in curves.values() for c in found)),
        )
        if curves and drawn
        else None,
        risk_coverage=picture(partial(risk_coverage_figure, risks), f"risk-coverage-{task}", keyed(labels, risks))
        if risks and drawn
        else None,
        grids=[bin_grid(labels[system], found) for system, found in bins.items()]
        + [
            curve_grid(labels[system], analysis.curve, [rows[0].key, *CURVES], percent)
            for system, analysis in analysed.items()
            if len(analysis.curve) > 1
        ],
        mistakes=analysed[last].mistakes if last else [],
        mistaken=labels[last] if last else "",
        documents=documents_words(some),
    )


def keyed(labels: Mapping[str, str], systems: Iterable[str]) -> dict[str, str]:
    """The labels of those that are drawn."""
    drawn = set(systems)
    return {system: label for system, label in labels.items() if system in drawn}


def headline(row: ScoreRow, labels: Mapping[str, str]) -> str:
    """The primary metric of the system that ran last."""
    last = list(row.scores)[-1]
    return f"{row.metric} {score_text(row.scores[last], row.percent)}, {labels[last]}"


def documents_words(analysis: TaskAnalysis) -> str:
    """``277 documents``, ``62 documents in 20 clusters``, ``1,200 documents in 4 strata``."""
    text = f"{analysis.documents:,} document{'' if analysis.documents == 1 else 's'}"
    parts = []
    if analysis.clusters != analysis.documents:
        parts.append(f"{analysis.clusters:,} independent clusters")
    if analysis.strata > 1:
        parts.append(f"{analysis.strata} subjects")
    return text + (f" in {' and '.join(parts)}" if parts else "")


def member_curves(
    analysed: Mapping[str, TaskAnalysis], rows: Sequence[ScoreRow], times: Mapping[str, float]
) -> dict[str, list[MemberCurve]]:
    """By the words of the primary metric, NLL and ECE: each system's curve; empty where no system has members.

    The base stays out: it may be so far away that the others' curves would look flat.
    """
    if not any(len(analysis.curve) > 1 for analysis in analysed.values()):
        return {}
    primary = next((row.key for row in rows if row.primary), "")
    percent = {row.key: row.percent for row in rows} | {"ece": True}
    found: dict[str, list[MemberCurve]] = {}
    for key in dict.fromkeys((primary, "nll", "ece")):
        scale = 100 if percent.get(key) else 1
        for system, analysis in analysed.items():
            points = [(point.members, scale * point.scores[key]) for point in analysis.curve if key in point.scores]
            if points and system != "base":
                members, scores = zip(*points, strict=True)
                curve = MemberCurve(system, list(members), list(scores), times.get(system))
                found.setdefault(curve_words(key, percent), []).append(curve)
    return found
