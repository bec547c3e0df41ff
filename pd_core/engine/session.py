"""The connection to a Ray cluster, or to one of our own that this process starts and ends."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pd_core.core.errors import RunError, UserError
from pd_core.engine import telemetry
from pd_core.engine.console import say
from pd_core.engine.resources import (
    START_ATTEMPTS,
    WORKER_BYTES,
    WORKERS_PER_CORE,
    Cluster,
    cores,
    describe,
    refreshed,
)

JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set by Ray for the driver of a job
TELEMETRY_OFF = {  # no package tells its makers about the run
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
LISTENS_S = 15.0  # a head that restarts is not there for some seconds
LOOPBACK_VARIABLE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
_shared: Cluster | None = None  # by a run whose parts are runs themselves


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """A handler of SIGTERM that was set before the body is so after it: Ray's start sets its own, which aborts or
    exits, and its end the system's.
    """
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if callable(before) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


@_own_sigterm()
def connect() -> Cluster:
    """Join the cluster that RAY_ADDRESS or the Ray job names, else start one on this machine.

    A cluster that we start ourselves has twice as many logical CPUs as cores: stages that stream into each other
    (read, decode, extract) must all hold a slot at once, or a pool that fills the machine starves its own input.
    """
    import ray

    for name, value in TELEMETRY_OFF.items():
        os.environ.setdefault(name, value)  # what is started here inherits it
    if ray.is_initialized():
        return describe(local=False)
    address = os.environ.get("RAY_ADDRESS")
    quiet: dict[str, Any] = {"logging_level": logging.WARNING, "log_to_driver": True}
    if address:
        given = _job_environment().get("env_vars") or {}  # Ray refuses to hear one twice
        package: dict[str, Any] = {"env_vars": {name: os.environ[name] for name in TELEMETRY_OFF if name not in given}}
        if JOB_VARIABLE not in os.environ:
            # the nodes of a cluster need what pd_core imports, not pd_core itself; in a job Ray has taken care of that
            package |= {"py_modules": [str(Path(__file__).resolve().parents[1])], "excludes": ["**/__pycache__"]}
        _check_that_somebody_listens(address)
        try:
            ray.init(address=address, runtime_env=package, **quiet)
        except ConnectionError as error:
            raise RunError(
                f"RAY_ADDRESS={address}: no Ray cluster answers there ({error}); start it or unset RAY_ADDRESS"
            ) from None
        return describe(local=False)
    # Nobody scrapes the metrics of such a cluster, and their exporter leaves a thread behind (one per session) that can
    # crash a process that is done: seen as a segmentation fault in its exit.
    os.environ.setdefault(telemetry.SWITCH, "0")
    # Tasks of a fraction of a CPU make more workers than CPUs; Ray would end the idle ones of these after a second, and
    # start them again for the next task, at 2 s of imports each (a fifth of the machine while small images stream).
    os.environ.setdefault("RAY_num_workers_soft_limit", str(_idle_workers()))
    for attempt in range(1, START_ATTEMPTS + 1):
        try:
            with _on_loopback(), _own_token():
                ray.init(address="local", num_cpus=2 * cores(), include_dashboard=False, **quiet)
            break
        except Exception as error:  # Ray has no type for it: a node that a busy machine did not start within 30 s
            ray.shutdown()
            if "timed out during startup" not in str(error) or attempt == START_ATTEMPTS:
                raise
            say("ray: the machine is busy and did not start a cluster within 30 s; trying again")
    return describe(local=True)


def _check_that_somebody_listens(address: str) -> None:
    """Raise RunError where nobody does: Ray itself would try for minutes without a word of ours."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not port.isdigit():  # auto: Ray looks for the address
        return
    deadline = time.monotonic() + LISTENS_S
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=LISTENS_S).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise RunError(
                    f"RAY_ADDRESS={address}: no Ray cluster answers there ({error}); start it or unset RAY_ADDRESS"
                ) from None
            time.sleep(1)


