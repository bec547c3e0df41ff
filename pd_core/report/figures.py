"""Figures of pages: their colours, axes and sizes, and the drawings that several pages show."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pd_core.engine.runs import REPORT
from pd_core.report.page import Calibration, calibration_range, drawable, finite_pairs, page, significant, visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DENSITY_AXIS = "pseudo density ρ (mean of the real set = 1)"
DISTANCE_AXIS = "mean distance to k nearest neighbors (Euclidean)"
# A density axis is logarithmic where the shown range spans more than this factor: with less, equal steps of ρ are
# easier to read; with more, the bulk of a linear histogram would be one bin.
LOG_AXIS_FACTOR = 20.0
# --- figures ----------------------------------------------------------------------------------------------------------
# The page turns these into their dark counterparts with a CSS filter, which keeps hues: one rendering serves both.
INK, MUTED, LINE, PAPER, BAR, MARK = "#1c2430", "#5d6878", "#dfe4ea", "#ffffff", "#7d9cc6", "#b4451f"
_WIDE_IN, _NARROW_IN = 9.6, 3.7  # for a desk and for a phone, where the wide one's text would be too small to read
_NAME_OFFSETS_PT = [
    (r * x, r * y) for r in (5, 10, 16) for x, y in ((1, 1), (1, -1), (-1, 1), (-1, -1), (0, 1), (0, -1))
]
_MARKER_PT = 8
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


def calibration_png(calibration: Calibration, narrow: bool = False) -> bytes:
    """Predicted against measured log ρ of held-out images, with the line on which a perfect predictor would lie."""
    true, predicted = finite_pairs(calibration)
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


def name_points(axes: Axes, names: Sequence[tuple[str, float, float, str]], points: np.ndarray) -> None:
    """Write each (name, x, y, color) beside its place; one that would cover another name or a point there is left out.

    points: float64 [P, 2], x and y of every marker in the figure. Call it when all else is drawn: places are in pixels.
    """
    from matplotlib.transforms import Bbox

    axes.get_figure(root=True).draw_without_rendering()  # type: ignore[union-attr]  # settles where the axes lie
    half = _MARKER_PT / 72 * _DPI / 2
    taken = [Bbox([place - half, place + half]) for place in axes.transData.transform(points)]
    for name, x, y, color in names:
        for offset in _NAME_OFFSETS_PT:
            written = axes.annotate(
                drawable(visible(name)),
                (x, y),
                xytext=offset,
                textcoords="offset points",
                ha={1: "left", 0: "center", -1: "right"}[np.sign(offset[0])],
                va="bottom" if offset[1] > 0 else "top",
                fontsize=7.5,
                color=color,
                parse_math=False,
                bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 0.5},
                in_layout=False,
            )
            box = written.get_window_extent()
            if axes.bbox.contains(*box.min) and axes.bbox.contains(*box.max) and not box.count_overlaps(taken):
                taken.append(box)
                break
            written.remove()


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


def page_files(template: str, context: Mapping[str, Any], drawings: Mapping[str, Drawing]) -> dict[str, bytes]:
    """Files of a report by name: the page of a template, with its figures, and each figure by itself, for MLflow."""
    # wide and narrow, as the template's `figure` macro shows it
    drawn = {name: {"wide": drawing(False), "narrow": drawing(True)} for name, drawing in drawings.items()}
    pictures = {f"{name}.png": sizes["wide"] for name, sizes in drawn.items()}
    return {**pictures, REPORT: page(template, {**context, "figures": drawn})}
