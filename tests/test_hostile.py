"""Files of strangers run no code and lead nowhere: Parquet that unpickles, records that name files outside, links.

Each case is built here. What a payload would make, or a name would reach, is looked for afterwards, whatever was said.
"""

from __future__ import annotations

import base64
import copy
import functools
import hashlib
import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pd_core.build import update
from pd_core.core import artifacts, files, schemas, tables
from pd_core.core.artifacts import Stage
from pd_core.core.errors import RunError, UserError
from pd_core.core.settings.data import DataSettings
from pd_core.density import originals, realset
from pd_core.evaluate import spaces
from pd_core.generate import export as generate_export
from pd_core.images import listing, sources
from pd_core.images.decode import BadImage
from pd_core.index import features
from tests import tiny

PICKLED = {"ARROW:extension:name": "ray.data.arrow_pickled_object", "ARROW:extension:metadata": ""}


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> Any:
        return open, (self.marker, "w")


@pytest.fixture
def armed() -> None:
    """Ray's type is registered, as it is in every process that has imported ray.data."""
    from ray.data._internal.object_extensions.arrow import ArrowPythonObjectType

    tables.forget_ray_types()
    pa.register_extension_type(ArrowPythonObjectType())


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """What a payload makes; it is not there after the test."""
    yield tmp_path / "marker"
    assert not (tmp_path / "marker").exists(), "the payload ran"


def pickled(marker: Path, rows: int = 1) -> pa.Array:
    return pa.array([pickle.dumps(Payload(marker))] * rows, pa.large_binary())


def field(name: str) -> pa.Field:
    return pa.field(name, pa.large_binary(), metadata=PICKLED)


def read_all(file: Path, **settings: Any) -> list[bytes | BadImage]:
    """Every image of a Parquet source, through listing and reading, as the workers do."""
    source = sources.open_source(DataSettings(source=str(file), **settings))
    listed = pa.concat_tables(sources.list_images(source))
    return list(sources.read(source, listed))


def test_the_payload_works_without_the_reader(tmp_path, armed):
    """What the others show is not that the payload is broken."""
    pq.write_table(
        pa.table({"x": pickled(tmp_path / "marker")}, schema=pa.schema([field("x")])), tmp_path / "x.parquet"
    )
    pq.read_table(tmp_path / "x.parquet")["x"][0].as_py()
    assert (tmp_path / "marker").exists()


# ---- Parquet ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["path", "image", "label", "extra", "list", "map", "dictionary"])
def test_a_source_with_a_pickling_column_is_refused_by_its_name(tmp_path, armed, marker, where):
    data = pa.array([tiny.png(1)], pa.binary())
    values = pickled(marker)
    columns, fields = [data], [pa.field("image", pa.binary())]
    if where == "path":
        struct_fields = [pa.field("bytes", pa.binary()), field("path")]
        columns = [pa.StructArray.from_arrays([pa.array([None], pa.binary()), values], fields=struct_fields)]
        fields = [pa.field("image", pa.struct(struct_fields))]
    elif where == "image":
        columns, fields = [values], [field("image")]
    else:
        kinds = {
            "list": (pa.list_(field("item")), lambda kind: pa.ListArray.from_arrays([0, 1], values, kind)),
            "map": (
                pa.map_(pa.string(), field("value")),
                lambda kind: pa.MapArray.from_arrays([0, 1], pa.array(["k"]), values, kind),
            ),
            "dictionary": (pa.dictionary(pa.int8(), pa.large_binary()), lambda _: values.dictionary_encode()),
        }
        kind, make = kinds.get(where, (pa.large_binary(), lambda _: values))
        columns.append(make(kind))
        metadata = PICKLED if where in ("label", "extra", "dictionary") else None
        fields.append(pa.field(where, columns[-1].type if where == "dictionary" else kind, metadata=metadata))
    pq.write_table(pa.Table.from_arrays(columns, schema=pa.schema(fields)), tmp_path / "x.parquet")
    with pytest.raises(
        UserError, match=r"x\.parquet: the column .* is of the extension type 'ray.data.arrow_pickled_object'"
    ):
        read_all(tmp_path, image_column="image", labels="column:label" if where == "label" else "none")


