"""generate.py on a real Ray cluster: what the rows are, and that they are the same whoever makes them."""

import contextlib
import io
import json
import re
import shutil
import signal
import tarfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pd_core.core import artifacts, errors, schemas, seeds
from pd_core.core import files as core_files
from pd_core.core.settings import load
from pd_core.core.settings.generate import GenerateSettings, GeneratorSettings
from pd_core.density import realset
from pd_core.engine import resources
from pd_core.engine import session as engine_session
from pd_core.generate import chunks as generate_chunks
from pd_core.generate import export, sampling, setup, verify, workflow
from pd_core.generators.noise import normal_latents
from tests import tiny, tiny_generators, toy_generator
from tests.build.test_workflow import is_ours, kill_once
from workflows import build_index, generate

N = 60
TOY = f"{toy_generator.__file__}:make"
LIGHT = ["sample_id", "seed", "density", "acceptance_probability"]


@pytest.fixture(scope="module")
def index(built):
    return built


def arguments(index, output, *more, toy=None, n=N):
    values = {
        "index": index,
        "generator.kind": "python",
        "generator.path": TOY,
        "generator.arguments": json.dumps(toy or {}),
        "n": n,
        "weighting.threshold": "p60",
        "weighting.weight": 10,
        "chunk": 16,
        "pilot": 64,
        "images": 6,
        "output": output,
    }
    given = {text.lstrip("-").partition("=")[0] for text in more}
    if "weighting.kind" in given:
        given |= {"weighting.threshold", "weighting.weight"}  # which other kinds refuse
    return [f"--{k}={v}" for k, v in values.items() if k not in given] + list(more) + ["--no-tracking.enabled"]


def run(index, output, *more, toy=None, n=N):
    argv = arguments(index, output, *more, toy=toy, n=n)
    return errors.exit_code(lambda: generate.main(argv))


def rows(output, stage="samples"):
    return pq.ParquetDataset(sorted(str(f) for f in (output / stage).glob("*.parquet"))).read()


def make(index, output, root, *more, **toy):
    """Run the command that makes `made`, whose files lie in `root`; more: settings, toy: of the generator."""
    named = [
        f"--generator.path={root / 'toy.py'}:make",
        f"--generator.prompts={root / 'prompts.txt'}",
        f"--checkpoint={root / 'tiny.safetensors'}",
        "--generator.labels=all",
        "--score=both",
        "--keep-rejected",
        "--export=png",
    ]
    return run(index, output, *named, *more, toy={"classes": 3, "texts": True, **toy})


@pytest.fixture(scope="session")
def undisturbed(made):
    return made / "out"


def test_the_first_n_accepted_in_candidate_order_and_nothing_else(undisturbed, index):
    """Every candidate up to the last row is in exactly one table, on the side on which its own u puts it."""
    accepted, rejected = rows(undisturbed), rows(undisturbed, "rejected")
    assert accepted.num_rows == N
    numbers = accepted["sample_id"].to_numpy()
    assert (np.diff(numbers) > 0).all()
    everyone = np.sort(np.concatenate([numbers, rejected["sample_id"].to_numpy()]))
    np.testing.assert_array_equal(everyone, np.arange(numbers[-1] + 1))
    u = lambda table: seeds.uniform(table["sample_id"].to_numpy(), seeds.stream(0, "acceptance"))  # noqa: E731
    assert (u(accepted) < accepted["acceptance_probability"].to_numpy()).all()
    assert (u(rejected) >= rejected["acceptance_probability"].to_numpy()).all()
    totals = json.loads((undisturbed / "samples" / "artifact.json").read_text())["totals"]
    assert totals["candidates"] == numbers[-1] + 1
    assert totals["acceptance_rate"] == pytest.approx(N / totals["candidates"])
    assert totals["extractor"] == realset.open_realset(str(index)).extractor.identity()


def test_acceptance_probabilities_are_the_papers(undisturbed, index):
    """w = 10: 1 above the real set's p60, 1/10 elsewhere."""
    tau = np.quantile(rows(index, "densities")["density"].to_numpy(), 0.6)
    for table in (rows(undisturbed), rows(undisturbed, "rejected")):
        expected = np.where(table["density"].to_numpy() > tau, 1.0, 0.1)
        np.testing.assert_allclose(table["acceptance_probability"].to_numpy(), expected)
    assert set(rows(undisturbed)["acceptance_probability"].to_pylist()) == {1.0, 0.1}


