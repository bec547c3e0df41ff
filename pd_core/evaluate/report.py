"""The report stage of evaluate: gather what its page shows from metrics/, scores/ and the images of the sets."""

from __future__ import annotations

import datetime
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pd_core.core import artifacts, files
from pd_core.core.errors import RunError, UserError
from pd_core.core.settings.evaluate import EvaluateSettings
from pd_core.core.settings.generate import GenerateSettings
from pd_core.core.settings.load import to_yaml
from pd_core.density.originals import original_of
from pd_core.density.realset import RealSet
from pd_core.engine import runs
from pd_core.evaluate import measure
from pd_core.evaluate import page as evaluate_page
from pd_core.evaluate.page import EvaluationData, Measured, Number, SpaceData, Tile
from pd_core.evaluate.spaces import INDEX, JUDGE, ImageSet, Space
from pd_core.images import child, decode, listing, sources
from pd_core.report import page


@dataclass(frozen=True)
class Inputs:
    """What the stage reads; picklable.

    Attributes:
        job: of the metrics. measured: its commit record.
        sets: those measured, in their order. spaces: those they were measured in. real: the real set.
    """

    job: measure.Job
    measured: artifacts.Artifact
    sets: Sequence[ImageSet]
    spaces: Sequence[Space]
    real: RealSet
    settings: EvaluateSettings
    timings_s: Mapping[str, float]


def stage_of(output: str, measuring: artifacts.Stage, settings: EvaluateSettings) -> artifacts.Stage:
    """The report stage under `output`."""
    identity = {"metrics": measuring.fingerprint, "images": settings.images}
    return runs.report_stage(output, identity)


def run(stage: artifacts.Stage, inputs: Inputs) -> runs.Made:
    """Make the page and its figures; returns the parts and totals to commit."""
    return runs.draw(stage, functools.partial(_draw, inputs))


def _draw(inputs: Inputs) -> runs.Drawn:
    data = gather(inputs)
    return runs.Drawn({**evaluate_page.figures(data), runs.REPORT: evaluate_page.render(data)})


def gather(inputs: Inputs) -> EvaluationData:
    """All that the page shows."""
    settings, job = inputs.settings, inputs.job
    rows = measure.read_metrics(job.metrics.uri, inputs.measured.parts)
    scores = {
        (c.set, c.space.name): files.read_table(files.join(job.scores.uri, artifacts.part_name(i)))
        for i, c in enumerate(job.comparisons)
    }
    tiles, note = _images(inputs, scores)
    return EvaluationData(
        title="Generated against real images",
        real=inputs.real.uri,
        output=str(settings.output),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        k_precision=settings.metrics.k_precision,
        k_coverage=settings.metrics.k_coverage,
        n=job.n,
        sizes={c.set: c.generated.rows for c in job.comparisons},
        spaces=[_space(space, inputs, rows, scores) for space in inputs.spaces],
        rows=tiles,
        pictures_note=note,
        timings_s=inputs.timings_s,
        versions=inputs.measured.versions,
        settings_yaml=to_yaml(settings),
    )


def _space(
    space: Space,
    inputs: Inputs,
    rows: Sequence[Mapping[str, Any]],
    scores: Mapping[tuple[str, str], pa.Table],
) -> SpaceData:
    own = [row for row in rows if row["space"] == space.name]
    preprocess = space.spec.preprocess
    return SpaceData(
        name=space.name,
        extractor=space.extractor,
        detail=f"{space.spec.feature_dim} features of images at {preprocess.height}x{preprocess.width} px, "
        f"{space.spec.precision}, weights {space.spec.weights_sha256[:12]}, {space.spec.library}.",
        is_judge=space.name == JUDGE,
        sets=[
            _measured(
                chosen, space, inputs, [r for r in own if r["set"] == chosen.name], scores[chosen.name, space.name]
            )
            for chosen in inputs.sets
        ],
    )


def _measured(
    chosen: ImageSet, space: Space, inputs: Inputs, rows: Sequence[Mapping[str, Any]], scores: pa.Table
) -> Measured:
    by_label: dict[str | None, dict[str, Number]] = {}
    for row in rows:
        by_label.setdefault(row["label"], {})[row["metric"]] = Number(row["value"], row["low"], row["high"])
    nearest = scores["nearest_real_distance"].to_numpy()
    quantile = (chosen.made or {}).get("copies_quantile", GenerateSettings.model_fields["copies_quantile"].default)
    near = inputs.real.copy_distance(quantile)
    everything = space.name == INDEX and rows[0]["n_real"] == inputs.real.rows  # else the nearest may not be there
    return Measured(
        name=chosen.name,
        uri=chosen.uri,
        asked=asked(chosen.made),
        selected_here=chosen.selected_in(space, inputs.real),
        n_real=rows[0]["n_real"],
        n_generated=rows[0]["n_generated"],
        numbers=by_label.pop(None),
        labels={label: numbers for label, numbers in by_label.items() if label is not None},
        label_sizes={row["label"]: (row["n_real"], row["n_generated"]) for row in rows if row["label"] is not None},
        nearest=tuple(np.quantile(nearest, [0.01, 0.5, 0.99]).tolist()),
        outside=float(1 - np.mean(scores["in_real_manifold"].to_numpy(zero_copy_only=False))),
        copies=float(np.mean(nearest <= near)) if everything else None,
    )


