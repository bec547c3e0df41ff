"""The stages of build_index in their order, each committed and tracked: what the workflow file calls."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pd_core.build import plan, report, update
from pd_core.core import artifacts, files
from pd_core.core.errors import UserError
from pd_core.core.settings import load
from pd_core.core.settings.index import BuildIndexSettings, ResolvedBuildIndex
from pd_core.density import densities, estimator, fit, formula
from pd_core.engine import console, resources, tasks
from pd_core.engine.runs import REPORT, Run, checked_output, execute, failures, started
from pd_core.images import decode, listing, sources
from pd_core.index import build, drift, extractor, features, neighbors, search
from pd_core.index.base import Base, Update

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
class _Listed:
    """What the source has, and how it is extracted. update: where there is a base, what is taken over from it."""

    listing: listing.Listing
    artifact: artifacts.Artifact
    spec: extractor.ExtractorSpec
    gpus: float | None
    update: Update | None


def _build(run: Run, settings: ResolvedBuildIndex, source: sources.Source, base: Base | None) -> None:
    listed = _list(run, settings, source, base)
    featured, taken = _extract(run, settings, source, listed)
    indexed, taken = _index(run, settings, featured, taken)
    _finish(run, settings, source, listed, featured, indexed, taken)


def _list(run: Run, settings: ResolvedBuildIndex, source: sources.Source, base: Base | None) -> _Listed:
    """List the source, while the model loads; of an update once it is known that it can be one."""
    output, part_rows, asked = run.output, settings.features.whole_part_rows, settings.features.actor_gpus
    describing = extractor.describe_remotely(settings.features)
    if base is None:
        listing_it = listing.start(source, output, part_rows, settings.overwrite)
        begun = None if settings.overwrite else artifacts.begun_identity(files.join(output, "features"))
    else:
        begun = base.artifacts["features"].identity
    console.silence_ray_data()  # which imports it, meanwhile
    with failures("features", output):  # first: a mistyped model is known in seconds, a listing may take an hour
        spec: extractor.ExtractorSpec = tasks.get(describing)
    gpus = resources.gpus_to_ask(run.now, asked, (begun or {}).get("device"))
    if base is not None:
        update.check_same(base, settings, source, spec, resources.device_of(run.now, gpus))
        listing_it = update.compare(source, base, output, part_rows, settings.overwrite)
    with run.tracker.stage("listing") as nested, failures("listing", files.join(output, "listing")):
        found, artifact = tasks.get(listing_it)
        taken = found if base is not None else None
        listed = found if taken is None else taken.listed
        run.done(listed.uri, artifact, nested, [] if taken is None else [files.join(taken.folder, "listing")])
        nested.dataset("images", source.root, listed.fingerprint, "source", {"rows": listed.rows})
    if taken is not None:
        new = taken.fresh.rows if taken.fresh else 0
        console.say(f"update: {new:,} new images, {len(taken.removed):,} gone or changed, of {listed.rows:,}")
    if listed.rows < fit.FEWEST_ROWS:
        raise UserError(
            f"{source.root}: holds {listed.rows} images; an index needs {fit.FEWEST_ROWS} or more; add some"
        )
    if settings.density.k >= listed.rows:
        raise UserError(f"--density.k {settings.density.k}: needs more than k images, found {listed.rows}; lower k")
    return _Listed(listed, artifact, spec, gpus, taken)


def _extract(
    run: Run, settings: ResolvedBuildIndex, source: sources.Source, listed: _Listed
) -> tuple[artifacts.Artifact, Update | None]:
    """Features of every image, in an update those of its base where they hold; and what is taken over, completed."""
    device = resources.device_of(run.now, listed.gpus)
    chosen = settings.features.model_copy(update={"actor_gpus": listed.gpus})
    most_bad, taken = settings.data.max_bad_fraction, listed.update

    def stage_of(output: str, images: listing.Listing) -> artifacts.Stage:
        return features.stage_of(output, images, listed.spec, settings.data, settings.features, device)

    def extracted(output: str, images: listing.Listing, most_bad: float, some: bool = True) -> artifacts.Artifact:
        stage, limits = stage_of(output, images), decode.limits_of(settings.data)
        work = features.Work(source, images, listed.spec, limits, settings.features.batch_size, stage)
        return run.stage(stage, lambda: features.run(work, run.now, chosen, most_bad, some))

    if taken is None:
        featured = extracted(run.output, listed.listing, most_bad)
    else:
        if taken.fresh is not None:
            taken = replace(taken, added=extracted(taken.folder, taken.fresh, 1.0, some=False))
        complete, added = taken, taken.added
        stage = taken.base.continued(stage_of(run.output, listed.listing), added=added and added.fingerprint)
        featured = run.stage(stage, lambda: features.merge(stage, complete, most_bad))
    run.say(*features.left_out(featured.parts, listed.listing.rows, files.join(run.output, "quarantine")))
    return featured, taken


def _index(
    run: Run, settings: ResolvedBuildIndex, featured: artifacts.Artifact, taken: Update | None
) -> tuple[artifacts.Artifact, Update | None]:
    """The index over the features, and what later stages take over: nothing, where the base's index does not hold."""
    uri = files.join(run.output, "features")

    def indexed(kept: Update | None) -> artifacts.Artifact:
        stage, resolved = build.stage_of(run.output, featured, settings.index, settings.density, kept)

        def make() -> tuple[Iterable[artifacts.Part], dict[str, Any]]:
            parts, facts = build.run(stage, uri, featured, resolved, settings.density, kept)
            return parts, facts if kept is None or resolved.kind == "flat" else facts | drift.facts_of_quantizer(kept)

        return run.stage(stage, make, replace=taken is not None)

    if taken is None:
        return indexed(None), None
    reason = drift.reason_to_rebuild(taken, featured.rows, settings)
    begun = artifacts.begun_identity(files.join(run.output, "index")) or {}
    if begun.get("features") == featured.fingerprint and "cells" in begun and "base" not in begun:
        reason = reason or "so it was decided before"
    flat = taken.base.artifacts["index"].totals["kind"] == "flat"
    kept = None if reason or (flat and not build.keeps_shards(taken)) else taken
    made = indexed(kept)
    if kept is not None and (reason := drift.short_of_recall(made)):
        made = indexed(None)
    if reason:
        console.say(f"update: the index is built anew and all neighbors are searched for: {reason}")
    return made, None if reason else taken


