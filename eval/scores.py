"""Scores of one evaluation as table rows, with intervals and sensible digits.

Input is lm-eval's results schema: ``results[task]["<metric>,<filter>"]`` and its
``"<metric>_stderr,<filter>"``. Statistics that need the single documents (paired comparisons,
calibration) do not belong here: they read the samples, this module reads the totals.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

from scipy.stats import binomtest

SYSTEMS = ("base", "deterministic", "ensemble")
"""In the order they run; the last one that ran is what ``results.json`` reports at its top."""
NORMAL_95 = NormalDist().inv_cdf(0.975)
PERCENTAGES = {"acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match", "em", "f1", "contains"}
LONG_NAMES = {"acc": "accuracy", "acc_norm": "accuracy, length-normalised", "mcc": "Matthews correlation", "f1": "F1"}


@dataclass(frozen=True)
class Score:
    """One measured value in the metric's own unit (a proportion for percentages)."""

    value: float
    stderr: float | None
    low: float | None
    """Lower end of the 95 % interval; None where no standard error is known."""
    high: float | None
    interval: str
    """`Wilson`, `normal`, or empty."""


@dataclass(frozen=True)
class ScoreRow:
    """One metric of one task, for every evaluated system."""

    task: str
    metric: str
    documents: int | None
    higher_is_better: bool | None
    percent: bool
    subtask: bool
    """Part of a group that has a total of its own."""
    scores: dict[str, Score]


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
        return Score(value, stderr, float(interval.low), float(interval.high), "Wilson")
    if stderr is None or not math.isfinite(value):
        return Score(value, None, None, None, "")
    return Score(value, stderr, value - NORMAL_95 * stderr, value + NORMAL_95 * stderr, "normal")


def documents_of(name: str, report: Mapping[str, Any]) -> int | None:
    """Documents behind a task, or behind all leaves of a group; None where lm-eval does not say."""
    samples = report.get("n-samples", {})
    if name in samples:
        return int(samples[name]["effective"])
    children = [documents_of(child, report) for child in report.get("group_subtasks", {}).get(name, [])]
    return sum(n for n in children if n is not None) if children and None not in children else None


def metric_keys(results: Mapping[str, Any]) -> list[str]:
    """lm-eval writes metrics as ``metric,filter``, beside names, aliases and standard errors."""
    return [
        key
        for key, value in results.items()
        if "," in key and not key.split(",")[0].endswith("_stderr") and isinstance(value, int | float)
    ]


def metric_name(key: str) -> str:
    """``exact_match,strict`` is read as ``exact match (strict)``; the filter ``none`` is not named."""
    metric, _, filtered = key.partition(",")
    name = LONG_NAMES.get(metric, metric.replace("_", " "))
    return name if filtered in ("", "none") else f"{name} ({filtered})"


def _score_of(results: Mapping[str, Any], key: str, documents: int | None) -> Score | None:
    if not isinstance(results.get(key), int | float):
        return None
    metric, _, filtered = key.partition(",")
    stderr = results.get(f"{metric}_stderr,{filtered}")
    known = stderr if isinstance(stderr, int | float) and math.isfinite(stderr) else None  # lm-eval writes "N/A"
    return score(float(results[key]), known, documents)


def ordered_tasks(groups: Mapping[str, Sequence[str]], evaluated: Mapping[str, Any]) -> list[tuple[str, bool]]:
    """(name, is part of a group with a total), every group before its parts.

    Args:
        groups: lm-eval's ``group_subtasks``; tasks may be listed, with no parts.
        evaluated: results by task and group.
    """
    totals = {name for name in evaluated if groups.get(name) and metric_keys(evaluated[name])}
    children = {part for parts in groups.values() for part in parts}
    order: list[tuple[str, bool]] = []

    def visit(name: str, subtask: bool) -> None:
        if all(name != seen for seen, _ in order):
            order.append((name, subtask))
            for part in groups.get(name, []):
                visit(part, subtask or name in totals)

    for name in [*(name for name in evaluated if name not in children), *evaluated]:
        visit(name, False)
    return order


def score_rows(report: Mapping[str, Any]) -> list[ScoreRow]:
    """One row per task and metric, groups first, then their parts."""
    systems = {
        name: report["lora_dropout"]["systems"][name] for name in SYSTEMS if name in report["lora_dropout"]["systems"]
    }
    evaluated = {task: results for system in systems.values() for task, results in system["results"].items()}
    rows = []
    for task, subtask in ordered_tasks(report.get("group_subtasks", {}), evaluated):
        documents = documents_of(task, report)
        of_task = {name: system["results"].get(task, {}) for name, system in systems.items()}
        for key in dict.fromkeys(key for results in of_task.values() for key in metric_keys(results)):
            scores = {
                name: found
                for name, results in of_task.items()
                if (found := _score_of(results, key, documents)) is not None
            }
            metric = key.partition(",")[0]
            rows.append(
                ScoreRow(
                    task=task,
                    metric=metric_name(key),
                    documents=documents,
                    higher_is_better=report.get("higher_is_better", {}).get(task, {}).get(metric),
                    percent=metric in PERCENTAGES or any(s.interval == "Wilson" for s in scores.values()),
                    subtask=subtask,
                    scores=scores,
                )
            )
    return rows


def decimals(stderr: float | None, value: float, percent: bool) -> int:
    """Digits after the point: tenths of a percent, else two digits of the standard error, else four in all."""
    if percent:
        return 1
    if stderr is not None and stderr > 0:
        return max(0, 1 - math.floor(math.log10(stderr)))
    return max(0, 3 - math.floor(math.log10(abs(value)))) if value and math.isfinite(value) else 3


def number(value: float, digits: int, sign: bool = False) -> str:
    """A decimal number with a true minus sign; one that rounds to zero carries no sign."""
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite"
    text = f"{value:{'+' if sign else ''}.{digits}f}"
    if float(text) == 0:
        text = text.lstrip("+-")
    return text.replace("-", "\N{MINUS SIGN}")


def score_text(found: Score, percent: bool, unit: bool = True) -> str:
    """``71.2 ± 1.4 %`` or ``12.31 ± 0.21``: the value and one standard error, with spaces that do not break."""
    scale = 100 if percent else 1
    digits = decimals(found.stderr, found.value, percent)
    text = number(found.value * scale, digits)
    if found.stderr:  # all answers right or all wrong: 0 would claim certainty, the interval does not
        text += f" ± {number(found.stderr * scale, digits)}"
    return (f"{text} %" if percent and unit and math.isfinite(found.value) else text).replace(" ", "\N{NO-BREAK SPACE}")


def interval_text(found: Score, percent: bool) -> str:
    """``68.4 to 73.9``; empty where there is no interval."""
    if found.low is None or found.high is None:
        return ""
    scale = 100 if percent else 1
    digits = decimals(found.stderr, found.value, percent)
    return f"{number(found.low * scale, digits)} to {number(found.high * scale, digits)}"
