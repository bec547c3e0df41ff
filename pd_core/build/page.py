"""The report of build_index: one self-contained HTML page, and its figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import numpy as np

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
    draw,
    draw_thresholds,
    new_figure,
    style_axes,
    to_png,
)
from pd_core.report.page import Calibration, LabelRow, Picture, drawable, page, shorten, visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_LABELS_SHOWN = 50


@dataclass(frozen=True)
class IndexFacts:
    """How neighbors were searched. None: does not apply, or was not measured.

    Attributes:
        kind: flat, ivf_flat, ivf_sq8 or ivf_pq.
        exact: every query was compared with every row.
        recall_lower: one-sided 95% confidence bound of measured_recall.
        distance_error: mean relative error of the mean k-NN distance against exact search.
        calibration_queries: rows that recall and error were measured on.
        reason: why this kind was taken, one sentence.
    """

    kind: str
    exact: bool = False
    shards: int | None = None
    cells: int | None = None
    nprobe: int | None = None
    target_recall: float | None = None
    measured_recall: float | None = None
    recall_lower: float | None = None
    distance_error: float | None = None
    calibration_queries: int | None = None
    reason: str | None = None


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
        thresholds: (as the user wrote it, density).
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
    index: IndexFacts
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


# What to do about each images.Reason.
QUARANTINE_ADVICE: Mapping[str, str] = {
    "empty": "The file has no bytes: an upload or copy was cut short. Copy it again, or delete it.",
    "truncated": "The file ends before the image does. Copy it again from where it came from.",
    "not_an_image": "The content is of no image format, whatever the name says. Remove it, or leave it: it does no harm.",
    "unsupported_format": "An image, but not one that can be read without guessing. Convert it as the detail says.",
    "too_many_bytes": "Larger than --data.max_image_bytes. Raise the limit if you trust the source, or shrink the file.",
    "too_many_pixels": "Larger than --data.max_image_pixels, or made of tiles or frames that are. Raise the limit if you trust the source, or "
    "shrink the image.",
    "too_expensive": "Decoding it takes more time (--data.max_image_cpu_s) or memory than a picture does, or ends the decoder; "
    "a hostile or broken file. Leave it out.",
    "unreadable": "The file was listed but could not be read; of a tar that is damaged, all that lies behind the place is lost. Check "
    "permissions and the store, or pack the tar again, then run again.",
    "corrupt": "The file has the marks of an image format, but decoding failed. Replace it.",
    "feature_not_finite": "The image decodes, but its feature holds NaN or infinity. Try --features.precision fp32.",
}


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


def figures(data: ReportData) -> dict[str, bytes]:
    """The page's figures as PNG by file name, for MLflow; one that has no data is left out."""
    return {f"{name}.png": drawing(False) for name, drawing in _drawings(data).items()}


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


# --- the page ----------------------------------------------------------------------------------------------------------
def render(data: ReportData) -> bytes:
    """The page as UTF-8 HTML. The same data gives the same bytes."""
    return page("report.html.j2", _context(data))


def _context(data: ReportData) -> dict[str, Any]:
    return {
        "d": data,
        "n_listed": data.n_images + data.n_quarantined,
        "total_s": sum(data.timings_s.values()),
        "figures": draw(_drawings(data)),
        "axis": density_axis(data.density, data.quantiles),
        "labels_shown": labels_shown(data.labels),
        "quarantine": sorted(data.quarantine.items(), key=lambda item: (-item[1], item[0])),
        "advice": QUARANTINE_ADVICE,
        "index_rows": _index_rows(data.index),
        "threshold_rows": _threshold_rows(data),
        "quantile_rows": [(f"p{p}", float(data.quantiles[10 * p])) for p in range(10, 100, 10)],
        "snippet": _snippet(data),
    }


def _index_rows(index: IndexFacts) -> list[tuple[str, str]]:
    """(what, value) of every fact that is known."""
    texts: dict[str, Callable[[Any], str]] = {
        "exact": lambda v: "exact: every image compared with every other" if v else "approximate: some cells per image",
        "recall_lower": lambda v: f"{v:.4f}",
        "measured_recall": lambda v: f"{v:.4f}",
        "distance_error": lambda v: f"{100 * v:.2g}%",
    }
    names = {
        "kind": "index",
        "exact": "search",
        "shards": "shards (index files)",
        "cells": "cells of the coarse quantizer",
        "nprobe": "cells searched per image (nprobe)",
        "target_recall": "recall@k asked for",
        "measured_recall": "recall@k measured",
        "recall_lower": "its lower 95% confidence bound",
        "distance_error": "mean relative error of the mean k-NN distance",
        "calibration_queries": "images that recall and error were measured on",
        "reason": "why this index",
    }
    assert names.keys() == {f.name for f in fields(index)}
    values = ((name, getattr(index, name)) for name in names)
    as_text: Callable[[Any], str] = lambda v: f"{v:,}" if isinstance(v, int) else str(v)  # noqa: E731
    return [(names[name], texts.get(name, as_text)(value)) for name, value in values if value is not None]


def _threshold_rows(data: ReportData) -> list[tuple[str, float, float]]:
    """(as written, density, share of the sampled images above it)."""
    return [(text, tau, float(np.mean(data.density > tau))) for text, tau in data.thresholds]


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
