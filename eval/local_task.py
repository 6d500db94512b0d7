"""lm-eval's own tasks on documents from local files: the class that the task files in ``eval/tasks`` name.

lm-eval lets a task file name a class with ``class: !function module.Class``; its code runs when the task is loaded.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import lm_eval.tasks
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._yaml_loader import load_yaml  # private; until lm-eval has a public reader that resolves includes

from eval.local_data import Document
from pipeline.errors import UserError

STOCK_TASKS = Path(lm_eval.tasks.__file__).parent
FOLDER_VARIABLE = "LORA_DROPOUT_DATA"


class LocalTask(ConfigurableTask):
    """A task of lm-eval's own: prompt, choices, metrics and few-shot rules are those of the installed lm-eval.

    The task file's own keys are

    - ``stock``: lm-eval's task file, below its folder ``tasks``. Without it the file writes the whole task.
    - ``files``: of each split, a path below the data folder, or a pattern (``*``) for one, or a list of them.
    - ``documents``: the function that turns such a file's path into documents in the columns of the prompt.
    - ``source``: where the files come from, in words; for messages, and kept in the results.

    All other keys are lm-eval's and override the stock file's, e.g. ``validation_split: null`` where there is none.
    The data folder is the metadata's ``data_folder`` (see ``eval/tasks.py``), else the variable LORA_DROPOUT_DATA.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        """Read the stock task file and the documents.

        Raises:
            UserError: a key is missing; this lm-eval has no such task file; see :meth:`download`.
        """
        missing = [key for key in ("files", "documents", "source") if key not in config]
        if missing:
            raise UserError(f"{config['task']}: the task file lacks {', '.join(missing)} (see eval/local_task.py)")
        self._files: dict[str, str | list[str]] = config["files"]
        self._documents: Callable[[Path], list[Document]] = config["documents"]
        stock = stock_config(config["stock"]) if "stock" in config else {}
        own = {key: config[key] for key in config if key not in {"class", "stock", "files", "documents", "source"}}
        origin = {key: config[key] for key in ("stock", "source") if key in config}
        super().__init__(
            config={
                **stock,
                "dataset_path": None,  # the Hub's: not where these documents are from
                "dataset_name": None,
                **own,
                "dataset_kwargs": {"files": self._files},
                "metadata": {**stock.get("metadata", {}), **own.get("metadata", {}), **origin},
            }
        )

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **_: Any) -> None:
        """Read every split from its files (lm-eval's name for where the documents come from).

        Raises:
            UserError: no data folder; a file that is missing, ambiguous, empty or malformed.
        """
        splits = {}
        for split, patterns in self._files.items():
            paths = self._paths([patterns] if isinstance(patterns, str) else patterns)
            splits[split] = datasets.Dataset.from_list([document for path in paths for document in self._read(path)])
        self.dataset = datasets.DatasetDict(splits)

    def _read(self, path: Path) -> list[Document]:
        try:
            documents = self._documents(path)
        except UserError as error:
            raise UserError(f"{self.task_name}: {error}\nThe task reads {self._origin}.") from error
        if not documents:
            raise UserError(f"{self.task_name}: {path} is empty. The task reads {self._origin}.")
        return documents

    def _paths(self, patterns: list[str]) -> list[Path]:
        """The one file of each pattern."""
        folder = self._folder()
        found = [sorted(folder.glob(pattern)) for pattern in patterns]
        missing = [str(folder / pattern) for pattern, paths in zip(patterns, found, strict=True) if not paths]
        if missing:
            raise UserError(f"{self.task_name}: no file {', '.join(missing)}. The task reads {self._origin}.")
        for pattern, paths in zip(patterns, found, strict=True):
            if len(paths) > 1:
                names = ", ".join(path.name for path in paths)
                raise UserError(f"{self.task_name}: {folder / pattern} should be one file, found {names}")
        return [paths[0] for paths in found]

    def _folder(self) -> Path:
        """The data folder."""
        given = self.config.metadata.get("data_folder")
        name = given or os.environ.get(FOLDER_VARIABLE)
        if not name:
            raise UserError(
                f"{self.task_name}: no data folder: set eval.data_folder in the recipe, or the environment variable "
                f"{FOLDER_VARIABLE}. The task reads {self._origin}."
            )
        folder = Path(os.path.expanduser(name))
        if not folder.is_dir():
            where = "eval.data_folder" if given else FOLDER_VARIABLE
            raise UserError(f"{self.task_name}: {where} is {name!r}, which is no folder (looked from {Path.cwd()})")
        return folder

    @property
    def _origin(self) -> str:
        """What the task reads and where it comes from, in words."""
        lists = [[patterns] if isinstance(patterns, str) else patterns for patterns in self._files.values()]
        names = ", ".join(name for patterns in lists for name in patterns)
        return f"{names} of the data folder, from {self.config.metadata['source']}; see eval/tasks/README.md"


def stock_config(file: str) -> dict[str, Any]:
    """A task file of the installed lm-eval, its includes and functions resolved.

    Args:
        file: path below lm-eval's folder ``tasks``, e.g. ``arc/arc_easy.yaml``.

    Raises:
        UserError: there is none.
    """
    if not (STOCK_TASKS / file).is_file():
        raise UserError(
            f"lm-eval {version('lm-eval')} has no task file {file} in {STOCK_TASKS}; install a version that has it "
            "(pyproject.toml names the one in use here)"
        )
    config = load_yaml(STOCK_TASKS / file)
    return {key: config[key] for key in config if key not in {"task", "tag", "group"}}
