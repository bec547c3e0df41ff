"""The report of build_index: one self-contained HTML page, and its figures; and what any report page is made with.

Pure functions from plain data to bytes. Reading artifacts and image files is the caller's part, so nothing here knows
where they are kept. A page holds its style, figures and thumbnails inline, runs no script and loads nothing: it opens
from a disk, from an object store's web view or inside MLflow.

Everything that came from outside (keys, labels, messages) is escaped by jinja2, and characters that do not print are
written as escapes (`visible`), so that a file name can neither act nor hide in the page.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_LABELS_SHOWN = 50
DENSITY_AXIS = "pseudo density ρ (mean of the real set = 1)"
DISTANCE_AXIS = "mean distance to k nearest neighbors (Euclidean)"

# A density axis is logarithmic where the shown range spans more than this factor: with less, equal steps of ρ are
# easier to read; with more, the bulk of a linear histogram would be one bin.
LOG_AXIS_FACTOR = 20.0


# --- what the page is made from ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Picture:
    """One image of the real set with its numbers.

    Attributes:
        key: name of the image within the source.
        label: its label, or None.
        density: pseudo density ρ.
        percentile: of ρ among the real set, in [0, 100].
        mean_knn_distance: Euclidean, not squared.
        thumbnail: PNG or JPEG (see `thumbnail`), or None when the original can no longer be read.
        distance: Euclidean distance to the image it is shown as a neighbor of, else None.
    """

    key: str
    label: str | None
    density: float
    percentile: float
    mean_knn_distance: float
    thumbnail: bytes | None
    distance: float | None = None


@dataclass(frozen=True)
class LabelRow:
    """Densities of the images of one label: number of images, mean and percentiles of ρ within the label."""

    label: str
    count: int
    mean: float
    p10: float
    p50: float
    p90: float


@dataclass(frozen=True)
class Calibration:
    """Held-out quality of the density predictor; r2 and spearman are of log ρ, None where undefined.

    Attributes:
        log_density: float64 [M], measured with the index; M may be a sample of the held-out rows (5,000 draw well).
        predicted_log_density: float64 [M].
        n_holdout: rows that r2, spearman and `more` are computed on.
        more: further figures. Names of `estimator.Calibration` get a description, others are shown as they are.
    """

    log_density: np.ndarray
    predicted_log_density: np.ndarray
    r2: float | None
    spearman: float | None
    n_holdout: int
    more: Mapping[str, float | None] = field(default_factory=dict)


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
        quantiles: float64 [1001], p0, p0.1 ... p100 of all densities (`density.density_quantiles`).
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

_CALIBRATION_TEXT: Mapping[str, str] = {
    "r2_density": "R² of ρ itself",
    "low_decile_spearman": "Spearman within the tenth of lowest density",
    "low_decile_mean_abs_log_error": "mean |error| of log ρ in the tenth of lowest density",
    "high_decile_spearman": "Spearman within the tenth of highest density",
    "high_decile_mean_abs_log_error": "mean |error| of log ρ in the tenth of highest density",
}


# --- figures -----------------------------------------------------------------------------------------------------------


# The page turns these into their dark counterparts with a CSS filter, which keeps hues: one rendering serves both.
INK, MUTED, LINE, PAPER, BAR, MARK = "#1c2430", "#5d6878", "#dfe4ea", "#ffffff", "#7d9cc6", "#b4451f"
_WIDE_IN, _NARROW_IN = 9.6, 3.7  # for a desk and for a phone, where the wide one's text would be too small to read
_DPI = 200  # shown at 100 px per inch: sharp on screens of twice the usual density

Drawing = Callable[[bool], bytes]  # narrow or not, to a PNG


@dataclass(frozen=True)
class DensityAxis:
    """The range of ρ that is shown, how many of the n sampled densities lie below and above it, and what it is."""

    low: float
    high: float
    log: bool
    below: int
    above: int
    n: int
    span: str


def density_axis(density: np.ndarray, quantiles: np.ndarray) -> DensityAxis:
    """p0.1 to p99.9 of the real set, so that a few extremes do not squeeze the rest; logarithmic for heavy tails.

    Below 1,000 densities p0.1 lies between the first two, and all are shown.
    """
    trim = 1 if density.size >= 1000 else 0
    low, high = float(quantiles[trim]), float(quantiles[-1 - trim])
    if low <= 0:  # ρ underflows to 0 far below the mean when n is large; a logarithmic axis starts above
        positive = density[density > 0]
        low = float(positive.min()) if positive.size else 0.5
        high = max(high, low)
    if high / low < 1 + 1e-9:  # all densities equal
        low, high = low * 0.95, high * 1.05
    below, above = int(np.count_nonzero(density < low)), int(np.count_nonzero(density > high))
    return DensityAxis(
        low, high, high / low > LOG_AXIS_FACTOR, below, above, density.size, "p0.1 to p99.9" if trim else "p0 to p100"
    )


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


def calibration_png(calibration: Calibration, narrow: bool = False) -> bytes:
    """Predicted against measured log ρ of held-out images, with the line on which a perfect predictor would lie."""
    true, predicted = _finite_pairs(calibration)
    figure, axes = new_figure(narrow, height_in=3.4 if narrow else 4.4, width_in=4.8)
    low, high = calibration_range(calibration)
    if true.size > 1500:
        extent = (low, high, low, high)
        # Squared units: a cell's colour grows with the logarithm of its number of points.
        axes.hexbin(true, predicted, gridsize=45, extent=extent, bins="log", mincnt=1, cmap=_colormap(), linewidths=0.1)
    else:
        axes.plot(true, predicted, "o", color=BAR, markersize=3, alpha=0.7, markeredgewidth=0)
    axes.plot([low, high], [low, high], color=MARK, linewidth=1.2)
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
    axes.set_aspect("equal")
    axes.set_xlabel("measured log ρ (natural logarithm)")
    axes.set_ylabel("predicted log ρ")
    return to_png(figure)


def calibration_range(calibration: Calibration) -> tuple[float, float]:
    """Range of both axes: 0.1% to 99.9% of measured and of predicted log ρ, with a margin."""
    true, predicted = _finite_pairs(calibration)
    if true.size == 0:
        return -1.0, 1.0
    ends = np.quantile(np.stack([true, predicted]), [0.001, 0.999], axis=1)
    low, high = float(ends.min()), float(ends.max())
    margin = 0.04 * (high - low) or 0.5
    return low - margin, high + margin


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


def _finite_pairs(calibration: Calibration) -> tuple[np.ndarray, np.ndarray]:
    true, predicted = calibration.log_density, calibration.predicted_log_density
    assert true.shape == predicted.shape, (true.shape, predicted.shape)
    finite = np.isfinite(true) & np.isfinite(predicted)  # a network that regresses ρ itself may predict ρ <= 0
    return true[finite], predicted[finite]


def draw_thresholds(axes: Axes, thresholds: Sequence[tuple[str, float]], low: float, high: float) -> None:
    """A named line at each (as the user wrote it, density) that lies within low ... high."""
    inside = sorted((t for t in thresholds if low <= t[1] <= high), key=lambda t: t[1])
    for i, (text, density) in enumerate(inside):
        axes.axvline(density, color=MARK, linewidth=1.1)
        fraction = axes.transAxes.inverted().transform(axes.transData.transform((density, 0)))[0]
        axes.annotate(
            drawable(visible(f"{text}: {significant(density)}" if text.startswith("p") else text)),
            (density, 0.95 - 0.09 * (i % 3)),  # three heights: names of neighboring thresholds do not overlap
            xycoords=("data", "axes fraction"),
            xytext=(-4 if fraction > 0.8 else 4, 0),
            textcoords="offset points",
            ha="right" if fraction > 0.8 else "left",
            va="center",
            color=MARK,
            fontsize=9,
            parse_math=False,
            bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 1.0},
        )


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


def new_figure(narrow: bool, height_in: float, width_in: float = _WIDE_IN) -> tuple[Figure, Axes]:
    """An empty figure in the style of the page, for a phone (narrow) or wider; `to_png` turns it into bytes."""
    # Figure without pyplot: pyplot keeps global state and is not safe to use from threads.
    from matplotlib.figure import Figure

    size = (_NARROW_IN if narrow else width_in, height_in)
    figure = Figure(figsize=size, dpi=_DPI, layout="constrained", facecolor=PAPER)
    axes = figure.add_subplot(facecolor=PAPER)
    axes.grid(color=LINE, linewidth=0.7)
    axes.set_axisbelow(True)
    style_axes(axes)
    return figure, axes


def style_axes(axes: Any) -> None:
    """Colours and sizes of the page."""
    for name, spine in axes.spines.items():
        spine.set_visible(name == "bottom")
        spine.set_color(MUTED)
    axes.tick_params(which="both", colors=MUTED, labelsize=9, width=0.7)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set_color(INK)
        axis.label.set_fontsize(9.5)


def _colormap() -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("density", ["#c3d1e6", BAR, INK])


def to_png(figure: Figure) -> bytes:
    """The figure as PNG; the same figure gives the same bytes."""
    sink = io.BytesIO()
    figure.savefig(sink, format="png", dpi=_DPI, facecolor=PAPER, metadata={"Software": None})
    return sink.getvalue()


# --- text --------------------------------------------------------------------------------------------------------------


def visible(text: str) -> str:
    """The text with every character that does not print (newline, control, right-to-left mark, ...) as an escape."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def shorten(text: str, chars: int) -> str:
    """At most `chars` characters; the middle gives way, as the end of a path tells more than what precedes it."""
    if len(text) <= chars:
        return text
    head = chars // 3
    return f"{text[:head]}…{text[len(text) - (chars - head - 1) :]}"


