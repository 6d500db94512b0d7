"""What checkpoints, heartbeat and logs cost: real trainings that take turns, and the writer by itself."""

from __future__ import annotations

import platform
import random
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from pipeline.benchmark.random_checkpoint import RandomState, folder_bytes
from pipeline.benchmark.run import processor
from pipeline.benchmark.shapes import shape_config
from pipeline.benchmark.show import duration
from pipeline.benchmark.statistics import Timing, interval_name, timing
from pipeline.benchmark.turns import Training, Turn
from pipeline.errors import UserError
from pipeline.preflight.estimate import in_words
from pipeline.process.rank import launched
from pipeline.recipe import Recipe
from pipeline.run.provenance import git_state, now, versions

EVERY = 50
"""Steps from one checkpoint to the next."""
STEPS = 5
"""Of one turn."""
WRITES = 5
"""Of the random adapter's checkpoint."""
NOTHING = "nothing"
LABELS = {
    NOTHING: "no checkpoints, no heartbeat, no logs",
    "checkpoints": f"a checkpoint every {EVERY} steps",
    "watched": "heartbeat, status, logs, signals",
    "both": "both, as launch/sft.py trains",
    "stock": f"stock trl, transformers' checkpoint every {EVERY} steps",
}


@dataclass(frozen=True)
class Line:
    """One of the trainings."""

    name: str
    steps: Timing
    """Of ``EVERY`` steps with all that belongs to them, against the first line's in the same round."""
    processor: Timing
    """The same in seconds of processor time."""
    save: float | None
    """Median seconds of a checkpoint, training standing still."""
    watching: float
    """Median seconds of heartbeat, status and logs in ``EVERY`` steps."""
    share: Timing
    """Of ``EVERY`` steps and all that, against the same steps without the seconds that it took: in one process, so that
    what others do hardly moves it."""
    checkpoint_bytes: int | None


@dataclass(frozen=True)
class Written:
    """Checkpoints of a random adapter, written one after another."""

    shape: str
    parameters: int
    bytes: int
    seconds: list[float]
    """Of each, SHA-256 and the wait for the disk included."""


def benchmark(
    recipe_file: Path, overrides: list[str], recipe: Recipe, shape: str, rounds: int, announce: Callable[[str], None]
) -> dict[str, Any]:
    """Measure, and return everything as for JSON.

    Args:
        recipe_file: whose base, data and step are trained.
        overrides: of it.
        recipe: both, loaded.
        shape: of the random adapter's base.
        rounds: of ``EVERY`` steps of each training that count; one more goes before.
        announce: told what happens.

    Raises:
        UserError: started through a launcher; a training failed.
    """
    if launched():
        raise UserError("launch/benchmark.py starts its processes itself: start it with `python`")
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        announce(f"writing checkpoints of a {shape} adapter")
        written = _written(shape, recipe, Path(folder))
        lines = _trained(recipe_file, overrides, rounds, Path(folder), announce)
        disk = _disk(Path(folder))
    return {
        "lines": [asdict(line) for line in lines],
        "written": asdict(written),
        "conditions": {
            "recipe": recipe.name,
            "zero": recipe.distributed.zero,
            "rounds": rounds,
            "every": EVERY,
            "disk": disk,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
            "threads": torch.get_num_threads(),
            "busy": f"{psutil.getloadavg()[0]:.1f} processes ran or waited on {psutil.cpu_count()} cores",
            "platform": platform.platform(),
            "versions": versions(),
            "git": git_state(),
            "command": shlex.join(sys.argv),
            "finished": now(),
        },
    }


def _written(shape: str, recipe: Recipe, folder: Path) -> Written:
    state = RandomState(shape_config(shape), recipe, ranks=1, seed=0)
    seconds, size = [], 0
    for step in range(1, WRITES + 1):
        began = time.perf_counter()
        checkpoint = state.write(folder / "written", step)
        seconds.append(time.perf_counter() - began)
        size = folder_bytes(checkpoint)
    return Written(shape, state.parameters, size, seconds)


