"""Two runs on one task: the primary test, the intervals of all metrics, the flips.

Legend: D documents, in the same order for both runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from eval.analysis.answers import Answers, ChoiceAnswers, answers_of
from eval.analysis.estimates import Score
from eval.analysis.groups import joined_choices
from eval.analysis.samples import SPOILT, common_columns, documents, first_filter, read_samples, samples_file
from eval.analysis.schema import Estimate
from eval.compare.flips import flips
from eval.compare.measures import document_values, scores_of, side_by_side, value_of
from eval.compare.runs import Run, Unit
from eval.compare.schema import Difference, TaskComparison
from eval.scores import metric_name
from eval.statistics.bootstrap import DRAWS, Interval, intervals
from eval.statistics.paired import PairedTest, difference, mcnemar_midp, sign_flip, swap_test
from eval.statistics.proportions import paired_difference
from pipeline.errors import UserError


@dataclass(frozen=True)
class UnitMaterial:
    """What one run answered on a task or group."""

    answers: Answers
    task_of: list[str]
    """``(D,)`` of a group, the part that a document is from."""
    scores: dict[str, Score]
    """By metric."""


@dataclass(frozen=True)
class Material:
    """What one run answered."""

    documents: dict[str, Answers]
    """By task with samples."""
    units: dict[str, UnitMaterial]
    """By task or group."""


def read_material(run: Run, found: Sequence[Unit]) -> Material:
    """The answers of a run to all that is compared.

    Raises:
        UserError: samples that are missing, damaged or of another version; a group that cannot be joined.
    """
    leaves = {leaf: read_documents(run, leaf) for leaf in dict.fromkeys(leaf for unit in found for leaf in unit.leaves)}
    return Material(leaves, {unit.name: unit_material(unit, leaves) for unit in found})


def read_documents(run: Run, task: str) -> Answers:
    """The answers to one task; of a kind that has no arrays of its own, lm-eval's numbers per document.

    Raises:
        UserError: samples that are missing, damaged or of another version.
    """
    samples = read_samples(run.folder, run.system, task)
    try:
        answers = answers_of(task, samples)
        if answers is not None:
            return answers
        rows = documents(task, first_filter(samples))
        return Answers(**common_columns(task, rows, [row["lora_dropout"]["requests"] for row in rows]))
    except SPOILT as error:
        file = samples_file(run.folder, run.system, task)
        raise UserError(f"{file}: a sample is not what an evaluation writes ({error!s}); evaluate again") from error


def unit_material(unit: Unit, leaves: dict[str, Answers]) -> UnitMaterial:
    """A task's answers, or those of all tasks of a group as one, each task a stratum.

    Raises:
        UserError: a group of other tasks than multiple choice.
    """
    parts = [leaves[leaf] for leaf in unit.leaves]
    if len(parts) == 1:
        return UnitMaterial(parts[0], [parts[0].task] * len(parts[0].doc_ids), scores_of(parts[0]))
    choices = [part for part in parts if isinstance(part, ChoiceAnswers)]
    if len(choices) < len(parts):
        raise UserError(f"{unit.name}: a group is compared as a whole if all its tasks are multiple choice")
    joined = joined_choices(unit.name, choices)
    return UnitMaterial(joined, [part.task for part in parts for _ in part.doc_ids], scores_of(joined))


def is_accuracy(material: UnitMaterial, metric: str) -> bool:
    """Whether a metric is a share of right answers."""
    return metric in material.scores and material.scores[metric].right is not None


def compared(
    unit: Unit, runs: tuple[Run, Run], material: tuple[Material, Material], primary: str, most: int
) -> TaskComparison:
    """Second run minus first on one task or group.

    Args:
        unit: the task or group.
        runs: first and second.
        material: theirs, on the same documents.
        primary: the tested metric.
        most: flips of each direction with text; parts of groups have none, the group has them.

    Raises:
        UserError: the primary metric cannot be computed from the samples.
    """
    first, second = (one.units[unit.name] for one in material)
    estimates = runs[0].analyses[unit.name].metrics
    theirs = runs[1].analyses[unit.name].metrics
    keys = [key for key in estimates if key in theirs and key in first.scores and key in second.scores]
    if primary not in keys:
        raise UserError(
            f"{unit.name}: {primary!r} has no value per document in the samples, so it cannot be tested; choose "
            f"another one by --primary, of {', '.join(keys) or 'which there are none'}"
        )
    keys.sort(key=lambda key: key != primary)
    found = bootstrap_intervals(first, second, [key for key in keys if not counted(first, second, key)])
    answers = first.answers
    left_out = sorted({*estimates, *theirs} - set(keys))
    return TaskComparison(
        task=unit.name,
        first=runs[0].label,
        second=runs[1].label,
        documents=len(answers.doc_ids),
        clusters=len(np.unique(answers.clusters)),
        strata=len(np.unique(answers.strata)),
        in_family=unit.in_family,
        differences=[
            one_difference(key, estimates[key], first, second, found.get(key), key == primary) for key in keys
        ],
        flips=flips(first.answers, second.answers, primary, first.task_of, most if unit.in_family else 0),
        notes=[f"Not compared, because a run has no value per document: {', '.join(left_out)}."] if left_out else [],
    )


def independent(material: UnitMaterial) -> bool:
    """Whether no two documents share a text."""
    return len(np.unique(material.answers.clusters)) == len(material.answers.clusters)


def counted(first: UnitMaterial, second: UnitMaterial, metric: str) -> bool:
    """Whether the difference is one of shares of independent documents, so that counts say all."""
    return independent(first) and all(one.scores[metric].right is not None for one in (first, second))


def bootstrap_intervals(first: UnitMaterial, second: UnitMaterial, metrics: Sequence[str]) -> dict[str, Interval]:
    """Paired: both runs are scored on the same draws."""
    differences = {key: difference(second.scores[key].statistic, first.scores[key].statistic) for key in metrics}
    clusters, strata = first.answers.clusters, first.answers.strata
    return intervals(differences, clusters, strata, draws=DRAWS, method="percentile") if metrics else {}


def one_difference(
    metric: str,
    estimate: Estimate,
    first: UnitMaterial,
    second: UnitMaterial,
    bootstrapped: Interval | None,
    primary: bool,
) -> Difference:
    """One metric, with the test that fits it.

    Independent right or wrong answers: McNemar, over all documents of all subjects; under no difference each
    discordant document is a fair coin, whatever its subject. Other means: sign flips of whole clusters. Other scores
    (F1, Matthews, perplexity), if primary: the answers of whole clusters are swapped.
    """
    mine, theirs = first.scores[metric], second.scores[metric]
    values = value_of(mine), value_of(theirs)
    each = document_values(mine), document_values(theirs)
    p_value: float | None
    low: float | None
    high: float | None
    if bootstrapped is None:
        only_first, only_second = discordant(mine, theirs)
        p_value = mcnemar_midp(only_first, only_second)
        test = f"McNemar, mid-p, {only_first} against {only_second} documents"
        bounds = paired_difference(only_second, only_first, len(first.answers.doc_ids))
        low, high, words = float(bounds.low), float(bounds.high), "Bonett-Price interval"
    else:
        low, high, words = bootstrapped.low, bootstrapped.high, f"paired {bootstrapped.words}"
        found, test = None, ""
        if each[0] is not None and each[1] is not None and (primary or mine.right is not None):
            found = sign_flip(each[1] - each[0], first.answers.clusters)
            test = test_words("sign flips", found, first, " that differ")
        elif primary:
            found = swap_test(side_by_side(theirs, mine), first.answers.clusters)
            test = "no test: a run has no score" if found is None else test_words("swapped answers", found, first)
        p_value = None if found is None else found.p_value
    return Difference(
        metric=metric,
        name=metric_name(metric),
        first=values[0],
        second=values[1],
        difference=None if values[0] is None or values[1] is None else values[1] - values[0],
        low=low,
        high=high,
        interval=words,
        p_value=p_value,
        test=test,
        higher_is_better=estimate.higher_is_better,
        percent=estimate.percent,
        primary=primary,
    )


def discordant(mine: Score, theirs: Score) -> tuple[int, int]:
    """Documents that only the first, and only the second run answers right."""
    first, second = mine.columns[0] == 1, theirs.columns[0] == 1
    return int((first & ~second).sum()), int((~first & second).sum())


def test_words(name: str, found: PairedTest, material: UnitMaterial, which: str = "") -> str:
    """``sign flips of the 12 clusters that differ, all 4,096 patterns``."""
    units = "documents" if independent(material) else "clusters"
    how = f"all {found.patterns:,} patterns" if found.exact else f"{found.patterns:,} random patterns"
    return f"{name} of the {found.units:,} {units}{which}, {how}"
