"""Generators of the user's own: a factory named MODULE:FACTORY or FILE.py:FACTORY. docs/generators.md holds an example."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pd_core import storage
from pd_core.errors import UserError
from pd_core.generators import Generator

if TYPE_CHECKING:
    from types import ModuleType

    from pd_core.config import GeneratorSettings


def open_factory(settings: GeneratorSettings, device: str = "cpu") -> Generator:
    """What the factory makes of `settings.arguments`, and of `device` where it has a parameter of that name.

    Raises:
        UserError: no such module, file or factory, arguments it does not take, or a result that is no Generator.
    """
    assert settings.path is not None, "open_generator refuses settings without a path"
    where = f"--generator.path {settings.path}"
    source, _, name = settings.path.rpartition(":")
    if not source or not name.isidentifier():
        raise UserError(f"{where}: expected MODULE:FACTORY or FILE.py:FACTORY")
    module = _from_file(source, where) if source.endswith(".py") else _from_module(source, where)
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
    generator = factory(**arguments)
    _check_protocol(generator, where)
    return generator


def _parameters(factory: Callable[..., Any], where: str) -> dict[str, inspect.Parameter]:
    try:
        return dict(inspect.signature(factory).parameters)
    except ValueError:
        raise UserError(f"{where}: Python cannot tell what it takes; wrap it in a function of your own") from None


def _from_module(name: str, where: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise UserError(f"{where}: no module {error.name}; install it, or name a file: FILE.py:FACTORY") from None
        raise  # an import inside the module: its traceback says where


def _from_file(path: str, where: str) -> ModuleType:
    """The module of a file, under a name of its own: one file is one module however often it is opened."""
    file = Path(storage.absolute(path))
    if not file.is_file():
        raise UserError(f"{where}: no such file; check the path")
    name = f"pd_core_generator_{hashlib.sha256(os.path.realpath(file).encode()).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None, "a .py file has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


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
    try:
        json.dumps(generator.identity(), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{where}: identity() gives what JSON cannot hold ({error}); give plain numbers and texts"
        ) from None
