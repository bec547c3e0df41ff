"""Metrics of our own, through Ray's metrics API to Prometheus: the one place where each is named, described and typed.

Counters of events are added to by the driver alone, as it hears of each committed part: Ray gives every process a
series of its own (tag `WorkerId`), which stays for the life of its node, so that tasks would leave one per worker
behind. What a part holds is counted at most once, whoever died meanwhile. Only seconds are counted by the actors
that spend them.

Tags have few values: never an id, a key or a path. Nothing is counted where Ray exports nothing, as on a cluster that a
run starts for itself. infra/monitoring/ holds what reads these names.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

# Ray sends increments to the exporter of the node about every 10 s, and Prometheus' rate() takes the value with which a
# series first appears for its beginning: a series has to appear before it counts. Ray's API refuses an increment of 0.
ALMOST_ZERO = 1e-9
HELD_EVERY_S = 1.0
SWITCH = "RAY_enable_open_telemetry"  # Ray's, of its exporter


@dataclass(frozen=True)
class Counter:
    """A number that only grows; Prometheus sees it as `exported`.

    Attributes:
        name: as Ray's API gets it. description: for the operator.
        tags: beside `workflow`, which every counter has.
    """

    name: str
    description: str
    tags: tuple[str, ...] = ("stage",)

    @property
    def exported(self) -> str:
        """The name in Prometheus."""
        return f"ray_{self.name}_total"

    def add(self, value: float, **tags: str) -> None:
        """Add `value`, at least 0; adding 0 before there is anything to count makes the series appear."""
        assert value >= 0 and set(tags) == set(self.tags), (self.name, value, tags)
        if not exported():
            return
        if self.name not in _opened:
            from ray.util import metrics

            _opened[self.name] = metrics.Counter(self.name, self.description, ("workflow", *self.tags))
        _opened[self.name].inc(float(value) or ALMOST_ZERO, {"workflow": _workflow, **tags})


IMAGES = Counter("pd_core_images", "Images that a stage is done with: extracted or quarantined, or perturbed")
QUARANTINED = Counter("pd_core_quarantined", "Images that cannot be used, by reason", ("stage", "reason"))
SEARCHED = Counter("pd_core_rows_searched", "Rows whose nearest neighbors were searched")
CANDIDATES = Counter("pd_core_candidates", "Generated images that were put to the test of acceptance")
ACCEPTED = Counter("pd_core_accepted", "Generated images that were accepted")
STEPS = Counter("pd_core_training_steps", "Steps of fine-tuning, those that had to be done again included")
PARTS = Counter("pd_core_parts", "Parts that were committed")
FAILED_PARTS = Counter("pd_core_failed_parts", "Parts that were left out, since the generator failed on a chunk")
RETRIES = Counter("pd_core_retries", "Executions of a stage that infrastructure ended and that were tried again")
RUNS = Counter(
    "pd_core_runs", "Runs of a workflow that ended: done, refused (settings or input) or failed", ("outcome",)
)
RELEASES = Counter("pd_core_releases", "Runs of curate: released, nothing_new or held_back by a gate", ("outcome",))
BUSY_S = Counter("pd_core_busy_seconds", "Seconds that actors computed, on cpu or gpu", ("stage", "device"))
HELD_S = Counter("pd_core_held_seconds", "Seconds that actors held a CPU or GPU: claim x time", ("stage", "resource"))

COUNTERS = tuple(value for value in list(globals().values()) if isinstance(value, Counter))
OUTCOMES = ("done", "refused", "failed")

_opened: dict[str, Any] = {}  # Ray's counters of this process
_workflow = ""  # of this process


def exported() -> bool:
    """Whether Ray exports what this process counts."""
    import ray

    off = os.environ.get(SWITCH, "1").lower() in ("0", "false")
    return not off and bool(ray.is_initialized())


def workflow() -> str:
    """Name of the workflow that this process runs, for its actors; empty where there is none."""
    return _workflow


@contextlib.contextmanager
def running(name: str) -> Iterator[None]:
    """Tag what is counted inside with the name of a workflow."""
    global _workflow
    before, _workflow = _workflow, name
    try:
        yield
    finally:
        _workflow = before


def hold(workflow: str, stage: str) -> None:
    """Count, from now to the end of this actor's process, the seconds that it holds what it claimed; elsewhere do
    nothing.

    That is what an actor costs, whether it computes, loads a model, or waits for input.
    """
    import ray

    global _workflow
    if not exported() or ray.get_runtime_context().get_actor_id() is None:
        return
    _workflow = workflow
    assigned = ray.get_runtime_context().get_assigned_resources()
    claims = {name.lower(): amount for name in ("CPU", "GPU") if (amount := assigned.get(name, 0.0))}
    threading.Thread(target=_count_held, args=(stage, claims), daemon=True).start()


def _count_held(stage: str, claims: dict[str, float]) -> None:
    for name in claims:
        HELD_S.add(0, stage=stage, resource=name)
    before = time.monotonic()
    while True:
        time.sleep(HELD_EVERY_S)
        now = time.monotonic()
        for name, amount in claims.items():
            HELD_S.add(amount * (now - before), stage=stage, resource=name)
        before = now


def busy(seconds: float, stage: str, device: str) -> None:
    """Count seconds that an actor computed. device: of torch, such as cpu or cuda:0."""
    BUSY_S.add(seconds, stage=stage, device="cpu" if device == "cpu" else "gpu")
