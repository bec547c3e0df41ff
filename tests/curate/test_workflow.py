"""The scheduled job end to end: releases, nothing new, gates, updates, locks, and what is left after a kill."""

import functools
import json
import shutil
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from pd_core.core import artifacts, errors, files, locks, schemas
from pd_core.core.settings.curate import GateSettings
from pd_core.curate import releases as curate_releases
from pd_core.engine import session
from tests import tiny, toy_generator
from tests.build.test_update import write
from workflows import curate

EARLIER = 110
TYPICAL = {"name": "typical", "n": 40, "threshold": "p60", "weight": 10}
VARIED = {"name": "varied", "n": 40, "threshold": "p40", "weight": 0.2}


def settings_file(source: Path, checkpoint: Path, output: Path | str, **more: object) -> str:
    values = {
        "output": str(output),
        "data": {"source": str(source), "labels": "parent", "max_bad_fraction": 0.1},
        "features": {"model": tiny.MODEL, "checkpoint": str(checkpoint), "batch_size": 8, "part_rows": 32},
        "density": {"k": 5, "block_rows": 64},
        "estimator": {"epochs": 3},
        "generator": {"kind": "python", "path": f"{toy_generator.__file__}:make"},
        "generation": {"chunk": 16, "pilot": 64},
        "recipes": [TYPICAL, VARIED],
        "gates": [{"metric": "n", "min": 40}, {"metric": "likely_copies", "max": 1.0}],
        "tracking": {"enabled": False},
    } | more
    file = source.parent / "curate.yaml"
    file.write_text(yaml.safe_dump(values))
    return str(file)


def run(*args: object, **more: object) -> int:
    return errors.exit_code(lambda: curate.main(["--config", settings_file(*args, **more)]))  # type: ignore[arg-type]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "images", list(tiny.files().items())[:EARLIER])


def releases(output: Path) -> list[str]:
    return files.folders(str(output / "releases"))


def latest(output: Path) -> str:
    return json.loads((output / "latest.json").read_text())["release"]


def test_the_first_release_and_nothing_new(source, inputs, tmp_path, ray_cluster, capsys):
    output, checkpoint = tmp_path / "out", inputs[1]
    planned = functools.partial(run, source, checkpoint, output, recipes=[TYPICAL], dry_run=True)
    assert planned() == 0 and "plan: index: built from 110 images of " in capsys.readouterr().out
    assert not output.exists()
    assert run(source, checkpoint, output, recipes=[TYPICAL]) == errors.EXIT_DONE
    first = latest(output)
    assert releases(output) == [first]
    at = output / "releases" / first
    table = table_of(at / "typical")
    assert table.num_rows == 40 and len(table["image_hash"].unique()) == 40
    record = json.loads((at / "release.json").read_text())
    assert record["last"] is None and record["gates_hold"] and len(record["verdicts"]) == 2
    assert 0 < record["numbers"]["typical"]["index.precision"] <= 1

    capsys.readouterr()
    assert run(source, checkpoint, output, recipes=[TYPICAL]) == errors.EXIT_NOTHING_NEW
    assert f"nothing new since {at}" in capsys.readouterr().out
    assert releases(output) == [first]

    assert planned() == 0 and "plan: index: the source is as it was for " in capsys.readouterr().out
    write(source, list(tiny.files().items())[EARLIER:])
    (source / "a" / "image 000.png").unlink()
    assert planned() == 0
    assert f": 43 new images, 0 changed, 1 gone, {EARLIER - 1} as they were" in capsys.readouterr().out
    assert planned(density={"k": 6}) == 0
    assert "plan: index: built anew: " in (said := capsys.readouterr().out) and "density.k: 5 -> 6" in said
    assert releases(output) == [first] and len(files.folders(str(output / "index"))) == 1

    assert verify(at) == 0
    assert "files are as committed; rows: 40 of typical" in capsys.readouterr().out
    copy = shutil.copytree(at, tmp_path / "copy")
    part = next((copy / "typical").glob("*.parquet"))
    part.write_bytes(part.read_bytes()[:-1] + b"X")
    (copy / "metrics.parquet").unlink()
    (copy / "typical" / "more.parquet").symlink_to(part)
    assert verify(copy) == errors.EXIT_FAILED
    said = capsys.readouterr()
    assert f"typical/{part.name}: sha256 " in said.out and "metrics.parquet: is missing" in said.out
    assert "typical/more.parquet: is not in the record" in said.out
    assert "failed: verify: files not as committed: 3; see above" in said.err
    assert verify(output) == errors.EXIT_BAD_INPUT
    assert "no finished release there; name a folder of releases/" in capsys.readouterr().err