@pytest.mark.parametrize("name", ["ray.data.arrow_tensor", "ray.data.arrow_tensor_v2", "ray.something.new"])
def test_any_other_type_of_ray_is_refused(tmp_path, name):
    metadata = {"ARROW:extension:name": name, "ARROW:extension:metadata": "[[[["}
    schema = pa.schema([pa.field("image", pa.binary()), pa.field("x", pa.large_binary(), metadata=metadata)])
    pq.write_table(pa.table({"image": [tiny.png(1)], "x": [b"1"]}, schema=schema), tmp_path / "x.parquet")
    with pytest.raises(UserError, match=f"the column 'x' is of the extension type '{name}'"):
        read_all(tmp_path)


def test_a_tensor_column_is_refused_in_a_line(tmp_path):
    tensor = pa.ExtensionArray.from_storage(
        pa.fixed_shape_tensor(pa.int8(), [2]), pa.array([[1, 2]], pa.list_(pa.int8(), 2))
    )
    pq.write_table(pa.table({"image": pa.array([tiny.png(1)]), "t": tensor}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"the column 't' is of the extension type 'arrow.fixed_shape_tensor'"):
        read_all(tmp_path)


def test_a_strangers_index_runs_nothing_where_its_tables_are_read(built, tmp_path, armed, marker):
    """Key and label of the features of a finished index, hashes and sizes of its record mended."""
    index = tmp_path / "index"
    shutil.copytree(built, index)
    change_tables(
        index / "features",
        lambda table: with_columns(table, {name: pickled(marker, table.num_rows) for name in ("key", "label")}, field),
    )
    real = realset.open_realset(str(index))  # its record is whole
    artifact = artifacts.load_artifact(str(index / "features"))
    assert artifact is not None and real.rows == artifact.rows
    with pytest.raises(
        UserError, match=r"features/part-00000000\.parquet: the column '(key|label)' is of the extension type"
    ):
        spaces.read_rows(spaces.features_of(str(index / "features"), artifact))
    with pytest.raises(UserError, match="is of the extension type"):
        features.load_features(str(index / "features" / "part-00000000.parquet"))


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("sample_id", lambda n: pa.array(["x"] * n)),
        ("feature", lambda n: pa.array([[1.0]] * n, pa.list_(pa.float64(), 1))),
        ("key", lambda n: pa.array([b"\xff"] * n, pa.binary())),
        ("label", lambda n: pa.array([{"a": 1}] * n)),
    ],
)
def test_columns_of_ours_have_the_types_of_ours(built, tmp_path, column, values):
    index = tmp_path / "index"
    shutil.copytree(built / "features", index)
    change_tables(index, lambda table: with_columns(table, {column: values(table.num_rows)}))
    with pytest.raises(UserError, match=rf"part-00000000\.parquet: the column '{column}' is .*, expected "):
        files.read_table(str(index / "part-00000000.parquet"))


def with_columns(table: pa.Table, columns: dict[str, pa.Array], to_field: Any = None) -> pa.Table:
    for name, values in columns.items():
        place = table.schema.get_field_index(name)
        table = table.set_column(place, to_field(name) if to_field else pa.field(name, values.type), values)
    return table


def change_tables(stage: Path, change: Any) -> None:
    """Every table of a stage made another, its record mended to fit."""
    record = json.loads((stage / "artifact.json").read_text())
    for part in record["parts"]:
        if part["name"].endswith(".parquet"):
            file = stage / part["name"]
            pq.write_table(change(pq.read_table(file)), file)
            data = file.read_bytes()
            part.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    (stage / "artifact.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("table", "line"),
    [
        (pa.Table.from_arrays([pa.array([tiny.png(1)])] * 2, ["image", "image"]), "has two columns named 'image'"),
        (
            pa.table(
                {
                    "image": [tiny.png(1)],
                    "m": pa.StructArray.from_arrays(
                        [pa.array([1]), pa.array([2])], fields=[pa.field("a", pa.int64()), pa.field("a", pa.int64())]
                    ),
                }
            ),
            "has two columns named 'a'",
        ),
    ],
)
def test_columns_of_one_name_are_refused(tmp_path, table, line):
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(UserError, match=line):
        read_all(tmp_path)


