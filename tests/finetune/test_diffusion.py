"""The diffusion loop: its losses against closed forms, every kind of prediction, and steps that nothing but their
number decides.
"""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pd_core.core.errors import RunError, UserError
from pd_core.core.settings.finetune import TrainingSettings
from pd_core.core.settings.generate import GeneratorSettings
from pd_core.finetune import averaging, parallel
from pd_core.finetune.models import diffusion
from pd_core.finetune.protocol import Batch, Share
from pd_core.generators.open import open_generator
from pd_core.generators.protocol import Conditions
from tests import tiny_generators

ALONE = Share(0, 1, "cpu", 1)
B = 4


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def batch(step: int, size: tuple[int, int], label: str | None = None, images: int = B) -> Batch:
    pixels = np.random.default_rng(step).integers(0, 256, (images, *size, 3), dtype=np.uint8)
    return Batch(step, step * images, np.arange(images), np.ones(images), (label,) * images, pixels)


def model(path: str, classes: dict[str, int] | None = None, share: Share = ALONE, **settings: Any) -> Any:
    training = TrainingSettings(batch_size=B, **settings)
    return diffusion.DiffusionModel(GeneratorSettings(path=path, steps=2), training, share, 7, classes or {})


def save_ddpm(folder: Path, **scheduler: Any) -> str:
    """The tiny DDPM with a scheduler of other settings."""
    from diffusers import DDPMPipeline, DDPMScheduler

    return tiny_generators._save(DDPMPipeline(tiny_generators.unet(), DDPMScheduler(**scheduler)), folder)


def save_flow(folder: Path) -> str:
    from diffusers import DDPMPipeline, FlowMatchEulerDiscreteScheduler

    return tiny_generators._save(
        DDPMPipeline(tiny_generators.unet(), FlowMatchEulerDiscreteScheduler(shift=3.0)), folder
    )


def save_digits_unet(folder: Path) -> str:
    """One colour channel and ten classes."""
    from diffusers import DDPMPipeline, DDPMScheduler

    return tiny_generators._save(DDPMPipeline(tiny_generators.unet(10, channels=1), DDPMScheduler()), folder)


KINDS: dict[str, Any] = {
    "epsilon": lambda folder: save_ddpm(folder),
    "sample": lambda folder: save_ddpm(folder, prediction_type="sample"),
    "v_prediction": lambda folder: save_ddpm(folder, prediction_type="v_prediction"),
    "flow": save_flow,
    "latent, vector-quantised": tiny_generators.save_ldm,
    "transformer with a variance": tiny_generators.save_dit,
    "transformer": lambda folder: tiny_generators.save_dit(folder, learned_variance=False),
    "classes, one channel": save_digits_unet,
}
LABELLED = ("transformer with a variance", "transformer", "classes, one channel")


# ---- the loss --------------------------------------------------------------------------------------------------------


def latents_and_noise() -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    return torch.randn(3, 2, 4, 4, generator=random), torch.randn(3, 2, 4, 4, generator=random)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_targets_undo_the_noise(prediction):
    """From x_t and the target itself, x comes back by the algebra of docs/method.md, section 5, whatever the level."""
    from diffusers import DDPMScheduler

    saved = DDPMScheduler(prediction_type=prediction)
    process = diffusion.process_of(saved, None, 2, 2, "here")
    x, noise = latents_and_noise()
    level = torch.tensor([0, 500, 999])
    noisy, timesteps, target = process.noisy(x, noise, level)
    assert timesteps.tolist() == level.tolist()
    alpha = saved.alphas_cumprod[level].sqrt().view(-1, 1, 1, 1)
    sigma = (1 - saved.alphas_cumprod[level]).sqrt().view(-1, 1, 1, 1)
    back = {
        "epsilon": (noisy - sigma * target) / alpha,
        "sample": target,
        "v_prediction": alpha * noisy - sigma * target,
    }[prediction]
    # float32: x is multiplied by alpha and divided by it again, at level 999 by 0.0063, which costs 2 to 3 of 7 digits
    torch.testing.assert_close(back, x, atol=2e-3, rtol=0)
    assert not torch.allclose(noisy, x, atol=0.1)


