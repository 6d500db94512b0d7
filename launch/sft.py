"""Train an adapter from a recipe, then evaluate it.

deepspeed launch/sft.py recipes/alpaca.yaml [key=value ...]
python    launch/sft.py recipes/alpaca.yaml [key=value ...]     one process, no DeepSpeed
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

sys.path[0] = str(Path(__file__).resolve().parents[1])  # python puts launch/ first, where evaluate.py shadows a package

import typer

from launch.command import run_command


def sft(
    recipe_file: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe, e.g. recipes/alpaca.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE ...]", help="e.g. adapter.dropout.rate=0.3")
    ] = None,
    evaluation: Annotated[bool, typer.Option("--eval/--no-eval", help="Run the recipe's evaluation stage.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete the run of the same name first.")] = False,
    local_rank: Annotated[int, typer.Option("--local_rank", "--local-rank", hidden=True)] = 0,
) -> None:
    """Train the adapter that RECIPE describes, then evaluate it."""
    from pipeline.process.environment import prepare_environment

    prepare_environment()
    from pipeline.process.rendezvous import check_port
    from pipeline.recipe import load_recipe

    recipe = load_recipe(recipe_file, overrides or [])
    check_port()
    if evaluation and recipe.eval.tasks:
        from eval.adapters import check_deep_ensemble  # imports take seconds: after the recipe's mistakes are told
        from eval.tasks import check_tasks

        check_tasks(recipe)
        check_deep_ensemble(recipe, adapter=None)
    from pipeline.process.rank import is_main
    from pipeline.train import train

    evaluates = evaluation and bool(recipe.eval.tasks)
    if evaluation and not evaluates and is_main():
        print("no evaluation follows the training: eval.tasks is empty")
    folder = train(recipe, overwrite=overwrite, evaluated=evaluates)
    if evaluates:
        from eval.run import evaluate

        evaluate(recipe, folder)


if __name__ == "__main__":
    run_command(sft, watched=True)