@pytest.mark.parametrize(
    "path", ["a\0b.png", "../outside.png", "a/../../outside.png", "/etc/hostname", "a/\x1b[2J.png", "..", "."]
)
def test_a_path_that_leads_elsewhere_is_that_images_fault(tmp_path, path):
    (tmp_path / "outside.png").write_bytes(tiny.png(2))
    (tmp_path / "in").mkdir()
    image = pa.array([{"bytes": tiny.png(1), "path": None}, {"bytes": None, "path": path}])
    pq.write_table(pa.table({"image": image}), tmp_path / "in" / "x.parquet")
    good, bad = read_all(tmp_path / "in")
    assert good == tiny.png(1) and isinstance(bad, BadImage)


def test_texts_that_are_no_utf8_are_told_at_the_listing(tmp_path):
    text = pa.Array.from_buffers(pa.string(), 1, [None, *pa.array([b"\xff"], pa.binary()).buffers()[1:]])
    pq.write_table(pa.table({"image": [tiny.png(1)], "caption": text}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"x\.parquet: a key, label or metadata column is corrupt"):
        read_all(tmp_path)


# Thrift's compact protocol, as far as Parquet's footer goes: what no writer writes.


def varint(number: int) -> bytes:
    out = b""
    while number >= 128:
        out, number = out + bytes([number & 127 | 128]), number >> 7
    return out + bytes([number])


def element(name: bytes, kind: int | None = None, repetition: int | None = None, children: int | None = None) -> bytes:
    """A SchemaElement; field 1 type, 3 repetition, 4 name, 5 children."""
    out, last = b"", 0
    for number, thrift, value in (
        (1, 5, None if kind is None else varint(2 * kind)),
        (3, 5, None if repetition is None else varint(2 * repetition)),
        (4, 8, varint(len(name)) + name),
        (5, 5, None if children is None else varint(2 * children)),
    ):
        if value is not None:
            out, last = out + bytes([(number - last) << 4 | thrift]) + value, number
    return out + b"\0"


def listed(items: int) -> bytes:
    return bytes([items << 4 | 12]) if items < 15 else b"\xfc" + varint(items)


def parquet_of(elements: list[bytes], groups: bytes = b"\x19\x0c", padding: int = 0) -> bytes:
    footer = b"\x15\x02\x19" + listed(len(elements)) + b"".join(elements) + b"\x16\0" + groups + b"\0" * (1 + padding)
    return b"PAR1" + footer + struct.pack("<I", len(footer)) + b"PAR1"


ROOT, LEAF = element(b"schema", children=1), element(b"image", 6, 0)


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (parquet_of([ROOT, *[element(b"a", repetition=0, children=1)] * 200, LEAF]), "is nested deeper than 32 levels"),
        (parquet_of([ROOT, *[element(b"a", repetition=0, children=1)] * 40_000, LEAF]), "more than 8000 columns"),
        (parquet_of([ROOT, LEAF], b"\x19\xfc" + varint(900_000), 120_000), "more than 8000 columns or row groups"),
        (
            parquet_of([ROOT, LEAF], b"\x19\x1c\x19\xfc" + varint(900_000), 120_000),
            "more than 8000 columns or row groups",
        ),
        (parquet_of([ROOT, LEAF], padding=33 << 20), "its metadata take .* bytes, at most"),
    ],
    ids=["nested", "nested until Arrow crashes", "row groups claimed", "columns claimed", "footer"],
)
def test_metadata_are_bounded_before_they_are_made(tmp_path, data, line):
    import resource

    (tmp_path / "x.parquet").write_bytes(data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=rf"x\.parquet: .*{line}"):
        read_all(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10  # KiB; the third took 0.9 GB


@pytest.mark.parametrize("rows", [1 << 60, -1, 1000])
def test_rows_that_are_only_claimed_are_not_listed(tmp_path, rows):
    """The footer and its row groups contradict each other; that both lie is the next test's."""
    (tmp_path / "x.parquet").write_bytes(claiming(rows))
    with pytest.raises(UserError, match=rf"x\.parquet: claims {rows} rows"):
        read_all(tmp_path)


def test_more_rows_than_a_file_can_have_are_not_listed(tmp_path):
    paths = pa.array([f"{i:07d}.png" for i in range(300_000)])
    image = pa.StructArray.from_arrays([pa.nulls(len(paths), pa.binary()), paths], ["bytes", "path"])
    pq.write_table(pa.table({"image": image}), tmp_path / "paths.parquet", compression="zstd")  # under a byte a row
    assert (
        sum(t.num_rows for t in sources.list_images(sources.open_source(DataSettings(source=str(tmp_path))))) == 300_000
    )
    pq.write_table(pa.table({"image": pa.nulls(2_000_000, pa.binary())}), tmp_path / "paths.parquet")
    with pytest.raises(UserError, match=r"claims 2000000 rows in \d+ bytes, more than 64 a byte"):
        read_all(tmp_path)


@pytest.mark.parametrize("role", ["label", "key", "metadata"])
def test_a_long_text_that_stands_in_every_row_by_a_number_is_not_unpacked(tmp_path, role):
    """50 kB of Parquet; the texts are 4 GB."""
    rows = 4096
    text = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int8()), ["x" * 1_100_000])
    table = pa.table({"image": pa.nulls(rows, pa.binary()), role: text})
    pq.write_table(table, tmp_path / "x.parquet", compression="zstd", row_group_size=rows)
    settings: dict[str, Any] = {"label": {"labels": "column:label"}, "key": {"key_column": "key"}}.get(role, {})
    with pytest.raises(UserError, match=r"x\.parquet: a key, label or metadata column is corrupt"):
        read_all(tmp_path, **settings)


