"""infra/container and infra/mlflow: images by digest, lists pinned by hash and whole, scripts that run."""

from __future__ import annotations

import configparser
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path

import pytest
from compose_spec import PyCompose
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.infra import files
from tests.infra.files import CONSTRAINTS, DOCUMENT, INFRA, ROOT, each, leaves, load, named
from tests.infra.test_rights import SECRET_NAME

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CONTAINER = INFRA / "container"


# ---- which images ----------------------------------------------------------------------------------------------------


def image_references() -> Iterator[tuple[str, str]]:
    """(file, image) of every image that a file names."""
    for path in files.YAML_FILES:
        for key, value in leaves(load(path)):
            if key in ("image", "worker_image", "head_image"):
                yield named(path), value
    for path in files.IMAGES:
        text = path.read_text()
        for image in re.findall(r"^FROM\s+(.+)$", text, re.MULTILINE):
            for name, value in re.findall(r"^ARG (\w+)=(\S+)$", text, re.MULTILINE):
                image = image.replace(f"${{{name}}}", value)
            yield named(path), image


# Known once they are built and pushed; the tag is that of this project, in a registry that is yours.
OURS = re.compile(r"(registry\.example\.com/)?pd-core(-mlflow)?:\d+\.\d+\.\d+[\w-]*")
# A tag that says what it is, and the digest that decides: as it is, to be written by command 2, or asked for.
BY_DIGEST = re.compile(
    r"[\w./-]+:v?\d+\.\d+[\w.-]*"
    r"@(sha256:[0-9a-f]{64}|sha256:digest-of-postgres|\$\{\w+_DIGEST:\?(.*infra/README\.md.*)\})"
)


def pinned(image: str) -> bool:
    return bool(OURS.fullmatch(image) or BY_DIGEST.fullmatch(image))


def test_every_image_is_named_by_digest_or_is_ours_of_this_version() -> None:
    found = list(image_references())
    assert len(found) > 10
    assert [(file, image) for file, image in found if not pinned(image)] == []
    version = re.escape(PROJECT["project"]["version"])
    for file, image in found:
        name, _, tag = image.rpartition(":")
        if name.endswith("pd-core"):
            assert re.fullmatch(rf"{version}-(cpu|gpu)(-aws|-gcp)?", tag), file
        elif name.endswith("pd-core-mlflow"):
            assert tag == CONSTRAINTS["mlflow"], file


def test_an_image_by_tag_alone_is_found() -> None:
    python = "python:3.11.14-slim-bookworm"
    planted = ["postgres:17.6-bookworm", "postgres@sha256:0123", "registry.example.com/other:1.0.0"]
    planted += [f"{python}@${{PYTHON_DIGEST}}", f"{python}@${{PYTHON_DIGEST:-sha256:}}"]
    assert [image for image in planted if pinned(image)] == []


def test_the_readme_finds_the_digest_of_each_image_of_others() -> None:
    text = (INFRA / "README.md").read_text()
    found = dict(re.findall(r'(\w+_DIGEST)="\$\(digest (\S+)\)"', text))
    others = [image for _, image in image_references() if not OURS.fullmatch(image)]
    assert set(found.values()) == {image.partition("@")[0] for image in others}
    asked = {name: image.partition("@")[0] for image in others for name in re.findall(r"\w+_DIGEST", image)}
    assert asked == found
    (command,) = re.findall(r"--format '[^']+'", text)
    assert f"docker buildx imagetools inspect {command} {found['PYTHON_DIGEST']}`" in DOCUMENT


# ---- how they are built ----------------------------------------------------------------------------------------------


def test_nodes_have_a_python_whose_tarfile_is_mended() -> None:
    for path in files.IMAGES:
        (version,) = re.findall(r"^ARG BASE_IMAGE=python:(\d+)\.(\d+)\.(\d+)-", path.read_text(), re.MULTILINE)
        assert tuple(map(int, version)) >= (3, 11, 14) and version[:2] == ("3", "11")  # the lists are for that
    (checked,) = re.findall(r'^RUN python -c "(.+)"$', (CONTAINER / "Dockerfile").read_text(), re.MULTILINE)
    for version_info, said in (((3, 11, 13), "Python 3.11.14"), ((3, 11, 14), ""), ((3, 12, 0), "")):
        code = f"import sys; sys.version_info = {version_info}; {checked}"
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert (ran.returncode == 0, said in ran.stderr) == (not said, True)


