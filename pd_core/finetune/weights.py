"""The stage `weights/`: which real images may be drawn, and how often each in proportion (arXiv 2407.08659, Algorithm
3).

Listed images meet the index's densities by sample_id, the hash of their key. Where they are the index's own, a part of
the listing meets the part of the same name; those of another source meet the whole index, sorted by id, in the object
store.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from pd_core.core import artifacts, files, schemas
from pd_core.core.errors import UserError
from pd_core.core.settings.data import DataSettings
from pd_core.core.settings.finetune import FinetuneSettings
from pd_core.core.settings.generate import WeightingSettings
from pd_core.density import originals
from pd_core.density import weighting as density_weighting
from pd_core.density.realset import RealSet
from pd_core.density.weighting import EVERYTHING, Weighting
from pd_core.engine import resources, runs, tasks
from pd_core.images import sources
from pd_core.images.listing import Listing, read_artifact
from pd_core.images.listing import start as start_listing

KINDS = ("two_level", "quantiles", "none")  # of weightings that need no generated samples
NAMED = 3  # images that a message names


@dataclass(frozen=True)
class Pictures:
    """The real images to train on; small and picklable.

    Attributes:
        source: where they are. listing: which there are.
        own: the index was made from this very listing, part by part.
    """

    source: sources.Source
    listing: Listing
    own: bool


@dataclass(frozen=True)
class Drawable:
    """The finished stage, as the stream of batches needs it; small but for two numbers a part, picklable.

    Attributes:
        uri: of the stage. fingerprint: of it. pictures: the images.
        rows: of each part, by its number. part_weights: their sums of weights, to the bit as `total` adds them.
        seed: of the run.
    """

    uri: str
    fingerprint: str
    pictures: Pictures
    rows: tuple[int, ...]
    part_weights: tuple[float, ...]
    seed: int


def open_pictures(run: runs.Run, real: RealSet, data: DataSettings) -> Pictures:
    """Those of `--data.source`, listed under the run's output, or without it those that the index was made from.

    Raises:
        UserError: there are none, or the index's have changed.
    """
    folder = files.join(real.uri, "listing")
    with files.explained(folder):
        of_index = artifacts.load_artifact(folder)
    assert of_index is not None, "the features of an index are made from its listing"
    if data.source is None:
        source, listed = originals.unchanged_original_of(real.uri, option="--data.source")
        settings = source.settings.model_copy(update={"max_bad_fraction": data.max_bad_fraction})  # of this run
        return Pictures(replace(source, settings=settings), listed, own=True)
    source = sources.open_source(data)
    part_rows = read_artifact(folder, of_index).part_rows  # so that the same source has the same parts
    uri = files.join(run.output, "listing")
    with run.tracker.stage(run.name_of(uri)) as nested, runs.failures("listing", uri):
        listed, artifact = tasks.get(start_listing(source, run.output, part_rows, run.settings.overwrite))
        run.done(uri, artifact, nested)
    return Pictures(source, listed, own=listed.fingerprint == of_index.fingerprint)


# ---- weightings ------------------------------------------------------------------------------------------------------


def check_settings(settings: WeightingSettings, labels: str) -> None:
    """Refuse what needs no real set to be refused. labels: `data.labels`, or another word where labels are there
    anyway.

    Raises:
        UserError: as `weighting.check`, or a weighting of generated samples.
    """
    if settings.kind not in KINDS:
        raise UserError(
            f"--weighting.kind {settings.kind}: weighs what a generator makes, not real images; fine-tuning takes "
            f"{', '.join(KINDS)}"
        )
    density_weighting.check(settings, labels)


def weightings_of(settings: WeightingSettings, real: RealSet) -> dict[str, Weighting]:
    """ω for all real images, under EVERYTHING, or with `per_label` for each label of the index that has enough of them.

    Raises:
        UserError: as `check_settings` and `weighting.resolve`; no label has enough images.
    """
    check_settings(settings, "labels")
    if not settings.per_label:
        return {EVERYTHING: density_weighting.resolve(settings, real.density_quantiles)}
    by_label = tasks.get(tasks.task(density_weighting.label_quantiles).remote(real.uri))
    if not by_label:
        raise UserError(
            f"--weighting.per_label: no label of --index {real.uri} has {density_weighting.FEWEST_OF_LABEL} images; "
            "run build_index.py with --data.labels, or leave it out"
        )
    return density_weighting.resolve_labels(settings, dict(sorted(by_label.items())))


# ---- the stage -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """What every task of the stage needs to know; small and picklable.

    Attributes:
        real: the index. densities: names of its parts that have any.
        pictures: the images. weightings: ω, of all or by label.
        classes: labels that the model knows; None: it takes none.
        size: (height, width) of the model's images, px. resize: crop or none.
        stage: weights/.
    """

    real: RealSet
    densities: frozenset[str]
    pictures: Pictures
    weightings: Mapping[str, Weighting]
    classes: frozenset[str] | None
    size: tuple[int, int]
    resize: str
    stage: artifacts.Stage


def work_of(
    run: runs.Run, settings: FinetuneSettings, real: RealSet, mapping: Mapping[str, int], size: tuple[int, int]
) -> Work:
    """The stage under the output of a run, begun by nobody yet; the listing of a source of its own is made.

    Args:
        mapping: class number of each label; empty for a model that takes none.
        size: (height, width) of the model's images, px.

    Raises:
        UserError: as `open_pictures` and `weightings_of`.
    """
    pictures = open_pictures(run, real, settings.data)
    weightings = weightings_of(settings.weighting, real)
    identity = {
        "listing": pictures.listing.fingerprint,
        "realset": {name: real.fingerprints[name] for name in ("features", "densities")},
        "weightings": {label or "all": weighting.to_json() for label, weighting in weightings.items()},
        "classes": sorted(mapping) or None,
        "size": list(size),
        "resize": settings.training.resize,
    }
    return Work(
        real=real,
        densities=frozenset(part.name for part in _densities(real).parts if part.rows),
        pictures=pictures,
        weightings=weightings,
        classes=frozenset(mapping) or None,
        size=size,
        resize=settings.training.resize,
        stage=artifacts.Stage(files.join(run.output, "weights"), "weights", schemas.VERSIONS["weights"], identity),
    )


def _densities(real: RealSet) -> artifacts.Artifact:
    artifact = artifacts.load_artifact(files.join(real.uri, "densities"))
    assert artifact is not None, "open_realset refuses an index without densities"
    return artifact


def run(work: Work) -> tuple[list[artifacts.Part], dict[str, Any]]:
    """Make the missing parts; returns all parts and the totals to commit.

    Raises:
        UserError: more images of a source other than the index's have no density than `data.max_bad_fraction` allows;
            labels that the model or the weighting does not know; with resize `none` images of another size; all weights
            are 0.
    """
    import ray

    known = None if work.pictures.own else tasks.task(_known).remote(work.real.uri, sorted(work.densities))
    weigh, add_up = (tasks.task(function, resources.IO_CPUS) for function in (_weigh_part, _add_up_part))
    names = [artifacts.part_name(number) for number in range(work.pictures.listing.parts)]
    sums: dict[str, np.ndarray] = {}  # of each part, see `_sums`
    shared = ray.put(work)  # once: it names every part
    parts = tasks.make_missing(
        work.stage, [[name] for name in names], lambda n: weigh.remote(shared, n[0], known), heard=sums.update
    )
    made_before = [name for name in names if name not in sums]
    sums |= tasks.bounded(lambda name: add_up.remote(shared, name), made_before, tasks.in_flight)
    _check(work, parts, known)
    return parts, _totals(work, parts, np.array([sums[name] for name in names]))


def _totals(work: Work, parts: Sequence[artifacts.Part], sums: np.ndarray) -> dict[str, Any]:
    """sums: float64 [parts, 3] of `_sums`."""
    weight, squares, above = (math.fsum(column) for column in sums.T)
    if not weight:
        raise UserError("weighting: the weight of every image is 0; give one above 0 to densities that there are")
    rows = sum(part.rows for part in parts)
    return {
        "listed": work.pictures.listing.rows,
        "rows": rows,
        "zero": _count(parts, "zero"),
        "without_density": _count(parts, "without_density"),
        "absent": work.real.rows - rows,
        "enlarged": _count(parts, "enlarged"),
        "part_weights": sums[:, 0].tolist(),
        "weight": weight,
        "effective_sample_size": weight * weight / squares,
        "share_above": above / weight if any(math.isfinite(_threshold(w)) for w in work.weightings.values()) else None,
    }


def opened(work: Work, artifact: artifacts.Artifact, seed: int) -> Drawable:
    """What a finished stage says to the stream."""
    rows = tuple(part.rows for part in artifact.parts)
    sums = tuple(artifact.totals["part_weights"])
    return Drawable(work.stage.uri, artifact.fingerprint, work.pictures, rows, sums, seed)


def summary(work: Work, artifact: artifacts.Artifact) -> list[str]:
    """What the user is told of the weights, a line each."""
    totals = artifact.totals
    lines = [
        f"weights: {totals['rows']} images, worth {totals['effective_sample_size']:.0f} of equal weight; "
        f"{totals['zero']} have weight 0"
    ]
    if totals["share_above"] is not None:
        lines.append(f"weights: {totals['share_above']:.1%} of the draws are above the threshold")
    if totals["without_density"]:
        lines.append(
            f"weights: {totals['without_density']} of {totals['listed']} listed images have no density and are not "
            "drawn"
        )
    if totals["absent"]:
        lines.append(f"weights: {totals['absent']} images of the index are not among the images to train on")
    if totals["enlarged"]:
        height, width = work.size
        lines.append(
            f"weights: {totals['enlarged']} images are smaller than the model's {width}x{height} px and are enlarged"
        )
    return lines


def _count(parts: Sequence[artifacts.Part], what: str) -> int:
    return sum(part.counts.get(what, 0) for part in parts)


# ---- what is refused -------------------------------------------------------------------------------------------------


def _check(work: Work, parts: Sequence[artifacts.Part], known: Any) -> None:
    listed, max_bad_fraction = work.pictures.listing.rows, work.pictures.source.settings.max_bad_fraction
    rows, without = sum(part.rows for part in parts), _count(parts, "without_density")
    if not rows or (not work.pictures.own and without > max_bad_fraction * listed):
        raise UserError(
            f"data: {without} of {listed} images of --data.source have no density in --index {work.real.uri} (first: "
            f"{_first(work, parts, 'without_density', known)}); name the source that the index was made from, "
            "or run build_index.py on this one and name its output by --index"
            f"{', or raise --data.max_bad_fraction' if rows else ''}"
        )
    height, width = work.size
    if work.resize == "none" and (many := _count(parts, "other_size")):
        raise UserError(
            f"--training.resize none: {many} of {rows} images are not of the model's {width}x{height} px (first: "
            f"{_first(work, parts, 'other_size', known)}); resize them, or set --training.resize crop"
        )
    if many := _count(parts, "unknown_class"):
        assert work.classes is not None
        raise UserError(
            f"data.labels: {many} of {rows} images have no label that the model knows (first: "
            f"{_first(work, parts, 'unknown_class', known)}); it knows {', '.join(sorted(work.classes)[:10])}; set "
            "--data.labels or the generator's --generator.label_names"
        )
    if many := _count(parts, "unknown_label"):
        raise UserError(
            f"--weighting.per_label: {many} of {rows} images have no label, or one of which the index holds fewer than "
            f"{density_weighting.FEWEST_OF_LABEL} images (first: {_first(work, parts, 'unknown_label', known)}); "
            "leave it out, or set --data.labels"
        )


def _first(work: Work, parts: Sequence[artifacts.Part], what: str, known: Any) -> str:
    """The first images of a kind that parts have counted, by key and, where that is at fault, label."""
    name = next(part.name for part in parts if part.counts.get(what))
    return tasks.get(tasks.task(_name_some, resources.IO_CPUS).remote(work, name, what, known))


def _name_some(work: Work, name: str, what: str, known: pa.Table | None) -> str:
    listed, found, joined = _join(work, name, known)
    rows = listed if what == "without_density" else joined
    chosen = rows.filter(pa.array(_kinds(work, found, joined)[what])).slice(0, NAMED)
    if what in ("unknown_class", "unknown_label"):
        pairs = zip(chosen["key"].to_pylist(), chosen["label"].to_pylist(), strict=True)
        return ", ".join(f"{key!r} has {label!r}" if label is not None else f"{key!r} has none" for key, label in pairs)
    return ", ".join(map(repr, chosen["key"].to_pylist()))


# ---- one part --------------------------------------------------------------------------------------------------------


def _known(uri: str, names: Sequence[str]) -> pa.Table:
    """Densities and image sizes (int32, px) of parts of the index, by ascending sample_id; 24 bytes a row. Of all parts
    it is a Ray task, so that its result is in the object store once, whoever reads it.
    """
    tables = []
    for name in names:
        densities = files.read_table(files.join(uri, "densities", name), ["sample_id", "density"])
        features = files.read_table(files.join(uri, "features", name), ["sample_id", "width", "height"])
        assert densities["sample_id"].equals(features["sample_id"]), name
        sizes = {side: features[side] for side in ("width", "height")}
        tables.append(pa.table({"sample_id": densities["sample_id"], "density": densities["density"], **sizes}))
    return pa.concat_tables(tables).sort_by("sample_id").combine_chunks()


def _join(work: Work, name: str, known: pa.Table | None) -> tuple[pa.Table, np.ndarray, pa.Table]:
    """A part of the listing: sample_id, key and label of all its rows; which of them have a density, bool; and these
    rows, with their `row` and what the index knows of them.
    """
    listed = files.read_table(files.join(work.pictures.listing.uri, name), ["sample_id", "key", "label"])
    if known is None:
        if name in work.densities:
            known = _known(work.real.uri, [name])
        else:  # a part without one usable image
            known = pa.table({column: pa.array([], kind) for column, kind in _KNOWN.items()})
    columns = {column: known[column].to_numpy() for column in _KNOWN}
    wanted = listed["sample_id"].to_numpy()
    places = np.searchsorted(columns["sample_id"], wanted)
    found = places < known.num_rows
    found[found] = columns["sample_id"][places[found]] == wanted[found]
    joined = listed.filter(pa.array(found)).append_column("row", pa.array(np.flatnonzero(found).astype(np.int32)))
    for column in ("density", "width", "height"):
        joined = joined.append_column(column, pa.array(columns[column][places[found]]))
    return listed, found, joined


_KNOWN = {"sample_id": pa.int64(), "density": pa.float64(), "width": pa.int32(), "height": pa.int32()}


def _kinds(work: Work, found: np.ndarray, joined: pa.Table) -> dict[str, np.ndarray]:
    """What is counted of a part: bool over its listed rows for `without_density`, over those with a density for the
    others.
    """
    labels, (height, width) = joined["label"].to_pylist(), work.size
    weight, classes = _weights_of(work, joined), work.classes
    heights, widths = joined["height"].to_numpy(), joined["width"].to_numpy()
    return {
        "without_density": ~found,
        "zero": weight == 0,
        "other_size": (heights != height) | (widths != width),
        "enlarged": np.minimum(heights / height, widths / width) < 1,
        "unknown_class": np.array([classes is not None and label not in classes for label in labels], dtype=bool),
        "unknown_label": np.isnan(weight),
    }


def _weights_of(work: Work, joined: pa.Table) -> np.ndarray:
    """ω of images, float64 [n]; NaN where their label has no weighting."""
    density = joined["density"].to_numpy()
    if EVERYTHING in work.weightings:
        return density_weighting.weight_of(density, work.weightings[EVERYTHING])
    labels, found = np.array(joined["label"].to_pylist(), dtype=object), np.full(len(density), np.nan)
    for label, weighting in work.weightings.items():
        own = labels == label
        found[own] = density_weighting.weight_of(density[own], weighting)
    return found


def _weigh_part(work: Work, name: str, known: pa.Table | None) -> dict[str, np.ndarray]:
    """Write a part; the sums of its weights by its name, see `_sums`."""
    _, found, joined = _join(work, name, known)
    kinds = _kinds(work, found, joined)
    weight = np.where(kinds["unknown_label"], 0.0, _weights_of(work, joined))
    schema, columns = schemas.weights(), joined.append_column("weight", pa.array(weight))
    table = pa.table([columns[column] for column in schema.names], schema=schema)
    work.stage.write_table(name, table, {kind: int(rows.sum()) for kind, rows in kinds.items() if rows.any()})
    return {name: _sums(table, work.weightings)}


def _add_up_part(work: Work, name: str) -> np.ndarray:
    """The sums of a part that an earlier run has made."""
    return _sums(files.read_table(files.join(work.stage.uri, name), ["label", "density", "weight"]), work.weightings)


def _sums(table: pa.Table, weightings: Mapping[str, Weighting]) -> np.ndarray:
    """Σω, Σω², and Σω where the density is above the threshold, of a part; float64 [3]."""
    density, weight = table["density"].to_numpy(), table["weight"].to_numpy()
    thresholds = {label: _threshold(weighting) for label, weighting in weightings.items()}
    if EVERYTHING in thresholds:
        threshold = np.full(len(density), thresholds[EVERYTHING])
    else:
        threshold = np.array([thresholds.get(label, math.inf) for label in table["label"].to_pylist()])
    return np.array([total(weight), total(np.square(weight)), total(np.where(density > threshold, weight, 0.0))])


def _threshold(weighting: Weighting) -> float:
    """τ of two levels; of other weightings nothing is above it."""
    return weighting.edges[0] if len(weighting.edges) == 1 else math.inf


def total(weights: np.ndarray) -> float:
    """The sum of float64 [n], added one by one in their order: the last of the cumulative sum, to the bit."""
    return float(np.cumsum(weights)[-1]) if len(weights) else 0.0
