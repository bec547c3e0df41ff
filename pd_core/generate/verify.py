"""`generate.py --verify`: every file against its commit record, some rows against their seeds, what differs line by
line.

A commit record tells whether a file is the one that was written. Whether its rows are what their seeds give, only
making them again tells: the whole chunk is made, scored, searched and accepted as in the run, so that every value must
be equal to the last bit. The number of search processes may be another: distances do not depend on it (knn.py).
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pd_core.core import artifacts, schemas, seeds, trust
from pd_core.core import files as core_files
from pd_core.core.errors import RunError, UserError, one_line, printable
from pd_core.core.settings.data import DataSettings
from pd_core.core.settings.generate import GeneratorSettings
from pd_core.density import realset
from pd_core.engine import console, resources, session, tasks
from pd_core.engine.runs import failures
from pd_core.generate.candidates import Batch, ChunkMaker, Recipe, finish, pixels_hash, prompts_hash
from pd_core.generators import protocol
from pd_core.generators.open import permitted
from pd_core.images import child, decode
from pd_core.index import search

STAGES = ("samples", "rejected", "pilot", "export", "report")  # of an output; those that are finished are checked
ROUNDED = ("torch", "torchvision", "faiss-cpu", "faiss-gpu-cu12", "numpy", "pillow")  # versions move numbers' last bits
SHOWN = 50  # differences of each kind
BLOCK_BYTES = 1 << 23  # of a file, read at once
READ_AS_WHOLE = (".parquet", ".tar", ".jsonl")  # files that are opened by their suffix, all that lie in a directory
IN_FLIGHT = 3  # parts: one that is made, one that is read, one that is compared
_SPOKEN = {"density_predicted": "predicted density", "density_index": "density by the index"}


def verify(
    uri: str,
    rows: int,
    generator: GeneratorSettings,
    seed: int | None = None,
    index: str | None = None,
    checkpoint: str | None = None,
) -> None:
    """Check every part of an output's finished stages against its record, make `rows` rows again from their seeds,
    compare.

    Args:
        uri: output of generate.py.
        rows: how many.
        generator: of this command. Only that it names the recorded one is used, and its permission to load a pickle.
        seed: of the choice of rows; None: another one in each call, which is printed.
        index: of this command; only that it lies where the recorded one does is used.
        checkpoint: of the weights of the index's extractor, where they are not at the place they had then.

    Raises:
        UserError: nothing finished is there, the record names code that this command does not name, what it was made
            from is gone or has changed, or it was made on a GPU and there is none here.
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
                f"--verify {uri}: these samples were made on GPUs and the cluster has none; on CPUs their last bits, "
                "and with them their hashes, are others; verify where there is a GPU"
            )
        _say_versions(artifact)
        found, chosen = check_files(uri, {"samples": artifact, **committed}, rows, seed)
        say_some([f"{name}: {text}" for name, texts in found.items() for text in texts])  # whatever comes of the rows
        console.say(f"verify: {len(chosen)} of {artifact.rows} rows are made again, chosen by seed {seed}")
        made: dict[int, str | None] = {}
        if chosen:
            with search.open_pool(recipe.realset.index, now, None, 1, True, "scoring") as pool:
                made = check_rows(core_files.join(uri, "samples"), recipe, pool, now, chosen)
    wrong = {number: text for number, text in sorted(made.items()) if text is not None}
    say_some([f"sample {number}: {text}" for number, text in wrong.items()])
    failed = [f"files not as committed: {len(found)}"] if found else []
    failed += [f"{len(wrong)} of {len(made)} rows are not what their seeds give"] if wrong else []
    if failed:
        raise RunError(f"verify: {'; '.join(failed)}; see above")
    files = ", ".join(f"{len(one.parts)} of {stage}/" for stage, one in {"samples": artifact, **committed}.items())
    console.say(
        f"verify: all files are as committed ({files}), {len(made)} of {len(made)} rows are what their seeds give"
    )


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