def asked(made: Mapping[str, Any] | None) -> str:
    """By what a set of generate.py or perturb.py was selected, in a few words; "" for any other set."""
    if made is None:
        return ""
    if "direction" in made:
        return f"perturbed {made['direction']}, epsilon {made['epsilon']:g}"
    weighting = made["weighting"]
    kind = str(weighting["kind"])
    texts = {
        "two_level": lambda: f"{weighting['threshold']}, w = {weighting['weight']:g}",
        "quantiles": lambda: f"weights {weighting['weights']}",
        "polarity": lambda: f"polarity {weighting['polarity']:g}",
        "none": lambda: "nothing",
    }
    return texts[kind]() if kind in texts else kind


# ---- images ----------------------------------------------------------------------------------------------------------


def _images(
    inputs: Inputs, scores: Mapping[tuple[str, str], pa.Table]
) -> tuple[list[tuple[str, list[tuple[str, list[Tile]]]]], str]:
    """For each set images of highest and lowest realism and of highest rarity, in the last space; and what is missing."""
    space, found, notes = inputs.spaces[-1], [], []
    for chosen in inputs.sets:
        table = scores[chosen.name, space.name]
        bands = _bands(table, inputs.settings.images)
        wanted = {table["sample_id"][row].as_py() for rows in bands.values() for row in rows}
        pictures, note = _pictures(chosen, inputs, wanted)
        notes += [f"{chosen.name}: {note}"] if note else []
        found.append(
            (chosen.name, [(name, [_tile(table, row, pictures) for row in rows]) for name, rows in bands.items()])
        )
    return found, "; ".join(notes)


def _bands(table: pa.Table, many: int) -> dict[str, list[int]]:
    """Rows of the table by heading; of a tie the lower id first."""
    ids = table["sample_id"].to_numpy()
    realism = np.nan_to_num(table["realism"].to_numpy(zero_copy_only=False).astype(np.float64), nan=np.inf)  # of copies
    rarity = table["rarity"].to_numpy(zero_copy_only=False).astype(np.float64)  # null is NaN
    order = np.lexsort((ids, realism))
    inside = np.flatnonzero(~np.isnan(rarity))
    rarest = inside[np.lexsort((ids[inside], -rarity[inside]))]
    bands = {
        "highest realism": order[::-1][:many].tolist(),
        "lowest realism": order[:many].tolist(),
        "highest rarity within the real manifold": rarest[:many].tolist(),
    }
    return {name: rows for name, rows in bands.items() if rows}


def _tile(table: pa.Table, row: int, pictures: Mapping[int, bytes]) -> Tile:
    values = {name: table[name][row].as_py() for name in ("sample_id", "key", "realism", "rarity", "label")}
    lines = ["a copy" if values["realism"] is None else f"realism {page.number(values['realism'])}"]
    if values["rarity"] is not None:
        lines.append(f"rarity {page.number(values['rarity'])}")
    if values["label"] is not None:
        lines.append(f"label {page.shorten(values['label'], 22)}")
    return Tile(values["key"], pictures.get(values["sample_id"]), lines)


def _pictures(chosen: ImageSet, inputs: Inputs, wanted: set[int]) -> tuple[dict[int, bytes], str]:
    """Thumbnails by id, and why some are missing; a report is made all the same where a set has moved."""
    found: dict[int, bytes] = {}
    try:
        if chosen.source is None:
            source, listed = original_of(chosen.uri, inputs.settings.source)
            folder = listed.uri
        else:
            source, folder = chosen.source, files.join(str(inputs.settings.output), "sets", chosen.name, "listing")
        limits = decode.limits_of(source.settings)
        with files.explained(chosen.uri):
            for _, rows in listing.rows_of_ids(folder, wanted):
                found |= child.thumbnails_by_id(rows["sample_id"].to_pylist(), sources.read(source, rows), limits)
    except (UserError, RunError) as error:
        return found, str(error)
    return found, "" if len(found) == len(wanted) else f"{len(wanted) - len(found)} of {len(wanted)} cannot be read"
