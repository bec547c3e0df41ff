"""The model of what runs cost: closed forms, conservation, the stages it stands for, and the page made from it."""

import json
import math
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from benchmarks import costs, joins, scaling, simulation
from pd_core.core import artifacts, files, schemas
from pd_core.core.settings.index import BuildIndexSettings, DensitySettings, IndexSettings
from pd_core.engine import resources
from pd_core.images import sources
from pd_core.index import build as index_build
from pd_core.index import features, search
from pd_core.index import shards as index_shards
from tests.synthetic import clustered

ROOT = Path(__file__).resolve().parents[2]
ROWS, DIM, K, SHARDS, PART_ROWS = 9000, 256, 20, 3, 3072


# ---- closed forms ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [10**5, 10**6, 10**8, 10**9])
@pytest.mark.parametrize("shards", [None, 1000])
def test_more_nodes_slow_down_only_what_is_named(rows, shards):
    build = scaling.build(rows, BuildIndexSettings.model_validate({"index": {"shards": shards}}), packed=shards is None)
    risen = set()
    for power in range(10):
        few, many = (scaling.fleet(2**p) for p in (power, power + 1))
        for before, after in zip(costs.build_index(build, few), costs.build_index(build, many), strict=True):
            if costs.seconds(after, many) > costs.seconds(before, few) * (1 + 1e-9):
                risen.add(before.title)
    assert risen <= costs.SLOWER_WITH_NODES, risen


def test_what_is_named_as_slower_with_nodes_is():
    build = scaling.build(10**6, BuildIndexSettings.model_validate({"index": {"shards": 1000}}))
    seconds = [
        {phase.title: costs.seconds(phase, machines) for phase in costs.build_index(build, machines)}
        for machines in (scaling.fleet(10), scaling.fleet(1000))
    ]
    assert all(seconds[1][title] > seconds[0][title] for title in costs.SLOWER_WITH_NODES)


def test_a_phase_takes_as_long_as_its_slowest_resource():
    machines = costs.Fleet(4, 8.0, 1e11, network_bytes_per_s=1e9, gets_per_s=100.0)
    phase = costs.Phase("s", "p", tasks=320, core_s=3200.0)
    assert costs.seconds(phase, machines) == 100.0 and costs.limit_of(phase, machines) == costs.CORES
    read = replace(phase, read_bytes=4e11)  # 100 s through four nodes, on top of the computing in the same tasks
    assert costs.seconds(read, machines) == 200.0
    asked = replace(phase, gets=5e4)
    assert costs.seconds(asked, machines) == 500.0 and costs.limit_of(asked, machines) == costs.REQUESTS
    alone = replace(phase, tasks=1)
    assert costs.seconds(alone, machines) == 3200.0 and costs.limit_of(alone, machines) == costs.ONE
    assert not costs.fits(replace(phase, memory_bytes=1e10), machines) and costs.fits(phase, machines)


def test_an_update_in_steps_compares_each_pair_once():
    # n^2 pairs in all, self included, however the rows arrive
    assert costs.pairs_of_update(0, 700) == 700**2
    steps = [300, 1, 250, 149]
    arrived = np.cumsum([0, *steps])
    assert sum(costs.pairs_of_update(int(old), new) for old, new in zip(arrived, steps, strict=False)) == 700**2


