"""Candidates in fixed chunks: what is drawn, generated, scored and accepted. Knows nothing of Ray, parts or how many are wanted.

Algorithm 2 of arXiv 2407.08659 for any bounded weight function. Candidate i is a function of (generator, run seed, i): its
image is drawn from a seed of its own, and so are its label, its prompt and the u that decides. A chunk of candidates is
always run as one batch.
"""

from __future__ import annotations

import functools
import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from pd_core.core import artifacts, schemas, trust
from pd_core.core import seeds as core_seeds
from pd_core.core.errors import UserError
from pd_core.core.settings.generate import GeneratorSettings
from pd_core.density import formula
from pd_core.density import weighting as density_weighting
from pd_core.density.realset import RealSet
from pd_core.density.scorer import Scorer
from pd_core.density.weighting import Weighting
from pd_core.generate.volume import Volume, floored, log_volume, top_singular_values
from pd_core.generators import protocol
from pd_core.generators.open import open_generator
from pd_core.index import search

if TYPE_CHECKING:
    import torch

EVERYTHING = ""  # name of the weighting of candidates without one of their own


# ---- what is drawn ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the rows, but not how many of them; picklable.

    Attributes:
        generator: G. generator_identity: of the weights that were found when the run began.
        realset: F, f, the index and the constants of the density.
        weightings: ω for each label name, or one for all under EVERYTHING.
        score: predictor, index or both, as in the settings.
        seed: of the run.
        chunk: candidates of one batch.
        threads: of the CPU arithmetic of one replica.
        classes: class numbers that labels are drawn from, or empty.
        class_names: name of each of `classes`.
        prompts: texts that prompts are drawn from, or empty.
        device: cpu or cuda; the last bits of an image differ between the two, and with them its hash.
        copy_distance: a row at most this far from a real image is a likely copy of it.
        drop_copies: such rows are not accepted.
        volume: how log-volumes are measured, which decide then; None where densities do.
    """

    generator: GeneratorSettings
    generator_identity: Mapping[str, Any]
    realset: RealSet
    weightings: Mapping[str, Weighting]
    score: str
    seed: int
    chunk: int
    threads: int
    classes: tuple[int, ...]
    class_names: tuple[str, ...]
    prompts: tuple[str, ...]
    device: str
    copy_distance: float
    drop_copies: bool
    volume: Volume | None = None

    def identity(self) -> dict[str, Any]:
        """JSON-able: all of it and the versions that move pixels, but not where the generator and the index lie."""
        import PIL

        return {
            "generator": dict(self.generator_identity),
            "settings": self.generator.model_dump(mode="json", exclude={"path", "code", "prompts", "allow_pickle"}),
            "realset": dict(self.realset.fingerprints),
            "weightings": {label: weighting.to_json() for label, weighting in self.weightings.items()},
            "volume": None if self.volume is None else asdict(self.volume),
            "score": self.score,
            "seed": self.seed,
            "chunk": self.chunk,
            "device": self.device,
            "threads": self.threads,
            "classes": list(self.classes),
            "class_names": list(self.class_names),
            "prompts": prompts_hash(self.prompts),
            "copy_distance": self.copy_distance,
            "drop_copies": self.drop_copies,
            "torch": version("torch"),  # not torch.__version__: every task would import torch to unpickle it
            "pillow": PIL.__version__,
        }

    @classmethod
    def from_identity(
        cls,
        identity: Mapping[str, Any],
        generator: GeneratorSettings,
        realset: RealSet,
        prompts: tuple[str, ...],
        where: str = "the record of the samples",
    ) -> Recipe:
        """Inverse of `identity`, given what it names by hash alone; the caller compares the hashes.

        where: URI of the record, for messages. Raises UserError: it says what cannot be.
        """
        said = trust.checked(_Recorded, identity, where, whole=False)
        return cls(
            generator=generator,
            generator_identity=said.generator,
            realset=realset,
            weightings=said.weightings,
            volume=said.volume,
            score=said.score,
            seed=said.seed,
            chunk=said.chunk,
            threads=said.threads,
            classes=said.classes,
            class_names=said.class_names,
            prompts=prompts,
            device=said.device,
            copy_distance=said.copy_distance,
            drop_copies=said.drop_copies,
        )


@dataclass(frozen=True)
class _Recorded:
    """What `Recipe.identity` says of itself and not by hash, as it is read from a record."""

    generator: dict[str, Any]
    weightings: dict[str, Weighting]
    volume: Volume | None
    score: Literal["predictor", "index", "both"]
    seed: Annotated[int, Field(ge=0)]
    chunk: trust.Small
    threads: Annotated[int, Field(ge=1, le=4096)]
    classes: tuple[Annotated[int, Field(ge=0)], ...]
    class_names: tuple[str, ...]
    device: Literal["cpu", "cuda"]
    copy_distance: trust.NotNegative
    drop_copies: bool

    def __post_init__(self) -> None:
        if len(self.class_names) != len(self.classes):
            raise ValueError(f"{len(self.class_names)} names of {len(self.classes)} classes")
        labels = set(self.class_names) if self.classes and EVERYTHING not in self.weightings else {EVERYTHING}
        if missing := labels - set(self.weightings):
            raise ValueError(f"no weighting of {min(missing)!r}")


def prompts_hash(prompts: Sequence[str]) -> str:
    """SHA-256 of the prompts in their order."""
    return artifacts.sha256("\n".join(prompts).encode())


@dataclass(frozen=True)
class Candidates:
    """One chunk, before anything is generated. Each array has a row per candidate.

    Attributes:
        number: int64, the sample_id. seed: int64, of the image. u: float64 in [0, 1).
        label: place in `Recipe.classes`, int64, or None. prompt: place in `Recipe.prompts`, or None.
    """

    number: np.ndarray
    seed: np.ndarray
    u: np.ndarray
    label: np.ndarray | None
    prompt: np.ndarray | None


def candidates_of(recipe: Recipe, chunk: int) -> Candidates:
    """Candidates [chunk * size, (chunk + 1) * size), drawn from their numbers alone."""
    number = np.arange(chunk * recipe.chunk, (chunk + 1) * recipe.chunk, dtype=np.int64)

    def pick(name: str, many: int) -> np.ndarray | None:
        return (
            (core_seeds.uniform(number, core_seeds.stream(recipe.seed, name)) * many).astype(np.int64) if many else None
        )

    return Candidates(
        number=number,
        seed=core_seeds.integers(number, core_seeds.stream(recipe.seed, "image")),
        u=core_seeds.uniform(number, core_seeds.stream(recipe.seed, "acceptance")),
        label=pick("label", len(recipe.classes)),
        prompt=pick("prompt", len(recipe.prompts)),
    )


def conditions_of(recipe: Recipe, drawn: Candidates) -> protocol.Conditions:
    """What the generator is asked to show."""
    return protocol.Conditions(
        labels=None if drawn.label is None else tuple(recipe.classes[i] for i in drawn.label),
        prompts=None if drawn.prompt is None else tuple(recipe.prompts[i] for i in drawn.prompt),
    )


@dataclass(frozen=True)
class Scores:
    """What is known of each candidate of a chunk.

    Attributes:
        density: ρ, by the predictor or by the index, float64 [n].
        log_volume: v, float64 [n], or None where it was not asked for.
    """

    density: np.ndarray
    log_volume: np.ndarray | None = None

    @property
    def deciding(self) -> np.ndarray:
        """What ω is a function of."""
        return self.density if self.log_volume is None else self.log_volume


def probabilities(recipe: Recipe, drawn: Candidates, deciding: np.ndarray) -> np.ndarray:
    """Acceptance probability of each candidate of a chunk, float64: ω of its label over the supremum of all labels' ω."""
    if drawn.label is None or EVERYTHING in recipe.weightings:
        return density_weighting.acceptance_probability(deciding, recipe.weightings[EVERYTHING])
    chances, sup = np.empty(len(deciding)), density_weighting.supremum(recipe.weightings.values())
    for place in np.unique(drawn.label):
        rows = drawn.label == place
        weighting = recipe.weightings[recipe.class_names[place]]
        chances[rows] = density_weighting.acceptance_probability(deciding[rows], weighting, sup)
    return chances


