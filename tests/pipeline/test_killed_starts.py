"""A run that was killed while it began its folder, or wrote a small file, begins there again; strangers' files stay."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.recipe.schema import Base, Data, Recipe, Source
from pipeline.run.folder import check_run_folder, continue_run_folder, create_run_folder


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return Recipe(name="run", output=str(tmp_path), base=Base(model="b"), data=Data(train=[Source(path="r.jsonl")]))


def test_what_kills_leave_is_no_obstacle(tmp_path: Path, recipe: Recipe) -> None:
    folder = tmp_path / "run"
    left: list[list[str]] = [
        [],
        ["identity.json.part"],
        ["identity.json"],
        ["identity.json", "recipe.yaml"],
        ["identity.json", "recipe.yaml", "status.json", ".status.json.4711", "history.jsonl.part"],
        ["identity.json", "recipe.yaml", ".tmpRzAoav", "adapter_model.safetensors.part"],
    ]
    for names in left:
        folder.mkdir()
        for name in names:
            (folder / name).write_text("")
        check_run_folder(recipe, overwrite=False)
        create_run_folder(recipe, {"seed": 1})
        assert sorted(path.name for path in folder.iterdir()) == ["identity.json", "recipe.yaml"]
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()


def test_what_kills_leave_is_gone_when_a_run_goes_on(recipe: Recipe) -> None:
    """Of an adapter of 7B each such file may have 200 MB."""
    folder = create_run_folder(recipe, {"seed": 1})
    for name in (".tmpRzAoav", "adapter_model.safetensors.part", ".status.json.4711", "adapter_config.json"):
        (folder / name).write_text("")
    continue_run_folder(recipe, step=3)
    left = ["adapter_config.json", "history.jsonl", "identity.json", "recipe.yaml"]
    assert sorted(path.name for path in folder.iterdir()) == left


def test_logs_of_attempts_without_a_checkpoint_stay(recipe: Recipe) -> None:
    """What killed them may stand there; --overwrite deletes them."""
    folder = create_run_folder(recipe, {"seed": 1})
    (folder / "ranks").mkdir()
    (folder / "ranks" / "rank-0.jsonl").write_text("{}\n")
    (folder / "ranks" / "bad-steps.jsonl").write_text("{}\n")
    (folder / "checkpoints").mkdir()
    create_run_folder(recipe, {"seed": 1})
    assert sorted(path.name for path in folder.iterdir()) == ["identity.json", "ranks", "recipe.yaml"]
    assert [path.name for path in (folder / "ranks").iterdir()] == ["rank-0.jsonl"]
    create_run_folder(recipe, {"seed": 1}, overwrite=True)
    assert sorted(path.name for path in folder.iterdir()) == ["identity.json", "recipe.yaml"]


@pytest.mark.parametrize("names", [["thesis.tex"], ["identity.json", "recipe.yaml", "thesis.tex"], ["recipe.yaml"]])
def test_files_of_others_are_not_deleted(tmp_path: Path, recipe: Recipe, names: list[str]) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    for name in names:
        (folder / name).write_text("mine")
    with pytest.raises(UserError, match=r"thesis\.tex|recipe\.yaml"):
        check_run_folder(recipe, overwrite=False)
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)
