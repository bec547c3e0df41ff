"""Measures what one unit of each kind of work costs, for the model of benchmarks/costs.py; writes docs/unit_costs.json.

    python benchmarks/unit_costs.py                # about two minutes on 2 cores
    python benchmarks/unit_costs.py --only search

Every figure is of one thread of one core, in seconds of CPU time, unless its name says otherwise: CPU time moves less
than the clock on a machine that does other work too. Each measurement runs in as many processes at once as there are
cores, and is their mean: a core of a busy cluster shares caches and memory with busy neighbors. What is a benchmark
already (docs/benchmarks.json) is not measured again here.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # not this folder: its modules are benchmarks.X

import numpy as np  # noqa: E402

from benchmarks import process, table  # noqa: E402
from pd_core.engine import resources, session  # noqa: E402
from pd_core.engine import tasks as engine_tasks  # noqa: E402

NAMES = ("models", "decoding", "listing", "parquet", "records", "search", "training", "ranks", "fitting", "tasks")
OUTPUT = ROOT / "docs" / "unit_costs.json"
DIM = 768


def cpu_s(work: Callable[[], Any], repeats: int = 3) -> float:
    """Least CPU seconds of this process over some repeats: what disturbs a measurement only adds to it."""
    found = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        found.append(time.process_time() - start)
    return min(found)


# ---- images ----------------------------------------------------------------------------------------------------------


def models() -> dict[str, float]:
    """A forward pass per image at 224 px, batch of 64, fp32, channels_last; weights are random, as time is the same."""
    import timm
    import torch

    torch.set_num_threads(1)
    costs = {}
    for name in ("vit_base_patch16_224", "resnet50", "tf_efficientnet_lite0"):
        model = timm.create_model(name, pretrained=False, num_classes=0).eval().to(memory_format=torch.channels_last)
        batch = torch.rand(64, 3, 224, 224).contiguous(memory_format=torch.channels_last)
        with torch.inference_mode():
            model(batch[:8])
            costs[f"model_s.{name}"] = cpu_s(functools.partial(model, batch), 1) / len(batch)
    return costs


def decoding() -> dict[str, float]:
    """Two photographs of 640 x 427 px as JPEG and a 64 px PNG, each to 224 px, as `resize.prepare` does it."""
    import io

    from PIL import Image
    from sklearn.datasets import load_sample_images

    from pd_core.images import decode as images_decode
    from pd_core.images import resize

    preprocess = resize.Preprocess(224, 224, "bicubic", 0.9, "center", (0.5,) * 3, (0.5,) * 3)
    limits = images_decode.DecodeLimits(1 << 26, 10**8, (255, 255, 255), 60)
    photos = [_encoded(Image.fromarray(a), "JPEG") for a in load_sample_images().images]
    icon = io.BytesIO(_encoded(Image.fromarray(load_sample_images().images[0]).resize((64, 64)), "PNG")).getvalue()
    costs = {"photo_bytes": float(np.mean([len(p) for p in photos]))}
    for name, contents in (("photo", photos), ("icon", [icon])):
        work = [*contents] * (40 // len(contents))
        decode = functools.partial(resize.prepare, limits=limits, preprocess=preprocess)
        costs[f"decode_s.{name}"] = cpu_s(functools.partial(_all, decode, work)) / len(work)
    return costs


def _all(function: Callable[[Any], Any], items: Sequence[Any]) -> None:
    for item in items:
        function(item)


def _encoded(image: Any, kind: str) -> bytes:
    import io

    sink = io.BytesIO()
    image.save(sink, kind)
    return sink.getvalue()


def listing() -> dict[str, float]:
    """Both walks over a local directory of 20,000 files, sorting, hashing, and the listing's parts."""
    from PIL import Image

    from benchmarks import datasets
    from pd_core.core.settings.data import DataSettings
    from pd_core.images import listing as stage
    from pd_core.images import sources

    rows, folder = 20_000, process.WORK / "files"
    folder.mkdir(parents=True)
    original = folder.parent / "one.png"
    Image.new("RGB", (4, 4)).save(original)
    datasets.repeat_files([original], rows, folder)
    source = sources.open_source(DataSettings(source=str(folder)))
    seconds = []
    for turn in range(3):
        output = str(process.WORK / f"listing-{turn}")
        start = time.process_time()
        stage._list(source, output, 4096, False)
        seconds.append(time.process_time() - start)
    written = sum(f.stat().st_size for f in (process.WORK / "listing-0" / "listing").glob("*.parquet"))
    return {"list_s": min(seconds) / rows, "listing_bytes": written / rows}


