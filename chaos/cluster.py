"""A cluster of several nodes on this machine, whose workers and nodes can be killed; ended by their own ids."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    from ray._private.node import Node

NODES = 2  # beside the head
CPUS = 2  # of each
NOT_WORKING = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent")  # a raylet ends with its agents
GONE_S = 30.0


class Nodes:
    """A head and NODES worker nodes, of which `env` is the way to them for a driver."""

    def __init__(self) -> None:
        # Ray's other programs on this machine must not take this cluster for theirs, nor we theirs: a token, and a
        # folder of its own (short: the paths of sockets are limited).
        self.folder = tempfile.mkdtemp(prefix="chaos-")
        self.env = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(16),
            "RAY_TMPDIR": self.folder,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_enable_open_telemetry": "0",
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Ray's only way to a loopback address of all nodes and drivers
        }
        os.environ.update(self.env)  # before Ray is imported
        from ray.cluster_utils import Cluster

        self.cluster: Any = Cluster(initialize_head=True, head_node_args={"num_cpus": CPUS, "include_dashboard": False})
        self.env["RAY_ADDRESS"] = self.cluster.address
        self.replace()

    def replace(self) -> None:
        """Add nodes until there are NODES again.

        Raises:
            RuntimeError: one is gone that no case has killed.
        """
        for node in self.cluster.list_all_nodes():
            if (raylet := _raylet(node)) is None or raylet.status() == psutil.STATUS_ZOMBIE:
                raise RuntimeError(f"a node of the cluster has died by itself: see {self.folder}")
        while len(self.cluster.worker_nodes) < NODES:
            self.cluster.add_node(num_cpus=CPUS)

    def workers(self, node: Node | None = None) -> list[psutil.Process]:
        """Ray worker processes that run something now, of one node or of all."""
        found = []
        for one in self.cluster.list_all_nodes() if node is None else [node]:
            for process in _children(_raylet(one)):
                with contextlib.suppress(psutil.Error):
                    if is_busy(process):
                        found.append(process)
        return found

    def kill_node(self, node: Node) -> None:
        """SIGKILL to all processes of a node at once, as when the machine is taken away."""
        raylet = _raylet(node)
        for process in [*([] if raylet is None else [raylet]), *_children(raylet)]:
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.cluster.remove_node(node, allow_graceful=False)

    def settle(self) -> None:
        """Return when no worker runs anything: a killed driver's are ended by Ray."""
        deadline = time.monotonic() + GONE_S
        while self.workers() and time.monotonic() < deadline:
            time.sleep(0.2)

    def end(self) -> None:
        """Every process of it."""
        family = [p for node in self.cluster.list_all_nodes() for p in _children(_raylet(node))]
        self.cluster.shutdown()
        for process in family:
            with contextlib.suppress(psutil.Error):
                process.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


def is_busy(process: psutil.Process) -> bool:
    """Whether a process is a Ray worker that holds an actor or runs a task. Raises psutil.Error."""
    title = " ".join(process.cmdline())
    return title.startswith("ray::") and not title.startswith(NOT_WORKING)


def _raylet(node: Node) -> psutil.Process | None:
    running = node.all_processes.get("raylet")
    if not running:
        return None
    try:
        return psutil.Process(running[0].process.pid)
    except psutil.NoSuchProcess:
        return None


def _children(process: psutil.Process | None) -> list[psutil.Process]:
    try:
        return [] if process is None else process.children(recursive=True)
    except psutil.Error:
        return []


@contextlib.contextmanager
def running_nodes() -> Iterator[Nodes]:
    """Start them, and end them afterwards."""
    nodes = Nodes()
    try:
        yield nodes
    finally:
        nodes.end()
