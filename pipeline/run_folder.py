"""The folder of a training run, which is also the adapter's folder.

<output>/<name>/
    adapter_model.safetensors  adapter_config.json  lora_dropout.json   the adapter, in peft's own format
    recipe.yaml  provenance.json  README.md                             how it came to be
    history.jsonl  runs/                                                curves: ours, TensorBoard's
    checkpoints/
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.recipe import Recipe, recipe_to_yaml

HISTORY_FILE = "history.jsonl"
RECIPE_FILE = "recipe.yaml"
PROVENANCE_FILE = "provenance.json"


def run_folder(recipe: Recipe) -> Path:
    """Where a recipe's training run is written."""
    return Path(recipe.output).expanduser() / recipe.name


def check_writable(key: str, folder: Path) -> None:
    """Refuse a folder that could not be made, filled or replaced; tried with a file that is gone again.

    Args:
        key: option, or key of the recipe, that names it.
        folder: need not exist.

    Raises:
        UserError: names the folder that takes no file, and the system's reason.
    """
    asked = place = folder.absolute()
    try:
        while not place.exists():
            place = place.parent
        with tempfile.TemporaryFile(dir=place):
            pass
        if place == asked:
            place = asked.parent
            with tempfile.TemporaryFile(dir=place):
                pass
    except OSError as error:
        # /proc is there, but says that a file in it is not
        reason = "takes no files" if isinstance(error, FileNotFoundError) else error.strerror
        raise UserError(
            f"{key}: {folder} cannot be written: {place}: {reason}.\n"
            f"Choose a folder in which you may write, with another {key}."
        ) from error


def check_run_folder(recipe: Recipe, overwrite: bool) -> None:
    """Refuse a folder that holds something else, before any work.

    Args:
        recipe: whose folder it is.
        overwrite: another run there may be deleted.

    Raises:
        UserError: the folder cannot be written; it holds a run and ``overwrite`` is not set, or files that are no run.
    """
    folder = run_folder(recipe)
    check_writable("output", folder)
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise UserError(
            f"{folder}: already holds {_held(folder)}; it is never overwritten silently.\n"
            "Give this run another name (name=...) or place (output=...), or pass --overwrite to delete what is there."
        )
    if not (folder / RECIPE_FILE).exists():
        raise UserError(
            f"{folder}: --overwrite deletes runs only, and this folder has no {RECIPE_FILE}.\n"
            "Empty it yourself, or choose another name or output."
        )


def create_run_folder(recipe: Recipe) -> Path:
    """Delete what :func:`check_run_folder` allowed to delete, and start the folder with the resolved recipe."""
    folder = run_folder(recipe)
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (folder / RECIPE_FILE).write_text(recipe_to_yaml(recipe))
    return folder


def _held(folder: Path) -> str:
    if (folder / "adapter_model.safetensors").exists():
        return "a finished run"
    if (folder / RECIPE_FILE).exists():
        return "an unfinished run"
    return "files of something else"


def read_history(folder: Path) -> list[dict[str, Any]]:
    """The records of a run's log, oldest first; empty where the run logged nothing."""
    file = folder / HISTORY_FILE
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