def test_images_are_those_of_the_generator(undisturbed):
    for row in rows(undisturbed).to_pylist():
        pixels = np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])))
        np.testing.assert_array_equal(pixels, toy_generator.draw(row["seed"], int(row["label"])))
    assert set(rows(undisturbed)["prompt"].to_pylist()) == {"a red square", "a blue one"}
    assert set(rows(undisturbed)["label"].to_pylist()) == {"0", "1", "2"}


def test_densities_are_those_of_the_index_and_of_the_predictor(undisturbed, index):
    """Brute force in float64 from the stored pictures: features by timm itself, k nearest real features, stored c."""
    from pd_core.density import predictor

    table, real = rows(undisturbed), np.array(rows(index, "features")["feature"].to_pylist(), np.float64)
    features = timm_features(index, [row["bytes"] for row in table["image"].to_pylist()])
    distances = np.sqrt(((features[:, None] - real[None]) ** 2).sum(axis=2))
    totals = json.loads((index / "densities" / "artifact.json").read_text())["totals"]
    mean = np.sort(distances, axis=1)[:, : totals["k"]].mean(axis=1)
    expected = np.exp(-np.log(mean) + totals["log_normalizer"])
    # batches on torch's resize against single images on Pillow's: pixels within one step, features within 1e-2
    np.testing.assert_allclose(table["density_index"].to_numpy(), expected, rtol=2e-2)
    np.testing.assert_allclose(table["nearest_real_distance"].to_numpy(), distances.min(axis=1), rtol=5e-2, atol=1e-2)
    nearest = rows(index, "features")["sample_id"].to_numpy()[distances.argmin(axis=1)]
    assert np.mean(nearest == table["nearest_real_id"].to_numpy()) > 0.95
    predicted = predictor.load(index / "estimator").predict(features.astype(np.float32)).density
    np.testing.assert_allclose(table["density_predicted"].to_numpy(), predicted, rtol=5e-2)
    np.testing.assert_array_equal(table["density"].to_numpy(), table["density_predicted"].to_numpy())


def timm_features(index: Path, pictures: list[bytes]) -> np.ndarray:
    import safetensors.torch
    import timm
    import torch
    from timm.data import create_transform, resolve_model_data_config

    spec = json.loads((index / "features" / "artifact.json").read_text())["totals"]["extractor"]
    model = timm.create_model(tiny.MODEL, num_classes=3)
    model.load_state_dict(safetensors.torch.load_file(spec["checkpoint"]))
    model.reset_classifier(0)  # type: ignore[operator]
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    with torch.inference_mode():
        images = torch.stack([transform(Image.open(io.BytesIO(data)).convert("RGB")) for data in pictures])
        return model.eval()(images).double().numpy()


@pytest.mark.slow
@pytest.mark.parametrize("score", ["index", "predictor"])
def test_what_decides_is_what_was_asked_for(index, tmp_path, score):
    assert run(index, tmp_path / "out", f"--score={score}", n=20) == 0
    table = rows(tmp_path / "out")
    other = "density_predicted" if score == "index" else "density_index"
    assert table[other].null_count == table.num_rows
    own = "density_index" if score == "index" else "density_predicted"
    assert table["density"].equals(table[own])


# ---- the same rows, whoever makes them -------------------------------------------------------------------------------


def same(output, undisturbed):
    found, expected = tiny.tables(output / "samples"), tiny.tables(undisturbed / "samples")
    return found == expected and tiny.tables(output / "rejected") == tiny.tables(undisturbed / "rejected")


@pytest.mark.slow
@pytest.mark.parametrize("actors", [1, 4])
def test_same_rows_with_other_numbers_of_actors(undisturbed, made, index, tmp_path, actors):
    output = tmp_path / "out"
    assert make(index, output, made, f"--actors={actors}") == 0
    assert same(output, undisturbed)


