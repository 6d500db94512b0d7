"""Documents from local files, in the columns that lm-eval's prompts name: one function for each benchmark.

Each takes a file's path and returns its documents; task files in ``eval/tasks`` name it with the key ``documents`` (see
``eval/local_task.py``). All raise UserError with file and line where a row is not what it should be.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from pipeline.errors import UserError

Document = dict[str, Any]

LETTERS = "ABCDEFGHIJ"
INSTRUCTION = re.compile(
    r"Please choose the correct answer to the question: (?P<question>.*)\n\n"
    r"(?P<listed>Answer1: .*)\n\n"
    r"Answer format: (?P<names>answer1(?:/answer\d)*)",
    re.DOTALL,
)
CHOICE = re.compile(r"(?:^|\s)Answer\d: ")
HEADING = re.compile(r"= (?!=).*(?<!=) =")
"""An article's title in WikiText; sections have ``= =`` and more."""


@dataclass(frozen=True)
class Row:
    """One row of a file."""

    cells: Mapping[str, Any]
    """By column."""
    where: str
    """File and line, for messages."""

    def text(self, column: str) -> str:
        """A cell that must hold text.

        Raises:
            UserError: no such column, no text, or only blanks.
        """
        if column not in self.cells:
            raise self.error(f"no column {column!r}; it has {', '.join(map(repr, self.cells)) or 'none'}")
        value = self.cells[column]
        if not isinstance(value, str) or not value.strip():
            raise self.error(f"{column} is {value!r}, expected text")
        return value

    def index(self, column: str, labels: Sequence[str]) -> int:
        """The position of a cell's label among the labels.

        Raises:
            UserError: no such column, or another label.
        """
        label, names = self.text(column), list(labels)
        if label not in names:
            raise self.error(f"{column} is {label!r}, expected one of {', '.join(names)}")
        return names.index(label)

    def error(self, message: str) -> UserError:
        """What is wrong, with the place."""
        return UserError(f"{self.where}: {message}")


def arc(path: Path) -> list[Document]:
    """ARC from LLM-Adapters' instructions: ``question``, ``choices`` (``text``, ``label``), ``answerKey`` (a label)."""
    return [
        {"question": question, "choices": {"text": choices, "label": list(LETTERS[: len(choices)])}, "answerKey": key}
        for question, choices, key in _instructions(path)
    ]


def openbookqa(path: Path) -> list[Document]:
    """OpenBookQA, as :func:`arc`; its question's column is ``question_stem``."""
    return [{"question_stem": document.pop("question"), **document} for document in arc(path)]


def _instructions(path: Path) -> Iterator[tuple[str, list[str], str]]:
    """Question, choices and the right one's letter.

    The instruction "Please choose the correct answer to the question: Why?", blank line, "Answer1: a Answer2: b",
    blank line, "Answer format: answer1/answer2" with the answer "answer2" gives ``("Why?", ["a", "b"], "B")``.
    """
    for row in _json_rows(path):
        parts = INSTRUCTION.fullmatch(row.text("instruction").strip())
        if parts is None:
            raise row.error("the instruction is not 'Please choose ... QUESTION', 'Answer1: ...', 'Answer format: ...'")
        question, listed, names = parts.groups()
        choices = [choice.strip() for choice in CHOICE.split(listed)[1:]]
        if len(choices) != len(names.split("/")) or not all(choices):
            raise row.error(f"the instruction lists {len(choices)} answers and names {names}")
        yield question, choices, LETTERS[row.index("answer", names.split("/"))]


def mmlu(path: Path) -> list[Document]:
    """MMLU from its csv (question, A, B, C, D, letter; no header): the columns of ``cais/mmlu``, and ``passage``.

    ``passage`` is equal in questions on the same text: a hash of all lines of the question but its last.
    """
    subject = path.stem.removesuffix("_test").removesuffix("_dev")
    columns = ["question", *"ABCD", "letter"]
    return [
        {
            "question": row.text("question"),
            "subject": subject,
            "choices": [row.text(letter) for letter in "ABCD"],
            "answer": row.index("letter", "ABCD"),
            "passage": _hash(row.text("question").rsplit("\n", 1)[0]),
        }
        for row in _csv_rows(path, columns)
    ]


def _hash(text: str) -> str:
    return hashlib.sha256(" ".join(text.split()).encode()).hexdigest()[:12]


def sst2(path: Path) -> list[Document]:
    """SST-2 from tsv (``label``, and ``sentence`` or ``content``): ``sentence``, ``label`` (1 is positive)."""
    documents = []
    for row in _tsv_rows(path):
        column = "content" if "content" in row.cells else "sentence"
        documents.append({"sentence": row.text(column), "label": row.index("label", "01")})
    return documents


def rte(path: Path) -> list[Document]:
    """RTE from GLUE's tsv: ``sentence1`` (the premise), ``sentence2``, ``label`` (0 is entailment)."""
    return [
        {
            "sentence1": row.text("sentence1"),
            "sentence2": row.text("sentence2"),
            "label": row.index("label", ["entailment", "not_entailment"]),
        }
        for row in _tsv_rows(path)
    ]


def cola(path: Path) -> list[Document]:
    """CoLA from its tsv (source, label, a mark, sentence; no header): ``sentence``, ``label`` (1 is acceptable)."""
    return [
        {"sentence": row.text("sentence"), "label": row.index("label", "01")}
        for row in _tsv_rows(path, ["source", "label", "mark", "sentence"])
    ]


