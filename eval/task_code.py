"""Code that a task would bring along, looked for before any of it is run.

A task file's own ``!function`` is code by design, like a recipe's task folders: yours, or lm-eval's. Two things come
from elsewhere: metrics that lm-eval does not have, which it fetches from the Hub and runs, and tasks that run what the
model writes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import lm_eval.api.metrics  # noqa: F401  fills the registry
from lm_eval.api.registry import METRIC_REGISTRY
from lm_eval.config.group import GroupConfig
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml  # private, as in eval/local_task.py

from pipeline.errors import UserError

Configuration = Mapping[str, Any]

GROUP_KEYS = {key.name for key in fields(GroupConfig)}
"""Of a group's file; every other key goes to all of its tasks."""

CHOICE_METRICS = frozenset(
    ("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match", "f1", "mcc", "brier_score", "likelihood")
)
"""What ``ConfigurableTask.process_results`` computes of a multiple choice, whatever function bears the name."""


def spare_needless_fetches(names: Sequence[str], manager: TaskManager) -> None:
    """Take ``hf_evaluate`` from indexed multiple-choice tasks whose metrics lm-eval computes by itself.

    Over 700 of its own tasks ask for the Hub's code of ``f1``, which lm-eval would fetch, import, and never call.
    Delete this once lm-eval fetches what it calls.

    Args:
        names: of tasks, groups and tags.
        manager: that knows them; the entries of such tasks are replaced in its index, and lm-eval calls their
            ``config_source`` "inline".
    """
    for found in {str(found.get("task")) for name in names for found in configurations_of(name, manager, ())}:
        entry = manager.task_index.get(found)
        if entry is None or entry.cfg is None or entry.yaml_path is None or not _needless(entry.cfg):
            continue
        whole = load_yaml(entry.yaml_path, resolve_func=True)
        metrics = [{key: each[key] for key in each if key != "hf_evaluate"} for each in whole["metric_list"]]
        manager.task_index[found] = replace(entry, yaml_path=None, cfg={**whole, "metric_list": metrics})


def _needless(task: Configuration) -> bool:
    """Whether a task would fetch metrics, and call none of them."""
    fetched = set(foreign_metrics(task))
    return bool(fetched) and fetched <= CHOICE_METRICS and task.get("output_type") == "multiple_choice"


def check_task_code(names: Sequence[str], manager: TaskManager) -> None:
    """Refuse tasks with code from elsewhere.

    Args:
        names: of tasks, groups, tags and files, all known.
        manager: that knows them.

    Raises:
        UserError: names the tasks, and why.
    """
    configurations = [found for name in names for found in configurations_of(name, manager, ())]
    unsafe = sorted({str(found.get("task")) for found in configurations if found.get("unsafe_code")})
    if unsafe:
        raise UserError(f"eval.tasks: {', '.join(unsafe)} would run code that the model writes, which is not done here")
    for found in configurations:
        foreign = foreign_metrics(found)
        if foreign:
            raise UserError(
                f"eval.tasks: {found.get('task')} is scored by {', '.join(foreign)}, for which lm-eval would fetch "
                "code from the Hub and run it, which is not done here.\n"
                "Choose another task, or name a function of your own in a copy of its file (metric: !function ...), or "
                "leave hf_evaluate out where lm-eval has the metric."
            )


def foreign_metrics(task: Configuration) -> list[str]:
    """Metrics that lm-eval would look for on the Hub."""
    if task.get("process_results") is not None:  # it scores by itself
        return []
    metrics = [entry for entry in task.get("metric_list") or [] if isinstance(entry, dict)]
    return [
        entry["metric"]
        for entry in metrics
        if isinstance(entry.get("metric"), str)
        and not is_function(entry["metric"])
        and (entry["metric"] not in METRIC_REGISTRY or entry.get("hf_evaluate") is True)
    ]


def is_function(metric: str) -> bool:
    """Whether an unresolved entry is a ``!function``, which lm-eval's index holds as the path of its module."""
    return Path(metric).is_absolute()


def configurations_of(name: str, manager: TaskManager, above: tuple[str, ...]) -> Iterator[Configuration]:
    """The files of a task, or of all tasks of a group or tag, with their functions left unresolved."""
    entry = manager.task_index.get(name)
    if entry is None:
        file = Path(os.path.expanduser(name))
        found = load_yaml(file, resolve_func=False) if file.is_file() else {}
    elif entry.cfg is None:
        found = {"task": sorted(entry.tags)}  # a tag
    else:
        found = entry.cfg
    members = found.get("task")
    if not isinstance(members, list):
        yield found
        return
    for_all = {key: value for key, value in found.items() if key not in GROUP_KEYS}
    for member in members:
        settings = member if isinstance(member, dict) else {}
        inner = settings.get("task") or settings.get("group") if settings else member
        if isinstance(inner, str) and inner not in above and inner in manager.task_index:
            for of_inner in configurations_of(inner, manager, (*above, name)):
                own = {key: value for key, value in settings.items() if key not in ("task", "group")}
                yield {**of_inner, **for_all, **own}
        elif settings:
            yield {**for_all, **settings}
