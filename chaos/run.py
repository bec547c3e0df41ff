"""Disturbs every workflow in every way at random moments, compares what is left with an undisturbed run, counts.

    make chaos
    make chaos ARGS="--only generate"
    make chaos ARGS="--only generate:driver:0 --seed 3"

Results are added to docs/reliability.json, one entry a case, and the tables of docs/reliability.md are written from it.
All cases take about an hour and a half on 2 cores. Inputs and undisturbed outputs stay in runs/chaos, where `--fresh`
makes them again. A small disk needs root (`mount`); without it these cases are left out, and said to be.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # not this folder: its modules are chaos.X

from chaos import faults, table  # noqa: E402
from chaos.case import Case, HangError, count_events  # noqa: E402
from chaos.cluster import Nodes, running_nodes  # noqa: E402
from chaos.compare import Difference, compare  # noqa: E402
from chaos.workflows import WORKFLOWS, Inputs, arguments, is_done, last_file, make_inputs  # noqa: E402
from pd_core.core import artifacts, files  # noqa: E402
from tests.mlflow_server import MlflowServer  # noqa: E402
from tests.s3 import Weed  # noqa: E402

UNTRACKED = "--no-tracking.enabled"


class Chaos:
    """Inputs, undisturbed outputs and servers, each made when the first case needs it."""

    def __init__(self, folder: Path, seed: int, stack: contextlib.ExitStack):
        self.folder, self.seed = folder, seed
        self.inputs = make_inputs(folder)
        self.scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder)))
        self._stack = stack
        disk = self.scratch / "disk"
        self.site = faults.Site(nodes=self._nodes, weed=self._weed, mlflow=self._mlflow, disk=disk)

    @functools.cache  # noqa: B019
    def _nodes(self) -> Nodes:
        nodes = self._stack.enter_context(running_nodes())
        end_on_sigterm()  # Ray has put its own in the place of ours
        return nodes

    @functools.cache  # noqa: B019
    def _weed(self) -> Weed:
        weed = Weed(self.scratch / "s3")
        self._stack.callback(weed.kill)
        weed.start()
        return weed

    @functools.cache  # noqa: B019
    def _mlflow(self) -> MlflowServer:
        (self.scratch / "mlflow").mkdir()
        server = MlflowServer(self.scratch / "mlflow")
        self._stack.callback(server.kill)
        server.start()
        return server

    def undisturbed(self, workflow: str) -> Path:
        """The output of a run in which nothing happened."""
        if workflow != "build_index":
            self.undisturbed("build_index")
        output = self.folder / "undisturbed" / workflow
        if not (output / last_file(workflow)).exists():
            shutil.rmtree(output, ignore_errors=True)
            argv = arguments(workflow, self.inputs, str(output), UNTRACKED)
            case = self._case(workflow, "none", 0, argv, str(output), {}, 0)
            if not is_done(workflow, (run := case.start()).finish()):
                raise RuntimeError(f"the undisturbed run of {workflow} failed; see {run.log}")
        return output

    @functools.cache  # noqa: B019
    def _undisturbed_on_s3(self, workflow: str) -> tuple[Path, str]:
        """The same in a bucket, whose listings mark files otherwise, of inputs in it: a copy, and where it was."""
        env = self.site.weed().server.env
        with _environment(env):
            output, inputs = self._to_bucket(f"{workflow}-none".replace("_", "-"))
            case = self._case(workflow, "none-s3", 0, arguments(workflow, inputs, output, UNTRACKED), output, env, 0)
            if not is_done(workflow, (run := case.start()).finish()):
                raise RuntimeError(f"the undisturbed run of {workflow} on S3 failed; see {run.log}")
            return self._fetched(output, f"{workflow}-on-s3"), output

    def _fetched(self, output: str, name: str) -> Path:
        """A copy of what lies in a bucket."""
        local = self.scratch / name
        shutil.rmtree(local, ignore_errors=True)
        self.site.weed().server.filesystem().get(output.removeprefix("s3://") + "/", str(local), recursive=True)
        return local

    def _case(
        self, workflow: str, fault: str, number: int, argv: list[str], output: str, env: dict[str, str], events: int
    ) -> Case:
        logs = self.folder / "logs" / f"{workflow}-{fault}-{number}"
        shutil.rmtree(logs, ignore_errors=True)
        logs.mkdir(parents=True)
        return Case(workflow, fault, number, self.seed, argv, output, env, events, logs)

    def run(self, workflow: str, fault: str, number: int) -> dict[str, Any]:
        """One case: what happened, and what differs."""
        expected = self.undisturbed(workflow)
        place = str(expected)
        inputs, env, more = self.inputs, {}, [UNTRACKED]
        output = str(self.scratch / f"{workflow}-{fault}-{number}")
        if fault in faults.ON_CLUSTER:
            self.site.nodes().replace()  # all are there
            env = self.site.nodes().env
        if fault in faults.ON_S3:
            env = self.site.weed().server.env
            with _environment(env):
                output, inputs = self._to_bucket(f"{workflow}-{fault}-{number}".lower().replace("_", "-"))
            expected, place = self._undisturbed_on_s3(workflow)
        if fault == "mlflow":
            env, more = {"MLFLOW_TRACKING_URI": self.site.mlflow().uri}, []
        if fault == "truncated":  # at the place where it was made, which listings of its own stages name
            output, expected = str(expected), self.scratch / "kept"
            shutil.copytree(output, expected)
        if fault == "full-disk":
            output = str(self.site.disk / "output")
        argv = arguments(workflow, inputs, output, *more)
        case = self._case(workflow, fault, number, argv, output, dict(env), count_events(str(expected)))
        with contextlib.ExitStack() as around:
            around.enter_context(_environment(env if fault in faults.ON_S3 else {}))
            if fault == "truncated":
                around.callback(_put_back, expected, Path(output))
            if fault == "full-disk":
                around.enter_context(faults.small_disk(case, self.site, expected))
            watch = artifacts.Stopwatch()
            broken = _disturbed(case, self.site)
            difference = Difference() if broken else self._compared(case, expected, place)
        result = _result(case, difference, broken, watch.seconds)
        text = json.dumps(result).replace(case.output, "OUTPUT").replace(str(self.folder), "WORK")
        return dict(json.loads(text))  # which names no place of this machine

    def _to_bucket(self, name: str) -> tuple[str, Inputs]:
        """An output in a bucket, and inputs of which images and index are there too."""
        bucket = self.site.weed().server.make_bucket()
        fs = self.site.weed().server.filesystem()
        fs.put(f"{self.inputs.images}/", f"{bucket}/images", recursive=True)
        fs.put(f"{self.inputs.index}/", f"{bucket}/index", recursive=True)
        there = {"images": f"s3://{bucket}/images", "index": f"s3://{bucket}/index"}
        return f"s3://{bucket}/{name}", Inputs(**{**vars(self.inputs), **there})

    def _compared(self, case: Case, expected: Path, place: str) -> Difference:
        if files.is_local(case.output):
            difference = compare(Path(case.output), expected, (case.output, place))
            if difference.none:
                shutil.rmtree(case.output)
            return difference
        return compare(self._fetched(case.output, "fetched"), expected, (case.output, place))


def _put_back(kept: Path, place: Path) -> None:
    shutil.rmtree(place, ignore_errors=True)
    shutil.move(kept, place)


def _disturbed(case: Case, site: faults.Site) -> str | None:
    """Why the workflow could not be brought to its end, or None."""
    try:
        faults.FAULTS[case.fault](case, site)
    except (HangError, RuntimeError) as error:
        return str(error)
    finally:
        case.end()
    return None


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """These variables in this process, which looks into the bucket itself."""
    import s3fs

    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        s3fs.S3FileSystem.clear_instance_cache()


def _result(case: Case, difference: Difference, broken: str | None, seconds: float) -> dict[str, Any]:
    return {
        "workflow": case.workflow,
        "fault": case.fault,
        "number": case.number,
        "seed": case.seed,
        "runs": case.runs,
        "kills": case.kills,
        "hits": case.hits,
        "reruns": case.reruns,
        "lost": difference.lost,
        "doubled": difference.doubled,
        "differing": difference.parts,
        "lines": case.lines,
        "tracebacks": case.tracebacks,
        "broken": broken,
        "seconds": round(seconds, 1),
    }


def chosen(only: Sequence[str] | None, count: int | None) -> list[tuple[str, str, int]]:
    """The cases that are named, WORKFLOW[:FAULT[:NUMBER]] with * for any; without names all.

    Raises:
        ValueError: a name that is none.
    """
    found = []
    for text in only or ["*"]:
        workflow, fault, number = (*text.split(":"), "*", "*")[:3]
        for kind, value, names in (("workflow", workflow, WORKFLOWS), ("fault", fault, faults.FAULTS)):
            if value != "*" and value not in names:
                raise ValueError(f"--only {text}: no {kind} {value!r}; there are {', '.join(names)}")
        for w in WORKFLOWS if workflow == "*" else [workflow]:
            for f in faults.FAULTS if fault == "*" else [fault]:
                numbers = range(count or faults.CASES.get(f, 1)) if number == "*" else [int(number)]
                found += [(w, f, n) for n in numbers]
    return list(dict.fromkeys(found))


def end_on_sigterm() -> None:
    """Unwind, so that everything that was started is ended."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def main(argv: Sequence[str]) -> int:
    """Run the cases one after the other; each adds its result when it is done. 0: none lost or doubled anything."""
    parser = argparse.ArgumentParser(prog="make chaos", description="Disturb the workflows, compare, count.")
    parser.add_argument("--only", action="append", metavar="WORKFLOW[:FAULT[:NUMBER]]", help="* for any; repeatable")
    parser.add_argument("--cases", type=int, help="of each workflow and fault (default: 1 or 2)")
    parser.add_argument("--seed", type=int, default=0, help="decides the random moments (default: 0)")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "chaos", help="for inputs, outputs and logs")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="where reliability.json and .md are")
    parser.add_argument("--fresh", action="store_true", help="make inputs and undisturbed outputs again")
    given = parser.parse_args(argv)
    end_on_sigterm()
    try:
        cases = chosen(given.only, given.cases)
    except ValueError as error:
        parser.error(str(error))
    if given.fresh:
        shutil.rmtree(given.work, ignore_errors=True)
    wrong = 0
    with contextlib.ExitStack() as stack:
        chaos = Chaos(given.work.resolve(), given.seed, stack)
        for workflow, fault, number in cases:
            name = f"{workflow}:{fault}:{number}"
            if fault == "full-disk" and not faults.can_mount():
                print(f"{name}: left out: a small disk needs root", flush=True)
                continue
            result = chaos.run(workflow, fault, number)
            table.add(given.docs, result)
            bad = bool(result["broken"] or result["lost"] or result["doubled"] or result["differing"])
            wrong += bad
            print(f"{name}: {table.told(result)}", flush=True)
            if bad:
                print(f"{name}: again: python chaos/run.py --seed {given.seed} --only {name}", flush=True)
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
