"""The self-join: ours in one process and on Ray, against faiss IVF search, big_batch_search and exact search."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import datasets, joins, process, table
from pd_core.index import recall

TEXT = f"""\
D = {datasets.DIM}, k = {joins.K}, all rows against all rows, leave-one-out. Every side runs in a process of its own
with {joins.THREADS} threads (Ray: 1 actor of 2 threads, or 2 actors of 1 thread), in turn; loading is not timed. The
IVF sides search one and the same index file with the same nprobe, so they compare the same pairs. (a)
`IndexIVFFlat.search` and (c) `IndexFlatL2.search` treat queries independently and are timed on every n-th row only
("queries"); times are per query. (b) `faiss.contrib.big_batch_search`, method pairwise_distances, all rows at once; its
blocks are small, so that one thread can beat two: both are tried, the faster is (b). Ours in one process: what a search
actor does (blocks of 65,536 queries; probes, cells as matrix products, distances again from differences, self removed
by id). Ours on Ray: the stage, committed features to committed neighbors (so Parquet is read and written, and queries
cross the object store, while all other sides start and end in memory), with all its processes awake ("start-up s" is
how long they take to wake, open their shards and answer {joins.TINY_ROWS} rows). Recall@20 and the error of the mean
distance are measured against (c) on the rows that (c) searched. nprobe is what our calibration chose for recall 0.99
unless it is marked as fixed."""

SHARDS = [1, 2, 4, 8, 16]
FIXED = 64  # nprobe where the calibration says that exact search is cheaper
BATCH_SIDES = ("faiss_batch", "faiss_batch_1")
SIDES = {
    "faiss_ivf": "(a) faiss IVF search",
    "faiss_batch": "(b) big_batch_search",
    "faiss_batch_1": "(b) big_batch_search, 1 thread",
    "faiss_exact": "(c) faiss exact",
    "ours": "ours, one process",
    "ours_exact": "ours exact, one process",
    "ray_1x2": "ours on Ray, 1 actor x 2 threads",
    "ray_2x1": "ours on Ray, 2 actors x 1 thread",
}


@dataclass
class Data:
    """One set of vectors and what is compared on it.

    Attributes:
        name, made: for the tables.
        path: .npy file, float32 [rows, D].
        rows: N.
        repeats: rounds of all sides but Ray's.
        fixed: further values of nprobe, compared with (a) and (b) alone.
        facts: of the index, from joins.build.
    """

    name: str
    made: str
    path: Path
    rows: int
    repeats: int
    fixed: Sequence[int] = ()
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def step(self) -> int:
        """Every step-th row is searched by (a) and (c), about 20,000 in all."""
        return max(1, self.rows // 20_000)

    @property
    def work(self) -> str:
        """Folder of its artifacts."""
        return str(process.WORK / f"{self.name}-{self.rows}")


def measure(quick: bool) -> table.Section:
    """All data sets, one after the other."""
    section = table.Section("Self-join", TEXT)
    everything = []
    for data in _data(quick, section.skipped):
        data.facts = process.call("benchmarks.joins.build", {"vectors": str(data.path), "work": data.work}).value
        runs = _measure(data)
        data.facts["intrinsic"] = joins.intrinsic_dimensions(_answers(data, "faiss_exact")[0])
        section.raw.append({"data": data.name, "rows": data.rows, **data.facts})
        section.raw += runs
        everything.append((data, runs))
        shutil.rmtree(data.work)
    for data, runs in everything:
        section.claims += _claims(data, runs)
    section.claims += _growth_claims([run for _, runs in everything for run in runs])
    section.tables = [
        _data_table(everything),
        _time_table(everything),
        _memory_table(everything),
        _traffic_table(everything),
    ]
    return section


# ---- data ------------------------------------------------------------------------------------------------------------


def _data(quick: bool, skipped: list[str]) -> list[Data]:
    small, large = (8_000, 16_000) if quick else (100_000, 300_000)
    repeats = 1 if quick else 3
    separated = {"count": 50, "latent_dim": 16, "separation": 1.5}
    overlapping = {"count": 1000, "latent_dim": 24, "separation": 1.0, "shared": True}
    text = "50 well separated Gaussian clusters, each on a 16-dimensional affine subspace of its own, noise 0.05"
    wide = "1,000 overlapping Gaussian clusters in one 24-dimensional subspace, noise 0.05"
    found = [
        Data("separated", text, _synthetic("separated", small, separated), small, repeats, (64,)),
        Data("separated", text, _synthetic("separated", large, separated), large, max(1, repeats - 1)),
        Data("overlapping", wide, _synthetic("overlapping", small, overlapping), small, max(1, repeats - 1)),
    ]
    found.append(_real(4_000 if quick else small, repeats, skipped))
    if process.short:
        skipped.append("all but one turn of each side (--short)")
        return [replace(data, repeats=1, fixed=()) for data in found]
    return found


def _synthetic(name: str, rows: int, parameters: dict[str, Any]) -> Path:
    path = process.CACHE / f"{name}-{'-'.join(f'{v:g}' for v in parameters.values())}-{rows}.npy"
    if not path.exists():
        process.call("benchmarks.datasets.save_clusters", {"path": str(path), "rows": rows, **parameters})
    return path


def _real(rows: int, repeats: int, skipped: list[str]) -> Data:
    try:
        images: str | None = str(datasets.emoji())
    except datasets.MissingInputError as missing:
        images = None
        skipped.append(f"real features of emoji: {missing}")
    path = process.CACHE / f"views-{'emoji-' if images else ''}{rows}.npy"
    if not path.exists():
        arguments = {"path": str(path), "images": images, "checkpoint": str(datasets.checkpoint())}
        limits = {"rows": rows, "seconds": 240.0, "threads": joins.THREADS}
        process.call("benchmarks.datasets.save_views", arguments | limits, threads=joins.THREADS)
    made = (
        "EfficientNet-lite0 features (64 px, 1,280-D, by PCA to 384) of random crops and flips of "
        f"{'3,786 emoji, ' if images else ''}1,797 digits and 2 photographs"
    )
    return Data("real", made, path, len(np.load(path, mmap_mode="r")), repeats)


# ---- runs ------------------------------------------------------------------------------------------------------------


def _measure(data: Data) -> list[dict[str, Any]]:
    """All runs on one data set, with their recall."""
    totals, exact = data.facts["index"], data.facts["auto_is_exact"]
    nprobe = data.facts["compared_nprobe"] = min(FIXED, totals["cells"]) if exact else totals["nprobe"]
    runs: list[dict[str, Any]] = []
    for turn in range(data.repeats):
        runs += _run(data, "faiss_exact", 0, turn)
        if exact:
            runs += _run(data, "ours_exact", 0, turn)
        runs += _cell_sides(data, nprobe, turn, [_faster_batch(runs, nprobe)] if turn else BATCH_SIDES)
    for fixed in data.fixed:
        runs += _cell_sides(data, fixed, 0)
    if not exact:
        runs += _run(data, "ray_1x2", nprobe, 0) + _run(data, "ray_2x1", nprobe, 0)
    arguments = {"vectors": str(data.path), "work": data.work, "nprobe": nprobe, "shards": SHARDS}
    data.facts["rows_sent"] = process.call("benchmarks.joins.rows_sent", arguments, threads=joins.THREADS).value
    return runs


def _cell_sides(data: Data, nprobe: int, turn: int, batch: Sequence[str] = BATCH_SIDES) -> list[dict[str, Any]]:
    return [run for side in ("faiss_ivf", *batch, "ours") for run in _run(data, side, nprobe, turn)]


def _faster_batch(runs: Sequence[dict[str, Any]], nprobe: int) -> str:
    """Which of big_batch_search's sides is the one to beat."""
    return min(BATCH_SIDES, key=lambda side: _us(runs, side, nprobe) or float("inf"))


