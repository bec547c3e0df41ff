"""The report of tradeoff: the curve as a page with figures, the table as CSV, the choice for a target."""

from __future__ import annotations

import csv
import functools
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pd_core.core import artifacts, schemas
from pd_core.core import files as core_files
from pd_core.engine import runs
from pd_core.evaluate.halfsamples import Estimate
from pd_core.evaluate.report import COLORS, MARKERS, draw_point, interval, metric_names, plane_axes
from pd_core.evaluate.spaces import JUDGE
from pd_core.evaluate.tradeoff import curve as tradeoff_curve
from pd_core.evaluate.tradeoff import points
from pd_core.evaluate.tradeoff.points import Setting, Target
from pd_core.images import thumbnails
from pd_core.report import figures, page

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TABLE = "tradeoff.csv"


@dataclass(frozen=True)
class Inputs:
    """What the stage reads; picklable.

    Attributes:
        job: of the curve. curve: its commit record.
        images: samples stages with the images, of the pool (None) and of each ψ.
        candidates: of the pool. n_real: real images that were measured against.
    """

    job: tradeoff_curve.Job
    curve: artifacts.Artifact
    images: Mapping[float | None, str]
    candidates: int
    n_real: int
    timings_s: Mapping[str, float]


def make(run: runs.Run, inputs: Inputs) -> None:
    """Complete the report stage of a run: the page, its figures and the table."""
    job, settings = inputs.job, inputs.job.settings
    identity = {"curve": job.stage.fingerprint, "images": settings.images, "target": settings.target}
    run.report(identity, functools.partial(_draw, inputs), replace=True)


def _draw(inputs: Inputs) -> runs.Drawn:
    rows = tradeoff_curve.read_curve(inputs.job.stage.uri, inputs.curve.parts)
    return runs.Drawn({**files(gather(inputs, rows)), TABLE: table(rows)}, rows={TABLE: len(rows)})


def files(data: Mapping[str, Any]) -> dict[str, bytes]:
    """The page and its figures by file name. The same data gives the same bytes."""
    drawings = {f"tradeoff_{plane['name']}": functools.partial(_plane_png, plane["rows"]) for plane in data["planes"]}
    names = {"d": data, "metric_names": metric_names, "numbers_of": numbers_of}
    return figures.page_files("tradeoff.html.j2", names, drawings)


def _plane_png(rows: Sequence[Mapping[str, Any]], narrow: bool) -> bytes:
    return figures.to_png(plane_figure(rows, narrow))


def plane_figure(rows: Sequence[Mapping[str, Any]], narrow: bool) -> Figure:
    """Precision over recall: a line for each method and threshold, through the generator itself; 95% intervals.

    Only settings on the frontier are named: these are the choice, and all names together would not be read.
    """
    figure, axes = figures.new_figure(narrow, height_in=3.9 if narrow else 5.6, width_in=8.4)
    measured = [row for row in rows if row["precision"] is not None]
    origin = [row for row in measured if row["curve"] == "generator"]
    named = []
    for i, curve in enumerate(dict.fromkeys(row["curve"] for row in measured if row["curve"] != "generator")):
        color, marker = COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]
        own = [row for row in measured if row["curve"] == curve]
        line = sorted([*origin, *own], key=_place)
        axes.plot([r["recall"] for r in line], [r["precision"] for r in line], color=color, linewidth=1.4, alpha=0.7)
        for j, row in enumerate(own):
            _draw_row(axes, row, curve if j == 0 else None, color, marker)
            if row["frontier"]:
                named.append((row["setting"].rpartition(", ")[2], row["recall"], row["precision"], color))
    for row in origin:
        _draw_row(axes, row, "the generator itself", figures.INK, "o")
    plane_axes(axes)
    if measured:
        figure.legend(frameon=False, fontsize=9, loc="outside lower center", ncols=1 if narrow else 3)
        figures.name_points(axes, named, np.array([(row["recall"], row["precision"]) for row in measured]))
    return figure


def _draw_row(axes: Axes, row: Mapping[str, Any], label: str | None, color: str, marker: str) -> None:
    numbers = numbers_of(row)
    draw_point(axes, numbers["recall"], numbers["precision"], label, color, marker)


def _place(row: Mapping[str, Any]) -> float:
    """Along the curve: log w, polarity, or ψ; that of truncation ends in the generator itself, which is at 0."""
    if row["weight"] is not None:
        return math.log(row["weight"])
    if row["truncation"] is not None:
        return row["truncation"] - 1e6
    return row["polarity"] or 0.0


