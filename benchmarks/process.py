"""Runs one side of a comparison in a process of its own and watches its memory and that of its children.

Both sides start from the same state, threads are set explicitly, and peak memory belongs to that side alone.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "runs" / "bench-data"  # downloads and features, kept from run to run
short = False  # --short: each side once
WORK = ROOT / "runs" / "bench-work" / str(os.getpid())  # artifacts and logs of this run; stays where it fails
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
SAMPLE_S = 0.25
TIMEOUT_S = 1800.0


@dataclass(frozen=True)
class Outcome:
    """What a process returned and took.

    Attributes:
        value: of the function, through JSON.
        peak_rss_bytes: of the process itself. Resident memory counts pages shared with others, such as Ray's object
            store, in every process that has touched them.
        children: highest peak of its Ray workers and other children, bytes, by what they ran.
    """

    value: Any
    peak_rss_bytes: int
    children: dict[str, int] = field(default_factory=dict)


def peak_rss_bytes(pid: int | str = "self") -> int:
    """High-water mark of resident memory. Not ru_maxrss, which a new process inherits from the one that forked it."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0  # a zombie has no memory


def call(function: str, arguments: dict[str, Any], threads: int | None = None, timeout_s: float = TIMEOUT_S) -> Outcome:
    """Call `module.function(**arguments)` in a new process; arguments and value are JSON.

    Args:
        function: dotted name.
        arguments: by keyword.
        threads: of OpenMP and BLAS, set before anything is imported; None leaves the variables unset, for drivers of
            Ray, whose workers would inherit them.
        timeout_s: the process and its children are ended after that.

    Raises:
        RuntimeError: it failed or took too long; the message ends with its last lines.
    """
    WORK.mkdir(parents=True, exist_ok=True)
    result, log = WORK / "result.json", WORK / f"{function}.log"
    result.unlink(missing_ok=True)
    environment = {n: v for n, v in os.environ.items() if n != "RAY_ADDRESS" and not n.startswith("PD_CORE_")}
    for name in THREAD_VARIABLES:
        environment.pop(name, None)
        if threads is not None:
            environment[name] = str(threads)
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, str(Path(__file__)), function, json.dumps(arguments), str(result)]
    with log.open("w") as stream:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT)
        children = _watch(process, timeout_s)
    if process.returncode or not result.exists():
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise RuntimeError(f"{function}{arguments}: exit code {process.returncode}; {log} ends with\n{tail}")
    answer = json.loads(result.read_text())
    return Outcome(answer["value"], answer["peak_rss_bytes"], children)


def _watch(process: subprocess.Popen[bytes], timeout_s: float) -> dict[str, int]:
    """Wait for the process; peak memory of its children by title. Whatever it leaves behind is ended, by pid."""
    deadline = time.monotonic() + timeout_s
    seen: dict[psutil.Process, tuple[str, int]] = {}
    try:
        while process.poll() is None and time.monotonic() < deadline:
            _sample(process.pid, seen)
            time.sleep(SAMPLE_S)
    finally:
        if process.poll() is None:
            process.terminate()
        _, alive = psutil.wait_procs(seen, timeout=10)  # Ray's daemons need a moment after their driver
        for child in alive:
            child.kill()
        process.wait()
    peaks: dict[str, int] = {}
    for title, peak in seen.values():
        peaks[title] = max(peaks.get(title, 0), peak)
    return peaks


def _sample(pid: int, seen: dict[psutil.Process, tuple[str, int]]) -> None:
    try:
        children = psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return
    for child in children:
        try:
            title, peak = _title(child.cmdline()), peak_rss_bytes(child.pid)
        except (psutil.Error, OSError):
            continue  # gone between two looks
        before, highest = seen.get(child, ("", 0))
        seen[child] = (before if title.startswith("ray::IDLE") and before else title, max(peak, highest))


def _title(command: list[str]) -> str:
    """`ray::_Searcher` of a Ray worker that says what it runs, else the program's name."""
    if not command:
        return "-"
    first = command[0].split()[0]
    return first.partition("(")[0].partition(".")[0] if first.startswith("ray::") else Path(first).name


def _main(function: str, arguments: str, result: str) -> None:
    sys.path[0] = str(ROOT)  # not this folder: its modules are benchmarks.X
    module, _, name = function.rpartition(".")
    value = getattr(importlib.import_module(module), name)(**json.loads(arguments))
    outcome = Outcome(value, peak_rss_bytes())
    Path(result).write_text(json.dumps(asdict(outcome)))


if __name__ == "__main__":
    _main(*sys.argv[1:])
