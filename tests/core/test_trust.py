"""What opens, deletes or runs something by a name lies in few places, which check it: a new one is found here."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "pd_core"

# A call by the end of its dotted name, and the files that may have it. Everything else goes through these files' own
# functions.
DOORS: dict[str, set[str]] = {
    # Parquet, and Arrow's other formats: extension types, metadata without bounds
    "parquet.ParquetFile": {"core/tables.py"},
    "ipc.open_stream": {"generate/chunks.py"},  # what one task of ours hands to another
    "ipc.read_schema": {"core/tables.py"},
    # FAISS files open other files
    "faiss.deserialize_index": {"index/shards.py"},
    # weights, and whatever runs code
    "pickle.load": {"generators/stylegan.py"},
    "torch.load": {"index/backbones.py", "finetune/checkpoints.py"},  # weights_only, see below
    "safetensors.torch.load": {
        "index/backbones.py",
        "density/predictor.py",
        "finetune/checkpoints.py",
        "generators/pairs.py",
    },
    "jit.load": {"generators/torchscript.py"},
    "yaml.safe_load": {"core/settings/load.py"},
    "exec": {"generators/python.py"},  # a factory that the command names
    "import_module": {"generators/python.py"},
    "tarfile.open": {"generate/export.py"},  # writes
    # files by name
    "open": {"generators/stylegan.py"},  # which writes
    "os.open": {"core/files.py", "images/sources/stores.py"},
    "os.link": {"core/files.py"},
    "os.unlink": {"core/files.py"},
    "os.rename": {"core/files.py"},
    "os.makedirs": {"core/files.py"},
    "os.mkdir": {"core/files.py"},
    "fs.rm": {"core/files.py"},
    "fs.rm_file": {"core/files.py"},
    "fs.get": {"generators/diffusers.py"},  # a pipeline on a store, whose names were looked at
    "fs.open": {"core/files.py"},
    "os.fdopen": {"images/sources/stores.py", "core/files.py"},
    # pathlib's: of /proc and the package itself, of folders that were just written, of what a command names
    ".read_bytes": {"density/predictor.py", "finetune/best.py", "generators/python.py"},
    ".read_text": {
        "core/rlimits.py",
        "engine/resources.py",
        "finetune/models/opened.py",
        "report/page.py",
    },
    ".write_bytes": {"engine/tracking.py"},
    ".write_text": {"images/child.py", "finetune/models/opened.py"},
    "Part": {"core/artifacts.py"},  # of a record that was read: checked with the record
    "Artifact": {"core/artifacts.py"},
    # other programs and other machines
    "subprocess.Popen": {"images/child.py"},  # itself again
    "socket.create_connection": {"engine/session.py"},
}
# Nobody calls these: readers that run code or open other files, and what leaves a folder by a name
CLOSED = """
    parquet.read_table parquet.read_metadata parquet.read_schema parquet.ParquetDataset dataset.dataset
    ipc.open_file data.read_parquet data.read_images data.read_binary_files data.read_webdataset
    pandas.read_parquet faiss.read_index faiss.read_VectorTransform Image.open pickle.loads numpy.load
    numpy.memmap runpy.run_path yaml.load eval exec_module extractall unpack_archive fsspec.open url_to_fs
    fsspec.filesystem os.symlink os.remove os.replace shutil.rmtree shutil.copy shutil.move fs.cat_file
    .unlink .rmdir subprocess.run os.system urlopen requests.get
"""
DOORS |= {door: set() for door in CLOSED.split()}


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Every call by its dotted name; a name that was imported from a module is that module's."""
    whole = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            for name in node.names:
                whole[name.asname or name.name] = f"{node.module}.{name.name}"
        elif isinstance(node, ast.Import):
            whole |= {name.asname: name.name for name in node.names if name.asname}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            first, dot, rest = ast.unparse(node.func).partition(".")
            yield whole.get(first, first) + dot + rest, node


def is_door(called: str, door: str) -> bool:
    """`self.fs.rm` is `fs.rm`; `file.open` is not the builtin `open`, `safetensors.torch.load` not torch's own."""
    if called.startswith("safetensors."):
        return door == called
    if called.startswith(("pd_core.core.files.", "pd_core.core.artifacts.")):  # the door itself, not one of pathlib's
        return False
    if door.startswith("."):
        return called.endswith(door) and not called.startswith("os.")
    return called == door or (("." in door or door in _METHODS) and called.endswith(f".{door}"))


_METHODS = {
    *("url_to_fs", "urlopen", "extractall", "unpack_archive", "exec_module", "import_module"),
    "ParquetFile",
}


def found(path: Path) -> Iterator[tuple[str, int, ast.Call]]:
    for called, call in calls(ast.parse(path.read_text())):
        for door in DOORS:
            if is_door(called, door):
                yield door, call.lineno, call


def test_whatever_opens_something_by_name_is_one_of_these_places():
    used: dict[str, set[str]] = {door: set() for door in DOORS}
    strangers = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        for door, line, _ in found(path):
            used[door].add(name)
            if name not in DOORS[door]:
                strangers.append(f"{name}:{line} calls {door}")
    assert not strangers, "go through the functions of: " + str({d: DOORS[d] for d in DOORS if DOORS[d]})
    assert {door: names for door, names in used.items() if names} == {d: n for d, n in DOORS.items() if n}


@pytest.mark.parametrize(
    "line",
    [
        "from pickle import loads\nloads(x)",
        "from faiss import read_index as opened\nopened(x)",
        "import numpy as np\nnp.load(x)",
        "Path(x).read_bytes()",
        "import pyarrow.parquet as pq\npq.ParquetFile(x)",
        "with open(x) as f: pass",
        "self.fs.rm(x)",
        "torch.load(x)",
    ],
)
def test_a_new_place_is_found(tmp_path, line):
    (tmp_path / "new.py").write_text(line)
    assert list(found(tmp_path / "new.py"))


def test_weights_are_loaded_as_data_alone():
    for path in sorted(PACKAGE.rglob("*.py")):
        for door, line, call in found(path):
            if door == "torch.load":
                only = [k.value for k in call.keywords if k.arg == "weights_only"]
                assert only and ast.unparse(only[0]) == "True", f"{path}:{line}"
