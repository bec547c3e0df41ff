"""Per-sample perturbation: latents moved within a box so that the predicted density of their images rises or falls.

Algorithm 1 of arXiv 2407.08659, projected gradient descent on the sign of the gradient. Knows no generator, predictor or file.
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


@dataclass(frozen=True)
class Perturbed:
    """The best iterate of each of B samples, and how it was reached; everything on the device of the latents.

    Attributes:
        latents: z + delta, float [B, ...]. delta: within [-epsilon, epsilon] element by element.
        images: that belong to it, as the score gave them. before_images: those of z itself.
        score_before, score: of z and of the best iterate, float [B].
        trace: scores of all iterates, float [T + 1, B]; with a random start they begin at that, not at z.
        flat: bool [B], the first gradient was zero in every element. not_finite: bool [B], a score or a gradient was not finite.
    """

    latents: torch.Tensor
    delta: torch.Tensor
    images: torch.Tensor
    before_images: torch.Tensor
    score_before: torch.Tensor
    score: torch.Tensor
    trace: torch.Tensor
    flat: torch.Tensor
    not_finite: torch.Tensor


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
    """Algorithm 1: delta <- clip(delta + direction * alpha * sign(gradient of the score), -epsilon, epsilon), T times from 0.

    Beyond Algorithm 1: of the T + 1 iterates the best one is kept, not the last (a step of fixed size oscillates about an
    optimum), and z itself counts as one, so that a sample that cannot be moved stays as it is. A sample whose score or gradient
    is not finite takes no step there. Costs T passes forward and backward and one forward, and one forward more with a random
    start, which z itself is not an iterate of.

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
    best = _Best(sign)
    delta = torch.zeros_like(z)
    if random_start is not None:
        with torch.no_grad():
            best.see(*score(z), delta)
        delta = _drawn(random_start, z, bound)
    trace, flat = [], torch.zeros(len(z), dtype=torch.bool, device=z.device)
    for step in range(steps):
        value, images, gradient = _differentiated(score, z, delta)
        best.see(value, images, delta)
        best.not_finite |= ~_rows(torch.isfinite(gradient)).all(dim=1)
        trace.append(value)
        if step == 0:
            flat = (_rows(gradient) == 0).all(dim=1)
        move = torch.where(_like(_rows(torch.isfinite(gradient)).all(dim=1), z), gradient.sign(), 0.0)
        delta = (delta + alpha * _like(sign, z) * move).clamp(-bound, bound)
    with torch.no_grad():
        value, images = score(z + delta)
    best.see(value, images, delta)
    trace.append(value.detach())
    return best.result(z, torch.stack(trace), flat)


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


def _rows(values: torch.Tensor) -> torch.Tensor:
    """[B, ...] as [B, elements]."""
    return values.reshape(len(values), -1)


def _like(per_sample: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """[B] as [B, 1, ...], to go with values [B, ...]."""
    return per_sample.view(-1, *(1 for _ in values.shape[1:]))


class _Best:
    """The best iterate of each sample so far; the first that is seen is z itself, or the start if there is no other."""

    def __init__(self, sign: torch.Tensor) -> None:
        self.sign = sign
        self.seen = False

    def see(self, value: torch.Tensor, images: torch.Tensor, delta: torch.Tensor) -> None:
        """Keep what is better. Equal is not better: of two the earlier one moved less."""
        import torch

        value, images = value.detach(), images.detach()
        if not self.seen:
            self.seen = True
            self.before, self.before_images = value, images
            self.value, self.images, self.delta = value, images, delta
            self.not_finite = ~torch.isfinite(value)
            return
        finite = torch.isfinite(value)
        self.not_finite |= ~finite
        better = finite & (~torch.isfinite(self.value) | (self.sign * value > self.sign * self.value))
        self.value = torch.where(better, value, self.value)
        self.images = torch.where(_like(better, images), images, self.images)
        self.delta = torch.where(_like(better, delta), delta, self.delta)

    def result(self, z: torch.Tensor, trace: torch.Tensor, flat: torch.Tensor) -> Perturbed:
        """All of it, of the latents z."""
        return Perturbed(
            latents=z + self.delta,
            delta=self.delta,
            images=self.images,
            before_images=self.before_images,
            score_before=self.before,
            score=self.value,
            trace=trace,
            flat=flat,
            not_finite=self.not_finite,
        )
