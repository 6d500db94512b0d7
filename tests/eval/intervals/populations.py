"""Populations of answered questions whose true scores are known, to draw test sets from.

A question has true log-odds of its choices; the right choice is drawn from them. A model sees them with noise and
states them ``scale`` times too strongly: with no noise and a scale of 1 it is perfectly calibrated.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax

Floats = NDArray[np.float64]
BRIGHT, DIM = 0.5, 0.8
"""Noise of the first and the second model's view of the questions, relative to their spread."""


@dataclass(frozen=True)
class Population:
    """Scale 1 and noise 0 would be calibrated."""

    choices: int
    spread: float
    """Standard deviation of the log-odds."""
    second_choice: float
    """Added to the log-odds of choice 1: makes class 1 more frequent."""
    scale: float
    """Of the first model; the second states 0.7 of it."""
    cluster: int = 1
    """Questions that share half of their difficulty."""


POPULATIONS = {
    "calibrated": Population(choices=2, spread=1.5, second_choice=0.0, scale=0.8),
    "overtrained": Population(choices=2, spread=1.5, second_choice=1.2, scale=4.0),
    "four choices": Population(choices=4, spread=1.5, second_choice=0.0, scale=1.5),
    "sure": Population(choices=2, spread=4.0, second_choice=1.0, scale=3.0),
    "clusters": Population(choices=2, spread=1.5, second_choice=0.8, scale=1.5, cluster=3),
}


@dataclass(frozen=True)
class Answers:
    """One model on D documents, ``(D,)`` each."""

    predicted: NDArray[np.intp]
    correct: NDArray[np.bool_]
    confidence: Floats
    nll: Floats
    brier: Floats


@dataclass(frozen=True)
class TestSet:
    """Two models on the same D documents."""

    gold: NDArray[np.intp]
    """``(D,)``"""
    clusters: NDArray[np.intp]
    """``(D,)``"""
    first: Answers
    second: Answers


def _answers(loglikelihoods: Floats, gold: NDArray[np.intp]) -> Answers:
    log_probabilities = log_softmax(loglikelihoods, axis=1)
    probabilities = np.exp(log_probabilities)
    rows = np.arange(gold.size)
    predicted = probabilities.argmax(axis=1)
    squares = (probabilities**2).sum(axis=1)
    brier = squares - 2 * probabilities[rows, gold] + 1
    return Answers(predicted, predicted == gold, probabilities.max(axis=1), -log_probabilities[rows, gold], brier)


def draw(population: Population, documents: int, generator: np.random.Generator) -> TestSet:
    """Independent documents, or clusters of them of which the last may be smaller."""
    clusters = np.arange(documents) // population.cluster
    shape = (documents, population.choices)
    odds = generator.normal(size=shape)
    if population.cluster > 1:
        shared = generator.normal(size=(int(clusters[-1]) + 1, population.choices))
        odds = (odds + shared[clusters]) / np.sqrt(2)
    odds *= population.spread
    odds[:, 1] += population.second_choice
    gold = (odds + generator.gumbel(size=shape)).argmax(axis=1)
    first, second = (
        population.scale * share * (odds + noise * population.spread * generator.normal(size=shape))
        for share, noise in ((1.0, BRIGHT), (0.7, DIM))
    )
    return TestSet(gold, clusters, _answers(first, gold), _answers(second, gold))


@dataclass(frozen=True)
class Articles:
    """``(D,)`` each: whole articles of a text to be modelled."""

    bits: Floats
    bytes: Floats


def draw_articles(articles: int, generator: np.random.Generator) -> Articles:
    """Log-normal lengths, as WikiText-2's (a few hundred bytes to tens of thousands); longer ones are a bit easier."""
    lengths = generator.normal(size=articles)
    size = np.round(20_000 * np.exp(0.7 * lengths))
    return Articles(size * (1.1 - 0.03 * lengths + 0.12 * generator.normal(size=articles)), size)
