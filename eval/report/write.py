"""Writes the report beside ``results.json``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eval.report.context import report_context
from eval.report.mistakes import CUTS, MOST_BYTES, cut_note, shown_mistakes
from eval.report.page import TEMPLATES, render
from eval.report.read import read_results
from eval.report.svg import write_pictures


def write_report(folder: Path) -> None:
    """Writes ``report.md``, ``report.html`` and the pictures in ``plots/`` beside ``results.json``.

    Where the page would exceed 10 MB, the texts of mistakes are cut, and it says so.
    """
    context = report_context(read_results(folder))
    for number, (most, characters) in enumerate(CUTS):
        shown = cut_context(context, most, characters, said=number > 0)
        page = render(TEMPLATES / "report.html.j2", shown)
        if len(page.encode()) <= MOST_BYTES:
            break
    (folder / "report.html").write_text(page, encoding="utf-8", newline="\n")
    (folder / "report.md").write_text(render(TEMPLATES / "report.md.j2", shown), encoding="utf-8", newline="\n")
    write_pictures(context["pictures"], folder / "plots")


def cut_context(context: Mapping[str, Any], most: int, characters: int, said: bool) -> dict[str, Any]:
    """The context with this many mistakes per task, of this many characters per text."""
    mistakes = {section.name: shown_mistakes(section.mistakes, most, characters) for section in context["sections"]}
    return {
        **context,
        "mistakes": mistakes,
        "notes": context["notes"] + ([cut_note(most, characters)] if said else []),
    }
