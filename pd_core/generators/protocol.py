"""Image generators behind one small protocol: seeds to uint8 images; where a format allows, seeds to latents to images.

An adapter is a class in a module of its own with the two methods of `Generator`, or the four of `LatentGenerator`.
Sample i of a batch is a function of seeds[i] and its own condition; everything random in it is drawn on the CPU from a
`torch.Generator` that all bits of seeds[i] decide (`generators_of`, `normal_latents`), so that it does not depend on
batch, device or worker; `generate_checked` holds every generator to it. docs/generators.md tells how to write one.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from pd_core.core import files, trust
from pd_core.core.errors import UserError

if TYPE_CHECKING:
    import torch


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
        """JSON-able: all beside the settings that decides an image (weights' hash, scheduler, library versions)."""
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


@contextlib.contextmanager
def own_randomness(name: str, device: torch.device | str) -> Iterator[None]:
    """Hold a block to the rule that samples depend on their seeds alone: it may not draw from global random states.

    Watched are those of torch (CPU, and the device), numpy and Python's `random`, at about 0.1 ms a block.

    Raises:
        UserError: `name`, as the user knows it, left one of them in another state.
    """
    before = _global_states(device)
    yield
    after = _global_states(device)
    if moved := [library for library, state in before.items() if state != after[library]]:
        raise UserError(
            f"{name}: draws from the global random state of {' and '.join(moved)}, so that an image is no function of "
            "its seed; choose another scheduler or generator, or draw from generators_of(seeds)"
        )


def _global_states(device: torch.device | str) -> dict[str, object]:
    import torch

    algorithm, words, *rest = np.random.get_state()  # noqa: NPY002 - what others might draw from
    states: dict[str, object] = {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "numpy": (algorithm, np.asarray(words).tobytes(), *rest),
        "Python": random.getstate(),
    }
    if torch.device(device).type == "cuda":
        states["torch on the GPU"] = torch.cuda.get_rng_state(device).numpy().tobytes()
    return states


def generate_checked(
    generator: Generator, seeds: Sequence[int], conditions: Conditions, name: str, device: torch.device | str
) -> torch.Tensor:
    """What the generator makes of the seeds: uint8 [B, H, W, 3], on whatever device it gives it.

    Args:
        generator: of any kind.
        seeds: B integers in [0, 2^63).
        conditions: what the samples shall show.
        name: the generator as the user knows it, for messages.
        device: where it runs, whose global random state is watched.

    Raises:
        UserError: it drew from a global random state, or gave something else than it promised.
    """
    with own_randomness(name, device):
        images = generator.generate(seeds, conditions)
    return checked(images, len(seeds))


def generate_decoded(generator: LatentGenerator, seeds: Sequence[int], conditions: Conditions) -> torch.Tensor:
    """`Generator.generate` of one whose images are those of its latents: uint8 [B, H, W, 3], on its device."""
    import torch

    with torch.no_grad():
        return to_uint8(generator.decode(generator.latents(seeds), conditions))


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
        UserError: nothing there, or no regular file.
    """
    where = f"--generator.path {path}"
    with files.explained(where):
        return files.read_file(path, where, trust.WEIGHTS_BYTES)


def read_prompts(path: str) -> tuple[str, ...]:
    """The lines of the UTF-8 text file that --generator.prompts names, without blank ones.

    Raises:
        UserError: nothing there, no regular file, or no line of text in it.
    """
    where = f"--generator.prompts {path}"
    with files.explained(where):
        lines = files.read_file(path, where, trust.TEXT_BYTES).decode("utf-8", errors="replace").splitlines()
    if not (prompts := tuple(line.strip() for line in lines if line.strip())):
        raise UserError(f"--generator.prompts {path}: holds no line of text")
    return prompts


def files_hash(uri: str, suffix: str = "") -> str:
    """sha256 over name and content of every file under a directory, or of one file; read file by file.

    What a stage of ours notes beside its files does not count: it holds times.

    Args:
        uri: the directory or file, local or s3://.
        suffix: how the names of the files that count end, e.g. ".py".

    Raises:
        UserError: nothing is there, or no regular file.
    """
    fs, path = files.filesystem(uri)
    digest = hashlib.sha256()
    found = sorted(name for name in fs.find(path) if name.endswith(suffix) and not _is_record(name.removeprefix(path)))
    if not found:
        raise UserError(f"{uri}: no such file or directory, or nothing in it; check the path")
    for name in found:
        digest.update(name.removeprefix(path).encode() + b"\0")
        with files.open_file(name if files.is_local(uri) else f"s3://{name}") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def _is_record(name: str) -> bool:
    return name.lstrip("/") in (files.ARTIFACT, files.STARTED) or name.startswith(f"/{files.RECORDS}/")
