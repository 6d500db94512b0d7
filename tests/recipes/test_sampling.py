"""The study of mask sampling: its arithmetic, and that its README says what its results say."""

from __future__ import annotations

import json
import math
import random
import sys
from pathlib import Path

import pytest
from scipy import stats

FOLDER = Path(__file__).resolve().parents[2] / "recipes" / "sampling"
sys.path.insert(0, str(FOLDER))

import compare  # noqa: E402
import study  # noqa: E402


def measured(mode: str, seed: int, loss: float, budget: str = "equal steps") -> compare.Measured:
    return compare.Measured(mode, seed, budget, 30, 1e-3, loss, 1.0, None if mode == "lora" else loss, 0.5, 0.1)


def test_differences_are_paired_by_seed() -> None:
    draw = random.Random()
    losses = {(mode, seed): draw.gauss(seed, 0.1) for mode in study.MODES for seed in range(5)}
    found = [measured(mode, seed, loss) for (mode, seed), loss in losses.items()]
    draw.shuffle(found)
    compared = {(one.first, one.second, one.measure): one for one in compare.differences(found)}
    one = compared["example-1", "instance-4", "held_out"]
    each = [losses["example-1", seed] - losses["instance-4", seed] for seed in range(5)]
    assert one.each == pytest.approx(each)
    mean = sum(each) / 5
    error = math.sqrt(sum((value - mean) ** 2 for value in each) / 4 / 5)
    for level, interval in ((0.975, one.interval_95), (0.95, one.interval_90)):
        half = stats.t.ppf(level, 4) * error
        assert interval == pytest.approx((mean - half, mean + half))
    assert ("example-1", "lora", "ensemble") not in compared  # plain LoRA has none


def test_equal_compute_is_as_many_passes() -> None:
    passes = {study.steps_at(mode, "equal compute") * study.PASSES[mode] for mode in study.MODES}
    assert passes == {4 * study.STEPS}
    assert {study.steps_at(mode, "equal steps") for mode in study.MODES} == {study.STEPS}


def test_one_run_serves_both_budgets_only_at_one_learning_rate() -> None:
    best = {"lora": {30: 1e-3, 120: 1e-3}, "example-1": {30: 2e-3, 120: 5e-4}}
    assert study.run_at("lora", 1, "equal steps", best) == study.Run("lora", 1e-3, 1, 120)
    assert study.run_at("example-1", 1, "equal steps", best) == study.Run("example-1", 2e-3, 1, 30)
    assert study.run_at("example-1", 1, "equal compute", best) == study.Run("example-1", 5e-4, 1, 120)


def test_readme_shows_the_results() -> None:
    record = json.loads((FOLDER / "results.json").read_text())
    found = [compare.Measured(**run) for run in record["runs"]]
    assert sorted({run.seed for run in found}) == list(study.TEST_SEEDS)
    assert compare.table(found, compare.differences(found)).strip() in (FOLDER / "README.md").read_text()