def drawable(text: str) -> str:
    """The text with characters that the figures' font lacks as �."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    font = get_font(findfont(FontProperties()))
    return "".join(c if font.get_char_index(ord(c)) else "\N{REPLACEMENT CHARACTER}" for c in text)


def significant(value: float) -> str:
    """Four significant digits, zeros included, so that values in a column compare at a glance."""
    return f"{value:#.4g}".removesuffix(".")


def number(value: float | None) -> str:
    """At most four significant digits; "not defined" for None."""
    return "not defined" if value is None else f"{value:.4g}"


def percentile(value: float) -> str:
    """A percentile with one decimal, and towards 0 and 100 with as many as tell it from its neighbors."""
    tail = min(value, 100.0 - value)
    decimals = 1 if tail >= 1 or tail <= 0 else min(8, 1 - math.floor(math.log10(tail)))
    return f"{value:.{decimals}f}"


def seconds(value: float) -> str:
    """`0.42 s`, `12.3 s`, `3 min 5 s` or `2 h 14 min`."""
    if value < 60:
        return f"{value:.2f} s" if value < 10 else f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def _data_uri(image: bytes) -> str:
    kind = "png" if image.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(image).decode('ascii')}"


# --- the page ----------------------------------------------------------------------------------------------------------


def render(data: ReportData) -> bytes:
    """The page as UTF-8 HTML. The same data gives the same bytes."""
    return page("report.html.j2", _context(data))


def page(template: str, context: Mapping[str, Any]) -> bytes:
    """A page of the package's templates as UTF-8 HTML; every expression in it is made visible and escaped.

    The template extends `base.html.j2`, which needs `d.title`, `d.created` and `d.versions`.
    """
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    environment = Environment(
        loader=FunctionLoader(lambda name: resources.files("pd_core").joinpath("templates", name).read_text("utf-8")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=_finalize,
    )
    environment.filters |= {
        "count": lambda value: f"{value:,}",
        "number": number,
        "significant": significant,
        "percent": lambda share: f"{100 * share:.3g}%",
        "percentile": percentile,
        "seconds": seconds,
        "shorten": lambda text, chars: shorten(visible(text), chars),
        "multiline": _multiline,
        "data_uri": _data_uri,
        "hidden_points": hidden_points,
        "calibration_rows": calibration_rows,
    }
    return environment.get_template(template).render(context).encode("utf-8")


def draw(drawings: Mapping[str, Drawing]) -> dict[str, dict[str, bytes]]:
    """Each figure wide and narrow, as the template's `figure` macro shows it."""
    return {name: {"wide": drawing(False), "narrow": drawing(True)} for name, drawing in drawings.items()}


def _finalize(value: Any) -> Any:
    # Applied to every expression of the template, before escaping. Markup is a str that is finished already.
    return visible(value) if type(value) is str else value


def _multiline(text: str) -> Any:
    from markupsafe import Markup, escape

    return Markup("\n").join(escape(visible(line)) for line in text.splitlines())


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


def calibration_rows(calibration: Calibration) -> list[tuple[str, float | None]]:
    """(what, value) of every figure of a calibration."""
    rows = [("R² of log ρ", calibration.r2), ("Spearman rank correlation", calibration.spearman)]
    return rows + [(_CALIBRATION_TEXT.get(name, name), value) for name, value in calibration.more.items()]


def hidden_points(calibration: Calibration) -> int:
    """Points that the drawing leaves out: beyond its axes, or not finite."""
    true, predicted = _finite_pairs(calibration)
    low, high = calibration_range(calibration)
    inside = (true >= low) & (true <= high) & (predicted >= low) & (predicted <= high)
    return calibration.log_density.size - int(np.count_nonzero(inside))


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
