"""A command whose output is finished is answered without Ray, and never where the whole run would do anything."""

import contextlib
import dataclasses
import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pd_core.core import artifacts, files, schemas
from pd_core.core.errors import UserError
from pd_core.core.settings import load
from pd_core.core.settings.generate import GenerateSettings
from pd_core.core.settings.index import ResolvedBuildIndex
from pd_core.engine import finished, runs, session
from pd_core.engine.resources import Cluster
from tests import tiny
from workflows import build_index

STAGES = ("listing", "features", "best")  # of which the last has no tables


class Whole(Exception):
    """The whole run begins."""


@pytest.fixture(autouse=True)
def without_ray(monkeypatch):
    """No run joins the Ray of other tests, of which facts could not be known."""
    monkeypatch.setattr(session, "is_joined", lambda: False)


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """Inputs of build_index: three images and a checkpoint."""
    (tmp_path / "images" / "a").mkdir(parents=True)
    for name in ("1.png", "2.png", "a/3.png"):
        (tmp_path / "images" / name).write_bytes(b"image " + name.encode())
    (tmp_path / "weights.safetensors").write_bytes(b"weights")
    monkeypatch.setattr(session, "session", lambda *_: contextlib.nullcontext(Cluster(2.0, 0.0, True, "")))
    return tmp_path


def settings_of(place: Path, **more: Any) -> ResolvedBuildIndex:
    given: dict[str, Any] = {
        "output": str(place / "out"),
        "data": {"source": str(place / "images")},
        "features": {"checkpoint": str(place / "weights.safetensors")},
        "tracking": {"enabled": False},
    }
    return load.made(ResolvedBuildIndex, **given | more)


def made(stage: artifacts.Stage) -> tuple[list[artifacts.Part], dict[str, Any]]:
    return [stage.write_part("part-0.parquet", b"rows", 1)], {}


def run(settings: ResolvedBuildIndex, refusal: UserError | None = None) -> None:
    """A run of two stages, of which one is made together with a third."""

    def body(run: runs.Run) -> None:
        beside = artifacts.Stage(f"{run.output}/quarantine", "quarantine", schemas.VERSIONS["quarantine"], {})
        for name in STAGES:
            stage = artifacts.Stage(f"{run.output}/{name}", name, schemas.VERSIONS.get(name, 1), {})
            if name == "features":
                beside.complete(lambda: ([beside.write_part("part-0.parquet", b"bad", 0)], {}), False)
                stage = dataclasses.replace(stage, beside=(beside.uri,))
            run.stage(stage, functools.partial(made, stage))
        run.say("said on the way")
        run.finish((), {"report": f"{run.output}/report"}, lambda: ["of its numbers"], refusal)

    runs.execute(settings, "build_index", STAGES, body)


def is_whole(settings: ResolvedBuildIndex, monkeypatch) -> bool:
    """Whether the same command goes its whole way."""

    def begins(*_: Any, **__: Any) -> None:
        raise Whole

    with monkeypatch.context() as patch:
        patch.setattr(runs, "started", begins)
        try:
            run(settings)
        except Whole:
            return True
    return False


def test_the_same_command_again_says_the_same_and_starts_nothing(place, monkeypatch, capsys):
    run(settings_of(place))
    first = capsys.readouterr().out.splitlines()
    record = (place / "out" / "run.json").read_bytes()
    assert not is_whole(settings_of(place), monkeypatch)
    again = capsys.readouterr().out.splitlines()
    (news,) = [line for line in again if line not in first]
    assert re.fullmatch(rf"done in \d+ s, every stage was finished already: {place}/out", news)
    assert {"said on the way", "of its numbers", f"report: {place}/out/report"} <= set(again) & set(first)
    assert (place / "out" / "run.json").read_bytes() == record
    for how in ({"dry_run": False}, {"config": "x.yaml"}):
        assert not is_whole(settings_of(place, **how), monkeypatch)


def rewritten(path: Path) -> None:
    """Other bytes, of the same number and with the same time of writing."""
    before = path.stat()
    path.write_bytes(bytes(len(path.read_bytes())))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


