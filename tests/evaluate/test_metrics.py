from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prdc import compute_prdc
from torch_fidelity import metric_fid, metric_prc

from pd_core.core.errors import UserError
from pd_core.evaluate import halfsamples, manifold, metrics
from pd_core.index import knn
from pd_core.index.shards import flat_rows

MANIFOLD = ("precision", "recall", "density", "coverage")


def gaussian(n, dim, seed, scale=1.0, shift=0.0):
    return (scale * np.random.default_rng(seed).standard_normal((n, dim)) + shift).astype(np.float32)


def modes(n, which, seed, dim=6, scale=1.0):
    """Gaussians, 20 standard deviations apart: float32 [n, dim]."""
    rng = np.random.default_rng(seed)
    centers = np.zeros((n, dim))
    centers[np.arange(n), rng.choice(which, n)] = 20.0
    return (centers + scale * rng.standard_normal((n, dim))).astype(np.float32)


def grid(n, seed, dim=3, side=4):
    """Points with integer coordinates: duplicates, ties, and distances that float32 holds or rounds alike."""
    return np.random.default_rng(seed).integers(1, 1 + side, (n, dim)).astype(np.float32)


def ids_of(n, seed=0):
    return np.random.default_rng(seed).choice(2**62, n, replace=False).astype(np.int64)


def evaluated(real, generated, threads=1, k_precision=3, k_coverage=5):
    reference = metrics.prepare(real, ids_of(len(real)), k_precision, k_coverage, threads, "cpu")
    return metrics.evaluate(reference, generated, ids_of(len(generated), 1), threads, "cpu")


def values(evaluation):
    return {name: found.value for name, found in evaluation.estimates.items()}


# --- brute force ------------------------------------------------------------------------------------------------------


def squared(a, b):
    """float64 [len(a), len(b)]."""
    return ((a[:, None].astype(np.float64) - b[None]) ** 2).sum(2)


def squared_radii(x, k):
    d = squared(x, x)
    np.fill_diagonal(d, np.inf)  # leave-one-out by row: a duplicate stays
    return np.sort(d, axis=1)[:, k - 1]


def brute_force(real, generated, k_precision=3, k_coverage=5):
    """The papers' formulas on squared distances, from the matrix of all pairs in float64."""
    d = squared(generated, real)
    balls, wide = squared_radii(real, k_precision), squared_radii(real, k_coverage)
    found = {
        "precision": (d <= balls).any(1).mean(),
        "recall": (d <= squared_radii(generated, k_precision)[:, None]).any(0).mean(),
        "density": (d <= wide).sum() / (k_coverage * len(generated)),
        "coverage": (d <= wide).any(0).mean(),
    }
    small = (balls <= np.median(balls)) & (balls > 0)
    with np.errstate(divide="ignore"):
        realism = np.sqrt(balls[small] / d[:, small]).max(1, initial=0.0)
    return found, realism, np.sqrt(np.where(d <= balls, balls, np.inf).min(1)), d


CASES = [
    pytest.param(gaussian(300, 5, 0), gaussian(200, 5, 1, 0.9, 0.2), 0.0, id="continuous"),
    pytest.param(gaussian(250, 40, 0), gaussian(270, 40, 1, 0.7), 0.0, id="dense in each other's balls"),
    pytest.param(grid(150, 0), grid(170, 1), 0.0, id="ties and duplicates"),
    pytest.param(grid(150, 0), grid(170, 1), 4096.0, id="ties far from the origin"),
    pytest.param(grid(90, 0, side=2), grid(100, 1, side=2), 0.0, id="mostly duplicates"),
]


@pytest.mark.parametrize(("real", "generated", "offset"), CASES)
def test_all_pairs_in_float64_give_the_same(real, generated, offset):
    # 4096 plus an integer is a float32, and differences stay exact: the offset may change nothing, but scores lose bits
    result = evaluated(real + np.float32(offset), generated + np.float32(offset))
    expected, realism, rarity, d = brute_force(real, generated)
    for name in MANIFOLD:
        assert result.estimates[name].value == pytest.approx(expected[name], abs=1e-12)
    answers = result.answers
    # a float32 distance errs by (D + 2)/2 + 1 units of 2^-24 (tests/index/test_knn.py), a ratio of two by twice that:
    # 3e-6 at D = 40
    np.testing.assert_allclose(answers.realism, realism, rtol=5e-6)
    np.testing.assert_allclose(answers.rarity, rarity, rtol=5e-6)
    np.testing.assert_allclose(answers.nearest_distance, np.sqrt(d.min(1)), rtol=5e-6)
    assert np.array_equal(answers.nearest, d.argmin(1))  # the first of several


