"""The runs of a comparison: folders that ``launch/evaluate.py`` wrote, and which of their systems is meant."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from eval.analysis.analyse import OVERALL
from eval.analysis.schema import TaskAnalysis
from eval.report.read import read_results, recorded_recipe
from eval.scores import SYSTEMS, ordered_tasks, read_analyses
from pipeline.errors import UserError
from pipeline.recipe import Recipe


@dataclass(frozen=True)
class Run:
    """One system of one evaluation."""

    folder: Path
    """Resolved: ``latest`` is followed."""
    system: str
    named: bool
    """Whether the system was asked for; if not, it is the last that ran."""
    label: str
    """Short, and of this run alone among those compared."""
    results: Mapping[str, Any]
    recipe: Recipe
    analyses: Mapping[str, TaskAnalysis]
    """By task or group."""

    @property
    def ours(self) -> Mapping[str, Any]:
        """The section ``lora_dropout`` of the results."""
        section: Mapping[str, Any] = self.results["lora_dropout"]
        return section

    @property
    def identity(self) -> tuple[Path, str]:
        """Equal for equal answers of one evaluation."""
        return self.folder, self.system


@dataclass(frozen=True)
class Unit:
    """What is compared as one: a task, a group as a whole, or all choice tasks together."""

    name: str
    leaves: tuple[str, ...]
    """The tasks with samples: of a task itself, of a group all below it."""
    in_family: bool
    """Tested. Not the parts of a group that is compared as a whole, nor what is counted in other tests already."""


def read_runs(arguments: Sequence[str]) -> list[Run]:
    """The runs that the command line names, with labels that tell them apart.

    Args:
        arguments: each a folder, or ``FOLDER:system``.

    Raises:
        UserError: see :func:`read_run`.
    """
    return labelled([read_run(argument) for argument in arguments])


def labelled(runs: Sequence[Run]) -> list[Run]:
    """The same runs, with the shortest labels of which no two are equal."""
    short = [f"{run.recipe.name}:{run.system}" for run in runs]
    long = [f"{run.recipe.name}/{run.folder.name}:{run.system}" for run in runs]
    labels = [long[place] if short.count(label) > 1 else label for place, label in enumerate(short)]
    seen: dict[str, int] = {}
    named = []
    for run, label in zip(runs, labels, strict=True):
        seen[label] = seen.get(label, 0) + 1
        named.append(replace(run, label=label if seen[label] == 1 else f"{label} ({seen[label]})"))
    return named


def read_run(argument: str) -> Run:
    """One run.

    Args:
        argument: a folder, or ``FOLDER:system``; without a system the last that ran, which is the best equipped one:
            the ensemble before the adapter before the base.

    Raises:
        UserError: no such folder, no results in it, a system that did not run, results without analyses.
    """
    path, system = split_system(argument)
    folder = (
        path / "latest" if not (path / "results.json").exists() and (path / "latest").exists() else path
    ).resolve()
    results = read_results(folder)
    ours = results["lora_dropout"]
    ran = [name for name in SYSTEMS if name in ours["systems"]]
    if system is not None and system not in ran:
        raise UserError(f"{argument}: the system {system} was not evaluated there; it has {', '.join(ran) or 'none'}")
    if not ran:
        raise UserError(f"{folder / 'results.json'}: lora_dropout.systems is empty; evaluate again")
    taken = system or ran[-1]
    analyses = read_analyses(ours)[taken]
    if not analyses:
        raise UserError(
            f"{folder / 'results.json'}: no analysis of the system {taken}, so an older version of this project wrote "
            "it; evaluate again"
        )
    return Run(
        folder=folder,
        system=taken,
        named=system is not None,
        label="",
        results=results,
        recipe=recorded_recipe(ours),
        analyses=analyses,
    )


def split_system(argument: str) -> tuple[Path, str | None]:
    """``FOLDER:system`` as its two parts; None where no system is named. A folder's own name may hold a colon.

    Raises:
        UserError: what follows the colon is no system, and there is no folder of the whole name.
    """
    folder, colon, system = argument.rpartition(":")
    if not colon or Path(argument).is_dir():
        return Path(argument), None
    if system not in SYSTEMS:
        near = difflib.get_close_matches(system, SYSTEMS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"systems are {', '.join(SYSTEMS)}"
        raise UserError(f"{argument}: no folder of this name, and {system!r} is no system; {hint}")
    return Path(folder), system


def units(run: Run) -> list[Unit]:
    """What of a run can be compared, in the report's order: groups, then their parts; at last all tasks together."""
    groups = run.results.get("group_subtasks", {})
    evaluated = dict.fromkeys([*run.ours["systems"][run.system]["results"], *run.analyses])
    order = ordered_tasks(groups, {name: name in run.analyses for name in evaluated if name != OVERALL})
    found = [
        Unit(name, tuple(_leaves(name, groups)), in_family=not part) for name, part in order if name in run.analyses
    ]
    if OVERALL in run.analyses:
        tasks = [unit.name for unit in found if unit.leaves == (unit.name,)]
        choices = tuple(name for name in tasks if run.analyses[name].kind == "choice")
        found.append(Unit(OVERALL, choices, in_family=False))
    return found


def _leaves(name: str, groups: Mapping[str, Sequence[str]]) -> list[str]:
    parts = groups.get(name) or []
    return list(dict.fromkeys(leaf for part in parts for leaf in _leaves(part, groups))) if parts else [name]
