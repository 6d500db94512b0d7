"""From sources to rows of prompt and completion."""

from __future__ import annotations

import json
import lzma
import os
import pkgutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow
from datasets.utils.extract import Extractor

from pipeline.data.prompts import OPTIONAL_COLUMNS, PromptTemplate
from pipeline.errors import UserError
from pipeline.hub import check_local, hub_errors
from pipeline.recipe import schema
from pipeline.recipe.schema import FORMAT_COLUMNS

LOADERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
READERS = frozenset(module.name for module in pkgutil.iter_modules(datasets.packaged_modules.__path__))
"""What datasets takes for the reader of a format, and not for a name: given one of them, it would read whatever files
lie in the working directory."""
UNREADABLE = (
    datasets.exceptions.DatasetsError,
    pyarrow.ArrowException,
    OSError,
    ValueError,
    LookupError,
    TypeError,
    ArithmeticError,
    RecursionError,
    StopIteration,
)
"""What datasets and pyarrow raise for a damaged file, or for one of another kind than its name says."""
NO_ROWS = ("BatchSize must be greater than 0", "file size is 0 bytes", "Empty JSON file", "corresponds to no data")
"""Of their words, those that are said of files without a single row."""


def load_rows(sources: list[schema.Source], keys: list[str] | None = None) -> datasets.Dataset:
    """All rows of the sources, in order.

    Args:
        sources: of the recipe.
        keys: recipe key of each, for messages; those of ``data.train`` by default.

    Returns:
        A dataset with the columns ``prompt``, ``completion`` (text) and ``row`` (int, place in the concatenation,
        the row's name for masks and messages).

    Raises:
        UserError: names file, row and column of what is wrong.
    """
    keys = keys or [f"data.train.{index}" for index in range(len(sources))]
    parts = [load_source(source, key) for source, key in zip(sources, keys, strict=True)]
    rows = datasets.concatenate_datasets(parts)
    return rows.add_column("row", list(range(len(rows))))


def load_source(source: schema.Source, key: str) -> datasets.Dataset:
    """Rows of one source with the columns ``prompt`` and ``completion``."""
    raw = read_raw(source, key)
    if source.limit is not None:
        raw = raw.select(range(min(source.limit, len(raw))))
    if len(raw) == 0:
        raise UserError(f"{key}.path: {source.path!r} has no rows")
    renamed = {wanted: source.columns.get(wanted, wanted) for wanted in FORMAT_COLUMNS[source.format]}
    completion = renamed[FORMAT_COLUMNS[source.format][-1]]
    _check_columns(raw, source, renamed, completion, key)
    template = PromptTemplate(source, key)

    def prompt_and_completion(row: dict[str, Any], index: int) -> dict[str, str]:
        columns = {**row, **{wanted: _text(row.get(own)) for wanted, own in renamed.items()}}
        if not isinstance(row[completion], str):
            raise UserError(
                f"{source.path}, row {index + 1}: {completion!r} is {type(row[completion]).__name__}, expected text"
            )
        return {"prompt": template.render(columns), "completion": row[completion]}

    try:
        return raw.map(
            prompt_and_completion, with_indices=True, remove_columns=raw.column_names, load_from_cache_file=False
        )
    except UNREADABLE as error:
        raise UserError(f"{key}.path: a row of {source.path!r} cannot be read: {_first_line(error)}") from error


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _check_columns(
    raw: datasets.Dataset, source: schema.Source, renamed: dict[str, str], completion: str, key: str
) -> None:
    needed = (
        {completion} if source.prompt else {own for wanted, own in renamed.items() if wanted not in OPTIONAL_COLUMNS}
    )
    missing = sorted(needed - set(raw.column_names))
    if missing:
        raise UserError(
            f"{key}: {source.path!r} has the columns {', '.join(raw.column_names)}; "
            f"the format {source.format!r} needs {', '.join(missing)}.\n"
            f"Name yours with {key}.columns, e.g. columns: {{{next(iter(renamed))}: {raw.column_names[0]}}}"
        )


