"""Evaluate an adapter with lm-eval: the base, the adapter, and its ensemble over masks.

python    launch/evaluate.py recipes/alpaca.yaml [key=value ...] [--adapter FOLDER]
deepspeed launch/evaluate.py recipes/alpaca.yaml [key=value ...]     several processes share the requests
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

sys.path[0] = str(Path(__file__).resolve().parents[1])  # python puts launch/ first, where evaluate.py shadows a package

import typer

from launch.command import run_command


def evaluate(
    recipe_file: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe, e.g. recipes/alpaca.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE ...]", help="e.g. eval.ensemble.instances=4")
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(help="Folder of the adapter; the recipe's own training run by default.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Results go to OUTPUT/<name>/<time>.")] = Path("eval/outputs"),
    local_rank: Annotated[int, typer.Option("--local_rank", "--local-rank", hidden=True)] = 0,
) -> None:
    """Evaluate the adapter that RECIPE trained on the recipe's tasks, and write a report."""
    from pipeline.process.environment import prepare_environment

    prepare_environment()
    from pipeline.process.rank import world_size
    from pipeline.process.rendezvous import check_port
    from pipeline.recipe import load_recipe

    recipe = load_recipe(recipe_file, overrides or [])
    if world_size() > 1:  # one process meets nobody, whatever launched it
        check_port()
    from eval.run import evaluate as run  # takes seconds to import: after the recipe's mistakes are told
    from pipeline.run.folder import run_folder

    run(recipe, adapter or run_folder(recipe), output)


if __name__ == "__main__":
    run_command(evaluate, watched=True)
