"""Artifacts: whole or not at all, resumed part by part, refused under another fingerprint."""

import dataclasses
import json
import os

import pyarrow as pa
import pytest

from pd_core.core import artifacts, files
from pd_core.core.artifacts import Stage
from pd_core.core.errors import RunError, UserError


def stage(uri, **identity):
    return Stage(str(uri), "features", 1, identity or {"model": "a", "nested": {"k": 3}})


def table(n=3):
    return pa.table({"x": pa.array(range(n), pa.int64())})


def test_parts_then_commit_then_skip(tmp_path):
    made = stage(tmp_path / "features")
    assert made.begin(overwrite=False) is None
    parts = [made.write_table(artifacts.part_name(i), table(i + 1), {"bad": i}) for i in range(3)]
    assert made.finished_parts() == {part.name: part for part in parts}
    artifact = made.commit(parts, {"rows": 6}, {"features": 1.23456})
    assert artifact.rows == 6
    assert stage(tmp_path / "features").begin(overwrite=False) == artifact == artifacts.load_artifact(made.uri)


def test_same_identity_resumes_and_leaves_finished_parts(tmp_path):
    made = stage(tmp_path)
    made.begin(overwrite=False)
    part = made.write_table("part-0.parquet", table())
    before = os.stat(tmp_path / "part-0.parquet").st_mtime_ns
    assert made.begin(overwrite=False) is None
    assert made.finished_parts() == {"part-0.parquet": part}
    assert os.stat(tmp_path / "part-0.parquet").st_mtime_ns == before


@pytest.mark.parametrize("finished", [True, False])
def test_other_identity_is_refused_naming_what_differs_and_replaced_on_request(tmp_path, finished):
    old = stage(tmp_path, model="a", nested={"k": 3})
    old.begin(overwrite=False)
    part = old.write_table("part-0.parquet", table())
    if finished:
        old.commit([part], {}, {})
    new = stage(tmp_path, model="a", nested={"k": 4})
    with pytest.raises(UserError, match=r"nested.k: 3 -> 4.*--overwrite"):
        new.begin(overwrite=False)
    assert (tmp_path / "part-0.parquet").exists()
    assert new.begin(overwrite=True) is None
    assert new.finished_parts() == {} and not (tmp_path / "part-0.parquet").exists()


def test_a_folder_of_somebody_else_is_never_touched(tmp_path):
    (tmp_path / "holiday.jpg").write_bytes(b"precious")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="not of this program"):
            stage(tmp_path).begin(overwrite)
    assert (tmp_path / "holiday.jpg").read_bytes() == b"precious"


def test_what_a_killed_process_left_half_written_is_in_nobodys_way(tmp_path):
    half = tmp_path / f"started.json.{'0f' * 16}.tmp"
    half.write_bytes(b"{")
    made = stage(tmp_path)
    assert made.begin(overwrite=False) is None and half.exists()  # its writer may be alive
    made.write_part("part-1.parquet", b"rows", 1)
    record = tmp_path / "_parts" / "part-1.parquet.json"
    other = record.with_name(f"part-0.parquet.json.{'a1' * 16}.tmp")
    other.write_bytes(record.read_bytes())
    for file in (half, other):
        os.utime(file, (0, 0))
    assert made.begin(overwrite=False) is None
    assert not half.exists() and not other.exists() and list(made.finished_parts()) == ["part-1.parquet"]


def test_overwrite_leaves_the_files_of_others_and_no_part_of_the_old_stage(tmp_path):
    old = stage(tmp_path, model="a")
    old.begin(overwrite=False)
    old.write_part("index.html", b"report", 0)
    (tmp_path / artifacts.part_name(7)).write_bytes(b"a part that a crash left without its record")
    (tmp_path / "notes.md").write_bytes(b"precious")
    stage(tmp_path, model="b").begin(overwrite=True)
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == {"started.json", "notes.md"}


@pytest.mark.parametrize(
    ("uri", "folder", "inside"),
    [
        ("/a/b", "/a", True),
        ("/a", "/a", True),
        ("/ab", "/a", False),
        ("/a", "/", True),
        ("s3://b/x/out", "s3://b/x/", True),
        ("s3://b/xy", "s3://b/x", False),
        ("s3://b/x", "/b", False),
    ],
)
def test_inside(uri, folder, inside):
    assert files.is_inside(uri, folder) is inside


