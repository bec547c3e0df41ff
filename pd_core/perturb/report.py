"""The report of perturb: what its page shows of the perturbed images, gathered and drawn.

Each sample down, as it was, and up; and whether the index agrees with what the predictor said.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pd_core.core import artifacts, files
from pd_core.core.settings.generate import PerturbSettings
from pd_core.engine import runs
from pd_core.generate import pilot
from pd_core.images import thumbnails
from pd_core.perturb import stage as perturb_stage
from pd_core.report import figures, page

BINS = 40  # of the histogram of changes
ORDER = ("down", "before", "up")  # of the images of a sample, from left to right


# All images of one direction: its name; the stage's totals of it; log(after / before) by index and by predictor,
# float64 [rows or less] of the same rows, left out of both where a density underflows to 0; exp of their means, or
# None; how the predictor agrees with the index about the images after.
Moved = Mapping[str, Any]


@dataclass(frozen=True)
class Inputs:
    """What the stage reads; picklable. job, perturbed: the stage before and its commit record. timings_s: so far."""

    job: perturb_stage.Job
    perturbed: artifacts.Artifact
    settings: PerturbSettings
    timings_s: Mapping[str, float]


def make(run: runs.Run, inputs: Inputs) -> None:
    """Complete the report stage of a run."""
    identity = {"perturbed": inputs.job.stage.fingerprint, "images": inputs.settings.images}
    run.report(identity, functools.partial(_draw, inputs))


def _draw(inputs: Inputs) -> runs.Drawn:
    data = gather(inputs)
    drawings = {name: functools.partial(draw, data["moved"]) for name, draw in FIGURES.items()}
    names = {"d": data, "snippet": _snippet(data["output"])}
    return runs.Drawn(figures.page_files("perturbed.html.j2", names, drawings))


def gather(inputs: Inputs) -> dict[str, Any]:
    """All that the page shows, as its template names it: the light columns, and the images of a few samples."""
    job, totals, settings = inputs.job, inputs.perturbed.totals, inputs.settings
    table = _light(inputs)
    first = table.filter(pc.equal(table["direction"], job.move.directions[0]))
    moved = [_moved(table, way, totals[way]) for way in job.move.directions]
    return page.facts_of_run("Perturbed images", settings, inputs.timings_s, inputs.perturbed.versions) | {
        "real": job.recipe.realset.uri,
        "n": job.n,
        "move": job.move,
        "moved": moved,
        "not_finite": totals["not_finite"],
        "before": _agreement(first, "before"),
        "columns": [name for name in ORDER if name in ("before", *job.move.directions)],
        "shown": _shown(inputs, first),
        "likely_copies": totals["copies"],
        "copy_distance": job.recipe.copy_distance,
        "facts": _facts(inputs),
    }


def _light(inputs: Inputs) -> pa.Table:
    """Every row without its images, and the part that it lies in."""
    tables = []
    for part in inputs.perturbed.parts:
        table = files.read_table(files.join(inputs.job.stage.uri, part.name), perturb_stage.LIGHT)
        tables.append(table.append_column("part", pa.array([part.name] * table.num_rows)))
    return pa.concat_tables([table.replace_schema_metadata(None) for table in tables])


def _moved(table: pa.Table, way: str, totals: Mapping[str, Any]) -> Moved:
    rows = table.filter(pc.equal(table["direction"], way))
    (by_index, predicted), _ = perturb_stage.log_changes(*perturb_stage.densities_of(rows))
    assert by_index.size == totals["rows"] - totals["no_log_ratio"], "each row has both changes or is left out"
    return {
        "direction": way,
        "totals": totals,
        "by_index": by_index,
        "predicted": predicted,
        "factor": float(np.exp(by_index.mean())) if by_index.size else None,
        "predicted_factor": float(np.exp(predicted.mean())) if predicted.size else None,
        "agreement": _agreement(rows, "after"),
    }


def _agreement(rows: pa.Table, when: str) -> dict[str, float | None]:
    """Of predicted and index-scored log density of the images before, or after."""
    found = pilot.agreement(rows[f"density_index_{when}"].to_numpy(), rows[f"density_predicted_{when}"].to_numpy())
    if found.figures is None:
        return {"r2": None, "spearman": None}
    return {"r2": found.figures.r2_log_density, "spearman": found.figures.spearman}


def _shown(inputs: Inputs, first: pa.Table) -> list[dict[str, Any]]:
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


def _sample(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a sample was asked for, and its images by `down`, `before`, `up`."""
    first = rows[0]
    before, *after = thumbnails.of_samples([first["image_before"], *(row["image"] for row in rows)], "perturbed")
    shots = {"before": _shot(first, "before", before)}
    for row, picture in zip(rows, after, strict=True):
        moved = {"distance": row["feature_distance"], "confirmed": row["confirmed"]}
        shots[row["direction"]] = _shot(row, "after", picture) | moved
    return {name: first[name] for name in ("sample_id", "seed", "label", "prompt")} | {"shots": shots}


