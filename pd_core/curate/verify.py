"""`curate.py --verify`: every file of a release held to its commit record, and that to itself."""

from __future__ import annotations

from pd_core.core import artifacts, schemas
from pd_core.core import files as core_files
from pd_core.core.errors import RunError, UserError, printable
from pd_core.core.settings.curate import SET_NAME
from pd_core.curate import releases
from pd_core.engine import console, resources, session, tasks
from pd_core.engine.runs import failures
from pd_core.generate import verify as generate_verify
from pd_core.generate.verify import commit_of, say_some


def verify_release(uri: str) -> None:
    """Hold every file of a release to its commit record, and that to itself.

    Args:
        uri: a folder of `releases/`.

    Raises:
        UserError: no release is there.
        RunError: something differs.
    """
    uri = core_files.absolute(uri)
    with failures("verify", uri):
        artifact = commit_of(uri)
    if artifact is None or artifact.kind != "release":
        raise UserError(f"--verify {uri}: no finished release there; name a folder of releases/")
    if artifact.schema_version != schemas.VERSIONS["release"]:
        raise UserError(f"--verify {uri}: made by another version of pd_core; verify with that one")
    if wrong := release_differences(artifact):  # its names may lead anywhere
        say_some([f"{core_files.ARTIFACT}: {text}" for text in wrong])
        raise RunError(f"verify: {uri}/{core_files.ARTIFACT} is not as it was committed; see above")
    sets = artifact.totals["rows"]
    with session.session(uri, "verify"), failures("verify", uri):
        found = generate_verify.surplus(uri, artifact, ("", *sets)) | _file_differences(uri, artifact)
    say_some([f"{name}: {text}" for name, texts in sorted(found.items()) for text in texts])
    if found:
        raise RunError(f"verify: files not as committed: {len(found)}; see above")
    rows = ", ".join(f"{rows} of {name}" for name, rows in sets.items())
    console.say(f"verify: all {len(artifact.parts)} files are as committed; rows: {rows}")


def _file_differences(uri: str, artifact: artifacts.Artifact) -> dict[str, list[str]]:
    task = tasks.task(generate_verify.file_differences, resources.IO_CPUS)
    found = {}
    with console.progress("verify parts", len(artifact.parts), "parts") as bar:
        submit = lambda part: task.remote(core_files.join(uri, part.name), part)  # noqa: E731
        for part, differences in tasks.bounded(submit, artifact.parts, tasks.in_flight):
            bar.update()
            if differences:
                found[part.name] = differences
    return found


def release_differences(artifact: artifacts.Artifact) -> list[str]:
    """What in the commit record of a release contradicts itself; where nothing does, its names lead into its folder."""
    found = generate_verify.own_differences(artifact)
    sets = artifact.totals.get("rows")
    if not isinstance(sets, dict) or not sets or not all(SET_NAME.fullmatch(name) for name in sets):
        return [*found, "its totals name no sets"]
    fixed = {releases.METRICS, releases.RECORD, releases.CARD}
    names = [str(part.name) for part in artifact.parts]
    found += [f"names no {name}" for name in sorted(fixed - set(names))]
    for name in set(names) - fixed:
        folder, _, file = name.rpartition("/")
        if folder not in sets or artifacts.part_number(file) is None:
            found.append(f"{printable(name)} is no name of a part")
    held = {name: sum(p.rows for p in artifact.parts if p.name.startswith(f"{name}/")) for name in sets}
    if held != sets:
        found.append(f"its parts hold {held} rows, its totals {sets}")
    return found
