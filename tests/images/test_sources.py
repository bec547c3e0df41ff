"""Sources against independent enumerations: os.walk, tarfile, pyarrow's own table reader, a real S3 server."""

from __future__ import annotations

import errno
import gzip
import hashlib
import io
import json
import os
import pickle
import random
import tarfile
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pd_core.core import schemas
from pd_core.core.errors import RunError, UserError
from pd_core.core.s3 import S3FileSystem
from pd_core.core.settings.data import DataSettings
from pd_core.images import decode, listing, sources
from pd_core.images.decode import BadImage, Reason
from pd_core.images.sources import names, stores, webdataset
from pd_core.images.sources.base import expand_braces
from tests.s3 import S3Server

ODD_NAMES = [
    "plain.png",
    "two words.png",
    "quo'te\".png",
    "new\nline.png",
    "100%41.png",
    "#hash?query=1.png",
    "x?versionId=3.png",
    "[x]*{a,b}.png",
    "ü日本é.png",
    "é" * 125 + ".png",  # 254 bytes
    "tab\t.png",
    " lead and trail ",
    "no_extension",
    "wrong.mp4",
    "+plus&amp;.png",
    "CAPS.PNG",
]
# a Linux file name need not be UTF-8; S3 keys are, and SeaweedFS turns a backslash into a slash
LOCAL_NAMES = [
    b"latin\xe9.png",
    b"\xff\xfe.png",
    b"back\\slash.png",
    b"\\xff.png",
    b"\\x5cxff.png",
    b"x" * 251 + b".png",
]


def settings(source: object, **values: Any) -> DataSettings:
    return DataSettings(source=str(source), **values)


def opened(source: object, **values: Any) -> sources.Source:
    # through pickle: that is how a worker gets it
    return pickle.loads(pickle.dumps(sources.open_source(settings(source, **values))))


def listed(source: sources.Source) -> pa.Table:
    tables = list(sources.list_images(source))
    schema = schemas.listing(source.metadata_type)
    assert all(table.schema == schema for table in tables)
    return pa.concat_tables(tables)


def keys(source: sources.Source) -> list[str]:
    return listed(source)["key"].to_pylist()


def outcome(item: bytes | BadImage) -> bytes | Reason:
    return item.reason if isinstance(item, BadImage) else item


def contents(source: sources.Source) -> dict[str, bytes | Reason]:
    rows = listed(source)
    found = [outcome(item) for item in sources.read(source, rows)]
    return dict(zip(rows["key"].to_pylist(), found, strict=True))


def never(seconds: float) -> None:
    raise AssertionError(f"waited {seconds} s for what cannot get better")


def write(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def tar_bytes(members: dict[str, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=form) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return sink.getvalue()


def parquet_bytes(table: pa.Table, **options: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, **options)
    return sink.getvalue()


# ---- names -----------------------------------------------------------------------------------------------------------


@given(st.lists(st.binary(min_size=1, max_size=40), unique=True))
def test_keys_are_utf8_reversible_and_unique(raw: list[bytes]) -> None:
    decoded = [os.fsdecode(name) for name in raw]
    escaped = [names.escape(name) for name in decoded]
    assert [os.fsencode(names.unescape(key.encode().decode())) for key in escaped] == raw
    assert len(set(escaped)) == len(raw)


def test_sample_ids_are_63_bit_hashes_of_the_key() -> None:
    ids = sources.sample_ids(["a", "b", "ü"])
    assert ids.dtype == np.int64
    assert (ids >= 0).all()
    assert ids.tolist() == [sources.sample_id(key) for key in ("a", "b", "ü")]
    assert sources.sample_id("a") == int.from_bytes(hashlib.blake2b(b"a", digest_size=8).digest(), "little") % 2**63


def test_check_unique_tells_a_double_key_from_a_hash_collision() -> None:
    table = ["a", "b", "a"]
    sources.check_unique(np.array([3, 1, 2]), lambda rows: pytest.fail("nothing to report"))
    with pytest.raises(UserError, match=r"'a' \(rows 0 and 2\)"):
        sources.check_unique(sources.sample_ids(table), lambda rows: [table[i] for i in rows])
    with pytest.raises(UserError, match="'a' and 'b' have the same 63-bit hash"):
        sources.check_unique(np.array([5, 5, 6]), lambda rows: [table[i] for i in rows])


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("s-{08..11}.tar", ["s-08.tar", "s-09.tar", "s-10.tar", "s-11.tar"]),
        ("{a,b}/{1..2}", ["a/1", "a/2", "b/1", "b/2"]),
        ("{plain}-{1..1}", ["{plain}-1"]),
        ("none", ["none"]),
    ],
)
def test_braces_expand_as_in_a_shell(pattern: str, expected: list[str]) -> None:
    assert list(expand_braces(pattern)) == expected


# ---- directory and glob ----------------------------------------------------------------------------------------------


@pytest.fixture
def odd_folder(tmp_path: Path) -> dict[bytes, bytes]:
    """Files with odd names in odd folders; returns path relative to tmp_path/root and content."""
    root = os.fsencode(tmp_path / "root")
    content = {}
    for folder in (b"", b"sub dir/", "ü/[0]/".encode(), b"\xe9/"):
        for name in [os.fsencode(n) for n in ODD_NAMES] + LOCAL_NAMES:
            content[folder + name] = b"content of " + folder + name
    names_in_any_order = list(content)
    random.Random(0).shuffle(names_in_any_order)
    for relative in names_in_any_order:
        os.makedirs(os.path.dirname(os.path.join(root, relative)), exist_ok=True)
        Path(os.fsdecode(os.path.join(root, relative))).write_bytes(content[relative])
    return content


def test_directory_lists_and_reads_what_os_walk_finds(tmp_path: Path, odd_folder: dict[bytes, bytes]) -> None:
    source = opened(tmp_path / "root")
    assert source.kind == "directory"
    found = {os.fsencode(names.unescape(key)): data for key, data in contents(source).items()}
    root = os.fsencode(tmp_path / "root")
    walked = {os.path.relpath(os.path.join(d, f), root) for d, _, files in os.walk(root) for f in files}
    assert set(found) == walked
    assert found == odd_folder


def test_order_is_that_of_the_bytes_of_the_key(tmp_path: Path, odd_folder: dict[bytes, bytes]) -> None:
    write(tmp_path / "root", {"a/b.png": b"", "a-b.png": b"", "a.png": b"", "a0.png": b""})  # '-' < '.' < '/' < '0'
    found = keys(opened(tmp_path / "root"))
    assert found == sorted(found, key=str.encode)
    assert [k for k in found if k.startswith("a") and k[1] in "-./0"] == ["a-b.png", "a.png", "a/b.png", "a0.png"]


def test_large_listings_come_in_several_tables_in_one_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pd_core.images.sources import folders as module

    write(tmp_path, {f"{i}.png": b"" for i in range(25)})
    monkeypatch.setattr(module, "TABLE_ROWS", 7)
    tables = list(sources.list_images(opened(tmp_path)))
    assert [table.num_rows for table in tables] == [7, 7, 7, 4]
    assert pa.concat_tables(tables)["key"].to_pylist() == sorted(f"{i}.png" for i in range(25))


