"""The engine of generate without Ray: what a chunk holds, whoever makes it and when, and whom it accepts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pytest
import torch
from scipy import stats

from pd_core.core import artifacts, files, schemas
from pd_core.core import seeds as core_seeds
from pd_core.core.errors import UserError
from pd_core.core.settings.generate import GeneratorSettings
from pd_core.core.settings.index import EstimatorSettings, FeatureSettings
from pd_core.density import fit, formula, predictor
from pd_core.density import weighting as density_weighting
from pd_core.density.realset import RealSet
from pd_core.density.weighting import EVERYTHING
from pd_core.engine import resources
from pd_core.generate import chunks as generate_chunks
from pd_core.generate import pilot as generate_pilot
from pd_core.generate import sampling, verify
from pd_core.generate.candidates import ChunkMaker, Recipe, candidates_of, finish
from pd_core.generate.volume import Volume
from pd_core.generators import noise
from pd_core.generators.open import open_generator
from pd_core.index import extractor, search
from tests import tiny, tiny_generators, toy_generator

CHUNK = 50
CHUNKS = 40


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> RealSet:
    """Extractor and predictor of 400 of the toy generator's own images; no index, which a chunk does not need."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("real")
    checkpoint = tiny.write_checkpoint(root / "tiny.safetensors")
    spec = extractor.describe(FeatureSettings(model=tiny.MODEL, checkpoint=str(checkpoint), image_size=32))
    pixels = np.stack([toy_generator.draw(seed, 0).repeat(2, 0).repeat(2, 1) for seed in range(400)])
    rows = extractor.Extractor(spec).extract(pixels)
    distances = np.sort(np.linalg.norm(rows[:, None] - rows[None], axis=2), axis=1)[:, 1:6]
    log_density = -np.log(formula.mean_knn_distance(distances))
    settings = EstimatorSettings(epochs=20, hidden=(32,))
    fitted = fit.fit([lambda: (np.arange(400), rows, log_density)], settings, feature_dim=rows.shape[1])
    (root / "estimator").mkdir()
    for name, data in predictor.to_bytes(fitted.predictor, fitted.metrics).items():
        (root / "estimator" / name).write_bytes(data)
    return RealSet(
        uri=str(root),
        rows=400,
        extractor=spec,
        index=search.IndexInfo("", "", "flat", 400, spec.feature_dim, 1, 0, ()),
        k=5,
        volume_dim=1.0,
        log_normalizer=0.0,
        distance_floor=0.0,
        density_quantiles=formula.density_quantiles(np.exp(log_density)),
        nearest_quantiles=np.linspace(0, 1, 1001),
        fingerprints={},
    )


def recipe_of(
    real: RealSet, settings: GeneratorSettings, weighting: density_weighting.Weighting, **more: Any
) -> Recipe:
    values: dict[str, Any] = {
        "generator": settings,
        "generator_identity": open_generator(settings).identity(),
        "realset": real,
        "weightings": {EVERYTHING: weighting},
        "score": "predictor",
        "seed": 7,
        "chunk": CHUNK,
        "threads": 1,
        "classes": (),
        "class_names": (),
        "prompts": (),
        "device": "cpu",
        "copy_distance": 0.0,
        "drop_copies": False,
    }
    return Recipe(**values | more)


@pytest.fixture(scope="module")
def toy() -> GeneratorSettings:
    return GeneratorSettings(kind="python", path=f"{toy_generator.__file__}:make")


@pytest.mark.parametrize("family", ["ddpm", "toy"])
def test_a_chunk_is_the_same_whoever_makes_it_and_after_whatever(
    real: RealSet, toy: GeneratorSettings, tmp_path: Path, family: str
) -> None:
    if family == "ddpm":  # draws noise in every step
        toy = GeneratorSettings(path=tiny_generators.save_ddpm(tmp_path / "ddpm"), steps=2)
    recipe = recipe_of(real, toy, density_weighting.uniform(), chunk=5)
    one = ChunkMaker(recipe, "cpu")
    forwards = {number: one.make(number) for number in (0, 1, 2, 3)}
    backwards = {number: one.make(number) for number in (3, 0, 2)}
    other = {number: ChunkMaker(recipe, "cpu").make(number) for number in (1, 3)}
    for made in (backwards, other):
        for number, batch in made.items():
            expected = forwards[number]
            np.testing.assert_array_equal(batch.pixels, expected.pixels)
            np.testing.assert_array_equal(batch.features, expected.features)
            assert batch.scored is not None and expected.scored is not None
            np.testing.assert_array_equal(batch.scored.density, expected.scored.density)
    assert not np.array_equal(forwards[0].pixels, forwards[1].pixels)


