"""The faults: what each does to a run, and what it takes until the run has succeeded."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from chaos.case import Case, Run, count_events
from chaos.cluster import Nodes
from chaos.compare import stages_of
from chaos.workflows import is_done
from tests.mlflow_server import MlflowServer
from tests.s3 import Weed

OUTAGE_S = 60.0
TRUNCATED = 3  # parts of an output
UNREAD = "candidates/"  # of curate: what is left of how a release was made; looked at when another is made of it


@dataclass
class Site:
    """What faults act on; servers are started when the first case needs them.

    Attributes:
        nodes: the cluster. weed: the S3 server. mlflow: the MLflow server. disk: where a small disk can be mounted.
    """

    nodes: Callable[[], Nodes]
    weed: Callable[[], Weed]
    mlflow: Callable[[], MlflowServer]
    disk: Path


def actor(case: Case, site: Site) -> None:
    """Four times, a Ray worker process that holds an actor or runs a task is killed; Ray starts another."""
    nodes, run = site.nodes(), case.start()
    for events, delay_s in case.moments(4):
        case.kills += 1
        if not run.wait_until(events, delay_s):
            continue
        if (victim := _some_worker(case, run, nodes)) is not None:
            with contextlib.suppress(psutil.Error):
                victim.kill()
                case.hits += 1
    case.finish(run)


def _some_worker(case: Case, run: Run, nodes: Nodes) -> psutil.Process | None:
    """A random one of those that are busy; the first to be so, where none is. None: the run ended before."""
    while run.alive:
        if workers := nodes.workers():
            return case.random.choice(sorted(workers, key=lambda process: process.pid))
        time.sleep(0.02)
    return None


def node(case: Case, site: Site) -> None:
    """Twice, all processes of a worker node are killed at once; another node joins some seconds later."""
    nodes, run = site.nodes(), case.start()
    for events, delay_s in case.moments(2):
        case.kills += 1
        if not run.wait_until(events, delay_s):
            continue
        by_load = sorted(nodes.cluster.worker_nodes, key=lambda one: len(nodes.workers(one)))
        case.hits += bool(nodes.workers(by_load[-1]))
        nodes.kill_node(by_load[-1])  # the one that has most to lose
        if run.alive:
            time.sleep(case.random.uniform(0, 3))
        nodes.replace()
    case.finish(run)


def driver(case: Case, site: Site) -> None:
    """Three times in turn the command is run and its driver killed, later each time; then it runs to its end."""
    for left in (3, 2, 1):
        case.kills += 1
        moment, run = case.moment_after(count_events(case.output), 1 / left), case.start()
        if run.wait_until(*moment):
            run.kill()
            case.hits += 1
        elif is_done(case.workflow, run.finish()):
            return
    case.rerun()


def driver_on_cluster(case: Case, site: Site) -> None:
    """Likewise on a cluster that stays: the next driver begins while Ray still ends what the one before left."""
    driver(case, site)
    site.nodes().settle()


def mlflow(case: Case, site: Site) -> None:
    """The MLflow server is killed, and started again when the run is over."""
    server, run = site.mlflow(), case.start()
    for events, delay_s in case.moments(1):
        case.kills += 1
        alive = run.wait_until(events, delay_s)
        server.kill()
        case.hits += alive
    case.finish(run)
    server.start()


def s3_restart(case: Case, site: Site) -> None:
    """Twice, the S3 server is killed and started again at once."""
    _without_s3(case, site, 2, 0.0)


def s3_outage(case: Case, site: Site) -> None:
    """The S3 server is killed, and started again 60 s later."""
    _without_s3(case, site, 1, OUTAGE_S)


def _without_s3(case: Case, site: Site, times: int, seconds: float) -> None:
    weed, run = site.weed(), case.start()
    for events, delay_s in case.moments(times):
        case.kills += 1
        alive = run.wait_until(events, delay_s)
        weed.kill()
        case.hits += alive
        if alive:
            time.sleep(seconds)
        weed.start()
    case.finish(run)


def full_disk(case: Case, site: Site) -> None:
    """The output lies on a disk that is too small, which grows after the run has failed."""
    case.kills += 1
    run = case.start()
    failed = not is_done(case.workflow, run.finish())
    case.hits += failed
    if failed:
        _mount(Path(case.output).parent, 1 << 30, "remount,")
        case.rerun()


@contextlib.contextmanager
def small_disk(case: Case, site: Site, undisturbed: Path) -> Iterator[None]:
    """A disk with room for a random share of what an undisturbed run has written there, for the output of a case."""
    used = sum(math.ceil(f.stat().st_size / 4096) * 4096 for f in undisturbed.rglob("*") if f.is_file())
    site.disk.mkdir(parents=True, exist_ok=True)
    _mount(site.disk, max(4096, int(used * case.random.uniform(0.05, 0.95))))
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(site.disk)], check=True)


def can_mount() -> bool:
    """Whether a small disk can be had: only root may mount."""
    return os.geteuid() == 0 and shutil.which("mount") is not None


def _mount(folder: Path, size: int, remount: str = "") -> None:
    command = ["mount", "-t", "tmpfs", "-o", f"{remount}size={size}", "tmpfs", str(folder)]
    subprocess.run(command, check=True)


def truncate(case: Case, site: Site) -> None:
    """Random parts of a finished output are cut short, to nothing sometimes; then the command runs once."""
    output = Path(case.output)
    stages = [one for name, one in stages_of(output).items() if not name.startswith(UNREAD)]
    files = [one.folder / part.name for one in stages for part in one.artifact.parts]
    for file in case.random.sample(files, TRUNCATED):
        case.kills += 1
        size = file.stat().st_size
        os.truncate(file, case.random.choice([0, case.random.randrange(size)]))
        case.hits += 1
    case.finish(case.start())


FAULTS: dict[str, Callable[[Case, Site], None]] = {
    "actor": actor,
    "node": node,
    "driver": driver,
    "driver-cluster": driver_on_cluster,
    "mlflow": mlflow,
    "s3-restart": s3_restart,
    "s3-outage": s3_outage,
    "full-disk": full_disk,
    "truncated": truncate,
}
ON_CLUSTER = ("actor", "node", "driver-cluster")
ON_S3 = ("s3-restart", "s3-outage")
CASES = {"actor": 2, "node": 2, "full-disk": 2}  # of each workflow; 1 where it is not named
