"""`generate.py --verify` and `curate.py --verify`: from a commit record to what differs, said line by line."""

from __future__ import annotations

import secrets
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pd_core import cluster, config, generators, realset, schemas, search, storage, verifying
from pd_core.candidates import Recipe, prompts_hash
from pd_core.errors import RunError, UserError, one_line, printable
from pd_core.running import failures

CODE: Mapping[str, tuple[str, ...]] = {  # settings that decide which code runs when a generator of a kind is opened
    "python": ("path", "arguments"),
    "stylegan": ("path", "code"),
    "torchscript": ("path",),  # no safe container
    "diffusers": (),  # but for pickles
}
STAGES = ("samples", "rejected", "pilot", "export", "report")  # of an output; those that are finished are checked
ROUNDED = ("torch", "torchvision", "faiss-cpu", "faiss-gpu-cu12", "numpy", "pillow")  # versions move numbers' last bits
SHOWN = 50  # differences of each kind


def verify(uri: str, rows: int, generator: config.GeneratorSettings, seed: int | None = None) -> None:
    """Check every part of an output's finished stages against its record, make `rows` rows again from their seeds, compare.

    Args:
        uri: output of generate.py.
        rows: how many.
        generator: of this command. Only that it names the recorded one is used, and its permission to load a pickle.
        seed: of the choice of rows; None: another one in each call, which is printed.

    Raises:
        UserError: nothing finished is there, the record names code that this command does not name, what it was made from is
            gone or has changed, or it was made on a GPU and there is none here.
        RunError: something differs.
    """
    uri, seed = storage.absolute(uri), secrets.randbits(31) if seed is None else seed
    with failures("verify", uri):
        committed = {stage: one for stage in STAGES if (one := _commit_of(storage.join(uri, stage))) is not None}
    artifact = committed.pop("samples", None)
    if artifact is None or artifact.kind != "samples":
        raise UserError(f"--verify {uri}: no finished samples there; name the --output of a finished generate.py")
    with cluster.session(uri, "verify") as now, failures("verify", uri):
        recipe = recipe_of(uri, artifact, generator)
        if recipe.device == "cuda" and not now.gpus:
            raise UserError(
                f"--verify {uri}: these samples were made on GPUs and the cluster has none; on CPUs their last bits, and with "
                "them their hashes, are others; verify where there is a GPU"
            )
        _say_versions(artifact)
        samples = samples_of(uri, artifact, recipe)
        parts, chosen = verifying.check_parts(samples, artifact, committed, verifying.Draw(rows, seed))
        _say_some([f"{name}: {text}" for name, texts in parts.items() for text in texts])  # whatever comes of the rows
        cluster.say(f"verify: {len(chosen)} of {artifact.rows} rows are made again, chosen by seed {seed}")
        found = verifying.Findings(parts)
        if len(chosen):
            with search.open_pool(recipe.realset.index, now, None, 1, True, "scoring") as pool:
                found.add(verifying.check_rows(samples, pool, now, chosen))
    _say_findings(found, {"samples": artifact, **committed})


def verify_release(uri: str) -> None:
    """Hold every file of a release to its commit record, and that to itself.

    Args:
        uri: a folder of `releases/`.

    Raises:
        UserError: no release is there.
        RunError: something differs.
    """
    uri = storage.absolute(uri)
    with failures("verify", uri):
        artifact = _commit_of(uri)
    if artifact is None or artifact.kind != "release":
        raise UserError(f"--verify {uri}: no finished release there; name a folder of releases/")
    if artifact.schema_version != schemas.VERSIONS["release"]:
        raise UserError(f"--verify {uri}: made by another version of pd_core; verify with that one")
    if wrong := verifying.release_differences(artifact):  # its names may lead anywhere
        _say_some([f"{storage.ARTIFACT}: {text}" for text in wrong])
        raise RunError(f"verify: {uri}/{storage.ARTIFACT} is not as it was committed; see above")
    sets = artifact.totals["rows"]
    with cluster.session(uri, "verify"), failures("verify", uri):
        found = verifying.surplus(uri, artifact, ("", *sets)) | _file_differences(uri, artifact)
    _say_some([f"{name}: {text}" for name, texts in sorted(found.items()) for text in texts])
    if found:
        raise RunError(f"verify: files not as committed: {len(found)}; see above")
    rows = ", ".join(f"{rows} of {name}" for name, rows in sets.items())
    cluster.say(f"verify: all {len(artifact.parts)} files are as committed; rows: {rows}")


def _file_differences(uri: str, artifact: storage.Artifact) -> dict[str, list[str]]:
    task = cluster.task(verifying.file_differences, cluster.IO_CPUS)
    found = {}
    with cluster.progress("verify parts", len(artifact.parts), "parts") as bar:
        submit = lambda part: task.remote(storage.join(uri, part.name), part)  # noqa: E731
        for part, differences in cluster.bounded(submit, artifact.parts, cluster.in_flight):
            bar.update()
            if differences:
                found[part.name] = differences
    return found


def _commit_of(uri: str) -> storage.Artifact | None:
    name = f"{uri.rpartition('/')[2]}/{storage.ARTIFACT}"
    try:
        found = storage.load_artifact(uri)
    except (ValueError, TypeError, KeyError) as error:
        raise RunError(f"verify: {name} is no commit record ({one_line(error)})") from None
    if found is None and storage.exists(storage.join(uri, storage.ARTIFACT)):
        raise RunError(f"verify: {name} is no commit record (it is no whole JSON file)")
    return found


