"""Evaluation while training: images from the same seeds each time, measured in the index's feature space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from pd_core.core import schemas
from pd_core.core import seeds as core_seeds
from pd_core.core.settings.evaluate import MetricSettings
from pd_core.density.scorer import Scorer
from pd_core.evaluate import measure as evaluate_measure
from pd_core.evaluate import metrics, spaces
from pd_core.evaluate.halfsamples import Estimate
from pd_core.evaluate.spaces import Features
from pd_core.generate.candidates import picture
from pd_core.generators.protocol import Conditions, Generator, generate_checked
from pd_core.index.extractor import ExtractorSpec

if TYPE_CHECKING:
    import torch

LOWER_IS_BETTER = ("frechet_distance",)


@dataclass(frozen=True)
class Plan:
    """What is generated and measured; picklable.

    Attributes:
        spec: extractor of the index.
        seed: of the run. stream: name of the seeds' stream; another one gives other images.
        n: images. chunk: of one batch.
        classes: class number of each label, which images get in turn; empty where the generator takes none.
        name: the generator as the user knows it, for messages.
    """

    spec: ExtractorSpec
    seed: int
    stream: str
    n: int
    chunk: int
    classes: Mapping[str, int]
    name: str

    @property
    def chunks(self) -> int:
        """Batches of the n images."""
        return -(-self.n // self.chunk)

    def numbers(self, chunk: int) -> np.ndarray:
        """Images of a batch, int64."""
        return np.arange(chunk * self.chunk, min((chunk + 1) * self.chunk, self.n))

    def seeds(self, numbers: np.ndarray) -> list[int]:
        """Seed of each image."""
        return [int(seed) for seed in core_seeds.integers(numbers, core_seeds.stream(self.seed, self.stream))]

    def labels(self, numbers: np.ndarray) -> list[str | None]:
        """Label of each image: all equally often, up to one; which come first is drawn, since there may be more than
        images.
        """
        if not self.classes:
            return [None] * len(numbers)
        stream = core_seeds.stream(self.seed, f"{self.stream}/classes")
        order = np.argsort(core_seeds.integers(np.arange(len(self.classes)), stream))
        names = list(self.classes)
        return [names[order[i % len(order)]] for i in numbers.tolist()]

    def conditions(self, numbers: np.ndarray) -> Conditions:
        """What the generator is asked for: the class of each image's label."""
        if not self.classes:
            return Conditions()
        return Conditions(labels=tuple(self.classes[str(label)] for label in self.labels(numbers)))


def generate(plan: Plan, sampler: Generator, chunk: int, device: str) -> torch.Tensor:
    """Images of a batch, uint8 [m, H, W, 3]."""
    numbers = plan.numbers(chunk)
    return generate_checked(sampler, plan.seeds(numbers), plan.conditions(numbers), plan.name, device)


def features_of(scorer: Scorer, images: torch.Tensor) -> np.ndarray:
    """float32 [m, D] of images uint8 [m, H, W, 3]."""
    return scorer.features(images.to(scorer.extractor.device)).float().cpu().numpy()


def samples(plan: Plan, images: torch.Tensor, densities: np.ndarray) -> pa.Table:
    """`schemas.finetuned_samples` of the first images of an evaluation, uint8 [m, H, W, 3], with their predicted
    densities.
    """
    numbers = np.arange(len(images))
    pixels = zip(numbers.tolist(), images.cpu().numpy(), strict=True)
    columns = {
        "number": numbers,
        "seed": plan.seeds(numbers),
        "label": plan.labels(numbers),
        "density_predicted": densities,
        "image": [picture(image, f"{number:012d}") for number, image in pixels],
    }
    return pa.table(columns, schema=schemas.finetuned_samples())


def prepare(real: Features, n_real: int, settings: MetricSettings, threads: int) -> metrics.Reference:
    """The real side of every evaluation of a run, once; in a Ray task."""
    rows = spaces.read_rows(real, n_real)
    return evaluate_measure.reference_of(rows, settings, threads, "cpu", "--index")


def measure(
    reference: metrics.Reference, found: Sequence[np.ndarray], threads: int, device: str
) -> Mapping[str, Estimate]:
    """Metrics of all batches together, in their order."""
    together = np.concatenate(found)
    rows = np.arange(len(together))
    return metrics.evaluate(reference, together, rows, threads=threads, device=device).estimates


def better(metric: str, one: float, other: float) -> bool:
    """Whether `one` beats `other`."""
    return one < other if metric in LOWER_IS_BETTER else one > other
