"""The comparison stage: from run folders to ``comparison.html``."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import combinations
from pathlib import Path
from typing import Any

from rich.console import Console

from eval.compare.declared import adjusted, detectable, family, pilot_discordances, primary_metrics
from eval.compare.flips import shown_of
from eval.compare.methods import (
    check_mask_seeds,
    method_differences,
    method_notes,
    noise_over_masks,
    read_methods,
)
from eval.compare.paired import Material, compared, is_accuracy, read_material
from eval.compare.runs import Run, Unit, read_runs
from eval.compare.same import common_units, document_problems, refuse, setting_problems
from eval.compare.schema import Comparison, Family, MethodDifference, TaskComparison
from eval.compare.settings import different_settings, run_facts
from eval.compare.terminal import show
from eval.compare.words import cut_sentences, noise_sentence, verdict
from eval.compare.write import check_output, folder_of, write_comparison
from eval.numbers import listed
from pipeline.errors import UserError
from pipeline.redaction import command_line

VERSIONED = ("lora-dropout", "numpy", "scipy")
"""Packages that can change a number here."""


@dataclass(frozen=True)
class Declared:
    """What the command line says beside the runs."""

    tasks: Sequence[str] = field(default_factory=list)
    primary: Sequence[str] = field(default_factory=list)
    discordance: float | None = None
    pilot: tuple[str, str] | None = None


def compare_adapters(runs: Sequence[str], declared: Declared, output: Path | None = None) -> Path:
    """Compare adapters: all pairs of runs, each second minus first, on the documents that they share.

    Args:
        runs: two or more, each ``FOLDER`` or ``FOLDER:system``.
        declared: tasks, primary metrics, discordance.
        output: folder of the results.

    Returns:
        That folder.

    Raises:
        UserError: fewer than two; runs that cannot be compared; see the modules that read them.
    """
    if len(runs) < 2:
        raise UserError(f"found {len(runs)} run, and a comparison needs two: launch/compare.py RUN_A RUN_B")
    found = read_runs(runs)
    ready = prepared(found, declared, output)
    pairs = list(combinations(range(len(found)), 2))
    share = accuracies(ready)
    pilot = pilot_discordances(declared.pilot, found, share) if declared.pilot else {}
    most = shown_of(len(pairs) * sum(unit.in_family for unit in ready.units))
    tasks = [
        compared(unit, (found[a], found[b]), (ready.material[a], ready.material[b]), ready.primary[unit.name], most)
        for unit in ready.units
        for a, b in pairs
    ]
    family_of = family(ready.primary, ready.units, len(pairs), declared.primary, "pairs of runs")
    tasks, family_of = with_adjusted_tasks(tasks, family_of)
    sizes = {task.task: (task.documents, task.clusters) for task in tasks}
    comparison = Comparison(
        kind="runs",
        title=listed([run.label for run in found]) if len(found) <= 3 else f"{len(found)} runs",
        verdict=verdict([task for task in tasks if task.in_family]),
        notes=ready.notes,
        tasks=tasks,
        family=family_of,
        detectable=detectable(ready.units, sizes, share, declared.discordance, pilot),
        **common(found),
    )
    return finished(comparison, ready.output)


def compare_methods(methods: Sequence[str], declared: Declared, output: Path | None = None) -> Path:
    """Compare methods over paired training seeds.

    Args:
        methods: each ``NAME=RUN``.
        declared, output: as for :func:`compare_adapters`; a discordance has no use here.

    Raises:
        UserError: fewer than five paired seeds, and what :func:`compare_adapters` refuses.
    """
    if declared.discordance is not None or declared.pilot is not None:
        raise UserError("--discordance and --pilot are about the documents of two runs; with --method seeds are tested")
    by_method = read_methods(methods)
    found = [run for runs in by_method.values() for run in runs]
    ready = prepared(found, declared, output, names=list(by_method))
    pairs = len(list(combinations(by_method, 2)))
    differences, family_of = with_adjusted_methods(
        method_differences(by_method, ready.units, ready.primary),
        family(ready.primary, ready.units, pairs, declared.primary, "pairs of methods"),
    )
    comparison = Comparison(
        kind="methods",
        title=listed(list(by_method)),
        verdict=verdict([one for one in differences if one.primary and one.in_family]),
        notes=[*method_notes(by_method), *ready.notes],
        methods={name: [run.label for run in runs] for name, runs in by_method.items()},
        method_differences=differences,
        family=family_of,
        **common(found),
    )
    return finished(comparison, ready.output)


def compare_masks(runs: Sequence[str], declared: Declared, output: Path | None = None) -> Path:
    """The noise of one ensemble: runs that differ in the seed of their masks only.

    Raises:
        UserError: fewer than three mask seeds, and what :func:`compare_adapters` refuses.
    """
    if declared.discordance is not None or declared.pilot is not None:
        raise UserError("--discordance and --pilot are about a test, and --mask-seeds makes none")
    found = read_runs(runs)
    check_mask_seeds(found)
    ready = prepared(found, declared, output)
    noise = noise_over_masks(found, ready.units, ready.primary)
    comparison = Comparison(
        kind="mask seeds",
        title=f"{found[0].recipe.name}: {len(found)} mask seeds",
        verdict=cut_sentences(
            [noise_sentence(one) for one in noise if one.primary and one.in_family],
            "tasks are",
        ),
        notes=ready.notes,
        mask_noise=noise,
        **common(found),
    )
    return finished(comparison, ready.output)


@dataclass(frozen=True)
class Ready:
    """Runs that may be compared, with what they answered."""

    units: list[Unit]
    primary: dict[str, str]
    material: list[Material]
    """By run."""
    notes: list[str]
    output: Path


def prepared(runs: Sequence[Run], declared: Declared, output: Path | None, names: Sequence[str] = ()) -> Ready:
    """Everything that can be refused is refused here, before a number is computed.

    Raises:
        UserError: see :mod:`eval.compare.same`, :mod:`eval.compare.declared`; an output that cannot be written.
    """
    folder = output or folder_of(names or [run.recipe.name for run in runs], now())
    check_output(folder)
    units = common_units(runs, declared.tasks)
    primary = primary_metrics(runs, units, declared.primary)
    material = [read_material(run, units) for run in runs]
    problems = setting_problems(runs, units)
    for run, theirs in zip(runs[1:], material[1:], strict=True):
        for leaf, ours in material[0].documents.items():
            problems += document_problems(runs[0], run, ours, theirs.documents[leaf])
    refuse(problems)
    return Ready(units, primary, material, notes_on(runs), folder)


def notes_on(runs: Sequence[Run]) -> list[str]:
    """What a reader must know before the numbers."""
    notes = []
    modes = {run.label: str(run.ours["systems"][run.system].get("mode", "exact")) for run in runs}
    if len(set(modes.values())) > 1:
        said = listed([f"{mode} in {label}" for label, mode in modes.items()])
        notes.append(f"Scored in different modes ({said}): in 16 bits a part of the difference may be rounding.")
    limits = {run.ours.get("limit") for run in runs}
    if limits != {None}:
        notes.append(f"Of each task at most {limits.pop()} documents (eval.limit): a trial, not a benchmark result.")
    same = [run.label for run in runs if [other.identity for other in runs].count(run.identity) > 1]
    if same:
        notes.append(f"{listed(same)} are the same answers of one evaluation.")
    for run in runs:
        notes += [f"{run.label}: {warning}" for warning in run.ours.get("warnings", [])]
    return list(dict.fromkeys(notes))


def accuracies(ready: Ready) -> dict[str, str]:
    """The primary metric of every task where it is a share of right answers."""
    return {
        unit.name: ready.primary[unit.name]
        for unit in ready.units
        if is_accuracy(ready.material[0].units[unit.name], ready.primary[unit.name])
    }


def with_adjusted_tasks(tasks: Sequence[TaskComparison], of: Family) -> tuple[list[TaskComparison], Family]:
    """Holm's p-values beside those of the family."""
    p_values = [task.differences[0].p_value if task.in_family else None for task in tasks]
    corrected = adjusted(p_values)
    filled = [
        task.model_copy(
            update={
                "differences": [
                    task.differences[0].model_copy(update={"adjusted_p": p}),
                    *task.differences[1:],
                ]
            }
        )
        for task, p in zip(tasks, corrected, strict=True)
    ]
    return filled, of.model_copy(update={"tests": sum(p is not None for p in corrected)})


def with_adjusted_methods(found: Sequence[MethodDifference], of: Family) -> tuple[list[MethodDifference], Family]:
    """Holm's p-values beside those of the family."""
    corrected = adjusted([one.p_value if one.primary and one.in_family else None for one in found])
    filled = [one.model_copy(update={"adjusted_p": p}) for one, p in zip(found, corrected, strict=True)]
    return filled, of.model_copy(update={"tests": sum(p is not None for p in corrected)})


def common(runs: Sequence[Run]) -> Mapping[str, Any]:
    """What every comparison records."""
    return {
        "runs": [run_facts(run) for run in runs],
        "settings": different_settings(runs),
        "written": now(),
        "command": command_line(sys.argv),
        "versions": {package: version(package) for package in VERSIONED},
    }


def now() -> str:
    """UTC, to the second, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def finished(comparison: Comparison, output: Path) -> Path:
    """Written and shown."""
    folder = write_comparison(comparison, output)
    console = Console()
    show(comparison, console)
    console.print(f"\nwritten to {folder}", soft_wrap=True, highlight=False)
    return folder
