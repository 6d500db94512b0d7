"""A job that is stopped and goes back into the queue again and again must get on in between: else it would for ever."""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.checkpoint.files import listed_checkpoints
from pipeline.errors import UserError
from pipeline.run.whole_file import write_json

FRUITLESS_STOPS = 3
"""In a row, after which a job stays stopped. One may hit the start, or two."""


def check_gain(job: str, run: Path, evaluations: Path) -> None:
    """Refuse another start after three in a row that left neither a newer checkpoint nor a new answer.

    Called at each stop of a job that would go back into the queue; one that is submitted anew has a new number.

    Args:
        job: SLURM's number.
        run: folder of the training run.
        evaluations: folder of the run's evaluations.

    Raises:
        UserError: nothing was gained.
    """
    file = run.parent / f".{run.name}.restarts.json"
    reached = _reached(run, evaluations)
    before = json.loads(file.read_text()) if file.exists() else {}
    gained = before.get("job") != job or before["reached"] != reached
    fruitless = 0 if gained else before["fruitless"] + 1
    if fruitless >= FRUITLESS_STOPS:
        raise UserError(
            f"{run}: job {job} was started again {fruitless} times and left nothing newer than {_in_words(reached)}; "
            "it does not go back into the queue.\n"
            "See above what stops it: a time limit too short for the start and a step, or preemption. "
            "The same command, submitted anew, goes on."
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {"job": job, "reached": reached, "fruitless": fruitless})


def _reached(run: Path, evaluations: Path) -> list[int]:
    """How far a run is: step of its newest checkpoint (-1: none), files of the adapter, bytes of kept answers."""
    steps = [checkpoint.step for checkpoint in listed_checkpoints(run / "checkpoints")]
    answers = sum(file.stat().st_size for file in (evaluations / "answers").glob("**/*") if file.is_file())
    return [max(steps, default=-1), len(list(run.glob("adapter_model.safetensors"))), answers]


def _in_words(reached: list[int]) -> str:
    step, finished, answers = reached
    if finished:
        return f"the adapter and {answers:,} bytes of answers"
    return "its recipe" if step < 0 else f"the checkpoint of step {step}"
