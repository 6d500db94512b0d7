"""What the report shows, as the templates name it.

Everything comes from ``results.json``; equal input gives equal bytes. The HTML loads nothing and needs no script.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from eval.analysis.analyse import OVERALL
from eval.report.cost import cost_rows, cost_sentences, kept_sentences, relative_times
from eval.report.notes import interval_note, notes
from eval.report.overfitting import evaluations, loss_curves, loss_sentences, training_loss_sentences
from eval.report.page import style_sheet
from eval.report.pictures.losses import logarithmic, losses_figure
from eval.report.pictures.scores import MOST_ROWS, scores_figure
from eval.report.read import recorded_recipe
from eval.report.settings import provenance_tables, setting_rows
from eval.report.svg import Picture, picture
from eval.report.tables import Row, ece_row, score_row
from eval.report.tasks import MOST_DRAWN, TaskSection, task_section
from eval.report.verdict import (
    baseline_sentences,
    calibration_sentences,
    pointer_sentences,
    score_sentences,
    temperature_sentences,
)
from eval.scores import SYSTEMS, Analyses, ScoreRow, ece_rows, read_analyses, score_rows
from pipeline.recipe import recipe_to_yaml

MOST_OPEN = 4
"""Tasks whose sections stand open; of more, only the first does."""
SURE = ("nll", "calibrated_nll")
SURE_NOTE = (
    "NLL is that of the right answer. A system's own temperature is fitted to its confidences on other documents of "
    'the task (cross-fitting). A calibration error has no interval; "calibrated" is the range in which it would lie '
    "for a perfectly calibrated model with the same confidences, p the probability of one at least as large."
)
CURVES_CAPTION = (
    "Scores after the first members; steps smaller than the intervals in the table mean little. Cost is the time "
    "of the whole run against the deterministic adapter's; a part of the members is taken as that part of the time."
)


def report_context(results: Mapping[str, Any]) -> dict[str, Any]:
    """What both templates show; ``pictures`` are those that become files too."""
    ours = results["lora_dropout"]
    recipe = recorded_recipe(ours)
    history = ours.get("history") or []
    analyses = read_analyses(ours)
    rows = score_rows(results, analyses)
    labels = {name: system_label(name, ours) for name in SYSTEMS if name in ours["systems"]}
    own = [row for row in rows if not row.subtask]
    tasks = list(dict.fromkeys(row.task for row in own))
    analysed = [task for task in tasks if any(task in by_task for by_task in analyses.values())]
    main = [row for row in own if row.primary or row.task not in analysed]
    drawn = [row for row in main if row.percent and row.scores]
    curves = loss_curves(history)
    scores_picture = picture(partial(scores_figure, drawn[:MOST_ROWS]), "scores", labels) if drawn else None
    losses_picture = picture(partial(losses_figure, curves), "losses") if curves else None
    sections = [
        task_section(
            task, [row for row in own if row.task == task], analyses, labels, relative_times(ours), n < MOST_DRAWN
        )
        for n, task in enumerate(analysed)
    ]
    return {
        "name": recipe.name,
        "verdict": score_sentences([row for row in main if row.primary and row.task != OVERALL], labels)
        + temperature_sentences(analyses, [task for task in analysed if task != OVERALL], labels)
        + baseline_sentences(analyses, [task for task in analysed if task != OVERALL], labels)
        + calibration_sentences(analyses, [task for task in analysed if task != OVERALL], labels)
        + [" ".join(loss_sentences(evaluations(history)))] * bool(evaluations(history)),
        "tests": pointer_sentences(labels),
        "notes": notes(results, history),
        "labels": labels,
        "rows": [score_row(row) for row in main],
        "subtask_rows": [score_row(row) for row in rows if row.subtask and (row.primary or not analysed)],
        "sure_rows": sure_rows(own, analysed, analyses),
        "interval_note": interval_note(rows),
        "sure_note": SURE_NOTE,
        "curves_caption": CURVES_CAPTION,
        "scores_picture": scores_picture,
        "drawn": min(len(drawn), MOST_ROWS),
        "drawable": len(drawn),
        "sections": sections,
        "most_open": MOST_OPEN,
        "log_losses": bool(curves) and logarithmic(curves),
        "losses_picture": losses_picture,
        "loss_words": loss_sentences(evaluations(history)) + training_loss_sentences(history, evaluations(history)),
        "costs": cost_rows(ours, labels),
        "ratios": bool(relative_times(ours)),
        "cost_words": cost_sentences(ours) + kept_sentences(ours, labels),
        "settings": setting_rows(ours, recipe),
        "provenance": provenance_tables(results),
        "recipe": recipe_to_yaml(recipe),
        "css": style_sheet(),
        "pictures": all_pictures(scores_picture, losses_picture, sections),
    }


def system_label(name: str, ours: Mapping[str, Any]) -> str:
    """The words for a system, with the number of members where it is known."""
    words = {
        "base": "base",
        "deterministic": "deterministic adapter",
        "mc_dropout": "MC dropout",
        "deep_ensemble": "deep ensemble",
        "ensemble": "ensemble",
    }[name]
    members = (ours.get("ensemble") if name == "ensemble" else ours["systems"][name].get("members")) or {}
    return f"{words} of {members['instances']}" if "instances" in members else words


def sure_rows(rows: Sequence[ScoreRow], analysed: Sequence[str], analyses: Analyses) -> list[Row]:
    """NLL, NLL after own temperature, and ECE of each task that has them."""
    found = []
    for task in analysed:
        found += [score_row(row) for row in rows if row.task == task and row.key in SURE and not row.primary]
        documents = next(by_task[task].documents for by_task in analyses.values() if task in by_task)
        found += [ece_row(row, documents) for row in ece_rows(task, analyses)[:1]]
    return found


def all_pictures(scores: Picture | None, losses: Picture | None, sections: Sequence[TaskSection]) -> list[Picture]:
    """Those that there are."""
    of_tasks = [one for section in sections for one in section.pictures]
    return [one for one in (scores, losses) if one is not None] + of_tasks
