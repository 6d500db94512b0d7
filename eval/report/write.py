"""Writes the report beside ``results.json``."""

from __future__ import annotations

from pathlib import Path

from eval import scores
from eval.report.context import report_context
from eval.report.page import TEMPLATES, render
from eval.report.read import read_results


def write_report(folder: Path) -> None:
    """Writes ``report.md`` and ``report.html`` beside ``results.json``."""
    context = report_context(read_results(folder))
    filters = {"score": scores.score_text, "interval": scores.interval_text}
    for name in ("report.html", "report.md"):
        text = render(TEMPLATES / f"{name}.j2", context, filters)
        (folder / name).write_text(text, encoding="utf-8", newline="\n")
