"""Jobs for SLURM: what runs, the script that says so, and its submission.

Plain ``sbatch``, not submitit: submitit pickles a python function and starts it by a script of its own, so that a user
could neither read what runs, nor edit it, nor submit it by hand; and its requeueing is made for functions that hold
their state in memory. Ours is in the checkpoint, and the same command goes on from it.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipeline.errors import UserError
from pipeline.recipe import load_recipe
from pipeline.redaction import redacted
from pipeline.run.folder import check_writable

REPOSITORY = Path(__file__).resolve().parents[2]
TEMPLATE = "job.sh.jinja"

WARNING_SECONDS = 120
"""Before a time limit, for the end of the step and a checkpoint; the controller may be half a minute early."""


@dataclass(frozen=True)
class Variant:
    """One run of an array: its name, and what else makes it differ."""

    name: str
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Resources:
    """What each job asks for."""

    nodes: int
    tasks: int
    """Processes per node."""
    gpus: int
    """Graphics cards per node; 0 asks for none."""
    cpus: int
    """Cores per process."""
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    further: tuple[str, ...] = ()
    """Any options of sbatch, as written; they win."""

    def options(self) -> list[str]:
        """For ``#SBATCH`` lines."""
        found = [f"--nodes={self.nodes}", f"--ntasks-per-node={self.tasks}"]
        if self.gpus:
            found.append(f"--gpus-per-node={self.gpus}")
        found.append(f"--cpus-per-task={self.cpus}")
        named = {"time": self.time, "partition": self.partition, "account": self.account}
        found += [f"--{name}={directive(value)}" for name, value in named.items() if value is not None]
        return [*found, *map(one_line, self.further)]


@dataclass(frozen=True)
class Job:
    """One script for sbatch.

    Attributes:
        title: what it does, in words.
        name: for SLURM; a recipe's name, or one made of it.
        program: of ours, relative to the repository.
        arguments: for it, of every run.
        variants: its runs; several are an array.
        resources: what it asks for.
        folder: where relative paths begin, absolute.
        output: the recipe's folder of runs.
        local_folder: on the node's own disk, where the run is written there; None writes to ``output``.
        python: interpreter, on the nodes.
    """

    title: str
    name: str
    program: str
    arguments: tuple[str, ...]
    variants: tuple[Variant, ...]
    resources: Resources
    folder: Path
    output: str
    local_folder: str | None = None
    python: str = sys.executable

    @property
    def array(self) -> bool:
        """Whether each run is a task of an array."""
        return bool(self.variants[0].overrides)

    @property
    def options(self) -> list[str]:
        """``#SBATCH`` lines: a stop comes as SIGUSR1 to all processes, and the job returns to the queue by itself."""
        logs = str(self.logs).replace("%", "%%")  # SLURM replaces % in the whole path
        log = f"{logs}/%x-{'%A_%a' if self.array else '%j'}.log"
        return [
            f"--job-name={self.name}",
            *([f"--array=0-{len(self.variants) - 1}"] if self.array else []),
            f"--signal=USR1@{WARNING_SECONDS}",
            "--requeue",
            "--open-mode=append",
            f"--output={directive(log)}",
            *self.resources.options(),
        ]

    @property
    def logs(self) -> Path:
        """Folder of what jobs print."""
        return self.folder / self.output / "slurm"

    def log(self, number: str) -> Path:
        """Of the job with this number; of an array, a pattern."""
        return self.logs / f"{self.name}-{number}{'_*' if self.array else ''}.log"


def seconds_of(limit: str) -> int | None:
    """Of a time limit as sbatch takes it: ``M``, ``M:S``, ``H:M:S``, ``D-H``, ``D-H:M``, ``D-H:M:S``; else None."""
    days, dash, clock = limit.rpartition("-")
    fields = clock.split(":")
    if not all(field.isascii() and field.isdigit() for field in ([days] if dash else []) + fields) or len(fields) > 3:
        return None
    units = (3600, 60, 1) if dash or len(fields) == 3 else (60, 1)
    return int(days or 0) * 86_400 + sum(unit * int(field) for unit, field in zip(units, fields, strict=False))


