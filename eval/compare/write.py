"""Writes a comparison: ``comparison.json``, ``comparison.md``, ``comparison.html`` and ``plots/``."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from eval.compare import words
from eval.compare.picture import MOST_ROWS, panels
from eval.compare.schema import Comparison, Flip, RunFacts, TaskComparison
from eval.numbers import number
from eval.report.page import render, style_sheet
from eval.report.svg import write_pictures
from pipeline.run.folder import check_writable

TEMPLATES = Path(__file__).parent / "templates"
MOST_NAMES = 3
"""Of runs or methods, in a folder's name."""


def folder_of(names: Sequence[str], written: str) -> Path:
    """``eval/outputs/comparisons/<names>-<time>``."""
    named = "-".join(re.sub(r"[^\w.-]+", "-", name) for name in list(dict.fromkeys(names))[:MOST_NAMES])
    time_stamp = datetime.fromisoformat(written).astimezone(UTC).strftime("%Y%m%d-%H%M%S")
    return Path("eval/outputs/comparisons") / f"{named}-{time_stamp}"


def check_output(folder: Path) -> None:
    """Refuse a folder that cannot be written. Raises UserError."""
    check_writable("--output", folder)


def write_comparison(comparison: Comparison, folder: Path) -> Path:
    """All files, which appear together or not at all; those of an earlier comparison in the folder are replaced.

    Returns:
        The folder.
    """
    partial = folder.parent / f".{folder.name}-{os.getpid()}.part"
    partial.mkdir(parents=True)
    try:
        (partial / "comparison.json").write_text(comparison.model_dump_json(indent=2) + "\n", encoding="utf-8")
        shown = context(comparison)
        for name in ("comparison.html", "comparison.md"):
            text = render(TEMPLATES / f"{name}.j2", shown)
            (partial / name).write_text(text, encoding="utf-8", newline="\n")
        write_pictures([panel.picture for panel in shown["panels"]], partial / "plots")
        folder.mkdir(exist_ok=True)
        shutil.rmtree(folder / "plots", ignore_errors=True)
        for file in sorted(partial.iterdir()):
            file.replace(folder / file.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def context(comparison: Comparison) -> dict[str, Any]:
    """What both templates show."""
    family = words.family_rows(comparison)
    return {
        "title": comparison.title,
        "kind": comparison.kind,
        "verdict": comparison.verdict,
        "notes": comparison.notes,
        "runs": comparison.runs,
        "run_titles": ["run", "folder", "system taken", "training seed", "mask seed"],
        "run_rows": [run_texts(run) for run in comparison.runs],
        "methods": comparison.methods,
        "settings": comparison.settings,
        "panels": panels(comparison),
        "most_drawn": MOST_ROWS,
        "family": comparison.family,
        "rows": family,
        "several_pairs": len({row.pair for row in family}) > 1,
        "sections": [task_section(task) for task in comparison.tasks],
        "seed_tables": [
            (words.method_row(found), words.seed_texts(found))
            for found in comparison.method_differences
            if found.primary and found.in_family
        ],
        "other_methods": [
            words.method_row(found)
            for found in comparison.method_differences
            if not (found.primary and found.in_family)
        ],
        "noise": [words.noise_texts(one) for one in comparison.mask_noise],
        "noise_titles": words.NOISE_TITLES,
        "detectable": words.detectable_table(comparison.detectable) if comparison.detectable else None,
        **headings(comparison),
        "meaning": meaning(comparison),
        "written": comparison.written,
        "command": comparison.command,
        "versions": comparison.versions,
        "css": style_sheet(),
    }


def run_texts(run: RunFacts) -> list[str]:
    """One run as a row."""
    masks = words.NONE if run.mask_seed is None else str(run.mask_seed)
    return [run.label, run.folder, run.system_taken, str(run.training_seed), masks]


def headings(comparison: Comparison) -> dict[str, str]:
    """The names of the two sides, where all rows have the same, and the direction of all differences."""
    pairs = {(one.first, one.second) for one in comparison.tasks}
    pairs |= {(one.first, one.second) for one in comparison.method_differences}
    first, second = pairs.pop() if len(pairs) == 1 else ("First", "Second")
    direction = "Second minus first" if pairs else f"{second} minus {first}"
    return {"first": first, "second": second, "direction": direction}


def task_section(task: TaskComparison) -> dict[str, Any]:
    """One pair of runs on one task."""
    size = f"{task.documents:,} documents"
    if task.clusters < task.documents:
        size += f" that share {task.clusters:,} texts"
    return {
        "task": task.task,
        "first": task.first,
        "second": task.second,
        "size": size + (f" in {task.strata} subjects" if task.strata > 1 else ""),
        "in_family": task.in_family,
        "rows": [words.task_row(task, found) for found in task.differences],
        "flips": task.flips,
        "lists": []
        if task.flips is None
        else [
            ("Right to wrong", task.flips.right_to_wrong, [flip_texts(flip) for flip in task.flips.lost]),
            ("Wrong to right", task.flips.wrong_to_right, [flip_texts(flip) for flip in task.flips.gained]),
        ],
        "notes": task.notes,
    }


def flip_texts(flip: Flip) -> dict[str, str]:
    """A document with both answers."""
    return {
        "name": f"{flip.task}, document {flip.doc_id}",
        "prompt": flip.prompt,
        "target": flip.target,
        "first": flip.first_answer.strip() or "(nothing)",
        "second": flip.second_answer.strip() or "(nothing)",
        "first_confidence": sure(flip.first_confidence),
        "second_confidence": sure(flip.second_confidence),
    }


def sure(confidence: float | None) -> str:
    """A confidence in percent, or empty."""
    return "" if confidence is None else f"{number(100 * confidence, 1)}\N{NO-BREAK SPACE}%"


def meaning(comparison: Comparison) -> list[str]:
    """What the numbers speak of, and what not."""
    if comparison.kind == "methods":
        return [
            "The sample is the training seeds, paired: mean, interval and test are Student's t over the differences "
            "of the seeds. They speak of the two methods as trained by these recipes on these data, measured on these "
            "documents.",
            "Intervals are not adjusted; p-values of the family are adjusted by Holm, all others are exploratory and "
            "unadjusted.",
        ]
    if comparison.kind == "mask seeds":
        return [
            "The adapter and the documents are the same, only the masks are drawn anew: this is the ensemble's own "
            "noise. A difference of this size between two ensembles may be nothing but the masks. It says nothing of "
            "other training seeds or other documents.",
        ]
    return [
        "These numbers speak of two adapters (or two uses of one), as they were trained. They do not speak of the "
        "methods that made them: a method's next training run may come out elsewhere. To compare methods, train five "
        "or more paired seeds of each (launch/compare.py --help).",
        "Both runs answered the same documents, and the tests are paired. Intervals are 95 % and not adjusted; "
        "p-values of the family are adjusted by Holm; all other metrics are exploratory and unadjusted. Expected "
        "calibration errors are not compared: they are biased, each by another amount. NLL, Brier score and NLL after "
        "each run's own temperature say it better.",
    ]
