"""docs/operations.md and infra/README.md say what is there, and every file of infra/ is held by some test."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

from tests.infra import files
from tests.infra.files import DOCUMENT, INFRA, MANIFESTS, ROOT, named


def test_every_file_is_checked_by_some_test_and_named_in_the_readme() -> None:
    checked = {path for kind in files.KINDS for path in kind} | {manifest.path for manifest in MANIFESTS}
    rest = [named(path) for path in files.FILES if path not in checked]
    assert rest == ["infra/README.md", "infra/mlflow/basic_auth.ini"]  # test_users_database_holds_no_password
    text = (INFRA / "README.md").read_text()
    others = [path for path in files.FILES if path not in files.MONITORING]
    missing = [named(path) for path in others if path.name not in text and f"{path.parent.name}/`" not in text]
    assert missing == ["infra/README.md"]


def texts_of_ours() -> str:
    """Every text in the source, what is filled in standing as `…`."""
    found = []
    for path in (ROOT / "pd_core").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_lines_of_the_troubleshooting_table_are_lines_of_ours() -> None:
    (table,) = re.findall(r"^\| line \|.*\n\|[-|]+\n((?:\|.*\n)+)", DOCUMENT, re.MULTILINE)
    lines = [row.split(" | ")[0].removeprefix("| ").strip("`") for row in table.splitlines()]
    lines = [line.replace("MLFLOW_TRACKING_URI", "…") for line in lines]  # a constant, filled in
    ours = texts_of_ours()
    pieces = [(line, piece.strip(" ().'")) for line in lines for piece in line.split("…") if re.search(r"\w{3}", piece)]
    assert len(lines) > 20 and [pair for pair in pieces if pair[1] not in ours] == []


def test_files_that_the_document_names_are_there() -> None:
    names = re.findall(r"infra/[\w./-]+\w", DOCUMENT)
    assert len(names) > 10
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_it_installs_in_ten_commands() -> None:
    (block,) = re.findall(r"Ten commands:\n\n```sh\n(.*?)```", DOCUMENT, re.DOTALL)
    assert [int(n) for n in re.findall(r"^# (\d+) ", block, re.MULTILINE)] == list(range(1, 11))
    applied = [ROOT / name for name in re.findall(r"-f (infra/[\w./-]+)", block) if "Dockerfile" not in name]
    left_out = {m.path for m in MANIFESTS if not any(m.path.is_relative_to(folder) for folder in applied)}
    other_schedule = INFRA / "kubernetes" / "schedule" / "raycronjob.yaml"
    assert {path for path in left_out if path.parent.name != "jobs"} == {other_schedule}


def test_the_documented_command_writes_the_names_everywhere(tmp_path: Path) -> None:
    """Command 2 on a copy: afterwards no placeholder is left, however often one stands on a line."""
    (block,) = re.findall(r"^# 2 .*\n((?:.*\n)+?)# 3 ", DOCUMENT, re.MULTILINE)
    names = {
        "REGISTRY": "images.invalid/team",
        "BUCKET": "bucket-of-ours",
        "ACCOUNT": "999988887777",
        "ISSUER": "oidc.eks.eu-west-1.amazonaws.com/id/AB",
        "PYTHON_DIGEST": f"sha256:{'1' * 64}",
        "POSTGRES_DIGEST": f"sha256:{'2' * 64}",
    }
    export, *rest = block.splitlines()
    assert export.partition("   #")[0] == "export " + " ".join(f"{name}=..." for name in names)
    copy = tmp_path / "infra"
    shutil.copytree(INFRA, copy, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(["bash", "-ec", "\n".join(rest)], cwd=tmp_path, env={**os.environ, **names}, check=True)
    left = re.compile(r"registry\.example\.com|my-bucket|111122223333|oidc\.example\.com|sha256:digest-of")
    texts = [path.read_text() for path in copy.rglob("*") if path.is_file()]
    assert [line for text in texts for line in text.splitlines() if left.search(line)] == []
    assert json.loads((copy / "policies" / "bucket.json").read_text())
    image = f"postgres:17.6-bookworm@{names['POSTGRES_DIGEST']} "
    assert image in (copy / "mlflow" / "kubernetes.yaml").read_text()
