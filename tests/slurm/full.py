"""What the suite has no time for: trainings on a real SLURM controller, stopped in every way, by hand.

python tests/slurm/full.py --folder /tmp/trainings     about 10 minutes on 4 cores; needs root, slurm-wlm and munge

2 nodes x 2 ranks. Each way of stopping ends in a requeued job that goes on, and whose per-step losses are those of an
uninterrupted run, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from controller import Cluster, started_cluster
from training import differences, losses, wait_for_step, write_recipe

from pipeline.cluster.restarts import FRUITLESS_STOPS

REPOSITORY = Path(__file__).resolve().parents[2]
SMALL = ("--gpus", "0", "--cpus", "1")
FURTHER_STEPS = 5
"""After each start."""
REFERENCE_STEPS = 60
"""The last stop may come later than that, 20 s after its start: what lies beyond is not compared."""


class Trainings:
    """Submits as a user does."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        self.recipe = write_recipe(folder, REPOSITORY, steps=100_000)
        quiet = {
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        self.environment = {**cluster.environment, **quiet}

    def submit(self, *arguments: str) -> list[str]:
        """Numbers of the jobs."""
        command = [sys.executable, str(REPOSITORY / "launch" / "submit.py"), str(self.recipe), *SMALL, *arguments]
        done = subprocess.run(command, env=self.environment, cwd=self.folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return [line.split()[1].strip(":") for line in done.stdout.splitlines() if line.startswith("job ")]

    def run(self, name: str) -> Path:
        return self.folder / "outputs" / name

    def ended(self, number: str) -> dict[str, str]:
        return self.cluster.wait(number, seconds=300)


def report(what: str, found: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {what:58} {found}", flush=True)


def stopped_in_every_way(trainings: Trainings) -> None:
    """One job, stopped again and again."""
    cluster = trainings.cluster
    shape = ("--nodes", "2", "--tasks", "2", "--evaluate", "none")
    (reference,) = trainings.submit("name=reference", *shape)  # first: two at a time are many processes
    wait_for_step(trainings.run("reference"), REFERENCE_STEPS)
    cluster.run("scancel", reference)
    trainings.ended(reference)
    (number,) = trainings.submit("name=stopped", *shape, "--time", "60")
    run = trainings.run("stopped")

    def urgent() -> None:
        command = ("sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null")
        cluster.run(*command, "--wrap=sleep 2")

    def limit() -> None:
        minutes = int(cluster.job(number)["RunTime"].split(":")[1]) + 2
        cluster.run("scontrol", "update", f"JobId={number}", f"TimeLimit={minutes}")

    ways: dict[str, Callable[[], object]] = {
        "scancel --signal=USR1": lambda: cluster.run("scancel", "--signal=USR1", number),
        "scontrol requeue": lambda: cluster.run("scontrol", "requeue", number),
        "time limit": limit,
        "preempted by a job of a higher partition": urgent,
    }
    at = wait_for_step(run, 3)
    for count, (way, stop) in enumerate(ways.items(), start=1):
        stop()
        began = time.monotonic()
        cluster.wait(number, "PENDING", seconds=200)
        cluster.run("scontrol", "update", f"JobId={number}", "TimeLimit=60")
        saved = sorted(int(path.name.split("-")[1]) for path in (run / "checkpoints").glob("checkpoint-*"))
        cluster.wait(number, "RUNNING", seconds=200)
        again = time.monotonic()
        at = wait_for_step(run, saved[-1] + FURTHER_STEPS)
        job = cluster.job(number)
        assert job["Restarts"] == str(count), job
        wrong = differences(run, trainings.run("reference"))
        report(
            f"{way}: stopped at step {saved[-1]}, went on to {at}",
            f"{wrong or 'losses equal'}; queue {again - began:.0f} s, start {time.monotonic() - again:.0f} s",
        )
        assert not wrong
    cluster.run("scancel", number)
    assert trainings.ended(number)["JobState"] == "CANCELLED"
    compared = min(len(losses(run)), len(losses(trainings.run("reference"))))
    wrong = differences(run, trainings.run("reference"))
    report("one job, stopped in every way, against one that was not", f"{wrong or f'{compared} equal losses'}")
    assert not wrong


def seeds_and_evaluations(trainings: Trainings) -> None:
    """An array over seeds; one of its tasks is stopped; each evaluation waits for its own training."""
    cluster = trainings.cluster
    steps = ("training.max_steps=60", "--array", "seeds=0:2", "--evaluate", "separate")
    training, evaluation = trainings.submit("name=seeds", *steps)
    runs = [trainings.run(f"seeds-seed{seed}") for seed in range(2)]
    wait_for_step(runs[0], 3)
    cluster.run("scancel", "--signal=USR1", f"{training}_0")
    cluster.wait(f"{training}_0", "PENDING")
    waiting = cluster.job(f"{evaluation}_0")["JobState"]
    states = [trainings.ended(f"{number}_{place}") for number in (training, evaluation) for place in range(2)]
    said = [f"{job['JobState']} (restarts {job['Restarts']})" for job in states]
    report(f"array of seeds with evaluations by dependency ({waiting} while requeued)", ", ".join(said))
    assert waiting == "PENDING" and {job["JobState"] for job in states} == {"COMPLETED"}
    first = [dict(losses(run))[1] for run in runs]
    assert first[0] != first[1]
    for run in runs:
        assert [step for step, _ in losses(run)] == list(range(1, 61))
        report(
            f"  {run.name}", str((trainings.folder / "eval" / "outputs" / run.name / "latest" / "report.md").exists())
        )


def failures(trainings: Trainings) -> None:
    """Bad input and bugs are not repeated; a job that gets nowhere is ended."""
    cluster = trainings.cluster
    training, evaluation = trainings.submit("name=bad", "adapter.target_modules=[nothing]", "--evaluate", "separate")
    job = trainings.ended(training)
    report("bad input", f"{job['JobState']}, exit {job['ExitCode']}, restarts {job['Restarts']}")
    assert (job["JobState"], job["Restarts"]) == ("FAILED", "0")
    assert trainings.ended(evaluation)["JobState"] == "CANCELLED"

    (number,) = trainings.submit("name=nowhere", "--evaluate", "none")
    starts = 0
    while starts < 8:
        cluster.wait(number, "RUNNING", seconds=100)
        if cluster.job(number)["JobState"] != "RUNNING":
            break
        starts += 1
        time.sleep(3)  # in the imports: before the first step
        cluster.run("scancel", "--signal=USR1", number)
        cluster.wait(number, "PENDING", seconds=100)
    job = cluster.job(number)
    report(f"stopped before the first step, {starts} times", f"{job['JobState']}, exit {job['ExitCode']}")
    assert (job["JobState"], starts) == ("FAILED", 1 + FRUITLESS_STOPS)
    print(Path(job["StdOut"]).read_text()[-900:])


def on_the_nodes_disk(trainings: Trainings) -> None:
    """The run is written to another disk, brought back when it is stopped, fetched when it goes on."""
    cluster = trainings.cluster
    place = trainings.folder / "local disk"
    (number,) = trainings.submit(
        "name=local", "training.max_steps=30", "--local-output", str(place), "--evaluate", "none"
    )
    wait_for_step(place / f"slurm-{number}" / "local", 3)
    cluster.run("scancel", "--signal=USR1", number)
    cluster.wait(number, "PENDING")
    brought = losses(trainings.run("local"))[-1][0]
    job = trainings.ended(number)
    steps = [step for step, _ in losses(trainings.run("local"))]
    report(
        f"output on the node's disk, stopped at step {brought}", f"{job['JobState']}, steps {steps[0]} to {steps[-1]}"
    )
    assert job["JobState"] == "COMPLETED" and steps == list(range(1, 31)) and list(place.iterdir()) == []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="a new folder")
    folder = parser.parse_args().folder.resolve()
    if folder.exists():
        parser.error(f"--folder: {folder} exists; expected a new folder")
    folder.mkdir(parents=True)
    with started_cluster(Path(tempfile.mkdtemp(prefix="slurm-"))) as cluster:
        trainings = Trainings(cluster, folder)
        for part in (stopped_in_every_way, seeds_and_evaluations, failures, on_the_nodes_disk):
            part(trainings)
    print(json.dumps({"done": True, "load": os.getloadavg()}))


if __name__ == "__main__":
    main()
