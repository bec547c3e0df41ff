"""Generators of the user's own: a factory named MODULE:FACTORY or FILE.py:FACTORY (docs/generators.md)."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import inspect
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pd_core.core import artifacts, files
from pd_core.core.errors import RunError, UserError, one_line
from pd_core.generators.pairs import Pair, Weights, check_trainable, image_shape, save_weights, weights_hash
from pd_core.generators.protocol import Conditions, Generator, LatentGenerator, files_hash

if TYPE_CHECKING:
    from types import ModuleType

    import torch

    from pd_core.core.settings.generate import GeneratorSettings


def split(path: str) -> tuple[str, str]:
    """(MODULE or FILE.py, FACTORY) of a --generator.path; a file ends in .py and may hold further colons.

    Raises:
        UserError: not of that form.
    """
    source, _, factory = path.rpartition(":")
    if not source or not factory.isidentifier():
        raise UserError(f"--generator.path {path}: expected MODULE:FACTORY or FILE.py:FACTORY")
    return source, factory


def open_factory(settings: GeneratorSettings, device: str = "cpu") -> Generator:
    """What the factory makes of `settings.arguments`, and of `device` where it has a parameter of that name.

    Raises:
        UserError: no such module, file or factory, arguments it does not take, a result that is no Generator, or
            whatever the user's code raises, with its line.
    """
    return _adapted(_factory(settings, device))


def open_pair(settings: GeneratorSettings, device: str = "cpu") -> Pair:
    """What the factory makes, whose object then has two networks more: `generator_network`, which `decode` runs, and
    `discriminator`.

    The discriminator takes images float32 [B, C, H, W] in [-1, 1], and where there are classes also their numbers,
    int64 [B]; it gives logits [B] or [B, 1]. The factory's parameter `weights` names a file of `pairs.save_weights`.

    Raises:
        UserError: what `open_factory` refuses, or an object or a factory without one of these.
    """
    factory = _factory(settings, device)
    live = _adapted(factory)
    made = live._made
    _check_pair(made, factory)
    check_trainable(made.generator_network, f"{factory.where}, generator_network")
    check_trainable(made.discriminator, f"{factory.where}, discriminator")
    assert isinstance(live, UserLatentGenerator), "_check_pair refuses others"
    made.generator_network.eval()
    with _blamed(factory.where):
        colors, size = image_shape(live)
    start = made.generator_network.state_dict()
    return Pair(
        generator=made.generator_network,
        discriminator=made.discriminator,
        live=live,
        judge=partial(_judged, made),
        averaged_start={name: tensor.detach().clone() for name, tensor in start.items()},
        colors=colors,
        size=size,
        sampler=partial(_sampler, factory),
        save=partial(_save, made),
        name=f"{factory.where}, discriminator",
    )


def _judged(made: Any, images: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
    return made.discriminator(images) if labels is None else made.discriminator(images, labels)


def _sampler(factory: _Factory, weights: Weights) -> Generator:
    """Another object of the factory, so that the one in training stays as it is."""
    other = _adapted(factory, {"weights": weights_hash(weights)})
    other._made.generator_network.load_state_dict(weights)
    other._made.generator_network.eval().requires_grad_(False)
    return other


def _save(made: Any, folder: str, weights: Weights) -> None:
    save_weights(
        os.path.join(folder, "weights.safetensors"), generator=weights, discriminator=made.discriminator.state_dict()
    )


def _check_pair(made: Any, factory: _Factory) -> None:
    import torch

    missing = [
        n for n in ("generator_network", "discriminator") if not isinstance(getattr(made, n, None), torch.nn.Module)
    ]
    if missing or not isinstance(made, LatentGenerator):
        missing += [] if isinstance(made, LatentGenerator) else ["latents", "decode"]
        raise UserError(
            f"{factory.where}: {type(made).__name__} has no {', no '.join(missing)}, which fine-tuning needs; see "
            "docs/generators.md"
        )
    if "weights" not in factory.parameters:
        raise UserError(
            f"{factory.where}: takes no argument weights, by which a fine-tuned generator is opened; see "
            "docs/generators.md"
        )


@dataclass(frozen=True)
class _Factory:
    """A user's factory with its arguments.

    Attributes:
        make: called without arguments, gives the object.
        parameters: that it has, by name.
        identity: its name and the hash of its file.
        where: it, as the user knows it.
    """

    make: Callable[[], Any]
    parameters: Mapping[str, inspect.Parameter]
    identity: dict[str, str]
    where: str


def _factory(settings: GeneratorSettings, device: str) -> _Factory:
    assert settings.path is not None, "open_generator refuses settings without a path"
    where = f"--generator.path {settings.path}"
    source, name = split(settings.path)
    module, code = _from_file(source, where) if source.endswith(".py") else _from_module(source, where)
    factory = getattr(module, name, None)
    if not callable(factory):
        raise UserError(f"{where}: {source} has no function or class {name}; check the name")
    arguments = dict(settings.arguments)
    parameters = _parameters(factory, where)
    if "device" in parameters:
        arguments.setdefault("device", device)
    try:
        inspect.Signature(list(parameters.values())).bind(**arguments)
    except TypeError as error:
        raise UserError(f"--generator.arguments {settings.arguments}: do not fit {name} ({error}); mend them") from None
    return _Factory(partial(factory, **arguments), parameters, {"factory": name, "file": code}, where)


def _adapted(factory: _Factory, identity: Mapping[str, str] | None = None) -> UserGenerator:
    """What the factory makes, as a `LatentGenerator` where it is one; `identity`: what else is to be told of it."""
    with _blamed(factory.where):
        made = factory.make()
    _check_protocol(made, factory.where)
    cls = UserLatentGenerator if isinstance(made, LatentGenerator) else UserGenerator
    return cls(made, {**factory.identity, **(identity or {})})


class UserGenerator:
    """A generator of the user's own, with the factory and its file in its identity; a `Generator`."""

    def __init__(self, made: Any, factory: dict[str, str]):
        self.num_classes: int = made.num_classes
        self.takes_prompts: bool = made.takes_prompts
        self._made, self._factory = made, factory

    def identity(self) -> dict[str, Any]:
        """Name of the factory, hash of its file, and what the user's generator says of itself."""
        return {**self._factory, "generator": self._made.identity()}

    def generate(self, seeds: Sequence[int], conditions: Conditions) -> torch.Tensor:
        """uint8 [B, H, W, 3], if the user's code keeps the promise; see Generator."""
        return self._made.generate(seeds, conditions)


