"""Workers that train on one batch together: gradients and numbers of all of them, and randomness that is theirs alone.

Gradients are summed after the backward pass, not in hooks as DistributedDataParallel does: R1 differentiates twice, and passes
are accumulated; StyleGAN2-ADA does likewise.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pd_core import ids
from pd_core.finetuning import Share

if TYPE_CHECKING:
    import torch


def average_gradients(parameters: Sequence[torch.nn.Parameter], world: int) -> None:
    """Replace each gradient by its mean over the workers. A parameter without one on any worker keeps none."""
    import torch
    from torch import distributed

    if world == 1:
        return
    used = [p for p in parameters if p.grad is not None]
    flat = torch.cat([p.grad.flatten() for p in used])  # type: ignore[union-attr]
    distributed.all_reduce(flat)
    flat /= world
    for parameter, mean in zip(used, flat.split([p.numel() for p in used]), strict=True):
        parameter.grad = mean.view_as(parameter)


def mean_of(values: Mapping[str, float], world: int) -> dict[str, float]:
    """Mean of each number over the workers, the same on all of them; NaN where one is."""
    import torch
    from torch import distributed

    if world == 1:
        return dict(values)
    device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
    flat = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
    distributed.all_reduce(flat)
    return dict(zip(values, (flat / world).tolist(), strict=True))


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


@contextlib.contextmanager
def own_random_state(seed: int, step: int, share: Share) -> Iterator[None]:
    """Dropout and the like draw from torch's global state: here it is one of the run's seed, the step and the rank."""
    import torch

    devices = [share.device] if share.device.startswith("cuda") else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(ids.stream(seed, f"finetune/step/{step}/{share.rank}"))
        yield


def images_of(pixels: np.ndarray, colors: int, device: str) -> torch.Tensor:
    """uint8 [b, H, W, 3] to float32 [b, colors, H, W] in [-1, 1]; one channel is ITU-R 601 luma, as Pillow's "L"."""
    import torch

    images = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2).float()
    if colors == 1:
        red, green, blue = images.split(1, dim=1)
        images = 0.299 * red + 0.587 * green + 0.114 * blue
    return images / 127.5 - 1
