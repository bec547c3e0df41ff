"""Weight functions and acceptance: closed forms of the paper, χ² against the analytic target, intervals that cover."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from pd_core.core import seeds
from pd_core.core.errors import UserError
from pd_core.density import formula as density_formula
from pd_core.density import weighting as density_weighting

QUANTILES = np.linspace(0.5, 1.5, 1001)


def rate_of(shares, weighting):
    """The expected share of accepted samples: Σ share_j a_j, for two levels the paper's P + (1 - P)/w or P w + (1 -
    P).
    """
    return np.dot(shares, weighting.weights) / max(weighting.weights)


@pytest.mark.parametrize("weight", [0.01, 0.1, 1.0, 10.0, 100.0])
def test_two_levels_are_the_papers_rule(weight):
    """Algorithm 2: w > 1 accepts if f > τ or u < 1/w; w < 1 accepts if f <= τ or u < w."""
    rng = np.random.default_rng(0)
    f, u, tau = rng.lognormal(size=20_000), rng.random(20_000), 1.2
    paper = (f > tau) | (u < 1 / weight) if weight >= 1 else (f <= tau) | (u < weight)
    ours = u < density_weighting.acceptance_probability(f, density_weighting.two_level(tau, weight))
    np.testing.assert_array_equal(ours, paper)


@pytest.mark.parametrize("weight", [0.01, 0.1, 10.0, 100.0])
def test_accepted_samples_follow_the_target(weight):
    """χ² over 12 bins against q ∝ ω p_G, with p_G = Exp(1) and the run's own u: not rejected at 1e-3."""
    number = np.arange(400_000)
    f = -np.log1p(-seeds.uniform(number, seeds.stream(3, "toy density")))
    u = seeds.uniform(number, seeds.stream(3, "acceptance"))
    weighting = density_weighting.two_level(stats.expon.ppf(0.8), weight)
    accepted = f[u < density_weighting.acceptance_probability(f, weighting)]
    edges = stats.expon.ppf(np.concatenate([np.linspace(0, 0.8, 9), [0.85, 0.9, 0.95, 1.0]]))
    mass = np.diff(stats.expon.cdf(edges)) * np.where(edges[:-1] >= weighting.edges[0], weight, 1.0)
    observed, _ = np.histogram(accepted, edges)
    expected = mass / mass.sum() * observed.sum()
    assert observed.sum() > 3_000
    assert expected.min() > 5, "χ² needs counts"
    assert stats.chisquare(observed, expected).pvalue > 1e-3


def test_inverse_probabilities_undo_the_selection():
    """Horvitz–Thompson: Σ x/a over Σ 1/a of the accepted is the generator's mean, within 5 standard errors."""
    rng = np.random.default_rng(1)
    f = rng.lognormal(size=200_000)
    a = density_weighting.acceptance_probability(f, density_weighting.two_level(1.5, 20.0))
    kept = rng.random(f.size) < a
    weights = 1 / a[kept]
    estimate = np.sum(weights * f[kept]) / weights.sum()
    error = math.sqrt(np.sum((weights * (f[kept] - estimate)) ** 2)) / weights.sum()
    assert abs(estimate - f.mean()) < 5 * error
    assert abs(f[kept].mean() - f.mean()) > 20 * error  # the selection itself is far from it


def test_match_gives_the_real_sets_densities():
    rng = np.random.default_rng(2)
    real, generated = rng.lognormal(0.0, 0.3, 50_000), rng.lognormal(0.25, 0.3, 200_000)
    quantiles = np.quantile(real, np.linspace(0, 1, 1001))
    weighting = density_weighting.match(quantiles, generated[:50_000], bins=10, most=50.0)
    kept = generated[rng.random(generated.size) < density_weighting.acceptance_probability(generated, weighting)]
    shares = density_weighting.bin_shares(kept, weighting)
    # each share is 0.1 up to the pilot's and the draw's sampling error: 0.1 (1 ± 5 sqrt(1/2000 + 1/2000))
    np.testing.assert_allclose(shares, 0.1, rtol=0.16)
    unmatched = density_weighting.bin_shares(generated, weighting)
    assert unmatched.max() > 0.2


