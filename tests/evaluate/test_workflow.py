"""evaluate.py on a real Ray cluster: sets of every form against the tiny index."""

import json
import shutil
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pd_core.core import errors, schemas
from pd_core.core.seeds import uniform
from pd_core.core.settings.evaluate import MetricSettings
from pd_core.evaluate import measure as evaluate_measure
from pd_core.evaluate import metrics, workflow
from pd_core.evaluate.spaces import Rows
from tests import tiny
from tests.generate.test_workflow import run as run_generate
from workflows import evaluate


def arguments(built, output, *samples, more=()):
    argv = ["--real", str(built), "--samples", *map(str, samples), "--output", str(output), "--no-tracking.enabled"]
    argv += [
        "--data.max_bad_fraction=0.1",
        "--extraction.batch_size=8",
        "--extraction.part_rows=32",
        "--images=2",
        *more,
    ]
    return argv


def run(built, output, *samples, more=()):
    return errors.exit_code(lambda: evaluate.main(arguments(built, output, *samples, more=more)))


def table(output, stage="metrics"):
    return pa.concat_tables([pq.read_table(file) for file in sorted((output / stage).glob("*.parquet"))])


def numbers(output, name, space="index", label=None):
    rows = [r for r in table(output).to_pylist() if (r["set"], r["space"], r["label"]) == (name, space, label)]
    return {row["metric"]: row for row in rows}


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Folders: half of the real images, few of them, and others; and the half as Parquet with labels."""
    root = tmp_path_factory.mktemp("sets")
    for i, (key, data) in enumerate(sorted(tiny.files().items())):
        if not key.startswith("broken/"):
            for folder, wanted in (("half", i % 2 == 0), ("few", i < 3)):
                if wanted:
                    (root / folder / key).parent.mkdir(parents=True, exist_ok=True)
                    (root / folder / key).write_bytes(data)
    (root / "other").mkdir()
    for i in range(100):
        (root / "other" / f"{i:03d}.png").write_bytes(tiny.png(10_000 + i))
    (root / "other" / "broken.png").write_bytes(b"no image")
    files = sorted((root / "half").rglob("*.png"))
    images = [{"bytes": file.read_bytes(), "path": file.name} for file in files]
    columns = {"image": pa.array(images, schemas.IMAGE), "label": [file.parent.name for file in files]}
    pq.write_table(pa.table(columns), root / "half.parquet")
    return root


@pytest.fixture(scope="module")
def measured(built, sets, tmp_path_factory):
    output = tmp_path_factory.mktemp("measured") / "out"
    assert run(built, output, sets / "other", sets / "half.parquet", built) == 0
    return output


def test_numbers_are_those_of_the_library_on_the_same_features(measured, built):
    """The stage adds no arithmetic of its own: `metrics.evaluate` on features read from its own tables."""
    real, other = (
        pa.concat_tables([pq.read_table(f) for f in sorted((folder / "features").glob("*.parquet"))])
        for folder in (built, measured / "sets" / "other" / "index")
    )
    as_array = lambda t: np.array(t["feature"].to_pylist(), np.float32)  # noqa: E731
    n = numbers(measured, "other")["precision"]["n_generated"]
    keep = np.sort(np.argsort(uniform(other["sample_id"].to_numpy()))[:n])
    reference = metrics.prepare(as_array(real), real["sample_id"].to_numpy())
    found = metrics.evaluate(reference, as_array(other)[keep], other["sample_id"].to_numpy()[keep])
    for name, row in numbers(measured, "other").items():
        # covariances of fewer rows than dimensions: roots of eigenvalues that are zero but for rounding
        rel = 1e-4 if name == "frechet_distance" else 1e-9
        assert row["value"] == pytest.approx(found.estimates[name].value, rel=rel), name
        assert row["low"] == pytest.approx(found.estimates[name].low, rel=rel), name


def test_sets_of_different_sizes_are_measured_at_the_size_of_the_smallest(measured):
    rows = table(measured).to_pylist()
    assert {row["n_generated"] for row in rows} == {tiny.GOOD // 2}
    assert {row["n_real"] for row in rows} == {tiny.GOOD}
    assert {row["set"] for row in rows} == {"other", "half", "out"}
    assert {row["k"] for row in rows if row["metric"] == "precision"} == {3}
    assert {row["k"] for row in rows if row["metric"] == "coverage"} == {5}
    assert not any(row["selected_here"] for row in rows)
    quarantined = json.loads((measured / "sets/other/index/quarantine/artifact.json").read_text())
    assert quarantined["totals"]["rows"] == 1


def test_every_measured_image_has_a_row_of_scores(measured):
    scores = table(measured, "scores")
    assert scores.schema.equals(schemas.scores())
    assert scores.num_rows == 3 * (tiny.GOOD // 2)
    outside = scores["rarity"].is_null().to_numpy(zero_copy_only=False)
    np.testing.assert_array_equal(outside, ~scores["in_real_manifold"].to_numpy(zero_copy_only=False))
    # of the same images the features are those of the index, here but for the rounding of other batches
    for name, most in (("half", 1e-4), ("out", 0)):
        distances = [row["nearest_real_distance"] for row in scores.to_pylist() if row["set"] == name]
        assert max(distances) <= most
        assert numbers(measured, name)["precision"]["value"] == 1


def test_the_same_command_makes_nothing_again_and_lost_parts_come_back_the_same(
    built, sets, measured, tmp_path, capsys
):
    output = tmp_path / "out"
    shutil.copytree(measured, output)  # its own stages name no place
    names = (sets / "other", sets / "half.parquet", built)
    before = tiny.tables(output)
    assert run(built, output, *names) == 0
    assert "every stage was finished already" in capsys.readouterr().out
    (output / "metrics" / "artifact.json").unlink()
    (output / "metrics" / "part-00000001.parquet").unlink()
    (output / "scores" / "part-00000002.parquet").unlink()
    assert run(built, output, *names) == 0
    assert "done in" in capsys.readouterr().out
    assert tiny.tables(output) == before


@pytest.mark.slow
def test_a_killed_driver_resumes_to_the_same_bytes(built, sets, measured, tmp_path):
    """Killed after the first set's numbers."""
    output = tmp_path / "out"
    names = (sets / "other", sets / "half.parquet", built)
    tiny.kill_when("metrics/_parts/*.json", output, *arguments(built, output, *names), workflow="evaluate.py")
    done = {f: f.stat().st_mtime_ns for f in output.glob("metrics/_parts/*.json")}
    assert len(done) < len(names) and not (output / "metrics" / "artifact.json").exists()
    assert run(built, output, *names) == 0
    assert tiny.tables(output) == tiny.tables(measured)


