"""The library on a real index: the bits of the workflow's tables without Ray, images of every kind, faults told."""

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import pd_core
from pd_core.core import errors
from pd_core.density import formula, realset
from pd_core.evaluate import metrics
from pd_core.index import knn, search
from tests import tiny
from workflows import build_index

KEYS = [key for key in sorted(tiny.files()) if key not in tiny.BAD]


@pytest.fixture(scope="module")
def folder(inputs) -> Path:
    return inputs[0]


@pytest.fixture(scope="module", params=["flat", "ivf_flat", pytest.param("ivf_sq8", marks=pytest.mark.slow)])
def output(request, built, inputs, ray_cluster, tmp_path_factory) -> Path:
    """An output of build_index, whose search is exact, or over some of ten cells."""
    if request.param == "flat":
        return built
    made = tmp_path_factory.mktemp(request.param) / "out"
    more = ["--index.cells=10", "--index.target_recall=0.5", f"--index.kind={request.param}", "--no-tracking.enabled"]
    assert errors.exit_code(lambda: build_index.main(tiny.arguments(*inputs, made, *more))) == 0
    assert 0 < realset.open_realset(str(made)).index.nprobe < 10
    return made


@pytest.fixture(scope="module")
def opened(built) -> pd_core.Index:
    return pd_core.open(built)


def rows(output: Path, stage: str) -> dict[str, dict]:
    """The rows of a stage's table by key."""
    table = pq.ParquetDataset(sorted(str(f) for f in (output / stage).glob("*.parquet"))).read()
    return {row["key"]: row for row in table.to_pylist()}


def strangers(count: int) -> list[np.ndarray]:
    """Pictures that are in no index of these tests."""
    rng = np.random.default_rng(7)
    return [rng.integers(0, 256, (20 + i, 24, 3), np.uint8) for i in range(count)]


# ---- the same bits ---------------------------------------------------------------------------------------------------


def test_images_of_the_source_have_their_rows_of_the_tables(output, folder):
    """To the bit, in another order and other batches, beside images that are no source's or cannot be used."""
    index = pd_core.open(output)
    order = np.random.default_rng(0).permutation(len(KEYS))
    own = [folder / KEYS[i] for i in order]
    given = [own[0], strangers(1)[0], folder / "broken/cut.png", *own[1:]]
    place = [0, *range(3, len(given))]
    made = index.features(given, strict=False)[place]
    expected = rows(output, "features")
    np.testing.assert_array_equal(made, np.array([expected[KEYS[i]]["feature"] for i in order], np.float32))
    scored = index.score(given).take(place).to_pylist()
    table = rows(output, "densities")
    keys = {row["sample_id"]: key for key, row in table.items()}
    for row, wanted in zip(scored, (table[KEYS[i]] for i in order), strict=True):
        assert row["key"] == str(folder / wanted["key"])
        assert {name: row[name] for name in ("density", "log_density", "percentile")} == {
            name: wanted[name] for name in ("density", "log_density", "percentile")
        }
        assert row["nearest_distance"] == wanted["neighbor_distances"][0]
        assert row["nearest_key"] == keys[wanted["neighbor_ids"][0]]
        assert row["reason"] is None and row["detail"] is None


def test_the_model_sees_the_batches_and_threads_of_the_run(opened, folder):
    """Kernels depend on both, and with them the last bits, though not with every model and processor."""
    seen = []

    def see(module, given):
        if isinstance(module, torch.nn.Conv2d):
            seen.append((len(given[0]), torch.get_num_threads()))

    hook = torch.nn.modules.module.register_module_forward_pre_hook(see)
    try:
        opened.features([folder / key for key in KEYS[:11]])
    finally:
        hook.remove()
    assert set(seen) == {(8, 1)}


def test_other_images_have_the_densities_that_search_on_ray_gives(output, ray_cluster):
    index, real = pd_core.open(output), realset.open_realset(str(output))
    given = strangers(11)
    features = index.features(given)
    with search.open_pool(real.index, ray_cluster, 1, 1) as pool:
        distances, ids, _ = search.search(pool, features, real.k)
    scored = index.score(given)
    np.testing.assert_array_equal(scored["log_density"].to_numpy(), real.log_density(distances))
    np.testing.assert_array_equal(scored["nearest_distance"].to_numpy(), distances[:, 0])
    np.testing.assert_array_equal(scored["percentile"].to_numpy(), real.percentile(scored["density"].to_numpy()))
    key_of = {row["sample_id"]: key for key, row in rows(output, "features").items()}
    near = index.neighbors(given, k=3).to_pylist()
    assert [row["neighbor_keys"] for row in near] == [[key_of[i] for i in row] for row in ids[:, :3].tolist()]
    np.testing.assert_array_equal([row["neighbor_distances"] for row in near], distances[:, :3])