GENERATED = {
    "far below": (0.7, 0.1, 2000),
    "few": (0.7, 0.1, 30),
    "above": (1.3, 0.1, 500),
    "narrow": (1.0, 0.02, 500),
    "nearly real": (1.0, 0.3, 500),
}


@pytest.mark.parametrize("most", [1.5, 5.0, 20.0, 1000.0])
@pytest.mark.parametrize("name", GENERATED)
def test_the_acceptance_rate_of_match_is_at_least_one_over_the_largest_weight(name, most):
    mean, spread, m = GENERATED[name]
    generated = np.random.default_rng(4).normal(mean, spread, m)
    weighting = density_weighting.match(QUANTILES, generated, bins=20, most=most)
    assert max(weighting.weights) <= most * (1 + 1e-12)
    new = density_weighting.unseen(weighting, generated)
    assert density_weighting.weight_of(generated, new).mean() == pytest.approx(1, rel=1e-12)
    assert density_weighting.acceptance_probability(generated, new).mean() >= (1 - 1e-12) / most


def test_match_cuts_no_more_than_the_bound_asks_for():
    """Where a weight is cut at all the bound is met exactly, and the weights that are not cut keep their
    proportions.
    """
    generated = np.random.default_rng(4).normal(0.7, 0.1, 2000)
    cut, whole = (density_weighting.match(QUANTILES, generated, bins=20, most=most) for most in (20.0, 1e9))
    assert density_weighting.acceptance_probability(
        generated, density_weighting.unseen(cut, generated)
    ).mean() == pytest.approx(1 / 20)
    below = np.array(cut.weights) < max(cut.weights)
    assert 3 < below.sum() < 20
    ratio = np.array(cut.weights)[below] / np.array(whole.weights)[below]
    np.testing.assert_allclose(ratio, ratio[0])


def test_match_holds_a_bin_that_the_pilot_missed():
    """All of a pilot in one bin of ten: that one has weight 1, the mean; the others the largest there may be."""
    weighting = density_weighting.match(QUANTILES, np.full(1000, 1.45), bins=10, most=20.0)
    assert weighting.weights[:-1] == pytest.approx((20.0,) * 9)
    assert weighting.weights[-1] == pytest.approx(1.0, rel=2e-3)  # 1000/1001: it is counted with the candidate itself


def test_the_weights_of_the_unseen_are_those_of_a_pilot_without_them():
    """Leave-one-out by hand; nothing is cut here, so the weights are the ratios up to their mean."""
    generated = np.random.default_rng(5).normal(1.0, 0.3, 40)
    weighting = density_weighting.match(QUANTILES, generated, bins=4, most=1e9)
    left_out = [
        density_weighting.match(QUANTILES, np.delete(generated, i), bins=4, most=1e9).weights
        for i in range(len(generated))
    ]
    place = np.searchsorted(weighting.edges, generated)
    unscaled = lambda w, m: np.array(w) / np.array(w)[0] * m  # noqa: E731
    counts = np.bincount(place, minlength=4)
    scale = 41 / (4 * (counts[0] + 1))  # (M + 1) / (B (c + 1)) of bin 0
    expected = []
    for i, j in enumerate(place):
        others = counts - (np.arange(4) == j)
        expected.append(unscaled(left_out[i], 40 / (4 * (others[0] + 1)))[j])
    ours = (
        density_weighting.weight_of(generated, density_weighting.unseen(weighting, generated))
        / weighting.weights[0]
        * scale
    )
    top = max(unscaled(weighting.weights, scale))
    np.testing.assert_allclose(ours, np.minimum(expected, top))


