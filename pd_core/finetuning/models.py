"""Opening the model that is trained, of any kind of generator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pd_core.acceptance import Weighting
from pd_core.config import FakeWeightingSettings, GeneratorSettings, TrainingSettings
from pd_core.finetuning import Share, Trainable
from pd_core.realset import RealSet


@dataclass(frozen=True)
class ModelSpec:
    """Everything that opens the model; picklable.

    Attributes:
        generator: settings of it.
        discriminator: file of the discriminator, where the generator's does not hold it.
        training: the optimisation.
        fake: ω of generated images, or None where all are taken (and for diffusion models, which train on none).
        sampling: limits of their rejection sampling.
        classes: class number of each label; empty where the model takes none.
        real: the real set: F and f score what is generated.
        seed: of the run.
    """

    generator: GeneratorSettings
    discriminator: str | None
    training: TrainingSettings
    fake: Weighting | None
    sampling: FakeWeightingSettings
    classes: Mapping[str, int]
    real: RealSet
    seed: int

    def open(self, share: Share) -> Trainable:
        """The model on a worker. Raises UserError where it cannot be trained."""
        if self.generator.kind == "diffusers":
            from pd_core.finetuning.diffusion import DiffusionModel

            return DiffusionModel(self.generator, self.training, share, self.seed, self.classes)
        raise NotImplementedError


def describe(spec: ModelSpec) -> dict[str, Any]:
    """Size of the model's images; in a Ray task, before anything is trained."""
    model = spec.open(Share(0, 1, "cpu", 1))
    return {"size": model.size}
