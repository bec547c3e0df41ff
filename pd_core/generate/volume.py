"""Log-volume of a generator at a latent: what Polarity Sampling and MaGNET weight samples by.

A generator G takes a small cube of latents around z to a patch of the image manifold whose volume is the product of the
singular values σ of the Jacobian J_G(z). Polarity Sampling (Humayun et al., arXiv 2203.01993) draws z with weights
exp(polarity · v), v = Σ log σ over the top r; MaGNET (arXiv 2110.08009) is polarity 1, uniform on the manifold.

J is never formed. J V is taken by forward-mode differentiation, J^T U by reverse mode: the two need neither a second
derivative nor memory beyond that of one gradient, and both pass through activation checkpoints and TorchScript.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pd_core.core import seeds as core_seeds
from pd_core.core import trust
from pd_core.core.errors import UserError, one_line
from pd_core.generators.noise import generators_of, normal

if TYPE_CHECKING:
    import torch

    Decode = Callable[[torch.Tensor], torch.Tensor]

FLOOR = 1e-6  # of a sample's largest singular value: about what float32 products tell a singular value by
ADJOINT_TOLERANCE = 1e-2  # far above float32 rounding, far below what a lost derivative makes
INSTEAD = "weigh by densities instead (--weighting.kind two_level)"  # the way out of each refusal, in generate's words


@dataclass(frozen=True)
class Volume:
    """How log-volumes are measured; part of what they are.

    Attributes:
        rank: r, singular values that count.
        output_size: images are averaged down to this side before they are differentiated, px; None: as they are.
            Another size gives other volumes, and memory grows with its square.
        iterations: products with J^T J; each costs r forward-mode and r reverse-mode passes, after r forward-mode ones.
    """

    rank: trust.Small
    output_size: trust.Small | None = None
    iterations: trust.Small = 3


def log_volume(singular_values: np.ndarray) -> np.ndarray:
    """v = Σ log σ, float64 [B], of singular values [B, r], descending (docs/method.md, section 6).

    A σ that is zero, or lost in the rounding of the products (`floored`), counts as FLOOR times the largest: v stays
    finite.
    """
    tiny = float(np.finfo(np.float32).tiny)  # of a sample that does not depend on its latent at all
    least = np.maximum(FLOOR * singular_values[:, :1], tiny)
    return np.log(np.maximum(singular_values, least)).sum(axis=1)


def floored(singular_values: np.ndarray) -> np.ndarray:
    """Whether a sample has a σ among its top r that `log_volume` takes for zero, bool [B]."""
    return singular_values[:, -1] <= FLOOR * singular_values[:, 0]


def top_singular_values(
    decode: Decode, latents: torch.Tensor, seeds: Sequence[int], volume: Volume, name: str = "the generator"
) -> np.ndarray:
    """The r largest singular values of J_G at each latent, descending, float64 [B, r].

    Randomised block Krylov iteration (Musco & Musco 2015, algorithm 2; with the first block as in Halko, Martinsson &
    Tropp 2011, algorithm 4.1), for all samples of the batch together: V spans J^T J's powers up to `iterations` times r
    Gaussian probes, and the values are those of J V. They are never too large, and exact, to rounding, where V spans
    all latents. For as many products they are nearer than those of a subspace iteration, which forgets the blocks
    before the last (docs/log.md).

    Args:
        decode: latents [B, ...] to images [B, ...], differentiable, row i of one from row i of the other alone.
        latents: float [B, ...].
        seeds: B integers in [0, 2^63); the probes of row i are drawn from a seed that seeds[i] gives.
        volume: how.
        name: the generator as the user knows it, for messages.

    Raises:
        UserError: not a differentiable function of latents, fewer than r dimensions, a size that images cannot be
            averaged to.
        ValueError: a derivative is not finite.
    """
    import torch

    jacobian = _Jacobian(decode, latents.detach(), volume, name)
    with _differentiable():
        # another stream than the latents', which a probe would repeat
        own = core_seeds.integers(np.asarray(seeds, dtype=np.int64), core_seeds.stream(0, "volume")).tolist()
        probes = normal(generators_of(own), (jacobian.inputs, volume.rank), latents.device)
        v = torch.linalg.qr(probes.double()).Q
        y = jacobian.forward(v)
        if (most := min(y.shape[1:])) < volume.rank:
            raise UserError(
                f"{name}: a map of {jacobian.inputs} latent dimensions to {y.shape[1]} values has no {volume.rank} "
                f"singular values; set --weighting.rank to at most {most}, or {INSTEAD}"
            )
        for _ in range(volume.iterations):
            if v.shape[2] == jacobian.inputs:
                break
            q, r = torch.linalg.qr(y[:, :, -volume.rank :])
            w = jacobian.backward(q)
            _check_adjoint(r, w.mT @ v[:, :, -volume.rank :], name)
            new = _beyond(v, w)
            v, y = torch.cat([v, new], dim=2), torch.cat([y, jacobian.forward(new)], dim=2)
    return torch.linalg.svdvals(y)[:, : volume.rank].cpu().numpy()


class _Jacobian:
    """Products with J of images, averaged to a size and flat, by latents, flat; for each sample by itself."""

    def __init__(self, decode: Decode, latents: torch.Tensor, volume: Volume, name: str):
        self.latents, self.name = latents, name
        self.inputs = latents[0].numel()
        self._decode, self._size = decode, volume.output_size

    def _images(self, latents: torch.Tensor) -> torch.Tensor:
        return averaged(self._decode(latents), self._size, self.name).flatten(1)

    def forward(self, v: torch.Tensor) -> torch.Tensor:
        """J V: float64 [B, d, l] to [B, m, l], a forward-mode pass per column."""
        import torch
        from torch.autograd import forward_ad

        columns = []
        for column in v.to(self.latents.dtype).unbind(2):
            with torch.no_grad(), forward_ad.dual_level(), self._explained():
                dual = forward_ad.make_dual(self.latents, column.reshape(self.latents.shape).contiguous())
                columns.append(self._known(forward_ad.unpack_dual(self._images(dual)).tangent))
        return _finite(torch.stack(columns, dim=2).double())

    def backward(self, u: torch.Tensor) -> torch.Tensor:
        """J^T U: float64 [B, m, l] to [B, d, l], one forward pass and a reverse-mode pass per column."""
        import torch

        latents = self.latents.clone().requires_grad_(True)
        with torch.enable_grad(), self._explained():
            images = self._images(latents)
            self._known(images.grad_fn)
            columns = []
            for column in u.to(images.dtype).unbind(2):
                (gradient,) = torch.autograd.grad(images, latents, column, retain_graph=True, allow_unused=True)
                columns.append(self._known(gradient).flatten(1))
        return _finite(torch.stack(columns, dim=2).double())

    def _known(self, found: Any) -> Any:
        if found is None:
            raise UserError(f"{self.name}: its images do not depend on latents by differentiable operations; {INSTEAD}")
        return found

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except NotImplementedError as error:  # torch, of operations without a derivative
            raise UserError(
                f"{self.name}: holds an operation that cannot be differentiated both ways ({one_line(error)}); "
                f"{INSTEAD}"
            ) from None


def _finite(products: torch.Tensor) -> torch.Tensor:
    if not bool(products.isfinite().all()):
        raise ValueError("derivatives of the generator are not finite")
    return products


def averaged(images: torch.Tensor, size: int | None, name: str = "the generator") -> torch.Tensor:
    """Images [B, C, H, W] as means over equal blocks, [B, C, h, w] with h and w at most `size` px; smaller ones stay.

    Raises:
        UserError: the sides are no multiples of the size.
    """
    if size is None or images.ndim != 4:
        return images
    batch, channels, height, width = images.shape
    factors = [max(1, side // size) for side in (height, width)]
    if any(side > size and side % size for side in (height, width)):
        raise UserError(
            f"{name}: its images of {height}x{width} px cannot be averaged to {size} px; set --weighting.output_size "
            f"to a divisor, or {INSTEAD}"
        )
    rows, columns = factors
    blocks = images.reshape(batch, channels, height // rows, rows, width // columns, columns)
    return blocks.mean(dim=(3, 5))


def _beyond(v: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Orthonormal columns that with those of v, [B, d, n], span w too, [B, d, r]: [B, d, min(r, d - n)]."""
    import torch

    return torch.linalg.qr(torch.cat([v, w], dim=2)).Q[:, :, v.shape[2] :]


def _check_adjoint(forward: torch.Tensor, backward: torch.Tensor, name: str) -> None:
    """Compare Q^T (J V), forward mode, with (J^T Q)^T V, reverse, [B, r, r]: custom or lost gradients part them."""
    wrong = (forward - backward).flatten(1).norm(dim=1) > ADJOINT_TOLERANCE * forward.flatten(1).norm(dim=1)
    if bool(wrong.any()):
        raise UserError(
            f"{name}: its derivatives forwards and backwards disagree, as with a gradient of its own making, and "
            f"volumes need the derivative of what it computes; {INSTEAD}"
        )


@contextlib.contextmanager
def _differentiable() -> Iterator[None]:
    """Operations that have both derivatives, and give the same bits each time.

    Fused attention has no forward mode, nor have kernels that TorchScript fuses on GPUs; reverse mode of some
    operations adds up in any order there, unless they are asked for another one.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    jit: Any = torch.jit  # typed in part
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with sdpa_kernel(SDPBackend.MATH), jit.optimized_execution(False):
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
