"""generate.py --verify: whatever is changed in finished samples is found, and said in a line that names it."""

import dataclasses
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pd_core.core import artifacts, errors, files, schemas
from pd_core.core import seeds as core_seeds
from pd_core.core.settings.generate import GeneratorSettings
from pd_core.engine import resources, session
from pd_core.generate import candidates, verify
from pd_core.generators.open import open_generator
from tests.generate.test_workflow import N, rows
from workflows import generate

# log_volume is null where densities decide; tests/generate/test_candidates.py compares it
LIGHT = [n for n in schemas.samples().names if n not in ("sample_id", "image", "image_hash", "log_volume")]


@pytest.fixture
def copy(made, tmp_path):
    shutil.copytree(made / "out", tmp_path / "out")
    return tmp_path / "out"


def run_verify(output: Path, count: int, *more: str) -> int:
    """With the generator that these samples are made with: what runs the user's code has to be named again."""
    own = told(output)
    named = [
        "--generator.kind=python",
        f"--generator.path={own.path}",
        f"--generator.arguments={json.dumps(own.arguments)}",
    ]
    return errors.exit_code(lambda: generate.main([f"--verify={output}", f"--rows={count}", *named, *more]))


def told(output: Path) -> GeneratorSettings:
    return GeneratorSettings.model_validate(record(output)["totals"]["settings"]["generator"])


def record(output: Path, stage: str = "samples") -> dict:
    return json.loads((output / stage / "artifact.json").read_text())


def commit(output: Path, values: dict, stage: str = "samples") -> None:
    """Write a commit record that agrees with itself and with the files, as a careful forger would."""
    for part in values["parts"]:
        data = (output / stage / part["name"]).read_bytes()
        part |= {
            "bytes": len(data),
            "sha256": artifacts.sha256(data),
            "rows": pq.read_metadata(io.BytesIO(data)).num_rows,
        }
    own = {"kind": values["kind"], "schema_version": values["schema_version"]}
    values["fingerprint"] = artifacts.fingerprint(own | values["identity"])
    (output / stage / "artifact.json").write_text(json.dumps(values))


def parts(output: Path, stage: str = "samples") -> list[Path]:
    return sorted((output / stage).glob("part-*.parquet"))


def changed(table: pa.Table, name: str, row: int, value: object) -> pa.Table:
    place = table.schema.get_field_index(name)
    field = table.schema.field(name)
    values = table[name].to_pylist()
    values[row] = value
    return table.set_column(place, field, pa.array(values, field.type))


def another(name: str, value: object) -> object:
    """Some other value that the column could well hold; of floats the very next one."""
    if value is None and name == "log_volume":  # null where densities decide
        return 0.5
    if isinstance(value, bool):
        return not value
    if isinstance(value, float):
        kind = np.float32 if name == "nearest_real_distance" else np.float64
        return float(np.nextafter(kind(value), kind(9)))
    return value + 1 if isinstance(value, int) else f"{value}?"


# ---- a whole output --------------------------------------------------------------------------------------------------


def test_untouched_samples_pass(made, capsys):
    assert run_verify(made / "out", N) == 0  # every row: every column is equal to the last bit
    said = capsys.readouterr()
    last = said.out.splitlines()[-1]
    assert f"{N} of {N} rows are what their seeds give" in last and "chosen by seed" in said.out
    for stage in ("samples", "rejected", "pilot", "export", "report"):
        held = len(record(made / "out", stage)["parts"])
        assert held and f"{held} of {stage}/" in last
    assert "verify parts" in said.err and "verify rows" in said.err  # progress


def test_each_harm_is_named_and_the_other_rows_are_made_again(copy, capsys):
    """A row forged with its record, a part lost, one that the record does not name, and a bit of another stage."""
    forged, lost = [part for part in parts(copy) if pq.read_metadata(part).num_rows > 1][:2]
    table = pq.read_table(forged)
    number, density = table["sample_id"][0].as_py(), table["density_index"][0].as_py()
    pq.write_table(changed(table, "density_index", 0, density * 2), forged)
    commit(copy, record(copy))
    left = N - pq.read_metadata(lost).num_rows
    lost.unlink()
    shutil.copy(forged, forged.with_name("part-00000777.parquet"))
    flip(copy / "pilot" / "part-00000000.parquet")
    assert run_verify(copy, N) == 1
    said = capsys.readouterr()
    assert f"samples/{lost.name}: is missing" in said.out and "pilot/part-00000000.parquet: sha256 " in said.out
    assert "samples/part-00000777.parquet: is not in the record" in said.out
    assert f"{left} of {N} rows are made again" in said.out
    assert f"sample {number}: density by the index {density * 2}, expected {density}" in said.out
    (line,) = [line for line in said.err.splitlines() if line.startswith("failed:")]
    assert f"1 of {left} rows are not what their seeds give" in line and "files not as committed: " in line