def table(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """The rows of the curve as CSV."""
    sink = io.StringIO()
    writer = csv.DictWriter(sink, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return sink.getvalue().encode()


def gather(inputs: Inputs, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """All that the page shows, as its template names it."""
    settings, job = inputs.job.settings, inputs.job
    return page.facts_of_run("Fidelity against diversity", settings, inputs.timings_s, inputs.curve.versions) | {
        "index": str(settings.index),
        "n": settings.n,
        "n_real": inputs.n_real,
        "pool": inputs.candidates,
        "score": settings.score,
        "k_precision": settings.metrics.k_precision,
        "k_coverage": settings.metrics.k_coverage,
        "planes": [
            {
                "name": space.name,
                "extractor": space.extractor,
                "is_judge": space.name == JUDGE,
                "rows": [row for row in rows if row["space"] == space.name],
            }
            for space in job.spaces
        ],
        "picked": [] if settings.target is None else choice(points.parse_target(settings.target), rows),
        "images": _images(inputs),
    }


def numbers_of(row: Mapping[str, Any]) -> dict[str, Estimate]:
    """Metrics of a row of the curve, empty where it was not measured."""
    if row["precision"] is None:
        return {}
    return {name: Estimate(row[name], row[f"{name}_low"], row[f"{name}_high"]) for name in schemas.CURVE_METRICS}


# ---- the choice ------------------------------------------------------------------------------------------------------


def choice(target: Target, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each space: the setting of the best counterpart that reaches the target, or the frontier."""
    names = dict.fromkeys(row["space"] for row in rows)
    return [_choice(target, space, [r for r in rows if r["space"] == space]) for space in names]


def _choice(target: Target, space: str, rows: Sequence[Mapping[str, Any]]) -> str:
    found = best(target, rows)
    asked = f"{target.metric} of {target.value:g} or more in the {space} space"
    if found is None:
        return f"No setting has a {asked}; the frontier: {'; '.join(frontier_lines(target, rows))}."
    numbers = numbers_of(found)
    values = ", ".join(f"{m} {interval(numbers[m])}" for m in (target.metric, target.sought))
    line = f"For a {asked} take {found['setting']}: {values}."
    if (low := numbers[target.metric].low) is None or low < target.value:
        line += f" That {target.metric} reaches {target.value:g} is not sure: measure more images (--n)."
    if others := _not_told_apart(target, found, rows):
        line += f" Not told apart from it in {target.sought}: {', '.join(others)}."
    return line


def _not_told_apart(target: Target, found: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Other settings that reach the target, whose intervals of the metric sought meet that of the one found."""
    best_low = found[f"{target.sought}_low"]
    return [
        row["setting"]
        for row in _reaching(target, rows)
        if row is not found and (best_low is None or row[f"{target.sought}_high"] >= best_low)
    ]


def best(target: Target, rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The row with the best counterpart among those that reach the target, or None where none does."""
    return max(_reaching(target, rows), key=lambda row: row[target.sought], default=None)


def _reaching(target: Target, rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [row for row in rows if row["precision"] is not None and row[target.metric] >= target.value]


def frontier_lines(target: Target, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Settings that no other beats in both the target's metric and its counterpart, best first."""
    values = [[np.nan if row[m] is None else row[m] for row in rows] for m in (target.metric, target.sought)]
    on = [row for row, keep in zip(rows, points.frontier(*values).tolist(), strict=True) if keep]
    on.sort(key=lambda row: -row[target.metric])
    return [
        f"{row['setting']} ({target.metric} {row[target.metric]:.3g}, {target.sought} {row[target.sought]:.3g})"
        for row in on
    ]


# ---- images ----------------------------------------------------------------------------------------------------------


def _images(inputs: Inputs) -> list[tuple[str, list[bytes]]]:
    """The first images of the generator, and of the extreme settings of each curve."""
    job = inputs.job
    pool = tradeoff_curve.read_pool(job, 0, light=True)
    shown = []
    for setting in shown_settings(job.swept):
        if setting.method == "truncation":
            numbers = list(range(job.settings.images))
        else:
            rows = tradeoff_curve.draw(setting, pool, job).rows[: job.settings.images]
            numbers = pool.number[rows].tolist()
        shown.append((setting.name, _thumbnails(inputs.images[setting.truncation], numbers)))
    return [(name, pictures) for name, pictures in shown if pictures]


def shown_settings(settings: Sequence[Setting]) -> list[Setting]:
    """The generator itself, and first and last setting of each curve."""
    by_curve: dict[str, list[Setting]] = {}
    for setting in settings:
        by_curve.setdefault(setting.curve, []).append(setting)
    return [s for own in by_curve.values() for s in dict.fromkeys([own[0], own[-1]])]


def _thumbnails(uri: str, numbers: Sequence[int]) -> list[bytes]:
    artifact = artifacts.load_artifact(uri)
    assert artifact is not None, "the stage is committed"
    wanted = set(numbers)
    found: dict[int, bytes] = {}
    for part in artifact.parts:
        if len(found) == len(wanted):
            break
        ids = core_files.read_table(core_files.join(uri, part.name), ["sample_id"])["sample_id"].to_pylist()
        if here := [place for place, number in enumerate(ids) if number in wanted]:
            column = core_files.read_table(core_files.join(uri, part.name), ["image"])["image"]
            pictures = thumbnails.of_samples((column[place].as_py() for place in here), uri)
            found |= zip((ids[place] for place in here), pictures, strict=True)
    return [found[number] for number in numbers if number in found]
