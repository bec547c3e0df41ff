"""Weighted data of fine-tuning: the draws against closed forms and brute force, the stage and the stream on a tiny
index.
"""

import dataclasses
import io
import math
import shutil
import tarfile
import time
from collections import Counter
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import scipy.stats
from PIL import Image

from pd_core.core import artifacts, seeds
from pd_core.core import files as core_files
from pd_core.core.errors import RunError, UserError
from pd_core.core.settings.data import DataSettings
from pd_core.core.settings.finetune import ResolvedFinetune
from pd_core.core.settings.generate import WeightingSettings
from pd_core.density import formula, realset
from pd_core.density import weighting as density_weighting
from pd_core.engine import runs, tasks, tracking
from pd_core.finetune import draws, stream, weights
from pd_core.finetune.draws import Draws
from pd_core.finetune.protocol import Share
from pd_core.images import listing, sources
from tests import tiny

SIZE = (12, 16)


# ---- draws -----------------------------------------------------------------------------------------------------------


def cut(values, rows):
    """Weights of each part, for parts of so many rows."""
    return [np.asarray(part, dtype=np.float64) for part in np.split(np.asarray(values), np.cumsum(rows)[:-1])]


def draws_of(parts, seed=0):
    return Draws([float(np.cumsum(part)[-1]) if len(part) else 0.0 for part in parts], [len(p) for p in parts], seed)


def located(found, parts, positions):
    """Number of the image, counted over all parts, of each draw."""
    firsts = np.cumsum([0] + [len(part) for part in parts])
    images = []
    for window, inside in found.windows(positions):
        part, row = window.locate(inside, lambda number: parts[number])
        images.append(firsts[part] + row)
    return np.concatenate(images)


def weight_sets():
    rng = np.random.default_rng(0)
    return {
        "two levels": np.where(rng.random(200) < 0.2, 33.0, 1.0),
        "two levels that no float holds": np.where(rng.random(200) < 0.2, 0.1, 0.3),
        "any": rng.lognormal(0, 2, 200),
        "zeros and ties": rng.choice([0.0, 0.0, 1 / 3, 2 / 3], 200),
        "one dominates": np.append(np.full(199, 1e-3), 1e6),
        "tiny and huge": 10.0 ** rng.uniform(-300, 300, 200),
        "all but vanish": np.append(1e300, np.full(199, 1e-300)),
        "only the first": np.append(1.0, np.zeros(199)),
        "equal": np.full(200, 0.1),
    }


@pytest.fixture
def small_windows(monkeypatch):
    monkeypatch.setattr(draws, "WINDOW_ROWS", 40)


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("name", weight_sets())
@pytest.mark.parametrize("rows", [[200], [1] * 200, [0, 70, 0, 1, 9, 64, 56, 0]])
def test_draws_are_those_of_systematic_resampling_computed_flat_and_exactly(name, rows):
    """Brute force in rational numbers: the points (j + u) W / E on the line of all weights in the epoch's order of
    parts.
    """
    parts, seed = cut(weight_sets()[name], rows), 3
    found, size = draws_of(parts, seed), 200
    flat = np.concatenate(parts)
    total = sum(map(Fraction, flat.tolist()))
    for epoch in range(3):
        counts = np.bincount(located(found, parts, np.arange(epoch * size, (epoch + 1) * size)), minlength=size)
        assert counts.sum() == size
        assert not counts[flat == 0].any()
        # within the rounding of sums of 200 float64 terms, counts are the expected number rounded down or up
        expected = [size * Fraction(w) / total for w in flat.tolist()]
        slack = Fraction(200 * size, 2**52)
        assert all(
            math.floor(e - slack) <= c <= math.ceil(e + slack) for e, c in zip(expected, counts.tolist(), strict=True)
        )

        offset = Fraction(float(seeds.uniform(np.array([epoch]), seeds.stream(seed, "finetune/offset"))[0]))
        firsts = np.cumsum([0] + [len(p) for p in parts])
        order = draws.permutation(len(parts), seeds.stream(seed, f"finetune/parts/{epoch}"))
        line = [i for part in order for i in range(firsts[part], firsts[part + 1])]
        brute, end, j = np.zeros(size, int), Fraction(0), 0
        near = False
        for i in line:
            end += Fraction(flat[i].item())
            while j < size and (j + offset) * total / size < end:
                brute[i] += 1
                j += 1
            border = end * size / total - offset
            near |= bool(flat[i]) and abs(border - round(border)) < slack
        if not near:  # no point lies so near to a border that rounding may put it on the other side
            np.testing.assert_array_equal(counts, brute)