def missing_data(recipe_file: Path, overrides: Sequence[str]) -> list[str]:
    """Data files of a recipe that are not here, and perhaps not where the jobs run either; one line for each."""
    sources = load_recipe(recipe_file, overrides).data.train
    paths = [(f"data.train.{number}.path", source.path) for number, source in enumerate(sources)]
    return [
        f"{key}: {path} is not here; a job fails where its node has it not, either"
        for key, path in paths
        if (Path(path).suffix or os.path.isabs(path)) and not os.path.exists(os.path.expanduser(path))
    ]


def short_limit(resources: Resources) -> str | None:
    """What to say of a time limit that leaves a run less time to train than it gets to stop; None: nothing."""
    given = [resources.time, *(option.removeprefix("--time=") for option in resources.further if "--time=" in option)]
    limit, early = given[-1], any(option.startswith("--signal") for option in resources.further)
    seconds = None if limit is None or early else seconds_of(limit)
    if not seconds or seconds > 2 * WARNING_SECONDS:  # 0 is no limit
        return None
    return (
        f"--time {limit}: SLURM stops a run {WARNING_SECONDS} s before its limit, which leaves this one "
        f"{max(seconds - WARNING_SECONDS, 0)} s each time, its start included.\n"
        "A job that SLURM has started again three times without a newer checkpoint is ended."
    )


