"""Two methods over training seeds, and one ensemble over mask seeds: what a comparison of two adapters cannot say."""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np

from eval.compare.runs import Run, Unit, labelled, read_run, split_system
from eval.compare.schema import MaskNoise, MethodDifference, SeedScore
from eval.compare.settings import MASK_SEEDS, different_settings, mask_seed, training_seed
from eval.numbers import listed
from eval.scores import metric_name
from eval.statistics.seeds import MASK_SEEDS as LEAST_MASK_SEEDS
from eval.statistics.seeds import TRAINING_SEEDS, mask_noise, paired_seeds
from pipeline.errors import UserError

SEED_KEYS = {"seed", *MASK_SEEDS.values()}
"""Recipe keys in which the runs of one method may differ."""


def read_methods(arguments: Sequence[str]) -> dict[str, list[Run]]:
    """The runs of every method, in the order of their training seeds, which are the same for all methods.

    Args:
        arguments: each ``NAME=RUN``; RUN may have wildcards, and ends in ``:system`` where one is meant.

    Raises:
        UserError: no ``NAME=``; no run found; fewer than two methods; see :func:`check_seeds`.
    """
    found: dict[str, list[Run]] = {}
    for argument in arguments:
        name, equals, pattern = argument.partition("=")
        if not (equals and name and pattern):
            raise UserError(f"--method {argument}: expected NAME=RUN, e.g. --method 'lora=eval/outputs/lora-*/latest'")
        found.setdefault(name, []).extend(read_run(run) for run in expanded(pattern))
    if len(found) < 2:
        raise UserError(f"--method: found {listed(list(found))} only; methods are compared with each other, name two")
    runs = labelled([run for of_method in found.values() for run in of_method])
    labels = iter(runs)
    by_method = {name: [next(labels) for _ in of_method] for name, of_method in found.items()}
    check_seeds(by_method)
    return {name: sorted(of_method, key=training_seed) for name, of_method in by_method.items()}


def expanded(pattern: str) -> list[str]:
    """The runs that ``FOLDER[:system]`` with wildcards stands for.

    Raises:
        UserError: none.
    """
    if not glob.has_magic(pattern):
        return [pattern]
    path, system = split_system(pattern)
    folders = sorted(glob.glob(str(path)))
    if not folders:
        raise UserError(f"{pattern}: no folder fits")
    return [folder if system is None else f"{folder}:{system}" for folder in folders]


def check_seeds(by_method: Mapping[str, Sequence[Run]]) -> None:
    """Refuse what is no paired sample of training seeds.

    Raises:
        UserError: a method with two runs of one seed or of several systems; methods of different seeds; fewer than
            five seeds.
    """
    seeds = {name: [training_seed(run) for run in runs] for name, runs in by_method.items()}
    for name, runs in by_method.items():
        systems = sorted({run.system for run in runs})
        if len(systems) > 1:
            raise UserError(f"method {name}: its runs are of {listed(systems)}; name one: --method {name}=RUN:system")
        twice = sorted({seed for seed in seeds[name] if seeds[name].count(seed) > 1})
        if twice:
            labels = [run.label for run in runs if training_seed(run) == twice[0]]
            raise UserError(
                f"method {name}: training seed {twice[0]} occurs {len(labels)} times, in {listed(labels)}; each seed "
                "counts once"
            )
    first = next(iter(seeds))
    for name, of_method in seeds.items():
        if set(of_method) != set(seeds[first]):
            raise UserError(
                "Methods are compared seed by seed, and their training seeds differ:\n"
                + "\n".join(f"  {method}: {', '.join(map(str, sorted(known)))}" for method, known in seeds.items())
                + f"\nTrain {listed([first, name])} with the same seeds (recipe key `seed`)."
            )
    if len(seeds[first]) < TRAINING_SEEDS:
        raise UserError(
            f"Claims about methods need at least {TRAINING_SEEDS} training seeds of each; found {len(seeds[first])}. "
            "Between two adapters the documents are the sample, between two methods the training runs are: with "
            "fewer, the spread over training seeds cannot be told. Train more seeds, or compare two adapters as such: "
            "launch/compare.py RUN RUN"
        )


def method_notes(by_method: Mapping[str, Sequence[Run]]) -> list[str]:
    """Settings in which the runs of one method differ though they should not."""
    notes = []
    for name, runs in by_method.items():
        keys = [setting.key for setting in different_settings(runs) if setting.key not in SEED_KEYS]
        if keys:
            notes.append(f"The runs of {name} differ in more than their seeds: {listed(keys)}. Are they one method?")
    return notes


