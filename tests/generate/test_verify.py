"""generate.py --verify: whatever is changed in finished samples is found, and said in a line that names it."""

import io
import json
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pd_core.core import artifacts, errors, files, schemas
from pd_core.core import seeds as core_seeds
from pd_core.core.settings.generate import GeneratorSettings
from pd_core.engine import resources, session
from pd_core.generate import candidates, verification
from pd_core.generate import verify as generate_verify
from pd_core.generators.open import open_generator
from tests import toy_generator
from tests.generate.test_workflow import index, rows, run  # noqa: F401
from workflows import generate

N = 40
# log_volume is null where densities decide; tests/generate/test_candidates.py compares it
LIGHT = [n for n in schemas.samples().names if n not in ("sample_id", "image", "image_hash", "log_volume")]


@pytest.fixture(scope="module")
def made(index, inputs, tmp_path_factory):  # noqa: F811
    """Samples whose every column holds something, and the files they were made from."""
    root = tmp_path_factory.mktemp("made")
    shutil.copy(toy_generator.__file__, root / "toy.py")
    shutil.copy(inputs[1], root / "tiny.safetensors")
    (root / "prompts.txt").write_text("a red square\na blue one\n")
    more = (
        f"--generator.path={root / 'toy.py'}:make",
        f"--generator.prompts={root / 'prompts.txt'}",
        f"--checkpoint={root / 'tiny.safetensors'}",
        "--generator.labels=all",
        "--score=both",
        "--keep-rejected",
        "--export=png",
    )
    assert run(index, root / "out", *more, toy={"classes": 3, "texts": True}, n=N) == 0
    return root


@pytest.fixture
def copy(made, tmp_path):
    shutil.copytree(made / "out", tmp_path / "out")
    return tmp_path / "out"


def verify(output: Path, count: int, *more: str) -> int:
    """With the generator that these samples are made with: what runs the user's code has to be named again."""
    stored = record(output)["totals"]["settings"]["generator"]
    return verify_alone(output, count, *options(stored["path"], stored["arguments"]), *more)


def verify_alone(output: Path, count: int, *more: str) -> int:
    return errors.exit_code(lambda: generate.main([f"--verify={output}", f"--rows={count}", *more]))


def options(path: str, arguments: dict) -> tuple[str, ...]:
    return (
        "--generator.kind=python",
        f"--generator.path={path}",
        f"--generator.arguments={json.dumps(arguments)}",
    )


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


# ---- as it was made --------------------------------------------------------------------------------------------------


def test_untouched_samples_pass_and_each_call_takes_other_rows(made, capsys, monkeypatch):
    taken: list[list[int]] = []
    check = generate_verify.check_rows

    def checking(samples, pool, now, chosen):
        taken.append(sorted(chosen.tolist()))
        if len(taken) == 1:
            return check(samples, pool, now, chosen)
        return generate_verify.Findings(rows=dict.fromkeys(chosen.tolist()))

    monkeypatch.setattr(generate_verify, "check_rows", checking)
    assert verify(made / "out", N) == 0  # every row: every column is equal to the last bit
    said = capsys.readouterr()
    last = said.out.splitlines()[-1]
    assert f"{N} of {N} rows are what their seeds give" in last
    for stage in ("samples", "rejected", "pilot", "export", "report"):
        held = len(record(made / "out", stage)["parts"])
        assert held and f"{held} of {stage}/" in last
    assert "verify parts" in said.err and "verify rows" in said.err  # progress
    assert taken[0] == rows(made / "out")["sample_id"].to_pylist()
    seeds = []
    for _ in range(2):
        assert verify(made / "out", 8) == 0
        seeds += re.findall(r"chosen by seed (\d+)", capsys.readouterr().out)
    assert len(taken[1]) == len(taken[2]) == 8
    assert taken[1] != taken[2] and seeds[0] != seeds[1]  # equal once in C(40, 8) = 7.7e7
    verification.verify(str(made / "out"), 8, told(made / "out"), int(seeds[0]))
    assert taken[3] == taken[1]


@pytest.mark.slow
def test_samples_that_the_index_decided_pass_and_a_row_with_another_acceptance_is_found(index, tmp_path, capsys):  # noqa: F811
    output = tmp_path / "out"
    assert run(index, output, "--score=index", n=20) == 0
    assert verify(output, 20) == 0
    (part,) = [p for p in parts(output) if pq.read_metadata(p).num_rows][:1]
    table = pq.read_table(part)
    number, chance = table["sample_id"][0].as_py(), table["acceptance_probability"][0].as_py()
    pq.write_table(changed(table, "acceptance_probability", 0, chance / 2), part)
    commit(output, record(output))
    assert verify(output, 20) == 1
    assert f"sample {number}: acceptance_probability {chance / 2}, expected {chance}" in capsys.readouterr().out


