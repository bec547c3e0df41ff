"""Mutated real files at every door by which files of strangers come in: `python -m tests.fuzzing --minutes 10`.

Right is a result, a UserError, a RunError or a BadImage. All else is a finding: another exception; a process that dies,
takes longer than SECONDS or more memory than BYTES; a file touched outside the case's folder, a connection, a program
that is started, a pickle that is opened. Each kind is printed once, in one line, and one input of it is kept under
--save; --replay tries what was kept there again. The same seed gives the same inputs.
"""

import argparse
import contextlib
import faulthandler
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import tarfile
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from itertools import count, product, takewhile
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

import numpy as np
import psutil
import pyarrow as pa
import yaml

from pd_core.build import update
from pd_core.core import artifacts, files
from pd_core.core import locks as core_locks
from pd_core.core.errors import RunError, UserError
from pd_core.core.settings import load
from pd_core.core.settings.data import DataSettings
from pd_core.core.settings.index import BuildIndexSettings
from pd_core.curate import releases
from pd_core.density import fit, originals, predictor, realset
from pd_core.density.architecture import Architecture
from pd_core.images import sources
from pd_core.images.decode import BadImage, DecodeLimits
from pd_core.images.resize import Preprocess, prepare
from pd_core.index import knn
from pd_core.index import shards as index_shards
from tests import tiny
from tests.images import test_decode as test_images
from tests.images import test_sources
from tests.index import test_shards as test_index
from tests.synthetic import DIM, clustered

SECONDS, BYTES = 10.0, 1 << 30
LIMITS = DecodeLimits(max_bytes=2**22, max_pixels=2**22, background=(0, 0, 0), max_cpu_s=5)
Files = dict[str, bytes]  # by name

# ---- the mutator -----------------------------------------------------------------------------------------------------

HOSTILE = json.loads(  # @deep and @long: more nesting than a parser's stack holds, and a long text
    '[null, true, 0, -1, 2147483648, 9223372036854775808, 1e308, NaN, Infinity, "", "x", "a\\u0000b\\u001b[2J", '
    '"\\ud800", "@deep", "@long", [], {}, [null], [{}], "../../../../victim", "..", "/etc/hostname", "~/x", '
    '"file:///etc/hostname", "s3://bucket/x", "http://127.0.0.1:9/x"]'
)
TEXTS = (b"0", b"-1", b"77777777777", b"99999999", b"1e9", b"-1000", b"-00000001000", b"\xff\xff\xff\xff")
EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)


