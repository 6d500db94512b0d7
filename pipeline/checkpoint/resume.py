"""Where a run begins: anew, from a checkpoint, or not at all because it has ended."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list

from pipeline.checkpoint.files import Checkpoint, clear_leftovers, listed_checkpoints, newest_whole, problem_of
from pipeline.checkpoint.identity import differences, identity_of
from pipeline.checkpoint.training_state import STATE_FILE, Progress, read_progress
from pipeline.data import Splits
from pipeline.errors import UserError
from pipeline.process.rank import is_main, world_size
from pipeline.recipe import Recipe
from pipeline.recipe.training import own_training, resolved_training
from pipeline.run.folder import (
    AUTO,
    CHECKPOINTS_FOLDER,
    IDENTITY_FILE,
    NEVER,
    has_finished,
    holds_run,
    run_folder,
)


@dataclass(frozen=True)
class Origin:
    """What a run is to go on from, before the bytes of its checkpoints have been looked at."""

    identity: dict[str, Any]
    """Of this run."""
    accumulation: int
    """Micro-batches of one rank in an optimizer step: the recipe's, or what keeps the rows per step on other ranks."""
    finished: bool = False
    """The run folder holds the result already."""
    source: Path | None = None
    """A checkpoint, or a run's folder of checkpoints; None: the run begins anew."""
    progress: Progress | None = None
    """Of one of those checkpoints: what all of them share (ranks, rows per step, execution) holds."""

    @property
    def in_words(self) -> str:
        """What this process sees."""
        run = "a finished run" if self.finished else "no finished run"
        return f"{run}, {'no checkpoint' if self.progress is None else f'a checkpoint after step {self.progress.step}'}"


def origin_of(recipe: Recipe, splits: Splits, overwrite: bool) -> Origin:
    """What ``training.resume`` means here; from small files only, the same on every rank.

    Args:
        recipe: resolved.
        splits: of its data.
        overwrite: what is in the run's folder is to be deleted.

    Raises:
        UserError: what is there belongs to another experiment; nothing to go on from; the rows per step cannot be kept.
    """
    resume, folder = own_training(recipe)["resume"], run_folder(recipe)
    if resume == AUTO and overwrite:
        resume = NEVER
    training = resolved_training(recipe)
    accumulation, micro_batch = training["gradient_accumulation_steps"], training["per_device_train_batch_size"]
    source = _source(resume, folder)
    progress = None if source is None else _any_progress(source)
    if progress is not None:
        accumulation = _kept_accumulation(progress, micro_batch, accumulation)
    identity = identity_of(recipe, splits, accumulation * micro_batch * world_size())
    if resume == AUTO and holds_run(folder):
        _check_same(folder, folder, identity, ANEW)
        return Origin(identity, accumulation, has_finished(folder), source, progress)
    if resume in (AUTO, NEVER):
        return Origin(identity, accumulation)
    if progress is None:
        raise UserError(
            f"training.resume: {resume!r} holds no checkpoint that training can go on from (it needs {STATE_FILE}).\n"
            "Give a run's folder, or one of the folders checkpoint-<step> in its checkpoints/."
        )
    assert source is not None
    _check_same(source, _newest_listed(source).folder, identity, "or begin without training.resume.")
    return Origin(identity, accumulation, source=source, progress=progress)


def _source(resume: str, folder: Path) -> Path | None:
    """Where checkpoints are looked for."""
    if resume == NEVER:
        return None
    if resume == AUTO:
        return folder / CHECKPOINTS_FOLDER
    given = Path(os.path.expanduser(resume))
    return given / CHECKPOINTS_FOLDER if (given / CHECKPOINTS_FOLDER).is_dir() else given


def _newest_listed(source: Path) -> Checkpoint:
    """The newest checkpoint of a folder of them with a readable state, or the folder itself if it is one."""
    for checkpoint in listed_checkpoints(source):
        if _readable(checkpoint.folder) is not None:
            return checkpoint
    return Checkpoint(source, 0)


def _any_progress(source: Path) -> Progress | None:
    return _readable(_newest_listed(source).folder)


def _readable(checkpoint: Path) -> Progress | None:
    """A checkpoint's progress; None where the file is damaged or missing, of which the manifest tells later."""
    try:
        return read_progress(checkpoint)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _kept_accumulation(progress: Progress, micro_batch: int, accumulation: int) -> int:
    """Micro-batches per rank and step with which this many ranks see the rows per step that the checkpoint's did."""
    rows, ranks = progress.rows_per_step, world_size()
    if accumulation * micro_batch * ranks == rows:
        return accumulation
    if rows % (micro_batch * ranks) == 0 and ranks != progress.ranks:
        return rows // (micro_batch * ranks)
    fitting = [size for size in range(1, rows + 1) if rows % (size * ranks) == 0]
    advice = (
        "Set training.per_device_train_batch_size to "
        f"{' or '.join(str(size) for size in fitting[-4:])} and gradient_accumulation_steps to what is left of {rows}."
        if fitting
        else f"Start a number of processes that divides {rows}."
    )
    raise UserError(
        f"training: the checkpoint was trained with {rows} rows per optimizer step ({progress.ranks} process(es) x "
        f"{progress.micro_batch} rows x {progress.accumulation} accumulation), and here {ranks} x {micro_batch} x "
        f"{accumulation} make {ranks * micro_batch * accumulation}: another experiment.\n{advice}"
    )