def test_sidecars_and_hidden_files_are_left_out_and_counted(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": b"1", "Thumbs.db": b"", "x/labels.json": b"", "y.json": b"", ".DS_Store": b""})
    write(tmp_path, {".cache/b.png": b"2", "x/._a.png": b"3"})
    os.mkfifo(tmp_path / "pipe.png")
    skipped: Counter[str] = Counter()
    (table,) = sources.list_images(opened(tmp_path), skipped)
    assert table["key"].to_pylist() == ["a.png"]
    assert skipped == {".db": 1, ".json": 2, stores.HIDDEN: 3, stores.IRREGULAR: 1}


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    """A source with every kind of link in it, and what they lead to."""
    write(tmp_path, {"root/a.png": b"1", "root/sub/c.png": b"3", "elsewhere/b.png": b"2", "elsewhere/deep/d.png": b"4"})
    root = tmp_path / "root"
    (root / "file.png").symlink_to(tmp_path / "elsewhere/b.png")
    (root / "folder").symlink_to(tmp_path / "elsewhere")
    (root / "deep").symlink_to("../elsewhere/deep")
    (root / "loop").symlink_to(root)
    (tmp_path / "elsewhere/back").symlink_to(root)
    (root / "inner").symlink_to("sub")
    (root / "inner.png").symlink_to("sub/c.png")
    (root / "there_and_back").symlink_to("../root/sub")
    (root / "dangling.png").symlink_to("nowhere")
    (root / "self.png").symlink_to("self.png")
    return root


INSIDE = {
    "a.png": b"1",
    "sub/c.png": b"3",
    "inner.png": b"3",
    "dangling.png": Reason.UNREADABLE,
    "self.png": Reason.UNREADABLE,
}


def test_links_are_followed_inside_the_source_only_and_loops_end(linked: Path) -> None:
    skipped: Counter[str] = Counter()
    source = opened(linked)
    list(sources.list_images(source, skipped))
    assert contents(source) == INSIDE | {"inner/c.png": b"3", "there_and_back/c.png": b"3"}
    assert skipped == {stores.LOOP: 1, stores.OUTSIDE: 3}


@pytest.mark.parametrize(
    ("many", "told"),
    [(1, "1 link leads out of the source,"), (1200, "1,200 links lead out of the source,")],
)
def test_links_that_are_left_out_are_told(capsys: pytest.CaptureFixture[str], many: int, told: str) -> None:
    listing.say_outside(Counter({stores.OUTSIDE: many}))
    assert f"listing: {told} left out; --data.follow-links" in capsys.readouterr().out


def test_links_out_are_followed_on_request_and_each_folder_is_entered_once(linked: Path) -> None:
    skipped: Counter[str] = Counter()
    source = opened(linked, follow_links=True)
    list(sources.list_images(source, skipped))
    out = {"file.png": b"2", "deep/d.png": b"4", "folder/b.png": b"2"}  # by name: what "deep" has is not folder/deep's
    assert contents(source) == INSIDE | out
    assert skipped == {stores.LOOP: 2, stores.TWICE: 3}


def test_following_links_is_part_of_what_a_listing_is_made_from_only_where_it_is_asked_for(linked: Path) -> None:
    plain, following = (sources.identity(opened(linked, follow_links=on)) for on in (False, True))
    assert following == plain | {"follow_links": True}


def test_what_links_lead_to_is_not_quoted(tmp_path: Path) -> None:
    write(tmp_path, {"token": b"hunter2 is the token"})
    for follow, told in ((False, "starts with b'hunter2"), (True, "20 bytes of no known format")):
        data = {"source": str(tmp_path), "follow_links": follow}
        limits = decode.limits_of(DataSettings.model_validate(data))
        with pytest.raises(BadImage, match=told):
            decode.decode((tmp_path / "token").read_bytes(), limits)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("follow", [False, True])
def test_folders_that_link_to_each_other_do_not_multiply_for_ever(tmp_path: Path, follow: bool) -> None:
    """Two links in each of 30 folders to the next one are 2^30 folders."""
    for i in range(30):
        write(tmp_path, {f"{i}/a.png": b""})
        for name in ("left", "right") if i < 29 else ():
            (tmp_path / f"{i}/{name}").symlink_to(f"../{i + 1}")
    source = opened(tmp_path, follow_links=follow)
    if follow:
        assert keys(source) == sorted(f"{i}/a.png" for i in range(30))
        return
    with pytest.raises(UserError, match="more than 1000 links of the source lead to this folder"):
        keys(source)


def test_what_the_user_names_may_be_a_link(tmp_path: Path) -> None:
    write(tmp_path, {"elsewhere/set/a.png": b"1", "elsewhere/b.tar": tar_bytes({"c.png": b"2"})})
    (tmp_path / "here").mkdir()
    (tmp_path / "here/set").symlink_to("../elsewhere/set")
    (tmp_path / "here/b.tar").symlink_to("../elsewhere/b.tar")
    assert contents(opened(tmp_path / "here/set")) == {"a.png": b"1"}
    assert contents(opened(tmp_path / "here/b.tar")) == {"b.tar#c.png": b"2"}
    with pytest.raises(UserError, match=r"no files but .*2 links lead out of the source: --data\.follow-links follows"):
        opened(tmp_path / "here")
    with pytest.raises(UserError, match=r"'\*/a\.png' \(1 link leads out of the source: --data\.follow-links follows"):
        opened(tmp_path / "here/*/a.png")
    assert contents(opened(tmp_path / "here/*/a.png", follow_links=True)) == {"set/a.png": b"1"}


@pytest.mark.parametrize("swapped", ["file", "folder", "pipe"])
@pytest.mark.parametrize("kind", ["directory", "parquet", "webdataset", "path"])
def test_a_link_that_is_put_in_after_the_listing_leads_nowhere(tmp_path: Path, kind: str, swapped: str) -> None:
    name, data = {
        "directory": ("x/a.png", b"secret"),
        "parquet": ("x/a.parquet", parquet_bytes(pa.table({"image": [b"secret"]}))),
        "webdataset": ("x/a.tar", tar_bytes({"a.png": b"secret"})),
        "path": ("x/a.png", b"secret"),
    }[kind]
    write(tmp_path, {f"outside/{name}": data, f"root/{name}": data})
    if kind == "path":
        table = pa.table({"image": pa.array([{"bytes": None, "path": name}], STRUCT)})
        write(tmp_path, {"root/of.parquet": parquet_bytes(table)})
    source = opened(tmp_path / "root", kind="parquet" if kind == "path" else "auto")
    rows = listed(source)
    assert list(sources.read(source, rows)) == [b"secret"]
    at = tmp_path / "root" / name
    if swapped == "folder":
        (tmp_path / "root/x").rename(tmp_path / "old")
        (tmp_path / "root/x").symlink_to("../outside/x")
    else:
        at.unlink()
        os.mkfifo(at) if swapped == "pipe" else at.symlink_to(tmp_path / "outside" / name)
    (found,) = sources.read(source, rows, sleep=never)
    assert isinstance(found, BadImage)
    assert ("not a regular file" if swapped == "pipe" else "leads out of the source") in found.detail
    following = opened(tmp_path / "root", kind=source.kind, follow_links=True) if swapped != "pipe" else None
    assert following is None or list(sources.read(following, rows)) == [b"secret"]


def test_a_folder_that_is_made_anew_while_it_is_read_is_read_anew(tmp_path: Path) -> None:
    source = opened(write(tmp_path, {"root/x/a.png": b"1", "root/x/b.png": b"2"}))
    reading = sources.read(source, listed(source), sleep=never)
    assert next(reading) == b"1"
    (tmp_path / "root/x").rename(tmp_path / "old")
    write(tmp_path, {"root/x/b.png": b"3"})
    (tmp_path / "old/b.png").unlink()
    assert next(reading) == b"3"


def test_labels_are_the_name_of_the_folder(tmp_path: Path) -> None:
    write(tmp_path / "set", {"cat/1.png": b"", "deep/dog/2.png": b"", "3.png": b""})
    table = listed(opened(tmp_path / "set", labels="parent"))
    expected = {"3.png": "set", "cat/1.png": "cat", "deep/dog/2.png": "dog"}
    assert dict(zip(table["key"].to_pylist(), table["label"].to_pylist(), strict=True)) == expected
    assert listed(opened(tmp_path / "set"))["label"].null_count == 3


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("root/**/*.png", ["a.png", "x/b.png", "x/y/c.png"]),
        ("root/*.png", ["a.png"]),
        ("root/*/*.png", ["x/b.png"]),
        ("root/x/**", ["b.png", "y/c.png"]),
        ("root/x/[ab].png", ["[ab].png"]),  # a file of that very name: a path that exists is no pattern
        ("root/z/[ab].png", ["a.png", "b.png"]),
        ("root/{a,x/b}.png", ["a.png", "x/b.png"]),
    ],
)
def test_globs(tmp_path: Path, pattern: str, expected: list[str]) -> None:
    write(tmp_path / "root", {"a.png": b"", "x/b.png": b"", "x/y/c.png": b"", ".h/d.png": b"", "e.txt": b""})
    if "[ab]" in pattern:
        write(tmp_path / "root", {"x/[ab].png": b"", "z/a.png": b"", "z/b.png": b"", "z/c.png": b""})
    source = opened(tmp_path / pattern)
    assert source.kind == "glob"
    assert keys(source) == expected


