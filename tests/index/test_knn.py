from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest
from faiss.contrib.big_batch_search import big_batch_search
from hypothesis import given, settings
from hypothesis import strategies as st

from pd_core.index import knn
from pd_core.index import shards as ix
from tests import synthetic
from tests.synthetic import DIM

CELLS = 20
NPROBE = 5


def clustered(n, clusters=12, seed=0, dim=DIM, offset=0.0):
    return synthetic.clustered(n, dim, clusters, seed) + np.float32(offset)


def random_ids(n, seed=1):
    return np.random.default_rng(seed).choice(2**62, n, replace=False).astype(np.int64)


def brute_force(queries, features, ids, k, allowed=None, exclude=None):
    """float64, by (distance, id); allowed: bool [m, n]."""
    d = np.sqrt(((queries[:, None].astype(np.float64) - features[None]) ** 2).sum(2))
    if allowed is not None:
        d[~allowed] = np.inf
    if exclude is not None:
        d[ids[None] == exclude[:, None]] = np.inf
    order = np.lexsort((np.broadcast_to(ids, d.shape), d), axis=1)[:, :k]
    return np.take_along_axis(d, order, 1), ids[order]


class Fixture:
    """An index over rows: its shards, and the cell of every row."""

    def __init__(self, features, ids, kind="ivf_flat", shards=1, cells=CELLS):
        self.features, self.ids = features, ids
        self.centroids = ix.train_quantizer(features, cells, seed=0)
        self.quantizer = ix.quantizer_of(self.centroids)
        self.own = ix.cell_of(self.quantizer, features)
        self.template = ix.train_template(kind, features.shape[1], self.centroids, features, pq_bytes=8)
        self.shard_of = ix.assign_cells(self.centroids, np.bincount(self.own, minlength=cells), shards)
        parts = [np.flatnonzero(self.shard_of[self.own] == s) for s in range(shards)]
        self.shards = [ix.build_shard(self.template, features[r], ids[r], self.own[r]) for r in parts]

    def probes(self, queries, nprobe=NPROBE):
        return ix.coarse_probes(self.quantizer, queries, nprobe)

    def sharded(self, queries, probes, k, exclude=None, threads=1):
        """What the stage does: each shard sees the probes of its own cells, then the results are merged."""
        parts = []
        for number, data in enumerate(self.shards):
            mine = np.where(self.shard_of[probes] == number, probes, -1)
            touched = (mine >= 0).any(1)
            d = np.full((len(queries), k + 1), np.inf, np.float32)
            i = np.full((len(queries), k + 1), knn.MISSING_ID, np.int64)
            d[touched], i[touched] = knn.ShardSearch.open([data], threads, "cpu").search_cells(
                queries[touched], mine[touched], k + 1
            )
            parts.append((d, i))
        return knn.merge_topk(parts, k, exclude)


def equal(one, other):
    return one[0].tobytes() == other[0].tobytes() and one[1].tobytes() == other[1].tobytes()