def test_types_that_parquet_itself_knows_are_read_as_what_they_are_stored_as(tmp_path):
    import uuid

    values = pa.array([uuid.uuid4().bytes], pa.uuid())
    table = pa.table({"image": [tiny.png(1)], "id": values, "facts": pa.array(['{"a": 1}'], pa.json_())})
    pq.write_table(table, tmp_path / "x.parquet", store_schema=False)
    assert read_all(tmp_path, metadata_columns=["facts"]) == [tiny.png(1)]


def claiming(rows: int) -> bytes:
    """One row of an image whose footer says that it has others: the count is the footer's, its only row group has
    one.
    """
    sink = io.BytesIO()
    pq.write_table(pa.table({"image": [tiny.png(1)]}), sink, store_schema=False)
    data = sink.getvalue()
    (footer,) = struct.unpack("<I", data[-8:-4])
    head, tail = data[: -8 - footer], data[-8 - footer : -8]
    place = tail.index(b"\x16\x02\x19\x1c")  # field 3, i64 1; then field 4, a list of one struct
    changed = tail[: place + 1] + varint(rows * 2 if rows >= 0 else -2 * rows - 1) + tail[place + 2 :]
    return head + changed + struct.pack("<I", len(changed)) + b"PAR1"


def test_a_page_that_unpacks_to_a_gigabyte_is_not_unpacked(tmp_path):
    """As an image and as a label; 33 kB each."""
    large = pa.array([bytes(1 << 30)], pa.large_binary())
    small = pa.array([tiny.png(1)])
    options = {"compression": "zstd", "use_dictionary": False, "write_statistics": False}
    for name, table in (
        ("image", {"image": large}),
        ("label", {"image": small, "label": large.cast(pa.large_string())}),
    ):
        (tmp_path / name).mkdir()
        pq.write_table(pa.table(table), tmp_path / name / "x.parquet", **options)
    script = (
        "import sys; from pathlib import Path; from tests.test_hostile import bombs; bombs(Path(sys.argv[1]))\n"
        "print(int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0]) >> 10)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, cwd=tiny.ROOT)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 900, "MiB, most of them imports; with the page it would be over a thousand more"


def bombs(folder: Path) -> None:
    (bad,) = read_all(folder / "image")
    assert isinstance(bad, BadImage) and bad.reason == "too_expensive"
    with pytest.raises(UserError, match="a key, label or metadata column is corrupt"):
        read_all(folder / "label", labels="column:label")


# ---- names -----------------------------------------------------------------------------------------------------------

OUTSIDE: list[object] = [
    "../../escaped.txt",
    "/tmp/x",
    "a/../../x",
    ".ssh",
    "a//b",
    "",
    ".",
    "..",
    "a\0b",
    "a\nb",
    "x/.",
    "~",
    "a%2Fb",
]
OUTSIDE += ["é", 7]


def test_a_base_that_names_a_file_outside_is_refused_before_anything_is_written(built, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(built, base)
    file = base / "index" / "artifact.json"
    whole, before = json.loads(file.read_text()), sorted(tmp_path.rglob("*"))
    for name in OUTSIDE:
        part = {"name": name, "rows": 0, "counts": {}, "bytes": 8, "sha256": "0" * 64}
        file.write_text(json.dumps(whole | {"parts": [*whole["parts"], part]}))
        with pytest.raises(
            UserError, match=r"index/artifact\.json: .*(no run of pd_core has written|no record of pd_core)"
        ):
            update.open_base(str(base))
        assert sorted(tmp_path.rglob("*")) == before, name


@pytest.mark.parametrize("overwrite", [True, False])
def test_records_of_parts_delete_nothing_outside(tmp_path, overwrite):
    """A folder that a stranger ships where a stage of ours is going to be: begun, with a record of somebody else's
    file.
    """
    precious = tmp_path / "home" / "id_rsa"
    precious.parent.mkdir()
    precious.write_bytes(b"key")
    stage = Stage(str(tmp_path / "out" / "features"), "features", 1, {"k": 3})
    (tmp_path / "out" / "features" / "_parts").mkdir(parents=True)
    (tmp_path / "out" / "features" / "started.json").write_text(json.dumps({"k": 4}))
    record = tmp_path / "out" / "features" / "_parts" / "..%2F..%2Fhome%2Fid_rsa.json"
    part = {"name": "../../home/id_rsa", "rows": 0, "bytes": 3, "sha256": "0" * 64, "counts": {}}
    record.write_text(json.dumps({"stage": stage.fingerprint, "part": part}))
    for action in (stage.begin, lambda _: stage.finished_parts(), lambda _: artifacts.remove(stage.uri)):
        with pytest.raises(UserError):
            action(overwrite)
    assert precious.read_bytes() == b"key"


def test_a_record_under_another_name_is_refused(tmp_path):
    stage = Stage(str(tmp_path), "features", 1, {"k": 3})
    stage.begin(overwrite=False)
    stage.write_part("part-0.parquet", b"x", 0)
    os.rename(tmp_path / "_parts" / "part-0.parquet.json", tmp_path / "_parts" / "part-1.parquet.json")
    with pytest.raises(UserError, match="is the record of another file"):
        stage.finished_parts()


def test_exported_images_lie_in_the_export(tmp_path, ray_cluster):
    samples = Stage(str(tmp_path / "samples"), "samples", 1, {})
    samples.begin(overwrite=False)
    zeros = {"int64": 0, "double": 0.0, "float": 0.0, "bool": False, "string": "x"}
    row = {f.name: zeros.get(str(f.type)) for f in schemas.samples()}
    row["image"] = {"bytes": tiny.png(1), "path": "../../../escaped.png"}
    part = samples.write_table(artifacts.part_name(0), pa.Table.from_pylist([row], schemas.samples()))
    committed = samples.commit([part], {}, {})
    for form in ("png", "webdataset"):
        stage = generate_export.stage_of(str(tmp_path / "out"), samples, form)
        stage.begin(overwrite=True)
        with pytest.raises((UserError, RunError), match="names the file"):
            export(stage, samples.uri, committed, form)
    assert not list(tmp_path.rglob("escaped.png"))


def export(stage: Stage, uri: str, committed: artifacts.Artifact, form: str) -> None:
    from pd_core.engine import runs

    with runs.failures("export", stage.uri):
        generate_export.run(stage, uri, committed, form)


# ---- links -----------------------------------------------------------------------------------------------------------


def test_a_stage_that_is_a_link_is_not_written_into(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "part-00000000.parquet").write_bytes(b"precious")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "features").symlink_to(tmp_path / "elsewhere")
    stage = Stage(str(tmp_path / "out" / "features"), "features", 1, {"k": 3})
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"is a link to .*elsewhere"):
            stage.begin(overwrite)
    with pytest.raises(UserError, match=r"features is a link to .*, outside of it"):
        files.refuse_links(str(tmp_path / "out"))
    assert os.listdir(tmp_path / "elsewhere") == ["part-00000000.parquet"]


