"""Held-out loss by the sampling of masks: tune the learning rate, train each recipe of this folder over seeds, compare.

python recipes/sampling/study.py alpaca.json [--output outputs/sampling] [--jobs 2]

A finished run is never repeated: stop it and start it again at will. README.md says what is compared, and how.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))  # python puts this folder first

import typer
from compare import Measured, ensemble_loss, mean_until, write_results

from launch.command import run_command
from pipeline.errors import UserError

MODES = ("lora", "instance-1", "example-1", "instance-4", "example-4")
RECIPES = {mode: HERE / ("sampling.yaml" if mode == "example-1" else f"{mode}.yaml") for mode in MODES}
PASSES = {"lora": 1, "instance-1": 1, "example-1": 1, "instance-4": 4, "example-4": 4}
STEPS = 30
"""Optimizer steps at which all modes are compared; at equal compute, a mode of one pass has four times as many."""
BUDGETS = ("equal steps", "equal compute")
RATES = {STEPS: (1e-3, 2e-3, 4e-3), 4 * STEPS: (2.5e-4, 5e-4, 1e-3)}
"""Learning rates tried, by optimizer steps."""
TUNING_SEED = 0
TEST_SEEDS = (1, 2, 3, 4, 5)
TRAIN_ROWS, HELD_OUT_ROWS, MAX_LENGTH = 128, 176, 48


@dataclass(frozen=True)
class Run:
    """One training run of the study."""

    mode: str
    rate: float
    seed: int
    steps: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.mode}-{self.rate:g}-seed{self.seed}-steps{self.steps}"

    def overrides(self, output: Path) -> list[str]:
        """Of its recipe."""
        train, held_out = ({"path": str(file), "format": "prompt-completion"} for file in row_files(output, self.seed))
        return [
            f"name={self.name}",
            f"seed={self.seed}",
            f"output={output / 'runs'}",
            f"training.learning_rate={self.rate}",
            f"training.max_steps={self.steps}",
            f"data.train={json.dumps([train])}",
            f"data.validation={json.dumps({'source': held_out, 'probe_rows': 32})}",
            f"data.max_length={MAX_LENGTH}",
        ]


def steps_at(mode: str, budget: str) -> int:
    """Optimizer steps of a mode at the point of comparison."""
    return STEPS * (4 // PASSES[mode] if budget == "equal compute" else 1)


def row_files(output: Path, seed: int) -> tuple[Path, Path]:
    """Training and held-out rows of a seed."""
    return output / "rows" / f"train-{seed}.jsonl", output / "rows" / f"held-out-{seed}.jsonl"


def write_rows(source: Path, output: Path) -> None:
    """Deal the rows that fit into ``MAX_LENGTH`` tokens out: no two seeds share a row, in training or held out.

    Raises:
        UserError: too few rows.
    """
    import random

    from pipeline.base import load_tokenizer
    from pipeline.data.load import load_rows
    from pipeline.data.tokenise import tokenised_row
    from pipeline.recipe import load_recipe

    seeds = (TUNING_SEED, *TEST_SEEDS)
    if all(file.exists() for seed in seeds for file in row_files(output, seed)):
        return
    recipe = load_recipe(RECIPES["example-1"])
    tokenizer = load_tokenizer(recipe.base)
    rows = load_rows([recipe.data.train[0].model_copy(update={"path": str(source), "limit": None})])
    texts = dict.fromkeys((row["prompt"], row["completion"]) for row in rows if row["completion"].strip())
    fitting = [
        {"prompt": prompt, "completion": completion}
        for prompt, completion in texts
        if not tokenised_row(prompt, completion, tokenizer, MAX_LENGTH)["truncated"]
    ]
    each = TRAIN_ROWS + HELD_OUT_ROWS
    if len(fitting) < each * len(seeds):
        raise UserError(
            f"{source}: {len(fitting):,} of its {len(texts):,} different rows have at most {MAX_LENGTH} tokens; "
            f"{len(seeds)} seeds of {TRAIN_ROWS} training and {HELD_OUT_ROWS} held-out rows need {each * len(seeds):,}"
        )
    random.Random(0).shuffle(fitting)
    (output / "rows").mkdir(parents=True, exist_ok=True)
    for place, seed in enumerate(seeds):
        own = fitting[place * each : (place + 1) * each]
        for file, part in zip(row_files(output, seed), (own[:TRAIN_ROWS], own[TRAIN_ROWS:]), strict=True):
            file.write_text("".join(json.dumps(row) + "\n" for row in part))


def finished(run: Run, output: Path) -> bool:
    """Whether the run's adapter was written."""
    return (output / "runs" / run.name / "provenance.json").exists()


def train_run(run: Run, output: Path) -> float:
    """Train in this process, its output in a log file; returns seconds."""
    from pipeline.process.environment import prepare_environment

    prepare_environment()
    from pipeline.recipe import load_recipe
    from pipeline.train import train

    started = time.perf_counter()
    log = output / "logs" / f"{run.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        train(load_recipe(RECIPES[run.mode], run.overrides(output)), overwrite=True)
    return time.perf_counter() - started


def in_parallel(work: Callable[..., float], tasks: Sequence[tuple[Any, ...]], jobs: int) -> None:
    """``work(*task)`` for each, whose first part is its run, a few at a time; each is said when it is done."""
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        running = {pool.submit(work, *task): task[0] for task in tasks}
        for done, future in enumerate(as_completed(running), start=1):
            seconds = future.result()
            print(f"{done}/{len(tasks)}  {work.__name__}  {running[future].name}  {seconds:.0f} s", flush=True)


def train_all(runs: Iterable[Run], output: Path, jobs: int) -> None:
    """Those that are not finished, longest first."""
    waiting = [run for run in set(runs) if not finished(run, output)]
    waiting.sort(key=lambda run: (-run.steps * PASSES[run.mode], run.name))
    in_parallel(train_run, [(run, output) for run in waiting], jobs)


