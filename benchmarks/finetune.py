"""What importance sampling costs a step, what a second worker brings, and how long a lost worker is missed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks import process, table

THRESHOLD, WEIGHT = "p80", 10.0
BATCH, GAN_BATCH = 64, 32
DIFFUSION_OPTIONS = ["--generator.scheduler=DDIMScheduler", "--generator.steps=10"]
KILL_STEPS, CHECKPOINT_EVERY = 400, 10

TEXT = f"""\
The demo's index (EfficientNet-lite0 at 64 px) and two generators of 8 px digits: its DDPM, batches of {BATCH}, and a
GAN (demo/train_gan.py), batches of {GAN_BATCH}. Each run is `finetune.py` with workers of 1 thread; step: median
seconds from one step to the next, the wait for its images included, without the first. With importance sampling:
{THRESHOLD}, w = {WEIGHT:g}, generated images by 1/w; without: every image alike, none scored. Formula for the GAN: 1 +
(1/acceptance - 1) x share, share being what a generated batch and its scores take of the step without; timed for
themselves, in one process. The formula takes the first candidate of each image to be free: in fact it is scored too,
and the accepted ones are made once more with gradients, so the measured ratio lies above. Loss of workers: both of two
are killed by SIGKILL; the time from then until the next new checkpoint is written."""


def measure(quick: bool) -> table.Section:
    """Both kinds with and without, one and two workers, one kill."""
    section = table.Section("Fine-tuning", TEXT)
    made = process.call("benchmarks.generate.prepare", {"cache": str(process.CACHE), "work": str(process.WORK)}).value
    gan = process.call("benchmarks.finetune.prepare_gan", {"cache": str(process.CACHE)}).value
    steps = 20 if quick else 60
    shown = table.Table(
        "Steps", ["model", "weights", "workers", "s a step", "of which waiting for images s", "images/s", "acceptance"]
    )
    found = {}
    for kind, weighted, workers in (
        ("diffusion", False, 1),
        ("diffusion", True, 1),
        ("diffusion", True, 2),
        ("gan", False, 1),
        ("gan", True, 1),
    ):
        run = _run(made, gan, kind, weighted, workers, steps)
        found[kind, weighted, workers] = run
        print(f"finetune: {kind}, {'weighted' if weighted else 'alike'}, {workers}: {run}", flush=True)
        shown.rows.append(
            [
                kind,
                f"{THRESHOLD}, w = {WEIGHT:g}" if weighted else "alike",
                workers,
                run["step_s"],
                run["data_s"],
                run["images_s"],
                run["acceptance"],
            ]
        )
        section.raw.append({"kind": kind, "weighted": weighted, "workers": workers, **run})
    section.tables.append(shown)
    share = process.call("benchmarks.finetune.generated_batch", {**gan, "index": made["index"]}, threads=1).value
    plain, weighted_run = found["gan", False, 1], found["gan", True, 1]
    formula = 1 + (1 / weighted_run["acceptance"] - 1) * 2 * share["batch_s"] / plain["step_s"]
    lost_s = _kill(made)
    section.claims += [
        table.at_most(
            "diffusion: a step with importance sampling over one without",
            found["diffusion", True, 1]["step_s"] / found["diffusion", False, 1]["step_s"],
            1.05,
        ),
        table.reported(
            "GAN: a step with importance sampling over one without", weighted_run["step_s"] / plain["step_s"]
        ),
        table.reported("GAN: what the formula allows", formula),
        table.reported(
            "diffusion: images/s of 2 workers over 1",
            found["diffusion", True, 2]["images_s"] / found["diffusion", True, 1]["images_s"],
        ),
        table.reported(
            f"from the kill of two workers to the next checkpoint ({CHECKPOINT_EVERY} steps apart)", lost_s, "s"
        ),
    ]
    section.raw.append({"generated_batch": share, "lost_s": lost_s})
    return section


def _options(made: dict[str, Any], output: Path, weighted: bool, workers: int, steps: int) -> list[str]:
    weighting = (
        [f"--weighting.threshold={THRESHOLD}", f"--weighting.weight={WEIGHT:g}"]
        if weighted
        else ["--weighting.kind=none"]
    )
    return [
        f"--index={made['index']}",
        *weighting,
        f"--steps={steps}",
        f"--evaluation.every={steps}",
        "--evaluation.n=64",
        f"--workers={workers}",
        f"--output={output}",
        "--no-tracking.enabled",
    ]


def _command(options: list[str]) -> list[str]:
    return [sys.executable, str(process.ROOT / "workflows" / "finetune.py"), *options]


def _diffusion(made: dict[str, Any]) -> list[str]:
    return [f"--generator.path={made['generator']}", f"--training.batch_size={BATCH}", *DIFFUSION_OPTIONS]


def _run(
    made: dict[str, Any], gan: dict[str, Any], kind: str, weighted: bool, workers: int, steps: int
) -> dict[str, Any]:
    """Rates of a run."""
    output = process.WORK / f"{kind}-{weighted}-{workers}"
    options = [*_options(made, output, weighted, workers, steps), f"--checkpoint_every={steps}"]
    if kind == "gan":
        options += [
            "--generator.kind=torchscript",
            f"--generator.path={gan['generator']}",
            "--generator.latent_shape=[64]",
            f"--discriminator={gan['discriminator']}",
            f"--training.batch_size={GAN_BATCH}",
        ]
    else:
        options += _diffusion(made)
    subprocess.run(_command(options), check=True, capture_output=True)
    totals = json.loads((output / "training" / "artifact.json").read_text())["totals"]
    return {name: totals[name] for name in ("step_s", "data_s", "images_s")} | {"acceptance": _acceptance(output)}


def _acceptance(output: Path) -> float | None:
    import pyarrow.parquet as pq

    rows = pq.read_table(output / "training" / "history.parquet").to_pylist()
    rates = [row["value"] for row in rows if row["name"] == "acceptance"]
    return float(np.mean(rates)) if rates else None


def _kill(made: dict[str, Any]) -> float:
    """Seconds from the kill of a worker to a checkpoint that was not there before it."""
    output = process.WORK / "killed"
    options = _options(made, output, True, 2, KILL_STEPS) + _diffusion(made)
    command = _command([*options, f"--checkpoint_every={CHECKPOINT_EVERY}", "--keep=1000"])
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    states = output / "training"
    try:
        _wait(lambda: (states / f"state-{CHECKPOINT_EVERY:08d}.pt").exists(), running)
        victims = [
            p for p in psutil.Process(running.pid).children(recursive=True) if "RayTrainWorker" in " ".join(p.cmdline())
        ]
        for victim in victims:  # the first one left alone might still finish a checkpoint
            victim.send_signal(signal.SIGKILL)
        watch, before = time.perf_counter(), set(states.glob("state-*.pt"))
        _wait(lambda: bool(set(states.glob("state-*.pt")) - before), running)
        return time.perf_counter() - watch
    finally:
        running.terminate()
        running.wait(timeout=60)


def _wait(until: Any, running: subprocess.Popen[bytes]) -> None:
    while not until():
        if running.poll() is not None:
            raise RuntimeError(f"finetune.py ended with {running.returncode}")
        time.sleep(0.05)


# ---- in processes of their own ---------------------------------------------------------------------------------------


def prepare_gan(cache: str) -> dict[str, str]:
    """A GAN of the digits, trained once."""
    from demo import make_digits, train_gan

    root = Path(cache)
    assert make_digits.main(["--output", str(root / "demo-data")]) in (0, None)
    folder = root / "digits-gan"
    arguments = ["--data", str(root / "demo-data" / "digits"), "--output", str(folder), "--steps", "600"]
    assert train_gan.main(arguments) == 0
    return {"generator": str(folder / "generator.pt"), "discriminator": str(folder / "discriminator.pt")}


def generated_batch(generator: str, discriminator: str, index: str) -> dict[str, float]:
    """Median seconds of a generated batch and its predicted densities."""
    from pd_core.core.settings.generate import GeneratorSettings
    from pd_core.density import realset
    from pd_core.density import scorer as density_scorer
    from pd_core.finetune.models import gan
    from pd_core.generators.open import open_generator
    from pd_core.generators.protocol import Conditions

    real = realset.open_realset(index)
    scorer = density_scorer.Scorer(real.extractor, real.predictor(), "cpu", 1)
    opened: Any = open_generator(GeneratorSettings(kind="torchscript", path=generator, latent_shape=(64,)))
    densities, times = gan.predicted(scorer), []
    for batch in range(20):
        start = time.perf_counter()
        densities(opened.generate(list(range(batch * GAN_BATCH, (batch + 1) * GAN_BATCH)), Conditions()))
        times.append(time.perf_counter() - start)
    return {"batch_s": float(np.median(times[3:]))}
