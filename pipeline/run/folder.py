"""The folder of a training run, which is also the adapter's folder.

<output>/<name>/
    adapter_model.safetensors  adapter_config.json  lora_dropout.json   the adapter, in peft's own format
    recipe.yaml  provenance.json  README.md                             how it came to be
    history.jsonl  runs/                                                curves: ours, TensorBoard's
    checkpoints/                                                        see pipeline/checkpoint/
    identity.json                                                       what must not change while it goes on
    status.json  ranks/                                                 how it is doing
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

from pipeline.checkpoint.files import listed_checkpoints, remove
from pipeline.errors import UserError
from pipeline.recipe import Recipe, recipe_to_yaml
from pipeline.recipe.training import own_training
from pipeline.run.whole_file import write_json, write_text
from pipeline.supervision.ranks import BAD_STEPS_FILE, RANKS_FOLDER

AUTO, NEVER = "auto", "never"
"""Values of ``training.resume`` that are no path."""

HISTORY_FILE = "history.jsonl"
RECIPE_FILE = "recipe.yaml"
PROVENANCE_FILE = "provenance.json"
IDENTITY_FILE = "identity.json"
CHECKPOINTS_FOLDER = "checkpoints"
RUN_FILES = frozenset(
    (
        *("adapter_model.safetensors", "adapter_config.json", "lora_dropout.json"),
        *(RECIPE_FILE, PROVENANCE_FILE, IDENTITY_FILE, "README.md"),
        *(HISTORY_FILE, "runs", CHECKPOINTS_FOLDER, "status.json", RANKS_FOLDER),
    )
)
"""All that a run writes into its folder, and so all that may be deleted with it."""


def run_folder(recipe: Recipe) -> Path:
    """Where a recipe's training run is written."""
    return Path(os.path.expanduser(recipe.output)) / recipe.name


def check_writable(key: str, folder: Path) -> None:
    """Refuse a folder that could not be made, filled or replaced; tried with a file that is gone again.

    Args:
        key: option, or key of the recipe, that names it.
        folder: need not exist.

    Raises:
        UserError: names the folder that takes no file, and the system's reason.
    """
    asked = place = folder.absolute()
    if os.path.islink(folder) and not os.path.exists(folder):
        raise UserError(f"{key}: {folder} is a link to {os.readlink(folder)}, where nothing is.\nMake or mend it.")
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

    Whether a run that is there is this very one, and can go on, is looked at once the data is loaded: see
    :func:`pipeline.checkpoint.resume.origin_of`.

    Args:
        recipe: whose folder it is.
        overwrite: another run there may be deleted.

    Raises:
        UserError: the folder cannot be written; it holds a run and may neither go on nor be deleted, or files that are
            no run.
    """
    folder = run_folder(recipe)
    check_writable("output", folder)
    resume = own_training(recipe)["resume"]
    source = None if resume in (AUTO, NEVER) else Path(os.path.expanduser(resume))
    if source is not None and not source.is_dir():
        raise UserError(f"training.resume: found {resume!r}, which is no folder (looked from {Path.cwd()})")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if source is not None and (overwrite or holds_run(folder)) and source.resolve().is_relative_to(folder.resolve()):
        raise UserError(
            f"training.resume: {resume} lies in {folder}, the folder of this very run"
            f"{', which --overwrite would delete' if overwrite else ''}; from a path a run goes on in another folder.\n"
            "Give it another name (name=...). To go on from the newest checkpoint, leave training.resume out."
        )
    # a run that was killed while it began its folder may have no recipe in it
    if not any((folder / name).exists() for name in (RECIPE_FILE, IDENTITY_FILE, f"{IDENTITY_FILE}.part")):
        how = "--overwrite deletes runs only, and this folder has" if overwrite else "holds files of something else:"
        raise UserError(f"{folder}: {how} no {RECIPE_FILE}.\nEmpty it yourself, or choose another name or output.")
    if overwrite or not holds_run(folder):
        check_deletable(folder)
    if not overwrite and resume != AUTO and holds_run(folder):
        raise UserError(
            f"{folder}: already holds {'a finished' if has_finished(folder) else 'an unfinished'} run; it is never "
            "overwritten silently.\n"
            "Give this run another name (name=...) or place (output=...), pass --overwrite to delete what is there, or "
            "go on in it with training.resume=auto."
        )


def check_deletable(folder: Path) -> None:
    """Refuse a folder that is not a run's alone, before a run that begins anew deletes it.

    Raises:
        UserError: a link, whose target may be anything; files that no run wrote.
    """
    if folder.is_symlink():
        raise UserError(
            f"{folder}: is a link to {folder.resolve()}, and a run that begins anew deletes its folder.\n"
            "Name the folder itself with output and name, or empty it."
        )
    names = {entry.name for entry in folder.iterdir()} - RUN_FILES
    strangers = sorted(name for name in names if not _is_left_over(name))
    if not any((folder / name).exists() for name in (IDENTITY_FILE, f"{IDENTITY_FILE}.part", PROVENANCE_FILE)):
        strangers.append(f"a {RECIPE_FILE} without {IDENTITY_FILE}")
    if strangers:
        more = f" and {len(strangers) - 4} more" if len(strangers) > 4 else ""
        raise UserError(
            f"{folder}: holds {', '.join(strangers[:4])}{more}, which no run wrote, and a run that begins anew deletes "
            "its folder.\nMove it away, or choose another name or output."
        )


def _is_left_over(name: str) -> bool:
    """Whether an entry is what a killed process leaves of writing one of a run's files."""
    aside = name.endswith(".part") and name.removesuffix(".part") in RUN_FILES
    hidden = name.startswith(".") and any(name[1:].startswith(f"{file}.") for file in RUN_FILES)
    return aside or hidden or re.fullmatch(r"\.tmp\w{6}", name) is not None  # the last is safetensors'


