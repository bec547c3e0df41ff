"""MLflow: one parent run per workflow, a nested run per stage.

Tracking never decides the fate of a run: a server that does not answer delays it by seconds, is mentioned in one line,
and from then on nothing is tracked. Everything happens in the driver, through `MlflowClient` with explicit run ids.
The stores are those whose failures can be bounded so: an MLflow server over http(s), and an SQLite file.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import math
import os
import posixpath
import re
import shlex
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from pd_core.core import artifacts, files
from pd_core.core.errors import UserError, redact
from pd_core.core.settings.base import TrackingSettings
from pd_core.engine.console import say

URI_VARIABLE = "MLFLOW_TRACKING_URI"
SQLITE = "sqlite:///"
DATABASE_FILE = "mlflow.db"
ARTIFACT_FOLDER = "mlartifacts"

OUTPUT_TAG = "pd_core.output"
STAGE_TAG = "pd_core.stage"
SUPERSEDED_TAG = "pd_core.superseded_by"
PARENT_TAG = "mlflow.parentRunId"
NON_FINITE_TAG = "non_finite."

# Three attempts of at most 5 s each instead of MLflow's eight of 120 s. Retry-After is ignored because a server in
# maintenance may ask for an hour. What the user has set stays.
ENVIRONMENT: Mapping[str, str] = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # the URL as given, credentials included
}

# Limits of MLflow, the same in every store.
MAX_NAME = 250
MAX_PARAM = 6000
MAX_DATASET_NAME = 500
MAX_DIGEST = 36
PARAMS_PER_REQUEST = 25  # 25 values of 6000 characters stay below 1 MB, the limit of a request, even when escaped
METRICS_PER_REQUEST = 1000


# ---- where to -------------------------------------------------------------------------------------------------------


def shown(uri: str) -> str:
    """A tracking URI without credentials, also where these hold characters that should have been quoted."""
    return uri if uri.startswith(SQLITE) else redact(re.sub(r"//.*@", "//***@", uri))


def resolve_uri(settings: TrackingSettings, output: str) -> str | None:
    """The tracking store: the setting, else MLFLOW_TRACKING_URI, else SQLite beside a local output, else None.

    Raises:
        UserError: a store that this program cannot write to.
    """
    name, uri = "tracking.uri", settings.uri
    if not uri:
        name, uri = f"environment {URI_VARIABLE}", os.environ.get(URI_VARIABLE)
    if uri:
        _check_uri(name, uri)
        return uri
    if not files.is_local(output):
        return None
    uri = SQLITE + str(Path(files.absolute(output)).parent / DATABASE_FILE)
    _check_uri("tracking.uri beside --output", uri)
    return uri


def _check_uri(name: str, uri: str) -> None:
    where = f"{name} {shown(uri)!r}"
    if uri.startswith(SQLITE):
        if uri.removeprefix(SQLITE) in ("", ":memory:"):
            raise UserError(f"{where}: names no file; expected sqlite:///PATH/mlflow.db")
        if re.search("[?%]", uri):  # MLflow reads the path as written, SQLAlchemy (from 2.1) unquotes it
            raise UserError(
                f"{where}: MLflow cannot open a path with '?' or '%' in it; set tracking.uri to another one"
            )
        return
    scheme = uri.partition("://")[0].lower() if "://" in uri else uri.partition(":")[0] if ":" in uri else ""
    if scheme in ("", "file"):
        path = shown(uri).removeprefix("file://").removeprefix("file:").rstrip("/")
        raise UserError(
            f"{where}: MLflow no longer keeps runs in a plain directory; "
            f"use sqlite:///{path}/mlflow.db or the http:// address of an MLflow server"
        )
    if scheme not in ("http", "https"):
        raise UserError(
            f"{where}: unknown or unsupported store {scheme!r}; expected http(s)://HOST:PORT or "
            "sqlite:///PATH/mlflow.db (put an MLflow server in front of any other)"
        )
    try:
        parts = urlsplit(uri)
        complete = bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number
        complete = False
    if complete and (parts.query or parts.fragment):
        raise UserError(
            f"{where}: has a query, which no MLflow server reads and which may hold a token; drop it, and set "
            "MLFLOW_TRACKING_TOKEN if the server asks for one"
        )
    if not complete:
        raise UserError(f"{where}: expected http(s)://HOST:PORT; mend the address")


def _artifact_location(uri: str) -> str | None:
    """A server knows where its artifacts go. SQLite does not, and MLflow's default is the current directory."""
    if not uri.startswith(SQLITE):
        return None
    return (Path(uri.removeprefix(SQLITE)).absolute().parent / ARTIFACT_FOLDER).as_uri()


