"""The ground the project stands on: pinned versions, import directions, what is printed, what papers say."""

from __future__ import annotations

import ast
import pkgutil
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

import pd_core
from pd_core.cli import COMMANDS
from pd_core.core import errors, schemas
from pd_core.core.errors import RunError, UserError
from pd_core.core.settings import load
from pd_core.core.settings.index import BuildIndexSettings
from pd_core.core.settings.load import setting_names
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


# --- import directions ------------------------------------------------------------------------------------------------

CONTRACT = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]
LAYERS = [name.strip("()") for name in reversed(CONTRACT["layers"])]
ROOMS = [name for name in LAYERS if name not in ("api", "cli")]


def _lint_imports(folder: Path, sources: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """lint-imports with the project's own contracts over a package of the same rooms; `index/knn` is index/knn.py."""
    shutil.copy(ROOT / "pyproject.toml", folder)
    files = {f"{room}/__init__": "" for room in ROOMS} | {"__init__": "", "api": "", "cli": ""}
    files |= dict.fromkeys(("density/formula", "density/weighting", "index/knn", "index/shards"), "")
    for name, source in (files | sources).items():
        path = folder / "pd_core" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)


def test_imports_up_the_list_are_allowed(tmp_path: Path) -> None:
    sources = {
        "core/files": "from pd_core.core import errors",
        "core/errors": "",
        "index/shards": "import faiss\nfrom pd_core.core import files",
        "index/knn": "import faiss\nfrom pd_core.index import shards",
        "density/formula": "from pd_core.core import errors",
        "evaluate/measure": "from pd_core.generate import pilot",
        "generate/pilot": "",
    }
    result = _lint_imports(tmp_path, sources)
    assert result.returncode == 0, result.stdout


WRONG = [  # (file, what it must not import)
    ("core/files", "pd_core.index.knn"),
    ("core/files", "pd_core.api"),
    ("engine/tracking", "pd_core.report"),
    ("report/page", "pd_core.images"),
    ("images/decode", "pd_core.index.knn"),
    ("index/build", "pd_core.density.formula"),
    ("index/build", "faiss"),
    ("build/plan", "pd_core.generate"),
    ("generate/verify", "pd_core.curate"),
    ("generators/open", "pd_core.evaluate"),
    ("density/formula", "pd_core.images"),
    ("density/weighting", "pd_core.index.knn"),
    ("density/fit", "faiss"),
]


def test_planted_wrong_imports_are_caught_also_inside_functions(tmp_path: Path) -> None:
    sources: dict[str, str] = {}
    for number, (importer, imported) in enumerate(WRONG):
        sources[importer] = sources.get(importer, "") + f"def late_{number}():\n    import {imported}\n"
    result = _lint_imports(tmp_path, sources)
    assert result.returncode != 0
    found = set(re.findall(r"^\W*(pd_core\.[\w.]+) -> ([\w.]+) \(", result.stdout, re.MULTILINE))
    assert found == {(f"pd_core.{importer.replace('/', '.')}", imported) for importer, imported in WRONG}


def test_a_circle_inside_a_room_is_caught(tmp_path: Path) -> None:
    sources = {
        "generators/pairs": "from pd_core.generators import open",
        "generators/open": "def late():\n    from pd_core.generators import pairs",
    }
    result = _lint_imports(tmp_path, sources)
    assert result.returncode != 0
    assert "No cycles are allowed in pd_core.generators" in result.stdout


def test_the_papers_list_the_rooms_in_the_order_of_the_contract() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    table = dict(re.findall(r"^\| `(\w+)(?:/|\.py)` \| (.*) \|$", text, re.M))
    assert list(table) == LAYERS
    for room in ROOMS:  # and say of each what it says of itself
        charter = ast.get_docstring(ast.parse((ROOT / "pd_core" / room / "__init__.py").read_text()))
        assert charter is not None
        assert table[room] == " ".join(charter.split())
    assert {path.name for path in (ROOT / "pd_core").iterdir() if (path / "__init__.py").exists()} == set(ROOMS)
    drawing = text.partition("```")[2].partition("```")[0]
    assert [room for room in LAYERS if not re.search(rf"\b{room}\b", drawing)] == []


def test_a_new_room_must_be_given_its_place(tmp_path: Path) -> None:
    result = _lint_imports(tmp_path, {"helpers": ""})
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


