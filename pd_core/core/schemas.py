"""Arrow schema of every table that is written, with its version.

Schemas are stated, never inferred from rows. A change that readers can notice raises the version of that table.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping

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
IMAGE = pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())])

# What a column of this name holds, in every table that has it; distances of `scores` alone are float64.
_NAMES_OF = {
    pa.int64(): "sample_id offset size version seed nearest_real_id n n_real n_generated candidates number step "
    "generation",
    pa.int32(): "width height row k k_precision k_coverage",
    pa.float32(): "nearest_real_distance",
    pa.bool_(): "likely_copy confirmed selected_here in_real_manifold",
    pa.string(): "key container content_hash image_hash label prompt reason detail direction "
    "set space extractor metric setting curve method threshold name",
    IMAGE: "image image_before",
}
_TYPE_OF = {name: kind for kind, names in _NAMES_OF.items() for name in names.split()}  # all others: float64


def _columns(names: str, metadata: pa.StructType | None = None, **others: pa.DataType) -> list[pa.Field]:
    """The columns of these names, in order; of `label?` a value may be null.

    Args:
        names: with blanks between them.
        metadata: type of one more column, METADATA.
        others: types that are not those of `_TYPE_OF`.
    """
    kinds = _TYPE_OF | others
    fields = [pa.field(n.rstrip("?"), kinds.get(n.rstrip("?"), pa.float64()), n.endswith("?")) for n in names.split()]
    return fields if metadata is None else [*fields, pa.field(METADATA, metadata)]


def _list(kind: pa.DataType, length: int = -1) -> pa.DataType:
    return pa.list_(pa.field("item", kind, nullable=False), length)


def listing(metadata: pa.StructType | None = None) -> pa.Schema:
    """One row per image of the source, in the order that fixes parts and batches.

    `container` is the file that holds the image (the image file itself in a directory), relative to the source's
    root; `offset` and `size` locate it inside: byte range in a tar, (row, -1) in a Parquet file, (0, file size)
    otherwise. `version` changes when that file does.
    """
    return pa.schema(_columns("sample_id key container offset size version label?", metadata))


def features(dim: int, metadata: pa.StructType | None = None) -> pa.Schema:
    """One row per image that has a feature, float32 [dim]; `width` and `height` in px after EXIF orientation."""
    names = "sample_id key content_hash width height label? feature"
    return pa.schema(_columns(names, metadata, feature=_list(pa.float32(), dim)))


def quarantine() -> pa.Schema:
    """One row per image without a feature; `reason` is one of images.Reason."""
    return pa.schema(_columns("sample_id key reason detail"))


def _neighbor_lists(k: int) -> dict[str, pa.DataType]:
    return {"neighbor_ids": _list(pa.int64(), k), "neighbor_distances": _list(pa.float32(), k)}


def neighbors(k: int) -> pa.Schema:
    """Neighbors of every row, in the order of the features part; distances Euclidean, ascending."""
    return pa.schema(_columns("sample_id neighbor_ids neighbor_distances", **_neighbor_lists(k)))


def densities(k: int, metadata: pa.StructType | None = None) -> pa.Schema:
    """Pseudo density of every image; distances Euclidean (not squared), percentile in [0, 100] of the real set."""
    names = "sample_id key label? mean_knn_distance log_density density percentile neighbor_ids neighbor_distances"
    return pa.schema(_columns(names, metadata, **_neighbor_lists(k)))


def samples() -> pa.Schema:
    """One row per accepted image; `image` is a PNG in the form that `datasets` and Ray Data read as an image.

    `sample_id` is the candidate's running number. `density` is the one that decided, unless `log_volume` is there,
    which then did (docs/method.md, section 6); `percentile` is the density's place among the real set's in [0, 100];
    `acceptance_probability` is a of docs/method.md, section 4, so that weights 1/a undo the selection; distances are
    Euclidean in the index's feature space; `image_hash` is the SHA-256 of height, width and RGB pixels.
    """
    return _with_images(
        "sample_id seed density density_predicted? density_index? percentile log_volume? acceptance_probability label? "
        "prompt? nearest_real_id nearest_real_distance likely_copy image_hash image?"
    )


def perturbed() -> pa.Schema:
    """One row per perturbed image, `image`, beside the one it was made from, `image_before`; both PNG.

    Densities are those of the images as they are saved, by the predictor and by the index; percentiles are of the
    latter among the real set's, in [0, 100]; `confirmed`: the index-scored one moved in the direction that was asked
    for. Distances are Euclidean in the index's feature space, `feature_distance` between the two images;
    `latent_distance_max` is the largest change of any element of the latent. Copies and `image_hash` are of `image`.
    """
    return _with_images(
        "sample_id seed direction label? prompt? density_predicted_before density_predicted_after density_index_before "
        "density_index_after percentile_before percentile_after latent_distance_max feature_distance confirmed "
        "nearest_real_id nearest_real_distance likely_copy image_hash image? image_before?"
    )


def _with_images(names: str) -> pa.Schema:
    """With what the `datasets` package keeps of a table in its Parquet files, so that it opens pictures as such. No
    picture is null; `datasets` knows them by a type that may be.
    """
    fields = _columns(names)
    dtypes = {"double": "float64", "float": "float32"}
    told = {
        f.name: {"_type": "Image"}
        if f.type == IMAGE
        else {"dtype": dtypes.get(str(f.type), str(f.type)), "_type": "Value"}
        for f in fields
    }
    return pa.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": told}})})


def rejected() -> pa.Schema:
    """One row per rejected candidate: density, log-volume where that decided, and acceptance probability."""
    return pa.schema(_columns("sample_id seed density log_volume? acceptance_probability"))


def metrics() -> pa.Schema:
    """One row per number (docs/method.md, section 7); low, high: its 95% interval, null where there are too few images.

    `selected_here`: the set was selected by densities in this very space, so that its numbers flatter it.
    """
    names = "set space extractor selected_here label? metric value low? high? k? n_real n_generated"
    return pa.schema(_columns(names))


def scores() -> pa.Schema:
    """One row per measured image of a set, against all measured real images; distances Euclidean in the space.

    `realism` is null for an exact copy of a real image, where it has no bound; `rarity` outside the real manifold.
    """
    names = "set space sample_id key label? realism? rarity? in_real_manifold nearest_real_id nearest_real_distance"
    return pa.schema(_columns(names, nearest_real_distance=pa.float64()))


def curve() -> pa.Schema:
    """One row per setting and space; metrics are null where the pool did not give n images.

    `candidates` were looked at for them, `acceptance_rate` is over the whole pool, and `effective_sample_size` says
    how many equally weighted candidates of the pool the setting's weights are worth; `exact_effective_size`: likewise
    of exp(polarity · v) without the steps that bound it, null for other methods. `NAME_low`, `NAME_high`: 95% interval
    of NAME.
    """
    names = (
        "space extractor setting curve method threshold? weight? polarity? truncation? n n_real k_precision k_coverage "
        "candidates acceptance_rate effective_sample_size exact_effective_size?"
    )
    measured = " ".join(f"{name}? {name}_low? {name}_high?" for name in CURVE_METRICS)
    return pa.schema(_columns(f"{names} {measured}"))


def weights() -> pa.Schema:
    """One row per image that fine-tuning may draw, in the order of the listing part of the same name.

    `row` is the image's place in that part; `weight` is ω(ρ) of `density`, and of the label where weightings are per
    label; images of weight 0 are there and are never drawn.
    """
    return pa.schema(_columns("sample_id key row label? density weight"))


def finetuned_samples() -> pa.Schema:
    """One row per shown image of one state of a generator; `number` counts the images of an evaluation, from 0.

    The same numbers have the same seeds, and the same labels, in every state. `density_predicted`: of the image as it
    is saved.
    """
    return pa.schema(_columns("number seed label? density_predicted image?"))


def evaluations() -> pa.Schema:
    """One row per number of an evaluation while training, as `metrics`; step 0 is the generator as it came."""
    return pa.schema(_columns("step metric value low? high? n_real n_generated k?"))


def history() -> pa.Schema:
    """One row per number that a step logged."""
    return pa.schema(_columns("step name value"))


def candidates() -> pa.Schema:
    """One row per combination of checkpoints that was tried; `value` of the metric is null where its images had none.

    `coefficients` add up to 1, in the order of the checkpoints' steps.
    """
    return pa.schema(_columns("number generation coefficients value?", coefficients=_list(pa.float64())))


# ---- reading ---------------------------------------------------------------------------------------------------------


@functools.cache
def known() -> Mapping[str, frozenset[pa.DataType]]:
    """Every column of the tables above by its name, with its types; those of `metadata` are the source's own."""
    fields = [*listing(), *features(1), *quarantine(), *neighbors(1), *densities(1), *samples(), *perturbed()]
    fields += [*rejected(), *metrics(), *scores(), *curve(), *weights(), *finetuned_samples(), *evaluations()]
    fields += [*history(), *candidates()]
    found: dict[str, frozenset[pa.DataType]] = {}
    for field in fields:
        found[field.name] = found.get(field.name, frozenset()) | {field.type}
    return found


def is_like(found: pa.DataType, wanted: pa.DataType) -> bool:
    """Whether a type is the wanted one, whatever the length of its lists, which is k or D."""
    if pa.types.is_fixed_size_list(wanted) or pa.types.is_list(wanted):
        return found.id == wanted.id and found.value_type == wanted.value_type
    return bool(found.equals(wanted))
