"""Wilson's interval against scipy, the paired difference against its published example."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, binomtest

from eval.statistics.proportions import paired_difference, wilson


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20_000), st.floats(0, 1), st.sampled_from([0.8, 0.95, 0.99]))
def test_wilson_equals_scipy(trials: int, share: float, confidence: float) -> None:
    successes = round(share * trials)
    ours = wilson(successes, trials, confidence)
    reference = binomtest(successes, trials).proportion_ci(confidence, method="wilson")
    assert float(ours.low) == pytest.approx(reference.low, abs=1e-12)
    assert float(ours.high) == pytest.approx(reference.high, abs=1e-12)


def test_wilson_of_bins_is_wilson_of_each() -> None:
    successes, trials = np.array([[0, 3, 7], [10, 0, 1]]), np.array([[5, 3, 9], [20, 0, 1]])
    found = wilson(successes, trials)
    assert found.low.shape == found.high.shape == (2, 3)
    assert (found.low[0, 0], found.high[0, 1]) == (0.0, 1.0)  # exactly: none and all
    assert (found.low[1, 1], found.high[1, 1]) == (0.0, 1.0)  # an empty bin tells nothing
    assert float(found.low[0, 2]) == float(wilson(7, 9).low)


@pytest.mark.parametrize(("successes", "trials"), [(4, 3), (-1, 3)])
def test_impossible_counts_are_refused(successes: int, trials: int) -> None:
    with pytest.raises(ValueError, match=f"between 0 and trials; found {successes} of {trials}"):
        wilson(successes, trials)


def test_paired_difference_of_a_published_example() -> None:
    """Airway data of Fagerland, Lydersen and Laake (2014): 1 and 7 disagreements of 21; by hand 2/23 - 8/23 ± 0.247."""
    found = paired_difference(1, 7, 21)
    half = 1.959964 * np.sqrt((10 / 23 - (6 / 23) ** 2) / 23)
    assert float(found.low) == pytest.approx(-6 / 23 - half, abs=1e-6)
    assert float(found.high) == pytest.approx(-6 / 23 + half, abs=1e-6)
    mirrored = paired_difference(7, 1, 21)
    assert (float(mirrored.low), float(mirrored.high)) == pytest.approx((-float(found.high), -float(found.low)))


def test_runs_that_never_disagree_have_a_width() -> None:
    found = paired_difference(0, 0, 277)
    assert 0.005 < float(found.high) == -float(found.low) < 0.015
    assert float(paired_difference(3, 0, 3).high) == 1.0


def test_paired_difference_covers() -> None:
    """Exactly, over all outcomes of 60 documents with discordance 0.3 and a true difference of 0.1."""
    n, only_first, only_second = 60, 0.2, 0.1
    covered = 0.0
    for pairs in range(n + 1):
        weight = binom.pmf(pairs, n, only_first + only_second)
        share = binom.pmf(np.arange(pairs + 1), pairs, only_first / (only_first + only_second))
        for first in range(pairs + 1):
            found = paired_difference(first, pairs - first, n)
            covered += weight * share[first] * (found.low <= 0.1 <= found.high)
    assert 0.94 < covered < 0.97


def test_more_disagreements_than_documents_are_refused() -> None:
    with pytest.raises(ValueError, match=r"3 \+ 2 disagreements do not fit in 4 documents"):
        paired_difference(3, 2, 4)
