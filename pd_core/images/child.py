"""The door for images of strangers: a small child process decodes them, and may die of it.

A worker hands the bytes of a group of images over in shared memory and gets pixels and facts back in it; while the
child decodes one group the worker reads the next. The child imports Pillow, numpy and `images`, knows no credentials,
and has limits for each image: `DecodeLimits.max_cpu_s` of CPU and `DecodeLimits.memory_bytes` of memory. Where memory
runs out the kernel takes it before anything else. It ends with its worker, however that ends.

The image at which a child dies, or hangs, is tried once more alone in a new one, and later again where the child was
killed. If that fails too the image is `TOO_EXPENSIVE`; all others are decoded as ever. What a child answers is read as
numbers and text, never as objects.
"""

from __future__ import annotations

import atexit
import ctypes
import fcntl
import itertools
import json
import math
import mmap
import os
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import AvifImagePlugin

from pd_core.core import rlimits
from pd_core.core.errors import RunError
from pd_core.images import resize
from pd_core.images.decode import BadImage, DecodeLimits, Reason
from pd_core.images.grouping import grouped
from pd_core.images.resize import Prepared, Preprocess

GROUP_IMAGES = 64  # handed over together: few enough that the worker's next read is never long behind
GROUP_BYTES = 16 << 20  # of files; one that has more goes alone
MOST_KEPT_BYTES = 256 << 20  # of shared memory by a worker that waits for more
PAUSES_S = (1.0, 5.0)  # before an image is tried again whose child was killed
WALL_FACTOR = 5  # wall-clock seconds for each second of CPU, before a child that answers nothing is taken for hung
_RECORD_BYTES = 2048  # of one answer: a detail has at most 300 characters of 4 bytes
_READY, _DONE = b"+", b"."

# glibc would give the pages of an image back to the kernel after each and fault them in for the next: a third of all
# CPU
_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": str(16 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(64 << 20),
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}

T = TypeVar("T")


_Facts = tuple[int, int, int, str]  # bytes that come back; width, height and SHA-256 of the source


@dataclass(frozen=True)
class _Request:
    """What to make of each image, of which `slot_bytes` bytes come back: pixels for a model, or a thumbnail."""

    limits: DecodeLimits
    slot_bytes: int
    preprocess: Preprocess | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "limits": asdict(self.limits),
            "slot_bytes": self.slot_bytes,
            "preprocess": self.preprocess and self.preprocess.to_json(),
        }

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> _Request:
        limits = DecodeLimits(**fields["limits"] | {"background": tuple(fields["limits"]["background"])})
        preprocess = fields["preprocess"]
        return cls(limits, fields["slot_bytes"], preprocess and Preprocess.from_json(preprocess))


@dataclass(frozen=True)
class _Layout:
    """Where what of a group lies in shared memory: answers, then slots, then files."""

    sizes: Sequence[int]
    slot_bytes: int

    def record(self, i: int) -> slice:
        return slice(i * _RECORD_BYTES, (i + 1) * _RECORD_BYTES)

    def slot(self, i: int, length: int) -> slice:
        start = len(self.sizes) * _RECORD_BYTES + i * self.slot_bytes
        return slice(start, start + length)

    def contents(self) -> list[slice]:
        first = len(self.sizes) * (_RECORD_BYTES + self.slot_bytes)
        ends = list(itertools.accumulate(self.sizes, initial=first))
        return [slice(start, stop) for start, stop in itertools.pairwise(ends)]

    @property
    def bytes(self) -> int:
        return len(self.sizes) * (_RECORD_BYTES + self.slot_bytes) + sum(self.sizes)


# ---- what a worker calls ---------------------------------------------------------------------------------------------


def prepared(
    contents: Iterable[bytes | BadImage], limits: DecodeLimits, preprocess: Preprocess
) -> Iterator[Prepared | BadImage]:
    """`resize.prepare` of each file, in order; a BadImage among them comes out as it is."""
    height, width = preprocess.height, preprocess.width

    def made(facts: _Facts, data: bytearray) -> Prepared:
        _, source_width, source_height, content_hash = facts
        return Prepared(
            np.frombuffer(data, np.uint8).reshape(height, width, 3), source_width, source_height, content_hash
        )

    return _answers(contents, _Request(limits, height * width * 3, preprocess), made)


