"""Examples of several lengths in one row of tokens: packed beforehand, or put together batch by batch.

An example keeps its dataset row, and with it its masks, wherever it lies.
"""

from __future__ import annotations

import itertools
from typing import Any, Literal

import datasets
import torch
from transformers import PreTrainedModel
from trl import pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from pipeline.errors import UserError
from pipeline.lora_dropout import copied_rows
from pipeline.recipe import Recipe
from pipeline.recipe.training import resolved_training


def layout_of(recipe: Recipe) -> Literal["padded", "packed", "flat"]:
    """How batches are made: rows padded to one length, packed beforehand, or put together without padding."""
    training = resolved_training(recipe)
    if training["packing"]:
        return "packed"
    return "flat" if training["padding_free"] else "padded"


def laid_out(rows: datasets.Dataset, recipe: Recipe) -> datasets.Dataset:
    """Training rows as batches are made of them.

    Args:
        rows: ``input_ids``, ``labels``, ``row`` (int); or what this function gave, which is returned.
        recipe: decides the layout.
    """
    layout = layout_of(recipe)
    if layout == "padded" or "seq_lengths" in rows.column_names:
        return rows
    return packed_rows(rows, recipe.data.max_length) if layout == "packed" else single_rows(rows)


def packed_rows(rows: datasets.Dataset, max_length: int) -> datasets.Dataset:
    """Rows filled with whole examples (trl's best-fit decreasing, within each thousand of them).

    Args:
        rows: ``input_ids``, ``labels``, ``row`` (int); no longer than ``max_length``.
        max_length: tokens of a packed row, at most.

    Returns:
        ``input_ids``, ``labels``, and for each example in it ``row`` and its tokens ``seq_lengths`` (lists of int).
    """
    # trl packs columns that are lists over tokens
    per_token = rows.select_columns(["input_ids", "labels", "row"]).map(
        lambda input_ids, row: {"row": [row] * len(input_ids)},
        input_columns=["input_ids", "row"],
        load_from_cache_file=False,
    )
    packed = pack_dataset(per_token, max_length, "bfd", {"load_from_cache_file": False})
    return packed.map(
        lambda row, seq_lengths: {"row": [row[end - 1] for end in itertools.accumulate(seq_lengths)]},
        input_columns=["row", "seq_lengths"],
        load_from_cache_file=False,
    )


def single_rows(rows: datasets.Dataset) -> datasets.Dataset:
    """The columns of :func:`packed_rows`, one example to a row: a batch of them is put together without padding."""
    return rows.map(
        lambda input_ids, row: {"row": [row], "seq_lengths": [len(input_ids)]},
        input_columns=["input_ids", "row"],
        load_from_cache_file=False,
    )


class RowCollator:
    """trl's collator, which also carries each example's place in the dataset.

    Rows with ``seq_lengths`` become one row of tokens without padding, all others a padded batch.
    """

    def __init__(self, pad_token_id: int, pad_to_multiple_of: int | None = None) -> None:
        self._padded = DataCollatorForLanguageModeling(pad_token_id, pad_to_multiple_of=pad_to_multiple_of)
        self._flat = DataCollatorForLanguageModeling(
            pad_token_id, padding_free=True, pad_to_multiple_of=pad_to_multiple_of
        )

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch.

        Returns:
            Padded: ``(B, T)`` tensors, and ``row``, B integers.
            Otherwise: ``(1, T)`` tensors with trl's marks of where examples begin, and the lists ``row`` and
            ``lengths``, tokens of each example; tokens that round T up count to the last one.
        """
        if "seq_lengths" not in examples[0]:
            batch = self._padded(examples)
            batch["row"] = [example["row"] for example in examples]
            return batch
        batch = self._flat(examples)
        batch["row"] = [row for example in examples for row in example["row"]]
        lengths = [length for example in examples for length in example["seq_lengths"]]
        lengths[-1] += batch["input_ids"].shape[1] - sum(lengths)
        batch["lengths"] = lengths
        return batch


LEAK = 0.1
"""Effect of a neighbour's first token on an example, relative to that of its own. Seen: 0 where examples are apart,
0.03 in int8, which rounds rows together; 0.8 to 1 where they are not."""


def check_apart(model: PreTrainedModel) -> None:
    """Make sure that examples in one row do not see each other.

    Where they end is told by ``position_ids``, and not every model makes its attention mask by them (OPT, Falcon).

    Args:
        model: with its weights in place, not as ZeRO-3's shards.

    Raises:
        UserError: a token of one example changes the logits of the next.
    """
    training = model.training
    model.eval()
    one, neighbour, own = (_second_of_two(model, *firsts) for firsts in ((0, 0), (1, 0), (0, 1)))
    model.train(training)
    if (neighbour - one).norm() > LEAK * (own - one).norm():
        raise UserError(
            f"training.packing, training.padding_free: in a {type(model).__name__} examples that lie in one "
            "row see each other, since its attention does not go by position_ids.\nSet both to false."
        )


@torch.no_grad()
def _second_of_two(model: PreTrainedModel, first: int, second: int) -> torch.Tensor:
    """Logits after the second example's later tokens, ``(3, vocabulary)`` float32.

    ``first`` and ``second`` are the first tokens of the two examples.
    """
    both = ([first, 2, 3, 4], [second, 4, 3, 2])
    batch = RowCollator(0)([{"input_ids": ids, "labels": ids, "row": [0], "seq_lengths": [4]} for ids in both])
    inputs = {n: value for n, value in batch.items() if n not in ("labels", "shift_labels", "row", "lengths")}
    on_device = {n: value.to(model.device) if isinstance(value, torch.Tensor) else value for n, value in inputs.items()}
    return model(**on_device, use_cache=False).logits[0, 5:].float()


def copied_batch(batch: dict[str, Any], copies: int) -> dict[str, Any]:
    """The batch ``copies`` times, one under the other: the group-major order of the masks.

    Args:
        batch: of :class:`RowCollator`, without its lists: ``(B, T)`` tensors; ``cu_seq_lens_*``, ``(E+1,)``, where E
            examples begin and end in the flattened tokens; ``max_length_*``, int.
        copies: how many.

    Returns:
        ``(copies * B, T)`` tensors, ``cu_seq_lens_*`` ``(copies * E + 1,)``.
    """
    rows = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor) and value.dim() == 2}
    ends = {name: _copied_ends(value, copies) for name, value in batch.items() if name.startswith("cu_seq_lens")}
    return {**batch, **copied_rows(rows, copies), **ends}


def _copied_ends(ends: torch.Tensor, copies: int) -> torch.Tensor:
    starts = torch.arange(copies, device=ends.device, dtype=ends.dtype)[:, None] * ends[-1]
    return torch.cat([ends[:1], (starts + ends[1:]).flatten()])
