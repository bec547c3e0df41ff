"""Writes the tables of docs/scaling.md: costs of runs that nobody has paid for, by costs.py and a simulation.

python benchmarks/scaling.py              # writes the tables between the marks in docs/scaling.md; seconds
python benchmarks/scaling.py --check      # exit code 1 where the page is not what the code gives
python benchmarks/scaling.py --measure    # first runs build_index and a self-join here, for the table of reality
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # not this folder: its modules are benchmarks.X

from benchmarks import costs, reality, simulation  # noqa: E402
from pd_core.core.settings.index import BuildIndexSettings  # noqa: E402

PAGE = ROOT / "docs" / "scaling.md"
UNIT_COSTS = ROOT / "docs" / "unit_costs.json"
REALITY = ROOT / "docs" / "scaling.json"
SIZES = {"1M": 10**6, "100M": 10**8, "1B": 10**9}
NODES = (10, 100, 1000)
NODE_CORES, NODE_BYTES = 32.0, 128 * costs.GIB
SPOT = simulation.Spot(losses_per_hour=0.05)
PACKED = 10_000  # images in a tar, where they are packed
GPU_SPEED = 100.0
THEN_FLOPS = 175e9 / 2  # of a core when docs/benchmarks.json was measured: 175 GFLOP/s on both

Cells = Sequence[str]


# ---- what is looked at -----------------------------------------------------------------------------------------------


def fleet(nodes: int, gpus: float = 0.0, gpu_speed: float = 1.0) -> costs.Fleet:
    """Machines of 32 vCPUs on one object store."""
    return costs.Fleet(
        nodes=nodes,
        network_bytes_per_s=costs.NETWORK_BYTES_PER_S,
        request_s=costs.REQUEST_S,
        gets_per_s=costs.GETS_PER_S,
        puts_per_s=costs.PUTS_PER_S,
        cores=NODE_CORES,
        memory_bytes=NODE_BYTES,
        gpus=gpus,
        gpu_speed=gpu_speed,
        elastic=True,
    )


def build(rows: int, settings: BuildIndexSettings | None = None, packed: bool = False) -> costs.Build:
    """Photographs of 640 x 427 px, ViT-B/16 at 224 px, as measured."""
    measured = json.loads(UNIT_COSTS.read_text())
    decoding, models = measured["decoding"]["costs"], measured["models"]["costs"]
    return costs.build_of(
        settings or BuildIndexSettings(),
        rows,
        -(-rows // PACKED) if packed else rows,
        dim=768,
        pixels=224 * 224,
        image_bytes=decoding["photo_bytes"],
        decode_s=decoding["decode_s.photo"],
        model_s=models["model_s.vit_base_patch16_224"],
    )


def advised(rows: int, nodes: int) -> dict[str, dict[str, Any]]:
    """What to set for so many images on so many nodes, by section of the settings."""
    small = rows < 10**7
    shards = {10**6: max(nodes, 16), 10**8: max(600, nodes)}.get(rows, 1024)
    chosen: dict[str, dict[str, Any]] = {
        "features": {"actors": nodes * 30, "part_rows": 8192 if small else 65_536},
        "index": {"shards": min(shards, 100) if small else shards, "actor_cpus": 16},
        "density": {"block_rows": 16_384 if small else 65_536},
        "estimator": {"batch_size": 4096} | ({"epochs": 20, "patience": 3} if small else {"epochs": 1, "patience": 0}),
    }
    if rows > 10**8:
        chosen["index"] |= {"kind": "ivf_sq8", "train_rows_per_cell": 39}
    return chosen


def advised_build(rows: int, nodes: int) -> costs.Build:
    """The run with these settings, from packed images."""
    return build(rows, BuildIndexSettings.model_validate(advised(rows, nodes)), packed=True)


# ---- the tables ------------------------------------------------------------------------------------------------------


def table(columns: Cells, rows: Sequence[Cells]) -> str:
    """Markdown."""
    return "\n".join(["| " + " | ".join(cells) + " |" for cells in (columns, ["---"] * len(columns), *rows)])


def shown(value: float) -> str:
    """Three significant digits."""
    if value == 0 or math.isinf(value):
        return "0" if value == 0 else "-"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}" if 1e-3 <= abs(value) < 1e7 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """In the unit that suits it."""
    if math.isinf(seconds):
        return "never"
    for unit, size in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{shown(seconds / size)} {unit}"
    return f"{shown(seconds)} s"


def size(value: float) -> str:
    """Bytes, in decimal units as networks and stores are sold."""
    for unit, one in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if value >= one:
            return f"{shown(value / one)} {unit}"
    return f"{shown(value / 1e3)} kB"


def unit_costs() -> str:
    """What the model was given."""
    rows = [
        [f"`{field.name}`", f"{field.default:.3g}", field.metadata["unit"], field.metadata["source"]]
        for field in dataclasses.fields(costs.UnitCosts)
    ]
    measured = json.loads(UNIT_COSTS.read_text())
    for section, names in (("decoding", ("decode_s.photo", "photo_bytes")), ("models", None)):
        for name, value in measured[section]["costs"].items():
            if names is None or name in names:
                unit = "B" if name.endswith("bytes") else "core s / image"
                rows.append([f"`{name}`", f"{value:.3g}", unit, f"unit_costs: {name}"])
    return table(["unit cost", "value", "unit", "measured by"], rows)


def assumptions() -> str:
    """What nobody measured."""
    rows = [
        ["node", f"{NODE_CORES:.0f} cores like the measured ones, {NODE_BYTES / costs.GIB:.0f} GiB", "choice"],
        ["network of a node", "10 Gbit/s each way", "AWS documents it for 32 vCPUs (m5.8xlarge)"],
        [
            "requests",
            f"{costs.GETS_PER_S:,.0f} GET/s, {costs.PUTS_PER_S:,.0f} PUT/s in all",
            "AWS documents at least these per partitioned prefix",
        ],
        [
            "answer of the store",
            f"{costs.REQUEST_S * 1e3:.0f} ms",
            "AWS writes of tens of milliseconds for small requests",
        ],
        [
            "spot nodes",
            f"each lost {SPOT.losses_per_hour:g} times an hour, replaced after {SPOT.replace_s:.0f} s",
            "no source",
        ],
        [
            "probed cells",
            "30 at 88,192 rows, growing by N^0.32; scanned rows 2.9% falling by N^-0.185",
            "two data sets of docs/benchmarks.md, extrapolated",
        ],
        [
            "spread of a query over A search processes",
            "A^0.49",
            "docs/benchmarks.md, real features, up to 16 shards; extrapolated",
        ],
        ["threads of k-means and of searches", "as fast as that many cores", "measured for 2"],
        ["fit of the predictor", "all of `--estimator.epochs`", "patience ends it earlier, by an unknown number"],
    ]
    return table(["what", "value", "source"], rows)


def per_million() -> str:
    """A million photographs, default settings, 10 nodes: every phase."""
    machines = fleet(10)
    return phases_table(costs.build_index(build(10**6), machines), machines)


def phases_table(phases: Sequence[costs.Phase], machines: costs.Fleet) -> str:
    """What each phase needs, and its seconds on these nodes."""
    rows = []
    for phase in phases:
        moved = size(phase.moved_bytes) if phase.moved_bytes else ""
        rows.append(
            [
                *(phase.title, f"{phase.tasks:,}", shown(phase.core_s), duration(costs.seconds(phase, machines))),
                *(size(phase.read_bytes), size(phase.written_bytes), moved, f"{phase.gets + phase.puts:,.0f}"),
                *(size(phase.memory_bytes), costs.limit_of(phase, machines)),
            ]
        )
    total = costs.total_s(phases, machines)
    nodes = f"{machines.nodes} nodes"
    columns = ["phase", "tasks", "core s", nodes, "read", "written", "moved", "requests", "process", "limit"]
    return table(columns, [*rows, ["all", "", "", duration(total), *[""] * 6]])


FORMULAS = {
    "listing: walk and sort": ("`listing._list`", "N·list_s + 2·files/1000 requests; 96 B a row, of packed images 40"),
    "index: train the quantizer": (
        "`build._train_template`",
        "20·(64·cells)·cells·D FLOP on `--index.actor_cpus` threads, cells = 4·√N; 8·D·64·cells B",
    ),
    "index: deal rows to shards": (
        "`build._fill_cells`",
        "⌈S / max(4, min(64, object store/2 in shards, 10⁵/G))⌉ passes over all features, G = N/65,536",
    ),
    "neighbors: search": (
        "`neighbors._join_block`",
        "block tasks: N·cells·coarse_s + N·A·merge_s on A + 1 threads; each process N·(4·D + 8)/A B",
    ),
    "densities: normalizer and ranks": (
        "`densities._calibrate`",
        "N·calibrate_s; 61.6 B a row, and 8 B a row on every node after it",
    ),
    "estimator: fit the predictor": (
        "`estimator._fit`",
        "epochs·(0.8·N·epoch_s + all features read again + 2·parts requests)",
    ),
    "report: draw": ("`report._gather`", "11 requests a part, one after the other"),
}


def serial() -> str:
    """What one process does, or what limits others: formula, seconds and memory at 100 nodes and default settings."""
    machines = fleet(100)
    found: dict[str, list[str]] = {title: [] for title in FORMULAS}
    for count in SIZES.values():
        for phase in costs.build_index(build(count), machines):
            title = phase.title.partition(",")[0]
            if title in found:
                found[title].append(f"{duration(costs.seconds(phase, machines))}, {size(phase.memory_bytes)}")
    rows = [[title, *FORMULAS[title], *cells] for title, cells in found.items()]
    driver = [size(costs.driver_bytes(build(count))) for count in SIZES.values()]
    rows.append(
        ["driver", "`artifacts.Artifact`", "4 tables, 605 B a part and table; artifact.json 171 B a part", *driver]
    )
    return table(["what", "where", "formula", *SIZES], rows)


def grid(choose: Callable[[int, int], costs.Build], spot: simulation.Spot) -> list[list[str]]:
    """Of every size and number of nodes: how long, what is first in the way, and what moves it."""
    rows = []
    for name, count in SIZES.items():
        for nodes in NODES:
            machines = fleet(nodes)
            played = simulation.play(costs.build_index(choose(count, nodes), machines), machines, spot)
            longest, *others = sorted(played, key=lambda one: -one.seconds)
            total, phase = sum(one.seconds for one in played), longest.phase
            if longest.limit == costs.MEMORY:
                need = f"{size(costs.node_bytes(phase, machines))} of {size(machines.worker_bytes)} a node"
                first = f"{phase.title}: memory, {need}"
                rows.append([name, f"{nodes:,}", "does not fit", first, phase.lever(longest.limit), ""])
                continue
            lever = NO_SPOT if longest.limit == simulation.LOSSES else phase.lever(longest.limit)
            first, then = (f"{p.phase.title}: {p.limit}, {duration(p.seconds)}" for p in (longest, others[0]))
            rows.append([name, f"{nodes:,}", duration(total), first, lever, then])
    return rows


NO_SPOT = "nodes that stay: the task begins again whenever its node is lost"
GRID = ["images", "nodes", "takes", "first bottleneck", "what moves it", "the next one"]


def default_grid() -> str:
    """Settings as they are, loose files."""
    return table(GRID, grid(lambda rows, _: build(rows), simulation.Spot()))


def advised_grid() -> str:
    """The settings of `advised`, packed images."""
    return table(GRID, grid(advised_build, simulation.Spot()))


def spot_grid() -> str:
    """Both, on nodes that are lost."""
    both = zip(grid(lambda rows, _: build(rows), SPOT), grid(advised_build, SPOT), strict=True)
    rows = [[*(default[:2]), default[2], chosen[2], chosen[3]] for default, chosen in both]
    return table(["images", "nodes", "defaults", "advised settings", "first bottleneck of these"], rows)


def settings() -> str:
    """What `advised` says."""
    rows = []
    for name, count in SIZES.items():
        for nodes in NODES:
            sections = advised(count, nodes)
            text = " ".join(f"--{s}.{n} {v}" for s, values in sections.items() for n, v in values.items())
            rows.append([name, f"{nodes:,}", f"`{text}`"])
    return table(["images", "nodes", "settings"], rows)


def network() -> str:
    """What the search moves, by N, processes and how near its queries' neighbors lie to each other."""
    rows = []
    for name, count in SIZES.items():
        for actors in (1, 10, 100, 1000):
            made = build(count)
            exact = replace(made, nprobe=0, scanned=1.0)
            rows.append(
                [
                    *(name, f"{actors:,}", shown(costs.fan_out(made, actors))),
                    size(costs.search_bytes(made, actors, count)),
                    shown(costs.fan_out(exact, actors)),
                    size(costs.search_bytes(exact, actors, count)),
                ]
            )
    columns = ["images", "search processes", "rows sent per query", "bytes", "exact: rows sent per query", "bytes"]
    return table(columns, rows)


