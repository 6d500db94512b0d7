"""What a system answered, as arrays: from lm-eval's samples, fresh or read back from a run's folder.

Legend: D documents (in order of doc_id), C most choices of any document, N members.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eval.analysis.samples import (
    SPOILT,
    Bools,
    Floats,
    Ints,
    Sample,
    as_text,
    common_columns,
    conditional,
    documents,
    filter_scores,
    first_filter,
    floats,
    least_gap,
    numbers,
    read_samples,
    samples_file,
    stacked,
    summed,
    weights,
    zero_one_metric,
)
from pipeline.errors import UserError

RUNNING_TOLERANCE = 1e-6
"""Relative; between lm-eval's log-likelihood and the last running one, which are one number."""


@dataclass(frozen=True)
class Answers:
    """Common to all kinds; all there is of a kind that is none of those below."""

    task: str
    doc_ids: Ints
    """``(D,)``"""
    doc_hashes: tuple[str, ...]
    """lm-eval's, of the document."""
    request_hashes: tuple[str, ...]
    """Of all arguments of all requests: prompts and choices."""
    clusters: Ints
    """``(D,)``; documents of one number share a text, so they are dependent."""
    strata: Ints
    """``(D,)``; the subject's number in a group."""
    subjects: tuple[str, ...]
    """The tasks, by the number in ``strata``."""
    cluster_keys: tuple[str, ...]
    """The cluster's name, or the document's hash where it stands alone: the same in every run."""
    prompts: tuple[str, ...]
    """With few-shot examples, of the first request."""
    targets: tuple[str, ...]
    """The right answer, as text."""
    truncated: Ints
    """``(D,)`` tokens that prompts lost for the model's context; 0 where no record tells."""
    recorded: bool
    """Whether the samples hold our records; if not, members are copies of the one answer."""
    scores: Mapping[str, Floats]
    """``(D,)`` lm-eval's own numbers per document, by metric (generation: by ``metric,filter``)."""
    scored: tuple[str, ...]
    """The metrics that lm-eval scores the task by, in its order."""


@dataclass(frozen=True)
class ChoiceAnswers(Answers):
    """Multiple choice: the answer is the choice of the highest log-likelihood."""

    loglikelihoods: Floats
    """``(D, C)`` in nats, ``-inf`` where a document has fewer choices."""
    running: Floats
    """``(N, D, C)`` under the average of the first 1..N members."""
    members: Floats
    """``(N, D, C)`` under each member alone."""
    gold: Ints
    """``(D,)`` index of the right choice."""
    correct: Bools
    """``(D,)`` lm-eval's own ``acc``."""
    choices: tuple[tuple[str, ...], ...]
    """The choices as texts."""
    tokens: Ints
    """``(D,)`` scored, of all choices together; 0 without records."""
    token_gap: Floats
    """``(D,)`` Jensen gap, in nats, summed over all choices' tokens."""
    least_gap: float
    """The smallest of any token; nan without records."""


@dataclass(frozen=True)
class GeneratedAnswers(Answers):
    """Generated text, compared with the target once per filter."""

    correct: Mapping[str, Bools]
    """``(D,)`` by filter, in lm-eval's order: exact match, or the task's first 0/1 score."""
    texts: tuple[str, ...]
    """As generated."""
    answers: Mapping[str, tuple[str, ...]]
    """By filter: what was compared."""
    confidence_length_normalised: Floats
    """``(D,)`` exp of the mean log-probability of the tokens; nan where there is none (no record, no token)."""
    confidence_first_answer_token: Mapping[str, Floats]
    """``(D,)`` by filter: probability of the token at which the compared answer begins in the text; of the first token
    where the answer is not in the text; nan as above."""
    running: Floats
    """``(N, D)`` log-probability of the text's tokens."""
    members: Floats
    """``(N, D)``"""
    tokens: Ints
    """``(D,)``"""
    total_entropy: Floats
    """``(D,)`` mean over tokens, in nats; nan without records."""
    expected_entropy: Floats
    """``(D,)``"""
    metric: str
    """The score behind ``correct``; empty where the task has none."""


