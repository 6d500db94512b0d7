"""From prompt and completion to token ids and labels, and what the labels amount to."""

from __future__ import annotations

from dataclasses import dataclass

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""Label of a token that the loss does not see."""


def common_prefix_length(first: list[int], second: list[int]) -> int:
    """How many leading tokens two sequences share."""
    for index, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return index
    return min(len(first), len(second))


def tokenised_row(
    prompt: str, completion: str, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> dict[str, object]:
    """Token ids and labels of one row, the same as trl's own preparation gives.

    The whole text is tokenised at once, EOS included; labels start where it departs from the tokenised prompt, and
    the end is cut at ``max_length``. BOS is there if the tokenizer adds it by itself.

    Returns:
        ``input_ids`` and ``labels``, lists of equal length at most ``max_length``, and ``truncated``.
    """
    prompt_ids = tokenizer(prompt, verbose=False)["input_ids"]  # not verbose: what is too long is cut below
    ending = "" if completion.endswith(tokenizer.eos_token) else tokenizer.eos_token
    input_ids = tokenizer(prompt + completion + ending, verbose=False)["input_ids"]
    prompt_length = common_prefix_length(prompt_ids, input_ids)
    labels = [IGNORED] * prompt_length + input_ids[prompt_length:]
    return {
        "input_ids": input_ids[:max_length],
        "labels": labels[:max_length],
        "truncated": len(input_ids) > max_length,
    }


def tokenise(rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> datasets.Dataset:
    """Rows of ``prompt``, ``completion``, ``row`` as ``input_ids``, ``labels``, ``truncated``, ``row``."""
    return rows.map(
        lambda prompt, completion: tokenised_row(prompt, completion, tokenizer, max_length),
        input_columns=["prompt", "completion"],
        remove_columns=["prompt", "completion"],
        load_from_cache_file=False,
    )


@dataclass(frozen=True)
class LabelStatistics:
    """What there is to learn from in a tokenised dataset."""

    rows: int
    tokens: int
    trained_tokens: int
    truncated_rows: int
    untrained_rows: list[int]
    """``row`` of each row without a single trained token."""
    length_quantiles: tuple[int, int, int]
    """Tokens per row: least, median, most."""
    trained_quantiles: tuple[int, int, int]
    """Trained tokens per row: least, median, most."""


def label_statistics(tokenised: datasets.Dataset) -> LabelStatistics:
    """Count, over a non-empty dataset of :func:`tokenise`. The first token is never predicted, so never counted."""
    lengths = np.array([len(ids) for ids in tokenised["input_ids"]])
    trained = np.array([sum(label != IGNORED for label in labels[1:]) for labels in tokenised["labels"]])
    row_numbers = np.array(tokenised["row"])
    return LabelStatistics(
        rows=len(tokenised),
        tokens=int(lengths.sum()),
        trained_tokens=int(trained.sum()),
        truncated_rows=int(sum(tokenised["truncated"])),
        untrained_rows=[int(row) for row in row_numbers[trained == 0]],
        length_quantiles=(int(lengths.min()), int(np.median(lengths)), int(lengths.max())),
        trained_quantiles=(int(trained.min()), int(np.median(trained)), int(trained.max())),
    )
