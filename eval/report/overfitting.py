"""Loss curves of a training run, and what they say about overfitting in words.

Training batches are measured with masks, the probe (fixed training rows) and validation without: only the last two
compare, and their difference is the generalisation gap.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eval.numbers import NORMAL_95, number

LEVEL = 0.01  # a rise of validation loss by less than this part of its minimum is called level


@dataclass(frozen=True)
class Curve:
    """Loss in nats per token at optimizer steps."""

    name: str
    steps: list[int]
    losses: list[float]


@dataclass(frozen=True)
class Evaluation:
    """Probe and validation loss at one optimizer step, nats per token, masks off."""

    step: int
    validation: float
    probe: float | None
    gap_stderr: float | None = None
    """Of their difference, over rows: two independent sets of them."""


def finite(value: Any) -> float | None:
    """A finite number of the log, or None for anything else."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def evaluations(history: Sequence[Mapping[str, Any]]) -> list[Evaluation]:
    """Every finite validation loss by step; of two at one step the later counts."""
    by_step = {}
    for line in history:
        validation, probe = finite(line.get("validation_loss")), finite(line.get("probe_loss"))
        if validation is not None:
            stderrs = [finite(line.get(f"{name}_loss_stderr")) for name in ("validation", "probe")]
            known = [stderr for stderr in stderrs if stderr is not None]
            gap_stderr = math.hypot(*known) if len(known) == 2 else None
            by_step[int(line["step"])] = Evaluation(int(line["step"]), validation, probe, gap_stderr)
    return [by_step[step] for step in sorted(by_step)]


def loss_curves(history: Sequence[Mapping[str, Any]]) -> list[Curve]:
    """The curves that exist: a curve needs two points."""
    training = [(int(line["step"]), loss) for line in history if (loss := finite(line.get("loss"))) is not None]
    measured = evaluations(history)
    points = {
        "training batches": training,
        "training probe": [(one.step, one.probe) for one in measured if one.probe is not None],
        "validation": [(one.step, one.validation) for one in measured],
    }
    return [
        Curve(name, [step for step, _ in found], [loss for _, loss in found])
        for name, found in points.items()
        if len(found) >= 2
    ]


def loss_sentences(measured: Sequence[Evaluation]) -> list[str]:
    """Validation loss and gap, then what the curve shows about overfitting."""
    return [gap_sentence(measured[-1]), course_sentence(measured)] if measured else []


def gap_sentence(last: Evaluation) -> str:
    """Where training ended."""
    text = f"Validation loss {last.validation:.3f} nats per token after {last.step} steps"
    if last.probe is None:
        return f"{text}; no training probe was measured, so there is no gap."
    gap = last.validation - last.probe
    interval = ""
    if last.gap_stderr is not None:
        low, high = (number(gap + sign * NORMAL_95 * last.gap_stderr, 3, sign=True) for sign in (-1, 1))
        interval = f"; 95 % interval over rows {low} to {high}"
    text = f"{text}, {number(gap, 3, sign=True)} against a fixed training probe (the generalisation gap{interval})"
    return f"{text}. It is negative where the validation rows happen to be easier." if gap < 0 else f"{text}."


def course_sentence(measured: Sequence[Evaluation]) -> str:
    """Whether validation loss rose again while the training probe fell; no bolder than one curve allows."""
    last, best = measured[-1], min(measured, key=lambda one: one.validation)
    rise = last.validation - best.validation
    if len(measured) == 1:
        return "Validation loss was measured once: one point shows no course, so nothing is said about overfitting."
    if best.step == last.step:
        return (
            f"The last of {len(measured)} validation losses is the lowest: this curve shows no overfitting, nor where "
            "it would begin."
        )
    text = f"Validation loss was lowest, {best.validation:.3f}, at step {best.step} and ended {rise:.3f} above that"
    if rise < LEVEL * best.validation:
        return f"{text}, which is less than {100 * LEVEL:.0f} % and called level here: this curve shows no overfitting."
    text = f"{text} ({100 * rise / best.validation:.0f} %)"
    if best.probe is None or last.probe is None:
        return f"{text}. Without a training probe the curve does not say whether that is overfitting."
    fall = best.probe - last.probe
    if fall <= 0:
        return (
            f"{text}, but the training probe did not fall meanwhile: not overfitting, look at the learning rate first."
        )
    return (
        f"{text}, while the training probe fell by another {fall:.3f}: the shape of overfitting. "
        f"Stopping near step {best.step} would have kept the lower loss."
    )


def training_loss_sentences(history: Sequence[Mapping[str, Any]], measured: Sequence[Evaluation]) -> list[str]:
    """What the thin line is, and what is missing."""
    if not history:
        return ["No training history came with this adapter, so there are no curves."]
    sentences = [
        "The loss of training batches is taken while the weights move, masks on; only probe and "
        "validation (masks off, same checkpoint) compare with each other."
    ]
    if any(one.probe is not None and one.gap_stderr is None for one in measured):
        sentences.append("The log has no standard errors of the losses, so the gap stands without an interval.")
    if not measured:
        sentences.append(
            "No validation rows were held out: there is no validation loss and no gap, and overfitting "
            "cannot be judged. data.validation in the recipe adds them."
        )
    return sentences