def _shot(row: Mapping[str, Any], when: str, picture: bytes) -> dict[str, Any]:
    names = ("density_predicted", "density_index", "percentile")
    return {name: row[f"{name}_{when}"] for name in names} | {"thumbnail": picture}


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


# --- figures ----------------------------------------------------------------------------------------------------------


def changes_png(moved: Sequence[Moved], narrow: bool = False) -> bytes:
    """Histograms of log(after / before): by the index (filled) and the predictor (line), a colour per direction."""
    figure, axes = figures.new_figure(narrow, height_in=2.9 if narrow else 3.5)
    edges = _edges(moved)
    for one in moved:
        color = figures.MARK if one["direction"] == "up" else figures.BAR
        inside = lambda values: np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0]  # noqa: E731
        axes.stairs(
            inside(one["by_index"]), edges, fill=True, color=color, alpha=0.45, label=f"{one['direction']}, index"
        )
        axes.stairs(inside(one["predicted"]), edges, color=color, linewidth=1.8, label=f"{one['direction']}, predictor")
    axes.axvline(0.0, color=figures.INK, linewidth=1.0, linestyle=":")
    axes.set_xlim(edges[0], edges[-1])
    axes.set_xlabel("log(ρ after / ρ before)")
    axes.set_ylabel("images")
    figure.legend(loc="outside upper left", ncols=2 if narrow else 4, frameon=False, fontsize=9, labelcolor=figures.INK)
    return figures.to_png(figure)


def agreement_png(moved: Sequence[Moved], narrow: bool = False) -> bytes:
    """Change by the predictor against change by the index; images in the right quarters agree in direction."""
    figure, axes = figures.new_figure(narrow, height_in=3.4 if narrow else 4.4, width_in=4.8)
    low, high = _edges(moved)[[0, -1]]
    for one in moved:
        color = figures.MARK if one["direction"] == "up" else figures.BAR
        axes.plot(one["by_index"], one["predicted"], "o", color=color, markersize=3, alpha=0.6, markeredgewidth=0)
    axes.plot([low, high], [low, high], color=figures.MUTED, linewidth=1.0)
    for line in (axes.axvline, axes.axhline):
        line(0.0, color=figures.INK, linewidth=0.8, linestyle=":")
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
    axes.set_aspect("equal")
    axes.set_xlabel("by the index: log(ρ after / ρ before)")
    axes.set_ylabel("by the predictor")
    return figures.to_png(figure)


def _edges(moved: Sequence[Moved]) -> np.ndarray:
    """Edges of the bins, which hold 0 as one of them: 1% to 99% of all changes."""
    everything = np.concatenate([np.r_[one["by_index"], one["predicted"]] for one in moved])
    everything = everything[np.isfinite(everything)]
    low, high = np.quantile(everything, [0.01, 0.99]) if everything.size else (-1.0, 1.0)
    low, high = min(float(low), 0.0), max(float(high), 0.0)
    width = max(high - low, 1e-6) / BINS
    return np.arange(np.floor(low / width) - 1, np.ceil(high / width) + 2) * width


FIGURES = {"changes": changes_png, "agreement": agreement_png}


def _snippet(output: str) -> str:
    folder = output.rstrip("/") + "/perturbed"
    return f"""\
from datasets import load_dataset

rows = load_dataset("parquet", data_files={folder + "/*.parquet"!r}, split="train")
confirmed = rows.filter(lambda row: row["confirmed"])
before, after = rows[0]["image_before"], rows[0]["image"]  # PIL images
"""
