"""How unsure the members are, and how much of it is disagreement."""

from __future__ import annotations

from dataclasses import dataclass

from scipy.special import entr, softmax

from eval.calibration.ece import Floats


@dataclass(frozen=True)
class Entropies:
    """``(D,)`` each, in nats; total = expected + mutual information."""

    total: Floats
    """Of the mean distribution."""
    expected: Floats
    """Mean of the members' entropies."""
    mutual_information: Floats
    """Between the answer and the member; not negative but for rounding."""


def choice_entropies(members: Floats) -> Entropies:
    """Entropies of the members' distributions over the choices.

    Always of the arithmetic mean of the members' probabilities, whatever average gave the answers: only then is the
    difference a mutual information (Depeweg et al. 2018, arXiv 1710.07283; Malinin and Gales 2018).

    Args:
        members: ``(N, D, C)`` log-likelihoods, ``-inf`` for choices that a document has not.
    """
    each = softmax(members, axis=-1)
    total = entr(each.mean(axis=0)).sum(axis=-1)
    expected = entr(each).sum(axis=-1).mean(axis=0)
    return Entropies(total, expected, total - expected)
