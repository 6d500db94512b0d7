"""Calibration metrics against scikit-learn, torchmetrics, closed forms and cases counted by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import entr, log_softmax, softmax
from sklearn.metrics import brier_score_loss, log_loss
from torchmetrics.functional.classification import binary_calibration_error

from eval.calibration.brier import choice_brier, decomposition
from eval.calibration.ece import (
    bin_edges,
    bin_totals,
    consistency,
    debiased_squared_error,
    equal_count_bins,
    equal_width_bins,
    plug_in_error,
    simulated_errors,
)
from eval.calibration.entropy import choice_entropies
from eval.calibration.selective import risk_coverage, selective_risks
from eval.calibration.temperature import (
    LEAST,
    choice_nll,
    cross_fitted,
    fitted_temperature,
    fold_numbers,
)
from eval.statistics import weighted

Draw = np.random.Generator


@pytest.fixture
def draw() -> Draw:
    return np.random.default_rng(3)


def calibrated(documents: int, draw: Draw) -> tuple[np.ndarray, np.ndarray]:
    confidences = draw.beta(4, 2, size=documents)
    return confidences, draw.random(documents) < confidences


def answers(documents: int, draw: Draw) -> tuple[np.ndarray, np.ndarray]:
    """Over-confident by a factor of 2."""
    truth = log_softmax(draw.normal(scale=1.5, size=(documents, 4)), axis=1)
    gold = (np.cumsum(np.exp(truth), axis=1) < draw.random((documents, 1))).sum(axis=1)
    return 2 * truth - 20, gold


# Expected calibration error


def test_ece_by_hand() -> None:
    # bins of 1/15: 0.99, 0.95 and 0.98 in the last (14/15, 1]; 0.5 in (7/15, 8/15]; 13 bins are empty
    confidences, correct = np.array([0.99, 0.95, 0.5, 0.98]), np.array([True, False, True, True])
    bins = equal_width_bins(confidences)
    assert bins.tolist() == [14, 14, 7, 14]
    assert plug_in_error(confidences, correct, bins) == pytest.approx(0.5 / 4 + (0.99 + 0.95 + 0.98 - 2) / 4)
    totals = bin_totals(confidences, correct, bins)
    assert (totals.counts[7], totals.counts[14], totals.counts.sum()) == (1, 3, 4)
    assert totals.confidence[14] == pytest.approx(2.92 / 3)
    assert totals.accuracy[14] == pytest.approx(2 / 3)


@pytest.mark.parametrize(("right", "expected"), [(True, 0.2), (False, 0.8)])
def test_ece_of_answers_all_right_or_all_wrong(right: bool, expected: float) -> None:
    confidences, correct = np.full(9, 0.8), np.full(9, right)
    for bins in (equal_width_bins(confidences), equal_count_bins(confidences)):
        assert plug_in_error(confidences, correct, bins) == pytest.approx(expected)


def test_ece_of_one_document() -> None:
    confidences, correct = np.array([0.7]), np.array([True])
    for bins in (equal_width_bins(confidences), equal_count_bins(confidences)):
        assert plug_in_error(confidences, correct, bins) == pytest.approx(0.3)
        assert debiased_squared_error(confidences, correct, bins) == 0  # one document tells no variance


@pytest.mark.parametrize("documents", [1, 7, 277, 5000])
def test_ece_is_torchmetrics(draw: Draw, documents: int) -> None:
    confidences = draw.uniform(0.01, 0.99, size=documents).astype(np.float32).astype(np.float64)
    correct = draw.random(documents) < confidences**2
    expected = binary_calibration_error(
        torch.tensor(confidences, dtype=torch.float32), torch.tensor(correct, dtype=torch.long), n_bins=15, norm="l1"
    )
    assert plug_in_error(confidences, correct, equal_width_bins(confidences)) == pytest.approx(
        float(expected), abs=2e-6
    )


def test_a_confidence_on_an_edge_belongs_below_it_and_torchmetrics_puts_it_above() -> None:
    edges = bin_edges()
    assert equal_width_bins(edges).tolist() == [0, *range(15)]
    assert equal_width_bins(np.array([1 / 3, 2 / 3, 1 / 5])).tolist() == [4, 9, 2]  # softmax of equal choices
    above = np.nextafter(edges[1:-1], 1)
    assert equal_width_bins(above).tolist() == list(range(1, 15))
    # one document exactly on 0.5 = 1/2 and one below it: with two bins torchmetrics parts them, we do not
    confidences, correct = np.array([0.5, 0.25]), np.array([True, False])
    ours = plug_in_error(confidences, correct, equal_width_bins(confidences, bins=2))
    theirs = binary_calibration_error(torch.tensor([0.5, 0.25]), torch.tensor([1, 0]), n_bins=2, norm="l1")
    assert ours == pytest.approx(abs(0.75 - 1) / 2)
    assert float(theirs) == pytest.approx((0.5 + 0.25) / 2)


def test_equal_counts_are_equal_and_ties_stay_together(draw: Draw) -> None:
    confidences = draw.permutation(np.linspace(0.1, 0.9, 47))
    sizes = np.bincount(equal_count_bins(confidences))
    assert len(sizes) == 15
    assert sizes.min() == 3 and sizes.max() == 4
    order = np.argsort(confidences)
    assert (np.diff(equal_count_bins(confidences)[order]) >= 0).all()
    tied = np.array([0.2] * 10 + [0.9] * 20)
    assert len(set(equal_count_bins(tied)[:10])) == 1
    assert len(set(equal_count_bins(tied)[10:])) == 1


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(0, 2**32 - 1), st.booleans())
def test_ece_does_not_depend_on_the_order_of_documents(documents: int, seed: int, coarse: bool) -> None:
    draw = np.random.default_rng(seed)
    confidences, correct = calibrated(documents, draw)
    confidences = np.round(confidences, 1) if coarse else confidences
    order = draw.permutation(documents)
    for binning in (equal_width_bins, equal_count_bins):
        for error in (plug_in_error, debiased_squared_error):
            expected = error(confidences, correct, binning(confidences))
            found = error(confidences[order], correct[order], binning(confidences[order]))
            assert found == pytest.approx(expected, abs=1e-12)


def test_debiased_error_by_hand_is_kumars_where_confidences_agree() -> None:
    confidences, correct = np.full(10, 0.8), np.array([True] * 6 + [False] * 4)
    found = debiased_squared_error(confidences, correct, equal_width_bins(confidences))
    assert found == pytest.approx(0.2**2 - 0.6 * 0.4 / 9)


@pytest.mark.parametrize("binning", [equal_width_bins, equal_count_bins])
def test_debiased_error_is_unbiased_where_the_plug_in_is_not(binning) -> None:  # type: ignore[no-untyped-def]
    draw = np.random.default_rng(0)
    found, plug_in = [], []
    for _ in range(4000):
        confidences, correct = calibrated(100, draw)
        bins = binning(confidences)
        found.append(debiased_squared_error(confidences, correct, bins))
        plug_in.append(plug_in_error(confidences, correct, bins))
    assert abs(np.mean(found)) < 4 * np.std(found) / np.sqrt(len(found))
    assert np.mean(plug_in) > 0.1  # of a calibrated model


def test_consistency_rejects_5_percent_of_calibrated_models() -> None:
    draw = np.random.default_rng(1)
    models, data_sets, documents = 60, 150, 277
    rejected, inside = np.zeros(2), np.zeros(2)
    for seed in range(models):  # every model's band is simulated once, and judges 150 data sets
        confidences, _ = calibrated(documents, draw)
        binnings = [equal_width_bins(confidences), equal_count_bins(confidences)]
        simulated = simulated_errors(confidences, binnings, draws=1000, seed=seed)
        for correct in draw.random((data_sets, documents)) < confidences:
            errors = [plug_in_error(confidences, correct, bins) for bins in binnings]
            found = [consistency(error, drawn) for error, drawn in zip(errors, simulated, strict=True)]
            rejected += [one.p_value <= 0.05 for one in found]
            inside += [one.low <= error <= one.high for one, error in zip(found, errors, strict=True)]
    assert ((rejected / models / data_sets >= 0.04) & (rejected / models / data_sets <= 0.06)).all(), rejected
    assert ((inside / models / data_sets >= 0.94) & (inside / models / data_sets <= 0.96)).all(), inside


def test_consistency_finds_overconfidence_and_repeats(draw: Draw) -> None:
    confidences, correct = calibrated(1000, draw)
    surer = np.sqrt(confidences)
    bins = equal_width_bins(surer)
    first, second = (simulated_errors(surer, [bins], draws=1000, seed=5) for _ in range(2))
    assert np.array_equal(first, second)
    assert first.shape == (1, 1000)
    found = consistency(plug_in_error(surer, correct, bins), first[0])
    assert found.p_value == pytest.approx(1 / 1001)
    assert plug_in_error(surer, correct, bins) > found.high


def test_simulated_errors_are_those_of_drawn_answers() -> None:
    confidences = np.array([1.0, 0.0, 1.0])  # nothing is left to chance
    simulated = simulated_errors(confidences, [equal_width_bins(confidences)], draws=7, seed=0)
    assert simulated.tolist() == [[0.0] * 7]
    one = simulated_errors(np.array([0.25]), [np.array([3])], draws=20000, seed=0)[0]  # 0.75 in a quarter of draws
    assert sorted(set(one.tolist())) == [0.25, 0.75]
    assert np.mean(one == 0.75) == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize("bad", [[], [0.5, 1.1], [-0.1], [np.nan]])
def test_confidences_that_are_none_are_refused(bad: list[float]) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        equal_width_bins(np.array(bad))


# Brier score


def test_brier_by_hand() -> None:
    probabilities = np.array([[0.7, 0.2, 0.1], [0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])
    found = choice_brier(probabilities, np.array([0, 1, 2]))
    assert found == pytest.approx([0.09 + 0.04 + 0.01, 0.5, 2.0])


def test_brier_is_scikit_learns(draw: Draw) -> None:
    loglikelihoods, gold = answers(300, draw)
    probabilities = softmax(loglikelihoods, axis=1)
    expected = brier_score_loss(gold, probabilities, labels=range(4), scale_by_half=False)
    assert choice_brier(probabilities, gold).mean() == pytest.approx(expected, abs=1e-12)


@settings(deadline=None)
@given(
    st.integers(1, 80).flatmap(
        lambda count: st.tuples(
            arrays(np.float64, count, elements=st.floats(0, 1)), arrays(np.bool_, count, elements=st.booleans())
        )
    )
)
def test_the_parts_add_up_to_the_brier_score(drawn: tuple[np.ndarray, np.ndarray]) -> None:
    confidences, correct = drawn
    expected = np.mean((confidences - correct) ** 2)
    for bins in (equal_width_bins(confidences), equal_count_bins(confidences)):
        parts = decomposition(confidences, correct, bins)
        total = parts.reliability - parts.resolution + parts.uncertainty + parts.within_bin
        assert total == pytest.approx(expected, abs=1e-12)
        assert min(parts.reliability, parts.resolution, parts.uncertainty) >= 0


def test_parts_by_hand() -> None:
    confidences = np.array([0.9, 0.9, 0.3, 0.3])
    correct = np.array([True, True, True, False])
    parts = decomposition(confidences, correct, equal_width_bins(confidences))
    assert parts.reliability == pytest.approx(0.5 * 0.1**2 + 0.5 * 0.2**2)
    assert parts.resolution == pytest.approx(0.25**2)
    assert parts.uncertainty == pytest.approx(0.75 * 0.25)
    assert parts.within_bin == pytest.approx(0)


# Ranking by confidence


def test_selective_risks_by_hand() -> None:
    confidences = np.array([0.3, 0.9, 0.6, 0.1])
    correct = np.array([False, True, False, True])
    # the k surest: right | right wrong | ... wrong | ... right
    assert selective_risks(confidences, correct) == pytest.approx([0, 1 / 2, 2 / 3, 2 / 4])
    assert selective_risks(confidences, np.array([True] * 4)).tolist() == [0] * 4
    assert selective_risks(confidences, np.array([False] * 4)).tolist() == [1] * 4
    assert selective_risks(np.array([0.5]), np.array([False])).tolist() == [1]


def test_the_risk_of_ties_is_the_mean_over_their_orders() -> None:
    confidences = np.array([0.9, 0.5, 0.5, 0.5, 0.2])
    correct = np.array([False, True, False, True, True])
    orders = [
        np.cumsum([1, *(1 - correct[list(order)]), 0]) / np.arange(1, 6) for order in itertools.permutations([1, 2, 3])
    ]
    assert selective_risks(confidences, correct) == pytest.approx(np.mean(orders, axis=0))


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(0, 2**32 - 1))
def test_the_risk_coverage_curve_ends_in_the_error_rate(documents: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    confidences, correct = np.round(draw.random(documents), 2), draw.random(documents) < 0.7
    points = risk_coverage(confidences, correct)
    coverages = [coverage for coverage, _ in points]
    assert len(points) == min(documents, 100)
    assert coverages == sorted(set(coverages)) and coverages[-1] == 1
    assert points[-1][1] == pytest.approx(np.mean(~correct))
    order = draw.permutation(documents)
    risks = selective_risks(confidences, correct)
    assert selective_risks(confidences[order], correct[order]) == pytest.approx(risks)
    area = weighted.aurc(np.ones((1, documents)), confidences, correct)
    assert risks.mean() == pytest.approx(area[0])


# Entropies


def test_entropies_by_hand() -> None:
    certain, torn = np.array([0.0, -np.inf]), np.log([0.5, 0.5])
    agree = choice_entropies(np.array([[torn], [torn]]))
    assert (agree.total[0], agree.mutual_information[0]) == (pytest.approx(np.log(2)), pytest.approx(0))
    disagree = choice_entropies(np.array([[certain], [certain[::-1]]]))
    assert disagree.total[0] == pytest.approx(np.log(2))
    assert disagree.expected[0] == pytest.approx(0)
    assert disagree.mutual_information[0] == pytest.approx(np.log(2))


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(2, 5), st.integers(0, 2**32 - 1))
def test_mutual_information_is_the_mean_divergence_from_the_mean(members: int, choices: int, seed: int) -> None:
    loglikelihoods = np.random.default_rng(seed).normal(scale=3, size=(members, 20, choices)) - 50
    loglikelihoods[:, ::2, -1] = -np.inf  # every other document has a choice less
    found = choice_entropies(loglikelihoods)
    each = softmax(loglikelihoods, axis=-1)
    mean = each.mean(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        divergence = np.where(each > 0, each * np.log(each / mean), 0).sum(axis=-1).mean(axis=0)
    assert found.mutual_information == pytest.approx(divergence, abs=1e-12)
    assert found.total == pytest.approx(entr(mean).sum(axis=-1))
    assert (found.mutual_information >= -1e-12).all()
    if members == 1:
        assert found.mutual_information == pytest.approx(np.zeros(20))


# Temperature


def test_nll_is_scikit_learns(draw: Draw) -> None:
    loglikelihoods, gold = answers(300, draw)
    expected = log_loss(gold, softmax(loglikelihoods, axis=1), labels=range(4))
    assert choice_nll(loglikelihoods, gold).mean() == pytest.approx(expected)
    far = np.array([[-3000.0, -5.0], [-1.0, -np.inf]])  # probabilities would underflow
    assert choice_nll(far, np.array([0, 0])) == pytest.approx([2995, 0])


def test_the_temperature_that_was_used_is_found_again(draw: Draw) -> None:
    loglikelihoods, gold = answers(40000, draw)
    for temperature in (0.4, 1.0, 3.0):
        assert fitted_temperature(loglikelihoods / 2 * temperature, gold) == pytest.approx(temperature, rel=0.03)


def test_the_fitted_temperature_is_the_best_of_a_grid(draw: Draw) -> None:
    loglikelihoods, gold = answers(200, draw)
    loglikelihoods[gold != 3, 3] = -np.inf
    found = fitted_temperature(loglikelihoods, gold)
    best = choice_nll(loglikelihoods, gold, found).mean()
    assert all(best <= choice_nll(loglikelihoods, gold, t).mean() + 1e-7 for t in np.geomspace(0.01, 100, 400))


def test_cross_fitting_uses_the_other_folds_only(draw: Draw) -> None:
    loglikelihoods, gold = answers(101, draw)
    folds = fold_numbers([f"document {n}" for n in range(101)])
    found = cross_fitted(loglikelihoods, gold, folds)
    assert found is not None
    assert not found.at_bound
    assert found.temperatures == pytest.approx(np.full(5, 2.0), rel=0.5)
    assert found.nll.mean() < choice_nll(loglikelihoods, gold).mean()
    changed = loglikelihoods.copy()
    changed[folds == 2] *= 7  # their own temperature must not move
    again = cross_fitted(changed, gold, folds)
    assert again is not None
    assert again.temperatures[2] == found.temperatures[2]
    assert (np.delete(again.temperatures, 2) != np.delete(found.temperatures, 2)).all()
    for fold in range(5):
        inside = folds == fold
        expected = choice_nll(loglikelihoods[inside], gold[inside], found.temperatures[fold])
        assert found.nll[inside] == pytest.approx(expected)


def test_folds_follow_the_documents_and_keep_clusters_whole(draw: Draw) -> None:
    keys = [f"text {n % 13}" for n in range(60)]
    folds = fold_numbers(keys)
    assert len({(key, fold) for key, fold in zip(keys, folds, strict=True)}) == 13
    order = draw.permutation(60)
    assert fold_numbers([keys[place] for place in order]).tolist() == folds[order].tolist()
    assert sorted(set(folds)) == [0, 1, 2, 3, 4]
    assert sorted(set(fold_numbers(["a", "b", "a"]))) == [0, 1]  # no empty folds


def test_one_cluster_cannot_be_cross_fitted(draw: Draw) -> None:
    loglikelihoods, gold = answers(6, draw)
    assert cross_fitted(loglikelihoods, gold, fold_numbers(["the same"] * 6)) is None


def test_all_right_drives_the_temperature_to_its_bound(draw: Draw) -> None:
    loglikelihoods, _ = answers(50, draw)
    found = cross_fitted(loglikelihoods, loglikelihoods.argmax(axis=1), fold_numbers([str(n) for n in range(50)]))
    assert found is not None
    assert found.at_bound
    assert found.temperatures.max() < 2 * LEAST
