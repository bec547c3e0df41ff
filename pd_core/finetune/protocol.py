"""Fine-tuning by importance sampling (arXiv 2407.08659, Algorithm 3): weighted real images, and loops that train on
them.

What a step sees is a function of the run's seed and the step's number alone. Draw p of a run (position p = step · B +
place, B images a step in all) has one image, one noise, one latent, whoever computes it: a run of one worker and one of
several train on the same batches, and a run that is taken up at a step goes on as if nothing had happened.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    import torch

    from pd_core.generators.protocol import Generator


@dataclass(frozen=True)
class Share:
    """One worker's part of every step. rank: in [0, world). device: torch's name. threads: of CPU arithmetic."""

    rank: int
    world: int
    device: str
    threads: int


@dataclass(frozen=True)
class Batch:
    """One worker's share of the images of one step: draws [first, first + b) of the run.

    Attributes:
        step: number of the step, from 0.
        first: position of its first draw.
        sample_id: int64 [b].
        density: pseudo density of each image, float64 [b].
        label: its label, or None, [b].
        pixels: uint8 [b, H, W, 3], mirrored where the draw says so.
        replaced: draws whose image could not be read any more, so that the window's next one stands in for it.
    """

    step: int
    first: int
    sample_id: np.ndarray
    density: np.ndarray
    label: tuple[str | None, ...]
    pixels: np.ndarray
    replaced: int = 0

    @property
    def positions(self) -> np.ndarray:
        """int64 [b]."""
        return np.arange(self.first, self.first + len(self.sample_id))


class Trainable(Protocol):
    """A model that fine-tuning moves: networks, optimisers, and the moving average of the generator's weights.

    Attributes:
        size: (height, width) of its images, px.
        parameters: how many numbers are trained.
        came_averaged: whether the moving average came with the model, other than its weights.
    """

    size: tuple[int, int]
    parameters: int
    came_averaged: bool

    def step(self, batch: Batch) -> dict[str, float]:
        """One step of every optimiser on this worker's share; gradients are those of all workers' batches together.

        Returns what there is to log, the same on every worker. Raises RunError where the loss is not finite.
        """
        ...

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on: tensors, numbers and texts in dicts and lists."""
        ...

    def load_state(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`."""
        ...

    def averaged(self) -> dict[str, torch.Tensor]:
        """The moving average of the generator's weights, by name, on the CPU."""
        ...

    def companions(self) -> dict[str, torch.Tensor]:
        """What else is saved with the average, by name, on the CPU: a GAN's networks in training; nothing of a
        diffusion model.
        """
        ...

    def load_companions(self, companions: Mapping[str, torch.Tensor]) -> None:
        """The inverse of `companions`."""
        ...

    def sampler(self, weights: Mapping[str, torch.Tensor]) -> Generator:
        """A generator of images with these weights, such as `averaged` gives."""
        ...

    def save(self, folder: str, weights: Mapping[str, torch.Tensor]) -> None:
        """Write into a local folder what the generator was opened from, with these weights: every workflow opens it."""
        ...
