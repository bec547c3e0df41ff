"""Credentials that expire or are rotated while a run goes on, on a real S3 server behind one that refuses old keys."""

import pickle
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from pd_core.core import artifacts, files
from pd_core.core.errors import CredentialsRefused, UserError
from pd_core.core.s3 import S3FileSystem
from pd_core.engine import tasks
from pd_core.images.sources import stores
from tests import tiny
from tests.s3 import ACCESS_KEY, OTHER_KEY, READER_KEY, expiring_server, write_credentials


@pytest.fixture
def front(s3_environment, monkeypatch, tmp_path):
    """The server that refuses expired keys; the process finds its key in a shared credentials file."""
    file = tmp_path / "credentials"
    write_credentials(file, ACCESS_KEY)
    with expiring_server(s3_environment) as front:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
        monkeypatch.setenv("AWS_ENDPOINT_URL", front.url)
        S3FileSystem.clear_instance_cache()
        yield front


@pytest.fixture
def file(front, tmp_path):
    return tmp_path / "credentials"


@pytest.fixture
def folder(s3_environment, front):
    bucket = s3_environment.make_bucket()
    s3_environment.put(bucket, "x/a", b"0123456789")
    files.read_bytes(f"s3://{bucket}/x/a")  # with the first key, so that a file system with it is in the cache
    return f"s3://{bucket}/x"


def parts_of(uri):
    fs, path = files.filesystem(uri)
    with fs.open(path, "rb") as opened:
        opened.seek(3)
        return opened.read(4)


# HEAD has no body to say why: botocore asks for the bucket's region (HEAD again), and we for the reason (GET)
UNTOLD = ["HEAD", "HEAD", "GET"]

OPERATIONS = {
    "read": (lambda folder: files.read_bytes(f"{folder}/a"), b"0123456789"),
    "seek": (lambda folder: parts_of(f"{folder}/a"), b"3456"),
    "exists": (lambda folder: files.exists(f"{folder}/a"), True),
    "absent": (lambda folder: files.exists(f"{folder}/none"), False),
    "sizes": (lambda folder: files.sizes(folder), {"a": 10}),
    "kind": (lambda folder: stores.open_store(folder).kind(), "directory"),
    "walk": (lambda folder: [e.name for e in stores.S3(folder).walk(lambda _: True, None, "", Counter())], ["a"]),
    "fetch": (lambda folder: list(stores.S3(folder).fetch([stores.Span("a", 2, 3)], 99, time.sleep)), [b"234"]),
    "write": (lambda folder: files.write_bytes(f"{folder}/b", b"1"), None),
    "delete": (lambda folder: files.delete_file(f"{folder}/b"), None),
}


def test_every_operation_goes_on_with_the_credentials_that_took_the_place_of_expired_ones(front, file, folder):
    key, other = ACCESS_KEY, OTHER_KEY
    for name, (call, expected) in OPERATIONS.items():
        front.requests.clear()
        front.expired = {key}
        write_credentials(file, other)
        assert call(folder) == expected, name
        assert front.refused() in ([front.refused()[0]], UNTOLD), name
        assert {key for _, _, key, refused in front.requests if not refused} == {other}, name
        front.requests.clear()
        files.sizes(folder)
        assert not front.refused(), "read anew once, not for every request"
        key, other = other, key


def test_credentials_that_nobody_refreshed_are_tried_twice_and_then_told(front, folder):
    front.expired.add(ACCESS_KEY)
    for name, (call, _) in OPERATIONS.items():
        front.requests.clear()
        told = pytest.raises(UserError, match="the credentials have expired; refresh them")
        with told as caught, files.explained(folder):
            call(folder)
        assert folder in str(caught.value) and "\n" not in str(caught.value), name
        methods = front.refused()
        assert methods == (UNTOLD * 2 if methods[0] == "HEAD" else [methods[0]] * 2), name


def test_a_key_that_is_gone_is_read_anew_too(s3_environment, front, file, folder):
    """The server's own answer to a key that it does not know."""
    write_credentials(file, "gone")
    S3FileSystem.clear_instance_cache()
    with pytest.raises(CredentialsRefused, match="InvalidAccessKeyId"):
        files.read_bytes(f"{folder}/a")
    write_credentials(file, OTHER_KEY)
    assert files.read_bytes(f"{folder}/a") == b"0123456789"


