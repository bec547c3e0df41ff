"""How long a cluster that has no worker takes to begin with a run, and to have none again after it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import process, table
from benchmarks.process import ROOT, WORK
from tests.ray_head import IDLE_S, Head, Watch, autoscaling_head

REPEATS = 3
NODES = 2
BATCH = 64
WAIT_S = 600.0

TEXT = f"""\
A head without CPUs, Ray's autoscaler with its provider of nodes that are processes of this machine (at most {NODES}
nodes of 2 CPUs; a node of a cloud takes its own time to boot on top), as Ray ships it: it looks at the demand every 5 s
and ends nodes that were idle for {IDLE_S:g} s. `build_index` on the 1,797 digits joins it, in parts of one batch of
{BATCH}, so that the first part is the first batch. Each run begins with no worker. Nodes and demands are what the
autoscaler itself says, asked twice a second. From demand to first batch holds: the node's start, unpacking pd_core on
it, describing the model and listing the source (a task each, whose workers import what they need), and the first
extractor's start."""

EVENTS = ("first demand", "first node", "first batch", "done", "no node")


def measure(quick: bool) -> table.Section:
    """Runs one after the other on one head."""
    WORK.mkdir(parents=True, exist_ok=True)
    data = WORK / "demo-data"
    subprocess.run([sys.executable, str(ROOT / "demo/make_digits.py"), "--output", str(data)], check=True, cwd=ROOT)
    repeats = 1 if quick or process.short else REPEATS
    with autoscaling_head(WORK, {"cpu": {"CPU": 2, "max": NODES}}) as head, Watch(head) as watch:
        raw = [_run(head, watch, data, WORK / f"out-{number}") for number in range(repeats)]
    starts = [run["first batch"] - run["first demand"] for run in raw]
    ends = [run["no node"] - run["done"] for run in raw]
    claims = [
        table.reported(f"from demand to the first batch, median of {len(raw)}", table.middle(starts), "s"),
        table.reported("from the end of the run to the last node gone, median", table.middle(ends), "s"),
    ]
    rows: list[list[table.Cell]] = [
        [event, table.middle([run[event] for run in raw]), table.spread([run[event] for run in raw])]
        for event in EVENTS
    ]
    most = [float(run["most nodes"]) for run in raw]
    rows.append(["(most nodes at once)", table.middle(most), table.spread(most)])
    columns = ["event", "s from the start of the driver, median", "lowest to highest"]
    return table.Section("Autoscaling", TEXT, claims, [table.Table("One run from zero to zero", columns, rows)], raw)


def _run(head: Head, watch: Watch, data: Path, output: Path) -> dict[str, Any]:
    """Seconds from the start of the driver to each of EVENTS, and the most nodes at once."""
    watch.until(lambda look: not look["nodes"], WAIT_S)
    first, start = len(watch.seen), time.time()
    command = [
        *(sys.executable, "workflows/build_index.py", "--config", "workflows/configs/default.yaml"),
        *("--output", str(output), "--data.source", str(data / "digits"), "--no-tracking.enabled"),
        *("--features.checkpoint", str(data / "efficientnet_lite0.safetensors"), f"--features.actors={2 * NODES}"),
        *(f"--features.part_rows={BATCH}", f"--features.batch_size={BATCH}"),
    ]
    environment = {**os.environ, **head.environment, "RAY_ADDRESS": head.address}
    log = output.with_suffix(".log")
    with log.open("w") as stream:
        subprocess.run(command, cwd=ROOT, env=environment, stdout=stream, stderr=stream, timeout=WAIT_S, check=True)
    done = time.time()
    gone = watch.until(lambda look: not look["nodes"], WAIT_S)
    looks = watch.seen[first:]
    times = {
        "first demand": next(look["time_s"] for look in looks if look["demands"]),
        "first node": next(look["time_s"] for look in looks if look["nodes"]),
        "first batch": min(file.stat().st_mtime for file in (output / "features" / "_parts").iterdir()),
        "done": done,
        "no node": gone["time_s"],
    }
    most = max(sum(look["nodes"].values()) for look in looks)
    return {event: round(seconds - start, 2) for event, seconds in times.items()} | {"most nodes": most}