@pytest.mark.slow
def test_parts_are_committed_while_the_actors_work(index, tmp_path):
    """Not all at the end: between the first commit and the last lies most of the time that the chunks took."""
    output, pause_s, actors = tmp_path / "out", 0.5, 2
    assert run(index, output, f"--actors={actors}", toy={"pause_s": pause_s}) == 0
    times = sorted(file.stat().st_mtime for file in (output / "samples" / "_parts").iterdir())[:-1]  # the last was cut
    identity = json.loads((output / "samples" / "artifact.json").read_text())["identity"]
    chunks = identity["chunks_per_part"] * (len(times) - 1)
    assert chunks > 8
    assert times[-1] - times[0] > 0.5 * chunks * pause_s / actors


@pytest.mark.slow
def test_a_killed_generator_changes_nothing(undisturbed, made, index, tmp_path):
    output = tmp_path / "out"
    killed: list[int] = []
    over = threading.Event()
    arguments = ("ray::MapWorker(MapBatches(_MakeChunk))", output / "samples", killed, over)
    killer = threading.Thread(target=kill_once, args=arguments, daemon=True)
    killer.start()
    try:
        code = make(index, output, made, pause_s=0.3)
    finally:
        over.set()
    killer.join()
    assert killed and code == 0
    assert same_rows(output, undisturbed)


def same_rows(output, undisturbed):
    """Equal rows, where the generator's arguments differ and with them the fingerprints."""
    return all(rows(output, stage).equals(rows(undisturbed, stage)) for stage in ("samples", "rejected"))


@pytest.mark.slow
@pytest.mark.parametrize("point", ["pilot", "samples"])
def test_a_killed_driver_resumes_to_the_same_bytes(index, tmp_path, point):
    output = tmp_path / "out"
    assert run(index, tmp_path / "undisturbed", "--keep-rejected") == 0
    argv = arguments(index, output, "--keep-rejected")
    first = tiny.start(*argv, workflow="generate.py")
    deadline = time.monotonic() + 240
    while not list(output.glob(f"{point}/_parts/*.json")) and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    assert first.poll() is None, first.communicate()[0]
    first.send_signal(signal.SIGKILL)
    first.communicate()
    done = {f: f.stat().st_mtime_ns for f in output.glob("samples/part-*.parquet")}
    assert errors.exit_code(lambda: generate.main(argv)) == 0
    assert same(output, tmp_path / "undisturbed")
    kept = [f for f, when in done.items() if f.exists() and f.stat().st_mtime_ns == when]
    assert len(kept) >= len(done) - 1, "finished parts were made again"  # the last may have been cut to n rows


def test_the_same_command_again_does_nothing(undisturbed, made, index):
    before = {f: f.stat().st_mtime_ns for f in undisturbed.rglob("*.parquet")}
    assert make(index, undisturbed, made) == 0
    assert before == {f: f.stat().st_mtime_ns for f in before}


# ---- a generator that fails ------------------------------------------------------------------------------------------


def seed_of(number: int) -> int:
    return int(seeds.integers(np.array([number]), seeds.stream(0, "image"))[0])


@pytest.mark.slow
@pytest.mark.parametrize("fail", ["raise", "nan"])
def test_a_chunk_that_fails_once_is_made_again(undisturbed, made, index, tmp_path, fail):
    assert make(index, tmp_path / "out", made, bad_seeds=[seed_of(40)], fail=fail, once=str(tmp_path / "failed")) == 0
    assert (tmp_path / "failed").exists()
    assert same_rows(tmp_path / "out", undisturbed)


@pytest.mark.slow
def test_a_chunk_that_keeps_failing_is_reported_with_its_seeds_and_the_rest_is_kept(
    index, tmp_path, capsys, undisturbed, made
):
    marker = tmp_path / "mended"
    toy: dict[str, Any] = {"bad_seeds": [seed_of(40)], "once": str(marker / "not there")}
    assert make(index, tmp_path / "out", made, **toy) == 1
    error = capsys.readouterr().err
    assert "chunk 2" in error and str(seed_of(32)) in error and "illegal memory access" in error
    assert "Traceback" not in error
    kept = {f: f.stat().st_mtime_ns for f in (tmp_path / "out" / "samples").glob("part-*.parquet")}
    assert len(kept) > 3
    marker.mkdir()
    (marker / "not there").touch()  # the generator is mended
    assert make(index, tmp_path / "out", made, **toy) == 0
    assert same_rows(tmp_path / "out", undisturbed)