def test_threads_that_fail_together_read_the_credentials_anew_together(front, file, folder, monkeypatch):
    made = []
    real = S3FileSystem.set_session

    async def set_session(self, refresh=False, kwargs={}):  # noqa: B006 - as s3fs has it
        made.append(refresh)
        return await real(self, refresh, kwargs)

    monkeypatch.setattr(S3FileSystem, "set_session", set_session)
    front.expired.add(ACCESS_KEY)
    write_credentials(file, OTHER_KEY)
    with ThreadPoolExecutor(24) as threads:
        assert set(threads.map(lambda _: files.read_bytes(f"{folder}/a"), range(48))) == {b"0123456789"}
    assert sum(made) == 1 and len(front.refused()) > 2


def test_a_denial_is_not_tried_again(front, file, folder):
    write_credentials(file, READER_KEY)
    S3FileSystem.clear_instance_cache()
    before = len(front.requests)
    with pytest.raises(PermissionError) as caught:
        files.write_bytes(f"{folder}/b", b"1")
    assert not isinstance(caught.value, CredentialsRefused)
    assert [method for method, *_ in front.requests[before:]] == ["PUT"]


def test_a_refusal_in_a_worker_stops_a_stage_at_once(front, file, ray_cluster):
    """Infrastructure that fails in a task is tried again for a minute; credentials are not."""
    error = CredentialsRefused("ExpiredToken: The provided token has expired.", "s3://b/x")
    assert str(pickle.loads(pickle.dumps(error))) == str(error) and pickle.loads(pickle.dumps(error)).uri == error.uri
    rounds = []

    def refused():
        raise error

    def execute():
        rounds.append(1)
        tasks.get(tasks.task(refused).remote())

    with pytest.raises(UserError, match=r"s3://b/x: the credentials have expired"):
        tasks.persist("features", execute, lambda: 0)
    assert rounds == [1]


STAGES = ("features", "quarantine", "index", "neighbors", "densities", "estimator")


def disturbed(front, output, inputs, at, change):
    """A run of build_index whose key expires, and `change` happens, once it has written a path with `at` in it."""
    process = tiny.start(*tiny.arguments(*inputs, output, "--no-tracking.enabled"))
    deadline = time.monotonic() + 240
    while (
        not any(at in path for method, path, *_ in list(front.requests) if method == "PUT")
        and time.monotonic() < deadline
    ):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    change()
    front.expired.add(ACCESS_KEY)
    text, _ = process.communicate(timeout=240)
    return process.returncode, text


def assert_same(output, built):
    for stage in STAGES:
        found, expected = (artifacts.load_artifact(f"{place}/{stage}") for place in (output, built))
        assert found is not None and expected is not None and found.parts == expected.parts, stage


@pytest.fixture
def output(s3_environment, front):
    return f"s3://{s3_environment.make_bucket()}/out"


@pytest.mark.slow
@pytest.mark.parametrize("at", ["/out/features/_parts/", "/out/index/shard"])
def test_a_run_goes_on_with_rotated_credentials_and_loses_nothing(front, file, output, inputs, built, at):
    code, text = disturbed(front, output, inputs, at, lambda: write_credentials(file, OTHER_KEY))
    assert code == 0, text
    assert front.refused() and front.requests[-1][2] == OTHER_KEY
    write_credentials(file, OTHER_KEY)
    assert_same(output, built)


@pytest.mark.slow
@pytest.mark.parametrize("at", ["/out/features/_parts/", "/out/densities/part"])
def test_a_run_whose_credentials_are_not_refreshed_stops_in_one_line_and_keeps_what_is_done(
    front, file, output, inputs, built, at
):
    code, text = disturbed(front, output, inputs, at, lambda: None)
    lines = [line for line in text.splitlines() if line.startswith("error:")]
    assert code == 2 and len(lines) == 1 and "Traceback" not in text, text
    assert output in lines[0] and "the credentials have expired; refresh them and run the same command" in lines[0]
    assert "again in" not in text  # no rounds as for infrastructure that may come back
    write_credentials(file, OTHER_KEY)
    kept = {f"/out/features/{name.removesuffix('.json')}" for name in files.sizes(f"{output}/features/_parts")}
    assert kept
    before = len(front.requests)
    process = tiny.start(*tiny.arguments(*inputs, output, "--no-tracking.enabled"))
    text, _ = process.communicate(timeout=240)
    assert process.returncode == 0, text
    written = {path[path.index("/out/") :] for method, path, *_ in front.requests[before:] if method == "PUT"}
    assert not written & kept
    assert_same(output, built)