def assert_neighbors(found, exact):
    """Same distances to float32 rounding and same ids, but for pairs whose distances agree to that rounding."""
    # fvec_L2sqr sums D squares of exactly rounded differences in float32: relative error of d² below (D + 2)·2^-24, of
    # d half
    np.testing.assert_allclose(found[0], exact[0], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(found[0].mean(1, dtype=np.float64), exact[0].mean(1), rtol=1e-5, atol=1e-7)
    assert np.array_equal(found[1] == knn.MISSING_ID, np.isinf(exact[0]))
    for d, ids, true_ids in zip(np.minimum(found[0], 1e30), found[1], exact[1], strict=True):
        if not np.array_equal(ids, true_ids):
            for j in np.flatnonzero((ids != true_ids) & (d < 1e30)):
                near = np.abs(d - d[j]) <= 1e-5 * d[j]
                near_edge = np.abs(d[-1] - d[j]) <= 1e-5 * d[j]
                assert near_edge or set(ids[near]) == set(true_ids[near])


# --- exact ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, 100.0])  # far from the origin, ‖x‖² − 2q·x cancels
@pytest.mark.parametrize("heaps", [True, False])
@pytest.mark.parametrize(("n", "dim"), [(600, 24), (300, 3), (40, 384)])
def test_search_all_is_brute_force(n, dim, heaps, offset):
    features, ids = clustered(n, dim=dim, offset=offset), random_ids(n)
    search = knn.ShardSearch(ix.flat_rows(ids, features), 2, "cpu", heaps)
    found = knn.merge_topk([search.search_all(features, 21)], 20, ids)
    assert_neighbors(found, brute_force(features, features, ids, 20, exclude=ids))


@pytest.mark.parametrize("blocks", [1, 7])
def test_exact_search_gives_the_same_bits_whatever_the_blocks(blocks):
    features, ids = clustered(1100), random_ids(1100)
    queries = clustered(64, seed=9)
    whole = knn.ShardSearch(ix.flat_rows(ids, features), 1, "cpu").search_all(queries, 20)
    order = np.array_split(np.random.default_rng(blocks).permutation(1100), blocks)
    assert equal(knn.exact_search(queries, ((ids[o], features[o]) for o in order), 20, 2, "cpu"), whole)


def test_flat_shards_open_as_one():
    features, ids = clustered(500), random_ids(500)
    template = ix.train_template("flat", DIM)
    shards = [ix.build_shard(template, features[r], ids[r]) for r in np.array_split(np.arange(500), 3)]
    one = knn.ShardSearch.open(shards, 1, "cpu").search_all(features, 10)
    parts = [knn.ShardSearch.open([s], 1, "cpu").search_all(features, 10) for s in shards]
    assert equal(knn.merge_topk(parts, 10), one)
    assert_neighbors(one, brute_force(features, features, ids, 10))


# --- cell by cell -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heaps", [True, False])
@pytest.mark.parametrize("nprobe", [1, NPROBE, CELLS])
def test_search_cells_is_brute_force_over_the_probed_cells(nprobe, heaps):
    features, ids = clustered(700), random_ids(700)
    made = Fixture(features, ids)
    probes = made.probes(features, nprobe)
    search = knn.ShardSearch(ix.open_rows(made.shards), 2, "cpu", heaps)
    found = knn.merge_topk([search.search_cells(features, probes, 11)], 10, ids)
    allowed = (probes[:, :, None] == made.own[None, None, :]).any(1)
    assert_neighbors(found, brute_force(features, features, ids, 10, allowed, ids))


@pytest.mark.parametrize("kind", ["ivf_flat", "ivf_sq8", "ivf_pq"])
@pytest.mark.parametrize("shards", [1, 3])
def test_agrees_with_plain_faiss_and_big_batch_search(kind, shards):
    features, ids = clustered(900), random_ids(900)
    queries = clustered(200, seed=9)
    made = Fixture(features, ids, kind, shards)
    ours = made.sharded(queries, made.probes(queries), 10)
    merged = ix.deserialize(made.shards[0])
    for data in made.shards[1:]:
        merged.merge_from(ix.deserialize(data), 0)
    merged.nprobe = NPROBE
    with contextlib.redirect_stdout(io.StringIO()):  # it prints whatever verbose says
        batched = big_batch_search(merged, queries, 10, method="pairwise_distances")
    for squared, found in (merged.search(queries, 10), batched):
        # faiss expands ‖q‖² − 2q·x + ‖x‖² in float32 where it uses BLAS; norms² here are up to 50 times d²
        np.testing.assert_allclose(ours[0], np.sqrt(np.maximum(squared, 0)), rtol=1e-4, atol=1e-3)
        same = np.array([len(set(a) & set(b)) for a, b in zip(ours[1], found, strict=True)])
        assert same.mean() / 10 > (0.95 if kind == "ivf_pq" else 0.999)  # PQ codes collide: ties at the k-th place


@pytest.mark.parametrize("kind", ["ivf_flat", "ivf_sq8", "ivf_pq"])
@pytest.mark.parametrize("duplicates", [0, 30])
def test_shards_threads_and_blocks_change_no_bit(kind, duplicates):
    features, ids = clustered(1000), random_ids(1000)
    features[100 : 100 + duplicates] = features[100]  # more copies than k + SPARE: which of them is decided by id
    whole, split = Fixture(features, ids, kind, 1), Fixture(features, ids, kind, 4)
    probes = whole.probes(features)
    reference = whole.sharded(features, probes, 15, ids)
    assert equal(split.sharded(features, probes, 15, ids), reference)
    assert equal(split.sharded(features, probes, 15, ids, threads=2), reference)
    together = knn.ShardSearch.open(split.shards, 3, "cpu").search_cells(features, probes, 16)
    assert equal(knn.merge_topk([together], 15, ids), reference)
    for seed, size in ((0, 1), (1, 3), (2, 333)):
        some = np.random.default_rng(seed).choice(1000, size, replace=False)
        part = split.sharded(features[some], probes[some], 15, ids[some])
        assert equal(part, (reference[0][some], reference[1][some]))


@pytest.mark.parametrize("constant", ["CHUNK_QUERIES", "TILE_QUERIES", "TILE_ROWS", "DECODED_VALUES", "DIRECT_ROWS"])
@pytest.mark.parametrize("kind", ["ivf_flat", "ivf_sq8"])
def test_tile_sizes_change_no_bit(kind, constant, monkeypatch):
    features, ids = clustered(300), random_ids(300)
    features[50:90] = features[50]
    made = Fixture(features, ids, kind)
    search = knn.ShardSearch.open(made.shards, 2, "cpu")
    probes = made.probes(features)
    cells, everything = search.search_cells(features, probes, 10), search.search_all(features, 10)
    monkeypatch.setattr(knn, constant, 37)
    assert equal(search.search_cells(features, probes, 10), cells)
    assert equal(search.search_all(features, 10), everything)


def test_the_gpu_path_gives_the_same_bits():
    features, ids = clustered(800), random_ids(800)
    features[50:90] = features[50]
    made = Fixture(features, ids)
    rows, probes = ix.open_rows(made.shards), made.probes(features)
    heaps, topk = (knn.ShardSearch(rows, 2, "cpu", heaps=h) for h in (True, False))
    assert equal(heaps.search_cells(features, probes, 12), topk.search_cells(features, probes, 12))
    assert equal(heaps.search_all(features, 12), topk.search_all(features, 12))


# --- duplicates, ties, self, and too few rows -------------------------------------------------------------------------


def test_duplicates_are_neighbors_at_exactly_zero_and_only_self_is_removed():
    features, ids = clustered(400, offset=30.0), random_ids(400)
    features[10:40] = features[10]
    made = Fixture(features, ids, shards=3)
    distances, found = made.sharded(features, made.probes(features), 20, ids)
    assert (distances[10:40] == 0.0).all()
    for row in range(10, 40):
        others = np.sort(np.setdiff1d(ids[10:40], ids[row]))
        assert np.array_equal(found[row], others[:20])  # of 29 at distance 0, the lowest ids
    assert (found != ids[:, None]).all()
    assert (distances[:10] > 0).all()


def test_ties_go_by_id():
    axis = np.eye(8, dtype=np.float32)
    features, ids = np.concatenate([axis, -axis]), np.arange(16)[::-1].astype(np.int64).copy()
    search = knn.ShardSearch(ix.flat_rows(ids, features), 1, "cpu")
    distances, found = search.search_all(np.zeros((1, 8), np.float32), 6)
    assert np.array_equal(found[0], np.arange(6)) and (distances == 1.0).all()


def test_a_thousand_copies_cost_no_correctness():
    features, ids = clustered(1300), random_ids(1300)
    features[:1000] = features[0]
    made = Fixture(features, ids, cells=4)
    search = knn.ShardSearch.open(made.shards, 2, "cpu")
    for distances, found in (
        search.search_cells(features, made.probes(features, 2), 5),
        search.search_all(features, 5),
    ):
        assert (distances[:1000] == 0).all()
        assert np.array_equal(found[:1000], np.broadcast_to(np.sort(ids[:1000])[:5], (1000, 5)))


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_fewer_rows_than_k_pads_with_inf(rows):
    features, ids = clustered(rows), random_ids(rows)
    search = knn.ShardSearch(ix.flat_rows(ids, features), 1, "cpu")
    queries = clustered(4, seed=3)
    distances, found = search.search_all(queries, 5)
    assert np.isinf(distances[:, rows:]).all() and (found[:, rows:] == knn.MISSING_ID).all()
    exact = brute_force(queries, features, ids, rows)
    assert np.array_equal(found[:, :rows], exact[1])


def test_empty_cells_one_row_cells_and_queries_without_probes():
    centroids = (10 * np.eye(6, 8)).astype(np.float32)
    features = np.concatenate([centroids[:1], centroids[2:3] + 0.5, centroids[2:3] - 0.5])  # cells 1, 3, 4, 5 are empty
    ids = np.array([7, 8, 9])
    own = ix.cell_of(ix.quantizer_of(centroids), features)
    shard = ix.build_shard(ix.train_template("ivf_flat", 8, centroids), features, ids, own)
    search = knn.ShardSearch.open([shard], 2, "cpu")
    probes = np.array([[0, 1], [2, -1], [-1, -1], [3, 4], [-1, 0]], np.int32)
    distances, found = search.search_cells(np.zeros((5, 8), np.float32), probes, 3)
    none = knn.MISSING_ID
    assert found.tolist() == [[7, none, none], [9, 8, none], [none] * 3, [none] * 3, [7, none, none]]
    assert np.isinf(distances[found == none]).all()


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_any_small_integer_rows_are_searched_exactly(data):
    # integers: distances are exact in float32, so ids must agree with brute force to the last tie
    n, k = data.draw(st.integers(1, 60)), data.draw(st.integers(1, 12))
    seed = data.draw(st.integers(0, 2**31))
    rng = np.random.default_rng(seed)
    features = rng.integers(-2, 3, (n, 2)).astype(np.float32)
    ids = random_ids(n, seed)
    centroids = rng.integers(-2, 3, (5, 2)).astype(np.float32)
    quantizer = ix.quantizer_of(centroids)
    own, probes = ix.cell_of(quantizer, features), ix.coarse_probes(quantizer, features, 3)
    shard = ix.build_shard(ix.train_template("ivf_flat", 2, centroids), features, ids, own)
    search = knn.ShardSearch.open([shard], 1, "cpu")
    allowed = (probes[:, :, None] == own[None, None, :]).any(1)
    wide = min(k, n)
    exact = brute_force(features, features, ids, wide, allowed)
    found = search.search_cells(features, probes, k)
    real = np.isfinite(exact[0])
    assert np.array_equal(found[1][:, :wide][real], exact[1][real])
    assert np.array_equal(found[0][:, :wide][real], exact[0][real].astype(np.float32))
    assert np.isinf(found[0][:, :wide][~real]).all()


def test_products_are_in_float32_whatever_the_process_was_set_to():
    """As by TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1, which some images of containers set; it is as it was afterwards."""
    import torch

    search = knn.ShardSearch(ix.flat_rows(random_ids(9), clustered(9)), 1, "cpu")
    expected = search.search_all(clustered(2), 3)
    torch.set_float32_matmul_precision("medium")
    try:
        with knn.single_threaded_torch():
            assert torch.get_float32_matmul_precision() == "highest"
        found = search.search_all(clustered(2), 3)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def test_merge_is_the_sorted_union():
    rng = np.random.default_rng(0)
    ids = rng.permutation(600).reshape(20, 30)
    distances = rng.integers(0, 10, (20, 30)).astype(np.float32)
    parts = [(distances[:, a:b], ids[:, a:b]) for a, b in ((0, 4), (4, 5), (5, 30))]
    found = knn.merge_topk(parts, 12, exclude_ids=ids[:, 0])
    for row in range(20):
        union = sorted(zip(distances[row, 1:].tolist(), ids[row, 1:].tolist(), strict=True))[:12]
        assert list(zip(found[0][row].tolist(), found[1][row].tolist(), strict=True)) == union
