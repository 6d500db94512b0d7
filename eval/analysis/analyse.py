"""All statistics of one system: every task, every group as a whole, and all choice tasks together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from eval.analysis.answers import (
    AnyAnswers,
    ChoiceAnswers,
    GeneratedAnswers,
    answers_of,
    plain_answers,
)
from eval.analysis.choice import choice_analysis
from eval.analysis.common import OwnScores
from eval.analysis.generation import generation_analysis
from eval.analysis.groups import joined_choices
from eval.analysis.rolling import plain_analysis, rolling_analysis
from eval.analysis.samples import Sample
from eval.analysis.schema import TaskAnalysis
from eval.statistics.bootstrap import DRAWS

OVERALL = "overall"
"""The key of all choice tasks together."""


def analyse(
    samples: Mapping[str, Sequence[Sample]], results: Mapping[str, Any], draws: int = DRAWS
) -> dict[str, TaskAnalysis]:
    """The analysis of every task and group of one system.

    Args:
        samples: by task; lm-eval's, with our key ``lora_dropout``.
        results: lm-eval's own, of the same run: ``results``, ``group_subtasks`` and ``higher_is_better``.
        draws: of the bootstrap and of calibrated models; at least 1,000 for a report.

    Returns:
        By name: tasks, then groups of choice tasks with the tasks as strata, then ``overall`` where there are several
        choice tasks and no group holds them all.

    Raises:
        ValueError: samples that contradict lm-eval's own scores, or log-likelihoods that are not finite.
    """
    answers = {task: answers_of(task, of_task) for task, of_task in samples.items() if of_task}
    found = {
        task: _task_analysis(answered, own_scores_of(task, results), draws)
        if answered is not None
        else plain_analysis(plain_answers(task, samples[task]), own_scores_of(task, results), draws)
        for task, answered in answers.items()
    }
    choices = {task: answered for task, answered in answers.items() if isinstance(answered, ChoiceAnswers)}
    groups = groups_of(results.get("group_subtasks", {}), list(choices), list(answers))
    if len(choices) > 1 and all(set(tasks) != set(choices) for tasks in groups.values()):
        groups[OVERALL] = list(choices)
    for name, tasks in groups.items():
        together = joined_choices(name, [choices[task] for task in tasks])
        found[name] = choice_analysis(together, own_scores_of(name, results), draws)
    return found


def groups_of(subtasks: Mapping[str, Sequence[str]], choices: list[str], evaluated: list[str]) -> dict[str, list[str]]:
    """The tasks of every group of several tasks that are all multiple choice.

    Args:
        subtasks: lm-eval's ``group_subtasks``: tasks and groups in each group.
        choices: the tasks that are multiple choice.
        evaluated: all tasks.
    """

    def leaves(name: str) -> list[str]:
        if name in evaluated:
            return [name]
        return [leaf for part in subtasks.get(name, []) for leaf in leaves(part)]

    groups = {name: list(dict.fromkeys(leaves(name))) for name in subtasks if name not in evaluated}
    return {name: tasks for name, tasks in groups.items() if len(tasks) > 1 and set(tasks) <= set(choices)}


def own_scores_of(name: str, results: Mapping[str, Any]) -> OwnScores:
    """lm-eval's numbers of a task or group; the filter ``none`` is not named, but for generation it is as well."""
    values = {}
    for key, value in results.get("results", {}).get(name, {}).items():
        metric, comma, filtered = key.partition(",")
        if comma and isinstance(value, int | float):
            values[key] = float(value)
            if filtered == "none":
                values[metric] = float(value)
    return OwnScores(values, results.get("higher_is_better", {}).get(name, {}))


def _task_analysis(answers: AnyAnswers, own: OwnScores, draws: int) -> TaskAnalysis:
    if isinstance(answers, ChoiceAnswers):
        return choice_analysis(answers, own, draws)
    if isinstance(answers, GeneratedAnswers):
        return generation_analysis(answers, own, draws)
    return rolling_analysis(answers, own, draws)