def test_every_column_that_is_written_is_described() -> None:
    text = (ROOT / "docs" / "artifacts.md").read_text()
    names = {re.sub("_(low|high)$", "", name) for name in schemas.known()}
    assert len(names) > 60
    assert [name for name in sorted(names) if f"`{name}`" not in text] == []


def test_every_reason_of_quarantine_is_described() -> None:
    text = (ROOT / "docs" / "artifacts.md").read_text()
    assert [reason.value for reason in decode.Reason if f"`{reason.value}`" not in text] == []


# --- the papers of the house -----------------------------------------------------------------------------------------

PAPERS = sorted(
    path.relative_to(ROOT) for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("infra/**/*.md")]
)
PAGES = {name: ROOT / "docs" / f"{name}.md" for name in COMMANDS}
# papers that say by names what is where in the code
NAMED = ("CONTRIBUTING.md", "docs/architecture.md", "docs/glossary.md", "docs/method.md")
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
    folders = set(re.findall(r"`((?:pd_core|tests)/[\w/]*/)`", (ROOT / paper).read_text()))
    assert [name for name in folders if not (ROOT / name).is_dir() and "ROOM" not in name] == []


def _code(text: str) -> str:
    """The indented blocks of a page, what is broken by a backslash on one line, without their comments."""
    lines = "\n".join(line[4:] for line in text.splitlines() if line.startswith("    "))
    return re.sub(r"(^|\s)# .*", "", lines.replace("\\\n", " "), flags=re.MULTILINE)


def _options(command: str) -> set[str]:
    """Every option of a command, as it may be written; with a hyphen also with an underscore, not the reverse."""
    names = {*setting_names(COMMANDS[command].settings), "help", "config"}
    return names | {name.replace("-", "_") for name in names}


def test_every_setting_that_a_paper_names_is_one() -> None:
    known = set().union(*(_options(name) for name in COMMANDS))
    told = {
        (str(paper), name)
        for paper in PAPERS
        for name in re.findall(r"--(?:no-)?([a-z]+\.[a-z][\w-]*)", (ROOT / paper).read_text())
    }
    assert len(told) > 50
    assert [(paper, name) for paper, name in sorted(told) if name not in known] == [
        ("infra/monitoring/README.md", "config.file")  # of Prometheus
    ]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_its_page_and_what_it_shows_is_understood(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    code = _code(PAGES[command].read_text())
    assert re.search(rf"^pd-core {command} ", code, re.MULTILINE)
    for line in code.splitlines():  # a whole command, of this page or another; or options of this one
        name = line.split()[1] if line.startswith("pd-core ") else command
        told = set(re.findall(r"(?<=--)[a-z][\w.-]*", line))
        assert {option.removeprefix("no-") for option in told} <= _options(name), line
        if line.startswith("pd-core ") and "--help" not in line and "my.yaml" not in line:
            load.load(COMMANDS[name].settings, shlex.split(line)[2:], prog=name)


def test_the_library_s_page_names_what_there_is() -> None:
    text = (ROOT / "docs" / "library.md").read_text()
    assert set(re.findall(r"pd_core\.(\w+)(?!\.)", text)) >= set(pd_core.__all__) - {"Index"}
    assert [name for name in re.findall(r"\bindex\.(?!md)(\w+)", text) if not hasattr(pd_core.Index, name)] == []


def _anchors(paper: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", paper.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("paper", PAPERS, ids=str)
def test_every_link_of_a_paper_leads_somewhere(paper: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", (ROOT / paper).read_text()):
        if "://" not in link:
            name, _, anchor = link.partition("#")
            target = (ROOT / paper).parent / name if name else ROOT / paper
            assert target.exists(), link
            assert not anchor or anchor in _anchors(target), link


def test_the_readme_is_short_and_leads_to_every_page() -> None:
    text = (ROOT / "README.md").read_bytes()
    assert len(text) < 9_000
    shown = set(re.findall(r"\]\((docs/[\w-]+\.md)\)", text.decode()))
    assert {str(path) for path in PAPERS if path.parent.name == "docs"} - shown == set()


def test_every_section_of_the_method_that_is_cited_is_there() -> None:
    written = set(re.findall(r"^## (\d+)\. ", (ROOT / "docs" / "method.md").read_text(), re.MULTILINE))
    sources = [path.read_text() for folder in ("pd_core", "demo", "tests") for path in (ROOT / folder).rglob("*.py")]
    cited = {section for text in sources for found in CITATION.findall(text) for section in found if section}
    assert len(cited) > 5
    assert cited - written == set()
