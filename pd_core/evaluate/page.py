"""The report of evaluate: one self-contained HTML page and its figures. Pure functions from plain data to bytes.

Style, escaping and figures' looks are those of `report`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from pd_core.core.settings.data import INCEPTION
from pd_core.report import figures as report_figures
from pd_core.report import page
from pd_core.report.figures import Drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARKERS = "osD^vP*X"
COLORS = (report_figures.MARK, report_figures.INK, "#2f7d5b", "#7a4fa3", "#b08a1e", report_figures.MUTED)
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


@dataclass(frozen=True)
class Number:
    """A metric's value with its 95% interval; low, high None where there are too few images for one."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Measured:
    """One set in one space.

    Attributes:
        name: of the set. uri: where it lies. asked: what it was selected by, or "".
        selected_here: by densities in this very space. n_real, n_generated: images measured. numbers: by metric.
        labels: numbers of each label's images. label_sizes: how many were measured of it, (real, generated).
        nearest: p1, p50, p99 of the distance to the nearest real image. outside: share outside the real manifold.
        copies: share within the distance of likely copies, None where that is not known (another space than the index's).
    """

    name: str
    uri: str
    asked: str
    selected_here: bool
    n_real: int
    n_generated: int
    numbers: Mapping[str, Number]
    labels: Mapping[str, Mapping[str, Number]]
    label_sizes: Mapping[str, tuple[int, int]]
    nearest: tuple[float, float, float]
    outside: float
    copies: float | None


@dataclass(frozen=True)
class SpaceData:
    """One feature space: its name, its extractor and preprocessing in words, and the sets measured in it."""

    name: str
    extractor: str
    detail: str
    is_judge: bool
    sets: Sequence[Measured]


@dataclass(frozen=True)
class Tile:
    """An image of a set: its picture, or None, and what is said under it."""

    key: str
    thumbnail: bytes | None
    lines: Sequence[str]


@dataclass(frozen=True)
class EvaluationData:
    """All that the page shows.

    Attributes:
        created: ISO 8601 time, given by the caller, so that `render` is a function of its argument alone.
        k_precision, k_coverage: neighbors of the metrics. sizes: images of each set before n of them were drawn.
        rows: heading, and images of one set: most realistic, least realistic, rarest.
        pictures_note: why pictures are missing, or "".
    """

    title: str
    real: str
    output: str
    created: str
    k_precision: int
    k_coverage: int
    n: int
    sizes: Mapping[str, int]
    spaces: Sequence[SpaceData]
    rows: Sequence[tuple[str, Sequence[tuple[str, Sequence[Tile]]]]]
    pictures_note: str
    timings_s: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    settings_yaml: str = ""


def metric_names(extractor: str) -> dict[str, str]:
    """How each metric reads in the space of an extractor: only the Inception of Heusel et al. (2017) gives an FID."""
    return {**METRICS, "frechet_distance": "FID"} if extractor == INCEPTION else METRICS


# --- figures -----------------------------------------------------------------------------------------------------------


def plane_png(space: SpaceData, narrow: bool = False) -> bytes:
    """Precision over recall of each set, with 95% intervals."""
    figure, axes = report_figures.new_figure(narrow, height_in=3.6 if narrow else 4.6, width_in=6.4)
    for i, measured in enumerate(space.sets):
        style = {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)]}
        draw_point(axes, measured.numbers["recall"], measured.numbers["precision"], measured.name, **style)
    plane_axes(axes)
    axes.legend(frameon=False, fontsize=9, loc="best")
    return report_figures.to_png(figure)


def draw_point(axes: Axes, x: Number, y: Number, label: str | None, color: str, marker: str) -> None:
    """A point with the intervals of both coordinates."""
    spans = [_errors(number) for number in (x, y)]
    axes.errorbar(
        [x.value],
        [y.value],
        xerr=spans[0],
        yerr=spans[1],
        fmt="none",
        ecolor=color,
        elinewidth=0.8,
        alpha=0.45,
    )
    axes.plot(
        [x.value],
        [y.value],
        marker,
        color=color,
        markersize=7,
        label=None if label is None else page.drawable(page.visible(label)),
    )


def _errors(number: Number) -> np.ndarray | None:
    if number.low is None or number.high is None:
        return None
    return np.array([[max(0.0, number.value - number.low)], [max(0.0, number.high - number.value)]])


def plane_axes(axes: Axes) -> None:
    """Names of a precision-recall plane."""
    axes.set_xlabel("recall (varied)")
    axes.set_ylabel("precision (faithful)")
    axes.margins(0.08)


def figures(data: EvaluationData) -> dict[str, bytes]:
    """The page's figures as PNG by file name, for MLflow."""
    return {f"{name}.png": drawing(False) for name, drawing in _drawings(data).items()}


def _drawings(data: EvaluationData) -> dict[str, Drawing]:
    def plane(space: SpaceData) -> Drawing:
        return lambda narrow: plane_png(space, narrow)

    return {f"precision_recall_{space.name}": plane(space) for space in data.spaces}


# --- the page ----------------------------------------------------------------------------------------------------------


def render(data: EvaluationData) -> bytes:
    """The page as UTF-8 HTML. The same data gives the same bytes."""
    context = {
        "d": data,
        "figures": report_figures.draw(_drawings(data)),
        "metric_names": metric_names,
        "names": [measured.name for measured in data.spaces[0].sets],
        "flattered": [m.name for space in data.spaces for m in space.sets if m.selected_here],
        "per_label": any(measured.labels for space in data.spaces for measured in space.sets),
        "label_rows": label_rows,
        "labels_shown": LABELS_SHOWN,
        "interval": interval,
    }
    return page.page("evaluation.html.j2", context)


def interval(number: Number | None) -> str:
    """`0.703 (0.68 … 0.72)`."""
    if number is None:
        return "–"
    text = page.number(number.value)
    if number.low is None or number.high is None:
        return text
    return f"{text} ({page.number(number.low)} … {page.number(number.high)})"


def label_rows(space: SpaceData) -> list[tuple[str, str, tuple[int, int], Mapping[str, Number]]]:
    """(label, set, (real, generated) images, numbers), by label; the first LABELS_SHOWN labels."""
    labels = sorted({label for measured in space.sets for label in measured.labels})[:LABELS_SHOWN]
    return [
        (label, m.name, m.label_sizes[label], m.labels[label])
        for label in labels
        for m in space.sets
        if label in m.labels
    ]
