"""What LoRA Dropout costs, in time and memory, against plain LoRA: one table, all variants interleaved in one run.

python launch/benchmark.py recipes/pocket/pocket.yaml [key=value ...]          on the recipe's own base and rows
python launch/benchmark.py --shape llama2-7b --layers 4 [key=value ...]        random base of that size, no download
python launch/benchmark.py --level layer --shape llama2-7b --tokens 512        one linear layer of it
python launch/benchmark.py --level evaluation --shape width-1024 --layers 4    scoring and decoding, against lm-eval
python launch/benchmark.py --level checkpoint recipes/pocket/pocket.yaml       checkpoints, heartbeat and logs
python launch/benchmark.py --level traffic --shape llama2-7b --processes 4     bytes that ranks exchange, counted

Settings come from the recipe, by default recipes/alpaca.yaml. The variants share one frozen base; each has an adapter
and an optimizer of its own.

On a GPU, by estimate (unmeasured so far, for want of one): 12 s per round at 300 TFLOP/s and 16 GiB, then 10 GiB.
python launch/benchmark.py --shape llama2-7b --tokens 512 --json cost.json --plot cost.svg
python launch/benchmark.py --shape llama2-7b --tokens 512 --variants lora-dropout,example,instance-4
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Literal

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[0] = str(REPOSITORY)  # python puts launch/ first, where evaluate.py shadows a package

import typer

from launch.command import run_command
from pipeline.benchmark.variants import DEFAULT_VARIANTS
from pipeline.errors import UserError
from pipeline.screen import PICTURES, check_output_file, progress


def recipe_and_overrides(words: list[str], shape: str | None) -> tuple[Path, list[str]]:
    """Split the command line's words; with a shape the recipe may be left out.

    Raises:
        UserError: no recipe and no shape, or two recipes.
    """
    files = [word for word in words if "=" not in word]
    if len(files) > 1:
        raise UserError(f"expected one recipe, found {', '.join(files)}; settings are key=value")
    if not files and shape is None:
        raise UserError("expected a recipe, or --shape for a random base, e.g. --shape llama2-7b")
    return Path(files[0]) if files else REPOSITORY / "recipes/alpaca.yaml", [word for word in words if "=" in word]


def check_level(level: str, shape: str | None, plot: Path | None, variants: str) -> None:
    """Refuse options that the levels besides training steps have not.

    Raises:
        UserError: names the option.
    """
    if level == "evaluation" and shape is None:
        raise UserError("--level evaluation: measures a random base; give its --shape, e.g. --shape width-1024")
    if plot is not None:
        raise UserError(f"--plot: --level {level} draws none; leave it out, --json has the numbers")
    if variants != DEFAULT_VARIANTS:
        raise UserError(f"--variants: are of training steps; --level {level} has its own, leave the option out")


def benchmark(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RECIPE] [KEY=VALUE ...]", help="e.g. training.per_device_train_batch_size=8"),
    ] = None,
    shape: Annotated[str | None, typer.Option(help="Random base of this shape, e.g. llama2-7b, in nf4.")] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Decoder layers of the shape; all by default.")] = None,
    tokens: Annotated[
        int | None,
        typer.Option(min=2, help="Random tokens per row. Default: the recipe's rows; its longest, if random."),
    ] = None,
    level: Annotated[
        Literal["model", "layer", "evaluation", "checkpoint", "traffic"],
        typer.Option(
            help="Training steps, one linear layer, evaluation with an ensemble, checkpoints and logs, bytes."
        ),
    ] = "model",
    processes: Annotated[int, typer.Option(min=2, help="Ranks of --level traffic.")] = 2,
    variants: Annotated[
        str, typer.Option(help="lora, lora-dropout, example[-N], instance-N[-sequential].")
    ] = DEFAULT_VARIANTS,
    rounds: Annotated[int, typer.Option(min=2, help="Rounds; each runs every variant once.")] = 10,
    warmup: Annotated[int, typer.Option(min=2, help="Steps of each variant before.")] = 3,
    seed: Annotated[int, typer.Option(help="Of the order within rounds, and of random weights and tokens.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything there.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw it there: .svg, .png or .pdf.")] = None,
) -> None:
    """Time and memory of LoRA Dropout's variants on RECIPE's settings, as ratios to plain LoRA."""
    check_output_file("--json", json_file)
    check_output_file("--plot", plot, PICTURES)
    recipe_file, overrides = recipe_and_overrides(words or [], shape)
    from pipeline.process.environment import prepare_environment

    prepare_environment()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler announces itself
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # and warns of every tensor that is older than it
    from pipeline.recipe import load_recipe

    recipe = load_recipe(recipe_file, overrides)

    if level in ("evaluation", "checkpoint", "traffic"):
        check_level(level, shape, plot, variants)
    if level == "evaluation":
        from eval.benchmark import benchmark as run_evaluation
        from eval.benchmark import print_result as print_evaluation

    from rich.console import Console
    from transformers.utils.logging import disable_progress_bar

    from pipeline.benchmark.run import Settings
    from pipeline.benchmark.run import benchmark as run
    from pipeline.benchmark.show import draw, print_result
    from pipeline.run.whole_file import write_json

    disable_progress_bar()
    if level == "evaluation":
        assert shape is not None
        with progress(Console(stderr=True)) as tell:
            found = run_evaluation(recipe, shape, layers, tokens, rounds, warmup, seed, tell)
        print_evaluation(found)
        if json_file is not None:
            write_json(json_file, found)
        return
    if level == "checkpoint":
        from pipeline.benchmark.saving import benchmark as run_saving
        from pipeline.benchmark.saving import print_result as print_saving

        with progress(Console(stderr=True)) as tell:
            found = run_saving(recipe_file, overrides, recipe, shape or "llama2-7b", rounds, tell)
        print_saving(found)
        if json_file is not None:
            write_json(json_file, found)
        return
    if level == "traffic":
        from pipeline.benchmark.traffic import benchmark as run_traffic
        from pipeline.benchmark.traffic import print_result as print_traffic

        with progress(Console(stderr=True)) as tell:
            found = run_traffic(shape or "llama2-7b", layers, processes, tell)
        print_traffic(found)
        if json_file is not None:
            write_json(json_file, found)
        return
    settings = Settings(variants, shape, layers, tokens, level == "layer", rounds, warmup, seed)
    with progress(Console(stderr=True)) as tell:
        result = run(recipe, settings, tell)
    print_result(result)
    if json_file is not None:
        write_json(json_file, result.as_dict())
    if plot is not None:
        draw(result, plot)


if __name__ == "__main__":
    run_command(benchmark)
