"""What records of strangers lead to and say: places beside them, regular files, values of the right types and sizes."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pd_core.core import artifacts, schemas, trust
from pd_core.core import files as core_files
from pd_core.core.errors import UserError
from pd_core.density import fit, originals, realset
from pd_core.density import predictor as density_predictor
from pd_core.density.architecture import Architecture
from pd_core.engine import session
from pd_core.images.resize import Preprocess
from pd_core.index import search, shards
from pd_core.index.extractor import ExtractorSpec

DIM, ROWS, K, CELLS = 4, 60, 3, 2


# ---- places ----------------------------------------------------------------------------------------------------------


def led(uri: object, *beside: str | None) -> str:
    return trust.recorded_path(uri, "RECORD", beside or ["/data/out"], "--checkpoint")


@pytest.mark.parametrize(
    ("uri", "beside", "expected"),
    [
        ("/a/b c.safetensors", "/data/out", "/a/b c.safetensors"),
        ("file:///a/b", "/data/out", "/a/b"),
        ("/a/?x=1#y", "file:///data/out", "/a/?x=1#y"),  # of a file name
        ("s3://bucket/a/b", "s3://bucket/out", "s3://bucket/a/b"),
        ("s3://bucket", "s3://bucket/out", "s3://bucket"),
    ],
)
def test_records_lead_to_the_place_where_they_lie(uri, beside, expected):
    assert led(uri, beside) == expected
    assert led(uri, "s3://other/x", beside) == led(uri, None, beside) == expected  # the command leads there too


def test_a_relative_path_is_one_of_this_directory():
    assert led("a/b") == os.path.abspath("a/b")
    assert led("data:text/plain,x") == os.path.abspath("data:text/plain,x")  # not what fsspec would take it for


@pytest.mark.parametrize(
    "uri",
    [
        *(
            "http://host/w",
            "https://host/w",
            "ftp://host/w",
            "gs://bucket/w",
            "memory://w",
            "hf://org/name",
            "S3://bucket/w",
        ),
        *(
            "simplecache::http://host/w",
            "simplecache::s3://bucket/w",
            "zip://w::/a.zip",
            "filecache::/a",
            "s3://bucket/a::b",
        ),
        *("s3://bucket/w?versionId=1", "s3://bucket/w#x", "s3:///w", "s3://user:word@host/w", "s3://../w", "s3://"),
        *("/a/b\0c", "", None, 5, ["/a"], {"a": 1}, True, "file://host://x"),
    ],
)
def test_other_schemes_and_chains_are_never_opened(uri):
    for beside in ("/data/out", "s3://bucket/out"):
        with pytest.raises(
            UserError, match=r"^RECORD: names [^\n]*is not opened; name the right place with --checkpoint$"
        ):
            led(uri, beside)


@pytest.mark.parametrize(
    ("uri", "beside", "place"),
    [
        ("s3://other/w", "s3://bucket/out", "s3://other"),
        ("s3://bucket-2/w", "s3://bucket/out", "s3://bucket-2"),
        ("s3://bucket/w", "/data/out", "s3://bucket"),
        ("/a/w", "memory://out", "this machine"),
        ("/a/w", "s3://bucket/out", "this machine"),
    ],
)
def test_another_place_takes_the_word_of_the_command(uri, beside, place):
    with pytest.raises(
        UserError, match=rf"lies in another place \({place}\) .*; if you trust it, add --checkpoint {uri}$"
    ):
        led(uri, beside)


# ---- records ---------------------------------------------------------------------------------------------------------


SPEC = ExtractorSpec(
    "m", None, "0" * 64, DIM, Preprocess(8, 8, "bicubic", 1.0, "squash", (0.5,) * 3, (0.5,) * 3), "fp32", "l 1"
)
QUANTILES = np.linspace(0.5, 2.0, 1001).tolist()
DENSITIES = {
    "rows": ROWS,
    "k": K,
    "volume_dim": 1.0,
    "log_normalizer": 0.1,
    "distance_floor": 1e-6,
    "density_quantiles": QUANTILES,
    "nearest_distance_quantiles": QUANTILES,
}
INDEX = {"kind": "ivf_flat", "rows": ROWS, "dim": DIM, "shards": 1, "nprobe": 1, "cells": CELLS}


def commit(output: Path, kind: str, totals: dict[str, Any], files: dict[str, bytes], **identity: str) -> str:
    stage = artifacts.Stage(str(output / kind), kind, schemas.VERSIONS[kind], identity)
    parts = [
        stage.write_part(n, data, 0 if n in (search.QUANTIZER, search.CELLS) else ROWS) for n, data in files.items()
    ]
    return stage.commit(parts, totals, {}).fingerprint


def files_of_index() -> dict[str, bytes]:
    features = np.random.default_rng(0).standard_normal((ROWS, DIM)).astype(np.float32)
    centroids = shards.train_quantizer(features, CELLS, seed=0)
    template = shards.train_template("ivf_flat", DIM, centroids)
    own = shards.cell_of(shards.quantizer_of(centroids), features)
    shard = shards.build_shard(template, features, np.arange(ROWS), own)
    cells = json.dumps({"shard_of_cell": [0] * CELLS, "rows_of_cell": [1] * CELLS}).encode()
    return {search.QUANTIZER: template, search.CELLS: cells, search.shard_name(0): shard}


@pytest.fixture
def built(tmp_path) -> Path:
    """As much of an output of build_index as `open_realset` reads."""
    output = tmp_path / "out"
    features = commit(output, "features", {"extractor": SPEC.to_json()}, {})
    commit(output, "index", INDEX, files_of_index(), features=features)
    densities = commit(output, "densities", DENSITIES, {"part-00000000.parquet": b"x"})
    commit(output, "estimator", {}, {}, densities=densities)
    return output


def change(output: Path, kind: str, edit: Any) -> None:
    file = output / kind / core_files.ARTIFACT
    values = json.loads(file.read_text())
    edit(values["totals"])
    file.write_text(json.dumps(values))


OTHERS: list[Any] = [
    None,
    True,
    -1,
    0,
    2**63,
    2**200,
    0.5,
    float("nan"),
    float("inf"),
    -0.5,
    "x",
    "1\n2",
    [],
    [1],
    {},
    {"a": 1},
]


def test_an_honest_record_is_opened(built):
    real = realset.open_realset(str(built))
    assert (real.rows, real.k, real.index.shard_of_cell, real.extractor) == (ROWS, K, (0,) * CELLS, SPEC)
    assert realset.open_for(str(built), "weights", "--index").extractor.checkpoint == os.path.abspath("weights")


@pytest.mark.parametrize(
    ("kind", "inside", "names"),
    [
        ("densities", None, sorted(set(DENSITIES) - {"rows"})),
        ("index", None, sorted(set(INDEX) - {"cells"})),
        ("features", "extractor", sorted(SPEC.to_json())),
    ],
)
def test_what_a_record_cannot_say_is_one_line(built, kind, inside, names):
    """Every entry in turn is gone or is something else. What passes all the same has to be of its type and in its
    bounds.
    """
    path = built / kind / core_files.ARTIFACT
    honest = path.read_text()
    for name in names:
        for other in [*OTHERS, "gone"]:

            def edit(totals: dict[str, Any], name: str = name, other: Any = other) -> None:
                values = totals if inside is None else totals[inside]
                if other == "gone":
                    del values[name]
                else:
                    values[name] = copy.deepcopy(other)

            change(built, kind, edit)
            try:
                real = realset.open_realset(str(built))
            except UserError as error:
                assert str(built) in str(error) and "\n" not in str(error), error
                assert len(str(error)) < 1000
            else:
                assert np.isfinite([real.volume_dim, real.log_normalizer, real.distance_floor]).all()
                assert real.volume_dim > 0 and real.distance_floor >= 0 and 1 <= real.k < ROWS
                assert 0 <= real.index.nprobe <= CELLS and real.index.shards == 1 and 1 <= real.index.dim <= 1 << 20
                assert all(isinstance(text, str) for text in (real.extractor.weights_sha256, real.extractor.library))
            path.write_text(honest)
    realset.open_realset(str(built))


@pytest.mark.parametrize(
    ("kind", "changes", "expected"),
    [
        ("densities", {"k": ROWS}, "k is 60, and there are 60 rows"),
        ("densities", {"rows": ROWS + 1}, "says 61 rows, its parts have 60"),
        ("index", {"rows": ROWS - 1}, "says 59 rows, its parts have 60"),
        ("densities", {"density_quantiles": QUANTILES[::-1]}, "quantiles do not ascend"),
        (
            "densities",
            {"nearest_distance_quantiles": [-1.0, *QUANTILES[1:]]},
            r"nearest_distance_quantiles.0: .* greater",
        ),
        ("densities", {"density_quantiles": [0.1] * 5000}, "density_quantiles: .*at most 1001"),
        ("index", {"kind": "hnsw"}, "kind: string should match"),
        ("index", {"kind": "flat"}, "an index of kind flat has not 0 cells|1 are probed"),
        ("index", {"nprobe": CELLS + 1}, "of which 3 are probed"),
        ("index", {"shards": 2}, "names no shard-00001.faiss"),
        ("index", {"shards": 2**40}, "shards: .*less than or equal"),
        ("index", {"dim": DIM + 1}, "has 5 dimensions, the features have 4"),
    ],
)
def test_what_contradicts_itself_is_one_line(built, kind, changes, expected):
    change(built, kind, lambda totals: totals.update(changes))
    with pytest.raises(UserError, match=rf"{built}/{kind}/artifact.json: [^\n]*({expected})"):
        realset.open_realset(str(built))


@pytest.mark.parametrize("owners", [[0, 1], [0, -1], [0], [0, 0, 0], "00", [0, None], {}, None, [2**70, 0]])
def test_cells_belong_to_shards_that_are_there(built, owners):
    file = built / "index" / search.CELLS
    text = json.dumps({"shard_of_cell": owners, "rows_of_cell": [1, 1]})
    file.write_text(text.ljust(file.stat().st_size)[: max(len(text), file.stat().st_size)])
    change(built, "index", lambda totals: totals.update(nprobe=2))
    values = json.loads((built / "index" / core_files.ARTIFACT).read_text())
    for part in values["parts"]:
        part["bytes"] = (built / "index" / part["name"]).stat().st_size
    (built / "index" / core_files.ARTIFACT).write_text(json.dumps(values))
    if owners == [0, 0, 0]:  # as many as it says, so that only the quantizer contradicts it
        with pytest.raises(UserError, match="other cells or dimensions than its record"):
            search.probes_of(realset.open_realset(str(built)).index, np.zeros((1, DIM), np.float32))
        return
    with pytest.raises(UserError, match=rf"{built}/index/(artifact|cells).json: "):
        realset.open_realset(str(built))


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(
    ("dim", "cells", "expected"),
    [
        (DIM + 1, CELLS, "its shards have other cells or dimensions"),
        (0, 0, "damaged"),
    ],
)
def test_a_shard_of_strangers_is_one_line_where_it_is_opened(built, dim, cells, expected):
    info = search.open_index(str(built / "index"))
    file = built / "index" / search.shard_name(0)
    own = np.zeros((cells, dim), np.float32)
    file.write_bytes(shards.train_template("ivf_flat", dim, own) if dim else file.read_bytes()[:-1])
    with (
        pytest.raises(UserError, match=rf"^{built}/index: .*{expected}"),
        search.open_pool(info, session.connect(), 1, 1),
    ):
        pass


def test_a_predictor_is_of_the_features_of_its_index(built):
    metrics = density_predictor.FitMetrics(fit.calibration(np.arange(4.0), np.arange(4.0)), 10, 4, 1, ())
    for dim in (DIM, DIM + 1):
        predictor = density_predictor.new_predictor(Architecture(dim, (2,), "density"))
        for name, data in density_predictor.to_bytes(predictor, metrics).items():
            (built / "estimator" / name).write_bytes(data)
        real = realset.open_realset(str(built))
        if dim == DIM:
            assert real.predictor().architecture == predictor.architecture
    with pytest.raises(UserError, match=rf"^{built}/estimator: is of other features"):
        real.predictor()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"another": 1}, "another: unexpected"),
        ({"model": "local-dir:/etc"}, "no model of timm or its hub"),
        ({"model": "hf_hub:../../x"}, "no model of timm or its hub"),
        ({"model": "hf_hub:a/b/c"}, "no model of timm or its hub"),
        ({"feature_dim": 10**9}, "feature_dim: .*less than or equal"),
        ({"precision": "int8"}, "precision: "),
        ({"preprocess": {**SPEC.to_json()["preprocess"], "height": 10**6}}, "more than 4096 px a side"),
        ({"preprocess": {**SPEC.to_json()["preprocess"], "std": [0, 1, 1]}}, "use values above 0"),
        ({"preprocess": 5}, "preprocess: "),
        ({"checkpoint": "http://host/w"}, "is not opened; name the right place with --checkpoint"),
        ({"checkpoint": "simplecache::http://host/w"}, "is not opened"),
        ({"checkpoint": "s3://bucket/w"}, r"another place \(s3://bucket\)"),
        ({"checkpoint": 5}, "checkpoint: "),
    ],
)
def test_an_extractor_of_strangers_is_held_to_what_one_can_be(built, changes, expected):
    change(built, "features", lambda totals: totals["extractor"].update(changes))
    with pytest.raises(UserError, match=rf"{built}/features/artifact.json: [^\n]*{expected}"):
        realset.open_realset(str(built))
    if "checkpoint" in changes and isinstance(changes["checkpoint"], str):
        assert realset.open_for(str(built), "/own", "--index").extractor.checkpoint == "/own"


@pytest.mark.parametrize("model", ["vit_base_patch16_224.augreg_in21k", "hf_hub:org/name", "hf-hub:org/name@v1.0"])
def test_models_of_timm_and_its_hub_are_taken(built, model):
    change(built, "features", lambda totals: totals["extractor"].update(model=model))
    assert realset.open_realset(str(built)).extractor.model == model


def test_an_index_on_a_store_leads_to_no_file_of_this_machine(built, s3_environment):
    change(built, "features", lambda totals: totals["extractor"].update(checkpoint=str(built / "weights")))
    realset.open_realset(str(built))
    bucket = s3_environment.make_bucket()
    s3_environment.filesystem().put(str(built), f"{bucket}/out", recursive=True)
    with pytest.raises(UserError, match=rf"another place \(this machine\) .* add --checkpoint {built}/weights"):
        realset.open_realset(f"s3://{bucket}/out")
    assert realset.open_for(f"s3://{bucket}/out", "/own", "--index").extractor.checkpoint == "/own"


# ---- sources ---------------------------------------------------------------------------------------------------------


def listed(output: Path, root: object, **more: object) -> str:
    source = {"kind": "directory", "root": root, "names": [], "patterns": [], **more}
    stage = artifacts.Stage(str(output / "listing"), "listing", schemas.VERSIONS["listing"], {"source": source})
    stage.commit([], {"rows": 0}, {})
    (output / "run.json").write_text(json.dumps({"settings": {"data": {"source": "/x"}}}))
    return str(output)


def test_a_recorded_source_is_where_its_record_lies_or_the_command_says(tmp_path):
    assert originals.source_of(listed(tmp_path / "a", str(tmp_path))).root == str(tmp_path)
    elsewhere = listed(tmp_path / "b", "s3://images/train")
    with pytest.raises(UserError, match=r"listing/artifact.json: .*\(s3://images\) .* add --source s3://images/train"):
        originals.source_of(elsewhere)
    with pytest.raises(UserError, match=r"add --data\.source s3://images/train"):
        originals.source_of(elsewhere, option="--data.source")
    assert originals.source_of(elsewhere, "s3://images/train/*.jpg").root == "s3://images/train"


@pytest.mark.parametrize(
    "source",
    [
        {"root": "http://host/"},
        {"root": 5},
        {"root": None},
        {"kind": "pickle"},
        {"names": "ab"},
        {"names": [5]},
        {"patterns": None},
    ],
)
def test_a_source_that_none_is_is_one_line(tmp_path, source):
    output = listed(tmp_path / "a", **{"root": str(tmp_path), **source})
    with pytest.raises(UserError, match=rf"^{output}/listing/artifact.json: [^\n]*$"):
        originals.source_of(output)


@pytest.mark.parametrize(
    "run", ["{", "[" * 100_000, "[]", "5", '{"settings": []}', '{"settings": {"data": {"kind": 5}}}']
)
def test_settings_of_a_source_that_none_are_are_one_line(tmp_path, run):
    output = listed(tmp_path / "a", str(tmp_path))
    Path(output, "run.json").write_text(run)
    with pytest.raises(UserError, match=rf"^{output}/run.json: [^\n]*$"):
        originals.source_of(output)