def test_neighbors_beyond_the_cells_that_are_probed_are_found(output, folder):
    """More than those cells hold, of all there are: an image of the source has every other one as neighbor, once."""
    near = pd_core.open(output).neighbors(folder / KEYS[5], k=tiny.GOOD - 1).to_pylist()[0]
    assert sorted(near["neighbor_keys"]) == sorted(set(KEYS) - {KEYS[5]})
    assert near["neighbor_distances"] == sorted(near["neighbor_distances"])


def test_by_predictor_is_the_predictor_of_the_index(opened, built, folder):
    given = [folder / KEYS[0], *strangers(3)]
    scored = opened.score(given, by="predictor")
    with knn.single_threaded_torch(), torch.inference_mode():
        predicted = realset.open_realset(str(built)).predictor()(torch.from_numpy(opened.features(given)))
    np.testing.assert_array_equal(scored["log_density"].to_numpy(), predicted.double().numpy())
    np.testing.assert_array_equal(scored["density"].to_numpy(), formula.density_of(predicted.double().numpy()))
    by_index = opened.score(given)
    assert scored["nearest_key"].equals(by_index["nearest_key"])
    assert scored["nearest_distance"].equals(by_index["nearest_distance"])


def test_more_images_than_a_block_holds_come_out_in_order(opened, folder, monkeypatch):
    whole = opened.score([folder / key for key in KEYS[:30]])
    monkeypatch.setattr("pd_core.api.BLOCK_IMAGES", 16)
    assert opened.score(folder / key for key in KEYS[:30]).equals(whole)


def test_pseudo_density_of_features_is_that_of_the_table(built):
    features, table = rows(built, "features"), rows(built, "densities")
    rho = pd_core.pseudo_density(np.array([row["feature"] for row in features.values()], np.float32), k=5)
    np.testing.assert_array_equal(rho, [table[key]["density"] for key in features])


def test_metrics_take_floats_of_any_width():
    rng = np.random.default_rng(0)
    real, generated = rng.normal(size=(60, 8)).astype(np.float32), rng.normal(size=(50, 8)).astype(np.float32) + 0.5
    for name in ("precision_recall", "density_coverage", "frechet_distance"):
        expected = getattr(metrics, name)(real, generated)
        assert getattr(pd_core, name)(real.astype(np.float64), generated.tolist()) == expected
    assert pd_core.vendi_score(real.tolist()) == metrics.vendi_score(real)


def test_thresholds_are_those_of_the_workflow(opened, built):
    densities = [row["density"] for row in rows(built, "densities").values()]
    assert opened.threshold("p80") == pytest.approx(np.quantile(densities, 0.8), rel=0.02)  # from 1001 quantiles
    assert opened.threshold(1.0) == 1.0
    with pytest.raises(pd_core.UserError, match="outside the densities"):
        opened.threshold("1e9")


# ---- images of every kind --------------------------------------------------------------------------------------------


def saved(image: Image.Image, kind: str, **options) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(Image.fromarray(strangers(1)[0]), "JPEG", exif=exif)


def see_through() -> Image.Image:
    return Image.fromarray(
        np.dstack([strangers(1)[0], np.arange(480, dtype=np.uint32).reshape(20, 24).astype(np.uint8)])
    )


