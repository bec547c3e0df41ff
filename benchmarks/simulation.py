"""Plays a run phase by phase on a cluster of nodes that fail: what the closed forms of benchmarks/costs.py leave out.

Nodes are lost at a rate, one by one, and are there again after a while. What a lost node was doing is done again: a
task from its start, by whoever is free. Two kinds of phases:

* Independent tasks. A free slot takes the next one. The tail is there (the last tasks run alone), and so is what a long
  task in one process costs: it begins again each time its node is lost, up to `ATTEMPTS` times.
* The self-join. Every block of queries needs an answer of every search process, and only so many blocks are under way
  (`neighbors.find_neighbors`). A lost process opens its shards again and answers once more what it had not answered.

Rates are shared: a task takes as long as the slowest resource gives its share to it, by `costs.limits`.
Deterministic: the same seed gives the same losses.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks import costs
from pd_core.engine import tasks

ATTEMPTS = tasks.TASK_OPTIONS["max_retries"] + 1  # of a task, before a run ends
MOST_UNITS = 4000  # tasks are bundled to about so many; what a loss costs is still that of one task
MOST_BLOCKS = 4000
FOREVER = math.inf
GIVE_UP_S = 365 * 86400.0


@dataclass(frozen=True)
class Spot:
    """How nodes come and go.

    Attributes:
        losses_per_hour: of one node; 0 for nodes that stay.
        replace_s: until a lost node is there again and Ray runs on it.
    """

    losses_per_hour: float = 0.0
    replace_s: float = 180.0


@dataclass(frozen=True)
class Played:
    """What became of a phase.

    Attributes:
        phase: which.
        seconds: inf where it does not fit into memory or does not end.
        limit: what it waited for most: one of `costs.limits`, or `losses` where these more than doubled its time.
        lost_s: seconds of slots whose work was done again or that waited for a node.
    """

    phase: costs.Phase
    seconds: float
    limit: str
    lost_s: float = 0.0


LOSSES = "lost nodes"


def play(phases: Sequence[costs.Phase], fleet: costs.Fleet, spot: Spot, seed: int = 0) -> list[Played]:
    """All phases, one after the other; after one that does not end there are no more."""
    played = []
    for number, phase in enumerate(phases):
        rng = np.random.default_rng([seed, number])
        played.append(_phase(phase, fleet, spot, rng))
        if math.isinf(played[-1].seconds):
            break
    return played


def _phase(phase: costs.Phase, fleet: costs.Fleet, spot: Spot, rng: np.random.Generator) -> Played:
    if not costs.fits(phase, fleet):
        return Played(phase, FOREVER, costs.MEMORY)
    undisturbed, limit = costs.seconds(phase, fleet), costs.limit_of(phase, fleet)
    simulate = _joined if phase.blocks else _independent
    seconds, lost_s = simulate(phase, fleet, spot, rng)
    return Played(phase, seconds, LOSSES if seconds > 2 * undisturbed + spot.replace_s else limit, lost_s)


class _Losses:
    """The times at which each node is lost, drawn as they are asked for."""

    def __init__(self, nodes: int, spot: Spot, rng: np.random.Generator) -> None:
        self.mean_s = 3600.0 / spot.losses_per_hour if spot.losses_per_hour else FOREVER
        self.rng = rng
        self.next = np.full(nodes, FOREVER) if math.isinf(self.mean_s) else rng.exponential(self.mean_s, nodes)

    def after(self, nodes: np.ndarray, since: np.ndarray) -> None:
        """These nodes were replaced at these times: when they are lost the next time."""
        self.next[nodes] = since + self.rng.exponential(self.mean_s, len(nodes))


def _independent(phase: costs.Phase, fleet: costs.Fleet, spot: Spot, rng: np.random.Generator) -> tuple[float, float]:
    """Seconds, and slot seconds lost: a heap of slots, each on a node."""
    slots = int(costs.slots(phase, fleet))
    task_s = max(costs.limits(phase, fleet).values()) * slots / phase.tasks
    losses = _Losses(fleet.nodes, spot, rng)
    bundle = max(1, phase.tasks // max(MOST_UNITS, 4 * slots))
    free = [(phase.start_s, slot) for slot in range(slots)]  # (time, slot), a heap; nodes hold slots in turn
    returned: list[tuple[float, int]] = []  # tasks that come back when their node is lost: (time, count)
    left, end, lost_s, attempts = phase.tasks, 0.0, 0.0, 1
    while left or returned:
        now, slot = heapq.heappop(free)
        while returned and returned[0][0] <= now:
            left += heapq.heappop(returned)[1]
        if not left:
            if returned:  # wait for what another slot will lose
                heapq.heappush(free, (max(now, returned[0][0]), slot))
            continue
        node = slot % fleet.nodes
        if losses.next[node] <= now:  # lost while idle, or with the others of its node: back after a while
            back = losses.next[node] + spot.replace_s
            if back > now:
                heapq.heappush(free, (back, slot))
                continue
            losses.after(np.array([node]), np.array([now]))
        take = min(bundle, left)
        left -= take
        until = now + take * task_s
        if losses.next[node] < until:
            at = losses.next[node]
            done = int((at - now) // task_s)
            heapq.heappush(returned, (at, take - done))
            lost_s += at - now - done * task_s + spot.replace_s
            heapq.heappush(free, (at + spot.replace_s + phase.start_s, slot))
            if phase.tasks == 1:
                attempts += 1
                if attempts > ATTEMPTS:
                    return FOREVER, lost_s
            continue
        end = max(end, until)
        heapq.heappush(free, (until, slot))
    return end, lost_s


def _joined(phase: costs.Phase, fleet: costs.Fleet, spot: Spot, rng: np.random.Generator) -> tuple[float, float]:
    """Blocks that all nodes answer, a window of them under way at a time.

    `phase.tasks` search processes; a block is finished when the last node has answered it, and only then another one
    begins.
    """
    nodes = min(fleet.nodes, phase.tasks)
    blocks = phase.blocks
    window = min(blocks, phase.tasks + 1)
    bundle = max(1, blocks // MOST_BLOCKS)
    units, window = -(-blocks // bundle), max(1, window // bundle)
    work_s = max(costs.limits(phase, fleet).values()) / units
    losses = _Losses(nodes, spot, rng)
    every = np.arange(nodes)
    free = np.full(nodes, phase.start_s)  # when each node has answered what it was asked
    finished = np.full(units, 0.0)
    lost_s = 0.0
    for block in range(units):
        begun = finished[block - window] if block >= window else phase.start_s
        start = np.maximum(free, begun)
        until = start + work_s
        while (struck := losses.next < until).any():
            hit = every[struck]
            back = losses.next[hit] + spot.replace_s + phase.start_s
            again = np.maximum(back, start[hit])
            lost_s += float((again - start[hit]).sum())
            start[hit] = again
            until[hit] = again + work_s
            losses.after(hit, back)
        free = until
        # blocks end in their order, as far as the driver can tell
        finished[block] = max(until.max(), finished[block - 1] if block else 0.0)
        if finished[block] > GIVE_UP_S:
            return FOREVER, lost_s
    return float(finished[-1]), lost_s
