"""`ray start --head` for tests: its processes are ended by their ids, never through `ray stop`."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from pd_core.engine.session import LOOPBACK_VARIABLE

RAY = str(Path(sys.executable).parent / "ray")
START_TIMEOUT_S = 180.0


@dataclass(frozen=True)
class Head:
    """A running head node.

    Attributes:
        dashboard: http://127.0.0.1:PORT, which takes jobs.
        address: of the cluster, for RAY_ADDRESS.
        environment: with the token that both ask for.
        metrics: where Prometheus would scrape it.
        log: what it printed.
        pid: of its first process.
    """

    dashboard: str
    address: str
    metrics: str
    environment: dict[str, str]
    log: Path
    pid: int

    def submit(self, workflow: str, *argv: str, timeout_s: float = 580) -> subprocess.CompletedProcess[str]:
        """`ray job submit` of a workflow of this tree."""
        root = Path(__file__).resolve().parent.parent
        command = [
            *(RAY, "job", "submit", "--address", self.dashboard, "--working-dir", str(root)),
            *("--", sys.executable, f"workflows/{workflow}", *argv),
        ]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=timeout_s)

    def processes(self) -> list[psutil.Process]:
        """All of its processes, workers and nodes that it started among them."""
        first = psutil.Process(self.pid)
        return [first, *first.children(recursive=True)]


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody listens on."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@contextlib.contextmanager
def running_head(directory: Path, *options: str, port: int = 0, **environment: str) -> Iterator[Head]:
    """A head node of our own, on loopback, with token authentication.

    Args:
        directory: for its log.
        options: of `ray start`.
        port: of the cluster; any free one if 0.
        environment: on top of this process's, for the head and so for all its workers.
    """
    log_file = directory / "head.log"
    everything: dict[str, str] = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(16),
        "RAY_USAGE_STATS_ENABLED": "0",
        LOOPBACK_VARIABLE: "0",  # without it Ray listens on every interface
        **environment,
    }
    # what a cluster of a test process sets for itself would turn the metrics of this one off
    everything.pop("RAY_enable_open_telemetry", None)
    ports = free_ports(5)
    port = port or ports[0]
    command = [
        *(RAY, "start", "--head", "--block", f"--port={port}", "--node-ip-address=127.0.0.1"),
        *("--dashboard-host=127.0.0.1", f"--dashboard-port={ports[1]}", f"--ray-client-server-port={ports[2]}"),
        f"--metrics-export-port={ports[3]}",
        # that of another Ray on this machine may be in use: no agent, no job
        f"--dashboard-agent-listen-port={ports[4]}",
        *options,
    ]
    dashboard = f"http://127.0.0.1:{ports[1]}"
    with log_file.open("w") as log:
        process = subprocess.Popen(command, env=everything, stdout=log, stderr=log, start_new_session=True)
        metrics = f"http://127.0.0.1:{ports[3]}"
        head = Head(dashboard, f"127.0.0.1:{port}", metrics, everything, log_file, process.pid)
        try:
            deadline = time.monotonic() + START_TIMEOUT_S
            ready = [RAY, "job", "list", "--address", dashboard]
            while subprocess.run(ready, env=head.environment, capture_output=True).returncode != 0:
                assert process.poll() is None and time.monotonic() < deadline, log_file.read_text()
                time.sleep(1)
            yield head
        finally:
            _end(head, process)


def _end(head: Head, process: subprocess.Popen[bytes]) -> None:
    family = head.processes() if process.poll() is None else []
    process.send_signal(signal.SIGTERM)
    _, left = psutil.wait_procs(family, timeout=30)
    for one in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait(10)


# ---- a cluster that scales -------------------------------------------------------------------------------------------

HEAD_TYPE = "ray.head.default"  # the name that Ray's fake provider gives its head
IDLE_S = 15.0
COMMANDS = (
    *("cluster_synced_files", "rsync_exclude", "rsync_filter", "initialization_commands"),
    *("setup_commands", "head_setup_commands", "worker_setup_commands"),
    *("head_start_ray_commands", "worker_start_ray_commands"),
)


@contextlib.contextmanager
def autoscaling_head(directory: Path, node_types: Mapping[str, Mapping[str, int]]) -> Iterator[Head]:
    """A head without CPUs whose autoscaler starts nodes, all on this machine, and ends those that are idle for IDLE_S.

    Args:
        directory: for its files.
        node_types: resources of a node of each type, and under `max` how many there may be.
    """
    (port,) = free_ports(1)
    types: dict[str, dict[str, Any]] = {
        name: {
            "resources": {"object_store_memory": 200 << 20, **{k: v for k, v in resources.items() if k != "max"}},
            "node_config": {},
            "min_workers": 0,
            "max_workers": resources["max"],
        }
        for name, resources in node_types.items()
    }
    settings = {
        "cluster_name": "fake",
        "max_workers": sum(kind["max_workers"] for kind in types.values()),
        "idle_timeout_minutes": IDLE_S / 60,
        "provider": {
            "type": "fake_multinode",
            "gcs_address": f"127.0.0.1:{port}",
            "use_node_id_as_ip": True,  # all have one address
            "launch_multiple": True,
        },
        # the rest is what `ray up` would fill in
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        "upscaling_speed": 1.0,
        **{name: [] for name in COMMANDS},
        "available_node_types": {HEAD_TYPE: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}, **types},
        "head_node_type": HEAD_TYPE,
    }
    file = directory / "autoscaling.json"
    file.write_text(json.dumps(settings))
    options = ("--num-cpus=0", f"--autoscaling-config={file}")
    with running_head(directory, *options, port=port, RAY_FAKE_CLUSTER="1") as head:
        yield head


class Watch:
    """What the autoscaler says of nodes and demands, twice a second, in `seen`: see watch_nodes.py."""

    def __init__(self, head: Head) -> None:
        script = Path(__file__).parent / "watch_nodes.py"
        self._process = subprocess.Popen(
            [sys.executable, str(script), head.address],
            stdout=subprocess.PIPE,
            text=True,
            env=head.environment,
        )
        self.seen: list[dict[str, Any]] = []
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.seen.append(json.loads(line))

    def until(self, holds: Callable[[dict[str, Any]], bool], timeout_s: float) -> dict[str, Any]:
        """The first look, from the next one on, of which `holds` is true."""
        first, deadline = len(self.seen), time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            for look in self.seen[first:]:
                if holds(look):
                    return look
            assert self._process.poll() is None, "watch_nodes.py has ended"
            time.sleep(0.1)
        raise AssertionError(f"not within {timeout_s:g} s; last seen {self.seen[-1:]}")

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait(10)
        self._thread.join(10)
