"""Perturbation on Ray: the first n candidates of a seed, each moved towards common or unique, and its new density.

By docs/method.md, section 3. Actors hold generator, extractor and predictor and run Algorithm 1 (algorithm.py) on a
chunk as one batch; tasks score the images before and after by the index, so that a rise the predictor was fooled into
is seen as one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from pd_core.core import artifacts, files, schemas
from pd_core.core import seeds as core_seeds
from pd_core.core.errors import RunError, UserError
from pd_core.density import formula, weighting
from pd_core.engine import console, resources, tasks, telemetry
from pd_core.generate import chunks as generate_chunks
from pd_core.generate.candidates import Models, Origin, candidates_of, conditions_of, picture, pixels_hash
from pd_core.generate.chunks import MAX_CHUNKS, Pool, Progress
from pd_core.generators import protocol
from pd_core.index import search
from pd_core.perturb import algorithm
from pd_core.perturb.algorithm import NoGradientError, Perturbed

if TYPE_CHECKING:
    import torch

SIGNS = {"up": 1, "down": -1}
PROBE_STEPS = 2


@dataclass(frozen=True)
class Move:
    """Settings of Algorithm 1; see `algorithm.perturb`. directions: of each sample, in the order of its rows."""

    directions: tuple[str, ...]
    epsilon: float
    step_size: float
    steps: int
    random_start: bool


@dataclass(frozen=True)
class Job:
    """A stage of perturbed samples: what is drawn and moved, and where it goes; picklable, a `chunks.Work`.

    Attributes:
        recipe: what is drawn. move: what is done with it.
        stage: where the rows go.
        chunks_per_part: chunks whose rows make one part.
        n: samples; the last chunk is made whole and cut, so that a row does not depend on n.
    """

    recipe: Origin
    move: Move
    stage: artifacts.Stage
    chunks_per_part: int
    n: int

    name = "perturbed"
    made = pa.schema(
        [
            ("height", pa.int32()),
            ("width", pa.int32()),
            ("pixels", pa.large_binary()),  # uint8 [1 + directions, m, H, W, 3], those before the change first
            ("features", pa.large_binary()),  # float32 [1 + directions, m, D]
            ("log_density", pa.list_(pa.float64())),  # predicted, [1 + directions, m]
            ("distance", pa.list_(pa.float64())),  # in the latents, [directions, m]
            ("not_finite", pa.int64()),  # changes in which a score or a gradient was not
        ]
    )
    finished = pa.schema([("rows", pa.large_binary()), ("not_finite", pa.int64())])

    @property
    def chunks(self) -> int:
        """Of all n samples."""
        return -(-self.n // self.recipe.chunk)

    @property
    def parts(self) -> int:
        """Of the stage."""
        return -(-self.chunks // self.chunks_per_part)

    def chunks_of(self, part: int) -> range:
        """The last part may have fewer."""
        first = part * self.chunks_per_part
        return range(first, min(first + self.chunks_per_part, self.chunks))

    def kept(self, chunk: int) -> int:
        """Samples of a chunk that are among the first n."""
        return min(self.recipe.chunk, self.n - chunk * self.recipe.chunk)

    def open(self, device: str) -> Models:
        """Generator, extractor and predictor."""
        if device != "cpu":
            _be_deterministic()
        return Models(self.recipe, device)

    def make(self, opened: Models, chunk: int) -> dict[str, Any]:
        """Moved, saved as uint8, and scored by the predictor again as saved."""
        return _made_values(opened, perturb_chunk(self, opened, chunk, self.move.steps), self.kept(chunk))

    def finish(self, pool: search.SearchPool, chunk: int, made: Mapping[str, Any]) -> dict[str, Any]:
        """Index-scored densities before and after, nearest real images, PNG encoding."""
        return {"rows": generate_chunks.to_stream(_rows(self, pool, chunk, made)), "not_finite": made["not_finite"]}

    def write(self, part: int, finished: pa.Table) -> int:
        """Commit the rows of a part."""
        table = generate_chunks.from_streams(finished["rows"]).replace_schema_metadata(schemas.perturbed().metadata)
        counts = {"not_finite": sum(finished["not_finite"].to_pylist())}
        self.stage.write_table(artifacts.part_name(part), table, counts)
        return table.num_rows

    @property
    def kind(self) -> str:
        """perturbed."""
        return self.stage.kind

    def count(self, chunks: int, rows: int) -> None:
        """Images, one for each direction of a sample."""
        telemetry.IMAGES.add(rows, stage=self.kind)


def stage_of(uri: str, recipe: Origin, move: Move, chunks_per_part: int, n: int) -> artifacts.Stage:
    """The stage at `uri`; everything that decides its rows is its identity."""
    identity = recipe.identity() | {"move": {**asdict(move), "directions": list(move.directions)}}
    identity |= {"n": n, "chunks_per_part": chunks_per_part}
    return artifacts.Stage(uri, "perturbed", schemas.VERSIONS["perturbed"], identity)


# ---- a chunk on its actor --------------------------------------------------------------------------------------------


def _be_deterministic() -> None:
    """On a GPU, operations that add in a fixed order where torch has them: the sign of a small gradient hangs on it."""
    import os

    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)


def perturb_chunk(job: Job, maker: Models, chunk: int, steps: int) -> list[Perturbed]:
    """The chunk's samples moved in each direction, on the device.

    Raises:
        UserError: the generator has no gradient, or draws from a global random state.
    """
    recipe, move = job.recipe, job.move
    drawn = candidates_of(recipe, chunk)
    name, device = f"--generator.path {recipe.generator.path}", maker.scorer.extractor.device
    generator, conditions = maker.generator, conditions_of(recipe, drawn)
    assert isinstance(generator, protocol.LatentGenerator), "refused before the run"

    def score(latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        images = generator.decode(latents, conditions).to(device)
        return maker.scorer.score(images), images

    start = (
        core_seeds.integers(drawn.number, core_seeds.stream(recipe.seed, "start")).tolist()
        if move.random_start
        else None
    )
    with protocol.own_randomness(name, device):
        latents = generator.latents(drawn.seed.tolist())
        try:
            made = [
                algorithm.perturb(score, latents, SIGNS[way], move.epsilon, move.step_size, steps, start)
                for way in move.directions
            ]
        except NoGradientError:
            raise UserError(
                f"{name}: its images have no gradient in the latents, so that nothing tells which way to move them; "
                "use a generator that is differentiable all the way (docs/generators.md)"
            ) from None
    if chunk == 0 and bool(made[0].flat.all()):  # a single later chunk may be flat: its samples stay where they are
        raise UserError(
            f"{name}: the predicted density of its images does not change with the latents: the gradient is zero for "
            f"all {len(latents)} samples of the first batch; use a generator that is differentiable all the way "
            "(docs/generators.md)"
        )
    return made


def _made_values(maker: Models, made: list[Perturbed], kept: int) -> dict[str, Any]:
    """Columns of `Job.made`. The images are measured as they are saved: uint8, in batches of the chunk's size."""
    import torch

    images = [made[0].before_images, *(one.images for one in made)]
    pixels = [protocol.to_uint8(image) for image in images]
    features = [maker.scorer.features(block) for block in pixels]
    predicted = [maker.scorer.log_density(block) for block in features]
    if not all(bool(torch.isfinite(block).all()) for block in (*features, *predicted)):
        raise ValueError("features or predicted densities of the images are not finite")
    stacked = torch.stack([block[:kept] for block in pixels]).cpu().numpy()
    return {
        "height": stacked.shape[2],
        "width": stacked.shape[3],
        "pixels": stacked.tobytes(),
        "features": torch.stack([block[:kept] for block in features]).cpu().numpy().tobytes(),
        "log_density": torch.stack([block[:kept] for block in predicted]).cpu().numpy().ravel(),
        "distance": np.concatenate([one.delta.flatten(1).abs().amax(dim=1)[:kept].double().cpu() for one in made]),
        "not_finite": int(sum(one.not_finite[:kept].sum() for one in made)),
    }