@dataclass(frozen=True)
class RollingAnswers(Answers):
    """The log-likelihood of whole texts, or of a given continuation (LAMBADA)."""

    loglikelihood: Floats
    """``(D,)`` in nats."""
    running: Floats
    """``(N, D)``"""
    members: Floats
    """``(N, D)``"""
    words: Floats | None
    """``(D,)`` lm-eval's weights of ``word_perplexity``; None where the task has not the metric."""
    bytes: Floats | None
    """``(D,)`` of ``byte_perplexity`` and ``bits_per_byte``."""
    tokens: Ints
    """``(D,)``; 0 without records."""
    greedy: Bools | None
    """``(D,)`` lm-eval's ``acc`` of a continuation: greedy decoding writes it. None for whole texts."""
    least_gap: float
    """The smallest Jensen gap of any token, in nats; nan without records."""


AnyAnswers = ChoiceAnswers | GeneratedAnswers | RollingAnswers


def answers_of(task: str, samples: Sequence[Sample]) -> AnyAnswers | None:
    """The arrays of the task's kind, told by the arguments of its requests; None for a kind that has none.

    That is multiple choice scored by the task's own code: several choices are right, or none, or ``acc`` is a share of
    probability (TruthfulQA's mc2). See :func:`plain_answers`.

    Raises:
        ValueError: no documents; a log-likelihood that is not finite; samples that contradict lm-eval's own score.
    """
    if not samples:
        raise ValueError(f"{task}: no documents")
    arguments = samples[0]["arguments"]
    if len(arguments[0]) == 1:
        return rolling_answers(task, samples)
    if not isinstance(arguments[0][1], str):
        return generated_answers(task, samples)
    golds = [sample["lora_dropout"]["gold"] for sample in samples]
    if all(gold is None for gold in golds) and all(len(sample["arguments"]) == 1 for sample in samples):
        return rolling_answers(task, samples)
    by_argmax = "acc" not in samples[0]["metrics"] or np.isin(numbers(samples, "acc"), (0, 1)).all()
    return choice_answers(task, samples) if by_argmax and None not in golds and min(golds) >= 0 else None


def plain_answers(task: str, samples: Sequence[Sample]) -> Answers:
    """What samples of every kind have: lm-eval's numbers of the first filter."""
    rows = documents(task, first_filter(samples))
    return Answers(**common_columns(task, rows, [row["lora_dropout"]["requests"] for row in rows]))


def choice_answers(task: str, samples: Sequence[Sample]) -> ChoiceAnswers:
    """Arrays of a multiple-choice task, from its samples of one filter (lm-eval gives choices no others).

    Raises:
        ValueError: see :func:`answers_of`.
    """
    rows = documents(task, first_filter(samples))
    scored = [conditional(row["filtered_resps"], row) for row in rows]
    for row, answers in zip(rows, scored, strict=True):
        _assert_choices(task, row, len(answers))
    width = max(len(answers) for answers in scored)
    loglikelihoods = np.full((len(rows), width), -np.inf)
    for place, answers in enumerate(scored):
        loglikelihoods[place, : len(answers)] = [float(answer[0]) for answer in answers]
    present = np.arange(width) < np.array([len(answers) for answers in scored])[:, None]
    _assert_finite(task, rows, np.where(present, loglikelihoods, 0.0).sum(axis=-1))
    gold = np.array([row["lora_dropout"]["gold"] for row in rows], dtype=np.int64)
    correct = loglikelihoods.argmax(axis=1) == gold
    _assert_lm_evals(task, rows, correct)
    records = [conditional(row["lora_dropout"]["requests"], row) for row in rows]
    recorded = all(records)
    if recorded:
        count = len(records[0][0]["running"])
        running, members = (np.full((count, len(rows), width), -np.inf) for _ in range(2))
        for place, of_document in enumerate(records):
            running[:, place, : len(of_document)] = np.array([record["running"] for record in of_document]).T
            members[:, place, : len(of_document)] = np.array([record["members"] for record in of_document]).T
        for array in (running, members):
            _assert_finite(task, rows, np.where(present, array, 0.0).sum(axis=-1))
        running = _ending_in(task, rows, running, loglikelihoods)
    else:
        running = members = loglikelihoods[None]
    gaps = np.where(present, running[-1], 0.0) - np.where(present, members, 0.0).mean(axis=0)
    return ChoiceAnswers(
        **common_columns(task, rows, records),
        loglikelihoods=loglikelihoods,
        running=running,
        members=members,
        gold=gold,
        correct=correct,
        choices=tuple(_choice_texts(row) for row in rows),
        tokens=summed(records, "tokens"),
        token_gap=gaps.sum(axis=1),
        least_gap=least_gap(records),
    )


