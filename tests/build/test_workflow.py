"""The whole workflow on a real Ray cluster: conservation, resume after kills, actor counts, refusals."""

import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pd_core.build import workflow
from pd_core.core import artifacts, errors
from pd_core.core.settings import load
from pd_core.core.settings.index import BuildIndexSettings, FeatureSettings
from pd_core.density import realset
from pd_core.index import extractor, features
from tests import tiny
from workflows import build_index


def run(images, checkpoint, output, *more, tracking=False):
    argv = tiny.arguments(images, checkpoint, output, *more)
    return errors.exit_code(lambda: build_index.main(argv if tracking else [*argv, "--no-tracking.enabled"]))


def rows(output, stage):
    return pq.ParquetDataset(sorted(str(f) for f in (output / stage).glob("*.parquet"))).read()


def test_listed_is_features_plus_quarantine_and_every_key_is_there_once(built):
    features, quarantine = rows(built, "features"), rows(built, "quarantine")
    keys = features["key"].to_pylist() + quarantine["key"].to_pylist()
    assert sorted(keys) == sorted(tiny.files())
    assert features.num_rows == tiny.GOOD
    reasons = dict(zip(quarantine["key"].to_pylist(), quarantine["reason"].to_pylist(), strict=True))
    assert reasons == {"broken/empty.png": "empty", "broken/text.jpg": "not_an_image", "broken/cut.png": "truncated"}
    totals = json.loads((built / "features" / "artifact.json").read_text())["totals"]
    assert (totals["listed"], totals["rows"], totals["quarantined"]) == (153, 150, 3)


def test_features_are_those_of_timm_itself(built, inputs):
    import safetensors.torch
    import timm
    import torch
    from PIL import Image
    from timm.data import create_transform, resolve_model_data_config

    images, checkpoint = inputs
    model = timm.create_model(tiny.MODEL, num_classes=3)
    model.load_state_dict(safetensors.torch.load_file(checkpoint))
    model.reset_classifier(0)  # type: ignore[operator]
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    table = rows(built, "features").slice(0, 24)
    with torch.inference_mode():
        batch = torch.stack([transform(Image.open(images / key).convert("RGB")) for key in table["key"].to_pylist()])
        expected = model.eval()(batch).numpy()
    found = np.array(table["feature"].to_pylist(), np.float32)
    # other memory format and batch size: convolutions sum in another order; a few hundred terms of relative 6e-8 each
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def described(checkpoint, **more):
    return extractor.describe(FeatureSettings(model=tiny.MODEL, checkpoint=str(checkpoint), **more))


def test_another_input_size_is_part_of_the_extractor(inputs):
    own, smaller = described(inputs[1]), described(inputs[1], image_size=64)
    assert (own.preprocess.height, smaller.preprocess.height, smaller.preprocess.width) == (160, 64, 64)
    assert own.identity() != smaller.identity()


def test_labels_and_order_are_kept_to_the_densities(built):
    features, densities = rows(built, "features"), rows(built, "densities")
    for name in ("sample_id", "key", "label"):
        assert densities[name].equals(features[name])
    assert densities["label"].to_pylist() == [key.split("/")[0] for key in densities["key"].to_pylist()]
    assert abs(np.mean(densities["density"].to_numpy()) - 1) < 1e-9


def test_the_report_and_the_run_record_are_there(built):
    page = (built / "report" / "index.html").read_text()
    assert "153 listed" in page and "not_an_image" in page and page.count("data:image") > 10
    record = json.loads((built / "run.json").read_text())
    assert set(record["stages"]) == {"listing", "features", "index", "neighbors", "densities", "estimator", "report"}


def test_the_same_command_again_does_nothing(built, inputs):
    before = {f: f.stat().st_mtime_ns for f in built.rglob("*") if f.suffix in (".parquet", ".faiss", ".html")}
    assert run(*inputs, built) == 0
    assert before == {f: f.stat().st_mtime_ns for f in before}


