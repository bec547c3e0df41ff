"""The report of tradeoff: one self-contained HTML page with the precision-recall curves of every method, and a table.

Pure functions from plain data to bytes. Style, escaping and figures' looks are those of `report`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pd_core.evaluate.page import COLORS, MARKERS, Number, draw_point, interval, metric_names, plane_axes
from pd_core.report import figures as report_figures
from pd_core.report import page
from pd_core.report.figures import Drawing


@dataclass(frozen=True)
class Point:
    """One setting in one space.

    Attributes:
        name, curve: of the setting. place: along its curve, where the generator itself is at 0. numbers: by metric; empty where the pool did not give n images.
        candidates: looked at. rate: accepted share. effective: rows of the pool that the weights are worth; exact: without Polarity's steps, else None.
        frontier: no other setting is better in both precision and recall.
    """

    name: str
    curve: str
    place: float
    numbers: Mapping[str, Number]
    candidates: int
    rate: float
    effective: float
    exact: float | None
    frontier: bool


@dataclass(frozen=True)
class Plane:
    """All settings in one space, in order of the curves."""

    name: str
    extractor: str
    is_judge: bool
    points: Sequence[Point]


@dataclass(frozen=True)
class TradeoffData:
    """All that the page shows.

    Attributes:
        created: ISO 8601 time, given by the caller, so that `render` is a function of its argument alone.
        target: as asked for, or None. picked: sentence on the setting that was chosen for it, by space.
        pool: candidates. n: images of each setting. n_real: real images. score: what decided.
        images: heading and thumbnails of a few settings.
    """

    title: str
    index: str
    output: str
    created: str
    n: int
    n_real: int
    pool: int
    score: str
    k_precision: int
    k_coverage: int
    planes: Sequence[Plane]
    target: str | None
    picked: Sequence[str]
    images: Sequence[tuple[str, Sequence[bytes]]]
    timings_s: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    settings_yaml: str = ""


def curves(points: Sequence[Point]) -> dict[str, list[Point]]:
    """Measured points of each curve, the generator's own first."""
    found: dict[str, list[Point]] = {}
    for point in points:
        if point.numbers:
            found.setdefault(point.curve, []).append(point)
    return found


def plane_png(plane: Plane, narrow: bool = False) -> bytes:
    """Precision over recall: a line for each method and threshold, through the generator itself; 95% intervals."""
    figure, axes = report_figures.new_figure(narrow, height_in=3.9 if narrow else 5.6, width_in=8.4)
    by_curve = curves(plane.points)
    origin = by_curve.pop("generator", [])
    for i, (name, points) in enumerate(by_curve.items()):
        color, marker = COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]
        line = sorted([*origin, *points], key=lambda point: point.place)
        axes.plot(
            [p.numbers["recall"].value for p in line],
            [p.numbers["precision"].value for p in line],
            color=color,
            linewidth=1.4,
            alpha=0.7,
        )
        for j, point in enumerate(points):
            label = name if j == 0 else None
            draw_point(axes, point.numbers["recall"], point.numbers["precision"], label, color, marker)
            if not narrow:
                _annotate(axes, point)
    for point in origin:
        draw_point(
            axes, point.numbers["recall"], point.numbers["precision"], "the generator itself", report_figures.INK, "o"
        )
    plane_axes(axes)
    axes.legend(frameon=False, fontsize=9, loc="best")
    return report_figures.to_png(figure)


def _annotate(axes: Any, point: Point) -> None:
    axes.annotate(
        page.drawable(point.name.rpartition(", ")[2]),
        (point.numbers["recall"].value, point.numbers["precision"].value),
        xytext=(5, 4),
        textcoords="offset points",
        fontsize=7.5,
        color=report_figures.MUTED,
        parse_math=False,
    )


def figures(data: TradeoffData) -> dict[str, bytes]:
    """The page's figures as PNG by file name, for MLflow and for other pages."""
    return {f"{name}.png": drawing(False) for name, drawing in _drawings(data).items()}


def _drawings(data: TradeoffData) -> dict[str, Drawing]:
    def draw(plane: Plane) -> Drawing:
        return lambda narrow: plane_png(plane, narrow)

    return {f"tradeoff_{plane.name}": draw(plane) for plane in data.planes}


def render(data: TradeoffData) -> bytes:
    """The page as UTF-8 HTML. The same data gives the same bytes."""
    context = {
        "d": data,
        "figures": report_figures.draw(_drawings(data)),
        "metric_names": metric_names,
        "interval": interval,
    }
    return page.page("tradeoff.html.j2", context)
