"""Checkpoints on disk: whole or not at all, and damage is told."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from pipeline.checkpoint.files import (
    check_space,
    clear_leftovers,
    delete_old,
    listed_checkpoints,
    newest_whole,
    problem_of,
    write_checkpoint,
)
from pipeline.errors import UserError

FILES = ("adapter_model.safetensors", "state.json", "rng.json")


def fill(folder: Path) -> None:
    for name in FILES:
        (folder / name).write_bytes(random.randbytes(random.randint(2, 5000)))


def steps(folder: Path) -> list[int]:
    return [checkpoint.step for checkpoint in listed_checkpoints(folder)]


def test_what_is_written_is_whole_and_alone(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoints", 40, fill)
    assert folder == tmp_path / "checkpoints" / "checkpoint-40"
    assert problem_of(folder) is None
    assert sorted(file.name for file in folder.iterdir()) == sorted([*FILES, "manifest.json"])
    assert [entry.name for entry in folder.parent.iterdir()] == ["checkpoint-40"]


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 2, fill)

    def full_disk(folder: Path) -> None:
        (folder / FILES[0]).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    for step in (2, 4):
        with pytest.raises(OSError, match="No space left"):
            write_checkpoint(tmp_path, step, full_disk)
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint-2"]
    assert problem_of(tmp_path / "checkpoint-2") is None


def test_a_step_is_written_anew_in_place_of_the_old(tmp_path: Path) -> None:
    old, new = (
        write_checkpoint(tmp_path, 2, fill) and (tmp_path / "checkpoint-2" / FILES[0]).read_bytes() for _ in "12"
    )
    assert old != new and steps(tmp_path) == [2]
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint-2"]


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "missing", "empty"])
def test_damage_is_told_and_the_next_older_one_taken(tmp_path: Path, name: str, damage: str) -> None:
    write_checkpoint(tmp_path, 8, fill)
    newest = write_checkpoint(tmp_path, 10, fill)  # before 8 as text
    assert newest_whole(tmp_path)[0] == listed_checkpoints(tmp_path)[0]
    file = newest / name
    content = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    elif damage == "flipped":
        place = random.randrange(len(content))
        content[place] ^= 1 << random.randrange(8)
        file.write_bytes(content)
    else:
        file.write_bytes(content[: random.randrange(len(content) - 1) if damage == "cut" else 0])
    found, damaged = newest_whole(tmp_path)
    assert found is not None and found.step == 8
    assert len(damaged) == 1 and damaged[0].startswith(str(newest))
    if name != "manifest.json":
        assert name in damaged[0]


@pytest.mark.parametrize(
    ("manifest", "words"),
    [
        ([], "expected an object with format, step and files"),
        ({"format": 2, "step": 10, "files": {}}, "format 2, and this version reads 1"),
        ({"format": 1, "step": "10", "files": {}}, "step is '10', expected a number"),
        ({"format": 1, "step": 12, "files": {}}, "its manifest is that of step 12"),
        ({"format": 1, "step": 10, "files": {"a": 3}}, "the entry 'a' names no file with bytes and sha256"),
        ({"format": 1, "step": 10, "files": {"a": {"bytes": None, "sha256": ""}}}, "the entry 'a' names no file"),
        ({"format": 1, "step": 10, "files": {"../a": {"bytes": 1, "sha256": ""}}}, "the entry '../a' names no file"),
    ],
)
def test_manifests_of_another_form_are_told(tmp_path: Path, manifest: object, words: str) -> None:
    folder = write_checkpoint(tmp_path, 10, fill)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert words in (problem_of(folder) or "")


def test_foreign_folders_are_no_checkpoints(tmp_path: Path) -> None:
    for name in ("checkpoint-x", "checkpoint-3.old", "runs", "checkpoint-"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-5").touch()
    (tmp_path / "checkpoint-4").mkdir()  # transformers' own, for instance
    assert steps(tmp_path) == [4]
    problem = "cannot be read (no manifest.json: incomplete, or not written by this project)"
    assert newest_whole(tmp_path) == (None, [f"{tmp_path / 'checkpoint-4'}: {problem}"])


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8, 10):
        write_checkpoint(tmp_path, step, fill)
    delete_old(tmp_path, step=10, keep=None, best_step=4)
    assert steps(tmp_path) == [10, 8, 6, 4, 2]
    delete_old(tmp_path, step=10, keep=2, best_step=4)
    assert steps(tmp_path) == [10, 8, 4]
    delete_old(tmp_path, step=10, keep=2, best_step=None)
    assert steps(tmp_path) == [10, 8]
    assert len(list(tmp_path.iterdir())) == 2


def test_a_damaged_newer_one_is_not_kept_in_place_of_a_good_one(tmp_path: Path) -> None:
    for step in (2, 6):
        write_checkpoint(tmp_path, step, fill)
    (tmp_path / "checkpoint-6" / "manifest.json").unlink()
    write_checkpoint(tmp_path, 4, fill)  # the run has gone on from step 2
    delete_old(tmp_path, step=4, keep=1, best_step=None)
    assert steps(tmp_path) == [4]


def test_leftovers_of_a_killed_process_go(tmp_path: Path) -> None:
    for step in (2, 4):
        write_checkpoint(tmp_path, step, fill)
    (tmp_path / "checkpoint-4").rename(tmp_path / ".checkpoint-4.replaced")  # killed before the new one got its name
    for name in (".checkpoint-6.part", ".checkpoint-1.deleted", ".checkpoint-2.replaced"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").touch()
    clear_leftovers(tmp_path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-4"]
    assert newest_whole(tmp_path)[0] == listed_checkpoints(tmp_path)[0]


def test_too_little_space_is_told_in_numbers(tmp_path: Path) -> None:
    check_space(tmp_path, 1)
    with pytest.raises(UserError, match=r"a checkpoint takes 1,048,576,000.0 MiB, and [\d,.]+ MiB are free \(16 MiB"):
        check_space(tmp_path, 1000 * 2**40)