def test_a_relative_source_means_the_same_in_another_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {"set/a.png": b"1"})
    monkeypatch.chdir(tmp_path)
    source = opened("set/")
    monkeypatch.chdir("/")
    assert contents(source) == {"a.png": b"1"}


@pytest.mark.parametrize("gone", ["emptied", "removed"])
def test_a_disk_that_is_not_mounted_ends_the_run_and_quarantines_nothing(tmp_path: Path, gone: str) -> None:
    source = opened(write(tmp_path / "images", {"a.png": b"a", "b.png": b"b"}))
    rows = listed(source)
    (tmp_path / "images" / "a.png").unlink()
    assert [outcome(item) for item in sources.read(source, rows)] == [Reason.UNREADABLE, b"b"]  # one lost file is lost
    (tmp_path / "images" / "b.png").unlink()
    if gone == "removed":
        (tmp_path / "images").rmdir()
    with pytest.raises(RunError, match="nothing is there any more"):
        list(sources.read(source, rows))


def test_a_huge_file_is_refused_unread(tmp_path: Path) -> None:
    write(tmp_path, {"ok.png": b"12345678", "over.png": b"123456789", "empty.png": b""})
    with (tmp_path / "sparse.png").open("wb") as file:
        file.truncate(1 << 40)  # reading it would take hours, and more memory than there is
    assert contents(opened(tmp_path, max_image_bytes=8)) == {
        "empty.png": b"",
        "ok.png": b"12345678",
        "over.png": Reason.TOO_MANY_BYTES,
        "sparse.png": Reason.TOO_MANY_BYTES,
    }


def test_the_limit_holds_for_a_file_that_grew_after_the_listing(tmp_path: Path) -> None:
    source = opened(write(tmp_path, {"a.png": b"1", "b.png": b"1", "c.png": b"1"}), max_image_bytes=8)
    rows = listed(source)
    write(tmp_path, {"a.png": b"123456789"})
    (tmp_path / "b.png").unlink()
    os.mkfifo(tmp_path / "b.png")
    found = [outcome(item) for item in sources.read(source, rows, sleep=never)]
    assert found == [Reason.TOO_MANY_BYTES, Reason.UNREADABLE, b"1"]


def test_a_passing_error_is_retried_and_a_lasting_one_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = opened(write(tmp_path, {"a.png": b"1"}))
    rows = listed(source)
    real, failures, waits = os.open, [TimeoutError(110, "timed out")] * 2, list[float]()

    def flaky(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if str(path).endswith("a.png") and failures:
            raise failures.pop()
        return real(path, flags, *rest, **named)

    monkeypatch.setattr(os, "open", flaky)
    assert list(sources.read(source, rows, sleep=waits.append)) == [b"1"]
    assert waits == list(stores.RETRY_DELAYS_S[:2])
    failures += [TimeoutError(110, "timed out")] * 99
    with pytest.raises(RunError, match=r"a\.png.*timed out"):
        list(sources.read(source, rows, sleep=waits.append))


@pytest.mark.parametrize("change", ["content", "added", "removed", "renamed"])
@pytest.mark.parametrize("kind", ["directory", "parquet", "webdataset"])
def test_state_shows_every_change(tmp_path: Path, kind: str, change: str) -> None:
    name = {"directory": "a.png", "parquet": "a.parquet", "webdataset": "a.tar"}[kind]
    data = {
        "directory": b"1",
        "parquet": parquet_bytes(pa.table({"image": [b"1"]})),
        "webdataset": tar_bytes({"a.png": b"1"}),
    }[kind]
    write(tmp_path, {name: data, f"z{name}": data})
    source = opened(tmp_path)
    before = sources.state(source)
    assert json.loads(json.dumps(before)) == sources.state(source)
    if change == "content":  # same name, same size
        changed = os.stat(tmp_path / name).st_mtime_ns + 1
        write(tmp_path, {name: data[:-1] + b"2"})
        os.utime(tmp_path / name, ns=(changed, changed))
    elif change == "added":
        write(tmp_path, {f"new-{name}": data})
    elif change == "removed":
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).rename(tmp_path / f"y{name}")
    assert sources.state(source)["hash"] != before["hash"]


def test_identity_says_what_decides_the_listing_and_no_more(tmp_path: Path) -> None:
    write(tmp_path, {"x/a.png": b""})
    plain = sources.identity(opened(tmp_path))
    assert json.loads(json.dumps(plain)) == plain
    assert sources.identity(opened(tmp_path, max_bad_fraction=0.5)) == plain
    assert sources.identity(opened(tmp_path, labels="parent")) != plain
    assert sources.identity(opened(tmp_path / "**/*.png")) != plain


# ---- Parquet ---------------------------------------------------------------------------------------------------------

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def image_table(images: Sequence[bytes | None], form: str) -> pa.Table:
    if form == "struct":
        column = pa.array([None if i is None else {"bytes": i, "path": "x.png"} for i in images], STRUCT)
    else:
        column = pa.array(images, {"binary": pa.binary(), "large": pa.large_binary()}[form])
    n = len(images)
    return pa.table(
        {
            "image": column,
            "name": [f"n{i}" for i in range(n)],
            "class": pa.array([i % 3 for i in range(n)]),
            "score": pa.array([i / 2 for i in range(n)], pa.float32()),
        }
    )


@pytest.mark.parametrize("form", ["binary", "large", "struct"])
@pytest.mark.parametrize("batch_rows", [256, 3])
def test_parquet_reads_any_slice_across_batches_row_groups_and_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, batch_rows: int
) -> None:
    from pd_core.images.sources import parquet

    monkeypatch.setattr(parquet, "MAX_BATCH_ROWS", batch_rows)
    images = [os.urandom(i % 50) for i in range(100)]
    parts = {"b.parquet": images[:37], "a/c.parquet": images[37:38], "a/d.parquet": images[38:]}
    for name, part in parts.items():
        write(tmp_path, {name: parquet_bytes(image_table(part, form), row_group_size=10)})
    source = opened(tmp_path)
    assert source.kind == "parquet"
    rows = listed(source)
    expected = {f"{name}#{i}": data for name, part in parts.items() for i, data in enumerate(part)}
    order = [f"{name}#{i}" for name in sorted(parts) for i in range(len(parts[name]))]
    assert rows["key"].to_pylist() == order
    for start, length in [(0, 100), (0, 1), (55, 20), (62, 2), (69, 11), (99, 1)]:
        found = list(sources.read(source, rows.slice(start, length), sleep=never))
        assert found == [expected[key] for key in order[start : start + length]]


