"""Which sampling of masks gives the quieter gradient here: measured on a recipe's base and rows.

python launch/noise.py recipes/sampling/sampling.yaml --adapter outputs/run/checkpoints/checkpoint-60
python launch/noise.py outputs/run/recipe.yaml --adapter outputs/run --json noise.json --plot noise.svg
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

sys.path[0] = str(Path(__file__).resolve().parents[1])  # python puts launch/ first, where evaluate.py shadows a package

import typer

from launch.command import run_command
from pipeline.screen import PICTURES, check_output_file, progress


def noise(
    recipe_file: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe, or the recipe.yaml of a run.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE ...]", help="e.g. adapter.dropout.rate=0.3")
    ] = None,
    adapter: Annotated[
        Path | None,
        typer.Option(help="Run or checkpoint folder with the weights at which to measure; else as initialised."),
    ] = None,
    examples: Annotated[int, typer.Option(min=2, help="Examples B of a step.")] = 8,
    repeats: Annotated[int, typer.Option(min=3, help="Steps drawn for each direct measurement.")] = 32,
    grids: Annotated[int, typer.Option(min=2, help="Independent grids of examples and masks.")] = 8,
    grid_examples: Annotated[int, typer.Option(min=2, help="Examples of each grid.")] = 32,
    grid_masks: Annotated[int, typer.Option(min=2, help="Masks of each grid.")] = 8,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all numbers here.")] = None,
    plot_file: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw them: .svg, .png or .pdf.")
    ] = None,
) -> None:
    """Measure the variance components of RECIPE's gradient, and the noise of each way to sample masks."""
    check_output_file("--json", json_file)
    check_output_file("--plot", plot_file, PICTURES)
    from pipeline.process.environment import prepare_environment

    prepare_environment()
    from pipeline.recipe import load_recipe

    recipe = load_recipe(recipe_file, overrides or [])

    from rich.console import Console
    from transformers.utils.logging import disable_progress_bar

    from pipeline.noise.report import plot, print_noise
    from pipeline.noise.run import Effort, measure_noise

    effort = Effort(grids, grid_examples, grid_masks, examples, repeats)
    disable_progress_bar()
    with progress(Console(stderr=True)) as tell:
        found = measure_noise(recipe, adapter, effort, tell)
    print_noise(found, Console(width=max(Console().width, 100), soft_wrap=True))  # no table breaks its cells
    if json_file:
        json_file.write_text(json.dumps(found.to_json(), indent=1, allow_nan=False) + "\n")
    if plot_file:
        plot(found, plot_file)


if __name__ == "__main__":
    run_command(noise)