@pytest.mark.parametrize("size", [1, 200, 10**9])
@pytest.mark.parametrize("offset", [0.0, 2.0**-53, 0.5, 1 - 2.0**-53])
def test_every_draw_is_below_the_whole_weight_whatever_rounding_makes_of_the_offset(size, offset):
    below = draws._below(np.array([0.0, 0.1, 0.1, 0.3]), 0.3, size, offset)
    assert below[0] == 0 and below[-1] == size
    assert below[1] == below[2] and abs(below[1] - (size / 3 - offset)) <= 1


@pytest.mark.usefixtures("small_windows")
def test_a_run_taken_up_at_any_position_goes_on_with_the_same_draws():
    parts = cut(weight_sets()["any"], [30] * 6 + [20])
    whole = located(draws_of(parts), parts, np.arange(700))
    for first in (0, 1, 39, 199, 200, 201, 555):
        np.testing.assert_array_equal(located(draws_of(parts), parts, np.arange(first, 700)), whole[first:])
    for position in range(0, 700, 7):
        assert located(draws_of(parts), parts, np.array([position])) == whole[position]
    assert not np.array_equal(whole[:200], located(draws_of(parts, seed=1), parts, np.arange(200)))


@pytest.mark.usefixtures("small_windows")
def test_windows_cover_the_run_without_gap_and_hold_few_images():
    parts = cut(weight_sets()["two levels"], [7] * 28 + [4])
    found, first, epochs = draws_of(parts), 0, 0
    seen: Counter[int] = Counter()
    while first < 600:
        window = found.window_of(first)
        assert window.first == first and window.draws > 0
        assert window is found.window_of(window.stop - 1)
        assert sum(len(parts[p]) for p in window.parts) < 40 + 7
        assert sorted(window.order.tolist()) == list(range(window.draws))
        seen.update(window.parts)
        first = window.stop
        if first % 200 == 0:
            epochs += 1
            assert set(seen.values()) == {epochs}, "each part once an epoch"
    assert epochs == 3


def test_draws_of_a_window_are_shuffled():
    parts = cut(np.ones(1000), [1000])
    order = located(draws_of(parts), parts, np.arange(1000))
    assert sorted(order) == list(range(1000))
    assert abs(scipy.stats.spearmanr(order, np.arange(1000)).statistic) < 0.15  # 4.7 standard deviations
    assert not np.array_equal(order, located(draws_of(parts), parts, np.arange(1000, 2000)))


def test_half_of_the_draws_are_mirrored_whatever_is_asked_with_them():
    found = Draws([1.0], [10], 5)
    mirrored = found.mirrored(np.arange(10_000))
    assert abs(mirrored.mean() - 0.5) < 4 * 0.5 / 100
    np.testing.assert_array_equal(found.mirrored(np.arange(70, 90)), mirrored[70:90])


def test_weights_that_are_not_those_of_the_sums_are_noticed():
    parts = cut(np.arange(1.0, 41.0), [20, 20])
    found = draws_of(parts)
    with pytest.raises(AssertionError, match="not the weights"):
        located(found, [part[::-1][:10] for part in parts], np.arange(40))


# ---- the stage -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def real(built):
    return realset.open_realset(str(built))


def weigh(real, output, now, *, mapping=None, size=(16, 16), resize="crop", **settings):
    """The stage, as the workflow runs it."""
    values: dict[str, Any] = {"weighting": WeightingSettings(weight=33.0), "training": {"resize": resize}} | settings
    made = ResolvedFinetune(index=real.uri, output=str(output), tracking={"enabled": False}, **values)
    with tracking.start(made.tracking, str(output), "finetune", {}) as tracker:
        run = runs.Run(made, str(output), now, tracker, "finetune", ("listing", "weights"))
        work = weights.work_of(run, made, real, mapping or {}, size)
        return work, run.stage(work.stage, lambda: weights.run(work))