# ---- tables ----------------------------------------------------------------------------------------------------------


def parquet() -> dict[str, float]:
    """A features part of 4,096 rows and its neighbors part, to Parquet with its hash and back: local disk, cached."""
    import pyarrow as pa

    from benchmarks import joins
    from pd_core.core import artifacts, files, schemas
    from pd_core.index.features import load_features

    rows, k, work = 4096, 20, str(process.WORK / "parquet")
    x = np.random.default_rng(0).standard_normal((rows, DIM), np.float32)
    joins.write_features(x, work, "features", rows)
    uri = files.join(work, "features", artifacts.part_name(0))
    whole = files.read_table(uri)
    size = len(files.table_bytes(whole))
    rng = np.random.default_rng(1)
    near = pa.table(
        [
            whole["sample_id"],
            pa.FixedSizeListArray.from_arrays(pa.array(rng.integers(1 << 62, size=rows * k)), k),
            pa.FixedSizeListArray.from_arrays(pa.array(np.sort(rng.random((rows, k), np.float32)).reshape(-1)), k),
        ],
        names=["sample_id", "neighbor_ids", "neighbor_distances"],
    ).cast(schemas.neighbors(k))
    near_bytes = files.table_bytes(near)
    sink = str(process.WORK / "near.parquet")
    Path(sink).write_bytes(near_bytes)
    return {
        "features_bytes_ratio": size / (rows * DIM * 4),
        "table_write_s_per_byte": cpu_s(lambda: artifacts.sha256(files.table_bytes(whole))) / size,
        "table_read_s_per_byte": cpu_s(lambda: load_features(uri)) / size,
        "neighbors_bytes": len(near_bytes) / (rows * k),
        "neighbors_write_s": cpu_s(lambda: artifacts.sha256(files.table_bytes(near))) / rows,
        "neighbors_read_s": cpu_s(lambda: files.read_table(sink)) / rows,
    }


def records() -> dict[str, float]:
    """Per part of a stage: writing an empty one with its record, reading the record, the driver's memory of it."""
    import tracemalloc

    from pd_core.core import artifacts, files

    stage = artifacts.Stage(str(process.WORK / "records"), "features", 1, {"rows": 0})
    stage.begin(overwrite=False)
    count = 2000
    write = cpu_s(lambda: [stage.write_part(artifacts.part_name(i), b"x", 0) for i in range(count)], 1)
    read = cpu_s(stage.finished_parts, 3)
    stage.commit(stage.finished_parts().values(), {}, {})
    size = (process.WORK / "records" / files.ARTIFACT).stat().st_size
    tracemalloc.start()
    held = artifacts.load_artifact(stage.uri)
    assert held is not None and len(held.parts) == count
    return {
        "part_write_s": write / count,
        "record_read_s": read / count,
        "artifact_bytes": size / count,
        "part_memory_bytes": tracemalloc.get_traced_memory()[1] / count,
    }


# ---- search ----------------------------------------------------------------------------------------------------------


def search() -> dict[str, float]:
    """Pairs compared by a search actor, exact and by cells, for two D; the coarse step; merging one actor's answer."""
    import torch

    from benchmarks import datasets
    from pd_core.index import knn, shards

    torch.set_num_threads(1)
    a, b = torch.rand(1536, 1536), torch.rand(1536, 1536)
    torch.mm(a, b)
    costs = {"flops": 2 * 1536**3 / cpu_s(lambda: torch.mm(a, b), 5)}
    rng = np.random.default_rng(0)
    k, rows, cells = 20, 40_000, 400
    for dim in (384, DIM):
        x = datasets.clusters(
            rows, count=50, latent_dim=16, separation=1.5, dim=dim
        )  # as the benchmark of the self-join
        flat = knn.ShardSearch(shards.flat_rows(np.arange(rows), x), 1, "cpu")
        few = x[:4000]
        costs[f"pair_exact_s.{dim}"] = cpu_s(functools.partial(flat.search_all, few, k), 2) / (len(few) * rows)
        centroids = shards.train_quantizer(x, cells, 0)
        quantizer = shards.quantizer_of(centroids)
        own = shards.cell_of(quantizer, x)
        template = shards.train_template("ivf_flat", dim, centroids)
        shard = shards.build_shard(template, x, np.arange(rows), own)
        held = knn.ShardSearch.open([shard], 1, "cpu")
        taken = []
        for nprobe in (8, 64):
            probes = shards.coarse_probes(quantizer, x, nprobe)
            pairs = int(np.bincount(own, minlength=cells)[probes].sum())
            taken.append((pairs, cpu_s(functools.partial(held.search_cells, x, probes, k), 1)))
        (few_pairs, few_s), (many_pairs, many_s) = taken
        costs[f"pair_s.{dim}"] = pair = (many_s - few_s) / (many_pairs - few_pairs)
        costs[f"query_s.{dim}"] = (few_s - pair * few_pairs) / rows
    centroids = rng.standard_normal((8192, DIM), np.float32)
    quantizer, q = shards.quantizer_of(centroids), rng.standard_normal((4096, DIM), np.float32)
    for nprobe in (1, 64):
        coarse = cpu_s(functools.partial(shards.coarse_probes, quantizer, q, nprobe), 2)
        costs[f"coarse_s.{nprobe}"] = coarse / (len(q) * len(centroids))
    found = np.sort(rng.random((65_536, k + 1), np.float32)), rng.integers(1 << 62, size=(65_536, k + 1))
    costs["merge_s"] = cpu_s(lambda: knn.merge_topk([found, found], k + 1), 2) / len(found[0])
    return costs


