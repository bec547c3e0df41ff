"""Whole jobs with credentials that are recognisable: nothing that a run prints, logs or writes may hold them."""

import base64
import contextlib
import ipaddress
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from urllib.parse import quote

import psutil
import pyarrow as pa
import pytest
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from pd_core.core import files as core_files
from tests import canaries, tiny, toy_generator
from tests.fronting import Answer, Request, fronting
from tests.ray_head import free_ports, running_head
from tests.s3 import running_server

KEY = "CANARYKEY" + os.urandom(6).hex().upper()
SECRETS = {
    "access key": KEY,
    "secret key": canaries.random_text(40),
    "session token": canaries.random_text(90),
    "mlflow user": "canary-user-" + os.urandom(6).hex(),
    "mlflow password": canaries.random_text(24),
    "ray token": os.urandom(16).hex(),
    "hub token": "hf_" + os.urandom(17).hex(),
    "url password": "pw" + os.urandom(8).hex(),
}
PLANTED = {"planted": "leak" + os.urandom(12).hex()}


@pytest.mark.parametrize("before", range(4))
def test_the_search_finds_a_secret_in_every_form(tmp_path, before):
    secret = SECRETS["secret key"]
    clear = ("x" * before + secret + "tail").encode()
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "gzip") as stream:
        stream.write(clear)
    database = sqlite3.connect(tmp_path / "runs.db")
    database.execute("CREATE TABLE t (v TEXT)")
    database.execute("INSERT INTO t VALUES (?)", ("y" * 9000 + clear.decode(),))  # over more than one page
    database.commit()
    database.close()
    rows = pa.table({"a": [f"row {i} {clear.decode()}" for i in range(3)]})
    files = {
        "out.log": b"line\n" + clear,
        "header.log": b"Authorization: Basic " + base64.b64encode(clear),
        "safe.log": base64.urlsafe_b64encode(clear),
        "url.log": quote(clear.decode(), safe="").encode(),
        "part-0.parquet": core_files.table_bytes(rows),
        "log.gz": sink.getvalue().to_pybytes(),
        "runs.db": (tmp_path / "runs.db").read_bytes(),
        f"{quote(secret, safe='')}.txt": b"",
    }
    for name, data in files.items():
        assert canaries.find(SECRETS, name, data) == {"secret key"}, name
    assert canaries.find(SECRETS, "out.log", clear.replace(secret.encode(), secret[:-1].encode())) == set()


def test_a_cluster_of_our_own_listens_on_loopback_alone_and_has_no_dashboard(ray_cluster):
    family = psutil.Process().children(recursive=True)
    listening = {
        (process.name(), ipaddress.ip_address(connection.laddr.ip))
        for process in [psutil.Process(), *family]
        for connection in _connections(process)
        if connection.status == psutil.CONN_LISTEN
    }
    assert {"raylet", "gcs_server"} <= {name for name, _ in listening}
    for name, address in listening:
        assert (getattr(address, "ipv4_mapped", None) or address).is_loopback, (name, address)
    # what is left of the dashboard serves no page; where it listens at all, for Ray's own processes, it is on loopback
    # as well
    dashboards = [command for process in family if "dashboard.py" in (command := " ".join(process.cmdline()))]
    assert all("--disable-frontend" in command for command in dashboards)


def _connections(process):
    try:
        return process.net_connections(kind="inet")
    except psutil.NoSuchProcess:
        return []


