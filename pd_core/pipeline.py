"""The stages of build_index in their order, each committed and tracked: what the workflow file calls."""

from __future__ import annotations

from pd_core import (
    cluster,
    config,
    density,
    features,
    fitting,
    images,
    indexing,
    listing,
    planning,
    reporting,
    search,
    selfjoin,
    sources,
    storage,
    tracking,
)
from pd_core.config import BuildIndexSettings
from pd_core.errors import UserError
from pd_core.running import REPORT, Run, checked_output, failures, flatten

STAGES = ("listing", "features", "index", "neighbors", "densities", "estimator", "report")


def prepare(settings: BuildIndexSettings) -> tuple[BuildIndexSettings, sources.Source]:
    """Check what can be checked without Ray; local paths become absolute, for workers that run elsewhere.

    Raises:
        UserError: no output or one that would be lost, no source, a threshold that is none, or a source that cannot be
            read.
    """
    output = checked_output(settings.output, "build_index")
    for text in settings.report.thresholds:
        density.parse_threshold(text)
    checkpoint = settings.features.checkpoint
    featuring = settings.features.model_copy(
        update={"checkpoint": None if checkpoint is None else storage.absolute(checkpoint)}
    )
    settings = settings.model_copy(update={"output": output, "features": featuring})
    source = sources.open_source(settings.data)
    recursive = not (source.names or source.patterns) or any("**" in pattern for pattern in source.patterns)
    if recursive and storage.is_inside(output, source.root):
        raise UserError(
            f"--output {settings.output}: lies in the source {source.root}, where the next run would take what it wrote "
            "for images; choose an --output outside"
        )
    return settings, source


def build_index(settings: BuildIndexSettings) -> None:
    """Images to committed features, index, densities, predictor and report under `settings.output`."""
    settings, source = prepare(settings)
    cluster.say(config.to_yaml(settings))
    output = str(settings.output)
    watch = storage.Stopwatch()
    tags = {"workflow": "build_index"}
    with (
        cluster.session(output, "build_index") as now,
        tracking.start(settings.tracking, output, "build_index", tags) as tracker,
    ):
        tracker.params(dict(flatten(settings.model_dump(mode="json"))))
        run = Run(settings, output, now, tracker, "build_index", STAGES)
        _build(run, settings, source)
        with failures("run", output):
            run.record(watch.seconds, ("report", "estimator"))
        run.say_done(watch.seconds)
        if tracker.hint:
            cluster.say(f"tracking: {tracker.hint}")
        cluster.say(f"report: {storage.join(output, 'report', REPORT)}")


def plan_build_index(settings: BuildIndexSettings) -> None:
    """Print the resolved settings and the plan; write nothing."""
    settings, source = prepare(settings)
    cluster.say(config.to_yaml(settings))
    with cluster.session(str(settings.output), "build_index") as now:
        cluster.say(planning.plan(settings, source, now, limits_of(settings)))


def _build(run: Run, settings: BuildIndexSettings, source: sources.Source) -> None:
    output, now = run.output, run.now
    describing = features.describe_remotely(settings.features)  # loads the model while the source is listed
    listing_it = listing.start(source, output, settings.features.whole_part_rows, settings.overwrite)
    with failures("features", output):  # first: a mistyped model is known in seconds, a listing may take an hour
        spec: features.ExtractorSpec = cluster.get(describing)
    with run.tracker.stage("listing") as nested, failures("listing", storage.join(output, "listing")):
        listed, artifact = cluster.get(listing_it)
        run.done(listed.uri, artifact, nested)
        nested.dataset("images", source.root, listed.fingerprint, "source", {"rows": listed.rows})
    if settings.density.k >= listed.rows:
        raise UserError(f"--density.k {settings.density.k}: needs more than k images, found {listed.rows}; lower k")

    begun = None if settings.overwrite else storage.begun_identity(storage.join(output, "features"))
    gpus = cluster.gpus_to_ask(now, settings.features.actor_gpus, (begun or {}).get("device"))
    device = cluster.device_of(now, gpus)
    featuring = features.stage_of(output, listed, spec, settings.data, settings.features, device)
    extracting = settings.features.model_copy(update={"actor_gpus": gpus})
    work = features.Work(source, listed, spec, limits_of(settings), settings.features.batch_size, featuring)
    featured = run.stage(featuring, lambda: features.run(work, now, extracting, settings.data.max_bad_fraction))

    indexing_stage, index_settings = indexing.stage_of(output, featured, settings.index, settings.density)
    indexed = run.stage(
        indexing_stage,
        lambda: indexing.run(indexing_stage, featuring.uri, featured, index_settings, settings.density),
    )
    info = search.open_index(indexing_stage.uri)

    neighbors_stage = selfjoin.neighbors_stage(output, info, settings.density)
    neighbors = run.stage(
        neighbors_stage,
        lambda: selfjoin.find_neighbors(
            neighbors_stage, info, featuring.uri, featured, settings.density, index_settings, now
        ),
    )
    densities_stage = selfjoin.stage_of(output, neighbors_stage, settings.density)
    densities = run.stage(
        densities_stage,
        lambda: selfjoin.write_densities(
            densities_stage, neighbors_stage.uri, neighbors, featuring.uri, settings.density
        ),
    )

    fitting_stage = fitting.stage_of(output, densities_stage, settings.estimator)
    fitted = run.stage(
        fitting_stage,
        lambda: fitting.run(
            fitting_stage, featuring.uri, densities_stage.uri, densities, spec.feature_dim, settings.estimator
        ),
    )

    reporting_stage = reporting.stage_of(output, densities_stage, fitting_stage, settings)
    inputs = reporting.Inputs(
        source, listed, limits_of(settings), settings, artifact, featured, indexed, densities, fitted, run.timings_s
    )
    run.stage(reporting_stage, lambda: reporting.run(reporting_stage, output, inputs))


def limits_of(settings: BuildIndexSettings) -> images.DecodeLimits:
    """The decode limits of the settings."""
    data = settings.data
    return images.DecodeLimits(data.max_image_bytes, data.max_image_pixels, data.background)
