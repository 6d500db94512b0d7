"""Training and held-out rows in the words of the tasks that the study scores.

LORA_DROPOUT_DATA=FOLDER python recipes/calibration/rows.py [outputs/calibration/rows]

Reads the folder that eval/tasks/README.md describes, and from it only what no task scores: the training splits of
ARC-easy, OpenBookQA (in MMLU's words, since MMLU has no training split), RTE and SST-2. Prompts are those of lm-eval's
tasks, completions the right choice. Writes train.jsonl and held-out.jsonl, the same bytes every time.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))  # python puts this folder first

import typer

from eval import local_data
from eval.local_data import Document
from eval.local_task import FOLDER_VARIABLE
from launch.command import run_command
from pipeline.errors import UserError

TRAIN_ROWS = {"arc_easy": 450, "mmlu": 350, "rte": 300, "sst2": 900}
HELD_OUT_ROWS = 100
"""Of each task."""
MAX_LENGTH = 96
"""Tokens: longer rows are left out, so that a study of many seeds fits into an hour of two CPU cores."""
SUBJECT = "elementary science"
"""What OpenBookQA would be called as a subject of MMLU."""

Row = dict[str, str]


def arc_row(document: Document) -> Row:
    """ARC's prompt; the completion is the answer's text."""
    choices = document["choices"]
    right = choices["text"][choices["label"].index(document["answerKey"])]
    return {"prompt": f"Question: {document['question']}\nAnswer:", "completion": f" {right}"}


def mmlu_row(document: Document) -> Row:
    """MMLU's prompt without examples, for a question of OpenBookQA; the completion is a letter."""
    choices = document["choices"]
    listed = "\n".join(f"{letter}. {text}" for letter, text in zip(choices["label"], choices["text"], strict=True))
    description = f"The following are multiple choice questions (with answers) about {SUBJECT}.\n\n"
    prompt = f"{description}{document['question_stem'].strip()}\n{listed}\nAnswer:"
    return {"prompt": prompt, "completion": f" {document['answerKey']}"}


def rte_row(document: Document) -> Row:
    """RTE's prompt; the completion is True or False."""
    prompt = f"{document['sentence1']}\nQuestion: {document['sentence2']} True or False?\nAnswer:"
    return {"prompt": prompt, "completion": (" True", " False")[document["label"]]}


def sst2_row(document: Document) -> Row:
    """SST-2's prompt; the completion is positive or negative."""
    prompt = f"{document['sentence'].strip()}\nQuestion: Is this sentence positive or negative?\nAnswer:"
    return {"prompt": prompt, "completion": (" negative", " positive")[document["label"]]}


SOURCES: dict[str, tuple[Callable[[Path], list[Document]], str, str | None, Callable[[Document], Row]]] = {
    "arc_easy": (local_data.arc, "arc_easy/train.json", "arc_easy/test.json", arc_row),
    "mmlu": (local_data.openbookqa, "openbookqa/train.json", None, mmlu_row),
    "rte": (local_data.rte, "rte/train.tsv", "rte/dev.tsv", rte_row),
    "sst2": (local_data.sst2, "sst2/train.tsv", "sst2/dev.tsv", sst2_row),
}
"""Of each task: reader, file of training rows, file that is scored (where its prompts are alike), and prompt."""


def data_file(name: str) -> Path:
    """A file of the data folder.

    Raises:
        UserError: no folder, or no such file in it.
    """
    folder = os.environ.get(FOLDER_VARIABLE)
    if not folder:
        raise UserError(f"{FOLDER_VARIABLE}: not set; it names the folder that eval/tasks/README.md describes")
    path = Path(folder).expanduser() / name
    if not path.is_file():
        raise UserError(f"{FOLDER_VARIABLE}: no file {path}; eval/tasks/README.md describes the folder")
    return path


def rows_of(task: str) -> tuple[list[Row], set[str]]:
    """All training rows there are, and the prompts that are scored, which no row may have."""
    read, train, scored, row = SOURCES[task]
    prompts = {row(document)["prompt"] for document in read(data_file(scored))} if scored else set()
    return [row(document) for document in read(data_file(train))], prompts


def fitting(rows: Iterable[Row], scored: set[str]) -> list[Row]:
    """Different prompts, none of them scored, that fit into ``MAX_LENGTH`` tokens of the recipe's base."""
    from pipeline.base import load_tokenizer
    from pipeline.data.tokenise import tokenised_row
    from pipeline.recipe import load_recipe

    tokenizer = load_tokenizer(load_recipe(HERE / "calibration.yaml").base)
    different = {row["prompt"]: row for row in rows if row["prompt"] not in scored}
    return [
        row
        for row in different.values()
        if not tokenised_row(row["prompt"], row["completion"], tokenizer, MAX_LENGTH)["truncated"]
    ]


def rows(output: Annotated[Path, typer.Argument()] = Path("outputs/calibration/rows")) -> None:
    """Write train.jsonl and held-out.jsonl into OUTPUT."""
    train: list[Row] = []
    held_out: list[Row] = []
    for task in SOURCES:
        all_rows, scored = rows_of(task)
        draw = random.Random(task)
        sample = draw.sample(all_rows, min(len(all_rows), 10 * TRAIN_ROWS[task]))  # SST-2 has 67,349
        usable = fitting(sample, scored)
        wanted = TRAIN_ROWS[task] + HELD_OUT_ROWS
        if len(usable) < wanted:
            raise UserError(f"{task}: {len(usable):,} rows can be used, {wanted:,} are needed")
        train += usable[: TRAIN_ROWS[task]]
        held_out += usable[TRAIN_ROWS[task] : wanted]
        print(f"{task}: {len(all_rows):,} rows, {len(usable):,} of {len(sample):,} drawn can be used")
    output.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", train), ("held-out", held_out)):
        (output / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))


if __name__ == "__main__":
    run_command(rows)