def generated_answers(task: str, samples: Sequence[Sample]) -> GeneratedAnswers:
    """Arrays of a generation task; lm-eval gives one sample per document and filter.

    Raises:
        ValueError: see :func:`answers_of`.
    """
    filters = list(dict.fromkeys(str(sample["filter"]) for sample in samples))
    by_filter = {name: documents(task, [s for s in samples if s["filter"] == name]) for name in filters}
    rows = by_filter[filters[0]]
    records = [row["lora_dropout"]["requests"][:1] for row in rows]
    recorded = all(records)
    logprobs = [of_document[0]["token_logprobs"] if of_document else [] for of_document in records]
    for row, values in zip(rows, logprobs, strict=True):
        if not np.isfinite(values).all():
            raise ValueError(f"{task}: document {row['doc_id']} has a token whose log-probability is not finite")
    answers = {name: tuple(as_text(row["filtered_resps"][0]) for row in by_filter[name]) for name in filters}
    metric = zero_one_metric(rows)
    return GeneratedAnswers(
        **{**common_columns(task, rows, records), "scores": filter_scores(by_filter)},
        correct={name: numbers(by_filter[name], metric) == 1 for name in filters} if metric else {},
        texts=tuple(as_text(row["resps"][0][0]) for row in rows),
        answers=answers,
        confidence_length_normalised=np.array([np.exp(np.mean(v)) if v else np.nan for v in logprobs]),
        confidence_first_answer_token={
            name: np.array([_first_answer_token(r[0], a) if r else np.nan for r, a in zip(records, found, strict=True)])
            for name, found in answers.items()
        },
        running=stacked(records, "running") if recorded else np.full((1, len(rows)), np.nan),
        members=stacked(records, "members") if recorded else np.full((1, len(rows)), np.nan),
        tokens=np.array([len(values) for values in logprobs], dtype=np.int64),
        total_entropy=floats(records, "total_entropy"),
        expected_entropy=floats(records, "expected_entropy"),
        metric=metric,
    )


def rolling_answers(task: str, samples: Sequence[Sample]) -> RollingAnswers:
    """Arrays of a task that scores whole texts, or one continuation of each prompt.

    Raises:
        ValueError: see :func:`answers_of`.
    """
    rows = documents(task, first_filter(samples))
    records = [row["lora_dropout"]["requests"][:1] for row in rows]
    continuation = len(rows[0]["arguments"][0]) == 2
    answered = [row["filtered_resps"][0] for row in rows]
    loglikelihood = np.array([float(a[0] if continuation else a) for a in answered])
    _assert_finite(task, rows, loglikelihood)
    if all(records):
        running = _ending_in(task, rows, stacked(records, "running"), loglikelihood)
        members = stacked(records, "members")
        _assert_finite(task, rows, running)
        _assert_finite(task, rows, members)
    else:
        running = members = loglikelihood[None]
    return RollingAnswers(
        **common_columns(task, rows, records),
        loglikelihood=loglikelihood,
        running=running,
        members=members,
        words=weights(rows, ["word_perplexity"]),
        bytes=weights(rows, ["byte_perplexity", "bits_per_byte"]),
        tokens=summed(records, "tokens"),
        greedy=np.array([str(a[1]) == "True" for a in answered]) if continuation else None,
        least_gap=least_gap(records),
    )


