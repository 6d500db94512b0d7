"""The verdict in sentences. It compares point estimates and says so: tests of differences are launch/compare.py's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from eval.analysis.schema import Estimate
from eval.numbers import FIXED_SPACE, capital, decimals, listed, number, p_text
from eval.scores import Analyses, ScoreRow, score_text, spread, value_text

MOST_TASKS = 3
"""That get a sentence each."""


def score_sentences(rows: Sequence[ScoreRow], labels: Mapping[str, str]) -> list[str]:
    """Who scores best on how many tasks, then each task's primary metric.

    Args:
        rows: primary metrics.
        labels: words by system.
    """
    rows = [row for row in rows if row.scores]
    if not rows:
        return ["No task gave a score."]
    sentences = [task_sentence(row, labels) for row in rows[:MOST_TASKS]]
    if sum(len(row.scores) > 1 for row in rows) > 1:
        sentences.insert(0, count_sentence(rows, labels))
    if len(rows) > MOST_TASKS:
        more = len(rows) - MOST_TASKS
        sentences.append("1 more task is in the table." if more == 1 else f"{more} more tasks are in the table.")
    return sentences


def pointer_sentences(labels: Mapping[str, str]) -> list[str]:
    """Where the differences are tested."""
    if len(labels) < 2:
        return []
    first = "deterministic" if "deterministic" in labels else next(iter(labels))
    last = list(labels)[-1]
    pair = f"RUN:{first} RUN:{last}" if first != last else f"RUN:{next(iter(labels))} RUN:{last}"
    return [
        f"These are differences of point estimates. Paired tests of them, RUN being this report's folder: "
        f"python launch/compare.py {pair}"
    ]


def ranked(row: ScoreRow) -> list[str]:
    """Systems, the best first; among equals the simplest."""
    sign = 1 if row.higher_is_better is False else -1
    return sorted(row.scores, key=lambda system: sign * row.scores[system].value)


def tied(row: ScoreRow) -> bool:
    """Whether the two best print the same."""
    texts = [value_text(row.scores[system], row.percent) for system in ranked(row)[:2]]
    return len(texts) == 2 and texts[0] == texts[1]


def count_sentence(rows: Sequence[ScoreRow], labels: Mapping[str, str]) -> str:
    """On how many tasks each system has the best score."""
    several = [row for row in rows if len(row.scores) > 1]
    wins = Counter(ranked(row)[0] for row in several if not tied(row)).most_common()
    ties = sum(tied(row) for row in several)
    if not wins:
        return f"The best two systems score the same on all {len(several)} tasks."
    (first, won), *others = wins
    where = f"all {len(several)} tasks" if won == len(several) else f"{won} of {len(several)} tasks"
    text = f"{the(labels[first])} scores best on {where}"
    text += "".join(f", {the(labels[system])} on {number_of}" for system, number_of in others)
    text += f", {ties} tied" if ties else ""
    clear = sum(ahead(row) for row in several)
    if not clear:
        return f"No system's interval lies clear of all others' on any task; {text}."
    apart = "all of them" if clear == len(several) else f"{clear} of them"
    return f"{capital(text)}; the best interval lies clear of all others on {apart}."


def ahead(row: ScoreRow) -> bool:
    """Whether the interval of the best overlaps no other's. A description: paired tests are sharper."""
    best, *others = [row.scores[system] for system in ranked(row)]
    if row.higher_is_better is False:
        return all(best.high is not None and one.low is not None and best.high < one.low for one in others)
    return all(best.low is not None and one.high is not None and best.low > one.high for one in others)


def task_sentence(row: ScoreRow, labels: Mapping[str, str]) -> str:
    """``Ensemble of 8: 71.2 % (68.4 to 73.9) on sst2, 1.3 points above the deterministic adapter's ...``."""
    best, *others = ranked(row)
    of = "" if row.percent and row.key == "acc" else f" {row.metric}"
    text = f"{capital(labels[best])}: {score_text(row.scores[best], row.percent)}{of} on {row.task}"
    if not others:
        return f"{text}."
    other = "deterministic" if "deterministic" in others else others[0]
    theirs = score_text(row.scores[other], row.percent)
    if value_text(row.scores[other], row.percent) == value_text(row.scores[best], row.percent):
        return f"{text}; {the(labels[other])} the same, {theirs}."
    return f"{text}, {difference(row, best, other)} {the(labels[other])}'s {theirs}."


def difference(row: ScoreRow, best: str, other: str) -> str:
    """``1.3 points above``: of the values as they are printed."""
    one, two = row.scores[best], row.scores[other]
    scale = 100 if row.percent else 1
    digits = max(decimals(found.value, spread(found), row.percent) for found in (one, two))
    by = round(one.value * scale, digits) - round(two.value * scale, digits)
    unit = f"{FIXED_SPACE}points" if row.percent else ""
    return f"{number(abs(by), digits)}{unit} {'above' if by > 0 else 'below'}"


def the(label: str) -> str:
    """With its article."""
    return label if label.startswith("MC") else f"the {label}"