def test_the_output_itself_may_be_a_link_since_the_user_names_it(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "other").mkdir()
    (tmp_path / "disk" / "same").symlink_to(tmp_path / "disk" / "other")  # stays inside
    files.refuse_links(str(tmp_path / "runs"))
    stage = Stage(str(tmp_path / "runs" / "features"), "features", 1, {"k": 3})
    stage.begin(overwrite=False)
    stage.write_part("best/unet/x.bin", b"x", 0)
    assert (tmp_path / "disk" / "features" / "best" / "unet" / "x.bin").read_bytes() == b"x"


@pytest.mark.parametrize("at", ["features", "features/best", "."])
def test_a_folder_that_is_swapped_for_a_link_is_noticed(tmp_path, at):
    """While a run is under way: in the process that has begun the stage, and in one that was sent it."""
    elsewhere, out = tmp_path / "elsewhere", tmp_path / "out"
    (elsewhere / "features" / "best").mkdir(parents=True)
    (elsewhere / "best").mkdir()
    (elsewhere / "a.bin").write_bytes(b"precious")
    stage = Stage(str(out / "features"), "features", 1, {"k": 3})
    stage.begin(overwrite=False)
    stage.write_part("best/a.bin", b"ours", 0)
    sent = pickle.loads(pickle.dumps(stage))
    sent.write_part("first.bin", b"", 0)  # where it looks for the folder, which nodes may have mounted elsewhere
    os.rename(out / at, tmp_path / "away")
    (out / at).symlink_to(elsewhere)
    before = {f: f.read_bytes() for f in elsewhere.rglob("*") if f.is_file()}
    for mine in (stage, sent):
        for name in ("best/a.bin", "best/b.bin"):
            with pytest.raises(RunError, match=r"has taken its place|is in the way"):
                mine.write_part(name, b"ours", 0)
            with pytest.raises(RunError, match=r"has taken its place|is in the way"):
                mine.drop_part(name)
    assert {f: f.read_bytes() for f in elsewhere.rglob("*") if f.is_file()} == before


