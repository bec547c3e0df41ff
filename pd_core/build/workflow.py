"""The stages of build_index in their order, each committed and tracked: what the workflow file calls."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pd_core.build import plan, report, update
from pd_core.core import artifacts, files
from pd_core.core.errors import UserError
from pd_core.core.settings import load
from pd_core.core.settings.index import BuildIndexSettings, ResolvedBuildIndex
from pd_core.density import densities as density_densities
from pd_core.density import estimator, formula
from pd_core.engine import console, resources, tasks
from pd_core.engine.runs import REPORT, Run, checked_output, execute, failures, started
from pd_core.images import decode, listing, sources
from pd_core.index import build, extractor, features, search
from pd_core.index import neighbors as index_neighbors

STAGES = ("listing", "added/features", "features", "index", "neighbors", "densities", "estimator", "report")


def folders_of(record: Mapping[str, Any], stages: Sequence[str] = STAGES) -> list[str]:
    """Folders of those of these stages that a finished run has, by its run.json, and of what was made beside them."""
    beside = {"features": "quarantine", "added/features": "added/quarantine"}
    if record["settings"].get("base"):
        beside["listing"] = "added/listing"
    made = [stage for stage in stages if stage in record["stages"]]
    return [*made, *(beside[stage] for stage in made if stage in beside)]


def prepare(settings: BuildIndexSettings) -> tuple[ResolvedBuildIndex, sources.Source]:
    """Check what can be checked without Ray; local paths become absolute, for workers that run elsewhere.

    Raises:
        UserError: no output or one that would be lost, no source, a threshold that is none, or a source that cannot be
            read.
    """
    output = checked_output(settings.output, "build_index")
    for text in settings.report.thresholds:
        formula.parse_threshold(text)
    checkpoint = settings.features.checkpoint
    featuring = settings.features.model_copy(
        update={"checkpoint": None if checkpoint is None else files.absolute(checkpoint)}
    )
    base = settings.base and files.absolute(settings.base)
    if base == output:
        raise UserError(f"--base {settings.base}: is the --output itself; an update is an output of its own")
    checked = load.resolved(ResolvedBuildIndex, settings, output=output, features=featuring, base=base)
    source = sources.open_source(settings.data)
    recursive = not (source.names or source.patterns) or any("**" in pattern for pattern in source.patterns)
    if recursive and files.is_inside(output, source.root):
        raise UserError(
            f"--output {settings.output}: lies in the source {source.root}, where the next run would take what it "
            "wrote for images; choose an --output outside"
        )
    return checked, source


def build_index(settings: BuildIndexSettings) -> None:
    """Images to committed features, index, densities, predictor and report under `settings.output`."""
    checked, source = prepare(settings)
    base = None if checked.base is None else update.open_base(checked.base)

    def body(run: Run) -> None:
        _build(run, checked, source, base)
        run.finish(("report", "estimator"), {"report": files.join(run.output, "report", REPORT)})

    execute(checked, "build_index", STAGES, body)


def plan_build_index(settings: BuildIndexSettings) -> None:
    """Print the resolved settings and the plan; write nothing."""
    checked, source = prepare(settings)
    base = None if checked.base is None else update.open_base(checked.base)
    with started(checked, "build_index", tracked=False) as run:
        console.say(plan.plan(checked, source, run.now, decode.limits_of(settings.data), base))


@dataclass(frozen=True)
class _Featured:
    """What the stages after features/ start from. base, changes, added: of an update, else None."""

    spec: extractor.ExtractorSpec
    listed: listing.Listing
    listing: artifacts.Artifact
    features: artifacts.Artifact
    base: update.Base | None = None
    changes: update.Changes | None = None
    added: artifacts.Artifact | None = None


def _build(run: Run, settings: BuildIndexSettings, source: sources.Source, base: update.Base | None) -> None:
    featured = _extract(run, settings, source) if base is None else _update(run, settings, source, base)
    if bad := features.reasons_of(featured.features.parts):
        where = files.join(run.output, "quarantine")
        run.say(
            f"quarantine: {sum(bad.values()):,} of {featured.listed.rows:,} images left out ({features.told(bad)}): {where}"
        )
    indexed, info, kept = _index(run, settings, featured)
    _finish(run, settings, source, featured, indexed, info, kept)


def _extract(run: Run, settings: BuildIndexSettings, source: sources.Source) -> _Featured:
    """Features of every image of the source."""
    output, now = run.output, run.now
    describing = extractor.describe_remotely(settings.features)  # loads the model while the source is listed
    listing_it = listing.start(source, output, settings.features.whole_part_rows, settings.overwrite)
    console.silence_ray_data()  # which imports it, meanwhile
    with failures("features", output):  # first: a mistyped model is known in seconds, a listing may take an hour
        spec: extractor.ExtractorSpec = tasks.get(describing)
    with run.tracker.stage("listing") as nested, failures("listing", files.join(output, "listing")):
        listed, artifact = tasks.get(listing_it)
        run.done(listed.uri, artifact, nested)
        nested.dataset("images", source.root, listed.fingerprint, "source", {"rows": listed.rows})
    if settings.density.k >= listed.rows:
        raise UserError(f"--density.k {settings.density.k}: needs more than k images, found {listed.rows}; lower k")

    begun = None if settings.overwrite else artifacts.begun_identity(files.join(output, "features"))
    gpus = resources.gpus_to_ask(now, settings.features.actor_gpus, (begun or {}).get("device"))
    device = resources.device_of(now, gpus)
    featuring = features.stage_of(output, listed, spec, settings.data, settings.features, device)
    extracting = settings.features.model_copy(update={"actor_gpus": gpus})
    work = features.Work(source, listed, spec, decode.limits_of(settings.data), settings.features.batch_size, featuring)
    featured = run.stage(featuring, lambda: features.run(work, now, extracting, settings.data.max_bad_fraction))
    return _Featured(spec, listed, artifact, featured)


def _update(run: Run, settings: BuildIndexSettings, source: sources.Source, base: update.Base) -> _Featured:
    """Features of the images that are not in the base as they are now, and those of the others from there."""
    output, now = run.output, run.now
    describing = extractor.describe_remotely(settings.features)
    console.silence_ray_data()  # which imports it, meanwhile
    with failures("features", output):
        spec: extractor.ExtractorSpec = tasks.get(describing)
    gpus = resources.gpus_to_ask(now, settings.features.actor_gpus, base.artifacts["features"].identity["device"])
    update.check_same(base, settings, source, spec, resources.device_of(now, gpus))
    with run.tracker.stage("listing") as nested, failures("listing", files.join(output, "listing")):
        comparing = update.compare(source, base, output, settings.features.whole_part_rows, settings.overwrite)
        changes, artifact = tasks.get(comparing)
        run.done(changes.listed.uri, artifact, nested, [files.join(output, update.ADDED, "listing")])
        nested.dataset("images", source.root, artifact.fingerprint, "source", {"rows": artifact.rows})
    new = changes.added.rows if changes.added else 0
    console.say(f"update: {new:,} new images, {len(changes.removed):,} gone or changed, of {artifact.rows:,}")
    added: artifacts.Artifact | None = None
    if changes.added is not None:
        uri = files.join(output, update.ADDED)
        fresh = features.stage_of(
            uri, changes.added, spec, settings.data, settings.features, resources.device_of(now, gpus)
        )
        extracting = settings.features.model_copy(update={"actor_gpus": gpus})
        work = features.Work(
            source, changes.added, spec, decode.limits_of(settings.data), settings.features.batch_size, fresh
        )
        added = run.stage(fresh, lambda: features.run(work, now, extracting, max_bad_fraction=1.0, some=False))
    stage = update.features_stage(output, changes, base, added)
    merged = run.stage(
        stage, lambda: update.merge_features(stage, changes, base, output, settings.data.max_bad_fraction)
    )
    return _Featured(spec, changes.listed, artifact, merged, base, changes, added)


def _index(
    run: Run, settings: BuildIndexSettings, featured: _Featured
) -> tuple[artifacts.Artifact, search.IndexInfo, bool]:
    """The index over the features, and whether it has the quantizer of the base, if that has any."""
    base, changes, output = featured.base, featured.changes, run.output
    reason = None
    if base is not None and changes is not None:
        reason = update.drift(
            base,
            changes,
            featured.added,
            featured.features.rows,
            output,
            settings.update,
            settings.index,
            settings.density,
        )
        begun = artifacts.begun_identity(files.join(output, "index")) or {}
        if begun.get("features") == featured.features.fingerprint and "cells" in begun and "base" not in begun:
            reason = reason or "so it was decided before"
    kept = None
    if base is not None and changes is not None and not reason:
        kept = update.kept_index(base, changes, output, featured.added)
    indexed = _index_stage(run, settings, featured, kept)
    if kept is not None and (reason := update.short_of_recall(indexed)):
        indexed = _index_stage(run, settings, featured, None)
    if reason:
        console.say(f"update: the index is built anew and all neighbors are searched for: {reason}")
    return indexed, search.open_index(files.join(output, "index")), reason is None


def _index_stage(
    run: Run, settings: BuildIndexSettings, featured: _Featured, kept: build.Kept | build.KeptShards | None
) -> artifacts.Artifact:
    base, changes = featured.base, featured.changes
    features_uri = files.join(run.output, "features")
    stage, resolved = build.stage_of(run.output, featured.features, settings.index, settings.density, kept)

    def make() -> tuple[Iterable[artifacts.Part], dict[str, Any]]:
        parts, facts = build.run(stage, features_uri, featured.features, resolved, settings.density, kept)
        if isinstance(kept, build.Kept) and base is not None and changes is not None:
            facts |= update.trained_facts(base, changes, featured.added)
        return parts, facts

    return run.stage(stage, make, replace=base is not None)


def _finish(
    run: Run,
    settings: BuildIndexSettings,
    source: sources.Source,
    featured: _Featured,
    indexed: artifacts.Artifact,
    info: search.IndexInfo,
    kept: bool,
) -> None:
    """Neighbors, densities, predictor and report. kept: those of the base still hold, if there is one."""
    output, now, base = run.output, run.now, featured.base
    features_uri, featured_artifact = files.join(output, "features"), featured.features
    if base is not None and kept:
        assert featured.changes is not None
        neighbors_stage = update.neighbors_stage(output, info, base, settings.density)
        find = functools.partial(
            update.merge_neighbors,
            neighbors_stage,
            info,
            base,
            featured.changes,
            output,
            featured_artifact,
            settings.density,
            settings.index,
            now,
        )
    else:
        neighbors_stage = index_neighbors.neighbors_stage(output, info, settings.density)
        find = functools.partial(
            index_neighbors.find_neighbors,
            neighbors_stage,
            info,
            features_uri,
            featured_artifact,
            settings.density,
            settings.index,
            now,
        )
    neighbors = run.stage(neighbors_stage, find)
    densities_stage = density_densities.stage_of(output, neighbors_stage, settings.density)
    densities = run.stage(
        densities_stage,
        lambda: density_densities.write_densities(
            densities_stage, neighbors_stage.uri, neighbors, features_uri, settings.density
        ),
    )

    dim = featured.spec.feature_dim
    if base is not None:
        fitting_stage = update.estimator_stage(output, densities_stage, settings.estimator, base)
        fit = functools.partial(
            update.keep_or_fit, fitting_stage, base, output, densities, dim, settings.estimator, settings.update
        )
    else:
        fitting_stage = estimator.stage_of(output, densities_stage, settings.estimator)
        fit = functools.partial(
            estimator.run, fitting_stage, features_uri, densities_stage.uri, densities, dim, settings.estimator
        )
    fitted = run.stage(fitting_stage, fit)

    reporting_stage = report.stage_of(output, densities_stage, fitting_stage, settings)
    inputs = report.Inputs(
        source,
        featured.listed,
        settings,
        featured.listing,
        featured_artifact,
        indexed,
        densities,
        fitted,
        run.timings_s,
    )
    run.stage(reporting_stage, lambda: report.run(reporting_stage, output, inputs))