def samples_of(uri: str, artifact: storage.Artifact, recipe: Recipe) -> verifying.Samples:
    """The samples of an output whose commit record and recipe these are."""
    return verifying.Samples(
        uri=storage.join(uri, "samples"),
        recipe=recipe,
        chunks_per_part=artifact.identity["chunks_per_part"],
        candidates=artifact.totals["candidates"],
        rejected=storage.join(uri, "rejected") if artifact.identity.get("keep_rejected") else None,
    )


def _say_versions(artifact: storage.Artifact) -> None:
    """A line where packages that decide the last bits of images and densities are not those of the run."""
    here = storage.package_versions()
    was = artifact.versions
    moved = [f"{name} {was.get(name)} -> {here.get(name)}" for name in ROUNDED if was.get(name) != here.get(name)]
    if moved:
        cluster.say(
            f"verify: other packages than in the run ({printable(', '.join(moved))}); numbers may differ by rounding"
        )


def _say_findings(found: verifying.Findings, committed: Mapping[str, storage.Artifact]) -> None:
    """Each difference of rows and the sum of all, those of files being said. Raises RunError where there is any."""
    wrong = {number: text for number, text in sorted(found.rows.items()) if text is not None}
    _say_some([f"chunk {chunk}: {text}" for chunk, texts in sorted(found.chunks.items()) for text in texts])
    _say_some([f"sample {number}: {text}" for number, text in wrong.items()])
    failed = []
    if found.parts:
        failed.append(f"files not as committed: {len(found.parts)}")
    if found.chunks:
        failed.append(f"chunks that hold other rows than are accepted of them: {len(found.chunks)}")
    if wrong:
        failed.append(f"{len(wrong)} of {len(found.rows)} rows are not what their seeds give")
    if failed:
        raise RunError(f"verify: {'; '.join(failed)}; see above")
    rows = len(found.rows)
    files = ", ".join(f"{len(artifact.parts)} of {stage}/" for stage, artifact in committed.items())
    either = ", each candidate is in samples/ or in rejected/" if "rejected" in committed else ""
    cluster.say(
        f"verify: all files are as committed ({files}), the totals are their sums{either}, "
        f"{rows} of {rows} rows are what their seeds give"
    )


def _say_some(lines: Sequence[str]) -> None:
    for line in lines[:SHOWN]:
        cluster.say(printable(line))
    if len(lines) > SHOWN:
        cluster.say(f"... and {len(lines) - SHOWN} more")


def recipe_of(uri: str, artifact: storage.Artifact, told: config.GeneratorSettings) -> Recipe:
    """The recipe of finished samples, from their commit record alone; `told`, of this command, only permits to run code."""
    identity, stored = artifact.identity, artifact.totals["settings"]
    if artifact.schema_version != schemas.VERSIONS["samples"] or "device" not in identity:
        raise UserError(f"--verify {uri}: made by another version of pd_core; verify with that one")
    generator = _permitted(uri, _recorded(uri, stored["generator"]), told)
    real = realset.open_realset(stored["index"])
    if dict(real.fingerprints) != identity["realset"]:
        raise UserError(
            f"--index {stored['index']}: is not as it was when the samples were made; nothing to compare with"
        )
    if stored["checkpoint"]:
        real = replace(real, extractor=replace(real.extractor, checkpoint=stored["checkpoint"]))
    prompts = generators.read_prompts(generator.prompts) if generator.prompts else ()
    if prompts_hash(prompts) != identity["prompts"]:
        raise UserError(f"--generator.prompts {generator.prompts}: has changed since the samples were made")
    return Recipe.from_identity(identity, generator, real, prompts)


def _recorded(uri: str, values: Mapping[str, Any]) -> config.GeneratorSettings:
    try:
        return config.GeneratorSettings.model_validate(values)
    except ValueError as error:
        raise UserError(f"--verify {uri}: its record holds no settings of a generator ({one_line(error)})") from None


def _permitted(uri: str, stored: config.GeneratorSettings, told: config.GeneratorSettings) -> config.GeneratorSettings:
    """The recorded generator. The record may be a stranger's: what runs code is opened only if this command names it too.

    Raises:
        UserError: it does not.
    """
    names, allow_pickle = CODE[stored.kind], told.allow_pickle and told.kind == stored.kind
    if allow_pickle:
        names = tuple(dict.fromkeys(("path", *names)))
    theirs, ours = _naming(stored, names), _naming(told, names)
    if names and theirs != ours:
        other = " and ".join(name for name in theirs if theirs[name] != ours.get(name)) or "code"
        add = " ".join(f"--generator.{name} {shlex.quote(printable(value))}" for name, value in theirs.items())
        raise UserError(
            f"--verify {uri}: its record names a generator that can run any code when it is opened, of another {other} than this "
            f"command; if you trust it, add {add}{' --generator.allow-pickle' if stored.kind == 'stylegan' else ''}"
        )
    path = theirs.get("path", stored.path)
    return stored.model_copy(update={"allow_pickle": allow_pickle, "path": path})


def _naming(generator: config.GeneratorSettings, names: Sequence[str]) -> dict[str, str]:
    """`kind` and these settings as a command names them, local paths absolute as `opening.resolved` makes them."""
    texts = {"kind": str(generator.kind)}
    for name in names:
        value = getattr(generator, name)
        if value is not None:
            texts[name] = storage.canonical(value) if name == "arguments" else _absolute(value)
    return texts


def _absolute(path: str) -> str:
    """A file or directory that is there, or FILE.py:FACTORY; hub ids, modules and URIs stay as they are."""
    file, colon, factory = path.rpartition(":") if ".py:" in path else (path, "", "")
    there = storage.is_local(file) and storage.exists(storage.absolute(file))
    return f"{storage.absolute(file)}{colon}{factory}" if there else path
