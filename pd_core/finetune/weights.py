"""The stage `weights/`: which real images may be drawn, and how often each in proportion (arXiv 2407.08659, Algorithm 3).

Listed images meet the index's densities by sample_id, the hash of their key. Where they are the index's own, a part of the
listing meets the part of the same name; those of another source meet the whole index, sorted by id, in the object store.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from pd_core.core import artifacts, files, schemas
from pd_core.core.errors import RunError, UserError
from pd_core.core.settings.data import DataSettings
from pd_core.core.settings.generate import WeightingSettings
from pd_core.density import originals
from pd_core.density import weighting as density_weighting
from pd_core.density.realset import RealSet
from pd_core.density.weighting import EVERYTHING, Weighting
from pd_core.engine import console, resources, runs, tasks
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
    """Refuse what needs no real set to be refused. labels: `data.labels`, or another word where labels are there anyway.

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
            f"--weighting.per_label: no label of --index {real.uri} has {density_weighting.FEWEST_OF_LABEL} images; run build_index.py "
            "with --data.labels, or leave it out"
        )
    return density_weighting.resolve_labels(settings, dict(sorted(by_label.items())))


def weights_of(density: np.ndarray, labels: np.ndarray, weightings: Mapping[str, Weighting]) -> np.ndarray:
    """ω of images, float64 [n]; NaN where their label has no weighting. labels: texts or None, object [n]."""
    if EVERYTHING in weightings:
        return density_weighting.weight_of(density, weightings[EVERYTHING])
    found = np.full(len(density), np.nan)
    for label, weighting in weightings.items():
        own = labels == label
        found[own] = density_weighting.weight_of(density[own], weighting)
    return found


