"""The report of evaluate: what its page shows of metrics/, scores/ and the images of the sets, gathered and drawn.

The kit for metrics with their intervals is here too, which the pages of tradeoff and of finetune draw with.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from pd_core.core import artifacts, files
from pd_core.core.errors import RunError, UserError
from pd_core.core.settings.data import INCEPTION
from pd_core.core.settings.evaluate import EvaluateSettings
from pd_core.core.settings.generate import GenerateSettings
from pd_core.density.originals import original_of
from pd_core.density.realset import RealSet
from pd_core.engine import runs
from pd_core.evaluate import measure
from pd_core.evaluate.halfsamples import Estimate
from pd_core.evaluate.spaces import INDEX, JUDGE, ImageSet, Space
from pd_core.images import listing, thumbnails
from pd_core.report import figures, page

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARKERS = "osD^vP*X"
COLORS = (figures.MARK, figures.INK, "#2f7d5b", "#7a4fa3", "#b08a1e", figures.MUTED)
METRICS = {  # in order of display: name, and how it reads
    "precision": "precision",
    "recall": "recall",
    "density": "density",
    "coverage": "coverage",
    "frechet_distance": "Fréchet distance",
    "vendi_generated": "Vendi score",
    "vendi_real": "Vendi score of the real set",
}
LABELS_SHOWN = 60
_Tile = tuple[str, bytes | None, list[str]]  # key, thumbnail, what is said under it


# ---- metrics with their intervals ------------------------------------------------------------------------------------


Number = Estimate  # as other pages know it


def metric_names(extractor: str) -> dict[str, str]:
    """How each metric reads in the space of an extractor: only the Inception of Heusel et al. (2017) gives an FID."""
    return {**METRICS, "frechet_distance": "FID"} if extractor == INCEPTION else METRICS


def interval(number: Estimate | None) -> str:
    """`0.703 (0.68 … 0.72)`."""
    if number is None:
        return "–"
    text = page.number(number.value)
    if number.low is None or number.high is None:
        return text
    return f"{text} ({page.number(number.low)} … {page.number(number.high)})"


def draw_point(axes: Axes, x: Estimate, y: Estimate, label: str | None, color: str, marker: str) -> None:
    """A point with the intervals of both coordinates."""
    at = ([x.value], [y.value])
    axes.errorbar(*at, xerr=_errors(x), yerr=_errors(y), fmt="none", ecolor=color, elinewidth=0.8, alpha=0.45)
    shown = None if label is None else page.drawable(page.visible(label))
    axes.plot(*at, marker, color=color, markersize=7, label=shown)


def _errors(number: Estimate) -> np.ndarray | None:
    if number.low is None or number.high is None:
        return None
    return np.array([[max(0.0, number.value - number.low)], [max(0.0, number.high - number.value)]])


def plane_axes(axes: Axes) -> None:
    """Names of a precision-recall plane."""
    axes.set_xlabel("recall (varied)")
    axes.set_ylabel("precision (faithful)")
    axes.margins(0.08)


# ---- the page --------------------------------------------------------------------------------------------------------


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


def make(run: runs.Run, inputs: Inputs) -> None:
    """Complete the report stage of a run."""
    identity = {"metrics": inputs.job.metrics.fingerprint, "images": inputs.settings.images}
    run.report(identity, functools.partial(_draw, inputs), replace=True)


def _draw(inputs: Inputs) -> runs.Drawn:
    data = gather(inputs)
    drawings = {f"precision_recall_{space['name']}": functools.partial(plane_png, space) for space in data["spaces"]}
    names = {"d": data, "metric_names": metric_names, "labels_shown": LABELS_SHOWN}
    return runs.Drawn(figures.page_files("evaluation.html.j2", names, drawings))


def plane_png(space: Mapping[str, Any], narrow: bool) -> bytes:
    """Precision over recall of each set, with 95% intervals."""
    figure, axes = figures.new_figure(narrow, height_in=3.6 if narrow else 4.6, width_in=6.4)
    for i, measured in enumerate(space["sets"]):
        style = {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)]}
        draw_point(axes, measured["numbers"]["recall"], measured["numbers"]["precision"], measured["name"], **style)
    plane_axes(axes)
    axes.legend(frameon=False, fontsize=9, loc="best")
    return figures.to_png(figure)


def gather(inputs: Inputs) -> dict[str, Any]:
    """All that the page shows, as its template names it."""
    settings, job = inputs.settings, inputs.job
    rows = measure.read_metrics(job.metrics.uri, inputs.measured.parts)
    scores = {
        (c.set, c.space.name): files.read_table(files.join(job.scores.uri, artifacts.part_name(i)))
        for i, c in enumerate(job.comparisons)
    }
    images, note = _images(inputs, scores)
    run = page.facts_of_run("Generated against real images", settings, inputs.timings_s, inputs.measured.versions)
    return run | {
        "real": inputs.real.uri,
        "k_precision": settings.metrics.k_precision,
        "k_coverage": settings.metrics.k_coverage,
        "n": job.n,
        "sizes": {c.set: c.generated.rows for c in job.comparisons},
        "spaces": [_space(space, inputs, rows, scores) for space in inputs.spaces],
        "images": images,
        "images_note": note,
    }


def _space(
    space: Space, inputs: Inputs, rows: Sequence[Mapping[str, Any]], scores: Mapping[tuple[str, str], pa.Table]
) -> dict[str, Any]:
    """One space: its extractor and preprocessing in words, the sets measured in it, and the first labels of these."""
    numbers: dict[tuple[str | None, str], dict[str, Estimate]] = {}
    sizes: dict[tuple[str | None, str], tuple[int, int]] = {}
    for row in rows:
        if row["space"] == space.name:
            of = row["label"], row["set"]
            numbers.setdefault(of, {})[row["metric"]] = Estimate(row["value"], row["low"], row["high"])
            sizes[of] = row["n_real"], row["n_generated"]
    labels = sorted({label for label, _ in numbers if label is not None})[:LABELS_SHOWN]
    by_label = [(label, chosen.name) for label in labels for chosen in inputs.sets if (label, chosen.name) in numbers]
    preprocess = space.spec.preprocess
    return {
        "name": space.name,
        "extractor": space.extractor,
        "detail": f"{space.spec.feature_dim} features of images at {preprocess.height}x{preprocess.width} px, "
        f"{space.spec.precision}, weights {space.spec.weights_sha256[:12]}, {space.spec.library}.",
        "is_judge": space.name == JUDGE,
        "sets": [
            _facts(chosen, space, inputs, scores[chosen.name, space.name], sizes[None, chosen.name])
            | {"numbers": numbers[None, chosen.name]}
            for chosen in inputs.sets
        ],
        "labels": [(*of, sizes[of], numbers[of]) for of in by_label],
    }


def _facts(chosen: ImageSet, space: Space, inputs: Inputs, scores: pa.Table, sizes: tuple[int, int]) -> dict[str, Any]:
    """What is said of one set in one space beside its metrics; copies: None where the nearest may not be known."""
    nearest = scores["nearest_real_distance"].to_numpy()
    quantile = (chosen.made or {}).get("copies_quantile", GenerateSettings.model_fields["copies_quantile"].default)
    everything = space.name == INDEX and sizes[0] == inputs.real.rows
    return {
        "name": chosen.name,
        "asked": asked(chosen.made),
        "selected_here": chosen.selected_in(space, inputs.real),
        "sizes": sizes,
        "nearest": np.quantile(nearest, [0.01, 0.5, 0.99]).tolist(),
        "outside": float(1 - np.mean(scores["in_real_manifold"].to_numpy(zero_copy_only=False))),
        "copies": float(np.mean(nearest <= inputs.real.copy_distance(quantile))) if everything else None,
    }


def asked(made: Mapping[str, Any] | None) -> str:
    """By what a set of generate.py or perturb.py was selected, in a few words; "" for any other set."""
    if made is None:
        return ""
    if "direction" in made:
        return f"perturbed {made['direction']}, epsilon {made['epsilon']:g}"
    weighting = made["weighting"]
    kind = str(weighting["kind"])
    match kind:
        case "two_level":
            return f"{weighting['threshold']}, w = {weighting['weight']:g}"
        case "quantiles":
            return f"weights {weighting['weights']}"
        case "polarity":
            return f"polarity {weighting['polarity']:g}"
    return "nothing" if kind == "none" else kind


# ---- images ----------------------------------------------------------------------------------------------------------


def _images(
    inputs: Inputs, scores: Mapping[tuple[str, str], pa.Table]
) -> tuple[list[tuple[str, list[tuple[str, list[_Tile]]]]], str]:
    """For each set images of highest and lowest realism and highest rarity, in the last space; and what is missing."""
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


def _tile(table: pa.Table, row: int, pictures: Mapping[int, bytes]) -> _Tile:
    values = {name: table[name][row].as_py() for name in ("sample_id", "key", "realism", "rarity", "label")}
    lines = ["a copy" if values["realism"] is None else f"realism {page.number(values['realism'])}"]
    if values["rarity"] is not None:
        lines.append(f"rarity {page.number(values['rarity'])}")
    if values["label"] is not None:
        lines.append(f"label {page.shorten(values['label'], 22)}")
    return (values["key"], pictures.get(values["sample_id"]), lines)


def _pictures(chosen: ImageSet, inputs: Inputs, wanted: set[int]) -> tuple[dict[int, bytes], str]:
    """Thumbnails by id, and why some are missing; a report is made all the same where a set has moved."""
    found: dict[int, bytes] = {}
    try:
        if chosen.source is None:
            source, listed = original_of(chosen.uri, inputs.settings.source)
            folder = listed.uri
        else:
            source, folder = chosen.source, files.join(str(inputs.settings.output), "sets", chosen.name, "listing")
        with files.explained(chosen.uri):
            for _, rows in listing.rows_of_ids(folder, wanted):
                found |= thumbnails.readable(thumbnails.of_originals(source, rows))
    except (UserError, RunError) as error:
        return found, str(error)
    return found, "" if len(found) == len(wanted) else f"{len(wanted) - len(found)} of {len(wanted)} cannot be read"
