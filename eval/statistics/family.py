"""A family of tests that were declared together."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def holm(p_values: ArrayLike) -> NDArray[np.float64]:
    """Adjusted p-values, in the given order (Holm 1979, Scand. J. Stat. 6, p. 65).

    Rejecting where the adjusted value is at most 0.05 keeps the chance of any false rejection in the family at 5 %,
    however the tests depend on each other.

    Args:
        p_values: ``(M,)``; M may be 0.

    Raises:
        ValueError: a value outside 0..1, or not a number: a test without a result has no place in the family.
    """
    p = np.asarray(p_values, dtype=np.float64)
    if p.ndim != 1 or not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"p-values between 0 and 1 expected; found {p.tolist()}.")
    order = np.argsort(p, kind="stable")
    steps = np.maximum.accumulate(p[order] * (p.size - np.arange(p.size)))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(steps, 1.0)
    return adjusted