def _run(data: Data, side: str, nprobe: int, turn: int) -> list[dict[str, Any]]:
    """One run of a side, or several in one Ray session, in a new process."""
    answers = Path(data.work, f"{side}.npz")
    arguments = {"vectors": str(data.path), "work": data.work, "nprobe": nprobe}
    arguments |= {"step": data.step, "answers": str(answers)}
    if side.startswith("ray_"):
        pool = {"actors": int(side[4]), "threads": int(side[6]), "repeats": data.repeats}
        outcome = process.call("benchmarks.joins.ours_on_ray", arguments | pool)
        for made in answers.parent.glob(f"{answers.name}.*"):
            shutil.rmtree(made)
    elif side == "faiss_batch_1":
        outcome = process.call("benchmarks.joins.faiss_batch", arguments | {"threads": 1}, threads=1)
    else:
        outcome = process.call(f"benchmarks.joins.{side}", arguments, threads=joins.THREADS)
    facts = {
        "data": data.name,
        "rows": data.rows,
        "side": side,
        "nprobe": nprobe,
        **outcome.value,
        **_quality(data, side),
    }
    facts |= {"peak_rss_bytes": outcome.peak_rss_bytes, "children_peak_rss_bytes": outcome.children}
    times = facts["seconds"] if isinstance(facts["seconds"], list) else [facts["seconds"]]
    runs = []
    for number, seconds in enumerate(times):
        runs.append(
            facts | {"turn": turn + number, "seconds": seconds, "us_per_query": 1e6 * seconds / facts["queries"]}
        )
        print(f"selfjoin: {data.name} {data.rows}, {SIDES[side]}, nprobe {nprobe}: {seconds:.1f} s", flush=True)
    return runs


