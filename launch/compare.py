"""Compare evaluations, document by document: which is better, by how much, and is that more than chance?

python launch/compare.py RUN_A RUN_B [RUN_C ...]             two adapters (or systems: RUN:system)
python launch/compare.py --method NAME=RUN ... (repeated)    two methods, over five or more paired training seeds
python launch/compare.py --mask-seeds RUN RUN RUN [...]      one ensemble's own noise, over three or more mask seeds

A RUN is a folder of eval/outputs, e.g. eval/outputs/pocket/latest, or eval/outputs/pocket/latest:deterministic.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

sys.path[0] = str(Path(__file__).resolve().parents[1])  # python puts launch/ first, where evaluate.py shadows a package

import typer

from launch.command import run_command
from pipeline.errors import UserError


def compare(
    runs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RUN ...]",
            help="Two or more, e.g. eval/outputs/pocket/latest[:system]. Differences are later minus earlier.",
        ),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=RUN",
            help="A run of a method, repeated for each training seed; RUN may have wildcards, in quotes.",
        ),
    ] = None,
    mask_seeds: Annotated[
        bool, typer.Option("--mask-seeds", help="The runs differ in eval.ensemble.seed only: the ensemble's noise.")
    ] = False,
    task: Annotated[list[str] | None, typer.Option(help="Compare this task only; repeat for more.")] = None,
    primary: Annotated[
        list[str] | None, typer.Option(metavar="TASK=METRIC", help="Test this metric instead of the task's own.")
    ] = None,
    discordance: Annotated[
        float | None,
        typer.Option(
            min=1e-6,
            max=1.0,
            help="Share of documents, known beforehand, that one run alone answers right.",
        ),
    ] = None,
    pilot: Annotated[
        tuple[str, str] | None, typer.Option(metavar="RUN RUN", help="Earlier runs to take the discordance from.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the results; eval/outputs/comparisons/<names>-<time> by default.")
    ] = None,
) -> None:
    """Compare evaluations on the same documents: tests, intervals, answers that changed, and a report."""
    from eval.compare.run import Declared, compare_adapters, compare_masks, compare_methods  # takes seconds to import

    declared = Declared(task or [], primary or [], discordance, pilot)
    if method and (runs or mask_seeds):
        raise UserError("--method names its runs itself: neither further runs nor --mask-seeds go with it")
    if method:
        compare_methods(method, declared, output)
    elif mask_seeds:
        compare_masks(runs or [], declared, output)
    else:
        compare_adapters(runs or [], declared, output)


if __name__ == "__main__":
    run_command(compare)
