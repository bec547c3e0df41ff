"""Tracking against the real thing: SQLite stores and a real `mlflow server`, read back with MLflow's own client.

What a dead or silent server may cost is asserted as attempts and lines, not seconds.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pd_core.core import errors
from pd_core.core.errors import UserError
from pd_core.core.settings import load
from pd_core.core.settings.base import TrackingSettings
from pd_core.core.settings.index import BuildIndexSettings
from pd_core.engine import tracking
from tests.mlflow_server import MlflowServer


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch):
    """Each test starts without MLflow variables, and what it sets is undone."""
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        monkeypatch.delenv(name)
    for name in tracking.ENVIRONMENT:  # register for undoing: `start` sets them
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def migrated(tmp_path_factory) -> Path:
    """An SQLite store made by MLflow, to copy: making one takes seconds."""
    directory = tmp_path_factory.mktemp("migrated")
    with start(directory / "out", experiment="first"):
        pass
    return directory / "mlflow.db"


@pytest.fixture
def out(tmp_path, migrated) -> Path:
    (tmp_path / "mlflow.db").write_bytes(migrated.read_bytes())
    return tmp_path / "out"


def start(output, uri=None, tags=None, experiment="densities"):
    settings = TrackingSettings(uri=uri, experiment=experiment)
    return tracking.start(settings, str(output), "a run", tags or {"workflow": "build_index"})


def reader(out: Path):
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{out.parent / 'mlflow.db'}")


def runs(client, name="densities"):
    """All runs of the experiment, oldest first."""
    experiment = client.get_experiment_by_name(name)
    return list(client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"]))


def said(capsys) -> list[str]:
    """Lines about tracking; nothing else may be written, neither by MLflow nor by urllib3."""
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out.splitlines()


# ---- SQLite ---------------------------------------------------------------------------------------------------------


def test_new_store_beside_the_output(tmp_path, capsys):
    out = tmp_path / "spaces and #1 é'\"" / "out"
    with start(out) as tracker:
        tracker.artifact_bytes("report/index.html", b"<html>")
        assert shlex.split(tracker.hint)[-1] == f"sqlite:///{out.parent}/mlflow.db"
    assert said(capsys) == []
    client = reader(out)
    (run,) = runs(client)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "a run"
    assert run.data.tags["workflow"] == "build_index"
    assert Path(client.download_artifacts(run.info.run_id, "report/index.html")).read_bytes() == b"<html>"
    assert (out.parent / "mlartifacts" / run.info.run_id / "artifacts/report/index.html").is_file()


def test_everything_logged_is_read_back(out, capsys):
    from mlflow.data import get_source

    digest = "0123456789" * 6
    with start(out) as tracker:
        tracker.params({"density.k": 20, "index.kind": "auto", "features.actors": None, "long": "x" * 9000})
        tracker.params({f"many.{i}": i for i in range(130)})
        with tracker.stage("features") as stage:
            stage.metrics({"images_per_s": 418.5, "zero": 0})
            stage.metrics({"loss": 0.5}, step=1)
            stage.metrics({"loss": 0.25}, step=2)
            stage.dataset("images", "s3://bucket/ffhq", digest, "source", {"rows": 7})
            stage.dataset("features", str(out / "features"), digest, "features")
        tracker.artifact_bytes("top.bin", bytes(range(256)))
    assert said(capsys) == []

    client = reader(out)
    parent, child = runs(client)
    assert {k: parent.data.params[k] for k in ("density.k", "index.kind", "features.actors")} == {
        "density.k": "20",
        "index.kind": "auto",
        "features.actors": "None",
    }
    assert [parent.data.params[f"many.{i}"] for i in range(130)] == [str(i) for i in range(130)]
    assert len(parent.data.params["long"]) == 6000
    assert parent.data.params["long"].endswith("… (9000 characters)")
    assert parent.data.tags.get("mlflow.parentRunId") is None
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert child.data.tags["workflow"] == "build_index"
    assert (child.info.run_name, child.info.status, parent.info.status) == ("features", "FINISHED", "FINISHED")
    assert child.data.metrics == {"images_per_s": 418.5, "zero": 0.0, "loss": 0.25}
    history = client.get_metric_history(child.info.run_id, "loss")
    assert [(metric.step, metric.value) for metric in history] == [(1, 0.5), (2, 0.25)]
    path = client.download_artifacts(parent.info.run_id, "top.bin")
    assert Path(path).read_bytes() == bytes(range(256))

    inputs = {item.dataset.name: item for item in child.inputs.dataset_inputs}
    assert inputs["images"].dataset.digest == digest[:36]
    assert json.loads(inputs["images"].dataset.profile) == {"rows": 7}
    assert [(tag.key, tag.value) for tag in inputs["images"].tags] == [("mlflow.data.context", "source")]
    # MLflow's own resolver finds the data again
    found = {name: get_source(item).to_dict()["uri"] for name, item in inputs.items()}
    assert found == {"images": "s3://bucket/ffhq", "features": str(out / "features")}


def test_numbers_that_are_not_finite_become_tags(out):
    with start(out) as tracker:
        tracker.metrics({"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.5})
    (run,) = runs(reader(out))
    assert run.data.metrics == {"d": 1.5}
    assert {k: v for k, v in run.data.tags.items() if "non_finite" in k} == {
        "non_finite.a": "nan",
        "non_finite.b": "inf",
        "non_finite.c": "-inf",
    }


@pytest.mark.parametrize(
    "names",
    [
        ["recall@20", "recall#20"],
        ["a//b", "/a", "../a", "..", "."],
        ["é", "", " ", "\n"],
        ["x" * 300, "x" * 299],
        ["a b/c:d.e-f"],
    ],
)
def test_any_name_is_accepted_and_none_is_lost(out, capsys, names):
    with start(out) as tracker:
        tracker.metrics({name: float(i) for i, name in enumerate(names)})
        tracker.params(dict.fromkeys(names, "v"))
        assert tracker.active
    (run,) = runs(reader(out))
    assert sorted(run.data.metrics.values()) == [float(i) for i in range(len(names))]
    assert len(run.data.params) == len(names)
    assert said(capsys) == []


@pytest.mark.parametrize(
    ("error", "status"), [(RuntimeError("out of memory"), "FAILED"), (KeyboardInterrupt(), "KILLED")]
)
def test_failed_stage_is_marked_and_the_exception_propagates(out, error, status):
    def workflow():
        with start(out) as tracker:
            with tracker.stage("done"):
                pass
            with tracker.stage("broken"):
                raise error

    with pytest.raises(type(error)) as caught:
        workflow()
    assert caught.value is error
    assert {run.info.run_name: run.info.status for run in runs(reader(out))} == {
        "a run": status,
        "done": "FINISHED",
        "broken": status,
    }


def test_failed_stage_that_the_workflow_survives(out):
    with start(out) as tracker, contextlib.suppress(RuntimeError), tracker.stage("broken"):
        raise RuntimeError("no")
    assert [run.info.status for run in runs(reader(out))] == ["FINISHED", "FAILED"]


def test_wrong_arguments_raise(out):
    with pytest.raises(TypeError), start(out) as tracker:
        tracker.metrics({"a": None})
    assert [run.info.status for run in runs(reader(out))] == ["FAILED"]


def test_runs_of_a_dead_process_are_superseded(out):
    """A process killed in the middle of a stage; the same command again; a run of another output stays as it is."""
    body = (
        "import os, signal; from pd_core.engine import tracking; from pd_core.core.settings.base import "
        "TrackingSettings\n"
        "settings = TrackingSettings(experiment='densities')\n"
        f"with tracking.start(settings, {str(out)!r}, 'dead', {{}}) as tracker, tracker.stage('features'):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", body], check=False, capture_output=True, text=True)
    assert (killed.returncode, killed.stdout, killed.stderr) == (-signal.SIGKILL, "", "")
    client = reader(out)
    dead = runs(client)
    assert [run.info.status for run in dead] == ["RUNNING", "RUNNING"]
    with start(out.parent / "other"):
        assert [run.info.status for run in runs(client)] == ["RUNNING"] * 3
        with start(out) as tracker:
            for run in dead:
                ended = client.get_run(run.info.run_id)
                assert ended.info.status == "KILLED"
                assert ended.data.tags["pd_core.superseded_by"] == tracker.run_id
            assert client.get_run(tracker.run_id).info.status == "RUNNING"
    assert [run.info.status for run in runs(client)] == ["KILLED", "KILLED", "FINISHED", "FINISHED"]


def test_store_that_cannot_be_opened_is_given_up_at_once(tmp_path, capsys):
    (tmp_path / "mlflow.db").mkdir()
    with start(tmp_path / "out") as tracker:
        assert use(tracker) == "done"
    (line,) = said(capsys)
    assert "unable to open database file" in line
    assert line.endswith("this run goes on without it")


# ---- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("file:///data/mlruns", "use sqlite:////data/mlruns/mlflow.db"),
        ("mlruns", "use sqlite:///mlruns/mlflow.db"),
        ("/data/mlruns/", "use sqlite:////data/mlruns/mlflow.db"),
        ("gopher://host", "unknown or unsupported store 'gopher'"),
        ("postgresql://db/mlflow", "put an MLflow server in front"),
        ("http://", "expected http(s)://HOST:PORT"),
        ("sqlite://", "unknown or unsupported store"),
        ("sqlite:///:memory:", "names no file"),
        ("sqlite:///a?b", "cannot open a path with '?' or '%'"),
        ("sqlite:////data/100%25/mlflow.db", "cannot open a path with '?' or '%'"),
    ],
)
@pytest.mark.parametrize("origin", ["tracking.uri", "MLFLOW_TRACKING_URI"])
def test_wrong_uri_is_refused_before_the_run(monkeypatch, tmp_path, uri, expected, origin):
    if origin != "tracking.uri":
        monkeypatch.setenv(origin, uri)
    with pytest.raises(UserError) as caught, start(tmp_path, uri if origin == "tracking.uri" else None):
        raise AssertionError("the body must not run")
    message = str(caught.value)
    assert expected in message
    assert origin in message
    assert "\n" not in message
    assert "hun" not in message


@pytest.mark.parametrize("uri", ["http://host:port", "http://me:hun/ter2@host:80"])
def test_an_address_that_is_none_is_refused_by_the_settings_and_of_the_environment(monkeypatch, tmp_path, uri):
    with pytest.raises(UserError, match="must not hold a name or password") as caught:
        load.load(BuildIndexSettings, [f"--tracking.uri={uri}"], prog="build_index.py")
    assert "hun" not in str(caught.value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(UserError, match="expected http") as caught, start(tmp_path):
        raise AssertionError("the body must not run")
    assert "hun" not in str(caught.value)


def test_a_refused_uri_of_the_environment_is_shown_without_its_password(monkeypatch, tmp_path):
    monkeypatch.setenv(
        "MLFLOW_TRACKING_URI", "postgresql://me:hunter2@db/mlflow"
    )  # in the settings it is refused at once
    with pytest.raises(UserError, match="put an MLflow server in front") as caught, start(tmp_path):
        raise AssertionError("the body must not run")
    assert "hunter2" not in str(caught.value)


def test_an_address_with_a_token_in_its_query_is_refused_and_not_shown(monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000/?token=hunter2")
    with pytest.raises(UserError, match="has a query") as caught, start(tmp_path):
        raise AssertionError("the body must not run")
    assert "hunter2" not in str(caught.value)


def test_precedence_of_the_uri(monkeypatch, tmp_path):
    settings, given = TrackingSettings(), TrackingSettings(uri="http://setting:1")
    assert tracking.resolve_uri(settings, f"{tmp_path}/a/out/") == f"sqlite:///{tmp_path}/a/mlflow.db"
    assert tracking.resolve_uri(settings, f"file://{tmp_path}/out") == f"sqlite:///{tmp_path}/mlflow.db"
    assert tracking.resolve_uri(settings, "s3://bucket/out") is None
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://variable:1")
    assert tracking.resolve_uri(settings, "s3://bucket/out") == "http://variable:1"
    assert tracking.resolve_uri(given, str(tmp_path)) == "http://setting:1"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://me:pw@host:5000/x", "http://***@host:5000/x"),
        ("see https://token@host and s3://b/a@b.png", "see https://***@host and s3://b/a@b.png"),
        ("s3://bucket/key", "s3://bucket/key"),
        ("user@host", "user@host"),
        ("https://h/x?X-Amz-Signature=ab&X-Amz-Date=1: 403", "https://h/x?*** 403"),
        ("'https://h/x?TOKEN' and 's3://b/k?versionId=3'", "'https://h/x?***' and 's3://b/k?***'"),
        ("Max retries exceeded with url: /api?token=abc (Caused", "Max retries exceeded with url: /api?*** (Caused"),
        ("https://h/cb#access_token=abc", "https://h/cb#***"),
        ("https://me:pw@h/x?sig=1", "https://***@h/x?***"),
        ("http://h:5000/#/experiments/1/runs/2", "http://h:5000/#/experiments/1/runs/2"),
        ("s3://b/year=20??/m=1/?.png and really?", "s3://b/year=20??/m=1/?.png and really?"),
    ],
)
def test_redact(text, shown):
    assert errors.redact(text) == shown


def test_credentials_reach_neither_lines_nor_store(out, capsys, monkeypatch):
    with start(out, tags={"server": "http://me:hunter2@host"}) as tracker:
        tracker.params({"tracking.uri": "http://me:hunter2@host", "index.kind": "auto"})
        tracker.dataset("images", "s3://me:hunter2@bucket/x", "1", "source", None)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hunter2@127.0.0.1:9")
    with start(out) as tracker:
        use(tracker)
    lines = said(capsys)
    assert len(lines) == 1
    assert "http://***@127.0.0.1:9" in lines[0]
    assert "hunter2" not in lines[0]
    assert b"hunter2" not in (out.parent / "mlflow.db").read_bytes()


@pytest.mark.parametrize(
    ("settings", "output", "expected"),
    [
        ("enabled=False", "/tmp/x/out", ""),
        ("", "s3://bucket/out", "tracking: off (no MLFLOW_TRACKING_URI for an output on s3)\n"),
    ],
)
def test_without_tracking_mlflow_is_not_imported(settings, output, expected):
    body = (
        "import sys; from pd_core.engine import tracking; from pd_core.core.settings.base import TrackingSettings\n"
        f"with tracking.start(TrackingSettings({settings}), {output!r}, 'r', {{}}) as tracker:\n"
        "    tracker.params({'a': 1}); tracker.metrics({'a': 1}); tracker.artifact_bytes('a', b'')\n"
        "    with tracker.stage('s') as stage: stage.dataset('d', 's3://b', '1', 'source', None)\n"
        "    assert tracker.hint is None and not tracker.active\n"
        "assert 'mlflow' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", body], check=True, capture_output=True, text=True)
    assert done.stdout == expected


# ---- servers that do not answer -------------------------------------------------------------------------------------


def use(tracker) -> str:
    """Everything a workflow calls."""
    tracker.params({"a": 1})
    tracker.metrics({"b": 2.0, "c": math.nan})
    with tracker.stage("features") as stage:
        stage.dataset("images", "s3://bucket/x", "1", "source", None)
        stage.artifact_bytes("report/index.html", b"x")
    return "done"


class Stub:
    """A server on loopback that counts connections and requests; it answers each request with `answer`, or never."""

    def __init__(self, answer: bytes | None) -> None:
        self.answer = answer
        self.requests = 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.open: list[socket.socket] = []
        threading.Thread(target=self._serve, daemon=True).start()

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.listener.getsockname()[1]}"

    def _serve(self) -> None:
        with contextlib.suppress(OSError):  # closed at the end of the test
            while True:
                connection, _ = self.listener.accept()
                self.open.append(connection)
                self.requests += 1
                if self.answer is not None:
                    connection.recv(65536)
                    connection.sendall(self.answer)
                    connection.close()


@pytest.fixture
def stub() -> Iterator[type[Stub]]:
    made: list[Stub] = []

    def make(answer: bytes | None) -> Stub:
        made.append(Stub(answer))
        return made[-1]

    yield make  # type: ignore[misc]
    for server in made:
        server.listener.close()
        for connection in server.open:
            connection.close()


def reply(status: str, headers: str = "", body: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n{headers}\r\n{body}".encode()


@pytest.mark.parametrize(
    ("answer", "attempts", "reason"),
    [
        (None, 3, "does not answer"),  # takes the connection and is silent: 3 attempts of MLFLOW_HTTP_REQUEST_TIMEOUT
        # a server in maintenance: the ten minutes that it asks for would be slept if its header were honored
        (reply("503 Service Unavailable", "Retry-After: 600\r\n"), 3, "503"),
        (reply("403 Forbidden", body="<html>no</html>"), 1, "403"),
        (reply("200 OK", body="<html>\nsome other server</html>"), 1, "not in a valid JSON format"),
    ],
    ids=["silent", "maintenance", "forbidden", "other"],
)
def test_server_without_an_answer_costs_one_call_and_one_line(
    monkeypatch, tmp_path, capsys, stub, answer, attempts, reason
):
    server = stub(answer)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")  # the user's value counts
    with start(tmp_path, server.uri) as tracker:
        assert use(tracker) == "done"
        assert not tracker.active
        assert tracker.hint is None
    assert server.requests == attempts
    (line,) = said(capsys)
    assert line.startswith(f"tracking: {server.uri} ")
    assert reason in line
    assert line.endswith("; this run goes on without it")


@pytest.mark.slow
def test_backlog_that_nobody_accepts(tmp_path, capsys):
    """The default limits: three attempts of 5 s, and about 3 s between them."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        began = time.monotonic()
        with start(tmp_path, f"http://127.0.0.1:{listener.getsockname()[1]}") as tracker:
            assert use(tracker) == "done"
        assert time.monotonic() - began < 30
    assert len(said(capsys)) == 1