def _answers(data: Data, side: str) -> tuple[np.ndarray, np.ndarray]:
    with np.load(Path(data.work, f"{side}.npz")) as saved:
        return saved["distances"], saved["ids"]


def _quality(data: Data, side: str) -> dict[str, float]:
    exact_distances, exact_ids = _answers(data, "faiss_exact")
    distances, ids = _answers(data, side)
    found = recall.recall_and_error(exact_ids, exact_distances, ids, distances)
    return {"recall": found.recall, "mean_distance_error": found.mean_relative_error}


# ---- figures ---------------------------------------------------------------------------------------------------------


def _us(runs: Sequence[dict[str, Any]], side: str, nprobe: int) -> float | None:
    times = [run["us_per_query"] for run in runs if run["side"] == side and run["nprobe"] == nprobe]
    return table.middle(times) if times else None


def _claims(data: Data, runs: list[dict[str, Any]]) -> list[table.Claim]:
    nprobe = data.facts["compared_nprobe"]
    size = f"{data.name} {data.rows // 1000}k"
    where = f"{size}, nprobe {nprobe}"
    sides = ("faiss_ivf", _faster_batch(runs, nprobe), "ours", "ray_1x2", "ray_2x1")
    a, b, one, ray, two = (_us(runs, side, nprobe) for side in sides)
    exact, own_exact = _us(runs, "faiss_exact", 0), _us(runs, "ours_exact", 0)
    assert a is not None and b is not None and one is not None and exact is not None
    claims = [
        table.at_most(f"{where}: ours in one process over (a)", one / a, 0.4),
        table.at_most(f"{where}: ours in one process over (b)", one / b, 1.05),
    ]
    if ray is not None and two is not None:
        claims += [
            table.at_most(f"{where}: ours on Ray, 1 actor, start-up apart, over (a)", ray / a, 0.4),
            table.at_most(f"{where}: ours on Ray, 1 actor, start-up apart, over (b)", ray / b, 1.05),
            table.at_most(f"{where}: ours on Ray, 1 actor, start-up apart, over (c)", ray / exact, 1.0),
            table.reported(f"{where}: 2 actors of 1 thread over 1 actor of 2 threads", two / ray),
        ]
    if own_exact is not None:
        claims.append(table.at_most(f"{size}: ours exact in one process over (c)", own_exact / exact, 1.0))
    return claims


def _growth_claims(runs: list[dict[str, Any]]) -> list[table.Claim]:
    peaks = _peaks([run for run in runs if run["data"] == "separated"])
    sizes = sorted({rows for _, rows in peaks})
    if len(sizes) < 2:
        return []
    return [
        table.reported(
            f"peak memory of {_process_name(side)}, {sizes[1]:,} over {sizes[0]:,} rows", high / peaks[side, sizes[0]]
        )
        for (side, rows), high in peaks.items()
        if rows == sizes[1] and side in ("ours", "faiss_batch", "ray_1x2:ray::_Searcher") and (side, sizes[0]) in peaks
    ]


def _peaks(runs: Sequence[dict[str, Any]]) -> dict[tuple[str, int], float]:
    """MiB by (side or side:worker, rows), highest of all runs."""
    peaks: dict[tuple[str, int], float] = {}
    for run in runs:
        found = {run["side"]: run["peak_rss_bytes"]}
        if run["side"].startswith("ray_"):
            workers = {
                t: v for t, v in run["children_peak_rss_bytes"].items() if t in ("ray::_Searcher", "ray::_join_block")
            }
            found = {f"{run['side']}:driver": run["peak_rss_bytes"]}
            found |= {f"{run['side']}:{title}": value for title, value in workers.items()}
        for name, value in found.items():
            key = (name, run["rows"])
            peaks[key] = max(peaks.get(key, 0.0), value / 2**20)
    return peaks


