"""`generate.py --verify` and `curate.py --verify`: from a commit record to what differs, said line by line."""

from __future__ import annotations

import secrets
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pd_core.core import artifacts, schemas, trust
from pd_core.core import files as core_files
from pd_core.core.errors import RunError, UserError, one_line, printable
from pd_core.core.settings.generate import GeneratorSettings
from pd_core.density import realset
from pd_core.engine import console, session
from pd_core.engine.runs import failures
from pd_core.generate import verify as generate_verify
from pd_core.generate.candidates import Recipe, prompts_hash
from pd_core.generators import protocol
from pd_core.generators.open import HUB_ID
from pd_core.index import search

CODE: Mapping[str, tuple[str, ...]] = {  # settings that decide which code runs when a generator of a kind is opened
    "python": ("path", "arguments"),
    "stylegan": ("path", "code"),
    "torchscript": ("path",),  # no safe container
    "diffusers": (),  # but for pickles
}
STAGES = ("samples", "rejected", "pilot", "export", "report")  # of an output; those that are finished are checked
ROUNDED = ("torch", "torchvision", "faiss-cpu", "faiss-gpu-cu12", "numpy", "pillow")  # versions move numbers' last bits
SHOWN = 50  # differences of each kind


def verify(
    uri: str,
    rows: int,
    generator: GeneratorSettings,
    seed: int | None = None,
    index: str | None = None,
    checkpoint: str | None = None,
) -> None:
    """Check every part of an output's finished stages against its record, make `rows` rows again from their seeds, compare.

    Args:
        uri: output of generate.py.
        rows: how many.
        generator: of this command. Only that it names the recorded one is used, and its permission to load a pickle.
        seed: of the choice of rows; None: another one in each call, which is printed.
        index: of this command; only that it lies where the recorded one does is used.
        checkpoint: of the weights of the index's extractor, where they are not at the place they had then.

    Raises:
        UserError: nothing finished is there, the record names code that this command does not name, what it was made from is
            gone or has changed, or it was made on a GPU and there is none here.
        RunError: something differs.
    """
    uri, seed = core_files.absolute(uri), secrets.randbits(31) if seed is None else seed
    with failures("verify", uri):
        committed = {stage: one for stage in STAGES if (one := commit_of(core_files.join(uri, stage))) is not None}
    artifact = committed.pop("samples", None)
    if artifact is None or artifact.kind != "samples":
        raise UserError(f"--verify {uri}: no finished samples there; name the --output of a finished generate.py")
    with session.session(uri, "verify") as now, failures("verify", uri):
        recipe = recipe_of(uri, artifact, generator, index, checkpoint)
        if recipe.device == "cuda" and not now.gpus:
            raise UserError(
                f"--verify {uri}: these samples were made on GPUs and the cluster has none; on CPUs their last bits, and with "
                "them their hashes, are others; verify where there is a GPU"
            )
        _say_versions(artifact)
        samples = samples_of(uri, artifact, recipe)
        parts, chosen = generate_verify.check_parts(samples, artifact, committed, generate_verify.Draw(rows, seed))
        say_some([f"{name}: {text}" for name, texts in parts.items() for text in texts])  # whatever comes of the rows
        console.say(f"verify: {len(chosen)} of {artifact.rows} rows are made again, chosen by seed {seed}")
        found = generate_verify.Findings(parts)
        if len(chosen):
            with search.open_pool(recipe.realset.index, now, None, 1, True, "scoring") as pool:
                found.add(generate_verify.check_rows(samples, pool, now, chosen))
    _say_findings(found, {"samples": artifact, **committed})


def commit_of(uri: str) -> artifacts.Artifact | None:
    """The commit record of an output; None where nothing was committed. Raises RunError if it is no such record."""
    name = f"{uri.rpartition('/')[2]}/{core_files.ARTIFACT}"
    try:
        found = artifacts.load_artifact(uri)
    except (ValueError, TypeError, KeyError) as error:
        raise RunError(f"verify: {name} is no commit record ({one_line(error)})") from None
    if found is None and core_files.exists(core_files.join(uri, core_files.ARTIFACT)):
        raise RunError(f"verify: {name} is no commit record (it is no whole JSON file)")
    return found


@dataclass(frozen=True)
class _Counted:
    """What is used of the identity and the totals of samples as numbers."""

    n: trust.Count
    rows: trust.Count
    chunks_per_part: trust.Count
    candidates: trust.Count


@dataclass(frozen=True)
class _Stored:
    """What is used of the settings that samples were made with."""

    generator: dict[str, Any]
    index: object
    checkpoint: object = None


def _record_of(uri: str) -> str:
    return core_files.join(uri, "samples", core_files.ARTIFACT)


def samples_of(uri: str, artifact: artifacts.Artifact, recipe: Recipe) -> generate_verify.Samples:
    """The samples of an output whose commit record and recipe these are. Raises UserError: the record counts what cannot be."""
    where = _record_of(uri)
    trust.checked(_Counted, artifact.identity | artifact.totals, where, whole=False)
    return generate_verify.Samples(
        uri=core_files.join(uri, "samples"),
        recipe=recipe,
        chunks_per_part=artifact.identity["chunks_per_part"],
        candidates=artifact.totals["candidates"],
        rejected=core_files.join(uri, "rejected") if artifact.identity.get("keep_rejected") else None,
    )