def _finish(
    run: Run,
    settings: BuildIndexSettings,
    source: sources.Source,
    listed: _Listed,
    featured: artifacts.Artifact,
    indexed: artifacts.Artifact,
    taken: Update | None,
) -> None:
    """Neighbors, densities, predictor and report. taken: what of a base still holds of the neighbors."""
    output, now, density, features_uri = run.output, run.now, settings.density, files.join(run.output, "features")
    base = listed.update.base if listed.update else None
    info = search.open_index(files.join(output, "index"))
    near = neighbors.neighbors_stage(output, info, density, taken.base if taken else None)
    found = run.stage(
        near,
        lambda: neighbors.find_neighbors(near, info, features_uri, featured, density, settings.index, now, taken),
    )
    dense = densities.stage_of(output, near, density)
    measured = run.stage(dense, lambda: densities.write_densities(dense, near.uri, found, features_uri, density))
    dim, drop = listed.spec.feature_dim, settings.update.max_r2_drop
    fitting = estimator.stage_of(output, dense, settings.estimator, base)
    fitted = run.stage(
        fitting,
        lambda: estimator.run(fitting, features_uri, dense.uri, measured, dim, settings.estimator, base, drop),
    )
    reporting = report.stage_of(output, dense, fitting, settings)
    inputs = report.Inputs(
        source, listed.listing, settings, listed.artifact, featured, indexed, measured, fitted, run.timings_s
    )
    run.stage(reporting, lambda: report.run(reporting, output, inputs))
