"""Whether a command has finished its output already: told from records and the states of files, before Ray is started.

What a run makes follows from its settings, the code, the device, and the files that the settings name. `facts` are all
of these; a finished run leaves those it began with beside what it made. The same facts again, and every part in its
place: nothing is to be done. Whatever cannot be known here in a moment, such as weights on a hub, leaves the facts
unknown, and the run goes its whole way.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import itertools
import json
import os
import platform
import sys
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pd_core.core import artifacts, files, schemas, trust
from pd_core.core.errors import RunError, UserError
from pd_core.core.settings.base import WorkflowSettings, flatten
from pd_core.core.settings.data import INCEPTION
from pd_core.engine import session, tracking

MANY = 20_000  # files of an input; where there are more, the run looks itself
INPUTS = (  # settings that name what a run reads: files, folders, patterns
    "base",
    "checkpoint",
    "data.source",
    "discriminator",
    "evaluation.judge.checkpoint",
    "features.checkpoint",
    "generator.code",
    "generator.path",
    "generator.prompts",
    "index",
    "judge.checkpoint",
    "real",
    "samples",
    "source",
)
EXTRACTORS = ("features", "judge", "evaluation.judge")
HOW = ("config", "overwrite", "dry_run")  # settings that say nothing of what is made
DEVICES = ("/dev/nvidia[0-9]*", "/proc/driver/nvidia/gpus/*", "/dev/dxg", "/dev/kfd", "/dev/dri/render*")
CHOSEN_DEVICES = ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")


@dataclass(frozen=True)
class Finished:
    """What a finished run leaves for the next one of the same command.

    Attributes:
        facts: hash of those it began with.
        stages: fingerprints of all that it consists of, by their folders in the output.
        lines: what it said of its result.
    """

    facts: str
    stages: dict[str, str]
    lines: tuple[str, ...]

    def holds(self, facts: str | None, output: str) -> bool:
        """Whether the facts are the same now, and every stage is there as it was, with all its parts, and of this
        pd_core.
        """

        def whole(folder: str) -> bool:
            uri = files.join(output, folder)
            artifact = artifacts.load_artifact(uri)
            return (
                artifact is not None
                and artifact.fingerprint == self.stages[folder]
                and artifact.schema_version == schemas.VERSIONS.get(artifact.kind, artifact.schema_version)
                and not artifacts.damaged_parts(uri, artifact.parts)
            )

        with ThreadPoolExecutor(files.READERS) as readers:
            return facts == self.facts and all(readers.map(whole, self.stages))


def read(uri: str) -> Finished | None:
    """What the record at a URI, such as run.json, holds under `finished`; None where nothing that is whole."""
    try:
        record = files.read_record(uri)
        found = trust.checked(Finished, record.get("finished") if isinstance(record, dict) else None, uri)
        for folder in found.stages:
            trust.relative(folder, uri)
    except UserError:  # the run makes another
        return None
    return found


def facts(settings: WorkflowSettings, output: str, more: Iterable[str] = ()) -> str | None:
    """A hash of everything that what a run makes follows from; None where it cannot be known here and now.

    Args:
        settings: resolved, with absolute paths.
        output: of the run; what lies in it is no input.
        more: URIs of inputs that no setting names.
    """
    values = settings.model_dump(mode="json", exclude=set(HOW))
    leaves = dict(flatten(values))
    if session.is_joined() or not _known(leaves):
        return None
    named = [leaves.get(name) for name in INPUTS]
    uris = [uri for value in named for uri in (value if isinstance(value, list) else [value]) if uri]
    states = {uri: state(uri, output) for uri in map(_root, [*uris, *more])}
    if None in states.values():
        return None
    uri = tracking.resolve_uri(settings.tracking, output) if settings.tracking.enabled else None
    found = {
        "settings": values,
        "inputs": states,
        "code": _code(),
        "packages": _packages(),
        "devices": [*(sorted(path) for path in map(glob.glob, DEVICES)), *map(os.environ.get, CHOSEN_DEVICES)],
        "tracking": uri and tracking.shown(uri),
    }
    return artifacts.fingerprint(found)


def _known(leaves: Mapping[str, Any]) -> bool:
    """Whether no model comes from a hub, where it may be another one today, or from code that may read anything."""
    for section in EXTRACTORS:
        model, checkpoint = leaves.get(f"{section}.model"), leaves.get(f"{section}.checkpoint")
        if model in (None, "none", INCEPTION):  # INCEPTION is known by its hash
            continue
        if checkpoint is None or ":" in str(model):  # of hf_hub:... size and mean lie there
            return False
    kind = leaves.get("generator.kind")
    return kind != "python" and (kind != "stylegan" or leaves.get("generator.code") is not None)


def _root(uri: str) -> str:
    """The URI, absolute, up to the first part of it that is a pattern."""
    parts = files.absolute(uri).rstrip("/").split("/")
    return "/".join(parts[: next((i for i, part in enumerate(parts) if set(part) & set("*?[]{}")), len(parts))])


def state(uri: str, output: str) -> str | None:
    """A hash over names, sizes and versions of the files at and under a URI.

    None where there is nothing, more than MANY files and folders, or some that cannot be listed, which may be read
    all the same.
    """
    digest, count = hashlib.sha256(), 0
    try:
        with files.explained(uri):
            for entry in _local(uri, output) if files.is_local(uri) else _remote(uri, output):
                count += 1
                if count > MANY:
                    return None
                digest.update(json.dumps(entry).encode())
    except (UserError, RunError):
        return None
    return digest.hexdigest() if count else None


def _local(uri: str, output: str) -> Iterator[list[Any]]:
    """What lies at and under a local path, links followed, but no folder twice; of each file whatever moves when it is
    written, replaced or moved.
    """

    def version(path: str) -> list[Any]:
        found = os.stat(path)
        return [path, found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]

    if os.path.isfile(uri):
        yield version(uri)
        return
    waiting, seen = [uri], set[tuple[int, int]]()
    while waiting:
        folder = waiting.pop()
        found = os.stat(folder)
        if folder == output or (found.st_dev, found.st_ino) in seen:
            continue
        seen.add((found.st_dev, found.st_ino))
        yield [folder]
        with os.scandir(folder) as entries:
            inside = sorted(itertools.islice(entries, MANY + 1), key=lambda entry: entry.name)
        waiting += [entry.path for entry in reversed(inside) if entry.is_dir()]
        for entry in inside:
            if not entry.is_dir():
                yield version(entry.path) if os.path.exists(entry.path) else [entry.path, os.readlink(entry.path)]


def _remote(uri: str, output: str) -> Iterator[list[Any]]:
    """Objects under a URI of a store, or where there are none the object at it, with their ETags."""
    fs, path = files.filesystem(uri)
    bucket, _, key = path.strip("/").partition("/")
    found, more = False, dict[str, Any]()
    while True:  # a page at a time: whoever counts may have enough after the first
        page = fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=f"{key}/" if key else "", **more)
        for item in page.get("Contents", ()):
            found = True
            if not f"s3://{bucket}/{item['Key']}".startswith(f"{output}/"):
                yield [item["Key"], item["Size"], item["ETag"]]
        if not page.get("IsTruncated"):
            break
        more["ContinuationToken"] = page["NextContinuationToken"]
    if key and not found:
        head = fs.call_s3("head_object", Bucket=bucket, Key=key)
        yield [key, head["ContentLength"], head["ETag"]]


@functools.cache
def _code() -> str:
    """Hash of the code of pd_core."""
    root, digest = Path(__file__).resolve().parents[1], hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + hashlib.sha256(files.read_bytes(str(path))).digest())
    return digest.hexdigest()


def _packages() -> str:
    """Hash of the names and versions of all packages that are installed, and of Python's."""
    # what Ray brings lies in its own folder, and is on the path once it is imported
    folders = [folder or "." for folder in sys.path if "site-packages/" not in folder]
    found = {Path(path).name for folder in folders for path in glob.glob(f"{glob.escape(folder)}/*.dist-info")}
    return artifacts.fingerprint({"python": platform.python_version(), "packages": sorted(found)})