def test_parquet_rows_are_read_in_whatever_order_they_are_asked_for(tmp_path: Path) -> None:
    """A listing that was updated names those that are read again after the others."""
    images = [str(i).encode() for i in range(30)]
    write(tmp_path, {"a.parquet": parquet_bytes(pa.table({"image": images}), row_group_size=10)})
    source = opened(tmp_path)
    order = [0, 4, 12, 29, 3, 11]
    rows = listed(source).take(pa.array(order))
    assert list(sources.read(source, rows)) == [images[i] for i in order]


def test_parquet_keys_labels_and_metadata_go_with_their_image(tmp_path: Path) -> None:
    table = image_table([b"0", b"1", b"2", b"3"], "binary")
    write(tmp_path, {"a.parquet": parquet_bytes(table.slice(0, 2)), "b.parquet": parquet_bytes(table.slice(2))})
    rows = listed(opened(tmp_path / "*.parquet", key_column="name", labels="column:class"))
    assert rows["key"].to_pylist() == ["n0", "n1", "n2", "n3"]
    assert rows["label"].to_pylist() == ["0", "1", "2", "0"]
    assert rows["metadata"].to_pylist() == [{"score": i / 2} for i in range(4)]
    assert listed(opened(tmp_path, metadata_columns=[])).schema == schemas.listing(None)
    chosen = listed(opened(tmp_path / "b.parquet", metadata_columns=["class", "name"]))
    assert chosen["key"].to_pylist() == ["b.parquet#0", "b.parquet#1"]
    assert chosen["metadata"].to_pylist() == [{"class": 2, "name": "n2"}, {"class": 0, "name": "n3"}]


def test_parquet_dictionaries_become_their_values(tmp_path: Path) -> None:
    words = pa.array(["x", None, "x"]).dictionary_encode()
    table = pa.table({"image": [b"0", b"1", b"2"], "label": words, "word": words})
    rows = listed(opened(write(tmp_path, {"a.parquet": parquet_bytes(table)}), labels="column:label"))
    assert rows["label"].to_pylist() == ["x", None, "x"]
    assert rows["metadata"].to_pylist() == [{"word": "x"}, {"word": None}, {"word": "x"}]


def test_parquet_null_oversized_and_external_images(tmp_path: Path) -> None:
    values = [
        {"bytes": b"in", "path": "ignored.png"},
        None,
        {"bytes": None, "path": None},
        {"bytes": None, "path": "img/a.png"},
        {"bytes": None, "path": "../up.png"},  # leaves the folder of the Parquet file, not the source
        {"bytes": None, "path": "../../secret"},
        {"bytes": None, "path": str(tmp_path / "secret")},
        {"bytes": None, "path": "img/missing.png"},
        {"bytes": b"123456789", "path": None},
        {"bytes": b"", "path": None},
    ]
    table = pa.table({"image": pa.array(values, STRUCT)})
    write(tmp_path, {"root/d/a.parquet": parquet_bytes(table), "root/d/img/a.png": b"out", "root/up.png": b"up"})
    write(tmp_path, {"secret": b"no"})
    with pytest.raises(UserError, match=r"several kinds.*--data\.kind"):
        opened(tmp_path / "root")
    found = contents(opened(tmp_path / "root", kind="parquet", max_image_bytes=8))
    lost, big = Reason.UNREADABLE, Reason.TOO_MANY_BYTES
    assert list(found.values()) == [b"in", Reason.EMPTY, Reason.EMPTY, b"out", b"up", lost, lost, lost, big, b""]


@pytest.mark.parametrize("form", ["binary", "struct"])
def test_a_corrupt_row_group_loses_its_own_rows_only(tmp_path: Path, form: str) -> None:
    images = [os.urandom(200) for _ in range(30)]
    data = bytearray(parquet_bytes(image_table(images, form), row_group_size=10, compression="zstd"))
    chunk = pq.ParquetFile(io.BytesIO(data)).metadata.row_group(1).column(0)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    data[start : start + chunk.total_compressed_size] = bytes(chunk.total_compressed_size)
    source = opened(write(tmp_path, {"a.parquet": bytes(data)}))
    found = list(contents(source).values())
    assert found == [*images[:10], *[Reason.UNREADABLE] * 10, *images[20:]]


def test_a_flipped_bit_is_found_where_pages_have_checksums(tmp_path: Path) -> None:
    images = [bytes([i]) * 500 for i in range(4)]
    table = pa.table({"image": images})
    plain = {"compression": "none", "use_dictionary": False, "write_statistics": False}  # each image is there once
    data = bytearray(parquet_bytes(table, row_group_size=2, write_page_checksum=True, **plain))
    data[data.index(images[2]) + 7] ^= 1
    found = list(contents(opened(write(tmp_path, {"a.parquet": bytes(data)}))).values())
    assert found == [*images[:2], Reason.UNREADABLE, Reason.UNREADABLE]


def test_parquet_that_shrank_or_went_after_the_listing(tmp_path: Path) -> None:
    write(tmp_path, {"a.parquet": parquet_bytes(image_table([b"0", b"1"], "binary"))})
    write(tmp_path, {"b.parquet": parquet_bytes(image_table([b"2"], "binary"))})
    source = opened(tmp_path)
    rows = listed(source)
    write(tmp_path, {"a.parquet": parquet_bytes(image_table([b"0"], "binary"))})
    (tmp_path / "b.parquet").unlink()
    found = [outcome(item) for item in sources.read(source, rows, sleep=never)]
    assert found == [b"0", Reason.UNREADABLE, Reason.UNREADABLE]


# ---- WebDataset ------------------------------------------------------------------------------------------------------

LONG = "d/" * 60 + "é" * 60 + ".png"


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_members_are_read_as_tarfile_reads_them(tmp_path: Path, form: int) -> None:
    members = {f"s/{i:03d}.{'JPG' if i % 2 else 'png'}": os.urandom(i * 37) for i in range(30)}
    members |= {f"s/{i:03d}.cls": f"{i % 4}\n".encode() for i in range(29)}  # behind all images: still their samples'
    if form != tarfile.USTAR_FORMAT:
        members[LONG] = b"long"
    write(tmp_path, {"one.tar": tar_bytes(members, form), "sub/two.tar": tar_bytes({"a.png": b"2"}, form)})
    source = opened(tmp_path, labels="member:cls")
    assert source.kind == "webdataset"
    expected = {}
    for path in sorted(tmp_path.rglob("*.tar")):
        with tarfile.open(path) as archive:
            for info in archive:
                if info.name.lower().endswith(("png", "jpg")):
                    file = archive.extractfile(info)
                    assert file is not None
                    expected[f"{path.relative_to(tmp_path)}#{info.name}"] = file.read()
    rows = listed(source)
    assert rows["key"].to_pylist() == list(expected)
    labels = dict(zip(rows["key"].to_pylist(), rows["label"].to_pylist(), strict=True))
    assert labels["one.tar#s/006.png"] == "2"
    assert labels["one.tar#s/029.JPG"] is None
    for start, length in [(0, len(expected)), (3, 9), (len(expected) - 2, 2)]:
        found = list(sources.read(source, rows.slice(start, length), sleep=never))
        assert found == list(expected.values())[start : start + length]


def test_tar_samples_with_several_images_and_metadata(tmp_path: Path) -> None:
    first = {"a.rgb.png": b"1", "a.seg.png": b"2", "a.json": b'{"x": 1}', "a.txt": b"caption", "a.npy": b"\xff\xfe"}
    second = {"b.png": b"3", "b.txt": b"other", "b.late": b"new", ".hidden.png": b"4"}
    source = opened(write(tmp_path, {"0.tar": tar_bytes(first), "1.tar": tar_bytes(second)}))
    skipped: Counter[str] = Counter()
    rows = pa.concat_tables(sources.list_images(source, skipped))
    assert rows["key"].to_pylist() == ["0.tar#a.rgb.png", "0.tar#a.seg.png", "1.tar#b.png"]
    a = {"json": '{"x": 1}', "txt": "caption", "other_members": None}
    assert rows["metadata"].to_pylist() == [a, a, {"json": None, "txt": "other", "other_members": '{"late": "new"}'}]
    assert skipped == {".npy (in a tar)": 1, stores.HIDDEN: 1}


