"""A Ray head node of a test's own, as `ray start --head` gives it to an operator; ended by pid, never through `ray stop`."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

RAY = str(Path(sys.executable).parent / "ray")


@dataclass(frozen=True)
class Head:
    """Where it listens. environment: of its clients."""

    gcs: str
    dashboard: str
    metrics: str
    environment: dict[str, str]


@contextlib.contextmanager
def running_head(folder: Path, cpus: int = 4) -> Iterator[Head]:
    """A head with token authentication that listens on free ports."""
    log_file = folder / "head.log"
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(16),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    # what a cluster of a test process sets for itself would turn the metrics of this one off
    environment.pop("RAY_enable_open_telemetry", None)
    gcs, dashboard, client, metrics = free_ports(4)
    with log_file.open("w") as log:
        process = subprocess.Popen(
            [
                RAY,
                "start",
                "--head",
                "--block",
                f"--num-cpus={cpus}",
                "--node-ip-address=127.0.0.1",
                f"--port={gcs}",
                "--dashboard-host=127.0.0.1",
                f"--dashboard-port={dashboard}",
                f"--ray-client-server-port={client}",
                f"--metrics-export-port={metrics}",
            ],
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        head = Head(f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}", f"http://127.0.0.1:{metrics}", environment)
        try:
            deadline = time.monotonic() + 120
            ready = [RAY, "job", "list", "--address", head.dashboard]
            while subprocess.run(ready, env=environment, capture_output=True).returncode != 0:
                assert process.poll() is None and time.monotonic() < deadline, log_file.read_text()
                time.sleep(1)
            yield head
        finally:
            family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            process.send_signal(signal.SIGTERM)
            _, left = psutil.wait_procs(family, timeout=30)
            for one in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports: list[int] = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