def test_rows_are_chosen_by_ids_alone_over_all_parts_and_others_by_another_seed(made):
    """The k smallest hashes, found part by part, are those of the whole table."""
    artifact = artifacts.load_artifact(str(made / "out" / "samples"))
    assert artifact is not None
    numbers = rows(made / "out")["sample_id"].to_numpy()
    chosen = []
    for seed in (5, 6):
        found, places = verify.check_files(str(made / "out"), {"samples": artifact}, 7, seed)
        keys = core_seeds.uniform(numbers, core_seeds.stream(seed, "verify"))
        chosen.append([number for _, number in places])
        assert found == {"rejected/artifact.json": ["is missing, though --keep-rejected was set"]}
        assert chosen[-1] == numbers[np.argsort(keys)][:7].tolist()
        for name, number in places:
            assert number in pq.read_table(made / "out" / "samples" / name)["sample_id"].to_pylist()
    assert chosen[0] != chosen[1]


# ---- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LIGHT)
def test_every_column_of_a_row_is_compared(made, name):
    """Rows against themselves, one value moved as little as the column allows."""
    table = rows(made / "out")
    assert table[name].null_count == 0, "a column without values would compare nothing"
    assert set(verify.compare_rows(table, table).values()) == {None}
    value = table[name][3].as_py()
    found = verify.compare_rows(changed(table, name, 3, another(name, value)), table)
    (number,) = [n for n, difference in found.items() if difference]
    assert number == table["sample_id"][3].as_py()
    assert (found[number] or "").endswith(f" {another(name, value)}, expected {value}")


def test_other_pictures_are_found(made):
    table = rows(made / "out")
    images, hashes = table["image"].to_pylist(), table["image_hash"].to_pylist()
    other = images[1] | {"path": images[0]["path"]}
    sink = io.BytesIO()
    Image.open(io.BytesIO(images[0]["bytes"])).convert("RGBA").save(sink, "PNG")
    cases = [
        (changed(table, "image", 0, other), "stored hash"),
        (changed(changed(table, "image", 0, other), "image_hash", 0, hashes[1]), "made again is another"),
        (changed(table, "image", 0, images[0] | {"path": "x.png"}), "image path x.png"),
        (changed(table, "image", 0, images[0] | {"bytes": images[0]["bytes"][:60]}), "stored hash"),
        (changed(table, "image", 0, images[0] | {"bytes": sink.getvalue()}), "stored hash"),
        (changed(table, "image", 0, None), "stored hash"),
    ]
    for stored, expected in cases:
        found = [text for text in verify.compare_rows(stored, table).values() if text]
        assert len(found) == 1 and expected in found[0], (found, expected)


def test_a_row_that_cannot_be_made_or_is_not_accepted_again_is_told(made, monkeypatch):
    table = rows(made / "out")
    assert verify.compare_rows(table.slice(0, 1), table.slice(1)) == {
        table["sample_id"][0].as_py(): "the candidate made again is not accepted"
    }
    maker, recipe = object.__new__(verify._Maker), recipe_of(made / "out")
    maker.failure, maker.maker = None, candidates.ChunkMaker(recipe, "cpu")
    monkeypatch.setattr(maker.maker, "generator", None)
    assert str(maker.make(0)).startswith("AttributeError: ")


# ---- files -----------------------------------------------------------------------------------------------------------


def recipe_of(output: Path) -> candidates.Recipe:
    artifact = artifacts.load_artifact(str(output / "samples"))
    assert artifact is not None
    return verify.recipe_of(str(output), artifact, told(output))