def holds_run(folder: Path) -> bool:
    """Whether there is something that deleting would lose: an adapter, or a checkpoint."""
    checkpoints = folder / CHECKPOINTS_FOLDER
    return (folder / "adapter_model.safetensors").exists() or bool(listed_checkpoints(checkpoints))


def has_finished(folder: Path) -> bool:
    """Whether training came to its end there; what is written last says so."""
    file = folder / PROVENANCE_FILE
    try:
        return "finished" in json.loads(file.read_bytes())
    except (OSError, ValueError, TypeError):  # not there, or damaged: then its results are written once more
        return False


def create_run_folder(recipe: Recipe, identity: dict[str, Any], overwrite: bool = False) -> Path:
    """Delete what :func:`check_run_folder` allowed to delete, and start the folder with the resolved recipe.

    Args:
        recipe: whose folder it is.
        identity: see :func:`pipeline.checkpoint.identity.identity_of`.
        overwrite: as there. Without it, logs of attempts that ended before their first checkpoint stay.
    """
    folder = run_folder(recipe)
    if folder.exists() and any(folder.iterdir()):
        check_deletable(folder)
        if overwrite:
            remove(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / IDENTITY_FILE, identity)  # first: a folder with it is a run's
    write_text(folder / RECIPE_FILE, recipe_to_yaml(recipe))
    for entry in folder.iterdir():
        if entry.is_symlink() or entry.is_file():
            if entry.name not in (IDENTITY_FILE, RECIPE_FILE):
                entry.unlink()
        elif entry.name != RANKS_FOLDER:
            remove(entry)
    (folder / RANKS_FOLDER / BAD_STEPS_FILE).unlink(missing_ok=True)
    return folder


def continue_run_folder(recipe: Recipe, step: int) -> None:
    """Get a folder ready to go on after a step: the history ends there, and the recipe says how it goes on."""
    folder = run_folder(recipe)
    for entry in folder.iterdir():
        if _is_left_over(entry.name) and entry.is_file():
            entry.unlink()
    write_text(folder / RECIPE_FILE, recipe_to_yaml(recipe))
    kept = [record for record in read_history(folder) if record["step"] <= step]
    write_text(folder / HISTORY_FILE, "".join(json.dumps(record) + "\n" for record in kept))


def read_history(folder: Path) -> list[dict[str, Any]]:
    """The records of a run's log, oldest first; empty where the run logged nothing.

    A last line without its end, which a process that was killed or a full disk leaves, does not count.
    """
    file = folder / HISTORY_FILE
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    return [_record(file, number, line) for number, line in enumerate(lines, start=1) if line.endswith(b"\n")]


def read_provenance(folder: Path) -> dict[str, Any] | None:
    """What a run recorded of itself; None where there is nothing.

    Raises:
        UserError: the file is damaged, or not a run's.
    """
    file = folder / PROVENANCE_FILE
    if not file.exists():
        return None
    try:
        record = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not JSON ({error}); the file was damaged or edited") from error
    if not isinstance(record, dict):
        raise UserError(f"{file}: expected an object, what a run records of itself; the file was damaged or edited")
    return record


def _record(file: Path, number: int, line: bytes) -> dict[str, Any]:
    """A line of the history. Raises ``UserError`` for one that holds no record."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}, line {number}: not JSON ({error}); the file was damaged or edited") from error
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        raise UserError(f"{file}, line {number}: expected a record with a step; the file was damaged or edited")
    return record
