"""Every row's neighbors over all shards, block by block: the first pass of the densities stage.

A row's neighbors change in an update only where one of them is gone or a new row comes nearer, so old rows are compared
with the new ones alone. The distance of a pair is the same bits wherever it is computed; with an exact index the result
is that of a whole build on the same features.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pd_core.core import artifacts, files, schemas
from pd_core.core.settings.index import DensitySettings, IndexSettings
from pd_core.engine import resources, tasks, telemetry
from pd_core.index import build, knn, search
from pd_core.index import shards as index_shards
from pd_core.index.base import Base, Origin, Update
from pd_core.index.features import load_features


def neighbors_stage(
    output: str, info: search.IndexInfo, settings: DensitySettings, base: Base | None = None
) -> artifacts.Stage:
    """The neighbors stage under `output`; base: whose neighbors are taken over where they still hold."""
    identity = {"index": info.fingerprint, "nprobe": info.nprobe, "k": settings.k, "block_rows": settings.block_rows}
    if info.exact:  # a distance depends on its pair alone, so how queries are grouped changes nothing
        del identity["block_rows"]
    uri = files.join(output, "neighbors")
    stage = artifacts.Stage(uri, "neighbors", schemas.VERSIONS["neighbors"], identity)
    return stage if base is None else base.continued(stage)


def find_neighbors(
    stage: artifacts.Stage,
    info: search.IndexInfo,
    features_uri: str,
    features: artifacts.Artifact,
    settings: DensitySettings,
    index_settings: IndexSettings,
    now: resources.Cluster,
    update: Update | None = None,
) -> tuple[list[artifacts.Part], dict[str, Any]]:
    """Write the missing neighbors parts; returns the parts and totals to commit.

    update: new rows, and those that lost a neighbor, are searched for over the whole index; the others are merged from
        what the base has and the new rows. `searched` in the totals counts the rows of the first kind in this call.
    """
    blocks = make_blocks(features, settings.block_rows)
    searched = sent = 0
    telemetry.SEARCHED.add(0, stage="neighbors")

    def count(traffic: search.Traffic) -> None:
        nonlocal searched, sent
        telemetry.SEARCHED.add(traffic.queries, stage="neighbors")
        searched, sent = searched + traffic.queries, sent + traffic.rows_sent

    beside = (
        update is not None
    )  # then most of the work is in the tasks, and the pool gets the smaller share of the CPUs
    with search.open_pool(
        info, resources.refreshed(now), index_settings.actors, index_settings.actor_cpus, beside
    ) as pool:
        if update is None:
            block_of = {name: block for block in blocks for name in block}
            join = tasks.task(_join_block, pool.io_cpus)
            parts = tasks.make_missing(
                stage,
                blocks,
                lambda missing: join.remote(stage, pool, features_uri, block_of[missing[0]], missing, settings.k),
                lambda: len(pool.actors) + 1,
                count,
            )
        else:
            submit = _merging(stage, pool, features_uri, settings.k, update)
            parts = tasks.make_missing(stage, blocks, submit, heard=count)
    totals: dict[str, Any] = {"rows": features.rows, "k": settings.k, "dim": info.dim, "nprobe": info.nprobe}
    if update is not None:
        totals["searched"] = searched
    elif searched:  # of this call: a resumed run did not move what it found done
        totals["rows_sent_per_query"] = round(sent / searched, 4)
    return parts, totals


def make_blocks(features: artifacts.Artifact, block_rows: int) -> list[list[str]]:
    """Part names of each block of queries.

    Every B-th part goes to the same of B blocks: a source sorted by class then does not send a whole block to one
    shard.
    """
    parts = [part for part in features.parts if part.rows]
    count = max(1, -(-sum(part.rows for part in parts) // block_rows))
    return [[part.name for part in parts[b::count]] for b in range(min(count, len(parts)))]


def _join_block(
    stage: artifacts.Stage,
    pool: search.SearchPool,
    features_uri: str,
    names: Sequence[str],
    missing: Collection[str],
    k: int,
) -> search.Traffic:
    """Search a whole block, always the same, and write those of its parts that are missing."""
    loaded = [load_features(files.join(features_uri, name)) for name in names]
    sample_ids = [table["sample_id"].to_numpy() for table, _ in loaded]
    queries = np.concatenate([features for _, features in loaded])
    del loaded
    distances, neighbor_ids, traffic = search.search(pool, queries, k, np.concatenate(sample_ids))
    cuts = np.cumsum([len(sample_id) for sample_id in sample_ids])[:-1]
    found = zip(names, sample_ids, np.split(neighbor_ids, cuts), np.split(distances, cuts), strict=True)
    for name, *columns in found:
        if name in missing:
            write_neighbors(stage, name, *columns)
    return traffic


def write_neighbors(
    stage: artifacts.Stage, name: str, sample_id: np.ndarray, neighbor_ids: np.ndarray, distances: np.ndarray
) -> None:
    """One part: int64 [n], int64 [n, k], float32 [n, k]."""
    k = neighbor_ids.shape[1]
    columns = [
        pa.array(sample_id),
        pa.FixedSizeListArray.from_arrays(pa.array(neighbor_ids.reshape(-1)), k),
        pa.FixedSizeListArray.from_arrays(pa.array(distances.reshape(-1)), k),
    ]
    schema = schemas.neighbors(k)
    stage.write_table(name, pa.table([c.cast(f.type) for c, f in zip(columns, schema, strict=True)], schema=schema))


# ---- an update -------------------------------------------------------------------------------------------------------


def _merging(stage: artifacts.Stage, pool: search.SearchPool, features_uri: str, k: int, update: Update) -> Any:
    """What submits a task for some parts of an update."""
    import ray

    base, origins = update.base, update.origins()
    cell_rows = np.empty(0, np.int64)
    if base.artifacts["index"].totals["kind"] != "flat":
        cell_rows = np.array(search.read_cells(base.folder("index")).rows_of_cell, np.int64)
    uris = update.added_parts
    new = tasks.task(_shard_of).remote(pool.info, uris) if uris else None
    same = ray.put((stage, features_uri, base.folder("neighbors"), k, cell_rows, update.removed))
    merge = tasks.task(_merge_block)
    return lambda names: merge.remote(same, pool, {name: origins[name] for name in names}, new)


def _shard_of(info: search.IndexInfo, uris: Sequence[str]) -> bytes:
    """The shard of some features parts alone, as bytes of a `.faiss` file."""
    sample_id, vectors = build.load_group(uris)
    if info.kind == "flat":
        template, cells = index_shards.train_template("flat", info.dim), None
    else:
        template = files.read_bytes(files.join(info.uri, search.QUANTIZER))
        cells = index_shards.cell_of(search.read_quantizer(info.uri), vectors)
    return index_shards.build_shard(template, vectors, sample_id, cells)


def _merge_block(
    same: tuple[artifacts.Stage, str, str, int, np.ndarray, np.ndarray],
    pool: search.SearchPool,
    origins: Mapping[str, Origin],
    new: bytes | None,
) -> search.Traffic:
    """Write the neighbors of some parts; returns how many rows were searched for in the whole index.

    same: stage, directories of features and of the base's neighbors, k, rows of each cell of the base's index, int64
        [cells], and sample ids that are gone, int64.
    """
    stage, features_uri, before_uri, k, cell_rows, removed = same
    nearest = None if new is None else knn.ShardSearch.open([new], device="cpu")
    searched = sent = 0
    for name, origin in origins.items():
        table, vectors = load_features(files.join(features_uri, name))
        sample_id = table["sample_id"].to_numpy()
        distances, found = _neighbors_before(before_uri, origin, sample_id, k)
        # new, or of other content under its id; one of its neighbors is gone; more than its cells were searched
        whole = (found[:, 0] == knn.MISSING_ID) | np.isin(sample_id, removed) | np.isin(found, removed).any(axis=1)
        probes = search.probes_of(pool.info, vectors)
        if probes is not None:
            whole |= cell_rows[probes].sum(axis=1) <= k + 1
        old = np.flatnonzero(~whole)
        if nearest is not None and len(old):  # where a search of the whole index would have looked
            more = nearest.search(vectors[old], None if probes is None else probes[old], k)
            distances[old], found[old] = knn.merge_topk([(distances[old], found[old]), more], k)
        if whole.any():
            distances[whole], found[whole], traffic = search.search(pool, vectors[whole], k, sample_id[whole])
            searched, sent = searched + traffic.queries, sent + traffic.rows_sent
        write_neighbors(stage, name, sample_id, found, distances)
    return search.Traffic(searched, sent)


def _neighbors_before(uri: str, origin: Origin, sample_id: np.ndarray, k: int) -> knn.Found:
    """What the base has in the directory `uri` for each row; MISSING_ID where it did not know the row."""
    distances = np.full((len(sample_id), k), np.inf, np.float32)
    found = np.full((len(sample_id), k), knn.MISSING_ID, np.int64)
    order = np.argsort(sample_id)
    for number in origin.old:
        part = files.join(uri, artifacts.part_name(number))
        if not files.exists(part):  # all of its images are in quarantine
            continue
        table = files.read_table(part)
        theirs = table["sample_id"].to_numpy()
        at = order[np.minimum(np.searchsorted(sample_id, theirs, sorter=order), len(order) - 1)]
        same = sample_id[at] == theirs
        for column, target in (("neighbor_distances", distances), ("neighbor_ids", found)):
            target[at[same]] = table[column].combine_chunks().flatten().to_numpy().reshape(-1, k)[same]
    return distances, found