def release_of(folder: Path, **more: Any) -> Path:
    """A release of one set that was never made: its commit record alone, with its identity's fingerprint."""
    identity = {"kind": "release", "schema_version": schemas.VERSIONS["release"], "sets": {}}
    names = ["a/part-00000000.parquet", "README.md", "metrics.parquet", "release.json"]
    parts = [part(name, 3 if "/" in name else 0) for name in names]
    record = {
        "kind": "release",
        "schema_version": identity["schema_version"],
        "fingerprint": artifacts.fingerprint(identity),
        "identity": {"sets": {}},
        "parts": parts,
        "totals": {"rows": {"a": 3}},
        "versions": {},
        "timings_s": {},
    } | more
    folder.mkdir()
    (folder / "artifact.json").write_text(json.dumps(record))
    return folder


def part(name: str, rows: int = 3) -> dict[str, Any]:
    return {"name": name, "rows": rows, "bytes": 1, "sha256": "0" * 64, "counts": {}}


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"parts": [part("b/part-00000000.parquet")]}, "is no name of a part"),
        ({"parts": []}, "names no release.json"),
        ({"totals": {"rows": {"../..": 3}}}, "its totals name no sets"),
        ({"totals": {}}, "its totals name no sets"),
        ({"totals": {"rows": {"a": 4}}}, "its parts hold {'a': 3} rows, its totals {'a': 4}"),
        ({"fingerprint": "0"}, "its fingerprint is not that of its identity"),
    ],
)
def test_a_record_that_contradicts_itself_is_followed_nowhere(tmp_path, capsys, monkeypatch, more, expected):
    monkeypatch.setattr(session, "session", lambda *_: pytest.fail("files are looked at"))
    release = release_of(tmp_path / "release", **more)
    assert verify(release) == errors.EXIT_FAILED
    said = capsys.readouterr()
    assert f"artifact.json: {expected}" in said.out or f" {expected}" in said.out
    assert said.err == f"failed: verify: {release}/artifact.json is not as it was committed; see above\n"


@pytest.mark.parametrize(
    ("name", "kept", "expected"),
    [
        ("a/../../elsewhere.parquet", None, "names the file 'a/../../elsewhere.parquet', which no run of pd_core has"),
        ("/etc/passwd", None, "names the file '/etc/passwd', which no run of pd_core has written"),
        ("a/part-00000000.parquet", 100, "release/artifact.json is no commit record (it is no whole JSON file)"),
    ],
)
def test_a_record_that_leads_out_of_the_release_or_is_cut_short_is_refused(tmp_path, capsys, name, kept, expected):
    record = release_of(tmp_path / "release", parts=[part(name)]) / "artifact.json"
    record.write_text(record.read_text()[:kept])
    assert verify(record.parent) == errors.EXIT_FAILED
    assert expected in capsys.readouterr().err