# ---- the stage -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """What every task of the stage needs to know; small and picklable.

    Attributes:
        real_uri: the index. densities: names of its parts that have any.
        pictures: the images. weightings: ω, of all or by label.
        classes: labels that the model knows; None: it takes none.
        size: (height, width) of the model's images, px. resize: crop or none.
        stage: weights/.
    """

    real_uri: str
    densities: frozenset[str]
    pictures: Pictures
    weightings: Mapping[str, Weighting]
    classes: frozenset[str] | None
    size: tuple[int, int]
    resize: str
    stage: artifacts.Stage


def work_of(
    output: str,
    real: RealSet,
    pictures: Pictures,
    weightings: Mapping[str, Weighting],
    mapping: Mapping[str, int] | None,
    size: tuple[int, int],
    resize: str,
) -> Work:
    """The stage under an output, begun by nobody yet.

    Args:
        mapping: class number of each label, of a model that takes classes.
        size: (height, width) of the model's images, px.
        resize: `training.resize`.
    """
    densities = artifacts.load_artifact(files.join(real.uri, "densities"))
    assert densities is not None, "open_realset refuses an index without densities"
    identity = {
        "listing": pictures.listing.fingerprint,
        "realset": {name: real.fingerprints[name] for name in ("features", "densities")},
        "weightings": {label or "all": weighting.to_json() for label, weighting in weightings.items()},
        "classes": None if mapping is None else sorted(mapping),
        "size": list(size),
        "resize": resize,
    }
    stage = artifacts.Stage(files.join(output, "weights"), "weights", schemas.VERSIONS["weights"], identity)
    return Work(
        real_uri=real.uri,
        densities=frozenset(part.name for part in densities.parts if part.rows),
        pictures=pictures,
        weightings=weightings,
        classes=None if mapping is None else frozenset(mapping),
        size=size,
        resize=resize,
        stage=stage,
    )


def run(work: Work, real: RealSet, max_bad_fraction: float) -> tuple[list[artifacts.Part], dict[str, Any]]:
    """Make the missing parts; returns all parts and the totals to commit.

    max_bad_fraction: share of the images of a source other than the index's that may have no density.

    Raises:
        UserError: more have none; labels that the model or the weighting does not know; with resize `none` images of another
            size; all weights are 0.
    """
    listing = work.pictures.listing
    known = None if work.pictures.own else tasks.task(_known_all).remote(work.real_uri, sorted(work.densities))
    sums: dict[int, np.ndarray] = {}
    done = work.stage.finished_parts()
    weigh = tasks.task(_weigh_part, resources.IO_CPUS)
    submit = lambda number: weigh.remote(work, number, artifacts.part_name(number) in done, known)  # noqa: E731
    with console.progress("weights", listing.rows, "images") as bar:
        for number, found in tasks.bounded(submit, range(listing.parts), tasks.in_flight):
            sums[number] = found
            bar.update(listing.rows_of(number))
    finished = work.stage.finished_parts()
    if absent := listing.parts - len(finished):
        raise RunError(f"weights: {absent} of {listing.parts} parts are missing; run the same command again")
    parts = [finished[artifacts.part_name(number)] for number in range(listing.parts)]
    _check(work, parts, max_bad_fraction, known)
    table = np.array([sums[number] for number in range(listing.parts)])
    return parts, _totals(work, real, parts, table)


def _totals(work: Work, real: RealSet, parts: Sequence[artifacts.Part], sums: np.ndarray) -> dict[str, Any]:
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
        "absent": real.rows - rows,
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
            f"weights: {totals['without_density']} of {totals['listed']} listed images have no density and are not drawn"
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


def _check(work: Work, parts: Sequence[artifacts.Part], max_bad_fraction: float, known: Any) -> None:
    listed, index = work.pictures.listing.rows, work.real_uri
    rows, without = sum(part.rows for part in parts), _count(parts, "without_density")
    if not rows or (not work.pictures.own and without > max_bad_fraction * listed):
        raise UserError(
            f"data: {without} of {listed} images of --data.source have no density in --index {index} (first: "
            f"{_first(work, parts, 'without_density', known)}); name the source that the index was made from, "
            f"or run build_index.py on this one and name its output by --index{', or raise --data.max_bad_fraction' if rows else ''}"
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
            f"{_first(work, parts, 'unknown_class', known)}); it knows {', '.join(sorted(work.classes)[:10])}; set --data.labels "
            "or the generator's --generator.label_names"
        )
    if many := _count(parts, "unknown_label"):
        raise UserError(
            f"--weighting.per_label: {many} of {rows} images have no label, or one of which the index holds fewer than "
            f"{density_weighting.FEWEST_OF_LABEL} images (first: {_first(work, parts, 'unknown_label', known)}); leave it out, or set "
            "--data.labels"
        )


def _first(work: Work, parts: Sequence[artifacts.Part], what: str, known: Any) -> str:
    """The first images of a kind that parts have counted, by key and, where that is at fault, label."""
    number = next(i for i, part in enumerate(parts) if part.counts.get(what))
    return tasks.get(tasks.task(_name_some, resources.IO_CPUS).remote(work, number, what, known))


def _name_some(work: Work, number: int, what: str, known: _Known | None) -> str:
    joined = _join(work, number, known)
    rows = joined.listed.filter(pa.array(joined.found)) if what != "without_density" else joined.listed
    chosen = rows.filter(pa.array(_kinds(work, joined)[what])).slice(0, NAMED)
    if what in ("unknown_class", "unknown_label"):
        pairs = zip(chosen["key"].to_pylist(), chosen["label"].to_pylist(), strict=True)
        return ", ".join(f"{key!r} has {label!r}" if label is not None else f"{key!r} has none" for key, label in pairs)
    return ", ".join(map(repr, chosen["key"].to_pylist()))


# ---- one part --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Known:
    """Densities and image sizes of the index by sample_id, ascending; 24 bytes a row.

    Attributes:
        sample_id: int64 [n]. density: float64 [n]. width, height: int32 [n], px.
    """

    sample_id: np.ndarray
    density: np.ndarray
    width: np.ndarray
    height: np.ndarray


@dataclass(frozen=True)
class _Joined:
    """A part of the listing with what the index knows of it.

    Attributes:
        listed: sample_id, key and label of all its rows, [n].
        found: bool [n], rows that have a density.
        density, width, height: of those rows.
    """

    listed: pa.Table
    found: np.ndarray
    density: np.ndarray
    width: np.ndarray
    height: np.ndarray

    @property
    def labels(self) -> np.ndarray:
        """Of the rows that have a density, object."""
        return np.array(self.listed["label"].to_pylist(), dtype=object)[self.found]


def _known_part(uri: str, name: str) -> _Known:
    """In the part's order."""
    densities = files.read_table(files.join(uri, "densities", name), ["sample_id", "density"])
    features = files.read_table(files.join(uri, "features", name), ["sample_id", "width", "height"])
    assert densities["sample_id"].equals(features["sample_id"]), name
    return _Known(*(column.to_numpy() for column in (*densities.columns, features["width"], features["height"])))