@pytest.mark.parametrize("settings", [{}, {"index": {"kind": "flat"}}], ids=str)
def test_an_update_goes_over_all_rows_but_for_pairs_extraction_training_and_fit(settings):
    """tests/build/test_update.py holds its phases to the tasks that an update starts."""
    build, machines = scaling.build(10**6, BuildIndexSettings.model_validate(settings)), scaling.fleet(10)
    whole = {phase.title: phase for phase in costs.build_index(build, machines)}
    update = {phase.title: phase for phase in costs.update_index(build, 10**4, machines)}
    saved = {
        *("listing: walk and sort", "neighbors: search", "estimator: fit the predictor"),
        *("index: draw the training sample", "index: train the quantizer"),
    }
    assert whole.keys() - update.keys() == saved & whole.keys()
    same = {title for title in whole.keys() & update.keys() if whole[title] == update[title]}
    shards = set() if build.cells else {"index: fill shards"}  # of a flat index those of the new rows alone
    others = {"features: decode and extract", "neighbors: open the shards", *shards}
    assert same == whole.keys() & update.keys() - others
    assert update["features: decode and extract"].read_bytes == whole["features: decode and extract"].read_bytes / 100
    # half of the rows are three quarters of the pairs, and those of a rebuild take what the model says of them
    unit = replace(costs.MEASURED, query_s=0.0)
    pairs = costs.pairs_of_update(5 * 10**5, 5 * 10**5) / 10.0**12
    searching = [0.0, 0.0]
    for number, new in enumerate((0, 5 * 10**5)):
        (joined,) = (p for p in costs.update_index(build, max(new, 1), machines, unit) if p.name.startswith("old rows"))
        actors, threads = costs.searchers(build, machines, search.BESIDE_SHARE)
        searching[number] = joined.floors["search processes"] * actors * min(threads, machines.cores)
        fresh = max(new, 1) * build.vector_bytes * unit.shard_build_s * joined.tasks
        merged = costs.fan_out(build, actors) * max(new, 1) * unit.merge_s - max(new, 1) * unit.merge_s
        searching[number] += joined.core_s - fresh - merged
    assert searching[1] - searching[0] == pytest.approx(pairs * costs.search_core_s(build, 1, unit), rel=1e-3)


def test_an_update_of_a_large_index_waits_for_listing_and_report_and_too_many_new_rows_do_not_fit():
    build, machines = scaling.build(10**8), scaling.fleet(100)
    phases = costs.update_index(build, 10**5, machines)
    longest = sorted(phases, key=lambda phase: -costs.seconds(phase, machines))
    assert [phase.title for phase in longest[:2]] == ["listing: walk and compare", "report: draw"]
    assert all(costs.fits(phase, machines) for phase in phases)
    assert costs.bottleneck(costs.update_index(build, 10**6, machines), machines).limit == costs.MEMORY


def test_pairs_make_the_search_quadratic_and_k_means_linear():
    one, two = (scaling.build(n) for n in (10**8, 4 * 10**8))
    exact = [replace(b, nprobe=0, scanned=1.0) for b in (one, two)]
    unit = replace(costs.MEASURED, query_s=0.0)
    assert costs.search_core_s(exact[1], 7, unit) == pytest.approx(16 * costs.search_core_s(exact[0], 7, unit))
    trained = [
        next(p.core_s for p in costs.build_index(b, scaling.fleet(10)) if p.name == "train the quantizer")
        for b in (one, two)
    ]
    assert trained[1] == pytest.approx(4 * trained[0], rel=1e-4)  # cells are whole numbers near 4 sqrt(N)


@pytest.mark.parametrize("nodes", [1, 10, 300])
def test_actors_are_those_that_the_stages_start(nodes):
    machines = scaling.fleet(nodes)
    now = resources.Cluster(nodes * 32.0, 0.0, False, "", 32.0, elastic=True)
    build = scaling.build(10**8)
    assert costs.searchers(build, machines) == resources.search_actors(now, None, 1, build.shards)[:2]
    assert costs.extractors(build, machines) == resources.actor_pool(now, None, 1, None)[1]


def test_a_run_is_resolved_as_the_index_stage_resolves_it(tmp_path):
    settings = BuildIndexSettings(index=IndexSettings(kind="ivf_flat"), density=DensitySettings(k=K))
    featured = artifacts.Artifact(
        "features",
        1,
        "",
        {},
        (artifacts.Part("a", 90_000, 1, ""), artifacts.Part("b", 9_000, 1, "")),
        {"dim": 4096},
        {},
        {},
    )
    _, resolved = index_build.stage_of(str(tmp_path), featured, settings.index, settings.density)
    build = costs.build_of(settings, 99_000, 99_000, 4096, 1, 0.0, 0.0, 0.0)
    assert (build.settings.index.kind, build.shards, build.cells) == (resolved.kind, resolved.shards, resolved.cells)
    assert build.shards == index_shards.default_shards(99_000, 4096) == 2


