"""The stages of finetune in their order: weights, training, merging, the best model, report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

from pd_core.core import artifacts, files, schemas
from pd_core.core.errors import UserError
from pd_core.core.settings import load
from pd_core.core.settings.finetune import FinetuneSettings, ResolvedFinetune
from pd_core.core.settings.generate import WeightingSettings
from pd_core.density import originals, realset
from pd_core.density import weighting as density_weighting
from pd_core.density.realset import RealSet
from pd_core.density.weighting import Weighting
from pd_core.engine import console, resources, tasks
from pd_core.engine.runs import REPORT, Run, checked_output, execute, failures, required, started
from pd_core.evaluate import spaces
from pd_core.evaluate.measure import measuring_cpus
from pd_core.finetune import best as finetune_best
from pd_core.finetune import judge, loop, report, stream, training, weights
from pd_core.finetune import merge as finetune_merge
from pd_core.finetune.models import opened
from pd_core.generate import setup
from pd_core.index import features

STAGES = ("weights", "training", "merging", "best", "report")
EVALUATION_STREAM = "finetune/evaluation"


def prepare(settings: FinetuneSettings) -> tuple[ResolvedFinetune, RealSet]:
    """Check what can be checked without Ray; local paths become absolute.

    Raises:
        UserError: a setting that every run needs is missing or does not fit another, a path that must be there is not,
            the index is not finished, or a threshold lies outside its densities.
    """
    output = checked_output(settings.output, "finetune")
    index = required(settings.index, "index", "name the --output of build_index.py")
    generator = setup.resolved(settings.generator)
    weights.check_settings(settings.weighting, "labels")
    _check_numbers(settings)
    _check_kind(settings)
    real = realset.open_for(index, settings.checkpoint, "--index")
    checked = load.resolved(
        ResolvedFinetune,
        settings,
        output=output,
        index=real.uri,
        checkpoint=settings.checkpoint and files.absolute(settings.checkpoint),
        generator=generator,
        evaluation=settings.evaluation.model_copy(update={"metric": _metric(settings)}),
        discriminator=settings.discriminator and files.absolute(settings.discriminator),
    )
    if not settings.weighting.per_label:
        density_weighting.resolve(settings.weighting, real.density_quantiles)
    fake_weighting(checked, real)
    return checked, real


def _metric(settings: FinetuneSettings) -> str:
    """By which the best step is chosen: the one that the weights are to move, unless another is asked for."""
    weight = settings.weighting.weight
    if settings.evaluation.metric != "auto":
        return settings.evaluation.metric
    if settings.weighting.kind != "two_level" or weight is None or weight == 1:
        return "frechet_distance"
    return "precision" if weight > 1 else "recall"


def _check_numbers(settings: FinetuneSettings) -> None:
    judged = settings.evaluation
    stream.check_share(settings.training.batch_size, settings.workers)
    least = max(judged.metrics.k_precision, judged.metrics.k_coverage) + 1
    for name, rows in (("--evaluation.n", judged.n), ("--evaluation.n_real", judged.n_real)):
        if rows < least:
            raise UserError(
                f"{name} {rows}: too few images for k = {least - 1}; raise it to {least} or more, or lower k"
            )
    if settings.images > min(judged.n, judged.chunk):
        raise UserError(
            f"--images {settings.images}: the report shows images of an evaluation's first batch, "
            f"{min(judged.n, judged.chunk)}; lower it, or raise --evaluation.chunk"
        )


def _check_kind(settings: FinetuneSettings) -> None:
    """What has no meaning for the kind of generator."""
    kind, fake, training_ = settings.generator.kind, settings.fake, settings.training
    if kind == "diffusers":
        if fake != type(fake)():
            raise UserError("--fake: a diffusion model trains on real images alone; drop it")
        for name in ("r1_weight", "r1_interval"):
            if getattr(training_, name) != type(training_).model_fields[name].get_default():
                raise UserError(f"--training.{name}: is of GANs; drop it for --generator.kind diffusers")
        if settings.discriminator is not None:
            raise UserError("--discriminator: has no meaning for --generator.kind diffusers; drop it")
        return
    for name in ("precision", "gradient_checkpointing", "min_snr", "clip"):
        if getattr(training_, name) != type(training_).model_fields[name].get_default():
            raise UserError(f"--training.{name}: is of diffusion models; drop it for --generator.kind {kind}")
    if settings.discriminator is not None and kind != "torchscript":
        raise UserError(f"--discriminator: a generator of kind {kind} brings its own; drop it")
    if kind == "torchscript" and settings.discriminator is None:
        raise UserError(
            "--discriminator: not set; a TorchScript generator is fine-tuned against one, name its file "
            "(demo/train_gan.py writes both)"
        )
    if settings.weighting.per_label:
        raise UserError(
            "--weighting.per_label: a GAN's generated images have one threshold for all labels; leave it out"
        )
    given, weighting = {fake.threshold is not None, fake.weight is not None}, settings.weighting.kind
    if (weighting == "none" and len(given) > 1) or (weighting == "quantiles" and False in given):
        raise UserError(
            f"--fake.threshold and --fake.weight: how generated images are drawn does not follow from --weighting.kind "
            f"{weighting}; set both (--fake.weight 1: all of them)"
        )


def fake_weighting(settings: FinetuneSettings, real: RealSet) -> Weighting | None:
    """ω of generated images (Algorithm 3): 1/w above the threshold of the real ones, unless `fake` says otherwise.

    None: all of them are taken.

    Raises:
        UserError: the threshold lies outside the real densities.
    """
    fake, weighting = settings.fake, settings.weighting
    if settings.generator.kind == "diffusers":
        return None
    if weighting.kind == "two_level":
        assert weighting.weight is not None, "check_settings refuses none"
        threshold = fake.threshold or weighting.threshold
        weight = fake.weight if fake.weight is not None else 1 / weighting.weight
    elif fake.threshold is None or fake.weight is None:
        return None
    else:
        threshold, weight = fake.threshold, fake.weight
    if weight == 1:
        return None
    asked = WeightingSettings(threshold=threshold, weight=weight)
    return density_weighting.resolve(asked, real.density_quantiles, option="--fake.threshold")


def finetune(settings: FinetuneSettings) -> None:
    """Train a generator on weighted images; the best model is in `best/` under `checked.output`."""
    checked, real = prepare(settings)

    def body(run: Run) -> None:
        planned = _plan(run, checked, real)
        run.say(planned.text)
        inputs = _finetune(run, planned)
        page = files.join(run.output, "report", REPORT)
        run.finish(("report",), {"images of it": report.command(inputs), "report": page})

    images = [] if checked.data.source else [originals.source_of(real.uri, option="--data.source").root]
    execute(checked, "finetune", STAGES, body, images)


def plan_finetune(settings: FinetuneSettings) -> None:
    """Open the model, time a step of it on images of noise, print what is to be expected, and stop; writes nothing."""
    checked, real = prepare(settings)
    with started(checked, "finetune", tracked=False) as run:
        planned = _plan(run, checked, real)
        console.say(planned.text)
        with failures("training", run.output):
            found = _on_worker(
                opened.probe, planned.workers, planned.spec, checked.training.batch_size // checked.workers
            )
        console.say(
            f"time: {found['step_s']:.3g} s a step, {checked.steps * found['step_s']:.0f} s in all, beside evaluations "
            f"and starting up\nmemory: a step took a process to {found['peak_bytes'] / 2**30:.2g} GiB; lower "
            "--training.batch_size, or raise --training.accumulate, where that is too much"
        )


@dataclass(frozen=True)
class Planned:
    """What is trained, before any image is looked at.

    Attributes:
        settings: of the workflow. real: the real set. spec: how the model is opened. facts: of `models.describe`.
        workers: on what. device: cpu or cuda. text: for the console.
    """

    settings: FinetuneSettings
    real: RealSet
    spec: opened.ModelSpec
    facts: Mapping[str, Any]
    workers: training.Workers
    device: str
    text: str


def _plan(run: Run, settings: FinetuneSettings, real: RealSet) -> Planned:
    with failures("training", run.output):
        begun = None if settings.overwrite else artifacts.begun_identity(files.join(run.output, "training"))
    gpus = resources.gpus_to_ask(run.now, settings.worker_gpus, (begun or {}).get("device"))
    workers = training.workers_of(run.now, settings.workers, settings.worker_cpus, gpus)
    spec = opened.ModelSpec(
        generator=settings.generator,
        discriminator=settings.discriminator,
        training=settings.training,
        fake=fake_weighting(settings, real),
        sampling=settings.fake,
        classes={},
        real=real,
        seed=settings.seed,
    )
    with failures("generator", str(settings.generator.path)):
        facts = _on_worker(opened.describe, workers, spec)
    spec = replace(spec, classes=facts["classes"])
    device = resources.device_of(run.now, gpus)
    text = (
        f"training: {settings.steps} steps of {settings.training.batch_size} images on {workers.count} "
        f"{'worker' if workers.count == 1 else 'workers'} ({device}); {facts['parameters']:,} parameters are trained, "
        f"images of {facts['size'][1]}x{facts['size'][0]} px\n"
        f"evaluation: {settings.evaluation.n} images every {settings.evaluation.every} steps and at the first "
        f"and last, best by {settings.evaluation.metric}"
    )
    if spec.fake is not None:
        (tau,), (_, weight) = spec.fake.edges, spec.fake.weights
        text += f"\ngenerated images: drawn with weight {weight:.4g} where their density is above {tau:.4g}"
    if facts["came_averaged"] and settings.steps * (1 - settings.training.ema_decay) < 1:
        text += (
            f"\naverage: {settings.training.ema_decay**settings.steps:.0%} of it will still be the average that came; "
            "lower --training.ema_decay to see more of what is trained"
        )
    return Planned(settings, real, spec, facts, workers, device, text)


def _on_worker(function: Any, workers: training.Workers, *arguments: Any) -> Any:
    """What the function gives in a Ray task with what a worker has: what fits one fits this."""
    return tasks.get(tasks.task(function, workers.cpus, workers.gpus).remote(*arguments))


def _finetune(run: Run, planned: Planned) -> report.Inputs:
    settings, real, spec, output = planned.settings, planned.real, planned.spec, run.output
    job = _job(run, planned, _weights(run, planned))
    featured = spaces.features_of(*_finished_features(real))

    def train() -> tuple[list[artifacts.Part], dict[str, Any]]:
        reference = _reference(run, settings, featured)
        parts, totals = training.run(job, run.now, planned.workers, reference, run.tracker)
        weighed = {name: value for name, value in run.artifacts["weights"].totals.items() if name != "part_weights"}
        return parts, totals | {"weights": weighed, "settings": settings.model_dump(mode="json")}

    trained = run.stage(job.stage, train)
    step = trained.totals["best"]
    came = ", the generator as it came: no later one was better" if step == 0 else ""
    run.say(f"best: step {step} by {settings.evaluation.metric}, {trained.totals['best_value']:.4g}{came}")
    merged = _merge(run, planned, job, trained, featured) if settings.merge == "best-of" else None
    best = finetune_best.stage_of(output, trained, merged)
    run.stage(best, lambda: finetune_best.run(best, output, spec, trained), replace=True)
    inputs = report.Inputs(
        training=job.stage.uri,
        trained=trained,
        merging=None if merged is None else (files.join(output, "merging"), merged),
        settings=settings,
        result=finetune_best.result_of(settings.generator, best.uri),
        extractor=real.extractor.model,
        timings_s=dict(run.timings_s),
    )
    reporting = report.stage_of(output, trained, merged)
    run.stage(reporting, lambda: report.run(reporting, inputs), replace=True)
    return inputs


def _weights(run: Run, planned: Planned) -> weights.Drawable:
    height, width = planned.facts["size"]
    work = weights.work_of(run, planned.settings, planned.real, planned.spec.classes, (height, width))
    artifact = run.stage(work.stage, lambda: weights.run(work))
    run.say(*weights.summary(work, artifact))
    return weights.opened(work, artifact, planned.settings.seed)


def _job(run: Run, planned: Planned, drawable: weights.Drawable) -> loop.Job:
    settings, real, spec = planned.settings, planned.real, planned.spec
    judged = settings.evaluation
    plan = judge.Plan(
        spec=real.extractor,
        seed=settings.seed,
        stream=EVALUATION_STREAM,
        n=judged.n,
        chunk=judged.chunk,
        classes=spec.classes,
        name=f"--generator.path {settings.generator.path}",
    )
    identity = {
        "generator": planned.facts["identity"],
        "settings": settings.generator.model_dump(mode="json", exclude={"path", "code", "prompts", "allow_pickle"}),
        "discriminator": planned.facts["discriminator"],
        "training": settings.training.model_dump(mode="json"),
        "fake": None if spec.fake is None else spec.fake.to_json(),
        "fake_candidates": None if spec.fake is None else settings.fake.max_candidates,
        "decode": features.decoding(drawable.pictures.source.settings),
        "classes": dict(spec.classes),
        "weights": run.artifacts["weights"].fingerprint,
        "realset": dict(real.fingerprints),
        "evaluation": judged.model_dump(mode="json"),
        "images": settings.images,
        "steps": settings.steps,
        "seed": settings.seed,
        "device": planned.device,
        "threads": settings.worker_cpus,
        "torch": version("torch"),
    }
    stage = artifacts.Stage(files.join(run.output, "training"), "training", schemas.VERSIONS["training"], identity)
    held = planned.workers.count * planned.workers.cpus
    now = resources.refreshed(run.now)
    feed = stream.feed_of(replace(now, held_cpus=now.held_cpus + held), planned.workers.count)
    return loop.Job(spec, drawable, feed, plan, stage, settings)


def _finished_features(real: RealSet) -> tuple[str, artifacts.Artifact]:
    folder = files.join(real.uri, "features")
    with files.explained(folder):
        artifact = artifacts.load_artifact(folder)
    assert artifact is not None, "open_realset refuses an index without features"
    return folder, artifact


def _reference(run: Run, settings: FinetuneSettings, featured: spaces.Features) -> Any:
    """Reference to the real side of all evaluations, in Ray's object store."""
    cpus = measuring_cpus(run.now)
    task = tasks.task(judge.prepare, cpus)
    reference = task.remote(featured, settings.evaluation.n_real, settings.evaluation.metrics, cpus)
    tasks.get(reference)  # too few real images are told before anything is trained
    return reference


def _merge(
    run: Run, planned: Planned, job: loop.Job, trained: artifacts.Artifact, featured: spaces.Features
) -> artifacts.Artifact:
    merge = finetune_merge.job_of(run.output, job, trained, planned.device)

    def make() -> tuple[list[artifacts.Part], dict[str, Any]]:
        reference = _reference(run, planned.settings, featured)
        return finetune_merge.run(merge, run.now, reference, planned.workers.gpus or None)

    merged = run.stage(merge.stage, make)
    totals, metric, step = merged.totals, merged.totals["metric"], trained.totals["best"]
    one, other = (totals[which][metric]["value"] for which in ("merged", "single"))
    verdict, kept = ("beats", "the combination") if totals["beats"] else ("does not beat", f"step {step}")
    run.say(
        f"merging: the combination {verdict} step {step} on fresh seeds ({metric} {one:.4g}, {other:.4g}); best/ holds "
        f"{kept}"
    )
    return merged