def _say_versions(artifact: artifacts.Artifact) -> None:
    """A line where packages that decide the last bits of images and densities are not those of the run."""
    here = artifacts.package_versions()
    was = artifact.versions
    moved = [f"{name} {was.get(name)} -> {here.get(name)}" for name in ROUNDED if was.get(name) != here.get(name)]
    if moved:
        console.say(
            f"verify: other packages than in the run ({printable(', '.join(moved))}); numbers may differ by rounding"
        )


def _say_findings(found: generate_verify.Findings, committed: Mapping[str, artifacts.Artifact]) -> None:
    """Each difference of rows and the sum of all, those of files being said. Raises RunError where there is any."""
    wrong = {number: text for number, text in sorted(found.rows.items()) if text is not None}
    say_some([f"chunk {chunk}: {text}" for chunk, texts in sorted(found.chunks.items()) for text in texts])
    say_some([f"sample {number}: {text}" for number, text in wrong.items()])
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
    console.say(
        f"verify: all files are as committed ({files}), the totals are their sums{either}, "
        f"{rows} of {rows} rows are what their seeds give"
    )


def say_some(lines: Sequence[str]) -> None:
    """Say the first of many lines, and how many more there are."""
    for line in lines[:SHOWN]:
        console.say(printable(line))
    if len(lines) > SHOWN:
        console.say(f"... and {len(lines) - SHOWN} more")


def recipe_of(
    uri: str,
    artifact: artifacts.Artifact,
    told: GeneratorSettings,
    index: str | None = None,
    checkpoint: str | None = None,
) -> Recipe:
    """The recipe of finished samples, from their commit record alone; the others, of this command, only permit what it names."""
    identity, where = artifact.identity, _record_of(uri)
    if artifact.schema_version != schemas.VERSIONS["samples"] or "device" not in identity:
        raise UserError(f"--verify {uri}: made by another version of pd_core; verify with that one")
    stored = trust.checked(_Stored, artifact.totals.get("settings"), where, whole=False)
    generator = _permitted(uri, _recorded(uri, stored.generator), told)
    named = trust.recorded_path(stored.index, where, [uri, index], "--index")
    if not checkpoint and stored.checkpoint:
        checkpoint = trust.recorded_path(stored.checkpoint, where, [uri], "--checkpoint")
    real = realset.open_for(named, checkpoint, "--index")
    if dict(real.fingerprints) != identity.get("realset"):
        raise UserError(f"--index {named}: is not as it was when the samples were made; nothing to compare with")
    prompts = protocol.read_prompts(generator.prompts) if generator.prompts else ()
    if prompts_hash(prompts) != identity.get("prompts"):
        raise UserError(f"--generator.prompts {generator.prompts}: has changed since the samples were made")
    return Recipe.from_identity(identity, generator, real, prompts, where)


def _recorded(uri: str, values: Mapping[str, Any]) -> GeneratorSettings:
    try:
        return GeneratorSettings.model_validate(values)
    except ValueError as error:
        raise UserError(f"--verify {uri}: its record holds no settings of a generator ({one_line(error)})") from None


def _permitted(uri: str, stored: GeneratorSettings, told: GeneratorSettings) -> GeneratorSettings:
    """The recorded generator. The record may be a stranger's: what runs code, or is fetched from the hub, is opened only if this
    command names it too, and other files where they lie beside the record, or where this command leads as well.

    Raises:
        UserError: it does not.
    """
    names, allow_pickle = CODE[stored.kind], told.allow_pickle and told.kind == stored.kind
    of_hub = not names and HUB_ID.fullmatch(str(stored.path)) is not None
    if allow_pickle or of_hub:
        names = tuple(dict.fromkeys(("path", *names)))
    theirs, ours = _naming(stored, names), _naming(told, names)
    if names and theirs != ours:
        other = " and ".join(name for name in theirs if theirs[name] != ours.get(name)) or "code"
        add = " ".join(f"--generator.{name} {shlex.quote(printable(value))}" for name, value in theirs.items())
        what = "comes from the hub" if of_hub and not allow_pickle else "can run any code when it is opened"
        raise UserError(
            f"--verify {uri}: its record names a generator that {what}, of another {other} than this "
            f"command; if you trust it, add {add}{' --generator.allow-pickle' if stored.kind == 'stylegan' else ''}"
        )
    places = {"path": theirs["path"]} if "path" in theirs else {"path": _beside(uri, stored, told, "path")}
    if stored.prompts is not None:
        places["prompts"] = _beside(uri, stored, told, "prompts")
    return stored.model_copy(update={"allow_pickle": allow_pickle, **places})


def _beside(uri: str, stored: GeneratorSettings, told: GeneratorSettings, name: str) -> str:
    beside = [uri, getattr(told, name)]
    return trust.recorded_path(getattr(stored, name), _record_of(uri), beside, f"--generator.{name}")


def _naming(generator: GeneratorSettings, names: Sequence[str]) -> dict[str, str]:
    """`kind` and these settings as a command names them, local paths absolute as `setup.resolved` makes them."""
    texts = {"kind": str(generator.kind)}
    for name in names:
        value = getattr(generator, name)
        if value is not None:
            texts[name] = artifacts.canonical(value) if name == "arguments" else _absolute(value)
    return texts


def _absolute(path: str) -> str:
    """A file or directory that is there, or FILE.py:FACTORY; hub ids, modules and URIs stay as they are."""
    file, colon, factory = path.rpartition(":") if ".py:" in path else (path, "", "")
    there = core_files.is_local(file) and core_files.exists(core_files.absolute(file))
    return f"{core_files.absolute(file)}{colon}{factory}" if there else path