def training() -> dict[str, float]:
    """k-means of the coarse quantizer: products per second of its assignments, and building a shard per row."""
    from pd_core.index import shards

    cells = 512
    x = np.random.default_rng(0).standard_normal((64 * cells, DIM), np.float32)
    seconds = cpu_s(lambda: shards.train_quantizer(x, cells, 0), 1)
    centroids = x[:cells]
    template = shards.train_template("ivf_flat", DIM, centroids)
    own = shards.cell_of(shards.quantizer_of(centroids), x)
    build = cpu_s(lambda: shards.build_shard(template, x, np.arange(len(x)), own), 2)
    return {
        "kmeans_flops": 2.0 * shards.LLOYD_ITERATIONS * len(x) * cells * DIM / seconds,
        "shard_build_s_per_byte": build / x.nbytes,
    }


# ---- densities and predictor -----------------------------------------------------------------------------------------


def ranks() -> dict[str, float]:
    """The second pass: mean distances, the task that holds one row of the whole set, a rank among 8 million."""
    from pd_core.density import densities, formula

    rng = np.random.default_rng(0)
    neighbors = np.sort(rng.random((262_144, 20), np.float32) + 0.5)
    mean = cpu_s(lambda: formula.mean_knn_distance(neighbors)) / len(neighbors)
    rows, pieces = 4_000_000, 16
    d = rng.random((rows, 2)) + 0.5
    summaries = np.split(d, pieces)
    peak, before = [], process.peak_rss_bytes()
    seconds = cpu_s(lambda: densities._calibrate(1.0, *summaries), 1)
    peak.append(process.peak_rss_bytes() - before)
    every = np.sort(rng.random(8_000_000))
    asked = rng.random(262_144)
    rank = cpu_s(lambda: formula.mid_ranks(asked, every)) / len(asked)
    # the pieces arrive in shared memory: 16 bytes a row that the process maps, beside what it allocates
    return {
        "mean_distance_s": mean,
        "calibrate_s": seconds / rows,
        "calibrate_bytes": peak[0] / rows + 16,
        "rank_s": rank,
    }


def fitting() -> dict[str, float]:
    """The density predictor: a row in an epoch, one thread, layers of 512, 256 and 128; the first pass over parts."""
    from pd_core.core.settings.index import EstimatorSettings
    from pd_core.density import fit

    rows = 16_384
    rng = np.random.default_rng(0)
    warm = rng.standard_normal((512, DIM), np.float32), rng.standard_normal(512)
    fit.fit([lambda: (np.arange(512), *warm)], EstimatorSettings(epochs=1, patience=0), feature_dim=DIM)
    x, y = rng.standard_normal((rows, DIM), np.float32), rng.standard_normal(rows)
    costs: dict[str, float] = {}
    for batch in (256, 4096):
        seconds = {}
        for epochs in (1, 3):
            settings = EstimatorSettings(batch_size=batch, epochs=epochs, patience=0)
            part = lambda: (np.arange(rows), x, y)  # noqa: E731
            run = lambda s=settings, p=part: fit.fit([p], s, feature_dim=DIM)  # noqa: E731
            seconds[epochs] = cpu_s(run, 2)
        trained = rows * (1 - EstimatorSettings().holdout_fraction)
        costs[f"epoch_s.{batch}"] = (seconds[3] - seconds[1]) / (2 * trained)
    return costs


