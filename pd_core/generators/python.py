"""Generators of the user's own: a factory named MODULE:FACTORY or FILE.py:FACTORY. docs/generators.md holds an example."""

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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pd_core import storage
from pd_core.errors import RunError, UserError, one_line
from pd_core.generators import Conditions, Generator, LatentGenerator, files_hash

if TYPE_CHECKING:
    from types import ModuleType

    import torch

    from pd_core.config import GeneratorSettings


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
        UserError: no such module, file or factory, arguments it does not take, a result that is no Generator, or whatever the
            user's code raises, with its line.
    """
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
    with _blamed(where):
        made = factory(**arguments)
    _check_protocol(made, where)
    cls = UserLatentGenerator if isinstance(made, LatentGenerator) else UserGenerator
    return cls(made, {"factory": name, "file": code})


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
    file = Path(storage.absolute(path))
    if not file.is_file():
        raise UserError(f"{where}: no such file; check the path")
    source = file.read_bytes()
    code = storage.sha256(source)
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
            f"{where}: gave {type(generator).__name__} without {', '.join(missing)}; see docs/generators.md for what a generator has"
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