# ---- a chunk off its actor -------------------------------------------------------------------------------------------


def _rows(job: Job, pool: search.SearchPool, chunk: int, made: Mapping[str, Any]) -> pa.Table:
    """`schemas.perturbed` of a chunk: sample by sample, within one in the order of the directions."""
    recipe, real, ways, m = job.recipe, job.recipe.realset, job.move.directions, job.kept(chunk)
    blocks = 1 + len(ways)
    pixels = np.frombuffer(made["pixels"], np.uint8).reshape(blocks, m, made["height"], made["width"], 3)
    features = np.frombuffer(made["features"], np.float32).reshape(blocks, m, -1)
    distances, neighbors, _ = search.search(pool, features.reshape(blocks * m, -1), real.k)
    by_index = real.log_density(distances).reshape(blocks, m)
    predicted = np.asarray(made["log_density"]).reshape(blocks, m)
    moved = np.asarray(made["distance"]).reshape(len(ways), m)
    nearest, nearest_id = distances[:, 0].reshape(blocks, m), neighbors[:, 0].reshape(blocks, m)
    drawn = candidates_of(recipe, chunk)
    sample, way = (grid.ravel() for grid in np.mgrid[:m, : len(ways)])
    after = way + 1
    apart = np.linalg.norm((features[after, sample] - features[0, sample]).astype(np.float64), axis=1)
    sign = np.array([SIGNS[name] for name in ways])[way]
    number = drawn.number[sample]
    rho = formula.density_of
    names = [ways[w] for w in way]
    columns = {
        "sample_id": number,
        "seed": drawn.seed[sample],
        "direction": names,
        "label": None if drawn.label is None else [recipe.class_names[i] for i in drawn.label[sample]],
        "prompt": None if drawn.prompt is None else [recipe.prompts[i] for i in drawn.prompt[sample]],
        "density_predicted_before": rho(predicted[0, sample]),
        "density_predicted_after": rho(predicted[after, sample]),
        "density_index_before": rho(by_index[0, sample]),
        "density_index_after": rho(by_index[after, sample]),
        "percentile_before": real.percentile(rho(by_index[0, sample])),
        "percentile_after": real.percentile(rho(by_index[after, sample])),
        "latent_distance_max": moved[way, sample],
        "feature_distance": apart,
        "confirmed": sign * (by_index[after, sample] - by_index[0, sample]) > 0,
        "nearest_real_id": nearest_id[after, sample],
        "nearest_real_distance": nearest[after, sample],
        "likely_copy": nearest[after, sample] <= recipe.copy_distance,
        "image_hash": [pixels_hash(pixels[a, i]) for a, i in zip(after, sample, strict=True)],
        "image": [
            picture(pixels[a, i], f"{j:012d}-{name}")
            for a, i, j, name in zip(after, sample, number, names, strict=True)
        ],
        "image_before": [picture(pixels[0, i], f"{j:012d}") for i, j in zip(sample, number, strict=True)],
    }
    schema = schemas.perturbed()
    arrays = [pa.nulls(len(sample), f.type) if (c := columns[f.name]) is None else pa.array(c, f.type) for f in schema]
    return pa.table(arrays, schema=schema)