def test_port_that_nobody_listens_on(tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

    def workflow():
        with start(tmp_path, f"http://127.0.0.1:{port}") as tracker:
            use(tracker)
            raise RuntimeError("the workflow's own")

    with pytest.raises(RuntimeError, match="the workflow's own"):
        workflow()
    (line,) = said(capsys)
    assert "does not answer" in line
    assert "Connection refused" in line


# ---- a real server --------------------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path, migrated) -> Iterator[MlflowServer]:
    (tmp_path / "mlflow.db").write_bytes(migrated.read_bytes())
    started = MlflowServer(tmp_path)
    try:
        started.start()
        yield started
    finally:
        started.kill()


@pytest.mark.slow
def test_server_that_dies_in_the_middle(server, tmp_path, capsys):
    """One run from end to end, read back from the server; then one in whose second stage the server is killed."""
    uri = server.uri
    with start("s3://bucket/out", uri, experiment="remote") as tracker:
        assert use(tracker) == "done"
        assert tracker.run_id in tracker.hint
    assert said(capsys) == []
    with start("s3://bucket/out", uri, experiment="remote") as second:
        with second.stage("features") as stage:
            stage.metrics({"rows": 1})
        server.kill()
        with second.stage("index") as stage:
            use(stage)
        assert use(second) == "done"
        assert second.hint is None
    (line,) = said(capsys)
    assert line.startswith(f"tracking: {uri} does not answer")

    client = reader(tmp_path / "out")  # the server's own database
    parent, child, cut, before = runs(client, "remote")
    assert [run.info.status for run in (parent, child, cut, before)] == ["FINISHED", "FINISHED", "RUNNING", "FINISHED"]
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert parent.data.params == {"a": "1"}
    assert parent.data.metrics == {"b": 2.0}
    assert parent.data.tags["non_finite.c"] == "nan"
    assert [item.dataset.name for item in child.inputs.dataset_inputs] == ["images"]
    (uploaded,) = (tmp_path / "served").rglob("index.html")
    assert uploaded.read_bytes() == b"x"
    assert child.info.run_id in str(uploaded)
    assert cut.info.run_id == second.run_id
