"""Releases: immutable sets with their lineage, gates that let one become the latest, and what changed since the last.

`releases/<date>-<hash>/` is one artifact: the samples of each recipe (`NAME/part-*.parquet`), `metrics.parquet`,
`release.json` (lineage, gates, settings, changes) and a README.md that data set tools read. The hash is of everything
that decides the content, down to the stages of the index, so the same index and settings give the same release, on
whatever day. `latest.json` names the one that passed last.
"""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pd_core.core import artifacts, files, locks, schemas, trust
from pd_core.core.errors import RunError, UserError, printable
from pd_core.core.settings.curate import GateSettings
from pd_core.engine import console, tasks

RELEASES, LATEST = "releases", "latest.json"
METRICS, RECORD, CARD = "metrics.parquet", "release.json", "README.md"
HASH_LETTERS = 12
POINTER = {"release", "uri", "moved", "lock_token", "last", "verdicts", "held"}  # keys of LATEST

# by recipe, by "space.metric"; n, likely_copies and acceptance_rate without a space
Numbers = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Set:
    """One recipe's samples: name, directory of the samples stage, its commit record."""

    name: str
    uri: str
    artifact: artifacts.Artifact


# ---- gates -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """What a gate said of one recipe. value, last: of the metric now and in the latest release; None: absent."""

    recipe: str
    metric: str
    space: str
    condition: str
    value: float | None
    last: float | None
    holds: bool

    def describe(self) -> str:
        """For a person."""
        value = "has no value" if self.value is None else f"is {self.value:.4g}"
        before = "" if self.last is None else f", {self.last:.4g} in the latest release"
        return f"{self.recipe}: {self.metric} {value}{before}; the gate wants {self.condition}"


def judge(gates: Sequence[GateSettings], numbers: Numbers, last: Numbers) -> list[Verdict]:
    """Every gate on every recipe that it is for.

    A metric without a finite value fails its gate. A bound on the change from the latest release holds where that has
    no such recipe or no finite value. It fails where that measured another number of images, with which most metrics
    move.
    """
    return [
        _verdict(gate, recipe, values, last.get(recipe, {}))
        for gate in gates
        for recipe, values in numbers.items()
        if gate.recipe in (None, recipe)
    ]


def _verdict(gate: GateSettings, recipe: str, values: Mapping[str, float], before: Mapping[str, float]) -> Verdict:
    name = gate.metric if gate.metric in values else f"{gate.space}.{gate.metric}"
    value, last = values.get(name), before.get(name)
    if last is not None and not math.isfinite(last):
        last = None
    wanted, holds = [], value is not None and math.isfinite(value)
    bounds = [("at least", gate.min), ("at most", gate.max)]
    if last is not None:
        bounds += [
            ("at least", None if gate.max_decrease is None else last - gate.max_decrease * abs(last)),
            ("at most", None if gate.max_increase is None else last + gate.max_increase * abs(last)),
        ]
    for word, bound in bounds:
        if bound is not None:
            wanted.append(f"{word} {bound:.4g}")
            holds = holds and value is not None and (value >= bound if word == "at least" else value <= bound)
    measured = [numbers.get(f"{gate.space}.n_generated") for numbers in (values, before)]
    changed = gate.max_increase is not None or gate.max_decrease is not None
    if changed and last is not None and name != gate.metric and measured[0] != measured[1]:
        counts = f"{_number(measured[1])}, not {_number(measured[0])}"
        wanted = [
            f"as many images as the latest release measured ({counts}), else it cannot be compared: set evaluation.n"
        ]
        holds = False
    condition = " and ".join(wanted) or "a change within its bounds, and there is no earlier value to compare with"
    return Verdict(recipe, gate.metric, gate.space, condition, value, last, holds)


