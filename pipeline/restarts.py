"""A job that SLURM starts again and again must get on in between: a broken one would go round for ever."""

from __future__ import annotations

import json
import os
from pathlib import Path

from pipeline.checkpoint.files import listed_checkpoints
from pipeline.errors import UserError
from pipeline.json_file import write_json
from pipeline.processes import is_main
from pipeline.recipe import Recipe
from pipeline.run_folder import run_folder

FRUITLESS_STARTS = 3
"""In a row, by SLURM, after which a job ends. One may be stopped before its first step, or twice."""


def check_restarts(recipe: Recipe, evaluations: Path) -> None:
    """Refuse another start after three in a row that left neither a newer checkpoint nor a new answer.

    Only what SLURM starts again is counted; a person may try as often as they like.

    Args:
        recipe: resolved.
        evaluations: folder under which the recipe's evaluations lie.

    Raises:
        UserError: nothing was gained.
    """
    restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    if not is_main() or restarts == 0:
        return
    folder = run_folder(recipe)
    file = folder.parent / f".{folder.name}.restarts.json"
    job, reached = os.environ["SLURM_JOB_ID"], _reached(folder, evaluations / recipe.name)
    before = json.loads(file.read_text()) if file.exists() else {}
    gained = before.get("job") != job or before["reached"] != reached
    fruitless = 0 if gained else before["fruitless"] + 1
    if fruitless >= FRUITLESS_STARTS:
        raise UserError(
            f"{folder}: job {job} was started again {fruitless} times and left nothing newer than {_in_words(reached)}.\n"
            "Look into the log for what stops it: a time limit too short for the start and a step, or preemption. "
            "The same command, submitted anew, goes on."
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {"job": job, "reached": reached, "fruitless": fruitless})


def _reached(folder: Path, evaluations: Path) -> list[int]:
    """How far a run is: step of its newest checkpoint (-1: none), files of the adapter, bytes of kept answers."""
    steps = [checkpoint.step for checkpoint in listed_checkpoints(folder / "checkpoints")]
    answers = sum(file.stat().st_size for file in (evaluations / "answers").glob("**/*") if file.is_file())
    return [max(steps, default=-1), len(list(folder.glob("adapter_model.safetensors"))), answers]


def _in_words(reached: list[int]) -> str:
    step, finished, answers = reached
    if finished:
        return f"the adapter and {answers:,} bytes of answers"
    return "its recipe" if step < 0 else f"the checkpoint of step {step}"
