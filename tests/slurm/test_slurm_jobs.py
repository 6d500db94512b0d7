"""Job scripts on a real SLURM controller: what becomes of a job that is stopped.

Two trainings over both nodes, and many jobs with a stand-in for the training, which ends as it is told to. All are
submitted at once, since most of their time is spent waiting: ``played``. The tests look at what came out.
``full.py`` has trainings that are stopped in every way.
"""

from __future__ import annotations

import json
import os
import pty
import re
import shlex
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from controller import NODES, Cluster
from training import differences, wait_for_step, write_recipe

from pipeline.cluster.slurm import Job, Resources, Variant, submit

STAND_IN = Path(__file__).with_name("stand_in.py")
NASTY = ('a=it\'s "$HOME" `id` $(id) \\ *', "#no=comment; exit 1", "b=[x, 'y z']\n?", "c=", "ü=%j é  ", "--option")
TWO_NODES = Resources(nodes=2, tasks=1, gpus=0, cpus=1)
ONE_NODE = replace(TWO_NODES, nodes=1)


@dataclass
class Bench:
    """Submits jobs whose python is the stand-in, and reads what it has recorded.

    Attributes:
        numbers: of the jobs, by what they are called here.
        training_numbers: of the trainings.
        trainings: folder of their runs.
        stopped_at: the last step that was seen of the stopped one.
    """

    cluster: Cluster
    folder: Path
    python: Path
    numbers: dict[str, str] = field(default_factory=dict)
    training_numbers: dict[str, str] = field(default_factory=dict)
    trainings: Path = Path()
    stopped_at: int = 0

    @property
    def records_file(self) -> Path:
        return self.folder / "records.jsonl"

    def environment(self, behaviour: str) -> dict[str, str]:
        told = {"BEHAVIOUR": behaviour, "RECORDS": str(self.records_file), "PYTHON": str(self.python)}
        return {**self.cluster.environment, **told, "HF_TOKEN": "hf_secret"}

    def submit(
        self,
        name: str,
        behaviour: str,
        resources: Resources,
        after: str | None = None,
        arguments: tuple[str, ...] = ("a recipe.yaml",),
        variants: tuple[Variant, ...] | None = None,
        local_folder: str | None = None,
    ) -> None:
        """As launch/submit.py does."""
        own = variants or (Variant(name),)
        places = (self.folder, "out puts", local_folder, str(self.python))
        job = Job("a job", name, "launch/sft.py", arguments, own, resources, *places)
        number = None if after is None else self.numbers[after]
        self.numbers[name] = submit(job, self.environment(behaviour), number)

    def records(self, number: str) -> list[dict[str, Any]]:
        """Of all processes of a job, in no order."""
        if not self.records_file.exists():
            return []
        return [one for one in map(json.loads, self.records_file.read_text().splitlines()) if one["job"] == number]

    def wait_for_ranks(self, number: str, count: int) -> None:
        """Until as many processes of the job run."""
        deadline = time.monotonic() + 60
        while len(self.records(number)) < count:
            assert time.monotonic() < deadline, f"{self.cluster.job(number)}\n{self.cluster.logs()}"
            time.sleep(0.1)


def tasks(array: str, count: int) -> list[str]:
    """Numbers of an array's tasks."""
    return [f"{array}_{place}" for place in range(count)]


def submit_trainings(bench: Bench, folder: Path, repository: Path) -> None:
    """The same training twice, one process on each node; it would take hours."""
    recipe = write_recipe(folder, repository, steps=100_000)
    bench.trainings = folder / "outputs"
    quiet = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    for name in ("reference", "stopped"):
        arguments = ("--no-eval", str(recipe))
        job = Job("a training", name, "launch/sft.py", arguments, (Variant(name),), TWO_NODES, folder, "outputs")
        bench.training_numbers[name] = submit(job, {**bench.cluster.environment, **quiet})


