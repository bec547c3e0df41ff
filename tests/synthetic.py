"""Synthetic features, committed as the features stage commits them."""

import numpy as np
import pyarrow as pa

from pd_core.core import artifacts, files, schemas

DIM = 24


def clustered(rows: int, dim: int = DIM, clusters: int = 12, seed: int = 0) -> np.ndarray:
    """Overlapping Gaussian clusters: float32 [rows, dim]."""
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(clusters, dim)) * 3
    return (centers[rng.integers(clusters, size=rows)] + rng.normal(size=(rows, dim))).astype(np.float32)


def commit_features(output: str, features: np.ndarray, part_rows: int) -> tuple[artifacts.Stage, artifacts.Artifact]:
    """A features stage holding these rows; ids are 10, 17, 24, ..."""
    rows, dim = features.shape
    stage = artifacts.Stage(
        files.join(output, "features"), "features", 1, {"rows": rows, "sum": float(features.astype(np.float64).sum())}
    )
    stage.begin(overwrite=False)
    schema = schemas.features(dim)
    parts = []
    for number, start in enumerate(range(0, rows, part_rows)):
        block = features[start : start + part_rows]
        count = len(block)
        columns = [
            pa.array(np.arange(start, start + count) * 7 + 10),
            pa.array([f"image-{start + i:06d}" for i in range(count)]),
            pa.array(["00"] * count),
            pa.array([8] * count, pa.int32()),
            pa.array([8] * count, pa.int32()),
            pa.array([str((start + i) % 3) for i in range(count)]),
            pa.FixedSizeListArray.from_arrays(pa.array(block.reshape(-1)), dim).cast(schema.field("feature").type),
        ]
        parts.append(stage.write_table(artifacts.part_name(number), pa.table(columns, schema=schema)))
    return stage, stage.commit(parts, {"rows": rows, "dim": dim}, {})
