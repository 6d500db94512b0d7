"""The scores of one evaluation on the terminal; the report says more."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from eval.numbers import decimals, number
from eval.scores import CALIBRATION, SYSTEMS, Score, ScoreRow, ece_rows, read_analyses, score_rows, spread, value_text

COLUMNS = {"mc_dropout": "MC dropout", "deep_ensemble": "deep ens."}
"""Short names, where the key is not one."""
MOST_WITH_SPREADS = 3
"""Systems whose half intervals fit on 80 columns."""


def score_table(results: Mapping[str, Any]) -> Table:
    """For each task its own metrics, NLL and ECE, with a column per system. Groups without their parts.

    Args:
        results: the content of ``results.json``.
    """
    ours = results["lora_dropout"]
    systems = [system for system in SYSTEMS if system in ours["systems"]]
    spreads = len(systems) <= MOST_WITH_SPREADS
    table = Table(box=None, pad_edge=False, caption_justify="left")
    table.caption = "± is half of the 95 % interval over documents" if spreads else "intervals are in the report"
    table.add_column("task", overflow="fold")
    table.add_column("metric", overflow="fold")
    for name in ("n", *(COLUMNS.get(system, system) for system in systems)):
        table.add_column(name, justify="right", no_wrap=True)
    analyses = read_analyses(ours)
    rows = [row for row in score_rows(results, analyses) if not row.subtask and shown(row)]
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        cells = [cell(row.scores[s], row.percent, spreads) if s in row.scores else "" for s in systems]
        documents = "" if row.documents is None else str(row.documents)
        table.add_row(*(Text(text) for text in (row.task, metric(row), documents, *cells)))
        if following is None or following.task != row.task:
            for error in ece_rows(row.task, analyses)[:1]:
                values = [number(100 * error.errors[s].value, 1) if s in error.errors else "" for s in systems]
                table.add_row(*(Text(text) for text in (row.task, "ECE, % ↓", documents, *values)))
    return table


def shown(row: ScoreRow) -> bool:
    """The metrics of the task itself and its NLL."""
    return row.primary or row.key not in CALIBRATION[1:]


def cell(found: Score, percent: bool, with_spread: bool) -> str:
    """``71.2 ± 2.8``."""
    half = spread(found)
    text = value_text(found, percent, unit=False)
    if half is None or not with_spread:
        return text
    return f"{text} ± {number(half * (100 if percent else 1), decimals(found.value, half, percent))}"


def metric(row: ScoreRow) -> str:
    """Its name, unit, and the direction that is better."""
    direction = {True: " ↑", False: " ↓", None: ""}[row.higher_is_better]
    name = "NLL" if row.key == "nll" else row.metric
    return name + (", %" if row.percent else "") + direction