@pytest.mark.slow
def test_a_generator_that_always_fails_ends_the_run(index, tmp_path, capsys):
    assert run(index, tmp_path / "out", toy={"fail": "always"}) == 1
    error = capsys.readouterr().err
    assert "RuntimeError: no image" in error and "Traceback" not in error


def hand_made_job(tmp_path, accepted, rejected, n):
    """One part of samples and of rejected candidates with these numbers, made as `_write_part` makes them."""
    stages = [artifacts.Stage(str(tmp_path / kind), kind, 1, {}) for kind in ("samples", "rejected")]
    for stage, schema, numbers in zip(
        stages, (schemas.samples(), schemas.rejected()), (accepted, rejected), strict=True
    ):
        values = {name: [0] * len(numbers) for name in ("seed", "density", "acceptance_probability")}
        table = pa.table(values | {"sample_id": numbers})
        columns = [
            table[f.name].cast(f.type) if f.name in table.column_names else pa.nulls(len(numbers), f.type)
            for f in schema
        ]
        stage.begin(overwrite=False)
        nullable = pa.schema([f.with_nullable(True) for f in schema])
        stage.write_table(artifacts.part_name(0), pa.table(columns, schema=nullable), {"candidates": 10, "copies": 0})
    recipe: Any = SimpleNamespace(chunk=10, drop_copies=True)
    return sampling.Job(recipe, stages[0], stages[1], 1, n)


@pytest.mark.parametrize(
    ("accepted", "n"),
    [([1, 4, 6], 2), ([1, 4], 2)],  # the second: nothing accepted is too many, but rejected ones are
)
def test_rejected_candidates_end_with_the_last_row_even_after_a_kill(tmp_path, monkeypatch, accepted, n):
    rejected = sorted(set(range(10)) - set(accepted))
    job = hand_made_job(tmp_path, accepted, rejected, n)
    write = artifacts.Stage.write_table
    for killed in ("rejected", "samples"):  # the process dies as it would write this table

        def dies(stage, *arguments, killed=killed):
            if stage.kind == killed:
                raise KeyboardInterrupt
            return write(stage, *arguments)

        monkeypatch.setattr(artifacts.Stage, "write_table", dies)
        with contextlib.suppress(KeyboardInterrupt):
            sampling._trim(job, 0)
    monkeypatch.setattr(artifacts.Stage, "write_table", write)
    assert sampling._trim(job, 0) == {"candidates": 5}
    assert rows(tmp_path)["sample_id"].to_pylist() == accepted[:n]
    assert rows(tmp_path, "rejected")["sample_id"].to_pylist() == [0, 2, 3]


# ---- the export ------------------------------------------------------------------------------------------------------


def test_no_label_leads_out_of_the_export():
    labels = ["..", ".", "a/b", "a%2Fb", "a", ".hidden", "%2E.", "é"]
    folders = [export._folder(label) for label in labels]
    assert len(set(folders)) == len(labels)
    assert not any("/" in folder or folder.startswith(".") for folder in folders)


@pytest.mark.parametrize("form", ["png", "webdataset"])
def test_export_holds_the_same_pictures(undisturbed, tmp_path, form):
    expected = {row["image"]["path"]: row["image"]["bytes"] for row in rows(undisturbed).to_pylist()}
    if form == "png":
        found = {f.name: f.read_bytes() for f in (undisturbed / "export").rglob("*.png")}
    else:
        stage, found = artifacts.Stage(str(tmp_path), "export", 1, {}), {}
        stage.begin(overwrite=False)
        for part in sorted((undisturbed / "samples").glob("part-*.parquet")):
            export._write(stage, str(undisturbed / "samples"), part.name, form)
        for tar in sorted(tmp_path.glob("*.tar")):
            with tarfile.open(tar) as opened:
                members = [m for m in opened if m.name.endswith(".png")]
                found |= {m.name: file.read() for m in members if (file := opened.extractfile(m))}
    assert found == expected


# ---- labels and other weightings -------------------------------------------------------------------------------------

