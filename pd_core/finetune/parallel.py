"""Workers that train on one batch together: gradients and numbers of all of them, and randomness that is theirs alone.

Gradients are summed after the backward passes, not in hooks as DistributedDataParallel does: R1 differentiates twice,
and passes are accumulated. StyleGAN2-ADA does likewise.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from pd_core.core import seeds
from pd_core.finetune.protocol import Share

if TYPE_CHECKING:
    import torch


def average_gradients(parameters: Iterable[torch.nn.Parameter], world: int) -> None:
    """Set each gradient to its mean over the workers, which all get the same bytes; one that is missing counts as 0.

    Not DistributedDataParallel, whose hooks do not see a gradient of a gradient. world: workers; with 1 nothing
    happens.
    """
    import torch

    if world == 1:
        return
    moved = list(parameters)
    for parameter in moved:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    average([parameter.grad for parameter in moved if parameter.grad is not None], world)


def average(tensors: Iterable[torch.Tensor], world: int) -> None:
    """Set each floating-point tensor to its mean over the workers, in place, by one message."""
    import torch

    if world == 1 or not (floating := [tensor for tensor in tensors if tensor.is_floating_point()]):
        return
    flat = torch.cat([tensor.detach().reshape(-1) for tensor in floating])
    torch.distributed.all_reduce(flat)
    flat /= world
    for tensor, part in zip(floating, flat.split([tensor.numel() for tensor in floating]), strict=True):
        tensor.detach().copy_(part.view_as(tensor))


def sum_of(values: Mapping[str, float], world: int, device: str) -> dict[str, float]:
    """Each number summed over the workers, in float64; what is not finite anywhere is not finite in the sum.

    Args:
        values: the same names on every worker.
        world: workers.
        device: on which the process group talks.
    """
    import torch

    if world == 1:
        return dict(values)
    numbers = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
    torch.distributed.all_reduce(numbers)
    return dict(zip(values, numbers.tolist(), strict=True))


def gathered(values: Mapping[int, Any], world: int) -> dict[int, Any]:
    """The entries of all workers together, on each of them."""
    from torch import distributed

    if world == 1:
        return dict(values)
    found: list[Any] = [None] * world
    distributed.all_gather_object(found, dict(values))
    return {key: value for part in found for key, value in part.items()}


def from_first(value: Any, world: int) -> Any:
    """What worker 0 has."""
    from torch import distributed

    if world == 1:
        return value
    held = [value]
    distributed.broadcast_object_list(held, src=0)
    return held[0]


def raise_together(error: Exception | None, world: int, device: str) -> None:
    """Raise the error of any worker on all of them: one that left alone would leave the others waiting for it.

    Args:
        error: of this worker, or None. world: workers. device: on which the process group talks.
    """
    failed = sum_of({"failed": float(error is not None)}, world, device)["failed"]
    if not failed:
        return
    errors = gathered({} if error is None else {0: error}, world)
    raise next(iter(errors.values()))


@contextlib.contextmanager
def own_random_state(seed: int, step: int, share: Share) -> Iterator[None]:
    """Dropout and the like draw from torch's global state: here it is one of the run's seed, the step and the rank."""
    import torch

    devices = [share.device] if share.device.startswith("cuda") else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seeds.stream(seed, f"finetune/step/{step}/{share.rank}"))
        yield


def images_of(pixels: np.ndarray, colors: int, device: str) -> torch.Tensor:
    """float32 [B, colors, H, W] in [-1, 1] of uint8 [B, H, W, 3]; grey as Pillow's mode L, which leaves grey as
    it is.
    """
    import torch

    planes = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))).to(device)
    if colors == 1:
        red, green, blue = planes.to(torch.int32).unbind(dim=1)
        planes = ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16).unsqueeze(1)
    return planes.float() / 127.5 - 1
