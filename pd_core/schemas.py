"""Arrow schema of every table that is written, with its version.

Schemas are stated, never inferred from rows. A change that readers can notice raises the version of that table.
"""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa

VERSIONS = {
    "listing": 1,
    "features": 1,
    "quarantine": 1,
    "index": 1,
    "neighbors": 1,
    "densities": 1,
    "estimator": 1,
    "report": 1,
    "pilot": 3,
    "samples": 3,
    "rejected": 3,
    "export": 1,
}

METADATA = "metadata"  # struct column of whatever else the source said of an image; absent where it said nothing


def _with_metadata(fields: list[pa.Field], metadata: pa.StructType | None) -> pa.Schema:
    return pa.schema([*fields, pa.field(METADATA, metadata)] if metadata is not None else fields)


def listing(metadata: pa.StructType | None = None) -> pa.Schema:
    """One row per image of the source, in the order that fixes parts and batches.

    `container` is the file that holds the image (the image file itself in a directory), relative to the source's
    root; `offset` and `size` locate it inside: byte range in a tar, (row, -1) in a Parquet file, (0, file size) otherwise.
    """
    fields = [
        pa.field("sample_id", pa.int64(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("container", pa.string(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),
        pa.field("label", pa.string()),
    ]
    return _with_metadata(fields, metadata)


def features(dim: int, metadata: pa.StructType | None = None) -> pa.Schema:
    """One row per image that has a feature; `width` and `height` in px after EXIF orientation; feature: float32 [dim]."""
    fields = [
        pa.field("sample_id", pa.int64(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("content_hash", pa.string(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("label", pa.string()),
        pa.field("feature", pa.list_(pa.field("item", pa.float32(), nullable=False), dim), nullable=False),
    ]
    return _with_metadata(fields, metadata)


def quarantine() -> pa.Schema:
    """One row per image without a feature; `reason` is one of images.Reason."""
    return pa.schema(
        [
            pa.field("sample_id", pa.int64(), nullable=False),
            pa.field("key", pa.string(), nullable=False),
            pa.field("reason", pa.string(), nullable=False),
            pa.field("detail", pa.string(), nullable=False),
        ]
    )


def neighbors(k: int) -> pa.Schema:
    """Neighbors of every row, in the order of the features part; distances Euclidean, ascending."""
    return pa.schema(
        [
            pa.field("sample_id", pa.int64(), nullable=False),
            pa.field("neighbor_ids", pa.list_(pa.field("item", pa.int64(), nullable=False), k), nullable=False),
            pa.field("neighbor_distances", pa.list_(pa.field("item", pa.float32(), nullable=False), k), nullable=False),
        ]
    )


def densities(k: int, metadata: pa.StructType | None = None) -> pa.Schema:
    """Pseudo density of every image; distances Euclidean (not squared), percentile in [0, 100] of the real set."""
    fields = [
        pa.field("sample_id", pa.int64(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("label", pa.string()),
        pa.field("mean_knn_distance", pa.float64(), nullable=False),
        pa.field("log_density", pa.float64(), nullable=False),
        pa.field("density", pa.float64(), nullable=False),
        pa.field("percentile", pa.float64(), nullable=False),
        pa.field("neighbor_ids", pa.list_(pa.field("item", pa.int64(), nullable=False), k), nullable=False),
        pa.field("neighbor_distances", pa.list_(pa.field("item", pa.float32(), nullable=False), k), nullable=False),
    ]
    return _with_metadata(fields, metadata)


IMAGE = pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())])


def samples() -> pa.Schema:
    """One row per accepted image; `image` is a PNG in the form that `datasets` and Ray Data read as an image.

    `density` is the one that decided, unless `log_volume` is there, which then did (METHOD section 6); `percentile` is the
    density's place among the real set's in [0, 100]; `acceptance_probability` is a of METHOD section 4, so that weights 1/a
    undo the selection; distances are Euclidean in the index's feature space;
    `image_hash` is the SHA-256 of height, width and RGB pixels.
    """
    fields = [
        pa.field("sample_id", pa.int64(), nullable=False),  # the candidate's running number
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("density", pa.float64(), nullable=False),
        pa.field("density_predicted", pa.float64()),
        pa.field("density_index", pa.float64()),
        pa.field("percentile", pa.float64(), nullable=False),
        pa.field("log_volume", pa.float64()),
        pa.field("acceptance_probability", pa.float64(), nullable=False),
        pa.field("label", pa.string()),
        pa.field("prompt", pa.string()),
        pa.field("nearest_real_id", pa.int64(), nullable=False),
        pa.field("nearest_real_distance", pa.float32(), nullable=False),
        pa.field("likely_copy", pa.bool_(), nullable=False),
        pa.field("image_hash", pa.string(), nullable=False),
        pa.field("image", IMAGE),  # never null; `datasets` knows its images by a type that may be
    ]
    return pa.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": _datasets_features(fields)}})})


def _datasets_features(fields: list[pa.Field]) -> dict[str, Any]:
    """What the `datasets` package keeps of a table in its Parquet files, so that it opens `image` as a picture."""
    features: dict[str, Any] = {f.name: {"dtype": _datasets_type(f.type), "_type": "Value"} for f in fields}
    return features | {"image": {"_type": "Image"}}


def _datasets_type(kind: pa.DataType) -> str:
    return {"double": "float64", "float": "float32"}.get(str(kind), str(kind))


def rejected() -> pa.Schema:
    """One row per rejected candidate: its density, its log-volume where that decided, and its acceptance probability."""
    return pa.schema(
        [
            pa.field("sample_id", pa.int64(), nullable=False),
            pa.field("seed", pa.int64(), nullable=False),
            pa.field("density", pa.float64(), nullable=False),
            pa.field("log_volume", pa.float64()),
            pa.field("acceptance_probability", pa.float64(), nullable=False),
        ]
    )