@pytest.fixture(scope="module")
def played(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Bench:
    """All jobs; those with the stand-in have ended, one of the trainings is stopped."""
    folder = tmp_path_factory.mktemp("it's a %j $HOME")
    python = folder / "python"
    real, stand_in = shlex.quote(sys.executable), shlex.quote(str(STAND_IN))
    python.write_text(
        f'#!/bin/sh\ncase $1 in */may_go_on.py) exec {real} "$@";; *) exec {real} {stand_in} "$@";; esac\n'
    )
    python.chmod(0o755)
    (folder / "a recipe.yaml").write_text("name: any")
    bench = Bench(cluster, folder, python)
    submit_trainings(bench, tmp_path_factory.mktemp("trainings"), repository)
    seeds = tuple(Variant(f"array-seed{seed}", (f"seed={seed}",)) for seed in range(2))
    bench.submit("nasty", "finish", replace(TWO_NODES, tasks=2), arguments=("a recipe.yaml", *NASTY))
    bench.submit("signalled", "stop", TWO_NODES)
    bench.submit("signalled-evaluation", "finish", ONE_NODE, after="signalled")
    bench.submit("requeued", "stop", ONE_NODE)
    bench.submit("cancelled", "stop", ONE_NODE)
    bench.submit("crashed", "crash", TWO_NODES)
    bench.submit("crashed-evaluation", "finish", ONE_NODE, after="crashed")
    bench.submit("array", "stop", ONE_NODE, variants=seeds)
    bench.submit("array-evaluation", "finish", ONE_NODE, after="array", variants=seeds)
    bench.submit("limited", "stop", replace(ONE_NODE, time="2"))  # the controller's signal comes at its next look
    bench.submit("hopeless", "stop at once", ONE_NODE)
    bench.submit("local", "stop", ONE_NODE, local_folder=str(folder / "node's disk"))
    numbers = bench.numbers
    first, second = tasks(numbers["array"], 2)
    bench.wait_for_ranks(numbers["signalled"], 2)
    for number in (numbers["requeued"], numbers["cancelled"], numbers["local"], first, second):
        bench.wait_for_ranks(number, 1)
    time.sleep(0.5)  # the stand-in's signal handlers
    for number in (numbers["signalled"], numbers["local"], first):
        cluster.run("scancel", "--signal=USR1", number)
    cluster.run("scontrol", "requeue", numbers["requeued"])
    cluster.run("scancel", numbers["cancelled"])
    cluster.wait(f"{numbers['array-evaluation']}_0")
    cluster.run("scancel", "--signal=USR1", second)
    bench.stopped_at = wait_for_step(bench.trainings / "stopped", 3)
    cluster.run("scancel", "--signal=USR1", bench.training_numbers["stopped"])
    arrays = {"array", "array-evaluation"}
    for name, number in numbers.items():
        for one in tasks(number, 2) if name in arrays else [number]:
            cluster.wait(one)
    return bench


def told(record: dict[str, Any]) -> tuple[str, ...]:
    """What a process was given after the program."""
    return tuple(record["arguments"][1:])


def test_words_reach_every_rank_as_they_were_written(played: Bench) -> None:
    number = played.numbers["nasty"]
    records = sorted(played.records(number), key=lambda record: record["RANK"])
    assert [record["RANK"] for record in records] == ["0", "1", "2", "3"]
    assert [record["LOCAL_RANK"] for record in records] == ["0", "1", "0", "1"]
    assert {record["MASTER_ADDR"] for record in records} == {NODES[0]}
    for record in records:
        assert told(record) == ("a recipe.yaml", *NASTY, "name=nasty")
        assert record["arguments"][0].endswith("/launch/sft.py")
        assert record["folder"] == str(played.folder)
        assert (record["WORLD_SIZE"], record["LOCAL_WORLD_SIZE"], record["HF_TOKEN"]) == ("4", "2", "hf_secret")
    assert "hf_secret" not in played.cluster.run("scontrol", "write", "batch_script", number, "-")
    log = played.folder / "out puts" / "slurm" / f"nasty-{number}.log"
    assert f"job {number}, start 1: 4 processes on 127.0.0.[1-2]" in log.read_text()


def test_jobs_of_one_host_meet_at_ports_of_their_own(played: Bench) -> None:
    ports = {
        name: {record["MASTER_PORT"] for record in played.records(number)} for name, number in played.numbers.items()
    }
    assert all(len(of_one) <= 1 for of_one in ports.values())
    found = [port for of_one in ports.values() for port in of_one]
    assert len(found) == len(set(found)) > 5


@pytest.mark.parametrize("name", ["signalled", "requeued", "limited"])
def test_a_stopped_job_goes_on_in_the_same_log(played: Bench, name: str) -> None:
    job = played.cluster.job(played.numbers[name])
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1")
    records = played.records(played.numbers[name])
    assert sorted(record["again"] for record in records) == sorted([False, True] * int(job["NumNodes"]))
    assert len({tuple(record["arguments"]) for record in records}) == 1
    said = (played.folder / "out puts" / "slurm" / f"{name}-{played.numbers[name]}.log").read_text()
    assert "start 1: " in said and "start 2: " in said
    assert ("was stopped; it goes back into the queue" in said) == (name != "requeued")  # the controller did that


def test_an_evaluation_waits_for_a_training_that_is_requeued(played: Bench) -> None:
    training = played.cluster.job(played.numbers["signalled"])
    evaluation = played.cluster.job(played.numbers["signalled-evaluation"])
    assert evaluation["JobState"] == "COMPLETED"
    assert evaluation["StartTime"] >= training["EndTime"]


def test_a_failed_training_is_not_repeated_and_its_evaluation_is_cancelled(played: Bench) -> None:
    """Its other process, which srun ends, says that it was stopped."""
    job = played.cluster.job(played.numbers["crashed"])
    assert (job["JobState"], job["Restarts"]) == ("FAILED", "0")
    assert played.cluster.job(played.numbers["crashed-evaluation"])["JobState"] == "CANCELLED"
    assert played.records(played.numbers["crashed-evaluation"]) == []


def test_a_job_that_gets_nowhere_stays_stopped(played: Bench) -> None:
    number = played.numbers["hopeless"]
    job = played.cluster.job(number)
    assert (job["JobState"], job["Restarts"], job["ExitCode"]) == ("FAILED", "3", "75:0")
    said = (played.folder / "out puts" / "slurm" / f"hopeless-{number}.log").read_text()
    assert "was started again 3 times and left nothing newer than its recipe" in said


def test_a_cancelled_job_stays_cancelled(played: Bench) -> None:
    job = played.cluster.job(played.numbers["cancelled"])
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "0")