def gpus() -> str:
    """The features stage on GPUs: as measured, which is a core's speed, and as assumed."""
    rows = []
    for name, count in SIZES.items():
        for speed, how in ((1.0, "as a measured core"), (GPU_SPEED, f"assumption: {GPU_SPEED:.0f} cores")):
            chosen = {**advised(count, 100), "features": {"actors": 100}}
            made = build(count, BuildIndexSettings.model_validate(chosen), packed=True)
            machines = fleet(100, gpus=1.0, gpu_speed=speed)
            phase = costs.build_index(made, machines)[1]
            rows.append([name, how, duration(costs.seconds(phase, machines)), costs.limit_of(phase, machines)])
    return table(["images", "a GPU is as fast as", "features on 100 nodes with one GPU each", "limit"], rows)


def update() -> str:
    """New images beside old ones against building all of it again, on one node and on many."""
    rows = []
    for name, made, nodes, shares in (
        ("100k", build(10**5), 1, (0.01, 0.1)),
        ("1M", build(10**6), 1, (0.01, 0.1)),
        ("1M", build(10**6), 10, (0.01, 0.1)),
        ("100M", build(10**8), 100, (0.001, 0.01, 0.1)),
        ("100M, advised settings", advised_build(10**8, 100), 100, (0.001, 0.01, 0.1)),
    ):
        machines = fleet(nodes)
        long = costs.total_s(costs.build_index(made, machines), machines)
        for share in shares:
            new = round(made.rows * share)
            pairs = costs.pairs_of_update(made.rows - new, new) / float(made.rows) ** 2
            phases = costs.update_index(made, new, machines)
            short, tight = costs.total_s(phases, machines), [p for p in phases if not costs.fits(p, machines)]
            longest = sorted(phases, key=lambda phase: -costs.seconds(phase, machines))[:2]
            waits = [
                f"{p.title}: {costs.limit_of(p, machines)}, {duration(costs.seconds(p, machines))}" for p in longest
            ]
            rows.append(
                [
                    *(name, f"{nodes:,}", f"{share:.1%}", f"{pairs:.2%}"),
                    f"does not fit ({duration(short)} if it did)" if tight else duration(short),
                    *(duration(long), f"{long / short:.1f}"),
                    _too_large(tight[0], machines) if tight else "",
                    *waits,
                ]
            )
    columns = ["images", "nodes", "new", "pairs of a rebuild", "update", "rebuild", "times"]
    return table([*columns, "memory", "what it waits for", "then"], rows)