@each(files.IMAGES)
def test_image_files_are_sound(path: Path) -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    found = subprocess.run([hadolint, "--no-color", str(path)], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (0, "")
    text = path.read_text()
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", re.findall(r"^USER (.+)$", text, re.MULTILINE)[-1])
    for line in text.replace("\\\n", " ").splitlines():
        assert not (line.startswith(("ENV", "ARG")) and SECRET_NAME.search(line)), line
        for command in re.findall(r"pip install[^&;]*", line):
            assert "--no-deps" in command and ("--require-hashes" in command or "--no-index" in command), command


def test_the_build_context_holds_what_is_copied_and_no_file_of_passwords() -> None:
    text = (ROOT / ".dockerignore").read_text()
    first, *let_in = [line for line in text.splitlines() if line and not line.startswith("#")]
    last = [let_in.pop() for _ in range(3)]
    # the last line that fits a file decides
    assert (first, last) == ("*", ["**/.env*", "**/*.py[cod]", "**/__pycache__"])
    folders = [ROOT / line.removeprefix("!") for line in let_in]
    assert [folder for folder in folders if not folder.exists()] == []
    copied = [line for path in files.IMAGES for line in re.findall(r"^COPY (.+)$", path.read_text(), re.MULTILINE)]
    for source in (ROOT / source for line in copied for source in shlex.split(line)[:-1]):
        assert source.exists() and any(source.is_relative_to(folder) for folder in folders), source


def test_no_file_of_passwords_gets_to_the_cluster(tmp_path: Path) -> None:
    from ray._private.runtime_env.packaging import get_excludes_from_ignore_files

    passwords = [".env", "infra/mlflow/.env", "infra/mlflow/.env.local", "workflows/configs/.env"]
    shutil.copy(ROOT / ".rayignore", tmp_path)
    for name in (*passwords, "workflows/curate.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (left_out,) = get_excludes_from_ignore_files(tmp_path, include_gitignore=False)
    assert [left_out(tmp_path / name) for name in passwords] == [True] * 4
    assert not left_out(tmp_path / "workflows/curate.py")


# ---- what they install -----------------------------------------------------------------------------------------------


def listed(path: Path) -> dict[str, str]:
    """Version of each package of a list of the images; every one has a hash, and nothing else stands there."""
    text = "".join(line for line in path.read_text().splitlines(keepends=True) if not line.startswith("#"))
    entry = r"([a-z0-9-]+)==([\w.!]+)(?: \\\n    --hash=sha256:[0-9a-f]{64})+\n"
    assert text and re.sub(entry, "", text) == "", path
    return dict(re.findall(entry, text))


@each(files.PINS)
def test_what_images_install_is_pinned_by_hash(path: Path) -> None:
    for name, version in listed(path).items():
        assert CONSTRAINTS.get(name, version) == version, f"constraints.txt has another {name}"


def needed(requirements: list[str]) -> set[str]:
    """Names of all that some requirements need, by what is installed here."""
    found: set[str] = set()
    asked = [Requirement(text) for text in requirements]
    while asked:
        one = asked.pop()
        name = canonicalize_name(one.name)
        for extra in one.extras or {""}:
            if f"{name}[{extra}]" not in found:
                found.add(f"{name}[{extra}]")
                inner = [Requirement(text) for text in distribution(name).requires or []]
                asked += [r for r in inner if r.marker is None or r.marker.evaluate({"extra": extra})]
                asked += [Requirement(name)] if extra else []
    return {name.partition("[")[0] for name in found}


def test_the_lists_are_whole() -> None:
    """The images install without resolving: what is needed and not listed would be missing."""
    more = PROJECT["project"]["optional-dependencies"]
    lists = {path.stem: listed(path) for path in files.PINS if path.parent == CONTAINER}
    base = lists.pop("requirements")
    assert needed([*PROJECT["project"]["dependencies"], *more["diffusers"]]) <= base.keys()
    assert needed(more["cpu"]) <= base.keys() | lists["faiss-cpu"].keys()
    assert {Requirement(text).name for text in PROJECT["build-system"]["requires"]} <= base.keys()
    mlflow = listed(INFRA / "mlflow" / "requirements.txt")
    assert needed(["mlflow"]) | {"flask-wtf", "psycopg2-binary", "boto3"} <= mlflow.keys()
    assert lists.keys() == {"faiss-cpu", "faiss-gpu", "cloud-aws", "cloud-gcp"}
    for variant, added in lists.items():  # a second version would replace the first
        assert not base.keys() & added.keys(), variant
    assert lists["faiss-gpu"]["faiss-gpu"] == CONSTRAINTS["faiss-cpu"]
    # each boto3 asks for the botocore of its own number
    assert {versions.get("boto3") for versions in (mlflow, lists["cloud-aws"])} == {CONSTRAINTS["botocore"]}


def test_a_template_engine_with_a_known_hole_is_not_accepted() -> None:
    dependencies = map(Requirement, PROJECT["project"]["dependencies"])
    (jinja2,) = [one for one in dependencies if one.name == "jinja2"]
    assert [jinja2.specifier.contains(version) for version in ("3.1.5", "3.1.6")] == [False, True]


# ---- what they run ---------------------------------------------------------------------------------------------------


@each(files.SCRIPTS)
def test_scripts_are_shell(path: Path) -> None:
    assert subprocess.run(["sh", "-n", str(path)], capture_output=True, check=False).stderr == b""


@pytest.mark.parametrize(("code", "expected"), [(0, 0), (3, 0), (4, 4), (2, 2), (1, 1)])
def test_nothing_new_is_a_success_for_a_schedule_and_all_else_is_not(tmp_path: Path, code: int, expected: int) -> None:
    script = tmp_path / "infra" / "container" / "scheduled.sh"
    program = tmp_path / "workflows" / "curate.py"
    for path in (script, program):
        path.parent.mkdir(parents=True)
    shutil.copy(CONTAINER / script.name, script)
    program.write_text(f"import sys; print(sys.argv[1:]); sys.exit({code})")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = ["sh", str(script), "--config", "a b.yaml"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (expected, "['--config', 'a b.yaml']\n")


def test_programs_are_among_what_make_check_checks() -> None:
    said = subprocess.run(["make", "-n", "check"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (mypy,) = [line for line in said.splitlines() if "/mypy " in line]
    assert {str(path.parent.relative_to(ROOT)) for path in files.PROGRAMS} <= set(mypy.split())


def test_mlflow_starts_with_authentication_and_options_that_it_knows() -> None:
    from mlflow.cli import server

    known = {option for parameter in server.params for option in (*parameter.opts, *parameter.secondary_opts)}
    text = (INFRA / "mlflow" / "serve.sh").read_text()
    (command,) = re.findall(r"^exec (mlflow server .*(?:\\\n.*)*)", text, re.MULTILINE)
    assert set(re.findall(r"(?<=\s)(--[\w-]+)", command)) <= known
    assert "--app-name basic-auth" in command
    starts = [named(p) for p in files.FILES if re.search(r"^[^#]*mlflow server", p.read_text(), re.MULTILINE)]
    assert starts == ["infra/mlflow/serve.sh"]  # the one place; the image runs it


def test_users_database_holds_no_password() -> None:
    parser = configparser.ConfigParser()
    parser.read(INFRA / "mlflow" / "basic_auth.ini")
    section = parser["mlflow"]
    assert section.keys() == {"database_uri", "authorization_function", "default_permission"}
    assert section["database_uri"] == "postgresql+psycopg2://mlflow@postgres:5432/mlflow"


@each(files.COMPOSE)
def test_compose_files_are_sound(path: Path) -> None:
    (values,) = load(path)
    text = re.sub(r"@\$\{\w+_DIGEST:\?[^}]*\}", "", path.read_text())  # this parser knows no tag beside a digest
    PyCompose.from_yaml(text)  # raises on an unknown key
    with pytest.raises(ValueError, match="portz"):
        PyCompose.from_yaml(text.replace("ports:", "portz:"))
    for service in values["services"].values():
        assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", service["user"])
        assert not service.get("privileged") and service.get("network_mode", "none") == "none"
        assert all(str(port).startswith("127.0.0.1:") for port in service.get("ports", []))
        assert set(service.get("depends_on", {})) <= values["services"].keys()
        for name, value in service.get("environment", {}).items():
            if SECRET_NAME.search(name):
                assert value is None or re.fullmatch(r"\$\{\w+(:\?.*)?\}", value), f"{name} has a value"
        if "build" in service:
            context = path.parent / service["build"]["context"]
            assert context.resolve() == ROOT
            wanted = re.findall(r"^ARG (\w+)$", (context / service["build"]["dockerfile"]).read_text(), re.MULTILINE)
            assert set(wanted) == service["build"]["args"].keys()  # those without a default
