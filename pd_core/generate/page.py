"""The report of generate: one self-contained HTML page, and its figures. Pure functions from plain data to bytes.

What was asked for, what the generator gives, and what of that was accepted, side by side on the axis of the real set's
densities. Style, escaping and figures' looks are those of `report`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pd_core.density import weighting as density_weighting
from pd_core.report import figures as report_figures
from pd_core.report import page
from pd_core.report.figures import Drawing
from pd_core.report.page import Calibration

MAX_WEIGHTS_SHOWN = 60  # rows of the table of weights
MAX_COUNTS_SHOWN = 50  # labels, and prompts
MAX_STEPS_DRAWN = 60  # of the acceptance rate over candidates
TENTHS = 10

# A bin of the drawn histogram is at least this share of the axis: bins of equally many real images can be as narrow as
# a hair where real densities crowd, and a bin's height is its share over its width.
_NARROWEST_BIN = 1 / 100


# --- what the page is made from ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """One generated image with its numbers.

    Attributes:
        number: running number of the candidate. seed: that its image was made from.
        density: ρ. percentile: of it among the real set, in [0, 100].
        probability: a, of being accepted; None where nothing was to be decided (the pilot).
        label, prompt: what the generator was asked to show, or None.
        thumbnail: PNG or JPEG.
    """

    number: int
    seed: int
    density: float
    percentile: float
    probability: float | None
    label: str | None
    prompt: str | None
    thumbnail: bytes


@dataclass(frozen=True)
class Pair:
    """An accepted image beside the real image nearest to it.

    Attributes:
        distance: Euclidean, between their features. likely_copy: whether that is near enough to be flagged.
        key, label: of the real image; key None where the index does not name it any more.
        original: its thumbnail, or None, and then `missing` says why.
    """

    sample: Sample
    distance: float
    likely_copy: bool
    key: str | None
    label: str | None
    original: bytes | None
    missing: str = ""


@dataclass(frozen=True)
class Expected:
    """What the pilot of `candidates` candidates said: acceptance rate, its 95% interval, P = Pr(ρ > τ) or None, copies."""

    rate: float
    low: float
    high: float
    above: float | None
    candidates: int
    copies: int


@dataclass(frozen=True)
class Weight:
    """One step of a weight function: ω(ρ) = weight for low < ρ <= high, accepted with `probability` = ω / sup ω.

    Where log-volumes decide, of v instead of ρ.

    label: whose function it is; None is everybody's. low, high: None where the step has no end on that side.
    """

    label: str | None
    low: float | None
    high: float | None
    weight: float
    probability: float


@dataclass(frozen=True)
class Count:
    """Accepted images of one label or prompt, and their mean ρ."""

    name: str
    rows: int
    mean_density: float


@dataclass(frozen=True)
class SamplesData:
    """All that the page shows.

    Attributes:
        created: ISO 8601 time, given by the caller, so that `render` is a function of its argument alone.
        n: accepted images. candidates: up to and with the n-th accepted.
        score: `predictor`, `index` or `both`, what the densities of generated images are.
        weighting: settings of it: kind, and what that takes.
        weights: its steps, in ascending density within each label.
        inverse_sum, inverse_square_sum: Σ 1/a and Σ 1/a² over the accepted.
        quantiles: float64 [1001], p0, p0.1 ... p100 of the real set's densities.
        generated: int64 [B], candidates in each of B bins of equally many real images; those beyond the real set count in
            the outermost. All candidates that were made, `candidates` of them or more. accepted: int64 [B], adds up to n.
        accepted_by_index: int64 [B], the accepted in the bins of their index-scored densities, where those are known.
        span: lowest and highest ρ among pilot and accepted, a few extremes apart: how far the axis must reach.
        bands: name of a range of percentiles of the accepted, and images from it in ascending density.
        unfiltered: images of the pilot, in ascending density.
        pilot_calibration: predicted against index-scored on the pilot; `accepted_calibration` on the accepted, or None.
        parts: (candidates, accepted) of each part in order; adds up to (candidates, n).
        copies: likely copies among what the weighting accepted. drop_copies: they were left out of the n.
        copy_distance: up to which an image is one. copies_quantile: share of real images that have a real one so near.
        pairs: flagged ones nearest first; where none is flagged, the nearest of all.
        originals_note: why originals can be read no more, or empty.
        labels, prompts: counts that add up to n each, or empty. choices: of how many labels was drawn.
        plan: the text that was printed before the run.
        facts: of generator and real set, in order of display, by heading.
    """

    title: str
    output: str
    index: str
    created: str
    n: int
    candidates: int
    score: str
    weighting: Mapping[str, Any]
    weights: Sequence[Weight]
    expected: Expected
    inverse_sum: float
    inverse_square_sum: float
    quantiles: np.ndarray
    generated: np.ndarray
    accepted: np.ndarray
    span: tuple[float, float]
    bands: Sequence[tuple[str, Sequence[Sample]]]
    unfiltered: Sequence[Sample]
    pilot_calibration: Calibration
    parts: Sequence[tuple[int, int]]
    copies: int
    copy_distance: float
    copies_quantile: float
    accepted_by_index: np.ndarray | None = None
    accepted_calibration: Calibration | None = None
    drop_copies: bool = False
    pairs: Sequence[Pair] = ()
    originals_note: str = ""
    labels: Sequence[Count] = ()
    prompts: Sequence[Count] = ()
    choices: Mapping[str, int] = field(default_factory=dict)
    plan: str = ""
    facts: Mapping[str, Sequence[tuple[str, str]]] = field(default_factory=dict)
    timings_s: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    settings_yaml: str = ""

    def __post_init__(self) -> None:
        """Conservation: what the page adds up must add up."""
        bins = len(self.generated)
        assert self.quantiles.shape == (1001,), self.quantiles.shape
        assert bins % TENTHS == 0 and 1000 % bins == 0, bins
        assert self.accepted.shape == (bins,) and self.accepted.sum() == self.n, (self.accepted.sum(), self.n)
        assert self.accepted_by_index is None or self.accepted_by_index.sum() == self.n
        assert self.generated.sum() >= self.candidates >= self.n, (self.generated.sum(), self.candidates, self.n)
        assert tuple(map(sum, zip(*self.parts, strict=True))) == (self.candidates, self.n), (self.parts, self.n)
        for counts in (self.labels, self.prompts):
            assert not counts or sum(count.rows for count in counts) == self.n

    @property
    def acceptance_rate(self) -> float:
        """Measured: n over candidates."""
        return self.n / self.candidates

    @property
    def measured_interval(self) -> tuple[float, float]:
        """Where the measured rate should lie with 95%, by the pilot: that of the true rate, and the run's own error."""
        expected = self.expected
        return density_weighting.measured_interval(expected.rate, expected.low, expected.high, self.candidates)

    @property
    def as_expected(self) -> bool:
        """Whether the measured rate lies in `measured_interval`."""
        low, high = self.measured_interval
        return low <= self.acceptance_rate <= high

    @property
    def effective_sample_size(self) -> float:
        """(Σ 1/a)² / Σ 1/a² (Kish 1965): as many equally weighted samples tell the generator's means as well."""
        return self.inverse_sum**2 / self.inverse_square_sum