def flip(part: Path) -> None:
    data = bytearray(part.read_bytes())
    data[len(data) // 3] ^= 1
    part.write_bytes(data)


def found_in(output: Path, stage: str, name: str) -> list[str]:
    artifact = artifacts.load_artifact(str(output / stage))
    assert artifact is not None
    (part,) = [part for part in artifact.parts if part.name == name]
    return verify._check_file(str(output), stage, part, 4, 0)[0]


@pytest.mark.parametrize(
    ("harm", "expected"),
    [
        (Path.unlink, ["is missing"]),
        (lambda part: part.write_bytes(part.read_bytes()[:-8]), ["bytes", "sha256"]),
        (flip, ["sha256"]),
    ],
    ids=["gone", "cut", "flipped"],
)
@pytest.mark.parametrize(
    ("stage", "name"),
    [(stage, "part-00000001.parquet") for stage in ("samples", "rejected")]
    + [("pilot", "part-00000000.parquet"), ("export", "part-00000000.jsonl"), ("report", "index.html")],
)
def test_a_file_that_differs_from_its_record_is_named_with_what_differs(copy, stage, name, harm, expected):
    assert found_in(copy, stage, name) == []
    harm(copy / stage / name)
    found = found_in(copy, stage, name)
    assert [text if text == "is missing" else text.partition(" ")[0] for text in found] == expected


def test_a_store_that_refuses_is_no_finding(copy, monkeypatch):
    """A file that may not be read says nothing of what it holds."""
    for error in (PermissionError(13, "denied"), ConnectionError("lost"), OSError(5, "SlowDown")):

        def refusing(uri, error=error):
            raise error

        monkeypatch.setattr(files, "open_file", refusing)
        with pytest.raises(type(error)):
            verify.file_differences(str(copy / "samples" / "x"), artifacts.Part("x", 1, 1, ""))


def test_a_record_whose_identity_was_changed_is_told(copy):
    values = record(copy)
    values["identity"]["seed"] = 1
    (copy / "samples" / "artifact.json").write_text(json.dumps(values))
    artifact = artifacts.load_artifact(str(copy / "samples"))
    assert artifact is not None
    assert verify.own_differences(artifact) == ["its fingerprint is not that of its identity"]


@pytest.mark.parametrize("stage", ["rejected", "export", "report"])
def test_a_stage_of_other_samples_is_told(copy, stage):
    samples, own = (artifacts.load_artifact(str(copy / name)) for name in ("samples", stage))
    assert samples is not None and own is not None
    assert verify.kinship(stage, own, samples) == []
    other = dataclasses.replace(samples, fingerprint="0" * 64, identity=samples.identity | {"seed": 1})
    assert verify.kinship(stage, own, other) == ["is of other samples"]
    assert verify.kinship("pilot", own, samples) == ["is of other samples"]


def test_exported_pictures_are_those_of_the_samples(copy):
    """No record holds their hashes."""
    listing = next(p for p in sorted((copy / "export").glob("part-*.jsonl")) if p.read_text().count("\n") > 1)
    names = [json.loads(line)["file"] for line in listing.read_text().splitlines()]
    flip(copy / "export" / names[0])
    (copy / "export" / names[1]).unlink()
    assert sorted(found_in(copy, "export", listing.name)) == sorted(
        [f"{names[0]} is not the picture of its sample (1 such)", f"{names[1]} is missing (1 such)"]
    )
    for text in ("[1]\n", "{}\n", "png\n"):
        listing.write_text(text)
        (found,) = verify.picture_differences(str(copy), listing.name)
        assert found.startswith("is no list of pictures")


# ---- what the samples were made from ---------------------------------------------------------------------------------


def error_line(capsys) -> str:
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("error:", "failed:"))]
    return line


def test_a_changed_generator_is_one_line_and_exit_2(made, tmp_path, capsys):
    shutil.copytree(made, tmp_path / "made")
    values = record(tmp_path / "made" / "out")
    toy = tmp_path / "made" / "toy.py"
    values["totals"]["settings"]["generator"]["path"] = f"{toy}:make"
    commit(tmp_path / "made" / "out", values)
    toy.write_text(toy.read_text() + "\n# another\n")
    assert run_verify(tmp_path / "made" / "out", 1) == 2
    assert "differs from what the run began with" in error_line(capsys)


def test_a_changed_extractor_is_refused(made, tmp_path):
    weights = (made / "tiny.safetensors").read_bytes()
    (tmp_path / "other.safetensors").write_bytes(weights[:-4] + b"\0\0\0\1")
    artifact = artifacts.load_artifact(str(made / "out" / "samples"))
    assert artifact is not None
    other = str(tmp_path / "other.safetensors")
    with pytest.raises(errors.UserError, match=r"other\.safetensors"):
        candidates.ChunkMaker(verify.recipe_of("out", artifact, told(made / "out"), None, other), "cpu")


