"""TorchScript files: a module from latents, and class numbers where it takes them, to images.

No Python of the file runs: TorchScript is a small language with an interpreter of its own. It is code all the same, and
torch does not promise that a hostile file does no harm: load files of people you trust.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from pd_core.core import artifacts, files, trust
from pd_core.core.errors import UserError, one_line
from pd_core.generators.noise import normal_latents, truncated_latents
from pd_core.generators.pairs import (
    Pair,
    Weights,
    check_trainable,
    frozen,
    image_shape,
    set_trained,
    weights_hash,
)
from pd_core.generators.protocol import Conditions, check_conditions, generate_decoded

if TYPE_CHECKING:
    import torch

    from pd_core.core.settings.generate import GeneratorSettings


def open_module(settings: GeneratorSettings, device: str = "cpu") -> TorchScript:
    """A module that `torch.jit.save` wrote, on a device.

    Its forward takes float32 latents [B, *latent_shape] and gives images [B, 1 or 3, H, W]. A second argument takes
    class numbers, int64 [B]; the module then holds their count as an integer attribute `num_classes`.

    Args:
        settings: `path`, local or s3://; `latent_shape`; `value_range` of the output.
        device: "cpu", "cuda", "cuda:1".

    Raises:
        UserError: no such file, not TorchScript, no latent_shape, another signature, or no num_classes where labels are
            taken.
    """
    where = f"--generator.path {settings.path}"
    assert settings.path is not None, "open_generator refuses settings without a path"
    if settings.latent_shape is None:
        raise UserError(
            "--generator.latent_shape: not set; a TorchScript module does not tell, e.g. [128] or [3,32,32]"
        )
    module, file_hash = _load(settings.path, where, device)
    set_trained(module, False)
    return TorchScript(module.eval(), settings, device, _classes(module, where), file_hash)


def open_pair(settings: GeneratorSettings, discriminator: str | None, device: str = "cpu") -> Pair:
    """The generator of `open_module` with a discriminator, another file of `torch.jit.save`.

    The discriminator's forward takes images float32 [B, C, H, W] in [-1, 1], whatever `value_range` the generator's
    output has, and gives logits [B] or [B, 1]. A second argument takes the class numbers, int64 [B].

    Args:
        settings: as for `open_module`; latents are drawn within a bound when images are sampled, not while training.
        discriminator: its file, local or s3://.
        device: "cpu", "cuda", "cuda:1".

    Raises:
        UserError: what `open_module` refuses, of both; no discriminator; one that takes labels where the generator
            takes none.
    """
    if discriminator is None:
        raise UserError(
            "--discriminator: not set; a GAN is trained against its discriminator, name its TorchScript file"
        )
    where = f"--discriminator {discriminator}"
    live = open_module(settings.model_copy(update={"latent_bound": None}), device)
    generator, (critic, _) = live._module, _load(discriminator, where, device)
    takes = _arguments(critic)
    if len(takes) not in (1, 2):
        raise UserError(f"{where}: forward takes ({', '.join(takes)}); it must take images, or images and labels")
    if len(takes) > 1 and not live.num_classes:
        raise UserError(f"{where}: takes labels, which the generator does not; name the one that belongs to it")
    for module, name in ((generator, f"--generator.path {settings.path}"), (critic, where)):
        set_trained(module.float(), True)
        check_trainable(module, name)
    colors, size = image_shape(live)
    return Pair(
        generator=generator,
        discriminator=critic,
        live=live,
        judge=partial(_judged, critic, len(takes) > 1),
        averaged_start={name: tensor.detach().clone() for name, tensor in generator.state_dict().items()},
        colors=colors,
        size=size,
        sampler=partial(_sampler, generator, settings, device, live.num_classes),
        save=partial(_save, generator, critic),
        name=where,
    )


def _judged(critic: Any, with_labels: bool, images: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
    import torch

    with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]  # as in `TorchScript.decode`
        return critic(images, labels) if with_labels else critic(images)


def _sampler(
    generator: Any, settings: GeneratorSettings, device: str, num_classes: int, weights: Weights
) -> TorchScript:
    return TorchScript(frozen(generator, weights), settings, device, num_classes, weights_hash(weights))


def _save(generator: Any, critic: Any, folder: str, weights: Weights) -> None:
    """generator.pt and discriminator.pt, which `open_pair` takes."""
    import torch

    for name, module in (("generator", frozen(generator, weights)), ("discriminator", frozen(critic))):
        with _quiet():
            torch.jit.save(module.to("cpu"), os.path.join(folder, f"{name}.pt"))


def _load(path: str, where: str, device: str) -> tuple[Any, str]:
    """The module of a file and the hash of its bytes."""
    import torch

    with files.explained(where):
        data = files.read_file(path, where, trust.WEIGHTS_BYTES)
    try:
        with _quiet():
            module = torch.jit.load(io.BytesIO(data), map_location=device)
    except (RuntimeError, ValueError) as error:
        reason = one_line(error)
        raise UserError(f"{where}: not a TorchScript file ({reason}); write one with torch.jit.save") from None
    return module, artifacts.sha256(data)


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        # of torch.export, which takes batches of one size only by default
        warnings.simplefilter("ignore", FutureWarning)
        yield


def _arguments(module: Any) -> list[str]:
    return [argument.name for argument in module.forward.schema.arguments if argument.name != "self"]


def _classes(module: Any, where: str) -> int:
    """Number of classes that a module's forward takes labels of; 0 if it takes latents alone."""
    arguments = _arguments(module)
    if len(arguments) not in (1, 2):
        raise UserError(f"{where}: forward takes ({', '.join(arguments)}); it must take latents, or latents and labels")
    if len(arguments) == 1:
        return 0
    classes = getattr(module, "num_classes", None)
    if not isinstance(classes, int) or classes < 1:
        raise UserError(
            f"{where}: forward takes labels, but the module has no integer num_classes; set it before scripting"
        )
    return classes