class UserLatentGenerator(UserGenerator):
    """One that offers latents; a `LatentGenerator`."""

    def latents(self, seeds: Sequence[int]) -> torch.Tensor:
        """float32 [B, ...]; see LatentGenerator."""
        return self._made.latents(seeds)

    def decode(self, latents: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        """float [B, 3, H, W] in [-1, 1]; see LatentGenerator."""
        return self._made.decode(latents, conditions)


# ---- Importing -------------------------------------------------------------------------------------------------------


def _parameters(factory: Callable[..., Any], where: str) -> dict[str, inspect.Parameter]:
    try:
        return dict(inspect.signature(factory).parameters)
    except ValueError:
        raise UserError(f"{where}: Python cannot tell what it takes; wrap it in a function of your own") from None


def _from_module(name: str, where: str) -> tuple[ModuleType, str]:
    """A module that can be imported, and the hash of its file."""
    with _blamed(where):
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name and (name == error.name or name.startswith(f"{error.name}.")):
                raise UserError(
                    f"{where}: no module {error.name}; install it, or name a file: FILE.py:FACTORY"
                ) from None
            raise  # an import inside the module
    file = getattr(module, "__file__", None)
    if file is None:
        raise UserError(
            f"{where}: {name} is no file, so that a change of it would go unnoticed; name a module that is one"
        )
    return module, files_hash(file)


def _from_file(path: str, where: str) -> tuple[ModuleType, str]:
    """The module of a file and the hash of what was run; under a name of its own, so that one file is one module."""
    file = Path(files.absolute(path))
    if not file.is_file():
        raise UserError(f"{where}: no such file; check the path")
    source = file.read_bytes()
    code = artifacts.sha256(source)
    name = f"pd_core_generator_{hashlib.sha256(f'{os.path.realpath(file)}:{code}'.encode()).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name], code
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None, "a .py file has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up there
    try:
        with _blamed(where):
            # not through the loader, which may take bytecode of an older file: what runs is what was hashed
            exec(compile(source, str(file), "exec"), module.__dict__)
    except BaseException:
        del sys.modules[name]
        raise
    return module, code


@contextlib.contextmanager
def _blamed(where: str) -> Iterator[None]:
    """Whatever the user's code raises becomes one line that says where in it."""
    try:
        yield
    except (UserError, RunError):  # one line already
        raise
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {one_line(error)}" if str(error) else type(error).__name__
        raise UserError(f"{where}: {_place(error)}{reason}; mend the file") from error


def _place(error: BaseException) -> str:
    """`FILE, line N: ` of the last line inside the user's file; empty where none of its lines ran."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}: "
    ours = (__file__, importlib.__file__)
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename not in ours and not frame.filename.startswith("<frozen ")
    ]
    inside = [frame for frame in frames if frame.filename == frames[0].filename]  # the first that is not ours is theirs
    return f"{inside[-1].filename}, line {inside[-1].lineno}: " if inside else ""


def _check_protocol(generator: Any, where: str) -> None:
    """Everything that `Generator` asks for, named one by one where it is missing."""
    missing = [
        name for name in ("num_classes", "takes_prompts", "identity", "generate") if not hasattr(generator, name)
    ]
    one_of_two = hasattr(generator, "latents") != hasattr(generator, "decode")
    if missing or one_of_two:
        missing += [n for n in ("latents", "decode") if one_of_two and not hasattr(generator, n)]
        raise UserError(
            f"{where}: gave {type(generator).__name__} without {', '.join(missing)}; see docs/generators.md for what a "
            "generator has"
        )
    classes = generator.num_classes
    if not isinstance(classes, int) or isinstance(classes, bool) or classes < 0:
        raise UserError(f"{where}: num_classes is {classes!r}; it must be a number of classes, 0 for none")
    if not isinstance(generator.takes_prompts, bool):
        raise UserError(f"{where}: takes_prompts is {generator.takes_prompts!r}; it must be True or False")
    with _blamed(where):
        identity = generator.identity()
    try:
        json.dumps(identity, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{where}: identity() gives what JSON cannot hold ({error}); give plain numbers and texts"
        ) from None
