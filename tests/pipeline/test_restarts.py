"""A job that is started again and again and gets nowhere is ended."""

from __future__ import annotations

from pathlib import Path

import pytest
from compare_runs import recipe_of

from pipeline.errors import UserError
from pipeline.recipe import Recipe
from pipeline.restarts import check_restarts


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    return recipe_of("name", 1, None).model_copy(update={"output": str(tmp_path / "outputs")})


def starts(recipe: Recipe, monkeypatch: pytest.MonkeyPatch, count: int, first: int = 1) -> None:
    """As many starts by SLURM."""
    for restart in range(first, first + count):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        check_restarts(recipe, Path(recipe.output))


def test_the_fourth_start_without_gain_is_refused(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    starts(recipe, monkeypatch, 3)
    with pytest.raises(UserError, match=r"job 7 was started again 3 times and left nothing newer than its recipe"):
        starts(recipe, monkeypatch, 1, first=4)
    monkeypatch.setenv("SLURM_JOB_ID", "8")  # submitted anew
    starts(recipe, monkeypatch, 3)


def test_a_checkpoint_or_an_answer_is_a_gain(recipe: Recipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = tmp_path / "outputs" / "name"
    starts(recipe, monkeypatch, 3)
    (run / "checkpoints" / "checkpoint-12").mkdir(parents=True)
    starts(recipe, monkeypatch, 3)
    (run / "adapter_model.safetensors").touch()
    starts(recipe, monkeypatch, 3)
    answers = tmp_path / "outputs" / "name" / "answers" / "one"
    answers.mkdir(parents=True)
    (answers / "answers.jsonl").write_text("{}\n")
    starts(recipe, monkeypatch, 3)
    with pytest.raises(UserError, match="nothing newer than the adapter and 3 bytes of answers"):
        starts(recipe, monkeypatch, 1)


def test_only_restarts_by_slurm_count(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    for _ in range(9):
        check_restarts(recipe, Path(recipe.output))
    monkeypatch.delenv("SLURM_RESTART_COUNT")
    for _ in range(9):
        check_restarts(recipe, Path(recipe.output))
    assert not Path(recipe.output).exists()
