"""Index, neighbors and densities on a real Ray cluster, held to a float64 brute force and to plain faiss."""

import dataclasses
import json
from pathlib import Path

import faiss
import numpy as np
import pytest

from pd_core.core import artifacts
from pd_core.core import files as core_files
from pd_core.core.errors import UserError
from pd_core.core.settings.index import DensitySettings, IndexSettings
from pd_core.density import densities as density_densities
from pd_core.density import formula
from pd_core.index import build, knn, search
from pd_core.index import neighbors as index_neighbors
from pd_core.index import shards as index_shards
from tests.synthetic import clustered, commit_features

K = 10


@pytest.fixture
def now(ray_cluster):
    return ray_cluster


def brute_force(features: np.ndarray, k: int) -> np.ndarray:
    """Distances to the k nearest other rows, float64, from differences."""
    x = features.astype(np.float64)
    distances = np.stack([np.sqrt(((x - row) ** 2).sum(axis=1)) for row in x])
    np.fill_diagonal(distances, np.inf)
    return np.sort(distances, axis=1)[:, :k]


def run(output, features, now, part_rows=256, index_settings=None, density_settings=None):
    """The stages from features to densities, as the pipeline calls them: commit records by kind."""
    index_settings = index_settings or IndexSettings()
    density_settings = density_settings or DensitySettings(k=K)
    stage, featured = commit_features(str(output), features, part_rows)
    indexing_stage, resolved = build.stage_of(str(output), featured, index_settings, density_settings)
    indexed = indexing_stage.complete(
        lambda: build.run(indexing_stage, stage.uri, featured, resolved, density_settings), False
    )
    info = search.open_index(indexing_stage.uri)
    near = index_neighbors.neighbors_stage(str(output), info, density_settings)
    neighbors = near.complete(
        lambda: index_neighbors.find_neighbors(near, info, stage.uri, featured, density_settings, resolved, now), False
    )
    last = density_densities.stage_of(str(output), near, density_settings)
    densities = last.complete(
        lambda: density_densities.write_densities(last, near.uri, neighbors, stage.uri, density_settings), False
    )
    return {"index": indexed, "neighbors": neighbors, "densities": densities}


def column(output, name: str) -> np.ndarray:
    files = sorted((Path(output) / "densities").glob("*.parquet"))
    columns = [core_files.read_table(str(file))[name].combine_chunks() for file in files]
    if name.startswith("neighbor"):
        return np.concatenate([c.flatten().to_numpy().reshape(len(c), -1) for c in columns])
    return np.concatenate([c.to_numpy() for c in columns])


def test_exact_densities_agree_with_float64_brute_force(tmp_path, now):
    features = clustered(1500)
    features[700:730] = features[3]  # thirty copies: duplicates are neighbors at distance 0
    made = run(tmp_path, features, now, index_settings=IndexSettings(kind="flat", shards=3))
    expected = brute_force(features, K)
    found = column(tmp_path, "neighbor_distances")
    # float32 differences and sums of D = 24 terms: relative error of a distance below 24 * 2^-24 = 1.4e-6
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=0)
    mean = column(tmp_path, "mean_knn_distance")
    np.testing.assert_allclose(mean, expected.mean(axis=1), rtol=1e-5)
    np.testing.assert_allclose(
        column(tmp_path, "density"), formula.pseudo_density(expected.mean(axis=1), 1.0), rtol=1e-5
    )
    assert made["densities"].totals["floored_rows"] == 31
    assert abs(column(tmp_path, "density").mean() - 1) < 1e-9
    own = column(tmp_path, "sample_id")
    assert not (column(tmp_path, "neighbor_ids") == own[:, None]).any()