def test_replicates_are_the_metrics_of_half_of_the_rows(monkeypatch):
    real, generated = gaussian(160, 3, 0), gaussian(140, 3, 1, 0.9)
    real[40:60], generated[10:20] = real[:20], real[:10]
    monkeypatch.setattr(metrics, "_list_length", lambda k: 160)  # whole lists: then they are exact
    result = evaluated(real, generated)
    groups = [halfsamples.groups_of(ids_of(len(x), seed)) for seed, x in enumerate((real, generated))]
    for r in range(0, halfsamples.REPLICATES, 7):
        halves = halfsamples.REAL_HALVES[r][groups[0]], halfsamples.GENERATED_HALVES[r][groups[1]]
        a, b = real[halves[0]], generated[halves[1]]
        for name, value in brute_force(a, b)[0].items():
            assert result.replicates[name][r] == pytest.approx(value, abs=1e-9), name


@pytest.mark.parametrize(("n", "m", "dim"), [(160, 140, 5), (90, 70, 100)])  # the second: singular covariances
def test_replicates_of_moments_are_the_slope_towards_the_half(n, m, dim):
    """Derivative of the metric by the weight of the half's rows, against differences of the metric of weighted rows."""
    real, generated = gaussian(n, dim, 0), gaussian(m, dim, 1, 0.9, 0.3)
    sides = list(zip((real, generated), (ids_of(n, 0), ids_of(m, 1)), strict=True))
    result = metrics.evaluate(metrics.prepare(*sides[0]), *sides[1])

    def weighted(rows, half, step):
        w = np.full(len(rows), (1 - step) / len(rows)) + step * half / half.sum()
        mean = w @ rows
        return mean, (rows - mean).T @ ((rows - mean) * w[:, None]), (rows.T / norms(rows) ** 2 * w) @ rows

    def norms(rows):
        return np.linalg.norm(rows, axis=1)

    def metric(halves, step):
        (a, b, c), (d, e, f) = (
            weighted(side.astype(np.float64), half, step) for (side, _), half in zip(sides, halves, strict=True)
        )
        kept = [v[v > 1e-12] for v in (np.linalg.eigvalsh(x) for x in (c, f))]
        vendi = [np.exp(-np.sum(v * np.log(v))) for v in kept]
        overlap = np.sqrt(np.maximum(np.linalg.eigvals(b @ e).real, 0)).sum()
        return np.array([np.sum((a - d) ** 2) + np.trace(b) + np.trace(e) - 2 * overlap, *vendi])

    groups = [halfsamples.groups_of(row_ids) for _, row_ids in sides]
    step = 1e-3
    for r in range(0, halfsamples.REPLICATES, 13):
        halves = halfsamples.REAL_HALVES[r][groups[0]], halfsamples.GENERATED_HALVES[r][groups[1]]
        slopes = (metric(halves, step) - metric(halves, -step)) / (2 * step)
        for name, slope in zip(("frechet_distance", "vendi_real", "vendi_generated"), slopes, strict=True):
            moved = result.replicates[name][r] - result.estimates[name].value
            # covariances with divisor n - 1 against n: 1/70 of the slope; the difference quotient: step² times a third
            # derivative
            assert moved == pytest.approx(slope, rel=0.03, abs=0.02 * np.abs(slopes).max()), name


def test_lists_of_neighbors_are_long_enough_for_halves(monkeypatch):
    real, generated = gaussian(1000, 4, 0), gaussian(1000, 4, 1, 0.9)
    short = evaluated(real, generated)
    monkeypatch.setattr(metrics, "_list_length", lambda k: 200)
    whole = evaluated(real, generated)
    for name in ("precision", "recall", "coverage"):
        # a list ends too early for about one row in 5,000: of some 500 in a half, none or one, whose answer may change
        np.testing.assert_allclose(short.replicates[name], whole.replicates[name], atol=1 / 400)
        assert short.estimates[name].value == whole.estimates[name].value
    for name in MANIFOLD:
        errors = [halfsamples.standard_error(e.replicates[name]) for e in (short, whole)]
        assert errors[0] == pytest.approx(errors[1], rel=0.02)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32), st.integers(6, 40), st.integers(6, 40), st.integers(1, 3), st.integers(1, 5))
