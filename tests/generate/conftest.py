"""One finished set of samples for the tests of this room."""

import shutil
from pathlib import Path

import pytest

from tests import toy_generator
from tests.generate.test_workflow import make


@pytest.fixture(scope="session")
def made(built: Path, inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`out/`, samples whose every column holds something, and the files they were made from. Nobody may change it."""
    root = tmp_path_factory.mktemp("made")
    shutil.copy(toy_generator.__file__, root / "toy.py")
    shutil.copy(inputs[1], root / "tiny.safetensors")
    (root / "prompts.txt").write_text("a red square\n\na blue one\n")
    assert make(built, root / "out", root) == 0
    return root