def table_of(work, artifact):
    return pa.concat_tables(
        [core_files.read_table(core_files.join(work.stage.uri, part.name)) for part in artifact.parts]
    )


def densities_of(built):
    columns = ["sample_id", "key", "label", "density"]
    return pa.concat_tables(
        [pq.read_table(path, columns=columns) for path in sorted(built.glob("densities/*.parquet"))]
    )


def folder_of(path, files):
    for key, content in files.items():
        (path / key).parent.mkdir(parents=True, exist_ok=True)
        (path / key).write_bytes(content)
    return str(path)


def test_weights_are_those_of_every_density(built, real, ray_cluster, tmp_path):
    work, artifact = weigh(real, tmp_path / "out", ray_cluster)
    found, known = table_of(work, artifact), densities_of(built)
    assert found.select(known.column_names).equals(known)
    tau = np.interp(800, np.arange(1001), real.density_quantiles)
    weight = np.where(known["density"].to_numpy() > tau, 33.0, 1.0)
    np.testing.assert_array_equal(found["weight"].to_numpy(), weight)
    listed = [pq.read_table(path) for path in sorted(built.glob("listing/*.parquet"))]
    assert [part.name for part in artifact.parts] == [artifacts.part_name(i) for i in range(len(listed))]
    for part, rows in zip(artifact.parts, listed, strict=True):
        here = core_files.read_table(core_files.join(work.stage.uri, part.name))
        assert rows.take(here["row"])["key"].equals(here["key"])
    totals = artifact.totals
    assert [totals[name] for name in ("listed", "rows", "without_density", "zero", "absent")] == [153, 150, 3, 0, 0]
    assert totals["weight"] == weight.sum() == sum(totals["part_weights"])
    assert totals["effective_sample_size"] == pytest.approx(density_weighting.effective_size(weight), rel=1e-12)
    assert totals["share_above"] == pytest.approx(weight[weight > 1].sum() / weight.sum(), rel=1e-12)
    opened = weights.opened(work, artifact, seed=0)
    cuts = np.cumsum([part.rows for part in artifact.parts])[:-1]
    assert opened.part_weights == tuple(np.cumsum(part)[-1] for part in np.split(weight, cuts))
    assert weights.summary(work, artifact)[0].startswith("weights: 150 images, worth ")


def test_weights_of_a_run_that_broke_off_are_completed_and_the_same(real, ray_cluster, tmp_path):
    weighting = WeightingSettings(kind="quantiles", weights=[0, 1, 0.3])
    work, artifact = weigh(real, tmp_path / "whole", ray_cluster, weighting=weighting)
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    folder = tmp_path / "part" / "weights"
    (folder / core_files.ARTIFACT).unlink()
    (folder / artifacts.part_name(1)).unlink()
    kept = (folder / artifacts.part_name(2)).stat().st_mtime_ns
    _, again = weigh(real, tmp_path / "part", ray_cluster, weighting=weighting)
    assert again.parts == artifact.parts and again.totals == artifact.totals
    assert (folder / artifacts.part_name(2)).stat().st_mtime_ns == kept
    assert again.totals["zero"] == (table_of(work, artifact)["weight"].to_numpy() == 0).sum() == 50
    assert again.totals["share_above"] is None


def test_weights_by_label(built, real, ray_cluster, tmp_path):
    weighting = WeightingSettings(kind="two_level", threshold="p50", weight=0.5, per_label=True)
    work, artifact = weigh(real, tmp_path / "out", ray_cluster, weighting=weighting, mapping={"a": 0, "b": 1, "c": 2})
    known = densities_of(built)
    labels, rho = np.array(known["label"].to_pylist()), known["density"].to_numpy()
    expected = np.empty(len(rho))
    for label in "abc":
        tau = formula.density_quantiles(rho[labels == label])[500]
        expected[labels == label] = np.where(rho[labels == label] > tau, 0.5, 1.0)
    np.testing.assert_array_equal(table_of(work, artifact)["weight"].to_numpy(), expected)
    assert artifact.totals["share_above"] == pytest.approx(25 * 0.5 / (25 * 0.5 + 25))


