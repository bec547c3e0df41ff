"""The densities stage on Ray: every row's neighbors over all shards, block by block, then pseudo densities.

The formula is that of docs/method.md, section 1.

Two passes. The first writes each row's k nearest others (neighbors/), in parts that match those of the features. The
second needs numbers of the whole set, the normaliser c and the ranks, and writes densities/; another n repeats only it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pd_core import density, search
from pd_core.core import artifacts, files, schemas
from pd_core.core.errors import RunError
from pd_core.core.settings.index import DensitySettings, IndexSettings
from pd_core.engine import console, resources, tasks, telemetry
from pd_core.features import load_features

GROUP_PARTS = 64  # parts that one task of the second pass handles


def neighbors_stage(output: str, info: search.IndexInfo, settings: DensitySettings) -> artifacts.Stage:
    """First pass: neighbors."""
    identity = {"index": info.fingerprint, "nprobe": info.nprobe, "k": settings.k, "block_rows": settings.block_rows}
    if info.exact:  # a distance depends on its pair alone, so how queries are grouped changes nothing
        del identity["block_rows"]
    return artifacts.Stage(files.join(output, "neighbors"), "neighbors", schemas.VERSIONS["neighbors"], identity)


def stage_of(output: str, neighbors: artifacts.Stage, settings: DensitySettings) -> artifacts.Stage:
    """Second pass: densities."""
    identity = {"neighbors": neighbors.fingerprint, "volume_dim": settings.volume_dim}
    return artifacts.Stage(files.join(output, "densities"), "densities", schemas.VERSIONS["densities"], identity)


# ---- first pass ------------------------------------------------------------------------------------------------------


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


# ---- second pass -----------------------------------------------------------------------------------------------------


def write_densities(
    stage: artifacts.Stage,
    neighbors_uri: str,
    neighbors: artifacts.Artifact,
    features_uri: str,
    settings: DensitySettings,
) -> tuple[list[artifacts.Part], dict[str, Any]]:
    """Densities of every row from its neighbors; returns the parts and the totals to commit."""
    import ray

    names = [part.name for part in neighbors.parts]
    groups = [names[i : i + GROUP_PARTS] for i in range(0, len(names), GROUP_PARTS)]
    options = {"num_cpus": 1, **tasks.TASK_OPTIONS}
    summaries = ray.remote(_summary).options(**options)
    calibrate = ray.remote(_calibrate).options(num_returns=2, **options)
    totals_ref, ranks = calibrate.remote(
        settings.volume_dim, *[summaries.remote(neighbors_uri, group, settings.k) for group in groups]
    )
    totals = tasks.get(totals_ref)
    done = stage.finished_parts()
    wanted = [[name for name in group if name not in done] for group in groups]
    write = ray.remote(_write_group).options(**options)
    telemetry.PARTS.add(0, stage="densities")
    with console.progress("densities", len(names), "parts", len(done)) as bar:
        submit = lambda group: write.remote(stage, neighbors_uri, features_uri, group, settings, totals, ranks)  # noqa: E731
        for group, _ in tasks.bounded(submit, [group for group in wanted if group], tasks.in_flight):
            bar.update(len(group))
            telemetry.PARTS.add(len(group), stage="densities")
    parts = stage.finished_parts()
    return [parts[name] for name in names], totals | {"k": settings.k, "volume_dim": settings.volume_dim}


def _distances(neighbors_uri: str, name: str, k: int) -> tuple[pa.Table, np.ndarray]:
    table = files.read_table(files.join(neighbors_uri, name))
    flat = table["neighbor_distances"].combine_chunks().flatten().to_numpy()
    return table, flat.reshape(-1, k)


def _summary(neighbors_uri: str, names: Sequence[str], k: int) -> np.ndarray:
    """Mean distance to the k neighbors and distance to the nearest of every row of some parts, float64 [n, 2]."""
    tables = [_distances(neighbors_uri, name, k)[1] for name in names]
    return np.concatenate([np.stack([density.mean_knn_distance(d), d[:, 0]], axis=1) for d in tables])


def _calibrate(volume_dim: float, *summaries: np.ndarray) -> tuple[dict[str, Any], np.ndarray]:
    """What the whole set decides: floor, c, quantiles; and all log densities, ascending, for the ranks."""
    distances, nearest = np.concatenate(summaries).T
    distances = np.sort(distances)  # sums then have the same bits whatever the order of the parts
    floor = density.distance_floor(distances)
    floored, touched = density.apply_distance_floor(distances, floor)
    c = density.log_normalizer(floored, volume_dim)
    log_density = np.sort(density.log_pseudo_density(floored, volume_dim, c))
    totals = {
        "rows": len(distances),
        "log_normalizer": c,
        "distance_floor": floor,
        "floored_rows": touched,
        "density_quantiles": density.density_quantiles(density.density_of(log_density)).tolist(),
        "nearest_distance_quantiles": density.permille_quantiles(nearest, "nearest distance").tolist(),
    }
    return totals, log_density


def _write_group(
    stage: artifacts.Stage,
    neighbors_uri: str,
    features_uri: str,
    names: Sequence[str],
    settings: DensitySettings,
    totals: Mapping[str, Any],
    ranks: np.ndarray,
) -> None:
    tables = [_distances(neighbors_uri, name, settings.k) for name in names]
    means = [density.mean_knn_distance(distances) for _, distances in tables]
    floored, _ = density.apply_distance_floor(np.concatenate(means), totals["distance_floor"])
    every = density.log_pseudo_density(floored, settings.volume_dim, totals["log_normalizer"])
    cuts = np.cumsum([len(mean) for mean in means])[:-1]
    percentiles = np.split(density.mid_ranks(every, ranks), cuts)
    log_densities = np.split(every, cuts)
    rows = zip(names, tables, means, log_densities, percentiles, strict=True)
    for name, (neighbors, _), mean, log_density, percentile in rows:
        described = files.read_table(files.join(features_uri, name), without=["feature"])
        assert described["sample_id"].equals(neighbors["sample_id"]), name
        columns = {
            **{column: described[column] for column in described.column_names},
            **{column: neighbors[column] for column in neighbors.column_names},
            "mean_knn_distance": pa.array(mean),
            "log_density": pa.array(log_density),
            "density": pa.array(density.density_of(log_density)),
            "percentile": pa.array(percentile),
        }
        metadata = described.schema.field(schemas.METADATA).type if schemas.METADATA in described.column_names else None
        schema = schemas.densities(settings.k, metadata)
        stage.write_table(name, pa.table([columns[c] for c in schema.names], schema=schema))