def history(run: Run, output: Path) -> list[dict[str, float]]:
    """What the run logged."""
    lines = (output / "runs" / run.name / "history.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def at_step(run: Run, output: Path, key: str, step: int) -> float:
    """What the run logged under a key at a step."""
    return next(line[key] for line in history(run, output) if line["step"] == step and key in line)


Rates = dict[str, dict[int, float]]
"""Learning rate by mode and optimizer steps."""


def longest_run(mode: str, rate: float, seed: int, wanted: Mapping[int, Collection[float]]) -> Run:
    """The run that has this learning rate at every number of steps where it is wanted: the rate is constant."""
    return Run(mode, rate, seed, max(steps for steps, rates in wanted.items() if rate in rates))


def tuned_rates(output: Path, jobs: int) -> tuple[Rates, dict[str, dict[int, dict[float, float]]]]:
    """The learning rate with the least held-out loss at the tuning seed, and the loss at each that was tried.

    Where the best is the lowest or the highest tried, the next by a factor of two is tried, too.
    """
    tried = {mode: {steps_at(mode, budget): set(RATES[steps_at(mode, budget)]) for budget in BUDGETS} for mode in MODES}
    while True:
        runs = {
            (mode, rate): longest_run(mode, rate, TUNING_SEED, tried[mode])
            for mode in MODES
            for rate in set().union(*tried[mode].values())
        }
        train_all(runs.values(), output, jobs)
        best: Rates = {mode: {} for mode in MODES}
        losses: dict[str, dict[int, dict[float, float]]] = {mode: {} for mode in MODES}
        complete = True
        for mode in MODES:
            for steps, rates in tried[mode].items():
                found = {rate: at_step(runs[mode, rate], output, "validation_loss", steps) for rate in sorted(rates)}
                losses[mode][steps] = found
                best[mode][steps] = rate = min(found, key=found.__getitem__)
                wider = {min(rates): rate / 2, max(rates): rate * 2}.get(rate)
                if wider is not None:
                    rates.add(wider)
                    complete = False
        if complete:
            return best, losses


def run_at(mode: str, seed: int, budget: str, best: Rates) -> Run:
    """The run that shows a mode at a budget."""
    wanted = {steps: [rate] for steps, rate in best[mode].items()}
    return longest_run(mode, best[mode][steps_at(mode, budget)], seed, wanted)


def ensemble_file(run: Run, steps: int, output: Path) -> Path:
    """Holds the ensemble's held-out loss after these steps."""
    return output / "runs" / run.name / f"ensemble-{steps}.json"


def measure_ensemble(run: Run, output: Path, steps: int) -> float:
    """Write :func:`ensemble_file`; returns seconds."""
    from pipeline.process.environment import prepare_environment

    prepare_environment()
    started = time.perf_counter()
    folder = output / "runs" / run.name
    adapter = folder if steps == run.steps else folder / "checkpoints" / f"checkpoint-{steps}"
    loss = ensemble_loss(folder / "recipe.yaml", adapter)
    ensemble_file(run, steps, output).write_text(json.dumps(loss))
    return time.perf_counter() - started


def measure_ensembles(tests: Mapping[tuple[str, int, str], Run], output: Path, jobs: int) -> None:
    """Those that are not measured yet."""
    wanted = {(run, output, steps_at(mode, budget)) for (mode, _, budget), run in tests.items() if mode != "lora"}
    waiting = [task for task in wanted if not ensemble_file(task[0], task[2], output).exists()]
    in_parallel(measure_ensemble, sorted(waiting, key=lambda task: (task[0].seed, task[0].name, task[2])), jobs)


def measured_run(mode: str, seed: int, budget: str, run: Run, output: Path) -> Measured:
    """A run at a point of comparison."""
    steps = steps_at(mode, budget)
    lines = history(run, output)
    return Measured(
        mode=mode,
        seed=seed,
        budget=budget,
        steps=steps,
        learning_rate=run.rate,
        held_out=at_step(run, output, "validation_loss", steps),
        probe=at_step(run, output, "probe_loss", steps),
        ensemble=None if mode == "lora" else json.loads(ensemble_file(run, steps, output).read_text()),
        clip_fraction=mean_until(lines, "clip_fraction", steps),
        update_norm=mean_until(lines, "update_norm", steps),
    )


def study(
    rows: Annotated[Path, typer.Argument(metavar="ROWS", help="Alpaca rows: a json, jsonl or parquet file.")],
    output: Annotated[Path, typer.Option(help="Folder of runs and results.")] = Path("outputs/sampling"),
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time; set OMP_NUM_THREADS to cores / jobs.")] = 2,
) -> None:
    """Tune, train, and compare: writes results.json, results.svg and table.md."""
    from pipeline.process.environment import prepare_environment

    prepare_environment()
    output = output.absolute()
    write_rows(rows, output)
    best, tuning_losses = tuned_rates(output, jobs)
    print(f"learning rates: {json.dumps(best)}", flush=True)
    tests = {key: run_at(*key, best) for key in product(MODES, TEST_SEEDS, BUDGETS)}
    train_all(tests.values(), output, jobs)
    measure_ensembles(tests, output, jobs)
    found = [measured_run(*key, run, output) for key, run in tests.items()]
    protocol = {
        "train_rows": TRAIN_ROWS,
        "held_out_rows": HELD_OUT_ROWS,
        "max_length": MAX_LENGTH,
        "tuning_seed": TUNING_SEED,
        "learning_rates": best,
        "tuning_losses": tuning_losses,
    }
    text = write_results(found, protocol, output)
    (output / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    run_command(study)
