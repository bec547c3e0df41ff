"""The densities stage on Ray: from distances to neighbors to pseudo densities, part by part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pd_core.core import artifacts, files, schemas
from pd_core.core.settings.index import DensitySettings
from pd_core.density import formula
from pd_core.engine import tasks

GROUP_PARTS = 64  # parts that one task handles


def stage_of(output: str, neighbors: artifacts.Stage, settings: DensitySettings) -> artifacts.Stage:
    """Second pass: densities."""
    identity = {"neighbors": neighbors.fingerprint, "volume_dim": settings.volume_dim}
    return artifacts.Stage(files.join(output, "densities"), "densities", schemas.VERSIONS["densities"], identity)


def write_densities(
    stage: artifacts.Stage,
    neighbors_uri: str,
    neighbors: artifacts.Artifact,
    features_uri: str,
    settings: DensitySettings,
) -> tuple[list[artifacts.Part], dict[str, Any]]:
    """Densities of every row from its neighbors; returns the parts and the totals to commit."""
    names = [part.name for part in neighbors.parts]
    groups = [names[i : i + GROUP_PARTS] for i in range(0, len(names), GROUP_PARTS)]
    summaries, calibrate = tasks.task(_summary), tasks.task(_calibrate, num_returns=2)
    totals_ref, ranks = calibrate.remote(
        settings.volume_dim, *[summaries.remote(neighbors_uri, group, settings.k) for group in groups]
    )
    totals, write = tasks.get(totals_ref), tasks.task(_write_group)

    def submit(missing: Sequence[str]) -> Any:
        return write.remote(stage, neighbors_uri, features_uri, missing, settings, totals, ranks)

    parts = tasks.make_missing(stage, groups, submit)
    return parts, totals | {"k": settings.k, "volume_dim": settings.volume_dim}


def _distances(neighbors_uri: str, name: str, k: int) -> tuple[pa.Table, np.ndarray]:
    table = files.read_table(files.join(neighbors_uri, name))
    flat = table["neighbor_distances"].combine_chunks().flatten().to_numpy()
    return table, flat.reshape(-1, k)


def _summary(neighbors_uri: str, names: Sequence[str], k: int) -> np.ndarray:
    """Mean distance to the k neighbors and distance to the nearest of every row of some parts, float64 [n, 2]."""
    tables = [_distances(neighbors_uri, name, k)[1] for name in names]
    return np.concatenate([np.stack([formula.mean_knn_distance(d), d[:, 0]], axis=1) for d in tables])


def _calibrate(volume_dim: float, *summaries: np.ndarray) -> tuple[dict[str, Any], np.ndarray]:
    """What the whole set decides: floor, c, quantiles; and all log densities, ascending, for the ranks."""
    distances, nearest = np.concatenate(summaries).T
    distances = np.sort(distances)  # sums then have the same bits whatever the order of the parts
    floor = formula.distance_floor(distances)
    floored, touched = formula.apply_distance_floor(distances, floor)
    c = formula.log_normalizer(floored, volume_dim)
    log_density = np.sort(formula.log_pseudo_density(floored, volume_dim, c))
    totals = {
        "rows": len(distances),
        "log_normalizer": c,
        "distance_floor": floor,
        "floored_rows": touched,
        "density_quantiles": formula.density_quantiles(formula.density_of(log_density)).tolist(),
        "nearest_distance_quantiles": formula.density_quantiles(nearest).tolist(),
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
    means = [formula.mean_knn_distance(distances) for _, distances in tables]
    floored, _ = formula.apply_distance_floor(np.concatenate(means), totals["distance_floor"])
    every = formula.log_pseudo_density(floored, settings.volume_dim, totals["log_normalizer"])
    cuts = np.cumsum([len(mean) for mean in means])[:-1]
    percentiles = np.split(formula.mid_ranks(every, ranks), cuts)
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
            "density": pa.array(formula.density_of(log_density)),
            "percentile": pa.array(percentile),
        }
        metadata = described.schema.field(schemas.METADATA).type if schemas.METADATA in described.column_names else None
        schema = schemas.densities(settings.k, metadata)
        stage.write_table(name, pa.table([columns[c] for c in schema.names], schema=schema))
