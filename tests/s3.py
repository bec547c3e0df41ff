"""A real S3 server (SeaweedFS) on loopback, for tests; nothing of it outlives the session."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import fsspec

from tests import fronting

ACCESS_KEY = "test-key"
SECRET_KEY = "test-secret"
OTHER_KEY = "other-key"  # with the same secret and rights as the first
READER_KEY = "reader-key"  # with the same secret: may read everything and write nothing
START_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class S3Server:
    """A running server.

    Attributes:
        url: the endpoint, http://127.0.0.1:PORT.
        env: environment variables with which s3fs, pyarrow and a workflow in a subprocess reach it.
        log: what the server wrote.
    """

    url: str
    env: dict[str, str]
    log: Path

    def filesystem(self, **credentials: str) -> fsspec.AbstractFileSystem:
        """s3fs on this server, whatever the environment says; `key=`, `secret=` replace the good credentials."""
        return fsspec.filesystem(
            "s3",
            endpoint_url=self.url,
            **{"key": ACCESS_KEY, "secret": SECRET_KEY, **credentials},
            use_listings_cache=False,
        )

    def make_bucket(self, name: str | None = None) -> str:
        """Make a bucket (by default one that no other test has) and return its name."""
        name = name or f"b{uuid.uuid4().hex[:12]}"
        self.filesystem().call_s3("create_bucket", Bucket=name)
        return name

    def put(self, bucket: str, key: str, data: bytes) -> None:
        """One PUT with the literal key: fsspec's own path rules have no say."""
        self.filesystem().call_s3("put_object", Bucket=bucket, Key=key, Body=data)

    def delete(self, bucket: str, key: str) -> None:
        """Delete one object."""
        self.filesystem().call_s3("delete_object", Bucket=bucket, Key=key)


def _free_ports(count: int) -> list[int]:
    # SeaweedFS also listens on each port + 10000 (gRPC): both must be free, and both valid
    ports: list[int] = []
    with contextlib.ExitStack() as held:
        while len(ports) < count:
            first, second = (held.enter_context(socket.socket()) for _ in range(2))
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
            try:
                second.bind(("127.0.0.1", port + 10_000))
            except (OSError, OverflowError):
                continue
            ports.append(port)
    return ports


class Weed:
    """SeaweedFS with its data and its log in a directory: can be killed, and started again on the same ports and
    data.
    """

    def __init__(self, directory: Path, more: Mapping[str, str] | None = None):
        (directory / "data").mkdir(parents=True)
        master, volume, filer, s3 = _free_ports(4)
        keys = {ACCESS_KEY: SECRET_KEY, OTHER_KEY: SECRET_KEY, **(more or {})}
        identity = {
            "name": "test",
            "credentials": [{"accessKey": key, "secretKey": secret} for key, secret in keys.items()],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        reader = {
            "name": "reader",
            "credentials": [{"accessKey": READER_KEY, "secretKey": SECRET_KEY}],
            "actions": ["Read", "List"],
        }
        (directory / "s3.json").write_text(json.dumps({"identities": [identity, reader]}))
        # a bucket is a collection of its own volumes: one each (the default is seven), or the server runs out of
        # volumes
        (directory / "master.toml").write_text("[master.volume_growth]\ncopy_1 = 1\n")
        self.directory = directory
        self.command = [
            str(Path(sys.executable).parent / "weed"),
            *("server", f"-dir={directory / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
            *(f"-master.port={master}", f"-volume.port={volume}", "-filer", f"-filer.port={filer}"),
            *("-s3", f"-s3.port={s3}", f"-s3.config={directory / 's3.json'}"),
            *("-s3.port.iceberg=0", "-s3.port.lance=0"),  # fixed ports otherwise: a second server could not start
            *("-master.volumeSizeLimitMB=64", "-volume.max=500"),
        ]
        url = f"http://127.0.0.1:{s3}"
        env = {
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        self.server = S3Server(url, env, directory / "server.log")
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> S3Server:
        """Returns once it answers."""
        with self.server.log.open("ab") as output:
            self.process = subprocess.Popen(
                self.command, stdout=output, stderr=subprocess.STDOUT, cwd=self.directory, start_new_session=True
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                self.server.make_bucket(f"ready-{uuid.uuid4().hex[:12]}")
                return self.server
            except Exception as error:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    tail = self.server.log.read_text(errors="replace")[-2000:]
                    raise RuntimeError(f"the S3 server did not start: {error}\n{tail}") from error
                time.sleep(0.2)

    def kill(self) -> None:
        """SIGKILL; an orderly end takes over ten seconds."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(10)


@contextlib.contextmanager
def running_server(directory: Path, more: Mapping[str, str] | None = None) -> Iterator[S3Server]:
    """Start a server that keeps its data and its log in `directory`, and end it afterwards.

    Args:
        directory: made here.
        more: further access keys and their secrets, with all rights.
    """
    weed = Weed(directory, more)
    try:
        yield weed.start()
    finally:
        weed.kill()


# As S3 documents it: https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html
EXPIRED = fronting.Answer(
    400,
    {"Content-Type": "application/xml"},
    b"""<?xml version="1.0" encoding="UTF-8"?>
<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message><RequestId>1</RequestId></Error>""",
)


@dataclass
class ExpiringServer:
    """A server in front of another one that refuses expired keys as S3 does; all else goes through as it is.

    Attributes:
        url: the endpoint.
        expired: access keys that are refused.
        requests: (method, path, access key, whether it was refused) of each, in order.
    """

    url: str = ""
    expired: set[str] = field(default_factory=set)
    requests: list[tuple[str, str, str, bool]] = field(default_factory=list)

    def refused(self) -> list[str]:
        """Methods of the refused requests."""
        return [method for method, _, _, refused in self.requests if refused]

    def gate(self, request: fronting.Request) -> fronting.Answer | None:
        """Whether a request goes through."""
        found = re.search("Credential=([^/]+)/", request.headers.get("Authorization", ""))
        key = found[1] if found else ""
        self.requests.append((request.method, request.path, key, key in self.expired))
        return EXPIRED if key in self.expired else None


@contextlib.contextmanager
def expiring_server(behind: S3Server) -> Iterator[ExpiringServer]:
    """Such a server on loopback."""
    front = ExpiringServer()
    with fronting.fronting(behind.url, front.gate) as front.url:
        yield front


def write_credentials(file: Path, key: str, secret: str = SECRET_KEY) -> None:
    """Replace a shared credentials file whole, as tools that rotate keys do."""
    new = file.with_suffix(".new")
    new.write_text(f"[default]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n")
    new.replace(file)