def mutated(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """A copy with one to eight faults: of bytes, or where it is JSON mostly of values."""
    for _ in range(rng.choice((1, 1, 1, 2, 4, 8))):
        values = None
        with contextlib.suppress(ValueError, RecursionError):
            values = json.loads(data) if data[:1] == b"{" and rng.random() < 0.8 else None
        data = _other_values(values, rng) if values else _other_bytes(data, rng.choice(others), rng)
    return data


def _other_bytes(data: bytes, other: bytes, rng: random.Random) -> bytes:
    size, long, width = len(data), rng.choice((1, 4, 16, 64, 512)), rng.choice((1, 2, 4, 8))
    near = rng.randrange(min(size, 512) + 1)  # of the start or the end, where headers lie
    at = rng.choice((near, size - near, rng.randrange(size + 1)))
    if rng.random() < 0.1 and (numbers := list(re.finditer(rb"\d{2,}", data))):  # written as text, as in tars and PNM
        start, end = rng.choice(numbers).span()
        return data[:start] + rng.choice(TEXTS).rjust(end - start, b"0")[: end - start] + data[end:]
    head, rest = data[:at], data[at:]
    length = (rng.choice((*EXTREMES, size, at)) % 256**width).to_bytes(width, rng.choice(("big", "little")))
    bit = bytes(byte ^ 1 << rng.randrange(8) for byte in rest[:1])
    cut, spliced = rng.choice((b"", rest[long:])), other[rng.randrange(len(other) + 1) :]
    doubled = rest[:long] * rng.choice((2, 3, 50)) + rest[long:]
    ways = (bit + rest[1:], cut, rng.randbytes(long) + rest, doubled, spliced)
    return head + rng.choice((*ways, length + rest[width:], length + rest[width:]))


def _other_values(values: dict[str, Any], rng: random.Random) -> bytes:
    places: list[tuple[Any, Any]] = []
    pending: list[Any] = [values]
    while pending:
        here = pending.pop()
        inner = list(here.items() if isinstance(here, dict) else enumerate(here))
        places += [(here, key) for key, _ in inner]
        pending += [value for _, value in inner if isinstance(value, dict | list)]
    (here, key), (there, other) = rng.choice(places), rng.choice(places)
    way, value = rng.randrange(5), rng.choice(HOSTILE)
    if way == 0:
        del here[key]
    elif way == 1 and isinstance(here, dict):
        here[str(rng.choice(HOSTILE))] = value
    else:
        here[key] = json.loads(json.dumps(there[other])) if way == 2 else value
    return json.dumps(values).replace('"@deep"', "[" * 5000 + "]" * 5000).replace("@long", "x" * 100_000).encode()


def _tar(data: bytes) -> bytes:
    """With the checksum of each header as it should be."""
    blocks = [data[at : at + 512] for at in range(0, len(data), 512)]
    for number, block in enumerate(blocks):
        if block[257:262] == b"ustar" and len(block) == 512:
            blocks[number] = block[:148] + b"%06o\0 " % (sum(block[:148] + block[156:]) + 8 * 32) + block[156:]
    return b"".join(blocks)


# ---- the doors: real files by name, given a finished index, and what reads one of them -------------------------------


def image_files(_: Path) -> Files:
    made = {name: test_images.corpus(name) for name in test_images.CORPUS}
    made |= {name: data for name, (data, _) in (test_images.PNG_CASES | test_images.OTHER_CASES).items()}
    made["progressive"] = test_images.saved(test_images.picture(), "JPEG", progressive=True)
    tile = {322: 16, 323: 16, 324: 8, 325: 256}  # TIFF 6.0, section 15
    return made | {"tile": test_images.tiff(16, 16, bytes(256), [8], extra=tile.items())}


def tars(_: Path) -> Files:
    members = {"a/1.png": tiny.png(0), "a/1.cls": b"7", f"{'b' * 90}/{'c' * 40}.png": tiny.png(1), "ü" * 40: b"text"}
    return {f"{form}.tar": test_sources.tar_bytes(members, form) for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)}


def parquets(_: Path) -> Files:
    made = {}
    for form, packed in product(("binary", "struct"), ("none", "snappy", "zstd")):
        table = test_sources.image_table([tiny.png(0), tiny.png(1), None], form)
        table = table.append_column("kind", pa.array(["a", "b", None]).dictionary_encode())
        made[f"{form}.{packed}.parquet"] = test_sources.parquet_bytes(table, compression=packed, row_group_size=2)
    return made


def records(built: Path) -> Files:
    found = [path for form in ("run.json", "*/artifact.json", "*/started.json") for path in built.glob(form)]
    found += [min(parts.iterdir()) for parts in built.glob("*/_parts")]
    return {str(path.relative_to(built)): path.read_bytes() for path in sorted(found)}


def stages(_: Path) -> Files:
    """Records of parts, some of which bear names of files that lie elsewhere."""
    with tempfile.TemporaryDirectory() as folder:
        _completed(_stage(Path(folder)))
        found = {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}
    part = found["_parts/a.parquet.json"]
    return found | {
        f"_parts/{quote(n, safe='')}.json": part for n in ("../../../../victim", "/etc/hostname", "x/../..")
    }


def _stage(folder: Path, identity: int = 1) -> artifacts.Stage:
    return artifacts.Stage(str(folder), "features", 1, {"x": identity})


def _completed(stage: artifacts.Stage) -> None:
    stage.complete(lambda: ([stage.write_part(name, b"x", 1) for name in ("a.parquet", "x/b.parquet")], {}), False)


def shards(_: Path) -> Files:
    rows, ids = clustered(600), np.arange(600)
    made = {kind: test_index.filled(kind, rows, ids, 1, cells=4)[0][0] for kind in test_index.KINDS}
    return made | {"quantizer": index_shards.serialize(index_shards.quantizer_of(rows[:4]))}


