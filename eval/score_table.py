"""The scores of one evaluation on the terminal; the report says more."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from eval.scores import SYSTEMS, ScoreRow, score_rows, score_text


def score_table(results: Mapping[str, Any]) -> Table:
    """One row per task and metric, a column per system: the value ± one standard error. Groups without their parts.

    Args:
        results: the content of ``results.json``.
    """
    systems = [system for system in SYSTEMS if system in results["lora_dropout"]["systems"]]
    table = Table(box=None, pad_edge=False, caption="± is one standard error over documents", caption_justify="left")
    table.add_column("task", overflow="fold")
    table.add_column("metric", overflow="fold")
    for name in ("n", *systems):
        table.add_column(name, justify="right", no_wrap=True)
    for row in score_rows(results):
        if not row.subtask:
            cells = [row.task, _metric(row), "" if row.documents is None else str(row.documents)]
            scores = [score_text(row.scores[s], row.percent, unit=False) if s in row.scores else "" for s in systems]
            table.add_row(*(Text(cell) for cell in cells + scores))
    return table


def _metric(row: ScoreRow) -> str:
    """Its name, unit, and the direction that is better."""
    direction = {True: " ↑", False: " ↓", None: ""}[row.higher_is_better]
    return row.metric + (", %" if row.percent else "") + direction
