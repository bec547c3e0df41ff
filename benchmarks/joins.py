"""The self-joins that are compared, one function per side, each run in a process of its own; and the index they share.

All sides answer the same question from the same file: the k = 20 nearest others of every row, ids and distances.
Loading is not timed. Where a side searches every `step`-th row only, it is one whose cost per query does not depend on
how many queries there are.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa

from pd_core.core import artifacts, files, schemas
from pd_core.core.settings.index import BuildIndexSettings, DensitySettings, IndexSettings
from pd_core.density import densities as density_densities
from pd_core.engine import resources, session
from pd_core.index import build as index_build
from pd_core.index import knn, recall, search
from pd_core.index import neighbors as index_neighbors
from pd_core.index import shards as index_shards

K = 20
THREADS = 2
PART_ROWS = 4096
TINY_ROWS, TINY_PARTS = 32, 4  # a join that is all start-up, in as many blocks
WARM_UP = 4096  # big_batch_search refuses fewer (query, probe) pairs than there are cells


# ---- the index -------------------------------------------------------------------------------------------------------


def build(vectors: str, work: str) -> dict[str, Any]:
    """Commit features/, tiny/ and an index in 1 and in 2 shards under `work`, by the stages of the workflow.

    Returns:
        Totals of the index, its seconds, and rows that travel per query by number of shards.
    """
    x = np.load(vectors, mmap_mode="r")
    featured = write_features(x, work, "features")
    write_features(x[:TINY_ROWS], work, "tiny", TINY_ROWS // TINY_PARTS)
    watch = artifacts.Stopwatch()
    with session.session(work):
        one = _build_index(work, featured, 1)
        seconds = watch.seconds
        _build_index(work, featured, 2)
    return {"index": one.totals, "build_s": seconds, "auto_is_exact": _auto_is_exact(one.totals)}


def complete(
    output: str, featured: artifacts.Artifact, settings: BuildIndexSettings, now: resources.Cluster
) -> tuple[dict[str, artifacts.Artifact], str]:
    """Index, neighbors and densities of committed features, by the stages of the workflow; returns the index's URI."""
    uri = files.join(output, "features")
    stage, resolved = index_build.stage_of(output, featured, settings.index, settings.density)
    indexed = stage.complete(lambda: index_build.run(stage, uri, featured, resolved, settings.density), False)
    info = search.open_index(stage.uri)
    near = index_neighbors.neighbors_stage(output, info, settings.density)
    neighbors = near.complete(
        lambda: index_neighbors.find_neighbors(near, info, uri, featured, settings.density, resolved, now), False
    )
    last = density_densities.stage_of(output, near, settings.density)
    densities = last.complete(
        lambda: density_densities.write_densities(last, near.uri, neighbors, uri, settings.density), False
    )
    return {"index": indexed, "neighbors": neighbors, "densities": densities}, stage.uri


def write_features(x: np.ndarray, work: str, name: str, part_rows: int = PART_ROWS) -> artifacts.Artifact:
    """A committed features stage of the given rows; sample_id is the row's number."""
    n, dim = x.shape
    stage = artifacts.Stage(files.join(work, name), "features", schemas.VERSIONS["features"], {"rows": n, "dim": dim})
    stage.begin(overwrite=False)
    schema = schemas.features(dim)
    for part, start in enumerate(range(0, n, part_rows)):
        rows = np.ascontiguousarray(x[start : start + part_rows], np.float32)
        ids = np.arange(start, start + len(rows))
        columns: dict[str, Any] = {
            "sample_id": pa.array(ids),
            "key": pa.array([f"{i:08d}" for i in ids]),
            "content_hash": pa.array([f"{i:064x}" for i in ids]),
            "width": pa.array(np.full(len(rows), 64, np.int32)),
            "height": pa.array(np.full(len(rows), 64, np.int32)),
            "label": pa.nulls(len(rows), pa.string()),
            "feature": pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), dim).cast(
                schema.field("feature").type
            ),
        }
        stage.write_table(artifacts.part_name(part), pa.table(columns, schema=schema))
    return stage.commit(stage.finished_parts().values(), {"rows": n, "dim": dim}, {})


def _build_index(work: str, featured: artifacts.Artifact, shards: int) -> artifacts.Artifact:
    # every cell may be probed: whether the target is then worth its price is what the benchmark shows
    settings = IndexSettings(kind="ivf_flat", shards=shards, max_scan_fraction=1.0, actor_cpus=THREADS)
    density = DensitySettings(k=K)
    stage, resolved = index_build.stage_of(index_folder(work, shards), featured, settings, density)
    stage.begin(overwrite=False)
    trained = Path(index_folder(work, 1), "index", search.QUANTIZER)
    if shards > 1:  # the same quantizer, without training it again
        stage.write_part(search.QUANTIZER, trained.read_bytes(), 0)
    features = files.join(work, "features")
    return stage.complete(lambda: index_build.run(stage, features, featured, resolved, density), overwrite=False)


