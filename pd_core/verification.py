"""`generate.py --verify`: from the commit record of finished samples to what differs, said line by line."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import replace

from pd_core import cluster, config, generators, realset, schemas, search, storage, verifying
from pd_core.candidates import Recipe, prompts_hash
from pd_core.errors import RunError, UserError
from pd_core.running import failures

PICKLED = ("diffusers", "stylegan")  # kinds of generators that --generator.allow-pickle has a meaning for
ROUNDED = ("torch", "torchvision", "faiss-cpu", "faiss-gpu-cu12", "numpy", "pillow")  # versions move numbers' last bits
SHOWN = 50  # differences of each kind


def verify(uri: str, rows: int, generator: config.GeneratorSettings, seed: int | None = None) -> None:
    """Check every part of a finished output against its commit record, make `rows` rows again from their seeds and compare.

    Args:
        uri: output of generate.py.
        rows: how many.
        generator: of this command; only its permission to load a pickle is used.
        seed: of the choice of rows; None: another one in each call, which is printed.

    Raises:
        UserError: nothing finished is there, what it was made from is gone or has changed, or it was made on a GPU and there
            is none here.
        RunError: something differs.
    """
    uri, seed = storage.absolute(uri), secrets.randbits(31) if seed is None else seed
    with failures("verify", uri):
        artifact = storage.load_artifact(storage.join(uri, "samples"))
    if artifact is None or artifact.kind != "samples":
        raise UserError(f"--verify {uri}: no finished samples there; name the --output of a finished generate.py")
    with cluster.session(uri) as now, failures("verify", uri):
        recipe = recipe_of(uri, artifact, generator.allow_pickle)
        if recipe.device == "cuda" and not now.gpus:
            raise UserError(
                f"--verify {uri}: these samples were made on GPUs and the cluster has none; on CPUs their last bits, and with "
                "them their hashes, are others; verify where there is a GPU"
            )
        _say_versions(artifact)
        place, totals = storage.join(uri, "samples"), artifact.totals
        samples = verifying.Samples(place, recipe, artifact.identity["chunks_per_part"], totals["candidates"])
        parts, chosen = verifying.check_parts(samples, artifact, verifying.Draw(rows, seed))
        cluster.say(f"verify: {len(chosen)} of {artifact.rows} rows are made again, chosen by seed {seed}")
        found = verifying.Findings(parts)
        if len(chosen):
            with search.open_pool(recipe.realset.index, now, None, 1, beside_generator=True) as pool:
                found.add(verifying.check_rows(samples, pool, now, chosen))
    _say_findings(found, len(artifact.parts))


def _say_versions(artifact: storage.Artifact) -> None:
    """A line where packages that decide the last bits of images and densities are not those of the run."""
    here = storage.package_versions()
    was = artifact.versions
    moved = [f"{name} {was.get(name)} -> {here.get(name)}" for name in ROUNDED if was.get(name) != here.get(name)]
    if moved:
        cluster.say(f"verify: other packages than in the run ({', '.join(moved)}); numbers may differ by rounding")


def _say_findings(found: verifying.Findings, parts: int) -> None:
    """Each difference and the sum of them. Raises RunError where there is any."""
    wrong = {number: text for number, text in sorted(found.rows.items()) if text is not None}
    _say_some([f"{name}: {text}" for name, texts in found.parts.items() for text in texts])
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
    cluster.say(f"verify: {parts} parts are as committed, {rows} of {rows} rows are what their seeds give")


def _say_some(lines: Sequence[str]) -> None:
    for line in lines[:SHOWN]:
        cluster.say(line)
    if len(lines) > SHOWN:
        cluster.say(f"... and {len(lines) - SHOWN} more")


def recipe_of(uri: str, artifact: storage.Artifact, allow_pickle: bool) -> Recipe:
    """The recipe of finished samples, from their commit record alone: the environment has no say here."""
    identity, stored = artifact.identity, artifact.totals["settings"]
    if artifact.schema_version != schemas.VERSIONS["samples"] or "device" not in identity:
        raise UserError(f"--verify {uri}: made by another version of pd_core; verify with that one")
    generator = config.GeneratorSettings.model_validate(
        stored["generator"] | {"allow_pickle": allow_pickle and stored["generator"]["kind"] in PICKLED}
    )
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