# ---- rows that were changed together with the record -----------------------------------------------------------------


@pytest.mark.parametrize("name", LIGHT)
def test_every_column_of_a_row_is_compared(made, name):
    """Rows against themselves, one value moved as little as the column allows."""
    table = rows(made / "out")
    assert table[name].null_count == 0, "a column without values would compare nothing"
    assert set(generate_verify.compare_rows(table, table).values()) == {None}
    value = table[name][3].as_py()
    found = generate_verify.compare_rows(changed(table, name, 3, another(name, value)), table)
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
        found = [text for text in generate_verify.compare_rows(stored, table).values() if text]
        assert len(found) == 1 and expected in found[0], (found, expected)


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ([1, 5, 7], []),
        ([1, 7], ["sample 5 is accepted, but not in the table"]),
        ([1, 5, 5, 7], ["sample 5 is in the table 2 times"]),
        ([1, 5, 6, 7], ["sample 6 is in the table, but not accepted"]),
    ],
)
def test_a_chunk_holds_what_is_accepted_of_it_and_nothing_else(table, expected):
    assert generate_verify.compare_accepted(table, [1, 5, 7]) == expected


def test_forged_doubled_and_removed_rows_are_found_though_the_record_fits(copy, capsys):
    """One part without a row, one with a row twice, one with another density, all of it in a consistent record."""
    long = [part for part in parts(copy) if pq.read_metadata(part).num_rows > 1][:3]
    assert len(long) == 3
    removed, doubled, forged = map(pq.read_table, long)
    numbers = [table["sample_id"].to_pylist() for table in (removed, doubled, forged)]
    pq.write_table(removed.slice(1), long[0])
    pq.write_table(pa.concat_tables([doubled.slice(0, 1), doubled]), long[1])  # --n is as it was
    density = forged["density_index"][0].as_py()
    pq.write_table(changed(forged, "density_index", 0, density * 2), long[2])
    commit(copy, record(copy))
    assert verify(copy, N) == 1
    said = capsys.readouterr()
    size = record(copy)["identity"]["chunk"]
    assert f"chunk {numbers[0][0] // size}: sample {numbers[0][0]} is accepted, but not in the table" in said.out
    assert f"chunk {numbers[1][0] // size}: sample {numbers[1][0]} is in the table 2 times" in said.out
    assert f"{long[1].name}: its sample_ids do not ascend" in said.out
    assert f"{long[0].name}: candidate {numbers[0][0]} is neither in it nor in rejected/ (1 such)" in said.out
    assert f"sample {numbers[2][0]}: density by the index {density * 2}, expected {density}" in said.out
    (line,) = [line for line in said.err.splitlines() if line.startswith("failed:")]
    assert "export/artifact.json: names other parts than samples/, or with other numbers of rows" in said.out
    exported = [f"export/{part.stem}.jsonl: " for part in long]
    assert [name in said.out for name in exported] == [True, True, False]  # the picture is there still, or once
    assert "committed: 5;" in line and "of them: 2;" in line and f"1 of {N - 1} rows" in line


# ---- the files -------------------------------------------------------------------------------------------------------


def samples_of(output: Path) -> tuple[generate_verify.Samples, artifacts.Artifact]:
    artifact = artifacts.load_artifact(str(output / "samples"))
    assert artifact is not None
    recipe = verification.recipe_of(str(output), artifact, told(output))
    return verification.samples_of(str(output), artifact, recipe), artifact


def cut(part: Path) -> None:
    part.write_bytes(part.read_bytes()[:-8])