def _process_name(key: str) -> str:
    side, _, worker = key.partition(":")
    titles = {"ray::_Searcher": "search actor", "ray::_join_block": "block task", "driver": "driver"}
    return SIDES[side] + (f": {titles[worker]}" if worker else "")


# ---- tables ----------------------------------------------------------------------------------------------------------

Everything = Sequence[tuple[Data, list[dict[str, Any]]]]


def _data_table(everything: Everything) -> table.Table:
    columns = [
        "data",
        "N",
        "how made",
        "intrinsic dimension: TwoNN",
        "MLE",
        "cells",
        "nprobe for 0.99",
        "rows scanned",
        "auto",
    ]
    made = table.Table("Data and index; rows scanned: share of N that a query is compared with at that nprobe", columns)
    for data, _ in everything:
        totals, dims = data.facts["index"], data.facts["intrinsic"]
        chosen = "exact" if data.facts["auto_is_exact"] else "cells"
        made.rows.append(
            [
                *(data.name, data.rows, data.made, dims["twonn"], dims["mle"]),
                *(totals["cells"], totals["nprobe"], totals["scan_fraction"], chosen),
            ]
        )
    return made


def _time_table(everything: Everything) -> table.Table:
    columns = ["data", "N", "nprobe", "side", "queries", "runs", "µs per query", "lowest to highest", "recall@20"]
    columns += ["error of mean distance", "ours in one process / it", "start-up s"]
    times = table.Table("Time per query (median)", columns)
    for data, runs in everything:
        for side, nprobe in dict.fromkeys((run["side"], run["nprobe"]) for run in runs):
            own = [run for run in runs if run["side"] == side and run["nprobe"] == nprobe]
            values, last = [run["us_per_query"] for run in own], own[-1]
            ours = _us(
                runs, "ours_exact" if data.facts["auto_is_exact"] and not nprobe else "ours", _nprobe(data, nprobe)
            )
            ratio = None if ours is None or side.startswith("ours") else ours / table.middle(values)
            fixed = nprobe and nprobe != data.facts["index"]["nprobe"]
            times.rows.append(
                [
                    *(data.name, data.rows, f"{nprobe} (fixed)" if fixed else str(nprobe or "all"), SIDES[side]),
                    *(last["queries"], len(own), table.middle(values), table.spread(values), last["recall"]),
                    *(last["mean_distance_error"], ratio, last.get("startup_s")),
                ]
            )
    return times


def _nprobe(data: Data, nprobe: int) -> int:
    """The nprobe of our run that a run is compared with: exact search (0) with what was calibrated."""
    return nprobe if nprobe or data.facts["auto_is_exact"] else data.facts["compared_nprobe"]


def _memory_table(everything: Everything) -> table.Table:
    runs = [run for data, runs in everything if data.name == "separated" for run in runs]
    peaks = _peaks(runs)
    sizes = sorted({rows for _, rows in peaks})
    title = "Peak resident memory per process, MiB (separated; the vectors themselves: "
    title += ", ".join(f"{table.shown(n * datasets.DIM * 4 / 2**20)} MiB at {n:,} rows" for n in sizes) + ")"
    made = table.Table(title, ["process", *(f"N = {n:,}" for n in sizes), "growth"])
    for name in dict.fromkeys(name for name, _ in peaks):
        values = [peaks.get((name, n)) for n in sizes]
        first, last = values[0], values[-1]
        made.rows.append([_process_name(name), *values, last / first if first and last else None])
    return made


def _traffic_table(everything: Everything) -> table.Table:
    title = (
        "Rows sent from a block of queries to shards, per query, counted at the nprobe compared (one actor per shard); "
        f"each is {datasets.DIM * 4:,} bytes. Shards of random rows would be sent every row: as many as there are "
        "shards"
    )
    made = table.Table(
        title, ["data", "N", "nprobe", *(f"{s} shards" for s in SHARDS), "2 shards, as the stage counted"]
    )
    for data, runs in everything:
        counted = [data.facts["rows_sent"][str(s)] for s in SHARDS]
        stage = next((run["rows_sent_per_query"] for run in runs if run["side"] == "ray_2x1"), None)
        made.rows.append([data.name, data.rows, data.facts["compared_nprobe"], *counted, stage])
    return made
