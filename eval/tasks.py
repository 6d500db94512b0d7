"""The recipe's tasks as lm-eval objects: lm-eval's own by name, ours in ``eval/tasks``, yours as YAML files.

Those in ``eval/tasks`` read local files (``eval/local_task.py``). The recipe's ``eval.data_folder`` is ``data_folder``
in the metadata of every task, so the function of lm-eval's own key ``custom_dataset`` gets it as an argument too. What
a task file names with ``!function`` runs when the task is loaded.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from pathlib import Path

import yaml
from datasets.exceptions import DatasetsError
from httpx2 import HTTPError
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

from eval.logs import quiet
from eval.prompt import TrainingPrompt
from eval.task_code import check_task_code, spare_needless_fetches
from pipeline.errors import UserError
from pipeline.recipe import Recipe, schema
from pipeline.recipe.problems import shortened

OUR_TASKS = Path(__file__).with_name("tasks")
MEMBER = "::"
"""lm-eval's mark between a group and a task that is written inside the group's file, e.g. ``my_group::my_task``."""

TASK_FILE_ERRORS = (
    OSError,  # no such file or dataset, no network
    HTTPError,  # a network that is lost during a download
    LookupError,  # a split or column that the data has not
    ValueError,
    TypeError,  # a key that lm-eval does not know
    RuntimeError,  # a data set that is a script, which datasets no longer runs
    ImportError,  # !function of a module that is not there
    AttributeError,  # !function of a function that is not there
    yaml.YAMLError,
    DatasetsError,
)
"""What lm-eval raises for a bad task file or missing data; task files hold code, so the kinds are many."""


def check_tasks(recipe: Recipe) -> None:
    """Load every task once, with its data, so that a mistake shows before hours of training; no tasks are fine.

    Raises:
        UserError: see :func:`load_tasks`; a training prompt that cannot be made from an instruction alone.
    """
    if not recipe.eval.tasks:
        return
    load_tasks(recipe.eval)
    if recipe.eval.prompt == "training":
        TrainingPrompt(recipe).render("Say something.")


def load_tasks(section: schema.Eval) -> list[Task | Group]:
    """The tasks and groups that ``eval.tasks`` names, in order, with their data.

    Raises:
        UserError: no tasks; an unknown name (with the nearest known ones); a task named twice; a file or data that
            cannot be read; a task that runs generated code.
    """
    if not section.tasks:
        raise UserError("eval.tasks: empty, so there is nothing to evaluate; name at least one lm-eval task")
    manager = task_manager(section)
    loaded = [item for name in section.tasks for item in _loaded(name, manager)]
    unsafe = [task.task_name for task in leaf_tasks(loaded) if task.get_config("unsafe_code")]
    if unsafe:
        raise UserError(f"eval.tasks: {', '.join(unsafe)} would run code that the model writes, which is not done here")
    names = [task.task_name for task in leaf_tasks(loaded)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"eval.tasks: {', '.join(twice)} is asked for twice, alone and in a group or in two groups")
    return loaded


def leaf_tasks(loaded: list[Task | Group]) -> list[Task]:
    """The tasks themselves, those of groups included."""
    return [task for item in loaded for task in (item.get_all_tasks() if isinstance(item, Group) else [item])]


def task_manager(section: schema.Eval) -> TaskManager:
    """lm-eval's index of task files, with its own thousands (12 s) only where a name needs them.

    Raises:
        UserError: a name that is in neither.
    """
    folders = [OUR_TASKS, *(Path(folder) for folder in section.task_folders)]
    for folder in folders:
        if not os.path.isdir(folder):
            raise UserError(
                f"eval.task_folders: found {shortened(str(folder))!r}, which is no folder (looked from {Path.cwd()})"
            )
    missing = [name for name in section.tasks if _is_yaml(name) and not os.path.isfile(os.path.expanduser(name))]
    if missing:
        raise UserError(f"eval.tasks: found {shortened(missing[0])!r}, which is no file (looked from {Path.cwd()})")
    metadata = {"data_folder": section.data_folder} if section.data_folder else {}
    manager = _indexed(folders, metadata, include_defaults=False)
    if _unknown(section.tasks, manager):
        manager = _indexed(folders, metadata, include_defaults=True)
        unknown = _unknown(section.tasks, manager)
        if unknown:
            raise UserError("\n".join(f"eval.tasks: {_no_such_task(name, manager)}" for name in unknown))
    return manager


def _indexed(folders: list[Path], metadata: dict[str, str], include_defaults: bool) -> TaskManager:
    paths = [str(folder) for folder in folders]
    try:
        with quiet("lm_eval.tasks"):
            return TaskManager(include_path=paths, include_defaults=include_defaults, metadata=metadata)
    except OSError as error:
        raise UserError(f"eval.task_folders: cannot be searched for task files: {error}") from error


def _unknown(names: Sequence[str], manager: TaskManager) -> list[str]:
    """Names that the index lacks: of tasks asked for, or of members of a group asked for."""
    unknown = []
    for name in names:
        group = name.partition(MEMBER)[0]
        if _is_yaml(name):
            continue
        if group not in manager.task_index:
            unknown.append(name)
        elif group in manager.all_groups:
            members = (manager.task_index[group].cfg or {}).get("task")
            named = [member for member in members if isinstance(member, str)] if isinstance(members, list) else []
            unknown += _unknown(named, manager)
    return unknown


def _is_yaml(name: str) -> bool:
    """Whether a name can only be meant as a task file."""
    return Path(name).suffix in {".yaml", ".yml"}


def _no_such_task(name: str, manager: TaskManager) -> str:
    near = difflib.get_close_matches(name, manager.all_tasks, n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(near)}?" if near else "`lm_eval ls tasks` lists lm-eval's."
    return (
        f"no task, group or tag is called {name!r} ({len(manager.all_tasks)} are known, lm-eval's and ours); {hint}\n"
        "Task files of your own: give their path, or their folder in eval.task_folders."
    )


def _loaded(name: str, manager: TaskManager) -> list[Task | Group]:
    """A task, a group, a group's member, or a tag's tasks, with their documents.

    Raises:
        UserError: its file or its data cannot be read; a member that the group has not; code from elsewhere.
    """
    group, _, member = name.partition(MEMBER)
    try:
        # lm-eval warns about defaults it fills in and about how custom_dataset gets its arguments
        with quiet("lm_eval"):
            asked = [group if member else name]
            spare_needless_fetches(asked, manager)
            check_task_code(asked, manager)
            loaded = manager.load(asked)
    except TASK_FILE_ERRORS as error:
        raise UserError(
            f"eval.tasks: {name!r} cannot be loaded: {type(error).__name__}: {error}\n"
            "Its task file is malformed, or its data is neither here nor in the local cache nor to be had from the Hub."
        ) from error
    groups, tasks = loaded.get("groups", {}), loaded["tasks"]
    if not member:
        members = {child for each in groups.values() for child in each.child_names}
        roots: list[Task | Group] = [each for each in groups.values() if each.name not in members]
        return roots or list(tasks.values())
    if name not in tasks:
        near = difflib.get_close_matches(name, tasks, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(sorted(tasks)[:8])}, ..."
        raise UserError(f"eval.tasks: the group {group!r} has no task {name!r}; {hint}")
    return [tasks[name]]
