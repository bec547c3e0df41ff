"""The workflows from a bucket to a bucket, on a real S3 server."""

import pyarrow.parquet as pq
import pytest

from pd_core.core import artifacts, errors, files
from tests import tiny, toy_generator
from tests.evaluate import test_tradeoff_curve as test_sweep
from tests.evaluate import test_workflow as test_evaluate
from tests.s3 import READER_KEY
from workflows import build_index, generate


@pytest.fixture
def bucket(s3_environment, ray_cluster):
    name = s3_environment.make_bucket()
    for key, data in tiny.files().items():
        s3_environment.put(name, f"images/{key}", data)
    return f"s3://{name}"


def run(*argv):
    return errors.exit_code(lambda: build_index.main(list(argv)))


def sample(*argv):
    return errors.exit_code(lambda: generate.main(list(argv)))


def test_from_bucket_to_bucket_with_the_same_numbers_as_from_disk(bucket, inputs, built, monkeypatch, capsys):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    files.write_bytes(f"{bucket}/models/tiny.safetensors", inputs[1].read_bytes())
    weights = f"{bucket}/models/tiny.safetensors"
    argv = tiny.arguments(f"{bucket}/images", weights, f"{bucket}/out")
    assert run(*argv) == 0
    printed = capsys.readouterr().out
    assert "tracking: off" in printed and f"report: {bucket}/out/report/index.html" in printed
    for stage in ("features", "quarantine", "densities"):
        local = pq.ParquetDataset(sorted(str(f) for f in (built / stage).glob("*.parquet"))).read()
        names = [name for name in sorted(files.sizes(f"{bucket}/out/{stage}")) if name.endswith(".parquet")]
        remote = [files.read_table(f"{bucket}/out/{stage}/{name}") for name in names]
        assert sum(table.num_rows for table in remote) == local.num_rows
        assert [k for t in remote for k in t["key"].to_pylist()] == local["key"].to_pylist()
    densities = [files.read_table(f"{bucket}/out/densities/{n}")["density"].to_pylist() for n in names]
    assert [d for part in densities for d in part] == local["density"].to_pylist()
    assert run(*argv) == 0  # done: nothing is made again


@pytest.mark.slow
def test_generate_from_bucket_to_bucket_with_the_same_rows_as_on_disk(bucket, inputs, built, tmp_path):
    fs, folder = files.filesystem(f"{bucket}/out")
    fs.put(f"{built}/", folder, recursive=True)
    weights = (
        f"--checkpoint={inputs[1]}"  # of this machine, which an index on a store leads to only where the command does
    )
    sampling = toy_generator.sampling(index=f"{bucket}/out", export="png")
    assert sample(*sampling, f"--output={bucket}/samples", "--no-tracking.enabled") == 2
    argv = [*sampling, weights, "--keep-rejected", "--no-tracking.enabled"]
    outputs = [f"{bucket}/samples", str(tmp_path / "samples")]
    for output in outputs:
        assert sample(*argv, f"--output={output}") == 0
    for stage in ("pilot", "samples", "rejected"):
        remote, local = (artifacts.load_artifact(f"{output}/{stage}") for output in outputs)
        assert remote is not None and local is not None and remote.parts == local.parts and remote.rows > 0
    assert files.exists(f"{bucket}/samples/report/index.html")
    assert remote is not None
    rows = [r for p in remote.parts for r in files.read_table(f"{bucket}/samples/rejected/{p.name}").to_pylist()]
    assert len(rows) == remote.rows
    named = [option for option in argv if option.startswith("--generator.")]
    assert sample(f"--verify={bucket}/samples", "--rows=5", weights, *named) == 0
    assert sample(*argv, "--seed=1", "--overwrite", f"--output={outputs[0]}") == 0
    fs, folder = files.filesystem(f"{bucket}/samples/export/png")
    assert len(fs.find(folder)) == 20  # none of the set before


@pytest.mark.slow
def test_evaluate_and_tradeoff_from_bucket_to_bucket_with_the_same_numbers_as_on_disk(bucket, inputs, built, tmp_path):
    fs, folder = files.filesystem(f"{bucket}/out")
    fs.put(f"{built}/", folder, recursive=True)
    fs.put(f"{tiny.write_images(tmp_path / 'same')}/", files.filesystem(f"{bucket}/same")[1], recursive=True)
    for place, index in ((bucket, f"{bucket}/out"), (str(tmp_path), str(built))):
        weights = f"--checkpoint={inputs[1]}"
        assert test_evaluate.run(index, f"{place}/evaluated", f"{place}/same", more=(weights,)) == 0
        assert test_sweep.run(index, f"{place}/swept", weights) == 0
        for output in ("evaluated", "swept"):
            assert files.exists(f"{place}/{output}/report/index.html")
    for stage in ("evaluated/metrics", "evaluated/scores", "swept/pool", "swept/curve"):
        remote, local = (artifacts.load_artifact(f"{place}/{stage}") for place in (bucket, tmp_path))
        assert remote is not None and local is not None and remote.parts == local.parts and remote.rows > 0


def test_a_stage_is_begun_anew_where_the_store_keeps_its_folder(bucket):
    """After the last deletion the server lists an object named as the folder; an S3 console makes such ones too."""
    old, new = (artifacts.Stage(f"{bucket}/out/pilot", "pilot", 1, {"seed": seed}) for seed in (1, 2))
    old.begin(overwrite=False)
    old.write_part("part-00000000.parquet", b"old", 1)
    old.commit(old.finished_parts().values(), {}, {})
    assert new.begin(overwrite=True) is None
    assert new.finished_parts() == {}
    new.write_part("part-00000000.parquet", b"new", 1)
    assert list(new.finished_parts()) == ["part-00000000.parquet"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, "credentials"),
        ({"AWS_ACCESS_KEY_ID": "nobody"}, "credentials"),
    ],
)
def test_wrong_credentials_are_one_line_and_exit_2(bucket, tmp_path, change, expected):
    process = tiny.start(*tiny.arguments(f"{bucket}/images", "x", tmp_path / "out", "--no-tracking.enabled"), **change)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 2, text
    line = [line for line in text.splitlines() if line.startswith("error:")]
    assert len(line) == 1 and expected in line[0] and "wrong" not in line[0] and "Traceback" not in text


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"AWS_ACCESS_KEY_ID": READER_KEY}, "permission denied"),
        pytest.param({"AWS_SECRET_ACCESS_KEY": "wrong"}, "credentials", marks=pytest.mark.slow),
        pytest.param({"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "credentials", marks=pytest.mark.slow),
    ],
)
def test_an_output_that_cannot_be_written_is_one_line_and_exit_2(s3_environment, tmp_path, change, expected):
    # a bucket that does not exist is not among them: this server makes one on the first PUT, others refuse it
    output = f"s3://{s3_environment.make_bucket()}/out"
    images, weights = tiny.write_images(tmp_path / "images"), tiny.write_checkpoint(tmp_path / "tiny.safetensors")
    process = tiny.start(*tiny.arguments(images, weights, output, "--no-tracking.enabled"), **change)
    text, _ = process.communicate(timeout=120)
    line = [line for line in text.splitlines() if line.startswith("error:")]
    assert process.returncode == 2 and len(line) == 1 and expected in line[0] and "Traceback" not in text, text


def test_a_bucket_that_does_not_exist_is_one_line_and_exit_2(s3_environment, tmp_path, capsys):
    assert run(*tiny.arguments("s3://no-such-bucket-here/x", "x", tmp_path / "out")) == 2
    assert "no-such-bucket-here" in capsys.readouterr().err