@pytest.mark.parametrize("break_at", ["data", "header", "no marker", "zeroed", "nothing", "not a tar"])
def test_a_broken_tar_gives_what_lies_before_the_break_and_one_row_for_the_rest(tmp_path: Path, break_at: str) -> None:
    members = {f"{i}.png": bytes([i]) * 700 for i in range(6)}
    whole = tar_bytes(members, tarfile.USTAR_FORMAT)
    size = 512 + 1024  # header and two data blocks of each member
    broken, kept = {
        "data": (whole[: 3 * size + 512 + 100], 3),
        "header": (whole[: 3 * size + 100], 3),
        "no marker": (whole[: 6 * size], 6),
        "zeroed": (whole[: 4 * size] + b"\xaa" * size + whole[5 * size :], 4),
        "nothing": (b"", 0),
        "not a tar": (b"x" * 2000, 0),
    }[break_at]
    source = opened(write(tmp_path, {"0.tar": tar_bytes({"a.png": b"1"}), "1.tar": broken, "2.tar": whole}))
    found = contents(source)
    expected: dict[str, bytes | Reason] = {"0.tar#a.png": b"1"}
    expected |= {f"1.tar#{name}": data for name, data in list(members.items())[:kept]}
    expected[f"1.tar#{kept * size}"] = Reason.UNREADABLE
    expected |= {f"2.tar#{name}": data for name, data in members.items()}
    assert found == expected


def tar_header(name: bytes, size: bytes, kind: bytes = b"0", map_goes_on: bool = False) -> bytes:
    """A header block that says what it is told to; its check sum is right."""
    block = bytearray(512)
    block[:100] = name.ljust(100, b"\0")
    block[100:124] = b"0000644\0" + b"0000000\0" * 2
    block[124:136] = size.ljust(12, b"\0")
    block[136:157] = b"00000000000\0" + b" " * 8 + kind
    block[257:265] = b"ustar\x0000"
    block[482] = map_goes_on
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def octal(number: int) -> bytes:
    return b"%011o" % number


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def pax(*records: bytes, kind: bytes = b"x") -> bytes:
    """A pax header of the records, whose lengths are counted: `KEYWORD=VALUE`."""
    lines = [
        next(b"%d %s\n" % (n, r) for n in range(len(r) + 3, len(r) + 9) if n == len(str(n)) + len(r) + 2)
        for r in records
    ]
    return tar_header(b"pax", octal(len(b"".join(lines))), kind) + padded(b"".join(lines))


IMAGE = tar_header(b"x.png", octal(3)) + padded(b"abc")
NEGATIVE = b"\xff" + (-512).to_bytes(11, "big", signed=True)
HUGE = b"\x80" + (1 << 70).to_bytes(11, "big")

BREAKS = {
    "a size that leads back": tar_header(b"x.png", NEGATIVE) + padded(b"abc"),
    "a folder of negative size": tar_header(b"x/", NEGATIVE, b"5"),
    "a size beyond all numbers": tar_header(b"x.png", HUGE) + padded(b"abc"),
    "a size beyond the end": tar_header(b"x.png", octal(1 << 30)) + padded(b"abc"),
    "a special file of a size beyond the end": tar_header(b"x", octal(1 << 30), b"V") + padded(b"abc"),
    "a chain of headers": pax(b"comment=x") * 400 + IMAGE,
    "a chain of long names": (tar_header(b"l", octal(6), b"L") + padded(b"a.png")) * 400 + IMAGE,
    "a chain of global headers": pax(b"comment=x", kind=b"g") * 400 + IMAGE,
    "a long name of gigabytes": tar_header(b"l", octal(1 << 32), b"L") + IMAGE,
    "a long name of more than a header may have": tar_header(b"l", octal(2 << 20), b"L") + bytes(2 << 20) + IMAGE,
    "a header of negative size": tar_header(b"l", NEGATIVE, b"x") + IMAGE,
    "a record of gigabytes": tar_header(b"p", octal(30), b"x") + padded(b"9999999999 path=x.png\n") + IMAGE,
    "a record whose length is a long number": tar_header(b"p", octal(1 << 20), b"x") + b"1" * (1 << 20) + IMAGE,
    "a record whose length is too short": tar_header(b"p", octal(12), b"x") + padded(b"3 path=x.png\n") + IMAGE,
    "a record that says a negative size": pax(b"size=-512") + IMAGE,
    "a record that says a huge size": pax(b"size=99999999999999999999") + IMAGE,
    "a record that says a text for a size": pax(b"size=many") + IMAGE,
    "a record that says a size beyond the end": pax(b"size=1073741824") + IMAGE,
    "a map of holes without an end": tar_header(b"x.png", octal(3), b"S", True) + (bytes(504) + b"\1" + bytes(7)) * 40,
    "a header before the end marker": pax(b"comment=x") + bytes(1024),
}


@pytest.mark.timeout(30)
@pytest.mark.parametrize("kind", BREAKS)
def test_a_hostile_member_breaks_its_tar_there_and_nothing_hangs(tmp_path: Path, kind: str) -> None:
    before = tar_bytes({"a.png": b"1", "b.png": b"2"}, tarfile.USTAR_FORMAT)[: 4 * 512]
    write(tmp_path, {"0.tar": before + BREAKS[kind], "1.tar": tar_bytes({"c.png": b"3"})})
    found = contents(opened(tmp_path))
    assert found == {"0.tar#a.png": b"1", "0.tar#b.png": b"2", "0.tar#2048": Reason.UNREADABLE, "1.tar#c.png": b"3"}


def test_the_byte_at_which_a_tar_breaks_is_told(tmp_path: Path) -> None:
    source = opened(write(tmp_path, {"0.tar": IMAGE + BREAKS["a size that leads back"]}))
    rows = listed(source)
    broken = list(sources.read(source, rows))[1]
    assert rows["key"].to_pylist()[1] == "0.tar#1024"
    assert isinstance(broken, BadImage)
    assert "at byte 1024, images before that: 1; all behind it counts as one bad image" in broken.detail
    write(tmp_path, {"0.tar": BREAKS["a size that leads back"]})
    with pytest.raises(UserError, match=r"no image members in 1 tars \(0\.tar is broken at byte 0\)"):
        opened(tmp_path)


def test_names_in_a_tar_are_keys_and_nothing_else(tmp_path: Path) -> None:
    secret = write(tmp_path, {"secret.png": b"no"}) / "secret.png"
    odd = [str(secret), "../secret.png", "a/../../secret.png", "bell\x07\x1b[2J.png", "null\0.png", "\u202egnp.png"]
    members = b"".join(pax(b"path=" + name.encode()) + IMAGE for name in odd)
    source = opened(write(tmp_path / "in", {"0.tar": members + bytes(1024)}))
    assert contents(source) == {f"0.tar#{name}": b"abc" for name in odd}


def test_files_with_holes_and_links_in_a_tar_are_left_out_and_what_follows_is_read(tmp_path: Path) -> None:
    whole = tar_header(b"holes.png", octal(3), b"S", True) + bytes(512) + padded(b"abc")
    whole += pax(b"GNU.sparse.major=1", b"GNU.sparse.minor=0") + tar_header(b"holes2.png", octal(3)) + padded(b"0\n")
    whole += tar_header(b"link.png", octal(9), b"2") + pax(b"path=" + b"l" * 5000 + b".png") + IMAGE
    skipped: Counter[str] = Counter()
    source = opened(write(tmp_path, {"0.tar": whole + IMAGE + bytes(1024)}))
    (table,) = sources.list_images(source, skipped)
    assert table["key"].to_pylist() == ["0.tar#x.png"]
    assert skipped == {"(link or special file in a tar)": 3, "(name of more than 4096 characters in a tar)": 1}
    assert list(contents(source).values()) == [b"abc"]


