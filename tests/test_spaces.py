"""Sets of images as they are opened, before Ray starts."""

import contextlib
import dataclasses
import io
import tarfile
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from pd_core import cluster, listing, schemas, sources, spaces, storage
from pd_core.config import DataSettings, ExtractionSettings
from pd_core.errors import UserError
from pd_core.features import ExtractorSpec
from pd_core.images import Preprocess
from pd_core.spaces import Space
from tests import tiny


def opened(path, space=None):
    return spaces.open_set("set", str(path), DataSettings(), space)


def write_tar(path, files):
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


# ---- what the user names ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "name"),
    [("{000..001}.tar", "000..001"), ("{000,001}.tar", "000,001"), ("*.tar", "all"), ("00[01].tar", "00[01]")],
)
def test_patterns_are_those_of_sources(tmp_path, pattern, name):
    for number in range(3):
        write_tar(tmp_path / f"{number:03d}.tar", {"a.png": tiny.png(number)})
    [source] = [opened(tmp_path / pattern).source]
    containers = {c for table in sources.list_images(source) for c in table["container"].to_pylist()}
    assert containers >= {"000.tar", "001.tar"} and ("002.tar" in containers) == (pattern == "*.tar")
    assert spaces.names_of([str(tmp_path / pattern)]) == [name]


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
    source = opened(tmp_path / "set").source
    (tmp_path / "set" / "a.png").unlink()
    monkeypatch.setattr(listing, "start", listing._list)  # in this process
    monkeypatch.setattr(cluster, "get", lambda made: made)
    tracker = SimpleNamespace(stage=lambda name: contextlib.nullcontext())
    run: Any = SimpleNamespace(tracker=tracker, name_of=str, settings=SimpleNamespace(overwrite=False))
    extraction = spaces.Extraction(ExtractionSettings(), DataSettings())
    with pytest.raises(UserError, match="set: no images there; check --samples"):
        spaces.list_set(run, str(tmp_path / "out"), source, extraction)


# ---- judged where it was selected ------------------------------------------------------------------------------------

PREPROCESS = Preprocess(8, 8, "bicubic", 1.0, "squash", (0.5,) * 3, (0.5,) * 3)
SPEC = ExtractorSpec("tiny", "/a/tiny.safetensors", "0" * 64, 4, PREPROCESS, "fp32", "timm 1")
OTHER = dataclasses.replace(SPEC, weights_sha256="1" * 64)


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
    stage, begun = ("perturbed", "perturbed") if kind == "perturbed" else ("samples", "pilot")
    made = {"direction": "up"} if kind == "perturbed" else {"weighting": {"kind": kind}}
    totals = {"settings": made} | ({} if recorded is None else {"extractor": recorded.identity()})
    identity = {"realset": {"features": "its own"}, "move": {"directions": ["up"]}}
    storage.Stage(str(tmp_path / begun), begun, 1, identity).begin(False)
    samples = storage.Stage(str(tmp_path / stage), stage, 1, identity)
    samples.begin(False)
    schema = schemas.perturbed() if kind == "perturbed" else schemas.samples()
    row = [pa.nulls(1, field.type) for field in schema]
    part = samples.write_table(
        storage.part_name(0), pa.table(row, schema=pa.schema([f.with_nullable(True) for f in schema]))
    )
    samples.commit([part], totals, {})
    chosen = opened(tmp_path)
    assert chosen.selected_in(Space("judge", judged_by), real_set(SPEC, features)) == selected