def _too_large(phase: costs.Phase, machines: costs.Fleet) -> str:
    need = f"{size(costs.node_bytes(phase, machines))} of {size(machines.worker_bytes)} a node"
    return f"{phase.title}: {need}; {phase.lever(costs.MEMORY)}"


def update_phases() -> str:
    """A hundred thousand new images beside a hundred million, default settings, 100 nodes: every phase."""
    machines = fleet(100)
    return phases_table(costs.update_index(build(10**8), 10**5, machines), machines)


def reality_now() -> str:
    """The runs of `--measure`."""
    found = json.loads(REALITY.read_text())
    made, joined = found["build_index"], found["self-join"]
    name = f"build_index, {made['rows']:,} emoji"
    expected = costs.by_stage(reality.phases_of_build(made), reality.HERE)
    rows = [[name, stage, *_beside(expected[stage], one["s"])] for stage, one in made["stages"].items()]
    rows.append([name, "all (measured: with Ray's start)", *_beside(sum(expected.values()), made["elapsed_s"])])
    name = f"{joined['rows']:,} vectors, D = 384, 2 shards"
    expected = costs.by_stage(reality.phases_of_join(joined), reality.HERE)
    rows += [[name, stage, *_beside(expected[stage], one["s"])] for stage, one in joined["stages"].items()]
    return table(["run", "stage", "predicted s", "measured s", "predicted / measured"], rows)


