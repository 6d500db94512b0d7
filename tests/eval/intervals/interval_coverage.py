"""How often the 95 % intervals of ``eval/statistics`` contain the true score, and how often the test of calibration
rejects a calibrated model. Run by hand, on one core per process:

    OMP_NUM_THREADS=1 PYTHONPATH=. python tests/eval/intervals/interval_coverage.py --sets 2000 --processes 2

It prints a table and writes ``interval_coverage.json`` beside itself: the numbers of the last full run. The suite runs
a short version (``test_interval_coverage.py``).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from populations import POPULATIONS, Articles, Population, TestSet, draw, draw_articles

from eval.calibration.ece import consistency, equal_count_bins, equal_width_bins, plug_in_error, simulated_errors
from eval.statistics import bootstrap
from eval.statistics.paired import difference
from eval.statistics.proportions import paired_difference, wilson
from eval.statistics.weighted import Values, aurc, auroc, f1, matthews, mean, overconfidence, ratio

SIZES = (277, 1000)
"""Documents: RTE's validation set, and a thousand."""
ARTICLES = 62
"""WikiText-2's test set."""
TRUTH_DOCUMENTS = 1_500_000
USED_FOR_COUNTS = {"accuracy": "Wilson", "difference of accuracy": "Bonett-Price"}
"""Of independent documents."""
DRAWS = 1000
"""Of the bootstrap: reports have twice as many, which only makes the same ends less noisy."""
AURC_OF = ("calibrated", "overtrained")
"""The score that takes half of the time, and has no bar."""
WRITTEN = Path(__file__).with_name("interval_coverage.json")


@dataclass
class Coverage:
    """Of one interval of one score over many test sets; shares are of the test sets that have an interval."""

    population: str
    documents: int
    score: str
    method: str
    truth: float
    sets: int
    used: bool
    """Whether it is the interval that reports and comparisons show."""
    without: int = 0
    """Test sets without an interval."""
    above: int = 0
    """Intervals that end below the truth ..."""
    below: int = 0
    """... that begin above it."""

    def count(self, low: float | None, high: float | None) -> None:
        if low is None or high is None:
            self.without += 1
        else:
            self.above += high < self.truth
            self.below += low > self.truth

    @property
    def percent(self) -> float:
        """Intervals that contain the truth."""
        return 100 * (1 - (self.above + self.below) / (self.sets - self.without))


def used_method(score: str) -> bootstrap.Method:
    return "percentile" if score.startswith("difference") else "bca"


def statistics_of(found: TestSet, with_aurc: bool = True) -> dict[str, bootstrap.Statistic]:
    """Every score of the first model, and the paired differences of both."""
    a, b = found.first, found.second
    two_classes = {
        "F1": lambda w: f1(w, a.predicted, found.gold),
        "Matthews": lambda w: matthews(w, a.predicted, found.gold),
    }
    return {
        "accuracy": partial(mean, values=a.correct),
        "NLL": partial(mean, values=a.nll),
        "Brier": partial(mean, values=a.brier),
        "AUROC": partial(auroc, scores=a.confidence, positive=a.correct),
        "over-confidence": partial(overconfidence, confidences=a.confidence, correct=a.correct),
        **(two_classes if found.gold.max() < 2 else {}),
        **({"AURC": partial(aurc, confidences=a.confidence, correct=a.correct)} if with_aurc else {}),
        "difference of accuracy": difference(partial(mean, values=a.correct), partial(mean, values=b.correct)),
        "difference of NLL": difference(partial(mean, values=a.nll), partial(mean, values=b.nll)),
        "difference of Brier": difference(partial(mean, values=a.brier), partial(mean, values=b.brier)),
    }


def statistics_of_articles(found: Articles) -> dict[str, bootstrap.Statistic]:
    return {"bits per byte": partial(ratio, numerators=found.bits, denominators=found.bytes)}


def whole(statistic: bootstrap.Statistic, documents: int) -> float:
    return float(statistic(np.ones((1, documents)))[0])


def population_coverage(
    name: str, documents: int, sets: int, draws: int = DRAWS, truth_documents: int = TRUTH_DOCUMENTS
) -> list[Coverage]:
    """All intervals on ``sets`` test sets of one population."""
    population: Population = POPULATIONS[name]
    large = statistics_of(draw(population, truth_documents, np.random.default_rng(1)), name in AURC_OF)
    truth = {score: whole(statistic, truth_documents) for score, statistic in large.items()}
    methods = ("bca", "percentile")
    table = {
        (score, method): Coverage(name, documents, score, method, truth[score], sets, method == used_method(score))
        for score in truth
        for method in methods
    }
    for score, method in USED_FOR_COUNTS.items() if population.cluster == 1 else ():
        table[score, method] = Coverage(name, documents, score, method, truth[score], sets, used=True)
        for other in methods:
            table[score, other].used = False
    generator = np.random.default_rng(2)
    for number in range(sets):
        found = draw(population, documents, generator)
        statistics = statistics_of(found, name in AURC_OF)
        for score, ends in _both(statistics, found.clusters, draws, number).items():
            for method, (low, high) in zip(methods, ends, strict=True):
                table[score, method].count(low, high)
        if population.cluster == 1:
            a, b = found.first.correct, found.second.correct
            interval = wilson(int(a.sum()), documents)
            table["accuracy", "Wilson"].count(float(interval.low), float(interval.high))
            interval = paired_difference(int((a & ~b).sum()), int((b & ~a).sum()), documents)
            table["difference of accuracy", "Bonett-Price"].count(float(interval.low), float(interval.high))
    return list(table.values())


