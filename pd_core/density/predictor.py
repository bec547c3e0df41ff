"""The density predictor as files, and what is said of a fit. torch and the network are imported late."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pd_core.core import trust
from pd_core.core.errors import UserError, one_line
from pd_core.density.architecture import Architecture

if TYPE_CHECKING:
    import torch

    from pd_core.density.network import DensityPredictor

FORMAT_VERSION = 1
WEIGHTS_FILE = "predictor.safetensors"
DESCRIPTION_FILE = "predictor.json"


def new_predictor(architecture: Architecture, seed: int = 0) -> DensityPredictor:
    """A predictor with torch's usual initial weights, drawn from `seed`."""
    from pd_core.density.network import DensityPredictor

    return DensityPredictor(architecture, seed)


# --- calibration ------------------------------------------------------------------------------------------------------
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


# --- files ------------------------------------------------------------------------------------------------------------
def to_bytes(predictor: DensityPredictor, metrics: FitMetrics) -> dict[str, bytes]:
    """The predictor's two files by name: safetensors with weights and statistics, JSON that describes them."""
    architecture = predictor.architecture
    description = {
        "format_version": FORMAT_VERSION,
        "architecture": asdict(architecture),
        "layer_widths": architecture.widths,
        "tensors": architecture.shapes,
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
        if self.layer_widths != self.architecture.widths or self.tensors != self.architecture.shapes:
            raise ValueError("the widths of its layers contradict each other")


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
    if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != architecture.shapes:
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