CHANGES = {
    "an image in a folder has other bytes": lambda p: rewritten(p / "images" / "a" / "3.png"),
    "an image is new": lambda p: (p / "images" / "4.png").write_bytes(b"new"),
    "an image is gone": lambda p: (p / "images" / "1.png").unlink(),
    "an image has another name": lambda p: (p / "images" / "1.png").rename(p / "images" / "0.png"),
    "all images are gone": lambda p: shutil.rmtree(p / "images"),
    "weights": lambda p: rewritten(p / "weights.safetensors"),
    "a part is gone": lambda p: (p / "out" / "features" / "part-0.parquet").unlink(),
    "a part is shorter": lambda p: (p / "out" / "listing" / "part-0.parquet").write_bytes(b""),
    "a part beside is gone": lambda p: (p / "out" / "quarantine" / "part-0.parquet").unlink(),
    "a stage is not committed": lambda p: (p / "out" / "listing" / "artifact.json").unlink(),
    "a stage beside is not committed": lambda p: (p / "out" / "quarantine" / "artifact.json").unlink(),
    "no record of the run": lambda p: (p / "out" / "run.json").unlink(),
    "half a record of the run": lambda p: (p / "out" / "run.json").write_bytes(b'{"finished": '),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_changed_on_disk_is_found(place, monkeypatch, change):
    run(settings_of(place))
    change(place)
    assert is_whole(settings_of(place), monkeypatch)


@pytest.mark.parametrize(
    "more",
    [
        {"density": {"k": 21}},
        {"report": {"images": 31}},
        {"data": {"source": "images", "labels": "parent"}},
        {"overwrite": True},
        {"tracking": {"enabled": True}},
        {"features": {"model": "resnet18"}},  # weights of a hub, which may be others today
    ],
    ids=str,
)
def test_other_settings_are_found(place, monkeypatch, more):
    monkeypatch.chdir(place)
    run(settings_of(place))
    assert is_whole(settings_of(place, **more), monkeypatch)


def test_a_relative_source_means_another_folder_elsewhere(place, monkeypatch):
    shutil.copytree(place / "images", place / "elsewhere" / "images")
    settings = settings_of(place, data={"source": "images"})
    monkeypatch.chdir(place)
    run(settings)
    assert not is_whole(settings, monkeypatch)
    monkeypatch.chdir(place / "elsewhere")
    assert is_whole(settings, monkeypatch)


@pytest.mark.parametrize("changed", ["code", "packages", "devices", "schema", "joined", "many"])
def test_another_program_or_machine_goes_the_whole_way(place, monkeypatch, changed):
    run(settings_of(place))
    if changed == "schema":
        monkeypatch.setitem(schemas.VERSIONS, "features", 1 + schemas.VERSIONS["features"])
    elif changed == "devices":
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    elif changed == "joined":
        monkeypatch.setattr(session, "is_joined", lambda: True)
    elif changed == "many":
        monkeypatch.setattr(finished, "MANY", 2)
    else:
        monkeypatch.setattr(finished, f"_{changed}", lambda: "another")
    assert is_whole(settings_of(place), monkeypatch)


def test_the_hashes_of_code_and_packages_follow_what_is_there(tmp_path, monkeypatch):
    before = finished._packages()
    (tmp_path / "torch-99.dist-info").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert finished._packages() != before
    (tmp_path / "pd_core" / "engine").mkdir(parents=True)
    (tmp_path / "pd_core" / "a.py").write_text("a")
    monkeypatch.setattr(finished, "__file__", str(tmp_path / "pd_core" / "engine" / "finished.py"))
    first = finished._code.__wrapped__()
    (tmp_path / "pd_core" / "a.py").write_text("b")
    assert finished._code.__wrapped__() != first


def test_a_run_that_ends_in_an_error_ends_in_it_again(place, monkeypatch):
    with pytest.raises(UserError, match="out of reach"):
        run(settings_of(place), UserError("--target: out of reach"))
    assert (place / "out" / "run.json").exists() and is_whole(settings_of(place), monkeypatch)


def test_an_input_that_changes_while_it_runs_is_seen_by_the_next(place, monkeypatch):
    made = runs.Run.finish

    def finish(self, *given):
        rewritten(place / "images" / "1.png")
        made(self, *given)

    monkeypatch.setattr(runs.Run, "finish", finish)
    run(settings_of(place))
    assert is_whole(settings_of(place), monkeypatch)


def test_files_of_a_pattern_and_links_are_followed(place):
    (place / "beyond").mkdir()
    (place / "beyond" / "5.png").write_bytes(b"five")
    (place / "images" / "linked").symlink_to(place / "beyond")
    (place / "images" / "gone").symlink_to(place / "nowhere")
    for source in (f"{place}/images", f"{place}/images/*.png", f"{place}/images/{{1,2}}.png"):
        settings = settings_of(place, data={"source": source})
        before = finished.facts(settings, f"{place}/out")
        assert before is not None and before == finished.facts(settings, f"{place}/out")
        rewritten(place / "beyond" / "5.png")
        assert before != finished.facts(settings, f"{place}/out")


@pytest.mark.parametrize(
    ("kind", "path"), [("python", "toy.py:make"), ("diffusers", "org/model"), ("stylegan", "g.pkl")]
)
def test_a_generator_of_code_or_of_a_hub_is_looked_at_each_time(place, monkeypatch, kind, path):
    (place / "g.pkl").write_bytes(b"pickle")
    monkeypatch.chdir(place)
    settings = load.made(GenerateSettings, index=str(place / "images"), generator={"kind": kind, "path": path}, n=1)
    assert finished.facts(settings, f"{place}/out") is None


def test_every_setting_that_may_name_a_file_is_an_input():
    """A new setting of text belongs to INPUTS, or here, if it names no file."""
    no_files = {
        "name", "kind", "model", "labels", "label_names", "image_column", "key_column", "metadata_columns", "scheduler",
        "threshold", "thresholds", "target", "recipes", "gates", "uri", "experiment", "verify", "output", "config",
    }  # fmt: skip
    named = {name for settings in load.WORKFLOWS for name in load.setting_names(settings) if takes_text(settings, name)}
    assert {name for name in named if name.rpartition(".")[2] not in no_files} == set(finished.INPUTS)


def takes_text(settings: Any, name: str) -> bool:
    """Whether a setting is any text, or a list of texts."""
    *sections, last = name.split(".")
    for section in sections:
        settings = settings.model_fields[section].annotation
    return settings.model_fields.get(last) is not None and settings.model_fields[last].annotation in (
        str, str | None, list[str], list[str] | None,
    )  # fmt: skip


def test_links_of_links_are_looked_at_once(tmp_path):
    """2^30 ways lead to the last folder."""
    for level in range(30):
        (tmp_path / f"images/d{level}").mkdir(parents=True)
        for name in "ab":
            (tmp_path / f"images/d{level}/{name}").symlink_to(f"../d{level + 1}")
    (tmp_path / "images/1.png").write_bytes(b"image")
    assert finished.state(str(tmp_path / "images"), "") is not None


def test_more_folders_than_are_looked_at_are_too_many(tmp_path, monkeypatch):
    monkeypatch.setattr(finished, "MANY", 10)
    for number in range(11):
        (tmp_path / f"{number}").mkdir()
    assert finished.state(str(tmp_path), "") is None


def test_objects_beside_one_of_the_name_of_their_folder_are_seen(s3_environment):
    fs, bucket = files.filesystem("s3://x")[0], "finished-states"
    fs.mkdir(bucket)
    for key in ("images", "images/1.png"):
        fs.pipe(f"{bucket}/{key}", b"image")
    before = finished.state(f"s3://{bucket}/images", "")
    fs.pipe(f"{bucket}/images/2.png", b"another")
    assert before is not None and finished.state(f"s3://{bucket}/images", "") not in (None, before)
    one = finished.state(f"s3://{bucket}/images/1.png", "")
    assert one is not None and finished.state(f"s3://{bucket}/nothing", "") is None


@pytest.mark.parametrize("model", ["hf_hub:org/name", "local-dir:/x"])
def test_a_model_that_is_described_elsewhere_is_not_known(place, model):
    checkpoint = str(place / "weights.safetensors")
    known = settings_of(place, features={"model": "resnet18", "checkpoint": checkpoint})
    elsewhere = settings_of(place, features={"model": model, "checkpoint": checkpoint})
    assert finished.facts(known, known.output) is not None
    assert finished.facts(elsewhere, elsewhere.output) is None


def test_build_index_answers_by_its_records_in_a_process_without_ray(inputs, ray_cluster, tmp_path, capsys):
    argv = tiny.arguments(*inputs, tmp_path / "out", "--no-tracking.enabled")
    build_index.main(argv)
    first = capsys.readouterr().out.splitlines()
    program = (
        "import sys; from workflows import build_index; build_index.main(sys.argv[1:]); "
        "print(sorted({'ray', 'torch', 'mlflow', 'timm'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *argv], cwd=tiny.ROOT, capture_output=True, text=True, check=True
    )
    *said, imported = done.stdout.splitlines()
    assert imported == "[]"
    (news,) = [line for line in said if line not in first]
    assert re.fullmatch(rf"done in \d+ s, every stage was finished already: {tmp_path}/out", news)
    assert f"report: {tmp_path}/out/report/index.html" in said and any(line.startswith("quarantine: ") for line in said)