# ---- a whole job -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder():
    """A short path: Ray keeps sockets in it."""
    made = Path(tempfile.mkdtemp(prefix="pd", dir="/tmp"))
    yield made
    shutil.rmtree(made)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A real S3 server, and the address of one before it that asks for the session token, which it does not know."""
    own = Credentials(KEY, SECRETS["secret key"])

    def gate(request: Request) -> Answer | None:
        if request.headers.get("X-Amz-Security-Token") != SECRETS["session token"]:
            return Answer(403, {}, b"<Error><Code>AccessDenied</Code><Message>no session token</Message></Error>")
        _sign_without_token(request, own)
        return None

    keys = {KEY: own.secret_key}
    with running_server(tmp_path_factory.mktemp("s3"), keys) as server, fronting(server.url, gate) as url:
        yield server, url


def _sign_without_token(request: Request, credentials: Credentials) -> None:
    signed = re.search("SignedHeaders=([^,]+)", request.headers["Authorization"])
    assert signed is not None
    kept = {n: v for n, v in request.headers.items() if n.lower() in signed[1].split(";") and "token" not in n.lower()}
    for name in ("Authorization", "X-Amz-Security-Token"):
        del request.headers[name]
    again = AWSRequest(request.method, f"http://{kept.pop('Host', request.headers['Host'])}{request.path}", kept)
    again.data = request.body
    S3SigV4Auth(credentials, "s3", "us-east-1").add_auth(again)
    for name, value in again.headers.items():
        del request.headers[name]
        request.headers[name] = value


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """A real MLflow server behind one that asks for a name and a password; its files."""
    files = tmp_path_factory.mktemp("mlflow")
    (port,) = free_ports(1)
    expected = base64.b64encode(f"{SECRETS['mlflow user']}:{SECRETS['mlflow password']}".encode()).decode()

    def gate(request: Request) -> Answer | None:
        if request.headers.get("Authorization") != f"Basic {expected}":
            return Answer(401, {"WWW-Authenticate": "Basic"}, b"who are you?")
        del request.headers["Authorization"]
        return None

    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{files}/mlflow.db", "--serve-artifacts"]
    command += ["--artifacts-destination", str(files / "served")]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with (files / "server.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=files, env=environment, start_new_session=True)
        try:
            deadline = time.monotonic() + 240
            while not _healthy(port):
                assert process.poll() is None and time.monotonic() < deadline, (files / "server.log").read_text()
                time.sleep(0.5)
            with fronting(f"http://127.0.0.1:{port}", gate) as url:
                yield files, url
        finally:
            family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            for one in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
            process.wait(10)


def _healthy(port):
    with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
        return True
    return False


@pytest.fixture(scope="module")
def environment(store, tracked, folder):
    """What an administrator gives to every node, and nothing else of this machine's."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
    (folder / "home").mkdir()
    return {
        **kept,
        "HOME": str(folder / "home"),
        "AWS_ENDPOINT_URL": store[1],
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRETS["secret key"],
        "AWS_SESSION_TOKEN": SECRETS["session token"],
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "MLFLOW_TRACKING_URI": tracked[1],
        "MLFLOW_TRACKING_USERNAME": SECRETS["mlflow user"],
        "MLFLOW_TRACKING_PASSWORD": SECRETS["mlflow password"],
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": SECRETS["ray token"],
        "HF_TOKEN": SECRETS["hub token"],
    }


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_whole_job_leaves_no_credential_anywhere(store, tracked, environment, folder, tmp_path, monkeypatch):
    server, _ = store
    bucket = server.make_bucket()
    for key, data in tiny.files().items():
        server.put(bucket, f"images/{key}", data)
    weights = tiny.write_checkpoint(tmp_path / "tiny.safetensors")
    root = f"s3://{bucket}"
    for name in list(os.environ):  # the head starts with the environment of this process
        if name not in environment:
            monkeypatch.delenv(name)
    with running_head(tmp_path, "--num-cpus=4", f"--temp-dir={folder}/ray", **environment) as head:
        jobs = [
            ("build_index.py", tiny.arguments(f"{root}/images", weights, f"{root}/index")),
            ("generate.py", toy_generator.sampling(index=f"{root}/index", output=f"{root}/samples")),
            ("evaluate.py", [f"--real={root}/index", f"--samples={root}/samples", f"--output={root}/evaluated"]),
        ]
        printed = ""
        for workflow, argv in jobs:
            done = head.submit(workflow, *argv, f"--tracking.experiment={PLANTED['planted']}")
            assert done.returncode == 0, done.stdout + done.stderr
            assert "tracking: http" in done.stdout, done.stdout  # the server took what was sent
            printed += done.stdout + done.stderr
    secret_or_planted = SECRETS | PLANTED
    copy = tmp_path / "bucket"
    server.filesystem().get(f"{bucket}/", str(copy), recursive=True)
    # a setting is printed, stored beside the data and sent to MLflow: the search does see what is in these places
    assert canaries.find(secret_or_planted, "stdout", printed.encode()) == {"planted"}
    assert not canaries.find(secret_or_planted, "head.log", head.log.read_bytes())
    places = {"ray": folder, "bucket": copy, "mlflow": tracked[0]}
    found = {place: canaries.find_under(secret_or_planted, files) for place, files in places.items()}
    assert "index/run.json" in found["bucket"] and "mlflow.db" in found["mlflow"]
    assert any(file.endswith(".log") for file in found["ray"])
    leaks = {f"{place}: {file}": who for place in found for file, who in found[place].items() if who != {"planted"}}
    assert not leaks
    assert len(list(copy.rglob("*.parquet"))) > 10