def numbers_of(sets: Sequence[Set], measured: pa.Table) -> dict[str, dict[str, float]]:
    """What gates look at, of each recipe.

    measured: rows of evaluate's metrics/, whose `set` is the recipe's name; those by label are left out.
    """
    numbers: dict[str, dict[str, float]] = {}
    for made in sets:
        totals = made.artifact.totals
        numbers[made.name] = {
            "n": float(made.artifact.rows),
            # where copies were dropped, the count is of those that are not in the set
            "likely_copies": 0.0 if totals["settings"]["drop_copies"] else totals["copies"] / made.artifact.rows,
            "acceptance_rate": made.artifact.rows / totals["candidates"],
        }
    for row in measured.filter(pc.is_null(measured["label"])).to_pylist():
        if row["set"] in numbers:
            of_set = numbers[row["set"]]
            of_set[f"{row['space']}.{row['metric']}"] = row["value"]
            of_set[f"{row['space']}.n_generated"] = float(row["n_generated"])
    return numbers


# ---- what there is ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Release:
    """A release that is there: its name, its directory, what its record says."""

    name: str
    uri: str
    record: dict[str, Any]


def pointer(root: str) -> dict[str, Any]:
    """`latest.json`, which people may write into; empty where nothing was released yet.

    Raises:
        UserError: it is none: a key that no pointer has, no `release`, or a `held` that is no list of names.
    """
    uri = files.join(root, LATEST)
    there = files.read_json(uri)
    if there is None:
        return {}
    if not isinstance(there, dict) or not isinstance(there.get("release"), str):
        raise UserError(f"{uri}: has no `release`, the name of one; restore or correct it")
    for key in ("release", "last"):
        if there.get(key) is not None:
            trust.file_name(there[key], uri)
    if unknown := sorted(set(there) - POINTER):
        raise UserError(f"{uri}: unknown key {unknown[0]!r}; correct it: the list of releases to keep out is `held`")
    held = there.get("held", [])
    if not isinstance(held, list) or not all(isinstance(name, str) for name in held):
        raise UserError(f"{uri}: `held` must be a list of names of releases; correct it")
    if there["release"] in held:
        raise UserError(f"{uri}: {there['release']} is `release` and in `held` at once; take it out of one of them")
    return there


def settle(root: str) -> None:
    """Where a person has written another `release` into `latest.json`, let the rest of it follow; needs the lock."""
    there = pointer(root)
    if not there or there.get("uri") == (uri := f"{RELEASES}/{there['release']}"):
        return
    record = record_of(root, there["release"]) or {}
    there |= {"uri": uri, "moved": _now(), "last": record.get("last"), "verdicts": record.get("verdicts", [])}
    files.write_bytes(files.join(root, LATEST), json.dumps(there, indent=1).encode())
    console.say(f"{files.join(root, LATEST)}: the rest of it follows `release`, which is {there['release']} now")


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def latest(root: str) -> str | None:
    """Name of the release that passed last."""
    return pointer(root).get("release")


def lock_token(root: str) -> int:
    """Of the run that has moved `latest.json` last; 0 where none has.

    Raises:
        UserError: `latest.json` is none, or no lock has such a number.
    """
    token = pointer(root).get("lock_token", 0)
    if type(token) is not int or not 0 <= token < locks.MAX_TOKEN:
        raise UserError(f"{files.join(root, LATEST)}: `lock_token` is no number of a lock; correct it, or set it to 0")
    return token


def open_latest(root: str) -> Release | None:
    """The release that `latest.json` names, to compare with, or None where nothing was released yet.

    One that has lost parts is enough, if its record can be read.

    Raises:
        UserError: that release is gone.
    """
    name = latest(root)
    if name is None:
        return None
    record = record_of(root, name)
    if record is None:
        raise UserError(
            f"{files.join(root, LATEST)}: names {name}, whose {RECORD} is not there any more, or not whole; restore "
            f"it, or delete {LATEST} to begin without a release to compare with"
        )
    return Release(name, files.join(root, RELEASES, name), record)


def record_of(root: str, name: str) -> dict[str, Any] | None:
    """What a release says of itself; None where that is gone or not whole."""
    record: dict[str, Any] | None = files.read_record(files.join(root, RELEASES, name, RECORD))
    return record


