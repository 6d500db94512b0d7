"""What is declared before any number is looked at: the primary metrics, the family of tests, the discordance."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

from eval.compare.flips import right_answers
from eval.compare.paired import read_material
from eval.compare.runs import Run, Unit, read_run, units
from eval.compare.schema import Detectable, Family
from eval.numbers import TIMES, listed
from eval.scores import metric_name
from eval.statistics.family import holm
from eval.statistics.power import minimum_detectable_effect, pilot_discordance
from pipeline.errors import UserError

DISCORDANCES = (0.05, 0.1, 0.2)
"""Shown where none is stated."""


def primary_metrics(runs: Sequence[Run], found: Sequence[Unit], overrides: Sequence[str]) -> dict[str, str]:
    """The tested metric of every task, by task: its own, or what ``--primary task=metric`` says.

    Raises:
        UserError: an override without ``=``, of an unknown task or metric, or twice; runs whose own ones differ.
    """
    stated: dict[str, str] = {}
    names = [unit.name for unit in found]
    for override in overrides:
        task, equals, metric = override.partition("=")
        if not equals or task not in names:
            near = difflib.get_close_matches(task, names, n=1)
            hint = f"did you mean {near[0]}?" if near else f"the tasks are {listed(names)}"
            raise UserError(f"--primary {override}: expected TASK=METRIC of a compared task; {hint}")
        if stated.setdefault(task, metric) != metric:
            raise UserError(f"--primary: {task} has {stated[task]} and {metric}; one metric per task is tested")
        for run in runs:
            if metric not in run.analyses[task].metrics:
                known = listed(list(run.analyses[task].metrics))
                raise UserError(f"--primary {override}: {run.label} has no {metric!r} on {task}; it has {known}")
    own = {}
    for unit in found:
        metrics = {run.analyses[unit.name].primary for run in runs}
        if len(metrics) > 1 and unit.name not in stated:
            raise UserError(
                f"{unit.name}: the runs' primary metrics are {listed(sorted(metrics))}; say which one is tested: "
                f"--primary {unit.name}={sorted(metrics)[0]}"
            )
        own[unit.name] = stated.get(unit.name) or runs[0].analyses[unit.name].primary
    return own


def family(primary: Mapping[str, str], found: Sequence[Unit], pairs: int, overrides: Sequence[str], of: str) -> Family:
    """The declaration in words, to be filled with as many tests as give a p-value.

    Args:
        primary: metric by task.
        found: what is compared; parts of groups are not in the family, the group is.
        pairs: of runs or methods.
        overrides: as on the command line.
        of: ``pairs of runs`` or ``pairs of methods``.
    """
    tested = [unit.name for unit in found if unit.in_family]
    named = listed([f"{metric_name(primary[task])} on {task}" for task in tested])
    changed = f" Stated by --primary: {listed(list(overrides))}." if overrides else ""
    tasks = "1 task" if len(tested) == 1 else f"{len(tested)} tasks"
    count = f"{tasks} {TIMES} {pairs} {of if pairs > 1 else of.replace('pairs', 'pair')}"
    return Family(
        tests=len(tested) * pairs,
        rule=f"{count}, one primary metric each ({named}); two-sided, adjusted by Holm.{changed}",
        primary={task: primary[task] for task in tested},
    )


def adjusted(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's over those that there are, in the given order."""
    known = [p for p in p_values if p is not None]
    corrected = iter(holm(known).tolist())
    return [None if p is None else next(corrected) for p in p_values]


def detectable(
    found: Sequence[Unit],
    sizes: Mapping[str, tuple[int, int]],
    accuracies: Mapping[str, str],
    discordance: float | None,
    pilot: Mapping[str, float],
) -> list[Detectable]:
    """What the tests of accuracy can find, from numbers known beforehand.

    Args:
        found: what is compared.
        sizes: documents and independent clusters of them, by task.
        accuracies: the primary metric of tasks where it is a share of right answers.
        discordance: as stated; None where it was not.
        pilot: measured by task, on another pair of runs.
    """
    rows = []
    for unit in found:
        if unit.name not in accuracies or not unit.in_family:
            continue
        if unit.name in pilot:
            shares = [(pilot[unit.name], "pilot")]
        elif discordance is not None:
            shares = [(discordance, "stated")]
        else:
            shares = [] if pilot else [(share, "supposed") for share in DISCORDANCES]
        documents, clusters = sizes[unit.name]
        for share, source in shares:
            effect = minimum_detectable_effect(documents, share) if share > 0 else None
            rows.append(
                Detectable(
                    task=unit.name,
                    documents=documents,
                    independent=clusters == documents,
                    discordance=share,
                    effect=effect if effect is not None and effect <= share else None,
                    source=source,
                )
            )
    return rows


def pilot_discordances(
    arguments: tuple[str, str], runs: Sequence[Run], accuracies: Mapping[str, str]
) -> dict[str, float]:
    """Share of documents on which the pilot's two runs differ in right and wrong, by task that it evaluated.

    Args:
        arguments: two runs as on the command line.
        runs: those compared.
        accuracies: the primary metric of tasks where it is a share of right answers.

    Raises:
        UserError: one of the compared runs is in the pilot: power from the data that are tested says no more than
            their p-value; the pilot's two runs were asked different things, or have none of the tasks.
    """
    pilot = [read_run(argument) for argument in arguments]
    compared = {run.identity: run.label for run in runs}
    for argument, run in zip(arguments, pilot, strict=True):
        if run.identity in compared:
            raise UserError(
                f"--pilot {argument}: this is {compared[run.identity]}, which is compared. A discordance from the "
                "compared runs would only restate their p-value (post-hoc power); give an earlier pair of runs, or "
                "state one: --discordance 0.1"
            )
    known = [{unit.name: unit for unit in units(run)} for run in pilot]
    found = {}
    for task, metric in accuracies.items():
        if all(task in of_run for of_run in known):
            answers = [read_material(run, [known[0][task]]).units[task].answers for run in pilot]
            if answers[0].request_hashes != answers[1].request_hashes:
                raise UserError(
                    f"--pilot: {arguments[0]} and {arguments[1]} answered other documents or prompts of {task}; give "
                    "two runs with equal tasks, eval.limit, eval.num_fewshot and eval.prompt"
                )
            first, second = (right_answers(one, metric) for one in answers)
            if first is not None and second is not None:
                found[task] = pilot_discordance(first, second)
    if not found:
        raise UserError(f"--pilot: {arguments[0]} and {arguments[1]} share no task of {listed(list(accuracies))}")
    return found