NOBODY = "http://127.0.0.1:9"  # discard: nobody listens
PASSWORD = SECRETS["url password"]

FAILURES = {
    "wrong secret": ({"AWS_SECRET_ACCESS_KEY": canaries.random_text(40)}, {}, "credentials"),
    "unknown key": ({"AWS_ACCESS_KEY_ID": "CANARYKEY0000000"}, {}, "credentials"),
    "no such store": ({"AWS_ENDPOINT_URL": NOBODY}, {}, "cannot reach the store"),
    "a source with a password": ({}, {"data.source": f"https://{KEY}:{PASSWORD}@host/images"}, "data.source"),
    "an output with a password": ({}, {"output": f"s3://{KEY}:{PASSWORD}@bucket/x"}, "output"),
    "a signed source": (
        {},
        {"data.source": f"https://host/images?X-Amz-Signature={PASSWORD}"},
        "must not hold a query",
    ),
    "no such hub": ({"HF_ENDPOINT": NOBODY}, {"features.model": "resnet18", "features.checkpoint": ""}, "resnet18"),
    "no such cluster": ({"RAY_ADDRESS": "127.0.0.1:9"}, {}, "no Ray cluster answers"),
    "no such MLflow": (
        {"MLFLOW_TRACKING_URI": f"http://canary:{PASSWORD}@127.0.0.1:9"},
        {"density.k": "500"},
        "this run goes on without it",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("failure", FAILURES)
def test_no_error_line_holds_a_credential(failure, store, environment, tmp_path, monkeypatch):
    changed, settings, expected = FAILURES[failure]
    server, _ = store
    bucket = server.make_bucket()
    for key, data in tiny.files().items():
        server.put(bucket, f"images/{key}", data)
    for name in list(os.environ):
        if name not in environment:
            monkeypatch.delenv(name)
    given = environment | {"AWS_ENDPOINT_URL": server.url} | changed
    if given["AWS_ENDPOINT_URL"] == server.url:
        monkeypatch.delenv("AWS_SESSION_TOKEN", raising=False)
        del given["AWS_SESSION_TOKEN"]  # this server knows none
    weights = tiny.write_checkpoint(tmp_path / "tiny.safetensors")
    argv = tiny.arguments(f"s3://{bucket}/images", weights, f"s3://{bucket}/out")
    argv += [f"--{name}={value}" for name, value in settings.items() if value]
    argv = [a for a in argv if not any(a.startswith(f"--{name}=") and not value for name, value in settings.items())]
    process = tiny.start(*argv, **given)
    text, _ = process.communicate(timeout=280)
    assert process.returncode in (1, 2) and expected in text, text
    assert len([line for line in text.splitlines() if line.startswith(("error:", "failed:"))]) == 1, text
    secret = SECRETS | {name: value for name, value in changed.items() if name.startswith("AWS_S")}
    assert not canaries.find(secret, "stdout", text.encode()), text
    assert "Traceback" not in text