def predictors(_: Path) -> Files:
    made = predictor.new_predictor(Architecture(8, (4,), "log_density"))
    measured = predictor.FitMetrics(fit.calibration(np.arange(4.0), np.arange(4.0)), 10, 4, 1, ())
    return predictor.to_bytes(made, measured)


def locks(_: Path) -> Files:
    holders = [core_locks.Holder("process 1 on a", 1e9, 1e10, "0" * 32, done) for done in (True, False)]
    return {f"{number:08d}.json": json.dumps(asdict(holder)).encode() for number, holder in enumerate(holders)}


def settings_files(_: Path) -> Files:
    text = (tiny.ROOT / "workflows" / "configs" / "default.yaml").read_bytes()
    return {"a.yaml": text, "b.yaml": json.dumps(yaml.safe_load(text)).encode(), "c.yaml": b"a: &a [1]\nb: [*a, *a]\n"}


def release_files(_: Path) -> Files:
    latest = {"release": "a-0123", "uri": "releases/a-0123", "lock_token": 3, "last": "a-0123", "held": ["x"]}
    record = '{"numbers": {"typical": {"n": 1.0}}, "verdicts": [], "last": null}'
    return {"latest.json": json.dumps(latest).encode(), "releases/a-0123/release.json": record.encode()}


def right(call: Callable[..., Any], *given: Any) -> Any:
    """What a call gives, all of it, or None where it refuses as it should."""
    with contextlib.suppress(UserError, RunError, BadImage):
        found = call(*given)
        return list(found) if isinstance(found, Iterator) else found


def each(*calls: Callable[[str], Any]) -> Callable[[Path], Any]:
    """All of these on the folder."""
    return lambda folder: [right(call, str(folder)) for call in calls]


def read_source(file: Path) -> None:
    labels = {"labels": "member:cls"} if file.suffix == ".tar" else {"labels": "column:kind", "key_column": "name"}
    for more in ({}, labels):
        given = DataSettings(source=str(file), max_image_bytes=2**22, **more)
        if source := right(sources.open_source, given):
            for table in right(sources.list_images, source) or ():
                right(sources.read, source, table)
    if file.suffix == ".parquet":
        files.read_table(str(file))


def read_stage(folder: Path) -> None:
    """Goes on with, takes over, replaces or deletes a stage that others have begun: each on a copy."""
    ways: tuple[Callable[[Path], Any], ...] = (
        lambda at: [_stage(folder / "new").adopt(str(at), part) for part in _stage(at).finished_parts().values()],
        lambda at: _completed(_stage(at)),
        lambda at: _stage(at, 2).begin(overwrite=True),
        lambda at: artifacts.remove(str(at)),
    )
    for number, way in enumerate(ways):
        right(way, shutil.copytree(folder, folder.parent / "copies" / f"{number}"))


def read_shard(file: Path) -> None:
    index_shards.deserialize(file.read_bytes())
    if file.name != "quantizer":
        opened = knn.ShardSearch.open([file.read_bytes()])
        opened.search_all(np.zeros((2, DIM), np.float32), 3)


class Target(NamedTuple):
    """A door. of_file: it is shown the file, else a folder with all of them. mended: sets checksums right."""

    seeds: Callable[[Path], Files]
    read: Callable[[Path], Any]
    of_file: bool = True
    mended: Callable[[bytes], bytes] = bytes


RELEASES = (releases.lock_token, releases.open_latest, releases.open_before_latest, releases.settle)
TARGETS = {
    "decode": Target(image_files, lambda file: prepare(file.read_bytes(), LIMITS, Preprocess.paper())),
    "tar": Target(tars, read_source, mended=_tar),
    "parquet": Target(parquets, read_source),
    "records": Target(records, each(realset.open_realset, originals.source_of, update.open_base), of_file=False),
    "stage": Target(stages, read_stage, of_file=False),
    "faiss": Target(shards, read_shard),
    "predictor": Target(predictors, lambda folder: predictor.load(folder), of_file=False),
    "lock": Target(locks, lambda folder: core_locks.acquire(str(folder), 60.0), of_file=False),
    "settings": Target(settings_files, lambda f: load.load(BuildIndexSettings, ["--config", str(f)], "x")),
    "release": Target(release_files, each(*RELEASES), of_file=False),
}

