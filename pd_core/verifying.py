"""Making rows again from their seeds: `generate.py --verify`."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pd_core import cluster, ids, sampling, storage

COLUMNS = ["sample_id", "seed", "density", "density_predicted", "acceptance_probability", "image_hash", "image"]
RELATIVE_ERROR = 1e-6  # of a density that is predicted again from the same pixels, in another batch of rows


def choose(uri: str, samples: storage.Artifact, rows: int) -> pa.Table:
    """`rows` rows of a samples stage, drawn by a hash of their ids; runs in a Ray task."""
    best: list[tuple[float, str, int]] = []
    for part in samples.parts:
        table = storage.read_table(storage.join(uri, part.name), ["sample_id"])
        keys = ids.uniform(table["sample_id"].to_numpy(), ids.stream(0, "verify"))
        best = sorted(best + [(float(key), part.name, row) for row, key in enumerate(keys)])[:rows]
    places: dict[str, list[int]] = defaultdict(list)
    for _, name, row in best:
        places[name].append(row)
    tables = [
        storage.read_table(storage.join(uri, name), COLUMNS).take(pa.array(sorted(where)))
        for name, where in sorted(places.items())
    ]
    return pa.concat_tables(tables)


class _Verifier:
    """Ray actor: chunks made again."""

    def __init__(self, recipe: sampling.Recipe) -> None:
        self.maker = sampling.ChunkMaker(recipe, cluster.assigned_device())

    def compare(self, chunk: int, rows: Sequence[Mapping[str, Any]]) -> dict[int, str | None]:
        """What differs in each of these rows of one chunk, by sample_id."""
        recipe = self.maker.recipe
        drawn, made = sampling.candidates_of(recipe, chunk), self.maker.make(chunk)
        places = {int(drawn.number[row]): place for place, row in enumerate(made.rows)}
        return {row["sample_id"]: _difference(row, recipe, drawn, made, places) for row in rows}


def verify(recipe: sampling.Recipe, rows: pa.Table, gpus: float) -> list[tuple[int, str | None]]:
    """Make the chunks of these rows again on one actor and compare: (sample_id, None or what differs) of every row.

    Three things must hold: the stored picture has the stored hash, the picture made again has it too, and seed, predicted
    density and acceptance probability are the stored ones.
    """
    import ray

    chunks: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for row in rows.to_pylist():
        chunks[row["sample_id"] // recipe.chunk].append(row)
    actor: Any = ray.remote(_Verifier).options(num_cpus=1, num_gpus=gpus, **cluster.ACTOR_OPTIONS).remote(recipe)
    found: dict[int, str | None] = {}
    with cluster.progress("verify", rows.num_rows, "rows") as bar:
        submit = lambda chunk: actor.compare.remote(chunk, chunks[chunk])  # noqa: E731
        for _, results in cluster.bounded(submit, sorted(chunks), lambda: 2):
            found |= results
            bar.update(len(results))
    ray.kill(actor)
    return sorted(found.items())


def _difference(
    row: Mapping[str, Any],
    recipe: sampling.Recipe,
    drawn: sampling.Candidates,
    made: sampling.Batch,
    places: Mapping[int, int],
) -> str | None:
    number = row["sample_id"]
    place = number - int(drawn.number[0])
    if _stored_hash(row["image"]["bytes"]) != row["image_hash"]:
        return "the stored picture does not have the stored hash"
    if number not in places:
        return "the candidate made again is not accepted"
    if sampling.pixels_hash(made.pixels[places[number]]) != row["image_hash"]:
        return "the picture made again is another"
    if row["seed"] != int(drawn.seed[place]):
        return f"seed {row['seed']}, expected {int(drawn.seed[place])}"
    if made.log_density is not None:
        expected = float(np.exp(made.log_density[place]))
        if row["density_predicted"] is None or not np.isclose(row["density_predicted"], expected, RELATIVE_ERROR, 0):
            return f"predicted density {row['density_predicted']}, expected {expected}"
        chance = float(sampling.probabilities(recipe, drawn, np.exp(made.log_density))[place])
        if not np.isclose(row["acceptance_probability"], chance, RELATIVE_ERROR, 0):
            return f"acceptance probability {row['acceptance_probability']}, expected {chance}"
    return None


def _stored_hash(data: bytes) -> str | None:
    from PIL import Image, UnidentifiedImageError

    try:
        return sampling.pixels_hash(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    except (OSError, UnidentifiedImageError):
        return None
