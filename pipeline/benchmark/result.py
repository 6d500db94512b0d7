"""What a benchmark found: rows of the table, and the conditions they hold under."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from pipeline.benchmark.statistics import Timing, interval_name
from pipeline.benchmark.variants import REFERENCE, Variant

SCHEMA = 1
"""Of the JSON file."""


@dataclass(frozen=True)
class Row:
    """One variant."""

    variant: Variant
    phases: dict[str, Timing]
    """By name, in order; the last is the most complete."""
    tokens_per_second: float
    """Tokens of the data, of which N copies count once, over the most complete phase's median."""
    peak_bytes: int
    """Base, adapter, optimizer states, and the most that tensors take within a step."""

    @property
    def whole(self) -> Timing:
        """The most complete phase."""
        return list(self.phases.values())[-1]


@dataclass(frozen=True)
class Result:
    """A benchmark."""

    conditions: dict[str, Any]
    """Everything that changes the numbers, in words and numbers."""
    rows: list[Row]
    """The reference first."""
    training: dict[str, float] | None
    """``steps`` and ``accumulation`` of the recipe's whole run, where its data was read."""

    @property
    def reference(self) -> Row:
        """Stock peft LoRA without dropout."""
        return self.rows[0]

    @property
    def interval_name(self) -> str:
        """What ``ratio_interval`` is: see :func:`pipeline.benchmark.statistics.interval_name`."""
        return interval_name(len(self.reference.whole.seconds))

    def seconds(self, row: Row) -> float:
        """Of the recipe's whole run under a variant; accumulation repeats forward and backward, not the rest."""
        assert self.training is not None
        both, step = row.phases["forward+backward"].median, row.phases["step"].median
        return self.training["steps"] * (step + (self.training["accumulation"] - 1) * both)

    def as_dict(self) -> dict[str, Any]:
        """For a JSON file."""
        return {
            "schema": SCHEMA,
            "reference": REFERENCE,
            "ratio_interval_is": self.interval_name,
            "conditions": self.conditions,
            "training": self.training,
            "variants": [
                {
                    "name": row.variant.name,
                    "label": row.variant.label,
                    "copies": row.variant.copies,
                    "copies_at_once": row.variant.copies_at_once,
                    "tokens_per_second": row.tokens_per_second,
                    "peak_bytes": row.peak_bytes,
                    "phases": {phase: asdict(timing) for phase, timing in row.phases.items()},
                }
                for row in self.rows
            ],
            "words": plain_words(self),
        }


def plain_words(result: Result) -> list[str]:
    """A sentence for each question: what one mask per example costs, what N instances cost, how long it takes."""
    rows = [row for row in result.rows if not row.variant.stock]
    example = [row for row in rows if row.variant.dropout.sampling == "example"][:1]
    instances = [row for row in rows if row.variant.dropout.sampling == "instance" and row.variant.copies > 1]
    batched = [row for row in instances if row.variant.copies_at_once > 1]
    sequential = [row for row in instances if row.variant.copies_at_once == 1]
    words = []
    for row in example:
        low, high = row.whole.ratio_interval
        interval = f" ({result.interval_name} {low:.2f} to {high:.2f})"
        words.append(f"{row.variant.label}: {_cost(result, example, interval)}.")
    for name, group in (("batched", batched), ("sequential", sequential)):
        if group:
            copies = ", ".join(str(row.variant.copies) for row in group)
            words.append(f"instance, N = {copies}, {name}: {_cost(result, group)}.")
    duration = _how_long(result, [result.reference, *example, *(batched or sequential)])
    return [*words, duration] if duration else words


def _cost(result: Result, rows: list[Row], interval: str = "") -> str:
    """Time and memory of one or more variants, as multiples of plain LoRA's."""
    time = ", ".join(f"{row.whole.ratio:.2f}" for row in rows)
    memory = ", ".join(f"{row.peak_bytes / result.reference.peak_bytes:.2f}" for row in rows)
    return f"{time} times plain LoRA's time{interval}, {memory} times its memory"


def _how_long(result: Result, rows: list[Row]) -> str | None:
    """The recipe's run, or 1,000 random rows; None for a single layer."""
    found = result.conditions
    if result.training is not None:
        what = f"The recipe's {result.training['steps']:,.0f} steps"
        seconds = [result.seconds(row) for row in rows]
    elif "step" in result.reference.phases:
        what = f"1,000 examples of {found['tokens_per_row']:.0f} tokens"
        seconds = [1000 * row.whole.median / found["rows"] for row in rows]
    else:
        return None
    times = ", ".join(f"{_duration(took)} ({row.variant.name})" for took, row in zip(seconds, rows, strict=True))
    return f"{what} would take here {times}."


def _duration(seconds: float) -> str:
    """`3.2 h`, `14 min`, `52 s`."""
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"