# ---- the process that tries ------------------------------------------------------------------------------------------

READS = {"os.listdir", "os.scandir"}
WRITES = {"os.chmod", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.truncate"}
NEVER = {"os.exec", "os.posix_spawn", "os.system", "subprocess.Popen", "socket.connect", "pickle.find_class"}
READABLE = [
    os.path.realpath(path) for path in (sys.prefix, sys.base_prefix, tiny.ROOT, "/proc", "/sys", "/dev", "/usr")
]


class Guard:
    """An audit hook: while it is on, what leads out of the folder is noted, and does not happen."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.on, self.noted = os.path.realpath(folder), False, ""

    def __call__(self, event: str, given: tuple[Any, ...]) -> None:
        if self.on and (event in NEVER or (event in READS | WRITES | {"open"} and self._outside(event, given))):
            self.noted = f"{event} in {_ours(traceback.extract_stack())}: {str(given[:2])[:120]}"
            raise PermissionError(self.noted)

    def _outside(self, event: str, given: tuple[Any, ...]) -> bool:
        reads = event in READS or (event == "open" and not given[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        paths = given[event == "os.symlink" : 2 if event in ("os.link", "os.rename", "os.symlink") else 1]
        named = [os.fsdecode(p) for p in paths if isinstance(p, str | bytes | os.PathLike)]
        # a name alone lies in a folder that was opened before, which the event of `open` does not tell
        real = [os.path.realpath(p) for p in named if "/" in p or p in (".", "..")]
        return not all(path.startswith((self.folder, *(READABLE if reads else ["/dev/null"]))) for path in real)


def _ours(frames: Iterable[traceback.FrameSummary]) -> str:
    found = [f"{f.filename.partition('/pd_core/')[2]}:{f.lineno} {f.name}" for f in frames if "/pd_core/" in f.filename]
    return found[-1] if found else "no file of ours"


def tried(read: Callable[[Path], Any], path: Path, guard: Guard) -> str | None:
    """What is wrong with what became of one input."""
    guard.on, guard.noted, said = True, "", None
    try:
        right(read, path)
    except BaseException as error:
        text = " ".join(str(error).split())[:120]
        said = f"{type(error).__name__} in {_ours(traceback.extract_tb(error.__traceback__))}: {text}"
    finally:
        guard.on = False
    return f"touched {guard.noted}" if guard.noted else said


def serve(pipe: Any, name: str, folder: Path, built: Path) -> None:
    """Answer each input with what is wrong, or None."""
    for stream in (1, 2):  # what libraries say, in C too
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.dont_write_bytecode = True
    faulthandler.enable((folder / "died").open("w"))
    target, case = TARGETS[name], folder / "a" / "case"
    seeds = target.seeds(built)
    sys.addaudithook(guard := Guard(case.parent))
    given = next(iter(seeds.items()))  # as it is: what is imported late is imported, and the answer says: ready
    while True:
        if name != "records":
            shutil.rmtree(case.parent, ignore_errors=True)
        elif not case.exists():  # read, not changed: what lies around the records stays
            shutil.copytree(built, case)
        for other, data in (({} if target.of_file else seeds) | dict([given])).items():
            _laid(case, other, data)
        pipe.send(tried(target.read, case / given[0] if target.of_file else case, guard))
        given = pipe.recv()


def _laid(folder: Path, name: str, data: bytes) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)


# ---- the process that watches it -------------------------------------------------------------------------------------


class Watched:
    """The process that tries, begun anew where it ends."""

    def __init__(self, *given: Any) -> None:
        self.given, self.folder = given, given[1]
        self.begin()

    def begin(self) -> None:
        self.pipe, other = multiprocessing.Pipe()
        self.process = multiprocessing.Process(target=serve, args=(other, *self.given), daemon=True)
        self.process.start()
        other.close()
        self.pipe.recv()

    def _memory(self) -> int:
        with contextlib.suppress(OSError, IndexError):
            return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * resource.getpagesize()
        return 0

    def _cpu_s(self) -> float:
        with contextlib.suppress(psutil.Error):
            return sum(psutil.Process(self.process.pid).cpu_times()[:2])
        return 0.0

    def ask(self, given: tuple[str, bytes]) -> str | None:
        """What is wrong with what became of an input; its seconds are of CPU, for a machine may be busy, unless it
        sleeps.
        """
        before, cpu_s, start, why = self._memory(), self._cpu_s(), time.monotonic(), ""
        self.pipe.send(given)
        while not self.pipe.poll(0.02):
            slow = self._cpu_s() - cpu_s > SECONDS or time.monotonic() - start > 12 * SECONDS
            big = self._memory() - before > BYTES
            if (slow or big) and not why:
                why = f"more than {SECONDS:g} s" if slow else f"more than {BYTES >> 20} MiB"
                os.kill(self.process.pid or 0, signal.SIGABRT)  # says where it is
        try:
            return self.pipe.recv()
        except EOFError:
            self.process.join()
        said = (self.folder / "died").read_text(errors="replace")
        where = re.findall(r'File ".*/pd_core/(.*)", line (\d+) in (\w+)', said) or [("no file of ours",)]
        why = why or f"died of {signal.Signals(-(self.process.exitcode or 0)).name}"
        self.begin()
        return f"{why} in {':'.join(where[0])}"


def inputs(name: str, built: Path, seed: int) -> Iterator[tuple[str, bytes]]:
    """Names and mutated files without end; the n-th is a function of the seed and n."""
    seeds = TARGETS[name].seeds(built)
    for number in count():
        rng = random.Random(f"{seed} {name} {number}")
        of = rng.choice(sorted(seeds))
        data = mutated(seeds[of], list(seeds.values()), rng)
        yield of, TARGETS[name].mended(data) if rng.random() < 0.5 else data


def fuzz(name: str, given: Iterable[tuple[str, bytes]], seconds: float, built: Path, save: Path | None) -> int:
    """Try inputs for so long; says what is found, returns how many kinds."""
    found: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        watched = Watched(name, Path(folder), built)
        start, tries = time.monotonic(), 0
        for of, data in takewhile(lambda _: time.monotonic() - start < seconds, given):
            tries += 1
            if said := watched.ask((of, data)):
                kind = said.partition(": ")[0]
                found[kind] = found.get(kind, 0) + 1
                if found[kind] == 1:
                    print(f"FOUND {name} {of}: {said}", flush=True)
                    if save is not None:
                        _laid(save / name, f"{artifacts.sha256(data)[:12]} {quote(of, safe='')}", data)
        watched.process.kill()
        watched.process.join()
    rate = tries / (time.monotonic() - start)
    print(f"{name}: {tries} inputs, {rate:.0f} a second, {len(found)} kinds of findings", flush=True)
    return len(found)


def main(argv: list[str]) -> int:
    """Returns 1 if anything was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzzing", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="of all targets together")
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--index", type=Path, help="a finished output of build_index; default: a small one is made")
    parser.add_argument("--save", type=Path, help="folder for one input of each kind of finding")
    parser.add_argument("--replay", type=Path, help="try once what was kept in that folder")
    asked = parser.parse_args(argv)
    os.environ["OMP_NUM_THREADS"] = "1"
    multiprocessing.set_start_method("forkserver")  # a process that has used no threads yet, so that none is held
    multiprocessing.set_forkserver_preload(
        ["pd_core.evaluate.spaces", "pd_core.build.update", "pd_core.index.knn", "torch"]
    )
    names, found = asked.target or list(TARGETS), 0
    with tempfile.TemporaryDirectory() as made:
        built = asked.index or Path(made) / "out"
        if "records" in names and asked.index is None:
            given = tiny.write_images(Path(made) / "images"), tiny.write_checkpoint(Path(made) / "w.safetensors"), built
            assert not tiny.start(*tiny.arguments(*given, "--no-tracking.enabled")).wait(), "build_index"
        for name in names:
            tries = inputs(name, built, asked.seed)
            if asked.replay is not None:
                kept = sorted((asked.replay / name).glob("*"))
                tries = ((unquote(path.name[13:]), path.read_bytes()) for path in kept)
            found += fuzz(name, tries, asked.minutes * 60 / len(names), built, asked.save)
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