def thumbnails(contents: Iterable[bytes | BadImage], limits: DecodeLimits) -> Iterator[bytes | BadImage]:
    """`resize.thumbnail` of each file, in order; a BadImage among them comes out as it is."""
    room = 8 * resize.THUMBNAIL_PX**2  # a file of noise has little over 3 bytes a pixel
    return _answers(contents, _Request(limits, room), lambda _, data: bytes(data))


def pixels(png: bytes, limits: DecodeLimits) -> np.ndarray | None:
    """Pixels uint8 [H, W, 3] of a PNG as our tables hold them, or None where it is no RGB picture of 8 bits in one."""
    if png[:8] != b"\x89PNG\r\n\x1a\n" or png[12:16] != b"IHDR" or png[24:26] != b"\x08\x02":
        return None
    width, height = int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")
    if not 0 < width * height <= limits.max_pixels:
        return None
    as_it_is = Preprocess(height, width, "nearest", 1.0, "squash", (0.0,) * 3, (1.0,) * 3)
    (made,) = prepared([png], limits, as_it_is)
    return None if isinstance(made, BadImage) else made.pixels


def begin() -> None:
    """Start a child while the first bytes are still being read, where none waits."""
    if not _idle:
        decoder = _Decoder()
        decoder.start()
        _idle.append(decoder)


def end() -> None:
    """End the children that wait for work."""
    while _idle:
        _idle.pop().stop()


_idle: list[_Decoder] = []  # with their children; one is enough, but for threads and interleaved iterators
atexit.register(end)


def _answers(
    contents: Iterable[bytes | BadImage], request: _Request, made: Callable[[_Facts, bytearray], T]
) -> Iterator[T | BadImage]:
    try:
        decoder = _idle.pop()
    except IndexError:
        decoder = _Decoder()
    if decoder.process is not None and decoder.process.poll() is not None:
        decoder.stop()  # it has died of nothing that it was asked
    try:
        for number, items in enumerate(grouped(contents, _bytes, GROUP_BYTES, GROUP_IMAGES)):
            decoder.submit(number % 2, items, request)  # queued behind the one before: the child never waits for us
            if len(decoder.queue) == 2:
                yield from decoder.finish().answers(made)
        while decoder.queue:
            yield from decoder.finish().answers(made)
    finally:  # also where nobody asks for more
        if decoder.queue or _idle or decoder.shared_bytes > MOST_KEPT_BYTES:
            decoder.stop()
        else:
            _idle.append(decoder)


def _bytes(content: bytes | BadImage) -> int:
    return len(content) if isinstance(content, bytes) else 0


# ---- the worker's side -----------------------------------------------------------------------------------------------


