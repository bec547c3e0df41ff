"""The workflow finetune: from a real set and a generator to a better one, through kills, on one worker and on two."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest

from pd_core.core import artifacts as core_artifacts
from pd_core.core import errors, files
from pd_core.core.errors import EXIT_BAD_INPUT, EXIT_FAILED
from pd_core.core.settings.generate import GeneratorSettings
from pd_core.engine import resources
from pd_core.finetune import checkpoints
from pd_core.generators.open import open_generator
from pd_core.generators.protocol import Conditions
from tests import tiny, tiny_generators
from workflows import evaluate, finetune, generate

STEPS, BATCH = 8, 16


@pytest.fixture(scope="module")
def ddpm(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny diffusion model of 16 px."""
    return tiny_generators.save_ddpm(tmp_path_factory.mktemp("ddpm") / "ddpm")


def arguments(index: str | Path, generator: str | Path, output: str | Path, *more: str) -> list[str]:
    """Settings of a training of seconds."""
    values = {
        "index": index,
        "generator.path": generator,
        "generator.scheduler": "DDIMScheduler",
        "generator.steps": 2,
        "weighting.threshold": "p80",
        "weighting.weight": 33,
        "steps": STEPS,
        "training.batch_size": BATCH,
        "training.learning_rate": 1e-3,
        "evaluation.every": 4,
        "evaluation.n": 24,
        "evaluation.chunk": 8,
        "checkpoint_every": 2,
        "images": 4,
        "output": output,
    }
    return [f"--{name}={value}" for name, value in values.items()] + ["--no-tracking.enabled", *more]


def finetuned(*argv: str) -> int:
    return errors.exit_code(lambda: finetune.main(list(argv)))


