"""Image generators behind one small protocol: seeds to uint8 images; where a format allows, seeds to latents to images.

An adapter is a class in a module of its own with the two methods of `Generator`, or the four of `LatentGenerator`. Sample i
of a batch is a function of seeds[i] and its own condition; everything random in it is drawn on the CPU from a
`torch.Generator` seeded with seeds[i] (`generators_of`, `normal_latents`), so that it does not depend on batch, device or
worker. docs/generators.md tells how to write one.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from pd_core import storage
from pd_core.errors import UserError

if TYPE_CHECKING:
    import torch

    from pd_core.config import GeneratorSettings


@dataclass(frozen=True)
class Conditions:
    """What a batch is asked to show. labels: class numbers [B]; prompts: texts [B]; None where there are none."""

    labels: tuple[int, ...] | None = None
    prompts: tuple[str, ...] | None = None


@runtime_checkable
class Generator(Protocol):
    """Seeds to images.

    Attributes:
        num_classes: number of class labels, 0 where the generator takes none.
        takes_prompts: whether it is conditioned on text.
    """

    num_classes: int
    takes_prompts: bool

    def identity(self) -> dict[str, Any]:
        """JSON-able: everything beside the settings that decides an image (weights' hash, scheduler, library versions)."""
        ...

    def generate(self, seeds: Sequence[int], conditions: Conditions) -> torch.Tensor:
        """uint8 [B, H, W, 3], RGB, on the generator's device. seeds: B integers in [0, 2^63)."""
        ...


@runtime_checkable
class LatentGenerator(Generator, Protocol):
    """A generator whose images are a differentiable function of latents."""

    def latents(self, seeds: Sequence[int]) -> torch.Tensor:
        """float32 [B, ...], on the generator's device; what `generate` starts from."""
        ...

    def decode(self, latents: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        """float [B, 3, H, W] in [-1, 1], not clamped; differentiable in the latents, deterministic."""
        ...


def generators_of(seeds: Sequence[int]) -> list[torch.Generator]:
    """One CPU random generator for each seed."""
    import torch

    return [torch.Generator("cpu").manual_seed(int(seed)) for seed in seeds]


def normal(generators: Sequence[torch.Generator], shape: Sequence[int], device: torch.device | str) -> torch.Tensor:
    """The next standard normal draw, float32 [B, *shape] on a device; row i from the CPU generator i alone."""
    import torch

    return torch.stack([torch.randn(*shape, generator=g) for g in generators]).to(device)


def normal_latents(seeds: Sequence[int], shape: Sequence[int], device: torch.device | str = "cpu") -> torch.Tensor:
    """Standard normal float32 [B, *shape] on a device, row i from seeds[i] alone."""
    return normal(generators_of(seeds), shape, device)


@contextlib.contextmanager
def own_randomness(name: str, device: torch.device | str) -> Iterator[None]:
    """Hold a block to the rule that samples depend on their seeds alone: it may not draw from torch's global generators.

    Raises:
        UserError: `name`, as the user knows it, drew from the global random state of the CPU or of the device.
    """
    import torch

    def states() -> list[torch.Tensor]:
        on_gpu = torch.device(device).type == "cuda"
        return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if on_gpu else [])]

    before = states()
    yield
    if not all(torch.equal(old, new) for old, new in zip(before, states(), strict=True)):
        raise UserError(
            f"{name}: draws random numbers of its own, so that an image is no function of its seed; choose another scheduler or "
            "generator"
        )


def check_conditions(generator: Generator, labels: Sequence[int] | None, prompts: Sequence[str] | None) -> None:
    """Hold labels and prompts to what the generator takes.

    Raises:
        UserError: given where there is none to take, missing where one is needed, or a label out of range.
    """
    classes = generator.num_classes
    if labels is not None and classes == 0:
        raise UserError("--generator.labels: this generator takes no class labels; set it to none")
    if labels is None and classes > 0:
        raise UserError(
            f"--generator.labels: this generator draws one of {classes} classes; set it to all or to a list"
        )
    if wrong := sorted({label for label in labels or () if not 0 <= label < classes}):
        raise UserError(f"--generator.labels: no class {wrong[0]}; this generator has the classes 0 to {classes - 1}")
    if prompts is not None and not generator.takes_prompts:
        raise UserError("--generator.prompts: this generator takes no text; drop it")
    if prompts is None and generator.takes_prompts:
        raise UserError(
            "--generator.prompts: this generator draws what a text says; name a file with one prompt per line"
        )


def checked(images: torch.Tensor, count: int) -> torch.Tensor:
    """The images, if they are what `Generator.generate` promises for `count` seeds.

    Raises:
        UserError: not a tensor, not uint8, not [count, H, W, 3], or without a pixel.
    """
    import torch

    promised = f"the generator must give a torch.Tensor of uint8 [{count}, H, W, 3]"
    if not isinstance(images, torch.Tensor):
        raise UserError(f"{promised}, gave {type(images).__name__}; mend its generate()")
    shape = list(images.shape)
    if images.dtype != torch.uint8:
        raise UserError(f"{promised}, gave {images.dtype} {shape}; scale to 0..255 and round, as to_uint8 does")
    if images.ndim != 4 or shape[0] != count or shape[3] != 3 or images.numel() == 0:
        raise UserError(f"{promised}, gave {shape}; mend its generate()")
    return images


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """float [B, C, H, W] in [-1, 1] to uint8 [B, H, W, 3]: round((x + 1) * 127.5), clamped; one channel is repeated.

    Raises:
        ValueError: another shape, or a value that is not finite.
    """
    import torch

    batch, channels, height, width = images.shape
    if channels not in (1, 3):
        raise ValueError(f"images must have 1 or 3 channels, have shape {[batch, channels, height, width]}")
    if not bool(torch.isfinite(images).all()):
        raise ValueError("the generator gave NaN or infinity")
    pixels = ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).expand(batch, height, width, 3).contiguous()


def read_file(path: str) -> bytes:
    """All bytes of the file that --generator.path names, local or s3://.

    Raises:
        UserError: nothing there, or a directory.
    """
    try:
        return storage.read_bytes(path)
    except OSError as error:
        raise storage.explain(error, f"--generator.path {path}") from None


def files_hash(uri: str, suffix: str = "") -> str:
    """sha256 over name and content of every file under a directory, or of one file; read file by file.

    Args:
        uri: the directory or file, local or s3://.
        suffix: how the names of the files that count end, e.g. ".py".

    Raises:
        UserError: nothing is there.
    """
    fs, path = storage.filesystem(uri)
    digest = hashlib.sha256()
    found = sorted(name for name in fs.find(path) if name.endswith(suffix))
    if not found:
        raise UserError(f"{uri}: no such file or directory, or nothing in it; check the path")
    for name in found:
        digest.update(name.removeprefix(path).encode() + b"\0")
        with fs.open(name, "rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def check_path(settings: GeneratorSettings) -> None:
    """What can be said of --generator.path without loading anything; the adapters look closer.

    Raises:
        UserError: nothing lies at a local path, and it is no hub id.
    """
    path = settings.path
    if path is None:
        raise UserError("--generator.path: not set; name the generator")
    if settings.kind == "python" or not storage.is_local(path) or storage.exists(storage.absolute(path)):
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
