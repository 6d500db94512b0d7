"""What a comparison of accuracies could have seen, from numbers known before it."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike


def standard_errors_apart(power: float = 0.8, level: float = 0.05) -> float:
    """z(1 - level / 2) + z(power): 2.80 for 80 % power at 5 %."""
    return NormalDist().inv_cdf(1 - level / 2) + NormalDist().inv_cdf(power)


def minimum_detectable_effect(documents: int, discordance: float) -> float:
    """Smallest true difference of accuracies found with 80 % power at the 5 % level: 2.8 sqrt(d / n).

    Normal approximation of McNemar's test for a difference that is small beside the discordance (Connor 1987,
    Biometrics 43, p. 207). A difference cannot exceed the discordance: where the result does, no difference at this
    discordance is found with that power.

    Args:
        documents: n, independent.
        discordance: d, share of documents that one run alone answers right, stated or from a pilot on other
            documents. Never from the compared runs themselves: that is post-hoc power, which only restates p.

    Raises:
        ValueError: no documents, or a discordance outside (0, 1]. A pilot that found none tells no effect size.
    """
    if documents < 1 or not 0 < discordance <= 1:
        raise ValueError(
            f"at least one document and a discordance above 0 and up to 1 expected; found {documents} documents and "
            f"discordance {discordance}. Where a pilot found no disagreement, state the discordance you expect."
        )
    return standard_errors_apart() * math.sqrt(discordance / documents)


def pilot_discordance(first_correct: ArrayLike, second_correct: ArrayLike) -> float:
    """Share of a pilot's documents on which the runs' right answers ``(D,)`` differ."""
    return float(np.mean(np.asarray(first_correct, dtype=bool) != np.asarray(second_correct, dtype=bool)))
