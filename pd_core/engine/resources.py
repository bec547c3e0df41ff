"""What the cluster has and what each stage asks of it. The only place that sizes anything."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pd_core.core.errors import UserError
from pd_core.engine.console import say

# A task that mostly waits for storage or for actors claims little, so that it never keeps a computing actor off a core.
IO_CPUS = 0.25
DECODE_CPUS = 0.5
START_ATTEMPTS = 4
AUTOSCALED_ACTORS = 64  # replicas that the pool may ask an autoscaling cluster for
HEAD = "node:__internal_head__"  # a resource that Ray gives the head, and no other node
UNTYPED = re.compile(r"node_[0-9a-f]{20,}")  # Ray's type of a node that no autoscaler brought: its id
WORKERS_PER_CORE = 8  # idle processes that a cluster of our own keeps, unless memory for that is short
WORKER_BYTES = 1 << 30
FEED_CPUS = 1.0  # kept free of actors for the tasks that feed them


@dataclass(frozen=True)
class Cluster:
    """What the run can count on at its start. One that is elastic may hold more later: an autoscaler adds what is asked
    for.
    """

    cpus: float
    gpus: float
    local: bool
    address: str
    node_cpus: float = 0.0  # of the largest node
    held_cpus: float = 0.0  # of `cpus`, what actors claim that stay for the whole run
    elastic: bool = False

    @property
    def free_cpus(self) -> float:
        """CPUs that another stage's actors and tasks can claim."""
        return max(0.0, self.cpus - self.held_cpus)


def describe(local: bool, was_elastic: bool = False) -> Cluster:
    """The cluster as it is now.

    was_elastic: what is known from before, for when Ray does not tell.
    """
    import ray

    resources = ray.cluster_resources()
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    elastic = False
    if not local:
        told = _scales()
        elastic = was_elastic or _looks_elastic(nodes) if told is None else told
    return Cluster(
        cpus=resources.get("CPU", 0.0),
        gpus=resources.get("GPU", 0.0),
        local=local,
        address=ray.get_runtime_context().gcs_address,
        node_cpus=_largest(nodes),
        elastic=elastic,
    )


def _scales() -> bool | None:
    """Whether an autoscaler adds nodes, from the report that `ray status` prints; None where there is none.

    Ray's monitor writes it every few seconds, in a cluster that does not scale too, but there each node is a type of
    its own. Ray's second autoscaler (RAY_enable_autoscaler_v2, KubeRay's default) writes none.
    """
    from ray._private import ray_constants
    from ray.experimental import internal_kv

    written = internal_kv._internal_kv_get(ray_constants.DEBUG_AUTOSCALING_STATUS)
    return scales(json.loads(written)) if written else None


def scales(status: Mapping[str, Any]) -> bool | None:
    """The same of what Ray's monitor wrote; None before it has looked at the nodes."""
    report = status.get("autoscaler_report") or {}
    types = [*(report.get("active_nodes") or ()), *(report.get("pending_launches") or ())]
    return any(not UNTYPED.fullmatch(kind) for kind in types) if types else None


def _looks_elastic(nodes: Sequence[Mapping[str, float]]) -> bool:
    """Where nobody tells: a head that runs no task is that of a cluster, and so is one that is not alone."""
    return len(nodes) > 1 or not any(HEAD in node and node.get("CPU") for node in nodes)


def _largest_node() -> float:
    """CPUs of the node that has most; 0 where no node has any."""
    import ray

    return _largest([node["Resources"] for node in ray.nodes() if node["Alive"]])


def _largest(nodes: Sequence[Mapping[str, float]]) -> float:
    return max((node.get("CPU", 0.0) for node in nodes), default=0.0)


def refreshed(cluster: Cluster) -> Cluster:
    """The cluster as it is now: it may have grown since the run began."""
    return describe(cluster.local, cluster.elastic)


