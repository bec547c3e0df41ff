from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pd_core.core.errors import UserError
from pd_core.index import shards as ix
from tests.synthetic import DIM, clustered

ROOT = Path(__file__).resolve().parents[2]
KINDS: list[ix.ShardKind] = ["flat", "ivf_flat", "ivf_sq8", "ivf_pq"]


def distinct(n):
    return np.random.default_rng(1).choice(2**62, n, replace=False).astype(np.int64)


def filled(kind, features, ids, shards, cells=20):
    """Shards of one index over the rows, and their coarse centroids."""
    if kind == "flat":
        template = ix.train_template("flat", features.shape[1])
        rows = np.array_split(np.arange(len(ids)), shards)
        return [ix.build_shard(template, features[r], ids[r]) for r in rows], None
    centroids = ix.train_quantizer(features, cells, seed=0)
    template = ix.train_template(kind, features.shape[1], centroids, features, pq_bytes=8)
    own = ix.cell_of(ix.quantizer_of(centroids), features)
    shard_of = ix.assign_cells(centroids, np.bincount(own, minlength=cells), shards)[own]
    parts = [np.flatnonzero(shard_of == s) for s in range(shards)]
    return [ix.build_shard(template, features[r], ids[r], own[r]) for r in parts], centroids


@pytest.mark.parametrize("rows", [1, 38, 39, 1797, 10_000, 1_000_000, 10**9])
def test_default_cells_leave_rows_to_train_each(rows):
    cells = ix.default_cells(rows)
    assert cells == 1 or rows / cells >= ix.ROWS_PER_CELL
    assert cells <= round(4 * rows**0.5)


def test_default_shards_are_one_per_gib():
    assert ix.default_shards(1, 768) == 1
    assert ix.default_shards(2**20, 256) == 1
    assert ix.default_shards(2**20 + 1, 256) == 2
    assert ix.default_shards(10**9, 768) == 2862  # ceil(10^9 * 3072 / 2^30)


def test_quantizer_is_a_function_of_sample_and_seed():
    features = clustered(1000)
    one, again, other = (ix.train_quantizer(features, 16, seed) for seed in (0, 0, 1))
    assert one.tobytes() == again.tobytes() != other.tobytes()
    assert one.shape == (16, DIM) and one.dtype == np.float32


def test_quantizer_is_as_good_as_plain_faiss():
    features = clustered(2000)
    ours = ix.train_quantizer(features, 12, seed=3)
    plain = faiss.Kmeans(DIM, 12, niter=10, seed=3, verbose=False)
    plain.train(features)
    squared = ix.quantizer_of(ours).search(features, 1)[0].sum()
    # same algorithm and seed: the same optimum, up to the order of sums
    assert squared == pytest.approx(plain.index.search(features, 1)[0].sum(), rel=1e-3)


def test_more_cells_than_rows_is_refused():
    with pytest.raises(UserError, match=r"index\.cells is 11 for 10 rows"):
        ix.train_quantizer(clustered(10), 11, seed=0)


def test_cell_of_is_the_nearest_centroid():
    features, centroids = clustered(500), clustered(30, seed=5)
    exact = ((features[:, None].astype(np.float64) - centroids[None]) ** 2).sum(2)
    assert np.array_equal(ix.cell_of(ix.quantizer_of(centroids), features), exact.argmin(1))


@pytest.mark.parametrize("kind", KINDS)
def test_shard_does_not_depend_on_the_order_of_arrival(kind):
    features = clustered(600)
    ids = distinct(600)
    rng = np.random.default_rng(2)
    shuffled = rng.permutation(600)
    centroids = ix.train_quantizer(features, 10, seed=0)
    template = ix.train_template(kind, DIM, centroids, features, pq_bytes=8)
    own = None if kind == "flat" else ix.cell_of(ix.quantizer_of(centroids), features)
    one = ix.build_shard(template, features, ids, own)
    assert ix.build_shard(template, features[shuffled], ids[shuffled], None if own is None else own[shuffled]) == one
    assert ix.deserialize(one).ntotal == 600