def tasks() -> dict[str, float]:
    """Ray on this machine: a first task with what it imports, one that does nothing, pieces, blocks of Ray Data."""
    import ray.data

    with session.session(str(process.WORK)):
        watch = time.perf_counter()
        engine_tasks.get(engine_tasks.task(_imports).remote())
        costs = {"task_start_s": time.perf_counter() - watch}
        watch = time.perf_counter()
        engine_tasks.get([engine_tasks.task(_imports_torch).remote() for _ in range(resources.cores())])
        costs["torch_start_s"] = time.perf_counter() - watch
        nothing = engine_tasks.task(_nothing)
        for count in (50, 1000):  # the first ones start the workers
            cpu = time.process_time()
            for _ in engine_tasks.bounded(nothing.remote, range(count), engine_tasks.in_flight):
                pass
            costs["task_driver_s"] = (time.process_time() - cpu) / count
        deal, build = ray.remote(_deal).options(num_returns=64), engine_tasks.task(_build)
        cpu = time.process_time()
        pieces: list[Any] = [deal.remote() for _ in range(32)]
        engine_tasks.get([build.remote(*[piece[shard] for piece in pieces]) for shard in range(64)])
        costs["piece_driver_s"] = (time.process_time() - cpu - 96 * costs["task_driver_s"]) / (32 * 64)
        ray.data.DataContext.get_current().enable_progress_bars = False
        seconds = {}
        for blocks in (50, 650):
            cpu = time.process_time()
            stream = ray.data.from_items([{"n": n} for n in range(blocks)], override_num_blocks=blocks)
            rows = stream.map_batches(_same, batch_size=None, num_cpus=0.5).map_batches(
                _Same, batch_size=1, compute=ray.data.ActorPoolStrategy(size=1), num_cpus=0.25
            )
            assert sum(1 for _ in rows.iter_rows()) == blocks
            seconds[blocks] = time.process_time() - cpu
        costs["block_driver_s"] = (seconds[650] - seconds[50]) / (2 * 600)  # each block passes two operators
        return costs


def _imports() -> None:
    import pd_core.index.build  # noqa: F401


def _imports_torch() -> None:
    import torch

    import pd_core.index.knn  # noqa: F401

    torch.zeros(1)


def _deal() -> list[np.ndarray]:
    return [np.zeros(1 << 16, np.uint8)] * 64


def _build(*pieces: np.ndarray) -> int:
    return len(pieces)


def _nothing(item: int) -> int:
    return item


def _same(batch: dict[str, Any]) -> dict[str, Any]:
    return batch


class _Same:
    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return batch


# ---- the program -----------------------------------------------------------------------------------------------------


def measured(name: str) -> dict[str, float]:
    """One measurement, in the process that it is alone in."""
    try:
        return globals()[name]()
    finally:
        shutil.rmtree(process.WORK, ignore_errors=True)


def _on_all_cores(name: str) -> dict[str, float]:
    """Mean of as many processes at once as there are cores; of Ray, which has all cores, of one."""
    many = 1 if name == "tasks" else resources.cores()
    environment = dict(os.environ) | ({} if name == "tasks" else dict.fromkeys(process.THREAD_VARIABLES, "1"))
    environment["PYTHONPATH"] = str(ROOT)
    with tempfile.TemporaryDirectory() as folder:
        results = [Path(folder, f"{number}.json") for number in range(many)]
        command = [sys.executable, process.__file__, "benchmarks.unit_costs.measured", json.dumps({"name": name})]
        running = [subprocess.Popen([*command, str(result)], cwd=ROOT, env=environment) for result in results]
        if any(one.wait() for one in running):
            raise SystemExit(f"{name}: a measurement failed, see above")
        found = [json.loads(result.read_text())["value"] for result in results]
    return {key: statistics.fmean(one[key] for one in found) for key in found[0]}


def main(argv: Sequence[str]) -> int:
    """Measure, and put the new figures in the place of the old ones of the same name."""
    parser = argparse.ArgumentParser(description="Write docs/unit_costs.json.")
    parser.add_argument("--only", choices=NAMES, action="append", help="measure this one, keep the others; repeatable")
    arguments = parser.parse_args(argv)
    known = json.loads(OUTPUT.read_text()) if OUTPUT.exists() else {}
    for name in arguments.only or NAMES:
        facts, start = table.circumstances(False), time.perf_counter()
        costs = _on_all_cores(name)
        facts.pop("quick")
        known[name] = {**facts, "wall_s": round(time.perf_counter() - start, 1), "costs": costs}
        OUTPUT.write_text(json.dumps({n: known[n] for n in NAMES if n in known}, indent=1) + "\n")
        print(f"{name}: {known[name]['wall_s']} s: {costs}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
