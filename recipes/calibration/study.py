"""Calibration on four real tasks: train with and without masks, evaluate, compare.

LORA_DROPOUT_DATA=FOLDER python recipes/calibration/study.py train|evaluate|compare [--output FOLDER] [--jobs 2]

Each verb prints the commands it runs, all of them of launch/. What is finished is never repeated: stop it and start it
again at will. README.md says what is compared, and how.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))  # python puts this folder first

import typer

from launch.command import run_command
from pipeline.errors import UserError

SEEDS = (0, 1, 2)
"""Two of masks, three of plain LoRA: of those the deep ensemble is made."""
MASK_SEEDS = (1, 2, 3)
"""Of seed 0's ensemble, beside the adapter's own."""
RECIPES = {"masks": "calibration.yaml", "lora": "lora.yaml", "input-dropout": "input-dropout.yaml"}
TASKS = ("local_arc_easy", "local_sst2", "local_rte", "calibration_mmlu")
FEWER = ("local_arc_easy", "local_sst2", "local_rte")
"""What all but the adapters of seed 0 are scored on, for time."""

Output = Annotated[Path, typer.Option(help="Rows, runs, evaluations and comparisons go there.")]


@dataclass(frozen=True)
class Job:
    """One command, and the file that shows that it was done."""

    name: str
    command: list[str]
    done: Path

    def run(self, logs: Path) -> None:
        """Run it, its output in a log file, unless it was done.

        Raises:
            UserError: it failed.
        """
        if self.done.exists():
            return
        print(shlex.join(self.command), flush=True)
        log = logs / f"{self.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as file:
            status = subprocess.run(self.command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, check=False)
        if status.returncode:
            raise UserError(f"{self.name}: ended with {status.returncode}; see {log}")


def trainings(output: Path) -> list[Job]:
    """Every training run: the pairs first."""
    rows = output / "rows"
    names = [(kind, seed) for seed in SEEDS[:2] for kind in ("masks", "lora")] + [("lora", 2), ("input-dropout", 0)]
    return [
        Job(
            f"train-{kind}-{seed}",
            [
                *(sys.executable, "launch/sft.py", f"recipes/calibration/{RECIPES[kind]}"),
                *(f"name={kind}-{seed}", f"seed={seed}", f"output={output / 'runs'}"),
                f"data.train.0.path={rows / 'train.jsonl'}",
                f"data.validation.source.path={rows / 'held-out.jsonl'}",
                *("--no-eval", "--overwrite"),  # over what was stopped half-way
            ],
            output / "runs" / f"{kind}-{seed}" / "provenance.json",
        )
        for kind, seed in names
    ]


def evaluations(output: Path) -> list[Job]:
    """Every evaluation; those of two adapters first."""

    def job(name: str, kind: str, seed: int, systems: str, *overrides: str, adapter: Path | None = None) -> Job:
        command = [
            *(sys.executable, "launch/evaluate.py", f"recipes/calibration/{RECIPES[kind]}"),
            *(f"name={name}", f"seed={seed}", f"eval.systems=[{systems}]", *overrides),
            *("--adapter", str(adapter or output / "runs" / f"{kind}-{seed}")),
            *("--output", str(output / "evaluations")),
        ]
        return Job(f"evaluate-{name}", command, output / "evaluations" / name / "latest")

    others = json.dumps([str(output / "runs" / f"lora-{seed}") for seed in SEEDS[1:]])
    fewer = f"eval.tasks=[{', '.join(FEWER)}]"
    jobs = []
    for seed in SEEDS[:2]:
        base, tasks = ("base, ", []) if seed == 0 else ("", [fewer])
        plain = output / "runs" / f"lora-{seed}"
        jobs += [
            job(f"masks-{seed}", "masks", seed, f"{base}deterministic, ensemble", *tasks),
            job(f"lora-{seed}", "lora", seed, f"{base}deterministic", *tasks),
            job(f"lora-early-{seed}", "lora", seed, "deterministic", *tasks, adapter=least_held_out(plain)),
        ]
    jobs += [
        job(f"masks-0-mask-seed-{seed}", "masks", 0, "ensemble", f"eval.ensemble.seed={seed}", fewer)
        for seed in MASK_SEEDS
    ]
    return [
        *jobs,
        job("deep-ensemble", "lora", 0, "deep_ensemble", f"eval.deep_ensemble={others}", fewer),
        job("mc-dropout", "input-dropout", 0, "deterministic, mc_dropout", fewer),
        job("masks-0-probabilities", "masks", 0, "ensemble", "eval.ensemble.average=probabilities", fewer),
    ]


def least_held_out(run: Path) -> Path:
    """The checkpoint of a run whose held-out loss was the least: the run stopped early.

    Raises:
        UserError: the run left no log.
    """
    history = run / "history.jsonl"
    if not history.exists():
        raise UserError(f"{run}: no finished run; train first: study.py train")
    lines = [json.loads(line) for line in history.read_text().splitlines()]
    measured = {line["step"]: line["validation_loss"] for line in lines if "validation_loss" in line}
    return run / "checkpoints" / f"checkpoint-{min(measured, key=lambda step: measured[step])}"


def comparisons(output: Path) -> list[Job]:
    """Seed 0's adapters, in both measures, those of seed 1, and the ensemble's own noise."""

    def job(name: str, *arguments: str, metric: str = "nll", tasks: tuple[str, ...] = TASKS) -> Job:
        folder = output / "comparisons" / name
        tested = [part for task in tasks for part in ("--task", task, "--primary", f"{task}={metric}")]
        command = [sys.executable, "launch/compare.py", *arguments, *tested, "--output", str(folder)]
        return Job(f"compare-{name}", command, folder / "comparison.json")

    def adapters(seed: int) -> list[str]:
        return [
            f"{results}/lora-{seed}/latest:deterministic",
            f"{results}/lora-early-{seed}/latest:deterministic",
            f"{results}/masks-{seed}/latest:deterministic",
            f"{results}/masks-{seed}/latest:ensemble",
        ]

    results = output / "evaluations"
    noise = [f"{results}/masks-0/latest:ensemble"]
    noise += [f"{results}/masks-0-mask-seed-{seed}/latest:ensemble" for seed in MASK_SEEDS]
    return [
        job("adapters", *adapters(0)),
        job("adapters-calibrated", *adapters(0), metric="calibrated_nll"),
        job("adapters-seed-1", *adapters(1), tasks=FEWER),
        job("mask-seeds", "--mask-seeds", *noise, tasks=FEWER),
    ]


def run_all(jobs: Iterable[Job], output: Path, at_once: int) -> None:
    """Run what was not done, a few at a time."""
    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(lambda job: job.run(output / "logs"), jobs))


def study(
    verb: Annotated[Literal["train", "evaluate", "compare"], typer.Argument()],
    output: Output = Path("outputs/calibration"),
    jobs: Annotated[int, typer.Option(min=1, help="Commands that run at once.")] = 2,
) -> None:
    """Run one part of the study."""
    output = output.resolve()
    if verb == "train":
        rows = output / "rows"
        Job("rows", [sys.executable, str(HERE / "rows.py"), str(rows)], rows / "train.jsonl").run(output / "logs")
    todo = {"train": trainings, "evaluate": evaluations, "compare": comparisons}[verb](output)
    run_all(todo, output, jobs)


if __name__ == "__main__":
    run_command(study)
