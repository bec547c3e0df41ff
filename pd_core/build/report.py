"""The report of build_index: what its page shows of the committed artifacts and of the images, gathered and drawn."""

from __future__ import annotations

import datetime
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pd_core.core import artifacts, files, seeds
from pd_core.core.settings.index import BuildIndexSettings
from pd_core.core.settings.load import to_yaml
from pd_core.density import estimator as density_estimator
from pd_core.density import formula
from pd_core.engine import runs as engine_runs
from pd_core.images import listing, sources, thumbnails
from pd_core.index.features import reasons_of
from pd_core.report.figures import (
    BAR,
    DENSITY_AXIS,
    DISTANCE_AXIS,
    INK,
    LOG_AXIS_FACTOR,
    MARK,
    MUTED,
    Drawing,
    calibration_png,
    density_axis,
    draw_thresholds,
    new_figure,
    page_files,
    style_axes,
    to_png,
)
from pd_core.report.page import Calibration, LabelRow, Picture, drawable, shorten, visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_LABELS_SHOWN = 50
SAMPLE_ROWS = 1_000_000  # densities that histogram and label quantiles are drawn from
NEIGHBORS_SHOWN = 8
QUARANTINE_EXAMPLES = 12
LIGHT_COLUMNS = ["sample_id", "key", "label", "mean_knn_distance", "density", "percentile"]
# What to do about each images.Reason.
QUARANTINE_ADVICE: Mapping[str, str] = {
    "empty": "The file has no bytes: an upload or copy was cut short. Copy it again, or delete it.",
    "truncated": "The file ends before the image does. Copy it again from where it came from.",
    "not_an_image": "The content is of no image format, whatever the name says. Remove it, or leave it: it does no "
    "harm.",
    "unsupported_format": "An image, but not one that can be read without guessing. Convert it as the detail says.",
    "too_many_bytes": "Larger than --data.max_image_bytes. Raise the limit if you trust the source, or shrink the "
    "file.",
    "too_many_pixels": "Larger than --data.max_image_pixels, or made of tiles or frames that are. Raise the limit if "
    "you trust the source, or shrink the image.",
    "too_expensive": "Decoding it takes more time (--data.max_image_cpu_s) or memory than a picture does, or ends the "
    "decoder; a hostile or broken file. Leave it out.",
    "unreadable": "The file was listed but could not be read; of a tar that is damaged, all that lies behind the place "
    "is lost. Check permissions and the store, or pack the tar again, then run again.",
    "corrupt": "The file has the marks of an image format, but decoding failed. Replace it.",
    "feature_not_finite": "The image decodes, but its feature holds NaN or infinity. Try --features.precision fp32.",
}