@pytest.mark.parametrize("kind", KINDS)
def test_plain_faiss_opens_and_merges_the_shards_to_what_it_would_have_built(kind, tmp_path):
    features = clustered(900)
    ids = distinct(900)
    shards, centroids = filled(kind, features, ids, 3)
    opened = []
    for number, data in enumerate(shards):
        (tmp_path / f"{number}.faiss").write_bytes(data)
        opened.append(faiss.read_index(str(tmp_path / f"{number}.faiss")))
    merged = opened[0]
    for other in opened[1:]:
        merged.merge_from(other, 0)
    template = ix.train_template(kind, DIM, centroids, features, pq_bytes=8)
    plain = ix.deserialize(template)
    plain.add_with_ids(features, ids)
    if kind != "flat":
        merged.nprobe = plain.nprobe = 5
    d_merged, i_merged = merged.search(features, 6)
    d_plain, i_plain = plain.search(features, 6)
    assert np.array_equal(d_merged, d_plain)  # one quantizer, one codec: bit for bit
    assert (i_merged == i_plain).mean() > 0.999 if kind != "ivf_pq" else True  # codes collide: ties in any order
    assert merged.ntotal == 900


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shards", [1, 3])
def test_open_rows_holds_every_row_once(kind, shards):
    features = clustered(700)
    ids = distinct(700)
    sources, centroids = filled(kind, features, ids, shards)
    rows = ix.open_rows(sources)
    assert np.array_equal(np.sort(rows.ids), np.sort(ids))
    assert rows.offsets[-1] == 700
    place = np.argsort(ids)[np.searchsorted(np.sort(ids), rows.ids)]  # of each opened row in `features`
    opened = rows.at(np.arange(700))
    if kind in ("flat", "ivf_flat"):
        assert np.array_equal(opened, features[place])
    else:
        merged = ix.deserialize(ix.train_template(kind, DIM, centroids, features, pq_bytes=8))
        merged.add_with_ids(features, ids)
        merged.set_direct_map_type(faiss.DirectMap.Hashtable)
        plain = np.stack([merged.reconstruct(int(i)) for i in rows.ids])
        np.testing.assert_allclose(opened, plain, rtol=1e-5, atol=1e-5)  # float32 sum of centroid and residual
    if kind != "flat":
        own = ix.cell_of(ix.quantizer_of(centroids), features)[place]
        rank = np.searchsorted(rows.offsets, np.arange(700), side="right") - 1
        assert np.array_equal(rows.rank_of[own], rank)


# --- files of strangers -----------------------------------------------------------------------------------------------


def on_disk(folder) -> bytes:
    """An index whose lists are in a file of their own, which faiss opens for writing."""
    features = clustered(300)
    index = ix.deserialize(ix.train_template("ivf_flat", DIM, ix.train_quantizer(features, 4, seed=0)))
    lists = faiss.OnDiskInvertedLists(4, index.code_size, str(folder / "lists"))
    index.replace_invlists(lists)
    index.add(features)
    return ix.serialize(index)


def others(folder) -> dict[str, bytes]:
    """Indexes of faiss of kinds that are not written here."""
    features = clustered(300)
    centroids = ix.train_quantizer(features, 4, seed=0)
    hnsw = faiss.IndexHNSWFlat(DIM, 4)
    inner = faiss.IndexIDMap2(faiss.IndexHNSWFlat(DIM, 4))
    dot = faiss.IndexIVFFlat(ix.quantizer_of(centroids), DIM, 4, faiss.METRIC_INNER_PRODUCT)
    mapped = ix.deserialize(ix.train_template("ivf_flat", DIM, centroids))
    mapped.set_direct_map_type(faiss.DirectMap.Hashtable)
    untrained = faiss.IndexIVFPQ(ix.quantizer_of(centroids), DIM, 4, 8, 8)
    four = faiss.IndexIVFScalarQuantizer(ix.quantizer_of(centroids), DIM, 4, faiss.ScalarQuantizer.QT_4bit)
    four.train(features)
    made = {"hnsw": hnsw, "ids of hnsw": inner, "dot": dot, "map": mapped, "untrained": untrained, "4 bits": four}
    return {"on disk": on_disk(folder), "nothing": b"", **{name: ix.serialize(one) for name, one in made.items()}}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("on disk", "its rows are not in the file"),
        ("nothing", "it ends 4 bytes too early"),
        ("hnsw", "it is of another kind"),
        ("ids of hnsw", "it is not flat inside"),
        ("dot", "its header is of no index of ours"),
        ("map", "it has a direct map"),
        ("untrained", "its header is of no index of ours"),
        ("4 bits", "its codes are of another codec"),
    ],
)
def test_only_what_is_written_here_is_given_to_faiss(tmp_path, name, reason):
    data = others(tmp_path)[name]
    for source in (data, lambda: data):
        with pytest.raises(UserError, match=rf"^an index file is damaged, or was not written by pd_core \({reason}\);"):
            ix.open_rows([source])


HARMED = """
import resource, sys
from pathlib import Path
import numpy as np
from pd_core.core.errors import UserError
from pd_core.index import shards

rng = np.random.default_rng(0)
numbers = [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**60, 2**63, 2**64 - 1]
for file in sys.argv[1:]:
    data, refused = Path(file).read_bytes(), 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(1000):
        harmed = bytearray(data)
        at = int(rng.integers(min(len(data), 400 if number % 2 else len(data))))
        kind = number % 4
        if kind == 0:
            harmed[at] = rng.integers(256)
        elif kind == 1:
            harmed[at : at + 8] = numbers[number % len(numbers)].to_bytes(8, "little")
        elif kind == 2:
            del harmed[at:]
        else:
            harmed[at : at + 4] = bytes(rng.choice([b"ilod", b"IxHN", b"sprs", b"full", b"IwFl"]))
        try:
            rows = shards.open_rows([bytes(harmed)])
            rows.at(np.arange(len(rows.ids)))
        except UserError:
            refused += 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + (200 << 10), file  # KiB
    assert refused >= 200, (file, refused)
"""


