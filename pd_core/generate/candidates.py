"""Candidates in fixed chunks: what is drawn, generated, scored and accepted. Knows nothing of Ray, parts or how many
are wanted.

Algorithm 2 of arXiv 2407.08659 for any bounded weight function. Candidate i is a function of (generator, run seed, i):
its image is drawn from a seed of its own, and so are its label, its prompt and the u that decides. A chunk of
candidates is always run as one batch.
"""

from __future__ import annotations

import functools
import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Annotated, Any, Literal

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
from pd_core.density.weighting import EVERYTHING, Weighting
from pd_core.generate.volume import Volume, floored, log_volume, top_singular_values
from pd_core.generators import protocol
from pd_core.generators.open import open_generator
from pd_core.index import search

# ---- what is drawn ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Everything that decides the candidates and what is measured of each; picklable.

    Attributes:
        generator: G. generator_identity: of the weights that were found when the run began.
        realset: F, f, the index and the constants of the density.
        seed: of the run.
        chunk: candidates of one batch.
        threads: of the CPU arithmetic of one replica.
        classes: class numbers that labels are drawn from, or empty.
        class_names: name of each of `classes`.
        prompts: texts that prompts are drawn from, or empty.
        device: cpu or cuda; the last bits of an image differ between the two, and with them its hash.
        copy_distance: a row at most this far from a real image is a likely copy of it.
        volume: how log-volumes are measured; None where they are not.
    """

    generator: GeneratorSettings
    generator_identity: Mapping[str, Any]
    realset: RealSet
    seed: int
    chunk: int
    threads: int
    classes: tuple[int, ...]
    class_names: tuple[str, ...]
    prompts: tuple[str, ...]
    device: str
    copy_distance: float
    volume: Volume | None = None

    def identity(self) -> dict[str, Any]:
        """JSON-able: all of it and the versions that move pixels, but not where the generator and the index lie."""
        import PIL

        return {
            "generator": dict(self.generator_identity),
            "settings": self.generator.model_dump(mode="json", exclude={"path", "code", "prompts", "allow_pickle"}),
            "realset": dict(self.realset.fingerprints),
            "volume": None if self.volume is None else asdict(self.volume),
            "seed": self.seed,
            "chunk": self.chunk,
            "device": self.device,
            "threads": self.threads,
            "classes": list(self.classes),
            "class_names": list(self.class_names),
            "prompts": prompts_hash(self.prompts),
            "copy_distance": self.copy_distance,
            "torch": version("torch"),  # not torch.__version__: every task would import torch to unpickle it
            "pillow": PIL.__version__,
        }

    def accepting(self, weightings: Mapping[str, Weighting], score: str, drop_copies: bool = False) -> Recipe:
        """The recipe of those of its candidates that are accepted so."""
        return Recipe(**vars(self), weightings=weightings, score=score, drop_copies=drop_copies)

    def everyone(self) -> Recipe:
        """The recipe of all of its candidates, scored by both predictor and index."""
        return self.accepting({EVERYTHING: density_weighting.uniform()}, "both")


@dataclass(frozen=True, kw_only=True)
class Recipe(Origin):
    """Everything that decides the rows, but not how many of them; picklable.

    Attributes:
        weightings: ω for each label name, or one for all under EVERYTHING.
        score: predictor, index or both, as in the settings.
        drop_copies: likely copies are not accepted.
    """

    weightings: Mapping[str, Weighting]
    score: str
    drop_copies: bool

    @property
    def statistic(self) -> str:
        """What the weights are functions of, by its column: density, or log_volume where that is measured."""
        return "density" if self.volume is None else "log_volume"

    def identity(self) -> dict[str, Any]:
        """JSON-able: that of the candidates, and who of them is accepted."""
        return super().identity() | {
            "weightings": {label: weighting.to_json() for label, weighting in self.weightings.items()},
            "score": self.score,
            "drop_copies": self.drop_copies,
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
        said = dict(vars(trust.checked(_Recorded, identity, where, whole=False)))
        return cls(
            generator=generator, generator_identity=said.pop("generator"), realset=realset, prompts=prompts, **said
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


def candidates_of(recipe: Origin, chunk: int) -> Candidates:
    """Candidates [chunk * size, (chunk + 1) * size), drawn from their numbers alone."""
    number = np.arange(chunk * recipe.chunk, (chunk + 1) * recipe.chunk, dtype=np.int64)

    def uniform(name: str) -> np.ndarray:
        return core_seeds.uniform(number, core_seeds.stream(recipe.seed, name))

    def pick(name: str, many: int) -> np.ndarray | None:
        return (uniform(name) * many).astype(np.int64) if many else None

    return Candidates(
        number=number,
        seed=core_seeds.integers(number, core_seeds.stream(recipe.seed, "image")),
        u=uniform("acceptance"),
        label=pick("label", len(recipe.classes)),
        prompt=pick("prompt", len(recipe.prompts)),
    )


def conditions_of(recipe: Origin, drawn: Candidates) -> protocol.Conditions:
    """What the generator is asked to show."""
    return protocol.Conditions(
        labels=None if drawn.label is None else tuple(recipe.classes[i] for i in drawn.label),
        prompts=None if drawn.prompt is None else tuple(recipe.prompts[i] for i in drawn.prompt),
    )


# ---- who is accepted -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scored:
    """Every candidate of a chunk after the decision, a row each; it is made once, by whoever has the deciding score.

    Attributes:
        density: ρ, by the predictor or by the index, float64 [n].
        statistic: what ω is a function of (`Recipe.statistic`), float64 [n].
        probability: a, of being accepted, float64 [n]. accepted: whether it was, bool [n].
    """

    density: np.ndarray
    statistic: np.ndarray
    probability: np.ndarray
    accepted: np.ndarray


def decide(recipe: Recipe, drawn: Candidates, density: np.ndarray, statistic: np.ndarray) -> Scored:
    """Accept with a = ω of the candidate's label over the supremum of all labels' ω; arguments as in `Scored`."""
    if drawn.label is None or EVERYTHING in recipe.weightings:
        chances = density_weighting.acceptance_probability(statistic, recipe.weightings[EVERYTHING])
    else:
        chances, sup = np.empty(len(statistic)), density_weighting.supremum(recipe.weightings.values())
        for place in np.unique(drawn.label):
            rows = drawn.label == place
            weighting = recipe.weightings[recipe.class_names[place]]
            chances[rows] = density_weighting.acceptance_probability(statistic[rows], weighting, sup)
    return Scored(density, statistic, chances, drawn.u < chances)


# ---- generated and scored --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """A generated chunk, or what is left of it; row j is candidate `rows[j]` of its chunk.

    Attributes:
        rows: int64 [m]. pixels: uint8 [m, H, W, 3]. features: float32 [m, D].
        scored: all candidates, of which `rows` are the accepted; None where the index decides, and `rows` are all.
        degenerate: candidates with a singular value that counts as zero.
    """

    rows: np.ndarray
    pixels: np.ndarray
    features: np.ndarray
    scored: Scored | None
    degenerate: int = 0


class Models:
    """The generator, the extractor and the predictor of one replica."""

    def __init__(self, origin: Origin, device: str, predicted: bool = True) -> None:
        """predicted: whether the predictor is wanted. Raises UserError: the generator is another, or has no volumes."""
        self.generator = open_generator(origin.generator, device, origin.threads)
        if artifacts.canonical(self.generator.identity()) != artifacts.canonical(origin.generator_identity):
            raise UserError(
                f"--generator.path {origin.generator.path}: differs from what the run began with; make the same files "
                "visible on every node and leave them as they are while it runs"
            )
        self.name = f"--generator.path {origin.generator.path}"
        if origin.volume is not None and not isinstance(self.generator, protocol.LatentGenerator):
            raise UserError(
                f"{self.name}: its images are not a function of latents that gradients pass (docs/generators.md); "
                "Polarity and MaGNET need a LatentGenerator, such as diffusion with --generator.scheduler "
                "DDIMScheduler --generator.eta 0"
            )
        predictor = origin.realset.predictor() if predicted else None
        self.scorer = Scorer(origin.realset.extractor, predictor, device, origin.threads)


class ChunkMaker(Models):
    """Models that make the chunks of a recipe."""

    def __init__(self, recipe: Recipe, device: str) -> None:
        assert recipe.volume is None or recipe.score != "index", "GenerateSettings refuses both"
        super().__init__(recipe, device, predicted=recipe.score != "index")
        self.recipe = recipe

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
                return Batch(np.arange(len(images)), images.cpu().numpy(), features.cpu().numpy(), None)
            log_density = self.scorer.log_density(features).cpu().numpy()
        if not np.isfinite(log_density).all():
            raise ValueError("predicted densities of generated images are not finite")
        statistic = density = formula.density_of(log_density)
        degenerate = 0
        if self.recipe.volume is not None:
            values = self._singular_values(self.recipe.volume, seeds, conditions)
            statistic, degenerate = log_volume(values), int(floored(values).sum())
        scored = decide(self.recipe, drawn, density, statistic)
        rows = np.flatnonzero(scored.accepted)
        kept = torch.from_numpy(rows).to(images.device)
        return Batch(rows, images[kept].cpu().numpy(), features[kept].cpu().numpy(), scored, degenerate)

    def _singular_values(self, volume: Volume, seeds: Sequence[int], conditions: protocol.Conditions) -> np.ndarray:
        """Of the Jacobian at each sample, float64 [chunk, rank]."""
        assert isinstance(self.generator, protocol.LatentGenerator)
        decode = functools.partial(self.generator.decode, conditions=conditions)
        with protocol.own_randomness(self.name, self.scorer.extractor.device):
            return top_singular_values(decode, self.generator.latents(seeds), seeds, volume, self.name)


# ---- searched and encoded --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finished:
    """A chunk as it is written: `schemas.samples`, `schemas.rejected`, and likely copies among what was accepted."""

    accepted: pa.Table
    rejected: pa.Table
    copies: int


def finish(recipe: Recipe, pool: search.SearchPool, chunk: int, made: Batch) -> Finished:
    """Search the index for what `make` gave, decide by it where it is to decide, and encode what is accepted."""
    drawn, real, scored = candidates_of(recipe, chunk), recipe.realset, made.scored
    k = 1 if recipe.score == "predictor" else real.k
    distances, neighbors, by_index = np.empty((0, k), np.float32), np.empty((0, k), np.int64), None
    if len(made.rows):
        distances, neighbors, _ = search.search(pool, made.features, k)
        by_index = None if recipe.score == "predictor" else formula.density_of(real.log_density(distances))
    if scored is None:
        assert by_index is not None and len(made.rows) == recipe.chunk
        scored = decide(recipe, drawn, by_index, by_index)
    copies, chosen = distances[:, 0] <= recipe.copy_distance, scored.accepted[made.rows]
    keep = np.flatnonzero(chosen & ~copies) if recipe.drop_copies else np.flatnonzero(chosen)
    rows = made.rows[keep]
    rest = np.setdiff1d(np.arange(recipe.chunk), rows)
    columns = {
        "sample_id": drawn.number,
        "seed": drawn.seed,
        "density": scored.density,
        "log_volume": scored.statistic if recipe.statistic == "log_volume" else None,
        "acceptance_probability": scored.probability,
    }
    pictures = zip(made.pixels[keep], drawn.number[rows].tolist(), strict=True)
    accepted = {name: None if column is None else column[rows] for name, column in columns.items()} | {
        "density_predicted": None if made.scored is None else scored.density[rows],
        "density_index": None if by_index is None else by_index[keep],
        "percentile": real.percentile(scored.density[rows]),
        "label": None if drawn.label is None else [recipe.class_names[i] for i in drawn.label[rows]],
        "prompt": None if drawn.prompt is None else [recipe.prompts[i] for i in drawn.prompt[rows]],
        "nearest_real_id": neighbors[keep, 0],
        "nearest_real_distance": distances[keep, 0],
        "likely_copy": copies[keep],
        "image_hash": [pixels_hash(pixels) for pixels in made.pixels[keep]],
        "image": [picture(pixels, f"{number:012d}") for pixels, number in pictures],
    }
    rejected = {name: None if column is None else column[rest] for name, column in columns.items()}
    return Finished(
        _table(schemas.samples(), accepted, len(rows)),
        _table(schemas.rejected(), rejected, len(rest)),
        int((chosen & copies).sum()),
    )


def _table(schema: pa.Schema, columns: Mapping[str, Any], rows: int) -> pa.Table:
    """Of columns by name, null where they are None."""
    arrays = [pa.nulls(rows, f.type) if (c := columns[f.name]) is None else pa.array(c, f.type) for f in schema]
    return pa.table(arrays, schema=schema)


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
