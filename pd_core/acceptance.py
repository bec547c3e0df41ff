"""Weight functions ω(ρ) and the probabilities of rejection sampling by them: pure functions, float64 inside.

Importance sampling at inference (arXiv 2407.08659, Algorithm 2): from a generator with distribution p_G draw the target
q(x) ∝ ω(ρ(x)) p_G(x) by accepting x with probability a = ω(ρ(x)) / sup ω. Every weighting here is a step function of the
density, the paper's rule (weight w above a threshold τ, 1 elsewhere) being the one with a single step.

Each accepted sample keeps its a: with weights 1/a an average over the accepted is one over p_G again (Horvitz & Thompson).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pd_core.errors import UserError

Float64Array = NDArray[np.float64]


@dataclass(frozen=True)
class Weighting:
    """A step function of the pseudo density: ω(ρ) = weights[j] for edges[j - 1] < ρ <= edges[j].

    Attributes:
        edges: densities where the weight changes, ascending, [B].
        weights: relative weights, finite and >= 0, not all of them 0, [B + 1].
    """

    edges: tuple[float, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.weights) != len(self.edges) + 1:
            raise ValueError(
                f"{len(self.edges)} edges need {len(self.edges) + 1} weights, there are {len(self.weights)}"
            )
        if any(b < a for a, b in zip(self.edges, self.edges[1:], strict=False)) or not all(
            map(math.isfinite, self.edges)
        ):
            raise ValueError(f"edges must be finite and ascending, are {self.edges}")
        if not all(math.isfinite(w) and w >= 0 for w in self.weights) or max(self.weights) == 0:
            raise UserError(f"weights must be finite, >= 0 and not all 0, are {list(self.weights)}; mend the weighting")

    @property
    def bins(self) -> int:
        """Number of steps."""
        return len(self.weights)

    def to_json(self) -> dict[str, Any]:
        """JSON-able."""
        return {"edges": list(self.edges), "weights": list(self.weights)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Weighting:
        """Inverse of `to_json`."""
        return cls(tuple(values["edges"]), tuple(values["weights"]))


# --- weight functions ---------------------------------------------------------------------------------------------------


def uniform() -> Weighting:
    """ω = 1: every sample is accepted."""
    return Weighting((), (1.0,))


def two_level(threshold: float, weight: float) -> Weighting:
    """The paper's: `weight` where ρ > `threshold`, 1 elsewhere (arXiv 2407.08659, Algorithm 2). Raises UserError: w <= 0."""
    if not (math.isfinite(weight) and weight > 0):
        raise UserError(f"weight {weight}: must be finite and > 0 (above 1 for typical, below 1 for varied samples)")
    return Weighting((float(threshold),), (1.0, float(weight)))


def by_quantile(real_quantiles: ArrayLike, weights: Sequence[float]) -> Weighting:
    """One weight for each of len(weights) bins that hold equally many real images, lowest densities first.

    real_quantiles: `density.density_quantiles` of the real set.
    """
    return Weighting(_equal_edges(real_quantiles, len(weights)), tuple(float(w) for w in weights))


def match(real_quantiles: ArrayLike, generated_density: ArrayLike, bins: int, most: float) -> Weighting:
    """ω = p_real / p_G over `bins` bins of equally many real images: the accepted then have the real set's densities.

    generated_density: [M], densities of samples of the generator (a pilot), from which p_G is taken with half a count
    added to each bin, so that one which the pilot missed has a finite weight. No weight is above `most`: since the mean
    of ω over the generator is 1, the acceptance rate stays above 1/most; bins that meet the limit stay under-represented.
    """
    edges = _equal_edges(real_quantiles, bins)
    counts = np.bincount(_bin(generated_density, edges), minlength=bins) + 0.5
    weights = (1.0 / bins) / (counts / counts.sum())
    return Weighting(edges, tuple(np.minimum(weights, most).tolist()))