def read_raw(source: schema.Source, key: str) -> datasets.Dataset:
    """The source's own rows: a json, jsonl or parquet file, a folder of them, or a Hub dataset."""
    check_local(source.path, f"{key}.path")
    path = Path(os.path.expanduser(source.path))
    if not os.path.exists(path):
        if source.path in READERS:
            raise UserError(f"{key}.path: found {source.path!r}, expected a file, a folder, or a data set of the Hub")
        try:
            with hub_errors(source.path, f"{key}.path"):
                return datasets.load_dataset(source.path, name=source.subset, split=source.split)
        except UNREADABLE as error:
            raise UserError(f"{key}.path: {source.path!r} cannot be read: {_first_line(error)}") from error
    files = data_files(path, key)
    if len({LOADERS[file.suffix] for file in files}) > 1:
        raise UserError(f"{key}.path: {source.path!r} mixes json and parquet files; list them as two sources")
    for file in files:
        packed = _archive(file)
        if packed:  # datasets would unpack it into its cache, however large it gets
            raise UserError(f"{key}.path: {file} is no {file.suffix} file, but {packed}: unpack it")
    try:
        return datasets.load_dataset(LOADERS[files[0].suffix], data_files=[str(file) for file in files], split="train")
    except datasets.exceptions.DatasetGenerationError as error:
        for file in files:
            problem = first_json_problem(file) if LOADERS[file.suffix] == "json" else None
            if problem:
                raise UserError(f"{key}.path: {file}, {problem}") from error
        raise UserError(
            f"{key}.path: {source.path!r} cannot be read: {_first_line(error.__cause__ or error)}"
        ) from error
    except UNREADABLE as error:
        if isinstance(error, StopIteration) or any(words in str(error) for words in NO_ROWS):
            raise UserError(f"{key}.path: {source.path!r} has no rows ({_first_line(error) or 'empty'})") from error
        raise UserError(f"{key}.path: {source.path!r} cannot be read: {_first_line(error)}") from error


def _archive(file: Path) -> str | None:
    """The kind of archive that a file is by its first bytes, whatever its name; None where it is none."""
    try:
        return Extractor.infer_extractor_format(file) or None
    except (EOFError, zlib.error, lzma.LZMAError, OSError):  # it looks into archives for others within
        return "a damaged archive"


def _first_line(error: BaseException) -> str:
    """An error's words; pyarrow adds pages."""
    return str(error).partition("\n")[0][:300]


def data_files(path: Path, key: str) -> list[Path]:
    """The files of a local source, in the order in which their rows count.

    Raises:
        UserError: there are none that can be read.
    """
    files = [path] if not path.is_dir() else sorted(file for file in path.iterdir() if file.suffix in LOADERS)
    if not files or files[0].suffix not in LOADERS:
        raise UserError(f"{key}.path: {path} is no {', '.join(LOADERS)} file, nor a folder that holds one")
    return files


def first_json_problem(file: Path) -> str | None:
    """Where a json or jsonl file is malformed, in words; None where it is not."""
    text = file.read_text(encoding="utf-8", errors="replace")
    for row, record in enumerate(_json_records(text), start=1):
        if isinstance(record, json.JSONDecodeError):
            return f"row {row} (line {record.lineno}, column {record.colno}): malformed JSON: {record.msg}"
        if isinstance(record, RecursionError | ValueError):  # a ValueError that is none of json's: digits
            return f"row {row}: {'nested too deeply' if isinstance(record, RecursionError) else record}"
        if not isinstance(record, dict):
            return f"row {row}: found {type(record).__name__}, expected an object with the row's columns"
    return None


def _json_records(text: str) -> Iterator[Any]:
    """The records of a JSON array or of JSON lines; the error in place of the first that is malformed.

    The error's line and column count from the start of ``text``.
    """
    decoder = json.JSONDecoder()
    in_array = text.lstrip()[:1] == "["
    position = text.index("[") + 1 if in_array else 0
    while True:
        while position < len(text) and text[position] in " \t\r\n,":
            position += 1
        if position >= len(text) or (in_array and text[position] == "]"):
            return
        try:
            record, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            yield error
            return
        yield record