@pytest.mark.parametrize("shift", [0.0, 1.0, 2.0])
def test_the_mean_weight_of_match_over_new_samples_is_one(shift):
    """Over 300 pilots of 256, on average: 1 within 3.5%, where weights from the counts alone would say 8% and more."""
    rng = np.random.default_rng(6)
    quantiles = stats.norm.ppf(np.clip(np.linspace(0, 1, 1001), 1e-4, 1 - 1e-4))
    mass = np.diff(stats.norm.cdf(np.concatenate([[-np.inf], quantiles[50:-50:50], [np.inf]]), shift))
    weights = [
        density_weighting.match(quantiles, rng.normal(shift, 1, 256), bins=20, most=20.0).weights for _ in range(300)
    ]
    assert np.mean(weights @ mass) == pytest.approx(1, abs=0.035)


def test_labels_are_divided_by_one_supremum():
    """q(x, y) ∝ ω_y(ρ) p(x, y): quotients of probabilities of different labels are those of their weights."""
    a, b = density_weighting.Weighting((1.0,), (1.0, 2.0)), density_weighting.Weighting((1.0,), (1.0, 8.0))
    sup = density_weighting.supremum([a, b])
    assert density_weighting.acceptance_probability([0.5, 2.0], a, sup).tolist() == [1 / 8, 2 / 8]
    assert density_weighting.acceptance_probability([0.5, 2.0], b, sup).tolist() == [1 / 8, 1.0]
    assert density_weighting.acceptance_probability([0.5, 2.0], a).tolist() == [0.5, 1.0]


def test_weights_by_quantile_cut_the_real_set_into_equal_bins():
    weighting = density_weighting.by_quantile(QUANTILES, [1, 2, 3, 4])
    assert weighting.edges == pytest.approx((0.75, 1.0, 1.25))
    np.testing.assert_array_equal(
        density_weighting.weight_of([0.6, 0.75, 0.76, 1.2, 1.3, 99], weighting), [1, 1, 2, 3, 4, 4]
    )


# --- ties in the real set ---------------------------------------------------------------------------------------------


