"""An update of an index is a whole build: same rows, neighbors and densities; and nothing done is done again."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
import ray.data

from benchmarks import costs
from pd_core.build import update, workflow
from pd_core.core import artifacts, errors
from pd_core.core import files as core_files
from pd_core.core.settings import load
from pd_core.core.settings.data import DataSettings
from pd_core.core.settings.index import BuildIndexSettings, EstimatorSettings
from pd_core.density import estimator, predictor
from pd_core.images import sources
from pd_core.index import build as index_build
from pd_core.index import search
from pd_core.index.base import Base, Update
from tests import tiny

GONE, CHANGED = (0, 40, 41), (7, 100, 107)
NEW = 30  # and a broken one


def run(source: Path, checkpoint: Path, output: Path, *more: str, command: Callable = workflow.build_index) -> int:
    argv = tiny.arguments(source, checkpoint, output, "--no-tracking.enabled", *more)
    return errors.exit_code(lambda: command(load.load(BuildIndexSettings, argv, prog="build_index.py")))


def rows(output: Path, stage: str) -> pa.Table:
    artifact = artifacts.load_artifact(str(output / stage))
    assert artifact is not None
    tables = [core_files.read_table(str(output / stage / part.name)) for part in artifact.parts]
    return pa.concat_tables(tables).sort_by("sample_id") if tables else pa.table({})


def totals(output: Path, stage: str) -> dict:
    artifact = artifacts.load_artifact(str(output / stage))
    assert artifact is not None
    return artifact.totals


@pytest.fixture
def source(inputs: tuple[Path, Path], tmp_path: Path) -> Path:
    """The images of `built`, with their times, which are part of what a file is."""
    return Path(shutil.copytree(inputs[0], tmp_path / "images", copy_function=shutil.copy2))


def write(root: Path, files: list[tuple[str, bytes]]) -> Path:
    for key, data in files:
        (root / key).parent.mkdir(parents=True, exist_ok=True)
        (root / key).write_bytes(data)
    return root


def path_of(number: int) -> str:
    return f"{'abc'[number % 3]}/image {number:03d}.png"


def grow(source: Path) -> None:
    """New images, a broken one among them, three that are gone, and three whose content is another."""
    write(source, [(f"new/{number}.png", tiny.png(500 + number)) for number in range(NEW)] + [("new/broken.png", b"")])
    for number in GONE:
        (source / path_of(number)).unlink()
    write(source, [(path_of(number), tiny.png(1000 + number)) for number in CHANGED])


@pytest.fixture(scope="module")
def updated(inputs, built, tmp_path_factory) -> tuple[Path, Path]:
    """A source that has changed, and the undisturbed update of `built` to it."""
    folder = tmp_path_factory.mktemp("updated")
    source = Path(shutil.copytree(inputs[0], folder / "images", copy_function=shutil.copy2))
    grow(source)
    assert run(source, inputs[1], folder / "out", f"--base={built}") == 0
    return source, folder / "out"


def same_rows(output: Path, whole: Path) -> None:
    """Every column of every table but those that say where a row lies."""
    for stage in ("listing", "features", "quarantine", "neighbors", "densities"):
        assert rows(output, stage).equals(rows(whole, stage)), stage
    for name in ("log_normalizer", "distance_floor", "density_quantiles", "nearest_distance_quantiles"):
        assert totals(output, "densities")[name] == totals(whole, "densities")[name]


def test_an_exact_index_is_updated_to_that_of_a_whole_build(updated, inputs, tmp_path):
    source, output = updated
    assert run(source, inputs[1], tmp_path / "whole") == 0
    same_rows(output, tmp_path / "whole")
    # what lies unchanged was not looked at again, and only those that lost a neighbor or are new were searched for
    assert totals(output / "added", "features")["listed"] == NEW + 1 + len(CHANGED)
    neighbors = totals(output, "neighbors")
    assert NEW + len(CHANGED) <= neighbors["searched"] < neighbors["rows"]
    assert totals(output, "index")["shards"] == 2  # that of the base, less what is gone, and that of what is new
    assert (output / "report" / "index.html").exists()


@pytest.mark.slow
def test_images_that_could_not_be_read_are_tried_again_and_are_no_drift(inputs, tmp_path, ray_cluster):
    """A file without a right to it is unreadable, as one that the store does not give: here, one that leads nowhere."""
    source = write(tmp_path / "images", list(tiny.files().items())[:30])
    lost = [f"a/lost {number}.png" for number in range(3)]
    for key in lost:
        (source / key).symlink_to(tmp_path / "nowhere" / key.rpartition("/")[2])
    base, output, whole = tmp_path / "base", tmp_path / "updated", tmp_path / "whole"
    assert run(source, inputs[1], base) == 0
    listed = sources.open_source(DataSettings(source=str(source), labels="parent"))
    assert str(update.foresee(listed, update.open_base(str(base)))) == (
        "0 new images, 0 changed, 0 gone, 3 to be tried again, 30 as they were"
    )
    for target, same in ((output, base), (tmp_path / "again", output)):
        assert run(source, inputs[1], target, f"--base={same}", "--update.max_growth=0.01") == 0
        assert totals(target, "neighbors")["searched"] == 0  # nothing was built anew
        assert totals(target, "listing")["indexed_removed"] == 0
    (tmp_path / "nowhere").mkdir()
    (tmp_path / "nowhere" / "lost 1.png").write_bytes(tiny.png(500))
    assert run(source, inputs[1], tmp_path / "third", f"--base={output}") == 0
    assert run(source, inputs[1], whole) == 0
    same_rows(tmp_path / "third", whole)


@pytest.mark.parametrize(
    ("shards", "removed", "added", "kept"),
    [
        ([1000], 0, 10, True),
        ([1000], 999, 0, True),
        ([1000, 5], 5, 10, False),  # one of them might be left without rows
        ([1000, *[5] * 8], 0, 10, True),
        ([1000, *[5] * 9], 0, 10, False),  # many small ones: they are put together again
    ],
)
def test_shards_of_a_flat_index_are_kept_while_they_are_neither_empty_nor_many(shards, removed, added, kept):
    def recorded(name: str, counts: list[int], **totals: Any) -> artifacts.Artifact:
        parts = tuple(artifacts.Part(str(i), rows, 1, "") for i, rows in enumerate(counts))
        return artifacts.Artifact(name, 1, "", {}, parts, totals, {}, {})

    index, news = recorded("index", shards, kind="flat", dim=8), recorded("features", [added])
    update = Update(Base("", {"index": index}, {}), None, None, (), np.arange(removed), removed, "", news)  # type: ignore[arg-type]
    assert index_build.keeps_shards(update) is kept
    resolved = index_build.resolve(BuildIndexSettings().index, False, sum(shards) + added, 8, 1, update)
    assert resolved.shards == len(shards) + bool(added)


def test_the_predictor_is_judged_on_rows_from_the_whole_listing():
    parts = [artifacts.Part(artifacts.part_name(i), 10_000, 1, "") for i in range(100)]
    artifact = artifacts.Artifact("densities", 1, "", {}, tuple(parts), {}, {}, {})
    chosen = estimator.spread(artifact, EstimatorSettings(holdout_fraction=0.2))
    assert len(chosen) == 33 and {parts[0].name, parts[-1].name} <= set(chosen)
    assert len(estimator.spread(artifact, EstimatorSettings(holdout_fraction=0.01))) == 100


@pytest.mark.slow
def test_an_update_of_an_update_whose_news_have_gone_again(updated, inputs, tmp_path):
    third, again = tmp_path / "third", tmp_path / "again"
    source = Path(shutil.copytree(updated[0], tmp_path / "images", copy_function=shutil.copy2))
    shutil.rmtree(source / "new")
    assert run(source, inputs[1], third, f"--base={updated[1]}") == 0
    assert run(source, inputs[1], again) == 0
    same_rows(third, again)


@pytest.mark.slow
def test_an_overwritten_image_is_there_once_with_the_neighbors_of_what_it_shows_now(inputs, tmp_path, ray_cluster):
    """Its new row lies in the part that its old one lay in, under the same id."""
    source = write(tmp_path / "images", list(tiny.files().items())[:20])
    base, output, whole = tmp_path / "base", tmp_path / "updated", tmp_path / "whole"
    assert run(source, inputs[1], base) == 0
    write(source, [(path_of(number), tiny.png(2000 + number)) for number in (4, 19)])
    assert run(source, inputs[1], output, f"--base={base}") == 0
    assert run(source, inputs[1], whole) == 0
    same_rows(output, whole)


def test_an_update_of_an_unchanged_source_takes_everything_over(inputs, built, tmp_path):
    output = tmp_path / "updated"
    assert run(*inputs, output, f"--base={built}") == 0
    same_rows(output, built)
    assert totals(output, "neighbors")["searched"] == 0
    for part in ("features/part-00000000.parquet", f"index/{search.shard_name(0)}"):
        assert (output / part).samefile(built / part)  # a link, not a copy
    ours, theirs = (predictor.load(at / "estimator") for at in (output, built))
    assert all((a == b).all() for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))


IVF = (
    "--index.kind=ivf_flat",
    "--index.cells=4",
    "--index.shards=2",
    "--index.target_recall=0.8",
    "--update.max_growth=2",
    "--update.max_cell_distance=9",
)


@pytest.fixture(scope="module")
def ivf_base(inputs, ray_cluster, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("ivf") / "out"
    assert run(*inputs, output, *IVF) == 0
    return output


@pytest.mark.slow
def test_an_index_with_cells_keeps_its_quantizer_and_stays_within_its_error(
    updated, inputs, ivf_base, tmp_path, ray_cluster
):
    output, (source, whole) = tmp_path / "updated", updated  # whole: exact
    base = ivf_base
    assert run(source, inputs[1], output, f"--base={base}", *IVF) == 0
    quantizer = [(at / "index" / "quantizer.faiss").read_bytes() for at in (base, output)]
    assert quantizer[0] == quantizer[1]
    facts = totals(output, "index")
    assert facts["recall"] >= 0.8 and facts["nprobe"] == totals(base, "index")["nprobe"]
    ours, exact = (rows(at, "densities")["mean_knn_distance"].to_numpy() for at in (output, whole))
    error = ours / exact - 1
    assert error.min() > -1e-6 and error.max() <= facts["max_distance_relative_error"] + 1e-6
    # and it is what a search of every row in that index finds: no neighbor was lost on the way
    info = search.open_index(str(output / "index"))
    table = rows(output, "features")
    with search.open_pool(info, ray_cluster, 1, 1) as pool:
        distances, ids, _ = search.search(pool, np.stack(table["feature"].to_numpy()), 5, table["sample_id"].to_numpy())
    found = rows(output, "neighbors")
    assert np.array_equal(np.stack(found["neighbor_ids"].to_numpy()), ids)
    assert np.array_equal(np.stack(found["neighbor_distances"].to_numpy()), distances)


@pytest.mark.slow
def test_a_quantizer_that_new_rows_have_left_behind_is_trained_again(source, inputs, ivf_base, tmp_path, capsys):
    base, output = ivf_base, tmp_path / "updated"
    grow(source)
    assert run(source, inputs[1], output, f"--base={base}", *IVF, "--update.max_growth=0.1") == 0
    assert "the index is built anew" in capsys.readouterr().out
    assert (base / "index" / "quantizer.faiss").read_bytes() != (output / "index" / "quantizer.faiss").read_bytes()
    assert totals(output, "neighbors").get("searched") is None


# Tasks and actors that the driver starts, and the phase of the model that stands for each.
DRAW, TRAIN = "index: draw the training sample", "index: train the quantizer"
STARTED = {
    "images.listing._list": "listing: walk and sort",
    "index.features._ExtractBatch": "features: decode and extract",
    "index.build._sample": "index: calibrate: exact neighbors of a sample",  # and, with another seed, DRAW
    "index.build._train_template": TRAIN,
    "index.build._assign": "index: assign rows to cells",
    "index.build._deal": "index: deal rows to shards",
    "index.build._build_shard": "index: build shards",
    "index.build._exact_in_group": "index: calibrate: exact neighbors of a sample",
    "index.build._choose": "index: calibrate: search the shards",  # a task that starts the others
    "index.search._Searcher": "neighbors: open the shards",
    "index.neighbors._join_block": "neighbors: search",
    "density.densities._summary": "densities: mean distances",
    "density.densities._calibrate": "densities: normalizer and ranks",
    "density.densities._write_group": "densities: write",
    "density.estimator._fit": "estimator: fit the predictor",
    "engine.runs._draw": "report: draw",
    "build.update._compare": "listing: walk and compare",
    "index.features._merge_part": "features: take over what is unchanged",
    "index.drift._cell_distance": "index: look whether the quantizer holds",
    "index.neighbors._shard_of": "neighbors: make a shard of the new rows",
    "index.neighbors._merge_block": "neighbors: old rows with new ones, new rows with all",
    "density.estimator._keep": "estimator: look whether the predictor holds",
}
SMALL = {
    "index.extractor.describe",
    "index.build._deal_cells",
    "index.features._write_part",
    "index.features._decode",
}  # of the driver's or no time


@pytest.mark.slow
def test_the_model_of_costs_has_the_phases_that_build_and_update_have(
    source, inputs, tmp_path, ray_cluster, monkeypatch
):
    started: set[str] = set()

    def name(function: Any) -> None:
        function = getattr(function, "func", function)
        if getattr(function, "__module__", "").startswith("pd_core."):
            started.add(f"{function.__module__.removeprefix('pd_core.')}.{function.__name__}")

    def started_by(submit: Callable[..., Any]) -> Callable[..., Any]:
        def seen(*args: Any, **options: Any) -> Any:
            for argument in args:
                name(argument)
            return submit(*args, **options)

        return seen

    monkeypatch.setattr("ray.remote", started_by(ray.remote))
    monkeypatch.setattr("ray.data.Dataset.map_batches", started_by(ray.data.Dataset.map_batches))
    keeps = ("--update.max_r2_drop=9", "--estimator.split=hash")
    base, settings = tmp_path / "base", BuildIndexSettings.model_validate({"index": {"kind": "ivf_flat"}})
    machines = costs.Fleet(1, 2.0, 1e11)
    build = costs.build_of(settings, 10**5, 10**5, 16, 1, 0.0, 0.0, 0.0)
    assert run(source, inputs[1], base, *IVF) == 0
    phases = {phase.title for phase in costs.build_index(build, machines)}
    assert phases == {STARTED[one] for one in started - SMALL} | {DRAW}
    grow(source)
    started.clear()
    assert run(source, inputs[1], tmp_path / "updated", f"--base={base}", *IVF, *keeps) == 0
    updates = {phase.title for phase in costs.update_index(build, 10**4, machines)}
    assert updates == {STARTED[one] for one in started - SMALL}


@pytest.mark.parametrize(
    "point", ["listing/_parts/*", "added/features/artifact.json", "features/_parts/*", "neighbors/_parts/*"]
)
@pytest.mark.slow
def test_a_killed_update_resumes_to_the_same_bytes(updated, inputs, built, tmp_path, point):
    source, whole = updated
    output, before = tmp_path / "updated", tiny.tables(built)
    more = ("--no-tracking.enabled", f"--base={built}")
    tiny.kill_when(point, output, *tiny.arguments(source, inputs[1], output, *more), workflow="build_index.py")
    assert run(source, inputs[1], output, f"--base={built}") == 0
    assert tiny.tables(output) == tiny.tables(whole)
    assert tiny.tables(built) == before


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (("--density.k=6",), "density.k: 5 -> 6"),
        (("--features.batch_size=16",), "batch_size: 8 -> 16"),
        (("--base=/nowhere",), "no finished run of build_index there"),
    ],
)
def test_a_base_of_other_settings_is_refused(inputs, built, tmp_path, capsys, more, expected):
    assert run(*inputs, tmp_path / "out", f"--base={built}", *more) == errors.EXIT_BAD_INPUT
    line = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(line) == 1 and expected in line[0] and "leave --base out" in line[0]


def test_quarantined_rows_that_are_lost_come_back(updated, inputs, built, tmp_path):
    source, done = updated
    output = Path(shutil.copytree(done, tmp_path / "out"))
    next((output / "quarantine").glob("part-*.parquet")).unlink()
    assert run(source, inputs[1], output, f"--base={built}") == 0
    assert rows(output, "quarantine").equals(rows(done, "quarantine"))


def test_links_that_the_base_may_have_followed_are_not_taken_for_images_that_are_gone(
    source, inputs, built, tmp_path, capsys
):
    """What is left out today may have been followed when the base was made, by an older version or by its settings."""
    (tmp_path / "elsewhere").mkdir()
    (source / path_of(0)).rename(tmp_path / "elsewhere" / "0.png")
    (source / "linked").symlink_to(tmp_path / "elsewhere")
    assert run(source, inputs[1], tmp_path / "out", f"--base={built}") == errors.EXIT_BAD_INPUT
    assert (
        f"{source}: 1 link leads out of the source, left out, and images of --base that are gone (1) may "
        "have been found by links; add --data.follow-links, or remove the links"
    ) in capsys.readouterr().err
    assert not (tmp_path / "out" / "listing" / "artifact.json").exists()


def test_a_plan_tells_what_an_update_would_find(updated, inputs, built, tmp_path, capsys):
    def plan(*more: str) -> int:
        arguments = f"--base={built}", *more
        return run(updated[0], inputs[1], tmp_path / "out", *arguments, command=workflow.plan_build_index)

    assert plan() == 0
    said, kept = capsys.readouterr().out, len(tiny.files()) - len(GONE) - len(CHANGED)
    assert f"update:    of {built}: {NEW + 1} new images, 3 changed, 3 gone, {kept} as they were" in said
    assert "neighbors" in said.partition("update: ")[2]
    assert plan("--density.k=6") == errors.EXIT_BAD_INPUT
    assert "density.k: 5 -> 6" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