def test_small_grids_of_any_size_agree_with_all_pairs(seed, n, m, dim, k):
    real, generated = grid(n, seed, dim), grid(m, seed + 1, dim)
    expected, *_ = brute_force(real, generated, k, k)
    assert metrics.precision_recall(real, generated, k) == pytest.approx((expected["precision"], expected["recall"]))
    assert metrics.density_coverage(real, generated, k) == pytest.approx((expected["density"], expected["coverage"]))


def test_pair_distances_have_the_bits_of_the_search():
    x, q = gaussian(500, 33, 0), gaussian(50, 33, 1)
    found, ids = knn.ShardSearch(flat_rows(np.arange(500), x), 1, "cpu").search_all(q, 9)
    rows = np.repeat(np.arange(50), 9)
    assert knn.pair_distances(q, x, rows, ids.ravel()).tobytes() == found.tobytes()
    # a pair decides alike from either side
    assert knn.pair_distances(x, q, ids.ravel(), rows).tobytes() == found.tobytes()


# --- other packages ---------------------------------------------------------------------------------------------------

PAIRS = [
    (gaussian(400, 8, 0), gaussian(300, 8, 1, 0.8, 0.1)),
    (gaussian(200, 64, 0), gaussian(150, 64, 1, 1.0, 0.1)),
    (modes(400, [0, 1, 2], 0), modes(500, [1, 2, 3], 1)),
]


@pytest.mark.parametrize(("real", "generated"), PAIRS)
@pytest.mark.parametrize("k", [3, 5])
def test_prdc(real, generated, k):
    theirs = compute_prdc(real.astype(np.float64), generated.astype(np.float64), k)
    ours = values(evaluated(real, generated, k_precision=k, k_coverage=k))
    for name in MANIFOLD:
        assert ours[name] == pytest.approx(theirs[name], abs=1e-6)


@pytest.mark.parametrize(("real", "generated"), PAIRS)
def test_torch_fidelity(real, generated):
    stats = [metric_fid.fid_features_to_statistics(torch.from_numpy(x).double()) for x in (generated, real)]
    theirs = metric_fid.fid_statistics_to_metric(*stats, verbose=False)[metric_fid.KEY_METRIC_FID]
    assert metrics.frechet_distance(real, generated) == pytest.approx(theirs, rel=1e-3)
    as_double = [torch.from_numpy(x).double() for x in (generated, real)]
    theirs = metric_prc.calculate_precision_recall_full(*as_double)
    # they average in float32
    assert metrics.precision_recall(real, generated) == pytest.approx(theirs, abs=1e-6)


# --- what each metric means -------------------------------------------------------------------------------------------


def test_orientation_is_pinned_by_modes_dropped_and_invented():
    """Precision is about generated rows, recall about real ones."""
    real, fewer = modes(400, [0, 1], 0), modes(400, [0, 1], 0)
    fewer = fewer[fewer[:, 0] > 10]  # a subset of the real rows: one of their two modes
    precision, recall = metrics.precision_recall(real, fewer)
    assert precision == 1 and recall == pytest.approx(len(fewer) / 400)
    more = np.concatenate([real, modes(100, [2], 1)])
    precision, recall = metrics.precision_recall(real, more)
    assert precision == pytest.approx(400 / 500) and recall == 1


@pytest.mark.parametrize("rows", [gaussian(500, 7, 0), grid(500, 0), np.repeat(gaussian(100, 4, 0), 3, axis=0)])
def test_a_set_against_itself(rows):
    result = values(evaluated(rows, rows))
    # closed balls: a row is at distance 0 of itself, and ties at the radius are within
    assert result["precision"] == result["recall"] == result["coverage"] == 1
    # roots of eigenvalues that are 0 but for rounding: about 1e-8·D of a variance of about 1
    assert 0 <= result["frechet_distance"] < 1e-6
    assert result["vendi_generated"] == pytest.approx(result["vendi_real"], rel=1e-12)