def test_texts_of_a_tar_are_bounded(tmp_path: Path) -> None:
    """A sample of many images with many texts repeats each of them: 40 MB of tar would be 100 GB of listing."""
    texts = {f"a.t{i}": b"x" * 1000 for i in range(300)}
    images = {f"a.{i}.png": b"" for i in range(2000)}
    skipped: Counter[str] = Counter()
    source = opened(write(tmp_path, {"0.tar": tar_bytes({"a.png": b""} | texts | images, tarfile.USTAR_FORMAT)}))
    rows = pa.concat_tables(sources.list_images(source, skipped))
    kept = 262  # of 1,000 bytes, in 256 KiB
    carrying = 96  # 64 times what is held, each text with its header
    assert rows.num_rows == 2001
    assert skipped == {
        "(text beyond the limits of a sample or a tar)": 300 - kept,
        "(texts of images beyond the limit, in a tar)": 2001 - carrying,
    }
    assert rows.nbytes < 64 * kept * 1512 * 1.2


def test_headings_of_what_is_left_out_are_bounded_and_can_be_written(tmp_path: Path) -> None:
    members = {"a.png": b"1"} | {f"a.{i}x": b"\xff" for i in range(1500)}
    skipped: Counter[str] = Counter()
    data = tar_header(b"a.\xff\xfe", octal(1)) + padded(b"\xff") + tar_bytes(members, tarfile.USTAR_FORMAT)
    list(sources.list_images(opened(write(tmp_path, {"0.tar": data})), skipped))
    assert len(skipped) == names.MAX_HEADINGS + 1
    assert skipped.total() == 1501
    json.dumps(skipped, ensure_ascii=False).encode()


@given(st.binary(max_size=600), st.integers(0, 3 * 512))
@example(b"BZh", 0)
def test_no_noise_in_a_tar_raises(noise: bytes, at: int) -> None:
    whole = tar_bytes({"a.png": b"1", LONG: b"2"})
    damaged = whole[:at] + noise + whole[at + len(noise) :]
    try:
        scanned = webdataset.scan(io.BytesIO(damaged), "x")
    except UserError as error:  # noise that begins as a compressed file does
        assert not at and "a compressed tar cannot be read at random" in str(error)
        return
    assert all(start + size <= len(damaged) for _, start, size in scanned.images)


def test_tar_limit_and_a_tar_cut_after_the_listing(tmp_path: Path) -> None:
    path = write(tmp_path, {"0.tar": tar_bytes({"a.png": b"12345678", "b.png": b"123456789", "c.png": b"1"})}) / "0.tar"
    source = opened(path, max_image_bytes=8)
    rows = listed(source)
    os.truncate(path, rows["offset"][2].as_py())
    found = [outcome(item) for item in sources.read(source, rows, sleep=never)]
    assert found == [b"12345678", Reason.TOO_MANY_BYTES, Reason.UNREADABLE]


def test_brace_patterns_name_shards_and_none_may_be_missing(tmp_path: Path) -> None:
    write(tmp_path, {f"s-{i:03d}.tar": tar_bytes({f"{i}.png": b""}) for i in (8, 9, 10, 12)})
    assert keys(opened(tmp_path / "s-{008..010}.tar")) == ["s-008.tar#8.png", "s-009.tar#9.png", "s-010.tar#10.png"]
    with pytest.raises(UserError, match=r"1 of the 5 files.*s-011\.tar"):
        opened(tmp_path / "s-{008..012}.tar")


# ---- the user's mistakes ---------------------------------------------------------------------------------------------


def _mistakes_folder(root: Path) -> None:
    table = image_table([b"0"], "binary")
    write(root, {"images/a.png": b"", "images/b/c.png": b"", "text/readme.txt": b"", "hidden/.a.png": b""})
    (root / "nothing").mkdir()
    write(root, {"pq/a.parquet": parquet_bytes(table), "norows/a.parquet": parquet_bytes(table.slice(0, 0))})
    write(root, {"notpq/a.parquet": b"PAR1 no", "mixed/a.png": b"", "mixed/a.tar": tar_bytes({"a.png": b""})})
    write(root, {"tar/a.tar": tar_bytes({"a.png": b"", "a.cls": b"1"}), "noimg/a.tar": tar_bytes({"a.txt": b""})})
    write(root, {"gz/a.tar.gz": b"\x1f\x8b", "fakegz/a.tar": gzip.compress(tar_bytes({"a.png": b""}))})
    write(root, {"odd/a.parquet": parquet_bytes(pa.table({"image": [[1]], "list": [[1]]}))})
    write(root, {"odd2/a.parquet": parquet_bytes(pa.table({"image": [b"1"], "list": [[1]]}))})


@pytest.mark.parametrize(
    ("source", "values", "message"),
    [
        (None, {}, "data.source: not set"),
        ("absent", {}, "absent: no such file or directory"),
        ("absent/*.png", {}, "absent is no directory"),
        ("nothing", {}, "nothing: no files"),
        ("hidden", {}, r"no files but those left out: \(hidden\) \(1\)"),
        ("text", {}, r"no images but those left out: \.txt \(1\)"),
        ("images/*.jpg", {}, r"match nothing.*'\*\.jpg'"),
        ("images/**.png", {}, r"'\*\*\.png' is not a pattern"),
        ("images/{0..999999}.png", {}, "more than 100000 files"),
        ("mixed", {}, r"several kinds: \.png \(1\), \.tar \(1\)"),
        ("gz", {}, "compressed tars cannot be read at random"),
        ("fakegz", {}, "compressed tar cannot be read at random"),
        ("noimg", {}, "no image members in 1 tars"),
        ("norows", {}, "no rows"),
        ("notpq", {}, r"a\.parquet: not a readable Parquet file"),
        ("gcs://bucket/x", {}, "only local paths and s3:// are read"),
        ("s3://buck*/x.png", {}, "bucket must be named in full"),
        ("images", {"kind": "parquet"}, r"no Parquet files but those left out: \.png \(2\)"),
        ("images", {"kind": "webdataset"}, r"no \.tar files"),
        ("images", {"kind": "glob"}, "a directory, but data.kind is glob"),
        ("images/*.png", {"kind": "directory"}, "not a directory, but data.kind is directory"),
        ("images", {"labels": "column:x"}, "'column:x' does not fit a directory source; use parent or none"),
        ("images", {"labels": "member:cls"}, "does not fit a directory source"),
        ("pq", {"labels": "parent"}, "does not fit a parquet source; use column:NAME"),
        ("tar", {"labels": "parent"}, "does not fit a webdataset source; use member:EXT"),
        ("tar", {"labels": "member:clss"}, "no text member 'clss'; did you mean 'cls'"),
        ("images", {"key_column": "name"}, "data.key_column: only for Parquet"),
        ("images", {"image_column": "x"}, "data.image_column: only for Parquet"),
        ("tar", {"metadata_columns": ["x"]}, "data.metadata_columns: only for Parquet"),
        ("pq", {"image_column": "imag"}, "no column 'imag'; did you mean 'image'"),
        ("pq", {"image_column": "score"}, "'score' is float, expected bytes or struct"),
        ("pq", {"key_column": "nam"}, "data.key_column: .*no column 'nam'; did you mean 'name'"),
        ("pq", {"labels": "column:clas"}, "data.labels: .*did you mean 'class'"),
        ("pq", {"metadata_columns": ["scor"]}, "data.metadata_columns: .*did you mean 'score'"),
        ("pq", {"metadata_columns": ["image"]}, "is the image column; leave it out"),
        ("odd", {}, r"'image' is list<.*>, expected bytes"),
        ("odd2", {"labels": "column:list"}, "data.labels: column 'list' is list<.*no text form"),
    ],
)
def test_mistakes_are_told_in_one_line(
    tmp_path: Path, source: str | None, values: dict[str, Any], message: str
) -> None:
    _mistakes_folder(tmp_path)
    where = source if source is None or "://" in source else str(tmp_path / source)
    with pytest.raises(UserError, match=message) as caught:
        sources.open_source(DataSettings(source=where, **values))
    assert "\n" not in str(caught.value)


