"""The comparison finds what is planted; and a short, seeded part of `make chaos`."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from chaos import run, table
from chaos.compare import Difference, compare
from chaos.faults import FAULTS
from chaos.workflows import WORKFLOWS
from pd_core.core import artifacts, files
from tests import tiny

ROWS = 10  # of each part
KEYS = [f"{i:02d}.png" for i in range(3 * ROWS)]


@pytest.fixture
def outputs(tmp_path: Path) -> tuple[Path, Path]:
    """The same finished stage and report twice: disturbed, undisturbed."""
    for name in ("found", "expected"):
        stage = artifacts.Stage(str(tmp_path / name / "features"), "features", 1, {"seed": 0})
        stage.begin(False)
        for i in range(3):
            keys = KEYS[i * ROWS : (i + 1) * ROWS]
            columns = {"sample_id": range(i * ROWS, (i + 1) * ROWS), "key": keys, "value": [i / 7] * ROWS}
            stage.write_table(artifacts.part_name(i), pa.table(columns))
        stage.commit(stage.finished_parts().values(), {"rows": 3 * ROWS}, {"features": len(name)})
        report = artifacts.Stage(str(tmp_path / name / "report"), "report", 1, {"seed": 0})
        report.begin(False)
        report.commit([report.write_part("index.html", f"took {len(name)} s".encode(), 0)], {}, {})
    return tmp_path / "found", tmp_path / "expected"


def test_equal_outputs_differ_in_nothing_but_the_report(outputs: tuple[Path, Path]) -> None:
    assert (outputs[0] / "report/index.html").read_bytes() != (outputs[1] / "report/index.html").read_bytes()
    assert compare(*outputs) == Difference()


PART = f"features/{artifacts.part_name(1)}"


def rewrite(file: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    pq.write_table(change(pq.read_table(file)), file)


ROWS_CHANGED = "features/artifact.json: totals rows: {} -> 30"


def recorded(output: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    """A change that the stage itself has made and recorded."""
    stage = artifacts.Stage(str(output / "features"), "features", 1, {"seed": 0})
    stage.write_table(artifacts.part_name(1), change(pq.read_table(output / PART)))
    parts = stage.finished_parts().values()
    stage.commit(parts, {"rows": sum(part.rows for part in parts)}, {})


def other_value(rows: pa.Table) -> pa.Table:
    return rows.set_column(2, "value", pa.array([0.5] * len(rows)))


def one_twice(rows: pa.Table) -> pa.Table:
    return pa.concat_tables([rows, rows.slice(3, 1)])


@pytest.mark.parametrize(
    ("plant", "lost", "doubled", "parts"),
    [
        (lambda o: recorded(o, lambda t: t.slice(1)), 1, 0, [ROWS_CHANGED.format(29), f"{PART}: other bytes"]),
        (lambda o: recorded(o, one_twice), 0, 1, [ROWS_CHANGED.format(31), f"{PART}: other bytes"]),
        (lambda o: recorded(o, other_value), 0, 0, [f"{PART}: other bytes"]),
        (lambda o: rewrite(o / PART, lambda t: t.slice(1)), 1, 0, [f"{PART}: not as its record says"]),
        (lambda o: (o / PART).write_bytes((o / PART).read_bytes()[:-1]), ROWS, 0, [f"{PART}: not as its record says"]),
        (lambda o: (o / PART).unlink(), ROWS, 0, [f"{PART}: not as its record says"]),
        (lambda o: shutil.copy(o / PART, o / "features" / artifacts.part_name(9)), 0, ROWS, []),
        (lambda o: (o / "features" / files.ARTIFACT).unlink(), 0, 0, ["features: not finished"]),
    ],
)
def test_what_is_planted_is_found(
    outputs: tuple[Path, Path], plant: Callable[[Path], None], lost: int, doubled: int, parts: list[str]
) -> None:
    plant(outputs[0])
    found = compare(*outputs)
    assert (found.lost, found.doubled, found.parts) == (lost, doubled, parts)
    assert not found.none


def test_a_bit_is_enough(outputs: tuple[Path, Path]) -> None:
    data = bytearray((outputs[0] / PART).read_bytes())
    data[10] ^= 1  # within the row group
    (outputs[0] / PART).write_bytes(bytes(data))
    assert f"{PART}: not as its record says" in compare(*outputs).parts


def versioned(output: Path, time: str) -> Path:
    """The output as one that holds its stage in a version and in a release."""
    version = output / "index" / f"{time}-0123456789ab"
    version.mkdir(parents=True)
    (output / "features").rename(version / "features")
    stage = artifacts.Stage(str(output / "releases" / f"2026-11-{time[6:8]}-0123456789ab"), "release", 1, {"seed": 0})
    stage.begin(False)
    parts = [stage.write_table(f"typical/{artifacts.part_name(0)}", pa.table({"sample_id": range(ROWS)}))]
    record = {
        "index": str(version),
        "hash": artifacts.sha256(str(output).encode()),
        "numbers": {"typical": {"n": ROWS}},
    }
    parts.append(stage.write_part("release.json", json.dumps(record).encode(), 0))
    stage.commit(parts, {}, {})
    (output / "report").rename(version / "report")
    (output / "latest.json").write_text(json.dumps({"release": stage.uri.rpartition("/")[2], "moved": time}))
    return version


def test_versions_are_compared_whenever_they_were_made(outputs: tuple[Path, Path]) -> None:
    found, expected = outputs
    version = versioned(found, "20261127T000000Z")
    versioned(expected, "20261128T000000Z")
    assert compare(found, expected) == Difference()
    rewrite(found / f"releases/2026-11-27-0123456789ab/typical/{artifacts.part_name(0)}", lambda t: t.slice(2))
    assert compare(found, expected).lost == 2
    other = expected / "releases" / "2026-11-28-0123456789ab" / "release.json"
    other.write_text(other.read_text().replace('"n": 10', '"n": 11'))
    (found / "latest.json").write_text('{"release": "2026-11-27"}')
    said = ["latest.json: says otherwise", "releases/NAME/release.json: says otherwise"]
    assert [line for line in compare(found, expected).parts if "says otherwise" in line] == said
    shutil.copytree(version, version.parent / "20261129T000000Z-0123456789ab")
    assert "index/NAME/features (2): not in the undisturbed run" in compare(found, expected).parts


def test_results_are_added_up_and_a_case_that_is_tried_again_counts_once(tmp_path: Path) -> None:
    case = {"workflow": "generate", "fault": "driver", "number": 0, "seed": 0, "runs": 4, "kills": 3, "hits": 2}
    case |= {"reruns": 1, "lost": 0, "doubled": 0, "differing": [], "lines": ["failed: /a/b/out/samples: no"]}
    case |= {"tracebacks": 0, "broken": None, "seconds": 1.0}
    (tmp_path / table.PAGE).write_text("# Page\n<!-- matrix -->\nold\n<!-- end -->\nafter\n")
    for one in (case, case, {**case, "number": 1, "lost": 5, "reruns": 0}, {**case, "number": 2, "broken": "hung"}):
        table.add(tmp_path, one)
    text = (tmp_path / table.PAGE).read_text()
    assert text.startswith("# Page\n<!-- matrix -->\n| workflow") and text.endswith("<!-- end -->\nafter\n")
    assert "| generate | driver | 3 | 12 | 6 of 9 | 1 | 1 (1 not done) | 5 | 0 | 0 |" in text and "old" not in text


def test_cases_are_named() -> None:
    for only in ("nothing", "generate:flood", "generate:driver:x"):
        with pytest.raises(ValueError, match=r"--only|invalid"):
            run.chosen([only], None)
    assert run.chosen(["generate:actor"], None) == [("generate", "actor", 0), ("generate", "actor", 1)]
    assert run.chosen(["*:node:3"], None)[:2] == [("build_index", "node", 3), ("generate", "node", 3)]
    assert len(run.chosen(None, 2)) == 2 * len(WORKFLOWS) * len(FAULTS)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_actors_and_drivers_that_are_killed_and_parts_that_are_cut_lose_nothing(
    tmp_path: Path,
) -> None:
    cases = ["build_index:actor:0", "build_index:driver:0", "build_index:truncated:0"]
    argv = [argument for case in cases for argument in ("--only", case)]
    # in a process of its own: its cluster is told by the environment that Ray is imported with
    program = [sys.executable, str(tiny.ROOT / "chaos" / "run.py"), *argv, "--seed=1"]
    done = subprocess.run([*program, f"--work={tmp_path / 'work'}", f"--docs={tmp_path}"], check=False)
    assert done.returncode == 0
    results = json.loads((tmp_path / table.RESULTS).read_text())["cases"]
    assert [f"{r['workflow']}:{r['fault']}:{r['number']}" for r in results] == cases
    for result in results:
        assert result["hits"] and not (result["lost"] or result["doubled"] or result["differing"]), result
