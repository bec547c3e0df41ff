"""Projected gradient descent held to closed forms."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pd_core.perturb import algorithm
from pd_core.perturb.algorithm import NoGradientError, perturb


def latents(rows: int = 4, dim: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))


def with_images(function):
    """The images are the latents, so that they can be told from each other."""
    return lambda z: (function(z), z.clone())


WEIGHTS = torch.tensor([1.0, -2.0, 0.5, 0.0, -0.25, 3.0])


def linear(z: torch.Tensor) -> torch.Tensor:
    return z @ WEIGHTS


@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.parametrize("steps", [1, 3, 4, 10])
def test_a_linear_score_is_climbed_along_the_signs_of_its_weights(direction, steps):
    """delta = direction * min(T alpha, epsilon) * sign(w), and the score moves by that times the 1-norm of w. Sums of
    at most 10 float32 steps of 0.025: an error of 10 * 2^-24 relative."""
    z = latents()
    made = perturb(with_images(linear), z, direction, epsilon=0.1, step_size=0.025, steps=steps)
    length = min(steps * 0.025, 0.1)
    torch.testing.assert_close(made.delta, (direction * length * WEIGHTS.sign()).expand_as(z), rtol=1e-6, atol=1e-8)
    moved = direction * length * float(WEIGHTS.abs().sum())
    torch.testing.assert_close(made.score - made.score_before, torch.full((len(z),), moved), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(made.score_before, linear(z))
    torch.testing.assert_close(made.score, linear(made.latents))
    assert torch.equal(made.images, made.latents) and torch.equal(made.before_images, z)
    assert made.trace.shape == (steps + 1, len(z))


def test_each_sample_goes_in_its_own_direction_also_where_the_caller_has_switched_gradients_off():
    with torch.no_grad():
        made = perturb(with_images(linear), latents(), torch.tensor([1, -1, -1, 1]), step_size=0.025)
    assert ((made.score - made.score_before).sign() == torch.tensor([1, -1, -1, 1])).all()
    assert not made.latents.requires_grad


@given(
    epsilon=st.floats(1e-3, 10),
    ratio=st.floats(0.01, 5),
    steps=st.integers(1, 8),
    seed=st.integers(0, 2**32),
    start=st.booleans(),
    direction=st.sampled_from([1, -1]),
)
@settings(max_examples=60, deadline=None)
def test_the_box_holds_and_the_best_is_at_least_as_good_as_the_start(epsilon, ratio, steps, seed, start, direction):
    """|delta| <= epsilon as it was given, in float64, whatever float32 makes of it."""
    z = latents(3, 5, seed)
    wavy = lambda x: (torch.sin(7 * x) * x.cos()).sum(dim=1)  # noqa: E731
    seeds = [seed, seed + 1, seed + 2] if start else None
    made = perturb(with_images(wavy), z, direction, epsilon, ratio * epsilon, steps, seeds)
    assert float(made.delta.abs().max()) <= epsilon
    assert (direction * made.score >= direction * made.score_before).all()
    everything = torch.cat([made.score_before[None], made.trace])
    assert torch.equal(direction * made.score, (direction * everything).amax(dim=0))


def test_the_best_iterate_is_kept_where_the_score_oscillates():
    """-|x - 0.05| from 0 with steps of 0.04: 0, 0.04, 0.08, 0.04, 0.08, ... The best is 0.04, the last of three steps
    0.04 or 0.08; after an even number of steps the last one is the worse."""
    z = torch.zeros(1, 1)
    made = perturb(with_images(lambda x: -(x - 0.05).abs().sum(dim=1)), z, 1, epsilon=0.1, step_size=0.04, steps=4)
    assert float(made.trace[-1, 0]) == pytest.approx(-0.03, abs=1e-6)
    assert float(made.delta) == pytest.approx(0.04, abs=1e-6)
    assert float(made.score) == pytest.approx(-0.01, abs=1e-6)


def test_a_sample_at_its_optimum_stays_where_it_is():
    made = perturb(with_images(lambda x: -x.square().sum(dim=1)), torch.zeros(2, 3), 1)
    assert (made.delta == 0).all() and (made.score == made.score_before).all() and made.flat.all()


def test_a_row_does_not_depend_on_its_batch():
    z = latents(5)
    curved = lambda x: torch.sin(3 * x).sum(dim=1)  # noqa: E731
    together = perturb(with_images(curved), z, 1, random_start=[1, 2, 3, 4, 5])
    alone = perturb(with_images(curved), z[2:3], 1, random_start=[3])
    assert torch.equal(together.latents[2:3], alone.latents)


def test_a_random_start_is_a_function_of_its_seed_and_fills_the_box():
    z = torch.zeros(2, 10_000)
    score = with_images(lambda x: (0.0 * x).sum(dim=1) + x[:, 0].abs())
    made, again = (perturb(score, z, 1, 0.2, 1e-9, 1, [7, 8]) for _ in range(2))
    assert torch.equal(made.delta, again.delta) and not torch.equal(made.delta[0], made.delta[1])
    # uniform in [-0.2, 0.2]: mean 0 with a standard error of 0.4 / sqrt(12 * 10^4), here 5 of them; variance 0.4^2 / 12
    assert abs(float(made.delta.mean())) < 5 * 0.4 / math.sqrt(12 * 20_000)
    assert float(made.delta.var()) == pytest.approx(0.4**2 / 12, rel=0.05)
    assert torch.equal(made.before_images, z)  # before is z itself, not the start


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("start", [False, True])
def test_passes_are_counted(steps, start):
    """T with a gradient and one without; with a random start one more, for z itself."""
    passes = []

    def score(x):
        passes.append(torch.is_grad_enabled())
        return linear(x), x

    perturb(score, latents(), 1, steps=steps, random_start=[0, 1, 2, 3] if start else None)
    assert passes.count(True) == steps and passes.count(False) == 1 + start


def test_a_sample_that_is_not_finite_keeps_its_best_and_disturbs_no_other():
    """Row 1 climbs -sqrt(0.12 - x - y), which ends between its steps at 0.1 and 0.2; row 2 has no score."""

    def score(x):
        value = x.sum(dim=1)
        return torch.stack([value[0], -(0.12 - value[1]).sqrt(), value[2] * math.nan]), x

    made = perturb(score, torch.zeros(3, 2), 1, epsilon=0.2, step_size=0.05, steps=6)
    assert float(made.score[0]) == pytest.approx(0.4)
    assert float(made.score[1]) == pytest.approx(-math.sqrt(0.02), rel=1e-5)
    assert made.delta[1].tolist() == pytest.approx([0.05, 0.05]) and (made.delta[2] == 0).all()
    assert made.not_finite.tolist() == [False, True, True]


@pytest.mark.parametrize("score", [lambda x: linear(x.detach()), lambda x: torch.ones(len(x), requires_grad=True)])
def test_a_score_that_is_no_function_of_the_latents_is_refused(score):
    with pytest.raises(NoGradientError):
        perturb(with_images(score), latents(), 1)


@pytest.mark.parametrize("wrong", [{"epsilon": 0.0}, {"steps": 0}, {"step_size": -0.1}])
def test_what_makes_no_sense_is_refused(wrong):
    with pytest.raises(ValueError, match="must be positive"):
        perturb(with_images(linear), latents(), 1, **wrong)


@given(st.floats(1e-6, 1e3))
def test_the_bound_in_float32_is_the_largest_that_does_not_exceed(epsilon):
    bound = algorithm._at_most(epsilon)
    assert bound <= epsilon < float(np.nextafter(np.float32(bound), np.float32(np.inf)))