class _Buffer:
    """Memory shared with the children, which cannot shrink it under the worker's hands."""

    def __init__(self) -> None:
        self.file = os.memfd_create("pd_core images", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        fcntl.fcntl(self.file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        self.map: mmap.mmap | None = None

    def fit(self, size: int) -> mmap.mmap:
        """The memory, of at least `size` bytes."""
        if self.map is None or len(self.map) < size:
            os.ftruncate(self.file, size)
            self.map = mmap.mmap(self.file, size)
        return self.map

    def __del__(self) -> None:
        os.close(self.file)


@dataclass
class _Group:
    """Images that are handed over together.

    Attributes:
        items: in order, with those that are bad already. files: how many others. which: its buffer.
        said: of each file so far, what a child has said of it, or the verdict where no child survives it.
    """

    items: Sequence[bytes | BadImage]
    files: int
    request: _Request
    layout: _Layout
    which: int
    memory: mmap.mmap
    said: list[_Facts | BadImage] = field(default_factory=list)

    def unanswered(self, stop: int) -> int:
        """The first file without an answer, or with none that a sound child would give; or `stop`."""
        for i in range(len(self.said), stop):
            line, newline, _ = self.memory[self.layout.record(i)].partition(b"\n")
            answer = _understood(line, self.request) if newline else None
            if answer is None:
                return i
            self.said.append(answer)
        return stop

    def answers(self, made: Callable[[_Facts, bytearray], T]) -> Iterator[T | BadImage]:
        """Of all items, in order."""
        numbers = itertools.count()
        for item in self.items:
            yield item if isinstance(item, BadImage) else self._made(next(numbers), made)

    def _made(self, i: int, made: Callable[[_Facts, bytearray], T]) -> T | BadImage:
        answer = self.said[i]
        if isinstance(answer, BadImage):
            return answer
        with memoryview(self.memory) as view:
            return made(answer, bytearray(view[self.layout.slot(i, answer[0])]))


def _understood(line: bytes, request: _Request) -> _Facts | BadImage | None:
    try:
        values = json.loads(line)
        if [type(value) for value in values] == [str, str]:
            return BadImage(Reason(values[0]), values[1])
        made_bytes, width, height, content_hash = values
    except (ValueError, TypeError):
        return None
    if [type(value) for value in values] != [int, int, int, str] or min(width, height) < 1:
        return None
    most = request.slot_bytes
    fits = made_bytes == most if request.preprocess else 0 < made_bytes <= most
    return (made_bytes, width, height, content_hash) if fits and width * height <= request.limits.max_pixels else None


class _Decoder:
    """A child, two buffers, and what is to be done where the child dies."""

    def __init__(self) -> None:
        self.buffers = (_Buffer(), _Buffer())
        self.process: subprocess.Popen[bytes] | None = None
        self.ready = self.was_killed = False
        self.queue: list[_Group] = []  # handed over and not waited for yet

    @property
    def shared_bytes(self) -> int:
        """Memory of both buffers."""
        return sum(len(buffer.map or b"") for buffer in self.buffers)

    def start(self) -> None:
        """Start the child. It gets the two buffers and no other file of this process, and none of its credentials."""
        files = [buffer.file for buffer in self.buffers]
        program = f"from pd_core.images import child; child.serve({files}, {os.getpid()})"
        kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
        path = os.pathsep.join([str(Path(__file__).resolve().parents[2]), *(entry for entry in sys.path if entry)])
        self.ready = False
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # what codecs print of damaged files
            bufsize=0,
            pass_fds=files,
            env={**kept, **_ENVIRONMENT, "PYTHONPATH": path},
            process_group=0,  # Ctrl-C is for the run, which ends the child
        )

    def stop(self) -> int:
        """End the child; returns its exit code."""
        if self.process is None:
            return 0
        process, self.process = self.process, None
        process.kill()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            pipe.close()
        return process.wait()

    def submit(self, which: int, items: Sequence[bytes | BadImage], request: _Request) -> None:
        """Hand a group over, in a buffer that nobody reads from any more."""
        files = [item for item in items if isinstance(item, bytes)]
        layout = _Layout([len(data) for data in files], request.slot_bytes)
        memory = self.buffers[which].fit(max(1, layout.bytes))
        for i, (place, data) in enumerate(zip(layout.contents(), files, strict=True)):
            memory[layout.record(i)] = bytes(_RECORD_BYTES)
            memory[place] = data
        self.queue.append(_Group(items, len(files), request, layout, which, memory))
        self._ask(self.queue[-1], 0, len(files))

    def finish(self) -> _Group:
        """Wait until each file of the oldest group has an answer, or a verdict."""
        group, died = self.queue[0], False
        while (at := self._wait(group, group.files)) < group.files:
            died = True
            if not self._answered_alone(group, at):
                group.said.append(BadImage(Reason.TOO_EXPENSIVE, _told(group.request.limits)))
            self._ask(group, at + 1, group.files)
        del self.queue[0]
        for other in self.queue if died else ():  # the child that knew of it is gone
            self._ask(other, 0, other.files)
        return group

    def _answered_alone(self, group: _Group, at: int) -> bool:
        """Whether a new child answers for the image at which one has died.

        One that was killed says little of its image: the kernel may have wanted memory for others. Then it is tried
        again later.
        """
        for pause_s in (*PAUSES_S, None):
            self._ask(group, at, at + 1)
            if self._wait(group, at + 1) > at:
                return True
            if not self.was_killed or pause_s is None:
                return False
            time.sleep(pause_s)
        raise AssertionError("the last round returns")

    def _ask(self, group: _Group, first: int, stop: int) -> None:
        """Have the child work on files first ... stop - 1 of a group. Of one that is gone `_wait` will hear."""
        if self.process is None:
            self.start()
        assert self.process is not None
        assert self.process.stdin is not None
        asked = group.request.to_json() | {"which": group.which, "sizes": group.layout.sizes, "range": [first, stop]}
        try:
            self.process.stdin.write(json.dumps(asked).encode() + b"\n")
        except BrokenPipeError:
            return

    def _wait(self, group: _Group, stop: int) -> int:
        """Wait for all files before `stop`; returns that, or the file at which the child died or hung."""
        assert self.process is not None
        before = -1
        while True:
            said = self._read(WALL_FACTOR * group.request.limits.max_cpu_s)
            at = group.unanswered(stop)
            if said == _DONE and at == stop:
                return stop
            if said in (_DONE, b"") or (said is None and at == before):
                code = self.stop()
                self.was_killed = said == b"" and code == -signal.SIGKILL  # not by us, as one that hangs
                if not self.ready:
                    raise RunError(
                        f"decoding: the process that decodes images ended before it began (exit code {code}); see that "
                        "this machine has memory to spare, then run the same command again"
                    )
                return at
            before = at if said is None else -1

    def _read(self, timeout_s: float) -> bytes | None:
        """What the child says, empty where it is gone; None after so long."""
        assert self.process is not None
        assert self.process.stdout is not None
        waiting = select.poll()
        waiting.register(self.process.stdout, select.POLLIN)
        if not waiting.poll(timeout_s * 1000):
            return None
        said = self.process.stdout.read(1)
        self.ready = self.ready or said == _READY
        return said


def _told(limits: DecodeLimits) -> str:
    return (
        f"decoding it takes more than {limits.max_cpu_s} s of CPU or {limits.memory_bytes >> 20} MiB of memory, or "
        "ends the decoder"
    )


# ---- the child's side ------------------------------------------------------------------------------------------------

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def serve(files: Sequence[int], parent: int) -> None:
    """The child: answer requests on standard input until it ends. files: of the buffers. parent: its process id."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before
        return
    Path("/proc/self/oom_score_adj").write_text("1000")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # a core for each worker, and no memory by the number of cores
    memory: dict[int, mmap.mmap] = {}
    own_bytes = rlimits.data_bytes()
    os.write(1, _READY)
    for line in sys.stdin.buffer:
        asked = json.loads(line)
        request, layout, which = _Request.from_json(asked), _Layout(asked["sizes"], asked["slot_bytes"]), asked["which"]
        if which not in memory or len(memory[which]) < layout.bytes:
            memory[which] = mmap.mmap(files[which], os.fstat(files[which]).st_size)
        rlimits.set_soft(resource.RLIMIT_DATA, own_bytes + request.limits.memory_bytes)
        contents = layout.contents()
        for i in range(*asked["range"]):
            rlimits.set_soft(resource.RLIMIT_CPU, math.ceil(time.process_time()) + request.limits.max_cpu_s)
            _serve_one(memory[which], layout, i, contents[i], request)
        os.write(1, _DONE)


def _serve_one(memory: mmap.mmap, layout: _Layout, i: int, content: slice, request: _Request) -> None:
    try:
        said: tuple[Any, ...]
        said, made = _make(memory[content], request)
        memory[layout.slot(i, len(made))] = made
    except BadImage as bad:
        if isinstance(bad.__cause__, MemoryError):  # perhaps for what images before it have left here
            os._exit(1)
        said = (bad.reason.value, bad.detail)
    line = json.dumps(said, ensure_ascii=False).encode() + b"\n"
    start = layout.record(i).start
    memory[start : start + len(line)] = line


def _make(data: bytes, request: _Request) -> tuple[_Facts, bytes | memoryview]:
    if request.preprocess is None:
        made = resize.make_thumbnail(data, request.limits)
        return (len(made), 1, 1, ""), made
    one = resize.prepare(data, request.limits, request.preprocess)
    return (one.pixels.size, one.width, one.height, one.content_hash), one.pixels.data.cast("B")
