"""From the settings of a generator to a Recipe: what every workflow that generates opens first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pd_core import acceptance, cluster, generators, sampling, storage
from pd_core.candidates import EVERYTHING, Recipe
from pd_core.config import GeneratorSettings
from pd_core.errors import UserError
from pd_core.generators.python import split
from pd_core.realset import RealSet


def located(settings: GeneratorSettings) -> GeneratorSettings:
    """The settings with local paths absolute, for workers that run elsewhere; checked without loading anything.

    Raises:
        UserError: no path, or nothing there.
    """
    generators.check_path(settings)
    assert settings.path is not None, "check_path refuses none"
    paths = {name: value for name in ("path", "code", "prompts") if (value := getattr(settings, name))}
    local = {name: storage.absolute(value) for name, value in paths.items() if _is_file(value)}
    if settings.kind == "python":
        source, factory = split(settings.path)
        if _is_file(source):
            local["path"] = f"{storage.absolute(source)}:{factory}"
    if "prompts" in paths and "prompts" not in local and storage.is_local(paths["prompts"]):
        raise UserError(f"--generator.prompts {paths['prompts']}: no such file; check the path")
    return settings.model_copy(update=local)


def _is_file(value: str) -> bool:
    return storage.is_local(value) and storage.exists(storage.absolute(value))


def open_recipe(
    settings: GeneratorSettings,
    real: RealSet,
    now: cluster.Cluster,
    pool: sampling.Pool,
    seed: int,
    chunk: int,
    copies_quantile: float,
) -> Recipe:
    """Every candidate accepted and scored by both predictor and index; the generator is loaded once for its identity.

    Args:
        settings: of the generator, `located`.
        real: the real set.
        now: the cluster.
        pool: the actors that will generate.
        seed: of the run.
        chunk: candidates of one batch.
        copies_quantile: of the real nearest distances, up to which a sample is a likely copy.

    Raises:
        UserError: the generator cannot be opened, or its labels or prompts do not fit it.
    """
    facts = _described(settings, now, pool)
    classes, names = _classes(settings, facts)
    return Recipe(
        generator=settings,
        generator_identity=facts["identity"],
        realset=real,
        weightings={EVERYTHING: acceptance.uniform()},
        score="both",
        seed=seed,
        chunk=chunk,
        threads=pool.actor_cpus,
        classes=classes,
        class_names=names,
        prompts=_prompts(settings, facts),
        device=cluster.device_of(now, pool.actor_gpus),
        copy_distance=real.copy_distance(copies_quantile),
        drop_copies=False,
    )


def _described(settings: GeneratorSettings, now: cluster.Cluster, pool: sampling.Pool) -> dict[str, Any]:
    """`describe` where an actor of the generator would run: what fits one fits this."""
    _, _, cpus, gpus = cluster.actor_pool(now, pool.actors, pool.actor_cpus, pool.actor_gpus)
    return cluster.get(cluster.task(describe, cpus, gpus).remote(settings))


def describe(settings: GeneratorSettings) -> dict[str, Any]:
    """Identity and abilities of a generator, which is loaded for it: runs in a Ray task."""
    generator = generators.open_generator(settings, cluster.assigned_device())
    return {
        "identity": generator.identity(),
        "num_classes": generator.num_classes,
        "takes_prompts": generator.takes_prompts,
    }


def _classes(settings: GeneratorSettings, facts: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Class numbers to draw from and their names."""
    text, many = settings.labels, facts["num_classes"]
    if text == "none":
        if many:
            raise UserError(
                f"--generator.labels: the generator takes one of {many} class labels; set all, or a list such as 0,3"
            )
        return (), ()
    if not many:
        raise UserError(f"--generator.labels {text}: the generator takes no class labels; leave it out")
    try:
        classes = tuple(range(many)) if text == "all" else tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--generator.labels {text}: expected none, all, or class numbers such as 0,3,7") from None
    if wrong := [c for c in classes if not 0 <= c < many]:
        raise UserError(f"--generator.labels {text}: {wrong[0]} is outside 0 ... {many - 1}")
    names = settings.label_names
    if names is not None and len(names) != many:
        raise UserError(f"--generator.label_names: {len(names)} names for {many} classes; give one for each")
    return classes, tuple(names[c] if names else str(c) for c in classes)


def _prompts(settings: GeneratorSettings, facts: Mapping[str, Any]) -> tuple[str, ...]:
    path = settings.prompts
    if path is None:
        if facts["takes_prompts"]:
            raise UserError("--generator.prompts: the generator takes text; name a file with a prompt on each line")
        return ()
    if not facts["takes_prompts"]:
        raise UserError(f"--generator.prompts {path}: the generator takes no text; leave it out")
    return generators.read_prompts(path)