def verify(release: Path) -> int:
    return errors.exit_code(lambda: curate.main(["--verify", str(release)]))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_new_images_a_source_that_goes_back_gates_and_hands_on_the_pointer(
    source, inputs, tmp_path, ray_cluster, capsys
):
    output, checkpoint = tmp_path / "out", inputs[1]
    assert run(source, checkpoint, output) == errors.EXIT_DONE
    first = latest(output)
    at = output / "releases" / first
    before = {str(f.relative_to(at)): f.read_bytes() for f in at.rglob("*") if f.is_file()}
    capsys.readouterr()
    write(source, list(tiny.files().items())[EARLIER:])
    assert run(source, checkpoint, output) == errors.EXIT_DONE
    assert "update: 43 new images, 0 gone or changed, of 153" in capsys.readouterr().out
    second = latest(output)
    assert second != first and set(releases(output)) == {first, second}
    changes = json.loads((output / "releases" / second / "release.json").read_text())["changes"]
    for name, change in changes.items():
        assert change["images_kept"] + change["images_new"] == 40 == change["images_kept"] + change["images_gone"], name
        assert change["numbers"]["n"] == [40, 40]
    # the images of one candidate are the same in both; other densities take another selection of them
    assert any(change["images_new"] for change in changes.values())
    assert before == {str(f.relative_to(at)): f.read_bytes() for f in at.rglob("*") if f.is_file()}

    # the source as it was before: the index and the release of then, and back again
    for key in list(tiny.files())[EARLIER:]:
        (source / key).rename(tmp_path / key.replace("/", "-"))
    assert run(source, checkpoint, output) == errors.EXIT_DONE
    assert latest(output) == first and len(releases(output)) == 2
    for key in list(tiny.files())[EARLIER:]:
        (tmp_path / key.replace("/", "-")).rename(source / key)
    assert run(source, checkpoint, output) == errors.EXIT_DONE
    assert latest(output) == second

    # how many processes do the work, and a release that was taken back by hand
    assert run(source, checkpoint, output, evaluation={"extraction": {"actors": 1}}) == errors.EXIT_NOTHING_NEW
    pointer = json.loads((output / "latest.json").read_text())
    held = f"2020-01-01-{second.rpartition('-')[2]}"  # also where it was made on another day
    (output / "latest.json").write_text(json.dumps(pointer | {"release": first, "held": [held]}))
    assert run(source, checkpoint, output) == errors.EXIT_HELD_BACK
    assert latest(output) == first
    (output / "latest.json").write_text(json.dumps(pointer))

    gates = [{"metric": "likely_copies", "recipe": "varied", "max": -1.0}]
    for _ in range(2):  # again: the same release, held back again
        capsys.readouterr()
        assert run(source, checkpoint, output, gates=gates) == errors.EXIT_HELD_BACK
        said = capsys.readouterr().out
        assert "gate: varied: likely_copies is" in said and "held back: " in said
        assert latest(output) == second and len(releases(output)) == 3

    # deleted by hand: it is a function of what there is, and comes back; not if that has changed
    kept = table_of(output / "releases" / second / "typical")
    files.remove_folder(str(output / "releases" / second))
    assert run(source, checkpoint, output) == errors.EXIT_NOTHING_NEW
    assert table_of(output / "releases" / second / "typical").equals(kept)
    files.remove_folder(str(output / "releases" / second))
    assert run(source, checkpoint, output, recipes=[TYPICAL]) == errors.EXIT_BAD_INPUT
    assert f"names {second}, whose release.json is not there any more" in capsys.readouterr().err


@pytest.mark.slow
def test_what_was_damaged_after_its_commit_is_mended_by_the_next_run(source, inputs, tmp_path, ray_cluster, capsys):
    output, checkpoint = tmp_path / "out", inputs[1]
    (source / "a" / "broken.png").write_bytes(b"none")  # for a quarantine
    assert run(source, checkpoint, output, recipes=[TYPICAL]) == errors.EXIT_DONE
    release = output / "releases" / latest(output)
    (version,) = (output / "index").glob("*-*")
    pointer = (output / "latest.json").read_bytes()
    before = table_of(release / "typical"), table_of(version / "densities")
    samples, record = next((release / "typical").glob("*.parquet")), release / "release.json"
    damaged = [samples, *(next((version / stage).glob("*.parquet")) for stage in ("densities", "quarantine"))]
    sizes, record_before = [file.stat().st_size for file in damaged], record.read_bytes()
    for file in damaged:
        file.write_bytes(file.read_bytes()[:100])  # the samples in candidates/ may be the same file, by a link
    capsys.readouterr()
    assert run(source, checkpoint, output, recipes=[TYPICAL]) == errors.EXIT_NOTHING_NEW
    said = capsys.readouterr().out
    assert f"has 100 of {sizes[1]} bytes since it was committed" in said
    assert f"mended, and nothing new since: {release}" in said
    assert [file.stat().st_size for file in damaged] == sizes
    assert (table_of(release / "typical"), table_of(version / "densities")) == before
    assert record.read_bytes() == record_before and (output / "latest.json").read_bytes() == pointer

    # and where the mending was broken off, or the record itself is damaged
    (release / "artifact.json").unlink()
    assert run(source, checkpoint, output, recipes=[TYPICAL]) == errors.EXIT_NOTHING_NEW
    record.write_bytes(record_before[:100])
    assert run(source, checkpoint, output, recipes=[TYPICAL]) == errors.EXIT_NOTHING_NEW
    assert json.loads(record.read_text())["numbers"] == json.loads(record_before)["numbers"]

    # something new does not need the latest release whole, to be compared with it
    samples.write_bytes(samples.read_bytes()[:100])
    assert run(source, checkpoint, output, recipes=[TYPICAL | {"n": 41}]) == errors.EXIT_DONE
    assert json.loads((output / "releases" / latest(output) / "release.json").read_text())["last"] == release.name


