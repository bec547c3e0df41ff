"""Sums of features and of their outer products by group of rows, and the two metrics that need no more than these."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pd_core.evaluate.halfsamples import GROUPS

if TYPE_CHECKING:
    import torch

Float64Array = NDArray[np.float64]

BLOCK_ROWS = 8192  # rows that are held in float64 at once


@dataclass(frozen=True)
class Moments:
    """Streamed in float64; memory GROUPS·D²·8 bytes (75 MB at D = 768, 0.5 GB at 2048).

    Attributes:
        count: rows, int64 [GROUPS].
        total: sums of features, float64 [GROUPS, D].
        outer: sums of outer products, float64 [GROUPS, D, D].
    """

    count: np.ndarray
    total: np.ndarray
    outer: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray, groups: np.ndarray, unit: bool = False) -> Moments:
        """Of float32 [N, D] in groups uint8 [N]; `unit`: of each row divided by its norm."""
        dim = features.shape[1]
        count = np.bincount(groups, minlength=GROUPS)
        sums = cls(count, np.zeros((GROUPS, dim)), np.zeros((GROUPS, dim, dim)))
        for group in range(GROUPS):
            members = np.flatnonzero(groups == group)
            for start in range(0, len(members), BLOCK_ROWS):
                rows = features[members[start : start + BLOCK_ROWS]].astype(np.float64)
                if unit:
                    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
                sums.total[group] += rows.sum(0)
                sums.outer[group] += rows.T @ rows
        return sums

    @property
    def rows(self) -> int:
        """Rows of all groups."""
        return int(self.count.sum())

    def mean(self) -> Float64Array:
        """Mean feature [D] of all rows."""
        return np.ones(GROUPS) @ self.total / self.rows

    def second_moment(self) -> Float64Array:
        """Mean outer product [D, D] of all rows."""
        groups, dim = self.total.shape
        return (np.ones(GROUPS) @ self.outer.reshape(groups, -1)).reshape(dim, dim) / self.rows

    def covariance(self) -> Float64Array:
        """Covariance [D, D] of all rows, with divisor n - 1 as numpy.cov; at least two rows."""
        n, mean = self.rows, self.mean()
        return (self.second_moment() - np.outer(mean, mean)) * (n / (n - 1))

    def influence(self, matrix: np.ndarray, vector: np.ndarray, center: np.ndarray, halves: np.ndarray) -> Float64Array:
        """Mean of (x − c)ᵀ A (x − c) + bᵀ(x − c) over the rows of each half less that over all rows, float64 [R].

        matrix: A, symmetric [D, D]. vector: b, [D]. center: c, [D]. halves: groups of each, bool [R, GROUPS].
        """
        turned = matrix @ center
        sums = np.einsum("gij,ij->g", self.outer, matrix) + self.total @ (vector - 2 * turned)
        sums += self.count * float(center @ turned - vector @ center)
        sums -= self.count * (sums.sum() / self.count.sum())
        return (halves @ sums) / (halves @ self.count)


# --- Fréchet distance -------------------------------------------------------------------------------------------------


def root(covariance: np.ndarray, device: str = "cpu") -> Float64Array:
    """Symmetric square root of a covariance [D, D] by its eigenvalues; those that rounding made negative count as 0."""
    values, vectors = _linalg().eigh(_tensor(covariance, device))
    return ((vectors * values.clamp(min=0).sqrt()) @ vectors.T).cpu().numpy()


def frechet(
    mean: np.ndarray,
    root_of_covariance: np.ndarray,
    other_mean: np.ndarray,
    other_covariance: np.ndarray,
    device: str = "cpu",
) -> float:
    """Squared 2-Wasserstein distance of two Gaussians (Dowson & Landau 1982; FID, Heusel et al. 2017, equation 6).

    ‖μ₁ − μ₂‖² + tr Σ₁ + tr Σ₂ − 2 tr (Σ₁^½ Σ₂ Σ₁^½)^½: the trace of the root of a symmetric matrix, which has the
    eigenvalues of Σ₁Σ₂ and is never complex, however few rows. Where a covariance is singular (no more rows than D)
    eigenvalues of 0 come out at the rounding error ε, their roots at sqrt(ε): the result is good to about 1e-8·D of the
    largest variance.
    """
    half, other = _tensor(root_of_covariance, device), _tensor(other_covariance, device)
    between = half @ other @ half
    overlap = float(_linalg().eigvalsh((between + between.T) / 2).clamp(min=0).sqrt().sum())
    return _distance(mean, root_of_covariance, other_mean, other_covariance, overlap)


def _distance(
    mean: np.ndarray,
    root_of_covariance: np.ndarray,
    other_mean: np.ndarray,
    other_covariance: np.ndarray,
    overlap: float,
) -> float:
    traces = float(np.sum(root_of_covariance**2)) + float(np.trace(other_covariance))
    return max(0.0, float(np.sum((mean - other_mean) ** 2)) + traces - 2 * overlap)


def frechet_with_halves(
    real: Moments,
    root_of_real: np.ndarray,
    generated: Moments,
    real_halves: np.ndarray,
    generated_halves: np.ndarray,
    rows: np.ndarray | None = None,
    device: str = "cpu",
) -> Float64Array:
    """The distance of all rows, then of each pair of halves to first order in their rows' weights, float64 [1 + R].

    With T = Σ₁^½ (Σ₁^½ Σ₂ Σ₁^½)^{+½} Σ₁^½, the optimal transport's matrix, a row x of the second side moves the
    distance by (x − μ₂)ᵀ(I − T)(x − μ₂) + 2(μ₂ − μ₁)ᵀ(x − μ₂), less its mean: the influence function (Hampel 1974); by
    that of the inverse transport a row of the first. Weights stay on the rows there are, so pseudo-inverses are right
    where covariances are singular. One eigendecomposition for all halves instead of one each, and without the bias of
    the halves' own sizes.

    Args:
        real: Σ₁, μ₁. root_of_real: `root` of its covariance.
        generated: Σ₂, μ₂.
        real_halves: groups of each replicate, bool [R, GROUPS]. generated_halves: likewise.
        rows: the generated features [M, D], where M < D: the decomposition is then of an M x M matrix.
        device: torch device of the linear algebra.
    """
    half = _tensor(root_of_real, device)
    if rows is None:
        overlap, transport, inverse = _transport(half, _tensor(generated.covariance(), device))
    else:
        centered = _tensor((rows - generated.mean()) / math.sqrt(len(rows) - 1), device)
        overlap, transport, inverse = _transport_by_rows(half @ half, centered)
    identity, shift = np.eye(len(transport)), 2 * (generated.mean() - real.mean())
    distance = _distance(real.mean(), root_of_real, generated.mean(), generated.covariance(), overlap)
    moved = generated.influence(identity - transport, shift, generated.mean(), generated_halves)
    moved += real.influence(identity - inverse, -shift, real.mean(), real_halves)
    return np.append(distance, distance + moved)


def _transport(half: torch.Tensor, other: torch.Tensor) -> tuple[float, np.ndarray, np.ndarray]:
    """tr (Σ₁^½ Σ₂ Σ₁^½)^½, the transport's matrix and its inverse, of Σ₁^½ and Σ₂."""
    between = half @ other @ half
    everything = _linalg().eigh((between + between.T) / 2)
    values, vectors = _kept(*everything)
    there, back = half @ vectors, other @ (half @ vectors)
    transport = (there / values.sqrt()) @ there.T
    inverse = (back / values.sqrt() ** 3) @ back.T
    return float(everything[0].clamp(min=0).sqrt().sum()), transport.cpu().numpy(), inverse.cpu().numpy()


