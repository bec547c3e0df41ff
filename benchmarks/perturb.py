"""Algorithm 1 as the workflow runs it against the authors' loop: a forward and a backward pass a step, nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import process, table
from pd_core.core import artifacts, files, seeds
from pd_core.core.settings.base import TrackingSettings
from pd_core.core.settings.generate import GeneratorSettings, ResolvedPerturb
from pd_core.density import realset
from pd_core.density import scorer as density_scorer
from pd_core.generate import setup
from pd_core.generators import protocol
from pd_core.generators.open import open_generator
from pd_core.perturb import workflow as perturb_workflow

CHUNK, STEPS, EPSILON = 8, 10, 0.1
DENOISING_STEPS = 10

TEXT = f"""\
The demo's generator (a DDPM of 8 px digits, DDIM at {DENOISING_STEPS} steps, each network call a checkpoint) and its
index (EfficientNet-lite0 at 64 px). T = {STEPS}, epsilon = {EPSILON:g}, chunks of {CHUNK}, one direction, 1 thread.
Bare loop: latents moved along the sign of the gradient T times, one forward and backward pass each, on the same models
and batches; it looks at no score, keeps no best iterate and saves no image. Ours, in the same process and in turn with
it: what an actor does with a chunk, from latents to images, features and predicted densities before and after. The
workflow: median over the chunks of one actor of `perturb.py`, beside search, encoding and writing in other
processes."""


def measure(quick: bool) -> table.Section:
    """Seconds a sample of both sides, and of an actor of the workflow."""
    section = table.Section("Perturb", TEXT)
    made = process.call("benchmarks.generate.prepare", {"cache": str(process.CACHE), "work": str(process.WORK)}).value
    rounds = 2 if quick else 12
    loops = process.call("benchmarks.perturb.in_turn", {**made, "rounds": rounds}, threads=1).value
    output = str(process.WORK / "perturbed")
    actor = process.call("benchmarks.perturb.workflow", {**made, "output": output, "n": rounds * CHUNK}).value
    ratio = loops["ours_s"] / loops["bare_s"]
    section.claims += [
        table.at_most("a chunk on its actor over the bare loop, seconds", ratio, 1.10),
        table.reported("an actor of the workflow over the bare loop, seconds", actor["sample_s"] / loops["bare_s"]),
    ]
    shown = table.Table("One sample, T = 10", ["side", "s"])
    shown.rows += [["bare loop", loops["bare_s"]], ["ours", loops["ours_s"]], ["workflow", actor["sample_s"]]]
    section.tables.append(shown)
    section.raw += [loops, actor]
    return section


def _settings(index: str, generator: str, output: str, n: int) -> ResolvedPerturb:
    return ResolvedPerturb(
        index=index,
        output=output,
        generator=GeneratorSettings(path=generator, scheduler="DDIMScheduler", steps=DENOISING_STEPS),
        n=n,
        chunk=CHUNK,
        actors=1,
        epsilon=EPSILON,
        steps=STEPS,
        tracking=TrackingSettings(enabled=False),
    )


# ---- the sides, each in a process of its own -------------------------------------------------------------------------


def in_turn(index: str, generator: str, rounds: int) -> dict[str, float]:
    """Median seconds a sample of the bare loop and of ours, in turn on other chunks; the first of each is not timed."""
    settings, real = _settings(index, generator, "unused", rounds * CHUNK + CHUNK), realset.open_realset(index)
    opened = open_generator(settings.generator)
    job = perturb_workflow.job_of(settings, real, setup.facts_of(opened), "cpu", "unused")
    maker = job.open("cpu")
    times: dict[str, list[float]] = {"bare": [], "ours": []}
    for chunk in range(rounds + 1):
        for side, run in (("bare", lambda c: _bare(opened, maker.scorer, c)), ("ours", lambda c: job.make(maker, c))):
            watch = artifacts.Stopwatch()
            run(chunk)
            times[side].append(watch.seconds)
    return {f"{side}_s": float(np.median(seconds[1:])) / CHUNK for side, seconds in times.items()}


def _bare(generator: Any, scorer: density_scorer.Scorer, chunk: int) -> None:
    import torch

    numbers = np.arange(chunk * CHUNK, (chunk + 1) * CHUNK)
    latents = generator.latents(seeds.integers(numbers, seeds.stream(0, "image")).tolist())
    delta = torch.zeros_like(latents, requires_grad=True)
    for _ in range(STEPS):
        value = scorer.score(generator.decode(latents + delta, protocol.Conditions()))
        (gradient,) = torch.autograd.grad(value.sum(), delta)
        with torch.no_grad():
            delta = (delta + EPSILON / 4 * gradient.sign()).clamp(-EPSILON, EPSILON)
        delta.requires_grad_()


def workflow(index: str, generator: str, output: str, n: int) -> dict[str, float]:
    """The whole of it; seconds of its actor."""
    perturb_workflow.perturb(_settings(index, generator, output, n))
    totals = json.loads(Path(output, "perturbed", files.ARTIFACT).read_text())["totals"]
    return {"sample_s": totals["actor_s_per_image"], "confirmed_share": totals["up"]["confirmed_share"]}
