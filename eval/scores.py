"""Scores of one evaluation as table rows.

What the analysis says (``lora_dropout.systems.<system>.analysis``) comes first; where it is silent, and in folders that
have none, lm-eval's totals are read: ``results[task]["<metric>,<filter>"]`` and its ``"<metric>_stderr,<filter>"``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from pydantic import TypeAdapter, ValidationError
from scipy.stats import binomtest

from eval.analysis.schema import CalibrationError, Estimate, TaskAnalysis
from eval.numbers import FIXED_SPACE, NORMAL_95, decimals, number
from pipeline.errors import UserError

SYSTEMS = ("base", "deterministic", "mc_dropout", "deep_ensemble", "ensemble")
"""In the order they run; the last one that ran is what ``results.json`` reports at its top."""
PERCENTAGES = {"acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match", "em", "f1", "contains"}
LONG_NAMES = {
    "acc": "accuracy",
    "acc_norm": "accuracy, length-normalised",
    "f1": "F1",
    "mcc": "Matthews correlation",
    "nll": "NLL, nats",
    "calibrated_nll": "NLL after own temperature",
    "brier": "Brier score of all choices",
    "brier_of_answer": "Brier score of the answer",
    "auroc": "AUROC of correctness",
    "aurc": "AURC: mean risk over coverages",
    "overconfidence": "over-confidence",
}
CALIBRATION = ("nll", "calibrated_nll", "brier", "brier_of_answer", "auroc", "aurc", "overconfidence")
"""In this order, after the metrics of the task itself."""
Analyses = Mapping[str, Mapping[str, TaskAnalysis]]
"""By system, then by task or group."""


@dataclass(frozen=True)
class Score:
    """One measured value in the metric's own unit (a proportion for percentages)."""

    value: float
    low: float | None
    """Lower end of the 95 % interval; None where there is none."""
    high: float | None
    interval: str
    """How it was found: ``Wilson``, ``normal``, ``bootstrap, 2,000 draws``; or empty."""


@dataclass(frozen=True)
class ScoreRow:
    """One metric of one task, for every system that has it."""

    task: str
    key: str
    """As in ``TaskAnalysis.metrics``: lm-eval's ``acc,none`` is ``acc``."""
    metric: str
    """In words."""
    documents: int | None
    higher_is_better: bool | None
    percent: bool
    subtask: bool
    """Part of a group that has a total of its own."""
    primary: bool
    """The metric that comparisons test."""
    scores: dict[str, Score]


@dataclass(frozen=True)
class EceRow:
    """A calibration error of one task, for every system that has it."""

    task: str
    metric: str
    errors: dict[str, CalibrationError]


BY_TASK = TypeAdapter(dict[str, TaskAnalysis])
"""Of one system, as ``results.json`` has them."""


def read_analyses(ours: Mapping[str, Any]) -> dict[str, dict[str, TaskAnalysis]]:
    """The analyses in ``lora_dropout``; none for a system of an older folder.

    Raises:
        UserError: they are of another version of this project.
    """
    try:
        return {
            system: BY_TASK.validate_python(ours["systems"][system].get("analysis") or {})
            for system in SYSTEMS
            if system in ours["systems"]
        }
    except ValidationError as error:
        raise UserError(f"results.json, an analysis: this version reads others; evaluate again\n{error}") from error


def proportion_of_independent_answers(value: float, stderr: float | None, documents: int) -> bool:
    """Whether the mean is one of 0/1 values: only they have the variance p(1-p), and lm-eval divides by n - 1."""
    if stderr is None or documents < 2 or not 0 <= value <= 1:
        return False
    whole = math.isclose(value * documents, round(value * documents), abs_tol=1e-6 * documents)
    return whole and math.isclose(stderr, math.sqrt(value * (1 - value) / (documents - 1)), rel_tol=1e-6, abs_tol=1e-9)


def score(value: float, stderr: float | None, documents: int | None) -> Score:
    """The value with its 95 % interval: Wilson for a proportion of independent documents, else normal."""
    if documents is not None and proportion_of_independent_answers(value, stderr, documents):
        interval = binomtest(round(value * documents), documents).proportion_ci(0.95, method="wilson")
        return Score(value, float(interval.low), float(interval.high), "Wilson")
    if stderr is None or not math.isfinite(value):
        return Score(value, None, None, "")
    return Score(value, value - NORMAL_95 * stderr, value + NORMAL_95 * stderr, "normal")


def documents_of(name: str, report: Mapping[str, Any]) -> int | None:
    """Documents behind a task, or behind all leaves of a group; None where lm-eval does not say."""
    samples = report.get("n-samples", {})
    if name in samples:
        return int(samples[name]["effective"])
    children = [documents_of(child, report) for child in report.get("group_subtasks", {}).get(name, [])]
    return sum(n for n in children if n is not None) if children and None not in children else None


def totals(results: Mapping[str, Any], documents: int | None) -> dict[str, Score]:
    """lm-eval's metrics of one task by key; it writes them as ``metric,filter`` beside names and standard errors."""
    found = {}
    for name, value in results.items():
        metric, comma, filtered = name.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
            stderr = results.get(f"{metric}_stderr,{filtered}")
            known = stderr if isinstance(stderr, int | float) and math.isfinite(stderr) else None  # it writes "N/A"
            found[metric if filtered == "none" else name] = score(float(value), known, documents)
    return found


def metric_name(key: str) -> str:
    """``exact_match,strict`` is read as ``exact match (strict)``; the filter ``none`` is not named."""
    metric, _, filtered = key.partition(",")
    name = LONG_NAMES.get(metric, metric.replace("_", " "))
    return name if filtered in ("", "none") else f"{name} ({filtered})"