# ---- the stages themselves -------------------------------------------------------------------------------------------


def commit_features(output: str, x: np.ndarray, part_rows: int) -> artifacts.Artifact:
    """As the features stage: keys with their hashes, content hashes, sizes, labels."""
    stage = artifacts.Stage(files.join(output, "features"), "features", schemas.VERSIONS["features"], {"rows": len(x)})
    stage.begin(overwrite=False)
    schema = schemas.features(x.shape[1])
    for number, start in enumerate(range(0, len(x), part_rows)):
        rows = x[start : start + part_rows]
        keys = [f"folder-{i % 7}/image-{i:08d}.jpg" for i in range(start, start + len(rows))]
        values = pa.array(rows.reshape(-1))
        columns = [
            pa.array(sources.sample_ids(keys)),
            pa.array(keys),
            pa.array([artifacts.sha256(key.encode()) for key in keys]),
            pa.array([640] * len(rows), pa.int32()),
            pa.array([427] * len(rows), pa.int32()),
            pa.array([key[:8] for key in keys]),
            pa.FixedSizeListArray.from_arrays(values, x.shape[1]).cast(schema.field("feature").type),
        ]
        stage.write_table(artifacts.part_name(number), pa.table(columns, schema=schema))
    return stage.commit(stage.finished_parts().values(), {"rows": len(x), "dim": x.shape[1]}, {})


@pytest.fixture(scope="module")
def joined(tmp_path_factory, ray_cluster):
    """Exact index in three shards, neighbors and densities of 9,000 rows: commit records by stage, and the model's."""
    output = str(tmp_path_factory.mktemp("costs"))
    settings = BuildIndexSettings.model_validate(
        {
            "features": {"part_rows": PART_ROWS},
            "index": {"kind": "flat", "shards": SHARDS, "actors": SHARDS},
            "density": {"k": K, "block_rows": 2048},
        }
    )
    featured = commit_features(output, clustered(ROWS, DIM), PART_ROWS)
    found, index_uri = joins.complete(output, featured, settings, ray_cluster)
    made = {"features": featured} | found
    return made, costs.build_of(settings, ROWS, ROWS, DIM, 1, 0.0, 0.0, 0.0), index_uri


@pytest.mark.slow
def test_stages_write_the_bytes_that_the_model_says(joined):
    made, build, _ = joined
    written = costs.written_bytes(costs.build_index(build, costs.Fleet(1, 2.0, 1e10)))
    found = {stage: sum(part.bytes for part in artifact.parts) for stage, artifact in made.items()}
    # of the index nothing is compressed: 8 bytes an id and 4 a value, and less than 1 kB of headers a shard
    assert 0 <= found["index"] - ROWS * (4 * DIM + 8) <= SHARDS * 1000
    assert written["index"] == ROWS * (4 * DIM + 8)
    # Random floats compress hardly, by 7%. But Parquet keeps the first MiB of different values twice, in a dictionary
    # and as places in it: of these parts a third of the values, 2 bytes each, which makes them larger by 17%; at D =
    # 768, 4%.
    assert written["features"] == pytest.approx(found["features"], rel=0.15)
    # the model takes neighbors for drawn at random, and distances for random floats: near rows share theirs
    assert written["neighbors"] == pytest.approx(found["neighbors"], rel=0.25)
    assert written["densities"] == pytest.approx(found["densities"], rel=0.25)


@pytest.mark.slow
def test_an_exact_search_moves_the_rows_that_the_model_says(joined, ray_cluster):
    made, build, uri = joined
    assert made["neighbors"].totals["rows_sent_per_query"] * ROWS == costs.rows_sent(build, SHARDS, ROWS)
    info = search.open_index(uri)
    queries = clustered(500, DIM, seed=1)
    for actors in (1, 2, SHARDS):
        with search.open_pool(info, ray_cluster, actors, 1) as pool:
            _, _, traffic = search.search(pool, queries, K)
        assert traffic.rows_sent == costs.rows_sent(build, actors, len(queries))


