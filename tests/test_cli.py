"""`pd-core`: what it lists, what it refuses, and that it works where nothing but the wheel is."""

from __future__ import annotations

import importlib
import os
import re
import resource
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

from pd_core import cli
from pd_core.core.settings.load import WORKFLOWS
from tests import tiny

FILES = {name: f"{name.replace('-', '_')}.py" for name in cli.COMMANDS}
HEAVY = {"torch", "ray", "faiss", "timm", "mlflow", "matplotlib", "pandas"}


@pytest.fixture
def pd_core(monkeypatch, capsys):
    """`pd-core` with these arguments: exit code, standard output, standard error."""

    def run(*argv: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["/anywhere/bin/pd-core", *argv])
        try:
            code = cli.main()
        except SystemExit as stop:
            code = int(str(stop.code))
        return code, *capsys.readouterr()

    return run


def test_every_workflow_is_a_command_and_a_file() -> None:
    assert [command.settings for command in cli.COMMANDS.values()] == list(WORKFLOWS)
    assert set(FILES.values()) == {path.name for path in (tiny.ROOT / "workflows").glob("*.py")}


def test_help_lists_the_commands_with_a_line_each(pd_core) -> None:
    code, out, err = pd_core("--help")
    assert (code, err) == (0, "")
    assert re.findall(r"^  (\S+) +[A-Z].+\.$", out, re.MULTILINE) == list(cli.COMMANDS)
    assert max(map(len, out.splitlines())) < 100
    assert pd_core("-h") == (code, out, err)


def test_help_takes_less_than_a_second_and_imports_nothing_heavy() -> None:
    code = (
        "import runpy, sys; from pd_core import cli; sys.argv = ['pd-core', '--help']; assert cli.main() == 0\n"
        "try: runpy.run_path('workflows/build_index.py', run_name='__main__')\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        f"heavy = {HEAVY} & set(sys.modules); assert not heavy, heavy"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=tiny.ROOT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # seconds of its own work, so that a busy machine does not count
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_a_command_is_that_of_its_file(name, pd_core, capsys) -> None:
    code, out, err = pd_core(name, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: pd-core {name} [-h]")
    workflow = importlib.import_module(f"workflows.{name.replace('-', '_')}")
    with pytest.raises(SystemExit):
        workflow.main(["--help"])
    of_file = capsys.readouterr().out
    assert of_file.startswith(f"usage: {FILES[name]} [-h]")
    purpose = next(line.split(maxsplit=1)[1] for line in pd_core("--help")[1].splitlines() if f"  {name} " in line)
    assert f"\n\n{purpose}\n" in out  # under the usage, whose lines break by the length of the name
    assert out.partition(purpose)[2] == of_file.partition(purpose)[2]


@pytest.mark.parametrize(
    ("typed", "nearest"),
    [
        ("genrate", "generate"),
        ("build", "build-index"),
        ("build-indx", "build-index"),
        ("build_indx.py", "build-index"),
        ("Evaluate", "evaluate"),
        ("fine-tune", "finetune"),
        ("trade_off", "tradeoff"),
    ],
)
def test_an_unknown_command_names_the_nearest(typed, nearest, pd_core) -> None:
    assert pd_core(typed, "--help") == (
        *(2, ""),
        f"error: pd-core {typed}: no such command; did you mean '{nearest}'?\n",
    )


@pytest.mark.parametrize("argv", [[], [""], ["xyzzy"], ["--output", "runs/a", "generate"], ["../\x1b[31m\n"]])
def test_what_is_near_no_command_is_one_line_that_leads_to_the_list(argv, pd_core) -> None:
    code, out, err = pd_core(*argv)
    assert (code, out) == (2, "")
    assert err.startswith("error: pd-core") and err.endswith("see --help for all commands\n")
    assert err.count("\n") == 1 and err[:-1].isprintable()


@pytest.mark.parametrize("typed", ["build-index", "build_index", "build_index.py"])
def test_a_command_has_the_name_of_its_file_too(typed, pd_core) -> None:
    """Messages say `run build_index.py`."""
    assert pd_core(typed, "--density.kk=3") == (
        *(2, ""),
        "pd-core build-index: error: unknown setting --density.kk; did you mean 'density.k'?\n",
    )


def test_the_version_is_that_of_the_package(pd_core) -> None:
    project = tomllib.loads((tiny.ROOT / "pyproject.toml").read_text())["project"]
    assert pd_core("--version") == (0, f"pd-core {project['version']}\n", "")


def test_without_settings_the_command_says_what_it_needs_and_makes_nothing(pd_core, tmp_path, monkeypatch) -> None:
    """Only the file of the tree knows of a demo."""
    monkeypatch.chdir(tmp_path)
    code, out, err = pd_core("build-index")
    assert (code, out) == (2, "")
    assert re.fullmatch(r"error: --output: .+\n", err)
    assert not list(tmp_path.iterdir())


# ---- Installed -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """bin/ of an environment that holds the wheel of this tree; what the wheel needs is seen in that of the tests."""
    root = tmp_path_factory.mktemp("installed")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(root)]
    subprocess.run(build, check=True, cwd=tiny.ROOT, capture_output=True)
    (wheel,) = root.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", str(root / "env")], check=True)
    folder = root / "env" / "bin"
    subprocess.run([str(folder / "pip"), "install", "--quiet", "--no-index", "--no-deps", str(wheel)], check=True)
    (packages,) = (root / "env" / "lib").glob("python*/site-packages")
    # a path alone: files of paths that lie there, as that of this tree, are not followed
    (packages / "needed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


@pytest.mark.slow
def test_the_wheel_builds_an_index_in_an_empty_folder(installed, inputs, built, tmp_path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(program: str, *argv: str) -> str:
        command = [str(installed / program), *argv]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert run("python", "-c", "import pd_core; print(pd_core.__file__)").startswith(str(installed.parent))
    assert "\n  build-index " in run("pd-core", "--help")
    assert run("pd-core", "build-index", "--help").startswith("usage: pd-core build-index ")
    argv = tiny.arguments(*inputs, "out", "--no-tracking.enabled")
    out = run("pd-core", "build-index", *argv)
    assert "report: " in out and (tmp_path / "out" / "report" / "index.html").exists()
    assert tiny.tables(tmp_path / "out") == tiny.tables(built)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    again = tiny.tables(tmp_path / "out")
    run("pd-core", "build-index", *argv)
    assert tiny.tables(tmp_path / "out") == again