# ---- generated and scored ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """A generated chunk, or what is left of it; row j is candidate `rows[j]` of its chunk.

    Attributes:
        rows: int64 [m]. pixels: uint8 [m, H, W, 3]. features: float32 [m, D].
        log_density: predicted, float64 [chunk], of all candidates; None where no predictor was asked for.
        log_volume: float64 [chunk], of all candidates; None where it was not asked for.
        degenerate: candidates with a singular value that counts as zero.
    """

    rows: np.ndarray
    pixels: np.ndarray
    features: np.ndarray
    log_density: np.ndarray | None
    log_volume: np.ndarray | None = None
    degenerate: int = 0


class ChunkMaker:
    """The generator, the extractor and the predictor of one replica."""

    def __init__(self, recipe: Recipe, device: str) -> None:
        self.recipe = recipe
        self.generator = open_generator(recipe.generator, device, recipe.threads)
        if artifacts.canonical(self.generator.identity()) != artifacts.canonical(recipe.generator_identity):
            raise UserError(
                f"--generator.path {recipe.generator.path}: differs from what the run began with; make the same files "
                "visible on every node and leave them as they are while it runs"
            )
        self.name = f"--generator.path {recipe.generator.path}"
        if recipe.volume is not None and not isinstance(self.generator, protocol.LatentGenerator):
            raise UserError(
                f"{self.name}: its images are not a function of latents that gradients pass (docs/generators.md); Polarity and "
                "MaGNET need a LatentGenerator, such as diffusion with --generator.scheduler DDIMScheduler --generator.eta 0"
            )
        assert recipe.volume is None or recipe.score != "index", "GenerateSettings refuses both"
        predictor = None if recipe.score == "index" else recipe.realset.predictor()
        self.scorer = Scorer(recipe.realset.extractor, predictor, device, recipe.threads)

    def make(self, chunk: int) -> Batch:
        """Generate and score a chunk; where the index does not decide, only what is accepted leaves the device.

        Raises:
            ValueError: the generator gave something that is no batch of images, or a feature is not finite.
        """
        import torch

        drawn = candidates_of(self.recipe, chunk)
        device = self.scorer.extractor.device
        with torch.no_grad():  # not inference_mode: a scheduler may keep a tensor that a later gradient has to pass
            seeds, conditions = drawn.seed.tolist(), conditions_of(self.recipe, drawn)
            images = protocol.generate_checked(self.generator, seeds, conditions, self.name, device).to(device)
            features = self.scorer.features(images)
            if not bool(torch.isfinite(features).all()):
                raise ValueError("features of generated images are not finite")
            if self.scorer.predictor is None:
                return _batch(np.arange(len(images)), images, features, None)
            log_density = self.scorer.log_density(features).cpu().numpy()
        if not np.isfinite(log_density).all():
            raise ValueError("predicted densities of generated images are not finite")
        values = self._singular_values(seeds, conditions)
        scores = Scores(formula.density_of(log_density), None if values is None else log_volume(values))
        accepted = np.flatnonzero(drawn.u < probabilities(self.recipe, drawn, scores.deciding))
        degenerate = 0 if values is None else int(floored(values).sum())
        return replace(
            _batch(accepted, images, features, log_density), log_volume=scores.log_volume, degenerate=degenerate
        )

    def _singular_values(self, seeds: Sequence[int], conditions: protocol.Conditions) -> np.ndarray | None:
        """Of the Jacobian at each sample, float64 [chunk, rank]; None where volumes were not asked for."""
        if self.recipe.volume is None:
            return None
        assert isinstance(self.generator, protocol.LatentGenerator)
        decode = functools.partial(self.generator.decode, conditions=conditions)
        with protocol.own_randomness(self.name, self.scorer.extractor.device):
            latents = self.generator.latents(seeds)
            return top_singular_values(decode, latents, seeds, self.recipe.volume, self.name)


def _batch(rows: np.ndarray, images: torch.Tensor, features: torch.Tensor, log_density: np.ndarray | None) -> Batch:
    import torch

    kept = torch.from_numpy(rows).to(images.device)
    return Batch(rows, images[kept].cpu().numpy(), features[kept].cpu().numpy(), log_density)


# ---- searched, accepted, encoded --------------------------------------------------------------------------------------


def finish(recipe: Recipe, pool: search.SearchPool, chunk: int, made: Batch) -> tuple[pa.Table, Scores, int]:
    """The accepted rows of a chunk (`schemas.samples`), the scores of all its candidates, likely copies."""
    drawn, real = candidates_of(recipe, chunk), recipe.realset
    k = 1 if recipe.score == "predictor" else real.k
    if len(made.rows) == 0:
        assert made.log_density is not None
        return schemas.samples().empty_table(), Scores(formula.density_of(made.log_density), made.log_volume), 0
    distances, neighbors, _ = search.search(pool, made.features, k)
    by_index = None if recipe.score == "predictor" else formula.density_of(real.log_density(distances))
    if made.log_density is None:  # the index decides: every candidate is here
        assert by_index is not None and len(made.rows) == recipe.chunk
        scores = Scores(by_index)
    else:
        scores = Scores(formula.density_of(made.log_density), made.log_volume)
    chances = probabilities(recipe, drawn, scores.deciding)
    copies = distances[:, 0] <= recipe.copy_distance
    chosen = drawn.u[made.rows] < chances[made.rows]
    likely = int((chosen & copies).sum())
    keep = np.flatnonzero(chosen & ~copies) if recipe.drop_copies else np.flatnonzero(chosen)
    rows = made.rows[keep]
    columns = {
        "sample_id": drawn.number[rows],
        "seed": drawn.seed[rows],
        "density": scores.density[rows],
        "density_predicted": None if made.log_density is None else formula.density_of(made.log_density[rows]),
        "density_index": None if by_index is None else by_index[keep],
        "percentile": real.percentile(scores.density[rows]),
        "log_volume": None if scores.log_volume is None else scores.log_volume[rows],
        "acceptance_probability": chances[rows],
        "label": None if drawn.label is None else [recipe.class_names[i] for i in drawn.label[rows]],
        "prompt": None if drawn.prompt is None else [recipe.prompts[i] for i in drawn.prompt[rows]],
        "nearest_real_id": neighbors[keep, 0],
        "nearest_real_distance": distances[keep, 0],
        "likely_copy": copies[keep],
        "image_hash": [pixels_hash(pixels) for pixels in made.pixels[keep]],
        "image": [picture(p, f"{n:012d}") for p, n in zip(made.pixels[keep], drawn.number[rows].tolist(), strict=True)],
    }
    schema = schemas.samples()
    arrays = [pa.nulls(len(keep), f.type) if (c := columns[f.name]) is None else pa.array(c, f.type) for f in schema]
    return pa.table(arrays, schema=schema), scores, likely


def pixels_hash(pixels: np.ndarray) -> str:
    """SHA-256 of an image uint8 [H, W, 3]: of its size and its pixels, whatever file it is kept in."""
    height, width, _ = pixels.shape
    return hashlib.sha256(f"{height}x{width} RGB\n".encode() + np.ascontiguousarray(pixels).tobytes()).hexdigest()


def picture(pixels: np.ndarray, name: str) -> dict[str, Any]:
    """`schemas.IMAGE` of uint8 [H, W, 3], as PNG."""
    from PIL import Image

    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "PNG")
    return {"bytes": sink.getvalue(), "path": f"{name}.png"}