def read_answers(folder: Path, system: str, task: str) -> AnyAnswers | None:
    """The answers of a system on a task in a run's folder; None for a kind that has none, see :func:`answers_of`.

    Raises:
        UserError: see :func:`read_samples`; samples that contradict themselves.
    """
    samples = read_samples(folder, system, task)
    try:
        return answers_of(task, samples)
    except SPOILT as error:
        raise UserError(f"{samples_file(folder, system, task)}: {error!s}; evaluate again") from error


def _assert_finite(task: str, rows: Sequence[Sample], values: Floats) -> None:
    """Values: ``(..., D)``."""
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        raise ValueError(f"{task}: document {rows[bad[0][-1]]['doc_id']} has a log-likelihood that is not finite")


def _assert_lm_evals(task: str, rows: Sequence[Sample], correct: Bools) -> None:
    for row, ours in zip(rows, correct, strict=True):
        if "acc" in row["metrics"] and bool(float(row["acc"])) != bool(ours):
            raise ValueError(
                f"{task}: document {row['doc_id']} has acc {row['acc']} in lm-eval's sample, but the highest of its "
                f"log-likelihoods is {'' if ours else 'not '}the right choice's"
            )


def _ending_in(task: str, rows: Sequence[Sample], running: Floats, answer: Floats) -> Floats:
    """The running values ``(N, D, ...)`` with the answer itself as the last: a curve ends in the run, bit for bit."""
    known = np.isfinite(answer)
    difference = np.abs(np.subtract(running[-1], answer, out=np.zeros_like(answer), where=known))
    wrong = np.argwhere(difference > RUNNING_TOLERANCE * (1 + np.abs(np.where(known, answer, 0.0))))
    if len(wrong):
        raise ValueError(
            f"{task}: document {rows[wrong[0][0]]['doc_id']}: the last running log-likelihood differs from the answer "
            f"by {difference.max():.2g}; they should be one number"
        )
    return np.concatenate([running[:-1], answer[None]])


def _assert_choices(task: str, row: Sample, count: int) -> None:
    """Of log-likelihoods there are as many as choices, of which one is right."""
    choices, gold = len(conditional(row["arguments"], row)), row["lora_dropout"]["gold"]
    if count != choices or not gold < count:
        raise ValueError(
            f"{task}: document {row['doc_id']} has {count} log-likelihoods for {choices} choices, of which number "
            f"{gold} (from 0) is right"
        )


def _choice_texts(row: Sample) -> tuple[str, ...]:
    """The continuations, or the prompts where these differ and the continuations do not (WinoGrande)."""
    arguments = conditional(row["arguments"], row)
    place = 0 if len({argument[1] for argument in arguments}) == 1 else 1
    return tuple(str(argument[place]).strip() for argument in arguments)


def _first_answer_token(record: Mapping[str, Any], answer: str) -> float:
    """Probability of the token in which the last occurrence of the answer begins, else of the first token.

    The last one, because a text that reasons before it answers names numbers on its way.
    """
    starts, logprobs = np.asarray(record["token_starts"]), record["token_logprobs"]
    if not logprobs:
        return float("nan")
    found = max(record["text"].rfind(answer.strip()), 0)
    before = starts[max(int(np.searchsorted(starts, found, side="right")) - 1, 0)]
    return float(np.exp(logprobs[int(np.searchsorted(starts, before, side="left"))]))  # one character, several tokens
