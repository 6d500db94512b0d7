"""Every recipe that ships loads, says what it is for, and reads back equal once resolved."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.recipe import Recipe, load_recipe, recipe_to_yaml

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
# task files and generated data are YAML too, but no recipes
FILES = sorted([*RECIPES.glob("*.yaml"), *RECIPES.glob("*/*.yaml")])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(RECIPES).as_posix())
def test_recipe_loads_and_reads_back(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(recipe_to_yaml(recipe))
    assert load_recipe(resolved) == recipe


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(RECIPES).as_posix())
def test_header_says_how_to_launch_it(path: Path) -> None:
    header = "\n".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    assert f"launch/sft.py recipes/{path.relative_to(RECIPES).as_posix()}" in header
    for word in ("Hardware", "Batch", "Expected"):
        assert word.lower() in header.lower(), f"the header does not say: {word}"


def test_names_are_different() -> None:
    names = [load_recipe(path).name for path in FILES]
    assert len(set(names)) == len(names), "two recipes would write to one folder"


def test_alpaca_recipes_differ_in_the_regulariser_only() -> None:
    ours, plain = (load_recipe(RECIPES / name) for name in ("alpaca.yaml", "alpaca-lora.yaml"))
    assert (ours.adapter.dropout.rate, ours.adapter.dropout.instances) == (0.5, 4)
    assert (plain.adapter.dropout.rate, plain.adapter.dropout.instances) == (0.0, 1)
    assert "ensemble" in ours.eval.systems and (ours.eval.mode, plain.eval.mode) == ("auto", "fast"), "scored alike"

    def rest(recipe: Recipe) -> Recipe:
        adapter = recipe.adapter.model_copy(update={"dropout": None})
        section = recipe.eval.model_copy(update={"systems": [], "ensemble": None, "mode": "auto"})
        return recipe.model_copy(update={"name": "", "adapter": adapter, "eval": section})

    assert rest(ours) == rest(plain)


def test_alpaca_batch_arithmetic_in_the_header() -> None:
    from pipeline.preflight.numbers import batch_of

    run = batch_of(load_recipe(RECIPES / "alpaca.yaml"), rows=50_700, processes=1)
    header = (RECIPES / "alpaca.yaml").read_text()
    assert run.examples_per_step == 16
    assert "4 examples x 4 accumulation x 1 process = 16 examples per optimizer step" in header
    assert f"{round(run.steps_per_epoch, -1):,} steps per epoch, {round(run.steps, -2):,} in all" in header
    assert f"one batch of {run.rows_per_pass} rows" in header
