"""The density predictor f: F(x) -> pseudo density as a torch module with its scales. Who needs it imports it late."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch  # noqa: TID253 - the module class needs it; this file itself is imported late
from numpy.typing import NDArray

from pd_core.density.architecture import PREDICT_ROWS, Architecture
from pd_core.density.formula import density_of

# A network that predicts rho itself can go below zero. Its logarithm is taken from here up; real densities are around 1
# and the resolution of such a network is some 1e-2, so nothing it can tell apart lies below.
_SMALLEST_PREDICTED_DENSITY = 1e-6


@dataclass(frozen=True)
class Prediction:
    """Predicted pseudo densities of N rows: float64 [N] each, finite, density = exp(log_density)."""

    density: NDArray[np.float64]
    log_density: NDArray[np.float64]


class DensityPredictor(torch.nn.Module):
    """f: F(x) -> pseudo density. Call it on a tensor for the differentiable log density, `predict` for numbers.

    The standardisation of features and target is part of the model: feature_mean and feature_std are [D], target_mean
    and target_std are scalars, (0, 1) where nothing is standardised. Weights are frozen outside `fit`; new ones are
    torch's usual, drawn from `seed` (the global generator is left alone).
    """

    feature_mean: torch.Tensor
    feature_std: torch.Tensor
    target_mean: torch.Tensor
    target_std: torch.Tensor

    def __init__(self, architecture: Architecture, seed: int = 0) -> None:
        super().__init__()
        self.architecture = architecture
        generator = torch.Generator().manual_seed(seed)
        layers: list[torch.nn.Module] = []
        for n_in, n_out in pairwise(architecture.widths):
            linear = torch.nn.utils.skip_init(torch.nn.Linear, n_in, n_out)
            for parameter in (linear.weight, linear.bias):  # what torch.nn.Linear.reset_parameters does
                torch.nn.init.uniform_(parameter, -1 / math.sqrt(n_in), 1 / math.sqrt(n_in), generator=generator)
            layers += [linear, torch.nn.ReLU()]
        self.layers = torch.nn.Sequential(*layers[:-1]).requires_grad_(False)
        self.register_buffer("feature_mean", torch.zeros(architecture.feature_dim))
        self.register_buffer("feature_std", torch.ones(architecture.feature_dim))
        self.register_buffer("target_mean", torch.zeros(()))
        self.register_buffer("target_std", torch.ones(()))

    def standardized_score(self, features: torch.Tensor) -> torch.Tensor:
        """The network's output [N] for features [N, D], in units of the standardised target."""
        if features.ndim != 2 or features.shape[1] != self.architecture.feature_dim:
            raise ValueError(f"features must be [N, {self.architecture.feature_dim}], are {list(features.shape)}")
        features = features.to(self.feature_mean.dtype)
        out: torch.Tensor = self.layers((features - self.feature_mean) / self.feature_std)
        return out.squeeze(1)

    def score(self, features: torch.Tensor) -> torch.Tensor:
        """The target itself, [N] for features [N, D]: log rho or rho, whichever the network was trained on.

        Where `forward` is held at the smallest density its gradient is zero; this one is not held and keeps its slope,
        and it rises and falls with the density: the one to climb with a predictor of the plain density.
        """
        return self.standardized_score(features) * self.target_std + self.target_mean

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Log pseudo density [N] of features [N, D] (any float type, the predictor's device); differentiable."""
        return self._log_density(self.score(features))

    def predict(self, features: NDArray[Any] | torch.Tensor) -> Prediction:
        """Predicted densities of features [N, D], array or tensor, without a gradient, on the predictor's device."""
        rows = len(features)
        log_density = np.empty(rows, dtype=np.float64)
        with torch.inference_mode():
            for start in range(0, rows, PREDICT_ROWS):
                block = features[start : start + PREDICT_ROWS]
                # torch.tensor copies, so read-only arrays (Arrow's) are fine.
                tensor = block if isinstance(block, torch.Tensor) else torch.tensor(block)
                score = self.score(tensor.to(self.feature_mean.device)).double()
                log_density[start : start + len(block)] = self._log_density(score).cpu().numpy()
        return Prediction(density_of(log_density), log_density)

    def rescaled(self, shift: float) -> DensityPredictor:
        """This predictor, changed in place, of log densities greater by `shift`: of the same d̄ under another c."""
        if self.architecture.target == "log_density":
            self.target_mean += shift
        else:
            self.target_mean *= math.exp(shift)
            self.target_std *= math.exp(shift)
        return self

    def _log_density(self, score: torch.Tensor) -> torch.Tensor:
        return score if self.architecture.target == "log_density" else score.clamp(_SMALLEST_PREDICTED_DENSITY).log()