@contextlib.contextmanager
def _on_loopback() -> Iterator[None]:
    """A Ray that is started inside listens on 127.0.0.1; by itself it would on every interface.

    The variable is Ray's, for laptops with a firewall that asks; its processes inherit it, this one has read it
    already.
    """
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        with _variables({LOOPBACK_VARIABLE: "0"}):
            yield
    finally:  # the next one may be a cluster of many nodes
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextlib.contextmanager
def _own_token() -> Iterator[None]:
    """A Ray that is started inside asks for a token that nobody else has; its processes inherit it.

    By itself Ray would write one for all clusters of a user into a file in the home directory that everybody can read.
    """
    with _variables({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}):
        _read_token_anew()
        yield


def _read_token_anew() -> None:
    """Let Ray's client look in the environment whether there is a token, and which; it asks once in the life of a
    process.
    """
    try:
        from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]  # of C++
    except (
        ImportError
    ):  # of another Ray; where it still asks once, a second cluster of this process refuses its own client
        return
    AuthenticationTokenLoader.instance().reset_cache()
    Config.initialize("")


@contextlib.contextmanager
def _variables(values: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for processes that are started inside; as they were before afterwards."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def session(output: str, workflow: str = "") -> Iterator[Cluster]:
    """`connect` for the time of a run; a cluster that was started for it ends with it.

    workflow: whose run it is, for the metrics; empty where it is none's.
    """
    import ray

    if _shared is not None:
        yield refreshed(_shared)
        return
    joined = ray.is_initialized()
    now = connect()
    cpus = f"{cores()} cores" if now.local else f"{now.cpus:g} CPUs"
    say(f"ray: {cpus} and {now.gpus:g} GPUs {'of this machine' if now.local else f'at {now.address}'}")
    nodes = sum(node["Alive"] for node in ray.nodes())
    if nodes > 1 and "://" not in output:
        say(f"ray: {nodes} nodes and a local --output; every node must see {output} (a shared disk), or use s3://")
    try:
        with telemetry.running(workflow), _counted() if workflow else contextlib.nullcontext():
            yield now
    finally:
        if not joined:
            _disconnect()


def _disconnect() -> None:
    import ray

    with _own_sigterm():
        ray.shutdown()
    _read_token_anew()  # a cluster that is joined next has another, or none


@contextlib.contextmanager
def _counted() -> Iterator[None]:
    """Count how the run inside ends."""
    for outcome in telemetry.OUTCOMES:
        telemetry.RUNS.add(0, outcome=outcome)
    outcome = "failed"
    try:
        yield
        outcome = "done"
    except UserError:
        outcome = "refused"
        raise
    finally:
        telemetry.RUNS.add(1, outcome=outcome)


@contextlib.contextmanager
def shared(now: Cluster) -> Iterator[None]:
    """Sessions inside the body are that of `now`: the runs in it are parts of one."""
    global _shared
    before, _shared = _shared, now
    try:
        yield
    finally:
        _shared = before


def is_joined() -> bool:
    """Whether a run of this process would be on a cluster that it did not start itself."""
    ray = sys.modules.get("ray")
    named = "RAY_ADDRESS" in os.environ or JOB_VARIABLE in os.environ
    return named or (ray is not None and ray.is_initialized())


def is_shared() -> bool:
    """Whether this is part of a run that has a session already."""
    return _shared is not None


def _idle_workers() -> int:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(2 * cores(), min(WORKERS_PER_CORE * cores(), memory // WORKER_BYTES))


def in_job_copy() -> bool:
    """Whether this is the driver of a Ray job in a temporary copy of its --working-dir, which Ray deletes after the
    job.
    """
    return bool(_job_environment().get("working_dir"))


def _job_environment() -> dict[str, Any]:
    """The runtime environment of the Ray job whose driver this is; empty where it is none."""
    return json.loads(os.environ.get(JOB_VARIABLE, "{}")).get("runtime_env") or {}