@pytest.mark.slow
def test_a_search_by_cells_moves_as_many_rows_as_shards_are_probed(tmp_path, ray_cluster):
    dim = 8  # so few that the neighbors of a row lie in many cells
    x = clustered(4000, dim, clusters=4)
    settings = BuildIndexSettings.model_validate(
        {"index": {"kind": "ivf_flat", "cells": 40, "shards": 4, "target_recall": 0.99, "calibration_queries": 200}}
    )
    featured = commit_features(str(tmp_path), x, 1024)
    uri = files.join(str(tmp_path), "features")
    stage, resolved = index_build.stage_of(str(tmp_path), featured, settings.index, settings.density)
    indexed = stage.complete(lambda: index_build.run(stage, uri, featured, resolved, settings.density), False)
    info = search.open_index(stage.uri)
    with search.open_pool(info, ray_cluster, 4, 1) as pool:
        _, _, traffic = search.search(pool, x, K)
    probes = index_shards.coarse_probes(search.read_quantizer(stage.uri), x, info.nprobe)
    owners = np.asarray(info.shard_of_cell)[probes]
    # a query whose cells hold fewer than k rows is sent to everyone once more
    table = json.loads(files.read_bytes(files.join(stage.uri, search.CELLS)))
    short = (np.asarray(table["rows_of_cell"])[probes].sum(axis=1) < K).sum()
    asked = sum(len(set(row)) for row in owners.tolist())
    assert traffic.rows_sent == asked + 4 * short
    # the model's spread is a number of the data: with the one that these rows have, it says the same
    build = costs.build_of(settings, len(x), len(x), dim, 1, 0.0, 0.0, 0.0)
    spread = math.log(asked / len(x), 4)
    build = replace(build, nprobe=indexed.totals["nprobe"], spread=spread)
    assert 0 < spread < 1 and build.nprobe > 4 and costs.rows_sent(build, 4, len(x)) == pytest.approx(asked)
    assert costs.fan_out(build, 1) == 1 and costs.fan_out(replace(build, spread=1.0), 10**6) == build.nprobe


