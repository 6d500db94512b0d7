"""Holm, the minimum detectable effect, and seeds: by hand, against scipy, and by simulation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from eval.statistics.family import holm
from eval.statistics.paired import mcnemar_midp
from eval.statistics.power import minimum_detectable_effect, pilot_discordance
from eval.statistics.seeds import mask_noise, paired_seeds
from pipeline.errors import UserError


def test_holm_by_hand() -> None:
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm([0.4, 0.5, 0.02]), [0.8, 0.8, 0.06])
    assert holm([]).shape == (0,)
    assert holm([0.03]).tolist() == [0.03]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1), max_size=12), st.floats(0.001, 0.2))
def test_holm_rejects_what_the_steps_reject(p_values: list[float], level: float) -> None:
    """The procedure of 1979: the smallest against level / m, the next against level / (m - 1), until one fails."""
    rejected: set[int] = set()
    for step, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        if p_values[index] * (len(p_values) - step) > level:
            break
        rejected.add(index)
    adjusted = holm(p_values)
    assert {i for i, p in enumerate(adjusted) if p <= level} == rejected
    assert (adjusted >= np.array(p_values)).all() and (adjusted <= 1).all()


@pytest.mark.parametrize("p_values", [[0.1, np.nan], [1.2], [-0.1]])
def test_holm_refuses_what_is_no_p_value(p_values: list[float]) -> None:
    with pytest.raises(ValueError, match="p-values between 0 and 1 expected"):
        holm(p_values)


def test_effect_is_2_8_standard_errors() -> None:
    assert minimum_detectable_effect(1000, 0.2) == pytest.approx(2.8016 * np.sqrt(0.2 / 1000), rel=1e-4)
    assert pilot_discordance([1, 0, 1, 1], [1, 1, 1, 0]) == 0.5


def test_the_minimum_effect_is_found_in_80_percent() -> None:
    documents, discordance = 1500, 0.2
    effect = minimum_detectable_effect(documents, discordance)
    generator = np.random.default_rng(13)
    pairs = generator.binomial(documents, discordance, size=1500)
    first = generator.binomial(pairs, (1 + effect / discordance) / 2)
    found = np.mean([mcnemar_midp(int(a), int(n - a)) <= 0.05 for a, n in zip(first, pairs, strict=True)])
    assert 0.76 < found < 0.84


@pytest.mark.parametrize(("documents", "discordance"), [(0, 0.2), (100, 0.0), (100, 1.1), (100, float("nan"))])
def test_a_pilot_without_disagreement_tells_no_effect(documents: int, discordance: float) -> None:
    with pytest.raises(ValueError, match="state the discordance you expect"):
        minimum_detectable_effect(documents, discordance)


def test_paired_seeds_equal_scipy() -> None:
    first, second = np.random.default_rng(14).normal(size=(2, 7)) + np.arange(7)
    found = paired_seeds(first, second)
    reference = stats.ttest_rel(first, second)
    ends = reference.confidence_interval()
    assert (found.seeds, found.p_value) == (7, pytest.approx(reference.pvalue))
    assert (found.low, found.high) == pytest.approx((ends.low, ends.high))
    assert found.mean == pytest.approx((first - second).mean())


def test_five_seeds_by_hand() -> None:
    """Differences 1..5: mean 3, standard error sqrt(2.5 / 5), t = 4.2426 with 4 degrees of freedom."""
    found = paired_seeds([1, 2, 3, 4, 5], np.zeros(5))
    assert (found.low, found.high) == pytest.approx((3 - 2.77645 * np.sqrt(0.5), 3 + 2.77645 * np.sqrt(0.5)), rel=1e-5)
    assert found.p_value == pytest.approx(0.013236, abs=1e-5)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ([1, 2, 3, 4], [0, 0, 0, 0], "need at least 5 seeds; found 4"),
        ([1, 2, 3, 4, 5], [0, 0, 0, 0, 0, 0], "found 5 scores of one method and 6 of the other"),
        ([1, 2, 3, 4, np.nan], [0, 0, 0, 0, 0], "need finite scores"),
        ([1, 2, 3, 4, 5], [0, 1, 2, 3, 4], "All 5 seeds differ by the same 1"),
    ],
)
def test_seeds_that_are_no_sample_are_refused(first: list[float], second: list[float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        paired_seeds(first, second)


def test_mask_noise_by_hand() -> None:
    """1, 2, 3: standard deviation 1; 2 / chi-squared quantiles 7.378 and 0.0506."""
    found = mask_noise([1, 2, 3])
    assert (found.seeds, found.mean, found.deviation) == (3, 2.0, 1.0)
    assert (found.deviation_low, found.deviation_high) == pytest.approx((0.52066, 6.28473), rel=1e-4)
    assert mask_noise([2, 2, 2]).deviation_high == 0.0
    with pytest.raises(UserError, match="need at least 3 seeds; found 2"):
        mask_noise([1, 2])


def test_mask_noise_covers() -> None:
    generator = np.random.default_rng(15)
    found = [mask_noise(scores) for scores in generator.normal(scale=2.0, size=(2000, 4))]
    covered = np.mean([one.deviation_low <= 2.0 <= one.deviation_high for one in found])
    assert abs(covered - 0.95) < 4 * np.sqrt(0.95 * 0.05 / 2000)