@pytest.mark.slow
def test_what_another_run_left_of_a_version_does_not_block_the_schedule(source, inputs, tmp_path, ray_cluster, capsys):
    """Other versions of packages, a base that is gone, a deletion broken off, a lock folder that was not restored."""
    output, checkpoint = tmp_path / "out", inputs[1]
    assert run(source, checkpoint, output, recipes=[TYPICAL]) == errors.EXIT_DONE
    (version,) = (output / "index").glob("*-*")
    before = table_of(version / "densities")
    for stage in ("features", "estimator"):  # as another torch has begun them
        started = version / stage / "started.json"
        started.write_text(started.read_text().replace('"torch":"', '"torch":"0.'))
        (version / stage / "artifact.json").unlink()
    (version / "run.json").unlink()
    (version / "begun.json").write_text(json.dumps({"base": str(tmp_path / "gone")}))
    for folder in (output / "candidates").glob("*-*"):
        if (folder / "typical").exists():
            (folder / "begun.json").unlink()
            (folder / "typical" / "samples" / "artifact.json").unlink()
            (folder / "typical" / "samples" / "started.json").unlink()
    pointer = json.loads((output / "latest.json").read_text())
    (output / "latest.json").write_text(json.dumps(pointer | {"lock_token": 40}))
    files.remove_folder(str(output / "lock"))
    assert run(source, checkpoint, output, recipes=[TYPICAL | {"seed": 1}]) == errors.EXIT_DONE
    assert json.loads((output / "latest.json").read_text())["lock_token"] == 41
    assert table_of(version / "densities").equals(before)

    # a source that was in another state while the version was made: its name alone is of this one
    at = version / "listing" / "artifact.json"
    at.write_text(at.read_text().replace('"files": ', '"files": 1'))
    capsys.readouterr()
    assert run(source, checkpoint, output, recipes=[TYPICAL | {"seed": 1}]) == errors.EXIT_NOTHING_NEW
    assert "the source changed while it was made" in capsys.readouterr().out


def test_a_pointer_is_not_moved_by_an_overtaken_holder(tmp_path):
    curate_releases.point(str(tmp_path), "a", 7, [], None)
    with pytest.raises(errors.RunError, match="was moved by run 7 of the lock, this is 6"):
        curate_releases.point(str(tmp_path), "b", 6, [], None)
    assert curate_releases.latest(str(tmp_path)) == "a" and curate_releases.lock_token(str(tmp_path)) == 7


def test_a_pointer_follows_the_release_that_a_person_has_written(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "releases" / name).mkdir(parents=True)
        (tmp_path / "releases" / name / "release.json").write_text(
            json.dumps({"last": f"before {name}", "verdicts": []})
        )
    curate_releases.point(str(tmp_path), "b", 7, [], None)
    there = curate_releases.pointer(str(tmp_path))
    curate_releases.settle(str(tmp_path))
    assert curate_releases.pointer(str(tmp_path)) == there
    (tmp_path / "latest.json").write_text(json.dumps(there | {"release": "a", "held": ["b"]}))
    curate_releases.settle(str(tmp_path))
    now = curate_releases.pointer(str(tmp_path))
    assert (now["uri"], now["last"], now["held"], now["lock_token"]) == ("releases/a", "before a", ["b"], 7)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"release": "a"', "is no whole JSON file"),
        ("", "is no whole JSON file"),
        ("[]", "has no `release`"),
        ('{"release": "a", "held": "b"}', "`held` must be a list"),
        ('{"release": "a", "held": ["b", "a"]}', "a is `release` and in `held` at once"),
        ('{"release": "a", "holds": []}', "unknown key 'holds'"),
    ],
)
def test_a_pointer_that_was_edited_badly_is_one_line(source, inputs, tmp_path, capsys, text, expected):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "latest.json").write_text(text)
    assert run(source, inputs[1], tmp_path / "out") == errors.EXIT_BAD_INPUT
    said = capsys.readouterr().err
    assert f"latest.json: {expected}" in said and len(said.strip().splitlines()) == 1


