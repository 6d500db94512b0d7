"""What is compared: stock peft without and with its dropout, and LoRA Dropout in each of its modes."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pipeline.errors import UserError
from pipeline.recipe import Recipe, schema

REFERENCE = "lora"
STOCK_DROPOUT = "lora-dropout"
STOCK_RATE = 0.05
"""peft users' usual ``lora_dropout`` (QLoRA section B.2)."""

DEFAULT_VARIANTS = (
    "lora,lora-dropout,example,instance-1,instance-2,instance-4,instance-8,"
    "instance-2-sequential,instance-4-sequential,instance-8-sequential"
)
_OURS = re.compile(r"(?P<sampling>example|instance)(-(?P<instances>[1-9]\d*))?(-(?P<execution>sequential))?")


@dataclass(frozen=True)
class Variant:
    """One row of the table."""

    name: str
    """As on the command line."""
    dropout: schema.Dropout
    """LoRA Dropout's settings; rate 0 for the stock rows."""
    input_dropout: float = 0.0
    """peft's ``lora_dropout``."""

    @property
    def stock(self) -> bool:
        """Whether plain trl and peft run, and none of our code."""
        return not self.dropout.masked

    @property
    def copies(self) -> int:
        """Times that every row is computed."""
        return self.dropout.instances

    @property
    def copies_at_once(self) -> int:
        """Of them, in one pass."""
        return 1 if self.dropout.execution == "sequential" else self.copies

    @property
    def label(self) -> str:
        """In words, for the table."""
        if self.stock:
            return f"peft LoRA, lora_dropout={self.input_dropout}" if self.input_dropout else "peft LoRA, no dropout"
        execution = "" if self.copies == 1 else f", {self.dropout.execution}"
        return f"{self.dropout.sampling}, N = {self.copies}{execution}"

    def applied(self, recipe: Recipe) -> Recipe:
        """The recipe as this variant."""
        adapter = recipe.adapter.model_copy(update={"dropout": self.dropout, "input_dropout": self.input_dropout})
        return recipe.model_copy(update={"adapter": adapter})


def parse_variants(text: str, dropout: schema.Dropout) -> list[Variant]:
    """The variants of a comma-separated list, the reference first whether named or not.

    Args:
        text: e.g. ``lora-dropout,example,instance-4,instance-4-sequential``.
        dropout: the recipe's, whose rate and other settings ours take.

    Raises:
        UserError: an unknown name; a recipe whose rate is 0.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    return [_variant(name, dropout) for name in dict.fromkeys([REFERENCE, *names])]


def _variant(name: str, dropout: schema.Dropout) -> Variant:
    if name in (REFERENCE, STOCK_DROPOUT):
        return Variant(name, schema.Dropout(rate=0.0), STOCK_RATE if name == STOCK_DROPOUT else 0.0)
    match = _OURS.fullmatch(name)
    if match is None:
        raise UserError(
            f"--variants: found {name!r}, expected {REFERENCE}, {STOCK_DROPOUT}, example, example-N, instance-N or "
            "instance-N-sequential with a number N, separated by commas"
        )
    if not dropout.masked:
        raise UserError(f"--variants: {name!r} needs a rate above 0: set adapter.dropout.rate, e.g. to 0.5")
    return Variant(
        name,
        dropout.model_copy(
            update={
                "sampling": match["sampling"],
                "instances": int(match["instances"] or 1),
                "execution": match["execution"] or "batched",
            }
        ),
    )