def flip(part: Path) -> None:
    data = bytearray(part.read_bytes())
    data[len(data) // 3] ^= 1
    part.write_bytes(data)


def drop_column(part: Path) -> None:
    pq.write_table(pq.read_table(part).drop_columns(["density"]), part)


def move_row(part: Path) -> None:
    table = pq.read_table(part)
    pq.write_table(changed(table, "sample_id", 0, 10**6), part)


@pytest.mark.parametrize(
    ("harm", "expected"),
    [
        (Path.unlink, ["is missing"]),
        (cut, ["bytes", "sha256", "cannot be read"]),
        (flip, ["sha256"]),
        (drop_column, ["bytes", "sha256", "cannot be read: its columns"]),
        (move_row, ["sha256", "sample_id 1000000 is not one of its own"]),
        (lambda part: pq.write_table(pq.read_table(part).slice(1), part), ["bytes", "sha256", "rows"]),
    ],
)
def test_a_part_that_differs_from_its_record_is_named_with_what_differs(copy, harm, expected):
    samples, artifact = samples_of(copy)
    part = next(p for p in artifact.parts if p.rows > 1)
    draw = generate_verify.Draw(4, 0)
    assert generate_verify.check_part(samples, part, draw).differences == []
    harm(copy / "samples" / part.name)
    found = generate_verify.check_part(samples, part, draw).differences
    assert all(any(text.startswith(start) for text in found) for start in expected), found


def break_pictures(part: Path) -> list[int]:
    """Break the pages of pictures, and no others; returns the sample_ids, which can still be read."""
    group, data = pq.read_metadata(part).row_group(0), bytearray(part.read_bytes())
    columns = [group.column(i) for i in range(group.num_columns)]
    (pictures,) = [column for column in columns if column.path_in_schema == "image.bytes"]
    start = pictures.data_page_offset
    data[start : start + 8] = bytes(b ^ 0xFF for b in data[start : start + 8])
    part.write_bytes(data)
    return pq.read_table(part, columns=["sample_id"])["sample_id"].to_pylist()


def test_a_file_that_cannot_be_decoded_is_a_finding_and_the_other_rows_are_made_again(copy, capsys):
    harmed = next(p for p in parts(copy) if pq.read_metadata(p).num_rows > 1)
    lost = break_pictures(harmed)
    assert verify(copy, N) == 1
    said = capsys.readouterr()
    assert said.out.index(f"{harmed.name}: sha256") < said.out.index("rows are made again")  # whatever comes after it
    told_of = [int(n) for n in re.findall(r"sample (\d+): its file cannot be read: ", said.out)]
    assert told_of == lost
    assert f"{len(lost)} of {N} rows are not what their seeds give" in said.err


class Refusing(io.BytesIO):
    """A file of a store that answers no request for its bytes."""

    def __init__(self, error: OSError):
        super().__init__(bytes(100))
        self.error = error

    def read(self, *_):
        raise self.error


def test_a_store_that_refuses_is_no_finding(copy, monkeypatch):
    """Of the files themselves and of their rows alike: a file that may not be read says nothing of what it holds."""
    samples, artifact = samples_of(copy)
    part = next(p for p in artifact.parts if p.rows)
    lost = break_pictures(copy / "samples" / part.name)
    group = {lost[0] // samples.recipe.chunk: lost[:1]}
    pool = maker = cast("Any", None)  # nothing is made again where there is nothing to compare with
    (text,) = generate_verify.compare_group(samples, pool, maker, group).rows.values()
    assert text is not None and text.startswith("its file cannot be read: ")
    for error in (PermissionError(13, "denied"), ConnectionError("lost"), OSError(5, "SlowDown")):
        monkeypatch.setattr(files, "open_file", lambda uri, error=error: Refusing(error))
        with pytest.raises(type(error)):
            generate_verify.compare_group(samples, pool, maker, group)
        with pytest.raises(type(error)):
            generate_verify.check_part(samples, part, generate_verify.Draw(4, 0))


def test_the_last_row_cannot_be_taken_away(copy):
    last = parts(copy)[-1]
    table = pq.read_table(last)
    pq.write_table(table.slice(0, table.num_rows - 1), last)
    commit(copy, record(copy))
    samples, artifact = samples_of(copy)
    found = generate_verify.check_part(samples, artifact.parts[-1], generate_verify.Draw(4, 0)).differences
    assert any("the last of all" in text for text in found)


def test_missing_and_surplus_parts_are_named_and_the_other_rows_are_made_again(copy, capsys):
    first, second, *_ = (part for part in parts(copy) if pq.read_metadata(part).num_rows)
    left = N - pq.read_metadata(first).num_rows
    first.unlink()
    shutil.copy(second, second.with_name("part-00000777.parquet"))
    assert verify(copy, 2) == 1
    said = capsys.readouterr()
    assert f"{first.name}: is missing" in said.out and "part-00000777.parquet: is not in the record" in said.out
    assert "files not as committed: 2; see above" in said.err
    assert left > 2 and "2 of 40 rows are made again" in said.out


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda r: r["identity"].update(seed=1), "fingerprint"),
        (lambda r: r["parts"].pop(), "its parts hold"),
        (lambda r: r["parts"].pop(0), "without gaps"),
        (lambda r: r["identity"].update(n=N - 1), "--n was 39"),
        (lambda r: r["totals"].update(candidates=10**6), "do not end in the last"),
        (lambda r: r["totals"].update(acceptance_rate=0.5), "its total acceptance_rate is 0.5, the sum"),
        (lambda r: r["totals"].update(copies=10**6), "its total copies is 1000000, the sum"),
        (lambda r: r["totals"]["density_bins"].reverse(), "its total density_bins"),
        (lambda r: r["parts"][0]["counts"].update(candidates=1), "candidates, and the densities of"),
    ],
)
def test_a_record_that_contradicts_itself_is_told(copy, change, expected):
    values = record(copy)
    assert generate_verify.record_differences(samples_of(copy)[1]) == []
    change(values)
    (copy / "samples" / "artifact.json").write_text(json.dumps(values))
    artifact = artifacts.load_artifact(str(copy / "samples"))
    assert artifact is not None
    found = generate_verify.record_differences(artifact)
    assert any(expected in text for text in found), found


