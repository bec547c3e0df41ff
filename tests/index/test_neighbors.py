"""Index, neighbors and densities on a real Ray cluster, held to a float64 brute force and to plain faiss."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

from pd_core.core import artifacts
from pd_core.core import files as core_files
from pd_core.core.errors import UserError
from pd_core.core.settings.index import DensitySettings, IndexSettings
from pd_core.density import densities, formula
from pd_core.index import build, neighbors, search
from tests import tiny
from tests.synthetic import clustered, commit_features

K = 10
IVF = IndexSettings(kind="ivf_flat", shards=4, cells=60, actors=1, target_recall=0.97, calibration_queries=600)


def brute_force(queries: np.ndarray, features: np.ndarray, k: int) -> np.ndarray:
    """Distances to the k nearest rows that are not the query itself, float64, from differences."""
    x = features.astype(np.float64)
    found = np.stack([np.sqrt(((x - query) ** 2).sum(axis=1)) for query in queries.astype(np.float64)])
    if queries is features:
        np.fill_diagonal(found, np.inf)
    return np.sort(found, axis=1)[:, :k]


def run(output, features, now, part_rows=256, index=None, density=None) -> dict[str, Any]:
    """The stages from features to densities, as the workflow calls them: commit records by kind."""
    index, density = index or IndexSettings(), density or DensitySettings(k=K)
    stage, featured = commit_features(str(output), features, part_rows)
    indexing, resolved = build.stage_of(str(output), featured, index, density)
    indexed = indexing.complete(lambda: build.run(indexing, stage.uri, featured, resolved, density), False)
    info = search.open_index(indexing.uri)
    near = neighbors.neighbors_stage(str(output), info, density)
    found = near.complete(
        lambda: neighbors.find_neighbors(near, info, stage.uri, featured, density, resolved, now), False
    )
    dense = densify(output, near, found, density, False)
    return {"index": indexed, "neighbors": found, "densities": dense, "stage": near}


def densify(output, near, found, density, overwrite) -> artifacts.Artifact:
    stage, uri = densities.stage_of(str(output), near, density), str(output / "features")
    return stage.complete(lambda: densities.write_densities(stage, near.uri, found, uri, density), overwrite)


def column(output, name: str) -> np.ndarray:
    files = sorted((Path(output) / "densities").glob("*.parquet"))
    columns = [core_files.read_table(str(file))[name].combine_chunks() for file in files]
    if name.startswith("neighbor"):
        return np.concatenate([c.flatten().to_numpy().reshape(len(c), -1) for c in columns])
    return np.concatenate([c.to_numpy() for c in columns])


@pytest.fixture(scope="module")
def exact(tmp_path_factory, ray_cluster):
    """(folder, features, commit records) of a flat index; thirty rows are copies: neighbors at distance 0."""
    features, folder = clustered(1500), tmp_path_factory.mktemp("exact")
    features[700:730] = features[3]
    return folder, features, run(folder, features, ray_cluster, index=IndexSettings(kind="flat", shards=3))


@pytest.fixture(scope="module")
def ivf(tmp_path_factory, ray_cluster):
    """(folder, features, commit records) of an index with cells in four shards, found by one search actor."""
    features, folder = clustered(6000, clusters=60), tmp_path_factory.mktemp("ivf")
    return folder, features, run(folder, features, ray_cluster, 1024, IVF, DensitySettings(k=K, block_rows=2000))


def test_exact_densities_agree_with_float64_brute_force(exact):
    folder, features, made = exact
    expected = brute_force(features, features, K)
    # float32 differences and sums of D = 24 terms: relative error of a distance below 24 * 2^-24 = 1.4e-6
    np.testing.assert_allclose(column(folder, "neighbor_distances"), expected, rtol=1e-5, atol=0)
    np.testing.assert_allclose(column(folder, "mean_knn_distance"), expected.mean(axis=1), rtol=1e-5)
    density = column(folder, "density")
    np.testing.assert_allclose(density, formula.pseudo_density(expected.mean(axis=1), 1.0), rtol=1e-5)
    assert made["densities"].totals["floored_rows"] == 31 and abs(density.mean() - 1) < 1e-9
    assert not (column(folder, "neighbor_ids") == column(folder, "sample_id")[:, None]).any()


def test_search_finds_neighbors_of_new_images(exact, ray_cluster):
    folder, features, _ = exact
    queries = clustered(50, seed=1)
    with search.open_pool(search.open_index(str(folder / "index")), ray_cluster, None, 1) as pool:
        distances, _, _ = search.search(pool, queries, K)
    np.testing.assert_allclose(distances, brute_force(queries, features, K), rtol=1e-5)


def test_ivf_densities_agree_within_the_stored_error(ivf):
    folder, features, made = ivf
    totals = made["index"].totals
    assert 1 <= totals["nprobe"] < 60 and totals["recall"] >= 0.97
    exact = brute_force(features, features, K).mean(axis=1)
    error = column(folder, "mean_knn_distance") / exact - 1
    # the stored figure is a mean over 600 of the 6,000 rows; its standard error is std/sqrt(600), 5 of them are allowed
    allowed = totals["mean_distance_relative_error"] + 5 * error.std() / np.sqrt(600)
    assert error.min() >= -1e-5 and error.mean() <= allowed  # what is missed is farther, never nearer
    assert made["neighbors"].totals["rows_sent_per_query"] < 4
    assert column(folder, "neighbor_ids").min() >= 10


def test_shards_are_plain_faiss_files_that_hold_the_cells_they_own(ivf):
    folder, features, _ = ivf
    shards = [faiss.read_index(str(file)) for file in sorted((folder / "index").glob("shard-*.faiss"))]
    assert len(shards) == 4 and min(s.ntotal for s in shards) > 0
    table = json.loads((folder / "index" / search.CELLS).read_text())
    for number, shard in enumerate(shards):
        rows = [shard.invlists.list_size(cell) for cell in range(60)]
        owned = zip(table["rows_of_cell"], table["shard_of_cell"], strict=True)
        assert rows == [count if owner == number else 0 for count, owner in owned]
    merged = shards[0]
    for other in shards[1:]:
        merged.merge_from(other, 0)
    merged.nprobe = search.open_index(str(folder / "index")).nprobe
    squared, ids = merged.search(features, K + 1)
    full = ids[:, -1] >= 0  # a query whose cells hold fewer than k rows is searched everywhere by us
    assert full.mean() > 0.98 and (ids[:, 0] == np.arange(6000) * 7 + 10).all()
    # faiss computes float32 squared distances of norm about 15 directly: sqrt(24 * 2^-24) relative is far below 1e-3
    ours = column(folder, "neighbor_distances")
    np.testing.assert_allclose(np.sqrt(squared[full, 1:]), ours[full], rtol=1e-4)


def test_same_bytes_with_one_or_four_actors(ivf, tmp_path, ray_cluster):
    folder, features, _ = ivf
    settings = IVF.model_copy(update={"actors": 4})
    run(tmp_path, features, ray_cluster, 1024, settings, DensitySettings(k=K, block_rows=2000))
    assert tiny.tables(tmp_path) == tiny.tables(folder)


def test_auto_is_exact_for_few_rows_and_where_cells_do_not_help(tmp_path, ray_cluster, monkeypatch):
    features = np.random.default_rng(0).normal(size=(1500, 24)).astype(np.float32)  # no clusters: every cell is near
    assert build.resolve_kind(IndexSettings(), False, 1500) == "flat"
    monkeypatch.setattr(build, "FLAT_ROWS", 1000)
    totals = run(tmp_path, features, ray_cluster)["index"].totals
    assert totals["kind"] == "ivf_flat" and totals["nprobe"] == 0 and totals["nprobe_at_target"] > 1
    found = column(tmp_path, "neighbor_distances")
    np.testing.assert_allclose(found, brute_force(features, features, K), rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"kind": "ivf_pq", "pq_bytes": 4, "cells": 8}, "reaches recall"),
        (
            {"kind": "ivf_flat", "cells": 8, "target_recall": 1.0, "max_scan_fraction": 0.2},
            "use --index.kind auto or flat",
        ),
    ],
)
def test_a_target_out_of_reach_is_an_error(tmp_path, ray_cluster, settings, expected):
    with pytest.raises(UserError) as error:
        run(tmp_path, clustered(1500), ray_cluster, index=IndexSettings(**settings))
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_an_index_is_resolved_and_refused_before_anything_is_built(tmp_path):
    _, featured = commit_features(str(tmp_path), clustered(30), part_rows=15)
    hollow = artifacts.Part("part-00000001.parquet", 0, 1, "")  # every image of it was quarantined
    featured = dataclasses.replace(featured, parts=(featured.parts[0], hollow, featured.parts[1]))

    def resolved(k: int, **index: Any) -> IndexSettings:
        return build.stage_of(str(tmp_path), featured, IndexSettings(**index), DensitySettings(k=k))[1]

    assert resolved(K, kind="flat", shards=3).shards == 2  # none without rows
    with pytest.raises(UserError, match=r"--index.pq_bytes 7: must divide the feature dimension 24; try 6"):
        resolved(K, kind="ivf_pq", pq_bytes=7)
    with pytest.raises(UserError, match=r"--density.k 30: needs more than k images, found 30"):
        resolved(30)
    with pytest.raises(UserError, match="no finished index"):
        search.open_index(str(tmp_path))


def test_blocks_cover_every_part_once(tmp_path):
    _, featured = commit_features(str(tmp_path), clustered(1000), 64)
    blocks = neighbors.make_blocks(featured, 300)
    assert sorted(name for block in blocks for name in block) == [part.name for part in featured.parts]
    assert len(blocks) == 4


def test_changing_the_volume_dimension_repeats_only_the_densities(tmp_path, ray_cluster):
    made = run(tmp_path, clustered(600), ray_cluster)
    other = DensitySettings(k=K, volume_dim=2.0)
    with pytest.raises(UserError, match=r"volume_dim: 1.0 -> 2.0"):
        densify(tmp_path, made["stage"], made["neighbors"], other, overwrite=False)
    densify(tmp_path, made["stage"], made["neighbors"], other, overwrite=True)
    expected = formula.pseudo_density(column(tmp_path, "mean_knn_distance"), 2.0)
    np.testing.assert_allclose(column(tmp_path, "density"), expected, rtol=1e-12)