def open_before_latest(root: str) -> Release | None:
    """The release before the one that `latest.json` names; None where there was none, or it is not there any more."""
    before = pointer(root).get("last")
    return None if before is None else open_release(root, before)


def open_release(root: str, name: str) -> Release | None:
    """A finished release, or None; one that has lost parts since, or their bytes, is finished no more."""
    uri = files.join(root, RELEASES, name)
    artifact = artifacts.load_artifact(uri)
    if artifact is None or artifacts.damaged_parts(uri, artifact.parts):
        return None
    return Release(name, uri, files.read_json(files.join(uri, RECORD)))


def digest(values: Mapping[str, Any]) -> str:
    """What names end with: the first letters of the hash of everything that decides the content."""
    return artifacts.fingerprint(values)[:HASH_LETTERS]


def name_of(root: str, identity: Mapping[str, Any]) -> str:
    """Name of the release with this identity: the one that it has, or today's date and its hash."""
    ending = f"-{digest(identity)}"
    there = [name for name in files.folders(files.join(root, RELEASES)) if name.endswith(ending)]
    return there[0] if there else f"{datetime.datetime.now(datetime.UTC).date().isoformat()}{ending}"


# ---- make one --------------------------------------------------------------------------------------------------------


def stage_of(root: str, identity: Mapping[str, Any]) -> artifacts.Stage:
    """The stage of a release under `root`."""
    uri = files.join(root, RELEASES, name_of(root, identity))
    return artifacts.Stage(uri, "release", schemas.VERSIONS["release"], dict(identity))


def run(
    stage: artifacts.Stage,
    sets: Sequence[Set],
    measured: pa.Table,
    record: Mapping[str, Any],
    last: Release | None,
    mending: bool,
) -> tuple[list[artifacts.Part], dict[str, Any]]:
    """Write a release; returns the parts and totals to commit.

    Args:
        stage: from `stage_of`, begun.
        sets: its recipes' samples, whose parts are taken over as they are.
        measured: rows of evaluate's metrics/.
        record: lineage, settings, numbers and verdicts, JSON-able.
        last: the latest release until now.
        mending: the release was whole before; what it says of itself stays, where that can be read.
    """
    taken = {f"{made.name}/{part.name}": (made.uri, part) for made in sets for part in made.artifact.parts}
    adopt = tasks.task(artifacts.Stage.adopt)
    submit = lambda names: adopt.remote(stage, *taken[names[0]], names[0])  # noqa: E731
    parts = tasks.make_missing(stage, [[name] for name in taken], submit)
    done = stage.finished_parts() if mending else {}
    if RECORD in done:
        whole = files.read_json(files.join(stage.uri, RECORD))
        parts.append(done[RECORD])
    else:
        changes = tasks.get(tasks.task(_changes).remote(sets, last, dict(record["numbers"])))
        whole = dict(record) | {"changes": changes, "last": None if last is None else last.name}
        parts.append(stage.write_part(RECORD, json.dumps(whole, indent=1).encode(), 0))
    parts.append(done.get(METRICS) or stage.write_table(METRICS, measured))
    parts.append(stage.write_part(CARD, _card(stage, sets, whole).encode(), 0))
    return parts, {"rows": {made.name: made.artifact.rows for made in sets}, "gates_hold": whole["gates_hold"]}


def _changes(sets: Sequence[Set], last: Release | None, numbers: Numbers) -> dict[str, Any]:
    """Of each recipe: images that the last release has too, new ones, those that are gone; each number before and now.

    Images are told by 64 bits of their hash: 8 bytes each in memory, and of ten million a pair is alike by chance once
    in 400,000 releases.
    """
    numbers_before = {} if last is None else last.record["numbers"]
    changes: dict[str, Any] = {}
    for made in sets:
        now = _hashes(made.uri, [part.name for part in made.artifact.parts])
        before = np.empty(0, np.uint64) if last is None else _hashes(last.uri, _readable(last, made.name))
        old, new = numbers_before.get(made.name, {}), numbers[made.name]
        same = int(np.isin(now, before).sum())
        changes[made.name] = {
            "images_kept": same,
            "images_new": len(now) - same,
            "images_gone": int((~np.isin(before, now)).sum()),
            "numbers": {k: [old.get(k), new.get(k)] for k in sorted({*old, *new})},
        }
    return changes | {name: {"recipe": "gone"} for name in sorted(set(numbers_before) - set(changes))}