def index_folder(work: str, shards: int) -> str:
    """Where the index of so many shards is."""
    return files.join(work, f"shards-{shards}")


def shard_file(work: str) -> Path:
    """The one file of the index in one shard: an ordinary faiss index."""
    return Path(index_folder(work, 1), "index", search.shard_name(0))


def _auto_is_exact(totals: dict[str, Any]) -> bool:
    return recall.relative_cost(totals["scan_fraction"], totals["rows"], totals["cells"]) >= 1


def rows_sent(vectors: str, work: str, nprobe: int, shards: list[int]) -> dict[str, float]:
    """Rows that travel per query, for each number of shards with one actor each: shards that own a probed cell."""
    x = np.load(vectors, mmap_mode="r")
    folder = files.join(index_folder(work, 1), "index")
    quantizer = search.read_quantizer(folder)
    counts = np.array(json.loads(files.read_bytes(files.join(folder, search.CELLS)))["rows_of_cell"])
    centroids = quantizer.reconstruct_n(0, quantizer.ntotal)
    owners = {count: index_shards.assign_cells(centroids, counts, count) for count in shards}
    sent = dict.fromkeys(shards, 0)
    for start in range(0, len(x), 16384):
        probes = index_shards.coarse_probes(quantizer, np.asarray(x[start : start + 16384]), nprobe)
        for count, owner in owners.items():
            held = owner[probes]
            sent[count] += sum(int((held == shard).any(axis=1).sum()) for shard in range(count))
    return {str(count): total / len(x) for count, total in sent.items()}


# ---- the sides -------------------------------------------------------------------------------------------------------


def _load(vectors: str, step: int) -> np.ndarray:
    return np.ascontiguousarray(np.load(vectors)[::step])


def _timed(run: Callable[[np.ndarray], knn.Found], queries: np.ndarray) -> tuple[float, knn.Found]:
    run(queries[:WARM_UP])  # thread pools and libraries are up
    watch = artifacts.Stopwatch()
    found = run(queries)
    return watch.seconds, found


def _answer(found: knn.Found, rows: np.ndarray, keep: int, answers: str) -> None:
    """Save the first `keep`-th rows' k others, by the rule that our own search follows."""
    distances, ids = (values[::keep] for values in found)
    distances, ids = knn.merge_topk([(distances, ids)], K, rows[::keep])
    np.savez(answers, distances=distances, ids=ids)


def faiss_ivf(vectors: str, work: str, nprobe: int, step: int, answers: str) -> dict[str, float]:
    """(a) IndexIVFFlat.search of every step-th row, k + 1 neighbors; removing the row itself is not timed."""
    queries = _load(vectors, step)
    ivf = index_shards.faiss.read_index(str(shard_file(work)))
    ivf.nprobe = nprobe
    index_shards.faiss.omp_set_num_threads(THREADS)
    seconds, (squared, ids) = _timed(lambda q: ivf.search(q, K + 1), queries)
    _answer((np.sqrt(squared), ids), np.arange(len(queries)) * step, 1, answers)
    return {"seconds": seconds, "queries": len(queries)}


def faiss_batch(
    vectors: str, work: str, nprobe: int, step: int, answers: str, threads: int = THREADS
) -> dict[str, float]:
    """(b) big_batch_search of all rows at once, k + 1 neighbors; removing the row itself is not timed."""
    from faiss.contrib.big_batch_search import big_batch_search

    queries = _load(vectors, 1)
    ivf = index_shards.faiss.read_index(str(shard_file(work)))
    ivf.nprobe = nprobe
    index_shards.faiss.omp_set_num_threads(threads)

    def run(q: np.ndarray) -> knn.Found:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints a line per cell, whatever `verbose` says
            return big_batch_search(ivf, q, K + 1, method="pairwise_distances")

    seconds, (squared, ids) = _timed(run, queries)
    _answer((np.sqrt(np.maximum(squared, 0)), ids), np.arange(len(queries)), step, answers)
    return {"seconds": seconds, "queries": len(queries)}


def faiss_exact(vectors: str, work: str, nprobe: int, step: int, answers: str) -> dict[str, float]:
    """(c) IndexFlatL2.search of every step-th row against all rows."""
    x = np.load(vectors)
    queries = np.ascontiguousarray(x[::step])
    flat = index_shards.faiss.IndexFlatL2(x.shape[1])
    flat.add(x)
    del x
    index_shards.faiss.omp_set_num_threads(THREADS)
    seconds, (squared, ids) = _timed(lambda q: flat.search(q, K + 1), queries)
    _answer((np.sqrt(np.maximum(squared, 0)), ids), np.arange(len(queries)) * step, 1, answers)
    return {"seconds": seconds, "queries": len(queries)}