def test_flow_goes_from_the_image_to_the_noise_on_the_schedulers_own_levels():
    from diffusers import FlowMatchEulerDiscreteScheduler

    saved = FlowMatchEulerDiscreteScheduler(shift=3.0)
    process = diffusion.process_of(saved, None, 2, 2, "here")
    x, noise = latents_and_noise()
    level = torch.tensor([0, 400, process.levels - 1])
    noisy, timesteps, target = process.noisy(x, noise, level)
    u = 1 - level.float() / 1000  # level 0 is all noise
    sigma = 3 * u / (1 + 2 * u)  # Esser et al. 2024, equation 23
    torch.testing.assert_close(
        timesteps, sigma * 1000, rtol=1e-4, atol=1e-4
    )  # 1 - u in float32 loses a digit near the image
    torch.testing.assert_close(noisy, x + sigma.view(-1, 1, 1, 1) * target)
    torch.testing.assert_close(target, noise - x)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_min_snr_is_one_loss_of_the_image_whatever_is_predicted(prediction):
    """Hang et al. 2023: with the same image guessed, every kind of prediction has the loss min(SNR, gamma) |x -
    x'|^2.
    """
    from diffusers import DDPMScheduler

    saved = DDPMScheduler(prediction_type=prediction)
    process = diffusion.process_of(saved, 5.0, 2, 2, "here")
    x, noise = latents_and_noise()
    guess = x + 0.1
    level = torch.tensor([10, 300, 800])
    noisy, _, target = process.noisy(x, noise, level)
    alphas = saved.alphas_cumprod[level].double()
    alpha, sigma = alphas.sqrt().view(-1, 1, 1, 1), (1 - alphas).sqrt().view(-1, 1, 1, 1)
    guessed_noise = (noisy - alpha * guess) / sigma
    predicted = {"epsilon": guessed_noise, "sample": guess, "v_prediction": alpha * guessed_noise - sigma * guess}[
        prediction
    ]
    loss = (predicted - target).square().mean((1, 2, 3)) * process.weight(level)
    expected = (alphas / (1 - alphas)).clamp(max=5.0) * 0.01
    torch.testing.assert_close(
        loss.double(), expected, rtol=1e-3, atol=0
    )  # float32 noise, divided by sigma 0.03 at level 10


def test_the_loss_is_that_of_the_networks_prediction(tmp_path):
    """A network whose output is known: zero weights in its last layer predict 0, so that the loss is the mean of
    noise^2.
    """
    opened = model(save_ddpm(tmp_path / "ddpm"), learning_rate=1e-12, accumulate=2)
    with torch.no_grad():
        opened.network.conv_out.weight.zero_()
        opened.network.conv_out.bias.zero_()
    given = batch(3, opened.size)
    expected = opened._noise(given.positions, "noise").square().mean().item()
    assert opened.step(given)["loss"] == pytest.approx(expected, rel=1e-6)


# ---- every kind trains -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_prediction_trains_samples_and_is_saved_as_it_came(kind, tmp_path):
    path = KINDS[kind](tmp_path / "pipeline")
    classes = {"7": 7} if kind in LABELLED else {}
    opened = model(path, classes, learning_rate=2e-3, warmup_steps=0, ema_decay=0.5)
    given = batch(0, opened.size, "7")
    losses = [opened.step(given)["loss"] for _ in range(25)]
    # one batch, one noise: the same step over and over has to be learned
    assert losses[-1] < 0.9 * losses[0], losses
    conditions = Conditions(labels=(7, 7)) if classes else Conditions()
    weights = opened.averaged()
    images = opened.sampler(weights).generate([1, 2], conditions)
    opened.save(str(tmp_path / "out"), weights)
    again = open_generator(GeneratorSettings(path=str(tmp_path / "out"), steps=2))
    assert torch.equal(again.generate([1, 2], conditions), images)
    before = open_generator(GeneratorSettings(path=path, steps=2)).generate([1, 2], conditions)
    assert not torch.equal(before, images), "the weights that were trained are not those that are saved"


def test_the_average_is_that_of_the_weights_step_by_step(tmp_path):
    opened = model(save_ddpm(tmp_path / "ddpm"), learning_rate=1e-2, warmup_steps=0, ema_decay=0.3)
    name = "conv_out.weight"
    expected = opened.network.state_dict()[name].clone()
    for step in range(4):
        opened.step(batch(step, opened.size))
        decay = min(0.3, (1 + step + 1) / (10 + step + 1))
        expected = decay * expected + (1 - decay) * opened.network.state_dict()[name]
    torch.testing.assert_close(opened.averaged()[name], expected, rtol=1e-5, atol=1e-7)