def test_what_a_part_counts_is_what_it_holds(copy):
    samples, artifact = samples_of(copy)
    part = artifact.parts[0]
    copies = part.counts["copies"]
    wrong = replace(part, counts=part.counts | {"copies": copies + 1, "candidates": 1})
    found = generate_verify.check_part(samples, wrong, generate_verify.Draw(4, 0)).differences
    size = samples.chunks_per_part * samples.recipe.chunk
    assert found == [f"copies {copies}, committed {copies + 1}", f"candidates {size}, committed 1"]


# ---- the other stages of an output -----------------------------------------------------------------------------------


def found_in(output: Path) -> dict[str, list[str]]:
    """What the check of all files of an output finds, without making a row."""
    samples, artifact = samples_of(output)
    beside = {
        stage: artifacts.load_artifact(str(output / stage)) for stage in ("rejected", "pilot", "export", "report")
    }
    there = {stage: found for stage, found in beside.items() if found is not None}
    found, _ = generate_verify.check_parts(samples, artifact, there, generate_verify.Draw(1, 0))
    return found


def without_first(part: Path) -> int:
    table = pq.read_table(part)
    pq.write_table(table.slice(1), part)
    return table["sample_id"][0].as_py()


@pytest.mark.parametrize("name", ["pilot/part-00000000.parquet", "rejected/part-00000001.parquet", "report/index.html"])
def test_a_changed_file_of_any_stage_is_named(copy, name):
    assert found_in(copy) == {}
    flip(copy / name)
    found = found_in(copy)
    assert [text.partition(" ")[0] for text in found.pop(name)] == ["sha256"]
    assert all(
        "cannot be read" in text for texts in found.values() for text in texts
    )  # of the part of samples beside it


def test_a_changed_file_of_another_stage_fails_the_whole_check(copy, capsys):
    harmed = copy / "rejected" / "part-00000001.parquet"
    flip(harmed)
    assert verify(copy, 1) == 1
    said = capsys.readouterr()
    assert f"rejected/{harmed.name}: sha256" in said.out and "files not as committed: " in said.err


def test_changed_missing_and_surplus_files_of_other_stages_are_named(copy):
    first, second, *_ = sorted((copy / "export").glob("part-*.jsonl"))
    first.write_text(first.read_text() + "{}")
    second.unlink()
    shutil.copy(parts(copy, "rejected")[0], copy / "rejected" / "part-00000777.parquet")
    found = found_in(copy)
    assert found.keys() == {f"export/{first.name}", f"export/{second.name}", "rejected/part-00000777.parquet"}
    assert found[f"export/{second.name}"] == ["is missing"]
    assert "is not in the record" in found["rejected/part-00000777.parquet"][0]


def test_exported_pictures_are_those_of_the_samples(copy):
    """No record holds their hashes."""
    listing = next(p for p in sorted((copy / "export").glob("part-*.jsonl")) if p.read_text().count("\n") > 1)
    names = [json.loads(line)["file"] for line in listing.read_text().splitlines()]
    flip(copy / "export" / names[0])
    (copy / "export" / names[1]).unlink()
    found = found_in(copy)
    assert found.keys() == {f"export/{listing.name}"}
    assert sorted(found[f"export/{listing.name}"]) == sorted(
        [f"{names[0]} is not the picture of its sample (1 such)", f"{names[1]} is missing (1 such)"]
    )


