"""Per-sample perturbation: latents moved within a box so that the predicted density of their images rises or falls.

Algorithm 1 of arXiv 2407.08659, projected gradient descent on the sign of the gradient. Knows no generator, predictor
or file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pd_core.core.settings.generate import PERTURB_EPSILON, PERTURB_STEPS
from pd_core.generators.noise import generators_of

if TYPE_CHECKING:
    import torch

    # latents [B, ...] to (what shall rise or fall, float [B]; the images it was computed from, [B, ...])
    Score = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class NoGradientError(ValueError):
    """The score is no function of the latents, as far as autograd can see."""


@dataclass
class Perturbed:
    """The best iterate of each of B samples so far, and how it was reached; everything on the device of the latents.

    Attributes:
        before: z, float [B, ...]. sign: of each sample, 1 where its score shall rise.
        before_images, score_before: of z itself, as the score gave them; scores are float [B].
        delta: of the best iterate, within [-epsilon, epsilon] element by element. images, score: of z + delta.
        trace: scores of all iterates, float [T + 1, B]; with a random start they begin at that, not at z.
        flat: bool [B], the first gradient was zero in every element.
        not_finite: bool [B], a score or a gradient was not finite.
    """

    before: torch.Tensor
    sign: torch.Tensor
    before_images: torch.Tensor
    score_before: torch.Tensor
    delta: torch.Tensor
    images: torch.Tensor
    score: torch.Tensor
    trace: torch.Tensor
    flat: torch.Tensor
    not_finite: torch.Tensor

    @property
    def latents(self) -> torch.Tensor:
        """z + delta, float [B, ...]."""
        return self.before + self.delta

    def see(self, value: torch.Tensor, images: torch.Tensor, delta: torch.Tensor) -> None:
        """Keep what is better. Equal is not better: of two the earlier one moved less."""
        import torch

        finite = torch.isfinite(value)
        self.not_finite |= ~finite
        better = finite & (~torch.isfinite(self.score) | (self.sign * value > self.sign * self.score))
        self.score = torch.where(better, value, self.score)
        self.images = torch.where(_like(better, images), images, self.images)
        self.delta = torch.where(_like(better, delta), delta, self.delta)


def default_step_size(epsilon: float) -> float:
    """alpha of Algorithm 1 where none is given: epsilon / 4, as the authors' 0.025 for 0.1."""
    return epsilon / 4


def perturb(
    score: Score,
    latents: torch.Tensor,
    direction: int | torch.Tensor,
    epsilon: float = PERTURB_EPSILON,
    step_size: float | None = None,
    steps: int = PERTURB_STEPS,
    random_start: Sequence[int] | None = None,
) -> Perturbed:
    """Algorithm 1: delta <- clip(delta + direction * alpha * sign(gradient of the score), ±epsilon), T times from 0.

    Beyond Algorithm 1: of the T + 1 iterates the best one is kept, not the last (a step of fixed size oscillates about
    an optimum), and z itself counts as one, so that a sample that cannot be moved stays as it is. A sample whose score
    or gradient is not finite takes no step there. Costs T passes forward and backward and one forward, and one forward
    more with a random start, which z itself is not an iterate of.

    Args:
        score: row i of its results depends on row i of the latents alone.
        latents: z, float [B, ...].
        direction: 1 raises the score, -1 lowers it; or an int tensor [B] of these.
        epsilon: bound of |delta|, in units of a latent.
        step_size: alpha; None: `default_step_size`.
        steps: T.
        random_start: a seed for each sample, from which its first delta is drawn uniformly in the box; None: zeros.

    Raises:
        NoGradientError: the score cannot be differentiated by the latents.
    """
    import torch

    if epsilon <= 0 or steps < 1 or (step_size is not None and step_size <= 0):
        raise ValueError(f"epsilon {epsilon}, step_size {step_size} and steps {steps} must be positive")
    z = latents.detach()
    sign = torch.as_tensor(direction, dtype=z.dtype, device=z.device).expand(len(z))
    bound = _at_most(epsilon)
    alpha = default_step_size(epsilon) if step_size is None else step_size
    best, delta, trace = None, torch.zeros_like(z), []
    if random_start is not None:
        with torch.no_grad():
            best = _first(z, sign, *score(z))
        delta = _drawn(random_start, z, bound)
    for step in range(steps):
        value, images, gradient = _differentiated(score, z, delta)
        if best is None:
            best = _first(z, sign, value, images)
        else:
            best.see(value, images, delta)
        if step == 0:
            best.flat = (gradient.flatten(1) == 0).all(dim=1)
        finite = torch.isfinite(gradient).flatten(1).all(dim=1)
        best.not_finite |= ~finite
        trace.append(value)
        move = torch.where(_like(finite, z), gradient.sign(), 0.0)
        delta = (delta + alpha * _like(sign, z) * move).clamp(-bound, bound)
    assert best is not None
    with torch.no_grad():
        value, images = score(z + delta)
    best.see(value.detach(), images.detach(), delta)
    best.trace = torch.stack([*trace, value.detach()])
    return best


def _first(z: torch.Tensor, sign: torch.Tensor, value: torch.Tensor, images: torch.Tensor) -> Perturbed:
    """z itself as the best iterate."""
    import torch

    value, images, bad = value.detach(), images.detach(), ~torch.isfinite(value)
    return Perturbed(
        z, sign, images, value, torch.zeros_like(z), images, value, value[None], torch.zeros_like(bad), bad
    )


def _at_most(epsilon: float) -> float:
    """The largest float32 that does not exceed epsilon: latents are float32, and the bound is held as it was given."""
    bound = np.float32(epsilon)
    return float(np.nextafter(bound, np.float32(0)) if float(bound) > epsilon else bound)


def _drawn(seeds: Sequence[int], like: torch.Tensor, bound: float) -> torch.Tensor:
    """Uniform in [-bound, bound], row i from seeds[i] alone."""
    import torch

    rows = [torch.rand(*like.shape[1:], generator=generator) for generator in generators_of(seeds)]
    return ((2 * torch.stack(rows) - 1) * bound).to(like)


def _differentiated(
    score: Score, z: torch.Tensor, delta: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(score, images, gradient of the score by delta), all detached."""
    import torch

    with torch.enable_grad():
        moved = delta.clone().requires_grad_(True)
        value, images = score(z + moved)
        if not value.requires_grad:
            raise NoGradientError("the score does not depend on the latents")
        (gradient,) = torch.autograd.grad(value.sum(), moved, allow_unused=True)
    if gradient is None:
        raise NoGradientError("the score does not depend on the latents")
    return value.detach(), images.detach(), gradient


def _like(per_sample: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """[B] as [B, 1, ...], to go with values [B, ...]."""
    return per_sample.view(-1, *(1 for _ in values.shape[1:]))