def test_inside_follows_links(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "images")
    assert files.is_inside(str(tmp_path / "link" / "out"), str(tmp_path / "images"))


def test_a_home_folder_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    assert files.absolute("~/pd") == "/somewhere/pd"


@pytest.mark.parametrize("damage", ["gone", "truncated", "no record"])
def test_a_part_without_its_bytes_or_its_record_is_made_again(tmp_path, damage):
    made = stage(tmp_path)
    made.begin(overwrite=False)
    made.write_table("part-0.parquet", table())
    kept = made.write_table("part-1.parquet", table())
    target = tmp_path / "part-0.parquet"
    if damage == "gone":
        target.unlink()
    elif damage == "truncated":
        target.write_bytes(target.read_bytes()[:-1])
    else:
        (tmp_path / "_parts" / "part-0.parquet.json").unlink()
    assert made.finished_parts() == {"part-1.parquet": kept}


def test_a_write_that_fails_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    target = tmp_path / "file"
    files.write_bytes(str(target), b"old")

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        files.write_bytes(str(target), b"new")
    assert target.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_a_part_whose_bytes_are_not_in_place_is_not_recorded(tmp_path, monkeypatch):
    made = stage(tmp_path)
    made.begin(overwrite=False)
    write = files.Folder.write
    monkeypatch.setattr(files.Folder, "write", lambda folder, name, data: write(folder, name, data[:-1]))
    with pytest.raises(RunError, match="wrote"):
        made.write_part("part-0", b"12345", 1)
    assert made.finished_parts() == {}


def finished(folder, **identity):
    """A stage of three parts, one of them in a folder of its own, and the calls that made them."""
    made, calls = stage(folder, **identity), []

    def make():
        for i in range(3):
            name = f"sub/{artifacts.part_name(i)}" if i == 2 else artifacts.part_name(i)
            if name not in made.finished_parts():
                made.write_table(name, table(i + 1))
                calls.append(name)
        return made.finished_parts().values(), {"calls": len(calls)}

    return made, make, calls


def test_parts_damaged_after_the_commit_are_made_again_and_the_record_stays(tmp_path):
    made, make, calls = finished(tmp_path)
    artifact = made.complete(make, overwrite=False)
    record = (tmp_path / "artifact.json").read_bytes()
    before = {file: file.read_bytes() for file in tmp_path.rglob("*.parquet")}
    cut, gone = tmp_path / "sub" / artifacts.part_name(2), tmp_path / artifacts.part_name(0)
    cut.write_bytes(cut.read_bytes()[:-1])
    gone.unlink()
    calls.clear()
    assert made.recorded() == artifact
    assert sorted(made.damage(artifact)) == [artifacts.part_name(0), f"sub/{artifacts.part_name(2)}"]
    with pytest.raises(UserError, match="other settings"):  # it is still that stage, finished or not
        stage(tmp_path, model="b").begin(overwrite=False)
    assert made.begin(overwrite=False) is None and artifacts.load_artifact(made.uri) is None
    (tmp_path / "artifact.json").write_bytes(record)
    assert made.complete(make, overwrite=False) == artifact, "the same parts: what was said of them still holds"
    assert sorted(calls) == [artifacts.part_name(0), f"sub/{artifacts.part_name(2)}"]
    assert {file: file.read_bytes() for file in tmp_path.rglob("*.parquet")} == before
    assert (tmp_path / "artifact.json").read_bytes() == record


def test_parts_that_come_out_otherwise_get_a_record_of_their_own(tmp_path):
    made, make, _ = finished(tmp_path)
    old = made.complete(make, overwrite=False)
    (tmp_path / artifacts.part_name(1)).unlink()

    def otherwise():
        made.write_table(artifacts.part_name(1), table(7))
        return made.finished_parts().values(), {}

    new = made.complete(otherwise, overwrite=False)
    assert new == artifacts.load_artifact(made.uri) != old and new.rows == old.rows + 5


@pytest.mark.parametrize("lost", ["part", "record"])
def test_a_stage_is_as_whole_as_the_one_beside_it(tmp_path, lost):
    beside, make_beside, _ = finished(tmp_path / "beside")
    made, make, _ = finished(tmp_path / "own")
    made = dataclasses.replace(made, beside=(beside.uri,))
    beside.complete(make_beside, overwrite=False)
    artifact = made.complete(make, overwrite=False)
    assert made.begin(overwrite=False) == artifact
    (tmp_path / "beside" / {"part": artifacts.part_name(0), "record": "artifact.json"}[lost]).unlink()
    (name,) = made.damage(artifact)
    assert name == "../beside/" + {"part": artifacts.part_name(0), "record": "artifact.json"}[lost]
    assert made.begin(overwrite=False) is None