def test_each_task_of_an_array_is_a_run_of_its_own(played: Bench) -> None:
    cluster = played.cluster
    trainings, evaluations = (tasks(played.numbers[name], 2) for name in ("array", "array-evaluation"))
    for seed, (training, evaluation) in enumerate(zip(trainings, evaluations, strict=True)):
        assert (cluster.job(training)["JobState"], cluster.job(training)["Restarts"]) == ("COMPLETED", "1")
        assert [told(record) for record in played.records(training)] == [
            ("a recipe.yaml", f"name=array-seed{seed}", f"seed={seed}")
        ] * 2
        assert cluster.job(evaluation)["JobState"] == "COMPLETED"
    assert cluster.job(evaluations[0])["StartTime"] < cluster.job(trainings[1])["EndTime"]  # each waits for its own


def test_output_on_the_nodes_disk_is_fetched_and_brought_back(played: Bench) -> None:
    number = played.numbers["local"]
    first, second = sorted(played.records(number), key=lambda record: record["again"])
    assert not first["found"] and second["found"]  # the second start had only what the first had brought back
    assert told(first) == ("a recipe.yaml", "name=local", f"output={played.folder}/node's disk/slurm-{number}")
    kept = played.folder / "out puts" / "local"
    assert [file.name for file in kept.iterdir()] == ["kept"]
    assert list((played.folder / "node's disk").iterdir()) == []


