"""A cluster that has no worker until a run asks for some, and none again after it: Ray's own autoscaler, on one machine."""

import pytest

from tests import tiny
from tests.ray_head import IDLE_S, Watch, autoscaling_head

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

CPU_NODES = 2
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


def test_nodes_come_for_a_run_and_leave_after_it(head, watch, inputs, built, tmp_path):
    process = start(head, inputs, tmp_path / "out", "--features.actors=3")
    text, _ = process.communicate(timeout=600)
    assert process.returncode == 0, text
    assert "ray: 0 CPUs and 0 GPUs at" in text
    nodes = [look["nodes"] for look in watch.seen]
    assert max(look.get("cpu", 0) for look in nodes) == CPU_NODES  # the pool grew over more than the first node
    assert not any("gpu" in look for look in nodes)
    watch.until(lambda look: not look["nodes"], WAIT_S + IDLE_S)
    assert tiny.tables(tmp_path / "out") == tiny.tables(built)


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