def _beside(predicted: float, measured: float) -> list[str]:
    return [shown(predicted), shown(measured), f"{predicted / measured:.2f}"]


def reality_bytes() -> str:
    """What the run of build_index left behind, against the model."""
    found = json.loads(REALITY.read_text())["build_index"]
    written = costs.written_bytes(reality.phases_of_build(found))
    rows = [
        [
            stage,
            size(expected),
            size(found["stages"][stage]["bytes"]),
            f"{expected / found['stages'][stage]['bytes']:.2f}",
        ]
        for stage, expected in written.items()
        if expected
    ]
    return table(["stage", "predicted", "measured", "predicted / measured"], rows)


def reality_before() -> str:
    """The self-join of docs/benchmarks.json: seconds of the search, its memory, and what travelled."""
    raw = json.loads((ROOT / "docs" / "benchmarks.json").read_text())["selfjoin"]["raw"]
    facts = {(one["data"], one["rows"]): one for one in raw if "index" in one}
    rows = []
    for one in raw:
        if one.get("side") not in ("ray_1x2", "ray_2x1"):
            continue
        made, actors = _joined(facts[one["data"], one["rows"]]), 1 if one["side"] == "ray_1x2" else 2
        searching = costs.search_core_s(made, actors) / 2
        slower = costs.search_core_s(made, actors, costs.MEASURED.on(THEN_FLOPS)) / 2
        held = costs.search_actor_bytes(made, actors, 2 // actors)
        peak = one["children_peak_rss_bytes"]["ray::_Searcher"]
        rows.append(
            [
                *(f"{one['data']} {one['rows']:,}, {actors} processes", *_beside(searching, one["seconds"])),
                f"{slower / one['seconds']:.2f}",
                *(size(held), size(peak), f"{held / peak:.2f}"),
                *(shown(costs.fan_out(made, actors)), shown(one["rows_sent_per_query"])),
            ]
        )
    columns = ["self-join", "predicted s", "measured s", "ratio", "ratio at 87 GFLOP/s a core", "process", "measured"]
    return table([*columns, "ratio", "rows sent", "counted"], rows)


def _joined(facts: dict[str, Any]) -> costs.Build:
    totals = facts["index"]
    chosen = {"kind": totals["kind"], "shards": totals["shards"], "cells": totals["cells"]}
    made = costs.build_of(
        BuildIndexSettings.model_validate({"index": chosen}), totals["rows"], totals["rows"], totals["dim"], 1, 0, 0, 0
    )  # fmt: skip
    return replace(made, nprobe=totals["nprobe"], scanned=totals["scan_fraction"])


# ---- the page --------------------------------------------------------------------------------------------------------

TABLES: dict[str, Callable[[], str]] = {
    function.__name__: function
    for function in (
        *(unit_costs, assumptions, per_million, serial, default_grid, advised_grid, settings, spot_grid, gpus, network),
        *(update, update_phases, reality_now, reality_bytes, reality_before),
    )
}
MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def page(text: str) -> str:
    """The text with every table between its marks as the code gives it."""
    return MARKED.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}\n{found[3]}", text)


def main(argv: Sequence[str]) -> int:
    """Write or check the page."""
    parser = argparse.ArgumentParser(description="Write the tables of docs/scaling.md.")
    parser.add_argument("--check", action="store_true", help="only say whether the page is what the code gives")
    parser.add_argument("--measure", action="store_true", help="run build_index and a self-join here first; minutes")
    arguments = parser.parse_args(argv)
    if arguments.measure:
        REALITY.write_text(json.dumps(reality.measure(), indent=1) + "\n")
    before = PAGE.read_text()
    after = page(before)
    if arguments.check:
        print(
            "docs/scaling.md is up to date" if before == after else "docs/scaling.md: run python benchmarks/scaling.py"
        )
        return int(before != after)
    PAGE.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