def tied_real(name, rows=50_000):
    """Real densities with exact duplicates, as copies of one image give them."""
    rho = np.random.default_rng(20).lognormal(0.0, 0.3, rows)
    many = {"top 6%": 0.06, "top 60%": 0.6, "middle 40%": 0.4, "bottom 30%": 0.3, "within a bin": 0.03}.get(name, 0.0)
    value = {"top": 9.0, "bottom": 0.01}.get(name.split()[0], 1.0)
    rho[: round(many * rows)] = value
    if name == "ten values":
        rho = np.repeat(np.linspace(0.5, 1.5, 10), rows // 10)
    if name == "all alike":
        rho[:] = 1.0
    return rho


TIES = ["top 6%", "top 60%", "middle 40%", "bottom 30%", "within a bin", "ten values", "all alike"]


@pytest.mark.parametrize("bins", [7, 20])
@pytest.mark.parametrize("fewer", [False, True], ids=["the real law", "half of the ties"])
@pytest.mark.parametrize("name", TIES)
def test_match_gives_the_real_sets_densities_where_they_are_tied(name, fewer, bins):
    """Accepted shares and rate of 300,000 candidates, held to p_real of each bin counted in the real set itself.

    Tolerances: a quantile is a thousandth of the real set; 5 standard errors of the draw and of the pilot. The ideal
        rate
    is 1 / max(p_real / p_G), and the largest of 20 quotients of a pilot of 100,000 errs by about 3%.
    """
    real, rng = tied_real(name), np.random.default_rng(21)
    values, counts = np.unique(real, return_counts=True)
    of_generator = np.where(counts > 1, counts / 2, counts) if fewer else counts.astype(float)
    pilot, generated = (rng.choice(values, m, p=of_generator / of_generator.sum()) for m in (100_000, 300_000))
    weighting = density_weighting.match(density_formula.density_quantiles(real), pilot, bins, most=1000.0)
    p_real, p_generator = (density_weighting.bin_shares(rho, weighting) for rho in (real, generated))
    assert (p_real > 0).all(), "a bin without a real image"
    kept = generated[rng.random(generated.size) < density_weighting.acceptance_probability(generated, weighting)]
    assert kept.size / generated.size == pytest.approx(1 / (p_real / p_generator).max(), rel=0.1)
    shares = density_weighting.bin_shares(kept, weighting)
    tolerance = 0.001 + 5 * np.sqrt(p_real / kept.size + p_real**2 / (100_000 * p_generator))
    assert (np.abs(shares - p_real) <= tolerance).all(), (shares, p_real)


def test_blanks_among_the_real_images_do_not_take_the_weight_from_the_rest():
    """6% of one blank, the densest image there is; the generator has all others just so. 200 pilots of 256.

    The bin of the blanks has the 4% of the real set below them too, so its weight is near 0.1 / (0.04 / 0.94) = 2.35,
    which divides all others: a rate near 0.43, less what the largest of the pilot's quotients is too large by. A weight
    of 20 for what lies above the blanks, where nothing does, made it 0.048.
    """
    real, rng = tied_real("top 6%"), np.random.default_rng(22)
    quantiles, generator = density_formula.density_quantiles(real), real[real < 9.0]
    rates = []
    for _ in range(200):
        weighting = density_weighting.match(quantiles, rng.choice(generator, 256), 20, 20.0)
        assert weighting.edges[-1] < 9.0
        rates.append(density_weighting.acceptance_probability(generator, weighting).mean())
    assert 0.3 < np.median(rates) < 0.44


@pytest.mark.parametrize("weights", [(1, 1, 1, 20), (20, 1, 1, 1), (1, 20, 1, 1), (1, 1, 20, 1), (1, 2, 3, 4)])
@pytest.mark.parametrize("name", TIES)
def test_weights_by_quantile_are_divided_by_a_weight_that_a_real_image_has(name, weights):
    """Rate and shares of a generator with the real law, accepted by ω of each image's lowest bin over the largest such
    ω.
    """
    real, rng = tied_real(name), np.random.default_rng(23)
    weighting = density_weighting.by_quantile(density_formula.density_quantiles(real), weights)
    generated = rng.choice(real, 200_000)
    a = density_weighting.acceptance_probability(real, weighting)
    assert a.max() == 1
    share_below = np.searchsorted(np.sort(real), real, side="left") / (real.size - 1)  # of the lowest of the tied
    omega = np.array(weights)[np.minimum((4 * share_below).astype(int), 3)]
    known = np.abs(4 * share_below - np.round(4 * share_below)) > 0.004 * 1.5  # quantiles are a thousandth apart
    known |= np.round(4 * share_below) == 0
    assert known.mean() > 0.4 and omega[known].max() == omega.max()
    np.testing.assert_allclose(a[known], omega[known] / omega.max())
    accepted = rng.random(generated.size) < density_weighting.acceptance_probability(generated, weighting)
    error = 5 / math.sqrt(generated.size)
    assert accepted.mean() == pytest.approx(omega.mean() / omega.max(), abs=error + 0.004)
    assert generated[accepted].mean() == pytest.approx(np.average(real, weights=omega), abs=0.05)


def test_what_lies_above_tied_densest_images_counts_with_them():
    weighting = density_weighting.by_quantile(density_formula.density_quantiles(tied_real("top 60%")), [1, 2, 3, 4])
    assert weighting.weights == (1, 2)
    np.testing.assert_array_equal(density_weighting.weight_of([9.0, 10.0], weighting), [2, 2])


def test_weights_above_0_only_where_no_real_image_is_are_refused():
    with pytest.raises(UserError, match=r"\[0, 0, 0, 1\].*same density"):
        density_weighting.by_quantile(density_formula.density_quantiles(tied_real("top 60%")), [0, 0, 0, 1])


@pytest.mark.parametrize("rows", [25, 1000, 50_000])
@pytest.mark.parametrize("bins", [1, 2, 7, 20, 100, 1000, 1500])
def test_without_ties_nothing_is_joined_to_the_bit(bins, rows):
    """Edges are the interpolated quantiles and p_real is 1/B, in these very operations."""
    rng = np.random.default_rng(24)
    quantiles = density_formula.density_quantiles(rng.lognormal(size=rows))
    generated = rng.lognormal(size=500)
    edges = np.interp(np.arange(1, bins) / bins * 1000, np.arange(1001), quantiles)
    weighting = density_weighting.match(quantiles, generated, bins, most=1e12)
    assert weighting.edges == tuple(edges)
    c = np.bincount(np.searchsorted(edges, generated), minlength=bins)
    ratios = 501 / (bins * (c + 1))
    mean = (c[c > 0] / 500) @ np.minimum(500 / (bins * c[c > 0]), ratios.max())
    assert weighting.weights == tuple(ratios / mean)
    listed = density_weighting.by_quantile(quantiles, range(1, bins + 1))
    assert listed.edges == tuple(edges) and listed.weights == tuple(range(1, bins + 1))


PILOT = 256


def cover(intervals, rate):
    """Share of intervals that hold the rate, and of those that lie above it."""
    low, high = np.array(intervals).T
    return np.mean((low <= rate) & (rate <= high)), np.mean(low > rate)


@pytest.mark.parametrize("weight", [0.01, 0.3, 1.5, 10.0, 100.0])
@pytest.mark.parametrize("above", [0.0007, 0.005, 0.02, 0.2, 0.5, 0.97])
def test_the_interval_of_two_levels_covers_the_rate(above, weight):
    """Of 2,000 pilots at least 92% (nominal 95%) cover, and at most 5% lie above; Wilson's: 84% at P = 0.0007."""
    levels = np.array(density_weighting.two_level(1.0, weight).weights) / max(1.0, weight)
    rate = rate_of([1 - above, above], density_weighting.two_level(1.0, weight))
    counts = np.random.default_rng(3).binomial(PILOT, above, 2000)
    different, which = np.unique(counts, return_inverse=True)
    found = [density_weighting.rate_interval(np.repeat(levels, [PILOT - c, c]), levels.min(), 1.0) for c in different]
    intervals = np.array(found)[which]
    covered, over = cover(intervals, rate)
    assert covered >= 0.92 and over <= 0.05
    assert np.min(intervals) >= levels.min() and np.max(intervals) <= 1


@pytest.mark.parametrize("shares", [[0.4, 0.3, 0.2, 0.1], [0.97, 0.01, 0.01, 0.01], [0.02, 0.03, 0.05, 0.9]])
@pytest.mark.parametrize("weights", [[1, 2, 3, 4], [1, 1, 10, 100], [0, 1, 1, 5], [100, 1, 1, 2]])
def test_the_interval_of_any_weights_covers_the_rate(weights, shares):
    weighting = density_weighting.by_quantile(QUANTILES, weights)
    levels, rate = np.array(weights) / max(weights), rate_of(shares, weighting)
    counts = np.random.default_rng(3).multinomial(PILOT, shares, 2000)
    covered, over = cover(
        [density_weighting.rate_interval(np.repeat(levels, c), levels.min(), 1.0) for c in counts], rate
    )
    assert covered >= 0.92 and over <= 0.05


@pytest.mark.parametrize("bins", [5, 20])
@pytest.mark.parametrize(("mean", "spread"), [(0, 1), (0.3, 0.9), (1, 1), (2, 1), (1, 0.5), (-3, 1), (-0.3, 1.2)])
def test_the_interval_of_match_covers_the_rate_of_the_weights_that_the_pilot_gave(mean, spread, bins):
    """ω and the interval come from the same pilot; 600 of them (the standard error of the coverage is 0.9%)."""
    rng = np.random.default_rng(8)
    quantiles = stats.norm.ppf(np.clip(np.linspace(0, 1, 1001), 1e-4, 1 - 1e-4))
    inner = quantiles[(np.arange(1, bins) * 1000) // bins]
    mass = np.diff(stats.norm.cdf(np.concatenate([[-np.inf], inner, [np.inf]]), mean, spread))
    hits = []
    for _ in range(600):
        pilot = rng.normal(mean, spread, PILOT)
        weighting = density_weighting.match(quantiles, pilot, bins, 20.0)
        rate = rate_of(mass, weighting)
        chances = density_weighting.acceptance_probability(pilot, density_weighting.unseen(weighting, pilot))
        lowest = min(weighting.weights) / max(weighting.weights)
        low, high = density_weighting.rate_interval(chances, lowest, 1.0, fitted_bins=bins)
        hits.append(low <= rate <= high)
    assert np.mean(hits) >= 0.92


@pytest.mark.parametrize("above", [0.1, 0.5])
def test_the_interval_is_that_of_what_is_unknown(above):
    """w = 1.5: a is 2/3 or 1, so the interval is a third as wide as that of P (Agresti & Coull's, within 3% of
    Wilson's).
    """
    c = round(above * PILOT)
    low, high = density_weighting.rate_interval(np.repeat([2 / 3, 1.0], [PILOT - c, c]), 2 / 3, 1.0)
    p, z2 = c / PILOT, density_weighting.Z**2
    wilson = 2 * density_weighting.Z / (1 + z2 / PILOT) * math.sqrt(p * (1 - p) / PILOT + z2 / (4 * PILOT**2))
    assert high - low == pytest.approx(wilson / 3, rel=0.03)


def test_the_low_end_is_never_below_what_is_certain():
    low, _ = density_weighting.rate_interval(np.full(PILOT, 0.01), 0.01, 1.0)
    assert low == 0.01


def test_where_all_are_accepted_alike_the_rate_is_known_only_if_nothing_else_can_be():
    assert density_weighting.rate_interval(np.ones(PILOT), 1.0, 1.0) == (1.0, 1.0)
    low, high = density_weighting.rate_interval(np.zeros(PILOT), 0.0, 1.0)
    assert low == 0 and 0.01 < high < 0.03


RUNS = [(0.5, 10.0, 100), (0.2, 100.0, 100), (0.2, 100.0, 1000), (0.02, 0.5, 100), (0.9, 10.0, 10)]


def measured_within(above, weight, n, times):
    """Share of 4,000 runs to the n-th accepted, at `times` the true rate, that lie where their pilot of 256 says."""
    rng = np.random.default_rng(9)
    levels = np.array(density_weighting.two_level(1.0, weight).weights) / max(1.0, weight)
    rate = times * rate_of([1 - above, above], density_weighting.two_level(1.0, weight))
    hits = []
    for c in rng.binomial(PILOT, above, 4000):
        chances = np.repeat(levels, [PILOT - c, c])
        told = density_weighting.rate_interval(chances, levels.min(), 1.0)
        candidates = n + rng.negative_binomial(n, rate)
        low, high = density_weighting.measured_interval(chances.mean(), *told, candidates)
        assert 0 <= low <= told[0] and told[1] <= high <= 1
        hits.append(low <= n / candidates <= high)
    return np.mean(hits)


@pytest.mark.parametrize(("above", "weight", "n"), RUNS)
def test_a_correct_run_measures_what_the_pilot_said(above, weight, n):
    """Nominal 95%; the interval of the true rate alone holds 76%, 88%, 95%, 52% and 33% of these runs."""
    assert measured_within(above, weight, n, 1.0) >= 0.93


def test_a_run_at_another_rate_does_not():
    """Half the rate, where that is several of the errors of pilot and run together, and a fifth of it at n = 100."""
    assert measured_within(0.5, 10.0, 100, 0.5) < 0.01
    assert measured_within(0.2, 100.0, 1000, 0.5) < 0.1
    assert measured_within(0.2, 100.0, 100, 0.2) < 0.01
    assert measured_within(0.2, 100.0, 1000, 2.0) < 0.01


@pytest.mark.parametrize("weight", [0.0, -1.0, math.inf, math.nan])
def test_a_weight_that_is_none_is_refused(weight):
    with pytest.raises(UserError):
        density_weighting.two_level(1.0, weight)


def test_nan_is_never_accepted_silently():
    with pytest.raises(ValueError, match="NaN"):
        density_weighting.acceptance_probability([1.0, math.nan], density_weighting.two_level(1.0, 2.0))


@pytest.mark.parametrize(("edges", "weights"), [((1.0,), (1.0,)), ((2.0, 1.0), (1.0, 2.0, 3.0))])
def test_edges_and_weights_must_fit(edges, weights):
    with pytest.raises(ValueError, match=r"edges|ascending"):
        density_weighting.Weighting(edges, weights)


# ---- log-volumes -----------------------------------------------------------------------------------------------------


def test_a_polarity_of_zero_accepts_everything():
    rng = np.random.default_rng(0)
    weighting = density_weighting.tilted(rng.normal(size=500), 0.0, 20)
    assert set(weighting.weights) == set(density_weighting.uniform().weights) == {1.0}
    np.testing.assert_array_equal(density_weighting.acceptance_probability(rng.normal(size=99), weighting), 1.0)


@pytest.mark.parametrize("polarity", [-2.0, -0.5, 1.0])
@pytest.mark.parametrize("rows", [640, 100, 30])
def test_each_bin_gets_what_the_papers_draw_from_the_pool_gives_it(polarity, rows):
    """Polarity Sampling draws i from the pool with chance exp(p v_i) / Σ exp(p v): summed by brute force over each
    bin.
    """
    v = np.random.default_rng(1).normal(0, 1.5, rows)
    weighting = density_weighting.tilted(v, polarity, 32)
    chance = np.exp(polarity * v) / np.exp(polarity * v).sum()
    ends = [-np.inf, *weighting.edges, np.inf]
    pool = [chance[(v > low) & (v <= high)].sum() for low, high in itertools.pairwise(ends)]
    ours = density_weighting.bin_shares(v, weighting) * np.array(weighting.weights)
    np.testing.assert_allclose(ours, pool, rtol=1e-12)
    assert np.mean(density_weighting.weight_of(v, weighting)) == pytest.approx(1.0)
    assert weighting.bins == min(32, rows)
    if rows == 640:
        np.testing.assert_allclose(density_weighting.bin_shares(v, weighting), 1 / 32)
    assert density_weighting.acceptance_probability(v, weighting).mean() >= 1 / 32 - 1 / rows


@pytest.mark.parametrize("polarity", [-1.0, 0.7])
def test_accepted_volumes_follow_the_tilted_distribution(polarity):
    """v ~ N(0, 1): the target is N(p, 1). χ² over 12 bins, the 256 steps being far finer; the outermost bins of the
    test begin
    where the weight's cap does not show: beyond the pilot's outermost step a target N(p, 1) has 0.4% and less to give.
    The pilot of 100,000 errs by 1/sqrt(390) times the spread within a step, 1% and less, where the counts err by 2% and
    more.
    """
    rng = np.random.default_rng(3)
    weighting = density_weighting.tilted(rng.normal(size=100_000), polarity, 256)
    v = rng.normal(size=200_000)
    kept = v[rng.random(v.size) < density_weighting.acceptance_probability(v, weighting)]
    edges = stats.norm.ppf(np.linspace(0, 1, 13), loc=polarity)
    observed, _ = np.histogram(kept, edges)
    assert observed.min() > 300
    assert stats.chisquare(observed).pvalue > 1e-3


def test_volumes_that_are_all_equal_are_all_accepted():
    weighting = density_weighting.tilted(np.full(50, 3.0), -4.0, 20)
    assert weighting == density_weighting.uniform()


def test_ties_are_in_one_bin_and_no_bin_is_empty():
    v = np.repeat([1.0, 2.0, 3.0], [70, 20, 10])
    weighting = density_weighting.tilted(v, 1.0, 10)
    assert weighting.edges == (1.0, 2.0)
    np.testing.assert_allclose(np.diff(np.log(weighting.weights)), 1.0)


@pytest.mark.filterwarnings("error")
def test_huge_volumes_do_not_overflow():
    weighting = density_weighting.tilted(np.linspace(-1e4, 1e4, 100), 5.0, 10)
    assert density_weighting.acceptance_probability([1e9], weighting) == [1.0]


@pytest.mark.parametrize(("weights", "size"), [([2.0] * 7, 7.0), ([1.0, 0.0, 0.0], 1.0), ([3.0, 1.0], 1.6)])
def test_the_effective_size_of_weights(weights, size):
    assert density_weighting.effective_size(weights) == pytest.approx(size)