def test_ivf_densities_agree_within_the_stored_error(tmp_path, now):
    features = clustered(6000, clusters=60)
    settings = IndexSettings(kind="ivf_flat", shards=4, cells=60, target_recall=0.97, calibration_queries=600)
    made = run(tmp_path, features, now, 1024, settings)
    totals = made["index"].totals
    assert 1 <= totals["nprobe"] < 60 and totals["recall"] >= 0.97
    exact = brute_force(features, K).mean(axis=1)
    error = np.abs(column(tmp_path, "mean_knn_distance") / exact - 1)
    # the stored figure is a mean over 600 of the 6,000 rows; its standard error is std/sqrt(600), 5 of them are allowed
    assert error.mean() <= totals["mean_distance_relative_error"] + 5 * error.std() / np.sqrt(600)
    assert (
        column(tmp_path, "mean_knn_distance") >= exact * (1 - 1e-5)
    ).all()  # what is missed is farther, never nearer
    ids = column(tmp_path, "neighbor_ids")
    assert made["neighbors"].totals["rows_sent_per_query"] < 4
    assert ids.min() >= 10


def test_shards_are_plain_faiss_files(tmp_path, now):
    features = clustered(3000, clusters=30)
    settings = IndexSettings(kind="ivf_flat", shards=3, cells=30, target_recall=0.9, calibration_queries=300)
    run(tmp_path, features, now, 512, settings)
    shards = [faiss.read_index(str(file)) for file in sorted((tmp_path / "index").glob("shard-*.faiss"))]
    assert len(shards) == 3 and min(s.ntotal for s in shards) > 0 and sum(s.ntotal for s in shards) == 3000
    merged = shards[0]
    for other in shards[1:]:
        merged.merge_from(other, 0)
    nprobe = search.open_index(str(tmp_path / "index")).nprobe
    merged.nprobe = nprobe
    squared, ids = merged.search(features, K + 1)
    full = ids[:, -1] >= 0  # a query whose cells hold fewer than k rows is searched everywhere by us
    ours = column(tmp_path, "neighbor_distances")
    assert full.mean() > 0.98
    assert (ids[:, 0] == np.arange(3000) * 7 + 10).all()
    # faiss computes float32 squared distances of norm about 15 directly: sqrt(24 * 2^-24) relative is far below 1e-3
    np.testing.assert_allclose(np.sqrt(squared[full, 1:]), ours[full], rtol=1e-4)


@pytest.mark.parametrize("kind", [pytest.param("flat", marks=pytest.mark.slow), "ivf_flat"])
def test_same_bytes_with_one_two_or_four_actors(tmp_path, now, kind):
    features = clustered(2000, clusters=20)
    contents = []
    for actors in (1, 2, 4):
        output = tmp_path / str(actors)
        settings = IndexSettings(
            kind=kind, shards=4, actors=actors, **({} if kind == "flat" else {"cells": 20, "target_recall": 0.9})
        )
        run(output, features, now, 256, settings, DensitySettings(k=K, block_rows=600))
        contents.append(
            {
                str(file.relative_to(output)): file.read_bytes()
                for file in sorted(output.rglob("*"))
                if file.suffix in (".parquet", ".faiss")
            }
        )
    assert len(contents[0]) >= 8 + 8 + 4
    assert contents[0] == contents[1] == contents[2]


def test_auto_is_exact_for_few_rows_and_where_cells_do_not_help(tmp_path, now, monkeypatch):
    features = np.random.default_rng(0).normal(size=(1500, 24)).astype(np.float32)  # no clusters: every cell is near
    assert run(tmp_path / "few", features, now)["index"].totals["kind"] == "flat"
    monkeypatch.setattr(build, "FLAT_ROWS", 1000)
    totals = run(tmp_path / "more", features, now)["index"].totals
    assert totals["kind"] == "ivf_flat" and totals["nprobe"] == 0 and totals["nprobe_at_target"] > 1
    np.testing.assert_array_equal(
        column(tmp_path / "few", "neighbor_distances"), column(tmp_path / "more", "neighbor_distances")
    )


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (IndexSettings(kind="ivf_pq", pq_bytes=4, cells=8), "reaches recall"),
        (
            IndexSettings(kind="ivf_flat", cells=8, target_recall=1.0, max_scan_fraction=0.2),
            "use --index.kind auto or flat",
        ),
        (IndexSettings(kind="ivf_pq", pq_bytes=7), "must divide the feature dimension 24; try 6"),
    ],
)
def test_a_target_out_of_reach_is_an_error(tmp_path, now, settings, expected):
    with pytest.raises(UserError) as error:
        run(tmp_path, clustered(1500), now, index_settings=settings)
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_a_flat_index_has_no_shard_without_rows(tmp_path):
    _, featured = commit_features(str(tmp_path), clustered(30), part_rows=15)
    hollow = artifacts.Part("part-00000001.parquet", 0, 1, "")  # every image of it was quarantined
    featured = dataclasses.replace(featured, parts=(featured.parts[0], hollow, featured.parts[1]))
    _, resolved = build.stage_of(str(tmp_path), featured, IndexSettings(kind="flat", shards=3), DensitySettings(k=K))
    assert resolved.shards == 2


