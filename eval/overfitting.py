"""Loss curves of a training run, and what they say about overfitting in words.

Training batches are measured with masks, the probe (fixed training rows) and validation without: only the last two
compare, and their difference is the generalisation gap.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eval.scores import number

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


def finite(value: Any) -> float | None:
    """A finite number of the log, or None for anything else."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def evaluations(history: Sequence[Mapping[str, Any]]) -> list[Evaluation]:
    """Every finite validation loss by step; of two at one step the later counts."""
    by_step = {}
    for line in history:
        validation, probe = finite(line.get("validation_loss")), finite(line.get("probe_loss"))
        if validation is not None:
            by_step[int(line["step"])] = Evaluation(int(line["step"]), validation, probe)
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
    """Validation loss, gap and what the curve shows about overfitting; no bolder than one curve allows."""
    if not measured:
        return []
    last, best = measured[-1], min(measured, key=lambda one: one.validation)
    first = f"Validation loss {last.validation:.3f} nats per token after {last.step} steps"
    if last.probe is None:
        sentences = [f"{first}; no training probe was measured, so there is no gap."]
    else:
        gap = number(last.validation - last.probe, 3, sign=True)
        sentences = [f"{first}, {gap} against a fixed training probe (the generalisation gap)."]
    if len(measured) == 1:
        return [*sentences, "It was measured once: one point shows no course, so nothing is said about overfitting."]
    rise = last.validation - best.validation
    lowest = f"{best.validation:.3f} at step {best.step}"
    if best.step == last.step:
        return [
            *sentences,
            f"The last of {len(measured)} validation losses is the lowest: this curve shows no overfitting.",
        ]
    if rise < LEVEL * best.validation:
        return [
            *sentences,
            f"It was lowest, {lowest}, and ended {rise:.3f} above that, a rise of less than "
            f"{100 * LEVEL:.0f} %: level at the end, no overfitting to speak of.",
        ]
    text = f"It was lowest, {lowest}, and ended {rise:.3f} ({100 * rise / best.validation:.0f} %) above that"
    if best.probe is not None and last.probe is not None and last.probe < best.probe:
        fall = best.probe - last.probe
        return [
            *sentences,
            f"{text}, while the training probe fell by another {fall:.3f}: the shape of overfitting. "
            f"Stopping near step {best.step} would have kept the lower loss.",
        ]
    return [
        *sentences,
        f"{text}; the training probe did not fall meanwhile, so this is not the usual overfitting: "
        "look at the learning rate first.",
    ]


def training_loss_sentences(history: Sequence[Mapping[str, Any]], measured: Sequence[Evaluation]) -> list[str]:
    """What the thin line is, and what is missing."""
    if not history:
        return ["No training history came with this adapter, so there are no curves."]
    sentences = [
        "The loss of training batches is taken with dropout as in training, so only probe and validation "
        "(masks off, same checkpoint) compare with each other."
    ]
    if not measured:
        sentences.append(
            "No validation rows were held out: there is no validation loss and no gap, and overfitting "
            "cannot be judged. data.validation in the recipe adds them."
        )
    return sentences
