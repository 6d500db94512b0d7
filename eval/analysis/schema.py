"""What ``results.json`` says of one system on one task or group, under ``lora_dropout.systems.<system>.analysis``.

The reports and the comparisons read these; nothing else in ``results.json`` holds a statistic.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict


class Part(BaseModel):
    """Frozen, and strict about its keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Estimate(Part):
    """One score with its 95 % interval, in the score's own unit (shares are between 0 and 1, losses in nats)."""

    value: float
    low: float | None = None
    high: float | None = None
    interval: str = ""
    """How it was found, in words: `Wilson`, `bootstrap, 2,000 draws`, `bootstrap within subjects, ...`; empty: none."""
    higher_is_better: bool | None = None
    percent: bool = False
    """Shown times 100."""


class CalibrationError(Part):
    """An ECE-type metric. It has no interval: a percentile bootstrap of it covers 0 % for a calibrated model."""

    value: float
    """Plug-in: biased upwards."""
    debiased_squared: float
    """Of the squared error; unbiased, may be negative."""
    band_low: float
    """2.5 % quantile of the plug-in value of a perfectly calibrated model with the same confidences."""
    band_high: float
    """97.5 % quantile."""
    p_value: float
    """Of perfect calibration."""


class Bin(Part):
    """A bar of the reliability diagram; bins without documents are left out."""

    low: float
    high: float
    count: int
    confidence: float
    """Mean."""
    accuracy: float
    accuracy_low: float
    """Wilson, 95 %."""
    accuracy_high: float


class BrierParts(Part):
    """`brier_of_answer` = reliability - resolution + uncertainty + within_bin, over the 15 equal-width bins."""

    reliability: float
    resolution: float
    uncertainty: float
    within_bin: float


class Temperature(Part):
    """Choice-level temperature, fitted by cross-fitting over documents."""

    folds: list[float]
    """One per fold, fitted on the others."""


class Entropy(Part):
    """Of the arithmetic mean of the members' distributions, in nats, averaged over documents (tokens in generation)."""

    total: float
    expected: float
    mutual_information: float


class JensenGap(Part):
    """Mean over members of the loss, minus the ensemble's loss, in nats."""

    per_token: float
    """Mean over all scored tokens; not negative but for rounding."""
    least: float
    """Smallest of any scored token; in generation, where it is not kept per token, of any text's mean."""
    choice_level: float | None
    """Of the right choice's probability among the choices; may be negative."""


class CurvePoint(Part):
    """The average of the first ``members`` members."""

    members: int
    scores: dict[str, float]
    """By metric, the keys of ``TaskAnalysis.metrics`` and ``ece``."""


class Mistake(Part):
    """A wrong answer, with its text."""

    task: str = ""
    """In a group, the part that the document is from."""
    doc_id: int
    prompt: str
    answer: str
    target: str
    confidence: float
    choices: list[str] = []
    """Multiple choice: all of them."""


class Confidence(Part):
    """One way to tell the confidence in a generated answer, against one filter's exact match."""

    ece: CalibrationError
    adaptive_ece: CalibrationError
    brier_parts: BrierParts
    bins: list[Bin]
    risk_coverage: list[tuple[float, float]]
    metrics: dict[str, Estimate]
    """`brier_of_answer`, `auroc`, `aurc`, `overconfidence`."""


class TaskAnalysis(Part):
    """Everything about one task, or about a group as a whole."""

    kind: Literal["choice", "generation", "rolling", "other"]
    documents: int
    clusters: int
    """Independent units: fewer than documents where some share a text."""
    strata: int
    """Subjects of a group; 1 for a task."""
    primary: str
    """Key in ``metrics`` of the score that comparisons test."""
    metrics: dict[str, Estimate]
    """`acc` (and `acc_norm`, `f1`, `mcc`), `nll`, `calibrated_nll`, `brier` (of all choices, 0 to 2),
    `brier_of_answer` (of the confidence in the given answer, 0 to 1), `auroc`, `aurc`, `overconfidence`;
    `exact_match,<filter>`; `bits_per_byte`, `word_perplexity` ...: lm-eval's names where it has the score."""
    ece: CalibrationError | None = None
    """15 equal-width bins."""
    adaptive_ece: CalibrationError | None = None
    """15 bins of equal counts."""
    brier_parts: BrierParts | None = None
    temperature: Temperature | None = None
    entropy: Entropy | None = None
    jensen: JensenGap | None = None
    bins: list[Bin] = []
    risk_coverage: list[tuple[float, float]] = []
    """(coverage, risk), at most 100 points."""
    curve: list[CurvePoint] = []
    confidences: dict[str, Confidence] = {}
    """Generation: by `length_normalised,<filter>` and `first_answer_token,<filter>`. The fields above, and the same
    names among the metrics, are those of the length-normalised one against the primary score."""
    sampled_subjects: dict[str, Estimate] = {}
    """A sensitivity, not the interval: groups of 20 subjects and more, as if the subjects too were a sample."""
    mistakes: list[Mistake] = []
    """The most confident first, at most 20."""
    notes: list[str] = []
    """What a reader must know, in sentences: truncated prompts, empty classes, metrics left out and why."""
