"""Log-volumes against closed forms and against Jacobians that autograd forms whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from pd_core.core.errors import UserError
from pd_core.core.settings.generate import GeneratorSettings
from pd_core.generate import volume
from pd_core.generate.volume import Volume
from pd_core.generators import noise, protocol
from pd_core.generators.open import open_generator
from tests import tiny_generators

Decode = Callable[[torch.Tensor], torch.Tensor]
SEEDS = [3, 2**62 + 1, 8, 11]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def linear(singular_values: list[float], outputs: int, dtype: torch.dtype = torch.float64) -> tuple[Decode, int]:
    """z to [B, 1, outputs, 1], of a matrix with these singular values."""
    d = len(singular_values)
    rng = np.random.default_rng(0)
    u, _ = np.linalg.qr(rng.normal(size=(outputs, d)))
    v, _ = np.linalg.qr(rng.normal(size=(d, d)))
    matrix = torch.from_numpy(u * np.array(singular_values) @ v.T).to(dtype)
    return lambda z: (z @ matrix.T)[:, None, :, None], d


def whole(decode: Decode, latents: torch.Tensor) -> np.ndarray:
    """All singular values of each sample's Jacobian, descending: reverse mode, a pass for every output."""
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        latents = latents.clone().requires_grad_(True)
        outputs = decode(latents).flatten(1).sum(0)  # of a batch: a sample's outputs depend on its own latent alone
        rows = [torch.autograd.grad(one, latents, retain_graph=True)[0].flatten(1) for one in outputs]
        return torch.linalg.svdvals(torch.stack(rows, dim=1).double()).numpy()


def log_volumes(
    decode: Decode, latents: torch.Tensor, seeds: Sequence[int], how: Volume, name: str = "G"
) -> np.ndarray:
    return volume.log_volume(volume.top_singular_values(decode, latents, seeds, how, name))


