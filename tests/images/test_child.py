"""The decoding process: what it gives is what images.py gives, whatever it dies of, and nothing of it stays behind."""

from __future__ import annotations

import hashlib
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pd_core.core.errors import RunError, UserError
from pd_core.core.settings.data import DataSettings
from pd_core.core.settings.index import FeatureSettings
from pd_core.engine import resources, tasks
from pd_core.images import child as images_child
from pd_core.images import decode, listing, resize, sources, thumbnails
from pd_core.images.decode import BadImage, DecodeLimits, Reason
from pd_core.images.resize import Prepared, Preprocess
from pd_core.index import extractor, features
from tests import tiny
from tests.images.test_decode import DECLARED, EXPENSIVE, WEBP_9999, jpeg_2000, picture, saved

LIMITS = DecodeLimits(max_bytes=2**26, max_pixels=2**22, background=(255, 255, 255), max_cpu_s=60)
SMALL = Preprocess(48, 48, "bicubic", 1.0, "center", (0.5,) * 3, (0.5,) * 3)
FILES = [saved(picture(seed=i), kind) for i in range(22) for kind in ("PNG", "JPEG", "WEBP")]
FILES += [b"", b"GIF89a", b"text"]


@pytest.fixture(autouse=True)
def no_child_stays() -> Iterator[None]:
    images_child.end()
    yield
    images_child.end()
    assert not children()


def children() -> list[psutil.Process]:
    """Decoding processes of this one, running; those of Ray's workers are not among them."""
    return [child for child in psutil.Process().children() if is_decoder(child)]