def temperature_sentences(analyses: Analyses, tasks: Sequence[str], labels: Mapping[str, str]) -> list[str]:
    """Whether the ensemble does it, or a mere temperature: NLL before and after each system's own temperature.

    Args:
        analyses: of all systems.
        tasks: without the parts of groups.
        labels: words by system.
    """
    measured = [
        (task, single, several)
        for task in tasks
        if (single := losses(analyses, "deterministic", task)) and (several := losses(analyses, "ensemble", task))
    ]
    if not measured:
        return []
    if len(measured) <= 2:
        return [temperature_sentence(task, single, several, labels) for task, single, several in measured]
    raw = sum(several[0] < single[0] for _, single, several in measured)
    mere = sum(single[1] <= several[0] for _, single, several in measured)
    beyond = sum(several[1] < single[1] for _, single, several in measured)
    return [
        f"The {labels['ensemble']} has the lower NLL on {raw} of {len(measured)} tasks. One temperature per task on "
        f"the single adapter does as well as the ensemble on {mere}. After own temperatures the ensemble is still "
        f"lower on {beyond}."
    ]


def baseline_sentences(analyses: Analyses, tasks: Sequence[str], labels: Mapping[str, str]) -> list[str]:
    """Which system's NLL is lowest after own temperatures, where baselines with several models were run.

    Args:
        analyses: of all systems.
        tasks: without the parts of groups.
        labels: words by system.
    """
    if not {"mc_dropout", "deep_ensemble"} & analyses.keys():
        return []
    winners = []
    for task in tasks:
        found = {system: pair[1] for system in analyses if (pair := losses(analyses, system, task))}
        if len(found) > 1:
            winners.append(min(found, key=found.__getitem__))
    words = [f"{the(labels[system])}'s on {won}" for system, won in Counter(winners).most_common()]
    if not words:
        return []
    return [f"After own temperatures the lowest NLL is {listed(words)} of {len(winners)} tasks."]


def losses(analyses: Analyses, system: str, task: str) -> tuple[float, float] | None:
    """(NLL, NLL after own temperature), where both are known."""
    metrics: Mapping[str, Estimate] = analyses[system][task].metrics if task in analyses.get(system, {}) else {}
    if "nll" not in metrics or "calibrated_nll" not in metrics:
        return None
    return metrics["nll"].value, metrics["calibrated_nll"].value


def temperature_sentence(
    task: str, single: tuple[float, float], several: tuple[float, float], labels: Mapping[str, str]
) -> str:
    """One task's, in three decimals; differences are of the numbers as printed."""
    (raw, scaled), (ensembled, both) = [tuple(round(value, 3) for value in pair) for pair in (single, several)]
    text = f"NLL on {task}: {raw:.3f} with the single adapter, {ensembled:.3f} with the {labels['ensemble']}; "
    text += f"after own temperatures {scaled:.3f} and {both:.3f}. "
    if ensembled >= raw and both >= scaled:
        return text + "The ensemble does not lower it."
    if both >= scaled:
        return text + "What the ensemble gains, a mere temperature gains too."
    left = scaled - both
    if ensembled >= raw:
        return text + f"The ensemble lowers it by {left:.3f}, and only after temperatures."
    cause = "A mere temperature does more than the ensemble alone; the" if scaled <= ensembled else "The"
    return text + f"{cause} ensemble's lead is {raw - ensembled:.3f} before and {left:.3f} after temperatures."


def calibration_sentences(analyses: Analyses, tasks: Sequence[str], labels: Mapping[str, str]) -> list[str]:
    """Which systems' confidences agree with perfect calibration (the test of the ECE), and which way the others err."""
    tested = {
        system: [by_task[task] for task in tasks if task in by_task and by_task[task].ece is not None]
        for system, by_task in analyses.items()
        if system != "base"
    }
    tested = {system: found for system, found in tested.items() if found}
    if not tested:
        return []
    if max(len(found) for found in tested.values()) > 1:
        words = [
            f"{sum(one.ece.p_value < 0.05 for one in found if one.ece)} of {len(found)} for {the(labels[system])}"
            for system, found in tested.items()
        ]
        return [f"Tasks on which perfect calibration is rejected (p < 0.05, each test by itself): {listed(words)}."]
    words = []
    for system, (one,) in tested.items():
        assert one.ece is not None
        bias = one.metrics.get("overconfidence")
        words.append(f"{the(labels[system])} {error_words(one.ece.p_value, bias)}")
    return [f"Calibration: {'; '.join(words)}."]


def error_words(p: float, bias: Estimate | None) -> str:
    """``over-confident by 7.2 points (5.1 to 9.3), p < 0.001``."""
    if p >= 0.05:
        return f"agrees with a calibrated model ({p_text(p)})"
    if bias is None or bias.low is None or bias.high is None or bias.low <= 0 <= bias.high:
        return f"is not calibrated ({p_text(p)})"
    way = "over" if bias.value > 0 else "under"
    ends = sorted(abs(100 * end) for end in (bias.low, bias.high))
    return f"is {way}-confident by {abs(100 * bias.value):.1f} points ({ends[0]:.1f} to {ends[1]:.1f}; {p_text(p)})"
