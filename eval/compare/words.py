"""The numbers of a comparison as readers see them: equal text on the terminal, in Markdown and in HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from eval.compare.schema import Comparison, Detectable, Difference, MaskNoise, MethodDifference, TaskComparison
from eval.numbers import FIXED_SPACE, capital, decimals, number, p_text

LEVEL = 0.05
"""Of the family: adjusted p-values up to it are called differences."""
MOST_SENTENCES = 4
NONE = "\N{EN DASH}"
NOISE_TITLES = ["task", "metric", "mean", "SD over masks", "95 % interval of the SD", "lowest to highest"]


@dataclass(frozen=True)
class Row:
    """One difference in words; empty texts where there is nothing to say."""

    task: str
    pair: str
    metric: str
    first: str
    second: str
    difference: str
    interval: str
    p: str
    adjusted: str
    how: str
    """Test and interval."""
    shown: bool
    """A difference at the 5 % level of the family."""


def arrow(higher_is_better: bool | None) -> str:
    """Which direction is better."""
    return {True: " ↑", False: " ↓", None: ""}[higher_is_better]


def metric_text(name: str, percent: bool, higher_is_better: bool | None) -> str:
    """``accuracy, % ↑``."""
    return name + (", %" if percent else "") + arrow(higher_is_better)


def digits(found: Difference | MethodDifference) -> int:
    """After the point, for the difference and for what it is made of."""
    spread = None if found.low is None or found.high is None else (found.high - found.low) / 2
    return decimals(found.difference or 0.0, spread, found.percent)


def value(found: float | None, percent: bool, places: int, sign: bool = False) -> str:
    """A number, times 100 for a percentage."""
    return NONE if found is None else number(found * (100 if percent else 1), places, sign)


def interval(found: Difference | MethodDifference) -> str:
    """``−1.2 to +3.4``."""
    if found.low is None or found.high is None:
        return NONE
    places = digits(found)
    return " to ".join(value(end, found.percent, places, sign=True) for end in (found.low, found.high))


def p_value(p: float | None) -> str:
    """``0.031`` or ``< 0.001``: without the letter, for a column of its own."""
    return NONE if p is None else p_text(p).removeprefix("p ").removeprefix("= ")


def is_shown(adjusted: float | None) -> bool:
    """Whether the family shows this difference."""
    return adjusted is not None and adjusted <= LEVEL


def task_row(task: TaskComparison, found: Difference) -> Row:
    """One metric of two runs."""
    places = digits(found)
    return Row(
        task=task.task,
        pair=f"{task.second} minus {task.first}",
        metric=metric_text(found.name, found.percent, found.higher_is_better),
        first=value(found.first, found.percent, places),
        second=value(found.second, found.percent, places),
        difference=value(found.difference, found.percent, places, sign=True),
        interval=interval(found),
        p=p_value(found.p_value),
        adjusted=p_value(found.adjusted_p),
        how="; ".join(text for text in (found.test, found.interval) if text),
        shown=is_shown(found.adjusted_p),
    )


def method_row(found: MethodDifference) -> Row:
    """One metric of two methods."""
    places = digits(found)
    return Row(
        task=found.task,
        pair=f"{found.second} minus {found.first}",
        metric=metric_text(found.name, found.percent, found.higher_is_better),
        first=value(found.first_mean, found.percent, places),
        second=value(found.second_mean, found.percent, places),
        difference=value(found.difference, found.percent, places, sign=True),
        interval=interval(found),
        p=p_value(found.p_value),
        adjusted=p_value(found.adjusted_p),
        how=found.note or f"Student's t over {len(found.seeds)} paired seeds",
        shown=is_shown(found.adjusted_p),
    )


def seed_texts(found: MethodDifference) -> list[tuple[str, str, str, str]]:
    """(seed, first, second, difference) for every training seed."""
    places = digits(found)
    return [
        (
            str(one.seed),
            value(one.first, found.percent, places),
            value(one.second, found.percent, places),
            value(one.second - one.first, found.percent, places, sign=True),
        )
        for one in found.seeds
    ]


def noise_texts(found: MaskNoise) -> tuple[str, str, str, str, str, str]:
    """(task, metric, mean, standard deviation, its interval, lowest to highest)."""
    places = decimals(found.mean, 2 * found.deviation, percent=False) if not found.percent else 2
    scores = sorted(found.scores)
    return (
        found.task,
        metric_text(found.name, found.percent, None),
        value(found.mean, found.percent, places),
        value(found.deviation, found.percent, places),
        " to ".join(value(end, found.percent, places) for end in (found.deviation_low, found.deviation_high)),
        " to ".join(value(end, found.percent, places) for end in (scores[0], scores[-1])),
    )


def detectable_table(found: Sequence[Detectable]) -> tuple[list[str], list[list[str]]]:
    """Titles and rows: a row per task, a column per supposed discordance, or one where it is stated or measured."""
    by_task: dict[str, list[Detectable]] = {}
    for one in found:
        by_task.setdefault(one.task, []).append(one)
    supposed = [one.discordance for one in next(iter(by_task.values()))] if found[0].source == "supposed" else []
    if supposed:
        titles = [f"if d is {100 * share:g}{FIXED_SPACE}%" for share in supposed]
        rows = [[effect_text(one) for one in of_task] for of_task in by_task.values()]
    else:
        titles = ["d", "difference"]
        rows = [
            [f"{100 * one.discordance:.3g}{FIXED_SPACE}% ({one.source})", effect_text(one)]
            for (one,) in by_task.values()
        ]
    sizes = [[task, f"{of_task[0].documents:,}"] for task, of_task in by_task.items()]
    return ["task", "documents", *titles], [size + row for size, row in zip(sizes, rows, strict=True)]


def effect_text(found: Detectable) -> str:
    """``4.0 points``; a dash where no difference that the discordance allows would be found."""
    if found.effect is None:
        return NONE
    return f"{'' if found.independent else 'at least '}{number(100 * found.effect, 1)} points"


def verdict(family: Sequence[TaskComparison | MethodDifference]) -> list[str]:
    """How many differences hold, then each of them, no bolder than the adjusted p-values allow.

    Args:
        family: what was tested; of a task the primary metric comes first.
    """
    found = [one if isinstance(one, MethodDifference) else one.differences[0] for one in family]
    pairs = [f"{one.second} minus {one.first}" for one in family]
    tested = sum(one.adjusted_p is not None for one in found)
    holding = sum(is_shown(one.adjusted_p) for one in found)
    one_pair = len(set(pairs)) == 1
    names = [one.task if one_pair else f"{one.task}, {pair}" for one, pair in zip(family, pairs, strict=True)]
    sentences = [sentence(name, one) for name, one in zip(names, found, strict=True)]
    first = opening(holding, tested)
    return [f"{pairs[0]}: {first}" if one_pair else capital(first), *cut_sentences(sentences, "tests are")]


def opening(holding: int, tested: int) -> str:
    """``2 of 4 tested differences hold at the 5 % level.``"""
    if tested < 2:
        judged = "holds" if holding else "does not hold"
        return f"the tested difference {judged} at the 5{FIXED_SPACE}% level." if tested else "nothing could be tested."
    verb = "holds" if holding < 2 else "hold"
    return f"{holding or 'none'} of {tested} tested differences {verb} at the 5{FIXED_SPACE}% level."


def sentence(where: str, found: Difference | MethodDifference) -> str:
    """One difference."""
    if found.adjusted_p is None or found.difference is None:
        reason = found.note if isinstance(found, MethodDifference) else found.test
        return f"{where}: {found.name} was not tested. {reason}"
    places = digits(found)
    unit, points = (f"{FIXED_SPACE}%", " points") if found.percent else ("", "")
    ends = (found.first_mean, found.second_mean) if isinstance(found, MethodDifference) else (found.first, found.second)
    first, second = (value(end, found.percent, places) for end in ends)
    if not is_shown(found.adjusted_p):
        judged = "no difference shown"
    elif found.higher_is_better is None:
        judged = "a difference"
    else:
        judged = "better" if (found.difference > 0) == found.higher_is_better else "worse"
    return (
        f"{where}: {judged}; {found.name} {value(found.difference, found.percent, places, sign=True)}{points}, from "
        f"{first}{unit} to {second}{unit} (95{FIXED_SPACE}% interval {interval(found)}, "
        f"adjusted {p_text(found.adjusted_p)})."
    )


def noise_sentence(found: MaskNoise) -> str:
    """How far the masks alone move one score."""
    _, _, mean, deviation, _, _ = noise_texts(found)
    unit, points = (f"{FIXED_SPACE}%", " points") if found.percent else ("", "")
    return (
        f"On {found.task}, {found.name} is {mean}{unit} on average of {len(found.scores)} mask seeds, with a standard "
        f"deviation of {deviation}{points}."
    )


def cut_sentences(sentences: Sequence[str], rest: str) -> list[str]:
    """The first few, and how many more there are."""
    more = len(sentences) - MOST_SENTENCES
    return [*sentences[:MOST_SENTENCES], *([f"{more} more {rest} in the table."] if more > 0 else [])]


def family_rows(comparison: Comparison) -> list[Row]:
    """The primary metrics of tasks that are no parts of groups: the tested family."""
    if comparison.kind == "methods":
        primary = [one for one in comparison.method_differences if one.primary and one.in_family]
        return [method_row(one) for one in primary]
    return [task_row(task, task.differences[0]) for task in comparison.tasks if task.in_family]