@pytest.mark.slow
def test_a_training_over_two_nodes_goes_on_as_if_nothing_had_happened(played: Bench) -> None:
    number, runs = played.training_numbers["stopped"], played.trainings
    played.cluster.wait(number, "RUNNING")
    last = wait_for_step(runs / "stopped", played.stopped_at + 4)
    assert played.cluster.job(number)["Restarts"] == "1"
    wait_for_step(runs / "reference", last)
    played.cluster.run("scancel", *played.training_numbers.values())
    assert differences(runs / "stopped", runs / "reference") == []
    for number in played.training_numbers.values():
        played.cluster.wait(number)


def test_a_job_that_makes_way_for_another_goes_back_into_the_queue(played: Bench) -> None:
    """Its processes are ended before they could agree on a checkpoint: status 143."""
    played.submit("preempted", "killed", replace(TWO_NODES, further=("--exclusive",)))
    number = played.numbers["preempted"]
    played.wait_for_ranks(number, 2)
    time.sleep(0.5)
    played.cluster.run("sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")
    played.cluster.wait(number, "PENDING")
    job = played.cluster.wait(number)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1")


def test_the_scripts_for_sbatch(played: Bench, tmp_path: Path, repository: Path) -> None:
    """From a folder without %, which sbatch would replace in the name of the log."""
    (tmp_path / "launch").symlink_to(repository / "launch")
    cluster, environment = played.cluster, played.environment("finish")

    def run(*command: str) -> str:
        return cluster.run(*command, cwd=tmp_path, environment=environment)

    given = ("a recipe.yaml", *NASTY)
    numbers = {
        script: run("sbatch", "--parsable", f"launch/slurm/{script}.sh", *first, *given)
        for script, first in {"one_node": (), "several_nodes": (), "evaluate": (), "sweep": (), "seeds": ("n",)}.items()
    }
    both = run("bash", "launch/slurm/train_then_evaluate.sh", *given)
    numbers["training"], numbers["evaluation"] = re.findall(r"job (\d+)", both)
    seeds, sweep = tasks(numbers.pop("seeds"), 3), tasks(numbers.pop("sweep"), 3)
    for number in (*numbers.values(), *seeds, *sweep):
        assert cluster.wait(number)["JobState"] == "COMPLETED"
    processes = {"one_node": 4, "several_nodes": 8, "evaluate": 4, "training": 8, "evaluation": 4}
    for script, count in processes.items():
        records = played.records(numbers[script])
        assert sorted(int(record["RANK"]) for record in records) == list(range(count))
        program = "launch/evaluate.py" if script.startswith("evalu") else "launch/sft.py"
        words = (program, *(["--no-eval"] if script == "training" else []), *given)
        assert {tuple(record["arguments"]) for record in records} == {words}
    for seed, number in enumerate(seeds):
        assert [told(record) for record in played.records(number)] == [(*given, f"name=n-seed{seed}", f"seed={seed}")]
    for rate, number in zip(("0.0", "0.3", "0.5"), sweep, strict=True):
        expected = (*given, f"name=sweep-{rate}", f"adapter.dropout.rate={rate}")
        assert [told(record) for record in played.records(number)] == [expected]


def test_what_is_typed_in_an_interactive_shell_is_one_process(played: Bench) -> None:
    """Two tasks are allocated; a step that is started from that shell has two ranks all the same."""
    words = [sys.executable, str(STAND_IN)]
    typed = f"{shlex.join([*words, 'typed'])}; srun --overlap -n2 {shlex.join([*words, 'step'])}"
    environment = played.environment("finish")
    process, terminal = pty.fork()
    if process == 0:
        os.execvpe("salloc", ["salloc", "-n2", "srun", "--overlap", "-n1", "--pty", "bash", "-c", typed], environment)
    said = b""
    while True:
        try:
            said += os.read(terminal, 4096)
        except OSError:  # the terminal is closed
            break
    _, status = os.waitpid(process, 0)
    assert status == 0, said
    records = [json.loads(line) for line in played.records_file.read_text().splitlines()]
    ranks = [(record["arguments"][0], record["RANK"]) for record in records]
    assert sorted(ranks[-3:], key=str) == [("step", "0"), ("step", "1"), ("typed", None)]
