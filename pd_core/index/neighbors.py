"""Every row's neighbors over all shards, block by block: the first pass of the densities stage."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pd_core.core import artifacts, files, schemas
from pd_core.core.errors import RunError
from pd_core.core.settings.index import DensitySettings, IndexSettings
from pd_core.engine import console, resources, tasks, telemetry
from pd_core.index import search
from pd_core.index.features import load_features


def neighbors_stage(output: str, info: search.IndexInfo, settings: DensitySettings) -> artifacts.Stage:
    """First pass: neighbors."""
    identity = {"index": info.fingerprint, "nprobe": info.nprobe, "k": settings.k, "block_rows": settings.block_rows}
    if info.exact:  # a distance depends on its pair alone, so how queries are grouped changes nothing
        del identity["block_rows"]
    return artifacts.Stage(files.join(output, "neighbors"), "neighbors", schemas.VERSIONS["neighbors"], identity)


def find_neighbors(
    stage: artifacts.Stage,
    info: search.IndexInfo,
    features_uri: str,
    features: artifacts.Artifact,
    settings: DensitySettings,
    index_settings: IndexSettings,
    now: resources.Cluster,
) -> tuple[list[artifacts.Part], dict[str, Any]]:
    """Write the missing neighbors parts; returns the parts and totals to commit."""
    done = stage.finished_parts()
    blocks = make_blocks(features, settings.block_rows)
    todo = [(block, [n for n in block if n not in done]) for block in blocks if any(n not in done for n in block)]
    rows_done = sum(part.rows for part in done.values())
    asked = sent = 0
    telemetry.PARTS.add(0, stage="neighbors")
    telemetry.SEARCHED.add(0, stage="neighbors")
    with (
        search.open_pool(info, resources.refreshed(now), index_settings.actors, index_settings.actor_cpus) as pool,
        console.progress("neighbors", features.rows, "rows", min(rows_done, features.rows)) as bar,
    ):
        join = tasks.task(_join_block, pool.io_cpus)
        submit = lambda item: join.remote(stage, pool, features_uri, *item, settings.k)  # noqa: E731
        for (_, written), traffic in tasks.bounded(submit, todo, lambda: len(pool.actors) + 1):
            bar.update(traffic.queries)
            telemetry.PARTS.add(len(written), stage="neighbors")
            telemetry.SEARCHED.add(traffic.queries, stage="neighbors")
            asked += traffic.queries
            sent += traffic.rows_sent
    totals: dict[str, Any] = {"rows": features.rows, "k": settings.k, "dim": info.dim, "nprobe": info.nprobe}
    if asked:  # of this call: a resumed run did not move what it found done
        totals["rows_sent_per_query"] = round(sent / asked, 4)
    parts = list(stage.finished_parts().values())
    if (found := sum(part.rows for part in parts)) != features.rows:
        raise RunError(f"{stage.uri}: {found} of {features.rows} rows are there; run the same command again")
    return parts, totals


def make_blocks(features: artifacts.Artifact, block_rows: int) -> list[list[str]]:
    """Part names of each block of queries.

    Every B-th part goes to the same of B blocks: a source sorted by class then does not send a whole block to one shard.
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
    start = 0
    for name, sample_id in zip(names, sample_ids, strict=True):
        stop = start + len(sample_id)
        if name not in missing:
            start = stop
            continue
        write_neighbors(stage, name, sample_id, neighbor_ids[start:stop], distances[start:stop])
        start = stop
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