def test_who_reads_a_damaged_part_is_told_which_and_what_to_do(tmp_path):
    made, make, _ = finished(tmp_path)
    artifact = made.complete(make, overwrite=False)
    artifacts.check_whole(made.uri, artifact)
    part = tmp_path / artifacts.part_name(1)
    part.write_bytes(part.read_bytes()[:-40])
    size = part.stat().st_size
    with pytest.raises(
        UserError, match=rf"{part.name} has {size} of {size + 40} bytes .*run the command that wrote it"
    ):
        artifacts.check_whole(made.uri, artifact)
    for columns in (None, ["x"]):
        with pytest.raises(UserError, match=rf"{part.name}: is no whole Parquet file .*run the command that wrote it"):
            files.read_table(str(part), columns)


def test_fingerprint_follows_identity_and_not_the_order_of_its_keys():
    a = stage("x", model="a", k=1).fingerprint
    assert a == Stage("elsewhere", "features", 1, {"k": 1, "model": "a"}).fingerprint
    assert a != stage("x", model="a", k=2).fingerprint
    assert a != Stage("x", "features", 2, {"model": "a", "k": 1}).fingerprint
    assert a != Stage("x", "index", 1, {"model": "a", "k": 1}).fingerprint


def test_same_table_gives_same_bytes():
    assert files.table_bytes(table(1000)) == files.table_bytes(table(1000))


def test_columns_can_be_left_out(tmp_path):
    uri = str(tmp_path / "t.parquet")
    files.write_bytes(uri, files.table_bytes(pa.table({"a": [1], "b": [2], "c": [3]})))
    assert files.read_table(uri).column_names == ["a", "b", "c"]
    assert files.read_table(uri, ["c", "a"]).column_names == ["c", "a"]
    assert files.read_table(uri, without=["b"]).column_names == ["a", "c"]


class SlowDown(OSError):
    pass


@pytest.mark.parametrize(
    ("error", "kind", "expected"),
    [
        (PermissionError("Access Denied"), UserError, "permission denied"),
        (FileNotFoundError("The specified bucket does not exist"), UserError, "not found"),
        (OSError(16, "Please reduce your request rate."), RunError, "throttles"),
        (PermissionError("Access Denied: SlowDown"), RunError, "throttles"),  # throttling that looks like a denial
        (PermissionError("The provided token has expired ExpiredToken"), UserError, "expired"),
        (OSError(5, "InternalError"), RunError, "OSError"),
        (OSError(28, "No space left on device"), RunError, "make room and run the same command again"),
        (OSError(122, "Disk quota exceeded"), RunError, "make room and run the same command again"),
    ],
)
def test_storage_errors_become_one_line(error, kind, expected):
    explained = files.explain(error, "s3://bucket/x")
    assert type(explained) is kind and expected in str(explained) and "s3://bucket/x" in str(explained)
    assert "\n" not in str(explained)


def test_an_identity_has_the_fingerprint_that_it_has_after_it_was_recorded():
    """Keys that are numbers become texts in a record, which sort in another order; tuples become lists."""
    identity = {"classes": {2: "a", 10: "b"}, "size": (8, 8)}
    assert artifacts.fingerprint(identity) == artifacts.fingerprint(json.loads(json.dumps(identity)))


def test_a_part_that_another_run_drops_meanwhile_is_not_there(tmp_path, monkeypatch):
    # the tasks of a killed run go on for seconds, and drop checkpoints as they write new ones
    made, other = stage(tmp_path), stage(tmp_path)
    made.begin(overwrite=False)
    kept = made.write_part("state-2.pt", b"two", 0)
    made.write_part("state-1.pt", b"one", 0)
    read = files.read_record

    def read_after_the_drop(uri: str) -> object:
        other.drop_part("state-1.pt")  # between the listing of the records and their reading
        return read(uri)

    monkeypatch.setattr(files, "read_record", read_after_the_drop)
    assert made.finished_parts() == {"state-2.pt": kept}
