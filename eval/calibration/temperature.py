"""Temperature scaling of choices: one number, fitted on other documents than it is judged on.

Legend: D documents, C choices. ``loglikelihoods``: ``(D, C)`` in nats, ``-inf`` for choices that a document has not;
``gold``: ``(D,)`` the right choice.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from eval.calibration.ece import Floats, Ints

FOLDS = 5
LEAST, MOST = 0.01, 100.0
"""Between them the temperature is sought: at LEAST the answers are certain, at MOST all choices are alike."""


@dataclass(frozen=True)
class CrossFitted:
    """Every document scored with the temperature of the folds that it is not in."""

    temperatures: Floats
    """``(folds,)``"""
    nll: Floats
    """``(D,)`` of the right choice, in nats."""

    @property
    def at_bound(self) -> bool:
        """Whether the bounds stopped a temperature: the answers it was fitted on are all right, or like chance."""
        return bool((self.temperatures < LEAST * 1.01).any() or (self.temperatures > MOST / 1.01).any())


def fold_numbers(keys: Sequence[str], folds: int = FOLDS) -> Ints:
    """``(D,)`` the fold of each document: its key decides, so it is the same in every run on these documents.

    Keys are ordered by hash and dealt out in turn; documents of one key (a cluster) stay together. There are no more
    folds than keys.
    """
    ordered = sorted(set(keys), key=lambda key: hashlib.sha256(key.encode()).digest())
    numbers = {key: place % folds for place, key in enumerate(ordered)}
    return np.array([numbers[key] for key in keys], dtype=np.int64)


def choice_nll(loglikelihoods: Floats, gold: Ints, temperature: float = 1.0) -> Floats:
    """``(D,)`` minus the log-probability of the right choice among the choices, in nats."""
    scaled = log_softmax(loglikelihoods / temperature, axis=1)
    return -np.take_along_axis(scaled, gold[:, None], axis=1)[:, 0]


def fitted_temperature(loglikelihoods: Floats, gold: Ints) -> float:
    """The temperature of the least mean NLL (Guo et al. 2017, section 4.2).

    The NLL is convex in 1/T, so it has one minimum in log T too; the search stops at LEAST and MOST.
    """
    shifted = loglikelihoods - loglikelihoods.max(axis=1, keepdims=True)
    right = np.take_along_axis(shifted, gold[:, None], axis=1)[:, 0].mean()

    def mean_nll(log_temperature: float) -> float:
        inverse = math.exp(-log_temperature)
        return float(np.log(np.exp(shifted * inverse).sum(axis=1)).mean() - right * inverse)

    found = minimize_scalar(
        mean_nll, bounds=(math.log(LEAST), math.log(MOST)), method="bounded", options={"xatol": 1e-4}
    )
    return math.exp(float(found.x))


def cross_fitted(loglikelihoods: Floats, gold: Ints, folds: Ints) -> CrossFitted | None:
    """The calibrated NLL (Ashukha et al. 2020, arXiv 2002.06470), each fold with the temperature of the others.

    Args:
        loglikelihoods, gold: see above.
        folds: ``(D,)`` from :func:`fold_numbers`.

    Returns:
        None where there is one fold only, so no other documents to fit on.
    """
    count = int(folds.max()) + 1
    if count < 2:
        return None
    temperatures, nll = np.empty(count), np.empty(len(gold))
    for fold in range(count):
        inside = folds == fold
        temperatures[fold] = fitted_temperature(loglikelihoods[~inside], gold[~inside])
        nll[inside] = choice_nll(loglikelihoods[inside], gold[inside], temperatures[fold])
    return CrossFitted(temperatures, nll)
