"""launch/submit.py without a cluster: what it writes, and what it refuses. With one: tests/slurm."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.cluster.slurm import (
    Job,
    Resources,
    Variant,
    dependency,
    directive,
    job_script,
    jobs,
    parsed_seeds,
    seconds_of,
    short_limit,
    submit,
    variants,
)
from pipeline.errors import UserError

RECIPE = """
name: tiny
base: {{model: {folder}, quantization: none}}
data: {{train: [{{path: {folder}/rows.json}}]}}
adapter: {{dropout: {{rate: 0.5}}}}
eval: {{tasks: [any]}}
"""
ONE = Resources(nodes=1, tasks=1, gpus=0, cpus=2)
JOB = Job("tiny: training", "tiny", "launch/sft.py", ("r.yaml",), (Variant("tiny"),), ONE, Path("/tmp"), "outputs")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "rows.json").write_text("[]")
    file = tmp_path / "a recipe.yaml"
    file.write_text(RECIPE.format(folder=tmp_path))
    return file


def run(repository: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """No sbatch is found."""
    return subprocess.run(
        [sys.executable, str(repository / "launch" / "submit.py"), *arguments],
        cwd=folder,
        env={**os.environ, "PATH": str(Path(sys.executable).parent), "HF_TOKEN": "hf_secret", "COLUMNS": "200"},
        capture_output=True,
        text=True,
    )


def test_dry_run_prints_both_scripts(repository: Path, recipe: Path) -> None:
    shape = ("--nodes", "2", "--gpus", "4", "--time", "8:00:00", "--account", "a b", "--sbatch=--mem=64G")
    runs = ("--array", "seeds=3:5", "--sweep", "adapter.dropout.rate=0.3,0.5", "--evaluate", "separate")
    done = run(repository, recipe.parent, str(recipe), "seed=1", *shape, *runs, "--dry-run")
    assert done.returncode == 0, done.stderr
    training, evaluation = done.stdout.split("\n# sbatch --dependency=aftercorr:<number of the job above>")
    assert evaluation.startswith(" --kill-on-invalid-dep=yes\n#!/usr/bin/env bash")
    directives = [line.removeprefix("#SBATCH ") for line in training.splitlines() if line.startswith("#SBATCH")]
    assert directives == [
        "--job-name=tiny-sweep",
        "--array=0-3",
        "--signal=USR1@120",
        "--requeue",
        "--open-mode=append",
        f'--output="{recipe.parent}/outputs/slurm/%x-%A_%a.log"',
        "--nodes=2",
        "--ntasks-per-node=4",
        "--gpus-per-node=4",
        "--cpus-per-task=8",
        '--time="8:00:00"',
        '--account="a b"',
        "--mem=64G",
    ]
    assert "    2) name=tiny-seed4-rate0.3 overrides=(seed=4 adapter.dropout.rate=0.3) ;;\n" in training
    assert f"{repository}/launch/sft.py --no-eval '{recipe}' seed=1 \\\n" in training
    assert f"{repository}/launch/evaluate.py '{recipe}' seed=1 \\\n" in evaluation
    assert "hf_secret" not in done.stdout
    assert not (recipe.parent / "outputs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("adapter.ranks=3",), "adapter.ranks"),
        (("--sweep", "adapter.rank=4,0"), "adapter.rank"),
        ((), "sbatch: no such command here"),
    ],
)
def test_bad_input_ends_with_status_2_before_anything_is_submitted(
    repository: Path, recipe: Path, arguments: tuple[str, ...], message: str
) -> None:
    done = run(repository, recipe.parent, str(recipe), *arguments)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert message in done.stderr


def test_what_does_not_fit_together_is_refused(recipe: Path) -> None:
    with pytest.raises(UserError, match="checkpoints that all of them read"):
        jobs(recipe, [], replace(ONE, nodes=2), [], [], "same", "/local")
    with pytest.raises(UserError, match=r"no eval\.tasks"):
        jobs(recipe, ["eval.tasks=[]"], ONE, [], [], "separate", None)


def test_sbatch_is_asked_for_the_number(tmp_path: Path) -> None:
    """A stand-in that prints the name of its cluster, too, and keeps what it was given."""
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/given; cat > {tmp_path}/script; echo "12;cluster"\n')
    sbatch.chmod(0o755)
    job = replace(JOB, folder=tmp_path)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    assert submit(job, environment, after="11") == "12"
    assert (tmp_path / "given").read_text().split() == ["--parsable", *dependency(job, "11")]
    assert (tmp_path / "script").read_text() == job_script(job)
    assert job.log("12") == tmp_path / "outputs" / "slurm" / "tiny-12.log" and job.logs.is_dir()
    sbatch.write_text("#!/bin/sh\necho 'invalid partition' >&2; exit 1\n")
    with pytest.raises(UserError, match=r"refuses the job: invalid partition\nThe training is submitted: job 11"):
        submit(job, environment, after="11")


def test_a_token_does_not_get_into_a_script() -> None:
    token = "hf_" + "a1B2" * 9
    with pytest.raises(UserError, match="can be read by others") as refused:
        job_script(replace(JOB, resources=replace(ONE, further=(f"--export=ALL,HF_TOKEN={token}",))))
    assert token not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "seeds"), [("seeds=0:3", [0, 1, 2]), ("seeds=7", [7]), ("seeds=3,1", [3, 1]), ("seeds=2:3", [2])]
)
def test_seeds(text: str, seeds: list[int]) -> None:
    assert parsed_seeds(text) == seeds


@pytest.mark.parametrize("text", ["seeds=3:3", "seeds=4:2", "seeds=", "seed=1", "0:5", "seeds=-1:2", "seeds=a"])
def test_no_seeds(text: str) -> None:
    with pytest.raises(UserError, match="--array"):
        parsed_seeds(text)


def test_variants() -> None:
    assert variants("x", [], []) == (Variant("x"),)
    found = variants("x", [1], ["a.b=[1, 2],{c: 3},'p,q'"])
    assert [one.overrides for one in found] == [("seed=1", f"a.b={value}") for value in ("[1, 2]", "{c: 3}", "'p,q'")]
    assert [one.name for one in found] == ["x-seed1-b1-2", "x-seed1-bc-3", "x-seed1-bp-q"]
    for sweep in ("a", "a=", "=1", "a=,"):
        with pytest.raises(UserError, match="--sweep"):
            variants("x", [], [sweep])
    with pytest.raises(UserError, match="two runs would be called x-ap-q"):
        variants("x", [], ["a=p/q,p-q"])


def test_a_line_break_cannot_become_a_directive() -> None:
    for text in ("a\n#SBATCH --uid=0", "a\rb", "\x1b"):
        with pytest.raises(UserError, match="cannot stand in a line"):
            directive(text)
        with pytest.raises(UserError, match="cannot stand in a line"):
            job_script(replace(JOB, resources=replace(ONE, further=(text,))))


WORDS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)
PRINT = "import json, os, sys; print(json.dumps([os.getcwd(), sys.argv[1:]]))"


@settings(max_examples=12, deadline=None)
@given(words=st.lists(WORDS, max_size=4), overrides=st.lists(WORDS, min_size=1, max_size=2))
def test_any_word_reaches_the_program(
    tmp_path_factory: pytest.TempPathFactory, words: list[str], overrides: list[str]
) -> None:
    """The script, run by bash with stand-ins for srun and squeue."""
    folder = tmp_path_factory.mktemp("$(it's) `a`")
    for name, text in {"srun": 'while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"', "squeue": "exit 1"}.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -S -c {shlex.quote(PRINT)} "$@"\n')
    python.chmod(0o755)
    own = (Variant("n0"), Variant("n1", tuple(overrides)))
    job = replace(JOB, arguments=tuple(words), variants=own, folder=folder, python=str(python))
    task = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "1", "SLURM_JOB_NODELIST": "n", "SLURM_ARRAY_JOB_ID": "1"}
    done = subprocess.run(
        ["bash"],
        input=job_script(replace(job, variants=(own[1], own[1]))),
        env={"PATH": f"{folder}:{os.environ['PATH']}", **task, "SLURM_ARRAY_TASK_ID": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    where, given_words = json.loads(done.stdout.splitlines()[-1])
    assert where == str(folder)
    assert given_words[1:] == [*words, "name=n1", *overrides]


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [
        *(("30", 1800), ("2:30", 150), ("1:02:03", 3723), ("1-0", 86_400), ("1-2:30", 95_400), ("2-00:00:01", 172_801)),
        *(("infinite", None), ("0", 0), ("1:2:3:4", None), ("-5", None), ("²", None), ("", None)),
    ],
)
def test_time_limits_are_read_as_sbatch_reads_them(limit: str, seconds: int | None) -> None:
    assert seconds_of(limit) == seconds
    assert (short_limit(replace(ONE, time=limit)) is None) == (not seconds or seconds > 240)
    assert (short_limit(replace(ONE, time="9", further=(f"--time={limit}",))) is None) == (not seconds or seconds > 240)
    assert short_limit(replace(ONE, time=limit, further=("--signal=USR1@30",))) is None


def test_a_limit_that_leaves_no_time_to_train_is_told(repository: Path, recipe: Path) -> None:
    found = run(repository, recipe.parent, str(recipe), "--time", "0:03:00", "--gpus", "0", "--dry-run")
    assert found.returncode == 0 and "#SBATCH --time=" in found.stdout
    assert "warning: --time 0:03:00: SLURM stops a run 120 s before" in found.stderr
    assert "which leaves this one 60 s each time" in found.stderr
    assert "warning" not in run(repository, recipe.parent, str(recipe), "--time", "8:00:00", "--dry-run").stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--sweep", "adapter.rank=4", "--sweep", "adapter.rank=8"), "--sweep: adapter.rank is given twice"),
        (("--sweep", "seed=1,2", "--array", "seeds=0:2"), "--sweep: seed is given by --array and --sweep"),
        (("--sweep", "name=a,b"), "--sweep: each run of an array has a name of its own"),
        (("--array", "seeds=3:3"), "found 'seeds=3:3' (an empty range)"),
        (("--sbatch=mem=64G",), "found 'mem=64G', expected an option of sbatch with its dashes: --sbatch=--mem=64G"),
    ],
)
def test_arrays_that_would_run_something_else_are_refused(
    repository: Path, recipe: Path, arguments: tuple[str, ...], message: str
) -> None:
    found = run(repository, recipe.parent, str(recipe), *arguments, "--dry-run")
    assert found.returncode == 2 and message in found.stderr, found.stderr


def test_data_that_is_not_here_is_told(repository: Path, recipe: Path) -> None:
    """The nodes may have it."""
    found = run(repository, recipe.parent, str(recipe), "data.train.0.path=/nowhere/rows.jsonl", "--dry-run")
    assert found.returncode == 0
    assert "warning: data.train.0.path: /nowhere/rows.jsonl is not here" in found.stderr