def test_a_part_that_is_a_link_is_not_taken_over(tmp_path):
    (tmp_path / "secret").write_bytes(b"token")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "part-0.bin").symlink_to(tmp_path / "secret")
    stage = Stage(str(tmp_path / "out"), "features", 1, {"k": 3})
    stage.begin(overwrite=False)
    part = artifacts.Part("part-0.bin", 0, 5, hashlib.sha256(b"token").hexdigest())
    with pytest.raises(RunError, match="is a link or no regular file"):
        stage.adopt(str(tmp_path / "base"), part)
    assert not (tmp_path / "out" / "part-0.bin").exists()


def test_pipes_and_devices_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "artifact.json")
    for read in (artifacts.load_artifact, lambda uri: files.read_bytes(f"{uri}/artifact.json")):
        with pytest.raises(UserError, match="is no regular file"):
            read(str(tmp_path))
    with pytest.raises(UserError, match="is no regular file"):
        files.read_bytes("/dev/zero")
    (tmp_path / "large").write_bytes(b"12345")
    with pytest.raises(UserError, match="has 5 bytes, more than the 4"):
        files.read_file(str(tmp_path / "large"), "large", 4)


@pytest.mark.parametrize(
    "uri", ["http://127.0.0.1:9/x", "simplecache::http://127.0.0.1:9/x", "memory://x", "ftp://h/x"]
)
def test_only_local_paths_and_s3_are_used(uri):
    for read in (files.read_bytes, files.read_table, artifacts.load_artifact, files.exists):
        with pytest.raises(UserError, match="only local paths and s3:// are used"):
            read(uri)


