"""A checkpoint on disk: written aside, synchronised, renamed; recognised as whole by its manifest.

checkpoints/checkpoint-<step>/
    adapter_model.safetensors  adapter_config.json  lora_dropout.json   the adapter, in peft's own format
    optimizer.safetensors      float32 masters and moments, whole
    state.json  rng.json  trainer_state.json  identity.json
    manifest.json              format, step, and size and SHA-256 of every other file; written last

A folder whose files do not agree with its manifest is damaged, one without is no checkpoint of ours; what is being
written, or deleted, has a name that begins with a dot.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from pipeline.errors import UserError

MANIFEST_FILE = "manifest.json"
FORMAT = 1
"""Raised whenever a checkpoint of today could not be read by the code of tomorrow."""

SPARE_BYTES = 16 * 2**20
"""Left free beside a checkpoint: for its JSON, the history, the logs and the final adapter's small files."""

_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """A folder that is named like a checkpoint. Whether it is whole, :func:`problem_of` tells."""

    folder: Path
    step: int


def checkpoint_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies.

    Args:
        folder: ``checkpoints/`` of the run.
        step: optimizer steps done.
    """
    return folder / f"checkpoint-{step}"


def listed_checkpoints(folder: Path) -> list[Checkpoint]:
    """All that are there, whole or not, the newest first."""
    if not folder.is_dir():
        return []
    named = ((_step_of(entry), entry) for entry in folder.iterdir() if entry.is_dir())
    found = [Checkpoint(entry, step) for step, entry in named if step is not None]
    return sorted(found, key=lambda checkpoint: checkpoint.step, reverse=True)


def write_checkpoint(folder: Path, step: int, write_files: Callable[[Path], None]) -> Path:
    """Write the checkpoint of a step so that at no moment a half of it can be taken for a whole.

    Args:
        folder: ``checkpoints/`` of the run.
        step: optimizer steps done.
        write_files: fills the folder that it is given with files.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError, SafetensorError: the disk is full or broken; what had been written is gone again, and older
            checkpoints are untouched.
    """
    final = checkpoint_folder(folder, step)
    part, replaced = folder / f".{final.name}.part", folder / f".{final.name}.replaced"
    remove(part)
    part.mkdir(parents=True)
    try:
        write_files(part)
        files = sorted(file for file in part.iterdir() if file.is_file())
        for file in files:
            synchronise(file)
        manifest = {
            "format": FORMAT,
            "step": step,
            "files": {file.name: {"bytes": file.stat().st_size, "sha256": sha256_of(file)} for file in files},
        }
        (part / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n")
        synchronise(part / MANIFEST_FILE)
        synchronise(part)
    except (OSError, SafetensorError):  # safetensors has its own for a full disk
        shutil.rmtree(part, ignore_errors=True)
        raise
    if final.exists():  # the same step, saved again after its evaluation
        remove(replaced)
        final.rename(replaced)
    part.rename(final)
    synchronise(folder)
    remove(replaced)
    return final


def problem_of(folder: Path) -> str | None:
    """Why the folder is no whole checkpoint, in words; None where it is one. Reads every byte."""
    try:
        manifest = _manifest(folder)
        if manifest["step"] != _step_of(folder):
            return f"its manifest is that of step {manifest['step']}"
        for name, expected in manifest["files"].items():
            file = folder / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != expected["bytes"]:
                return f"{name} has {file.stat().st_size:,} bytes, expected {expected['bytes']:,}"
            if sha256_of(file) != expected["sha256"]:
                return f"{name} is not what was written (its SHA-256 differs)"
    except (OSError, ValueError, RecursionError) as error:
        return f"cannot be read ({error})"
    return None


def _manifest(folder: Path) -> dict[str, Any]:
    """The manifest, its form checked.

    Raises:
        ValueError: says what is wrong with it.
    """
    file = folder / MANIFEST_FILE
    if not file.is_file():
        raise ValueError(f"no {MANIFEST_FILE}: incomplete, or not written by this project")
    manifest = json.loads(file.read_bytes())
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise ValueError(f"{MANIFEST_FILE}: expected an object with format, step and files")
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{MANIFEST_FILE}: format {manifest.get('format')!r}, and this version reads {FORMAT}")
    if not isinstance(manifest.get("step"), int):
        raise ValueError(f"{MANIFEST_FILE}: step is {manifest.get('step')!r}, expected a number")
    for name, expected in manifest["files"].items():
        numbers = isinstance(expected, dict) and isinstance(expected.get("bytes"), int) and "sha256" in expected
        if not numbers or Path(name).name != name:
            raise ValueError(f"{MANIFEST_FILE}: the entry {name!r} names no file with bytes and sha256")
    return manifest


def _step_of(folder: Path) -> int | None:
    """From its name."""
    name = _NAME.fullmatch(folder.name)
    return int(name[1]) if name else None


def newest_whole(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that is whole.

    Args:
        folder: ``checkpoints/`` of the run.

    Returns:
        The checkpoint, or None; and one line for each newer one that is damaged.
    """
    damaged: list[str] = []
    for checkpoint in listed_checkpoints(folder):
        problem = problem_of(checkpoint.folder)
        if problem is None:
            return checkpoint, damaged
        damaged.append(f"{checkpoint.folder}: {problem}")
    return None, damaged


def delete_old(folder: Path, step: int, keep: int | None, best_step: int | None) -> None:
    """Delete all but the newest checkpoints and the best one.

    Those of later steps go, too: they were damaged when the run went on from an older one, and would be kept in place
    of good ones.

    Args:
        folder: ``checkpoints/`` of the run.
        step: of the checkpoint that has just been written.
        keep: how many of the newest stay; None, all.
        best_step: of the best by validation loss, which stays besides; None where there is none.
    """
    listed = listed_checkpoints(folder)
    later = [checkpoint for checkpoint in listed if checkpoint.step > step]
    old = listed[len(later) :][keep:] if keep else []
    for checkpoint in (*later, *old):
        if checkpoint.step != best_step:
            remove(checkpoint.folder)


def clear_leftovers(folder: Path) -> None:
    """Delete what a process that was killed had begun to write or to delete.

    A checkpoint that was being replaced, when the new one had not got its name yet, gets its name back.
    """
    for replaced in folder.glob(".checkpoint-*.replaced"):
        name = replaced.name.removeprefix(".").removesuffix(".replaced")
        if not (folder / name).exists():
            replaced.rename(folder / name)
    for leftover in folder.glob(".checkpoint-*"):
        remove(leftover)


def remove(folder: Path) -> None:
    """Delete a folder that may not exist; under its own name it is there whole or not at all."""
    if not folder.exists():
        return
    if not folder.name.startswith("."):
        deleted = folder.with_name(f".{folder.name}.deleted")
        remove(deleted)
        folder = folder.rename(deleted)
    shutil.rmtree(folder)


def check_space(folder: Path, needed: int) -> None:
    """Refuse to begin what does not fit.

    Args:
        folder: exists.
        needed: bytes.

    Raises:
        UserError: too little is free.
    """
    free = shutil.disk_usage(folder).free
    if free < needed + SPARE_BYTES:
        raise UserError(
            f"{folder}: a checkpoint takes {needed / 2**20:,.1f} MiB, and {free / 2**20:,.1f} MiB are free "
            f"({SPARE_BYTES // 2**20} MiB are left free besides)."
        )


def synchronise(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(file: Path) -> str:
    """Hexadecimal."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