def test_a_name_in_held_that_is_no_release_is_told(tmp_path, capsys):
    (tmp_path / "releases" / "2026-11-27-0123456789ab").mkdir(parents=True)
    pointer = {"release": "2026-11-26-ba9876543210", "held": ["2026-11-25-0123456789ab", "2026-11-27-0123456789"]}
    (tmp_path / "latest.json").write_text(json.dumps(pointer))
    curate_releases.say_unknown_held(str(tmp_path))
    (line,) = capsys.readouterr().out.splitlines()
    assert "`held` names 2026-11-27-0123456789, which is no release here" in line


@pytest.mark.slow
def test_only_the_newest_versions_are_kept_and_releases_need_none_of_them(
    source, inputs, tmp_path, ray_cluster, capsys
):
    """Of new images twice, and of other settings, with which everything is indexed anew."""
    output = tmp_path / "out"
    for number, k in enumerate((5, 5, 6)):
        capsys.readouterr()
        write(source, list(tiny.files().items())[EARLIER + 5 * number : EARLIER + 5 * (number + 1)])
        more = {"density": {"k": k, "block_rows": 64}, "keep": 1, "recipes": [TYPICAL]}
        assert run(source, inputs[1], output, **more) == errors.EXIT_DONE
    assert "density.k: 5 -> 6" in (said := capsys.readouterr().out) and "building anew" in said
    assert len(files.folders(str(output / "index"))) == 1
    assert len(files.folders(str(output / "candidates"))) == 2  # a recipe and its evaluation
    assert len(releases(output)) == 3
    for name in releases(output):
        artifact = artifacts.load_artifact(str(output / "releases" / name))
        assert artifact is not None
        for part in artifact.parts:
            assert artifacts.sha256((output / "releases" / name / part.name).read_bytes()) == part.sha256


