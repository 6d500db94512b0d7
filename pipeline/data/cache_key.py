"""What tokenised rows depend on: two runs share them only where all of it is equal."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import platform
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from pipeline.checkpoint.files import sha256_of
from pipeline.data.load import data_files
from pipeline.data.packing import layout_of
from pipeline.errors import UserError
from pipeline.hub import check_local, hub_errors
from pipeline.recipe import Recipe, schema

PACKAGES = ("datasets", "jinja2", "numpy", "pyarrow", "tokenizers", "transformers", "trl")
"""They read, render, split, tokenise and pack."""


def dependencies(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Everything that decides what :func:`pipeline.data.splits.load_splits` gives, as JSON takes it.

    Raises:
        UserError: a source that cannot be had or read.
    """
    data = recipe.data
    sources = [(source, f"data.train.{index}") for index, source in enumerate(data.train)]
    if data.validation is not None and data.validation.source is not None:
        sources.append((data.validation.source, "data.validation.source"))
    return {
        "data": data.model_dump(mode="json"),
        "contents": [source_contents(source, key) for source, key in sources],
        "seed": recipe.seed,
        "layout": layout_of(recipe),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "code": _code_fingerprint(),
        "versions": {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}},
    }


def key_of(depends_on: dict[str, Any]) -> str:
    """32 hexadecimal digits."""
    return hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:32]


def source_contents(source: schema.Source, key: str) -> list[str]:
    """SHA-256 of each local file, with its suffix; revision and configuration of a dataset of the Hub.

    Raises:
        UserError: not found, not readable, or no file of a known kind.
    """
    check_local(source.path, f"{key}.path")
    path = Path(os.path.expanduser(source.path))
    if path.exists():
        try:
            return [f"{file.suffix} {sha256_of(file)}" for file in data_files(path, key)]
        except OSError as error:
            raise UserError(f"{key}.path: {source.path!r} cannot be read: {error.strerror}") from error
    with hub_errors(source.path, f"{key}.path"):
        builder = datasets.load_dataset_builder(source.path, name=source.subset)
    return [f"{source.path} {builder.config_id} {builder.hash}"]


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over the files that the tokenizer would be saved as, and over the code of its class."""
    digest = hashlib.sha256(Path(inspect.getfile(type(tokenizer))).read_bytes())
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for file in sorted(Path(folder).rglob("*")):
            if file.is_file():
                digest.update(f"{file.relative_to(folder)} {sha256_of(file)}\n".encode())
    return digest.hexdigest()


def _code_fingerprint() -> str:
    """SHA-256 over this package: whatever changes in it, rows are tokenised again."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(f"{file.name} {sha256_of(file)}\n".encode())
    return digest.hexdigest()
