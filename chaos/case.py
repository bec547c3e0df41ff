"""One disturbed run: its driver, the moments at which it is disturbed, and the runs after it until one succeeds."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from chaos.workflows import ROOT, is_done, last_file
from pd_core.core import files

LIMIT_S = 280.0  # one run; what takes longer hangs
MOST_RUNS = 6
EVENTS = re.compile(rf"(^|/)({re.escape(files.ARTIFACT)}|{re.escape(files.STARTED)}|{files.RECORDS}/[^/]+\.json)$")
LONGEST_DELAY_S = 1.5  # after a file has appeared


class HangError(RuntimeError):
    """A run that did not end by itself."""


@dataclass
class Case:
    """A workflow under a fault.

    Attributes:
        workflow, fault, number: which; they and the seed decide the moments.
        argv: of the workflow. output: local path or s3://. env: of the driver, beside this process's.
        events: files by which a run's progress is counted that an undisturbed run leaves.
        folder: of the logs.
        runs: drivers started. kills: tried. hits: kills that met something that ran. reruns: runs needed after the
            first.
        lines: with which runs ended that failed. tracebacks: whether a driver ended with one.
    """

    workflow: str
    fault: str
    number: int
    seed: int
    argv: list[str]
    output: str
    env: Mapping[str, str]
    events: int
    folder: Path
    runs: int = 0
    kills: int = 0
    hits: int = 0
    reruns: int = 0
    lines: list[str] = field(default_factory=list)
    tracebacks: int = 0
    last: Run | None = None

    def __post_init__(self) -> None:
        self.random = random.Random(f"{self.seed}/{self.workflow}/{self.fault}/{self.number}")

    def moments(self, count: int) -> Iterator[tuple[int, float]]:
        """Random moments in their order: so many files are there, and so many seconds later."""
        targets = sorted(self.random.randrange(self.events) for _ in range(count))
        delays = [self.random.uniform(0, LONGEST_DELAY_S) for _ in targets]
        return iter(list(zip(targets, delays, strict=True)))

    def moment_after(self, events: int, share: float) -> tuple[int, float]:
        """A random moment after so many files are there, within a share of what is missing then."""
        missing = max(1, round((self.events - events) * share))
        return events + self.random.randrange(missing), self.random.uniform(0, LONGEST_DELAY_S)

    def start(self) -> Run:
        """A driver."""
        self.runs += 1
        log = self.folder / f"run-{self.runs}.log"
        environment = {n: v for n, v in os.environ.items() if not n.startswith(("RAY_", "AWS_", "MLFLOW_", "PD_CORE_"))}
        self.last = Run(self, log, {**environment, **self.env})
        return self.last

    def end(self) -> None:
        """No driver of it runs on."""
        if self.last is not None and self.last.alive:
            self.last.end()

    def rerun(self) -> None:
        """Run the command until it succeeds.

        Raises:
            HangError: it hangs. RuntimeError: it failed MOST_RUNS times.
        """
        while self.runs < MOST_RUNS:
            self.reruns += 1
            if is_done(self.workflow, self.start().finish()):
                return
        raise RuntimeError(f"{self.workflow} failed {self.runs} times: {self.lines[-1:]}; see {self.folder}")

    def finish(self, run: Run) -> None:
        """Wait for a run that was disturbed; where it fails, run again until one succeeds."""
        if not is_done(self.workflow, run.finish()):
            self.rerun()


class Run:
    """A driver, its log, and its exit."""

    def __init__(self, case: Case, log: Path, environment: Mapping[str, str]):
        self.case, self.log = case, log
        program = str(ROOT / "workflows" / f"{case.workflow}.py")
        with log.open("wb") as stream:
            self.process = subprocess.Popen(
                [sys.executable, program, *case.argv],
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=dict(environment),
                cwd=ROOT,
                start_new_session=True,
            )
        self.deadline = time.monotonic() + LIMIT_S

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self.process.poll() is None

    def wait_until(self, events: int, delay_s: float) -> bool:
        """Return at a moment of the run; False where it ended or had made everything before. Raises HangError."""
        while self.alive and count_events(self.case.output) < events:
            self._check_time()
            time.sleep(0.05)
        moment = time.monotonic() + delay_s
        while self.alive and time.monotonic() < moment:
            time.sleep(0.02)
        return self.alive and not files.exists(files.join(self.case.output, last_file(self.case.workflow)))

    def kill(self) -> None:
        """SIGKILL to the driver alone; what it leaves behind is Ray's to end."""
        children = self._family()
        self.process.kill()
        self.process.wait()
        _, left = psutil.wait_procs(children, timeout=20)
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()

    def finish(self) -> int:
        """Wait for its end; its exit code, and what it said where that is not 0. Raises HangError."""
        try:
            while self.alive:
                self._check_time()
                time.sleep(0.05)
        finally:
            self.note()
        return self.process.returncode

    def note(self) -> None:
        """Remember the line with which it failed."""
        code = self.process.poll()
        if code is None or is_done(self.case.workflow, code):
            return
        text = self.log.read_text(errors="replace")
        self.case.lines += [line for line in text.splitlines() if line.startswith(("failed: ", "error: "))][-1:]
        self.case.tracebacks += int(bool(re.search(r"^Traceback", text, re.MULTILINE)))

    def _check_time(self) -> None:
        if time.monotonic() > self.deadline:
            self.end()
            raise HangError(f"{self.case.workflow}: not done after {LIMIT_S:.0f} s; see {self.log}")

    def end(self) -> None:
        """SIGKILL to the driver and all that it has started."""
        family = self._family()
        os.killpg(self.process.pid, signal.SIGKILL)
        for process in family:
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.process.wait()

    def _family(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.Error):
            return psutil.Process(self.process.pid).children(recursive=True)
        return []


def count_events(output: str) -> int:
    """Files of an output by which its progress is counted: stages begun and finished, parts recorded."""
    if not files.is_local(output):
        fs, folder = files.filesystem(output)
        return sum(bool(EVENTS.search(name)) for name in fs.find(folder))
    found = 0
    for folder, _, names in os.walk(output):
        found += sum(bool(EVENTS.search(f"{folder}/{name}")) for name in names)
    return found