LABELS = ("--generator.labels=all", '--generator.label_names=["a","b","c"]')


@pytest.mark.slow
def test_thresholds_of_the_samples_own_label(index, tmp_path):
    output = tmp_path / "out"
    assert run(index, output, *LABELS, "--weighting.per_label", toy={"classes": 3}) == 0
    table, real = rows(output), rows(index, "densities")
    labels, densities = np.array(real["label"].to_pylist()), real["density"].to_numpy()
    tau = {label: np.quantile(densities[labels == label], 0.6) for label in "abc"}
    assert len(set(tau.values())) == 3
    own = np.array([tau[label] for label in table["label"].to_pylist()])
    expected = np.where(table["density"].to_numpy() > own, 1.0, 0.1)
    np.testing.assert_allclose(table["acceptance_probability"].to_numpy(), expected)
    assert set(table["label"].to_pylist()) == set("abc")


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [["--weighting.kind=match", "--weighting.bins=4"], ["--weighting.kind=quantiles", "--weighting.weights=[4,1]"]],
)
def test_other_weightings_run(index, tmp_path, more):
    assert run(index, tmp_path / "out", *more, n=20) == 0
    assert rows(tmp_path / "out").num_rows == 20


POLARITY = ["--weighting.kind=polarity", "--weighting.polarity=-1", "--weighting.rank=4", "--weighting.bins=8"]
POLARITY += ["--generator.kind=torchscript", "--generator.latent_shape=[4]", "--generator.arguments={}"]


@pytest.mark.slow
def test_polarity_sampling_by_log_volumes_end_to_end(index, tmp_path, capsys):
    """Rows, rejected, plan, report, --verify; log-volumes are those of the closed form at the latents of the rows'
    seeds.
    """
    gan = f"--generator.path={tiny_generators.save_bars(tmp_path / 'bars.pt')}"
    output = tmp_path / "out"
    assert run(index, output, *POLARITY, gan, "--keep-rejected", "--pilot=128", n=40) == 0
    text = capsys.readouterr().out
    assert "effective sample size of the pilot" in text and "log-volumes cut at" in text
    accepted, rejected, pilot = (rows(output, stage) for stage in ("samples", "rejected", "pilot"))
    for table in (accepted, rejected, pilot):
        latents = normal_latents(table["seed"].to_pylist(), (4,)).numpy()
        np.testing.assert_allclose(table["log_volume"], tiny_generators.Bars.log_volume(latents), atol=1e-4)
    everyone = np.sort(np.concatenate([accepted["sample_id"].to_numpy(), rejected["sample_id"].to_numpy()]))
    np.testing.assert_array_equal(everyone, np.arange(everyone[-1] + 1))
    v, a = accepted["log_volume"].to_numpy(), accepted["acceptance_probability"].to_numpy()
    assert (np.diff(a[np.argsort(v)]) <= 0).all() and len(set(a.tolist())) > 3  # modes first, in steps
    page = (output / "report" / "index.html").read_text()
    assert "Polarity Sampling" in page and "v above" in page and "ρ above" in page
    generator = GeneratorSettings(kind="torchscript", path=str(tmp_path / "bars.pt"), latent_shape=(4,))
    verify.verify(str(output), 8, generator, 1)
    assert "8 of 8 rows are what their seeds give" in capsys.readouterr().out


def test_exact_duplicates_do_not_switch_the_search_for_copies_off():
    """With 30% duplicates the 1% quantile of all nearest distances is 0, and nothing would be flagged."""
    nearest = np.quantile(np.concatenate([np.zeros(300), np.linspace(1, 2, 700)]), np.linspace(0, 1, 1001))
    real: Any = SimpleNamespace(nearest_quantiles=nearest, distance_floor=1e-3)
    assert realset.RealSet.copy_distance(real, 0.01) == pytest.approx(1.01, abs=0.01)
    real.nearest_quantiles = np.zeros(1001)
    assert realset.RealSet.copy_distance(real, 0.01) == 0.0


