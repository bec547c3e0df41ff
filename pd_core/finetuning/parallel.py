"""What workers tell each other in a step: sums, over torch.distributed's process group where there are several."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def average_gradients(parameters: Iterable[torch.nn.Parameter], world: int) -> None:
    """Set each gradient to its mean over the workers, which all get the same bytes; one that is missing counts as 0.

    Not DistributedDataParallel, whose hooks do not see a gradient of a gradient. world: workers; with 1 nothing happens.
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