def test_k_must_be_below_the_number_of_images(tmp_path, now):
    with pytest.raises(UserError, match=r"--density.k 20: needs more than k images, found 20"):
        run(tmp_path, clustered(20), now, density_settings=DensitySettings(k=20))


def test_blocks_cover_every_part_once(tmp_path):
    _, featured = commit_features(str(tmp_path), clustered(1000), 64)
    blocks = index_neighbors.make_blocks(featured, 300)
    assert sorted(name for block in blocks for name in block) == [part.name for part in featured.parts]
    assert len(blocks) == 4


def test_changing_the_volume_dimension_repeats_only_the_densities(tmp_path, now):
    features = clustered(600)
    run(tmp_path, features, now)
    before = {f.name: f.stat().st_mtime_ns for f in (tmp_path / "neighbors").glob("*.parquet")}
    with pytest.raises(UserError, match=r"volume_dim: 1.0 -> 2.0"):
        run_again(tmp_path, features, now, volume_dim=2.0, overwrite=False)
    run_again(tmp_path, features, now, volume_dim=2.0, overwrite=True)
    assert before == {f.name: f.stat().st_mtime_ns for f in (tmp_path / "neighbors").glob("*.parquet")}
    expected = formula.pseudo_density(column(tmp_path, "mean_knn_distance"), 2.0)
    np.testing.assert_allclose(column(tmp_path, "density"), expected, rtol=1e-12)


def run_again(output, features, now, volume_dim, overwrite):
    settings = DensitySettings(k=K, volume_dim=volume_dim)
    info = search.open_index(str(output / "index"))
    near = index_neighbors.neighbors_stage(str(output), info, settings)
    neighbors = near.begin(False)
    assert neighbors is not None
    last = density_densities.stage_of(str(output), near, settings)
    uri = str(output / "features")
    return last.complete(lambda: density_densities.write_densities(last, near.uri, neighbors, uri, settings), overwrite)


def test_search_finds_neighbors_of_new_images(tmp_path, now):
    features = clustered(900)
    run(tmp_path, features, now, index_settings=IndexSettings(kind="flat", shards=2))
    queries = clustered(50, seed=1)
    info = search.open_index(str(tmp_path / "index"))
    with search.open_pool(info, now, None, 1) as pool:
        distances, _, _ = search.search(pool, queries, K)
    x = features.astype(np.float64)
    expected = np.sort(np.sqrt(((queries[:, None].astype(np.float64) - x[None]) ** 2).sum(-1)), axis=1)[:, :K]
    np.testing.assert_allclose(distances, expected, rtol=1e-5)


def test_open_index_refuses_an_unfinished_index(tmp_path):
    with pytest.raises(UserError, match="no finished index"):
        search.open_index(str(tmp_path))


def test_cells_file_matches_the_shards(tmp_path, now):
    settings = IndexSettings(kind="ivf_flat", shards=3, cells=20, target_recall=0.9)
    run(tmp_path, clustered(1200), now, index_settings=settings)
    table = json.loads((tmp_path / "index" / search.CELLS).read_text())
    for shard in range(3):
        opened = index_shards.deserialize((tmp_path / "index" / search.shard_name(shard)).read_bytes())
        rows = [faiss.downcast_index(opened).invlists.list_size(cell) for cell in range(20)]
        expected = [
            n if owner == shard else 0 for n, owner in zip(table["rows_of_cell"], table["shard_of_cell"], strict=True)
        ]
        assert rows == expected
    assert knn.MISSING_ID == -1