def test_own_source_meets_the_index_by_key(built, real, inputs, ray_cluster, tmp_path):
    """Another set, in other parts' places: two thirds of the index's images, and three that it does not know."""
    files = {key: content for key, content in tiny.files().items() if not key.startswith(("a/", "broken/"))}
    source = folder_of(tmp_path / "own", files | {f"x/new {i}.png": tiny.png(500 + i) for i in range(3)})
    data = DataSettings(source=source, max_bad_fraction=0.1)
    work, artifact = weigh(real, tmp_path / "out", ray_cluster, data=data)
    known = {row["sample_id"]: row["density"] for row in densities_of(built).to_pylist()}
    rows = table_of(work, artifact).to_pylist()
    assert {row["key"] for row in rows} == set(files)
    assert all(row["density"] == known[row["sample_id"]] for row in rows)
    totals = artifact.totals
    assert (totals["listed"], totals["rows"], totals["without_density"], totals["absent"]) == (103, 100, 3, 50)

    with pytest.raises(
        UserError, match=r"3 of 103 images of --data\.source have no density.*'x/new 0\.png', 'x/new 1\.png'"
    ):
        weigh(real, tmp_path / "strict", ray_cluster, data=data.model_copy(update={"max_bad_fraction": 0.01}))
    strange = folder_of(tmp_path / "strange", {f"{i}.png": tiny.png(i) for i in range(5)})
    with pytest.raises(UserError, match="5 of 5 images"):
        weigh(real, tmp_path / "none", ray_cluster, data=DataSettings(source=strange, max_bad_fraction=1.0))
    same = DataSettings(source=str(inputs[0]), labels="parent")
    assert weigh(real, tmp_path / "same", ray_cluster, data=same)[0].pictures.own


def test_what_does_not_fit_the_model_is_refused_with_numbers(real, ray_cluster, tmp_path):
    with pytest.raises(
        UserError, match=r"150 of 150 images are not of the model's 32x24 px \(first: 'a/image 000\.png'"
    ):
        weigh(real, tmp_path / "size", ray_cluster, size=(24, 32), resize="none")
    _, artifact = weigh(real, tmp_path / "crop", ray_cluster, size=(24, 32))
    assert artifact.totals["enlarged"] == 150
    with pytest.raises(UserError, match=r"50 of 150 images have no label that the model knows \(first: 'c/.* has 'c'"):
        weigh(real, tmp_path / "class", ray_cluster, mapping={"a": 0, "b": 1})
    with pytest.raises(UserError, match="match: weighs what a generator makes"):
        weights.check_settings(WeightingSettings(kind="match"), "labels")
    assert weigh(real, tmp_path / "fits", ray_cluster, size=(16, 16), resize="none")[1].rows == 150


# ---- the stream ------------------------------------------------------------------------------------------------------

FEED = stream.Feed(2, 0.5)


def batches(drawable, first=0, steps=6, batch_size=12, rank=0, world=1, mirror=False, size=SIZE):
    share = Share(rank, world, "cpu", 1)
    return list(stream.batches(drawable, first, steps, batch_size, share, mirror, size, FEED))


def parts_of(drawable):
    return [pq.read_table(f"{drawable.uri}/{artifacts.part_name(i)}") for i in range(len(drawable.rows))]


def drawn_rows(drawable, positions):
    """Rows of weights/ that these draws are of, by the draws themselves."""
    tables = parts_of(drawable)
    found = Draws(drawable.part_weights, drawable.rows, drawable.seed)
    places = located(found, [table["weight"].to_numpy() for table in tables], positions)
    return pa.concat_tables(tables).take(pa.array(places)).to_pylist()


def shown(content, size=SIZE):
    """An image as Pillow alone makes it: the shorter side to the size, centre cut out."""
    height, width = size
    image = Image.open(io.BytesIO(content)).convert("RGB")
    scale = max(height / image.height, width / image.width)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return np.asarray(image.crop((left, top, left + width, top + height)))


