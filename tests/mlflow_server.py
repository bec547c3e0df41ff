"""A real MLflow server on loopback, for tests: can be killed, and started again on the same port and data."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

START_S = 200.0  # 18 s on two free cores, much longer on busy ones


class MlflowServer:
    """`mlflow server` in a process group of its own, with its database, its log and what is uploaded in a directory."""

    def __init__(self, directory: Path):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = str(listener.getsockname()[1])
        self.directory, self.uri, self.log = directory, f"http://127.0.0.1:{port}", directory / "server.log"
        self.command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", port]
        self.command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{directory}/mlflow.db"]
        self.command += ["--serve-artifacts", "--artifacts-destination", str(directory / "served")]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns once it answers."""
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=log, cwd=self.directory, env=environment, start_new_session=True
            )
        deadline = time.monotonic() + START_S
        while self.process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=5):
                return
            time.sleep(0.5)
        raise RuntimeError(f"no answer from mlflow server\n{self.log.read_text(errors='replace')[-2000:]}")

    def kill(self) -> None:
        """SIGKILL to the whole group."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