def test_the_list_of_exported_pictures_is_that_of_the_samples_though_the_record_fits(copy):
    listing = next(p for p in sorted((copy / "export").glob("part-*.jsonl")) if p.read_text().count("\n") > 1)
    first, *others = [json.loads(line) for line in listing.read_text().splitlines()]
    lines = [first | {"sample_id": 10**6}, *others]
    listing.write_text("".join(json.dumps(line) + "\n" for line in lines))
    values = record(copy, "export")
    part = next(part for part in values["parts"] if part["name"] == listing.name)
    part |= {"bytes": len(listing.read_bytes()), "sha256": artifacts.sha256(listing.read_bytes())}
    (copy / "export" / "artifact.json").write_text(json.dumps(values))
    assert found_in(copy) == {
        f"export/{listing.name}": [
            f"sample {first['sample_id']} is not in it (1 such)",
            f"{first['file']} is of no sample (1 such)",
        ]
    }
    part = artifacts.Part(listing.name, 1, 1, "")
    for text in ("[1]\n", "{}\n", "png\n"):
        listing.write_text(text)
        (found,) = generate_verify.picture_differences(samples_of(copy)[0], part)
        assert found.startswith("is no list of pictures")


def test_a_candidate_is_in_the_samples_or_in_the_rejected_though_the_record_fits(copy):
    """One taken away, one there twice, one of another part."""
    first, second, third, *_ = parts(copy, "rejected")
    gone = without_first(first)
    table = pq.read_table(second)
    pq.write_table(pa.concat_tables([table, table.slice(0, 1)]), second)
    again = table["sample_id"][0].as_py()
    table = pq.read_table(third)
    moved = table["sample_id"][0].as_py()
    pq.write_table(changed(table, "sample_id", 0, 10**6), third)
    commit(copy, record(copy, "rejected"), "rejected")
    assert found_in(copy) == {
        f"samples/{first.name}": [f"candidate {gone} is neither in it nor in rejected/ (1 such)"],
        f"samples/{second.name}": [f"candidate {again} is more than once in it and rejected/ together (1 such)"],
        f"samples/{third.name}": [
            f"candidate {moved} is neither in it nor in rejected/ (1 such)",
            "candidate 1000000 is in rejected/ beside it, but not of this part (1 such)",
        ],
    }


@pytest.mark.parametrize(
    ("stage", "change", "expected"),
    [
        ("rejected", lambda r: r["identity"].update(seed=1), "is of other samples"),
        ("rejected", lambda r: r["parts"].pop(), "names other parts than samples/"),
        ("rejected", lambda r: r.update(kind="pilot"), "is the record of pilot"),
        ("export", lambda r: r["identity"].update(samples="1"), "is of other samples"),
        ("export", lambda r: r["parts"].pop(), "names other parts than samples/"),
        ("report", lambda r: r.update(fingerprint="1"), "its fingerprint is not that of its identity"),
        ("pilot", lambda r: r["totals"].update(copies=10**6), "its total copies is 1000000"),
    ],
)
def test_a_record_beside_that_contradicts_itself_or_the_samples_is_told(made, stage, change, expected):
    output = made / "out"
    samples = artifacts.load_artifact(str(output / "samples"))
    beside = artifacts.load_artifact(str(output / stage))
    assert samples is not None and beside is not None
    rejected = artifacts.load_artifact(str(output / "rejected"))
    assert rejected is not None
    assert not any(generate_verify.beside_differences(samples, {"rejected": rejected, stage: beside}).values())
    values = asdict(beside) | {"parts": list(beside.parts)}
    change(values)
    told_of = generate_verify.beside_differences(samples, {"rejected": rejected, stage: artifacts.Artifact(**values)})
    assert any(expected in text for text in told_of[f"{stage}/artifact.json"])
    assert generate_verify.beside_differences(samples, {})["rejected/artifact.json"] == [
        "is missing, though --keep-rejected was set"
    ]


def test_rows_are_chosen_by_ids_alone_over_all_parts(made):
    """The k smallest hashes, found part by part, are those of the whole table; no other column is read."""
    samples, artifact = samples_of(made / "out")
    _, chosen = generate_verify.check_parts(samples, artifact, {}, generate_verify.Draw(7, 5))
    numbers = rows(made / "out")["sample_id"].to_numpy()
    keys = core_seeds.uniform(numbers, core_seeds.stream(5, "verify"))
    np.testing.assert_array_equal(chosen, numbers[np.argsort(keys)][:7])


