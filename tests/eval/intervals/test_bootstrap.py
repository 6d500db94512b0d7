"""The bootstrap against scipy, closed forms, and explicit resampling; clusters, strata and cases without interval."""

from __future__ import annotations

import tracemalloc
from functools import partial
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from eval.statistics import bootstrap
from eval.statistics.bootstrap import interval, intervals, intervals_over_strata, leave_one_out, resamples, sampling
from eval.statistics.weighted import auroc, f1, mean, ratio

GENERATOR = np.random.default_rng(11)


def alone(documents: int) -> tuple[np.ndarray, np.ndarray]:
    """Independent documents of one stratum."""
    return np.arange(documents), np.zeros(documents)


def drawn(clusters: np.ndarray, strata: np.ndarray, draws: int = 200, seed: int = 1) -> np.ndarray:
    return np.concatenate(list(resamples(sampling(clusters, strata), draws, seed)))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 15), st.integers(1, 4), st.integers(0, 10_000))
def test_clusters_are_drawn_whole_and_strata_keep_their_clusters(
    documents: int, clusters: int, strata: int, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    cluster = generator.integers(0, clusters, documents)
    stratum = generator.integers(0, strata, clusters)[cluster]
    weights = drawn(cluster, stratum, draws=20, seed=seed)
    assert weights.shape == (20, documents)
    _, first, of = np.unique(cluster, return_index=True, return_inverse=True)
    np.testing.assert_array_equal(weights, weights[:, first][:, of])
    for label in np.unique(stratum):
        inside = first[stratum[first] == label]
        assert (weights[:, inside].sum(axis=1) == inside.size).all()


def test_draws_have_the_moments_of_a_bootstrap() -> None:
    """Counts of n independent documents are multinomial: mean 1, variance 1 - 1/n, covariance -1/n."""
    weights = drawn(*alone(10), draws=20_000)
    np.testing.assert_allclose(weights.mean(axis=0), 1, atol=0.03)
    np.testing.assert_allclose(np.cov(weights.T), np.eye(10) - 0.1, atol=0.03)


def test_a_draw_depends_on_the_seed_and_its_number_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    clusters, strata = np.arange(30) // 2, np.arange(30) // 10
    whole = drawn(clusters, strata)
    monkeypatch.setattr(bootstrap, "ENTRIES_AT_ONCE", 70)
    parts = list(resamples(sampling(clusters, strata), 200, 1))
    assert max(len(part) for part in parts) == 2
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    np.testing.assert_array_equal(drawn(clusters, strata, draws=50), whole[:50])
    assert (drawn(clusters, strata, seed=2) != whole).any()


def test_labels_may_be_words_and_their_order_is_free() -> None:
    clusters = np.array(["b", "a", "b", "c"])
    assert sampling(clusters, np.array(["x", "x", "x", "y"])).clusters == 3
    with pytest.raises(ValueError, match=r"cluster .*'b'.* lies in two strata"):
        sampling(clusters, np.array(["x", "x", "y", "y"]))
    with pytest.raises(ValueError, match=r"found \(4,\), \(3,\)"):
        sampling(clusters, np.zeros(3))
    with pytest.raises(ValueError, match="one cluster and one stratum per document"):
        sampling([], [])


def scipy_level(documents: int) -> float:
    """The confidence that scipy needs for our levels, which are wider for few documents."""
    z = bootstrap.expanded_z(sampling(*alone(documents)), 0.95)
    return 2 * NormalDist().cdf(z) - 1


@pytest.mark.parametrize("method", ["percentile", "bca"])
def test_ends_equal_scipy_on_the_same_draws(method: bootstrap.Method) -> None:
    values = GENERATOR.lognormal(size=80)
    reference = stats.bootstrap(
        (values,), np.mean, n_resamples=999, confidence_level=scipy_level(80), method=method, rng=3
    )
    plan = sampling(*alone(80))
    jackknife = bootstrap.values_of({"": partial(mean, values=values)}, leave_one_out(plan))[""]
    found = bootstrap.interval_of(values.mean(), reference.bootstrap_distribution, jackknife, plan, method)
    assert (found.low, found.high) == pytest.approx(tuple(reference.confidence_interval), rel=1e-9)


def test_auroc_equals_scipy_on_the_same_draws() -> None:
    confidences = np.round(GENERATOR.random(60), 1)
    correct = GENERATOR.random(60) < confidences

    def plain(confidence: np.ndarray, right: np.ndarray) -> float:
        return float(auroc(np.ones((1, right.size)), confidence, right)[0])

    reference = stats.bootstrap(
        (confidences, correct), plain, n_resamples=400, paired=True, vectorized=False, rng=3,
        confidence_level=scipy_level(60),
    )  # fmt: skip
    statistic = partial(auroc, scores=confidences, positive=correct)
    plan = sampling(*alone(60))
    jackknife = bootstrap.values_of({"": statistic}, leave_one_out(plan))[""]
    found = bootstrap.interval_of(plain(confidences, correct), reference.bootstrap_distribution, jackknife, plan, "bca")
    assert (found.low, found.high) == pytest.approx(tuple(reference.confidence_interval), rel=1e-9)


def test_a_mean_of_many_documents_has_the_t_interval() -> None:
    values = GENERATOR.normal(size=400)
    found = interval(partial(mean, values=values), *alone(400), draws=20_000)
    expected = stats.ttest_1samp(values, 0).confidence_interval()
    assert found.value == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx(tuple(expected), abs=0.004)
    assert (found.draws, found.undefined, found.words) == (20_000, 0, "bootstrap, 20,000 draws")


def test_few_articles_get_a_wider_interval() -> None:
    """Normal values of 8 articles: the width of Student's t with 7 degrees of freedom, not of the normal (-17 %)."""
    values = GENERATOR.normal(size=8)
    found = interval(partial(mean, values=values), *alone(8), draws=50_000, method="percentile")
    expected = stats.ttest_1samp(values, 0).confidence_interval()
    assert found.high - found.low == pytest.approx(expected.high - expected.low, rel=0.08)


def test_copies_in_a_cluster_are_one_document() -> None:
    values = GENERATOR.exponential(size=50)
    once = interval(partial(mean, values=values), *alone(50))
    copied = interval(partial(mean, values=np.repeat(values, 6)), np.repeat(np.arange(50), 6), np.zeros(300))
    assert (once.low, once.high) == pytest.approx((copied.low, copied.high), abs=1e-12)
    assert copied.words == "bootstrap of clusters, 2,000 draws"
    naive = interval(partial(mean, values=np.repeat(values, 6)), *alone(300))
    assert naive.high - naive.low < 0.6 * (once.high - once.low)


def test_fixed_strata_remove_the_variance_between_them() -> None:
    """Three subjects of constant difficulty 0, 1 and 2, with a little noise: only the noise is uncertain."""
    strata = np.arange(300) % 3
    values = strata + GENERATOR.normal(scale=0.1, size=300)
    within = interval(partial(mean, values=values), np.arange(300), strata, draws=4000)
    expected = np.sqrt(sum(values[strata == s].var(ddof=1) * 100 for s in range(3))) / 300
    assert within.high - within.low == pytest.approx(2 * stats.t.ppf(0.975, 297) * expected, rel=0.06)
    assert within.words == "bootstrap within strata, 4,000 draws"
    pooled = interval(partial(mean, values=values), *alone(300))
    assert pooled.high - pooled.low > 5 * (within.high - within.low)


def test_resampling_strata_needs_twenty_of_them() -> None:
    strata = np.arange(400) // 20
    difficulty = GENERATOR.normal(size=20)
    statistic = {"mean": partial(mean, values=difficulty[strata] + 0.01 * GENERATOR.normal(size=400))}
    found = intervals_over_strata(statistic, strata)["mean"]
    assert found.high - found.low == pytest.approx(2 * 2.093 * difficulty.std(ddof=1) / np.sqrt(20), rel=0.15)
    assert found.words == "bootstrap of whole strata, 2,000 draws"
    with pytest.raises(ValueError, match="needs at least 20 of them; found 19"):
        intervals_over_strata(statistic, np.minimum(strata, 18))


def test_a_jackknife_row_leaves_one_cluster_out_and_keeps_the_strata() -> None:
    clusters, strata = np.array([0, 0, 1, 2, 3, 4]), np.array([0, 0, 0, 0, 1, 1])
    rows = np.concatenate(list(leave_one_out(sampling(clusters, strata))))
    np.testing.assert_array_equal(
        rows,
        [
            [0, 0, 1.5, 1.5, 1, 1],
            [1.5, 1.5, 0, 1.5, 1, 1],
            [1.5, 1.5, 1.5, 0, 1, 1],
            [1, 1, 1, 1, 0, 2],
            [1, 1, 1, 1, 2, 0],
        ],
    )
    assert len(list(leave_one_out(sampling(*alone(1))))) == 0


def test_acceleration_of_a_mean_is_its_skewness() -> None:
    """a = skewness / (6 sqrt(n)); of more than 1,000 documents, from a sample of them."""
    for documents, tolerance in ((200, 1e-12), (5000, 0.003)):
        values = GENERATOR.exponential(size=documents)
        plan = sampling(*alone(documents))
        jackknife = bootstrap.values_of({"": partial(mean, values=values)}, leave_one_out(plan))[""]
        assert jackknife.size <= bootstrap.MOST_LEFT_OUT
        expected = stats.skew(values) / (6 * np.sqrt(documents))
        assert bootstrap.acceleration(plan, jackknife) == pytest.approx(expected, abs=tolerance)


def test_a_perfect_model_gets_words_instead_of_a_false_certainty() -> None:
    right = np.ones(40)
    area = partial(auroc, scores=GENERATOR.random(40), positive=right)
    found = intervals({"auroc": area, "f1": partial(f1, predicted=right, gold=right)}, *alone(40))
    assert found["auroc"] == bootstrap.Interval(None, None, None, 2000, 2000, "not defined on these documents")
    assert (found["f1"].value, found["f1"].low, found["f1"].high) == (1.0, None, None)
    assert found["f1"].words == "no interval: the same in all 2,000 bootstrap draws"


def test_draws_of_one_class_are_counted() -> None:
    """One mistake among 40 is in no draw with probability (1 - 1/40)^40 = 36 %; six in none with 0.1 %."""
    confidences = GENERATOR.random(40)
    one = interval(partial(auroc, scores=confidences, positive=np.arange(40) > 0), *alone(40))
    assert 640 < one.undefined < 800
    assert one.value is not None and one.low is one.high is None
    assert one.words == f"no interval: not defined in {one.undefined} of 2,000 bootstrap draws"
    six = interval(partial(auroc, scores=confidences, positive=np.arange(40) > 5), *alone(40), draws=20_000)
    assert 0 < six.undefined < 100
    assert six.low < six.value < six.high


@pytest.mark.parametrize("documents", [1, 4])
def test_a_handful_of_documents_has_no_interval(documents: int) -> None:
    found = interval(partial(mean, values=GENERATOR.random(documents)), *alone(documents))
    assert found.low is None
    assert found.words == "no interval: fewer than 5 documents or clusters that could be others"
    alone_in_stratum = interval(partial(mean, values=GENERATOR.random(30)), np.arange(30), np.arange(30))
    assert alone_in_stratum.words == found.words


def test_a_ratio_weighs_articles_by_their_length() -> None:
    """Linearised: the standard error of sum(x) / sum(y) is that of the mean of (x - r y) / mean(y)."""
    lengths = GENERATOR.lognormal(sigma=0.5, size=200)
    losses = lengths * (1 + 0.1 * GENERATOR.normal(size=200))
    found = interval(partial(ratio, numerators=losses, denominators=lengths), *alone(200), draws=10_000)
    total = losses.sum() / lengths.sum()
    error = (losses - total * lengths).std(ddof=1) / lengths.mean() / np.sqrt(200)
    assert found.value == pytest.approx(total)
    assert found.high - found.low == pytest.approx(2 * 1.972 * error, rel=0.04)


def test_mmlu_fits_in_memory() -> None:
    """All 14,042 documents: 4,000 draws at once would be 450 MB."""
    values, strata = GENERATOR.random(14_042), np.arange(14_042) % 57
    tracemalloc.start()
    found = interval(partial(mean, values=values), np.arange(14_042), strata, draws=400)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.low < found.value < found.high
    assert peak < 150e6