@dataclass(frozen=True)
class ReportData:
    """All that the page shows.

    Attributes:
        created: ISO 8601 time, given by the caller, so that `render` is a function of its argument alone.
        n_images: images with a density. n_quarantined: images without; n_images + n_quarantined were listed.
        log_normalizer: c of log ρ = -n log d + c. volume_dim: n.
        floored_rows: images whose mean k-NN distance is zero (k exact duplicates) and was raised to the floor.
        density: float [S], 1 <= S <= n_images, a sample for the histogram.
        quantiles: float64 [1001], p0, p0.1 ... p100 of all densities (`formula.density_quantiles`).
        thresholds: (as the user wrote it, density). index: totals of the stage.
        lowest: ascending in density. highest: descending. neighbors: an image and its nearest, nearest first.
        quarantine: reason to number, adds up to n_quarantined. quarantine_examples: (key, reason, detail).
        skipped: suffix to number of files that were not taken for images.
        timings_s: stage to seconds, in order of the run.
        feature: facts of the extractor in order of display (model, checkpoint, preprocessing, precision, fingerprint).
    """

    title: str
    source: str
    output: str
    created: str
    n_images: int
    n_quarantined: int
    k: int
    volume_dim: float
    log_normalizer: float
    floored_rows: int
    density: np.ndarray
    quantiles: np.ndarray
    thresholds: Sequence[tuple[str, float]]
    index: Mapping[str, Any]
    lowest: Sequence[Picture] = ()
    highest: Sequence[Picture] = ()
    neighbors: Sequence[tuple[Picture, Sequence[Picture]]] = ()
    labels: Sequence[LabelRow] = ()
    calibration: Calibration | None = None
    quarantine: Mapping[str, int] = field(default_factory=dict)
    quarantine_examples: Sequence[tuple[str, str, str]] = ()
    skipped: Mapping[str, int] = field(default_factory=dict)
    timings_s: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    settings_yaml: str = ""
    feature: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Conservation: what the page adds up must add up."""
        assert sum(self.quarantine.values()) == self.n_quarantined, (dict(self.quarantine), self.n_quarantined)
        assert self.quantiles.shape == (1001,), self.quantiles.shape
        assert self.density.ndim == 1, self.density.shape
        assert 1 <= self.density.size <= self.n_images, (self.density.size, self.n_images)


@dataclass(frozen=True)
class Inputs:
    """What the stage reads; picklable."""

    source: sources.Source
    listing: listing.Listing
    settings: BuildIndexSettings
    listed: artifacts.Artifact
    features: artifacts.Artifact
    index: artifacts.Artifact
    densities: artifacts.Artifact
    estimator: artifacts.Artifact
    timings_s: Mapping[str, float]


def stage_of(
    output: str, densities: artifacts.Stage, estimator: artifacts.Stage, settings: BuildIndexSettings
) -> artifacts.Stage:
    """The report stage under `output`."""
    identity = {
        "densities": densities.fingerprint,
        "estimator": estimator.fingerprint,
        "settings": settings.report.model_dump(mode="json"),
    }
    return engine_runs.report_stage(output, identity)


def run(stage: artifacts.Stage, output: str, inputs: Inputs) -> engine_runs.Made:
    """Make the page and its figures; returns the parts and totals to commit."""
    return engine_runs.draw(stage, functools.partial(_draw, output, inputs))


def _draw(output: str, inputs: Inputs) -> engine_runs.Drawn:
    return engine_runs.Drawn(drawn(_gather(output, inputs)))


def _gather(output: str, inputs: Inputs) -> ReportData:
    settings = inputs.settings
    uri = files.join(output, "densities")
    chosen = _choose(uri, inputs)
    pictures = _pictures(inputs, chosen)

    def shown(rows: Iterable[Mapping[str, Any]]) -> list[Picture]:
        return [pictures[row["sample_id"]] for row in rows]

    def near(row: Mapping[str, Any]) -> list[Picture]:
        return [replace(pictures[i], distance=distance) for i, distance in row["neighbors"] if i in pictures]

    totals = inputs.densities.totals
    quantiles = np.asarray(totals["density_quantiles"])
    quarantined = reasons_of(inputs.features.parts)
    extractor = inputs.features.totals["extractor"]
    return ReportData(
        title="Pseudo density",
        source=str(settings.data.source),
        output=output,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        n_images=inputs.densities.rows,
        n_quarantined=sum(quarantined.values()),
        k=totals["k"],
        volume_dim=totals["volume_dim"],
        log_normalizer=totals["log_normalizer"],
        floored_rows=totals["floored_rows"],
        density=chosen.sample["density"].to_numpy(),
        quantiles=quantiles,
        thresholds=[(text, formula.parse_threshold(text).density(quantiles)) for text in settings.report.thresholds],
        index=inputs.index.totals,
        lowest=shown(chosen.lowest),
        highest=shown(chosen.highest),
        neighbors=[(pictures[row["sample_id"]], near(row)) for row in chosen.shown],
        labels=_labels(chosen),
        calibration=_calibration(output, inputs.estimator),
        quarantine=quarantined,
        quarantine_examples=_examples(output, inputs.features),
        skipped=inputs.listed.totals["skipped"],
        timings_s=inputs.timings_s,
        versions=inputs.densities.versions,
        settings_yaml=to_yaml(settings),
        feature={
            "model": extractor["model"],
            "checkpoint": extractor["checkpoint"] or "timm's hub",
            "precision": extractor["precision"],
            "dimension": str(extractor["feature_dim"]),
            "preprocessing": artifacts.canonical(extractor["preprocess"]),
            "weights sha256": extractor["weights_sha256"],
            "library": extractor["library"],
        },
    )


@dataclass(frozen=True)
class _Chosen:
    """Rows of the densities that the report shows (as dicts), and a sample of all."""

    lowest: list[dict[str, Any]]
    highest: list[dict[str, Any]]
    shown: list[dict[str, Any]]  # with their neighbors
    sample: pa.Table
    label_counts: Mapping[str, int]
    label_sums: Mapping[str, float]


def _choose(uri: str, inputs: Inputs) -> _Chosen:
    """One pass over the densities, holding one part, the extremes and a sample."""
    many = min(inputs.settings.report.images, -(-inputs.densities.rows // 2))  # a small set fills no picture twice
    targets = np.linspace(0, 100, inputs.settings.report.neighbors + 2)[1:-1]
    fraction = SAMPLE_ROWS / max(1, inputs.densities.rows)
    lowest: pa.Table | None = None
    highest: pa.Table | None = None
    nearest: pa.Table | None = None
    sample: list[pa.Table] = []
    counts: dict[str, int] = {}
    sums: dict[str, float] = {}
    for part in inputs.densities.parts:
        table = files.read_table(files.join(uri, part.name), LIGHT_COLUMNS)
        table = table.append_column("part", pa.array([part.name] * table.num_rows))
        lowest = _first(lowest, table, [("density", "ascending"), ("sample_id", "ascending")], many)
        highest = _first(highest, table, [("density", "descending"), ("sample_id", "ascending")], many)
        nearest = _closest(nearest, table, targets)
        keep = seeds.uniform(table["sample_id"].to_numpy(), seed=0) < fraction
        sample.append(table.select(["label", "density"]).filter(pa.array(keep)))
        for group in table.group_by("label").aggregate([("density", "count"), ("density", "sum")]).to_pylist():
            if group["label"] is not None:
                counts[group["label"]] = counts.get(group["label"], 0) + group["density_count"]
                sums[group["label"]] = sums.get(group["label"], 0.0) + group["density_sum"]
    assert lowest is not None and highest is not None and nearest is not None
    shown = [_with_neighbors(uri, row) for row in nearest.to_pylist()]
    return _Chosen(lowest.to_pylist(), highest.to_pylist(), shown, pa.concat_tables(sample), counts, sums)


def _first(best: pa.Table | None, table: pa.Table, order: list[tuple[str, str]], many: int) -> pa.Table:
    both = table if best is None else pa.concat_tables([best, table])
    return both.take(pc.select_k_unstable(both, k=min(many, both.num_rows), sort_keys=order))


def _closest(best: pa.Table | None, table: pa.Table, percentiles: np.ndarray) -> pa.Table:
    """For each wanted percentile the row nearest to it."""
    both = table if best is None else pa.concat_tables([best, table])
    at = np.abs(both["percentile"].to_numpy()[:, None] - percentiles[None]).argmin(axis=0)
    return both.take(pa.array(at))


def _with_neighbors(uri: str, row: dict[str, Any]) -> dict[str, Any]:
    table = files.read_table(files.join(uri, row["part"]), ["sample_id", "neighbor_ids", "neighbor_distances"])
    full = table.filter(pc.equal(table["sample_id"], row["sample_id"])).to_pylist()[0]
    return row | {
        "neighbors": list(zip(full["neighbor_ids"], full["neighbor_distances"], strict=True))[:NEIGHBORS_SHOWN]
    }


def _pictures(inputs: Inputs, chosen: _Chosen) -> dict[int, Picture]:
    """Pictures of the chosen rows and of their neighbors by sample_id, each image read once."""
    rows = {row["sample_id"]: row for row in [*chosen.lowest, *chosen.highest, *chosen.shown]}
    rows |= _find_densities(inputs, {i for row in chosen.shown for i, _ in row["neighbors"]} - set(rows))
    found: dict[int, bytes] = {}
    for _, listed in listing.rows_of_ids(inputs.listing.uri, set(rows)):
        found |= thumbnails.readable(thumbnails.of_originals(inputs.source, listed))
    columns = ("key", "label", "density", "percentile", "mean_knn_distance")
    return {i: Picture(**{name: row[name] for name in columns}, thumbnail=found.get(i)) for i, row in rows.items()}


def _find_densities(inputs: Inputs, wanted: Iterable[int]) -> dict[int, dict[str, Any]]:
    """Densities rows by id: one pass over the parts, light columns only."""
    value_set = pa.array(sorted(wanted), pa.int64())
    found: dict[int, dict[str, Any]] = {}
    uri = files.join(str(inputs.settings.output), "densities")
    for part in inputs.densities.parts:
        if len(found) == len(value_set):
            break
        table = files.read_table(files.join(uri, part.name), LIGHT_COLUMNS)
        for row in table.filter(pc.is_in(table["sample_id"], value_set=value_set)).to_pylist():
            found[row["sample_id"]] = row
    return found


def _labels(chosen: _Chosen) -> list[LabelRow]:
    order = pc.sort_indices(chosen.sample, sort_keys=[("label", "ascending")])
    ordered = chosen.sample.take(order)
    ordered = ordered.filter(pc.is_valid(ordered["label"]))
    runs = pc.value_counts(ordered["label"].combine_chunks()).to_pylist()
    ends = np.cumsum([run["counts"] for run in runs]).astype(np.int64)
    densities = ordered["density"].to_numpy()
    rows = []
    for run, end in zip(runs, ends, strict=True):
        label = run["values"]
        p10, p50, p90 = np.percentile(densities[end - run["counts"] : end], [10, 50, 90])
        mean = chosen.label_sums[label] / chosen.label_counts[label]
        rows.append(LabelRow(label, chosen.label_counts[label], mean, float(p10), float(p50), float(p90)))
    return rows


def _calibration(output: str, estimator: artifacts.Artifact) -> Calibration:
    heldout = files.read_table(files.join(output, "estimator", density_estimator.HELDOUT))
    facts = dict(estimator.totals["heldout"])
    return Calibration(
        log_density=heldout["log_density"].to_numpy(),
        predicted_log_density=heldout["predicted_log_density"].to_numpy(),
        r2=facts.pop("r2_log_density"),
        spearman=facts.pop("spearman"),
        n_holdout=estimator.totals["n_heldout"],
        more=facts,
    )


def _examples(output: str, features: artifacts.Artifact) -> list[tuple[str, str, str]]:
    rows: list[tuple[str, str, str]] = []
    for part in features.parts:
        if len(rows) >= QUARANTINE_EXAMPLES:
            break
        if part.counts:
            table = files.read_table(files.join(output, "quarantine", part.name))
            rows += [(row["key"], row["reason"], row["detail"]) for row in table.to_pylist()]
    return rows[:QUARANTINE_EXAMPLES]


# --- figures ----------------------------------------------------------------------------------------------------------


def histogram_png(data: ReportData, narrow: bool = False) -> bytes:
    """Histogram of ρ with the thresholds; the upper axis gives the mean k-NN distance that belongs to each ρ."""
    shown = density_axis(data.density, data.quantiles)
    figure, axes = new_figure(narrow, height_in=2.9 if narrow else 3.5)
    n_bins = int(np.clip(math.sqrt(shown.n), 10, 40 if narrow else 80))
    edges = (np.geomspace if shown.log else np.linspace)(shown.low, shown.high, n_bins + 1)
    edges[[0, -1]] = shown.low, shown.high  # geomspace may miss its ends by one rounding
    counts, _ = np.histogram(data.density, edges)
    axes.stairs(100.0 * counts / shown.n, edges, fill=True, color=BAR)
    axes.set_xscale("log" if shown.log else "linear")
    axes.set_xlim(shown.low, shown.high)
    axes.set_ylim(0, max(float(counts.max()), 1.0) * 100.0 / shown.n * 1.3)  # room for the names of the thresholds
    axes.set_xlabel("pseudo density ρ (mean = 1)" if narrow else DENSITY_AXIS)
    axes.set_ylabel("share of the images (%)")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    draw_thresholds(axes, data.thresholds, shown.low, shown.high)
    _draw_distance_axis(figure, axes, data, narrow)
    return to_png(figure)


def labels_png(labels: Sequence[LabelRow], narrow: bool = False) -> bytes:
    """p10 to p90 (bar), median (line) and mean (dot) of ρ within each label, in the order given."""
    figure, axes = new_figure(narrow, height_in=0.8 + 0.21 * len(labels))
    rows = np.arange(len(labels))
    p10, p50, p90, mean = (np.array([getattr(row, name) for row in labels]) for name in ("p10", "p50", "p90", "mean"))
    axes.barh(rows, p90 - p10, left=p10, height=0.55, color=BAR)
    axes.vlines(p50, rows - 0.275, rows + 0.275, color=INK, linewidth=1.4)
    axes.plot(mean, rows, "o", color=MARK, markersize=4)
    smallest, largest = float(min(p10.min(), mean.min())), float(max(p90.max(), mean.max()))
    if smallest > 0 and largest / smallest > LOG_AXIS_FACTOR:
        axes.set_xscale("log")
        axes.set_xlim(smallest / 1.2, largest * 1.2)
    else:
        margin = 0.03 * (largest - smallest) or 0.05 * largest
        axes.set_xlim(smallest - margin, largest + margin)
    if smallest <= 1 <= largest:
        axes.axvline(1.0, color=MUTED, linewidth=0.8, linestyle=":")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    chars = 12 if narrow else 28
    axes.set_yticks(rows, [drawable(shorten(visible(row.label), chars)) for row in labels], parse_math=False)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("ρ: p10–p90, median, mean" if narrow else f"{DENSITY_AXIS}: p10–p90, median (line), mean (dot)")
    return to_png(figure)


def _draw_distance_axis(figure: Figure, axes: Axes, data: ReportData, narrow: bool) -> None:
    # ρ = exp(c - n log d), so d = exp((c - log ρ) / n): a second reading of the same positions.
    low, high = axes.get_xlim()
    ticks = [tick for tick in axes.get_xticks() if tick > 0 and low <= tick <= high]
    distances = np.exp((data.log_normalizer - np.log(ticks)) / data.volume_dim)
    upper = axes.secondary_xaxis("top")
    upper.set_xticks(ticks, [f"{distance:.3g}" for distance in distances])
    upper.minorticks_off()
    upper.set_xlabel("mean k-NN distance (Euclidean)" if narrow else DISTANCE_AXIS)
    style_axes(upper)


def _drawings(data: ReportData) -> dict[str, Drawing]:
    drawings: dict[str, Drawing] = {"density_histogram": lambda narrow: histogram_png(data, narrow)}
    if data.labels:
        drawings["label_densities"] = lambda narrow: labels_png(labels_shown(data.labels), narrow)
    if data.calibration is not None:
        calibration = data.calibration
        drawings["predictor_calibration"] = lambda narrow: calibration_png(calibration, narrow)
    return drawings


def labels_shown(labels: Sequence[LabelRow]) -> list[LabelRow]:
    """Labels in ascending mean density; where there are more than fit, those of lowest and of highest mean."""
    ordered = sorted(labels, key=lambda row: (row.mean, row.label))
    half = MAX_LABELS_SHOWN // 2
    return ordered if len(ordered) <= MAX_LABELS_SHOWN else [*ordered[:half], *ordered[-half:]]


# --- the page ---------------------------------------------------------------------------------------------------------
def drawn(data: ReportData) -> dict[str, bytes]:
    """Files of the report by name. The same data gives the same bytes."""
    context = {
        "d": data,
        "n_listed": data.n_images + data.n_quarantined,
        "axis": density_axis(data.density, data.quantiles),
        "labels_shown": labels_shown(data.labels),
        "quarantine": sorted(data.quarantine.items(), key=lambda item: (-item[1], item[0])),
        "advice": QUARANTINE_ADVICE,
        "index_rows": _index_rows(data.index),
        "threshold_rows": [(text, tau, float(np.mean(data.density > tau))) for text, tau in data.thresholds],
        "quantile_rows": [(f"p{p}", float(data.quantiles[10 * p])) for p in range(10, 100, 10)],
        "snippet": _snippet(data),
    }
    return page_files("report.html.j2", context, _drawings(data))


def _index_rows(index: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(what, value) of every fact that is known."""
    exact = index["nprobe"] == 0
    whole, bound = "{:,}".format, "{:.4f}".format
    rows: list[tuple[str, Any, Callable[[Any], str]]] = [
        ("index", index["kind"], str),
        (
            "search",
            "exact: every image compared with every other" if exact else "approximate: some cells per image",
            str,
        ),
        ("shards (index files)", index.get("shards"), whole),
        ("cells of the coarse quantizer", index.get("cells"), whole),
        ("cells searched per image (nprobe)", None if exact else index["nprobe"], whole),
        ("recall@k asked for", index.get("target_recall"), str),
        ("recall@k measured", index.get("recall"), bound),
        ("its lower 95% confidence bound", index.get("recall_lower"), bound),
        (
            "mean relative error of the mean k-NN distance",
            index.get("mean_distance_relative_error"),
            lambda v: f"{100 * v:.2g}%",
        ),
        ("images that recall and error were measured on", index.get("calibration_queries"), whole),
    ]
    return [(name, text(value)) for name, value, text in rows if value is not None]


def _snippet(data: ReportData) -> str:
    """Code that reads the densities; the stage's directory holds records beside the tables, hence the filter."""
    text, tau = data.thresholds[-1] if data.thresholds else ("p80", float(data.quantiles[800]))
    return f"""\
import fsspec
import pandas as pd

fs, folder = fsspec.url_to_fs({data.output.rstrip("/") + "/densities"!r})
files = sorted(path for path in fs.ls(folder, detail=False) if path.endswith(".parquet"))
densities = pd.read_parquet(files, filesystem=fs)

tau = {tau!r}  # threshold {" ".join(visible(text).split())}
common = densities[densities["density"] > tau]
rarest = densities.nsmallest(100, "density")
"""