@pytest.mark.slow
def test_copies_are_flagged_counted_and_dropped(index, tmp_path):
    """With the real set's own p90 of nearest distances as the limit, many are 'copies'."""
    assert run(index, tmp_path / "kept", "--copies_quantile=0.9", n=30) == 0
    assert run(index, tmp_path / "dropped", "--copies_quantile=0.9", "--drop-copies", n=10) == 0
    kept, dropped = rows(tmp_path / "kept"), rows(tmp_path / "dropped")
    limit = json.loads((tmp_path / "kept" / "samples" / "artifact.json").read_text())["identity"]["copy_distance"]
    distance = kept["nearest_real_distance"].to_numpy()
    np.testing.assert_array_equal(distance <= np.float32(limit), kept["likely_copy"].to_numpy(zero_copy_only=False))
    assert 0 < kept["likely_copy"].to_numpy(zero_copy_only=False).sum() < 30
    assert not dropped["likely_copy"].to_numpy(zero_copy_only=False).any()


# ---- limits and bad input --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_hours_that_are_over_keep_what_is_made_and_go_on_later(undisturbed, made, index, tmp_path, capsys):
    output = tmp_path / "out"
    shutil.copytree(undisturbed, output)
    (output / "samples" / core_files.ARTIFACT).unlink()
    last = sorted((output / "samples").glob("part-*.parquet"))[-1]
    for file in (last, output / "samples" / core_files.RECORDS / f"{last.name}.json"):
        file.unlink()
    before = {f: f.stat().st_mtime_ns for f in (output / "samples").glob("part-*.parquet")}
    assert len(before) > 3
    assert make(index, output, made, "--max-hours=0.000001") == 1
    assert "--max-hours is over" in capsys.readouterr().err
    assert before == {f: f.stat().st_mtime_ns for f in (output / "samples").glob("part-*.parquet")}
    assert make(index, output, made) == 0
    assert same(output, undisturbed)
    assert before == {f: f.stat().st_mtime_ns for f in before}


def test_a_chunk_that_comes_after_the_deadline_is_not_made(monkeypatch):
    """A part may take hours: the clock is looked at before each of its chunks."""

    class Work:
        kind, made = "samples", pa.schema([("pixels", pa.large_binary())])

        def open(self, device):
            return device

        def make(self, opened, chunk):
            raise AssertionError("made")

    monkeypatch.setattr(resources, "assigned_device", lambda: "cpu")
    numbers = pa.table({"chunk": [3]})
    (late,) = generate_chunks._MakeChunk(cast("Any", Work()), time.time() - 1)(numbers).to_pylist()
    assert (late["chunk"], late["error"], late["pixels"]) == (3, generate_chunks.LATE, None)
    (made,) = generate_chunks._MakeChunk(cast("Any", Work()), time.time() + 1000)(numbers).to_pylist()
    assert made["error"] == "AssertionError: made"


@pytest.mark.slow
def test_more_actors_than_chunks_may_be_asked_for(index, tmp_path):
    assert run(index, tmp_path / "out", "--actors=3", "--pilot=32", n=4) == 0
    assert rows(tmp_path / "out").num_rows == 4


@pytest.mark.slow
def test_nothing_of_an_older_set_stays_beside_a_new_one(index, tmp_path):
    output = tmp_path / "out"
    pictures = lambda: {file.name for file in (output / "export").rglob("*.png")}  # noqa: E731
    assert run(index, output, "--keep-rejected", "--export=png", n=12) == 0
    assert list((output / "rejected").glob("*.parquet")) and pictures()
    assert run(index, output, "--export=png", "--seed=1", "--overwrite", n=12) == 0
    assert pictures() == {row["path"] for row in rows(output)["image"].to_pylist()}
    assert not any((output / "rejected").glob("*.parquet"))
    assert run(index, output, "--seed=2", "--overwrite", n=12) == 0
    assert not pictures()


def test_dry_run_tells_the_rate_and_the_run_takes_its_pilot_over(index, tmp_path, capsys):
    """And refuses, before it makes anything, a budget that cannot suffice."""
    output = tmp_path / "out"
    assert run(index, output, "--dry-run") == 0
    text = capsys.readouterr().out
    assert "acceptance:" in text and "candidates: about" in text and "time:" in text
    before = {f: f.stat().st_mtime_ns for f in (output / "pilot").glob("*.parquet")}
    assert run(index, output, "--max-candidates=40") == 2
    error = capsys.readouterr().err
    assert "--max-candidates 40" in error and "lower --n" in error
    assert not (output / "samples").exists()
    assert before == {f: f.stat().st_mtime_ns for f in before}


