"""The machines of a plan, its steps on them, and which step limits it by time or memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pd_core.engine import resources

GIB = float(1 << 30)
ASSUMED_CORES, ASSUMED_BYTES = 8.0, 32 * GIB  # of a node where none is up to ask: as those of infra/
LARGE_S = 3600.0  # a plan of a run that takes longer says what limits it
PROCESS_BYTES = 400e6  # of a worker that has imported what it needs, before it holds any row
WORKER_SHARE = 0.7  # of a node's memory; Ray keeps the rest for its object store


@dataclass(frozen=True)
class Fleet:
    """The machines, taken to be alike: what the stages size their processes by, nodes with CPUs and bytes of each."""

    cluster: resources.Cluster
    nodes: int
    memory_bytes: float

    @property
    def cores(self) -> float:
        """Of all nodes together."""
        return float(resources.cores()) if self.cluster.local else self.cluster.cpus

    def __str__(self) -> str:
        return f"{self.nodes} node{'s' if self.nodes > 1 else ''} of {self.cores / self.nodes:g} CPUs"


def fleet_of(now: resources.Cluster) -> Fleet:
    """The nodes that are up now, some of which may have come since `now`; where none is, an assumed one."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) > 0]
    memory = min((n.get("memory", 0.0) + n.get("object_store_memory", 0.0) for n in nodes), default=0.0)
    cluster = now if nodes else replace(now, cpus=ASSUMED_CORES, node_cpus=ASSUMED_CORES)
    return Fleet(cluster, 1 if now.local else max(1, len(nodes)), memory or ASSUMED_BYTES)


@dataclass(frozen=True)
class Step:
    """Work of equal processes that run at the same time, one step after the other.

    Attributes:
        core_s: seconds of one core, of all processes together.
        processes: at most. threads: of each.
        memory_bytes: of each, beside PROCESS_BYTES.
        lever: what makes it faster, or smaller.
    """

    name: str
    core_s: float
    processes: float
    memory_bytes: float
    lever: str
    threads: float = 1.0

    def seconds(self, fleet: Fleet) -> float:
        """Of all processes, nothing failing."""
        return self.core_s / max(1.0, min(self.processes * self.threads, fleet.cores))

    def node_bytes(self, fleet: Fleet) -> float:
        """Memory of the node that needs most, the object store apart."""
        together = max(1.0, min(self.processes, fleet.cores))
        return (PROCESS_BYTES + self.memory_bytes) * math.ceil(together / fleet.nodes)

    def limit(self, fleet: Fleet) -> str:
        """What it waits for."""
        few = "one process" if self.processes == 1 else "few processes"
        return few if self.processes * self.threads < WORKER_SHARE * fleet.cores else "cores"


def limit_lines(steps: Sequence[Step], fleet: Fleet) -> list[str]:
    """What limits a run that is large, or that does not fit into memory."""
    has = WORKER_SHARE * fleet.memory_bytes
    for step in steps:
        if (needed := step.node_bytes(fleet)) > has:
            return [
                f"limit:     {step.name}: memory, {bytes_text(needed)} on a node that has {bytes_text(has)} for "
                f"processes; what moves it: nodes with more memory; {step.lever}"
            ]
    longest = max(steps, key=lambda step: step.seconds(fleet))
    if sum(step.seconds(fleet) for step in steps) < LARGE_S:
        return []
    spent = time_text(longest.seconds(fleet))
    return [f"limit:     {longest.name}: {longest.limit(fleet)}, {spent}; what moves it: {longest.lever}"]


def bytes_text(value: float) -> str:
    """For a person, in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return f"{value:,.0f} {unit}" if unit == "B" else f"{value:,.1f} {unit}"
        value /= 1024
    raise AssertionError


def time_text(seconds: float) -> str:
    """For a person, in s, min or h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