# ---- what the samples were made from ---------------------------------------------------------------------------------


def error_line(capsys) -> str:
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("error:", "failed:"))]
    return line


@pytest.mark.parametrize(
    ("name", "expected"),
    [("toy.py", "differs from what the run began with"), ("tiny.safetensors", "tiny.safetensors")],
)
def test_a_changed_generator_or_extractor_is_one_line_and_exit_2(made, capsys, name, expected):
    file = made / name
    original = file.read_bytes()
    try:
        if name == "toy.py":
            file.write_bytes(original + b"\n# another\n")
        else:
            file.write_bytes(original[:-4] + b"\0\0\0\1")
        assert verify(made / "out", 1) == 2
    finally:
        file.write_bytes(original)
    line = error_line(capsys)
    assert expected in line and not line.endswith("..."), line


def test_an_identity_that_json_writes_in_another_form_is_the_same(copy, tmp_path):
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
    recipe = replace(samples_of(copy)[0].recipe, generator=settings)
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
    named = f"--generator.kind python --generator.path subprocess:run --generator.arguments '{artifacts.canonical(arguments)}'"
    for more in [
        (),
        ("--generator.allow-pickle",),
        options(str(honest.path), honest.arguments),
        options("subprocess:run", {}),
        options("subprocess:run", {**arguments, "shell": False}),
    ]:
        assert verify_alone(copy, 1, *more) == 2
        assert not touched.exists(), more
        line = error_line(capsys)
        assert f"add {named}" in line, line


@pytest.mark.parametrize("kind", get_args(GeneratorSettings.model_fields["kind"].annotation))
def test_what_can_run_code_is_opened_only_where_the_command_names_it_too(made, kind):
    artifact = artifacts.load_artifact(str(made / "out" / "samples"))
    assert artifact is not None
    own: dict[str, dict[str, Any]] = {"stylegan": {"code": "/code"}, "python": {"arguments": {"a": [1]}}}
    of_kind = own.get(kind, {})
    runs = GeneratorSettings.model_validate({"kind": kind, "path": "/x.py:f", **of_kind})
    stored = runs.model_dump(mode="json") | {"prompts": str(made / "prompts.txt")}
    artifact.totals["settings"]["generator"] = stored
    recipe_of = lambda told: verification.recipe_of("out", artifact, told).generator  # noqa: E731
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
        assert verification.recipe_of("out", artifact, GeneratorSettings()).generator == saved
    (stored if section is None else stored[section])[name] = value
    nothing = GeneratorSettings() if section else told(made / "out")
    with pytest.raises(errors.UserError, match=rf"^[^\n]*{expected}"):
        verification.recipe_of("out", artifact, nothing)
    if name == "checkpoint":
        own = str(made / "tiny.safetensors")
        assert verification.recipe_of("out", artifact, nothing, None, own).realset.extractor.checkpoint == own
    if value == "org/name":
        hub = GeneratorSettings(path="org/name")
        assert verification.recipe_of("out", artifact, hub).generator.path == "org/name"


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
        ("identity", "chunks_per_part", 0, "chunks_per_part: "),
        ("identity", "n", None, "n: "),
        ("totals", "candidates", 0, "candidates: "),
        ("totals", "candidates", 2**63, "candidates: "),
        ("totals", "rows", float("inf"), "rows: "),
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
        verification.samples_of("out", artifact, verification.recipe_of("out", artifact, told(made / "out")))


def test_the_path_of_the_command_may_be_a_relative_one(made, monkeypatch):
    artifact = artifacts.load_artifact(str(made / "out" / "samples"))
    assert artifact is not None
    monkeypatch.chdir(made)
    relative = told(made / "out").model_copy(update={"path": "toy.py:make"})
    assert verification.recipe_of("out", artifact, relative).generator == told(made / "out")


def test_samples_of_a_gpu_are_refused_where_there_is_none(copy, capsys):
    if resources.refreshed(session.connect()).gpus:
        pytest.skip("there is a GPU")
    values = record(copy)
    values["identity"]["device"] = "cuda"
    commit(copy, values)
    assert verify(copy, 1) == 2
    assert "made on GPUs and the cluster has none" in error_line(capsys)


def test_samples_of_another_version_are_refused(copy, capsys):
    values = record(copy)
    del values["identity"]["device"]
    commit(copy, values)
    assert verify(copy, 1) == 2
    assert "another version of pd_core" in error_line(capsys)
