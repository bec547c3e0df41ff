"""The plan of a run: what --dry-run says of one that nobody has paid for."""

import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from pd_core.build import fleet, plan, probe
from pd_core.core.settings.index import BuildIndexSettings
from pd_core.engine import resources, tasks
from pd_core.images import decode, listing, resize
from pd_core.index import extractor

NODES = fleet.Fleet(resources.Cluster(320.0, 0.0, False, "", 32.0), 10, 128 * fleet.GIB)
PROBED = probe.Probe(read_s=0.0, decode_s=0.003, extract_s=0.25, bad=0, tried=64, flops=1.9e11, model_bytes=1)
PREPROCESS = resize.Preprocess(224, 224, "bicubic", 1.0, "center", (0.5,) * 3, (0.5,) * 3)
SPEC = extractor.ExtractorSpec("vit", None, "", 768, PREPROCESS, "fp32", "")


def planned(monkeypatch, nodes, elastic, rows=10**6, unit=PROBED, **settings) -> str:
    """The plan of a build of so many images, as a cluster of these nodes would print it."""
    up = [{"Alive": True, "Resources": node} for node in nodes]
    total = {name: sum(node.get(name, 0.0) for node in nodes) for name in ("CPU", "GPU")}
    now = resources.Cluster(total["CPU"], total["GPU"], False, "", 8.0, elastic=elastic)
    counted = {"rows": rows, "bytes": 44_000 * rows, "files": rows, "sample": None}
    monkeypatch.setattr("ray.nodes", lambda: up)
    monkeypatch.setattr(listing, "count", lambda source: counted)
    monkeypatch.setattr(probe, "probe", lambda *args: None)
    monkeypatch.setattr(tasks, "get", lambda reference: (SPEC, unit))
    monkeypatch.setattr(resources, "refreshed", lambda before: now)
    chosen = BuildIndexSettings.model_validate({"output": "s3://bucket/out", "features": settings})
    source: Any = SimpleNamespace(root="s3://bucket/images", kind="images")
    before = resources.Cluster(0.0, 0.0, False, "", elastic=elastic)
    return plan.plan(chosen, source, before, decode.DecodeLimits(1, 1, (0, 0, 0), 1))


NODE = {"CPU": 8.0, "memory": 24e9, "object_store_memory": 8e9}


def test_a_plan_on_a_cluster_that_grows_says_for_which_nodes_it_is(monkeypatch):
    text = planned(monkeypatch, [{"memory": 8e9}], elastic=True)  # the head alone
    assert "1 node of 8 CPUs" in text
    assert "fleet:     times are for one node of 8 CPUs and 32.0 GiB, an assumption, since none is up" in text
    assert "on 1 cores" not in text and "1 node of 1 CPUs" not in text
    text = planned(monkeypatch, [{"memory": 8e9}, NODE, NODE], elastic=True)
    assert "fleet:     times are for the 2 nodes of 8 CPUs that the cluster has now" in text
    # decoding and model of a million images are 70.3 core-hours; what the others add is below a sixth of that
    (hours,) = re.findall(r"compute ([\d.]+) core-hours", text)
    assert 10**6 * 0.253 / 3600 < float(hours) < 10**6 * 0.253 / 3600 * 1.16
    assert "fleet:" not in planned(monkeypatch, [NODE, NODE], elastic=False)


def features_s(text: str) -> str:
    return re.findall(r"features (\d+ \w+|[\d.]+ h)", text)[0]


def test_a_plan_counts_what_a_store_takes_to_give_an_image(monkeypatch):
    slow = replace(PROBED, read_s=0.5)
    near, far = (planned(monkeypatch, [NODE], elastic=False, unit=unit) for unit in (PROBED, slow))
    assert "500.0 ms reading from the source" in far and features_s(near) != features_s(far)
    build = plan.Build(BuildIndexSettings(), 10**6, SPEC, slow, NODES, gpus=False)
    (step,) = (step for step in build.steps() if step.name == "features")
    assert step.core_s == pytest.approx(10**6 * (0.5 + 0.003 + 0.25))


def test_a_plan_does_not_pass_off_seconds_of_cpus_as_those_of_gpus(monkeypatch):
    on_cpus = planned(monkeypatch, [NODE], elastic=True)
    assert "250.0 ms model" in on_cpus and "runs on GPUs" not in on_cpus
    coming = planned(monkeypatch, [NODE], elastic=True, actor_gpus=1.0)
    there = planned(monkeypatch, [NODE | {"GPU": 1.0}], elastic=True)
    for text in (coming, there):
        assert "ms model" not in text and "the model runs on GPUs, which are not probed" in text
    assert features_s(coming) == features_s(there) != features_s(on_cpus)
    # GPUs that are not to be used change nothing
    unused = planned(monkeypatch, [NODE | {"GPU": 1.0}], elastic=True, actor_gpus=0.0)
    assert features_s(unused) == features_s(on_cpus) and "250.0 ms model" in unused


def test_a_plan_says_what_limits_a_large_run_and_nothing_of_a_small_one(monkeypatch):
    assert "limit:" not in planned(monkeypatch, [NODE], elastic=False, rows=2000)
    nodes = 40 * [NODE]
    (line,) = re.findall("limit: .*", planned(monkeypatch, nodes, elastic=False))
    assert line.startswith("limit:     estimator: one process, ") and "--estimator.epochs" in line
    (line,) = re.findall("limit: .*", planned(monkeypatch, nodes, elastic=False, rows=10**9))
    assert "memory, " in line and "GiB on a node that has 20.9 GiB" in line


def test_a_step_takes_its_rows_over_what_its_processes_do_and_more_nodes_help_only_where_there_are_tasks():
    many = fleet.Step("s", 3200.0, 1000, 0.0, "")
    assert many.seconds(NODES) == 10.0 and many.limit(NODES) == "cores"
    few, alone = replace(many, processes=4), replace(many, processes=1)
    assert few.seconds(NODES) == 800.0 and few.limit(NODES) == "few processes"
    assert alone.seconds(NODES) == 3200.0 and alone.limit(NODES) == "one process"
    assert replace(alone, threads=32).seconds(NODES) == 100.0
    assert many.node_bytes(NODES) == 32 * fleet.PROCESS_BYTES and alone.node_bytes(NODES) == fleet.PROCESS_BYTES


@pytest.mark.parametrize("kind", ["flat", "ivf_flat"])
def test_an_update_takes_quantizer_and_predictor_over_and_searches_for_what_is_new(kind):
    index = {"kind": kind, "shards": 3, "cells": 4000 if kind == "ivf_flat" else None}
    settings = BuildIndexSettings.model_validate({"index": index})
    build = plan.Build(settings, 10**6, SPEC, PROBED, NODES, gpus=False)
    whole, update, all_new = (
        {step.name: step for step in replace(build, new=new).steps()} for new in (None, build.rows // 100, build.rows)
    )
    assert whole.keys() - update.keys() == {"estimator"} | ({"quantizer"} if kind == "ivf_flat" else set())
    assert update["features"].core_s == pytest.approx(whole["features"].core_s / 100)
    assert update["neighbors"].core_s < whole["neighbors"].core_s
    assert all_new["neighbors"] == whole["neighbors"] and all_new["densities"] == whole["densities"]


def test_generating_a_million_is_limited_by_its_actors():
    step = fleet.Step("samples", 10**7 * 0.5, 64, 0.0, "--actors larger")
    (line,) = fleet.limit_lines([step], NODES)
    assert line == "limit:     samples: few processes, 21.7 h; what moves it: --actors larger"
    assert fleet.limit_lines([replace(step, core_s=3600.0)], NODES) == []