def conv_gan(dim: int = 24, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [torch.nn.Linear(dim, 16 * 16), torch.nn.ReLU(), torch.nn.Unflatten(1, (16, 4, 4))]
        layers += [torch.nn.ConvTranspose2d(16, 8, 4, 2, 1), torch.nn.BatchNorm2d(8), torch.nn.LeakyReLU(0.2)]
        layers += [torch.nn.ConvTranspose2d(8, 3, 4, 2, 1), torch.nn.Tanh()]
        return torch.nn.Sequential(*layers).eval().to(dtype)


# ---- closed forms ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outputs", [20, 64])
def test_of_a_linear_generator_they_are_those_of_its_matrix(outputs: int) -> None:
    """σ_i = 2^-i, r = 4, three products with J^T J: the share of the 5th and later directions in V falls by
    (σ_5/σ_4)^6 = 2^-6 or more with the plain power, by (σ_13/σ_4)^2 = 2^-18 a product with the 12 directions that the
    first three blocks have caught; it enters squared. The worst of 4 values is off by far less than 1e-5, and only
    downwards.
    """
    wanted = [2.0**-i for i in range(20)]
    decode, d = linear(wanted, outputs)
    found = volume.top_singular_values(decode, torch.zeros(4, d, dtype=torch.float64), SEEDS, Volume(4))
    assert found.dtype == np.float64 and found.shape == (4, 4)
    assert (found <= np.array(wanted[:4]) * (1 + 1e-12)).all()
    np.testing.assert_allclose(found, np.tile(wanted[:4], (4, 1)), rtol=1e-5)
    v = log_volumes(decode, torch.zeros(4, d, dtype=torch.float64), SEEDS, Volume(4))
    np.testing.assert_allclose(v, -6 * math.log(2), atol=4e-5)


def test_of_a_nonlinear_map_in_closed_form() -> None:
    """x_i = exp(a_i z_i) has σ_i = a_i exp(a_i z_i), and v = Σ log a_i + Σ a_i z_i."""
    a = torch.tensor([0.5, 1.0, 1.5, 2.0], dtype=torch.float64)
    z = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = log_volumes(lambda z: torch.exp(a * z), z, range(6), Volume(4))
    np.testing.assert_allclose(found, (a.log().sum() + z @ a).numpy(), rtol=1e-12)


def test_repeated_singular_values_are_all_found() -> None:
    """A Krylov space of one vector would hold one direction of each."""
    decode, d = linear([3.0] * 5 + [1.0] * 15, 30)
    found = volume.top_singular_values(decode, torch.zeros(2, d, dtype=torch.float64), [1, 2], Volume(7))
    np.testing.assert_allclose(found, np.tile([3.0] * 5 + [1.0] * 2, (2, 1)), rtol=1e-12)


@pytest.mark.parametrize("rotated", ["latents", "images"])
def test_rotations_change_nothing(rotated: str) -> None:
    """σ of Q J P are those of J; with V over all latents exactly, in float64."""
    gan, d = conv_gan(dtype=torch.float64), 24
    rng = np.random.default_rng(1)
    turn = torch.from_numpy(np.linalg.qr(rng.normal(size=(d, d)))[0])
    swap = torch.from_numpy(np.linalg.qr(rng.normal(size=(768, 768)))[0])
    z = torch.from_numpy(rng.normal(size=(3, d)))
    plain = log_volumes(gan, z, [1, 2, 3], Volume(8))
    if rotated == "latents":
        turned = log_volumes(lambda x: gan(x @ turn.T), z @ turn, [1, 2, 3], Volume(8))
    else:
        turned = log_volumes(lambda x: gan(x).flatten(1) @ swap, z, [1, 2, 3], Volume(8))
    np.testing.assert_allclose(turned, plain, rtol=1e-10)


# ---- whole Jacobians -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [None, 4])
def test_of_a_convolutional_generator(size: int | None) -> None:
    """24 latents, 4 blocks of 8: V spans all, and what is left is the rounding of float32 products, some 1e-7 of σ_1
    each.
    """
    gan = conv_gan()
    z = noise.normal_latents(SEEDS, (24,))
    expected = whole(lambda x: volume.averaged(gan(x), size), z)[:, :8]
    found = volume.top_singular_values(gan, z, SEEDS, Volume(8, size))
    np.testing.assert_allclose(found, expected, atol=3e-6 * float(expected.max()), rtol=0)


def test_of_a_wide_generator_whose_latents_the_probes_do_not_span() -> None:
    """256 latents, 32 directions; a random network, whose spectrum is flat: never too large, in the same order, nearer
    with
    each block (what is missing falls as a Chebyshev polynomial of the blocks, Musco & Musco 2015, theorem 1)."""
    gan = conv_gan(256)
    seeds = list(range(8))
    z = noise.normal_latents(seeds, (256,))
    expected = whole(gan, z)[:, :8]
    missing = []
    for iterations in (1, 3, 6):
        found = volume.top_singular_values(gan, z, seeds, Volume(8, iterations=iterations))
        assert (found <= expected + 3e-6 * expected.max()).all()
        missing.append(float((np.log(expected) - np.log(found)).sum(1).mean()))
        if iterations == 3:
            order = np.corrcoef(np.log(found).sum(1), np.log(expected).sum(1))[0, 1]
    assert missing[0] > 3 * missing[1] > 9 * missing[2] >= 0, missing
    assert order > 0.9


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_of_diffusion_through_its_checkpoints(tmp_path: Path) -> None:
    """DDIM in 2 steps at 16 px: 768 latents to 12 values. 3 blocks of 4 J^T Q span the rows of J: exact but for
    rounding.
    """
    settings = GeneratorSettings(path=tiny_generators.save_ddim(tmp_path / "ddim"), steps=2)
    generator = open_generator(settings)
    assert isinstance(generator, protocol.LatentGenerator)
    decode = lambda z: generator.decode(z, protocol.Conditions())  # noqa: E731
    z = generator.latents([5, 6])
    expected = whole(lambda x: volume.averaged(decode(x), 2), z)[:, :4]
    found = volume.top_singular_values(decode, z, [5, 6], Volume(4, 2))
    np.testing.assert_allclose(found, expected, atol=1e-5 * float(expected.max()), rtol=0)


@pytest.mark.filterwarnings("ignore:.*TorchScript.*", "ignore:.*torch.jit.*")
def test_of_torchscript_it_is_that_of_the_module(tmp_path: Path) -> None:
    gan = conv_gan()
    torch.jit.save(torch.jit.script(gan), tmp_path / "gan.pt")
    settings = GeneratorSettings(kind="torchscript", path=str(tmp_path / "gan.pt"), latent_shape=(24,))
    generator = open_generator(settings)
    assert isinstance(generator, protocol.LatentGenerator)
    z = generator.latents(SEEDS)
    decode = lambda z: generator.decode(z, protocol.Conditions())  # noqa: E731
    first = log_volumes(decode, z, SEEDS, Volume(8))
    np.testing.assert_allclose(first, log_volumes(gan, z, SEEDS, Volume(8)), rtol=1e-6)
    for _ in range(3):  # TorchScript compiles anew after its first calls
        np.testing.assert_array_equal(log_volumes(decode, z, SEEDS, Volume(8)), first)


# ---- of a sample alone -----------------------------------------------------------------------------------------------


def test_a_samples_volume_does_not_depend_on_its_batch() -> None:
    """Up to the rounding of float32 sums in another batch; a probe of another seed would move it by far more."""
    gan = conv_gan(256)
    z = noise.normal_latents(SEEDS, (256,))
    together = log_volumes(gan, z, SEEDS, Volume(8))
    alone = [log_volumes(gan, z[i : i + 1], SEEDS[i : i + 1], Volume(8))[0] for i in range(4)]
    np.testing.assert_allclose(together, alone, atol=8 * 3e-6)
    order = [2, 0, 3, 1]
    shuffled = log_volumes(gan, z[order], [SEEDS[i] for i in order], Volume(8))
    np.testing.assert_allclose(shuffled, together[order], atol=8 * 3e-6)
    other = log_volumes(gan, z, [1, 2, 3, 4], Volume(8))
    assert np.abs(other - together).min() > 1e-4


def test_no_global_state_is_read_or_moved() -> None:
    gan, z = conv_gan(), noise.normal_latents(SEEDS, (24,))
    before = torch.are_deterministic_algorithms_enabled()
    with protocol.own_randomness("volumes", "cpu"):
        first = log_volumes(gan, z, SEEDS, Volume(4, iterations=1))
    torch.manual_seed(99)
    np.testing.assert_array_equal(log_volumes(gan, z, SEEDS, Volume(4, iterations=1)), first)
    assert torch.are_deterministic_algorithms_enabled() == before


# ---- degenerate, and refused -----------------------------------------------------------------------------------------


def test_singular_values_of_zero_are_floored_and_counted() -> None:
    decode, d = linear([4.0, 1.0] + [0.0] * 6, 10)
    found = volume.top_singular_values(decode, torch.zeros(2, d, dtype=torch.float64), [1, 2], Volume(3))
    np.testing.assert_array_equal(volume.floored(found), [True, True])
    np.testing.assert_allclose(volume.log_volume(found), math.log(4.0 * 1.0 * 4.0 * volume.FLOOR), rtol=1e-9)
    np.testing.assert_array_equal(volume.floored(found[:, :2]), [False, False])


def test_a_sample_that_does_not_move_has_a_finite_volume() -> None:
    found = volume.top_singular_values(lambda z: 0 * z, torch.zeros(2, 4), [1, 2], Volume(3))
    assert np.isfinite(volume.log_volume(found)).all() and volume.floored(found).all()


class Halved(torch.autograd.Function):
    """Twice its input, with a derivative forwards that is right and one backwards that is not."""

    @staticmethod
    def forward(z):
        return 2 * z

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        return gradient

    @staticmethod
    def jvp(ctx, tangent):
        return 2 * tangent


@pytest.mark.parametrize(
    ("decode", "expected"),
    [
        (lambda z: torch.zeros(len(z), 3, 4, 4), "do not depend on latents"),
        (lambda z: z.detach().view(-1, 1, 2, 4), "do not depend on latents"),
        (Halved.apply, "forwards and backwards disagree"),
        (lambda z: z[:, :2], "set --weighting.rank to at most 2"),
        (lambda z: z[:, None, None, :6], "set --weighting.output_size to a divisor"),
    ],
    ids=["constant", "detached", "own gradient", "rank", "size"],
)
def test_what_has_no_volume_is_refused_in_one_line(decode: Decode, expected: str) -> None:
    with pytest.raises(UserError, match=expected) as raised:
        log_volumes(decode, torch.randn(2, 8), [1, 2], Volume(3, 4), "--generator.path X")
    assert str(raised.value).startswith("--generator.path X: ") and "\n" not in str(raised.value)
    assert str(raised.value).endswith(volume.INSTEAD)


def test_derivatives_that_are_not_finite_are_an_error() -> None:
    with pytest.raises(ValueError, match="not finite"):
        log_volumes(lambda z: torch.sqrt(z), torch.zeros(2, 8), [1, 2], Volume(3))