def _equal_edges(real_quantiles: ArrayLike, bins: int) -> tuple[float, ...]:
    quantiles = np.asarray(real_quantiles, dtype=np.float64)
    if bins < 1:
        raise UserError(f"a weighting needs at least one bin, has {bins}")
    ranks = np.arange(1, bins) / bins * (len(quantiles) - 1)
    return tuple(np.interp(ranks, np.arange(len(quantiles)), quantiles).tolist())


# --- acceptance ---------------------------------------------------------------------------------------------------------


def weight_of(density: ArrayLike, weighting: Weighting) -> Float64Array:
    """ω(ρ): float64 [N] for densities [N]."""
    return np.asarray(weighting.weights, dtype=np.float64)[_bin(density, weighting.edges)]


def acceptance_probability(density: ArrayLike, weighting: Weighting) -> Float64Array:
    """a = ω(ρ) / sup ω: float64 [N] in [0, 1] for densities [N] (arXiv 2407.08659, Algorithm 2, for any bounded ω).

    For two levels: w > 1 gives 1 above τ and 1/w elsewhere; w < 1 gives w above τ and 1 elsewhere.
    Raises ValueError on a density that is NaN.
    """
    return weight_of(density, weighting) / max(weighting.weights)


def bin_shares(density: ArrayLike, weighting: Weighting) -> Float64Array:
    """Share of the densities in each bin of the weighting, float64 [bins]; for two levels (1 - P, P), P = Pr(ρ > τ)."""
    inside = _bin(density, weighting.edges)
    if inside.size == 0:
        raise ValueError("the shares of no densities are not defined")
    return np.bincount(inside, minlength=weighting.bins) / inside.size


def acceptance_rate(shares: ArrayLike, weighting: Weighting) -> float:
    """Expected share of accepted samples: Σ share_j a_j.

    For two levels: P + (1 - P)/w for w >= 1, P w + (1 - P) for w < 1.
    """
    return float(np.dot(np.asarray(shares, dtype=np.float64), weighting.weights) / max(weighting.weights))


def rate_interval(rate: float, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Confidence interval of a mean of `trials` values in [0, 1] whose mean was `rate` (Wilson 1927).

    Wilson's is for values 0 and 1, which have the largest variance of all with that mean: for others it is too wide, never
    too narrow by more than its own approximation, and it does not shrink to a point where all values were equal.
    """
    from scipy.special import ndtri

    if trials < 1:
        raise ValueError(f"an interval needs at least one trial, has {trials}")
    z = float(ndtri(0.5 + confidence / 2))
    center = (rate + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(rate * (1 - rate) / trials + z * z / (4 * trials**2))
    return max(0.0, center - half), min(1.0, center + half)


def weighting_that_accepts(shares: ArrayLike, weighting: Weighting, rate: float) -> Weighting:
    """The weighting nearest to this one whose acceptance rate reaches `rate`: weights below s sup ω are raised to it.

    For two levels that is a w nearer to 1. shares: of the generator's samples in each bin.
    """
    share = np.asarray(shares, dtype=np.float64)
    top = max(weighting.weights)
    relative = np.asarray(weighting.weights, dtype=np.float64) / top
    if not 0 < rate <= 1:
        raise ValueError(f"an acceptance rate lies in (0, 1], is {rate}")
    if np.dot(share, relative) >= rate:
        return weighting
    # the rate grows with s, linearly between neighbouring weights: find the stretch, then solve in it
    for low, high in zip(levels := [0.0, *np.unique(relative)], levels[1:], strict=False):
        if np.dot(share, np.maximum(relative, high)) >= rate:
            raised = relative <= low
            floor = (rate - np.dot(share[~raised], relative[~raised])) / share[raised].sum()
            # one rounding above, so that the rate is reached
            floor = min(1.0, float(np.nextafter(floor, 2.0)))
            return Weighting(weighting.edges, tuple((np.maximum(relative, floor) * top).tolist()))
    raise AssertionError("a floor of 1 accepts everything")


def _bin(density: ArrayLike, edges: Sequence[float]) -> NDArray[np.int64]:
    values = np.asarray(density, dtype=np.float64)
    if np.isnan(values).any():
        raise ValueError("a density is NaN")
    return np.searchsorted(np.asarray(edges, dtype=np.float64), values, side="left")
