"""Sets of images as they are opened, before Ray starts."""

import contextlib
import dataclasses
import io
import tarfile
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from pd_core.core import artifacts, schemas
from pd_core.core.errors import UserError
from pd_core.core.settings.data import DataSettings, ExtractionSettings
from pd_core.engine import tasks
from pd_core.evaluate import report, spaces
from pd_core.evaluate.spaces import Space
from pd_core.images import listing, sources
from pd_core.images.resize import Preprocess
from pd_core.index.extractor import ExtractorSpec
from tests import tiny

PREPROCESS = Preprocess(8, 8, "bicubic", 1.0, "squash", (0.5,) * 3, (0.5,) * 3)
SPEC = ExtractorSpec("tiny", "/a/tiny.safetensors", "0" * 64, 4, PREPROCESS, "fp32", "timm 1")
OTHER = dataclasses.replace(SPEC, weights_sha256="1" * 64)


def opened(*paths):
    return spaces.open_sets([str(path) for path in paths], DataSettings(), Space("index", SPEC))


def write_tar(path, files):
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def commit_samples(output, made, rows, extractor=SPEC):
    """As much of an output of generate.py or perturb.py as is read of it; null what a row does not say."""
    kind, begun = ("perturbed", "perturbed") if "direction" in made else ("samples", "pilot")
    totals = {"settings": made} | ({} if extractor is None else {"extractor": extractor.identity()})
    identity = {"realset": {"features": "its own"}}
    artifacts.Stage(str(output / begun), begun, 1, identity).begin(False)
    stage = artifacts.Stage(str(output / kind), kind, 1, identity)
    stage.begin(False)
    schema = schemas.perturbed() if kind == "perturbed" else schemas.samples()
    table = pa.Table.from_pylist(rows, pa.schema([field.with_nullable(True) for field in schema]))
    half = len(rows) // 2
    tables = {artifacts.part_name(i): part for i, part in enumerate((table[:half], table[half:])) if part.num_rows}
    stage.commit([stage.write_table(*part) for part in tables.items()], totals, {})


def moved_png(sample, which):
    return tiny.png(1000 + 10 * sample + which)


def commit_both_ways(output, n):
    """Samples moved down and up in two parts; before them, down and up: `moved_png` of 0, 1 and 2."""
    cell = lambda *which: {"bytes": moved_png(*which), "path": None}  # noqa: E731
    rows = [
        {"sample_id": i, "direction": way, "image": cell(i, where), "image_before": cell(i, 0)}
        for i in range(n)
        for where, way in ((1, "down"), (2, "up"))
    ]
    commit_samples(output, {"direction": "both", "epsilon": 0.1}, rows)


# ---- what the user names ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "name"),
    [("{000..001}.tar", "000..001"), ("{000,001}.tar", "000,001"), ("*.tar", "all"), ("00[01].tar", "00[01]")],
)
def test_patterns_are_those_of_sources(tmp_path, pattern, name):
    for number in range(3):
        write_tar(tmp_path / f"{number:03d}.tar", {"a.png": tiny.png(number)})
    [chosen] = opened(tmp_path / pattern)
    containers = {c for table in sources.list_images(chosen.source) for c in table["container"].to_pylist()}
    assert containers >= {"000.tar", "001.tar"} and ("002.tar" in containers) == (pattern == "*.tar")
    assert chosen.name == name


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("empty", "no files; check --samples"),
        ("texts", "no images but those left out: .txt (1); check --samples and data.kind"),
        ("absent", "no such file or directory; check --samples"),
        ("absent/{0..1}.png", "is no directory; check --samples"),
        ("none.tar", "no image members in 1 tars; check --samples"),
        ("{000..001}.tar", "2 of the 2 files or patterns that --samples names match nothing"),
    ],
)
def test_messages_name_the_setting_of_evaluate(tmp_path, name, line):
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a")
    write_tar(tmp_path / "none.tar", {"a.txt": b"a"})
    with pytest.raises(UserError) as raised:
        opened(tmp_path / name)
    text = str(raised.value)
    assert line in text and text.startswith("--samples /") and "data.source" not in text, text


