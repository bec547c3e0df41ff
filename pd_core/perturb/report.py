"""The report stage of perturb: gather what its page shows from the perturbed images."""

from __future__ import annotations

import datetime
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pd_core.core import artifacts, files
from pd_core.core.settings.generate import PerturbSettings
from pd_core.core.settings.load import to_yaml
from pd_core.engine import runs
from pd_core.generate import pilot
from pd_core.images import child
from pd_core.perturb import page as perturb_page
from pd_core.perturb import stage as perturb_stage
from pd_core.perturb.page import Moved, PerturbedData, Shot, Shown
from pd_core.report import page

NUMBERS = ("density_predicted", "density_index", "percentile")


@dataclass(frozen=True)
class Inputs:
    """What the stage reads; picklable. job, perturbed: the stage before and its commit record. timings_s: so far."""

    job: perturb_stage.Job
    perturbed: artifacts.Artifact
    settings: PerturbSettings
    timings_s: Mapping[str, float]


def stage_of(output: str, perturbed: artifacts.Stage, images: int) -> artifacts.Stage:
    """The report stage under `output`."""
    identity = {"perturbed": perturbed.fingerprint, "images": images}
    return runs.report_stage(output, identity)


def run(stage: artifacts.Stage, inputs: Inputs) -> runs.Made:
    """Make the page and its figures; returns the parts and totals to commit."""
    return runs.draw(stage, functools.partial(_draw, inputs))


def _draw(inputs: Inputs) -> runs.Drawn:
    data = gather(inputs)
    return runs.Drawn({**perturb_page.figures(data), runs.REPORT: perturb_page.render(data)})


def gather(inputs: Inputs) -> PerturbedData:
    """All that the page shows: a pass over the light columns, and the images of a few samples."""
    job, totals, settings = inputs.job, inputs.perturbed.totals, inputs.settings
    table = _light(inputs)
    ways = np.array(table["direction"].to_pylist())
    moved = [_moved(table, ways == way, way, totals[way]) for way in job.move.directions]
    first = table.filter(pa.array(ways == job.move.directions[0]))
    return PerturbedData(
        title="Perturbed images",
        output=str(settings.output),
        index=job.recipe.realset.uri,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        n=job.n,
        epsilon=job.move.epsilon,
        step_size=job.move.step_size,
        steps=job.move.steps,
        random_start=job.move.random_start,
        moved=moved,
        not_finite=totals["not_finite"],
        before=_agreement(first, "before"),
        shown=_shown(inputs, first),
        copies=totals["copies"],
        copy_distance=job.recipe.copy_distance,
        facts=_facts(inputs),
        timings_s=inputs.timings_s,
        versions=inputs.perturbed.versions,
        settings_yaml=to_yaml(settings),
    )


def _light(inputs: Inputs) -> pa.Table:
    """Every row without its images, and the part that it lies in."""
    tables = []
    for part in inputs.perturbed.parts:
        table = files.read_table(files.join(inputs.job.stage.uri, part.name), perturb_stage.LIGHT)
        tables.append(table.append_column("part", pa.array([part.name] * table.num_rows)))
    return pa.concat_tables([table.replace_schema_metadata(None) for table in tables])


def _moved(table: pa.Table, here: np.ndarray, way: str, totals: Mapping[str, Any]) -> Moved:
    rows = table.filter(pa.array(here))
    (by_index, predicted), left_out = perturb_stage.log_changes(*perturb_stage.densities_of(rows))
    return Moved(
        direction=way,
        rows=totals["rows"],
        confirmed=totals["confirmed"],
        low=totals["confirmed_low"],
        high=totals["confirmed_high"],
        predicted_share=totals["predicted_share"],
        by_index=by_index,
        predicted=predicted,
        no_log_ratio=left_out,
        unmoved=totals["unmoved"],
        feature_distance=totals["mean_feature_distance"],
        agreement=_agreement(rows, "after"),
    )


def _agreement(rows: pa.Table, when: str) -> page.Calibration:
    """Predicted against index-scored log density of the images before, or after."""
    found = pilot.agreement(rows[f"density_index_{when}"].to_numpy(), rows[f"density_predicted_{when}"].to_numpy())
    figures = found.figures
    if figures is None:
        return page.Calibration(found.true, found.predicted, None, None, 0)
    return page.Calibration(found.true, found.predicted, figures.r2_log_density, figures.spearman, figures.n)


def _shown(inputs: Inputs, first: pa.Table) -> list[Shown]:
    """Samples at equal steps through the originals in ascending index-scored density."""
    ordered = first.sort_by([("density_index_before", "ascending"), ("sample_id", "ascending")])
    many = min(inputs.settings.images, ordered.num_rows)
    places = np.unique(np.linspace(0, ordered.num_rows - 1, many).round().astype(int))
    chosen = ordered.take(pa.array(places))
    by_part: dict[str, set[int]] = {}
    for part, number in zip(chosen["part"].to_pylist(), chosen["sample_id"].to_pylist(), strict=True):
        by_part.setdefault(part, set()).add(number)
    rows: dict[int, list[dict[str, Any]]] = {}
    for part, numbers in sorted(by_part.items()):  # one part in memory at a time; all rows of a sample lie in one
        table = files.read_table(files.join(inputs.job.stage.uri, part))
        wanted = [number in numbers for number in table["sample_id"].to_pylist()]
        for row in table.filter(pa.array(wanted)).to_pylist():
            rows.setdefault(row["sample_id"], []).append(row)
    return [_sample(rows[number]) for number in chosen["sample_id"].to_pylist()]


def _sample(rows: Sequence[Mapping[str, Any]]) -> Shown:
    first = rows[0]
    shown = [first["image_before"], *(row["image"] for row in rows)]
    before, *after = child.sample_thumbnails(shown, "perturbed")
    shots = {"before": _shot(first, "before", before)}
    shots |= {row["direction"]: _shot(row, "after", picture) for row, picture in zip(rows, after, strict=True)}
    return Shown(first["sample_id"], first["seed"], first["label"], first["prompt"], shots)


def _shot(row: Mapping[str, Any], when: str, picture: bytes) -> Shot:
    predicted, by_index, percentile = (row[f"{name}_{when}"] for name in NUMBERS)
    if when == "before":
        return Shot(predicted, by_index, percentile, picture)
    return Shot(predicted, by_index, percentile, picture, row["feature_distance"], row["confirmed"])


def _facts(inputs: Inputs) -> dict[str, list[tuple[str, str]]]:
    recipe, totals = inputs.job.recipe, inputs.perturbed.totals
    real, made = recipe.realset, totals.get("actor_s_per_image")
    given = recipe.generator.model_dump(mode="json", exclude_defaults=True)
    generator = {"kind": recipe.generator.kind} | given | dict(recipe.generator_identity)
    shorten = lambda value: page.shorten(value if isinstance(value, str) else artifacts.canonical(value), 120)  # noqa: E731
    return {
        "Generator": [(name, shorten(value)) for name, value in generator.items()]
        + [("run seed", str(recipe.seed)), ("samples of one batch", f"{recipe.chunk:,}")]
        + ([] if made is None else [("seconds of one process per image", page.number(made))]),
        "Real set": [
            ("index", real.uri),
            ("images", f"{real.rows:,}"),
            ("extractor", real.extractor.model),
            ("neighbors k", str(real.k)),
            ("sharpness n", page.number(real.volume_dim)),
        ],
    }