def prepared(index, output, *more):
    return workflow.prepare(load.load(GenerateSettings, arguments(index, output, *more), "generate"))


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--index=/nowhere"], "does not exist"),
        (["--n=0"], "n: input should be greater than 0"),
        (["--generator.kind=torchscript", "--generator.path=/nowhere.pt", "--generator.arguments={}"], "no such file"),
        (["--generator.kind=diffusers", "--generator.path=a/b/ddpn", "--generator.arguments={}"], "no hub id"),
        (["--weighting.threshold=99"], "outside the densities of the index, which lie in"),
        (["--weighting.threshold=p8o"], "p8o"),
        (["--weighting.kind=quantiles"], "--weighting.weights"),
        (["--weighting.per_label"], "--generator.labels"),
        (["--generator.prompts=/nowhere.txt"], "/nowhere.txt"),
    ],
)
def test_bad_input_is_one_line_before_ray_is_started(index, tmp_path, more, expected):
    with pytest.raises(errors.UserError, match=rf"^[^\n]*{re.escape(expected)}[^\n]*$"):
        prepared(index, tmp_path / "out", *more)


def test_a_mistyped_name_does_not_cost_the_start_of_ray(index, tmp_path, monkeypatch, capsys):
    def session(*_, **__):
        raise AssertionError("Ray was started")

    monkeypatch.setattr(engine_session, "session", session)
    assert run(index, tmp_path / "out", "--weighting.threshold=99") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert "outside the densities of the index" in line


@pytest.mark.parametrize(
    ("labels", "classes", "expected"),
    [
        ("all", 0, "takes no class labels"),
        ("0,3", 3, "3 is outside 0 ... 2"),
        ("none", 3, "takes one of 3 class labels"),
        ("0,x", 3, "expected none, all, or class numbers"),
    ],
)
def test_labels_that_do_not_fit_the_generator_are_refused(labels, classes, expected):
    with pytest.raises(errors.UserError, match=expected):
        setup.classes_of(GeneratorSettings(labels=labels), {"num_classes": classes})


def test_a_dry_run_replaces_no_pilot_of_a_finished_set(undisturbed, index, capsys):
    assert run(index, undisturbed, "--dry-run", "--overwrite", "--seed=1") == 2
    assert "holds finished samples" in capsys.readouterr().err


def test_an_index_that_is_not_finished_is_refused(index, tmp_path):
    shutil.copytree(index, tmp_path / "index")
    (tmp_path / "index" / "estimator" / core_files.ARTIFACT).unlink()
    with pytest.raises(errors.UserError, match="is not finished \\(estimator/"):
        prepared(tmp_path / "index", tmp_path / "out")


def test_the_output_of_another_workflow_is_left_alone(undisturbed, index, capsys):
    before = tiny.tables(index), (index / "run.json").read_bytes()
    assert run(index, index) == 2
    assert "holds a run of build_index.py" in capsys.readouterr().err
    assert before == (tiny.tables(index), (index / "run.json").read_bytes())
    assert errors.exit_code(lambda: build_index.main([f"--data.source={index}", f"--output={undisturbed}"])) == 2
    assert "holds a run of generate.py" in capsys.readouterr().err


def test_other_settings_on_the_same_output_are_refused(undisturbed, made, index, capsys):
    assert make(index, undisturbed, made, "--weighting.weight=5") == 2
    error = capsys.readouterr().err
    assert "weights" in error and "--overwrite" in error


def test_no_process_of_the_generators_is_left(undisturbed):
    """Ray ends an actor a moment after its pool is gone."""
    names, deadline = ("_Searcher", "_MakeChunk", "_Maker"), time.monotonic() + 20
    while True:
        found = [(p, " ".join(p.info["cmdline"] or [])) for p in psutil.process_iter(["cmdline"])]
        left = [title for p, title in found if any(name in title for name in names) and is_ours(p)]
        if not left or time.monotonic() > deadline:
            break
        time.sleep(0.2)
    assert not left