def test_images_that_have_gone_since_are_missed_in_the_same_words(tmp_path, monkeypatch):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.png").write_bytes(tiny.png(0))
    [chosen] = opened(tmp_path / "set")
    (tmp_path / "set" / "a.png").unlink()
    monkeypatch.setattr(listing, "start", listing._list)  # in this process
    monkeypatch.setattr(tasks, "get", lambda made: made)
    tracker = SimpleNamespace(stage=lambda name: contextlib.nullcontext())
    run: Any = SimpleNamespace(tracker=tracker, name_of=str, settings=SimpleNamespace(overwrite=False))
    extraction = spaces.Extraction(ExtractionSettings(), DataSettings())
    with pytest.raises(UserError, match="set: no images there; check --samples"):
        spaces.list_set(run, str(tmp_path / "out"), chosen.source, extraction)


def test_samples_that_are_not_finished_are_refused(tmp_path):
    artifacts.Stage(str(tmp_path / "pilot"), "pilot", 1, {}).begin(False)
    with pytest.raises(UserError, match=r"its images are not finished; run generate\.py on it again"):
        opened(tmp_path)


# ---- judged where it was selected ------------------------------------------------------------------------------------


def real_set(extractor, features):
    """As much of a RealSet as the question needs."""
    real: Any = SimpleNamespace(extractor=extractor, fingerprints={"features": features})
    return real


@pytest.mark.parametrize(
    ("kind", "recorded", "features", "judged_by", "selected"),
    [
        ("two_level", SPEC, "its own", SPEC, True),
        ("two_level", SPEC, "held out", SPEC, True),  # or the same images in batches of another size
        ("two_level", SPEC, "held out", dataclasses.replace(SPEC, checkpoint="/b/the same.safetensors"), True),
        ("perturbed", SPEC, "held out", SPEC, True),
        ("two_level", SPEC, "its own", OTHER, False),
        ("two_level", OTHER, "held out", SPEC, False),
        ("none", SPEC, "its own", SPEC, False),
        ("polarity", SPEC, "its own", SPEC, False),
        ("two_level", None, "its own", SPEC, True),  # by an older pd_core
        ("two_level", None, "its own", OTHER, False),
        ("two_level", None, "held out", SPEC, True),
        ("two_level", None, "held out", OTHER, True),
        ("none", None, "held out", SPEC, False),
    ],
)
def test_selection_is_known_by_its_extractor(tmp_path, kind, recorded, features, judged_by, selected):
    """Whichever real images it is measured against: those it was selected by, or any other."""
    made = {"direction": "up"} if kind == "perturbed" else {"weighting": {"kind": kind}}
    commit_samples(tmp_path, made, [{}], recorded)
    [chosen] = opened(tmp_path)
    assert chosen.selected_in(Space("judge", judged_by), real_set(SPEC, features)) == selected


# ---- perturbed both ways ---------------------------------------------------------------------------------------------


def test_images_perturbed_both_ways_are_two_sets_without_their_originals(tmp_path):
    commit_both_ways(tmp_path / "moved", 5)
    found = opened(tmp_path / "moved")
    assert [(chosen.name, report.asked(chosen.made)) for chosen in found] == [
        ("moved-down", "perturbed down, epsilon 0.1"),
        ("moved-up", "perturbed up, epsilon 0.1"),
    ]
    keys = []
    for where, chosen in enumerate(found, start=1):
        rows = pa.concat_tables(sources.list_images(chosen.source))
        assert list(sources.read(chosen.source, rows)) == [moved_png(i, where) for i in range(5)]
        keys += rows["key"].to_pylist()
        assert chosen.chosen_by == "perturbed"
    assert len(set(keys)) == 10
    assert sources.identity(found[0].source) != sources.identity(found[1].source)


def test_a_direction_does_not_take_the_name_of_another_set(tmp_path):
    commit_both_ways(tmp_path / "moved", 2)
    (tmp_path / "moved-up").mkdir()
    (tmp_path / "moved-up" / "a.png").write_bytes(tiny.png(0))
    with pytest.raises(UserError, match="two sets have the name 'moved-up'; rename one"):
        opened(tmp_path / "moved", tmp_path / "moved-up")
