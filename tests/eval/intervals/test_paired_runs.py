"""Paired tests against published numbers, scipy, and full enumeration; paired intervals."""

from __future__ import annotations

from functools import partial
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import f1_score

from eval.statistics.bootstrap import interval
from eval.statistics.paired import difference, mcnemar_midp, sign_flip, swap_test
from eval.statistics.weighted import Values, auroc, f1, mean

GENERATOR = np.random.default_rng(12)


@pytest.mark.parametrize(
    ("only_first", "only_second", "published"),
    [(1, 7, 0.0391), (6, 16, 0.0347)],  # Fagerland, Lydersen and Laake 2013, their two examples
)
def test_midp_of_the_published_examples(only_first: int, only_second: int, published: float) -> None:
    assert mcnemar_midp(only_first, only_second) == pytest.approx(published, abs=5e-5)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 400), st.integers(1, 400))
def test_midp_is_the_exact_p_less_half_of_what_is_as_extreme(first: int, second: int) -> None:
    found = mcnemar_midp(first, second)
    pairs = first + second
    as_extreme = {first, second}
    probability = stats.binom.pmf(np.arange(pairs + 1), pairs, 0.5)
    more_extreme = abs(2 * np.arange(pairs + 1) - pairs) > abs(first - second)
    expected = probability[more_extreme].sum() + probability[list(as_extreme)].sum() / 2
    assert found == pytest.approx(expected, abs=1e-9)
    assert found == mcnemar_midp(second, first)
    assert 0 < found <= 1


def test_runs_that_agree_have_p_one_and_negative_counts_are_refused() -> None:
    assert mcnemar_midp(0, 0) == 1.0
    assert sign_flip(np.zeros(5), np.arange(5)).p_value == 1.0
    with pytest.raises(ValueError, match="found -1 and 3"):
        mcnemar_midp(-1, 3)
    with pytest.raises(ValueError, match="1 of 3 differences are not finite"):
        sign_flip([0.1, np.inf, 0.2], [0, 1, 2])


def test_sign_flip_equals_scipy_for_few_clusters() -> None:
    differences = GENERATOR.normal(0.5, size=12)
    reference = stats.permutation_test(
        (differences,), np.sum, permutation_type="samples", n_resamples=np.inf, alternative="two-sided"
    )
    found = sign_flip(differences, np.arange(12))
    assert (found.exact, found.units, found.patterns) == (True, 12, 4096)
    assert found.p_value == pytest.approx(reference.pvalue, abs=1e-12)


def test_sign_flip_of_single_documents_is_the_exact_binomial_test() -> None:
    first, second = 9, 5
    differences = np.concatenate([np.ones(first), -np.ones(second), np.zeros(30)])
    found = sign_flip(differences, np.arange(44))
    assert found.units == 14
    assert found.p_value == pytest.approx(stats.binomtest(first, first + second).pvalue, abs=1e-12)


def test_many_clusters_are_sampled_and_never_give_zero() -> None:
    differences = np.concatenate([np.ones(26), -np.ones(14)])
    found = sign_flip(differences, np.arange(40))
    expected = stats.binomtest(26, 40).pvalue
    assert not found.exact
    assert found.p_value == pytest.approx(expected, abs=4 * np.sqrt(expected / found.patterns))
    assert found == sign_flip(differences, np.arange(40))
    assert sign_flip(np.ones(40), np.arange(40)).p_value == pytest.approx(1e-4)


def test_clusters_flip_whole() -> None:
    """Ten copies of six documents say no more than six documents."""
    differences, clusters = np.array([1.0, 1, 1, 1, 1, -1]), np.arange(6)
    once = sign_flip(differences, clusters)
    assert sign_flip(np.repeat(differences, 10), np.repeat(clusters, 10)).p_value == once.p_value
    assert sign_flip(np.repeat(differences, 10), np.arange(60)).p_value < 0.001 < once.p_value


def test_sign_flip_keeps_its_level() -> None:
    """Exchangeable clusters of unequal size: rejections at 5 % lie within 4 standard errors of at most 5 %."""
    clusters = np.repeat(np.arange(14), GENERATOR.integers(1, 6, 14))
    rejected = 0
    for _ in range(400):
        shared = GENERATOR.normal(size=14)[clusters]
        rejected += sign_flip(shared + 0.3 * GENERATOR.normal(size=clusters.size), clusters).p_value <= 0.05
    assert 0.01 < rejected / 400 < 0.05 + 4 * np.sqrt(0.05 * 0.95 / 400)


def test_swap_test_of_f1_equals_enumeration() -> None:
    gold = np.array([1, 0, 1, 1, 0, 1, 0, 0])
    first, second = np.array([1, 0, 1, 1, 0, 1, 1, 0]), np.array([0, 1, 1, 0, 0, 1, 0, 1])
    clusters = np.array([0, 0, 1, 2, 3, 4, 5, 5])

    def plain(swap: tuple[int, ...]) -> float:
        swapped = np.array(swap)[clusters] == 1
        return f1_score(gold, np.where(swapped, second, first)) - f1_score(gold, np.where(swapped, first, second))

    observed = plain((0,) * 6)
    expected = np.mean([abs(plain(swap)) >= abs(observed) - 1e-12 for swap in product((0, 1), repeat=6)])

    found = swap_test(partial(f1, predicted=np.append(first, second), gold=np.append(gold, gold)), clusters)
    assert (found.exact, found.units) == (True, 6)
    assert found.p_value == pytest.approx(expected)


def test_swap_test_of_a_mean_is_the_sign_flip_test() -> None:
    first, second = GENERATOR.normal(size=(2, 10))
    clusters = np.arange(10)
    found = swap_test(partial(mean, values=np.append(first, second)), clusters)
    assert found.p_value == sign_flip(first - second, clusters).p_value


def test_swap_test_without_a_score_says_so() -> None:
    """The first run is right everywhere: its AUROC of correctness is not defined."""
    correct = np.append(np.ones(6), [1, 0, 1, 0, 1, 1])
    assert swap_test(partial(auroc, scores=GENERATOR.random(12), positive=correct), np.arange(6)) is None


def test_the_paired_interval_is_the_interval_of_the_differences() -> None:
    first = GENERATOR.exponential(size=100)
    second = first + 0.1 * GENERATOR.normal(size=100)
    where = (np.arange(100), np.zeros(100))
    paired = interval(difference(partial(mean, values=first), partial(mean, values=second)), *where)
    direct = interval(partial(mean, values=first - second), *where)
    assert (paired.low, paired.high) == pytest.approx((direct.low, direct.high), abs=1e-9)
    single = interval(partial(mean, values=first), *where)
    assert paired.high - paired.low < 0.3 * (single.high - single.low)


def test_a_difference_without_one_of_its_scores_has_none() -> None:
    def undefined(weights: Values) -> Values:
        return np.full(len(weights), np.nan)

    found = interval(difference(partial(mean, values=np.arange(9)), undefined), np.arange(9), np.zeros(9))
    assert (found.value, found.words) == (None, "not defined on these documents")