def test_a_folder_that_may_not_be_read_stops_the_listing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = opened(write(tmp_path, {"d/a.png": b"", "e/a.png": b""}))
    real = os.open

    def closed(path: Any, *rest: Any, **named: Any) -> Any:
        if str(path).endswith("/e"):
            raise PermissionError(13, "Permission denied", path)
        return real(path, *rest, **named)

    monkeypatch.setattr(os, "open", closed)
    with pytest.raises(UserError, match="permission denied"):
        list(sources.list_images(source))


@pytest.mark.parametrize(
    ("second", "values", "message"),
    [
        ({"image": [b"1"], "n": ["x"]}, {}, r"b\.parquet: column 'n' is string but int64 in the first file"),
        ({"image": [b"1"]}, {}, r"b\.parquet: column 'n' is missing but int64"),
        ({"image": [b"1"], "n": [2]}, {"key_column": "n"}, None),
        (
            {"image": [b"1", b"2"], "n": pa.array([2, None])},
            {"key_column": "n"},
            r"'n' is null in b\.parquet row 1",
        ),
    ],
)
def test_parquet_files_must_agree_and_have_keys(
    tmp_path: Path, second: dict[str, Any], values: dict[str, Any], message: str | None
) -> None:
    write(tmp_path, {"a.parquet": parquet_bytes(pa.table({"image": [b"0"], "n": [1]}))})
    write(tmp_path, {"b.parquet": parquet_bytes(pa.table(second))})
    source = opened(tmp_path, **values)
    if message is None:
        assert keys(source) == ["1", "2"]
        return
    with pytest.raises(UserError, match=message):
        listed(source)


def test_a_corrupt_label_column_is_not_a_null_label(tmp_path: Path) -> None:
    table = pa.table({"image": [b"0"] * 100, "label": [f"label {i}" for i in range(100)]})
    data = bytearray(parquet_bytes(table, use_dictionary=False))
    chunk = pq.ParquetFile(io.BytesIO(data)).metadata.row_group(0).column(1)
    data[chunk.data_page_offset : chunk.data_page_offset + chunk.total_compressed_size] = bytes(
        chunk.total_compressed_size
    )
    source = opened(write(tmp_path, {"a.parquet": bytes(data)}), labels="column:label")
    with pytest.raises(UserError, match=r"a\.parquet: a key, label or metadata column is corrupt"):
        listed(source)


# ---- S3 --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """A prefix of its own in a bucket that the tests share: a new bucket costs a second."""

    server: S3Server
    bucket: str
    prefix: str

    @property
    def uri(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}"

    def put(self, name: str, data: bytes) -> None:
        self.server.put(self.bucket, f"{self.prefix}/{name}", data)

    def delete(self, name: str) -> None:
        self.server.delete(self.bucket, f"{self.prefix}/{name}")


@pytest.fixture(scope="module")
def shared_bucket(s3_server: S3Server) -> str:
    return s3_server.make_bucket()


@pytest.fixture
def place(s3_environment: S3Server, shared_bucket: str) -> Place:
    return Place(s3_environment, shared_bucket, uuid.uuid4().hex)


def test_s3_directory_with_odd_names(place: Place) -> None:
    files = {
        name: b"content of " + name.encode() for name in [*ODD_NAMES, "empty.png", *(f"a/b/{n}" for n in ODD_NAMES)]
    }
    files["empty.png"] = b""
    for name, data in files.items():
        place.put(f"set [1]/{name}", data)
    for name in ("set [1]/labels.json", "set [1]/.hidden.png", "set [1]/.h/x.png", "set [1]x/other.png", "above.png"):
        place.put(name, b"x")
    source = opened(f"{place.uri}/set [1]/")
    assert source.kind == "directory"
    assert contents(source) == files
    assert keys(source) == sorted(files, key=str.encode)
    skipped: Counter[str] = Counter()
    list(sources.list_images(source, skipped))
    assert skipped == {".json": 1, stores.HIDDEN: 2}
    rows = listed(source)
    for start, length in [(0, 1), (5, 11)]:
        found = list(sources.read(source, rows.slice(start, length), sleep=never))
        assert found == [files[key] for key in rows["key"].to_pylist()[start : start + length]]


