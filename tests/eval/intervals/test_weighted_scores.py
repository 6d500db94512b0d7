"""Scores of weighted documents: equal to plain scores of documents written out, and to scikit-learn's."""

from __future__ import annotations

from functools import partial
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics

from eval.calibration.selective import selective_risks
from eval.statistics.bootstrap import Statistic
from eval.statistics.weighted import aurc, auroc, f1, matthews, mean, overconfidence, ratio

Documents = tuple[np.ndarray, np.ndarray, np.ndarray]


@st.composite
def documents(draw: st.DrawFn) -> Documents:
    """(confidences with ties, labels, counts), ``(D,)`` each; at least one document is drawn."""
    size = draw(st.integers(1, 25))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    levels = draw(st.sampled_from([1, 3, 1000]))
    labels = generator.random(size) < draw(st.sampled_from([0.0, 0.2, 0.7, 1.0]))
    counts = generator.integers(0, 4, size)
    counts[generator.integers(size)] += 1
    return generator.integers(0, levels, size) / levels, labels, counts


def scores(confidences: np.ndarray, labels: np.ndarray) -> dict[str, Statistic]:
    predicted = confidences > 0.4
    return {
        "mean": partial(mean, values=confidences),
        "ratio": partial(ratio, numerators=confidences, denominators=1 + labels),
        "overconfidence": partial(overconfidence, confidences=confidences, correct=labels),
        "f1": partial(f1, predicted=predicted, gold=labels),
        "matthews": partial(matthews, predicted=predicted, gold=labels),
        "auroc": partial(auroc, scores=confidences, positive=labels),
        "aurc": partial(aurc, confidences=confidences, correct=labels),
    }


def once(statistic: Statistic, size: int) -> float:
    return float(statistic(np.ones((1, size)))[0])


@settings(max_examples=60, deadline=None)
@given(documents())
def test_a_weight_is_a_number_of_copies(found: Documents) -> None:
    confidences, labels, counts = found
    written_out = np.repeat(np.arange(counts.size), counts)
    copied = scores(confidences[written_out], labels[written_out])
    weights = np.stack([counts, 2 * counts, np.ones_like(counts)]).astype(np.float64)
    for name, statistic in scores(confidences, labels).items():
        values = statistic(weights)
        assert values.shape == (3,)
        np.testing.assert_allclose(values[0], once(copied[name], written_out.size), atol=1e-12, err_msg=name)
        if name != "aurc":  # its ties are averaged over whole documents
            np.testing.assert_allclose(values[0], values[1], atol=1e-12, err_msg=name)


@settings(max_examples=40, deadline=None)
@given(documents(), st.integers(0, 2**32 - 1))
def test_the_order_of_documents_does_not_matter(found: Documents, seed: int) -> None:
    confidences, labels, counts = found
    order = np.random.default_rng(seed).permutation(counts.size)
    shuffled = scores(confidences[order], labels[order])
    for name, statistic in scores(confidences, labels).items():
        values, others = statistic(counts[None] * 1.0), shuffled[name](counts[None, order] * 1.0)
        np.testing.assert_allclose(values, others, atol=1e-12, err_msg=name)


@settings(max_examples=60, deadline=None)
@given(documents())
def test_scores_equal_scikit_learn(found: Documents) -> None:
    confidences, labels, counts = found
    weights = counts[None] * 1.0
    both = 0 < labels @ counts < counts.sum()
    area = auroc(weights, confidences, labels)[0]
    assert np.isnan(area) != both
    if both:
        assert area == pytest.approx(metrics.roc_auc_score(labels, confidences, sample_weight=counts), abs=1e-12)
    predicted = confidences > 0.4
    if (predicted | labels) @ counts:
        expected = metrics.f1_score(labels, predicted, sample_weight=counts)
        assert f1(weights, predicted, labels)[0] == pytest.approx(expected, abs=1e-12)
    else:
        assert np.isnan(f1(weights, predicted, labels)[0])
    if both and 0 < predicted @ counts < counts.sum():
        expected = metrics.matthews_corrcoef(labels, predicted, sample_weight=counts)
        assert matthews(weights, predicted, labels)[0] == pytest.approx(expected, abs=1e-12)
    else:
        assert np.isnan(matthews(weights, predicted, labels)[0])


@settings(max_examples=60, deadline=None)
@given(documents())
def test_aurc_is_the_area_under_the_curve_of_the_report(found: Documents) -> None:
    confidences, labels, counts = found
    written_out = np.repeat(np.arange(counts.size), counts)
    expected = selective_risks(confidences[written_out], labels[written_out]).mean()
    assert aurc(counts[None] * 1.0, confidences, labels)[0] == pytest.approx(expected, abs=1e-12)


def test_aurc_of_ties_is_the_mean_over_all_their_orders() -> None:
    confidences, wrong = np.array([0.9, 0.7, 0.7, 0.7, 0.2, 0.2]), np.array([0, 1, 0, 1, 1, 0])
    areas = [
        (np.cumsum(wrong[[0, *first, *last]]) / np.arange(1, 7)).mean()
        for first in permutations((1, 2, 3))
        for last in permutations((4, 5))
    ]
    assert aurc(np.ones((1, 6)), confidences, 1 - wrong)[0] == pytest.approx(np.mean(areas))


def test_aurc_by_hand() -> None:
    """Accepting the surest first: risks 0, 1/2, 1/3; with all tied, 1/3 is expected at every coverage."""
    three = np.ones((1, 3))
    assert aurc(three, [0.9, 0.8, 0.7], [1, 0, 1])[0] == pytest.approx((0 + 1 / 2 + 1 / 3) / 3)
    assert aurc(three, [0.5, 0.5, 0.5], [1, 0, 1])[0] == pytest.approx(1 / 3)
    assert aurc(three, [0.9, 0.5, 0.5], [1, 0, 1])[0] == pytest.approx((0 + (1 / 2) / 2 + 1 / 3) / 3)
    assert aurc(three, [0.9, 0.8, 0.7], [1, 1, 1])[0] == 0.0


def test_one_class_has_no_value_and_all_correct_has() -> None:
    weights, right = np.ones((2, 4)), np.ones(4)
    assert np.isnan(auroc(weights, [0.1, 0.2, 0.3, 0.4], right)).all()
    assert np.isnan(matthews(weights, right, right)).all()
    assert np.isnan(f1(weights, 0 * right, 0 * right)).all()
    assert (f1(weights, right, right) == 1).all()
    assert (overconfidence(weights, 0.75 * right, right) == -0.25).all()
    assert np.isnan(mean(np.zeros((1, 4)), right)).all()  # no document is drawn


def test_third_classes_and_missing_confidences_are_refused() -> None:
    with pytest.raises(ValueError, match=r"two classes 0 and 1 expected; found \[0, 1, 2\]"):
        f1(np.ones((1, 3)), [0, 1, 2], [0, 1, 1])
    with pytest.raises(ValueError, match="1 of 2 confidences are not a number"):
        auroc(np.ones((1, 2)), [0.5, np.nan], [0, 1])
