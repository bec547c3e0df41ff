"""What a workflow with a generator starts from: paths that are there, the generator's abilities and conditions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pd_core.core import files
from pd_core.core.errors import UserError
from pd_core.core.settings.generate import GeneratorSettings
from pd_core.density.realset import RealSet
from pd_core.engine import resources, tasks
from pd_core.engine.runs import failures
from pd_core.generate.candidates import Origin
from pd_core.generate.chunks import Pool
from pd_core.generate.volume import Volume
from pd_core.generators import protocol
from pd_core.generators.open import absolute, check_path, open_generator
from pd_core.generators.python import split


def resolved(generator: GeneratorSettings) -> GeneratorSettings:
    """The generator with local paths absolute; everything that can be checked without loading it is.

    Raises:
        UserError: no path, or one that is not there.
    """
    check_path(generator)
    assert generator.path is not None, "check_path refuses none"
    if generator.kind == "python":
        split(generator.path)
    prompts = generator.prompts
    if prompts is not None and files.is_local(prompts) and not files.exists(files.absolute(prompts)):
        raise UserError(f"--generator.prompts {prompts}: no such file; check the path")
    named = {name: value for name in ("path", "code", "prompts") if (value := getattr(generator, name))}
    return generator.model_copy(update={name: absolute(value) for name, value in named.items()})


def describe(settings: GeneratorSettings, now: resources.Cluster, pool: Pool) -> dict[str, Any]:
    """`facts_of` a generator that is loaded where an actor of it would run: what fits one fits this."""
    _, _, cpus, gpus = resources.actor_pool(now, pool.actors, pool.actor_cpus, pool.actor_gpus)
    with failures("generator", str(settings.path)):
        return tasks.get(tasks.task(_describe, cpus, gpus).remote(settings))


def _describe(settings: GeneratorSettings) -> dict[str, Any]:
    return facts_of(open_generator(settings, resources.assigned_device()))


def facts_of(generator: protocol.Generator) -> dict[str, Any]:
    """Identity and abilities of a generator."""
    return {
        "identity": generator.identity(),
        "num_classes": generator.num_classes,
        "takes_prompts": generator.takes_prompts,
        "latents": isinstance(generator, protocol.LatentGenerator),
        "adapter": type(generator).__name__,
    }


def origin_of(
    settings: GeneratorSettings,
    facts: Mapping[str, Any],
    real: RealSet,
    seed: int,
    chunk: int,
    threads: int,
    device: str,
    copies_quantile: float,
    volume: Volume | None = None,
) -> Origin:
    """Where the candidates of a run come from.

    Args:
        settings: of the generator, `resolved`.
        facts: of it, as `describe` gives them.
        real: the real set.
        seed: of the run.
        chunk: candidates of one batch.
        threads: of one replica.
        device: cpu or cuda.
        copies_quantile: of the real nearest distances, up to which a sample is a likely copy.
        volume: how log-volumes are measured, where they are.

    Raises:
        UserError: labels or prompts do not fit the generator.
    """
    classes, names = classes_of(settings, facts)
    return Origin(
        generator=settings,
        generator_identity=facts["identity"],
        realset=real,
        seed=seed,
        chunk=chunk,
        threads=threads,
        classes=classes,
        class_names=names,
        prompts=prompts_of(settings, facts),
        device=device,
        copy_distance=real.copy_distance(copies_quantile),
        volume=volume,
    )


def classes_of(settings: GeneratorSettings, facts: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Class numbers to draw from and their names; both empty where the generator takes none.

    Raises:
        UserError: labels that do not fit the generator.
    """
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
        numbers = tuple(range(many)) if text == "all" else tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--generator.labels {text}: expected none, all, or class numbers such as 0,3,7") from None
    if wrong := [c for c in numbers if not 0 <= c < many]:
        raise UserError(f"--generator.labels {text}: {wrong[0]} is outside 0 ... {many - 1}")
    names = settings.label_names
    if names is not None and len(names) != many:
        raise UserError(f"--generator.label_names: {len(names)} names for {many} classes; give one for each")
    return numbers, tuple(names[c] if names else str(c) for c in numbers)


def prompts_of(settings: GeneratorSettings, facts: Mapping[str, Any]) -> tuple[str, ...]:
    """Texts to draw from. facts: as `describe` gives them. Raises UserError: they do not fit the generator."""
    path = settings.prompts
    if path is None:
        if facts["takes_prompts"]:
            raise UserError("--generator.prompts: the generator takes text; name a file with a prompt on each line")
        return ()
    if not facts["takes_prompts"]:
        raise UserError(f"--generator.prompts {path}: the generator takes no text; leave it out")
    return protocol.read_prompts(path)
