"""What the tree before the rooms made (tests/data) is still finished, opens and resumes in another folder."""

import fcntl
import importlib
import json
import tarfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

import pd_core
from pd_core.core import errors
from tests.data import make

ARCHIVE = Path(make.__file__).parent / "made_before_rooms.tar.xz"
CPU = "AVX512"  # that made the archive; features made on another one may differ in their last bits
OUTPUTS = {"build_index": "index", "generate": "samples", "perturb": "perturbed", "evaluate": "evaluated"}


@pytest.fixture
def place(tmp_path: Path) -> Iterator[None]:
    """The files of this test also where the sources lay when they were listed; other runs of these tests wait."""
    with open(f"{make.PLACE}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        make.PLACE.unlink(missing_ok=True)  # of a run that was killed; no folder is ever removed
        make.PLACE.symlink_to(tmp_path)
        yield
        make.PLACE.unlink()


@pytest.fixture
def root(tmp_path: Path, place: None) -> Path:
    """The archive's files in a folder of their own. Without the packages that made them, each is rightly refused."""
    with tarfile.open(ARCHIVE) as tar:
        tar.extractall(tmp_path, filter="data")
    identity = record(tmp_path / "index/features")["identity"]
    made = [identity["torch"], identity["decode"]["pillow"], identity["extractor"]["library"]]
    here = [version("torch").partition("+")[0], version("pillow"), f"timm {version('timm')}"]
    if made != here:
        pytest.skip(f"made with torch, Pillow and timm {made}, not {here}: to be made again, see tests/data/README.md")
    return tmp_path


def record(stage: Path) -> dict:
    return json.loads((stage / "artifact.json").read_text())


def contents(output: Path) -> dict[str, bytes]:
    """Bytes of every file by path, but of the settings of the last run and of a report that the archive leaves out."""
    left_out = ["run.json"] if output.name == "evaluated" else ["run.json", "report"]
    files = [file.relative_to(output) for file in sorted(output.rglob("*")) if file.is_file()]
    return {str(file): (output / file).read_bytes() for file in files if file.parts[0] not in left_out}


def tables(output: Path) -> dict[str, bytes]:
    return {
        name: data
        for name, data in contents(output).items()
        if Path(name).suffix in (".parquet", ".faiss", ".safetensors")
    }


def run(workflow: str, arguments: list[str]) -> str:
    told = (process := make.run(workflow, arguments)).communicate()[0]
    assert process.returncode == 0, told
    return told


@pytest.mark.parametrize("workflow", OUTPUTS)
def test_a_finished_output_is_finished(root, ray_cluster, workflow):
    output, command = root / OUTPUTS[workflow], importlib.import_module(f"workflows.{workflow}")
    before = contents(output)
    assert errors.exit_code(lambda: command.main(make.commands(root)[workflow])) == 0
    assert contents(output) == before
    assert (output / "report/artifact.json").exists()


def test_a_finished_index_opens_and_scores(root):
    """An image of the source has its row of the table."""
    index = pd_core.open(root / "index", checkpoint=str(root / "extractor.safetensors"))
    wanted = pq.read_table(root / "index/densities/part-00000000.parquet").to_pylist()[:3]
    found = index.score([root / "images" / row["key"] for row in wanted]).to_pylist()
    for name in ("density", "percentile"):
        assert [row[name] for row in found] == pytest.approx([row[name] for row in wanted], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("workflow", make.STOPPED)
def test_a_stopped_output_resumes_to_the_same_tables(root, workflow):
    finished = root / OUTPUTS[workflow]
    stopped, stage = root / f"{finished.name}-stopped", make.STOPPED[workflow]
    assert not (stopped / stage / "artifact.json").exists()
    done = {file: file.stat().st_mtime_ns for file in stopped.rglob("part-00000000.parquet")}
    assert stopped / stage / "part-00000000.parquet" in done
    run(workflow, make.commands(root, stopped=True)[workflow])
    assert {file: file.stat().st_mtime_ns for file in done} == done, "parts that were finished were made again"
    assert tables(stopped).keys() == tables(finished).keys()
    if torch.backends.cpu.get_cpu_capability() == CPU:
        assert tables(stopped) == tables(finished)
