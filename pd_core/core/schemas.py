"""Arrow schema of every table that is written, with its version.

Schemas are stated, never inferred from rows. A change that readers can notice raises the version of that table.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

VERSIONS = {
    "listing": 2,
    "features": 3,
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
    "metrics": 1,
    "scores": 1,
    "pool": 3,
    "curve": 2,
    "perturbed": 1,
    "weights": 1,
    "training": 1,
    "merging": 1,
    "release": 1,
}

METRICS = ("precision", "recall", "density", "coverage", "frechet_distance", "vendi_generated")
CURVE_METRICS = METRICS

METADATA = "metadata"  # struct column of whatever else the source said of an image; absent where it said nothing


def _with_metadata(fields: list[pa.Field], metadata: pa.StructType | None) -> pa.Schema:
    return pa.schema([*fields, pa.field(METADATA, metadata)] if metadata is not None else fields)


def listing(metadata: pa.StructType | None = None) -> pa.Schema:
    """One row per image of the source, in the order that fixes parts and batches.

    `container` is the file that holds the image (the image file itself in a directory), relative to the source's
    root; `offset` and `size` locate it inside: byte range in a tar, (row, -1) in a Parquet file, (0, file size) otherwise.
    `version` changes when that file does.
    """
    fields = [
        pa.field("sample_id", pa.int64(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("container", pa.string(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),
        pa.field("version", pa.int64(), nullable=False),
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

    `density` is the one that decided, unless `log_volume` is there, which then did (docs/method.md, section 6);
    `percentile` is the density's place among the real set's in [0, 100]; `acceptance_probability` is a of
    docs/method.md, section 4, so that weights 1/a undo the selection; distances are Euclidean in the index's feature
    space; `image_hash` is the SHA-256 of height, width and RGB pixels.
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


def perturbed() -> pa.Schema:
    """One row per perturbed image, `image`, beside the one it was made from, `image_before`; both PNG.

    Densities are those of the images as they are saved, by the predictor and by the index; percentiles are of the latter
    among the real set's, in [0, 100]; `confirmed`: the index-scored one moved in the direction that was asked for. Distances
    are Euclidean in the index's feature space, `feature_distance` between the two images; `latent_distance_max` is the
    largest change of any element of the latent. Copies and `image_hash` are of `image`.
    """
    before_after = ("density_predicted", "density_index", "percentile")
    fields = [
        pa.field("sample_id", pa.int64(), nullable=False),  # the candidate's running number
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("direction", pa.string(), nullable=False),
        pa.field("label", pa.string()),
        pa.field("prompt", pa.string()),
        *(pa.field(f"{n}_{when}", pa.float64(), nullable=False) for n in before_after for when in ("before", "after")),
        pa.field("latent_distance_max", pa.float64(), nullable=False),
        pa.field("feature_distance", pa.float64(), nullable=False),
        pa.field("confirmed", pa.bool_(), nullable=False),
        pa.field("nearest_real_id", pa.int64(), nullable=False),
        pa.field("nearest_real_distance", pa.float32(), nullable=False),
        pa.field("likely_copy", pa.bool_(), nullable=False),
        pa.field("image_hash", pa.string(), nullable=False),
        pa.field("image", IMAGE),
        pa.field("image_before", IMAGE),
    ]
    return pa.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": _datasets_features(fields)}})})


def _datasets_features(fields: list[pa.Field]) -> dict[str, Any]:
    """What the `datasets` package keeps of a table in its Parquet files, so that it opens `image` as a picture."""
    values = {f.name: {"dtype": _datasets_type(f.type), "_type": "Value"} for f in fields if f.type != IMAGE}
    pictures = {f.name: {"_type": "Image"} for f in fields if f.type == IMAGE}
    return {f.name: (values | pictures)[f.name] for f in fields}


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


def metrics() -> pa.Schema:
    """One row per number (docs/method.md, section 7); low, high: its 95% interval, null where there are too few images.

    `selected_here`: the set was selected by densities in this very space, so that its numbers flatter it.
    """
    return pa.schema(
        [
            pa.field("set", pa.string(), nullable=False),
            pa.field("space", pa.string(), nullable=False),
            pa.field("extractor", pa.string(), nullable=False),
            pa.field("selected_here", pa.bool_(), nullable=False),
            pa.field("label", pa.string()),
            pa.field("metric", pa.string(), nullable=False),
            pa.field("value", pa.float64(), nullable=False),
            pa.field("low", pa.float64()),
            pa.field("high", pa.float64()),
            pa.field("k", pa.int32()),
            pa.field("n_real", pa.int64(), nullable=False),
            pa.field("n_generated", pa.int64(), nullable=False),
        ]
    )


def scores() -> pa.Schema:
    """One row per measured image of a set, against all measured real images; distances Euclidean in the space.

    `realism` is null for an exact copy of a real image, where it has no bound; `rarity` outside the real manifold.
    """
    return pa.schema(
        [
            pa.field("set", pa.string(), nullable=False),
            pa.field("space", pa.string(), nullable=False),
            pa.field("sample_id", pa.int64(), nullable=False),
            pa.field("key", pa.string(), nullable=False),
            pa.field("label", pa.string()),
            pa.field("realism", pa.float64()),
            pa.field("rarity", pa.float64()),
            pa.field("in_real_manifold", pa.bool_(), nullable=False),
            pa.field("nearest_real_id", pa.int64(), nullable=False),
            pa.field("nearest_real_distance", pa.float64(), nullable=False),
        ]
    )


def curve() -> pa.Schema:
    """One row per setting and space; metrics are null where the pool did not give n images.

    `candidates` were looked at for them, `acceptance_rate` is over the whole pool, and `effective_sample_size` says how many
    equally weighted candidates of the pool the setting's weights are worth; `exact_effective_size`: likewise of exp(polarity · v)
    without the steps that bound it, null for other methods. `NAME_low`, `NAME_high`: 95% interval of NAME.
    """
    fields = [
        pa.field("space", pa.string(), nullable=False),
        pa.field("extractor", pa.string(), nullable=False),
        pa.field("setting", pa.string(), nullable=False),
        pa.field("curve", pa.string(), nullable=False),
        pa.field("method", pa.string(), nullable=False),
        pa.field("threshold", pa.string()),
        pa.field("weight", pa.float64()),
        pa.field("polarity", pa.float64()),
        pa.field("truncation", pa.float64()),
        pa.field("n", pa.int64(), nullable=False),
        pa.field("n_real", pa.int64(), nullable=False),
        pa.field("k_precision", pa.int32(), nullable=False),
        pa.field("k_coverage", pa.int32(), nullable=False),
        pa.field("candidates", pa.int64(), nullable=False),
        pa.field("acceptance_rate", pa.float64(), nullable=False),
        pa.field("effective_sample_size", pa.float64(), nullable=False),
        pa.field("exact_effective_size", pa.float64()),
    ]
    measured = [pa.field(f"{name}{end}", pa.float64()) for name in CURVE_METRICS for end in ("", "_low", "_high")]
    return pa.schema(fields + measured)


def weights() -> pa.Schema:
    """One row per image that fine-tuning may draw, in the order of the listing part of the same name.

    `row` is the image's place in that part; `weight` is ω(ρ) of `density`, and of the label where weightings are per label;
    images of weight 0 are there and are never drawn.
    """
    return pa.schema(
        [
            pa.field("sample_id", pa.int64(), nullable=False),
            pa.field("key", pa.string(), nullable=False),
            pa.field("row", pa.int32(), nullable=False),
            pa.field("label", pa.string()),
            pa.field("density", pa.float64(), nullable=False),
            pa.field("weight", pa.float64(), nullable=False),
        ]
    )


def finetuned_samples() -> pa.Schema:
    """One row per shown image of one state of a generator; `number` counts the images of an evaluation, from 0.

    The same numbers have the same seeds, and the same labels, in every state. `density_predicted`: of the image as it is saved.
    """
    return pa.schema(
        [
            pa.field("number", pa.int64(), nullable=False),
            pa.field("seed", pa.int64(), nullable=False),
            pa.field("label", pa.string()),
            pa.field("density_predicted", pa.float64(), nullable=False),
            pa.field("image", IMAGE),
        ]
    )


def evaluations() -> pa.Schema:
    """One row per number of an evaluation while training, as `metrics`; step 0 is the generator as it came."""
    return pa.schema(
        [
            pa.field("step", pa.int64(), nullable=False),
            pa.field("metric", pa.string(), nullable=False),
            pa.field("value", pa.float64(), nullable=False),
            pa.field("low", pa.float64()),
            pa.field("high", pa.float64()),
            pa.field("n_real", pa.int64(), nullable=False),
            pa.field("n_generated", pa.int64(), nullable=False),
            pa.field("k", pa.int32()),
        ]
    )


def history() -> pa.Schema:
    """One row per number that a step logged."""
    return pa.schema(
        [
            pa.field("step", pa.int64(), nullable=False),
            pa.field("name", pa.string(), nullable=False),
            pa.field("value", pa.float64(), nullable=False),
        ]
    )


def candidates() -> pa.Schema:
    """One row per combination of checkpoints that was tried; `value` of the metric is null where its images had none.

    `coefficients` add up to 1, in the order of the checkpoints' steps.
    """
    return pa.schema(
        [
            pa.field("number", pa.int64(), nullable=False),
            pa.field("generation", pa.int64(), nullable=False),
            pa.field("coefficients", pa.list_(pa.field("item", pa.float64(), nullable=False)), nullable=False),
            pa.field("value", pa.float64()),
        ]
    )


# ---- reading ---------------------------------------------------------------------------------------------------------


@functools.cache
def known() -> Mapping[str, frozenset[pa.DataType]]:
    """Every column by its name, with the types that it has in the tables above; those of `metadata` are the source's own."""
    one = [
        listing(),
        features(1),
        quarantine(),
        neighbors(1),
        densities(1),
        samples(),
        perturbed(),
        rejected(),
        metrics(),
    ]
    more = [scores(), curve(), weights(), finetuned_samples(), evaluations(), history(), candidates()]
    found: dict[str, frozenset[pa.DataType]] = {}
    for field in (field for schema in [*one, *more] for field in schema):
        found[field.name] = found.get(field.name, frozenset()) | {field.type}
    return found


def is_like(found: pa.DataType, wanted: pa.DataType) -> bool:
    """Whether a type is the wanted one, whatever the length of its lists, which is k or D."""
    if pa.types.is_fixed_size_list(wanted):
        return pa.types.is_fixed_size_list(found) and found.value_type == wanted.value_type
    if pa.types.is_list(wanted):
        return pa.types.is_list(found) and found.value_type == wanted.value_type
    return bool(found.equals(wanted))
