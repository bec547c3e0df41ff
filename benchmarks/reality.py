"""Runs that are small enough to be paid for, each beside what the model says of it; kept in docs/scaling.json."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import costs, datasets, joins, process, table
from pd_core.build import probe as build_probe
from pd_core.build import workflow
from pd_core.core import artifacts
from pd_core.core.settings import load
from pd_core.core.settings.index import BuildIndexSettings, DensitySettings, IndexSettings
from pd_core.engine import session, tasks
from pd_core.images import decode, listing

JOIN_ROWS, JOIN_SHARDS = 100_000, 2
PX, PART_ROWS = 64, 512
HERE = costs.Fleet(1, 2.0, 24 * costs.GIB, local=True)  # the machine of docs/scaling.json


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
        *(f"--features.image_size={PX}", f"--features.part_rows={PART_ROWS}"),
    ]
    settings, source = workflow.prepare(load.load(BuildIndexSettings, arguments, prog="build_index.py"))
    with session.session(str(output)):
        counted = listing.count(source)
        spec, unit = tasks.get(build_probe.probe(source, counted["sample"], settings, decode.limits_of(settings.data)))
    command = [sys.executable, "workflows/build_index.py", *arguments]
    with (process.WORK / "build.log").open("w") as log:
        done = subprocess.run(command, cwd=process.ROOT, stdout=log, stderr=subprocess.STDOUT)
    if done.returncode:
        raise SystemExit((process.WORK / "build.log").read_text()[-2000:])
    run = json.loads((output / "run.json").read_text())
    fitted = artifacts.load_artifact(str(output / "estimator"))
    assert fitted is not None
    return {
        **{"rows": counted["rows"], "dim": spec.feature_dim, "image_bytes": counted["bytes"] / counted["rows"]},
        "probe": {"decode_s": unit.decode_s, "model_s": unit.extract_s, "flops": unit.flops},
        "epochs": fitted.totals["epochs"],
        "elapsed_s": run["elapsed_s"],
        "stages": {name: {"s": s, "bytes": _size(output / name)} for name, s in run["timings_s"].items()},
    }


def phases_of_build(found: Mapping[str, Any]) -> list[costs.Phase]:
    """What the model says of the run, from its probe and the epochs that it took."""
    settings = BuildIndexSettings.model_validate({"features": {"part_rows": PART_ROWS}})
    probe, rows = found["probe"], found["rows"]
    build = costs.build_of(
        settings, rows, rows, found["dim"], PX * PX, found["image_bytes"], probe["decode_s"], probe["model_s"]
    )
    return costs.build_index(replace(build, epochs=found["epochs"]), HERE, costs.MEASURED.on(probe["flops"]))


def _size(folder: Path) -> int:
    artifact = artifacts.load_artifact(str(folder))
    assert artifact is not None
    return sum(part.bytes for part in artifact.parts)


def join() -> dict[str, Any]:
    """Index, neighbors and densities of 100,000 separated clusters, D = 384, in two shards."""
    work = str(process.WORK / "join")
    x = datasets.clusters(JOIN_ROWS, count=50, latent_dim=16, separation=1.5)
    featured = joins.write_features(x, work, "features")
    settings = BuildIndexSettings(index=IndexSettings(kind="ivf_flat", shards=JOIN_SHARDS), density=DensitySettings())
    with session.session(work) as now:
        found, _ = joins.complete(work, featured, settings, now)
    return {
        **{
            "rows": JOIN_ROWS,
            "nprobe": found["index"].totals["nprobe"],
            "scanned": found["index"].totals["scan_fraction"],
        },
        "rows_sent_per_query": found["neighbors"].totals["rows_sent_per_query"],
        "stages": {name: {"s": sum(artifact.timings_s.values())} for name, artifact in found.items()},
    }


def phases_of_join(found: Mapping[str, Any]) -> list[costs.Phase]:
    """What the model says of it, from the cells that calibration chose."""
    settings = BuildIndexSettings.model_validate({"index": {"kind": "ivf_flat", "shards": JOIN_SHARDS}})
    build = costs.build_of(settings, found["rows"], found["rows"], datasets.DIM, 1, 0.0, 0.0, 0.0)
    return costs.build_index(replace(build, nprobe=found["nprobe"], scanned=found["scanned"]), HERE)
