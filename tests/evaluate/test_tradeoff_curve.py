"""tradeoff.py on a real Ray cluster: one pool, every setting; its draws are what generate.py accepts."""

import csv
import json
import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pd_core.core import errors
from pd_core.core.errors import UserError
from pd_core.core.settings.evaluate import MetricSettings, TradeoffSettings
from pd_core.density import weighting
from pd_core.engine import resources
from pd_core.evaluate import metrics
from pd_core.evaluate.tradeoff import curve as tradeoff_curve
from pd_core.evaluate.tradeoff import report, workflow
from pd_core.evaluate.tradeoff.points import Setting
from pd_core.generate import volume
from tests import tiny, tiny_generators
from tests.generate.test_workflow import TOY, rows
from tests.generate.test_workflow import run as run_generate
from workflows import tradeoff

N = 70
# 37 chunks of 16, too few for the second weight
THREE_PARTS = ('--thresholds=["p90"]', "--weights=[50, 500]", "--max-candidates=600")


def arguments(built, output, *more):
    values = {
        "index": built,
        "generator.kind": "python",
        "generator.path": TOY,
        "n": N,
        "thresholds": '["p30", "p60"]',
        "weights": "[0.2, 5]",
        "chunk": 16,
        "pilot": 64,
        "images": 2,
        "extraction.batch_size": 16,
        "extraction.part_rows": 64,
        "output": output,
    }
    given = {text.lstrip("-").partition("=")[0] for text in more}
    return [f"--{k}={v}" for k, v in values.items() if k not in given] + list(more) + ["--no-tracking.enabled"]


def run(built, output, *more):
    return errors.exit_code(lambda: tradeoff.main(arguments(built, output, *more)))


@pytest.fixture(scope="module")
def swept(built, tmp_path_factory):
    output = tmp_path_factory.mktemp("swept") / "out"
    assert run(built, output, "--target=recall=0.01") == 0
    return output


@pytest.mark.slow
def test_a_run_that_was_killed_after_its_curve_still_tells_mlflow_of_each_setting(swept, built):
    from mlflow import MlflowClient

    output = swept
    (output / "report" / "artifact.json").unlink()
    (output / "run.json").unlink()
    tracked = [a for a in arguments(built, output, "--target=recall=0.01") if "tracking" not in a]
    for _ in range(2):  # the second makes nothing, and tells nothing
        assert errors.exit_code(lambda: tradeoff.main(tracked)) == 0
    client = MlflowClient(tracking_uri=f"sqlite:///{output.parent / 'mlflow.db'}")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    found = {run.info.run_name: run.data for run in client.search_runs(experiments)}
    assert {name for name in found if name.startswith("index: ")} == {f"index: {name}" for name in curve(output)}
    own = found["index: p60, w = 5"]
    assert own.metrics["precision"] == curve(output)["p60, w = 5"]["precision"]
    assert own.params["weight"] == "5.0" and "mlflow.parentRunId" in own.tags


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A curve of three settings over a pool of 60 candidates, of which 40 are wanted; without Ray."""
    monkeypatch.setattr(resources, "assigned_device", lambda: "cpu")
    settings = (Setting("generator"), Setting("density", "p50", 50.0), Setting("polarity", polarity=-1.0))
    curves = weighting.uniform(), weighting.two_level(0.9, 50.0), weighting.tilted(np.arange(60.0), -1.0, 20)
    weightings = dict(zip([s.name for s in settings], curves, strict=True))
    how = TradeoffSettings(metrics=MetricSettings(k_precision=2, k_coverage=4), score="index", n=40)
    where: Any = SimpleNamespace(name="index", extractor="of a test")
    return tradeoff_curve.Job(str(tmp_path), how, settings, (where,), {}, {}, {}, weightings, "its own")


def pool_of(log_volume, rng):
    many = len(log_volume)
    features = rng.normal(size=(many, 4)).astype(np.float32)
    return tradeoff_curve.Pool(np.arange(many), np.arange(many), rng.random(many), log_volume, features)


def test_each_row_names_what_its_numbers_hang_on(job):
    """docs/method.md, section 7: extractor, images on both sides, k; measured or not, in the table and in the CSV."""
    rng = np.random.default_rng(0)
    reference = metrics.prepare(rng.normal(size=(55, 4)).astype(np.float32), np.arange(55), 2, 4)
    pool = pool_of(np.arange(60.0), rng)
    for i in range(3):
        tradeoff_curve._measure_part(job, 0, i, reference, pool, 1)
    found = tradeoff_curve.read_curve(job.stage.uri, list(job.stage.finished_parts().values()))
    assert [row["precision"] is not None for row in found] == [True, False, False]
    written = list(csv.DictReader(report.table(found).decode().splitlines()))
    for row in (*found, *written):
        named = [str(row[name]) for name in ("extractor", "n_real", "k_precision", "k_coverage")]
        assert named == ["of a test", "55", "2", "4"]
    assert found[0]["n"] == 40 and all(row["n"] < 40 for row in found[1:])


def test_the_exact_weights_of_polarity_are_worth_less_than_its_steps(job):
    """Of normal volumes with standard deviation s, exp(polarity v) is worth exp(-(polarity s)²) of the sample. 200,000
    values with s = 1: the moment E w² has a relative standard error of sqrt((e⁴ - 1) / 200000) = 1.6%."""
    rng = np.random.default_rng(0)
    v = rng.normal(size=200_000)
    polarity = job.swept[2]
    steps = replace(job, weightings={polarity.name: weighting.tilted(v[:256], -1.0, 20)})
    found = tradeoff_curve.draw(polarity, pool_of(v, rng), steps)
    assert found.exact == pytest.approx(np.exp(-1) * len(v), rel=0.08)
    assert found.exact is not None and found.exact < found.effective
    assert tradeoff_curve.draw(job.swept[1], pool_of(v, rng), job).exact is None


def curve(output):
    table = pa.concat_tables([pq.read_table(file) for file in sorted((output / "curve").glob("*.parquet"))])
    return {row["setting"]: row for row in table.to_pylist()}


def test_every_setting_is_measured_once_from_one_pool(swept, built):
    """At the formula's rates: P + (1 - P)/w for w > 1, P w + (1 - P) for w < 1, within 5 standard errors."""
    found = curve(swept)
    assert set(found) == {"generator", "p30, w = 0.2", "p30, w = 5", "p60, w = 0.2", "p60, w = 5"}
    assert all(row["n"] == N and row["precision"] is not None for row in found.values())
    assert found["generator"]["candidates"] == N
    assert found["generator"]["acceptance_rate"] == 1
    pool = rows(swept, "pool")["density_predicted"].to_numpy()
    real = rows(built, "densities")["density"].to_numpy()
    for row in found.values():
        if row["method"] == "density":
            above = np.mean(pool > np.quantile(real, float(row["threshold"][1:]) / 100))
            w = row["weight"]
            expected = above + (1 - above) / w if w > 1 else above * w + 1 - above
            assert abs(row["acceptance_rate"] - expected) < 5 * np.sqrt(0.25 / len(pool))


