"""The stages of perturb in their order: perturbed images, report; what workflows/perturb.py calls."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pd_core.core import artifacts, files
from pd_core.core.errors import UserError
from pd_core.core.settings import load
from pd_core.core.settings.generate import GeneratorSettings, PerturbSettings, ResolvedPerturb
from pd_core.density import realset
from pd_core.density.realset import RealSet
from pd_core.engine import console, tasks
from pd_core.engine import resources as engine_resources
from pd_core.engine.runs import REPORT, Run, checked_output, execute, failures, required, started
from pd_core.generate import setup
from pd_core.generate.chunks import Pool
from pd_core.index import search
from pd_core.perturb import algorithm, report
from pd_core.perturb import stage as perturb_stage

STAGES = ("perturbed", "report")


def prepare(settings: PerturbSettings) -> tuple[ResolvedPerturb, RealSet]:
    """Check what can be checked without Ray; local paths become absolute.

    Raises:
        UserError: a setting that every run needs is missing, a path that must be there is not, or the index is not
            finished.
    """
    output = checked_output(settings.output, "perturb")
    index = required(settings.index, "index", "name the --output of build_index.py")
    n = required(settings.n, "n", "how many samples are to be perturbed")
    real = realset.open_for(index, settings.checkpoint, "--index")
    checked = load.resolved(
        ResolvedPerturb,
        settings,
        output=output,
        index=real.uri,
        n=n,
        checkpoint=settings.checkpoint and files.absolute(settings.checkpoint),
        generator=setup.resolved(settings.generator),
    )
    return checked, real


def perturb(settings: PerturbSettings) -> None:
    """Perturbed images beside their originals, in `perturbed/` under `settings.output`."""
    checked, real = prepare(settings)

    def body(run: Run) -> None:
        planned = _plan(run, checked, real)
        run.say(planned.text)
        _perturb(run, checked, planned)
        images, page = files.join(run.output, "perturbed", "*.parquet"), files.join(run.output, "report", REPORT)
        run.finish(("report",), {"images": images, "report": page})

    execute(checked, "perturb", STAGES, body)


def plan_perturb(settings: PerturbSettings) -> None:
    """Measure a few steps of the first chunk, print what is to be expected, and stop; writes nothing."""
    checked, real = prepare(settings)
    with started(checked, "perturb", tracked=False) as run:
        planned = _plan(run, checked, real)
        console.say(planned.text)
        with failures("perturbed", run.output):
            found = _probe(planned, run.now)
        console.say(_cost(planned, found, run.now))


@dataclass(frozen=True)
class Planned:
    """What is to be made, and by whom."""

    job: perturb_stage.Job
    pool: Pool
    text: str


def _plan(run: Run, settings: ResolvedPerturb, real: RealSet) -> Planned:
    stage_uri = files.join(run.output, "perturbed")
    gpus = run.gpus_to_ask(settings.actor_gpus, stage_uri)
    pool = Pool(settings.actors, settings.actor_cpus, gpus)
    facts = setup.describe(settings.generator, run.now, pool)
    _check_latents(settings.generator, facts)
    job = job_of(settings, real, facts, engine_resources.device_of(run.now, gpus), stage_uri)
    return Planned(job, pool, _text(job))


def job_of(
    settings: ResolvedPerturb, real: RealSet, facts: Mapping[str, Any], device: str, uri: str
) -> perturb_stage.Job:
    """The stage at `uri`; facts: of the generator, from `setup.describe`."""
    recipe = setup.origin_of(
        settings.generator,
        facts,
        real,
        seed=settings.seed,
        chunk=settings.chunk,
        threads=settings.actor_cpus,
        device=device,
        copies_quantile=settings.copies_quantile,
    )
    step_size = settings.step_size or algorithm.default_step_size(settings.epsilon)
    move = perturb_stage.Move(settings.directions, settings.epsilon, step_size, settings.steps, settings.random_start)
    per_part = -(-settings.part_rows // (settings.chunk * len(move.directions)))
    stage = perturb_stage.stage_of(uri, recipe, move, per_part, settings.n)
    return perturb_stage.Job(recipe, move, stage, per_part, settings.n)


def _check_latents(settings: GeneratorSettings, facts: Mapping[str, Any]) -> None:
    """Raise UserError where the images are no differentiable function of latents, with what would make them one."""
    if facts["latents"]:
        return
    name = f"--generator.path {settings.path}"
    if facts["adapter"] == "Diffusion":
        raise UserError(
            f"{name}: its scheduler draws noise between the steps, so that an image is no function of one latent; add "
            "--generator.scheduler DDIMScheduler with few --generator.steps, such as 10 (and no --generator.eta)"
        )
    if settings.kind == "diffusers":
        raise UserError(
            f"{name}: this pipeline runs in a loop of its own, which gives no gradients; perturb takes U-Net and DiT "
            "pipelines, or a --generator.kind python with latents() and decode()"
        )
    raise UserError(f"{name}: offers no latents; add latents() and decode() to it (docs/generators.md)")


def _perturb(run: Run, settings: PerturbSettings, planned: Planned) -> None:
    job = planned.job

    def make() -> tuple[list[artifacts.Part], dict[str, Any]]:
        searching, now = settings.search, engine_resources.refreshed(run.now)
        with contextlib.ExitStack() as resources:
            pool = search.open_pool(
                job.recipe.realset.index, now, searching.actors, searching.actor_cpus, True, "perturbed"
            )
            parts, totals = perturb_stage.run(job, run.now, planned.pool, resources.enter_context(pool))
        extractor = job.recipe.realset.extractor.identity()
        return parts, totals | {"settings": settings.model_dump(mode="json"), "extractor": extractor}

    perturbed = run.stage(job.stage, make)
    for way in job.move.directions:
        run.say(f"{way}: {_summary(perturbed.totals[way])}")
    report.make(run, report.Inputs(job, perturbed, settings, run.timings_s))


def _summary(totals: Mapping[str, Any]) -> str:
    share = totals["predicted_share"]
    claim = "says nothing, since its densities underflow to 0" if share is None else f"says {100 * share:.3g}%"
    return (
        f"{totals['confirmed']} of {totals['rows']} images ({100 * totals['confirmed_share']:.3g}%, 95%: "
        f"{100 * totals['confirmed_low']:.3g}% ... {100 * totals['confirmed_high']:.3g}%) confirmed by the index; "
        f"the predictor {claim}"
    )


# ---- the plan --------------------------------------------------------------------------------------------------------


def _text(job: perturb_stage.Job) -> str:
    ways, move = job.move.directions, job.move
    surplus = job.chunks * job.recipe.chunk - job.n
    cut = f"; {surplus} more are made to fill the last and cut" if surplus else ""
    return (
        f"perturbed: {job.n} samples {' and '.join(ways)}, {job.n * len(ways)} images, in {job.chunks} chunks of "
        f"{job.recipe.chunk} and {job.parts} parts{cut}\n"
        f"box: epsilon {move.epsilon:g}, {move.steps} steps of {move.step_size:g}"
        f"{', from a random start' if move.random_start else ''}"
    )


def _probe(planned: Planned, now: engine_resources.Cluster) -> perturb_stage.Probe:
    pool = planned.pool
    _, _, cpus, gpus = engine_resources.actor_pool(now, pool.actors, pool.actor_cpus, pool.actor_gpus)
    return tasks.get(tasks.task(perturb_stage.probe, cpus, gpus).remote(planned.job))


def _cost(planned: Planned, found: perturb_stage.Probe, now: engine_resources.Cluster) -> str:
    job, pool = planned.job, planned.pool
    passes = len(job.move.directions) * (job.move.steps + 1 / 3 + job.move.random_start / 3)
    chunk_s = found.step_s * passes
    _, most, _, _ = engine_resources.actor_pool(now, pool.actors, pool.actor_cpus, pool.actor_gpus, job.chunks)
    actors = max(1, min(most, engine_resources.actors_that_fit(now, pool.actor_cpus, pool.actor_gpus)))
    total_s = -(-job.chunks // actors) * chunk_s
    where = "of GPU memory" if found.device != "cpu" else "of memory"
    return (
        f"time: {found.step_s:.3g} s a step of one chunk, {chunk_s / job.recipe.chunk:.3g} s a sample; about "
        f"{total_s:.0f} s with {actors} {'actor' if actors == 1 else 'actors'}, beside starting up\n"
        f"memory: a step of one chunk took a process to {found.peak_bytes / 2**30:.2g} GiB {where}; lower --chunk "
        "where that is too much (other chunks, other rows: it is part of their identity)"
    )
