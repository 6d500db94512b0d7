"""``launch/status.py``: runs as a table or as JSON, from their ``status.json`` and the heartbeats of their ranks."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pipeline.observation.status import STATUS_FILE, Status, age_seconds, read_status, sign_of_life
from pipeline.run.lock import was_killed

FINISHED, FAILED, NO_STATUS, RUNS, RESUMABLE = 0, 1, 2, 3, 75
"""Exit statuses of launch/status.py, which says what they mean."""

OF_A_RUN = ("identity.json", "recipe.yaml", STATUS_FILE)
"""What a run writes first: pipeline/run/folder.py, whose imports take seconds."""

WIDTH = 200
"""Columns where there is no terminal, which would have a width of its own."""

COLOURS = {"finished": "green", "failed": "red", "stopped": "yellow", "lost": "red", "none": "red", "running": "cyan"}


@dataclass(frozen=True)
class Run:
    """What is known of the run in a folder."""

    folder: Path
    status: Status | None
    heartbeats: list[dict[str, Any]]
    """Of its ranks, as they wrote them last."""

    @property
    def state(self) -> str:
        """The status's own, or "lost" where it says "running" but was killed, or nothing was heard since, or "none"."""
        if self.status is None:
            return "none"
        killed = self.status.state == "running" and self.status.phase != "evaluating" and was_killed(self.folder)
        return "lost" if killed or not sign_of_life(self.status) else self.status.state


def read_run(folder: Path) -> Run:
    """Of the run in this folder."""
    heartbeats = [_read_json(file) for file in (folder / "ranks").glob("rank-*.json")]
    return Run(folder, read_status(folder), sorted((h for h in heartbeats if h), key=lambda found: found["rank"]))


def _read_json(file: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("rank"), int) else None


def run_folders(folders: Sequence[Path]) -> Sequence[Path]:
    """Of several folders, those that are a run's or are not there yet: ``outputs/*`` has logs of SLURM jobs, too."""
    runs = [folder for folder in folders if not folder.is_dir() or any((folder / file).exists() for file in OF_A_RUN)]
    return runs if len(folders) > 1 and runs else folders


def exit_status(runs: Sequence[Run]) -> int:
    """For a queue script: see launch/status.py."""
    of_state = {"none": NO_STATUS, "failed": FAILED, "stopped": RESUMABLE, "lost": RESUMABLE, "running": RUNS}
    found = {of_state.get(run.state, FINISHED) for run in runs}
    return next((status for status in (NO_STATUS, FAILED, RESUMABLE, RUNS) if status in found), FINISHED)


def show_once(folders: Sequence[Path], ranks: bool, as_json: bool) -> list[Run]:
    """Print the runs, and return them."""
    runs = [read_run(folder) for folder in run_folders(folders)]
    if as_json:
        print(json.dumps([described(run, ranks) for run in runs], indent=2))
    else:
        console = Console()
        console = console if console.is_terminal else Console(width=WIDTH)
        console.print(shown(runs, ranks))
    return runs


def watched(folders: Sequence[Path], ranks: bool, every: float) -> list[Run]:
    """Show the runs until none of them runs or is still to begin; returns what they were at the last look."""
    with Live(auto_refresh=False) as live:
        while True:
            runs = [read_run(folder) for folder in run_folders(folders)]
            live.update(shown(runs, ranks), refresh=True)
            if not any(run.state in ("running", "none") for run in runs):
                return runs
            time.sleep(every)


def described(run: Run, ranks: bool) -> dict[str, Any]:
    """For JSON: the status as it is, where it lies, how old it is, and what that makes of it."""
    status = run.status
    return {
        "folder": str(run.folder),
        "verdict": run.state,
        "age_seconds": None if status is None else age_seconds(status),
        **({} if status is None else asdict(status)),
        **({"heartbeats": run.heartbeats} if ranks else {}),
    }


def shown(runs: Sequence[Run], ranks: bool) -> Group:
    """A table of runs, what went wrong below it, and one of their ranks."""
    table = _table("run", "state", "step", "loss", "tokens/s", "left", "saved", "host", "sign of life")
    for run in runs:
        table.add_row(*_row(run))
    notes = [Text(f"{run.folder.name}: {note}") for run in runs for note in [_note(run)] if note]
    return Group(table, *notes, *([_rank_table(runs)] if ranks else []))


def _table(*headers: str) -> Table:
    table = Table(box=SIMPLE, pad_edge=False)
    for header in headers:
        table.add_column(header, no_wrap=header != headers[-1])
    return table


def _row(run: Run) -> list[Text]:
    status = run.status
    state = Text(run.state if status is None else _state_in_words(run, status), style=COLOURS[run.state])
    if status is None:
        return [Text(run.folder.name), state]
    loss = f"{status.loss:.4f}" if isinstance(status.loss, float) else status.loss or ""
    return [
        Text(run.folder.name),
        state,
        Text(f"{status.step}/{status.steps}" if status.steps else ""),
        Text(loss),
        Text(f"{status.tokens_per_second:,.0f}" if status.tokens_per_second is not None else ""),
        Text(duration(status.seconds_left) if status.seconds_left is not None and run.state == "running" else ""),
        Text(Path(status.last_checkpoint).name.removeprefix("checkpoint-") if status.last_checkpoint else ""),
        Text(status.host),
        Text(f"{duration(age_seconds(status))} ago"),
    ]


def _state_in_words(run: Run, status: Status) -> str:
    if run.state != "running":
        return run.state
    if status.task is not None:
        return f"{status.phase}: {status.task}" + (f" {status.share:.0%}" if status.share is not None else "")
    return status.phase


def _note(run: Run) -> str | None:
    """What a person should know of a run that does not run."""
    status = run.status
    if status is None:
        return f"{run.folder / STATUS_FILE} is not there or cannot be read; a run writes it once its folder is made"
    if run.state == "lost":
        return (
            f"no sign of life since {status.updated} (process {status.pid} on {status.host}); if that process is gone, "
            "the same command goes on from the last checkpoint"
        )
    if run.state in ("failed", "stopped"):
        why = status.message or "see its log"
        return f"exit status {status.exit_status}: {why}"
    return None


def _rank_table(runs: Sequence[Run]) -> Table:
    table = _table("run", "rank", "host", "process", "phase", "step", "for", "sign of life", "in the call")
    for run in runs:
        for found in run.heartbeats[: run.status.ranks if run.status else None]:  # an earlier attempt may have had more
            cells = [str(found.get(key, "")) for key in ("rank", "host", "pid", "phase", "step")]
            idle, told = found.get("idle_seconds"), found.get("time")
            cells.append(duration(idle) if isinstance(idle, float) else "")
            cells.append(f"{duration(max(time.time() - told, 0.0))} ago" if isinstance(told, float) else "")
            cells.append("" if found.get("exit_status") is not None else str(found.get("call", "")))
            table.add_row(run.folder.name, *(Text(cell) for cell in cells))
    return table


def duration(seconds: float) -> str:
    """In two units: "45 s", "12 min 5 s", "3 h 20 min", "2 d 4 h"."""
    whole = round(seconds)
    for size, unit, smaller, smaller_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // smaller} {smaller_unit}"
    return f"{whole} s"