def apart(low, high):
    """The interval of one estimate is below that of the other."""
    assert low.high is not None and high.low is not None
    return low.high < high.low


def test_each_fault_moves_its_metric_beyond_the_intervals():
    reference = metrics.prepare(modes(1500, range(5), 0), ids_of(1500), device="cpu")
    run = lambda x: metrics.evaluate(reference, x, ids_of(len(x), 1), device="cpu").estimates  # noqa: E731
    good, dropped = run(modes(1500, range(5), 1)), run(modes(1500, range(3), 1))
    invented, noisy = run(modes(1500, range(6), 1)), run(modes(1500, range(5), 1, scale=1.6))
    for name in ("recall", "coverage", "vendi_generated"):
        assert apart(dropped[name], good[name])
    assert not apart(dropped["precision"], good["precision"])
    assert apart(invented["precision"], good["precision"]) and apart(
        good["vendi_generated"], invented["vendi_generated"]
    )
    assert not apart(invented["recall"], good["recall"])
    for name in ("precision", "density"):
        assert apart(noisy[name], good[name])
    for worse in (dropped, invented):  # shares of modes so far apart drown what noise does to the Fréchet distance ...
        assert apart(good["frechet_distance"], worse["frechet_distance"])
    real = gaussian(500, 6, 0)  # ... so here it is alone
    good, noisy = (evaluated(real, gaussian(500, 6, 1, scale)).estimates for scale in (1, 1.6))
    assert apart(good["frechet_distance"], noisy["frechet_distance"])


def test_all_of_a_sample_is_not_taken_for_all_there_is():
    # all of them amid many balls: no replicate differs
    share = evaluated(gaussian(200, 2, 0), gaussian(100, 2, 1, 0.05)).estimates["precision"]
    assert (share.value, share.high) == (1.0, 1.0)
    assert share.low == pytest.approx(100 / (100 + 1.959963984540054**2))  # Wilson's bound of 100 of 100


# --- closed forms -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [1, 2, 7])
def test_vendi_of_equal_orthogonal_clusters_is_their_number(m):
    rows = np.repeat(np.eye(9, dtype=np.float32)[:m] * 3, 11, axis=0)  # length does not count: cosines
    # eigenvalues are 1/m within ε, exp(entropy) within ε·m·log m; those of 0 within ε add ε·log(1/ε) each, 1e-13 in all
    assert metrics.vendi_score(rows) == pytest.approx(m, rel=1e-12)


def test_vendi_is_that_of_the_matrix_of_cosines():
    rows = gaussian(60, 20, 0, shift=0.3).astype(np.float64)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    values = np.linalg.eigvalsh(unit @ unit.T / 60)
    values = values[values > 1e-12]
    assert metrics.vendi_score(rows.astype(np.float32)) == pytest.approx(
        np.exp(-(values * np.log(values)).sum()), rel=1e-9
    )


@pytest.mark.parametrize(("n", "m", "dim"), [(300, 200, 10), (50, 40, 1), (400, 500, 40), (10, 8, 30)])
def test_frechet_distance_is_the_closed_form(n, m, dim):
    a, b = gaussian(n, dim, 0) @ gaussian(dim, dim, 5) + 1, gaussian(m, dim, 1, 1.3)
    centred = [(x - x.mean(0, dtype=np.float64)) / np.sqrt(len(x) - 1) for x in (a, b)]
    # tr (Σ₁^½ Σ₂ Σ₁^½)^½ is the nuclear norm of A Bᵀ for Σ₁ = AᵀA, Σ₂ = BᵀB: no root, also where they are singular
    overlap = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    mean = a.mean(0, dtype=np.float64) - b.mean(0, dtype=np.float64)
    expected = mean @ mean + sum((c**2).sum() for c in centred) - 2 * overlap
    assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


# --- half-samples -----------------------------------------------------------------------------------------------------


