"""Recall and its bounds against plain faiss, by hand, and by how often the bounds hold."""

import numpy as np
import pytest

from pd_core.index import knn, recall
from pd_core.index import shards as ix
from tests.index.test_knn import Fixture
from tests.synthetic import DIM, clustered


def test_recall_curve_is_the_recall_that_plain_faiss_has():
    features, ids = clustered(2000, DIM, clusters=1), np.arange(2000)
    made = Fixture(features, ids, cells=30)
    queries = features[:150]
    _, exact = knn.merge_topk([knn.exact_search(queries, [(ids, features)], 11, 1, "cpu")], 10, ids[:150])
    ranks = recall.neighbor_ranks(made.own[exact], made.probes(queries, 30))
    curve = recall.recall_curve(ranks, 30)
    index = ix.deserialize(made.shards[0])
    for nprobe in (1, 2, 5, 12, 30):
        index.nprobe = nprobe
        _, found = index.search(queries, 11)
        hits = sum(len(set(f) & set(e)) for f, e in zip(found, exact, strict=True))
        assert curve.mean[nprobe - 1] == pytest.approx(hits / exact.size, abs=1e-12)
    assert curve.mean[-1] == curve.lower[-1] == 1.0
    assert (np.diff(curve.mean) >= 0).all() and (curve.lower <= curve.mean).all()


def test_curve_variance_is_that_of_per_query_recall():
    ranks = np.random.default_rng(0).integers(0, 9, (40, 6)).astype(np.int32)
    curve = recall.recall_curve(ranks, 9)
    for nprobe in range(1, 9):
        share = (ranks < nprobe).mean(1)
        lower = recall.lower_bound(share.mean(), np.asarray(share.var(ddof=1)), 40, 6)
        assert curve.lower[nprobe - 1] == pytest.approx(float(lower), abs=1e-9)


@pytest.mark.parametrize("alike", [False, True])
def test_lower_bound_covers_95_percent(alike):
    # neighbors of one query found independently, or all together (then only queries count)
    rng, queries, k, true, runs = np.random.default_rng(0), 400, 10, 0.97, 2000
    draws = rng.random((runs, queries, 1 if alike else k)) < true
    share = np.broadcast_to(draws, (runs, queries, k)).mean(2)
    covered = (recall.lower_bound(share.mean(1), share.var(1, ddof=1), queries, k) <= true).mean()
    # nominal 0.95; binomial standard deviation over the runs 0.005, and discreteness with 400 queries
    assert 0.93 < covered < 0.975


def test_choose_nprobe_takes_the_smallest_whose_bound_reaches():
    lower = np.array([0.2, 0.7, 0.95, 0.97, 1.0])
    curve = recall.RecallCurve(lower + 0.01, lower)
    assert recall.choose_nprobe(curve, 0.95) == 3
    assert recall.choose_nprobe(curve, 0.951) == 4
    assert recall.choose_nprobe(recall.RecallCurve(lower[:3], lower[:3]), 0.99) is None


def test_scan_fraction_and_cost():
    rows = np.array([10, 20, 30, 40])
    probes = np.array([[0, 1], [2, 3]], np.int32)
    assert recall.scan_fraction(probes, rows) == pytest.approx(0.5)
    assert recall.relative_cost(1.0, 100, 4) >= 1  # scanning everything cell by cell never pays
    assert recall.relative_cost(0.05, 100_000, 1265) < 1
    assert recall.relative_cost(0.5, 100, 4) == pytest.approx(
        0.5 * recall.PAIR_COST_RATIO + 0.04 * recall.COARSE_COST_RATIO
    )


def test_recall_and_error_by_hand():
    exact_ids = np.array([[1, 2, 3, 4], [5, 6, 7, 8]])
    exact_d = np.array([[1, 2, 3, 4], [1, 1, 2, 2]], np.float32)
    approx_ids = np.array([[1, 2, 4, 9], [5, 6, 7, 99]])  # 3 is missed; 99 ties with 8
    approx_d = np.array([[1, 2, 4, 5], [1, 1, 2, 2]], np.float32)
    measured = recall.recall_and_error(exact_ids, exact_d, approx_ids, approx_d)
    assert measured.recall == pytest.approx((3 / 4 + 1) / 2)
    assert measured.max_relative_error == pytest.approx(3 / 2.5 - 1)
    assert measured.mean_relative_error == pytest.approx(0.1)
    assert measured.recall_lower < measured.recall


def test_recall_and_error_of_zero_distances():
    ids, zero = np.array([[1, 2]]), np.zeros((1, 2), np.float32)
    assert recall.recall_and_error(ids, zero, ids, zero).max_relative_error == 0
    assert recall.recall_and_error(ids, zero, ids, zero + 1).max_relative_error == np.inf