def _known_all(uri: str, names: Sequence[str]) -> _Known:
    """Of the whole index; a Ray task, so that its result is in the object store once, whoever reads it."""
    parts = [_known_part(uri, name) for name in names]
    columns = [np.concatenate([getattr(part, name) for part in parts]) for name in _Known.__dataclass_fields__]
    order = np.argsort(columns[0], kind="stable")
    return _Known(*(column[order] for column in columns))


def _join(work: Work, number: int, known: _Known | None) -> _Joined:
    name = artifacts.part_name(number)
    listed = files.read_table(files.join(work.pictures.listing.uri, name), ["sample_id", "key", "label"])
    if known is None:
        # a part without one usable image has no densities
        names = [name] if name in work.densities else []
        known = _known_all(work.real_uri, names) if names else _Known(*(np.empty(0, t) for t in "qdii"))
    wanted = listed["sample_id"].to_numpy()
    places = np.searchsorted(known.sample_id, wanted)
    found = places < len(known.sample_id)
    found[found] = known.sample_id[places[found]] == wanted[found]
    chosen = places[found]
    return _Joined(listed, found, known.density[chosen], known.width[chosen], known.height[chosen])


def _kinds(work: Work, joined: _Joined) -> dict[str, np.ndarray]:
    """What is counted of a part: bool over its listed rows for `without_density`, over those with a density for the others."""
    labels, (height, width) = joined.labels, work.size
    weight = weights_of(joined.density, labels, work.weightings)
    other = (joined.height != height) | (joined.width != width)
    small = np.minimum(joined.height / height, joined.width / width) < 1
    classes = work.classes
    strange = np.array([classes is not None and label not in classes for label in labels], dtype=bool)
    return {
        "without_density": ~joined.found,
        "zero": weight == 0,
        "other_size": other,
        "enlarged": small,
        "unknown_class": strange,
        "unknown_label": np.isnan(weight),
    }


def _weigh_part(work: Work, number: int, done: bool, known: _Known | None) -> np.ndarray:
    """Write a part, unless that is done; the sums of its weights, see `_sums`."""
    name = artifacts.part_name(number)
    uri = files.join(work.stage.uri, name)
    if done:
        return _sums(files.read_table(uri, ["label", "density", "weight"]), work.weightings)
    joined = _join(work, number, known)
    kinds = _kinds(work, joined)
    weight = weights_of(joined.density, joined.labels, work.weightings)
    columns = {
        **{column: joined.listed[column].filter(pa.array(joined.found)) for column in joined.listed.column_names},
        "row": pa.array(np.flatnonzero(joined.found).astype(np.int32)),
        "density": pa.array(joined.density),
        "weight": pa.array(np.where(kinds["unknown_label"], 0.0, weight)),
    }
    schema = schemas.weights()
    table = pa.table([columns[column] for column in schema.names], schema=schema)
    work.stage.write_table(name, table, {kind: int(rows.sum()) for kind, rows in kinds.items() if rows.any()})
    return _sums(table, work.weightings)


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