def test_halves_are_balanced_and_their_spread_is_the_standard_error_of_a_mean():
    real, generated = halfsamples.REAL_HALVES, halfsamples.GENERATED_HALVES
    assert (real.sum(1) == 8).all() and (generated.sum(1) == 8).all()
    x, y = np.random.default_rng(0).standard_normal((2, 16))
    means = [[x[a].mean() - 2 * y[b].mean()] for a, b in zip(real, generated, strict=True)]
    expected = x.var(ddof=1) / 16 + 4 * y.var(ddof=1) / 16  # of independent sides
    assert halfsamples.standard_error(np.ravel(means)) ** 2 == pytest.approx(expected, rel=1e-12)


def test_bits_are_counted():
    words = np.random.default_rng(0).integers(0, 2**61, 70_000).astype(np.uint64)
    expected = [int(((words >> np.uint64(bit)) & np.uint64(1)).sum()) for bit in range(halfsamples.FULL + 1)]
    assert halfsamples.count_bits(words).tolist() == expected


def test_a_shared_reference_and_shared_rows_cancel_in_differences():
    real, generated = modes(800, range(4), 0), modes(800, range(4), 1)
    reference = metrics.prepare(real, ids_of(800), device="cpu")
    one = metrics.evaluate(reference, generated, ids_of(800, 1), device="cpu")
    assert metrics.difference(one, one, "recall") == metrics.Estimate(0.0, 0.0, 0.0)
    fewer = metrics.evaluate(reference, generated[:600], ids_of(800, 1)[:600], device="cpu")
    width = lambda e: e.high - e.low  # noqa: E731
    for name in ("recall", "coverage"):
        apart = np.hypot(width(one.estimates[name]), width(fewer.estimates[name]))
        assert width(metrics.difference(one, fewer, name)) < 0.8 * apart
    assert metrics.difference(one, fewer, "vendi_real") == metrics.Estimate(0.0, 0.0, 0.0)


def few_of_many(n, dim, seed, scale=1.0):
    """Rows that spread over 12 of many dimensions, and a little over all of them, as features of networks do."""
    axes = np.random.default_rng(1).standard_normal((12, dim))
    rng = np.random.default_rng(seed)
    return (scale * rng.standard_normal((n, 12)) @ axes + 0.3 * rng.standard_normal((n, dim))).astype(np.float32)


NARROW = {"density", "vendi_generated", "vendi_real"}  # in noise of more dimensions than rows, as metrics.py admits


@pytest.mark.parametrize(
    ("n", "m", "dim", "rows", "narrow"),
    [
        (64, 64, 4, gaussian, set()),
        (64, 64, 128, few_of_many, set()),
        pytest.param(64, 64, 128, gaussian, NARROW, marks=pytest.mark.slow),
        pytest.param(400, 300, 4, gaussian, set(), marks=pytest.mark.slow),
    ],
)
def test_intervals_cover_the_expectation(n, m, dim, rows, narrow):
    """The mean over all draws is the expectation at this N, to 1/sqrt(draws) of a spread."""
    draws = [evaluated(rows(n, dim, 2 * s), rows(m, dim, 2 * s + 1, 0.9)).estimates for s in range(100)]
    for name in metrics.METRICS:
        truth = np.mean([found[name].value for found in draws])
        share = np.mean([found[name].low <= truth <= found[name].high for found in draws])
        # a true 0.95 shows as 0.95 ± 0.022 (1 sd) in 100 draws; half-samples err to the wide side where N is small
        assert share >= (0.75 if name in narrow else 0.90), (name, share)


# --- bounds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tile", "threads"), [((7, 13), 3), ((64, 1000), 1)])
def test_tiles_and_threads_change_nothing(monkeypatch, tile, threads):
    real, generated = np.concatenate([gaussian(300, 5, 0), grid(100, 0, 5)]), gaussian(250, 5, 1, 0.9)
    generated[:40] = real[:40]
    expected = evaluated(real, generated)
    monkeypatch.setitem(manifold.TILES, "cpu", tile)
    monkeypatch.setattr(manifold, "PAIRS", 101)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    result = evaluated(real, generated, threads)
    torch.set_num_threads(before)
    for name in metrics.METRICS:
        assert result.replicates[name].tobytes() == expected.replicates[name].tobytes()
        assert result.estimates[name] == expected.estimates[name]
    for field in ("realism", "rarity", "nearest_distance", "nearest"):
        assert getattr(result.answers, field).tobytes() == getattr(expected.answers, field).tobytes()