def cores() -> int:
    """Cores that this process may use: those of its affinity, or fewer where a container has a CPU quota."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):  # no cgroup v2
        return allowed
    return allowed if quota == "max" else min(allowed, max(1, int(quota) // int(period)))


def computing_cpus(cluster: Cluster) -> float:
    """CPUs that computing actors may fill: cores on a cluster of our own, else all but a quarter, kept for input."""
    return max(1.0, float(cores()) if cluster.local else cluster.free_cpus * 0.75)


def device_of(cluster: Cluster, gpus: float | None) -> str:
    """Type of the device, cpu or cuda, that the actors of a model run on; `gpus` of each as in the settings."""
    return "cuda" if _gpus_each(cluster, gpus) else "cpu"


def gpus_to_ask(cluster: Cluster, gpus: float | None, before: str | None) -> float | None:
    """GPUs of each actor, as in the settings, or None for what there is.

    Args:
        cluster: as it is now.
        gpus: as in the settings.
        before: device, cpu or cuda, of what is taken up again, or None. Where GPUs made it and have scaled away since,
            the autoscaler is asked for one each.
    """
    if gpus is None and not cluster.gpus and not cluster.local:
        if before == "cuda":
            return 1.0
        if cluster.elastic:
            say("ray: no GPU is up, so models run on CPUs; where GPUs scale from zero, set actor_gpus")
    return gpus


def _gpus_each(cluster: Cluster, gpus: float | None) -> float:
    if gpus is None:
        return 1.0 if cluster.gpus else 0.0
    if cluster.local and gpus > cluster.gpus:  # nobody would ever add what an actor waits for
        raise UserError(
            f"actor_gpus {gpus:g}: this machine has {cluster.gpus:g} GPUs; leave it out, or join a cluster that "
            "has more "
            "(RAY_ADDRESS)"
        )
    return gpus


def actors_that_fit(cluster: Cluster, cpus: int, gpus: float | None) -> int:
    """Actors of a model for which there is room now, on GPUs where they use any, else on CPUs."""
    per_gpu = _gpus_each(cluster, gpus)
    return int(cluster.gpus / per_gpu) if per_gpu else int(computing_cpus(cluster) // cpus)


def actor_pool(
    cluster: Cluster, actors: int | None, cpus: int, gpus: float | None, work: int | None = None
) -> tuple[int, int, float, float]:
    """(fewest actors, most actors, CPUs each, GPUs each) of a stage whose actors run a model; never more than `work`,
    its batches, where they are counted.

    Without `actors` the pool grows from 1: on this machine to what fits, on a cluster that was joined as far as Ray
    Data finds work and the autoscaler finds nodes. GPUs are used where there are any; where they scale from zero,
    `gpus` says so. Actors asked for on a joined cluster are what the pool grows to, since Ray Data keeps room for its
    other tasks only while it decides on the growth.

    Raises:
        UserError: more GPUs are asked for than this machine has, and it stands alone.
    """
    per_gpu = _gpus_each(cluster, gpus)
    each, fits = 1 if per_gpu else cpus, actors_that_fit(cluster, cpus, gpus)
    if cluster.elastic:
        fits = max(fits, AUTOSCALED_ACTORS)
    most = actors or fits or 1
    if work is not None:
        most = min(most, work)
    return (most if actors and cluster.local else 1), most, _claim(cluster, most, each), per_gpu


def _claim(cluster: Cluster, actors: int, cpus: int) -> float:
    """CPUs that each actor claims: `cpus`, or less where that would leave nothing for the tasks that feed the actors.

    Actors that fill the cluster starve their own input, a silent deadlock; that they share cores only makes them
    slower. No actor claims more than the largest node has, or it would wait for ever.
    """
    if cluster.node_cpus >= 1:
        cpus = min(cpus, int(cluster.node_cpus))
    if cluster.elastic:  # what is missing is for the autoscaler to add, and it adds what is asked for
        return float(cpus)
    share = min(float(cpus), max(cluster.free_cpus - FEED_CPUS, 0.0) / actors)
    return float(int(share)) if share >= 1 else int(share * 1000) / 1000


def search_actors(
    cluster: Cluster, actors: int | None, cpus: int, shards: int, share: float = 1.0
) -> tuple[int, int, float, int]:
    """Number of search processes, threads of each, and CPUs and GPUs that each claims.

    As many processes as asked for or as fit into a share of the cluster, never more than shards; where they are fewer
    than cores, each gets more threads, on which no number depends. Those are not claimed: a claim of many CPUs may fit
    on no node beside the others. GPUs are for searches that have the cluster to themselves; a generator beside them
    needs them.
    """
    computing = max(1.0, computing_cpus(cluster) * share)
    count = min(shards, actors or int(computing // cpus) or 1)
    threads = max(cpus, int(computing // count))
    if cluster.node_cpus >= 1 and not cluster.local:
        threads = max(cpus, min(threads, int(cluster.node_cpus)))
    return count, threads, _claim(cluster, count, cpus), int(share == 1.0 and cluster.gpus >= count)


def io_cpus(cluster: Cluster, claimed: float) -> float:
    """CPUs that a task claims which waits for actors: next to nothing, and nothing where these have claimed all."""
    return IO_CPUS if cluster.cpus < 1 or cluster.free_cpus - claimed >= IO_CPUS else 0.0


def feasible_cpus(cpus: int) -> float:
    """`cpus`, or as many as the largest node has: a task that fits on no node would wait for ever."""
    largest = _largest_node()
    return float(min(cpus, int(largest))) if largest >= 1 else float(cpus)


def decode_memory(most: int) -> int | None:
    """`share_of_memory` of the nodes that run tasks now."""
    import ray

    return share_of_memory(most, [node["Resources"] for node in ray.nodes() if node["Alive"]])


def share_of_memory(most: int, nodes: Sequence[Mapping[str, float]]) -> int | None:
    """Bytes that a task claims which decodes images, of which one may take up to `most`; None where Ray counts no
    memory.

    Never more than any of the nodes, by their resources, has for what such a task takes of its CPUs, or half of it
    where it has one: a task that fits on no node would wait for ever, and cores would idle for the sake of images that
    are rare. Where several of these meet, the kernel ends a decoder before anything else, and its image is tried again.
    """
    shares = [
        node.get("memory", 0.0) * DECODE_CPUS / max(2 * DECODE_CPUS, node["CPU"]) for node in nodes if node.get("CPU")
    ]
    return min(most, int(min(shares, default=0.0))) or None


def assigned_device() -> str:
    """The torch device that Ray gave this worker; one that holds no GPU must not use those it can see."""
    import ray

    return "cuda" if ray.get_runtime_context().get_accelerator_ids().get("GPU") else "cpu"
