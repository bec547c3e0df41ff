"""The accepted images as PNG files or WebDataset tars, for tools that read no Parquet."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from typing import Any

from pd_core.core import artifacts, files, schemas, trust
from pd_core.engine import tasks

PICTURES = "png"
FACTS = ("sample_id", "seed", "density", "percentile", "acceptance_probability", "label", "prompt", "likely_copy")


def stage_of(output: str, samples: artifacts.Stage, form: str) -> artifacts.Stage:
    """The export under `output`."""
    identity = {"samples": samples.fingerprint, "form": form}
    return artifacts.Stage(files.join(output, "export"), "export", schemas.VERSIONS["export"], identity)


def run(
    stage: artifacts.Stage, samples_uri: str, samples: artifacts.Artifact, form: str
) -> tuple[list[artifacts.Part], dict[str, Any]]:
    """Write what is missing, a Ray task for each part of the samples; returns the parts and totals to commit."""
    if not stage.finished_parts():  # a set of other images may have been here
        _drop_pictures(stage.uri)
    pictured = {_name(part.name, form): part.name for part in samples.parts if part.rows}
    write = tasks.task(_write)
    submit = lambda missing: write.remote(stage, samples_uri, pictured[missing[0]], form)  # noqa: E731
    parts = tasks.make_missing(stage, [[name] for name in pictured], submit)
    return parts, {"images": sum(part.rows for part in parts), "form": form}


def remove_other(output: str, samples: artifacts.Stage) -> None:
    """Delete the export under `output`, if one was begun there of other samples."""
    uri = files.join(output, "export")
    begun = artifacts.begun_identity(uri)
    if begun is not None and begun["samples"] != samples.fingerprint:
        _drop_pictures(uri)
        artifacts.remove(uri)


def _drop_pictures(uri: str) -> None:
    files.remove_folder(files.join(uri, PICTURES))


def _name(part: str, form: str) -> str:
    """A tar; of PNG files, the table that says where they lie and what they are."""
    return part.replace(".parquet", ".tar" if form == "webdataset" else ".jsonl")


def _write(stage: artifacts.Stage, samples_uri: str, name: str, form: str) -> None:
    uri = files.join(samples_uri, name)
    rows = files.read_table(uri, [*FACTS, "image"]).to_pylist()
    for row in rows:
        trust.file_name(row["image"]["path"], uri)
    if form == "webdataset":
        stage.write_part(_name(name, form), _tar(rows), len(rows))
        return
    lines = []
    for row in rows:
        file = "/".join([PICTURES, *([_folder(row["label"])] if row["label"] else []), row["image"]["path"]])
        stage.folder.write(file, row["image"]["bytes"])
        lines.append(json.dumps({"file": file, **{fact: row[fact] for fact in FACTS}}))
    stage.write_part(_name(name, form), "\n".join(lines).encode() + b"\n", len(rows))


def _folder(label: str) -> str:
    """A label as the name of a folder: no other label has the same, and none leads out of the export."""
    name = label.replace("%", "%25").replace("/", "%2F").replace("\0", "%00")
    return "%2E" + name[1:] if name.startswith(".") else name


def _tar(rows: list[dict[str, Any]]) -> bytes:
    """NUMBER.png, NUMBER.json and, where there is a label, NUMBER.cls of every row; the same rows give the same
    bytes.
    """
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for row in rows:
            stem = row["image"]["path"].removesuffix(".png")
            for suffix, data in _members(row):
                member = tarfile.TarInfo(f"{stem}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return sink.getvalue()


def _members(row: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
    yield "png", row["image"]["bytes"]
    yield "json", json.dumps({fact: row[fact] for fact in FACTS}).encode()
    if row["label"] is not None:
        yield "cls", row["label"].encode()