# ---- the run ---------------------------------------------------------------------------------------------------------


def run(
    job: Job, now: resources.Cluster, pool: Pool, index: search.SearchPool
) -> tuple[list[artifacts.Part], dict[str, Any]]:
    """Make what is missing; returns the parts and totals to commit.

    Raises:
        RunError: a chunk failed twice (with its seeds); what was made is kept.
    """
    state = Progress({}, {})
    rows = job.n * len(job.move.directions)

    def execute() -> None:
        state.rows = {
            number: part.rows for number, part in generate_chunks.by_number(job.stage.finished_parts()).items()
        }
        state.failed = {}
        together = max(1, MAX_CHUNKS // job.chunks_per_part)
        missing = [number for number in range(job.parts) if number not in state.rows]
        with console.progress("perturbed", rows, "images", sum(state.rows.values())) as bar:
            while missing and not state.hopeless:
                wanted, missing = missing[:together], missing[together:]
                generate_chunks.execute(job, wanted, now, pool, index, state, rows, bar, lambda: False)

    tasks.persist("perturbed", execute, lambda: len(state.rows))
    if state.failed:
        seeds = lambda chunk: candidates_of(job.recipe, chunk).seed  # noqa: E731
        raise RunError(generate_chunks.failed_line(job, state.failed, seeds, job.recipe.seed))
    parts = list(job.stage.finished_parts().values())
    assert sum(part.rows for part in parts) == rows, (len(parts), rows)
    totals = tasks.get(
        tasks.task(totals_of, resources.IO_CPUS).remote(job.stage.uri, sorted(part.name for part in parts))
    )
    totals |= {"rows": rows, "samples": job.n, "not_finite": sum(part.counts["not_finite"] for part in parts)}
    if state.busy_s:  # the median: the first chunk of an actor takes longer
        totals["actor_s_per_image"] = float(np.median(state.busy_s)) / (job.recipe.chunk * len(job.move.directions))
    return parts, totals


LIGHT = [field.name for field in schemas.perturbed() if field.type != schemas.IMAGE]


def totals_of(uri: str, names: list[str]) -> dict[str, Any]:
    """Of each direction: shares that the index confirms and that the predictor claims, and how far densities moved.

    Both shares are of all rows. A row whose predicted density underflows to 0 before and after is none that moved;
    where all do, the predictor says nothing, and its share is None.
    """
    table = pa.concat_tables([files.read_table(files.join(uri, name), LIGHT) for name in names])
    ways = np.array(table["direction"].to_pylist())
    columns = {name: table[name].to_numpy() for name in LIGHT if pa.types.is_floating(table[name].type)}
    confirmed = table["confirmed"].to_numpy().astype(bool)
    totals: dict[str, Any] = {"copies": sum(table["likely_copy"].to_pylist())}
    for way in np.unique(ways).tolist():
        here = ways == way
        before, after = densities_of(table.filter(pa.array(here)))
        (of_index, predicted), left_out = log_changes(before, after)
        told = (before[1] > 0) | (after[1] > 0)
        low, high = weighting.rate_interval(confirmed[here].astype(float), 0.0, 1.0)
        totals[way] = {
            "rows": int(here.sum()),
            "confirmed": int(confirmed[here].sum()),
            "confirmed_share": float(confirmed[here].mean()),
            "confirmed_low": low,
            "confirmed_high": high,
            "predicted_share": float(np.mean(SIGNS[way] * (after - before)[1] > 0)) if told.any() else None,
            "mean_log_ratio_index": float(of_index.mean()) if len(of_index) else None,
            "mean_log_ratio_predicted": float(predicted.mean()) if len(predicted) else None,
            "no_log_ratio": left_out,
            "mean_feature_distance": float(columns["feature_distance"][here].mean()),
            "unmoved": int((columns["latent_distance_max"][here] == 0).sum()),
        }
    return totals


def densities_of(rows: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Before and after, by index and by predictor: float64 [2, rows] each."""
    before, after = (
        np.stack([rows[f"density_{kind}_{when}"].to_numpy() for kind in ("index", "predicted")])
        for when in ("before", "after")
    )
    return before, after


def log_changes(before: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, int]:
    """log(after / before) of the rows where no density is 0, to which it may underflow, and how many others there are.

    before, after: `densities_of`. Returns float64 [2, rows or less]: a row is left out of both or of none.
    """
    finite = ((before > 0) & (after > 0)).all(axis=0)
    return np.log(after[:, finite]) - np.log(before[:, finite]), int((~finite).sum())


# ---- what it will cost -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Probe:
    """One step of one chunk in one direction, measured: seconds, and peak bytes of the process, or of its GPU."""

    step_s: float
    peak_bytes: int
    device: str


def probe(job: Job) -> Probe:
    """Two steps of the first chunk; what a run would refuse on its first chunk is refused here. Runs in a Ray task."""
    import resource

    import torch

    device = resources.assigned_device()
    maker = job.open(device)
    perturb_chunk(job, maker, 0, 1)  # the first pass of a process takes longer
    watch = artifacts.Stopwatch()
    perturb_chunk(job, maker, 0, PROBE_STEPS)
    seconds = watch.seconds / len(job.move.directions) / (PROBE_STEPS + 1 / 3)  # the last forward is about a third
    on_gpu = torch.device(device).type == "cuda"
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Probe(seconds, peak, device)
