"""Settings of finetune: training, weights of real and generated images, evaluation on the way."""

from __future__ import annotations

from typing import Literal

from pydantic import (
    Field,
)

from pd_core.core.settings.base import ResolvedSettings, Section
from pd_core.core.settings.data import DataSettings
from pd_core.core.settings.evaluate import MetricSettings
from pd_core.core.settings.generate import GeneratingSettings, WeightingSettings


class FakeWeightingSettings(Section):
    """Which generated images a GAN trains on (Algorithm 3): those of its D step and of its G step are drawn with these
    weights.
    """

    threshold: str | None = Field(
        None, description="tau of generated images, a percentile of the real set or a density; default: the weighting's"
    )
    weight: float | None = Field(
        None, gt=0, description="w of generated images above it; default: 1 / weighting.weight; 1: all of them"
    )
    max_candidates: int = Field(
        2000, gt=0, description="stop where an image of a batch is still rejected after so many"
    )


class TrainingSettings(Section):
    """The optimisation. Sizes are those of one step of all workers together."""

    batch_size: int = Field(64, gt=0, description="real images of one step, of all workers together")
    accumulate: int = Field(1, gt=0, description="passes that a worker's share of a step is cut into, to save memory")
    learning_rate: float = Field(
        1e-4, gt=0, description="of Adam, after warm-up; of a GAN's generator and discriminator"
    )
    warmup_steps: int = Field(10, ge=0, description="steps over which the learning rate rises to it")
    clip: float = Field(1.0, gt=0, description="diffusion: largest norm of the gradient")
    ema_decay: float = Field(
        0.999, ge=0, lt=1, description="of the average of the weights, which is what is saved; lower in the first steps"
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="diffusion: arithmetic of the network (autocast); weights and averages stay fp32"
    )
    gradient_checkpointing: bool = Field(
        False, description="diffusion: compute activations twice instead of keeping them"
    )
    min_snr: float | None = Field(
        None, gt=0, description="diffusion: gamma of the min-SNR loss weights, e.g. 5; default: the plain loss"
    )
    r1_weight: float = Field(1.0, ge=0, description="GAN: gamma of the R1 penalty on real images")
    r1_interval: int = Field(
        16, gt=0, description="GAN: steps from one R1 penalty to the next; it is scaled to make up"
    )
    mirror: bool = Field(False, description="show half of the real images mirrored")
    resize: Literal["crop", "none"] = Field(
        "crop", description="crop: shorter side to the model's, centre cut out; none: refuse images of other sizes"
    )


class InLoopSettings(Section):
    """Evaluation while training, in the index's feature space, from the same seeds each time."""

    every: int = Field(100, gt=0, description="steps between two evaluations; checkpoints are written there")
    n: int = Field(500, gt=0, description="images generated for one")
    n_real: int = Field(10_000, gt=0, description="real images that they are measured against, at most")
    chunk: int = Field(50, gt=0, description="images generated as one batch")
    metric: Literal["auto", "frechet_distance", "precision", "recall", "density", "coverage"] = Field(
        "auto",
        description="by which the best step is chosen; auto: precision where weighting.weight is above 1, recall where "
        "it is below, frechet_distance for other weightings",
    )
    patience: int = Field(0, ge=0, description="stop after so many evaluations without a better one; 0: never")
    metrics: MetricSettings = MetricSettings()


class FinetuneSettings(GeneratingSettings):
    """Train a generator further, on real images drawn by their densities."""

    discriminator: str | None = Field(
        None, description="torchscript: file of the discriminator, images and labels to logits; local or s3://"
    )
    data: DataSettings = DataSettings()
    weighting: WeightingSettings = WeightingSettings()
    fake: FakeWeightingSettings = FakeWeightingSettings()
    steps: int = Field(500, gt=0, description="optimiser steps")
    workers: int = Field(1, gt=0, description="data-parallel processes that share each batch")
    worker_cpus: int = Field(1, gt=0, description="threads of one worker without GPU, cores")
    worker_gpus: float | None = Field(
        None, ge=0, description="GPUs of one worker; default: 1 where the cluster has any"
    )
    training: TrainingSettings = TrainingSettings()
    evaluation: InLoopSettings = InLoopSettings()
    checkpoint_every: int = Field(
        100, gt=0, description="steps between two checkpoints: what is lost at most when a worker dies"
    )
    keep: int = Field(2, gt=0, description="checkpoints kept to go on from; the averages of all evaluations stay")
    merge: Literal["none", "best-of"] = Field(
        "none",
        description="best-of: search for the combination of the saved averages that is best, and save it if it beats "
        "the best step",
    )
    merge_candidates: int = Field(64, gt=1, description="combinations that --merge tries")
    seed: int = Field(0, ge=0, description="of the run: images drawn, noise, latents, labels")
    images: int = Field(24, gt=0, description="images in each grid of the report, from the same seeds before and after")


class ResolvedFinetune(ResolvedSettings, FinetuneSettings):
    """Of finetune, checked."""

    index: str
