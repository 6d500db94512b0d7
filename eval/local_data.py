"""Evaluation data from local files: the functions that the task files in ``eval/tasks`` name.

lm-eval calls a task's ``custom_dataset`` with the task's metadata (our ``data_folder`` among it, see ``eval/tasks.py``)
and its ``dataset_kwargs``, and ``process_docs`` with the rows of a split.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import datasets

from pipeline.errors import UserError

READERS: dict[str, dict[str, Any]] = {
    ".json": {"path": "json"},
    ".jsonl": {"path": "json"},
    ".csv": {"path": "csv"},
    ".tsv": {"path": "csv", "sep": "\t", "quoting": 3},  # 3 is csv.QUOTE_NONE: GLUE's files hold bare quotes
}
ARC_OPENING = "Please choose the correct answer to the question: "
MMLU_LETTERS = "ABCD"


def load(files: dict[str, str], data_folder: str | None = None, **_: Any) -> datasets.DatasetDict:
    """The splits of a task, from json, jsonl, or csv and tsv files with a header line.

    Args:
        files: path below the data folder, for each split; all of one kind.
        data_folder: the recipe's ``eval.data_folder``; else the variable ``LORA_DROPOUT_DATA``.
        **_: the rest of the task's metadata.

    Raises:
        UserError: no data folder, or a file that is not in it.
    """
    paths = _paths(files, data_folder)
    suffix = Path(next(iter(files.values()))).suffix
    return datasets.load_dataset(**READERS[suffix], data_files=paths)


def load_mmlu(subject: str, data_folder: str | None = None, **_: Any) -> datasets.DatasetDict:
    """The splits ``dev`` (five examples) and ``test`` of an MMLU subject, in the columns of lm-eval's prompt.

    Args:
        subject: as in the files' names, e.g. ``us_foreign_policy``.
        data_folder: see :func:`load`.
        **_: the rest of the task's metadata.

    Returns:
        ``question``, ``choices`` (four texts), ``answer`` (the right one's index), ``subject`` (in words).

    Raises:
        UserError: see :func:`load`.
    """
    paths = _paths({split: f"mmlu/{split}/{subject}_{split}.csv" for split in ("dev", "test")}, data_folder)
    columns = ["question", *MMLU_LETTERS, "letter"]
    rows = datasets.load_dataset(
        "csv",
        data_files=paths,
        header=None,
        column_names=columns,
        features=datasets.Features({column: datasets.Value("string") for column in columns}),
        keep_default_na=False,  # "None" and "NA" are answers here
    )

    def document(row: dict[str, str]) -> dict[str, object]:
        return {
            "choices": [row[letter] for letter in MMLU_LETTERS],
            "answer": MMLU_LETTERS.index(row["letter"]),
            "subject": subject.replace("_", " "),
        }

    return rows.map(document, remove_columns=[*MMLU_LETTERS, "letter"], load_from_cache_file=False)


def arc_documents(rows: datasets.Dataset) -> datasets.Dataset:
    """`question`, `choices` (texts) and `gold` (the right one's index), from LLM-Adapters' instructions."""
    return rows.map(arc_document, remove_columns=rows.column_names, load_from_cache_file=False)


def arc_document(row: dict[str, str]) -> dict[str, object]:
    """Take one instruction apart.

    The instruction "Please choose the correct answer to the question: Why?", blank line, "Answer1: a Answer2: b",
    blank line, "Answer format: answer1/answer2" with the answer "answer2" gives
    ``{"question": "Why?", "choices": ["a", "b"], "gold": 1}``.
    """
    question, listed, _ = row["instruction"].removeprefix(ARC_OPENING).rsplit("\n\n", maxsplit=2)
    choices = [choice.strip() for choice in re.split(r"(?:^|\s)Answer\d: ", listed)[1:]]
    return {"question": question, "choices": choices, "gold": int(row["answer"].removeprefix("answer")) - 1}


def _paths(files: dict[str, str], data_folder: str | None) -> dict[str, str]:
    """The files in the data folder, by split; refuses where one is missing."""
    folder = data_folder or os.environ.get("LORA_DROPOUT_DATA")
    if not folder:
        raise UserError(
            f"no folder to find {', '.join(files.values())} in: set eval.data_folder in the recipe, or the "
            "environment variable LORA_DROPOUT_DATA, to the folder that eval/tasks/README.md describes"
        )
    paths = {split: Path(folder).expanduser() / file for split, file in files.items()}
    missing = [str(path) for path in paths.values() if not path.is_file()]
    if missing:
        raise UserError(f"no file {', '.join(missing)}; eval/tasks/README.md describes the data folder {folder}")
    return {split: str(path) for split, path in paths.items()}