PICTURES = {
    "rgb": lambda: saved(Image.fromarray(strangers(1)[0]), "PNG"),
    "turned by EXIF": turned,
    "CMYK": lambda: saved(Image.fromarray(strangers(1)[0]).convert("CMYK"), "JPEG"),
    "see-through": lambda: saved(see_through(), "PNG"),
    "palette": lambda: saved(see_through().convert("P"), "GIF", transparency=3),
    "black and white": lambda: saved(Image.fromarray(strangers(1)[0]).convert("1"), "PNG"),
    "16 bits": lambda: saved(Image.fromarray(np.arange(480, dtype=np.uint16).reshape(20, 24) * 130), "PNG"),
    "32 bits": lambda: saved(Image.fromarray(np.arange(480, dtype=np.int32).reshape(20, 24) * 130), "TIFF"),
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_pil_image_is_what_its_file_is(opened, tmp_path, name):
    data = PICTURES[name]()
    (tmp_path / "one").write_bytes(data)
    features = opened.features([tmp_path / "one", data, Image.open(io.BytesIO(data))])
    np.testing.assert_array_equal(features[1:], features[[0, 0]])
    assert np.abs(features[0]).max() > 0


def test_pixels_are_what_their_file_is(opened):
    grey, alpha = strangers(1)[0][:, :, 0], np.asarray(see_through())
    arrays = [strangers(1)[0], grey, grey[:, :, None], alpha, strangers(1)[0][::2, ::-1]]
    files = [saved(Image.fromarray(np.ascontiguousarray(a.squeeze())), "PNG") for a in arrays]
    np.testing.assert_array_equal(opened.features(arrays), opened.features(files))
    np.testing.assert_array_equal(opened.features(np.stack(strangers(1) * 3)), opened.features(strangers(1) * 3))
    np.testing.assert_array_equal(opened.features(grey), opened.features([grey]))


def test_an_image_that_cannot_be_used_has_a_row_that_says_why(opened, folder, tmp_path):
    cut = Image.open(io.BytesIO(saved(Image.fromarray(strangers(1)[0]), "JPEG")[:-200]))
    good = folder / KEYS[0]
    given = {
        "no_such.png": "unreadable",
        str(tmp_path): "unreadable",
        "https://example.org/a.png": "unreadable",
        str(folder / "broken/empty.png"): "empty",
        str(folder / "broken/text.jpg"): "not_an_image",
        str(folder / "broken/cut.png"): "truncated",
    }
    others = [b"GIF89a", cut, np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8), np.zeros((4, 4, 2), np.uint8), None]
    scored = opened.score([good, *given, *others, good])
    alone = opened.score(str(good)).to_pylist()
    assert scored.slice(0, 1).to_pylist() == alone == scored.slice(len(scored) - 1).to_pylist()
    bad = scored.slice(1, len(scored) - 2)
    assert bad["reason"].to_pylist() == [
        *given.values(), "truncated", "corrupt", *["not_an_image"] * 4,
    ]  # fmt: skip
    assert bad["key"].to_pylist() == [*given, *map(str, range(7, 13))]
    assert all(bad["detail"].to_pylist()) and "NoneType" in bad["detail"].to_pylist()[-1]
    for name in ("density", "log_density", "percentile", "nearest_key", "nearest_distance"):
        assert bad[name].null_count == len(bad)
    assert np.isnan(opened.features(list(given), strict=False)).all()
    assert opened.neighbors(list(given))["neighbor_keys"].null_count == len(given)


def test_strict_raises_and_names_the_image(opened, folder):
    bad = folder / "broken/cut.png"
    for call in (opened.score, opened.neighbors, opened.features):
        with pytest.raises(pd_core.UserError, match=r"broken/cut\.png: truncated.*strict=False"):
            call([folder / KEYS[0], bad], strict=True)
    with pytest.raises(pd_core.UserError, match="truncated"):
        opened.features([bad])


def test_no_images_are_a_table_without_rows(opened):
    assert opened.score([]).num_rows == opened.neighbors([]).num_rows == 0
    assert opened.features([]).shape == (0, opened.features(strangers(1)).shape[1])
    assert opened.score(b"").schema == opened.score([]).schema


# ---- what is in the way ----------------------------------------------------------------------------------------------


def changed(path: Path, **values) -> None:
    """Some of the record of an extractor."""
    record = json.loads(path.read_text())
    record["totals"]["extractor"] |= values
    path.write_text(json.dumps(record))


