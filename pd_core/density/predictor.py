"""The density predictor f: F(x) -> pseudo density as a torch module with its scales, saved and loaded."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pd_core.core import trust
from pd_core.core.errors import UserError, one_line
from pd_core.density.formula import density_of

if TYPE_CHECKING:
    import torch


FORMAT_VERSION = 1
WEIGHTS_FILE = "predictor.safetensors"
DESCRIPTION_FILE = "predictor.json"
PREDICT_ROWS = 65_536
# A network that predicts rho itself can go below zero. Its logarithm is taken from here up; real densities are around 1
# and the resolution of such a network is some 1e-2, so nothing it can tell apart lies below.
_SMALLEST_PREDICTED_DENSITY = 1e-6


# --- the predictor -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Architecture:
    """Layers feature_dim - hidden... - 1 with ReLU between them; `target` is what the last layer stands for."""

    feature_dim: int
    hidden: tuple[int, ...]
    target: str

    def __post_init__(self) -> None:
        if self.feature_dim < 1 or any(width < 1 for width in self.hidden):
            raise UserError(f"layer widths must be >= 1, are {self.feature_dim} and hidden {list(self.hidden)}")
        if self.target not in ("log_density", "density"):
            raise UserError(f"estimator target is {self.target!r}; it must be 'log_density' or 'density'")


@dataclass(frozen=True)
class Prediction:
    """Predicted pseudo densities of N rows: float64 [N] each, finite, density = exp(log_density)."""

    density: NDArray[np.float64]
    log_density: NDArray[np.float64]


@dataclass(eq=False)
class DensityPredictor:
    """f: F(x) -> pseudo density. Call it on a tensor for the differentiable log density, `predict` for numbers.

    The standardisation of features and target is part of the model: feature_mean and feature_std are [D], target_mean
    and target_std are scalars, (0, 1) where nothing is standardised. Weights are frozen outside `fit`.
    """

    architecture: Architecture
    layers: torch.nn.Sequential
    feature_mean: torch.Tensor
    feature_std: torch.Tensor
    target_mean: torch.Tensor
    target_std: torch.Tensor

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

    __call__ = forward

    def predict(self, features: NDArray[Any] | torch.Tensor) -> Prediction:
        """Predicted densities of features [N, D], array or tensor, without a gradient; runs on the predictor's device."""
        import torch

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
        """This predictor, changed in place, of log densities that are greater by `shift`: of the same d̄ under another c."""
        if self.architecture.target == "log_density":
            self.target_mean += shift
        else:
            self.target_mean *= math.exp(shift)
            self.target_std *= math.exp(shift)
        return self

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> DensityPredictor:
        """Moves the predictor in place, as torch.nn.Module.to does, and returns it."""
        self.layers.to(device=device, dtype=dtype)
        for name in ("feature_mean", "feature_std", "target_mean", "target_std"):
            setattr(self, name, getattr(self, name).to(device=device, dtype=dtype))
        return self

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Weights and statistics by name; the tensors are the predictor's own, not copies."""
        state = {f"layers.{name}": tensor for name, tensor in self.layers.state_dict().items()}
        for name in ("feature_mean", "feature_std", "target_mean", "target_std"):
            state[name] = getattr(self, name)
        return state

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Copies weights and statistics from `state`. Raises ValueError if names or shapes are not this predictor's."""
        import torch

        own = self.state_dict()
        found, expected = ({name: tuple(t.shape) for name, t in tensors.items()} for tensors in (state, own))
        wrong = {name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)}
        if wrong:
            listed = ", ".join(f"{n} is {found.get(n)}, not {expected.get(n)}" for n in sorted(wrong))
            raise ValueError(f"the predictor's tensors have other names or shapes: {listed}")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(state[name])

    def _log_density(self, score: torch.Tensor) -> torch.Tensor:
        return score if self.architecture.target == "log_density" else score.clamp(_SMALLEST_PREDICTED_DENSITY).log()