def _say_versions(artifact: artifacts.Artifact) -> None:
    """A line where packages that decide the last bits of images and densities are not those of the run."""
    here = artifacts.package_versions()
    was = artifact.versions
    moved = [f"{name} {was.get(name)} -> {here.get(name)}" for name in ROUNDED if was.get(name) != here.get(name)]
    if moved:
        console.say(
            f"verify: other packages than in the run ({printable(', '.join(moved))}); numbers may differ by rounding"
        )


def say_some(lines: Sequence[str]) -> None:
    """Say the first of many lines, and how many more there are."""
    for line in lines[:SHOWN]:
        console.say(printable(line))
    if len(lines) > SHOWN:
        console.say(f"... and {len(lines) - SHOWN} more")


# ---- the files -------------------------------------------------------------------------------------------------------


def check_files(
    uri: str, stages: Mapping[str, artifacts.Artifact], rows: int, seed: int
) -> tuple[dict[str, list[str]], list[tuple[str, int]]]:
    """Every part of every stage of an output against its commit record, each in a Ray task.

    Args:
        uri: the output.
        stages: the commit records of its finished stages, by name.
        rows, seed: the `rows` samples with the smallest hashes of their ids and this seed are chosen.

    Returns:
        texts by file (STAGE/NAME), and (part, sample_id) of the chosen; a part that differs offers none.
    """
    found: dict[str, list[str]] = {}
    for stage, artifact in stages.items():
        found[f"{stage}/{core_files.ARTIFACT}"] = own_differences(artifact) + kinship(
            stage, artifact, stages["samples"]
        )
        there = surplus(core_files.join(uri, stage), artifact)
        found |= {f"{stage}/{name}": texts for name, texts in there.items()}
    if stages["samples"].identity.get("keep_rejected") and "rejected" not in stages:
        found[f"rejected/{core_files.ARTIFACT}"] = ["is missing, though --keep-rejected was set"]
    items = [(stage, part) for stage, artifact in stages.items() for part in artifact.parts]
    task, offered = tasks.task(_check_file, resources.IO_CPUS), list[tuple[float, int, str]]()
    with console.progress("verify parts", len(items), "parts") as bar:
        submit = lambda item: task.remote(uri, *item, rows, seed)  # noqa: E731
        for (stage, part), (texts, ids) in tasks.bounded(submit, items, tasks.in_flight):
            found[f"{stage}/{part.name}"] = texts
            offered = sorted([*offered, *((key, number, part.name) for key, number in ids)])[:rows]
            bar.update()
    return {name: texts for name, texts in sorted(found.items()) if texts}, [(name, n) for _, n, name in offered]


def kinship(stage: str, artifact: artifacts.Artifact, samples: artifacts.Artifact) -> list[str]:
    """What says that a stage is not of these samples, with or beside which it lies."""
    beside = artifact.identity == samples.identity if stage == "rejected" else True
    of = artifact.identity.get("samples", samples.fingerprint)
    return [] if artifact.kind == stage and beside and of == samples.fingerprint else ["is of other samples"]


def own_differences(artifact: artifacts.Artifact) -> list[str]:
    """What in a commit record contradicts itself, whatever its kind."""
    identity = {"kind": artifact.kind, "schema_version": artifact.schema_version, **artifact.identity}
    if artifacts.fingerprint(identity) != artifact.fingerprint:
        return ["its fingerprint is not that of its identity"]
    return []


def surplus(uri: str, artifact: artifacts.Artifact, folders: Sequence[str] = ("",)) -> dict[str, list[str]]:
    """Files in these folders of an artifact that its record does not name; text by name."""
    known = {part.name for part in artifact.parts}
    there = [
        f"{folder}/{name}".lstrip("/")
        for folder in folders
        for name in core_files.names(core_files.join(uri, folder) if folder else uri)
    ]
    text = "is not in the record, though whoever opens the directory reads it"
    return {name: [text] for name in there if name.endswith(READ_AS_WHOLE) and name not in known}