@pytest.fixture(scope="module")
def done(built: Path, ddpm: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of one undisturbed run on one worker. Nobody may change it."""
    output = tmp_path_factory.mktemp("finetuned") / "out"
    assert finetuned(*arguments(built, ddpm, output)) == 0
    return output


def results(output: Path) -> dict[str, bytes]:
    """Bytes of everything that must not depend on what happened on the way: averages, images, numbers, the
    saved model.
    """
    kept = [
        *output.glob("training/*.safetensors"),
        *output.glob("training/*.parquet"),
        *output.rglob("best/**/*.safetensors"),
    ]
    return {str(file.relative_to(output)): file.read_bytes() for file in sorted(kept)}


def history(output: Path, name: str) -> list[float]:
    table = pq.read_table(output / "training" / checkpoints.HISTORY).to_pylist()
    return [row["value"] for row in table if row["name"] == name]


# ---- a run -----------------------------------------------------------------------------------------------------------


def test_a_run_leaves_a_model_an_evaluation_of_each_state_and_a_report(done: Path, built: Path) -> None:
    artifacts = {
        stage: core_artifacts.load_artifact(str(done / stage)) for stage in ("weights", "training", "best", "report")
    }
    assert all(artifacts.values())
    training = artifacts["training"]
    assert training is not None
    names = {part.name for part in training.parts}
    assert {checkpoints.average_name(s) for s in (0, 4, 8)} == {n for n in names if n.startswith("average-")}
    assert {f"state-{s:08d}.pt" for s in (6, 8)} == {n for n in names if n.startswith("state-")}, (
        "the newest two are kept"
    )
    evaluations = pq.read_table(done / "training" / checkpoints.EVALUATIONS).to_pylist()
    precision = {row["step"]: row["value"] for row in evaluations if row["metric"] == "precision"}
    assert sorted(precision) == [0, 4, 8] and training.totals["metric"] == "precision", "w is above 1"
    assert training.totals["best"] == max(precision, key=lambda step: precision[step])
    assert all(row["n_generated"] == 24 and row["n_real"] == tiny.GOOD for row in evaluations)
    assert len(history(done, "loss")) == STEPS and training.totals["steps"] == STEPS
    assert training.totals["weights"]["rows"] == tiny.GOOD
    page = (done / "report" / "index.html").read_text()
    assert page.count("data:image/png") > 8
    record = json.loads((done / "run.json").read_text())
    assert record["workflow"] == "finetune" and set(record["stages"]) >= {"weights", "training", "best", "report"}


def test_what_was_saved_is_the_best_average_and_opens_as_it_is(done: Path) -> None:
    import safetensors.torch

    training = core_artifacts.load_artifact(str(done / "training"))
    assert training is not None
    average = safetensors.torch.load_file(done / "training" / checkpoints.average_name(training.totals["best"]))
    saved = safetensors.torch.load_file(done / "best" / "unet" / "diffusion_pytorch_model.safetensors")
    assert average.keys() == saved.keys()
    assert all(average[name].equal(saved[name]) for name in average)
    opened = open_generator(GeneratorSettings(path=str(done / "best"), scheduler="DDIMScheduler", steps=2))
    assert opened.generate([1, 2], Conditions()).shape == (2, 16, 16, 3)


def test_the_same_command_again_makes_nothing(
    done: Path, built: Path, ddpm: str, capfd: pytest.CaptureFixture[str]
) -> None:
    before = {file: file.stat().st_mtime_ns for file in done.rglob("*") if file.is_file() and file.name != "run.json"}
    assert finetuned(*arguments(built, ddpm, done)) == 0
    assert "every stage was finished already" in capfd.readouterr().out
    assert before == {file: file.stat().st_mtime_ns for file in before}


def test_other_settings_are_refused_on_the_same_output(
    done: Path, built: Path, ddpm: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert finetuned(*arguments(built, ddpm, done, "--training.learning_rate=1e-4")) == EXIT_BAD_INPUT
    error = capfd.readouterr().err
    assert "training.learning_rate: 0.001 -> 0.0001" in error and "--overwrite" in error


@pytest.mark.slow
def test_the_result_goes_through_generate_and_evaluate_as_it_is(done: Path, built: Path, tmp_path: Path) -> None:
    options = ["--generator.scheduler=DDIMScheduler", "--generator.steps=2", "--no-tracking.enabled"]
    argv = [f"--index={built}", f"--generator.path={done / 'best'}", "--n=12", "--pilot=16", "--chunk=8", *options]
    output = tmp_path / "samples"
    assert errors.exit_code(lambda: generate.main([*argv, "--weighting.kind=none", f"--output={output}"])) == 0
    measured = tmp_path / "measured"
    found = [f"--real={built}", "--samples", str(output), f"--output={measured}", "--no-tracking.enabled"]
    assert errors.exit_code(lambda: evaluate.main(found)) == 0
    artifact = core_artifacts.load_artifact(str(measured / "metrics"))
    assert artifact is not None and artifact.totals["index"]["samples"]["frechet_distance"] > 0


@pytest.mark.slow
def test_early_stop_ends_after_its_patience(built: Path, ddpm: str, tmp_path: Path) -> None:
    """A learning rate that ruins the model: no evaluation beats step 0."""
    more = [
        "--training.learning_rate=0.5",
        "--training.warmup_steps=0",
        "--training.ema_decay=0",
        "--evaluation.every=1",
    ]
    more += ["--evaluation.patience=2", "--evaluation.metric=precision"]
    output = tmp_path / "out"
    assert finetuned(*arguments(built, ddpm, output, *more)) == 0
    artifact = core_artifacts.load_artifact(str(output / "training"))
    assert artifact is not None and artifact.totals["stopped_early"]
    assert artifact.totals["steps"] == artifact.totals["best"] + 2 < STEPS


def test_a_dry_run_tells_time_and_memory_and_writes_nothing(
    built: Path, ddpm: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert finetuned(*arguments(built, ddpm, tmp_path / "out", "--dry-run")) == 0
    out = capfd.readouterr().out
    assert "s a step" in out and "memory: a step took a process to" in out and "parameters are trained" in out
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_merging_is_reported_with_what_it_gained(built: Path, ddpm: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    more = ["--merge=best-of", "--merge_candidates=12", "--steps=4", "--evaluation.every=2", "--evaluation.n=16"]
    assert finetuned(*arguments(built, ddpm, output, *more)) == 0
    merged, best = (core_artifacts.load_artifact(str(output / stage)) for stage in ("merging", "best"))
    assert merged is not None and best is not None
    assert best.totals["merged"] == merged.totals["beats"]
    assert sum(merged.totals["coefficients"]) == pytest.approx(1)


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--weighting.weight=0"], "weighting.weight: input should be greater than 0"),
        (
            ["--weighting.kind=polarity", "--weighting.polarity=1"],
            "weighting.weight has no meaning",
        ),
        (["--weighting.threshold=50"], "outside the densities of the index"),
        (["--workers=3"], "must be a multiple of --workers 3"),
        (["--evaluation.n=3"], "too few images for k = 5"),
        (["--fake.weight=0.5"], "a diffusion model trains on real images alone"),
        (["--training.r1_weight=0.5"], "--training.r1_weight: is of GANs"),
        (["--images=9"], "--images 9: the report shows images of an evaluation's first batch, 8"),
        (["--discriminator=d.pt"], "--discriminator: has no meaning for --generator.kind diffusers"),
        (["--generator.kind=torchscript"], "no meaning for generator.kind 'torchscript'"),
        (["--index=nowhere"], "nowhere"),
        (["--generator.path=nowhere"], "no such directory"),
        (["--trainig.batch_size=3"], "did you mean 'training.batch_size'"),
    ],
)
def test_bad_settings_end_in_one_line(
    built: Path, ddpm: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    argv = arguments(built, ddpm, tmp_path / "out", *more)
    try:
        code = finetuned(*argv)
    except SystemExit as left:  # of the parser
        code = int(left.code or 0)
    error = capfd.readouterr().err
    assert code == EXIT_BAD_INPUT and message in error, error
    assert len(error.strip().splitlines()) == 1 and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_at_the_last_good_checkpoint(
    built: Path, ddpm: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    more = ["--training.learning_rate=1e30", "--training.warmup_steps=0", "--seed=5"]
    assert finetuned(*arguments(built, ddpm, tmp_path / "out", *more)) == EXIT_FAILED
    error = capfd.readouterr().err
    # one line of ours, and no traceback of ours: Ray may print some of its own when the machine is busy
    assert "(seed 5)" in error and "the last good checkpoint is that of step 0" in error
    assert error.count("failed: training: ") == 1 and "pd_core/finetuning" not in error, error
    assert (tmp_path / "out" / "training" / "state-00000000.pt").exists()
    assert not (tmp_path / "out" / "training" / files.ARTIFACT).exists()


# ---- kills -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("when", ["weights/artifact.json", "training/state-00000006.pt", "best/_parts/*"])
def test_a_killed_driver_resumes_to_the_same_bits(
    built: Path, ddpm: str, done: Path, tmp_path: Path, when: str
) -> None:
    output = tmp_path / "out"
    argv = arguments(built, ddpm, output)
    tiny.kill_when(when, output, *argv, workflow="finetune.py")
    assert not (output / "run.json").exists()
    assert finetuned(*argv) == 0
    assert results(output) == results(done)


LONG = ("--steps=40", "--evaluation.every=40")


@pytest.fixture(scope="module")
def alone(built: Path, ddpm: str, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of a longer run of one worker."""
    output = tmp_path_factory.mktemp("alone") / "out"
    assert finetuned(*arguments(built, ddpm, output, *LONG)) == 0
    return history(output, "loss")


@pytest.mark.slow
@pytest.mark.parametrize("lost", [1, 0], ids=["one", "both"])
def test_two_workers_do_what_one_does_and_go_on_after_a_loss(
    built: Path, ddpm: str, done: Path, alone: list[float], tmp_path: Path, lost: int
) -> None:
    """Same batches, same noise: losses agree up to the order in which floats are added, whoever is killed meanwhile."""
    output = tmp_path / "out"
    process = tiny.start(*arguments(built, ddpm, output, "--workers=2", *LONG), workflow="finetune.py")
    deadline = time.monotonic() + 240
    while not (output / "training" / "state-00000004.pt").exists() and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    children = psutil.Process(process.pid).children(recursive=True)
    victims = [child for child in children if "RayTrainWorker" in " ".join(child.cmdline())]
    assert len(victims) == 2, [child.cmdline() for child in children]
    for victim in victims[lost:]:
        victim.send_signal(signal.SIGKILL)
    out = process.communicate(timeout=280)[0]
    assert process.returncode == 0, out
    assert "goes on from step" in out, out
    two = history(output, "loss")
    assert len(alone) == len(two) == 40
    # float32 sums in another order: 1e-7 a step, amplified by 40 of Adam, large where gradients are small
    assert np.allclose(alone, two, rtol=2e-3), np.abs(np.array(alone) / two - 1).max()
    # the first steps of a longer run are those of a shorter
    assert alone[:STEPS] == pytest.approx(history(done, "loss"), rel=1e-6)


@pytest.mark.slow
def test_a_state_that_is_not_as_it_was_written_is_passed_over(
    built: Path, ddpm: str, done: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    argv = arguments(built, ddpm, output)
    tiny.kill_when("training/state-00000006.pt", output, *argv, workflow="finetune.py")
    newest = sorted((output / "training").glob("state-*.pt"))[-1]
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(bytes(data))
    assert finetuned(*argv) == 0
    assert results(output) == results(done)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lost", "again"),
    [("average-00000004.safetensors", [0, 4, 8]), ("samples-00000008.parquet", [8]), ("history.parquet", [])],
)
def test_a_part_that_was_cut_short_after_its_commit_is_made_again(
    built: Path, ddpm: str, done: Path, tmp_path: Path, lost: str, again: list[int]
) -> None:
    """Steps are made again only where they must be."""
    output = tmp_path / "out"
    shutil.copytree(done, output)
    (output / "training" / lost).write_bytes((output / "training" / lost).read_bytes()[:-20])
    averages = {step: output / "training" / checkpoints.average_name(step) for step in (0, 4, 8)}
    before = {step: file.stat().st_mtime_ns for step, file in averages.items()}
    assert finetuned(*arguments(built, ddpm, output)) == 0
    assert results(output) == results(done)
    assert [step for step, file in averages.items() if file.stat().st_mtime_ns != before[step]] == again
    records = [core_artifacts.load_artifact(str(folder / "training")) for folder in (output, done)]
    found, expected = ({part.name for part in record.parts} for record in records if record is not None)
    assert found == expected


@pytest.mark.slow
def test_to_a_bucket(built: Path, ddpm: str, done: Path, s3_environment: Any, ray_cluster: resources.Cluster) -> None:
    output = f"s3://{s3_environment.make_bucket()}/out"
    assert finetuned(*arguments(built, ddpm, output)) == 0
    for name, data in results(done).items():
        assert files.read_bytes(files.join(output, name)) == data, name


# ---- GANs ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_gan_goes_through_the_workflow_and_generates(built: Path, tmp_path: Path) -> None:
    folder, gan = tmp_path / "images", tmp_path / "gan"
    (folder / "x").mkdir(parents=True)
    for i in range(48):
        (folder / "x" / f"{i}.png").write_bytes(tiny.png(i))
    command = ["--data", str(folder), "--output", str(gan), "--steps", "4", "--channels", "8", "16", "--threads", "1"]
    subprocess.run([sys.executable, str(tiny.ROOT / "demo" / "train_gan.py"), *command], check=True)
    more = ["--generator.kind=torchscript", "--generator.latent_shape=[64]"]
    given = arguments(
        built, gan / "generator.pt", tmp_path / "out", *more, f"--discriminator={gan / 'discriminator.pt'}"
    )
    argv = [a.replace("weight=33", "weight=2") for a in given if "scheduler" not in a and "generator.steps" not in a]
    assert finetuned(*argv) == 0
    import safetensors.torch
    import torch

    trained = core_artifacts.load_artifact(str(tmp_path / "out" / "training"))
    assert trained is not None
    beside = tmp_path / "out" / "training" / checkpoints.companions_name(trained.totals["best"])
    companions = safetensors.torch.load_file(beside)
    saved, came = (
        torch.jit.load(str(folder / "discriminator.pt")).state_dict() for folder in (tmp_path / "out" / "best", gan)
    )
    assert all(saved[name].equal(companions[f"discriminator.{name}"]) for name in saved)
    assert trained.totals["best"] == 0 or not all(saved[name].equal(came[name]) for name in saved)
    acceptance = history(tmp_path / "out", "acceptance")
    assert len(acceptance) == STEPS and all(0 < value <= 1 for value in acceptance)
    output = tmp_path / "samples"
    argv = [f"--index={built}", *more, f"--generator.path={tmp_path / 'out' / 'best' / 'generator.pt'}", "--n=12"]
    argv += ["--pilot=16", "--chunk=8", "--weighting.kind=none", f"--output={output}", "--no-tracking.enabled"]
    assert errors.exit_code(lambda: generate.main(argv)) == 0
