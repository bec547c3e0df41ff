"""Precision, recall and the rest against torch-fidelity and prdc on the same features, and what large sets take."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import process, table
from pd_core.core import artifacts

DIM, QUICK_DIM = 768, 64
THREADS = 2
K = 3
CLUSTERS: dict[str, Any] = {"count": 1000, "latent_dim": 24, "separation": 1.0, "shared": True}
WARM_UP = 512
TIMEOUT_S = 7200.0
AGREEMENT = 1e-4  # a pair on the edge of a ball, decided in another rounding, moves one row of 10,000 or more

TEXT = f"""\
D = {DIM}, 1,000 overlapping Gaussian clusters in one 24-dimensional subspace, noise 0.05; generated rows are further
rows of the same distribution. Every side runs in a process of its own with {THREADS} threads; loading and libraries'
start are not timed. "precision and recall": `metrics.precision_recall`, k = {K}. "everything": `metrics.prepare` and
`metrics.evaluate`, all seven metrics with their intervals and the scores of each row. torch-fidelity:
`prc_features_to_metric` with batches of 10,000, the form that does not hold all pairs. prdc: `compute_prdc`, precision,
recall, density and coverage, which holds all pairs three times and so runs on fewer rows. Largest difference: of
precision and recall from ours. Peak: high-water mark of the process, features included."""


@dataclass(frozen=True)
class Case:
    """One size, and who runs it."""

    dim: int
    real: int
    generated: int
    sides: tuple[str, ...]


def measure(quick: bool) -> table.Section:
    """Every side on every size it fits."""
    dim, small, middle, large = (QUICK_DIM, 1_000, 2_000, 4_000) if quick else (DIM, 15_000, 50_000, 300_000)
    cases = [
        Case(dim, small, small, ("ours", "torch_fidelity", "prdc", "everything")),
        Case(dim, middle, middle, ("ours", "torch_fidelity", "everything")),
        Case(dim, large, middle, ("everything",)),
    ]
    section = table.Section("Metrics", TEXT)
    shown = table.Table(
        "Seconds and memory", ["real", "generated", "side", "s", "of which prepare s", "peak MiB", "largest difference"]
    )
    for case in cases:
        runs = {side: _run(case, side) for side in case.sides}
        section.raw += runs.values()
        shown.rows += [_cells(run, runs.get("ours")) for run in runs.values()]
        section.claims += _claims(case, runs)
        print(
            f"metrics: {case.real} x {case.generated}: { {s: round(r['seconds'], 1) for s, r in runs.items()} }",
            flush=True,
        )
    section.tables.append(shown)
    return section


def _run(case: Case, side: str) -> dict[str, Any]:
    rows = case.real + case.generated
    path = process.CACHE / f"metrics-{case.dim}-{rows}.npy"
    if not path.exists():
        arguments = {"path": str(path), "rows": rows, "dim": case.dim, **CLUSTERS}
        process.call("benchmarks.datasets.save_clusters", arguments)
    arguments = {"vectors": str(path), "real": case.real}
    outcome = process.call(f"benchmarks.metrics.{side}", arguments, threads=THREADS, timeout_s=TIMEOUT_S)
    sizes = {"real": case.real, "generated": case.generated, "side": side}
    return {**sizes, **outcome.value, "peak_rss_bytes": outcome.peak_rss_bytes}


def _difference(run: dict[str, Any], ours: dict[str, Any]) -> float:
    return max(abs(run[name] - ours[name]) for name in ("precision", "recall"))


def _cells(run: dict[str, Any], ours: dict[str, Any] | None) -> list[table.Cell]:
    names = {"ours": "precision and recall", "torch_fidelity": "torch-fidelity"}
    difference = None if ours is None or run is ours else _difference(run, ours)
    side, seconds, mib = names.get(run["side"], run["side"]), run["seconds"], run["peak_rss_bytes"] / 2**20
    return [run["real"], run["generated"], side, seconds, run.get("prepare_s"), mib, difference]


def _claims(case: Case, runs: dict[str, dict[str, Any]]) -> list[table.Claim]:
    size, claims = f"{case.real:,} x {case.generated:,}", []
    for other in ("torch_fidelity", "prdc"):
        if other in runs:
            ratio = runs["ours"]["seconds"] / runs[other]["seconds"]
            claims.append(table.at_most(f"{size}: precision and recall, ours over {other}, time", ratio, 1.0))
            difference = _difference(runs[other], runs["ours"])
            claims.append(table.at_most(f"{size}: largest difference from {other}", difference, AGREEMENT))
    matrix = case.real * case.generated * 4 / 2**20
    peak = runs["everything"]["peak_rss_bytes"] / 2**20
    claims.append(
        table.reported(f"{size}: peak, everything; one matrix of all pairs is {matrix:,.0f} MiB", peak, "MiB")
    )
    return claims


# ---- the sides, in processes of their own ----------------------------------------------------------------------------


def _load(vectors: str, real: int) -> tuple[np.ndarray, np.ndarray]:
    rows = np.load(Path(vectors))
    return rows[:real], rows[real:]


def ours(vectors: str, real: int) -> dict[str, float]:
    """metrics.precision_recall."""
    from pd_core.evaluate import metrics

    a, b = _load(vectors, real)
    metrics.precision_recall(a[:WARM_UP], b[:WARM_UP], K, THREADS, "cpu")
    watch = artifacts.Stopwatch()
    precision, recall = metrics.precision_recall(a, b, K, THREADS, "cpu")
    return {"seconds": watch.seconds, "precision": precision, "recall": recall}


def everything(vectors: str, real: int) -> dict[str, Any]:
    """metrics.prepare and metrics.evaluate."""
    from pd_core.evaluate import metrics

    a, b = _load(vectors, real)
    metrics.precision_recall(a[:WARM_UP], b[:WARM_UP], K, THREADS, "cpu")
    watch = artifacts.Stopwatch()
    reference = metrics.prepare(a, np.arange(len(a)), threads=THREADS, device="cpu")
    prepare_s = watch.seconds
    found = metrics.evaluate(reference, b, np.arange(len(b)), threads=THREADS, device="cpu").estimates
    values = {name: estimate.value for name, estimate in found.items()}
    return {"seconds": watch.seconds, "prepare_s": prepare_s, **values}


def torch_fidelity(vectors: str, real: int) -> dict[str, float]:
    """torch_fidelity.metric_prc, whose first set is the generated one."""
    import torch
    from torch_fidelity import metric_prc

    a, b = (torch.from_numpy(rows) for rows in _load(vectors, real))
    settings = {"prc_neighborhood": K, "prc_batch_size": 10_000, "save_cpu_ram": True, "verbose": False}
    metric_prc.prc_features_to_metric(b[:WARM_UP], a[:WARM_UP], **settings)
    watch = artifacts.Stopwatch()
    found = metric_prc.prc_features_to_metric(b, a, **settings)
    return {"seconds": watch.seconds, "precision": found["precision"], "recall": found["recall"]}


def prdc(vectors: str, real: int) -> dict[str, float]:
    """prdc.compute_prdc."""
    from prdc import compute_prdc

    a, b = _load(vectors, real)
    compute_prdc(a[:WARM_UP], b[:WARM_UP], K)
    watch = artifacts.Stopwatch()
    found = compute_prdc(a, b, K)
    return {"seconds": watch.seconds, **{name: float(value) for name, value in found.items()}}