def test_decoding_tasks_and_passes_over_the_features_are_those_of_the_stages():
    build, machines = scaling.build(10**9), scaling.fleet(100)
    assert features.batches_together(10**9 // 64, 64, 64 * 3 * 224 * 224, None) == math.ceil(10**9 / 64 / 8192)
    at_once = index_build.fit_shards(machines.store_bytes, 4 * 768 * 10**9 // build.shards, build.groups)
    assert costs.rounds(build, machines) == math.ceil(build.shards / at_once) == 477
    groups = list(index_build._groups("", _record(1000, 4096)))
    assert costs.build_of(BuildIndexSettings(), 4096 * 1000, 1, 768, 1, 0.0, 0.0, 0.0).groups == len(groups)


def _record(parts: int, rows: int) -> artifacts.Artifact:
    made = tuple(artifacts.Part(artifacts.part_name(n), rows, 1, "") for n in range(parts))
    return artifacts.Artifact("features", 1, "", {}, made, {"dim": 768}, {}, {})


# ---- nodes that are lost ---------------------------------------------------------------------------------------------


def test_without_losses_the_simulation_takes_what_the_closed_form_says():
    machines = scaling.fleet(10)
    phases = costs.build_index(scaling.advised_build(10**6, 10), machines)
    for played in simulation.play(phases, machines, simulation.Spot()):
        expected = costs.seconds(played.phase, machines)
        # the last tasks run alone: at most one more round of them, or of bundles of them
        rounds = played.phase.tasks / costs.slots(played.phase, machines)
        assert expected * (1 - 1e-9) <= played.seconds <= expected * (1 + 1.01 / min(rounds, 1000)) + 1e-6
        assert played.limit == costs.limit_of(played.phase, machines) and played.lost_s == 0


def test_the_same_seed_loses_the_same_nodes():
    machines = scaling.fleet(100)
    phases = costs.build_index(scaling.advised_build(10**8, 100), machines)
    seconds = [
        [one.seconds for one in simulation.play(phases, machines, simulation.Spot(0.2), seed)] for seed in (3, 3, 4)
    ]
    assert seconds[0] == seconds[1] != seconds[2]
    assert sum(seconds[0]) > costs.total_s(phases, machines)


def test_one_long_task_on_a_node_that_is_lost():
    """It takes (e^(lT) - 1) / l of running on average until one try of T survives losses at rate l, for l T = 0.5."""
    machines = costs.Fleet(1, 1.0, 1e12)
    phase = costs.Phase("s", "p", tasks=1, core_s=1800.0)
    spot = simulation.Spot(losses_per_hour=1.0, replace_s=0.0)
    took = np.array([simulation.play([phase], machines, spot, seed)[0].seconds for seed in range(4000)])
    ended = took[np.isfinite(took)]
    assert len(ended) / len(took) == pytest.approx(1 - (1 - math.exp(-0.5)) ** simulation.ATTEMPTS, abs=0.01)
    rate = 1 / 3600
    # of an exponential below T, its mean; tries until one survives, at most ATTEMPTS of them
    survive, lost = math.exp(-0.5), 1 / rate - 1800 * math.exp(-0.5) / (1 - math.exp(-0.5))
    odds = [survive * (1 - survive) ** n for n in range(simulation.ATTEMPTS)]
    mean = sum(p * (1800 + n * lost) for n, p in enumerate(odds)) / sum(odds)
    assert ended.mean() == pytest.approx(mean, abs=5 * ended.std() / math.sqrt(len(ended)))


def test_a_self_join_waits_for_every_node():
    """Of n nodes all are up a share (1 + l R)^-n of the time, where each is lost at rate l and away for R."""
    nodes, work_s, blocks, replace_s = 20, 2000.0, 4000, 90.0
    machines = costs.Fleet(nodes, 1.0, 1e12)
    phase = costs.Phase("s", "p", tasks=nodes, core_s=nodes * work_s, blocks=blocks)
    spot = simulation.Spot(losses_per_hour=1.0, replace_s=replace_s)
    took = [simulation.play([phase], machines, spot, seed)[0].seconds for seed in range(40)]
    up = (1 + replace_s / 3600) ** -nodes
    # a node that is back has up to 21 blocks of 0.5 s to answer that the others have answered already: 10.5 of the 90 s
    # are not lost to these. 40 runs meet some 700 losses, so that their share of the time is known to 4%.
    hidden = (nodes + 1) * work_s / blocks / replace_s
    lost = work_s * (1 / up - 1)
    assert work_s + lost * (1 - hidden) * 0.88 <= np.mean(took) <= work_s + lost * 1.12


# ---- the page --------------------------------------------------------------------------------------------------------


def test_the_page_is_what_the_code_gives():
    text = scaling.PAGE.read_text()
    assert {name for _, name, _ in scaling.MARKED.findall(text)} == set(scaling.TABLES)
    assert scaling.page(text) == text, "run python benchmarks/scaling.py"


def test_unit_costs_are_those_that_were_measured():
    measured = json.loads((ROOT / "docs" / "unit_costs.json").read_text())
    found = {name: value for one in measured.values() for name, value in one["costs"].items()}
    for unit in fields(costs.UnitCosts):
        source, _, name = unit.metadata["source"].partition(": ")
        if source == "unit_costs":
            assert unit.default == pytest.approx(found[name], rel=0.01), unit.name
        else:
            assert source in ("benchmarks", "docs/log.md, 2026-11-27"), unit.name
    assert pytest.approx(found["flops"], rel=0.15) == costs.CORE_FLOPS


def test_generating_a_million_is_limited_by_its_actors():
    sampled = costs.Sampling(10**6, 0.1, 64, 64, 0.5, 40_000.0, 64, 3e9, 3)
    machines = scaling.fleet(10)
    (phase,) = costs.generate(sampled, 768, machines)
    assert phase.core_s == 10**7 * 0.5 and phase.tasks == 156_250
    assert costs.seconds(phase, machines) > 10**7 * 0.5 / 64 and costs.limit_of(phase, machines) == costs.FEW