def _check_file(
    uri: str, stage: str, part: artifacts.Part, rows: int, seed: int
) -> tuple[list[str], list[tuple[float, int]]]:
    """What differs in a part of a stage, and of samples the (key, sample_id) of the rows that it offers."""
    if "/" in part.name:
        return ["is no name of a part"], []
    location = core_files.join(uri, stage, part.name)
    differences = file_differences(location, part)
    if not differences and stage == "export" and part.name.endswith(".jsonl"):
        differences = picture_differences(uri, part.name)
    if differences or stage != "samples":
        return differences, []
    numbers = core_files.read_table(location, ["sample_id"])["sample_id"].to_numpy()
    keys = seeds.uniform(numbers, seeds.stream(seed, "verify"))
    return [], sorted(zip(keys.tolist(), numbers.tolist(), strict=True))[:rows]


def file_differences(location: str, part: artifacts.Part) -> list[str]:
    """How the bytes of a file differ from its record."""
    digest, size = hashlib.sha256(), 0
    try:
        with core_files.open_file(location) as file:
            while block := file.read(BLOCK_BYTES):
                digest.update(block)
                size += len(block)
    except FileNotFoundError:
        return ["is missing"]
    compared = {"bytes": (size, part.bytes), "sha256": (digest.hexdigest(), part.sha256)}
    return [f"{name} {now}, committed {then}" for name, (now, then) in compared.items() if now != then]


def picture_differences(uri: str, name: str) -> list[str]:
    """Whether the files of exported pictures, which no record holds, are those in the samples; `name` is their list."""
    try:
        lines = core_files.read_bytes(core_files.join(uri, "export", name)).splitlines()
        files = [trust.relative(json.loads(line)["file"], name) for line in lines]
    except (ValueError, KeyError, TypeError) as error:
        return [f"is no list of pictures: {one_line(error)}"]
    try:
        table = core_files.read_table(core_files.join(uri, "samples", name.replace(".jsonl", ".parquet")), ["image"])
    except (FileNotFoundError, UserError):
        return []  # which the check of that file tells

    def verdict(file: str, picture: bytes | None) -> str | None:
        try:
            same = core_files.read_bytes(core_files.join(uri, "export", file)) == picture
        except FileNotFoundError:
            return "is missing"
        return None if same else "is not the picture of its sample"

    wrong: dict[str, list[str]] = defaultdict(list)
    with ThreadPoolExecutor(core_files.READERS) as readers:
        pictures = pc.struct_field(table["image"], "bytes").to_pylist()
        for file, text in zip(files, readers.map(verdict, files, pictures), strict=False):
            wrong[text or ""].append(file)
    return [f"{min(names)} {text} ({len(names)} such)" for text, names in wrong.items() if text]


# ---- the rows --------------------------------------------------------------------------------------------------------


class _Maker:
    """Ray actor: chunks made again."""

    def __init__(self, recipe: Recipe) -> None:
        self.failure: Exception | None = None
        try:
            self.maker = ChunkMaker(recipe, resources.assigned_device())
        except Exception as error:  # an actor that dies in its constructor would take the reason with it
            self.failure = error

    def ready(self) -> None:
        """Answers once the models are loaded; raises what kept them from it."""
        if self.failure is not None:
            raise self.failure

    def make(self, chunk: int) -> Batch | str:
        """The chunk, or why it cannot be made."""
        self.ready()
        try:
            return self.maker.make(chunk)
        except UserError:
            raise
        except Exception as error:  # whatever a generator raises: the other rows are compared all the same
            return f"{type(error).__name__}: {one_line(error)}"


def check_rows(
    uri: str, recipe: Recipe, pool: search.SearchPool, now: resources.Cluster, chosen: Sequence[tuple[str, int]]
) -> dict[int, str | None]:
    """Make the chunks of these rows again, on one actor and on the device type that made them, and compare.

    uri: of the samples. chosen: (part, sample_id). Returns by sample_id what differs, or None.

    Raises:
        UserError: the generator, the extractor or the predictor are not what they were.
    """
    import ray

    free = replace(now, held_cpus=pool.cpus)
    gpus = 1.0 if recipe.device == "cuda" else 0.0
    _, _, cpus, gpus = resources.actor_pool(free, 1, recipe.threads, gpus)
    maker: Any = ray.remote(_Maker).options(num_cpus=cpus, num_gpus=gpus, **tasks.ACTOR_OPTIONS).remote(recipe)
    task, parts = tasks.task(_compare_part, pool.io_cpus), defaultdict(list)
    for name, number in chosen:
        parts[core_files.join(uri, name)].append(number)
    found: dict[int, str | None] = {}
    try:
        tasks.wait_for([maker], "verify")
        with console.progress("verify rows", len(chosen), "rows") as bar:
            submit = lambda part: task.remote(recipe, pool, maker, *part)  # noqa: E731
            for _, rows in tasks.bounded(submit, sorted(parts.items()), lambda: IN_FLIGHT):
                found |= rows
                bar.update(len(rows))
    finally:
        ray.kill(maker)
    return found