def emptied(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


FAULTS: dict[str, Callable[[Path], object]] = {
    "does not exist.*build_index": shutil.rmtree,
    r"is no index .*build_index": emptied,
    r"is not finished \(densities/.*build_index": lambda o: (o / "densities" / "artifact.json").unlink(),
    "is gone": lambda o: next((o / "features").glob("part-*")).unlink(),
    "checkpoint .*gone.safetensors: not found": lambda o: changed(
        o / "features/artifact.json", checkpoint=str(o / "gone.safetensors")
    ),
    "are not those of the run": lambda o: changed(o / "features/artifact.json", weights_sha256="0" * 64),
    "pip install timm==0.0.1": lambda o: changed(o / "features/artifact.json", library="timm 0.0.1"),
    r"checkpoint = s3://elsewhere": lambda o: changed(o / "features/artifact.json", checkpoint="s3://elsewhere/w.pt"),
}


@pytest.mark.parametrize("message", FAULTS)
def test_what_cannot_be_opened_says_why_in_one_line(built, tmp_path, message):
    output = tmp_path / "out"
    shutil.copytree(built, output)
    FAULTS[message](output)
    with pytest.raises(pd_core.UserError, match=message) as caught:
        pd_core.open(output)
    assert "\n" not in str(caught.value) and "--" not in str(caught.value).replace("--output", "")


def test_a_bad_argument_is_told_in_one_line(opened, built):
    with pytest.raises(pd_core.UserError, match="choose index or predictor"):
        opened.score([], by="both")
    with pytest.raises(pd_core.UserError, match="choose 1 to 149"):
        opened.neighbors([], k=150)
    with pytest.raises(pd_core.UserError, match="choose cpu"):
        pd_core.open(built, device="meta")
    with pytest.raises(pd_core.UserError, match="more than k rows"):
        pd_core.pseudo_density(np.zeros((20, 3)))
    with pytest.raises(pd_core.UserError, match=r"expected floats \[N, D\]"):
        pd_core.pseudo_density(np.zeros(20))
    with pytest.raises(pd_core.UserError, match="row 1 is not finite in float32"):
        pd_core.frechet_distance([[1.0], [1e300], [2.0]], np.ones((3, 1)))
    with pytest.raises(pd_core.UserError, match="D = 2, generated 3"):
        pd_core.precision_recall(np.ones((9, 2)), np.ones((9, 3)))
    with pytest.raises(AttributeError, match="no attribute 'opne'"):
        _ = getattr(pd_core, "opne")  # noqa: B009 - mypy sees that there is none


def test_an_index_and_images_on_s3(built, inputs, s3_environment, opened):
    bucket = s3_environment.make_bucket()
    for file in built.rglob("*"):
        if file.is_file():
            s3_environment.put(bucket, f"out/{file.relative_to(built)}", file.read_bytes())
    s3_environment.put(bucket, "a.png", (inputs[0] / KEYS[0]).read_bytes())
    with pytest.raises(pd_core.UserError, match="add checkpoint ="):  # the record leads to this machine
        pd_core.open(f"s3://{bucket}/out")
    index = pd_core.open(f"s3://{bucket}/out", checkpoint=str(inputs[1]))
    scored = index.score([f"s3://{bucket}/a.png", f"s3://{bucket}/gone.png"])
    expected = opened.score([inputs[0] / KEYS[0]])
    assert scored.slice(0, 1).drop_columns("key").equals(expected.drop_columns("key"))
    assert scored["reason"].to_pylist() == [None, "unreadable"]


# ---- a guest in its process ------------------------------------------------------------------------------------------


def python(program: str, *argv: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program, *argv], capture_output=True, text=True, cwd=tiny.ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def imported_anyway() -> set[str]:
    """Modules that Python itself imports here, such as those of editable installs."""
    return set(python("import sys; print(*{name.partition('.')[0] for name in sys.modules})").split())


def test_importing_costs_nothing_and_sets_nothing():
    program = (
        "import os, sys; before = dict(os.environ)\n"
        "import pd_core\n"
        "assert dict(os.environ) == before\n"
        "names = set(sys.modules)\n"
        "print(*{name.partition('.')[0] for name in names}, *(name for name in names if name.startswith('pd_core.')))\n"
        "assert set(pd_core.__all__) <= set(dir(pd_core))"
    )
    found = set(python(program).split())
    assert found <= {*sys.stdlib_module_names, *imported_anyway(), "pd_core"}, found


def test_the_library_leaves_ray_out_and_torch_as_it_was(output, folder):
    program = (
        "import sys, torch, faiss, pd_core\n"
        "torch.set_num_threads(2); torch.set_float32_matmul_precision('medium'); faiss.omp_set_num_threads(2)\n"
        "index = pd_core.open(sys.argv[1])\n"
        "index.score([sys.argv[2]]); index.score([sys.argv[2]], by='predictor'); index.neighbors([sys.argv[2]])\n"
        "pd_core.pseudo_density(torch.eye(30)); pd_core.frechet_distance(torch.eye(9) + 1, torch.eye(9))\n"
        "assert 'ray' not in sys.modules\n"
        "assert (torch.get_num_threads(), torch.get_float32_matmul_precision()) == (2, 'medium')\n"
        "assert faiss.omp_get_max_threads() == 2\n"
        "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'\n"  # the new way, after which torch refuses the old
        "index.features([sys.argv[2]]); pd_core.pseudo_density(torch.eye(30))\n"
        "assert torch.backends.mkldnn.matmul.fp32_precision == 'bf16'\n"
        "print('done')"
    )
    assert python(program, str(output), str(folder / KEYS[0])).endswith("done\n")


@pytest.mark.slow
def test_the_notebook_runs(built, folder, monkeypatch):
    """On the tiny index, as it would on anybody's."""
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("PD_CORE_INDEX", str(built))
    monkeypatch.setenv("PD_CORE_PICTURES", str(folder))
    notebook = nbformat.read(tiny.ROOT / "examples" / "score_own_pictures.ipynb", as_version=4)
    assert any(cell.get("outputs") for cell in notebook.cells), "it is kept as it was run"
    NotebookClient(notebook, timeout=200, resources={"metadata": {"path": str(tiny.ROOT)}}).execute()