def test_an_identity_that_json_writes_in_another_form_is_the_same(made, tmp_path):
    """Tuples come back from a commit record as lists, numbers as keys as texts, and these sort in another order."""
    (tmp_path / "odd.py").write_text(
        "from tests.toy_generator import Toy\n"
        "class Odd(Toy):\n"
        "    def identity(self):\n"
        "        return {'size': (16, 16), 'steps': {2: 'a', 10: 'b'}}\n"
        "def make():\n"
        "    return Odd(3, True, (), 'raise', None, 0.0)\n"
    )
    settings = GeneratorSettings(kind="python", path=f"{tmp_path / 'odd.py'}:make")
    live = open_generator(settings).identity()
    recorded = json.loads(json.dumps(live))
    assert recorded != live
    recipe = replace(recipe_of(made / "out"), generator=settings)
    for same in (live, recorded):
        candidates.ChunkMaker(replace(recipe, generator_identity=same), "cpu")
    with pytest.raises(errors.UserError, match="differs from what the run began with"):
        candidates.ChunkMaker(replace(recipe, generator_identity=recorded | {"file": "another"}), "cpu")


# ---- what runs code --------------------------------------------------------------------------------------------------


def test_a_record_that_names_code_of_its_own_runs_none_of_it(copy, tmp_path, capsys):
    """A stranger's record may name any module and any arguments; only what the command names as well is run."""
    touched = tmp_path / "touched"
    honest, values = told(copy), record(copy)
    arguments = {"args": f"touch {touched}", "shell": True}
    values["totals"]["settings"]["generator"] |= {"path": "subprocess:run", "arguments": arguments}
    commit(copy, values)
    named = f"--generator.arguments '{artifacts.canonical(arguments)}'"
    named = f"--generator.kind python --generator.path subprocess:run {named}"
    python = GeneratorSettings(kind="python", path="subprocess:run")
    artifact = artifacts.load_artifact(str(copy / "samples"))
    assert artifact is not None
    for command in [
        GeneratorSettings(),
        GeneratorSettings(allow_pickle=True),
        honest,
        python,
        python.model_copy(update={"arguments": {**arguments, "shell": False}}),
    ]:
        with pytest.raises(errors.UserError) as raised:
            verify.recipe_of(str(copy), artifact, command)
        assert f"add {named}" in str(raised.value)
        assert not touched.exists(), command
    assert errors.exit_code(lambda: generate.main([f"--verify={copy}"])) == 2
    assert f"add {named}" in error_line(capsys) and not touched.exists()


@pytest.mark.parametrize("kind", get_args(GeneratorSettings.model_fields["kind"].annotation))
def test_what_can_run_code_is_opened_only_where_the_command_names_it_too(made, kind):
    artifact = artifacts.load_artifact(str(made / "out" / "samples"))
    assert artifact is not None
    own: dict[str, dict[str, Any]] = {"stylegan": {"code": "/code"}, "python": {"arguments": {"a": [1]}}}
    of_kind = own.get(kind, {})
    runs = GeneratorSettings.model_validate({"kind": kind, "path": "/x.py:f", **of_kind})
    stored = runs.model_dump(mode="json") | {"prompts": str(made / "prompts.txt")}
    artifact.totals["settings"]["generator"] = stored
    recipe_of = lambda told: verify.recipe_of("out", artifact, told).generator  # noqa: E731
    with_pickle = kind in ("diffusers", "stylegan")

    assert recipe_of(runs).model_dump(mode="json") == stored
    nothing = GeneratorSettings()
    if kind == "diffusers":
        assert not recipe_of(nothing).allow_pickle
    else:
        with pytest.raises(errors.UserError, match=rf"add --generator\.kind {kind} --generator\.path /x\.py:f"):
            recipe_of(nothing)
    if with_pickle:  # the permission holds for what is named with it, and for nothing else
        assert recipe_of(runs.model_copy(update={"allow_pickle": True})).allow_pickle
        with pytest.raises(errors.UserError, match=r"add --generator\.kind \w+ --generator\.path /x\.py:f"):
            recipe_of(runs.model_copy(update={"allow_pickle": True, "path": "/y"}))
    for name, value in {"path": "/y.py:f", **dict.fromkeys(of_kind, "/other")}.items():
        if kind != "diffusers":
            with pytest.raises(errors.UserError, match="can run any code"):
                recipe_of(runs.model_copy(update={name: value}))


