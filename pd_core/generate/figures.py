"""Figures of the report of generate: real, generated and accepted densities on one axis, and acceptance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pd_core.generate.pilot import Expectation
from pd_core.report import figures as kit

MAX_STEPS_DRAWN = 60  # of the acceptance rate over candidates
TENTHS = 10

# A bin of the drawn histogram is at least this share of the axis: bins of equally many real images can be as narrow as
# a hair where real densities crowd, and a bin's height is its share over its width.
_NARROWEST_BIN = 1 / 100


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


def steps(quantiles: np.ndarray, generated: np.ndarray, accepted: np.ndarray, span: tuple[float, float]) -> Steps:
    """What the histogram draws: bins of equally many real images, those too narrow to be seen joined with the next.

    The outermost bins hold what lies beyond the real set; they reach to the ends of the axis, where nearly all of it
    is.

    Args:
        quantiles: float64 [1001], of the real set. generated, accepted: int64 [B]. span: how far the axis must reach.
    """
    bins = len(generated)
    edges = quantiles[:: 1000 // bins].copy()
    low, high = min(span[0], float(quantiles[1])), max(span[1], float(quantiles[-2]))
    if low <= 0:  # ρ underflows to 0 far below the mean when the sharpness is large
        positive = edges[edges > 0]
        low = float(positive[0]) / 2 if positive.size else 0.5
    if high / low < 1 + 1e-9:  # all densities equal
        low, high = low * 0.95, low * 1.05
    log = high / low > kit.LOG_AXIS_FACTOR
    edges = np.clip(edges, low, high)
    edges[[0, -1]] = low, high
    at = np.log(edges) if log else edges
    counts = np.stack([np.full(bins, 1.0), generated, accepted]).astype(np.float64)
    counts /= counts.sum(axis=1, keepdims=True)
    kept = _wide_enough(at)
    joined = np.add.reduceat(counts, kept[:-1], axis=1)
    return Steps(edges[kept], log, *(joined / np.diff(at[kept])))


def _wide_enough(at: np.ndarray) -> np.ndarray:
    """Indices of the edges that stay, first and last included, so that no bin is narrower than _NARROWEST_BIN."""
    narrowest = (at[-1] - at[0]) * _NARROWEST_BIN
    kept = [0]
    for i in range(1, len(at) - 1):
        if at[i] - at[kept[-1]] >= narrowest and at[-1] - at[i] >= narrowest:
            kept.append(i)
    return np.array([*kept, len(at) - 1])


def histogram_png(shown: Steps, thresholds: Sequence[tuple[str, float]], narrow: bool = False) -> bytes:
    """Real (filled), generated (dashed) and accepted (line) over ρ, with τ where there is one."""
    figure, axes = kit.new_figure(narrow, height_in=3.0 if narrow else 3.7)
    axes.stairs(shown.real, shown.edges, fill=True, color=kit.BAR, alpha=0.55, label="real")
    axes.stairs(shown.generated, shown.edges, color=kit.INK, linestyle=(0, (4, 2)), linewidth=1.3, label="generated")
    axes.stairs(shown.accepted, shown.edges, color=kit.MARK, linewidth=2.2, label="accepted")
    axes.set_xscale("log" if shown.log else "linear")
    axes.set_xlim(shown.edges[0], shown.edges[-1])
    axes.set_ylim(0, 1.3 * max(float(values.max()) for values in (shown.real, shown.generated, shown.accepted)))
    axes.set_yticklabels([])
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    axes.set_xlabel("pseudo density ρ (real mean = 1)" if narrow else kit.DENSITY_AXIS)
    axes.set_ylabel("relative frequency")
    kit.draw_thresholds(axes, thresholds, float(shown.edges[0]), float(shown.edges[-1]))
    figure.legend(loc="outside upper left", ncols=3, frameon=False, fontsize=9, labelcolor=kit.INK)
    return kit.to_png(figure)


def acceptance_png(parts: Sequence[tuple[int, int]], expected: Expectation, narrow: bool = False) -> bytes:
    """Acceptance rate of each stretch of candidates and of all up to there, with the pilot's interval."""
    figure, axes = kit.new_figure(narrow, height_in=2.8 if narrow else 3.0)
    candidates, accepted = stretches(parts)
    ends = np.cumsum(candidates)
    axes.axhspan(100 * expected.low, 100 * expected.high, color=kit.BAR, alpha=0.3, linewidth=0, label="pilot, 95%")
    axes.axhline(100 * expected.rate, color=kit.BAR, linewidth=1.2)
    edges = np.r_[0, ends]
    axes.stairs(
        100 * accepted / candidates,
        edges,
        baseline=None,
        color=kit.MUTED,
        linewidth=1.1,
        label="of each stretch",
    )
    total = 100 * np.cumsum(accepted) / ends
    axes.plot(ends, total, color=kit.MARK, linewidth=2.2, marker="o", markersize=3.5, label="of all so far")
    axes.set_xlim(0, ends[-1])
    highest = max(100 * expected.high, float((100 * accepted / candidates).max()))
    axes.set_ylim(0, min(1.15 * highest, 104.0))
    axes.set_xlabel("candidates")
    axes.set_ylabel("accepted (%)")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    figure.legend(loc="outside upper left", ncols=3, frameon=False, fontsize=9, labelcolor=kit.INK)
    return kit.to_png(figure)


def stretches(parts: Sequence[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Candidates and accepted of at most MAX_STEPS_DRAWN runs of parts."""
    counts = np.array(parts, dtype=np.float64).T
    starts = np.unique(np.linspace(0, len(parts), min(len(parts), MAX_STEPS_DRAWN) + 1).astype(int)[:-1])
    candidates, accepted = np.add.reduceat(counts, starts, axis=1)
    return candidates, accepted


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


def tenths(
    quantiles: np.ndarray, generated: np.ndarray, accepted: np.ndarray, accepted_by_index: np.ndarray | None
) -> list[Tenth]:
    """Shares in each tenth of the real set; the columns add up to 1."""
    share = lambda counts: counts.reshape(TENTHS, -1).sum(axis=1) / counts.sum()  # noqa: E731
    made, kept = share(generated), share(accepted)
    by_index = None if accepted_by_index is None else share(accepted_by_index)
    return [
        Tenth(
            name=f"p{10 * i}–p{10 * i + 10}",
            low=float(quantiles[100 * i]),
            high=float(quantiles[100 * i + 100]),
            generated=float(made[i]),
            accepted=float(kept[i]),
            accepted_by_index=None if by_index is None else float(by_index[i]),
            factor=float(kept[i] / made[i]) if made[i] else None,
        )
        for i in range(TENTHS)
    ]