def new_predictor(architecture: Architecture, seed: int = 0) -> DensityPredictor:
    """A predictor with torch's usual initial weights, drawn from `seed` (the global generator is left alone)."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    widths = [architecture.feature_dim, *architecture.hidden, 1]
    layers: list[torch.nn.Module] = []
    for n_in, n_out in pairwise(widths):
        linear = torch.nn.utils.skip_init(torch.nn.Linear, n_in, n_out)
        for parameter in (linear.weight, linear.bias):  # what torch.nn.Linear.reset_parameters does
            torch.nn.init.uniform_(parameter, -1 / math.sqrt(n_in), 1 / math.sqrt(n_in), generator=generator)
        layers += [linear, torch.nn.ReLU()]
    network = torch.nn.Sequential(*layers[:-1]).requires_grad_(False)
    mean, std = torch.zeros(architecture.feature_dim), torch.ones(architecture.feature_dim)
    return DensityPredictor(architecture, network, mean, std, torch.zeros(()), torch.ones(()))


# --- calibration -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Calibration:
    """Predicted against true log densities of n rows. None where a figure is undefined (constant values, < 2 rows)."""

    n: int
    r2_log_density: float | None
    r2_density: float | None
    spearman: float | None
    low_decile_spearman: float | None
    low_decile_mean_abs_log_error: float
    high_decile_spearman: float | None
    high_decile_mean_abs_log_error: float


@dataclass(frozen=True)
class EpochLoss:
    """Losses of one epoch (from 1): mean squared error in units of the standardised target.

    train_loss is the mean over all training rows while the weights move, heldout_loss is taken at the epoch's end.
    """

    epoch: int
    train_loss: float
    heldout_loss: float


@dataclass(frozen=True)
class FitMetrics:
    """Held-out calibration and the course of the fit. best_epoch is the one whose weights were kept."""

    heldout: Calibration
    n_train: int
    n_heldout: int
    best_epoch: int
    losses: tuple[EpochLoss, ...]


@dataclass(frozen=True)
class FitResult:
    """The predictor (on the CPU), its metrics, and up to CALIBRATION_ROWS held-out rows: float64 [M] each."""

    predictor: DensityPredictor
    metrics: FitMetrics
    heldout_log_density: NDArray[np.float64]
    heldout_predicted_log_density: NDArray[np.float64]


# --- files -------------------------------------------------------------------------------------------------------------
def to_bytes(predictor: DensityPredictor, metrics: FitMetrics) -> dict[str, bytes]:
    """The predictor's two files by name: safetensors with weights and statistics, JSON that describes them."""
    architecture = predictor.architecture
    description = {
        "format_version": FORMAT_VERSION,
        "architecture": asdict(architecture),
        "layer_widths": [architecture.feature_dim, *architecture.hidden, 1],
        "tensors": {name: list(tensor.shape) for name, tensor in predictor.state_dict().items()},
        "metrics": asdict(metrics),
    }
    text = json.dumps(description, indent=2, sort_keys=True, allow_nan=False)
    return {WEIGHTS_FILE: weights_bytes(predictor), DESCRIPTION_FILE: text.encode() + b"\n"}


def weights_bytes(predictor: DensityPredictor) -> bytes:
    """The safetensors file of weights and statistics."""
    from safetensors.torch import save

    return bytes(save({name: tensor.detach().cpu().contiguous() for name, tensor in predictor.state_dict().items()}))


@dataclass(frozen=True)
class _Description:
    """What predictor.json says; the numbers of the fit are for people."""

    format_version: int
    architecture: Architecture
    layer_widths: tuple[int, ...]
    tensors: dict[str, tuple[int, ...]]
    metrics: dict[str, Any]

    def __post_init__(self) -> None:
        own = self.architecture
        if self.layer_widths != (own.feature_dim, *own.hidden, 1) or self.tensors != _shapes(own):
            raise ValueError("the widths of its layers contradict each other")


def _shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor of `DensityPredictor.state_dict`, by name; nothing is made."""
    widths = [architecture.feature_dim, *architecture.hidden, 1]
    shapes: dict[str, tuple[int, ...]] = {}
    for number, (n_in, n_out) in enumerate(pairwise(widths)):  # each with a ReLU after it
        shapes |= {f"layers.{2 * number}.weight": (n_out, n_in), f"layers.{2 * number}.bias": (n_out,)}
    d = (architecture.feature_dim,)
    return shapes | {"feature_mean": d, "feature_std": d, "target_mean": (), "target_std": ()}


def from_bytes(files: Mapping[str, bytes]) -> DensityPredictor:
    """The predictor, on the CPU, from the files of `to_bytes`. Raises UserError if they are missing or do not fit.

    Nothing is made before the widths are known to be those of the tensors, which are in the file.
    """
    import safetensors

    for name in (WEIGHTS_FILE, DESCRIPTION_FILE):
        if name not in files:
            raise UserError(f"density predictor: {name} is missing; run the estimator stage again")
    architecture = _described(files[DESCRIPTION_FILE])
    try:
        tensors = _checked_tensors(files[WEIGHTS_FILE], architecture)
    except (ValueError, TypeError, safetensors.SafetensorError) as error:
        raise UserError(
            f"density predictor: the files do not fit together ({one_line(error)}); make them again"
        ) from error
    predictor = new_predictor(architecture)
    predictor.load_state_dict(tensors)
    return predictor


def _described(text: bytes) -> Architecture:
    where = f"density predictor: {DESCRIPTION_FILE}"
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: is no JSON ({one_line(error)}); run the estimator stage again") from None
    version = values.get("format_version") if isinstance(values, dict) else None
    if isinstance(version, int) and version != FORMAT_VERSION:
        raise UserError(f"density predictor: format version {version}, this release reads {FORMAT_VERSION}")
    return trust.checked(_Description, values, where).architecture


def _checked_tensors(data: bytes, architecture: Architecture) -> dict[str, torch.Tensor]:
    """Raises ValueError: they are not those of the architecture, or hold what no fit has left."""
    import torch
    from safetensors.torch import load as load_tensors

    tensors = load_tensors(data)
    if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != _shapes(architecture):
        raise ValueError(f"the tensors are of other layers than {DESCRIPTION_FILE} says")
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32 or not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} holds something else than finite numbers of float32")
        if name.endswith("_std") and not bool((tensor > 0).all()):
            raise ValueError(f"{name} is not above 0")
    return tensors


def load(path: str | Path) -> DensityPredictor:
    """The predictor from its two files in a local directory. Needs neither Ray nor a network."""
    directory = Path(path)
    files = {name: directory / name for name in (WEIGHTS_FILE, DESCRIPTION_FILE)}
    return from_bytes({name: file.read_bytes() for name, file in files.items() if file.is_file()})
