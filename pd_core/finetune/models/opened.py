"""Opening the model that is trained, of any kind of generator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pd_core.core import artifacts
from pd_core.core.settings.finetune import FakeWeightingSettings, TrainingSettings
from pd_core.core.settings.generate import GeneratorSettings
from pd_core.density.realset import RealSet
from pd_core.density.scorer import Scorer
from pd_core.density.weighting import Weighting
from pd_core.engine import resources
from pd_core.finetune.protocol import Batch, Share, Trainable
from pd_core.generate import setup
from pd_core.generators import open as generators_open
from pd_core.generators import protocol

PROBED_STEPS = 3  # of which the first is not timed


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
            from pd_core.finetune.models.diffusion import DiffusionModel

            return DiffusionModel(self.generator, self.training, share, self.seed, self.classes)
        from pd_core.finetune.models.gan import FakeSampling, Gan, predicted

        pair = generators_open.open_pair(self.generator, self.discriminator, share.device, share.threads)
        fake = None
        if self.fake is not None:
            (threshold,), (_, weight) = self.fake.edges, self.fake.weights
            densities = predicted(self.scorer(share.device, share.threads))
            fake = FakeSampling(densities, threshold, weight, self.sampling.max_candidates)
        return Gan(pair, self.training, share, self.seed, self.classes, fake)

    def scorer(self, device: str, threads: int) -> Scorer:
        """F and f of the real set on a device."""
        return Scorer(self.real.extractor, self.real.predictor(), device, threads)


def describe(spec: ModelSpec) -> dict[str, Any]:
    """Facts of the generator (`setup.facts_of`) and of training it; in a Ray task, before anything is trained.

    Beside those: class number of each label; size of its images (height, width), px; parameters that are trained;
    whether an average came with it; hash of the discriminator's file.

    Raises:
        UserError: it cannot be opened, or cannot be trained.
    """
    device = resources.assigned_device()
    facts = setup.facts_of(generators_open.open_generator(spec.generator, device))
    numbers, names = setup.classes_of(spec.generator, facts)
    classes = dict(zip(names, numbers, strict=True))
    model = replace(spec, classes=classes).open(Share(0, 1, device, 1))
    discriminator = None if spec.discriminator is None else protocol.files_hash(spec.discriminator)
    more = {
        "classes": classes,
        "size": list(model.size),
        "parameters": model.parameters,
        "came_averaged": model.came_averaged,
        "discriminator": discriminator,
    }
    return facts | more


def probe(spec: ModelSpec, images: int) -> dict[str, float]:
    """Seconds of a step on so many images, and the memory that a process needs for it; in a Ray task."""
    model = spec.open(Share(0, 1, resources.assigned_device(), 1))
    rng = np.random.default_rng(0)
    label = next(iter(spec.classes), None)
    times = []
    Path("/proc/self/clear_refs").write_text("5")  # what this process took for earlier tasks is not of this one
    for step in range(PROBED_STEPS):
        pixels = rng.integers(0, 256, (images, *model.size, 3), dtype=np.uint8)
        numbers = np.arange(images)
        watch = artifacts.Stopwatch()
        model.step(Batch(step, step * images, numbers, np.ones(images), (label,) * images, pixels))
        times.append(watch.seconds)
    return {"step_s": float(np.median(times[1:])), "peak_bytes": _peak_bytes()}


def _peak_bytes() -> float:
    import torch

    if resources.assigned_device() == "cuda":
        return float(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status").read_text()
    return float(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))) * 1024