def test_learning_rate_rises_to_its_value():
    assert [averaging.warm_up(step, 4) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert averaging.warm_up(0, 0) == 1.0


# ---- a function of seed and step -------------------------------------------------------------------------------------


def bytes_of(opened: Any) -> list[bytes]:
    return [
        value.numpy().tobytes()
        for state in (opened.network.state_dict(), opened.averaged())
        for value in state.values()
    ]


def test_a_run_that_is_taken_up_ends_with_the_same_bits(tmp_path):
    path = save_ddpm(tmp_path / "ddpm")
    whole = model(path, accumulate=2)
    for step in range(5):
        whole.step(batch(step, whole.size))
    first = model(path, accumulate=2)
    for step in range(2):
        first.step(batch(step, first.size))
    sink = io.BytesIO()
    torch.save(state := first.state(), sink)
    # states that earlier releases wrote are opened by these names
    assert set(state) == {"network", "averaged", "optimizer", "scaler"}
    assert set(state["averaged"]) == {"n_averaged", *(f"module.{name}" for name in state["network"])}
    torch.rand(3)  # the global random state is nobody's
    second = model(path, accumulate=2)
    second.load_state(torch.load(io.BytesIO(sink.getvalue()), weights_only=True))
    for step in range(2, 5):
        second.step(batch(step, second.size))
    assert bytes_of(second) == bytes_of(whole)


def test_dropout_is_drawn_by_seed_and_step_and_leaves_the_global_state(tmp_path):
    """The transformer drops labels at random."""
    path = tiny_generators.save_dit(tmp_path / "dit")
    before = torch.get_rng_state()
    one, other = (model(path, {"1": 1}) for _ in range(2))
    losses = [m.step(batch(0, m.size, "1"))["loss"] for m in (one, other)]
    assert losses[0] == losses[1] and torch.equal(torch.get_rng_state(), before)
    with parallel.own_random_state(7, 0, ALONE):
        first = torch.rand(2)
    with parallel.own_random_state(7, 1, ALONE):
        assert not torch.equal(first, torch.rand(2))
    with parallel.own_random_state(7, 0, Share(1, 2, "cpu", 1)):
        assert not torch.equal(first, torch.rand(2))


def test_noise_and_levels_are_those_of_the_draw_whoever_computes_it(tmp_path):
    path = save_ddpm(tmp_path / "ddpm")
    whole = model(path)
    halves = [model(path, share=Share(rank, 2, "cpu", 1)) for rank in range(2)]
    given = batch(5, whole.size)
    parts = [
        Batch(
            5,
            given.first + 2 * rank,
            given.sample_id[:2],
            given.density[:2],
            (None, None),
            given.pixels[2 * rank :][:2],
        )
        for rank in range(2)
    ]
    noise = torch.cat([m._noise(p.positions, "noise") for m, p in zip(halves, parts, strict=True)])
    assert torch.equal(noise, whole._noise(given.positions, "noise"))
    levels = np.concatenate([m._levels(p, p.positions) for m, p in zip(halves, parts, strict=True)])
    assert levels.tolist() == whole._levels(given, given.positions).tolist()
    spread = np.sort(levels)
    assert (np.diff(spread) == 250).all(), "four levels of a thousand, evenly apart"
    everything = np.concatenate([whole._levels(b, b.positions) for b in (batch(s, whole.size) for s in range(500))])
    # uniform: 2,000 draws in ten bins; stratified draws vary less than independent ones: chi-square's bound is generous
    counts = np.bincount(everything // 100, minlength=10)
    assert ((counts - 200) ** 2 / 200).sum() < 27.9  # 99.9% of chi-square with 9 degrees of freedom


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (tiny_generators.save_consistency, "ConsistencyModelPipeline cannot be fine-tuned here"),
        (tiny_generators.save_stable_diffusion, "StableDiffusionPipeline cannot be fine-tuned here"),
        (lambda f: save_unfit(f), "gives 4 channels for latents of 3; model and scheduler disagree"),
        (lambda f: save_lcm(f), "LCMScheduler belongs to a distilled"),
    ],
)
def test_models_that_cannot_be_trained_are_refused(make, message, tmp_path):
    with pytest.raises(UserError, match=message):
        model(make(tmp_path / "pipeline"))


def save_unfit(folder: Path) -> str:
    from diffusers import DDPMPipeline, DDPMScheduler

    return tiny_generators._save(DDPMPipeline(tiny_generators.unet(out_channels=4), DDPMScheduler()), folder)


def save_lcm(folder: Path) -> str:
    from diffusers import DDPMPipeline, LCMScheduler

    return tiny_generators._save(DDPMPipeline(tiny_generators.unet(), LCMScheduler()), folder)


def test_min_snr_means_nothing_for_a_flow(tmp_path):
    with pytest.raises(UserError, match=r"min_snr: has no meaning for flow matching"):
        model(save_flow(tmp_path / "flow"), min_snr=5.0)


def test_a_loss_that_is_not_finite_stops_before_the_weights_are_touched(tmp_path):
    opened = model(save_ddpm(tmp_path / "ddpm"))
    with torch.no_grad():
        opened.network.conv_out.bias.fill_(math.inf)
    before = bytes_of(opened)
    with pytest.raises(RunError, match=r"loss is (inf|nan).* at step 3 \(seed 7\)"):
        opened.step(batch(3, opened.size))
    assert bytes_of(opened) == before