# Neighbors are looked for among 2,000 rows each, which takes no minute: radii are then larger, and pairs more
PEAK = """
import resource, sys
import numpy as np
from pd_core.evaluate import halfsamples, manifold, metrics
make = lambda rows, seed: np.random.default_rng(seed).standard_normal((rows, 16), np.float32)
def reference(features):
    ids = np.arange(len(features))
    blocks = [slice(i, i + 2000) for i in range(0, len(ids), 2000)]
    parts = [manifold.Side.of(features[block], ids[block], 28, 1, "cpu") for block in blocks]
    lists = [np.concatenate([getattr(p, name) for p in parts]) for name in ("groups", "distances", "neighbor_groups")]
    moments = metrics.Moments.of(features, lists[0])
    side, vendi = manifold.Side(features, *lists), np.ones(1 + halfsamples.REPLICATES)
    return metrics.Reference(side, moments, np.eye(16), vendi, 3, 5)
def peak(n, m):
    real, generated = reference(make(n, 0)), make(m, 1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = metrics.evaluate(real, generated, np.arange(m), device="cpu")
    assert result.n_real == n and len(result.replicates["recall"]) == halfsamples.REPLICATES
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
peak(4000, 1024)  # libraries are loaded, tiles and arrays of pairs have their full size
print(peak(*map(int, sys.argv[1:])))
"""


def test_memory_does_not_grow_with_pairs():
    n, m = 40_000, 3_000
    done = subprocess.run([sys.executable, "-c", PEAK, str(n), str(m)], capture_output=True, text=True, check=True)
    # a tile holds 45 bytes for each of its pairs that matter, at most 2^21 of them; and some words per real row
    assert int(done.stdout) < 96 * 2**20 + n * 64 < n * m * 4 / 4


@pytest.mark.parametrize(("n", "m"), [(63, 200), (200, 63)])
def test_too_few_rows_for_an_interval(n, m):
    result = evaluated(gaussian(n, 4, 0), gaussian(m, 4, 1))
    assert all(e.low is None and e.high is None for e in result.estimates.values())
    assert all(len(values) == 0 for values in result.replicates.values())
    assert metrics.difference(result, result, "recall") == metrics.Estimate(0.0, None, None)


def test_too_few_rows_for_k():
    reference = metrics.prepare(gaussian(6, 4, 0), np.arange(6), device="cpu")
    metrics.evaluate(reference, gaussian(4, 4, 1), np.arange(4), device="cpu")
    with pytest.raises(UserError, match=r"^3 generated images are too few for k = 3; at least 4 are needed$"):
        metrics.evaluate(reference, gaussian(3, 4, 1), np.arange(3), device="cpu")
    with pytest.raises(UserError, match=r"^5 real images are too few for k = 5; at least 6 are needed$"):
        metrics.prepare(gaussian(5, 4, 0), np.arange(5), device="cpu")
    with pytest.raises(UserError, match="3 generated images are too few for k = 5"):
        metrics.precision_recall(gaussian(9, 4, 0), gaussian(3, 4, 0), k=5)
    with pytest.raises(UserError, match="row 0 is all zero"):
        metrics.vendi_score(gaussian(9, 4, 0) * np.float32(0))


def with_value(value):
    rows = gaussian(20, 4, 0)
    rows[7, 2] = value
    return rows


@pytest.mark.parametrize(
    ("features", "row_ids", "message"),
    [
        (with_value(np.nan), np.arange(20), "row 7 is not finite"),
        (with_value(np.inf), np.arange(20), "row 7 is not finite"),
        (gaussian(20, 4, 0) * np.float32(0), np.arange(20), "all zero"),
        (gaussian(20, 5, 0), np.arange(20), "D = 5"),
        (gaussian(20, 4, 0).astype(np.float64), np.arange(20), "float32"),
        (gaussian(20, 4, 0), np.arange(19), "ids of 20"),
        (gaussian(20, 4, 0), np.zeros(20, np.int64), "same id"),
    ],
)
def test_what_callers_may_not_pass(features, row_ids, message):
    reference = metrics.prepare(gaussian(20, 4, 1), np.arange(20), device="cpu")
    with pytest.raises(ValueError, match=message):
        metrics.evaluate(reference, features, row_ids, device="cpu")