# --- figures -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Steps:
    """Histograms over one set of edges [B + 1], each a density [B] whose integral over the axis is 1.

    The integral is over ρ, or over log ρ where `log`.
    """

    edges: np.ndarray
    log: bool
    real: np.ndarray
    generated: np.ndarray
    accepted: np.ndarray


def steps(data: SamplesData) -> Steps:
    """What the histogram draws: bins of equally many real images, those too narrow to be seen joined with the next.

    The outermost bins hold what lies beyond the real set; they reach to the ends of the axis, where nearly all of it is.
    """
    bins = len(data.generated)
    edges = data.quantiles[:: 1000 // bins].copy()
    low, high = min(data.span[0], float(data.quantiles[1])), max(data.span[1], float(data.quantiles[-2]))
    if low <= 0:  # ρ underflows to 0 far below the mean when the sharpness is large
        positive = edges[edges > 0]
        low = float(positive[0]) / 2 if positive.size else 0.5
    if high / low < 1 + 1e-9:  # all densities equal
        low, high = low * 0.95, low * 1.05
    log = high / low > report_figures.LOG_AXIS_FACTOR
    edges = np.clip(edges, low, high)
    edges[[0, -1]] = low, high
    at = np.log(edges) if log else edges
    counts = np.stack([np.full(bins, 1.0), data.generated, data.accepted]).astype(np.float64)
    counts /= counts.sum(axis=1, keepdims=True)
    kept = _wide_enough(at)
    joined = np.add.reduceat(counts, kept[:-1], axis=1)
    real, generated, accepted = joined / np.diff(at[kept])
    return Steps(edges[kept], log, real, generated, accepted)


def _wide_enough(at: np.ndarray) -> np.ndarray:
    """Indices of the edges that stay, first and last included, so that no bin is narrower than _NARROWEST_BIN."""
    narrowest = (at[-1] - at[0]) * _NARROWEST_BIN
    kept = [0]
    for i in range(1, len(at) - 1):
        if at[i] - at[kept[-1]] >= narrowest and at[-1] - at[i] >= narrowest:
            kept.append(i)
    return np.array([*kept, len(at) - 1])


def histogram_png(data: SamplesData, narrow: bool = False) -> bytes:
    """Real (filled), generated (dashed) and accepted (line) over ρ, with τ where there is one."""
    shown = steps(data)
    figure, axes = report_figures.new_figure(narrow, height_in=3.0 if narrow else 3.7)
    axes.stairs(shown.real, shown.edges, fill=True, color=report_figures.BAR, alpha=0.55, label="real")
    axes.stairs(
        shown.generated, shown.edges, color=report_figures.INK, linestyle=(0, (4, 2)), linewidth=1.3, label="generated"
    )
    axes.stairs(shown.accepted, shown.edges, color=report_figures.MARK, linewidth=2.2, label="accepted")
    axes.set_xscale("log" if shown.log else "linear")
    axes.set_xlim(shown.edges[0], shown.edges[-1])
    axes.set_ylim(0, 1.3 * max(float(values.max()) for values in (shown.real, shown.generated, shown.accepted)))
    axes.set_yticklabels([])
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    axes.set_xlabel("pseudo density ρ (real mean = 1)" if narrow else report_figures.DENSITY_AXIS)
    axes.set_ylabel("relative frequency")
    report_figures.draw_thresholds(axes, thresholds(data), float(shown.edges[0]), float(shown.edges[-1]))
    figure.legend(loc="outside upper left", ncols=3, frameon=False, fontsize=9, labelcolor=report_figures.INK)
    return report_figures.to_png(figure)


def acceptance_png(data: SamplesData, narrow: bool = False) -> bytes:
    """Acceptance rate of each stretch of candidates and of all up to there, with the pilot's interval."""
    figure, axes = report_figures.new_figure(narrow, height_in=2.8 if narrow else 3.0)
    candidates, accepted = _stretches(data.parts)
    ends = np.cumsum(candidates)
    expected = data.expected
    axes.axhspan(
        100 * expected.low, 100 * expected.high, color=report_figures.BAR, alpha=0.3, linewidth=0, label="pilot, 95%"
    )
    axes.axhline(100 * expected.rate, color=report_figures.BAR, linewidth=1.2)
    edges = np.r_[0, ends]
    axes.stairs(
        100 * accepted / candidates,
        edges,
        baseline=None,
        color=report_figures.MUTED,
        linewidth=1.1,
        label="of each stretch",
    )
    total = 100 * np.cumsum(accepted) / ends
    axes.plot(ends, total, color=report_figures.MARK, linewidth=2.2, marker="o", markersize=3.5, label="of all so far")
    axes.set_xlim(0, ends[-1])
    highest = max(100 * expected.high, float((100 * accepted / candidates).max()))
    axes.set_ylim(0, min(1.15 * highest, 104.0))
    axes.set_xlabel("candidates")
    axes.set_ylabel("accepted (%)")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    figure.legend(loc="outside upper left", ncols=3, frameon=False, fontsize=9, labelcolor=report_figures.INK)
    return report_figures.to_png(figure)


def _stretches(parts: Sequence[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Candidates and accepted of at most MAX_STEPS_DRAWN runs of parts."""
    counts = np.array(parts, dtype=np.float64).T
    starts = np.unique(np.linspace(0, len(parts), min(len(parts), MAX_STEPS_DRAWN) + 1).astype(int)[:-1])
    candidates, accepted = np.add.reduceat(counts, starts, axis=1)
    return candidates, accepted


def thresholds(data: SamplesData) -> list[tuple[str, float]]:
    """(as the user wrote it, τ) of a two-level weighting that is the same for all."""
    if data.weighting["kind"] != "two_level" or data.weighting["per_label"]:
        return []
    tau = data.weights[0].high
    assert tau is not None
    return [(str(data.weighting["threshold"]), tau)]


def figures(data: SamplesData) -> dict[str, bytes]:
    """The page's figures as PNG by file name, for MLflow."""
    return {f"{name}.png": drawing(False) for name, drawing in _drawings(data).items()}


def _drawings(data: SamplesData) -> dict[str, Drawing]:
    drawings: dict[str, Drawing] = {
        "sample_densities": lambda narrow: histogram_png(data, narrow),
        "acceptance": lambda narrow: acceptance_png(data, narrow),
        "predictor_on_generated": lambda narrow: report_figures.calibration_png(data.pilot_calibration, narrow),
    }
    accepted = data.accepted_calibration
    if accepted is not None:
        drawings["predictor_on_accepted"] = lambda narrow: report_figures.calibration_png(accepted, narrow)
    return drawings


# --- the page ----------------------------------------------------------------------------------------------------------


def render(data: SamplesData) -> bytes:
    """The page as UTF-8 HTML. The same data gives the same bytes."""
    return page.page("samples.html.j2", _context(data))


def _context(data: SamplesData) -> dict[str, Any]:
    shown = steps(data)
    return {
        "d": data,
        "figures": report_figures.draw(_drawings(data)),
        "total_s": sum(data.timings_s.values()),
        "axis": {"low": float(shown.edges[0]), "high": float(shown.edges[-1]), "log": shown.log},
        "tenths": tenths(data),
        "threshold": dict(thresholds(data)),
        "weights": data.weights[:MAX_WEIGHTS_SHOWN],
        "counts": [(what, counts, counts_shown(counts)) for what, counts in _counts(data)],
        "snippets": _snippets(data),
    }


@dataclass(frozen=True)
class Tenth:
    """One tenth of the real set: its range of ρ, and shares of the generated and of the accepted in it.

    factor: accepted share over generated share, None where none was generated.
    """

    name: str
    low: float
    high: float
    generated: float
    accepted: float
    accepted_by_index: float | None
    factor: float | None


def tenths(data: SamplesData) -> list[Tenth]:
    """Shares in each tenth of the real set; the columns add up to 1."""
    share = lambda counts: counts.reshape(TENTHS, -1).sum(axis=1) / counts.sum()  # noqa: E731
    generated, accepted = share(data.generated), share(data.accepted)
    by_index = None if data.accepted_by_index is None else share(data.accepted_by_index)
    return [
        Tenth(
            name=f"p{10 * i}–p{10 * i + 10}",
            low=float(data.quantiles[100 * i]),
            high=float(data.quantiles[100 * i + 100]),
            generated=float(generated[i]),
            accepted=float(accepted[i]),
            accepted_by_index=None if by_index is None else float(by_index[i]),
            factor=float(accepted[i] / generated[i]) if generated[i] else None,
        )
        for i in range(TENTHS)
    ]


def _counts(data: SamplesData) -> list[tuple[str, Sequence[Count]]]:
    return [(what, counts) for what, counts in (("label", data.labels), ("prompt", data.prompts)) if counts]


def counts_shown(counts: Sequence[Count]) -> list[Count]:
    """Most accepted first; where there are more than fit, those of most and of fewest."""
    ordered = sorted(counts, key=lambda count: (-count.rows, count.name))
    half = MAX_COUNTS_SHOWN // 2
    return ordered if len(ordered) <= MAX_COUNTS_SHOWN else [*ordered[:half], *ordered[-half:]]


def _snippets(data: SamplesData) -> dict[str, str]:
    """Code that reads the samples; the directory holds records beside the tables, and its path may hold `name=value`."""
    folder = data.output.rstrip("/") + "/samples"
    return {
        "pandas": f"""\
import io

import fsspec
import pandas as pd
from PIL import Image

fs, folder = fsspec.url_to_fs({folder!r})
files = sorted(path for path in fs.ls(folder, detail=False) if path.endswith(".parquet"))
samples = pd.read_parquet(files, filesystem=fs, partitioning=None)  # columns=[...] leaves the images out
image = Image.open(io.BytesIO(samples["image"][0]["bytes"]))

# what the generator would have without the selection: each row counts 1/a times
weight = 1 / samples["acceptance_probability"]
mean_density = (weight * samples["density"]).sum() / weight.sum()
""",
        "datasets": f"""\
from datasets import load_dataset

samples = load_dataset("parquet", data_files={folder + "/*.parquet"!r}, split="train")
image = samples[0]["image"]  # a PIL image
""",
        "ray": f"""\
import ray

samples = ray.data.read_parquet({folder!r}, partitioning=None)
for batch in samples.iter_batches(batch_size=64):
    pictures = [image["bytes"] for image in batch["image"]]  # PNG
""",
    }
