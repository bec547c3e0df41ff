"""density.py against brute force, closed forms and the invariances that the method claims."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from scipy.spatial import cKDTree
from scipy.special import logsumexp

from pd_core.core.errors import UserError
from pd_core.density import formula


def _distances(n: int = 2000, seed: int = 0, spread: float = 0.5) -> np.ndarray:
    return np.random.default_rng(seed).lognormal(mean=1.0, sigma=spread, size=n)


def test_ranks_follow_the_true_density_of_a_gaussian_mixture() -> None:
    rng = np.random.default_rng(7)
    means, scales = np.array([[0.0, 0.0], [4.0, 1.0], [-2.0, 5.0]]), np.array([1.0, 0.5, 2.0])
    component = rng.choice(3, size=20_000, p=[0.5, 0.2, 0.3])
    points = means[component] + scales[component, None] * rng.standard_normal((20_000, 2))
    # p(x) up to the constant 1/(2 pi), which no rank sees.
    squared = ((points[:, None, :] - means) ** 2).sum(axis=2)
    true_density = (np.array([0.5, 0.2, 0.3]) / scales**2 * np.exp(-0.5 * squared / scales**2)).sum(axis=1)

    neighbor_distances, _ = cKDTree(points).query(points, k=21)
    rho = formula.pseudo_density(formula.mean_knn_distance(neighbor_distances[:, 1:]), volume_dim=2)

    assert stats.spearmanr(rho, true_density).statistic >= 0.95


def test_log_density_has_the_slope_of_the_true_log_density_when_n_is_the_dimension() -> None:
    """With n equal to the intrinsic dimension rho is proportional to p (Loftsgaarden & Quesenberry 1965)."""
    points = np.random.default_rng(3).standard_normal((20_000, 2))
    neighbor_distances, _ = cKDTree(points).query(points, k=21)
    rho = formula.pseudo_density(formula.mean_knn_distance(neighbor_distances[:, 1:]), volume_dim=2)
    core = (points**2).sum(axis=1) < 4.0  # the tail is biased: a k-NN ball there reaches into denser space
    slope = np.polyfit(-0.5 * (points[core] ** 2).sum(axis=1), np.log(rho[core]), 1)[0]
    # Per-row noise of log rho is about 1/sqrt(20) = 0.22; over 17k rows with a spread of 0.57 in x the standard error
    # is below 0.01 even with the 20-fold correlation of neighbours. The rest of the 0.06 is for the smoothing bias.
    assert slope == pytest.approx(1.0, abs=0.06)


def test_mean_knn_distance_is_the_row_mean_in_float64() -> None:
    distances = np.array([[1.0, 2.0, 6.0], [0.0, 0.0, 0.0]], dtype=np.float32)
    result = formula.mean_knn_distance(distances)
    assert result.dtype == np.float64
    assert result.tolist() == [3.0, 0.0]


def test_n_equal_to_one_is_the_formula_of_the_authors() -> None:
    # Ten orders of magnitude, with rows far below 1e-3 of the median: the floor must not touch positive distances.
    d = np.concatenate([_distances(), np.geomspace(1e-5, 1e5, 50)])
    expected = d.size * (1 / d) / np.sum(1 / d)
    # exp(log x) costs about |log x| eps <= 12 * 2.2e-16, sums of 2050 terms less than 1e-14.
    np.testing.assert_allclose(formula.pseudo_density(d, 1), expected, rtol=1e-13)


@pytest.mark.parametrize("volume_dim", [1, 2.5, 10])
def test_density_is_one_over_volume_up_to_one_factor(volume_dim: float) -> None:
    d = _distances()
    unit_ball = 0.5 * volume_dim * math.log(math.pi) - math.lgamma(0.5 * volume_dim + 1)
    product = np.log(formula.pseudo_density(d, volume_dim)) + unit_ball + volume_dim * np.log(d)
    np.testing.assert_allclose(product, product[0], atol=1e-12)  # |log| <= 30: 30 * eps * a few operations
    assert formula.pseudo_density(d, volume_dim).mean() == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("volume_dim", [1, 8, 64])
@pytest.mark.parametrize("scale", [1e-6, 0.3, 1e6])
def test_scaling_all_distances_changes_nothing(volume_dim: int, scale: float) -> None:
    d = _distances()
    # log(scale d) is rounded at |log| <= 16, times n: 64 * 16 * 2.2e-16 = 2e-13, twice with the normaliser.
    expected = formula.pseudo_density(d, volume_dim)
    np.testing.assert_allclose(formula.pseudo_density(scale * d, volume_dim), expected, rtol=1e-12)


@pytest.mark.parametrize("volume_dim", [0.5, 2, 16, 384])
def test_ranks_and_percentiles_do_not_depend_on_n(volume_dim: float) -> None:
    d = _distances()
    reference = formula.log_pseudo_density(d, 1, 0.0)
    other = formula.log_pseudo_density(d, volume_dim, formula.log_normalizer(d, volume_dim))
    np.testing.assert_array_equal(stats.rankdata(other), stats.rankdata(reference))
    np.testing.assert_array_equal(
        formula.mid_ranks(other, np.sort(other)), formula.mid_ranks(reference, np.sort(reference))
    )


@pytest.mark.parametrize("zeros", [0, 3])
@pytest.mark.parametrize("volume_dim", [1, 384, 2048])
def test_nothing_overflows(volume_dim: int, zeros: int) -> None:
    d = np.concatenate([np.zeros(zeros), np.geomspace(1e-8, 1e8, 1001)])
    rho = formula.pseudo_density(d, volume_dim)
    floored, count = formula.apply_distance_floor(d, formula.distance_floor(d))
    log_rho = formula.log_pseudo_density(floored, volume_dim, formula.log_normalizer(floored, volume_dim))
    assert count == zeros
    assert np.all(np.isfinite(rho)) and np.all(np.isfinite(log_rho))
    assert rho.mean() == pytest.approx(1.0, rel=1e-9)  # n |log d| <= 4e4, times eps: 1e-11
    assert np.all(np.diff(log_rho) <= 0)
    query = formula.density_of(formula.log_pseudo_density(np.array([1e-300, 1e300]), volume_dim, 0.0))
    assert np.all(np.isfinite(query))


def test_duplicates_are_bounded_and_stay_the_densest() -> None:
    d = np.concatenate([np.zeros(5), _distances(1000)])
    rho = formula.pseudo_density(d, 1)
    assert formula.distance_floor(d) == pytest.approx(1e-3 * np.median(d[5:]), rel=1e-15)
    # 1000 times the density of the median distance, which is 1000^n with n = 1.
    median_density = rho[5:][np.argsort(d[5:])][499:501].max()
    np.testing.assert_allclose(rho[:5], rho[0])
    assert rho[5:].max() < rho[0] <= 1000 * median_density * (1 + 1e-12)
    assert rho.mean() == pytest.approx(1.0, rel=1e-12)


def test_floor_keeps_the_order_when_positive_distances_are_tiny() -> None:
    d = np.array([0.0, 1e-7, 1.0, 1.0, 2.0])
    rho = formula.pseudo_density(d, 3)
    assert formula.distance_floor(d) == 1e-7
    assert rho[0] == rho[1] > rho[2]


@pytest.mark.parametrize("smallest", [5e-324, 1e-320])
def test_floor_is_positive_at_the_smallest_floats(smallest: float) -> None:
    assert formula.distance_floor(np.array([0.0, smallest, smallest])) > 0


def test_identical_images_are_refused() -> None:
    with pytest.raises(UserError, match="identical in feature space"):
        formula.pseudo_density(np.zeros(4), 1)


def test_normalizer_against_scipy_whatever_the_order_of_the_rows() -> None:
    d = _distances()
    c = formula.log_normalizer(d, 3)
    assert c == pytest.approx(math.log(d.size) - logsumexp(-3.0 * np.log(d)), abs=1e-12)
    assert formula.log_normalizer(np.random.default_rng(1).permutation(d), 3) == c  # to the bit


def test_query_form_agrees_with_the_real_set_under_the_same_constants() -> None:
    d = _distances()
    c = formula.log_normalizer(d, 4)
    rho = formula.pseudo_density(d, 4)
    np.testing.assert_allclose(formula.density_of(formula.log_pseudo_density(d[10:20], 4, c)), rho[10:20], rtol=1e-13)


def test_percentile_is_the_mean_percentile_of_score() -> None:
    rng = np.random.default_rng(1)
    reference = np.sort(rng.integers(0, 30, size=200).astype(float))  # many ties
    values = np.array([-1.0, 0.0, 7.0, 7.5, 29.0, 40.0])
    expected = [stats.percentileofscore(reference, v, kind="mean") for v in values]
    result = formula.mid_ranks(values, reference)
    np.testing.assert_allclose(result, expected, rtol=1e-14)
    assert result[0] == 0.0 and result[-1] == 100.0
    assert formula.mid_ranks(reference, reference).mean() == pytest.approx(50.0)


@pytest.mark.parametrize("text", ["p0", "p12.34", "p80", "p99.9", "p100"])
def test_percentile_threshold_is_the_quantile(text: str) -> None:
    rho = formula.pseudo_density(_distances(5001), 2)
    threshold = formula.parse_threshold(text)
    expected = np.quantile(rho, float(text[1:]) / 100)
    assert threshold.kind == "percentile"
    # The rank 5000 q is rounded to 1e-12 of a row, and neighbouring rows differ by less than their own size.
    assert threshold.density(np.sort(rho)) == pytest.approx(expected, rel=1e-12)
    # 1001 quantiles are exact at tenths of a percent; between them linear to second order in the step of 1e-3.
    assert threshold.density(formula.density_quantiles(rho)) == pytest.approx(expected, rel=1e-3)


def test_quantiles_are_exact_at_their_own_ranks() -> None:
    rho = formula.pseudo_density(_distances(4321), 1)
    quantiles = formula.density_quantiles(rho)
    assert quantiles.shape == (1001,) and quantiles[0] == rho.min() and quantiles[-1] == rho.max()
    assert formula.parse_threshold("p80").density(quantiles) == quantiles[800]
    assert np.mean(rho > quantiles[800]) == pytest.approx(0.2, abs=1 / 4321)


@pytest.mark.parametrize(("text", "value"), [("1.1869", 1.1869), (" .5 ", 0.5), ("2e-3", 0.002), (1.25, 1.25)])
def test_density_threshold_is_itself(text: str | float, value: float) -> None:
    threshold = formula.parse_threshold(text)
    assert threshold == formula.Threshold("density", value)
    assert threshold.density(np.array([1.0, 2.0])) == value


@pytest.mark.parametrize(
    "text",
    ["", "p", "80p", "p101", "p-1", "pnan", "nan", "inf", "1e999", "0", "-1.5", "80%", "1_0", "p 80", "median", "1,18"],
)
def test_bad_threshold_shows_both_forms(text: str) -> None:
    with pytest.raises(UserError) as error:
        formula.parse_threshold(text)
    assert "p80" in str(error.value) and "1.1869" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: formula.mean_knn_distance(np.ones(3)), ValueError),
        (lambda: formula.mean_knn_distance(np.ones((3, 0))), ValueError),
        (lambda: formula.mean_knn_distance(np.array([[1.0, np.inf]])), ValueError),
        (lambda: formula.pseudo_density(np.array([1.0, np.nan]), 1), ValueError),
        (lambda: formula.pseudo_density(np.array([1.0, -1.0]), 1), ValueError),
        (lambda: formula.pseudo_density(np.ones((2, 2)), 1), ValueError),
        (lambda: formula.pseudo_density(np.ones(2), 0), UserError),
        (lambda: formula.pseudo_density(np.ones(2), math.inf), UserError),
        (lambda: formula.log_normalizer(np.array([0.0, 1.0]), 1), ValueError),
        (lambda: formula.log_normalizer(np.array([]), 1), ValueError),
        (lambda: formula.log_pseudo_density(np.ones(2), 1, math.nan), ValueError),
        (lambda: formula.apply_distance_floor(np.ones(2), 0.0), ValueError),
        (lambda: formula.density_quantiles(np.array([])), ValueError),
        (lambda: formula.density_quantiles(np.array([1.0, np.nan])), ValueError),
    ],
)
def test_bad_input_is_refused(call, error: type[Exception]) -> None:
    with pytest.raises(error):
        call()


def test_a_threshold_outside_the_real_densities_is_refused_by_the_name_of_its_setting():
    quantiles = formula.density_quantiles(np.linspace(0.5, 2.0, 1001))
    assert formula.threshold_inside("p0", quantiles, "--x", "the index") == pytest.approx(0.5)
    assert formula.threshold_inside("2", quantiles, "--x", "the index") == 2
    for text in ("0.49", "2.01"):
        with pytest.raises(UserError, match=rf"^--x {text}: outside the densities of label '3', .* 0.5 ... 2; choose"):
            formula.threshold_inside(text, quantiles, "--x", "label '3'")