def same(one, other):
    assert (one.step, one.first, one.label, one.replaced) == (other.step, other.first, other.label, other.replaced)
    for name in ("sample_id", "density", "pixels"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


@pytest.fixture(scope="session")
def drawable(real, ray_cluster, tmp_path_factory):
    work, artifact = weigh(real, tmp_path_factory.mktemp("weighted") / "out", ray_cluster)
    return weights.opened(work, artifact, seed=4)


@pytest.fixture
def short_runs(monkeypatch):
    """Two steps of one worker to a task."""
    monkeypatch.setattr(stream, "TASK_IMAGES", 24)


@pytest.mark.usefixtures("short_runs")
def test_batches_are_the_images_that_were_drawn(drawable):
    made = batches(drawable, steps=27, mirror=True)  # into the third epoch, and to an unfinished task
    assert [batch.step for batch in made] == list(range(27))
    assert np.concatenate([batch.positions for batch in made]).tolist() == list(range(27 * 12))
    rows = drawn_rows(drawable, np.arange(27 * 12))
    files, mirrored = tiny.files(), Draws([1.0], [1], 4).mirrored(np.arange(27 * 12))
    assert [i for batch in made for i in batch.sample_id] == [row["sample_id"] for row in rows]
    assert [d for batch in made for d in batch.density] == [row["density"] for row in rows]
    assert [label for batch in made for label in batch.label] == [row["label"] for row in rows]
    expected = [shown(files[row["key"]]) for row in rows]
    expected = [image[:, ::-1] if flip else image for image, flip in zip(expected, mirrored, strict=True)]
    np.testing.assert_array_equal(np.concatenate([batch.pixels for batch in made]), expected)
    assert made[0].pixels.flags.writeable and not any(batch.replaced for batch in made)


@pytest.mark.usefixtures("short_runs")
def test_two_workers_share_what_one_has_and_a_run_taken_up_goes_on(drawable):
    alone = batches(drawable, mirror=True)
    shares = [batches(drawable, rank=rank, world=2, mirror=True) for rank in (0, 1)]
    for whole, *halves in zip(alone, *shares, strict=True):
        for name in ("sample_id", "density", "pixels", "positions"):
            joined = np.concatenate([getattr(half, name) for half in halves])
            np.testing.assert_array_equal(joined, getattr(whole, name))
        assert halves[0].label + halves[1].label == whole.label
    for one, other in zip(alone[3:], batches(drawable, first=3, steps=3, mirror=True), strict=True):
        same(one, other)
    with pytest.raises(UserError, match=r"batch_size 10: cannot be shared equally by --workers 4"):
        batches(drawable, batch_size=10, world=4)


def moved(drawable, folder, max_bad_fraction):
    """The same weights, of a copy of the images that may be harmed."""
    source = drawable.pictures.source
    if not folder.exists():
        shutil.copytree(source.root, folder)
    settings = source.settings.model_copy(update={"max_bad_fraction": max_bad_fraction})
    source = dataclasses.replace(source, root=str(folder), settings=settings)
    return dataclasses.replace(drawable, pictures=dataclasses.replace(drawable.pictures, source=source))


def test_an_image_that_cannot_be_read_any_more_is_replaced_and_counted(drawable, tmp_path):
    copy = tmp_path / "copy"
    harmed = moved(drawable, copy, 1.0)
    rows = drawn_rows(drawable, np.arange(150))  # one window: all images, one epoch
    keys = [row["key"] for row in rows]
    lost = {keys[5], keys[6], keys[149]}
    (copy / keys[5]).unlink()
    (copy / keys[6]).write_bytes(b"\x89PNG\r\n\x1a\n broken")
    (copy / keys[149]).write_bytes(b"")
    good = [next(i % 150 for i in range(place, place + 150) if keys[i % 150] not in lost) for place in range(150)]
    replaced = sum(key in lost for key in keys)
    made = batches(harmed, steps=10, batch_size=15)
    assert np.concatenate([batch.sample_id for batch in made]).tolist() == [rows[i]["sample_id"] for i in good]
    assert [batch.replaced for batch in made] == [
        sum(key in lost for key in keys[i : i + 15]) for i in range(0, 150, 15)
    ]
    halves = [batches(harmed, steps=5, batch_size=30, rank=rank, world=2) for rank in (0, 1)]
    for one, other in zip(made, [half[step] for step in range(5) for half in halves], strict=True):
        np.testing.assert_array_equal(one.pixels, other.pixels)
    assert len(batches(moved(drawable, copy, (replaced + 0.5) / 150), steps=10, batch_size=15)) == 10
    refused = rf"{replaced} of the images drawn up to step \d cannot be read.*allows {replaced - 1} of 150"
    with pytest.raises(UserError, match=refused):
        batches(moved(drawable, copy, (replaced - 0.5) / 150), steps=10, batch_size=15)


def test_images_that_are_gone_stop_the_run_in_one_line(drawable, tmp_path):
    harmed = moved(drawable, tmp_path / "copy", 1.0)
    for path in (tmp_path / "copy").rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(
        UserError, match=r"^\S+copy: \d+ images that were drawn one after the other cannot be read any more \(first: '"
    ):
        batches(harmed)
    shutil.rmtree(tmp_path / "copy")
    with pytest.raises(RunError, match="nothing is there any more"):
        batches(harmed)


def test_a_stream_that_is_left_ends_its_tasks(drawable, ray_cluster):
    left = stream.batches(drawable, 0, 100_000, 12, Share(0, 1, "cpu", 1), False, SIZE, FEED)
    assert next(left).step == 0
    left.close()
    deadline = time.monotonic() + 10
    while ray.available_resources().get("CPU") != ray.cluster_resources()["CPU"]:
        assert time.monotonic() < deadline, "its tasks still hold CPUs"
        time.sleep(0.1)


def packed(kind, files, folder):
    """The same images in two Parquet files of small row groups, or in two tars."""
    folder.mkdir()
    items = sorted(files.items())
    for number, half in enumerate((items[:80], items[80:])):
        if kind == "parquet":
            table = pa.table({"image": [content for _, content in half], "name": [key for key, _ in half]})
            pq.write_table(table, folder / f"{number}.parquet", row_group_size=16)
            continue
        with tarfile.open(folder / f"{number}.tar", "w") as tar:
            for key, content in half:
                member = tarfile.TarInfo(key)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return DataSettings(source=str(folder))


def index_of(source, uri, part_rows):
    """As much of an index as the stage reads, of the images of a source: their densities are a hash of their ids."""
    listed, _ = tasks.get(listing.start(source, str(uri), part_rows, overwrite=False))
    for kind in ("features", "densities"):
        stage = artifacts.Stage(f"{uri}/{kind}", kind, 1, {})
        stage.begin(False)
        parts = []
        for number in range(listed.parts):
            found = listed.read(number)["sample_id"]
            rho = pa.array(seeds.uniform(found.to_numpy()) + 0.5)
            sides = pa.array(np.full(len(found), 16, np.int32))
            columns = {"sample_id": found, "density": rho, "width": sides, "height": sides}
            parts.append(stage.write_table(artifacts.part_name(number), pa.table(columns)))
        stage.commit(parts, {}, {})
    quantiles = formula.density_quantiles(np.linspace(0.5, 1.5, 100))
    fingerprints = {"features": "f", "densities": "d"}
    return SimpleNamespace(uri=str(uri), rows=listed.rows, density_quantiles=quantiles, fingerprints=fingerprints)


@pytest.mark.parametrize("kind", ["parquet", "webdataset"])
def test_images_in_parquet_and_in_tars(kind, ray_cluster, tmp_path):
    files = {f"{i:03d}.png": tiny.png(i) for i in range(150)}
    data = packed(kind, files, tmp_path / "packed")
    source = sources.open_source(data)
    assert source.kind == kind
    real = index_of(source, tmp_path / "index", 32)
    work, artifact = weigh(real, tmp_path / "out", ray_cluster, data=data)
    opened = weights.opened(work, artifact, seed=1)
    made = batches(opened, steps=4)
    names = [f"{i:03d}.png" for i in range(150)]
    keys = [
        f"{i // 80}.parquet#{i % 80}" if kind == "parquet" else f"{i // 80}.tar#{name}" for i, name in enumerate(names)
    ]
    by_key = dict(zip(keys, names, strict=True))
    rows = drawn_rows(opened, np.arange(48))
    np.testing.assert_array_equal(
        np.concatenate([batch.pixels for batch in made]), [shown(files[by_key[row["key"]]]) for row in rows]
    )
