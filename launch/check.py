"""Look at a recipe before any GPU does: labels, batches, memory, disk, the tasks of its evaluation.

python launch/check.py recipes/alpaca.yaml [key=value ...] [--processes 8]

Exit status: 0 ready, 2 something would stop or spoil the run.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

sys.path[0] = str(Path(__file__).resolve().parents[1])  # python puts launch/ first, where evaluate.py shadows a package

import typer

from launch.command import BAD_INPUT, run_command
from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.recipe import Recipe


def evaluation_errors(recipe: Recipe) -> list[str]:
    """What is wrong with the evaluation that follows the training; launch/sft.py would refuse it, too."""
    if not recipe.eval.tasks:
        return []
    from eval.adapters import check_deep_ensemble  # imports lm-eval, which takes seconds
    from eval.tasks import check_tasks

    try:
        check_tasks(recipe)
        check_deep_ensemble(recipe, adapter=None)
    except UserError as error:
        return [str(error)]
    return []


def check(
    recipe_file: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe, e.g. recipes/alpaca.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE ...]", help="e.g. adapter.dropout.rate=0.3")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows of each training source to tokenise.")] = 100,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Processes that training will be launched with; by default one per GPU.")
    ] = None,
    evaluation: Annotated[bool, typer.Option("--eval/--no-eval", help="Load the evaluation's tasks, too.")] = True,
    local_rank: Annotated[int, typer.Option("--local_rank", "--local-rank", hidden=True)] = 0,
) -> None:
    """Check RECIPE before training: one example with its labels, batch arithmetic, memory and disk estimates."""
    from pipeline.process.environment import prepare_environment

    prepare_environment()
    from pipeline.recipe import load_recipe

    recipe = load_recipe(recipe_file, overrides or [])

    import torch
    from rich.console import Console

    from pipeline.preflight.checks import examine
    from pipeline.preflight.text import print_findings

    findings = examine(recipe, rows, processes or max(torch.cuda.device_count(), 1))
    if evaluation:
        findings.errors += evaluation_errors(recipe)
    print_findings(findings, Console(soft_wrap=True))
    if findings.errors:
        sys.exit(BAD_INPUT)


if __name__ == "__main__":
    run_command(check)