def mrpc(path: Path) -> list[Document]:
    """MRPC from Microsoft's tsv: ``sentence1``, ``sentence2``, ``label`` (1 is a paraphrase), ``cluster``.

    ``cluster`` is equal in pairs that a chain of shared sentences (by their IDs) connects.
    """
    rows = _tsv_rows(path)
    clusters = _connected([(row.text("#1 ID"), row.text("#2 ID")) for row in rows])
    return [
        {
            "sentence1": row.text("#1 String"),
            "sentence2": row.text("#2 String"),
            "label": row.index("Quality", "01"),
            "cluster": str(cluster),
        }
        for row, cluster in zip(rows, clusters, strict=True)
    ]


def _connected(pairs: list[tuple[str, str]]) -> list[int]:
    """The number of each pair's connected component."""
    if not pairs:
        return []
    names, ends = np.unique(np.array(pairs), return_inverse=True)
    first, second = ends.reshape(-1, 2).T
    graph = coo_array((np.ones(len(pairs)), (first, second)), shape=(len(names), len(names)))
    return connected_components(graph, directed=False)[1][first].tolist()


def gsm8k(path: Path) -> list[Document]:
    """GSM8K from its jsonl: ``question``, ``answer`` (reasoning, ``####``, the number)."""
    documents = []
    for row in _json_rows(path):
        if "####" not in row.text("answer"):
            raise row.error("the answer has no '####' before its number")
        documents.append({"question": row.text("question"), "answer": row.text("answer")})
    return documents


def lambada(path: Path) -> list[Document]:
    """LAMBADA from jsonl, a ``text`` or its ``context`` and ``continuation`` (the last word): ``text``."""
    documents = []
    for row in _json_rows(path):
        if "text" in row.cells:
            text = row.text("text")
        else:
            text = f"{row.text('context').rstrip(' ')} {row.text('continuation').strip(' ')}"
            if " " in row.text("continuation").strip(" "):
                raise row.error(f"continuation is {row.text('continuation')!r}, expected one word")
        if " " not in text.strip(" "):
            raise row.error(f"found {text!r}, expected a text of several words")
        documents.append({"text": text})
    return documents


def wikitext(path: Path) -> list[Document]:
    """WikiText from its text, whole articles: ``page``, from one title (`` = Title = ``) to the next.

    As in the Hub's ``EleutherAI/wikitext_document_level``, which lm-eval reads: lines stay as they are.
    """
    articles: list[list[str]] = [[]]
    for line in _text(path).split("\n"):
        if HEADING.fullmatch(line.strip()):
            articles.append([])
        articles[-1].append(line)
    pages = ["\n".join(lines) for lines in articles]
    return [{"page": page} for page in pages if page.strip()]


def unchanged(path: Path) -> list[Document]:
    """The rows as they are, for task files of your own: json, jsonl, or csv and tsv with a header line (all text)."""
    readers = {".json": _json_rows, ".jsonl": _json_rows, ".csv": _csv_rows, ".tsv": _tsv_rows}
    if path.suffix not in readers:
        raise UserError(f"{path}: expected one of {', '.join(readers)}")
    return [dict(row.cells) for row in readers[path.suffix](path)]


def _json_rows(path: Path) -> list[Row]:
    """Of a json file (a list of objects) or a jsonl file (an object in each line)."""
    text = _text(path)
    if path.suffix == ".json":
        values = [(f"{path}, row {number}", value) for number, value in enumerate(_json_list(path, text), start=1)]
    else:
        lines = [(f"{path}, line {number}", line) for number, line in enumerate(text.split("\n"), start=1)]
        values = [(where, _json(where, line)) for where, line in lines if line.strip()]
    for where, value in values:
        if not isinstance(value, dict):
            raise UserError(f"{where}: expected an object with named values, found {str(value)[:60]!r}")
    return [Row(value, where) for where, value in values]


def _json_list(path: Path, text: str) -> list[Any]:
    if not text.strip():
        return []
    value = _json(str(path), text)
    if not isinstance(value, list):
        raise UserError(f"{path}: expected a list of objects, found {type(value).__name__}")
    return value


def _json(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON: {error}") from error


def _tsv_rows(path: Path, columns: list[str] | None = None) -> list[Row]:
    """Cells between tabs. Quotes are text: GLUE's files hold single ones.

    Args:
        path: the file.
        columns: their names, where the file has no header line.
    """
    lines = [(number, line.split("\t")) for number, line in enumerate(_text(path).split("\n"), start=1) if line.strip()]
    return _table(path, lines, columns)


def _csv_rows(path: Path, columns: list[str] | None = None) -> list[Row]:
    """Cells between commas, quoted where they hold commas or line breaks; arguments as in :func:`_tsv_rows`."""
    reader = csv.reader(io.StringIO(_characters(path), newline=""), strict=True)
    try:
        lines = [(reader.line_num, cells) for cells in reader if cells]
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: not csv: {error}") from error
    return _table(path, lines, columns)


def _table(path: Path, lines: list[tuple[int, list[str]]], columns: list[str] | None) -> list[Row]:
    if columns is None and lines:
        columns = lines.pop(0)[1]
    found = []
    for number, cells in lines:
        if columns is None or len(cells) != len(columns):
            expected = f"{len(columns or [])} cells ({', '.join(columns or [])})"
            raise UserError(f"{path}, line {number}: found {len(cells)} cells, expected {expected}")
        found.append(Row(dict(zip(columns, cells, strict=True)), f"{path}, line {number}"))
    return found


def _text(path: Path) -> str:
    """A file's text, without a byte order mark, with newlines as line ends."""
    return _characters(path).replace("\r\n", "\n")


def _characters(path: Path) -> str:
    """A file's text as it stands, but for a byte order mark."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from error
