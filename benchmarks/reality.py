"""Runs that are small enough to be paid for, each beside what the model says of it; kept in docs/scaling.json."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import datasets, joins, process, table
from pd_core import cluster, config, costs, indexing, listing, pipeline, planning, search, selfjoin, storage
from pd_core.config import BuildIndexSettings, DensitySettings, IndexSettings

JOIN_ROWS, JOIN_SHARDS = 100_000, 2


def measure() -> dict[str, Any]:
    """Both runs; each figure with the machine and the load that it was measured under."""
    shutil.rmtree(process.WORK, ignore_errors=True)
    process.WORK.mkdir(parents=True)
    facts = table.circumstances(False)
    facts.pop("quick")
    try:
        return {**facts, "build_index": small_build(), "self-join": join(), "load_after": round(os.getloadavg()[0], 2)}
    finally:
        shutil.rmtree(process.WORK, ignore_errors=True)


def small_build() -> dict[str, Any]:
    """build_index on 3,786 emoji of 64 px, as a user runs it; predicted from its dry run's probe, before it."""
    output = process.WORK / "out"
    arguments = [
        *(f"--data.source={datasets.emoji()}", f"--output={output}", "--no-tracking.enabled"),
        *(f"--features.model={datasets.MODEL}", f"--features.checkpoint={datasets.checkpoint()}"),
        *("--features.image_size=64", "--features.part_rows=512"),
    ]
    settings, source = pipeline.prepare(config.load(BuildIndexSettings, arguments, prog="build_index.py"))
    with cluster.session(str(output)) as now:
        counted = listing.count(source)
        spec, unit = cluster.get(planning.probe(source, counted["sample"], settings, pipeline.limits_of(settings)))
        fleet = planning.fleet_of(now, str(output))
    command = [sys.executable, "workflows/build_index.py", *arguments]
    with (process.WORK / "build.log").open("w") as log:
        done = subprocess.run(command, cwd=process.ROOT, stdout=log, stderr=subprocess.STDOUT)
    if done.returncode:
        raise SystemExit((process.WORK / "build.log").read_text()[-2000:])
    run = json.loads((output / "run.json").read_text())
    fitted = storage.load_artifact(str(output / "estimator"))
    assert fitted is not None
    build = planning.build_of(settings, source, counted, spec, unit, fleet)
    phases = costs.build_index(replace(build, epochs=fitted.totals["epochs"]), fleet, costs.MEASURED.on(unit.flops))
    expected, written = costs.by_stage(phases, fleet), costs.written_bytes(phases)
    stages = {
        name: {
            "predicted_s": expected[name],
            "measured_s": run["timings_s"][name],
            "predicted_bytes": written[name],
            "measured_bytes": _size(output / name),
        }
        for name in expected
    }
    return {
        "rows": counted["rows"],
        "stages": stages,
        "elapsed_s": run["elapsed_s"],
        "epochs": fitted.totals["epochs"],
        "probe": {"decode_s": unit.decode_s, "model_s": unit.extract_s, "flops": unit.flops},
    }


def _size(folder: Path) -> int:
    artifact = storage.load_artifact(str(folder))
    assert artifact is not None
    return sum(part.bytes for part in artifact.parts)


def join() -> dict[str, Any]:
    """Index, neighbors and densities of 100,000 separated clusters, D = 384, in two shards."""
    work = str(process.WORK / "join")
    x = datasets.clusters(JOIN_ROWS, count=50, latent_dim=16, separation=1.5)
    featured = joins.write_features(x, work, "features")
    settings = BuildIndexSettings(index=IndexSettings(kind="ivf_flat", shards=JOIN_SHARDS), density=DensitySettings())
    uri = storage.join(work, "features")
    with cluster.session(work) as now:
        fleet = planning.fleet_of(now, work)
        stage, resolved = indexing.stage_of(work, featured, settings.index, settings.density)
        indexed = stage.complete(lambda: indexing.run(stage, uri, featured, resolved, settings.density), False)
        info = search.open_index(stage.uri)
        near = selfjoin.neighbors_stage(work, info, settings.density)
        neighbors = near.complete(
            lambda: selfjoin.find_neighbors(near, info, uri, featured, settings.density, resolved, now), False
        )
        last = selfjoin.stage_of(work, near, settings.density)
        densities = last.complete(
            lambda: selfjoin.write_densities(last, near.uri, neighbors, uri, settings.density), False
        )
    build = costs.build_of(settings, JOIN_ROWS, JOIN_ROWS, datasets.DIM, 1, 0, 0, 0)
    build = replace(build, nprobe=indexed.totals["nprobe"], scanned=indexed.totals["scan_fraction"])
    expected = costs.by_stage(costs.build_index(build, fleet), fleet)
    found = {"index": indexed, "neighbors": neighbors, "densities": densities}
    actors, _ = costs.searchers(build, fleet)
    return {
        "rows": JOIN_ROWS,
        "nprobe": build.nprobe,
        "scanned": build.scanned,
        "rows_sent_per_query": {
            "predicted": costs.fan_out(build, actors),
            "measured": neighbors.totals["rows_sent_per_query"],
        },
        "stages": {
            name: {"predicted_s": expected[name], "measured_s": sum(artifact.timings_s.values())}
            for name, artifact in found.items()
        },
    }