def _readable(release: Release, recipe: str) -> list[str]:
    """Parts of a recipe's samples that are there; where some are not, their images count as new in what comes after."""
    artifact = artifacts.load_artifact(release.uri)
    if artifact is None:
        return []
    damaged = artifacts.damaged_parts(release.uri, artifact.parts)
    return [p.name for p in artifact.parts if p.name.startswith(f"{recipe}/") and p.name not in damaged]


def _hashes(uri: str, names: Sequence[str]) -> np.ndarray:
    """The first 64 bits of `image_hash`, hexadecimal, of every row of some parts: uint64 [n]."""
    found = [np.empty(0, np.uint64)]
    for name in names:
        column = files.read_table(files.join(uri, name), ["image_hash"])["image_hash"]
        found.append(np.array([int(text[:16], 16) for text in column.to_pylist()], np.uint64))
    return np.concatenate(found)


def _card(stage: artifacts.Stage, sets: Sequence[Set], record: Mapping[str, Any]) -> str:
    """README.md: the sets as data set tools find them, and what a person wants to know first."""
    configs = "".join(f"- config_name: {made.name}\n  data_files: {made.name}/*.parquet\n" for made in sets)
    names = sorted({name for values in record["numbers"].values() for name in values})
    head = "| set | " + " | ".join(names) + " |\n|---|" + "--:|" * len(names) + "\n"
    lines = [
        f"| {made.name} | " + " | ".join(_number(record["numbers"][made.name].get(name)) for name in names) + " |\n"
        for made in sets
    ]
    gates = "".join(f"- {'holds' if v['holds'] else 'FAILS'}: {Verdict(**v).describe()}\n" for v in record["verdicts"])
    return (
        f"---\nconfigs:\n{configs}---\n\n# {stage.uri.rpartition('/')[2]}\n\nSynthetic images, selected by pseudo "
        f"density. Lineage, settings and changes: `{RECORD}`.\n\n{head}{''.join(lines)}\n"
        f"Gates:\n\n{gates or '- none were set'}\n"
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def say_unknown_held(root: str) -> None:
    """Say which names in `held` are of no release: mistyped ones hold nothing."""
    there = {_digest_of(name) for name in files.folders(files.join(root, RELEASES))}
    for name in pointer(root).get("held", []):
        if _digest_of(name) not in there:
            console.say(
                f"{files.join(root, LATEST)}: `held` names {printable(name)}, which is no release here; correct it, "
                "or leave it if it was deleted"
            )


def is_held_by_hand(root: str, name: str) -> bool:
    """Whether `latest.json` names this release in `held`, of whatever day: one deleted and made again is the same."""
    return _digest_of(name) in map(_digest_of, pointer(root).get("held", []))


def _digest_of(name: str) -> str:
    return name.rpartition("-")[2]


def point(root: str, name: str, token: int, verdicts: Sequence[Verdict], last: Release | None) -> None:
    """Move `latest.json` to a release.

    Args:
        token: of the run lock. verdicts: by which it is moved, against `last`, the latest until now.

    Raises:
        RunError: a later holder of the lock has moved it.
    """
    uri = files.join(root, LATEST)
    there = pointer(root)
    if (other := there.get("lock_token", 0)) > token:
        raise RunError(
            f"{uri}: was moved by run {other} of the lock, this is {token}; what is done is kept, run it again"
        )
    moved = {
        "release": name,
        "uri": f"{RELEASES}/{name}",
        "moved": _now(),
        "lock_token": token,
        "last": None if last is None else last.name,
        "verdicts": [asdict(verdict) for verdict in verdicts],
        "held": there.get("held", []),
    }
    files.write_bytes(uri, json.dumps(moved, indent=1).encode())