def job_script(job: Job) -> str:
    """The text for sbatch; no word of the user's is read by a shell."""
    environment = Environment(
        loader=FileSystemLoader(REPOSITORY / "launch" / "slurm"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["quote"] = shlex.quote
    template = environment.get_template(TEMPLATE)
    return template.render(job=job, repository=str(REPOSITORY))


def directive(value: str) -> str:
    """A value in a ``#SBATCH`` line, which sbatch splits at blanks, but not within double quotes."""
    escaped = one_line(value).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def one_line(text: str) -> str:
    """The text itself.

    Raises:
        UserError: it does not fit into a line, or holds a secret.
    """
    if not text.isprintable():
        raise UserError(f"{text!r} holds characters that cannot stand in a line of a job script.")
    if redacted(text) != text:
        raise UserError(
            f"{redacted(text)}: a token in a job script can be read by others.\n"
            "Leave it out: the environment in which you submit reaches the job."
        )
    return text


def variants(name: str, seeds: Sequence[int], sweeps: Sequence[str]) -> tuple[Variant, ...]:
    """Every seed with every combination of the sweeps' values.

    Args:
        name: of the recipe; each run's begins with it.
        seeds: none leaves the recipe's.
        sweeps: ``key=value,value``; commas within brackets or quotes separate nothing.

    Raises:
        UserError: a sweep without a key or values; a key given twice; two runs that would have one name.
    """
    axes = [[(f"seed{seed}", f"seed={seed}") for seed in seeds]] if seeds else []
    keys = {"seed"} if seeds else set()
    for sweep in sweeps:
        key, equals, values = sweep.partition("=")
        listed = re.findall(r"""(?:\[[^]]*\]|\{[^}]*\}|"[^"]*"|'[^']*'|[^,])+""", values)
        if not key or not equals or not listed:
            raise UserError(f"--sweep: found {sweep!r}, expected key=value,value, e.g. adapter.dropout.rate=0,0.3,0.5")
        if key == "name":
            raise UserError("--sweep: each run of an array has a name of its own; sweep what they differ in")
        if key in keys:
            how = "by --array and --sweep" if key == "seed" and seeds else "twice"
            raise UserError(f"--sweep: {key} is given {how}; write all its values once, {key}=first,second")
        keys.add(key)
        axes.append([(f"{key.rpartition('.')[2]}{_slug(value)}", f"{key}={value}") for value in listed])
    if not axes:
        return (Variant(name),)
    found: list[Variant] = []
    for chosen in product(*axes):
        own = "-".join([name, *(part for part, _ in chosen)])
        found.append(Variant(own, tuple(override for _, override in chosen)))
    names = [variant.name for variant in found]
    twice = sorted({one for one in names if names.count(one) > 1})
    if twice:
        raise UserError(f"two runs would be called {twice[0]}: values must differ in letters, digits, dots or dashes.")
    return tuple(found)


def _slug(value: str) -> str:
    """What of a value may stand in a name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", value).strip("-")


def parsed_seeds(text: str) -> list[int]:
    """Of ``--array``: ``seeds=0:5`` are 0, 1, 2, 3, 4; ``seeds=3,7`` are two.

    Raises:
        UserError: anything else.
    """
    span = re.fullmatch(r"seeds=(\d+):(\d+)", text)
    listed = re.fullmatch(r"seeds=(\d+(?:,\d+)*)", text)
    if span and int(span[1]) < int(span[2]):
        return list(range(int(span[1]), int(span[2])))
    if listed:
        return [int(seed) for seed in listed[1].split(",")]
    empty = " (an empty range)" if span else ""
    raise UserError(f"--array: found {text!r}{empty}, expected seeds=0:5 (0, 1, 2, 3, 4) or seeds=3,7")


def jobs(
    recipe_file: Path,
    overrides: Sequence[str],
    resources: Resources,
    seeds: Sequence[int],
    sweeps: Sequence[str],
    evaluate: Literal["same", "separate", "none"],
    local_folder: str | None,
) -> list[Job]:
    """The training and, where it is separate, the evaluation, in this folder; every run's recipe is read first.

    Raises:
        UserError: bad input; output on a node's own disk for several nodes; no tasks to evaluate on.
    """
    wrong = next((option for option in resources.further if not option.startswith("-")), None)
    if wrong is not None:
        raise UserError(f"--sbatch: found {wrong!r}, expected an option of sbatch with its dashes: --sbatch=--{wrong}")
    recipe = load_recipe(recipe_file, overrides)
    runs = variants(recipe.name, seeds, sweeps)
    for run in runs:
        load_recipe(recipe_file, [*overrides, f"name={run.name}", *run.overrides])
    if local_folder is not None and resources.nodes > 1:
        raise UserError(
            "--local-output: a run on several nodes goes on from checkpoints that all of them read.\n"
            "Leave it out, and let `output` be on a disk that the nodes share; or take one node."
        )
    if evaluate == "separate" and not recipe.eval.tasks:
        raise UserError("--evaluate separate: the recipe has no eval.tasks to evaluate on; name some, or leave it out.")
    name = recipe.name + ("" if not runs[0].overrides else "-seeds" if not sweeps else "-sweep")
    arguments = (str(recipe_file), *overrides)
    output = str(Path(os.path.expanduser(recipe.output)))
    trained = arguments if evaluate == "same" else ("--no-eval", *arguments)
    title = f"{recipe.name}: training" + (", then evaluation" if evaluate == "same" and recipe.eval.tasks else "")
    found = [Job(title, name, "launch/sft.py", trained, runs, resources, Path.cwd(), output, local_folder)]
    if evaluate == "separate":
        title = f"{recipe.name}: evaluation"
        found.append(
            Job(title, f"{name}-evaluation", "launch/evaluate.py", arguments, runs, resources, Path.cwd(), output)
        )
    return found


def dependency(job: Job, after: str) -> list[str]:
    """Options of sbatch for a job that waits until another one has finished well, and is cancelled where that fails.

    It waits while that is stopped and requeued: its number stays. Of an array, each run waits for its own.
    """
    return [f"--dependency={'aftercorr' if job.array else 'afterok'}:{after}", "--kill-on-invalid-dep=yes"]


def submit(job: Job, environment: Mapping[str, str], after: str | None = None) -> str:
    """Hand the script to sbatch.

    Args:
        job: what runs.
        environment: for the job.
        after: number of a job that must have finished well before.

    Returns:
        The job's number.

    Raises:
        UserError: no sbatch here, or it refuses.
    """
    command = ["sbatch", "--parsable", *([] if after is None else dependency(job, after))]
    check_writable("output", job.folder / job.output)
    job.logs.mkdir(parents=True, exist_ok=True)  # else the job ends at once, without a word
    try:
        done = subprocess.run(
            command, input=job_script(job), cwd=job.folder, env=environment, capture_output=True, text=True
        )
    except FileNotFoundError as error:
        raise UserError(
            "sbatch: no such command here. Submit from a login node of your cluster, or see the script with --dry-run."
        ) from error
    if done.returncode:
        waiting = "" if after is None else f"\nThe training is submitted: job {after}."
        raise UserError(f"sbatch refuses the job: {done.stderr.strip()}{waiting}")
    return done.stdout.strip().split(";")[0]  # the name of a cluster may follow
