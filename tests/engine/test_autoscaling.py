"""A cluster that has no worker until a run asks for some, and none again after it: Ray's own autoscaler, on one
machine.
"""

import pytest

from tests import tiny
from tests.ray_head import IDLE_S, Watch, autoscaling_head

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

CPU_NODES = 3  # more than are asked for: an autoscaler that may add no other takes a GPU node for work on CPUs
WAIT_S = 180.0  # a busy machine starts a node in far less


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    types = {"cpu": {"CPU": 2, "max": CPU_NODES}, "gpu": {"CPU": 1, "GPU": 1, "max": 1}}
    with autoscaling_head(tmp_path_factory.mktemp("head"), types) as head:
        yield head


@pytest.fixture
def watch(head):
    with Watch(head) as watch:
        watch.until(lambda look: not look["nodes"], WAIT_S)
        yield watch


def start(head, inputs, output, *more):
    argv = tiny.arguments(*inputs, output, "--no-tracking.enabled", *more)
    return tiny.start(*argv, RAY_ADDRESS=head.address, **head.environment)


def nodes_of(watch):
    return [look["nodes"] for look in watch.seen]


def test_a_node_comes_for_a_run_and_leaves_after_it(head, watch, inputs, built, tmp_path):
    process = start(head, inputs, tmp_path / "out")
    text, _ = process.communicate(timeout=600)
    assert process.returncode == 0, text
    assert "ray: 0 CPUs and 0 GPUs at" in text
    assert any(nodes.get("cpu") for nodes in nodes_of(watch)) and not any("gpu" in nodes for nodes in nodes_of(watch))
    watch.until(lambda look: not look["nodes"], WAIT_S + IDLE_S)
    assert tiny.tables(tmp_path / "out") == tiny.tables(built)


def test_a_pool_with_work_before_it_grows_over_more_nodes(head, watch, inputs, tmp_path):
    """Large images keep one extractor of one CPU busy for far longer than a node takes to come."""
    process = start(head, inputs, tmp_path / "out", "--features.image_size=1024", "--features.actors=3")
    text, _ = process.communicate(timeout=600)
    assert process.returncode == 0, text
    assert max(nodes.get("cpu", 0) for nodes in nodes_of(watch)) >= 2
    assert not any("gpu" in nodes for nodes in nodes_of(watch))
    watch.until(lambda look: not look["nodes"], WAIT_S + IDLE_S)


def test_the_stage_that_wants_gpus_asks_for_their_nodes_and_the_others_for_cpus(head, watch, inputs, tmp_path):
    """The GPU is a number: nothing can run on it, and the run is ended as soon as its node is there."""
    process = start(head, inputs, tmp_path / "out", "--features.actor_gpus=1")
    try:
        look = watch.until(lambda look: "gpu" in look["nodes"], 2 * WAIT_S)
    finally:
        process.kill()
        text, _ = process.communicate()
    asked = [demand["bundle"] for look in watch.seen for demand in look["demands"]]
    assert {bundle["GPU"] for bundle in asked if "GPU" in bundle} == {1.0}, text
    assert any("GPU" not in bundle and bundle.get("CPU") for bundle in asked), text  # listing and decoding
    assert look["nodes"].get("cpu"), look
    watch.until(lambda look: not look["nodes"], WAIT_S + IDLE_S)