def test_s3_listing_of_many_pages_and_globs(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(50):
        place.put(f"{i % 3}/{i:02d}.png", b"")
    monkeypatch.setattr(stores, "PAGE_KEYS", 7)
    source = opened(place.uri, labels="parent")
    rows = listed(source)
    assert rows["key"].to_pylist() == sorted(f"{i % 3}/{i:02d}.png" for i in range(50))
    assert rows["label"].to_pylist() == [key[0] for key in rows["key"].to_pylist()]
    assert keys(opened(f"{place.uri}/*/0[0-4].png")) == ["0/00.png", "0/03.png", "1/01.png", "1/04.png", "2/02.png"]
    assert keys(opened(f"{place.uri}/1/*.png")) == [f"{i:02d}.png" for i in range(1, 50, 3)]
    assert sources.state(source)["files"] == 50


def test_s3_whole_bucket(s3_environment: S3Server) -> None:
    bucket = s3_environment.make_bucket()
    with pytest.raises(UserError, match="no files"):
        opened(f"s3://{bucket}")
    s3_environment.put(bucket, "a.png", b"1")
    s3_environment.put(bucket, "b/a.png", b"2")
    assert contents(opened(f"s3://{bucket}/")) == {"a.png": b"1", "b/a.png": b"2"}
    assert listed(opened(f"s3://{bucket}", labels="parent"))["label"].to_pylist() == [bucket, "b"]


def test_s3_limits_deletions_and_changes_after_the_listing(place: Place) -> None:
    for name, data in {"ok": b"12345678", "over": b"123456789", "grown": b"1", "gone": b"1", "new": b"1"}.items():
        place.put(f"{name}.png", data)
    source = opened(f"{place.uri}", max_image_bytes=8)
    rows = listed(source)
    before = sources.state(source)
    place.put("grown.png", b"123456789")
    place.put("new.png", b"2")  # same name, same size
    place.delete("gone.png")
    found = [outcome(item) for item in sources.read(source, rows, sleep=never)]
    too_big = Reason.TOO_MANY_BYTES
    expected = {"ok": b"12345678", "over": too_big, "grown": too_big, "gone": Reason.UNREADABLE, "new": b"2"}
    assert found == [expected[key.removesuffix(".png")] for key in rows["key"].to_pylist()]
    assert sources.state(source)["hash"] != before["hash"]


def test_s3_tars(place: Place) -> None:
    # larger than the read-ahead and than a merged request, so that both are crossed
    members = {f"{i:03d}.png": os.urandom(300_000) for i in range(40)} | {"000.cls": b"7"}
    whole = tar_bytes(members)
    place.put("shards/s-0.tar", whole)
    place.put("shards/s-1.tar", whole[:2_000_000])
    place.put("shards/s-2.tar", tar_bytes({"z.png": b"", "y.png": b"1"}))
    source = opened(f"{place.uri}/shards/s-{{0..2}}.tar", labels="member:cls")
    found = contents(source)
    images = {name: data for name, data in members.items() if name.endswith("png")}
    assert {k.removeprefix("s-0.tar#"): v for k, v in found.items() if k.startswith("s-0")} == images
    cut = {k: v for k, v in found.items() if k.startswith("s-1")}
    assert list(cut.values()) == [*list(images.values())[:6], Reason.UNREADABLE]
    assert {k: v for k, v in found.items() if k.startswith("s-2")} == {"s-2.tar#z.png": b"", "s-2.tar#y.png": b"1"}
    rows = listed(source)
    assert rows["label"].to_pylist()[:2] == ["7", None]
    place.delete("shards/s-2.tar")
    lost = [outcome(item) for item in sources.read(source, rows.slice(rows.num_rows - 2), sleep=never)]
    assert lost == [Reason.UNREADABLE] * 2


def test_s3_parquet(place: Place) -> None:
    images = [os.urandom(20_000) for _ in range(300)]
    table = image_table(images, "struct")
    place.put("pq/a.parquet", parquet_bytes(table.slice(0, 250), row_group_size=100))
    place.put("pq/b.parquet", parquet_bytes(table.slice(250)))
    source = opened(f"{place.uri}/pq", labels="column:class")
    rows = listed(source)
    assert rows["key"].to_pylist()[249:251] == ["a.parquet#249", "b.parquet#0"]
    assert rows["label"].to_pylist() == [str(i % 3) for i in range(300)]
    assert list(sources.read(source, rows)) == images
    assert list(sources.read(source, rows.slice(190, 100))) == images[190:290]
    place.delete("pq/b.parquet")
    found = [outcome(item) for item in sources.read(source, rows.slice(249, 3), sleep=never)]
    assert found == [images[249], Reason.UNREADABLE, Reason.UNREADABLE]


@pytest.mark.parametrize(
    ("uri", "environment", "message"),
    [
        ("s3://no-such-bucket-here/x", {}, "not found; check the path or bucket name"),
        ("{place.uri}/absent", {}, "no such file or directory"),
        ("{place.uri}/absent/*.png", {}, "absent is no directory"),
        ("{place.uri}", {"AWS_ACCESS_KEY_ID": "wrong"}, "does not accept these credentials"),
        ("{place.uri}", {"AWS_SECRET_ACCESS_KEY": "wrong"}, "does not accept these credentials"),
    ],
)
def test_s3_mistakes_are_told_in_one_line(
    place: Place,
    monkeypatch: pytest.MonkeyPatch,
    uri: str,
    environment: dict[str, str],
    message: str,
) -> None:

    place.put("a.png", b"1")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    S3FileSystem.clear_instance_cache()
    with pytest.raises(UserError, match=message) as caught:
        opened(uri.format(place=place))
    assert "\n" not in str(caught.value)
    for secret in place.server.env["AWS_ACCESS_KEY_ID"], place.server.env["AWS_SECRET_ACCESS_KEY"]:
        assert secret not in str(caught.value)


def _s3_error(code: str, kind: type[OSError] = OSError) -> OSError:
    from botocore.exceptions import ClientError

    error = kind(5, code)
    error.__cause__ = ClientError({"Error": {"Code": code, "Message": code}}, "GetObject")
    return error


@pytest.mark.parametrize(
    ("error", "times", "expected"),
    [
        (_s3_error("SlowDown"), 2, b"1"),
        (TimeoutError("timed out"), 3, b"1"),
        (_s3_error("AccessDenied", PermissionError), 99, Reason.UNREADABLE),
        (_s3_error("NoSuchKey", FileNotFoundError), 99, Reason.UNREADABLE),
        (_s3_error("SlowDown"), 99, "RunError: .*throttles"),
        (_s3_error("ExpiredToken", PermissionError), 99, "UserError: .*expired"),
        (_s3_error("NoSuchBucket", FileNotFoundError), 99, "UserError: .*not found"),
        (ConnectionResetError("reset"), 99, "RunError: .*reset"),
    ],
)
def test_s3_errors_of_one_object_are_told_from_those_of_the_store(
    place: Place, monkeypatch: pytest.MonkeyPatch, error: OSError, times: int, expected: Any
) -> None:
    place.put("a.png", b"1")
    place.put("b.png", b"2")
    source = opened(f"{place.uri}")
    rows = listed(source)
    state = SimpleNamespace(left=times, waits=[])
    real = stores.S3.get

    async def failing(self: stores.S3, request: Any) -> bytes:
        if request.name == "a.png" and state.left:
            state.left -= 1
            raise error
        return await real(self, request)

    monkeypatch.setattr(stores.S3, "get", failing)
    if not isinstance(expected, bytes | Reason):
        kind, _, message = expected.partition(": ")
        with pytest.raises((RunError, UserError), match=message) as caught:
            list(sources.read(source, rows, sleep=state.waits.append))
        assert type(caught.value).__name__ == kind
    else:
        found = [outcome(item) for item in sources.read(source, rows, sleep=state.waits.append)]
        assert found == [expected, b"2"]
    assert tuple(state.waits) == stores.RETRY_DELAYS_S[: len(state.waits)]
    assert len(state.waits) == (0 if isinstance(error, FileNotFoundError | PermissionError) else min(times, 3))


@pytest.mark.parametrize("code", ["SlowDown", "ExpiredToken"])
def test_a_store_that_fails_while_a_tar_is_listed_breaks_no_tar(
    place: Place, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    place.put("a.tar", tar_bytes({"a.png": bytes(3 << 20), "b.png": b"2"}))  # the second header is of another request
    source = opened(place.uri)
    real = stores.S3.get

    async def failing(self: stores.S3, request: Any) -> bytes:
        if request.start:
            raise _s3_error(code, OSError if code == "SlowDown" else PermissionError)
        return await real(self, request)

    monkeypatch.setattr(stores.S3, "get", failing)
    monkeypatch.setattr(stores, "RETRY_DELAYS_S", ())
    with pytest.raises(RunError if code == "SlowDown" else UserError, match=r"a\.tar"):
        listed(source)


@pytest.mark.parametrize("code", ["SlowDown", "ExpiredToken", "AccessDenied"])
@pytest.mark.parametrize("at", ["open", "data"])
def test_s3_parquet_rows_are_lost_only_with_their_file(
    place: Place, monkeypatch: pytest.MonkeyPatch, code: str, at: str
) -> None:
    place.put("a.parquet", parquet_bytes(image_table([b"1", b"2"], "binary")))
    source = opened(place.uri)
    rows = listed(source)

    async def failing(*_: Any) -> bytes:
        raise _s3_error(code, OSError if code == "SlowDown" else PermissionError)

    monkeypatch.setattr(stores.S3, "_size" if at == "open" else "get", failing)
    if code == "AccessDenied":
        found = [outcome(item) for item in sources.read(source, rows, sleep=never)]
        assert found == [Reason.UNREADABLE] * 2
        return
    waits: list[float] = []
    with pytest.raises(RunError if code == "SlowDown" else UserError, match=r"a\.parquet"):
        list(sources.read(source, rows, sleep=waits.append))
    assert waits == (list(stores.RETRY_DELAYS_S) if code == "SlowDown" else [])


def test_a_stale_mount_does_not_quarantine_parquet_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = opened(write(tmp_path, {"a.parquet": parquet_bytes(image_table([b"1"], "binary"))}))
    rows = listed(source)

    def stale(*_: Any, **named: Any) -> Any:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(os, "open", stale)
    with pytest.raises(RunError, match=r"a\.parquet: .*Stale"):
        list(sources.read(source, rows, sleep=lambda _: None))