def articles_coverage(sets: int, draws: int = DRAWS) -> list[Coverage]:
    """Bits per byte over whole articles of very different lengths."""
    large = statistics_of_articles(draw_articles(TRUTH_DOCUMENTS, np.random.default_rng(1)))
    truth = whole(large["bits per byte"], TRUTH_DOCUMENTS)
    table = [
        Coverage("articles", ARTICLES, "bits per byte", method, truth, sets, method == "percentile")
        for method in ("bca", "percentile")
    ]
    generator = np.random.default_rng(2)
    for number in range(sets):
        statistics = statistics_of_articles(draw_articles(ARTICLES, generator))
        ends = _both(statistics, np.arange(ARTICLES), draws, number)["bits per byte"]
        for row, (low, high) in zip(table, ends, strict=True):
            row.count(low, high)
    return table


def _both(
    statistics: dict[str, bootstrap.Statistic], clusters: Values, draws: int, seed: int
) -> dict[str, list[tuple[float | None, float | None]]]:
    """BCa and percentile ends from the same draws."""
    plan = bootstrap.sampling(clusters, np.zeros(len(clusters)))
    values = bootstrap.values_of(statistics, bootstrap.resamples(plan, draws, seed))
    jackknife = bootstrap.values_of(statistics, bootstrap.leave_one_out(plan))
    return {
        name: [
            (found.low, found.high)
            for method in ("bca", "percentile")
            for found in [
                bootstrap.interval_of(whole(statistic, len(clusters)), values[name], jackknife[name], plan, method)
            ]
        ]
        for name, statistic in statistics.items()
    }


def calibrated_confidences(documents: int, generator: np.random.Generator) -> tuple[Values, Values]:
    """(confidences, correct) of a perfectly calibrated model, confidences from 0.5 to 1."""
    confidences = 0.5 + 0.5 * generator.beta(2, 1, size=documents)
    return confidences, generator.random(documents) < confidences


def ece_control(documents: int, sets: int, draws: int = DRAWS) -> list[Coverage]:
    """The negative control: a percentile bootstrap of ECE, for a calibrated model whose true ECE is 0."""
    row = Coverage("perfectly calibrated", documents, "ECE", "percentile", 0.0, sets, used=False)
    generator = np.random.default_rng(3)
    plan = bootstrap.sampling(np.arange(documents), np.zeros(documents))
    for number in range(sets):
        confidences, correct = calibrated_confidences(documents, generator)
        gaps = np.eye(15)[equal_width_bins(confidences)] * (confidences - correct)[:, None]
        values = np.concatenate(
            [np.abs(w @ gaps).sum(axis=1) / documents for w in bootstrap.resamples(plan, draws, number)]
        )
        low, high = np.quantile(values, [0.025, 0.975])
        row.count(float(low), float(high))
    return [row]


def ece_rejections(documents: int, sets: int, draws: int = DRAWS) -> dict[str, float]:
    """Percent of perfectly calibrated models that the consistency test rejects at 5 %, by binning."""
    generator = np.random.default_rng(4)
    rejected = np.zeros(2)
    for number in range(sets):
        confidences, correct = calibrated_confidences(documents, generator)
        binnings = [equal_width_bins(confidences), equal_count_bins(confidences)]
        simulated = simulated_errors(confidences, binnings, draws, number)
        rejected += [
            consistency(plug_in_error(confidences, correct, bins), errors).p_value <= 0.05
            for bins, errors in zip(binnings, simulated, strict=True)
        ]
    return dict(zip(("equal width", "equal count"), (100 * rejected / sets).round(2).tolist(), strict=True))


def _job(arguments: tuple[str, int, int]) -> tuple[list[Coverage], dict[str, dict[str, float]]]:
    kind, documents, sets = arguments
    if kind == "articles":
        return articles_coverage(sets), {}
    if kind == "ECE":
        return ece_control(documents, sets), {f"{documents} documents": ece_rejections(documents, sets)}
    return population_coverage(kind, documents, sets), {}


def printed(rows: Iterable[Coverage]) -> None:
    header = f"{'population':21}{'documents':>9}  {'score':24}{'method':13}used{'truth':>8}"
    print(f"{header}  covers  misses below / above  none")
    for row in rows:
        first = f"{row.population:21}{row.documents:9}  {row.score:24}{row.method:13}{'yes' if row.used else '':4}"
        missed = f"{100 * row.below / row.sets:7.1f} / {100 * row.above / row.sets:.1f} %"
        print(f"{first}{row.truth:8.3f}  {row.percent:5.1f} %  {missed}      {row.without}", flush=True)


def write(path: Path, sets: int, rows: list[Coverage], rejections: dict[str, dict[str, float]]) -> None:
    """One row a line, so that a difference to the last run can be read."""
    lines = [json.dumps({**asdict(row), "covers_percent": round(row.percent, 2)}) for row in rows]
    path.write_text(
        f'{{"command": "python tests/eval/intervals/interval_coverage.py --sets {sets}", "draws": {DRAWS},\n'
        f'"calibrated_models_rejected_percent": {json.dumps(rejections)},\n"coverage": [\n'
        + ",\n".join(lines)
        + "\n]}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=int, default=2000, help="test sets per population and size")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--out", type=Path, default=WRITTEN)
    chosen = parser.parse_args()
    jobs = [(kind, documents, chosen.sets) for kind in ("ECE", *POPULATIONS) for documents in SIZES]
    rows, rejections = [], {}
    with get_context("spawn").Pool(chosen.processes) as pool:
        for found, rejected in pool.imap(_job, [("articles", ARTICLES, chosen.sets), *jobs]):
            printed(found)
            rows += found
            rejections |= rejected
    print("calibrated models rejected at 5 %, percent:", rejections)
    write(chosen.out, chosen.sets, rows, rejections)


if __name__ == "__main__":
    main()
