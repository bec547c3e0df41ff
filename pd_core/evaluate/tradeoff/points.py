"""Fidelity against diversity: settings of each method, their draws from one pool, frontier and choice.

Pure functions, float64 inside. One pool of candidates serves every setting but truncations, whose images are others:
what a setting would have accepted of them is exactly what generate.py would accept, since candidate i and its u depend
on i alone. Sets of two settings therefore share candidates, and differ by the settings, not by the luck of other draws.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pd_core.core.errors import UserError
from pd_core.density import weighting as density_weighting
from pd_core.density.weighting import Weighting

Method = Literal["generator", "density", "polarity", "truncation"]

# what may be asked for, and what is then sought: each pair is one of fidelity and one of diversity, both better higher
COUNTERPARTS = {"precision": "recall", "recall": "precision", "density": "coverage", "coverage": "density"}


@dataclass(frozen=True)
class Setting:
    """One way to draw from a generator; None: does not apply.

    Attributes:
        method: as the generator draws, by pseudo density, by Polarity Sampling, or truncated.
        threshold: τ as the user wrote it. weight: w. polarity: of Polarity Sampling. truncation: ψ.
    """

    method: Method
    threshold: str | None = None
    weight: float | None = None
    polarity: float | None = None
    truncation: float | None = None

    @property
    def statistic(self) -> str:
        """What its weights are functions of."""
        return "log_volume" if self.method == "polarity" else "density"

    @property
    def curve(self) -> str:
        """Name of the curve that it is a point of."""
        if self.method == "density":
            return f"density, τ = {self.threshold}"
        return {"generator": "generator", "polarity": "polarity", "truncation": "truncation"}[self.method]

    @property
    def name(self) -> str:
        """Short and unique among the settings of a run."""
        if self.method == "density":
            return f"{self.threshold}, w = {self.weight:g}"
        if self.method == "polarity":
            return "MaGNET" if self.polarity == 1 else f"polarity {self.polarity:g}"
        return "generator" if self.truncation is None else f"ψ = {self.truncation:g}"


def sweep(
    thresholds: Sequence[str], weights: Sequence[float], polarities: Sequence[float], truncations: Sequence[float]
) -> list[Setting]:
    """All settings, the generator itself first; w = 1 and polarity 0 are the generator itself and come once."""
    found = [Setting("generator")]
    found += [Setting("density", threshold=t, weight=float(w)) for t in thresholds for w in sorted(weights) if w != 1]
    found += [Setting("polarity", polarity=float(p)) for p in sorted(polarities) if p != 0]
    found += [Setting("truncation", truncation=float(psi)) for psi in sorted(truncations)]
    return list(dict.fromkeys(found))


# --- draws from a pool ------------------------------------------------------------------------------------------------


def accepted(deciding: ArrayLike, u: ArrayLike, weighting: Weighting) -> NDArray[np.int64]:
    """Rows of a pool that rejection sampling accepts, in candidate order (arXiv 2407.08659, Algorithm 2).

    deciding: ρ of each candidate, or its log-volume for Polarity Sampling, [M]. u: its own uniform number, [M]. Returns
    int64 [m].
    """
    return np.flatnonzero(np.asarray(u) < density_weighting.acceptance_probability(deciding, weighting))


def pool_needed(weightings: Iterable[tuple[ArrayLike, Weighting]], n: int, most: int) -> int:
    """Candidates that give n accepted under each of these weightings with a probability of 97.5%, at most `most`.

    weightings: each with the values that decide about the pilot's candidates, [M]. The pilot's own error is counted.
    """
    needed: float = n
    for deciding, weighting in weightings:
        chances = density_weighting.acceptance_probability(deciding, weighting)
        low, _ = density_weighting.rate_interval(chances, min(weighting.weights) / max(weighting.weights), 1.0)
        needed = max(needed, density_weighting.candidates_surely(n, float(chances.mean()), low))
    return most if needed >= most else math.ceil(needed)


# --- frontier and choice ----------------------------------------------------------------------------------------------


def frontier(first: ArrayLike, second: ArrayLike) -> NDArray[np.bool_]:
    """Whether no other point is at least as good in both coordinates and better in one (Pareto); higher is better.

    first, second: [S] each, NaN for a point that was not measured and is on no frontier. Returns bool [S].
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    at_least = (a[None, :] >= a[:, None]) & (b[None, :] >= b[:, None])
    better = (a[None, :] > a[:, None]) | (b[None, :] > b[:, None])
    return ~(at_least & better).any(axis=1) & np.isfinite(a) & np.isfinite(b)


@dataclass(frozen=True)
class Target:
    """A metric that must reach a value; of the settings that do, the one of the best counterpart is wanted."""

    metric: str
    value: float

    @property
    def sought(self) -> str:
        """The metric that is to be as high as it can."""
        return COUNTERPARTS[self.metric]


def parse_target(text: str) -> Target:
    """Reads `recall=0.6`. Raises UserError on anything else."""
    metric, equals, value = text.partition("=")
    names = ", ".join(COUNTERPARTS)
    if not equals or metric.strip() not in COUNTERPARTS:
        raise UserError(f"--target {text}: expected METRIC=VALUE with one of {names}, e.g. recall=0.6")
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number > 0):
        raise UserError(f"--target {text}: {value!r} is no number above 0; expected e.g. recall=0.6")
    return Target(metric.strip(), number)
