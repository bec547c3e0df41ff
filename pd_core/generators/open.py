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
    from pd_core.generators.pairs import Pair

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


def open_pair(
    settings: GeneratorSettings, discriminator: str | None = None, device: str = "cpu", threads: int = 1
) -> Pair:
    """The generator of the settings with its discriminator, on a device; the same in every process.

    Args:
        settings: of the generator.
        discriminator: torchscript: its file, local or s3://. The other formats hold it beside the generator.
        device: "cpu", "cuda", "cuda:1".
        threads: of CPU arithmetic.

    Raises:
        UserError: what `open_generator` refuses, a format without discriminators, or a pair of which one is missing.
    """
    import torch

    torch.set_num_threads(threads)
    check_path(settings)
    if settings.kind == "diffusers":
        raise UserError(
            "--generator.kind diffusers: is no GAN; use stylegan, torchscript or python, or train it as diffusion"
        )
    if discriminator is not None and settings.kind != "torchscript":
        raise UserError(
            f"--discriminator {discriminator}: a generator of kind {settings.kind} brings its own; leave it out"
        )
    # whatever a factory draws as first weights: from here, so that no two workers differ
    with torch.random.fork_rng(devices=[device] if torch.device(device).type == "cuda" else []):
        torch.manual_seed(0)
        return _pair_of(settings, discriminator, device)


def _pair_of(settings: GeneratorSettings, discriminator: str | None, device: str) -> Pair:
    """By the adapter of its kind; imported when it is needed."""
    if settings.kind == "torchscript":
        from pd_core.generators import torchscript

        return torchscript.open_pair(settings, discriminator, device)
    if settings.kind == "stylegan":
        from pd_core.generators import stylegan

        return stylegan.open_pair(settings, device)
    from pd_core.generators import python

    return python.open_pair(settings, device)
