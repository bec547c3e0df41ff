"""A schedule that finds nothing new says so without Ray, and never where the whole run would do anything."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from pd_core.core import artifacts, errors, schemas
from pd_core.core.settings import load
from pd_core.core.settings.curate import CurateSettings
from pd_core.curate import workflow
from pd_core.engine import finished, session

VERSION, RELEASE = "20260101T000000Z-aaaaaaaaaaaa", "2026-01-01-bbbbbbbbbbbb"


class Whole(Exception):
    """The whole run begins."""


def write(path: Path, values: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))


def stages(folder: Path, kinds: Iterable[str]) -> None:
    for kind in kinds:
        stage = artifacts.Stage(str(folder), kind, schemas.VERSIONS[kind], {})
        if kind != "release":
            stage = artifacts.Stage(str(folder / kind), kind, schemas.VERSIONS[kind], {})
        stage.begin(False)
        stage.commit([stage.write_part("part-0.parquet", b"rows", 1)], {}, {})


def settings_of(place: Path, **more: Any) -> CurateSettings:
    given: dict[str, Any] = {
        "output": str(place / "out"),
        "data": {"source": str(place / "images")},
        "features": {"checkpoint": str(place / "weights")},
        "generator": {"kind": "torchscript", "path": str(place / "generator.pt"), "latent_shape": (4,)},
        "recipes": [{"name": "typical", "n": 10, "threshold": "p80", "weight": 5}],
        "tracking": {"enabled": False},
    }
    return load.made(CurateSettings, **given | more)


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """Inputs, and an output that released what it made of them: its index, its release, and the pointers to both."""
    (tmp_path / "images").mkdir()
    for name in ("images/1.png", "weights", "generator.pt"):
        (tmp_path / name).write_bytes(b"content")
    version = tmp_path / "out" / "index" / VERSION
    kinds = ("listing", "features", "index", "neighbors", "densities", "estimator", "report")
    stages(version, (*kinds, "quarantine"))
    write(version / "run.json", {"settings": {"base": None}, "stages": dict.fromkeys(kinds, "")})
    write(tmp_path / "out" / "index" / "current.json", {"version": VERSION, "digest": "aaaaaaaaaaaa"})
    stages(tmp_path / "out" / "releases" / RELEASE, ("release",))
    write(tmp_path / "out" / "latest.json", {"release": RELEASE, "uri": f"releases/{RELEASE}", "lock_token": 0})
    monkeypatch.setattr(session, "is_joined", lambda: False)

    def begins(*_: Any, **__: Any) -> None:
        raise Whole

    monkeypatch.setattr(workflow, "started", begins)
    checked = workflow.prepare(settings_of(tmp_path))
    workflow._remember(checked, finished.facts(checked, checked.output))
    return tmp_path


def test_nothing_new_is_said_from_the_records(place, capsys):
    for _ in range(2):
        assert workflow.curate(settings_of(place)) == errors.EXIT_NOTHING_NEW
    said = capsys.readouterr().out.splitlines()
    assert said.count(f"nothing new since {place}/out/releases/{RELEASE}") == 2
    assert f"index: {place}/images is as it was for {place}/out/index/{VERSION}" in said


CHANGES = {
    "an image": lambda p: (p / "images" / "2.png").write_bytes(b"new"),
    "weights": lambda p: (p / "weights").write_bytes(b"others"),
    "the generator": lambda p: (p / "generator.pt").write_bytes(b"another"),
    "a part of the index": lambda p: (p / "out" / "index" / VERSION / "features" / "part-0.parquet").unlink(),
    "what is beside it": lambda p: (p / "out" / "index" / VERSION / "quarantine" / "part-0.parquet").unlink(),
    "a part of the release": lambda p: (p / "out" / "releases" / RELEASE / "part-0.parquet").write_bytes(b""),
    "the record of the index": lambda p: (p / "out" / "index" / VERSION / "run.json").unlink(),
    "the current index": lambda p: (p / "out" / "index" / "current.json").unlink(),
    "the latest release": lambda p: (p / "out" / "latest.json").unlink(),
    "what is held by hand": lambda p: write(p / "out" / "latest.json", {"release": RELEASE, "held": ["x"]}),
    "the record of the schedule": lambda p: (p / "out" / "finished.json").write_bytes(b'{"finished": '),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_changed_on_disk_is_found(place, change):
    change(place)
    with pytest.raises(Whole):
        workflow.curate(settings_of(place))


@pytest.mark.parametrize(
    "more",
    [{"keep": 2}, {"overwrite": True}, {"recipes": [{"name": "typical", "n": 11, "threshold": "p80", "weight": 5}]}],
    ids=str,
)
def test_other_settings_are_found(place, more):
    with pytest.raises(Whole):
        workflow.curate(settings_of(place, **more))