# ---- the connection -------------------------------------------------------------------------------------------------


def _infrastructure_errors() -> tuple[type[BaseException], ...]:
    """What a store that is down, full, denied or half installed raises; anything else is a defect and propagates."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    # requests' errors are OSErrors; ModuleNotFoundError: the client of the server's artifact store, e.g. boto3
    errors: list[type[BaseException]] = [MlflowException, SQLAlchemyError, sqlite3.Error, OSError, ModuleNotFoundError]
    with contextlib.suppress(ImportError):
        from botocore.exceptions import BotoCoreError, ClientError

        errors += [BotoCoreError, ClientError]
    with contextlib.suppress(ImportError):
        from boto3.exceptions import Boto3Error  # a failed upload to S3

        errors.append(Boto3Error)
    return tuple(errors)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """MLflow's migrations and urllib3's retries log line after line; our one line says what the user needs."""
    loggers = [logging.getLogger(name) for name in ("mlflow", "alembic", "urllib3.connectionpool")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@dataclass
class _Connection:
    """The client of one store, shared by all trackers of a run. Once it is not alive, every call does nothing."""

    uri: str = ""
    alive: bool = False
    client: Any = None
    experiment_id: str = ""
    tags: dict[str, str] = field(default_factory=dict)

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`function(client, *args)`, or None after the store's first failure, which is said in one line."""
        if not self.alive:
            return None
        with _quiet():
            errors = _infrastructure_errors()  # imports mlflow
        try:
            with _quiet():
                return function(self.client, *args, **kwargs)
        except errors as error:
            self.alive = False
            say(f"tracking: {shown(self.uri)} {_reason(error, self.uri)}; this run goes on without it")
            return None


def _reason(error: BaseException, uri: str) -> str:
    """Verb and cause of a failure on one line, without credentials."""
    text = " ".join(str(error).split()) or type(error).__name__
    verb = "fails"
    if "Caused by " in text:  # urllib3 puts the cause last: the connection, or no answer in time
        verb, text = "does not answer", text.rpartition("Caused by ")[2].rstrip(") ") + ")"
    text = redact(text.replace(uri, shown(uri)))
    if not uri.startswith(SQLITE) and (secret := urlsplit(uri).password or urlsplit(uri).username):
        text = text.replace(secret, "***")
    return f"{verb} ({text if len(text) <= 200 else text[:199] + '…'})"


def _connect(uri: str, experiment: str, tags: Mapping[str, str]) -> _Connection:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    connection = _Connection(uri, alive=True, tags=dict(tags))
    connection.client = connection.call(_open_store, uri)
    connection.experiment_id = connection.call(_experiment_id, experiment, _artifact_location(uri)) or ""
    return connection


def _open_store(_: None, uri: str) -> Any:
    from mlflow import MlflowClient

    if uri.startswith(SQLITE):
        path = Path(uri.removeprefix(SQLITE))
        path.parent.mkdir(parents=True, exist_ok=True)
        # MLflow tries a database that it cannot open ten times, 100 s in all; this asks once
        with contextlib.closing(sqlite3.connect(path)) as database:
            database.execute("BEGIN IMMEDIATE")
            database.rollback()
    return MlflowClient(tracking_uri=uri)  # this migrates the database, if there is one


def _experiment_id(client: Any, name: str, location: str | None) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client.create_experiment(name, artifact_location=location)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another run was first
                raise
            found = client.get_experiment_by_name(name)
    return found.experiment_id


def _supersede(client: Any, experiment_id: str, output: str, run_id: str) -> None:
    """End runs of the same output that still say RUNNING: their process died, since an output has one run at a time."""
    stale, token = [], None
    while token != "":
        page = client.search_runs([experiment_id], "attributes.status = 'RUNNING'", page_token=token)
        # compared here: MLflow's filter language has no way to quote every path
        stale += [run.info.run_id for run in page if run.data.tags.get(OUTPUT_TAG) == output]
        token = page.token or ""
    for stale_id in stale:
        if stale_id != run_id:
            client.set_tag(stale_id, SUPERSEDED_TAG, run_id)
            client.set_terminated(stale_id, "KILLED")