def ordered_tasks(groups: Mapping[str, Sequence[str]], evaluated: Mapping[str, bool]) -> list[tuple[str, bool]]:
    """(name, is part of a group with a total), every group before its parts.

    Args:
        groups: lm-eval's ``group_subtasks``; tasks may be listed, with no parts.
        evaluated: for every task and group whether it has a score.
    """
    children = {part for parts in groups.values() for part in parts}
    order: dict[str, bool] = {}

    def visit(name: str, subtask: bool) -> None:
        if name not in order:
            order[name] = subtask
            for part in groups.get(name, []):
                visit(part, subtask or evaluated.get(name, False))

    for name in [*(name for name in evaluated if name not in children), *evaluated]:
        visit(name, False)
    return list(order.items())


def place(key: str, percent: bool) -> int:
    """Where a metric stands among those of its task: its own percentages, its other ones, then how sure it is."""
    return 2 + CALIBRATION.index(key) if key in CALIBRATION else 0 if percent else 1


def score_rows(report: Mapping[str, Any], analyses: Analyses | None = None) -> list[ScoreRow]:
    """One row per task and metric, groups before their parts, the primary metric of a task first.

    Args:
        report: the content of ``results.json``.
        analyses: as ``read_analyses`` gives them, where they are read already.
    """
    systems = report["lora_dropout"]["systems"]
    analyses = read_analyses(report["lora_dropout"]) if analyses is None else analyses
    evaluated = {
        task: bool(totals(results, None))
        for name in analyses
        for task, results in (systems[name]["results"] | {task: {} for task in analyses[name]}).items()
    } | {task: True for by_task in analyses.values() for task in by_task}
    return [
        row
        for task, subtask in ordered_tasks(report.get("group_subtasks", {}), evaluated)
        for row in task_rows(task, subtask, report, analyses)
    ]


def task_rows(task: str, subtask: bool, report: Mapping[str, Any], analyses: Analyses) -> list[ScoreRow]:
    """The metrics of one task."""
    systems = report["lora_dropout"]["systems"]
    documents = documents_of(task, report)
    analysed = {name: by_task[task] for name, by_task in analyses.items() if task in by_task}
    if documents is None and analysed:
        documents = next(iter(analysed.values())).documents
    scores: dict[str, dict[str, Score]] = {}
    estimates: dict[str, Estimate] = {}
    for name in analyses:
        found = totals(systems[name]["results"].get(task, {}), documents)
        if name in analysed:
            estimates = analysed[name].metrics | estimates
            named = {f"{key},none" for key in found} & analysed[name].metrics.keys()  # generation names all filters
            found = {key: one for key, one in found.items() if f"{key},none" not in named}
            found |= {k: Score(e.value, e.low, e.high, e.interval) for k, e in analysed[name].metrics.items()}
        for key, one in found.items():
            scores.setdefault(key, {})[name] = one
    higher = report.get("higher_is_better", {}).get(task, {})
    percent = {key: is_percent(key, estimates.get(key), by_system) for key, by_system in scores.items()}
    primaries = [analysis.primary for analysis in analysed.values() if analysis.primary in scores]
    first = primaries[0] if primaries else next(iter(scores), "")
    return [
        ScoreRow(
            task=task,
            key=key,
            metric=metric_name(key),
            documents=documents,
            higher_is_better=estimates[key].higher_is_better if key in estimates else higher.get(key.partition(",")[0]),
            percent=percent[key],
            subtask=subtask,
            primary=key == first,
            scores=scores[key],
        )
        for key in sorted(scores, key=lambda key: (key != first, place(key, percent[key])))
    ]


def is_percent(key: str, estimate: Estimate | None, by_system: Mapping[str, Score]) -> bool:
    """Whether a metric is shown times 100."""
    if estimate is not None:
        return estimate.percent
    return key.partition(",")[0] in PERCENTAGES or any(one.interval == "Wilson" for one in by_system.values())


def ece_rows(task: str, analyses: Analyses) -> list[EceRow]:
    """The calibration errors of one task: equal-width bins, then bins of equal counts."""
    analysed = {name: by_task[task] for name, by_task in analyses.items() if task in by_task}
    named = {
        "ECE, 15 bins": {name: one.ece for name, one in analysed.items() if one.ece is not None},
        "adaptive ECE, bins of equal counts": {
            name: one.adaptive_ece for name, one in analysed.items() if one.adaptive_ece is not None
        },
    }
    return [EceRow(task, metric, errors) for metric, errors in named.items() if errors]


def spread(found: Score) -> float | None:
    """Half of the 95 % interval."""
    return None if found.low is None or found.high is None else (found.high - found.low) / 2


def value_text(found: Score, percent: bool, unit: bool = True) -> str:
    """``71.2 %`` or ``12.31``, with spaces that do not break."""
    text = number(found.value * (100 if percent else 1), decimals(found.value, spread(found), percent))
    return f"{text}{FIXED_SPACE}%" if percent and unit and math.isfinite(found.value) else text


def interval_text(found: Score, percent: bool) -> str:
    """``68.4 to 73.9``; empty where there is no interval."""
    if found.low is None or found.high is None:
        return ""
    text = partial(number, digits=decimals(found.value, spread(found), percent))
    scale = 100 if percent else 1
    return f"{text(found.low * scale)} to {text(found.high * scale)}".replace(" ", FIXED_SPACE)


def score_text(found: Score, percent: bool) -> str:
    """``71.2 % (68.4 to 73.9)``."""
    interval = interval_text(found, percent)
    return value_text(found, percent) + (f" ({interval})" if interval else "")
