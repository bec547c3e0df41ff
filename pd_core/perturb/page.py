"""The report of perturb: one self-contained HTML page, and its figures. Pure functions from plain data to bytes.

Each sample down, as it was, and up; and whether the index agrees with what the predictor said. Style, escaping and figures'
looks are those of `report`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pd_core.report import figures as report_figures
from pd_core.report import page
from pd_core.report.figures import Drawing
from pd_core.report.page import Calibration

BINS = 40  # of the histogram of changes
ORDER = ("down", "before", "up")  # of the images of a sample, from left to right


@dataclass(frozen=True)
class Shot:
    """One image of a sample with its numbers; densities rho by predictor and index, percentile of the latter among the real.

    distance: Euclidean, between its feature and the original's; None for the original. confirmed: likewise.
    """

    predicted: float
    by_index: float
    percentile: float
    thumbnail: bytes
    distance: float | None = None
    confirmed: bool | None = None


@dataclass(frozen=True)
class Shown:
    """A sample: its number and seed, what the generator was asked for, and its images by `down`, `before`, `up`."""

    number: int
    seed: int
    label: str | None
    prompt: str | None
    shots: Mapping[str, Shot]


@dataclass(frozen=True)
class Moved:
    """All images of one direction.

    Attributes:
        direction: up or down. rows: of it.
        confirmed: rows whose index-scored density moved that way; low, high: 95% interval of their share.
        predicted_share: of rows whose predicted density did; None where all of these underflow to 0.
        by_index, predicted: log(after / before), float64 [rows or less] of the same rows; left out of both where a density
            underflows to 0.
        no_log_ratio: rows so left out. unmoved: rows that kept their latent. feature_distance: mean.
        agreement: predicted against index-scored log density of the images after.
    """

    direction: str
    rows: int
    confirmed: int
    low: float
    high: float
    predicted_share: float | None
    by_index: np.ndarray
    predicted: np.ndarray
    no_log_ratio: int
    unmoved: int
    feature_distance: float
    agreement: Calibration

    @property
    def share(self) -> float:
        """Confirmed."""
        return self.confirmed / self.rows

    @property
    def factor(self) -> float | None:
        """exp of the mean log change by the index; None where there is none."""
        return float(np.exp(self.by_index.mean())) if self.by_index.size else None

    @property
    def predicted_factor(self) -> float | None:
        """The same by the predictor."""
        return float(np.exp(self.predicted.mean())) if self.predicted.size else None


@dataclass(frozen=True)
class PerturbedData:
    """All that the page shows.

    Attributes:
        created: ISO 8601 time, given by the caller, so that `render` is a function of its argument alone.
        n: samples. epsilon, step_size, steps, random_start: of Algorithm 1.
        moved: of each direction. not_finite: changes in which a score or a gradient was not finite.
        before: predicted against index-scored log density of the originals.
        shown: some samples, in ascending index-scored density of the original.
        copies: likely copies among the images. copy_distance: up to which one is.
        facts: of generator and real set, in order of display, by heading.
    """

    title: str
    output: str
    index: str
    created: str
    n: int
    epsilon: float
    step_size: float
    steps: int
    random_start: bool
    moved: Sequence[Moved]
    not_finite: int
    before: Calibration
    shown: Sequence[Shown]
    copies: int
    copy_distance: float
    facts: Mapping[str, Sequence[tuple[str, str]]] = field(default_factory=dict)
    timings_s: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    settings_yaml: str = ""

    def __post_init__(self) -> None:
        """Conservation: every sample moved in every direction."""
        for moved in self.moved:
            assert moved.rows == self.n and 0 <= moved.confirmed <= moved.rows, (moved.rows, self.n)
            assert moved.by_index.size + moved.no_log_ratio == moved.rows
            assert moved.predicted.size == moved.by_index.size

    @property
    def columns(self) -> list[str]:
        """Of the images of a sample, from left to right."""
        there = {"before", *(moved.direction for moved in self.moved)}
        return [name for name in ORDER if name in there]


# --- figures -----------------------------------------------------------------------------------------------------------


def changes_png(data: PerturbedData, narrow: bool = False) -> bytes:
    """Histograms of log(after / before): by the index (filled) and by the predictor (line), a colour for each direction."""
    figure, axes = report_figures.new_figure(narrow, height_in=2.9 if narrow else 3.5)
    edges = _edges(data)
    for moved in data.moved:
        color = report_figures.MARK if moved.direction == "up" else report_figures.BAR
        inside = lambda values: np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0]  # noqa: E731
        axes.stairs(
            inside(moved.by_index), edges, fill=True, color=color, alpha=0.45, label=f"{moved.direction}, index"
        )
        axes.stairs(inside(moved.predicted), edges, color=color, linewidth=1.8, label=f"{moved.direction}, predictor")
    axes.axvline(0.0, color=report_figures.INK, linewidth=1.0, linestyle=":")
    axes.set_xlim(edges[0], edges[-1])
    axes.set_xlabel("log(ρ after / ρ before)")
    axes.set_ylabel("images")
    figure.legend(
        loc="outside upper left", ncols=2 if narrow else 4, frameon=False, fontsize=9, labelcolor=report_figures.INK
    )
    return report_figures.to_png(figure)


def agreement_png(data: PerturbedData, narrow: bool = False) -> bytes:
    """Change by the predictor against change by the index of each image; those in the right quarters agree in direction."""
    figure, axes = report_figures.new_figure(narrow, height_in=3.4 if narrow else 4.4, width_in=4.8)
    low, high = _edges(data)[[0, -1]]
    for moved in data.moved:
        color = report_figures.MARK if moved.direction == "up" else report_figures.BAR
        axes.plot(moved.by_index, moved.predicted, "o", color=color, markersize=3, alpha=0.6, markeredgewidth=0)
    axes.plot([low, high], [low, high], color=report_figures.MUTED, linewidth=1.0)
    for line in (axes.axvline, axes.axhline):
        line(0.0, color=report_figures.INK, linewidth=0.8, linestyle=":")
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
    axes.set_aspect("equal")
    axes.set_xlabel("by the index: log(ρ after / ρ before)")
    axes.set_ylabel("by the predictor")
    return report_figures.to_png(figure)


def _edges(data: PerturbedData) -> np.ndarray:
    """Edges of the bins, which hold 0 as one of them: 1% to 99% of all changes."""
    everything = np.concatenate([np.r_[moved.by_index, moved.predicted] for moved in data.moved])
    everything = everything[np.isfinite(everything)]
    low, high = np.quantile(everything, [0.01, 0.99]) if everything.size else (-1.0, 1.0)
    low, high = min(float(low), 0.0), max(float(high), 0.0)
    width = max(high - low, 1e-6) / BINS
    return np.arange(np.floor(low / width) - 1, np.ceil(high / width) + 2) * width


def figures(data: PerturbedData) -> dict[str, bytes]:
    """The page's figures as PNG by file name, for MLflow."""
    return {f"{name}.png": drawing(False) for name, drawing in _drawings(data).items()}


def _drawings(data: PerturbedData) -> dict[str, Drawing]:
    return {
        "changes": lambda narrow: changes_png(data, narrow),
        "agreement": lambda narrow: agreement_png(data, narrow),
    }


# --- the page ----------------------------------------------------------------------------------------------------------


def render(data: PerturbedData) -> bytes:
    """The page as UTF-8 HTML. The same data gives the same bytes."""
    context: dict[str, Any] = {
        "d": data,
        "figures": report_figures.draw(_drawings(data)),
        "total_s": sum(data.timings_s.values()),
        "snippet": _snippet(data),
    }
    return page.page("perturbed.html.j2", context)


def _snippet(data: PerturbedData) -> str:
    folder = data.output.rstrip("/") + "/perturbed"
    return f"""\
from datasets import load_dataset

rows = load_dataset("parquet", data_files={folder + "/*.parquet"!r}, split="train")
confirmed = rows.filter(lambda row: row["confirmed"])
before, after = rows[0]["image_before"], rows[0]["image"]  # PIL images
"""