class TorchScript:
    """A TorchScript module as a `LatentGenerator`. Latents are standard normal, truncated where a bound is set."""

    takes_prompts = False

    def __init__(self, module: Any, settings: GeneratorSettings, device: str, num_classes: int, file_hash: str):
        assert settings.latent_shape is not None, "open_module refuses settings without a latent_shape"
        self.num_classes = num_classes
        self._module, self._device, self._file_hash = module, device, file_hash
        self._path, self._shape, self._range = str(settings.path), settings.latent_shape, settings.value_range
        self._bound = settings.latent_bound

    def identity(self) -> dict[str, Any]:
        """Hash of the file, shape and bound of a latent, range of the output, torch's version."""
        return {
            "file": self._file_hash,
            "latent_shape": list(self._shape),
            "latent_bound": self._bound,
            "value_range": self._range,
            "versions": {"torch": version("torch")},
        }

    def generate(self, seeds: Sequence[int], conditions: Conditions) -> torch.Tensor:
        """uint8 [B, H, W, 3] on the device; see Generator."""
        return generate_decoded(self, seeds, conditions)

    def latents(self, seeds: Sequence[int]) -> torch.Tensor:
        """Standard normal float32 [B, *latent_shape] on the device, within ±latent_bound where one is set."""
        if self._bound is None:
            return normal_latents(seeds, self._shape, self._device)
        return truncated_latents(seeds, self._shape, self._bound, self._device)

    def decode(self, latents: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        """float32 [B, 1 or 3, H, W], the module's value range moved to [-1, 1]; differentiable where the module is.

        Raises:
            UserError: the module refuses latents of this shape, or gives something else than images.
        """
        import torch

        check_conditions(self, conditions.labels, conditions.prompts)
        labels = () if conditions.labels is None else (torch.tensor(conditions.labels, device=self._device),)
        # as it stands: what the interpreter makes of a module after its first calls may round in another way
        with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
            images = self._module(latents, *labels)
        if not isinstance(images, torch.Tensor) or images.ndim != 4 or images.shape[1] not in (1, 3):
            found = list(images.shape) if isinstance(images, torch.Tensor) else type(images).__name__
            raise UserError(f"--generator.path {self._path}: gave {found}; the module must give images [B, 3, H, W]")
        scale, offset = {"-1..1": (1.0, 0.0), "0..1": (2.0, -1.0), "0..255": (1 / 127.5, -1.0)}[self._range]
        return images.float() * scale + offset
