"""Opening a generator by its settings: which adapter, which file, what is permitted."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from pd_core.core import artifacts, files, trust
from pd_core.core.errors import UserError, printable
from pd_core.generators.protocol import Generator

if TYPE_CHECKING:
    from pd_core.core.settings.generate import GeneratorSettings
    from pd_core.generators.pairs import Pair

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
CODE: Mapping[str, tuple[str, ...]] = {  # settings that decide which code runs when a generator of a kind is opened
    "python": ("path", "arguments"),
    "stylegan": ("path", "code"),
    "torchscript": ("path",),  # no safe container
    "diffusers": (),  # but for pickles
}


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


def absolute(path: str) -> str:
    """A file or directory that is there, or FILE.py:FACTORY, with its whole path; hub ids, modules and URIs as they
    are.
    """
    file, colon, factory = path.rpartition(":") if ".py:" in path else (path, "", "")
    there = files.is_local(file) and files.exists(files.absolute(file))
    return f"{files.absolute(file)}{colon}{factory}" if there else path


def permitted(uri: str, where: str, stored: GeneratorSettings, told: GeneratorSettings) -> GeneratorSettings:
    """The generator that a record of samples names, if this command may open it.

    The record may be a stranger's: what runs code, or is fetched from the hub, is opened only if the command names it
    too, and other files where they lie beside the record, or where the command leads as well.

    Args:
        uri, where: of the output and of its record, for messages.
        stored: by the record. told: by the command.

    Raises:
        UserError: it may not.
    """
    names, allow_pickle = CODE[stored.kind], told.allow_pickle and told.kind == stored.kind
    of_hub = not names and HUB_ID.fullmatch(str(stored.path)) is not None
    if allow_pickle or of_hub:
        names = tuple(dict.fromkeys(("path", *names)))
    theirs, ours = _naming(stored, names), _naming(told, names)
    if names and theirs != ours:
        other = " and ".join(name for name in theirs if theirs[name] != ours.get(name)) or "code"
        add = " ".join(f"--generator.{name} {shlex.quote(printable(value))}" for name, value in theirs.items())
        what = "comes from the hub" if of_hub and not allow_pickle else "can run any code when it is opened"
        raise UserError(
            f"--verify {uri}: its record names a generator that {what}, of another {other} than this "
            f"command; if you trust it, add {add}{' --generator.allow-pickle' if stored.kind == 'stylegan' else ''}"
        )
    places = {"path": theirs["path"]} if "path" in theirs else {}
    for name in ("path", "prompts"):
        if name not in places and (name == "path" or stored.prompts is not None):
            beside = [uri, getattr(told, name)]
            places[name] = trust.recorded_path(getattr(stored, name), where, beside, f"--generator.{name}")
    return stored.model_copy(update={"allow_pickle": allow_pickle, **places})


def _naming(generator: GeneratorSettings, names: Sequence[str]) -> dict[str, str]:
    """`kind` and these settings as a command names them, local paths absolute as `absolute` makes them."""
    texts = {"kind": str(generator.kind)}
    for name in names:
        value = getattr(generator, name)
        if value is not None:
            texts[name] = artifacts.canonical(value) if name == "arguments" else absolute(value)
    return texts


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