def test_the_report_names_sets_and_spaces(measured):
    page = (measured / "report" / "index.html").read_text()
    assert tiny.MODEL in page and "half" in page and "Judged where" not in page
    record = json.loads((measured / "run.json").read_text())
    assert record["workflow"] == "evaluate" and "sets/other/index/features" in record["stages"]


@pytest.mark.slow
def test_a_judge_labels_and_what_was_selected(built, sets, inputs, tmp_path):
    """A second extractor, by whose densities nothing was selected; each label by itself; outputs of generate."""
    assert run_generate(built, tmp_path / "typical", "--weighting.weight=5", n=70) == 0
    assert run_generate(built, tmp_path / "plain", "--weighting.kind=none", n=70) == 0
    output, samples = tmp_path / "out", (sets / "half.parquet", tmp_path / "typical", tmp_path / "plain")
    more: tuple[str, ...] = (f"--judge.model={tiny.MODEL}", f"--judge.checkpoint={inputs[1]}", "--judge.image_size=64")
    more += ("--per-label", "--data.labels=column:label", "--metrics.k_precision=2", "--metrics.k_coverage=2")
    assert run(built, output, *samples, more=more) == 0
    both = [numbers(output, "plain", space)["frechet_distance"]["value"] for space in ("index", "judge")]
    assert both[0] != both[1]
    found = numbers(output, "half", label="a")["precision"]
    assert (found["value"], found["n_real"]) == (1, tiny.GOOD // 3)  # they are real images of that label
    flagged = {(row["set"], row["space"]) for row in table(output).to_pylist() if row["selected_here"]}
    assert flagged == {("typical", "index")}
    page = (output / "report" / "index.html").read_text()
    assert "A judge of its own" in page and "p60, w = 5" in page and "nothing" in page
    assert "Judged where they were selected:</b> typical." in page


@pytest.mark.parametrize(
    ("samples", "more", "line"),
    [
        (["few"], (), "--samples few: 3 images are too few for k = 3; at least 4 are needed"),
        (["absent"], (), "no such file or directory"),
        (["few", "few"], (), "named twice"),
        (["other"], ("--judge.model=resnet5",), "--judge.model resnet5: timm has no such model"),
        (
            ["other"],
            (f"--judge.model={tiny.MODEL}", "--judge.checkpoint=CHECKPOINT"),
            f"error: --judge.model {tiny.MODEL}: is the extractor of the index itself, which must not judge what it",
        ),
        (["other"], ("--data.source=x",), "data.source has no meaning"),
        (["other"], ("--n-real=4",), "--n-real 4: too few"),
        (["other"], ("--n=2",), "--n 2: too few"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(built, sets, inputs, tmp_path, capsys, samples, more, line):
    more = [text.replace("CHECKPOINT", str(inputs[1])) for text in more]
    assert run(built, tmp_path / "out", *(sets / name for name in samples), more=more) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert line in said, said


def test_more_images_than_the_smallest_set_has_are_refused():
    sets: Any = [SimpleNamespace(name=name, rows=rows) for name, rows in (("few", 3), ("many", 9))]
    assert workflow.rows_of_each(None, sets, sets) == workflow.rows_of_each(3, sets, sets) == 3
    with pytest.raises(errors.UserError, match=r"^--n 4: --samples few has 3 usable images; lower --n or add images$"):
        workflow.rows_of_each(4, sets, sets)


@pytest.mark.parametrize("side", ["real", "generated"])
def test_a_feature_without_a_direction_is_named_by_its_set_and_its_image(side):
    """As of a black image and an extractor that ends in a ReLU without a bias."""
    features = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)
    keys, ids = np.array([f"{i}.png" for i in range(40)], dtype=object), np.arange(40)
    good, bad = Rows(ids, keys, keys, features), Rows(ids, keys, keys, features.copy())
    bad.features[[7, 30]] = 0
    settings, where = MetricSettings(), "--real (space index)"
    real = evaluate_measure.reference_of(good, settings, 1, "cpu", where)
    refused = {
        where: lambda: evaluate_measure.reference_of(bad, settings, 1, "cpu", where),
        "--samples typical": lambda: evaluate_measure.measured(real, bad, "typical", 1, "cpu"),
    }
    name = where if side == "real" else "--samples typical"
    with pytest.raises(errors.UserError) as raised:
        refused[name]()
    assert str(raised.value).startswith(f"{name}: the features of 2 of 40 images are all zero, the first is '7.png'")


def test_features_of_another_extractor_are_refused(built, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(built / "features", other / "features")
    record = other / "features" / "artifact.json"
    values = json.loads(record.read_text())
    values["totals"]["extractor"]["weights_sha256"] = "0" * 64
    record.write_text(json.dumps(values))
    assert run(built, tmp_path / "out", other) == 2
    assert "another extractor" in capsys.readouterr().err


def test_an_output_of_another_workflow_and_a_missing_index_are_refused(built, sets, tmp_path, capsys):
    assert run(built, built, sets / "other") == 2
    assert "holds a run of build_index.py" in capsys.readouterr().err
    assert run(tmp_path / "nowhere", tmp_path / "out", sets / "other") == 2
    assert "--real" in capsys.readouterr().err