def written(kind: ix.ShardKind, rows: int) -> bytes:
    """An index of so many rows, of 8 cells, as it lies in a file."""
    features = clustered(400)
    template = ix.train_template(kind, DIM, ix.train_quantizer(features, 8, seed=0), features, pq_bytes=8)
    index = ix.deserialize(template)
    if rows:
        index.add_with_ids(features[:rows], np.arange(rows))
    return ix.serialize(index)


def test_a_file_of_any_bytes_is_an_index_or_one_line(tmp_path):
    """In a process of its own, with what faiss would do to it: abort, take memory, write."""
    for kind in KINDS:
        for rows in (0, 60):
            (tmp_path / f"{kind}-{rows}.faiss").write_bytes(written(kind, rows))
    before = sorted(file.name for file in tmp_path.iterdir())
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", HARMED, *before]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(file.name for file in tmp_path.iterdir()) == before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [0, 1, 300])
def test_what_is_written_here_opens_as_it_did(kind, rows):
    """Empty, with lists that are mostly empty and with full ones, which faiss writes in two forms."""
    data = written(kind, rows)
    assert ix.serialize(ix.deserialize(data)) == data
    for source in (data, lambda: data):
        assert sorted(ix.open_rows([source]).ids) == list(range(rows))


def test_shards_of_different_kinds_or_of_one_cell_are_refused():
    features = clustered(400)
    flat, _ = filled("flat", features, np.arange(400), 1)
    cells, _ = filled("ivf_flat", features, np.arange(400), 1)
    for shards in ([*flat, *cells], [*cells, *flat]):
        with pytest.raises(UserError, match="of different kinds"):
            ix.open_rows(shards)
    with pytest.raises(UserError, match="rows of one cell"):
        ix.open_rows([cells[0], cells[0]])
    with pytest.raises(UserError, match="has no cells"):
        ix.centroids_of(ix.deserialize(flat[0]))


# --- assign_cells -----------------------------------------------------------------------------------------------------


@given(
    weights=st.lists(st.integers(1, 1000), min_size=1, max_size=60),
    shards=st.integers(1, 12),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=150, deadline=None)
def test_shards_are_balanced_and_none_is_empty(weights, shards, seed):
    centroids = np.random.default_rng(seed).standard_normal((len(weights), 3)).astype(np.float32)
    rows = np.array(weights)
    shard_of = ix.assign_cells(centroids, rows, shards)
    per_shard = np.bincount(shard_of, weights=rows, minlength=shards)
    # each cut misses its share by at most half of the largest cell; errors are passed on scaled by at most 2/3
    assert len(per_shard) == shards
    assert per_shard.max() <= rows.sum() / shards + 1.5 * rows.max()
    assert (per_shard > 0).sum() == min(shards, len(weights))
    assert np.array_equal(shard_of, ix.assign_cells(centroids, rows, shards))


def test_empty_cells_do_not_make_empty_shards():
    centroids = np.random.default_rng(0).standard_normal((40, 4)).astype(np.float32)
    rows = np.zeros(40, np.int64)
    rows[::5] = 10
    per_shard = np.bincount(ix.assign_cells(centroids, rows, 8), weights=rows, minlength=8)
    assert (per_shard == 10).all()


def test_identical_centroids_still_split():
    shard_of = ix.assign_cells(np.zeros((8, 3), np.float32), np.full(8, 5), 4)
    assert np.array_equal(np.bincount(shard_of), [2, 2, 2, 2])


def test_a_query_touches_far_fewer_shards_than_with_random_cells():
    features = clustered(6000, clusters=60)
    centroids = ix.train_quantizer(features, 240, seed=0)
    quantizer = ix.quantizer_of(centroids)
    rows = np.bincount(ix.cell_of(quantizer, features), minlength=240)
    probes = ix.coarse_probes(quantizer, features[:1000], 8)
    near = ix.assign_cells(centroids, rows, 12)
    random = np.random.default_rng(0).permutation(near)

    def touched(shard_of):
        return np.mean([len(set(shard_of[p])) for p in probes])

    # 8 cells thrown at random into 12 shards touch 12·(1 − (11/12)^8) = 6.0 of them
    assert touched(random) > 5.5
    assert touched(near) < 0.6 * touched(random)


def test_cell_order_is_a_permutation_that_keeps_neighbors_close():
    centroids = np.random.default_rng(0).uniform(size=(512, 2)).astype(np.float32)
    order = ix.cell_order(centroids)
    assert np.array_equal(np.sort(order), np.arange(512))
    step = np.linalg.norm(np.diff(centroids[order], axis=0), axis=1).mean()
    # random order: mean distance of two points in the unit square, 0.52; a perfect tour takes about 0.7/sqrt(512)
    assert step < 0.2