@pytest.fixture(scope="module")
def everyone(real: RealSet, toy: GeneratorSettings) -> np.ndarray:
    """Densities of CHUNKS chunks of candidates, nobody rejected."""
    maker = ChunkMaker(recipe_of(real, toy, density_weighting.uniform()), "cpu")
    made = [maker.make(number) for number in range(CHUNKS)]
    assert all(len(batch.rows) == CHUNK for batch in made)
    return np.concatenate([batch.scored.density for batch in made if batch.scored is not None])


@pytest.mark.parametrize("weight", [0.1, 10.0])
def test_the_engine_accepts_in_proportion_to_the_weights(
    real: RealSet, toy: GeneratorSettings, everyone: np.ndarray, weight: float
) -> None:
    """Accepted in each quarter of the candidates' densities against sum(a): chi-square of independent Bernoulli draws.

    a is the paper's (Algorithm 2) from the candidates' densities, written out here: w / max(w, 1) above tau, else
    1 / max(w, 1).
    """
    tau = float(np.quantile(everyone, 0.4))
    maker = ChunkMaker(recipe_of(real, toy, density_weighting.two_level(tau, weight)), "cpu")
    accepted = np.zeros(CHUNK * CHUNKS, bool)
    for number in range(CHUNKS):
        accepted[number * CHUNK + maker.make(number).rows] = True
    chance = np.where(everyone > tau, weight, 1.0) / max(weight, 1.0)
    np.testing.assert_array_equal(accepted[chance == 1.0], True)
    drawn = chance < 1
    bins = np.digitize(everyone, np.quantile(everyone[drawn], [0.25, 0.5, 0.75]))
    variance = chance * (1 - chance)
    terms = [
        (accepted[rows].sum() - chance[rows].sum()) ** 2 / variance[rows].sum()
        for rows in (drawn & (bins == b) for b in range(4))
    ]
    assert min(chance[drawn & (bins == b)].sum() for b in range(4)) >= 5  # fewer would not be a chi-square
    assert stats.chi2.sf(sum(terms), 4) > 1e-3
    assert stats.binomtest(int(accepted[drawn].sum()), int(drawn.sum()), float(chance[drawn][0])).pvalue > 1e-3


# ---- by the log-volume -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bars(tmp_path_factory: pytest.TempPathFactory) -> GeneratorSettings:
    path = tiny_generators.save_bars(tmp_path_factory.mktemp("bars") / "bars.pt")
    return GeneratorSettings(kind="torchscript", path=path, latent_shape=(4,))


def volumes_of(recipe: Recipe, chunks: int) -> tuple[np.ndarray, np.ndarray]:
    """Log-volumes of all candidates, and whether each was accepted."""
    maker, found, accepted = ChunkMaker(recipe, "cpu"), [], np.zeros(recipe.chunk * chunks, bool)
    for number in range(chunks):
        made = maker.make(number)
        assert made.scored is not None and made.degenerate == 0
        found.append(made.scored.statistic)
        accepted[number * recipe.chunk + made.rows] = True
    return np.concatenate(found), accepted


@pytest.mark.parametrize("polarity", [-1.0, 1.0])
def test_polarity_draws_the_tilted_distribution_from_a_generator(
    real: RealSet, bars: GeneratorSettings, polarity: float
) -> None:
    """v of the bars is N(μ, s²) with s = 2 RATE = 1; exp(p v) makes it N(μ + p s², s²).

    χ² over 8 bins of the accepted, some 1,000. The pilot of 2,000 in 40 steps errs by exp's spread within a step over
    sqrt(50): 2%, in the outermost one 6%, where the counts err by 9% and more.
    """
    recipe = recipe_of(real, bars, density_weighting.uniform(), chunk=250, volume=Volume(4, 16))
    pilot, everyone = volumes_of(replace(recipe, seed=1), 8)
    assert everyone.all()
    v, accepted = volumes_of(
        replace(recipe, weightings={EVERYTHING: density_weighting.tilted(pilot, polarity, 40)}), 24
    )
    seeds = np.concatenate([candidates_of(recipe, chunk).seed for chunk in range(24)])
    latents = noise.normal_latents(seeds.tolist(), (4,)).numpy()
    np.testing.assert_allclose(v, tiny_generators.Bars.log_volume(latents), atol=1e-4)
    mean = float(tiny_generators.Bars.log_volume(np.zeros((1, 4)))[0]) + polarity * (2 * tiny_generators.RATE) ** 2
    observed, _ = np.histogram(v[accepted], stats.norm.ppf(np.linspace(0, 1, 9), mean, 2 * tiny_generators.RATE))
    assert observed.min() > 50
    assert stats.chisquare(observed).pvalue > 1e-3


