"""What a benchmark found: rows of the table, and the conditions they hold under."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from pipeline.benchmark.statistics import Timing
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
    """What it costs, in sentences."""
    reference = result.reference
    phase = list(reference.phases)[-1]
    what = {"step": "a training step", "forward+backward": "forward and backward of the layer"}[phase]
    words = []
    for row in result.rows[1:]:
        low, high = row.whole.ratio_interval
        memory = row.peak_bytes / reference.peak_bytes
        words.append(
            f"{row.variant.label}: {what} takes {row.whole.ratio:.2f} times as long as plain LoRA's "
            f"(95 % interval {low:.2f} to {high:.2f}) and {memory:.2f} times the memory."
        )
    if result.training is None and phase == "step":
        found = result.conditions
        times = ", ".join(
            f"{_duration(1000 * row.whole.median / found['rows'])} with {row.variant.name}" for row in result.rows
        )
        words.append(f"1,000 examples of {found['tokens_per_row']:.0f} tokens would take {times}, on this machine.")
    if result.training is not None:
        times = ", ".join(f"{_duration(result.seconds(row))} with {row.variant.name}" for row in result.rows)
        words.append(f"The recipe's {result.training['steps']:,.0f} steps would take {times}, on this machine.")
    return words


def _duration(seconds: float) -> str:
    """`3.2 h`, `14 min`, `52 s`."""
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"