def _transport_by_rows(covariance: torch.Tensor, rows: torch.Tensor) -> tuple[float, np.ndarray, np.ndarray]:
    """The same of Σ₁ and X with Σ₂ = XᵀX: X Σ₁ Xᵀ = V m Vᵀ has the eigenvalues but 0, Σ₁^½ Xᵀ V m^-½ the vectors."""
    turned = rows @ covariance
    between = turned @ rows.T
    everything = _linalg().eigh((between + between.T) / 2)
    values, vectors = _kept(*everything)
    there, back = turned.T @ vectors, rows.T @ vectors
    transport = (there / values.sqrt() ** 3) @ there.T
    inverse = (back / values.sqrt()) @ back.T
    return float(everything[0].clamp(min=0).sqrt().sum()), transport.cpu().numpy(), inverse.cpu().numpy()


def _kept(values: torch.Tensor, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues and vectors but for those that are zero up to rounding."""
    kept = values > values.max() * len(values) * 1e-14
    return values[kept], vectors[:, kept]


# --- Vendi score ------------------------------------------------------------------------------------------------------


def vendi(second_moment: np.ndarray, device: str = "cpu") -> float:
    """exp of the entropy of the eigenvalues of K/N (Friedman & Dieng 2022, equation 1), K the cosines of N rows.

    From the mean outer product [D, D] of unit rows instead, which has the same eigenvalues but for zeros.
    """
    values = _linalg().eigvalsh(_tensor(second_moment, device)).cpu().numpy()
    shares = values[values > 0] / values[values > 0].sum()
    return math.exp(-float(shares @ np.log(shares)))


def vendi_with_halves(
    unit: Moments, halves: np.ndarray, rows: np.ndarray | None = None, device: str = "cpu"
) -> Float64Array:
    """The score of all rows, then of each half to first order in their rows' weights, float64 [1 + R].

    A row x of norm 1 moves the logarithm by −xᵀ (log C) x, less its mean, C being the mean outer product: the influence
    function of the entropy.

    Args:
        unit: moments of unit rows.
        halves: groups of each replicate, bool [R, GROUPS].
        rows: those rows [M, D] in float64, where M < D: the decomposition is then of an M x M matrix.
        device: torch device of the linear algebra.
    """
    if rows is None:
        values, vectors = _kept(*_linalg().eigh(_tensor(unit.second_moment(), device)))
    else:
        scaled = _tensor(rows / math.sqrt(len(rows)), device)
        values, vectors = _kept(*_linalg().eigh(scaled @ scaled.T))
        vectors = scaled.T @ vectors / values.sqrt()
    shares = values / values.sum()
    score = math.exp(-float((shares * shares.log()).sum()))
    logarithm = ((vectors * shares.log()) @ vectors.T).cpu().numpy()
    nothing = np.zeros(len(logarithm))
    return np.append(score, score * (1 + unit.influence(-logarithm, nothing, nothing, halves)))


def _tensor(matrix: np.ndarray, device: str) -> torch.Tensor:
    import torch

    return torch.from_numpy(np.array(matrix, np.float64)).to(device)  # a copy: what Ray shares cannot be written


def _linalg() -> Any:
    import torch

    return torch.linalg
