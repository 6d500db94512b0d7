"""How the tests of random masks tell a defect from chance: exact binomial tails, and a seed that can be repeated."""

from __future__ import annotations

import numpy as np
import torch
from scipy import stats

from pipeline.lora_dropout.masks import Coordinate, Side, feature_words, kept, threshold

CPU = torch.device("cpu")
RATES = (0.1, 0.25, 0.5, 0.9)

FALSE_ALARM = 1e-6
"""Of one test function, were the bits truly random: its comparisons share this (Bonferroni), whatever their dependence.
For one comparison that is 4.9 standard deviations, for a thousand of them 6.1."""


def assert_binomial(counts: torch.Tensor | int, trials: int, probability: float, tests: int = 1) -> None:
    """Each count is Binomial(trials, probability), within chance; exact two-sided tails.

    Args:
        counts: integers of any shape.
        trials: of each count.
        probability: of a success.
        tests: how often the test function calls this with as many counts: it divides the false-alarm rate.
    """
    counts = np.atleast_1d(np.asarray(counts))
    below, above = stats.binom.cdf(counts, trials, probability), stats.binom.sf(counts - 1, trials, probability)
    tails = 2 * np.minimum(below, above)
    worst = tails.argmin()
    limit = FALSE_ALARM / (counts.size * tests)
    expected = trials * probability
    deviation = (expected * (1 - probability)) ** 0.5
    assert tails.min() >= limit, (
        f"count {counts.flat[worst]} of {trials} at {np.unravel_index(worst, counts.shape)}, expected {expected:.1f} "
        f"± {deviation:.1f}: chance {tails.min():.1e}, allowed {limit:.1e}"
    )


def assert_multinomial(cells: torch.Tensor, expected: torch.Tensor, tests: int = 1) -> None:
    """Counts of cells against their expectation, by Pearson's chi-squared; 20 or more are expected in every cell, so
    that its tail holds. Both tails count: cells that fit too well are no chance, either.

    Args:
        cells: how often each event was seen.
        expected: with the same sum.
        tests: see :func:`assert_binomial`.
    """
    assert expected.min() >= 20, expected.min()
    statistic = ((cells - expected) ** 2 / expected).sum().item()
    freedom = cells.numel() - 1
    tail = 2 * min(stats.chi2.cdf(statistic, freedom), stats.chi2.sf(statistic, freedom))
    assert tail >= FALSE_ALARM / tests, f"chi-squared {statistic:.1f} on {freedom} degrees: chance {tail:.1e}"


def bits(
    rate: float,
    seed: int = 7,
    purpose: str = "train",
    coordinate: Coordinate = (3, 1, 0),
    module: str = "model.layers.0.self_attn.q_proj",
    side: Side = "A",
    features: int = 400_000,
    balanced: int | None = None,
) -> torch.Tensor:
    """``(features,)`` bool, one mask."""
    words = feature_words(module, side, features, CPU)
    return kept(words, seed, purpose, [coordinate], threshold(rate), balanced)[0, :features]