def is_decoder(process: psutil.Process) -> bool:
    try:
        return "child.serve(" in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def peak_bytes(process: psutil.Process) -> int:
    """High-water mark of resident memory, shared memory included."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def here(data: bytes, limits: DecodeLimits = LIMITS) -> Prepared | BadImage:
    """What images.py makes of it, in this process."""
    try:
        return resize.prepare(data, limits, SMALL)
    except BadImage as bad:
        return bad


def assert_same(found: Prepared | BadImage, expected: Prepared | BadImage) -> None:
    if isinstance(expected, BadImage):
        assert isinstance(found, BadImage)
        assert (found.reason, found.detail) == (expected.reason, expected.detail)
        return
    assert isinstance(found, Prepared)
    assert (found.width, found.height, found.content_hash) == (expected.width, expected.height, expected.content_hash)
    np.testing.assert_array_equal(found.pixels, expected.pixels)
    assert found.pixels.flags.writeable


def slow(megapixels: float) -> bytes:
    """A clean file that Pillow decodes in Python, some 1.4 s of CPU for each megapixel: its largest value is not
    255.
    """
    side = int((megapixels * 1e6) ** 0.5)
    return f"P6 {side} {side} 100\n".encode() + bytes(3 * side * side)


# --------------------------------------------------------------------------------------------------------- the same


@pytest.mark.parametrize("group_images", [1, 7, 64])
def test_pixels_facts_and_reasons_are_those_of_images(group_images, monkeypatch):
    monkeypatch.setattr(images_child, "GROUP_IMAGES", group_images)
    if group_images == 7:  # and files that are larger than a group may be go alone
        monkeypatch.setattr(images_child, "GROUP_BYTES", 2000)
    unread = BadImage(Reason.UNREADABLE, "gone")
    contents: list[bytes | BadImage] = [*FILES[:5], unread, *FILES[5:], unread]
    found = list(images_child.prepared(contents, LIMITS, SMALL))
    assert len(found) == len(contents)
    for content, one in zip(contents, found, strict=True):
        assert_same(one, content if isinstance(content, BadImage) else here(content))
    assert len(children()) == 1  # that one did it all, and waits for more


def test_nothing_to_decode_starts_nothing():
    assert list(images_child.prepared([], LIMITS, SMALL)) == []
    assert not children()


def test_iterators_between_each_other_do_not_wait_for_each_other():
    first, second = images_child.prepared(FILES, LIMITS, SMALL), images_child.thumbnails(FILES, LIMITS)
    for content, one, thumbnail in zip(FILES, first, second, strict=True):
        assert_same(one, here(content))
        assert isinstance(thumbnail, bytes) == isinstance(one, Prepared)
    assert len(children()) == 1


def test_one_that_is_left_early_leaves_no_work_behind(monkeypatch):
    monkeypatch.setattr(images_child, "GROUP_IMAGES", 1)
    begun = images_child.prepared([FILES[0], slow(3), slow(3)], LIMITS, SMALL)
    next(begun)
    (busy,) = children()
    del begun
    assert not is_decoder(busy)
    assert_same(next(images_child.prepared(FILES, LIMITS, SMALL)), here(FILES[0]))


def test_thumbnails():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (640, 640, 3), np.uint8))
    noises = [noise, noise.crop((0, 0, resize.THUMBNAIL_PX, resize.THUMBNAIL_PX))]  # of most bytes
    contents = [FILES[0], b"no picture", saved(picture(400, 300), "JPEG"), *(saved(image, "PNG") for image in noises)]
    small, bad, large, *noisy = images_child.thumbnails(contents, LIMITS)
    assert noisy == [resize.thumbnail(image) for image in noises]
    assert small == resize.thumbnail(picture())
    assert isinstance(bad, BadImage)
    assert large == resize.thumbnail(decode.decode(contents[2], LIMITS))


def test_originals_are_shown_where_they_are_as_they_were(tmp_path):
    contents = {"0.png": FILES[0], "1.png": b"no picture", "2.jpg": saved(picture(400, 300), "JPEG")}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    source = sources.open_source(DataSettings(source=str(tmp_path)))
    (rows,) = sources.list_images(source)
    ids = dict(zip(rows["key"].to_pylist(), rows["sample_id"].to_pylist(), strict=True))
    made = thumbnails.of_originals(source, rows)
    assert made[ids["0.png"]] == resize.thumbnail(picture())
    assert isinstance(bad := made[ids["1.png"]], BadImage) and bad.detail != thumbnails.CHANGED
    assert set(thumbnails.readable(made)) == {ids["0.png"], ids["2.jpg"]}
    hashes = {ids[name]: hashlib.sha256(contents[name]).hexdigest() for name in contents}
    assert thumbnails.readable(thumbnails.of_originals(source, rows, hashes)) == thumbnails.readable(made)
    (tmp_path / "2.jpg").write_bytes(saved(picture(300, 400), "JPEG"))
    changed = thumbnails.of_originals(source, rows, hashes)
    assert isinstance(bad := changed[ids["2.jpg"]], BadImage) and bad.detail == thumbnails.CHANGED
    assert changed[ids["0.png"]] == made[ids["0.png"]]


def test_pictures_of_samples():
    image = {"bytes": saved(picture(), "PNG"), "path": "0.png"}
    assert thumbnails.of_samples([image, image], "samples/part-0") == [resize.thumbnail(picture())] * 2
    for bad in (None, {"bytes": None}, {"bytes": b"\x89PNG\r\n\x1a\n"}, {"bytes": DECLARED["TIFF tile"][0]}):
        with pytest.raises(UserError, match=r"samples/part-0: holds a picture that cannot be shown \("):
            thumbnails.of_samples([image, bad], "samples/part-0")


def test_pixels_of_a_png_of_ours():
    pixels = images_child.pixels(saved(picture(), "PNG"), LIMITS)
    assert pixels is not None
    np.testing.assert_array_equal(pixels, np.asarray(picture()))
    huge = saved(picture(), "PNG").replace((31).to_bytes(4, "big"), (1 << 30).to_bytes(4, "big"), 1)
    others = [saved(picture().convert("L"), "PNG"), saved(picture(), "JPEG"), saved(picture(), "PNG")[:60], huge, b""]
    assert [images_child.pixels(data, LIMITS) for data in others] == [None] * 5


# ------------------------------------------------------------------------------------------------- hostile, and dying


def test_declared_bombs_cost_no_memory():
    """Alone each would take up to 2 GB or 14 s."""
    contents = [data for data, _ in DECLARED.values()]
    for one, (_, expected) in zip(images_child.prepared(contents, EXPENSIVE, SMALL), DECLARED.values(), strict=True):
        assert isinstance(one, BadImage)
        assert str(one).startswith(expected)
    (child,) = children()
    assert peak_bytes(child) < 256 << 20  # 35 MiB of a process with numpy, and the files


@pytest.mark.parametrize("data", [WEBP_9999, pytest.param(jpeg_2000(9999, 9999), marks=pytest.mark.slow)])
def test_a_large_picture_in_a_small_file_stays_within_the_stated_memory(data):
    (one,) = images_child.prepared([data], EXPENSIVE, SMALL)
    assert isinstance(one, Prepared)
    (child,) = children()
    assert 200 << 20 < peak_bytes(child) < EXPENSIVE.memory_bytes


def test_one_that_takes_too_long_is_quarantined_and_the_others_are_not(monkeypatch):
    monkeypatch.setattr(images_child, "WALL_FACTOR", 1000)  # it is the seconds of CPU that end it
    limits = replace(LIMITS, max_cpu_s=1)
    contents = [*FILES[:5], slow(3), *FILES[5:]]
    found = list(images_child.prepared(contents, limits, SMALL))
    bad = found.pop(5)
    assert isinstance(bad, BadImage)
    mebibytes = limits.memory_bytes >> 20
    told = f"decoding it takes more than 1 s of CPU or {mebibytes} MiB of memory, or ends the decoder"
    assert (bad.reason, bad.detail) == (Reason.TOO_EXPENSIVE, told)
    for content, one in zip(FILES, found, strict=True):
        assert_same(one, here(content))


@pytest.mark.parametrize("how", ["killed", "hangs"])
def test_a_child_that_is_killed_or_hangs_is_replaced_and_loses_nothing(how, monkeypatch):
    """In the middle of the second image, which is slow, while others wait in the queue."""
    monkeypatch.setattr(images_child, "GROUP_IMAGES", 5)
    monkeypatch.setattr(images_child, "WALL_FACTOR", 0.07)  # 4.2 s, twice
    contents = [FILES[0], slow(0.6), *FILES[1:20]]

    def wait_and_disturb() -> None:
        while not (found := children()):
            time.sleep(0.01)
        while found[0].cpu_times().user < 0.6:  # of which 0.2 s are imports
            time.sleep(0.01)
        found[0].kill() if how == "killed" else found[0].suspend()

    thread = threading.Thread(target=wait_and_disturb)
    thread.start()
    found = list(images_child.prepared(contents, LIMITS, SMALL))
    thread.join()
    for content, one in zip(contents, found, strict=True):
        assert_same(one, here(content))


def test_memory_that_runs_out_is_tried_once_more_in_a_new_child():
    assert list(images_child.prepared(FILES[:1], LIMITS, SMALL))
    (child,) = children()
    limit = child.memory_info().data + (32 << 20)
    child.rlimit(psutil.RLIMIT_DATA, (limit, limit))
    large = saved(Image.new("RGB", (4000, 4000), (1, 2, 3)), "PNG")  # 64 MB
    contents = [FILES[0], large, FILES[1]]
    limits = replace(LIMITS, max_pixels=16_000_000)
    for content, one in zip(contents, images_child.prepared(contents, limits, SMALL), strict=True):
        assert_same(one, here(content, limits))
    assert children()[0].pid != child.pid


def test_a_child_that_dies_while_nobody_looks_is_replaced():
    assert list(images_child.prepared(FILES[:1], LIMITS, SMALL))
    children()[0].kill()
    for content, one in zip(FILES, images_child.prepared(FILES, LIMITS, SMALL), strict=True):
        assert_same(one, here(content))


def test_a_child_that_cannot_start_is_no_images_fault(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RunError, match=r"ended before it began \(exit code 1\)"):
        list(images_child.prepared(FILES, LIMITS, SMALL))


def test_the_child_has_the_limits_that_are_stated():
    assert list(images_child.prepared(FILES[:1], LIMITS, SMALL))
    (child,) = children()
    least, most = LIMITS.memory_bytes, LIMITS.memory_bytes + (128 << 20)  # beside what it has before any image
    assert least < child.rlimit(psutil.RLIMIT_DATA)[0] < most
    assert LIMITS.max_cpu_s < child.rlimit(psutil.RLIMIT_CPU)[0] <= LIMITS.max_cpu_s + 5  # of CPU so far
    assert child.rlimit(psutil.RLIMIT_CORE) == (0, 0)


def test_room_for_a_huge_picture_is_not_kept(monkeypatch):
    monkeypatch.setattr(images_child, "MOST_KEPT_BYTES", 2 << 20)
    pixels = images_child.pixels(saved(Image.new("RGB", (1000, 1000)), "PNG"), LIMITS)
    assert pixels is not None and pixels.shape == (1000, 1000, 3)
    assert not children()


def test_the_child_knows_little(monkeypatch):
    """No credentials, no files of the worker, first to go where memory ends."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    with open(__file__) as own:
        os.set_inheritable(own.fileno(), True)
        assert list(images_child.prepared(FILES[:1], LIMITS, SMALL))
        (child,) = children()
        assert "AWS_SECRET_ACCESS_KEY" not in child.environ()
        assert [file.path for file in child.open_files() if file.path.endswith(".py")] == []
    assert Path(f"/proc/{child.pid}/oom_score_adj").read_text().strip() == "1000"
    assert child.num_threads() == 1
    loaded = {Path(place.path).name.partition(".")[0] for place in child.memory_maps()}
    assert not {"libarrow", "libtorch", "_raylet"} & loaded