def _trained(
    recipe_file: Path, overrides: list[str], rounds: int, folder: Path, announce: Callable[[str], None]
) -> list[Line]:
    """All trainings side by side."""
    trainings = {}
    try:
        for name in LABELS:
            announce(f"starting: {name}")
            job = _job(name, recipe_file, overrides, rounds, folder)
            trainings[name] = Training(job, folder / f"{name}.log")
        for training in trainings.values():
            training.ready()
        order = random.Random(0)
        turns: dict[str, list[list[Turn]]] = {name: [] for name in LABELS}
        for number in range(rounds + 1):
            announce(f"round {number} of {rounds}" if number else "warm-up")
            taken: dict[str, list[Turn]] = {name: [] for name in LABELS}
            for _ in range(EVERY // STEPS):
                for name in order.sample(list(LABELS), len(LABELS)):
                    taken[name].append(trainings[name].turn())
            if number:
                for name in LABELS:
                    turns[name].append(taken[name])
    finally:
        for training in trainings.values():
            training.end()
    return [_line(name, turns, folder) for name in LABELS]


def _job(name: str, recipe_file: Path, overrides: list[str], rounds: int, folder: Path) -> dict[str, Any]:
    saves = name in ("checkpoints", "both", "stock")
    settings = [
        f"name={name}",
        f"output={folder}",
        "data.validation=null",
        "training.eval_strategy=no",
        "training.report_to=[]",
        f"training.max_steps={(rounds + 1) * EVERY + STEPS}",
        f"training.save_strategy={'steps' if saves else 'no'}",
        f"training.save_steps={EVERY}",
        "training.save_total_limit=2",
    ]
    return {
        "recipe": str(recipe_file.resolve()),
        "overrides": [*overrides, *settings],
        "steps": STEPS,
        "stock": name == "stock",
        "watched": name in ("watched", "both"),
    }


def _line(name: str, turns: dict[str, list[list[Turn]]], folder: Path) -> Line:
    def per_round(of: str, what: str) -> list[float]:
        return [sum(asdict(turn)[what] for turn in of_round) for of_round in turns[of]]

    whole, saving, watching = (per_round(name, what) for what in ("seconds", "saving", "watching"))
    without = [total - saved - watched for total, saved, watched in zip(whole, saving, watching, strict=True)]
    checkpoints = sorted((folder / name / "checkpoints").glob("checkpoint-*"))
    return Line(
        name,
        steps=timing(whole, per_round(NOTHING, "seconds"), 0),
        processor=timing(per_round(name, "processor_seconds"), per_round(NOTHING, "processor_seconds"), 0),
        save=statistics.median(saving) if checkpoints else None,
        watching=statistics.median(watching),
        share=timing(whole, without, 0),
        checkpoint_bytes=folder_bytes(checkpoints[-1]) if checkpoints else None,
    )


def _disk(folder: Path) -> str:
    """Device and file system."""
    mounts = [part for part in psutil.disk_partitions(all=True) if folder.is_relative_to(part.mountpoint)]
    if not mounts:
        return "unknown"
    part = max(mounts, key=lambda mount: len(mount.mountpoint))
    return f"{part.fstype} on {part.device}"


def print_result(found: dict[str, Any]) -> None:
    """The table, and the conditions it holds under."""
    conditions, written = found["conditions"], found["written"]
    rounds, reference = conditions["rounds"], found["lines"][0]["steps"]["median"]
    grid = Table(box=None, pad_edge=False, header_style="dim")
    grid.add_column("training", no_wrap=True)
    whole = f"{EVERY} steps, {interval_name(rounds)}"
    titles = "a step", whole, "processor time", "a save", "logs etc.", "with / without them"
    for title in titles:
        grid.add_column(title, justify="right", no_wrap=True)
    for line in found["lines"]:
        save = "-" if line["save"] is None else f"{duration(line['save'])}, {in_words(line['checkpoint_bytes'])}"
        watching = duration(line["watching"]) if line["watching"] else "-"
        share = "-" if line["name"] == NOTHING else _ratio(line["share"])
        against = [_ratio(line["steps"]), _ratio(line["processor"])]
        if line["name"] in (NOTHING, "stock"):  # the latter's trainer is another one, without masks
            against = ["-"] * 2
        grid.add_row(LABELS[line["name"]], duration(line["steps"]["median"] / EVERY), *against, save, watching, share)
    seconds = statistics.median(written["seconds"])
    words = (
        f"a {written['shape']} adapter by itself, random values, {written['parameters']:,} parameters: "
        f"{in_words(written['bytes'])} in {duration(seconds)} ({min(written['seconds']):.2f} to "
        f"{max(written['seconds']):.2f} s), SHA-256 and the wait for the disk included"
    )
    head = (
        f"{conditions['recipe']}, one rank, ZeRO-{conditions['zero']}, a step of {duration(reference / EVERY)}; "
        f"{rounds} rounds of {EVERY} steps each, in turns of {STEPS}\n{conditions['device']}, "
        f"{conditions['threads']} thread(s) each; {conditions['busy']}; disk: {conditions['disk']}"
    )
    Console(width=max(Console().width, 170), soft_wrap=True).print(Group(Text(head), Text(), grid, Text(), Text(words)))


def _ratio(found: dict[str, Any]) -> str:
    low, high = found["ratio_interval"]
    return f"{found['ratio']:.3f} {low:.3f} to {high:.3f}"
