"""The moving average of a network's weights, which is evaluated and saved, and the warm-up of the learning rate."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch.optim.swa_utils import AveragedModel


def decay_at(update: int, decay: float) -> float:
    """Of the moving average at update 1, 2, ...: min(decay, (1 + t) / (10 + t)); the first steps of a short run
    count.
    """
    return min(decay, (1 + update) / (10 + update))


def averaged(network: torch.nn.Module, decay: float) -> AveragedModel:
    """The exponential moving average of a network's parameters, which begins at the network as it is; buffers are
    copied.
    """
    import torch
    from torch.optim.swa_utils import AveragedModel

    @torch.no_grad()
    def update(averages: Any, weights: Any, updates: torch.Tensor | int) -> None:
        torch._foreach_lerp_(averages, weights, 1 - decay_at(int(updates), decay))

    model = AveragedModel(network, multi_avg_fn=update)
    model.n_averaged.fill_(1)  # at 0 the first update would take the weights as they are then
    model.requires_grad_(False)
    return model


def warm_up(step: int, steps: int) -> float:
    """Factor of the learning rate at step 0, 1, ...: rises linearly to 1 over `steps`."""
    return min(1.0, (step + 1) / max(1, steps))


def weights_of(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of everything that is saved of a network, by name, on the CPU."""
    return {name: value.detach().cpu().clone() for name, value in network.state_dict().items()}


def with_weights(network: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> Any:
    """A copy of a network with these weights, for evaluation."""
    made = copy.deepcopy(network)
    made.load_state_dict(dict(weights))
    return made.eval().requires_grad_(False)