def test_a_live_lock_is_named(source, inputs, tmp_path, capsys):
    output = tmp_path / "out"
    with locks.hold(str(output / "lock"), 60):
        assert run(source, inputs[1], output) == errors.EXIT_BAD_INPUT
    line = capsys.readouterr().err
    assert "another run holds the lock: process" in line and " since 20" in line


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"gates": [{"metric": "precison", "min": 0.5}]}, "unknown metric 'precison'; did you mean 'precision'?"),
        ({"gates": [{"metric": "precision", "min": 0.5, "recipe": "typcal"}]}, "did you mean 'typical'?"),
        ({"gates": [{"metric": "precision"}]}, "sets no bound"),
        ({"gates": [{"metric": "precision", "min": 0.9, "max": 0.1}]}, "min 0.9 is above max 0.1"),
        ({"gates": [{"metric": "precision", "min": 0.5, "space": "judge"}]}, "evaluation.judge.model is none"),
        ({"recipes": [TYPICAL | {"treshold": "p3"}]}, "unknown setting; did you mean 'threshold'?"),
        ({"recipes": [TYPICAL, TYPICAL]}, "'typical' is named twice"),
        ({"recipes": [TYPICAL | {"threshold": "p800"}]}, "recipes: typical: threshold 'p800'"),
        ({"recipes": [{"name": "typical", "n": 40}]}, "recipes: typical: weight: not set"),
        ({"recipes": []}, "recipes: none"),
        ({"gates": [{"metric": "n", "min": 41}]}, "n of 'typical' is 40, the gate wants 41"),
        ({"evaluation": {"n": 50}}, "'typical' has n 40, evaluation.n is 50"),
        ({"recipes": [TYPICAL | {"name": "../x"}]}, "expected a folder name"),
        ({"generator": {"kind": "diffusers", "path": "/nowhere/ddpm"}}, "/nowhere/ddpm"),
    ],
)
def test_bad_settings_are_one_line_and_exit_2(source, inputs, tmp_path, capsys, more, expected):
    assert run(source, inputs[1], tmp_path / "out", **more) == errors.EXIT_BAD_INPUT
    said = capsys.readouterr().err
    assert expected in said and len(said.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def numbers(values: dict[str, float]) -> dict[str, dict[str, float]]:
    """Of recipe a; in the index's space where they name none."""
    return {"a": {name if name == "n" or "." in name else f"index.{name}": value for name, value in values.items()}}


FRECHET, RISE = "frechet_distance", {"metric": "frechet_distance", "max_increase": 0.05}
PRECISION, FALL = {"metric": "precision", "min": 0.5}, {"metric": "recall", "max_decrease": 0.1}


@pytest.mark.parametrize(
    ("gate", "now", "last", "holds"),
    [
        (PRECISION, {"precision": 0.5}, {}, True),
        (PRECISION, {"precision": 0.499}, {}, False),
        (PRECISION, {"judge.precision": 0.9}, {}, False),  # measured elsewhere: no value
        (PRECISION | {"space": "judge"}, {"judge.precision": 0.9, "precision": 0.1}, {}, True),
        (RISE, {FRECHET: 10.5}, {FRECHET: 10.0}, True),
        (RISE, {FRECHET: 10.6}, {FRECHET: 10.0}, False),
        (RISE, {FRECHET: 99.0}, {}, True),  # the first release
        (RISE, {FRECHET: float("nan")}, {}, False),
        # of another number of images: not comparable
        (RISE, {FRECHET: 9.0, "n_generated": 50.0}, {FRECHET: 10.0, "n_generated": 100.0}, False),
        ({"metric": FRECHET, "max": 10}, {FRECHET: 9.0, "n_generated": 5.0}, {FRECHET: 9.0, "n_generated": 9.0}, True),
        (FALL, {"recall": 0.44}, {"recall": 0.5}, False),
        (FALL, {"recall": 0.4}, {"recall": float("nan")}, True),
        ({"metric": "recall", "min": 0.1}, {"recall": float("nan")}, {}, False),
        ({"metric": "n", "min": 3, "max": 5}, {"n": 6.0}, {}, False),
    ],
)
def test_gates(gate, now, last, holds):
    (verdict,) = curate_releases.judge([GateSettings(**gate)], numbers(now), numbers(last) if last else {})
    assert verdict.holds is holds
    assert verdict.describe().startswith(f"a: {gate['metric']} ")


def test_a_gate_is_for_its_recipe_or_for_each():
    values = {"a": {"n": 1.0}, "b": {"n": 9.0}}
    both = curate_releases.judge([GateSettings(metric="n", min=5)], values, {})
    assert [(v.recipe, v.holds) for v in both] == [("a", False), ("b", True)]
    assert [v.recipe for v in curate_releases.judge([GateSettings(metric="n", min=5, recipe="b")], values, {})] == ["b"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_that_is_killed_twice_is_taken_up_by_the_next(source, inputs, tmp_path, ray_cluster):
    undisturbed, output = tmp_path / "undisturbed", tmp_path / "out"
    assert run(source, inputs[1], undisturbed, recipes=[TYPICAL]) == errors.EXIT_DONE
    more: dict[str, Any] = {"lock": {"lease_s": 3.0}, "recipes": [TYPICAL]}
    for point in ("candidates/*/typical/samples/_parts/*", "releases/*/_parts/*"):
        file = settings_file(source, inputs[1], output, **more)
        tiny.kill_when(point, output, "--config", file, workflow="curate.py")
        time.sleep(3.5)  # a lease of a killed run ends by itself
    assert run(source, inputs[1], output, **more) == errors.EXIT_DONE
    assert len(releases(output)) == len(files.folders(str(output / "index"))) == 1
    ours, theirs = (table_of(at / "releases" / releases(at)[0] / "typical") for at in (output, undisturbed))
    assert ours.equals(theirs)


def table_of(folder: Path) -> pa.Table:
    return pq.ParquetDataset(sorted(str(f) for f in folder.glob("*.parquet"))).read()


def test_parts_of_a_run_share_its_cluster(ray_cluster):
    with session.shared(ray_cluster), session.session("") as now:
        assert now.local == ray_cluster.local
