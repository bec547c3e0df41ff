"""Fixtures that several test files share. What takes long to start or to make is there once for the whole session."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from pd_core.core import errors
from pd_core.core.s3 import S3FileSystem
from pd_core.engine import resources, session
from tests import tiny
from tests.s3 import S3Server, running_server


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch on one thread, on which its sums have one order."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server for the whole session; see S3Server for what it offers."""
    with running_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def s3_environment(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """The server, with this process's environment pointing at it: `s3://` URIs mean it."""
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    S3FileSystem.clear_instance_cache()  # instances keep the credentials they were made with
    yield s3_server
    S3FileSystem.clear_instance_cache()


@pytest.fixture(scope="session")
def ray_cluster(s3_server: S3Server) -> Iterator[resources.Cluster]:
    """The Ray that tests in this process share, with warm workers; these find the S3 server by their environment."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_server.env.items():
            patch.setenv(name, value)
        stack = contextlib.ExitStack()
        now = stack.enter_context(session.session(""))
    with stack:
        yield now


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The tiny source's folder of images, and a checkpoint of its extractor."""
    root = tmp_path_factory.mktemp("inputs")
    return tiny.write_images(root / "images"), tiny.write_checkpoint(root / "tiny.safetensors")


@pytest.fixture(scope="session")
def built(inputs: tuple[Path, Path], ray_cluster: resources.Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of one undisturbed run of build_index on them. Nobody may change it."""
    from workflows import build_index

    output = tmp_path_factory.mktemp("built") / "out"
    argv = tiny.arguments(*inputs, output, "--no-tracking.enabled")
    assert errors.exit_code(lambda: build_index.main(argv)) == 0
    return output
