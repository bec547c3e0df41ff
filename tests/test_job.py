"""`ray job submit` against `ray start --head`, with the workflow's own defaults of a job: nothing installed by hand."""

import contextlib
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests import tiny

# a head with a dashboard takes 10 s, a job 15 s more, on top of the workflow
pytestmark = [pytest.mark.slow, pytest.mark.timeout(700)]

RAY = str(Path(sys.executable).parent / "ray")


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    """A head node of our own; its processes are ended by pid, never through `ray stop`."""
    log_file = tmp_path_factory.mktemp("head") / "head.log"
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(16),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    log = log_file.open("w")
    ports = free_ports(3)
    process = subprocess.Popen(
        [
            RAY,
            "start",
            "--head",
            "--block",
            "--num-cpus=4",
            f"--port={ports[0]}",
            "--dashboard-host=127.0.0.1",
            f"--dashboard-port={ports[1]}",
            f"--ray-client-server-port={ports[2]}",
        ],
        env=environment,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    address = f"http://127.0.0.1:{ports[1]}"
    deadline = time.monotonic() + 120
    ready = [RAY, "job", "list", "--address", address]
    while subprocess.run(ready, env=environment, capture_output=True).returncode != 0:
        assert process.poll() is None and time.monotonic() < deadline, log_file.read_text()
        time.sleep(1)
    yield address, environment
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    process.send_signal(signal.SIGTERM)
    _, left = psutil.wait_procs(family, timeout=30)
    for one in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    log.close()


def free_ports(count: int) -> list[int]:
    import socket

    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def submit(head, *argv, workflow="build_index.py"):
    address, environment = head
    return subprocess.run(
        [
            RAY,
            "job",
            "submit",
            "--address",
            address,
            "--working-dir",
            str(tiny.ROOT),
            "--",
            sys.executable,
            f"workflows/{workflow}",
            *argv,
        ],
        env=environment,
        capture_output=True,
        text=True,
        timeout=580,
    )


def test_jobs_run_the_workflows(head, tmp_path):
    images, checkpoint = tiny.write_images(tmp_path / "images"), tiny.write_checkpoint(tmp_path / "tiny.safetensors")
    done = submit(head, *tiny.arguments(images, checkpoint, tmp_path / "out", "--no-tracking.enabled"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "out" / "run.json").exists()
    assert re.search(r"ray: 4 CPUs and 0 GPUs at ", done.stdout)

    settings = {
        "index": tmp_path / "out",
        "generator.kind": "python",
        "generator.path": "tests.toy_generator:make",
        "n": 20,
        "weighting.threshold": "p60",
        "weighting.weight": 10,
        "chunk": 16,
        "pilot": 64,
        "output": tmp_path / "samples",
    }
    argv = [f"--{name}={value}" for name, value in settings.items()]
    done = submit(head, *argv, "--no-tracking.enabled", workflow="generate.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"report: {tmp_path / 'samples'}/report/index.html" in done.stdout


def test_a_job_with_bad_input_fails_with_the_line(head, tmp_path):
    done = submit(head, "--data.source=/nowhere/at/all", f"--output={tmp_path / 'out'}")
    assert done.returncode != 0
    assert "error: /nowhere/at/all: no such file or directory" in done.stdout + done.stderr


def test_a_job_refuses_an_output_that_would_go_with_it(head):
    done = submit(head, f"--data.source={tiny.ROOT / 'demo'}", "--output=runs/lost")
    assert done.returncode != 0
    assert "error: --output runs/lost: would lie in this job's temporary copy" in done.stdout + done.stderr


def test_a_job_without_settings_runs_the_demo_and_says_so(head):
    done = submit(head)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no settings given: using workflows/configs/default.yaml" in done.stdout
    assert "making the demo images in runs/demo-data" in done.stdout
    assert re.search(r"ray: /\S+/runs/digits is in the job's temporary copy .* give --output", done.stdout)
    assert re.search(r"report: (/\S+/runs/digits/report/index.html)", done.stdout)