ANEW = "or give this run another name (name=...); or pass --overwrite to delete what is there and begin anew."


def _check_same(place: Path, holder: Path, identity: dict[str, Any], otherwise: str) -> None:
    """Refuse what belongs to another experiment, and list how it differs.

    Args:
        place: as named in the message.
        holder: the folder with the identity's file.
        identity: of this run.
        otherwise: what to do but undo the changes.
    """
    try:
        saved = json.loads((holder / IDENTITY_FILE).read_bytes())
        if not isinstance(saved, dict):
            raise ValueError("expected an object")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{holder / IDENTITY_FILE}: cannot be read ({error}), so whether it is this experiment cannot be told.\n"
            "Give this run another name, or pass --overwrite to delete what is there."
        ) from error
    changed = differences(saved, identity)
    if changed:
        listed = "\n".join(f"  {line}" for line in changed)
        raise UserError(
            f"{place}: holds another experiment, in which this one cannot go on. It differs in\n{listed}\n"
            f"Undo these changes to go on; {otherwise}"
        )


def whole_checkpoint(origin: Origin) -> Path | None:
    """The newest checkpoint that is whole, found by rank 0 for all; None where the run begins anew.

    Says which are damaged. With a path in ``training.resume``, a damaged one is refused.

    Raises:
        UserError: on every rank.
    """
    found: list[Any] = [None, None]  # checkpoint, error
    if is_main() and origin.source is not None:
        try:
            found = list(_newest_of(origin.source))
        except OSError as failure:
            found = [None, f"{origin.source}: cannot be read: {failure}"]
    broadcast_object_list(found)
    checkpoint, error = found
    if error is not None:
        raise UserError(error)
    return None if checkpoint is None else Path(checkpoint)


def _newest_of(source: Path) -> tuple[str | None, str | None]:
    if (source / STATE_FILE).exists():
        problem = problem_of(source)
        error = f"training.resume: {source} is damaged: {problem}.\nTake an older checkpoint." if problem else None
        return str(source), error
    if source.is_dir():
        clear_leftovers(source)
    checkpoint, damaged = newest_whole(source)
    for line in damaged:
        print(f"warning: left aside, damaged: {line}")
    if checkpoint is None:
        listed = "\n".join(f"  {line}" for line in damaged)
        error = (
            f"{source}: none of the checkpoints is whole:\n{listed}\nThe disk, or a copy, may be at fault. Pass "
            "--overwrite to delete what is there and begin anew, or give this run another name (name=...)."
        )
        return None, error if damaged else None
    if (checkpoint.folder / STATE_FILE).exists() and _readable(checkpoint.folder) is None:
        return None, (
            f"{checkpoint.folder}: its files are whole, but {STATE_FILE} is not what this version writes.\n"
            "Go on with the version that wrote it (ranks/rank-0.jsonl names it), or begin anew with --overwrite."
        )
    if not (checkpoint.folder / STATE_FILE).exists():
        return None, (
            f"{checkpoint.folder}: holds the adapter only (training.save_only_model), from which training cannot go on."
            "\nGive this run another name (name=...), or pass --overwrite to delete what is there and begin anew."
        )
    return str(checkpoint.folder), None


def told(checkpoint: Path | None, now: Progress) -> str | None:
    """What goes on from where, and how exactly, in words; None where the run begins anew.

    Args:
        checkpoint: of :func:`whole_checkpoint`.
        now: of the trainer that goes on; its step and tokens do not count.
    """
    if checkpoint is None:
        return None
    before = read_progress(checkpoint)
    start = f"going on from {checkpoint} (step {before.step})"
    if replace(now, step=before.step, tokens=before.tokens) == before:
        return f"{start}, as if nothing had happened"
    return (
        f"{start} on {_shape(now)} in place of {_shape(before)}, with {before.rows_per_step} rows in each step as "
        "before: losses agree to rounding, not to the bit. Masks with sampling `example` are the same; those with "
        "`instance` are where number and size of the micro-batches stay. On another number of processes, other rows "
        "fill up the last step of an epoch that the rows of a step do not divide, and peft's own dropout and NEFTune "
        "draw anew."
    )


def _shape(progress: Progress) -> str:
    """What the bits of a sum depend on, in words."""
    return (
        f"{progress.ranks} process(es) x {progress.micro_batch} rows x {progress.accumulation} accumulation "
        f"({progress.execution}, ZeRO {progress.zero})"
    )