@pytest.mark.slow
def test_a_setting_takes_the_very_images_that_generate_accepts(swept, built, tmp_path):
    """generate.py with this threshold, weight and seed."""
    setting = curve(swept)["p60, w = 5"]
    output = tmp_path / "out"
    assert run_generate(built, output, "--weighting.threshold=p60", "--weighting.weight=5", n=N) == 0
    assert_taken_from(swept, setting, rows(output))


def assert_taken_from(swept, setting, accepted):
    """The same candidates in the same order."""
    assert accepted["sample_id"].to_numpy()[-1] + 1 == setting["candidates"]
    pool = rows(swept, "pool")
    kept = pool.filter(pa.array(np.isin(pool["sample_id"].to_numpy(), accepted["sample_id"].to_numpy())))
    assert kept["image_hash"].to_pylist() == accepted["image_hash"].to_pylist()


def test_table_and_page_and_choice(swept):
    table = list(csv.DictReader((swept / "report" / "tradeoff.csv").read_text().splitlines()))
    assert len(table) == 5 and any(row["frontier"] == "True" for row in table)
    page = (swept / "report" / "index.html").read_text()
    assert "For a recall of 0.01 or more in the index space take" in page
    assert json.loads((swept / "run.json").read_text())["workflow"] == "tradeoff"


def test_the_same_command_makes_nothing_again_and_a_lost_setting_comes_back_the_same(built, swept, capsys):
    before = tiny.tables(swept)
    (swept / "curve" / "artifact.json").unlink()
    (swept / "curve" / "part-00000002.parquet").unlink()
    assert run(built, swept, "--target=recall=0.01") == 0
    assert tiny.tables(swept) == before
    assert run(built, swept, "--target=recall=0.01") == 0
    assert "every stage was finished already" in capsys.readouterr().out


@pytest.mark.slow
def test_a_part_of_the_pool_that_was_cut_short_comes_back_and_nothing_follows_from_it(built, swept, capsys):
    """Its file is a newer one then, but holds what the listing of the pool has listed."""
    before = tiny.tables(swept)
    times = {
        f: f.stat().st_mtime_ns for f in swept.rglob("*") if f.is_file() and f.parent.name not in ("pool", "_parts")
    }
    (swept / "pool" / "part-00000000.parquet").write_bytes(b"PAR1")
    assert run(built, swept, "--target=recall=0.01") == 0
    assert "pool: part-00000000.parquet has 4 of" in capsys.readouterr().out
    assert tiny.tables(swept) == before
    changed = {f.name for f, when in times.items() if f.stat().st_mtime_ns != when}
    assert changed == {"run.json"}


