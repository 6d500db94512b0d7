"""The rows a run trains on, those it is measured on, and the fixed probe that makes the two comparable."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import datasets
import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from pipeline.data.load import load_rows
from pipeline.data.packing import laid_out
from pipeline.data.tokenise import LabelStatistics, label_statistics, tokenise
from pipeline.errors import UserError
from pipeline.recipe import Recipe, schema

MOST_UNTRAINED = 0.01
"""Share of rows without a trained token above which the data is refused: a wrong template or too short a length."""


@dataclass(frozen=True)
class Splits:
    """Tokenised rows, with the columns ``input_ids``, ``labels``, ``row``."""

    train: datasets.Dataset
    validation: datasets.Dataset | None
    probe: datasets.Dataset | None
    """Training rows, fixed by the seed, measured like validation; their difference is the generalisation gap."""
    statistics: LabelStatistics
    """Of the training rows, before untrained ones were dropped."""
    dropped: dict[str, list[int]]
    """``row`` of each row without a trained token, left out, by split."""
    sources: list[dict[str, object]]
    """Path, rows and content fingerprint of each split."""
    laid_out: datasets.Dataset
    """The training rows as batches are made of them: ``train`` itself, or packed, see :func:`laid_out`."""
    tokens_sha256: str
    """Of ``train``: equal only for the same token ids, labels and row numbers in the same order."""


def load_splits(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Splits:
    """Load, split, tokenise and check.

    Raises:
        UserError: see :func:`pipeline.data.load.load_rows`; too many rows without a trained token; an empty split.
    """
    rows, held_out = split_rows(recipe.data, recipe.seed)
    max_length = recipe.data.max_length
    tokenised = tokenise(rows, tokenizer, max_length)
    statistics = label_statistics(tokenised)
    train = without_untrained(tokenised, statistics, "data.train")
    sources = [_described("train", [s.path for s in recipe.data.train], rows)]
    dropped = {"training": statistics.untrained_rows}
    laid = laid_out(train, recipe)
    tokens = token_fingerprint(train)
    if held_out is None:
        return Splits(train, None, None, statistics, dropped, sources, laid, tokens)
    validation = tokenise(held_out, tokenizer, max_length)
    held_out_statistics = label_statistics(validation)
    dropped["validation"] = held_out_statistics.untrained_rows
    validation = without_untrained(validation, held_out_statistics, "data.validation")
    assert recipe.data.validation is not None
    source = recipe.data.validation.source
    sources.append(_described("validation", [source.path] if source else ["held out of train"], held_out))
    return Splits(train, validation, probe_rows(train, recipe), statistics, dropped, sources, laid, tokens)


def split_rows(data: schema.Data, seed: int) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """Training rows, and validation rows where the recipe asks for them."""
    rows = load_rows(data.train)
    if data.validation is None:
        return rows, None
    if data.validation.source is not None:
        return rows, load_rows([data.validation.source], ["data.validation.source"])
    assert data.validation.fraction is not None  # the schema asks for exactly one of the two
    if round(len(rows) * data.validation.fraction) in (0, len(rows)):
        raise UserError(
            f"data.validation.fraction: {data.validation.fraction} of {len(rows)} rows leaves one split empty; "
            "give more rows or another fraction"
        )
    parts = rows.train_test_split(test_size=data.validation.fraction, seed=seed)
    return parts["train"], parts["test"]


def probe_rows(train: datasets.Dataset, recipe: Recipe) -> datasets.Dataset:
    """The fixed training probe: as many rows as asked for, or all."""
    assert recipe.data.validation is not None
    count = min(recipe.data.validation.probe_rows, len(train))
    return train.shuffle(seed=recipe.seed).select(range(count))


def without_untrained(tokenised: datasets.Dataset, statistics: LabelStatistics, key: str) -> datasets.Dataset:
    """Rows that have something to learn; refuses where more than one in a hundred has not.

    trl would drop them without a word.
    """
    untrained = statistics.untrained_rows
    if len(untrained) > MOST_UNTRAINED * statistics.rows:
        listed = ", ".join(str(row + 1) for row in untrained[:10]) + (", ..." if len(untrained) > 10 else "")
        raise UserError(
            f"{key}: {len(untrained)} of {statistics.rows} rows have no trained token (rows {listed}); at most "
            f"{MOST_UNTRAINED:.0%} may.\nTheir prompt alone fills data.max_length, or their completion is empty: raise "
            "data.max_length or mend the rows."
        )
    dropped = set(untrained)
    kept = [index for index, row in enumerate(tokenised["row"]) if row not in dropped]
    return tokenised.select(kept).select_columns(["input_ids", "labels", "row"])


def _described(split: str, paths: list[str], rows: datasets.Dataset) -> dict[str, object]:
    return {"split": split, "paths": paths, "rows": len(rows), "sha256": content_fingerprint(rows)}


def content_fingerprint(rows: datasets.Dataset) -> str:
    """SHA-256 over prompts and completions in order: equal data, equal fingerprint, wherever the files lie."""
    digest = hashlib.sha256()
    for row in rows:
        for part in (row["prompt"], row["completion"]):
            encoded = part.encode()
            digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()


def token_fingerprint(rows: datasets.Dataset) -> str:
    """SHA-256 over token ids, labels and row numbers in order: of what is learned, whichever files it came from."""
    digests = {name: hashlib.sha256() for name in ("lengths", "input_ids", "labels", "row")}
    for batch in rows.with_format("arrow").iter(1000):
        for name in ("input_ids", "labels"):
            digests[name].update(_numbers(batch[name].combine_chunks().flatten()))
        digests["lengths"].update(_numbers(batch["input_ids"].combine_chunks().value_lengths()))
        digests["row"].update(_numbers(batch["row"].combine_chunks()))
    return hashlib.sha256("".join(digest.hexdigest() for digest in digests.values()).encode()).hexdigest()


def _numbers(array: pa.Array) -> bytes:
    """As 64-bit integers, little-endian."""
    return array.to_numpy(zero_copy_only=False).astype(np.dtype("<i8")).tobytes()