WORKER = """
import sys
from pd_core.images import child, decode, resize
limits = decode.DecodeLimits(2**26, 2**23, (0, 0, 0), 60)
def prepared(data):
    return list(child.prepared([data], limits, resize.Preprocess.paper()))
prepared(b"P6 1 1 255\\n" + bytes(3))
print("idle", flush=True)
if sys.argv[1] == "idle":
    sys.stdin.read()
else:
    prepared(b"P6 2000 2000 100\\n" + bytes(3 * 2000 * 2000))  # some 6 s of CPU
"""


@pytest.mark.parametrize(
    ("doing", "how"), [("idle", signal.SIGTERM), ("busy", signal.SIGKILL), ("busy", signal.SIGINT)]
)
def test_no_child_outlives_its_worker(doing, how):
    worker = subprocess.Popen(
        [sys.executable, "-c", WORKER, doing],
        cwd=tiny.ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert worker.stdout is not None
    assert worker.stdin is not None
    assert worker.stdout.readline() == b"idle\n"
    (child,) = [process for process in psutil.Process(worker.pid).children() if is_decoder(process)]
    if doing == "busy":
        used = child.cpu_times().user
        while child.cpu_times().user < used + 0.1:
            time.sleep(0.01)
    worker.send_signal(how)
    worker.communicate()
    deadline = time.monotonic() + 3  # of some 6 that it would go on
    while is_decoder(child):
        assert time.monotonic() < deadline
        time.sleep(0.02)


# ------------------------------------------------------------------------------------------------------ in the stage


def test_the_limits_of_time_are_no_part_of_an_identity():
    """An output that is finished stays so, whatever the limit is now."""
    assert features.decoding(DataSettings(max_image_cpu_s=1)) == features.decoding(DataSettings())
    assert set(features.decoding(DataSettings())) == {"max_image_bytes", "max_image_pixels", "background", "pillow"}


@pytest.mark.parametrize(
    ("nodes", "claimed"),
    [
        ([{"CPU": 4.0, "memory": 8e9}], 1_000_000_000),  # two of half a CPU on each
        ([{"CPU": 1.0, "memory": 8e9}], 3_600_000_000),  # two on the node
        ([{"CPU": 1.0, "memory": 2e9}], 1_000_000_000),
        ([{"CPU": 4.0, "memory": 64e9}, {"CPU": 8.0, "memory": 8e9}], 500_000_000),  # the leanest
        ([{"CPU": 4.0, "memory": 8e9}, {"memory": 1.0}], 1_000_000_000),  # a head that runs no task
        ([{"CPU": 4.0}], None),
        ([], None),
    ],
)
def test_a_task_claims_no_more_memory_than_any_node_has_for_it(nodes, claimed):
    assert resources.share_of_memory(3_600_000_000, nodes) == claimed


def test_what_is_claimed_here_fits_twice(ray_cluster):
    import ray

    (node,) = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    assert 2 * (resources.decode_memory(1 << 60) or 0) <= node["memory"]


def test_repetitions_take_ever_fewer_batches_together(ray_cluster, inputs, tmp_path, monkeypatch):
    """One image that ends its worker every time is found among those of its task in the end."""
    checkpoint = str(inputs[1])
    data = DataSettings(source=str(inputs[0]))
    settings = FeatureSettings(model=tiny.MODEL, checkpoint=checkpoint, batch_size=1, part_rows=8)
    source = sources.open_source(data)
    listed, _ = tasks.get(listing.start(source, str(tmp_path), 8, overwrite=False))
    stage = features.stage_of(str(tmp_path), listed, extractor.describe(settings), data, settings, "cpu")
    stage.begin(overwrite=False)
    work = features.Work(source, listed, extractor.describe(settings), decode.limits_of(data), 1, stage)
    together: list[int] = []

    def execute(work: features.Work, *_: object) -> None:
        together.append(work.batches_together)
        raise RunError("a worker was killed")

    monkeypatch.setattr(features, "_execute", execute)
    monkeypatch.setattr(tasks, "ROUND_DELAYS_S", (0.0,) * 5)
    with pytest.raises(RunError, match="a worker was killed"):
        features.run(work, ray_cluster, settings, 1.0)
    assert together == [8, 4, 2, 1, 1]


@pytest.mark.slow
def test_a_folder_with_hostile_files_is_indexed_without_them(tmp_path):
    """In a run of its own, after which nothing is left of it."""
    folder, output = tiny.write_images(tmp_path / "images"), tmp_path / "out"
    hostile = {f"{number}.bin": data for number, (data, _) in enumerate(DECLARED.values())} | {"slow.ppm": slow(10)}
    for name, data in hostile.items():
        (folder / "a" / name).write_bytes(data)
    argv = tiny.arguments(folder, tiny.write_checkpoint(tmp_path / "tiny.safetensors"), output, "--no-tracking.enabled")
    run = tiny.start(*argv, "--data.max_image_cpu_s=2")
    seen: set[psutil.Process] = set()
    while run.poll() is None:
        seen |= {child for child in psutil.Process(run.pid).children(recursive=True) if is_decoder(child)}
        time.sleep(0.1)
    said, _ = run.communicate()
    assert run.returncode == 0, said
    quarantine = pq.ParquetDataset(sorted(map(str, (output / "quarantine").glob("*.parquet")))).read()
    reasons = dict(zip(quarantine["key"].to_pylist(), quarantine["reason"].to_pylist(), strict=True))
    expected = {f"a/{name}": str(here(data, EXPENSIVE)).partition(":")[0] for name, data in hostile.items()}
    assert {key: reasons[key] for key in expected} == expected | {"a/slow.ppm": "too_expensive"}
    assert len(reasons) == len(expected) + len(tiny.BAD)
    assert seen
    deadline = time.monotonic() + 10
    while any(itertools.filterfalse(lambda child: not is_decoder(child), seen)):
        assert time.monotonic() < deadline
        time.sleep(0.1)
