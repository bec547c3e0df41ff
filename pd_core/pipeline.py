"""The stages of build_index in their order, each committed and tracked: what the workflow file calls."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

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
from pd_core.errors import RunError, UserError

Made = tuple[Iterable[storage.Part], Mapping[str, Any]]
Make = Callable[[], Made]

RUN = "run.json"
REPORT = "index.html"
STAGES = ("listing", "features", "index", "neighbors", "densities", "estimator", "report")


def prepare(settings: BuildIndexSettings) -> tuple[BuildIndexSettings, sources.Source]:
    """Check what can be checked without Ray; local paths become absolute, for workers that run elsewhere.

    Raises:
        UserError: no output or one that would be lost, no source, a threshold that is none, or a source that cannot be
            read.
    """
    if not settings.output:
        raise UserError("--output: not set; name the directory or s3:// prefix for the artifacts")
    if set(settings.output) & set("*?[]"):
        raise UserError(
            f"--output {settings.output}: must hold none of * ? [ ], which stores take for patterns; rename it"
        )
    if cluster.in_job_copy() and storage.is_local(settings.output) and not os.path.isabs(settings.output):
        raise UserError(
            f"--output {settings.output}: would lie in this job's temporary copy of the working directory, which Ray "
            "deletes; give an absolute path or an s3:// prefix"
        )
    for text in settings.report.thresholds:
        density.parse_threshold(text)
    checkpoint = settings.features.checkpoint
    featuring = settings.features.model_copy(
        update={"checkpoint": None if checkpoint is None else storage.absolute(checkpoint)}
    )
    settings = settings.model_copy(update={"output": storage.absolute(settings.output), "features": featuring})
    source = sources.open_source(settings.data)
    recursive = not (source.names or source.patterns) or any("**" in pattern for pattern in source.patterns)
    if recursive and storage.is_inside(str(settings.output), source.root):
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
    with cluster.session(output) as now, tracking.start(settings.tracking, output, "build_index", tags) as tracker:
        tracker.params(dict(flatten(settings.model_dump(mode="json"))))
        run = Run(settings, output, now, tracker)
        _build(run, source)
        with failures("run", output):
            run.record(watch.seconds)
        cluster.say(f"done in {watch.seconds:.0f} s: {output}")
        if tracker.hint:
            cluster.say(f"tracking: {tracker.hint}")
        cluster.say(f"report: {storage.join(output, 'report', REPORT)}")


def plan_build_index(settings: BuildIndexSettings) -> None:
    """Print the resolved settings and the plan; write nothing."""
    settings, source = prepare(settings)
    cluster.say(config.to_yaml(settings))
    with cluster.session(str(settings.output)) as now:
        cluster.say(planning.plan(settings, source, now, limits_of(settings)))


@dataclass
class Run:
    """One run of the workflow: what every stage needs, and the commit records so far."""

    settings: BuildIndexSettings
    output: str
    now: cluster.Cluster
    tracker: tracking.Tracker
    artifacts: dict[str, storage.Artifact] = field(default_factory=dict)

    def stage(self, stage: storage.Stage, make: Make) -> storage.Artifact:
        """Complete a stage inside a tracked run of its own."""
        with self.tracker.stage(stage.kind) as nested, failures(stage.kind, stage.uri):
            artifact = stage.complete(lambda: self._make(stage.kind, make), self.settings.overwrite)
            self.done(stage.uri, artifact, nested)
        return artifact

    def _make(self, kind: str, make: Make) -> Made:
        """What was made of an older state of this stage is finished no more; then make the stage."""
        for later in STAGES[STAGES.index(kind) + 1 :]:
            storage.delete_file(storage.join(self.output, later, storage.ARTIFACT))
        storage.delete_file(storage.join(self.output, RUN))
        return make()

    def done(self, uri: str, artifact: storage.Artifact, nested: tracking.Tracker) -> None:
        """Remember and track a finished stage."""
        self.artifacts[artifact.kind] = artifact
        numbers = {n: v for n, v in flatten(artifact.totals) if isinstance(v, int | float) and not isinstance(v, bool)}
        nested.metrics(numbers | {f"{name}_s": value for name, value in artifact.timings_s.items()})
        nested.dataset(artifact.kind, uri, artifact.fingerprint, "output", {"rows": artifact.rows})

    @property
    def timings_s(self) -> dict[str, float]:
        """Seconds that each stage took when it was made."""
        return {name: value for artifact in self.artifacts.values() for name, value in artifact.timings_s.items()}

    def record(self, elapsed_s: float) -> None:
        """Write run.json and log what the whole run made."""
        values = {
            "workflow": "build_index",
            "settings": self.settings.model_dump(mode="json"),
            "stages": {name: artifact.fingerprint for name, artifact in self.artifacts.items()},
            "timings_s": self.timings_s,
            "elapsed_s": round(elapsed_s, 3),
            "versions": storage.package_versions(),
        }
        storage.write_bytes(storage.join(self.output, RUN), json.dumps(values, indent=1).encode())
        self.tracker.metrics({"elapsed_s": elapsed_s})
        for stage in ("report", "estimator"):
            for part in self.artifacts[stage].parts:
                uri = storage.join(self.output, stage, part.name)
                self.tracker.artifact_bytes(f"{stage}/{part.name}", storage.read_bytes(uri))


def _build(run: Run, source: sources.Source) -> None:
    settings, output, now = run.settings, run.output, run.now
    describing = features.describe_remotely(settings.features)  # loads the model while the source is listed
    listing_it = listing.start(source, output, settings.part_rows, settings.overwrite)
    with failures("features", output):  # first: a mistyped model is known in seconds, a listing may take an hour
        spec: features.ExtractorSpec = cluster.get(describing)
    with run.tracker.stage("listing") as nested, failures("listing", storage.join(output, "listing")):
        listed, artifact = cluster.get(listing_it)
        run.done(listed.uri, artifact, nested)
        nested.dataset("images", source.root, listed.fingerprint, "source", {"rows": listed.rows})
    if settings.density.k >= listed.rows:
        raise UserError(f"--density.k {settings.density.k}: needs more than k images, found {listed.rows}; lower k")

    featuring = features.stage_of(output, listed, spec, settings.data, settings.features)
    work = features.Work(source, listed, spec, limits_of(settings), settings.features.batch_size, featuring)
    featured = run.stage(featuring, lambda: features.run(work, now, settings.features, settings.data.max_bad_fraction))

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


@contextmanager
def failures(stage: str, uri: str) -> Iterator[None]:
    """Turn what storage and cluster raise inside a stage into one line with the next step."""
    import ray

    try:
        yield
    except ray.exceptions.RayError as error:
        cluster.raise_cause(error)
        cause = getattr(error, "cause", None)
        if storage.is_failure(cause):
            raise storage.explain(cause, uri) from error
        if isinstance(error, ray.exceptions.RayTaskError):
            raise  # a defect of this program keeps its traceback
        line = " ".join(str(error).split())[:200]
        raise RunError(
            f"{stage}: {type(error).__name__}: {line}; what is done is kept, run the same command again"
        ) from error
    except Exception as error:
        if storage.is_failure(error):
            raise storage.explain(error, uri) from error
        raise


def limits_of(settings: BuildIndexSettings) -> images.DecodeLimits:
    """The decode limits of the settings."""
    data = settings.data
    return images.DecodeLimits(data.max_image_bytes, data.max_image_pixels, data.background)


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and leaves of nested settings or totals."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