@pytest.mark.slow
def test_a_killed_driver_resumes_to_the_same_bytes_and_what_the_pool_cannot_give_is_left_out(built, tmp_path, capsys):
    undisturbed, output = tmp_path / "undisturbed", tmp_path / "out"
    assert run(built, undisturbed, *THREE_PARTS) == 0
    assert "too small for p90, w = 500, which are left out; raise --max-candidates" in capsys.readouterr().out
    found = curve(undisturbed)
    assert found["p90, w = 500"]["precision"] is None and found["generator"]["precision"] is not None
    tiny.kill_when("pool/_parts/*.json", output, *arguments(built, output, *THREE_PARTS), workflow="tradeoff.py")
    assert not (output / "pool" / "artifact.json").exists()
    done = {f: f.stat().st_mtime_ns for f in output.glob("pool/_parts/*.json")}
    assert run(built, output, *THREE_PARTS) == 0
    assert tiny.tables(output) == tiny.tables(undisturbed)
    assert all(f.stat().st_mtime_ns == when for f, when in done.items()), "finished parts were made again"


def test_a_target_out_of_reach_shows_the_frontier(built, swept, capsys):
    before = tiny.tables(swept)
    assert run(built, swept, "--target=precision=1.5") == 2
    assert tiny.tables(swept) == before  # a question about the table makes only the report again
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "out of reach" in said and "precision" in said and "frontier" in said


@pytest.mark.slow
def test_polarity_takes_the_very_images_that_generate_accepts_and_truncations_are_pools_of_their_own(built, tmp_path):
    """With the same pilot, steps and seed the rows are those of generate; a larger pilot has other steps."""
    gan, output = f"--generator.path={tiny_generators.save_bars(tmp_path / 'bars.pt')}", tmp_path / "out"
    kind = ("--generator.kind=torchscript", gan, "--generator.latent_shape=[4]")
    wanted = ('--thresholds=["p50"]', "--weights=[3]", "--polarities=[-1, 1]", "--truncations=[0.5, 1.0]")
    assert run(built, output, *kind, "--rank=4", "--bins=8", *wanted, "--score=index") == 0
    more = ("--weighting.kind=polarity", "--weighting.polarity=-1", "--weighting.rank=4", "--weighting.bins=8")
    assert run_generate(built, tmp_path / "generated", *more, *kind, n=N) == 0
    found = curve(output)
    setting = found["polarity -1"]
    assert_taken_from(output, setting, rows(tmp_path / "generated"))
    assert setting["effective_sample_size"] < setting["candidates"]
    assert {"MaGNET", "ψ = 0.5", "ψ = 1"} < set(found)
    assert found["ψ = 0.5"]["vendi_generated"] < found["generator"]["vendi_generated"]
    assert rows(output, "truncated-0.5")["image_hash"].to_pylist() != rows(output, "pool")["image_hash"].to_pylist()[:N]


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["--target=fid=3"], "expected METRIC=VALUE"),
        (['--thresholds=["q20"]'], "cannot be read"),
        (['--thresholds=["99"]'], "outside the densities"),
        (["--truncations=[0.5]"], "has no truncation"),
        (["--n=3"], "--n 3: too few"),
        (["--max-candidates=16"], "fewer than --n"),
        (["--polarities=[NaN]"], "finite"),
        (["--polarities=[-1]"], "offers no latents"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(built, tmp_path, capsys, more, line):
    assert run(built, tmp_path / "out", *more) == 2
    assert line in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.slow
def test_volumes_that_cannot_be_measured_are_refused_by_the_options_of_this_workflow(built, tmp_path, capsys):
    """No polarity is asked for: those of the default for TorchScript."""
    gan = f"--generator.path={tiny_generators.save_bars(tmp_path / 'bars.pt')}"
    kind = ("--generator.kind=torchscript", gan, "--generator.latent_shape=[4]", "--truncations=[]")
    assert run(built, tmp_path / "out", *kind, "--output_size=5") == 2
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert "set --output_size to a divisor, or give --polarities '[]'" in said and "--weighting" not in said


@pytest.mark.parametrize(
    "decode",
    [lambda z: z[:, :2], lambda z: z[:, None, None, :6], lambda z: z.detach(), lambda z: torch.zeros(2, 3, 4, 4)],
    ids=["rank", "size", "detached", "constant"],
)
def test_a_refusal_of_volumes_names_no_option_that_this_workflow_lacks(decode):
    own = {f"--{name}" for name in TradeoffSettings.model_fields}
    with pytest.raises(UserError) as raised, workflow._own_words():
        volume.top_singular_values(decode, torch.randn(2, 8), [1, 2], volume.Volume(3, 4))
    named = set(re.findall(r"--[a-z_.]+", str(raised.value)))
    assert "--polarities" in named and named <= own
