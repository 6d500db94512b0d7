"""A comparison on the terminal; the files say more."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from eval.compare.schema import Comparison, RunFacts
from eval.compare.words import NOISE_TITLES, Row, detectable_table, family_rows, noise_texts

MOST_NOISE = 5
"""Columns of the noise that fit on 80 characters."""
FIRST_COLUMN = 20
"""Characters of a task's name that do not fold."""
DETECTABLE = "Detectable with 80 % power, known beforehand:"


def show(comparison: Comparison, console: Console) -> None:
    """Which runs, the verdict, the family of tests, and what could have been seen."""
    console.print(terminal(comparison))


def terminal(comparison: Comparison) -> RenderableType:
    """What is shown."""
    parts: list[RenderableType] = [methods_table(comparison) if comparison.methods else runs_table(comparison.runs)]
    parts += [Text(f"Note: {note}", style="yellow") for note in comparison.notes]
    parts += [Text(""), *(Text(sentence) for sentence in comparison.verdict[: 1 if comparison.family else None])]
    rows = family_rows(comparison)
    for pair in dict.fromkeys(row.pair for row in rows):
        of_pair = [row for row in rows if row.pair == pair]
        metrics = {row.metric for row in of_pair}
        title = f"{pair}, {of_pair[0].metric}" if len(metrics) == 1 else pair
        parts += [Text(""), Text(title, style="bold"), differences_table(of_pair, with_metric=len(metrics) > 1)]
    if comparison.family:
        parts.append(Text(f"Family: {comparison.family.rule}", style="dim"))
    noise = [noise_texts(one)[:MOST_NOISE] for one in comparison.mask_noise if one.in_family]
    if noise:
        parts += [Text(""), plain_table(NOISE_TITLES[:MOST_NOISE], noise, left=2)]
    if comparison.detectable:
        parts += [Text(""), Text(DETECTABLE), plain_table(*detectable_table(comparison.detectable), left=1)]
    return Group(*parts)


def runs_table(runs: Sequence[RunFacts]) -> Table:
    """Label, folder, and how the system was chosen."""
    rows = [(run.label, near(run.folder), run.system_taken) for run in runs]
    return plain_table(("run", "folder", "system taken"), rows, left=3)


def methods_table(comparison: Comparison) -> Table:
    """Each method with its training seeds."""
    by_label = {run.label: run for run in comparison.runs}
    rows = []
    for method, labels in comparison.methods.items():
        runs = [by_label[label] for label in labels]
        seeds = ", ".join(str(run.training_seed) for run in runs)
        rows.append((method, f"{runs[0].system} ({runs[0].system_taken})", seeds))
    return plain_table(("method", "system", "training seeds"), rows, left=3)


def near(folder: str) -> str:
    """Relative to the working directory, where it is below."""
    path = Path(folder)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else folder


def differences_table(rows: Sequence[Row], with_metric: bool) -> Table:
    """The tested differences of one pair; an asterisk marks those that hold. It has to fit on 80 characters."""
    heading = ("task", *(("metric",) if with_metric else ()), "first", "second", "change", "95 %", "p, Holm")
    cells = [
        (
            row.task,
            *((row.metric,) if with_metric else ()),
            row.first,
            row.second,
            row.difference,
            row.interval,
            row.adjusted + " *" * row.shown,
        )
        for row in rows
    ]
    return plain_table(heading, cells, left=1 + with_metric)


def plain_table(heading: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> Table:
    """A table without lines; the first columns are text and may fold, the others numbers."""
    table = Table(box=None, pad_edge=False)
    for place, name in enumerate(heading):
        widest = max(len(text) for text in (name, *(row[place] for row in rows)))
        table.add_column(
            name,
            justify="left" if place < left else "right",
            overflow="fold",
            no_wrap=place >= left,
            min_width=min(widest, FIRST_COLUMN) if place == 0 else None,
        )
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table
