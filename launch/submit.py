"""Submit training and evaluation to SLURM; a run that is stopped returns to the queue and goes on.

python launch/submit.py recipes/alpaca.yaml [key=value ...] --nodes 2 --gpus 4 [--array seeds=0:5] [--dry-run]

The jobs get the environment of this shell, as sbatch's --export says; tokens (HF_TOKEN) stand in no script.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Literal

sys.path[0] = str(Path(__file__).resolve().parents[1])  # python puts launch/ first, where evaluate.py shadows a package

import typer

from launch.command import run_command


def submit(
    recipe_file: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe, e.g. recipes/alpaca.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE ...]", help="e.g. adapter.dropout.rate=0.3")
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes of each job.")] = 1,
    gpus: Annotated[int, typer.Option(min=0, help="Graphics cards per node; 0 where there are none.")] = 1,
    tasks: Annotated[
        int | None, typer.Option(min=1, help="Processes per node; one per graphics card by default.")
    ] = None,
    cpus: Annotated[int, typer.Option(min=1, help="Cores per process.")] = 8,
    time: Annotated[str | None, typer.Option(help="Limit, e.g. 8:00:00; the partition's by default.")] = None,
    partition: Annotated[str | None, typer.Option(help="Partition; the cluster's default if not given.")] = None,
    account: Annotated[str | None, typer.Option(help="Account that is charged.")] = None,
    sbatch: Annotated[
        list[str] | None, typer.Option(metavar="OPTION", help="Any other option of sbatch: --sbatch=--mem=64G. Repeat.")
    ] = None,
    array: Annotated[str | None, typer.Option(metavar="seeds=0:5", help="One run per seed: 0, 1, 2, 3, 4.")] = None,
    sweep: Annotated[
        list[str] | None, typer.Option(metavar="KEY=A,B,C", help="One run per value. Repeat for all combinations.")
    ] = None,
    evaluate: Annotated[
        Literal["same", "separate", "none"],
        typer.Option(help="In the training job; in one of its own, once training has finished well; or not."),
    ] = "same",
    local_output: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="Write the run to this folder of the node's own disk, and bring it back."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the scripts; submit nothing.")] = False,
) -> None:
    """Submit the run that RECIPE describes to SLURM."""
    environment = dict(os.environ)  # the jobs' own: not what is set here for this process
    from pipeline.process.environment import prepare_environment

    prepare_environment()
    from pipeline.cluster.slurm import Resources, dependency, job_script, jobs, missing_data, parsed_seeds, short_limit
    from pipeline.cluster.slurm import submit as submitted

    resources = Resources(nodes, tasks or max(gpus, 1), gpus, cpus, time, partition, account, tuple(sbatch or []))
    seeds = [] if array is None else parsed_seeds(array)
    planned = jobs(recipe_file, overrides or [], resources, seeds, sweep or [], evaluate, local_output)
    limit = short_limit(resources)
    for warning in [*missing_data(recipe_file, overrides or []), *([limit] if limit else [])]:
        print(f"warning: {warning}", file=sys.stderr)
    if dry_run:
        for place, job in enumerate(planned):
            if place:
                print("\n# sbatch " + " ".join(dependency(job, "<number of the job above>")))
            print(job_script(job), end="")
        return
    numbers: list[str] = []
    for job in planned:
        numbers.append(submitted(job, environment, after=numbers[-1] if numbers else None))
        waiting = f", once job {numbers[-2]} has finished well" if numbers[1:] else ""
        print(f"job {numbers[-1]}: {job.title}{waiting}; log {job.log(numbers[-1])}")
    training, log = numbers[0], planned[0].log(numbers[0])
    run = Path(planned[0].output) / planned[0].variants[0].name
    print(
        f"""
squeue --jobs={",".join(numbers)}
tail -F {log}
python launch/status.py {run}
scancel --signal=USR1 {training}     saves a checkpoint, returns to the queue and goes on
scancel {training}                   ends it; the same recipe submitted again goes on"""
    )


if __name__ == "__main__":
    run_command(submit)