# ---- what a workflow sees -------------------------------------------------------------------------------------------


class Tracker:
    """One MLflow run. Where tracking is off or the store has failed, its methods do nothing.

    Only the store's failures are absorbed; wrong arguments raise as everywhere.
    """

    def __init__(self, connection: _Connection, run_id: str | None) -> None:
        self._connection = connection
        self.run_id = run_id

    @property
    def active(self) -> bool:
        """Whether calls still reach the store."""
        return self._connection.alive and self.run_id is not None

    @property
    def hint(self) -> str | None:
        """Where to look at the run: its address, or the command that shows it; None where nothing is tracked."""
        if not self.active:
            return None
        uri, experiment_id = shown(self._connection.uri), self._connection.experiment_id
        if uri.startswith(SQLITE):
            return f"mlflow ui --backend-store-uri {shlex.quote(uri)}"
        return f"{uri.rstrip('/')}/#/experiments/{experiment_id}/runs/{self.run_id}"

    def params(self, values: Mapping[str, Any]) -> None:
        """Log parameters, e.g. `{"density.k": 20}`. Values become text, cut at MLflow's 6000 characters, marked."""
        texts = {name: _cut(redact(str(value))) for name, value in _clean_names(values).items()}
        for batch in _batches(texts.items(), PARAMS_PER_REQUEST):
            self._connection.call(_log_params, self.run_id, batch)

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Log numbers at `step` (default 0).

        NaN and infinities become tags `non_finite.NAME`: as metrics MLflow would store infinity as 1.8e308.
        """
        numbers = {name: float(value) for name, value in _clean_names(values).items()}
        for name, value in numbers.items():
            if not math.isfinite(value):
                self._connection.call(_method("set_tag"), self.run_id, (NON_FINITE_TAG + name)[:MAX_NAME], str(value))
        finite = [(name, value) for name, value in numbers.items() if math.isfinite(value)]
        for batch in _batches(finite, METRICS_PER_REQUEST):
            self._connection.call(_log_metrics, self.run_id, batch, step or 0)

    def dataset(
        self, name: str, source_uri: str, digest: str, context: str, profile: Mapping[str, Any] | None = None
    ) -> None:
        """Record what the run read or made; no data are loaded.

        Args:
            name: shown in MLflow.
            source_uri: where the data are, local or s3://.
            digest: of their content, e.g. a stage's fingerprint; MLflow keeps the first 36 characters.
            context: their part in the run, e.g. `source` or `features`.
            profile: JSON-able facts such as row counts.
        """
        uri = redact(files.absolute(source_uri))
        kind = "local" if files.is_local(source_uri) else uri.partition("://")[0]
        facts = None if profile is None else artifacts.canonical(dict(profile))
        values = (name[:MAX_DATASET_NAME], digest[:MAX_DIGEST], kind, json.dumps({"uri": uri}), facts)
        self._connection.call(_log_dataset, self.run_id, values, context)

    def artifact_bytes(self, path: str, data: bytes) -> None:
        """Store a file under the run's artifacts, e.g. `report/index.html`."""
        parts = PurePosixPath(path).parts
        assert parts and not path.startswith("/") and ".." not in parts, f"not a relative path: {path!r}"
        self._connection.call(_log_bytes, self.run_id, path, data)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[Tracker]:
        """A nested run. It ends FINISHED, FAILED after an exception or KILLED after an interrupt; these propagate."""
        tags = {STAGE_TAG: name, **({PARENT_TAG: self.run_id} if self.run_id else {})}
        with _run(self._connection, name, tags) as tracker:
            yield tracker


def connect(settings: TrackingSettings, output: str, tags: Mapping[str, str]) -> Future[_Connection] | None:
    """Connect to the store in a thread, which takes seconds of imports; None where nothing is tracked. See `start`."""
    uri = resolve_uri(settings, output) if settings.enabled else None
    if uri is None:
        return None
    own = {OUTPUT_TAG: _place(output), "mlflow.source.name": Path(sys.argv[0]).name, "mlflow.source.type": "LOCAL"}
    thread = ThreadPoolExecutor(1)
    connecting = thread.submit(_connect, uri, settings.experiment, own | {n: redact(text) for n, text in tags.items()})
    thread.shutdown(wait=False)
    return connecting


