"""Weight functions and acceptance: closed forms of the paper, χ² against the analytic target, intervals that cover."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from pd_core import acceptance, ids
from pd_core.errors import UserError

QUANTILES = np.linspace(0.5, 1.5, 1001)


@pytest.mark.parametrize("weight", [0.01, 0.1, 1.0, 10.0, 100.0])
def test_two_levels_are_the_papers_rule(weight):
    """Algorithm 2: w > 1 accepts if f > τ or u < 1/w; w < 1 accepts if f <= τ or u < w."""
    rng = np.random.default_rng(0)
    f, u, tau = rng.lognormal(size=20_000), rng.random(20_000), 1.2
    paper = (f > tau) | (u < 1 / weight) if weight >= 1 else (f <= tau) | (u < weight)
    ours = u < acceptance.acceptance_probability(f, acceptance.two_level(tau, weight))
    np.testing.assert_array_equal(ours, paper)


@pytest.mark.parametrize("weight", [0.01, 0.3, 1.0, 7.0, 100.0])
@pytest.mark.parametrize("above", [0.0, 0.2, 0.9, 1.0])
def test_the_rate_of_two_levels_is_the_papers_formula(weight, above):
    formula = above + (1 - above) / weight if weight >= 1 else above * weight + (1 - above)
    rate = acceptance.acceptance_rate([1 - above, above], acceptance.two_level(1.0, weight))
    assert rate == pytest.approx(formula, rel=1e-14)


@pytest.mark.parametrize("weight", [0.01, 0.1, 10.0, 100.0])
def test_accepted_samples_follow_the_target(weight):
    """χ² over 12 bins against q ∝ ω p_G, with p_G = Exp(1) and the run's own u: not rejected at 1e-3."""
    number = np.arange(400_000)
    f = -np.log1p(-ids.uniform(number, ids.stream(3, "toy density")))
    u = ids.uniform(number, ids.stream(3, "acceptance"))
    weighting = acceptance.two_level(stats.expon.ppf(0.8), weight)
    accepted = f[u < acceptance.acceptance_probability(f, weighting)]
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
    a = acceptance.acceptance_probability(f, acceptance.two_level(1.5, 20.0))
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
    weighting = acceptance.match(quantiles, generated[:50_000], bins=10, most=50.0)
    kept = generated[rng.random(generated.size) < acceptance.acceptance_probability(generated, weighting)]
    shares = acceptance.bin_shares(kept, weighting)
    # each share is 0.1 up to the pilot's and the draw's sampling error: 0.1 (1 ± 5 sqrt(1/2000 + 1/2000))
    np.testing.assert_allclose(shares, 0.1, rtol=0.16)
    unmatched = acceptance.bin_shares(generated, weighting)
    assert unmatched.max() > 0.2


def test_match_holds_a_bin_that_the_pilot_missed():
    generated = np.full(1000, 1.4)  # all in one bin of ten
    weighting = acceptance.match(QUANTILES, generated, bins=10, most=20.0)
    assert max(weighting.weights) == 20.0
    assert acceptance.acceptance_rate(acceptance.bin_shares(generated, weighting), weighting) < 1 / 20


def test_weights_by_quantile_cut_the_real_set_into_equal_bins():
    weighting = acceptance.by_quantile(QUANTILES, [1, 2, 3, 4])
    assert weighting.edges == pytest.approx((0.75, 1.0, 1.25))
    np.testing.assert_array_equal(acceptance.weight_of([0.6, 0.75, 0.76, 1.2, 1.3, 99], weighting), [1, 1, 2, 3, 4, 4])


def test_no_weighting_accepts_everything():
    assert (acceptance.acceptance_probability([0.1, 5.0], acceptance.uniform()) == 1).all()


@given(
    weights=st.lists(st.floats(0.001, 1000), min_size=1, max_size=6),
    shares=st.lists(st.floats(0.001, 1), min_size=6, max_size=6),
    rate=st.floats(0.01, 1),
)
def test_the_raised_weights_reach_the_rate_and_change_no_more_than_needed(weights, shares, rate):
    weighting = acceptance.Weighting(tuple(float(i) for i in range(len(weights) - 1)), tuple(weights))
    share = np.array(shares[: len(weights)]) / sum(shares[: len(weights)])
    raised = acceptance.weighting_that_accepts(share, weighting, rate)
    reached = acceptance.acceptance_rate(share, raised)
    assert reached >= rate - 1e-12
    if raised != weighting:
        assert reached <= rate + 1e-9
        assert max(raised.weights) == pytest.approx(max(weights))
        assert all(new >= old * (1 - 1e-12) for new, old in zip(raised.weights, weights, strict=True))


def test_the_weight_that_fits_is_that_of_the_formula():
    """P = 0.2 and rate 0.5: P + (1 - P)/w = 0.5, w = 8/3; below 1: P w + (1 - P) = 0.9, w = 0.5."""
    raised = acceptance.weighting_that_accepts([0.8, 0.2], acceptance.two_level(1.0, 100.0), 0.5)
    assert raised.weights[1] / raised.weights[0] == pytest.approx(8 / 3)
    raised = acceptance.weighting_that_accepts([0.8, 0.2], acceptance.two_level(1.0, 0.01), 0.9)
    assert raised.weights[1] / raised.weights[0] == pytest.approx(0.5)


@pytest.mark.parametrize("rate", [0.02, 0.3, 0.9])
def test_the_interval_covers_the_rate(rate):
    """Of 4,000 pilots of 256 the 95% interval misses at most 8%: Wilson's coverage dips below 95% near 0 and 1."""
    found = np.random.default_rng(3).binomial(256, rate, 4000) / 256
    missed = np.mean([not low <= rate <= high for low, high in (acceptance.rate_interval(p, 256) for p in found)])
    assert 0.005 < missed < 0.08


def test_the_interval_of_nothing_accepted_is_not_a_point():
    low, high = acceptance.rate_interval(0.0, 256)
    assert low == 0 and 0.01 < high < 0.03


@pytest.mark.parametrize("weight", [0.0, -1.0, math.inf, math.nan])
def test_a_weight_that_is_none_is_refused(weight):
    with pytest.raises(UserError):
        acceptance.two_level(1.0, weight)


def test_nan_is_never_accepted_silently():
    with pytest.raises(ValueError, match="NaN"):
        acceptance.acceptance_probability([1.0, math.nan], acceptance.two_level(1.0, 2.0))


@pytest.mark.parametrize(("edges", "weights"), [((1.0,), (1.0,)), ((2.0, 1.0), (1.0, 2.0, 3.0))])
def test_edges_and_weights_must_fit(edges, weights):
    with pytest.raises(ValueError, match=r"edges|ascending"):
        acceptance.Weighting(edges, weights)


def test_json_gives_an_equal_weighting_back():
    weighting = acceptance.two_level(1.1869, 33.0)
    assert acceptance.Weighting.from_json(weighting.to_json()) == weighting
