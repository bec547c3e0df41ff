"""The fuzzer: a minute of it, and that it sees what it is there to see."""

import re
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest

from tests import fuzzing, tiny

PLANTED = """
import itertools, multiprocessing, os, pickle, socket, subprocess, sys, time
from pathlib import Path
from pd_core.core.errors import UserError
from tests import fuzzing

HERE = Path(sys.argv[1])


def refused(file):
    raise UserError("as it should be")


DOORS = {
    "result": lambda file: file.read_bytes(),
    "refused": refused,
    "inside": lambda file: os.rename(file, file.with_name("other")),
    "raised": lambda file: 1 / 0,
    "died": lambda file: os.kill(os.getpid(), 11),
    "hung": lambda file: next(n for n in itertools.count() if n < 0),  # CPU, not sleep
    "memory": lambda file: (b"x" * (256 << 20), time.sleep(60)),
    "read": lambda file: (HERE / "secret").read_bytes(),
    "listed": lambda file: os.listdir(HERE),
    "removed": lambda file: os.remove(HERE / "secret"),
    "moved": lambda file: os.rename(file, HERE / "moved"),
    "climbed": lambda file: os.mkdir(f"{file}/../../../victim"),
    "program": lambda file: subprocess.run(["true"]),
    "connection": lambda file: socket.socket().connect(("127.0.0.1", 9)),
    "pickle": lambda file: pickle.loads(pickle.dumps(os.getcwd)),
}
fuzzing.SECONDS, fuzzing.BYTES = 5.0, 64 << 20
fuzzing.TARGETS["planted"] = fuzzing.Target(lambda _: dict.fromkeys(DOORS, b"x"), lambda file: DOORS[file.name](file))
multiprocessing.set_start_method("fork")
sys.exit(fuzzing.fuzz("planted", [(name, b"data") for name in DOORS], 100.0, HERE, HERE / "saved"))
"""
WRONG = {
    "raised": "ZeroDivisionError",
    "died": "died of SIGSEGV",
    "hung": "more than 5 s",
    "memory": "more than 64 MiB",
}
WRONG |= {"read": "touched open", "listed": "touched os.listdir", "removed": "touched os.remove"}
WRONG |= {"moved": "touched os.rename", "climbed": "touched os.mkdir", "program": "touched subprocess.Popen"}
WRONG |= {"connection": "touched socket.connect", "pickle": "touched pickle.find_class"}


def ran(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *argv], cwd=tiny.ROOT, capture_output=True, text=True, check=False)


def test_what_is_wrong_is_seen_and_what_is_right_is_not(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("stays")
    done = ran("-c", PLANTED, str(tmp_path))
    found = dict(re.findall(r"^FOUND planted (\w+): (.*) in ", done.stdout, re.MULTILINE))
    assert found == WRONG, done.stdout + done.stderr
    assert done.returncode == len(WRONG) == len(list((tmp_path / "saved" / "planted").iterdir()))
    assert (tmp_path / "secret").read_text() == "stays" and not (tmp_path / "moved").exists()


def test_the_same_seed_gives_the_same_inputs_which_are_none_of_the_real_ones(tmp_path: Path) -> None:
    first, again, other = (list(islice(fuzzing.inputs("tar", tmp_path, seed), 100)) for seed in (3, 3, 4))
    assert first == again != other
    real = set(fuzzing.TARGETS["tar"].seeds(tmp_path).values())
    assert len({data for _, data in first} - real) > 90


@pytest.mark.slow
def test_a_minute_of_it_finds_nothing(built: Path) -> None:
    done = ran("-m", "tests.fuzzing", "--minutes", "1", "--index", str(built))
    assert done.returncode == 0, done.stdout + done.stderr
    tried = re.findall(r"^(\w+): [1-9]\d* inputs", done.stdout, re.MULTILINE)
    assert tried == list(fuzzing.TARGETS)