def method_differences(
    by_method: Mapping[str, Sequence[Run]], found: Sequence[Unit], primary: Mapping[str, str]
) -> list[MethodDifference]:
    """Student's t over seed differences, of every metric that all runs have, for all pairs of methods."""
    return [
        seed_difference(unit, metric, names, (by_method[names[0]], by_method[names[1]]), metric == primary[unit.name])
        for names in combinations(by_method, 2)
        for unit in found
        for metric in shared_metrics([run for name in names for run in by_method[name]], unit.name, primary[unit.name])
    ]


def shared_metrics(runs: Sequence[Run], task: str, primary: str) -> list[str]:
    """The metrics that all runs have of a task, the primary one first."""
    common = [
        metric for metric in runs[0].analyses[task].metrics if all(metric in run.analyses[task].metrics for run in runs)
    ]
    return sorted(common, key=lambda metric: metric != primary)


def seed_difference(
    unit: Unit, metric: str, names: tuple[str, str], runs: tuple[Sequence[Run], Sequence[Run]], primary: bool
) -> MethodDifference:
    """One metric of one task, second method minus first."""
    estimate = runs[0][0].analyses[unit.name].metrics[metric]
    first, second = (
        np.array([run.analyses[unit.name].metrics[metric].value for run in of_method]) for of_method in runs
    )
    note = ""
    try:
        test = paired_seeds(second, first)
    except UserError as error:  # equal differences, or a score that is not finite: no test, and the reason is shown
        test, note = None, str(error)
    return MethodDifference(
        task=unit.name,
        metric=metric,
        name=metric_name(metric),
        first=names[0],
        second=names[1],
        seeds=[
            SeedScore(seed=training_seed(run), first=float(a), second=float(b))
            for run, a, b in zip(runs[0], first, second, strict=True)
        ],
        first_mean=float(first.mean()),
        second_mean=float(second.mean()),
        difference=None if test is None else test.mean,
        deviation=None if test is None else float((second - first).std(ddof=1)),
        low=None if test is None else test.low,
        high=None if test is None else test.high,
        p_value=None if test is None else test.p_value,
        higher_is_better=estimate.higher_is_better,
        percent=estimate.percent,
        primary=primary,
        in_family=unit.in_family,
        note=note,
    )


def check_mask_seeds(runs: Sequence[Run]) -> None:
    """Refuse runs that differ in more than the seed of the masks.

    Raises:
        UserError: fewer than three; a system without masks; one seed twice; another difference, which is named.
    """
    if len(runs) < LEAST_MASK_SEEDS:
        raise UserError(
            f"--mask-seeds: found {len(runs)} runs, and a spread needs at least {LEAST_MASK_SEEDS}. Evaluate the "
            "adapter again with other values of eval.ensemble.seed"
        )
    for run in runs:
        if mask_seed(run) is None:
            raise UserError(f"--mask-seeds: {run.label} has no masks; name an ensemble: {run.folder}:ensemble")
    if len({run.system for run in runs}) > 1:
        raise UserError(f"--mask-seeds: found the systems {listed(sorted({run.system for run in runs}))}; name one")
    first = runs[0]
    for run in runs[1:]:
        keys = [one.key for one in different_settings([first, run]) if one.key not in MASK_SEEDS.values()]
        if training_of(first) != training_of(run):
            keys.append("the adapter")
        if keys:
            raise UserError(
                f"--mask-seeds: {first.label} and {run.label} differ in more than the masks: {listed(keys)}"
            )
    seeds = [mask_seed(run) for run in runs]
    twice = [seed for seed in seeds if seeds.count(seed) > 1]
    if twice:
        raise UserError(
            f"--mask-seeds: mask seed {twice[0]} occurs {seeds.count(twice[0])} times; give each run an eval.ensemble."
            "seed of its own"
        )


def training_of(run: Run) -> object:
    """Equal for one adapter: its folder, and when it was trained."""
    training = (run.ours.get("provenance") or {}).get("training") or {}
    return run.ours.get("adapter"), training.get("started")


def noise_over_masks(runs: Sequence[Run], found: Sequence[Unit], primary: Mapping[str, str]) -> list[MaskNoise]:
    """Mean and standard deviation over mask seeds, of every metric of every task."""
    rows = []
    for unit in found:
        for metric in shared_metrics(runs, unit.name, primary[unit.name]):
            estimates = [run.analyses[unit.name].metrics[metric] for run in runs]
            noise = mask_noise([estimate.value for estimate in estimates])
            rows.append(
                MaskNoise(
                    task=unit.name,
                    metric=metric,
                    name=metric_name(metric),
                    scores=[estimate.value for estimate in estimates],
                    mean=noise.mean,
                    deviation=noise.deviation,
                    deviation_low=noise.deviation_low,
                    deviation_high=noise.deviation_high,
                    percent=estimates[0].percent,
                    primary=metric == primary[unit.name],
                    in_family=unit.in_family,
                )
            )
    return rows