PLACES = [
    ("index", "http://host/index", None, "is not opened; name the right place with --index"),
    ("index", "s3://bucket/index", None, r"another place \(s3://bucket\) .* add --index s3://bucket/index"),
    ("index", 5, None, "is not opened"),
    ("checkpoint", "http://host/w", None, "is not opened; name the right place with --checkpoint"),
    ("checkpoint", "simplecache::http://host/w", None, "is not opened"),
    ("checkpoint", "s3://bucket/w", None, "add --checkpoint s3://bucket/w"),
    ("checkpoint", ["/a"], None, "is not opened"),
    ("prompts", "http://host/p", "generator", "is not opened; name the right place with --generator.prompts"),
    ("prompts", "s3://bucket/p", "generator", "add --generator.prompts s3://bucket/p"),
    ("path", "http://host/p", "generator", "is not opened; name the right place with --generator.path"),
    ("path", "s3://bucket/p", "generator", "add --generator.path s3://bucket/p"),
    (
        "path",
        "org/name",
        "generator",
        "comes from the hub, .* add --generator.kind diffusers --generator.path org/name",
    ),
    ("path", None, "generator", "is not opened"),
]


@pytest.mark.parametrize(("name", "value", "section", "expected"), PLACES)
def test_a_record_leads_nowhere_that_the_command_does_not(made, name, value, section, expected):
    """What is data is opened where the record lies itself; nothing is asked of another store, a hub or a server."""
    artifact = artifacts.load_artifact(str(made / "out" / "samples"))
    assert artifact is not None
    stored = artifact.totals["settings"]
    if section:
        saved = GeneratorSettings(path=str(made), prompts=str(made / "prompts.txt"))
        stored["generator"] = saved.model_dump(mode="json")
        assert verify.recipe_of("out", artifact, GeneratorSettings()).generator == saved
    (stored if section is None else stored[section])[name] = value
    nothing = GeneratorSettings() if section else told(made / "out")
    with pytest.raises(errors.UserError, match=rf"^[^\n]*{expected}"):
        verify.recipe_of("out", artifact, nothing)
    if name == "checkpoint":
        own = str(made / "tiny.safetensors")
        assert verify.recipe_of("out", artifact, nothing, None, own).realset.extractor.checkpoint == own
    if value == "org/name":
        hub = GeneratorSettings(path="org/name")
        assert verify.recipe_of("out", artifact, hub).generator.path == "org/name"


@pytest.mark.parametrize(
    ("where", "name", "value", "expected"),
    [
        ("identity", "chunk", 10**12, "chunk: .*less than or equal"),
        ("identity", "chunk", -1, "chunk: "),
        ("identity", "threads", 10**9, "threads: "),
        ("identity", "seed", "x", "seed: "),
        ("identity", "device", "tpu", "device: "),
        ("identity", "classes", [0, "1; 2", -1], "classes"),
        ("identity", "class_names", [], "0 names of 3 classes"),
        ("identity", "copy_distance", float("nan"), "copy_distance: "),
        ("identity", "weightings", {"": {"edges": [1.0], "weights": [1.0]}}, "1 edges need 2 weights"),
        ("identity", "weightings", {}, "no weighting of "),
        ("identity", "volume", {"rank": 10**9}, "volume.rank: "),
        ("totals", "settings", None, "input should be"),
        ("totals", "settings", {"generator": {}, "index": {}}, "is not opened"),
        ("totals", "settings", {"generator": []}, "generator: "),
    ],
)
def test_what_a_record_of_samples_cannot_say_is_one_line(made, where, name, value, expected):
    artifact = artifacts.load_artifact(str(made / "out" / "samples"))
    assert artifact is not None
    getattr(artifact, where)[name] = value
    with pytest.raises(errors.UserError, match=rf"^out/samples/artifact.json: [^\n]*{expected}"):
        verify.recipe_of("out", artifact, told(made / "out"))


def test_the_path_of_the_command_may_be_a_relative_one(made, monkeypatch):
    artifact = artifacts.load_artifact(str(made / "out" / "samples"))
    assert artifact is not None
    monkeypatch.chdir(made)
    relative = told(made / "out").model_copy(update={"path": "toy.py:make"})
    assert verify.recipe_of("out", artifact, relative).generator == told(made / "out")


def test_samples_of_a_gpu_are_refused_where_there_is_none(copy, capsys, ray_cluster):
    if resources.refreshed(session.connect()).gpus:
        pytest.skip("there is a GPU")
    values = record(copy)
    values["identity"]["device"] = "cuda"
    commit(copy, values)
    assert run_verify(copy, 1) == 2
    assert "made on GPUs and the cluster has none" in error_line(capsys)


def test_samples_of_another_version_are_refused(made):
    artifact = artifacts.load_artifact(str(made / "out" / "samples"))
    assert artifact is not None
    del artifact.identity["device"]
    with pytest.raises(errors.UserError, match="another version of pd_core"):
        verify.recipe_of("out", artifact, told(made / "out"))