def _place(output: str) -> str:
    return redact(files.absolute(output))


@contextlib.contextmanager
def start(
    settings: TrackingSettings,
    output: str,
    run_name: str,
    tags: Mapping[str, str],
    connecting: Future[_Connection] | None = None,
) -> Iterator[Tracker]:
    """The run of a workflow; whatever happens to the store, the body runs and its exceptions propagate.

    Runs of the same output that a dead process left RUNNING end as KILLED, tagged with the new run's id.

    Args:
        settings: store and experiment.
        output: URI of the workflow's output; it identifies re-runs, and SQLite lies beside it.
        run_name: shown in MLflow.
        tags: of the parent run and of all nested ones, e.g. workflow and version.
        connecting: by `connect`, of the same arguments, if that was called before.

    Raises:
        UserError: the tracking URI is of no store that can be written to.
    """
    connecting = connecting or connect(settings, output, tags)
    if connecting is None:
        if settings.enabled:
            say(f"tracking: off (no {URI_VARIABLE} for an output on {output.partition('://')[0]})")
        yield Tracker(_Connection(), None)
        return
    connection = connecting.result()
    with _run(connection, run_name, {}) as tracker:
        connection.call(_supersede, connection.experiment_id, _place(output), tracker.run_id)
        yield tracker


@contextlib.contextmanager
def _run(connection: _Connection, name: str, tags: Mapping[str, str]) -> Iterator[Tracker]:
    given = {"tags": {**connection.tags, **tags}, "run_name": name}
    created = connection.call(_method("create_run"), connection.experiment_id, **given)
    run_id = created and created.info.run_id
    status = "FINISHED"
    try:
        yield Tracker(connection, run_id)
    except BaseException as error:
        status = "FAILED" if isinstance(error, Exception) else "KILLED"
        raise
    finally:
        connection.call(_method("set_terminated"), run_id, status)


# ---- requests: each takes the client first, as `_Connection.call` gives it -------------------------------------------


def _method(name: str) -> Callable[..., Any]:
    return lambda client, *args, **kwargs: getattr(client, name)(*args, **kwargs)


def _log_params(client: Any, run_id: str, batch: list[tuple[str, str]]) -> None:
    from mlflow.entities import Param

    client.log_batch(run_id, params=[Param(name, text) for name, text in batch], synchronous=True)


def _log_metrics(client: Any, run_id: str, batch: list[tuple[str, float]], step: int) -> None:
    from mlflow.entities import Metric

    now_ms = int(time.time() * 1000)
    client.log_batch(run_id, metrics=[Metric(name, value, now_ms, step) for name, value in batch], synchronous=True)


def _log_dataset(client: Any, run_id: str, values: tuple[str, str, str, str, str | None], context: str) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    name, digest, kind, source, profile = values
    entry = Dataset(name, digest, source_type=kind, source=source, profile=profile)
    client.log_inputs(run_id, [DatasetInput(entry, [InputTag("mlflow.data.context", context)])])


def _log_bytes(client: Any, run_id: str, path: str, data: bytes) -> None:
    folder, _, name = path.rpartition("/")
    with tempfile.TemporaryDirectory(prefix="pd_core-") as directory:
        file = Path(directory) / name
        file.write_bytes(data)
        client.log_artifact(run_id, str(file), folder or None)


# ---- MLflow's rules for names and values ----------------------------------------------------------------------------


def _clean_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Names that MLflow accepts: other characters become `_`; two that would then be one are numbered."""
    clean: dict[str, Any] = {}
    for name, value in values.items():
        accepted = re.sub(r"[^\w.\- :/]", "_", name)[:MAX_NAME].strip() or "_"
        if posixpath.normpath(accepted) != accepted or accepted.startswith(("/", ".")):  # `a//b`, `../a`
            accepted = re.sub(r"[/.]", "_", accepted)
        base, number = accepted, 2
        while accepted in clean:
            accepted, number = f"{base[: MAX_NAME - 8]}_{number}", number + 1
        clean[accepted] = value
    return clean


def _cut(text: str) -> str:
    mark = f"… ({len(text)} characters)"
    return text if len(text) <= MAX_PARAM else text[: MAX_PARAM - len(mark)] + mark


def _batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch
