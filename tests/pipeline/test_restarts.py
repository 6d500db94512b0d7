"""A job that is stopped again and again and gets nowhere does not go back into the queue."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.cluster.restarts import check_gain
from pipeline.errors import UserError
from pipeline.recipe import load_recipe
from pipeline.recipe.loader import output_and_name


def stops(folder: Path, count: int, job: str = "7") -> None:
    """As many stops of a job."""
    for _ in range(count):
        check_gain(job, folder / "outputs" / "name", folder / "evaluations" / "name")


def test_the_fourth_stop_without_a_gain_is_the_last(tmp_path: Path) -> None:
    stops(tmp_path, 3)
    with pytest.raises(UserError, match=r"job 7 was started again 3 times and left nothing newer than its recipe"):
        stops(tmp_path, 1)
    stops(tmp_path, 3, job="8")  # submitted anew


def test_a_checkpoint_or_an_answer_is_a_gain(tmp_path: Path) -> None:
    run, answers = tmp_path / "outputs" / "name", tmp_path / "evaluations" / "name" / "answers" / "one"
    stops(tmp_path, 3)
    (run / "checkpoints" / "checkpoint-12").mkdir(parents=True)
    stops(tmp_path, 3)
    (run / "adapter_model.safetensors").touch()
    stops(tmp_path, 3)
    answers.mkdir(parents=True)
    (answers / "answers.jsonl").write_text("{}\n")
    stops(tmp_path, 3)
    with pytest.raises(UserError, match="nothing newer than the adapter and 3 bytes of answers"):
        stops(tmp_path, 1)


def test_the_run_is_found_without_reading_all_of_the_recipe(repository: Path, tmp_path: Path) -> None:
    for recipe in sorted((repository / "recipes").glob("*.yaml")):
        for overrides in ([], ["name=other", "output=~/it's here"]):
            whole = load_recipe(recipe, overrides)
            assert output_and_name(recipe, overrides) == (whole.output, whole.name)


def test_the_program_that_job_scripts_ask(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "a recipe.yaml").write_text("name: any\noutput: out\n")
    program = ["launch/sft.py", "--no-eval", "a recipe.yaml", "training.max_steps=3", "name=my"]
    command = [sys.executable, str(repository / "launch" / "slurm" / "may_go_on.py"), "5_1", *program]
    for _ in range(3):
        assert subprocess.run(command, cwd=tmp_path).returncode == 0
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "error: out/my: job 5_1 was started again 3 times" in done.stderr
