"""Opening a generator by its settings: which adapter, which file, what is permitted."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from pd_core.core import files
from pd_core.core.errors import UserError
from pd_core.generators.protocol import Generator

if TYPE_CHECKING:
    from pd_core.core.settings.generate import GeneratorSettings

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def check_path(settings: GeneratorSettings) -> None:
    """What can be said of --generator.path without loading anything; the adapters look closer.

    Raises:
        UserError: nothing lies at a local path, and it is no hub id.
    """
    path = settings.path
    if path is None:
        raise UserError("--generator.path: not set; name the generator")
    if settings.kind == "python" or not files.is_local(path) or files.exists(files.absolute(path)):
        return
    if settings.kind != "diffusers":
        raise UserError(f"--generator.path {path}: no such file; check the path")
    if not HUB_ID.fullmatch(path):
        raise UserError(f"--generator.path {path}: no such directory, and no hub id (ORG/NAME); check the path")


def open_generator(settings: GeneratorSettings, device: str = "cpu", threads: int = 1) -> Generator:
    """The generator of the settings, on a device.

    Raises:
        UserError: nothing there, an unknown format, pickle without permission, settings that do not fit the format.
    """
    import torch

    torch.set_num_threads(threads)
    check_path(settings)
    return _opener(settings.kind)(settings, device)


def _opener(kind: str) -> Callable[[GeneratorSettings, str], Generator]:
    """The adapter of a kind; imported when it is needed."""
    if kind == "diffusers":
        from pd_core.generators import diffusers

        return diffusers.open_pipeline
    if kind == "stylegan":
        from pd_core.generators import stylegan

        return stylegan.open_pickle
    if kind == "torchscript":
        from pd_core.generators import torchscript

        return torchscript.open_module
    if kind == "python":
        from pd_core.generators import python

        return python.open_factory
    raise UserError(f"--generator.kind {kind}: unknown; use diffusers, stylegan, torchscript or python")
