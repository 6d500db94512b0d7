"""What a comparison found: ``comparison.json``. The terminal, the Markdown and the HTML show these numbers only."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict


class Part(BaseModel):
    """Frozen, and strict about its keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class RunFacts(Part):
    """One run, as compared."""

    label: str
    folder: str
    system: str
    system_taken: Literal["named", "the last that ran"]
    adapter: str
    training_seed: int
    mask_seed: int | None
    """Of the ensemble's masks; None for a system without masks."""
    finished: str


class Setting(Part):
    """A recipe key that is not the same in all runs."""

    key: str
    values: list[str]
    """In the order of the runs."""


class Difference(Part):
    """Second run minus first, of one metric on one task, on the same documents."""

    metric: str
    """Key, as in ``TaskAnalysis.metrics``."""
    name: str
    """In words."""
    first: float | None
    second: float | None
    difference: float | None
    """None where one of the runs has no score (one class only)."""
    low: float | None
    """Of the 95 % interval, unadjusted; None where there is none."""
    high: float | None
    interval: str
    """How it was found, or why there is none."""
    p_value: float | None = None
    """Two-sided, unadjusted. Metrics that are neither primary nor a share of right answers have an interval only."""
    adjusted_p: float | None = None
    """By Holm, over the family; None for a metric that is not in it."""
    test: str = ""
    higher_is_better: bool | None
    percent: bool
    """Shown times 100."""
    primary: bool


class Flip(Part):
    """A document that one run answers right and the other wrong."""

    task: str
    doc_id: int
    prompt: str
    target: str
    first_answer: str
    second_answer: str
    first_confidence: float | None
    """Of the first run in its own answer; None where the samples do not tell."""
    second_confidence: float | None


class Flips(Part):
    """The documents on which right and wrong changed places, from the first run to the second."""

    both_right: int
    both_wrong: int
    right_to_wrong: int
    wrong_to_right: int
    lost: list[Flip]
    """Right to wrong: those of which the second run is most confident first, at most 20."""
    gained: list[Flip]
    """Wrong to right, likewise."""


class Detectable(Part):
    """The difference of accuracies that a test on these documents would find with 80 % power at the 5 % level."""

    task: str
    documents: int
    independent: bool
    """Where documents share texts, the real effect is larger."""
    discordance: float
    effect: float | None
    """2.8 sqrt(d / n); None where that exceeds d, the largest difference there could be."""
    source: str
    """Where the discordance is from."""


class TaskComparison(Part):
    """Two runs on one task or group."""

    task: str
    first: str
    """Label."""
    second: str
    documents: int
    clusters: int
    strata: int
    in_family: bool
    differences: list[Difference]
    """The primary metric first."""
    flips: Flips | None
    """None where no answer is right or wrong."""
    notes: list[str]


class SeedScore(Part):
    """A score of one training seed under both methods."""

    seed: int
    first: float
    second: float


class MethodDifference(Part):
    """Second method minus first, over paired training seeds: mean, Student's t interval and test."""

    task: str
    metric: str
    name: str
    first: str
    second: str
    seeds: list[SeedScore]
    first_mean: float
    second_mean: float
    difference: float | None
    """None where Student's t cannot be had; ``note`` says why."""
    deviation: float | None
    """Of the seeds' differences, n - 1."""
    low: float | None
    high: float | None
    p_value: float | None
    adjusted_p: float | None = None
    higher_is_better: bool | None
    percent: bool
    primary: bool
    in_family: bool
    note: str = ""


class MaskNoise(Part):
    """One metric of one ensemble over mask seeds."""

    task: str
    metric: str
    name: str
    scores: list[float]
    """In the order of the runs."""
    mean: float
    deviation: float
    """Sample standard deviation, n - 1."""
    deviation_low: float
    """Of its 95 % chi-squared interval."""
    deviation_high: float
    percent: bool
    primary: bool
    in_family: bool


class Family(Part):
    """The tests that were declared together, and what the declaration was."""

    tests: int
    rule: str
    """In words, with every override."""
    primary: dict[str, str]
    """Metric by task."""


class Comparison(Part):
    """Everything."""

    kind: Literal["runs", "methods", "mask seeds"]
    title: str
    verdict: list[str]
    """Sentences."""
    notes: list[str]
    """What a reader must know before the numbers."""
    runs: list[RunFacts]
    methods: dict[str, list[str]] = {}
    """Labels of the runs by method, in the order of the seeds."""
    settings: list[Setting]
    tasks: list[TaskComparison] = []
    method_differences: list[MethodDifference] = []
    mask_noise: list[MaskNoise] = []
    family: Family | None = None
    detectable: list[Detectable] = []
    written: str
    command: str
    versions: dict[str, str]