def test_a_recipe_that_decides_by_volumes_is_read_from_its_record_again(real: RealSet, bars: GeneratorSettings) -> None:
    recipe = recipe_of(real, bars, density_weighting.uniform(), volume=Volume(4, 16))
    again = Recipe.from_identity(json.loads(json.dumps(recipe.identity())), bars, real, ())
    assert again == recipe
    assert recipe.identity() != replace(recipe, volume=Volume(3, 16)).identity()


def test_a_generator_without_latents_has_no_volumes(real: RealSet, toy: GeneratorSettings) -> None:
    with pytest.raises(
        UserError, match=r"--generator.path .*toy.* not a function of latents .* need a LatentGenerator"
    ):
        ChunkMaker(recipe_of(real, toy, density_weighting.uniform(), volume=Volume(4)), "cpu")


def nearest(rows: np.ndarray) -> Any:
    """Brute force in the place of the search actors."""

    def search_in(_: Any, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, int]:
        distances = np.linalg.norm(queries[:, None] - rows[None], axis=2).astype(np.float32)
        order = np.argsort(distances, axis=1)[:, :k]
        return np.take_along_axis(distances, order, axis=1), order.astype(np.int64), 0

    return search_in


def made_part(recipe: Recipe, root: Path, chunks: int, kind: str) -> sampling.Job:
    """One part by way of all that is done on actors and in tasks, in this process."""
    stages = [sampling.stage_of(str(root / name), name, recipe, {}) for name in (kind, "rejected")]
    job = sampling.Job(recipe, stages[0], stages[1] if kind == "samples" else None, chunks, 1)
    for stage in stages:
        stage.begin(overwrite=False)
    actor = generate_chunks._MakeChunk(job, None)
    made = [actor(pa.table({"chunk": [number]})) for number in range(chunks)]
    finished = [generate_chunks._finish_chunk(job, cast("Any", None), one) for one in made]
    (record,) = generate_chunks._write_part(job, pa.concat_tables(finished)).to_pylist()
    assert record["error"] is None, record
    return job


@pytest.mark.parametrize("volume", [Volume(4, 16), None], ids=["volumes", "densities"])
def test_log_volumes_reach_the_tables_and_are_what_decided(
    real: RealSet,
    bars: GeneratorSettings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    volume: Volume | None,
) -> None:
    """Pilot, accepted and rejected: v of the closed form at the latents of each row's seed, a of the step it lies
    in.
    """
    monkeypatch.setattr(resources, "assigned_device", lambda: "cpu")
    monkeypatch.setattr(
        search, "search", nearest(np.random.default_rng(0).normal(size=(9, real.extractor.feature_dim)))
    )
    real = replace(real, distance_floor=1e-6)
    recipe = recipe_of(real, bars, density_weighting.uniform(), score="both", volume=volume)
    stage = made_part(replace(recipe, seed=1), tmp_path / "before", 2, "pilot").samples
    pilot = generate_pilot.read(stage, stage.commit(stage.finished_parts().values(), {}, {}))
    if volume is None:
        assert pilot.log_volume is None
        weighting = density_weighting.two_level(float(np.median(pilot.predicted)), 5)
    else:
        assert pilot.log_volume is not None and pilot.degenerate == 0
        weighting = density_weighting.tilted(pilot.log_volume, -1.0, 8)
    job = made_part(replace(recipe, weightings={EVERYTHING: weighting}), tmp_path, 3, "samples")
    assert job.rejected is not None
    tables = [files.read_table(files.join(s.uri, artifacts.part_name(0))) for s in (job.samples, job.rejected)]
    assert [table.schema.names for table in tables] == [schemas.samples().names, schemas.rejected().names]
    numbers = np.concatenate([table["sample_id"].to_numpy() for table in tables])
    np.testing.assert_array_equal(np.sort(numbers), np.arange(3 * CHUNK))
    for table, wanted in zip(tables, (True, False), strict=True):
        assert table.num_rows > 10
        chance, number = table["acceptance_probability"].to_numpy(), table["sample_id"].to_numpy()
        assert ((core_seeds.uniform(number, core_seeds.stream(recipe.seed, "acceptance")) < chance) == wanted).all()
        if volume is None:
            assert table["log_volume"].null_count == table.num_rows
            deciding = table["density"].to_numpy()
        else:
            deciding = table["log_volume"].to_numpy()
            latents = noise.normal_latents(table["seed"].to_pylist(), (4,)).numpy()
            np.testing.assert_allclose(deciding, tiny_generators.Bars.log_volume(latents), atol=1e-4)
        np.testing.assert_array_equal(chance, density_weighting.acceptance_probability(deciding, weighting))
    again = finish(job.recipe, cast("Any", None), 1, ChunkMaker(job.recipe, "cpu").make(1)).accepted
    assert set(again["sample_id"].to_pylist()) <= set(tables[0]["sample_id"].to_pylist())
    assert set(verify.compare_rows(again, tables[0]).values()) == {None}