def ours(vectors: str, work: str, nprobe: int, step: int, answers: str) -> dict[str, float]:
    """What one search process does, in blocks of the default size: probes, search_cells, self removed by id."""
    queries = _load(vectors, 1)
    searcher = knn.ShardSearch.open([shard_file(work).read_bytes()], THREADS, "cpu")
    quantizer = search.read_quantizer(files.join(index_folder(work, 1), "index"))
    rows = np.arange(len(queries))
    blocks = -(-len(queries) // DensitySettings().block_rows)

    def run(q: np.ndarray) -> knn.Found:
        found = []
        for own, row in zip(np.array_split(q, blocks), np.array_split(rows[: len(q)], blocks), strict=True):
            probes = index_shards.coarse_probes(quantizer, own, nprobe)
            found.append(knn.merge_topk([searcher.search_cells(own, probes, K + 1)], K, row))
        distances, ids = zip(*found, strict=True)
        return np.concatenate(distances), np.concatenate(ids)

    seconds, found = _timed(run, queries)
    _answer(found, rows, step, answers)
    return {"seconds": seconds, "queries": len(queries)}


def ours_exact(vectors: str, work: str, nprobe: int, step: int, answers: str) -> dict[str, float]:
    """What one search process does where the index is flat: search_all of every step-th row, self removed by id."""
    x = np.load(vectors)
    queries, rows = np.ascontiguousarray(x[::step]), np.arange(0, len(x), step)
    searcher = knn.ShardSearch(index_shards.flat_rows(np.arange(len(x)), x), THREADS, "cpu")
    run = lambda q: knn.merge_topk([searcher.search_all(q, K + 1)], K, rows[: len(q)])  # noqa: E731
    seconds, found = _timed(run, queries)
    _answer(found, rows, 1, answers)
    return {"seconds": seconds, "queries": len(queries)}


def ours_on_ray(
    vectors: str, work: str, nprobe: int, step: int, answers: str, actors: int, threads: int, repeats: int
) -> dict[str, Any]:
    """The stage itself, committed features to committed neighbors, with one shard per actor, `repeats` times.

    Start-up: the search actors open their shards and answer a join of a few rows, in blocks enough to wake every
    process that a full join will use. The full joins find all of them awake.
    """
    info = replace(search.open_index(files.join(index_folder(work, actors), "index")), nprobe=nprobe)
    seconds = []
    with session.session(work) as now:
        watch = artifacts.Stopwatch()
        with (
            search.open_pool(info, now, actors, threads) as pool,
            # find_neighbors would open a pool of its own, and end it, in every call
            mock.patch.object(search, "open_pool", return_value=contextlib.nullcontext(pool)),
        ):
            few = DensitySettings(k=K, block_rows=TINY_ROWS // TINY_PARTS)
            _join(info, work, "tiny", f"{answers}.tiny", few, now)
            startup_s = watch.seconds
            for turn in range(repeats):
                took, artifact = _join(info, work, "features", f"{answers}.{turn}", DensitySettings(k=K), now)
                seconds.append(took)
    _save_neighbors(f"{answers}.0/neighbors", artifact, step, answers)
    return {
        "seconds": seconds,
        "queries": artifact.rows,
        "startup_s": startup_s,
        "rows_sent_per_query": artifact.totals["rows_sent_per_query"],
    }


def _join(
    info: search.IndexInfo, work: str, features: str, output: str, density: DensitySettings, now: resources.Cluster
) -> tuple[float, artifacts.Artifact]:
    uri = files.join(work, features)
    featured = artifacts.load_artifact(uri)
    assert featured is not None
    stage = index_neighbors.neighbors_stage(output, info, density)
    watch = artifacts.Stopwatch()
    artifact = stage.complete(
        lambda: index_neighbors.find_neighbors(stage, info, uri, featured, density, IndexSettings(), now),
        overwrite=False,
    )
    return watch.seconds, artifact


def _save_neighbors(uri: str, artifact: artifacts.Artifact, step: int, answers: str) -> None:
    tables = [files.read_table(files.join(uri, part.name)) for part in artifact.parts]
    together = pa.concat_tables(tables).combine_chunks()
    assert np.array_equal(together["sample_id"].to_numpy(), np.arange(together.num_rows))
    columns = [together[name].combine_chunks().flatten().to_numpy() for name in ("neighbor_distances", "neighbor_ids")]
    distances, ids = (values.reshape(-1, K)[::step] for values in columns)
    np.savez(answers, distances=distances, ids=ids)


def intrinsic_dimensions(distances: np.ndarray) -> dict[str, float]:
    """Two estimates from the distances to the k nearest others, float32 [q, k] ascending.

    TwoNN (Facco et al., Sci. Rep. 7, 2017, maximum likelihood of their equation 3) and the estimator of Levina and
    Bickel (NIPS 2004, equation 8) with the average that MacKay and Ghahramani proposed. Rows with an exact duplicate
    are left out.
    """
    kept = distances[distances[:, 0] > 0].astype(np.float64)
    ratios = np.log(kept[:, -1:] / kept[:, :-1])
    return {"twonn": len(kept) / float(np.log(kept[:, 1] / kept[:, 0]).sum()), "mle": 1 / float(ratios.mean())}