def _compare_part(
    recipe: Recipe, pool: search.SearchPool, maker: Any, location: str, numbers: Sequence[int]
) -> dict[int, str | None]:
    """Some rows of a part of samples; runs in a Ray task, which holds the part and one chunk."""
    table, found = core_files.read_table(location), dict[int, str | None]()
    for chunk in sorted({number // recipe.chunk for number in numbers}):
        own = [number for number in numbers if number // recipe.chunk == chunk]
        made = tasks.get(maker.make.remote(chunk))
        if isinstance(made, str):
            found |= dict.fromkeys(own, f"cannot be made again: {made}")
            continue
        stored = table.filter(pc.is_in(table["sample_id"], pa.array(own)))
        found |= compare_rows(stored, finish(recipe, pool, chunk, made).accepted)
    return found


def compare_rows(stored: pa.Table, made: pa.Table) -> dict[int, str | None]:
    """What differs in each stored row from the row made again, by sample_id; None where nothing does."""
    expected = {row["sample_id"]: row for row in made.to_pylist()}
    return {row["sample_id"]: _difference(row, expected.get(row["sample_id"])) for row in stored.to_pylist()}


def _difference(row: Mapping[str, Any], made: Mapping[str, Any] | None) -> str | None:
    if _pixels_hash(row["image"]) != row["image_hash"]:
        return "the stored picture does not have the stored hash"
    if made is None:
        return "the candidate made again is not accepted"
    if row["image_hash"] != made["image_hash"]:
        return "the picture made again is another"
    names: Sequence[str] = [name for name in made if name not in ("image", "image_hash")]
    texts = [f"{_SPOKEN.get(n, n)} {row[n]}, expected {made[n]}" for n in names if row[n] != made[n]]
    path, expected = row["image"]["path"], made["image"]["path"]
    if path != expected:
        texts.append(f"image path {path}, expected {expected}")
    return "; ".join(texts) or None


def _pixels_hash(image: Mapping[str, Any] | None) -> str | None:
    """Of the picture in a file, whose compressed bytes may be others with another zlib. None: no RGB picture."""
    if image is None or image["bytes"] is None:
        return None
    pixels = child.pixels(image["bytes"], decode.limits_of(DataSettings()))
    return None if pixels is None else pixels_hash(pixels)


# ---- the recipe of a record ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Stored:
    """What is used of the settings that samples were made with."""

    generator: dict[str, Any]
    index: object
    checkpoint: object = None


def recipe_of(
    uri: str,
    artifact: artifacts.Artifact,
    told: GeneratorSettings,
    index: str | None = None,
    checkpoint: str | None = None,
) -> Recipe:
    """The recipe of finished samples by their commit record alone; the rest, of this command, permits what it names."""
    identity, where = artifact.identity, core_files.join(uri, "samples", core_files.ARTIFACT)
    if artifact.schema_version != schemas.VERSIONS["samples"] or "device" not in identity:
        raise UserError(f"--verify {uri}: made by another version of pd_core; verify with that one")
    stored = trust.checked(_Stored, artifact.totals.get("settings"), where, whole=False)
    try:
        recorded = GeneratorSettings.model_validate(stored.generator)
    except ValueError as error:
        raise UserError(f"--verify {uri}: its record holds no settings of a generator ({one_line(error)})") from None
    generator = permitted(uri, where, recorded, told)
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
