"""How runs are doing, from the status files that they write.

python launch/status.py outputs/alpaca [outputs/other ...] [--ranks] [--watch] [--json]

Exit status, for a queue script: 0 all finished; 3 none needs anything, but not all have finished; 75 one was stopped by
a signal, or shows no sign of life: its own command, started again, goes on; 1 one failed: read its message;
2 a folder holds no status. Where several apply, the first of 2, 1, 75, 3.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

sys.path[0] = str(Path(__file__).resolve().parents[1])  # python puts launch/ first, where evaluate.py shadows a package

import typer

from launch.command import run_command


def status(
    folders: Annotated[list[Path], typer.Argument(metavar="FOLDER ...", help="Of runs, e.g. outputs/alpaca.")],
    ranks: Annotated[bool, typer.Option("--ranks", help="A line for each process, too: what it is doing.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Show again every few seconds until no run is left.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
    every: Annotated[float, typer.Option(help="Seconds between two looks of --watch.", min=0.1)] = 5.0,
) -> None:
    """Show how runs are doing: step, loss, speed, time left, last checkpoint, last sign of life."""
    from pipeline.errors import UserError
    from pipeline.observation.show import exit_status, show_once, watched

    if watch and as_json:
        raise UserError("--watch shows a table, and --json prints once: leave one of them out")
    runs = watched(folders, ranks, every) if watch else show_once(folders, ranks, as_json)
    sys.exit(exit_status(runs))


if __name__ == "__main__":
    run_command(status)