# ---- records ---------------------------------------------------------------------------------------------------------


@contextmanager
def watched(canary: str) -> Iterator[list[str]]:
    """What is done inside to anything whose name has `canary` in it, or over a socket."""
    seen: list[str] = []
    _watches.append((canary, seen))
    try:
        yield seen
    finally:
        _watches.remove((canary, seen))


_watches: list[tuple[str, list[str]]] = []
_ACTS = (
    "open",
    "os.remove",
    "os.rename",
    "os.mkdir",
    "os.link",
    "os.symlink",
    "socket.connect",
    "subprocess.Popen",
    "exec",
)


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _watches and event in _ACTS:
        for canary, seen in _watches:
            if event in ("socket.connect", "subprocess.Popen") or canary in str(arguments):
                seen.append(f"{event} {arguments}")


sys.addaudithook(_audit)


def leaves(values: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(values, dict | list):
        for key, inner in values.items() if isinstance(values, dict) else enumerate(values):
            yield from leaves(inner, (*path, key))
    yield path


def replaced(values: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    values = copy.copy(values)
    values[path[0]] = replaced(values[path[0]], path[1:], value)
    return values


def test_no_leaf_of_a_record_leads_anywhere(built, tmp_path):
    """Every leaf of every record of an index, each by something else: what opens it says so in a line, or opens it,
    and touches nothing else.
    """
    index = tmp_path / "index"
    shutil.copytree(built, index, ignore=shutil.ignore_patterns("report"))
    (tmp_path / "canary").mkdir()
    (tmp_path / "canary" / "x").write_bytes(b"1")
    leading = [str(tmp_path / "canary" / "x"), "../../canary/x", "http://127.0.0.1:9/canary"]
    others: list[Any] = [None, -1, [], {}, 1e308, True]
    tried = refused = 0
    for file in sorted(index.rglob("*.json")):
        whole = file.read_text()
        record = json.loads(whole)
        kept = [path for path in leaves(record) if not any(isinstance(step, int) and step > 0 for step in path)]
        for number, path in enumerate(kept):
            text = isinstance(functools.reduce(lambda inner, step: inner[step], path, record), str)
            away = leading if text else leading[number % 3 :][:1]  # of other types one in turn, as of what is no path
            for value in (*away, others[number % len(others)]):
                file.write_text(json.dumps(replaced(record, path, value)))
                with watched("canary") as seen:
                    refused += not opens(str(index))
                assert not seen, (file, path, value, seen)
                tried += 1
        file.write_text(whole)
    assert opens(str(index)) and tried > 1000 and refused > tried // 5


def opens(uri: str) -> bool:
    """Whether all that reads the records of an index takes them, without reading its tables; else each refused in one
    line.
    """
    whole = True
    for read in (realset.open_realset, update.open_base, originals.source_of):
        try:
            read(uri)
        except (UserError, RunError) as error:
            assert "\n" not in str(error)
            whole = False
    return whole


def test_the_type_of_metadata_in_a_record_is_held_to_plain_types(built, tmp_path, armed):
    """An Arrow schema as text, whose types the tables of a listing are read with."""
    index = tmp_path / "index"
    shutil.copytree(built / "listing", index)
    record = json.loads((index / "artifact.json").read_text())
    for metadata, line in (
        (pa.struct([field("x")]), "is of the extension type 'ray.data.arrow_pickled_object'"),
        (None, "states no type"),
    ):
        text = base64.b64encode(pa.schema([pa.field("metadata", metadata)]).serialize()).decode() if metadata else "%%"
        record["totals"]["metadata"] = text
        (index / "artifact.json").write_text(json.dumps(record))
        artifact = artifacts.load_artifact(str(index))
        assert artifact is not None
        with pytest.raises(UserError, match=line):
            listing.read_artifact(str(index), artifact)