@pytest.mark.parametrize("actors", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_same_tables_with_other_numbers_of_actors(built, inputs, tmp_path, actors, monkeypatch):
    monkeypatch.setattr(features, "FEWEST_TASKS", 1)  # and with tasks of 8 batches, which reach over 3 parts
    output = tmp_path / "out"
    assert run(*inputs, output, f"--features.actors={actors}", f"--index.actors={actors}") == 0
    assert tiny.tables(output) == tiny.tables(built)


def kill_once(title: str, stage: Path, killed: list[int], over: threading.Event) -> None:
    """Kill one process of ours with this title while the stage is under way; its pid goes to `killed`."""
    while not over.wait(0.02) and not (stage / "artifact.json").exists():
        for process in psutil.process_iter(["cmdline"]) if (stage / "started.json").exists() else ():
            if " ".join(process.info["cmdline"] or []).startswith(title) and is_ours(process):
                process.kill()
                killed.append(process.pid)
                return


def run_with_one_killed(title: str, stage: str, images, checkpoint, output, *more: str) -> int:
    """Exit code of a run of which one process with this title is killed within the stage."""
    killed: list[int] = []
    over = threading.Event()
    killer = threading.Thread(target=kill_once, args=(title, output / stage, killed, over), daemon=True)
    killer.start()
    try:
        code = run(images, checkpoint, output, *more)
    finally:
        over.set()
    killer.join()
    assert killed, "nothing was killed"
    return code


@pytest.mark.slow
def test_a_killed_extractor_changes_nothing(built, inputs, tmp_path):
    title, output = "ray::MapWorker(MapBatches(_ExtractBatch))", tmp_path / "out"
    assert run_with_one_killed(title, "features", *inputs, output, "--features.actors=1") == 0
    assert tiny.tables(output) == tiny.tables(built)


def is_ours(process: psutil.Process) -> bool:
    """Whether a process belongs to the cluster that this test session started."""
    try:
        return any(parent.pid == os.getpid() for parent in process.parents())
    except psutil.NoSuchProcess:
        return False


KILL_POINTS = {
    "features": "features/_parts/*.json",
    "index": "index/started.json",
    "neighbors": "neighbors/_parts/*.json",
    "densities": "densities/_parts/*.json",
    "estimator": "estimator/started.json",
}


@pytest.mark.parametrize(
    "point",
    ["features", *(pytest.param(p, marks=pytest.mark.slow) for p in ("index", "neighbors", "densities", "estimator"))],
)
def test_a_killed_driver_resumes_to_the_same_bytes(built, inputs, tmp_path, point):
    kill_and_resume(tiny.arguments(*inputs, tmp_path / "out"), tmp_path / "out", KILL_POINTS[point])
    assert tiny.tables(tmp_path / "out") == tiny.tables(built)


def kill_and_resume(argv: list[str], output: Path, point: str) -> None:
    """Run until a file of this pattern is there, kill -9, run again; nothing that was finished is made again."""
    argv = [*argv, "--no-tracking.enabled"]
    first = tiny.start(*argv)
    deadline = time.monotonic() + 240
    while not list(output.glob(point)) and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    assert first.poll() is None, first.communicate()[0]
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert list(output.glob(point)), "the stage was never reached"
    assert not (output / "run.json").exists()
    done = {f: f.stat().st_mtime_ns for f in finished(output)}
    assert errors.exit_code(lambda: build_index.main(argv)) == 0
    again = [f.name for f, when in done.items() if f.stat().st_mtime_ns != when]
    assert not again, "finished parts were made again"


def finished(output: Path) -> list[Path]:
    """Parts whose record was written before the kill."""
    records = output.glob("*/_parts/*.json")
    return [record.parent.parent / record.name.removesuffix(".json") for record in records]


IVF = ("--index.kind=ivf_flat", "--index.shards=3", "--index.cells=3", "--index.target_recall=0.5")


@pytest.fixture(scope="module")
def whole_ivf(inputs, ray_cluster, tmp_path_factory):
    """One run with an IVF index in three shards, one search actor, nothing killed."""
    output = tmp_path_factory.mktemp("whole_ivf") / "out"
    assert run(*inputs, output, *IVF, "--index.actors=1") == 0
    assert len(list((output / "index").glob("shard*.faiss"))) == 3
    return output


@pytest.mark.slow
def test_ivf_with_two_search_actors_one_of_them_killed(whole_ivf, inputs, tmp_path):
    output = tmp_path / "out"
    assert run_with_one_killed("ray::_Searcher", "neighbors", *inputs, output, *IVF, "--index.actors=2") == 0
    assert tiny.tables(output) == tiny.tables(whole_ivf)


@pytest.mark.slow
@pytest.mark.parametrize("point", ["quantizer.faiss", "cells.json", "shard-*.faiss"])
def test_a_driver_killed_within_the_ivf_build_resumes_to_the_same_bytes(whole_ivf, inputs, tmp_path, point):
    output = tmp_path / "out"
    kill_and_resume(tiny.arguments(*inputs, output, *IVF), output, f"index/_parts/{point}.json")
    assert tiny.tables(output) == tiny.tables(whole_ivf)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def test_parts_damaged_after_their_commit_are_made_again_and_what_follows_stays(built, inputs, tmp_path, capsys):
    output = tmp_path / "out"
    shutil.copytree(built, output)
    kept = {s: (output / s / "artifact.json").read_bytes() for s in ("listing", "features", "index", "neighbors")}
    cut(output / "listing" / artifacts.part_name(1))
    cut(output / "features" / artifacts.part_name(2))
    next((output / "quarantine").glob("*.parquet")).unlink()
    cut(output / "neighbors" / artifacts.part_name(0))
    later = [file for s in ("index", "densities", "estimator", "report") for file in (output / s).iterdir()]
    before = {file: file.stat().st_mtime_ns for file in later}
    assert run(*inputs, output) == 0
    assert tiny.tables(output) == tiny.tables(built)
    assert {s: (output / s / "artifact.json").read_bytes() for s in kept} == kept
    assert {file: file.stat().st_mtime_ns for file in later} == before
    said = capsys.readouterr().out
    assert "features: ../quarantine/part-" in said or f"features: {artifacts.part_name(2)} has" in said
    assert f"neighbors: {artifacts.part_name(0)} has" in said and "making it anew" in said
    assert run(*inputs, output) == 0
    said = capsys.readouterr().out
    assert "every stage was finished already" in said
    left_out = (
        f"quarantine: {len(tiny.BAD)} of {len(tiny.files())} images left out (1 empty, 1 not_an_image, 1 truncated)"
    )
    assert f"{left_out}: {output / 'quarantine'}" in said


@pytest.mark.parametrize("stage", ["features", "index", "estimator"])
def test_a_damaged_index_is_refused_naming_the_part(built, tmp_path, stage):
    output = Path(shutil.copytree(built, tmp_path / "index"))
    part = sorted(f for f in (output / stage).iterdir() if f.is_file() and f.name.startswith(("p", "s")))[0]
    cut(part)
    with pytest.raises(errors.UserError, match=f"{stage}: {part.name} has .* run the command that wrote it again"):
        realset.open_realset(str(output))


@pytest.mark.slow
def test_parts_damaged_before_their_commit_are_made_again_with_what_lies_beside(built, inputs, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(built, output)
    cut(output / "features" / artifacts.part_name(2))
    next((output / "quarantine").glob("*.parquet")).unlink()
    (output / "features" / "artifact.json").unlink()
    assert run(*inputs, output) == 0
    assert tiny.tables(output) == tiny.tables(built)


def test_a_mostly_broken_source_stops_and_says_what_is_wrong(inputs, tmp_path, capsys, ray_cluster):
    output = tmp_path / "out"
    assert run(*inputs, output, "--data.max_bad_fraction=0.01") == 2
    error = capsys.readouterr().err
    assert "of 153 images are unusable" in error and "1 empty" in error and "raise it to 0.0" in error
    assert "Traceback" not in error
    assert run(*inputs, output, "--data.max_bad_fraction=0.02") == 0  # goes on from there


def test_other_settings_on_the_same_output_are_refused(built, inputs, capsys):
    assert run(*inputs, built, "--density.k=6") == 2
    error = capsys.readouterr().err
    assert "k: 5 -> 6" in error and "--overwrite" in error


@pytest.mark.slow
def test_parquet_gives_the_numbers_of_the_files(built, inputs, tmp_path):
    rows_of = {key: data for key, data in tiny.files().items() if not key.startswith("broken/")}
    table = pa.table({"key": list(rows_of), "image": list(rows_of.values())})
    pq.write_table(table, tmp_path / "images.parquet", row_group_size=40)
    output = tmp_path / "out"
    assert run(tmp_path / "images.parquet", inputs[1], output, "--data.labels=none", "--data.key_column=key") == 0
    found, expected = rows(output, "densities"), rows(built, "densities")
    by_key = dict(zip(expected["key"].to_pylist(), expected["density"].to_pylist(), strict=True))
    assert found.num_rows == tiny.GOOD
    for key, value in zip(found["key"].to_pylist(), found["density"].to_pylist(), strict=True):
        assert value == pytest.approx(by_key[key], rel=1e-3)  # batches differ, and with them the last bits


def test_a_source_that_changed_is_noticed(built, inputs, tmp_path, capsys):
    images = Path(shutil.copytree(inputs[0], tmp_path / "images", copy_function=shutil.copy2))
    (images / "a" / "image 000.png").write_bytes(tiny.png(999))
    assert run(images, inputs[1], shutil.copytree(built, tmp_path / "out")) == 2
    assert "state.hash" in capsys.readouterr().err


def test_odd_file_names_pass_unharmed(inputs, tmp_path, ray_cluster):
    names = ["sp ace.png", 'quo"te.png', "new\nline.png", "übergröße.png", "no extension", "100%.png", "wrong.txt.jpg"]
    names += ["#?[x].png", "x" * 250 + ".png", *(f"plain {i}.png" for i in range(20))]
    root = tmp_path / "images"
    root.mkdir()
    for i, name in enumerate(names):
        (root / name).write_bytes(tiny.png(i))
    assert run(root, inputs[1], tmp_path / "out", "--data.labels=none", "--density.k=3") == 0
    assert sorted(rows(tmp_path / "out", "densities")["key"].to_pylist()) == sorted(names)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--data.source=/nowhere/at/all"], "no such file or directory"),
        (["--report.thresholds=p8o"], "p8o"),
        (["--data.labels=column:x"], "does not fit a directory source"),
        (["--features.preprocess=paper", "--features.image_size=64"], "features: image_size has no meaning"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_anything_starts(inputs, tmp_path, more, expected):
    argv = tiny.arguments(*inputs, tmp_path / "out", *more)
    with pytest.raises(errors.UserError, match=expected) as error:
        workflow.prepare(load.load(BuildIndexSettings, argv, prog="build_index.py"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"model": "test_efficientnett"}, "did you mean 'test_efficientnet"),
        ({"model": "test_resnet"}, "not weights of test_resnet"),
        ({"checkpoint": "/nowhere.safetensors"}, "not found"),
    ],
)
def test_an_extractor_that_cannot_be_is_refused(inputs, more, expected):
    settings = {"model": tiny.MODEL, "checkpoint": str(inputs[1])} | more
    with pytest.raises(errors.UserError, match=expected):
        extractor.describe(FeatureSettings(**settings))


def test_bad_input_on_the_cluster_is_one_line_and_exit_2(inputs, tmp_path, capsys, ray_cluster):
    assert run(*inputs, tmp_path / "out", "--density.k=153") == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(error) == 1 and "needs more than k images, found 153" in error[0]
    (tmp_path / "images").mkdir()
    assert run(tmp_path / "images", inputs[1], tmp_path / "empty") == 2
    assert f"{tmp_path / 'images'}: no files; check data.source" in capsys.readouterr().err


@pytest.mark.parametrize("inside", [".", "pd", "a/pd"])
def test_an_output_inside_the_source_is_refused(inputs, inside):
    argv = tiny.arguments(*inputs, inputs[0] / inside)
    with pytest.raises(errors.UserError, match="lies in the source"):
        workflow.prepare(load.load(BuildIndexSettings, argv, prog="build_index.py"))


def test_an_output_of_somebody_else_is_refused_and_left_alone(inputs, tmp_path, capsys, ray_cluster):
    folder, file = tmp_path / "out" / "features", tmp_path / "file"
    folder.mkdir(parents=True)
    for precious, output, expected in (
        (folder / "thesis.doc", tmp_path / "out", "not of this program"),
        (file, file, f"error: {file}"),
    ):
        precious.write_bytes(b"precious")
        assert run(*inputs, output) == 2
        error = capsys.readouterr().err
        assert expected in error and "Traceback" not in error and precious.read_bytes() == b"precious"


def test_dry_run_prints_the_plan_and_writes_nothing(inputs, tmp_path, capsys, ray_cluster):
    assert run(*inputs, tmp_path / "out", "--dry-run", "--data.max_bad_fraction=0", "--features.batch_size=64") == 0
    text = capsys.readouterr().out
    assert "images:    153 listed" in text and "256 dimensions" in text and "3 parts of 64 images" in text
    assert "time:" in text and "memory:" in text
    assert "the run would stop, --data.max_bad_fraction is 0" in text
    assert not (tmp_path / "out").exists()
