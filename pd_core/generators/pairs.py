"""A GAN's generator with the discriminator that it is trained against: opened from what the adapters open, saved as
that again.

Nothing here trains. What an adapter calls latents, images and classes is meant here too; a discriminator sees images as
its generator gives them, [B, 1 or 3, H, W] in [-1, 1].
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pd_core.core import files
from pd_core.core.errors import UserError, one_line
from pd_core.generators.protocol import Conditions, Generator, LatentGenerator

if TYPE_CHECKING:
    import torch


Weights = Mapping[str, "torch.Tensor"]


@dataclass(frozen=True)
class Pair:
    """A generator and its discriminator, float32 on one device.

    Attributes:
        generator: its network. What may be trained requires gradients, here and in the discriminator.
        discriminator: its network.
        live: the generator as it is sampled, of whatever weights `generator` has at the time, without truncation.
        judge: images [B, C, H, W] in [-1, 1] and class numbers int64 [B], None where there are none, to logits.
        averaged_start: weights and buffers that the moving average of the generator starts from, by name.
        colors: channels of the images, 1 or 3.
        size: (height, width) of the images, px.
        sampler: weights of the generator to a generator of its own that has them.
        save: writes into a local folder what was opened: the discriminator as it is, the generator with these weights.
        name: the discriminator as the user knows it, for messages.
    """

    generator: torch.nn.Module
    discriminator: torch.nn.Module
    live: LatentGenerator
    judge: Callable[[torch.Tensor, torch.Tensor | None], Any]
    averaged_start: dict[str, torch.Tensor]
    colors: int
    size: tuple[int, int]
    sampler: Callable[[Weights], Generator]
    save: Callable[[str, Weights], None]
    name: str

    def logits(self, images: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        """float32 [B], positive for real; see `judge`.

        Raises:
            UserError: the discriminator gives something else than one number for each image.
        """
        import torch

        found, count = self.judge(images, labels), len(images)
        shape = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
        if shape not in ((count,), (count, 1)):
            raise UserError(
                f"{self.name}: gives {shape} for {count} images; it must give one logit for each, [{count}] or "
                f"[{count}, 1]"
            )
        return found.reshape(count).float()


def conditions_of(labels: Iterable[int] | None) -> Conditions:
    """What a generator is asked for by class numbers, or by none."""
    return Conditions() if labels is None else Conditions(labels=tuple(labels))


def image_shape(live: LatentGenerator) -> tuple[int, tuple[int, int]]:
    """(colors, (height, width)) of a generator's images; makes one.

    Raises:
        UserError: it gives no images.
    """
    import torch

    with torch.no_grad():
        image: Any = live.decode(live.latents([0]), conditions_of([0] if live.num_classes else None))
    if not isinstance(image, torch.Tensor) or image.ndim != 4 or image.shape[1] not in (1, 3):
        found = list(image.shape) if isinstance(image, torch.Tensor) else type(image).__name__
        raise UserError(f"the generator gives {found} for one latent; it must give an image [1, 1 or 3, H, W]")
    return image.shape[1], (image.shape[2], image.shape[3])


def frozen(network: Any, weights: Weights | None = None) -> Any:
    """A copy of a network to be sampled from or saved, with other weights if there are any; it is not trained."""
    import torch

    with torch.no_grad():  # TorchScript would copy within the graph
        copied = copy.deepcopy(network)
    if weights is not None:
        copied.load_state_dict(weights)
    set_trained(copied, False)
    return copied.eval()


def set_trained(network: Any, on: bool) -> None:
    """Whether a network's weights require gradients."""
    for parameter in network.parameters():  # one by one: modules of TorchScript have no requires_grad_
        parameter.requires_grad_(on)


def check_trainable(network: torch.nn.Module, where: str) -> None:
    """Raises UserError where a network has nothing to train; `where`: the network as the user knows it."""
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise UserError(
            f"{where}: has no weights that can be trained; save the network itself, not a frozen form of it"
        )


def check_passes(pair: Pair, sizes: Iterable[int]) -> None:
    """Hold the discriminator to batches of the generator's images, of every size that it will be shown.

    Raises:
        UserError: it does not take them.
    """
    import torch

    device = next(pair.discriminator.parameters()).device
    training, _ = pair.discriminator.training, pair.discriminator.eval()  # statistics of zeros are none to keep
    for count in sorted(set(sizes)):
        images = torch.zeros(count, pair.colors, *pair.size, device=device)
        labels = torch.zeros(count, dtype=torch.int64, device=device) if pair.live.num_classes else None
        try:
            with torch.no_grad():
                pair.logits(images, labels)
        except UserError:
            raise
        except Exception as error:  # its code is the user's, and may raise anything
            raise UserError(
                f"{pair.name}: does not take {count} images of the generator, {list(images.shape)} ({_reason(error)}); "
                "name the one that belongs to this generator, or choose another --training.batch_size or "
                "--training.accumulate"
            ) from None
    pair.discriminator.train(training)


def _reason(error: Exception) -> str:
    """The last line: where TorchScript fails, its traceback comes before the message."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return one_line(lines[-1].removeprefix("builtins."))


# ---- Weights ---------------------------------------------------------------------------------------------------------


def weights_hash(weights: Weights) -> str:
    """sha256 over names, types, shapes and values, in the order of names."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_weights(path: str, **networks: Weights) -> None:
    """Write the weights of networks into one local safetensors file, each name after that of its network and a dot."""
    import safetensors.torch

    together = {f"{part}.{name}": tensor for part, weights in networks.items() for name, tensor in weights.items()}
    # copies: safetensors refuses tensors that share their memory
    safetensors.torch.save_file({name: t.detach().cpu().clone().contiguous() for name, t in together.items()}, path)


def load_weights(path: str, **networks: torch.nn.Module) -> None:
    """The inverse of `save_weights`, into networks of these names.

    Args:
        path: local or s3://.
        networks: such as `generator=...` and `discriminator=...`.

    Raises:
        UserError: no such file, or weights of other networks.
    """
    import safetensors
    import safetensors.torch

    with files.explained(f"weights {path}"):
        data = files.read_bytes(path)
    try:
        together = safetensors.torch.load(data)
        for part, network in networks.items():
            own = {name.removeprefix(f"{part}."): t for name, t in together.items() if name.startswith(f"{part}.")}
            network.load_state_dict(own)
    except (safetensors.SafetensorError, RuntimeError) as error:
        raise UserError(
            f"weights {path}: not those of this factory's networks ({one_line(error)}); name the file that belongs to "
            "them"
        ) from None
