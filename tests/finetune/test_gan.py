"""Fine-tuning of GANs: the loop against plain ones, the choice of generated images against its distribution, saved
pairs.
"""

from __future__ import annotations

import copy
import io
import itertools
import json
import multiprocessing
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torch import nn
from torch.nn import functional as F

from demo import gan as demo_gan
from demo import train_gan
from pd_core.core import seeds as core_seeds
from pd_core.core.errors import RunError, UserError
from pd_core.core.settings.finetune import TrainingSettings
from pd_core.core.settings.generate import GeneratorSettings
from pd_core.core.settings.index import FeatureSettings
from pd_core.density import predictor as density_predictor
from pd_core.density.architecture import Architecture
from pd_core.density.scorer import Scorer
from pd_core.finetune import parallel
from pd_core.finetune.models.gan import VAIN, FakeSampling, Gan, choose, predicted, seeds_of, squared_gradients
from pd_core.finetune.parallel import average_gradients, sum_of
from pd_core.finetune.protocol import Batch, Share
from pd_core.generators.noise import normal_latents
from pd_core.generators.open import open_generator, open_pair
from pd_core.generators.pairs import Pair, load_weights
from pd_core.generators.protocol import Conditions, LatentGenerator, to_uint8
from pd_core.index import extractor
from tests import tiny
from tests.nvidia import StandIn

DOCS = Path(__file__).resolve().parents[2] / "docs" / "generators.md"
SIDE = 8
ALONE = Share(0, 1, "cpu", 1)
SETTINGS = TrainingSettings(
    batch_size=8, learning_rate=1e-2, warmup_steps=3, ema_decay=0.5, r1_weight=0.7, r1_interval=2
)
CLASSES = {"a": 2, "b": 0, "c": 1}


pytestmark = pytest.mark.usefixtures("one_thread")


# ---- A pair in a few lines -------------------------------------------------------------------------------------------


class Painter(nn.Module):
    """Latents [B, 4], and class numbers where there are any, to images [B, C, 8, 8] in [-1, 1]."""

    def __init__(self, colors: int = 3, num_classes: int = 0):
        super().__init__()
        self.num_classes, self.colors = num_classes, colors
        self.hidden, self.out = nn.Linear(4 + num_classes, 16), nn.Linear(16, colors * SIDE * SIDE)
        self.register_buffer("gain", torch.tensor(1.0))

    def forward(self, latents: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        if labels is not None:
            latents = torch.cat([latents, F.one_hot(labels, self.num_classes).float()], dim=1)
        return torch.tanh(self.gain * self.out(F.silu(self.hidden(latents)))).reshape(-1, self.colors, SIDE, SIDE)


class Critic(nn.Module):
    """Images to logits [B, 1]; the class has a say, and noise where it is asked for."""

    def __init__(self, colors: int = 3, num_classes: int = 0, dropout: float = 0.0):
        super().__init__()
        self.num_classes = num_classes
        self.conv, self.drop = nn.Conv2d(colors, 8, 3, stride=2, padding=1), nn.Dropout(dropout)
        self.out = nn.Linear(8 * 16 + num_classes, 1)

    def forward(self, images: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        x = self.drop(F.leaky_relu(self.conv(images), 0.2)).flatten(1)
        if labels is not None:
            x = torch.cat([x, F.one_hot(labels, self.num_classes).float()], dim=1)
        return self.out(x)


class Live:
    """A network as a `LatentGenerator`."""

    takes_prompts = False

    def __init__(self, network: nn.Module, num_classes: int = 0, latent: int = 4):
        self.network, self.num_classes, self.latent, self.decoded = network, num_classes, latent, 0

    def identity(self) -> dict[str, Any]:
        return {}

    def generate(self, seeds: Any, conditions: Conditions) -> torch.Tensor:
        with torch.no_grad():
            return to_uint8(self.decode(self.latents(seeds), conditions))

    def latents(self, seeds: Any) -> torch.Tensor:
        return normal_latents(seeds, (self.latent,))

    def decode(self, latents: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        self.decoded += 1
        given = () if conditions.labels is None else (torch.tensor(conditions.labels),)
        return self.network(latents, *given)


def pair_of(generator: nn.Module, discriminator: nn.Module, classes: int = 0, colors: int = 3, latent: int = 4) -> Pair:
    def judge(images: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        return discriminator(images) if labels is None else discriminator(images, labels)

    def sampler(weights: Mapping[str, torch.Tensor]) -> Live:
        other = copy.deepcopy(generator)
        other.load_state_dict(dict(weights))
        return Live(other, classes, latent)

    def save(folder: str, weights: Mapping[str, torch.Tensor]) -> None:
        raise NotImplementedError

    start = {name: tensor.clone() for name, tensor in generator.state_dict().items()}
    live = Live(generator, classes, latent)
    assert isinstance(live, LatentGenerator)
    return Pair(generator, discriminator, live, judge, start, colors, (SIDE, SIDE), sampler, save, "the critic")


def seeded(make: Callable[[], Any], seed: int = 0) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def small_pair(classes: int = 0, dropout: float = 0.0, seed: int = 0, colors: int = 3) -> Pair:
    return seeded(lambda: pair_of(Painter(colors, classes), Critic(colors, classes, dropout), classes, colors), seed)


def batch_of(step: int, rank: int = 0, world: int = 1, size: int = 8, pixels: np.ndarray | None = None) -> Batch:
    """This worker's draws of a step whose images, labels and ids are functions of the step and the draw."""
    place = np.arange(size * rank // world, size * (rank + 1) // world)
    images = np.stack(
        [np.random.default_rng([step, p]).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8) for p in place.tolist()]
    )
    labels = tuple("abc"[(step + p) % 3] for p in place.tolist())
    given = images if pixels is None else pixels[place]
    return Batch(step, step * size + int(place[0]), place + 100, np.ones(len(place)), labels, given)


def by_brightness(images: torch.Tensor) -> np.ndarray:
    """A density that is known: the mean grey level over 127.5."""
    return images.double().mean(dim=(1, 2, 3)).numpy() / 127.5


BRIGHT = FakeSampling(by_brightness, threshold=0.99, weight=0.1, max_candidates=200)


def bytes_of(gan: Gan) -> list[bytes]:
    state = gan.state()
    return [t.numpy().tobytes() for part in ("generator", "discriminator", "averaged") for t in state[part].values()]


# ---- One step against a plain one ------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [0, 3])
def test_steps_are_those_of_a_plain_loop(classes: int) -> None:
    """The same losses, written down once more with whole batches, autograd's own penalty and float64 kept out of it."""
    pair, plain = small_pair(classes), small_pair(classes)
    gan = Gan(pair, SETTINGS, ALONE, 5, CLASSES if classes else None)
    G, D = plain.generator, plain.discriminator
    g_adam = torch.optim.Adam(G.parameters(), betas=(0.0, 0.99))
    d_adam = torch.optim.Adam(D.parameters(), betas=(0.0, 0.99))
    for step in range(5):
        batch = batch_of(step)
        logged = gan.step(batch)
        for group in g_adam.param_groups + d_adam.param_groups:
            group["lr"] = 1e-2 * min(1.0, (step + 1) / 3)
        labels = (torch.tensor([CLASSES[str(label)] for label in batch.label]),) if classes else ()
        z = {
            name: normal_latents(
                seeds_of(
                    batch.positions, np.zeros(8, np.int64), core_seeds.stream(5, f"finetune/{name}-latent")
                ).tolist(),
                (4,),
            )
            for name in "dg"
        }
        real = torch.from_numpy(batch.pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
        loss = -F.logsigmoid(D(real, *labels)).mean() - F.logsigmoid(-D(G(z["d"], *labels).detach(), *labels)).mean()
        assert logged["d_loss"] == pytest.approx(loss.item(), rel=1e-4)
        assert ("r1" in logged) == (step % 2 == 0)
        if step % 2 == 0:
            x = real.clone().requires_grad_()
            norms = [torch.autograd.grad(D(x, *labels)[i].sum(), x, create_graph=True)[0][i].norm() for i in range(8)]
            r1 = torch.stack(norms).square().mean()
            assert logged["r1"] == pytest.approx(r1.item(), rel=1e-4)
            loss = loss + 0.7 / 2 * 2 * r1
        d_adam.zero_grad()
        loss.backward()
        d_adam.step()
        g_loss = -F.logsigmoid(D(G(z["g"], *labels), *labels)).mean()
        assert logged["g_loss"] == pytest.approx(g_loss.item(), rel=1e-4)
        g_adam.zero_grad()
        g_loss.backward()
        g_adam.step()
    for ours, theirs in ((pair.generator, G), (pair.discriminator, D)):
        for name, tensor in ours.state_dict().items():
            # Adam divides by the root of a gradient's square: sums of another order move a weight by a few 1e-5 of 1e-2
            torch.testing.assert_close(tensor, theirs.state_dict()[name], rtol=1e-3, atol=2e-5)


def test_the_penalty_of_a_linear_discriminator_is_its_squared_norm() -> None:
    linear = seeded(lambda: nn.Linear(3 * SIDE * SIDE, 1))
    critic = nn.Sequential(nn.Flatten(), linear)
    pair = pair_of(seeded(Painter), critic)
    expected = linear.weight.detach().double().square().sum().item()
    images = torch.rand(5, 3, SIDE, SIDE, requires_grad=True)
    torch.testing.assert_close(
        squared_gradients(critic(images)[:, 0], images).double(), torch.full((5,), expected).double()
    )
    assert Gan(pair, SETTINGS, ALONE, 0).step(batch_of(0))["r1"] == pytest.approx(expected, rel=1e-5)


def test_the_average_is_the_weighted_sum_of_all_weights_it_saw() -> None:
    """Σ_t (1 - d_t) Π_{s > t} d_s θ_t + Π d_s θ_0, with d_t = min(0.5, (1 + t) / (10 + t)), in float64; buffers are the
    last ones.
    """
    pair = small_pair()
    gan = Gan(pair, SETTINGS, ALONE, 0)
    seen = [{name: t.double().clone() for name, t in pair.generator.state_dict().items()}]
    for step in range(12):
        gan.step(batch_of(step))
        dict(pair.generator.named_buffers())["gain"].fill_(1 + step / 100)
        seen.append({name: t.double().clone() for name, t in pair.generator.state_dict().items()})
    decays = [min(0.5, (1 + t) / (10 + t)) for t in range(1, 13)]
    assert 0.5 in decays and decays[0] == 2 / 11  # both branches
    shares = [np.prod(decays)] + [(1 - d) * np.prod(decays[t + 1 :]) for t, d in enumerate(decays)]
    assert sum(shares) == pytest.approx(1)
    for name, tensor in gan.averaged().items():
        if name == "gain":
            assert tensor.item() == pytest.approx(1.1)  # as it was in the last step
            continue
        expected = sum(share * weights[name] for share, weights in zip(shares, seen, strict=True))
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-5, atol=1e-6)  # float32, 12 roundings


def test_passes_add_up_to_the_step() -> None:
    """Cut into 1, 3 or 8 passes a step is the same up to the order of float32 sums, which Adam's first steps
    amplify.
    """
    runs = []
    for accumulate in (1, 3, 8):
        pair = small_pair()
        gan = Gan(pair, SETTINGS.model_copy(update={"accumulate": accumulate}), ALONE, 3, None, BRIGHT)
        logged = [gan.step(batch_of(step)) for step in range(3)]
        runs.append((logged, torch.cat([p.detach().flatten() for p in gan.averaged().values()])))
    for logged, weights in runs[1:]:
        torch.testing.assert_close(weights, runs[0][1], rtol=1e-3, atol=2e-5)
        for ours, first in zip(logged, runs[0][0], strict=True):
            assert ours == pytest.approx(first, rel=1e-3)


def test_grey_images_are_pillows() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, SIDE, SIDE, 3), dtype=np.uint8)
    pixels[0] = pixels[0, :, :, :1]  # grey to begin with
    expected = np.stack([np.asarray(Image.fromarray(image).convert("L")) for image in pixels])
    found = parallel.images_of(pixels, 1, "cpu")
    assert np.array_equal(((found + 1) * 127.5).round().numpy()[:, 0], expected)
    assert np.array_equal(expected[0], pixels[0, :, :, 0])
    assert Gan(small_pair(colors=1), SETTINGS, ALONE, 0).step(batch_of(0))["d_loss"] > 0


# ---- Which generated images ------------------------------------------------------------------------------------------


class Uniform(nn.Module):
    """A latent z to an image of one grey level, uniform in [-1, 1]: 2 Φ(z) - 1."""

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        return torch.erf(latents / 2**0.5)[:, :, None, None].expand(-1, 3, 2, 2)


@pytest.mark.parametrize(("threshold", "weight"), [(1.2, 0.1), (1.2, 10.0), (0.5, 0.02)])
def test_chosen_images_follow_the_target(threshold: float, weight: float) -> None:
    """χ² of 5000 grey levels in 17 bins against q ∝ ω(level / 127.5); one seed, so it passes or fails for good."""
    fake = FakeSampling(by_brightness, threshold, weight, max_candidates=10_000)
    choice = choose(Live(Uniform(), latent=1), fake, np.arange(5000), None, 7, "d")
    assert choice.images is not None and choice.tally.rejected == 0
    levels = to_uint8(choice.images)[:, 0, 0, 0].numpy()
    chances = np.full(256, 1 / 255)
    chances[[0, 255]] /= 2  # rounded from half as wide an interval
    omega = np.where(np.arange(256) / 127.5 > threshold, weight, 1.0)
    q = (chances * omega).reshape(-1, 16).sum(axis=1)
    observed = np.bincount(levels // 16, minlength=16)
    assert stats.chisquare(observed, 5000 * q / q.sum()).pvalue > 1e-3
    rate = (chances * omega).sum() / omega.max()
    tally = choice.tally
    # candidates until 5000 are accepted: negative binomial, four deviations of sqrt(5000 (1 - rate)) / rate
    assert abs(tally.candidates - 5000 / rate) < 4 * (5000 * (1 - rate)) ** 0.5 / rate
    share = chances[np.arange(256) / 127.5 > threshold].sum()
    assert abs(tally.above / tally.candidates - share) < 4 * (share * (1 - share) / tally.candidates) ** 0.5
    torch.testing.assert_close(Uniform()(choice.latents), choice.images)


def test_a_draws_image_is_its_first_accepted_candidate_whatever_is_made_together() -> None:
    """Brute force: candidate after candidate of each draw by itself; and the same draws in other company."""
    live = Live(Uniform(), latent=1)
    fake = FakeSampling(by_brightness, 0.3, 0.05, max_candidates=1000)
    positions = np.array([5, 6, 7, 1000, 2**40])
    together = choose(live, fake, positions, None, 7, "g")
    candidates = 0
    for row, position in enumerate(positions):
        for attempt in itertools.count():
            stream = core_seeds.stream(7, "finetune/g-latent")
            seed = seeds_of(np.array([position]), np.array([attempt]), stream)
            latent = normal_latents(seed.tolist(), (1,))
            density = by_brightness(to_uint8(Uniform()(latent)))
            candidates += 1
            if core_seeds.uniform(seed, core_seeds.stream(7, "finetune/g-accept"))[0] < (
                0.05 if density[0] > 0.3 else 1.0
            ):
                break
        assert torch.equal(together.latents[row], latent[0])
    assert together.tally.candidates == candidates > 2 * len(positions)  # so that further rounds were needed
    for some in ([0], [2, 1], [0, 3, 4]):
        assert torch.equal(choose(live, fake, positions[some], None, 7, "g").latents, together.latents[some])
    assert not torch.equal(choose(live, fake, positions, None, 8, "g").latents, together.latents)
    assert not torch.equal(choose(live, fake, positions, None, 7, "d").latents, together.latents)


def test_a_draw_keeps_its_class_through_all_candidates() -> None:
    pair = small_pair(classes=3)
    labels = [0, 2, 1, 1, 0, 2]
    choice = choose(pair.live, BRIGHT, np.arange(6), labels, 1, "d")
    assert choice.tally.candidates > 6
    with torch.no_grad():
        again = pair.live.decode(choice.latents, Conditions(labels=tuple(labels)))
    torch.testing.assert_close(again, choice.images)


def test_without_weights_nothing_is_made_twice() -> None:
    pair = small_pair()
    assert "acceptance" not in Gan(pair, SETTINGS, ALONE, 0).step(batch_of(0))
    assert isinstance(pair.live, Live) and pair.live.decoded == 2  # one batch for each network
    assert 0 < Gan(small_pair(), SETTINGS, ALONE, 0, None, BRIGHT).step(batch_of(0))["acceptance"] < 1


def test_densities_of_the_predictor_are_those_of_the_image_as_it_is_saved(tmp_path: Path) -> None:
    checkpoint = str(tiny.write_checkpoint(tmp_path / "tiny.safetensors"))
    spec = extractor.describe(FeatureSettings(model=tiny.MODEL, checkpoint=checkpoint))
    predictor = density_predictor.new_predictor(Architecture(spec.feature_dim, (8,), "log_density"))
    scorer = Scorer(spec, predictor)
    pair = small_pair()
    middle = float(np.median(predicted(scorer)(pair.live.generate(list(range(20)), Conditions()))))
    fake = FakeSampling(predicted(scorer), middle, 20.0, 100)
    choice = choose(pair.live, fake, np.arange(20), None, 0, "d")
    assert choice.images is not None
    pixels = np.stack([np.asarray(Image.fromarray(image)) for image in to_uint8(choice.images).numpy()])
    expected = predictor.predict(scorer.features(torch.from_numpy(pixels)).numpy()).density
    np.testing.assert_allclose(predicted(scorer)(to_uint8(choice.images)), expected, rtol=1e-5)
    # half of all lie above the median, and of 20 accepted with odds of 20 to 1 fewer than 15 do with probability 1e-3
    assert (expected > middle).sum() >= 15


# ---- Going on, and what else is promised -----------------------------------------------------------------------------


def test_a_run_that_is_taken_up_ends_with_the_same_bytes() -> None:
    """With dropout in the discriminator, between two penalties, in the middle of the warm-up, from a file without
    pickles.
    """
    whole = Gan(small_pair(3, dropout=0.3), SETTINGS, ALONE, 9, CLASSES, BRIGHT)
    logged = [whole.step(batch_of(step)) for step in range(6)]
    first = Gan(small_pair(3, dropout=0.3), SETTINGS, ALONE, 9, CLASSES, BRIGHT)
    for step in range(3):
        first.step(batch_of(step))
    sink = io.BytesIO()
    torch.save(state := first.state(), sink)
    # states that earlier releases wrote are opened by these names
    networks = {"generator", "discriminator"}
    assert set(state) == networks | {f"{name}_optimizer" for name in networks} | {"averaged", "steps"}
    sink.seek(0)
    torch.manual_seed(77)  # another process has another global state, which stays as it is
    before = torch.get_rng_state()
    second = Gan(small_pair(3, dropout=0.3, seed=5), SETTINGS, ALONE, 9, CLASSES, BRIGHT)
    second.load_state(torch.load(sink, weights_only=True))
    again = [second.step(batch_of(step)) for step in range(3, 6)]
    assert bytes_of(second) == bytes_of(whole) and again == logged[3:]
    assert torch.equal(torch.get_rng_state(), before)
    other = Gan(small_pair(3, dropout=0.3), SETTINGS, ALONE, 10, CLASSES, BRIGHT)
    for step in range(6):
        other.step(batch_of(step))
    assert bytes_of(other) != bytes_of(whole)


def test_hopeless_weights_end_with_an_explanation() -> None:
    fake = FakeSampling(by_brightness, threshold=1e-6, weight=0.001, max_candidates=7)  # all lie above it
    with pytest.raises(RunError) as caught:
        Gan(small_pair(), SETTINGS, ALONE, 4, None, fake).step(batch_of(0))
    message = str(caught.value)
    assert "\n" not in message and "step 0, seed 4" in message
    for part in ("of 8 generated images were rejected 7 times", "100.00% of", "tau = 1e-06", "w = 0.001"):
        assert part in message
    assert "raise --fake.threshold" in message and "--fake.max_candidates" in message


def test_a_low_rate_is_waited_for_and_none_at_all_is_not() -> None:
    """One candidate of 200 accepted: some draws need far more than the others, and all get theirs."""
    positions, pair = np.arange(8), small_pair()
    rare = FakeSampling(by_brightness, threshold=1e-6, weight=0.005, max_candidates=100_000)  # all lie above it
    tally = choose(pair.live, rare, positions, None, 4, "d").tally
    assert tally.rejected == 0 and 400 < tally.candidates < 6400  # 1,600 expected, geometric: standard deviation 560
    never = FakeSampling(by_brightness, threshold=1e-6, weight=1e-12, max_candidates=100_000)
    tally = choose(pair.live, never, positions, None, 4, "d").tally
    assert (tally.rejected, tally.candidates) == (8, 8 * VAIN)


@pytest.mark.parametrize("broken", ["loss", "gradient", "image"])
def test_what_is_not_finite_ends_the_run_before_a_weight_moves(broken: str) -> None:
    pair = small_pair()
    if broken == "loss":
        with torch.no_grad():
            dict(pair.discriminator.named_parameters())["out.bias"].fill_(float("inf"))
    if broken == "gradient":  # the logits are finite, the root's slope at 0 is not
        pair = pair_of(pair.generator, Rooted())
    if broken == "image":
        with torch.no_grad():
            dict(pair.generator.named_parameters())["out.bias"][0] = float("nan")
    gan = Gan(
        pair, SETTINGS.model_copy(update={"r1_weight": 0.0}), ALONE, 4, None, BRIGHT if broken == "image" else None
    )
    before = bytes_of(gan)
    what = {"loss": r"d_loss \(", "gradient": "a gradient of d_loss", "image": "an image of the generator"}[broken]
    with pytest.raises(RunError, match=rf"^training: {what}.* is not finite at step 0, seed 4; "):
        gan.step(batch_of(0))
    assert bytes_of(gan) == before


class Rooted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return (self.scale * images.mean(dim=(1, 2, 3))).square().sqrt()


def test_labels_and_classes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match=r"--generator\.labels: the generator draws one of 3 classes"):
        Gan(small_pair(3), SETTINGS, ALONE, 0)
    with pytest.raises(
        UserError, match=r"image 102 has the label 'c', of which the generator has no class \(it has a, b\)"
    ):
        Gan(small_pair(3), SETTINGS, ALONE, 0, {"a": 0, "b": 1}).step(batch_of(0))


# ---- Several workers -------------------------------------------------------------------------------------------------


UNEVEN = SETTINGS.model_copy(update={"batch_size": 7, "accumulate": 2})  # shares of 3 and 4 images


class Touchy(Critic):
    """NaN for images with a white corner."""

    def forward(self, images: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(images, labels) + (images[:, 0, :1, 0] == 1) * float("nan")


def run_uneven(share: Share) -> tuple[Gan, list[dict[str, float]]]:
    gan = Gan(small_pair(3), UNEVEN, share, 2, CLASSES, BRIGHT)
    return gan, [gan.step(batch_of(step, share.rank, share.world, size=7)) for step in range(4)]


def worker(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    share = Share(rank, 2, "cpu", 1)
    parameters = [nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))]
    parameters[0].grad = torch.arange(6.0).reshape(2, 3) * (1 + 2 * rank)
    if rank == 1:
        parameters[1].grad = torch.tensor([4.0, 8.0])
    average_gradients(parameters, 2)
    sums = sum_of({"a": 1.5 + rank, "b": float("inf") if rank else 1.0}, 2, "cpu")
    gan, logged = run_uneven(share)
    ended = []
    white = batch_of(0).pixels
    white[7, 0, 0] = 255  # of the second worker's share
    touchy = seeded(lambda: pair_of(Painter(), Touchy()))
    hopeless = FakeSampling(lambda images: np.ones(len(images)) * (2 if rank else 0), 1.0, 1e-6, 5)
    for pair, fake in ((touchy, None), (small_pair(), hopeless)):
        try:
            Gan(pair, SETTINGS, share, 0, None, fake).step(batch_of(0, rank, 2, pixels=white))
        except RunError as error:
            ended.append(str(error))
    gradients = [parameter.grad for parameter in parameters]
    found = {"gradients": gradients, "sums": sums, "state": gan.state(), "logged": logged, "ended": ended}
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("workers")
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=worker, args=(rank, folder), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_workers_tell_each_other_means_and_sums(two_workers: list[dict[str, Any]]) -> None:
    for found in two_workers:
        first, second, third = found["gradients"]
        assert torch.equal(first, torch.arange(6.0).reshape(2, 3) * 2)
        assert second.tolist() == [2.0, 4.0] and third.tolist() == [0.0]  # one worker had none, none had any
        assert found["sums"] == {"a": 4.0, "b": float("inf")}


def test_two_workers_train_as_one(two_workers: list[dict[str, Any]]) -> None:
    """Shares of 3 and 4 images in two passes each: equal on both to the byte, and to one worker's up to float32
    sums.
    """
    alone, logged = run_uneven(ALONE)
    first, second = (found["state"] for found in two_workers)
    for part in ("generator", "discriminator", "averaged"):
        for name, tensor in alone.state()[part].items():
            assert torch.equal(first[part][name], second[part][name])
            torch.testing.assert_close(first[part][name], tensor, rtol=1e-3, atol=2e-5)
    assert two_workers[0]["logged"] == two_workers[1]["logged"]
    for ours, theirs in zip(two_workers[0]["logged"], logged, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3) and ours["acceptance"] == theirs["acceptance"]


def test_trouble_of_one_worker_ends_all_in_the_same_step(two_workers: list[dict[str, Any]]) -> None:
    assert two_workers[0]["ended"] == two_workers[1]["ended"]
    not_finite, hopeless = two_workers[0]["ended"]
    assert "d_loss (nan) is not finite at step 0" in not_finite
    # one worker's candidates all lie below, and are taken at once; the other's 4 draws of 5 candidates each above
    assert "4 of 8 generated images were rejected 5 times: 83.33% of 24 candidates" in hopeless


# ---- Pairs: TorchScript ----------------------------------------------------------------------------------------------


def scripted(module: nn.Module, path: Path) -> str:
    train_gan.save(module, path)
    return str(path)


class Levels(nn.Module):
    """Latents [B, 4] to images in 0..255. TorchScript sees no globals, hence the numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(4, 192)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        return 255 * torch.sigmoid(self.out(latents)).reshape(-1, 3, 8, 8)


class Conditional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_classes = 3
        self.table, self.out = nn.Embedding(3, 4), nn.Linear(4, 64)

    def forward(self, latents: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.out(latents + self.table(labels))).reshape(-1, 1, 8, 8)


class Projection(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(3, 64)

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return (images.flatten(1) * self.table(labels)).sum(dim=1)


class Plain(nn.Module):
    def __init__(self, colors: int = 3, side: int = SIDE, outputs: int = 1) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(colors, 4, 3, padding=1), nn.Linear(4 * side * side, outputs)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.out(F.leaky_relu(self.conv(images), 0.2).flatten(1))


@pytest.mark.parametrize("kind", ["levels", "conditional", "demo"])
def test_torchscript_pairs_train_and_open_again(kind: str, tmp_path: Path) -> None:
    networks: dict[str, Callable[[], tuple[nn.Module, nn.Module]]] = {
        "levels": lambda: (Levels(), Plain()),
        "conditional": lambda: (Conditional(), Projection()),
        "demo": lambda: train_gan.networks(train_gan.Recipe(channels=(8, 16), latent_dim=4), SIDE, 3),
    }
    generator, discriminator = seeded(networks[kind])
    paths = scripted(generator, tmp_path / "g.pt"), scripted(discriminator, tmp_path / "d.pt")
    settings = GeneratorSettings(
        kind="torchscript", path=paths[0], latent_shape=(4,), value_range="0..255" if kind == "levels" else "-1..1"
    )
    pair = open_pair(settings, paths[1])
    assert (pair.colors, pair.size) == (1 if kind == "conditional" else 3, (SIDE, SIDE))
    classes = CLASSES if kind == "conditional" else None
    conditions = Conditions(labels=(0, 2)) if classes else Conditions()
    images = pair.live.decode(pair.live.latents([1, 2]), conditions)
    assert images.min() >= -1 and images.max() <= 1 and images.min() < 0
    gan = Gan(pair, SETTINGS, ALONE, 0, classes)
    for step in range(3):
        assert np.isfinite(list(gan.step(batch_of(step)).values())).all()
    gan.save(str(tmp_path), gan.averaged())
    again = settings.model_copy(update={"path": str(tmp_path / "generator.pt")})
    opened, sampler = open_generator(again), gan.sampler(gan.averaged())
    assert torch.equal(opened.generate([1, 2], conditions), sampler.generate([1, 2], conditions))
    assert not torch.equal(opened.generate([1, 2], conditions), open_generator(settings).generate([1, 2], conditions))
    other = open_pair(again, str(tmp_path / "discriminator.pt"))
    for name, tensor in other.discriminator.state_dict().items():
        assert torch.equal(tensor, gan.state()["discriminator"][name])
    for name, tensor in other.averaged_start.items():
        assert torch.equal(tensor, gan.averaged()[name])
    Gan(other, SETTINGS, ALONE, 0, classes).step(batch_of(0))  # and it can be trained again
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.pt", "discriminator.pt", "g.pt", "generator.pt"]


def test_a_truncated_generator_is_trained_on_all_latents(tmp_path: Path) -> None:
    paths = scripted(Levels(), tmp_path / "g.pt"), scripted(Plain(), tmp_path / "d.pt")
    settings = GeneratorSettings(
        kind="torchscript", path=paths[0], latent_shape=(4,), latent_bound=0.1, value_range="0..255"
    )
    pair = open_pair(settings, paths[1])
    assert torch.equal(pair.live.latents([1]), normal_latents([1], (4,)))
    sampler = pair.sampler(pair.averaged_start)
    assert torch.equal(sampler.generate([1], Conditions()), open_generator(settings).generate([1], Conditions()))


def refused(expected: str, run: Callable[[], Any]) -> None:
    with pytest.raises(UserError, match=re.escape(expected)) as caught:
        run()
    assert "\n" not in str(caught.value)


def test_torchscript_pairs_that_do_not_fit_are_one_line(tmp_path: Path) -> None:
    generator = scripted(Painterly(), tmp_path / "g.pt")
    settings = GeneratorSettings(kind="torchscript", path=generator, latent_shape=(4,))
    good, file = scripted(Plain(), tmp_path / "good.pt"), tmp_path / "d.pt"

    def trained(batch_size: int = 8) -> Any:
        return Gan(open_pair(settings, str(file)), SETTINGS.model_copy(update={"batch_size": batch_size}), ALONE, 0)

    refused("--discriminator: not set; a GAN is trained against its discriminator", lambda: open_pair(settings))
    refused(f"--discriminator {tmp_path}/absent.pt", lambda: open_pair(settings, str(tmp_path / "absent.pt")))
    file.write_bytes(b"no module")
    refused(f"--discriminator {file}: not a TorchScript file", trained)
    for module, expected in (
        (Plain(colors=1), f"--discriminator {file}: does not take 8 images of the generator, [8, 3, 8, 8]"),
        (Plain(side=16), "mat1 and mat2 shapes cannot be multiplied"),
        (Plain(outputs=2), f"--discriminator {file}: gives (8, 2) for 8 images; it must give one logit for each"),
        (Projection(), "takes labels, which the generator does not"),
        (nn.Flatten(), f"--discriminator {file}: has no weights that can be trained"),
    ):
        scripted(module, file)
        refused(expected, trained)
    _, demo = seeded(lambda: train_gan.networks(train_gan.Recipe(channels=(8, 16), latent_dim=4), SIDE, 3))
    scripted(demo, file)
    refused(f"images in groups of {demo_gan.DEVIATIONS_OF}, the batch has 6); ", lambda: trained(6))
    frozen = torch.jit.freeze(torch.jit.script(Painterly().eval()))
    torch.jit.save(frozen, generator)
    refused(f"--generator.path {generator}: has no weights that can be trained", lambda: open_pair(settings, good))
    refused("--generator.kind diffusers: is no GAN", lambda: open_pair(GeneratorSettings(path=str(tmp_path)), good))
    python = GeneratorSettings(kind="python", path="a.py:make")
    refused(f"--discriminator {good}: a generator of kind python brings its own", lambda: open_pair(python, good))


class Painterly(nn.Module):
    """An unconditional `Painter` that TorchScript takes."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(4, 192)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.out(latents)).reshape(-1, 3, 8, 8)


# ---- Pairs: factories ------------------------------------------------------------------------------------------------


def test_the_documented_pair(tmp_path: Path) -> None:
    _, code = re.findall(r"```python\n(.*?)```", DOCS.read_text(), flags=re.S)
    (tmp_path / "strokes.py").write_text(code)
    settings = GeneratorSettings(kind="python", path=f"{tmp_path}/strokes.py:make")
    torch.manual_seed(3)  # of no matter
    pair = open_pair(settings)
    assert (pair.colors, pair.size) == (1, (16, 16))
    gan = Gan(pair, SETTINGS, ALONE, 0, None, BRIGHT)
    for step in range(3):
        gan.step(grown(batch_of(step)))
    sampler = gan.sampler(gan.averaged())
    gan.save(str(tmp_path), gan.averaged())
    arguments = {"weights": str(tmp_path / "weights.safetensors")}
    saved = settings.model_copy(update={"arguments": arguments})
    opened = open_generator(saved)
    assert torch.equal(opened.generate([1, 2], Conditions()), sampler.generate([1, 2], Conditions()))
    assert opened.identity() != open_generator(settings).identity()
    assert json.loads(json.dumps(opened.identity())) == opened.identity()
    other = open_pair(saved)
    for part, expected in (("generator", gan.averaged()), ("discriminator", gan.state()["discriminator"])):
        network = other.generator if part == "generator" else other.discriminator
        assert all(torch.equal(tensor, expected[name]) for name, tensor in network.state_dict().items())
    refused("not those of this factory's networks", lambda: load_weights(arguments["weights"], generator=Painterly()))


def grown(batch: Batch) -> Batch:
    """16 px of 8."""
    pixels = batch.pixels.repeat(2, axis=1).repeat(2, axis=2)
    return Batch(batch.step, batch.first, batch.sample_id, batch.density, batch.label, pixels)


LACKING = """
import torch
from torch import nn
class Plain:
    num_classes, takes_prompts = 0, False
    def __init__(self):
        self.generator_network, self.discriminator = nn.Linear(2, 12), nn.Linear(12, 1)
    def identity(self): return {}
    def generate(self, seeds, conditions): ...
    def latents(self, seeds): return torch.zeros(len(seeds), 2)
    def decode(self, latents, conditions): return self.generator_network(latents).reshape(-1, 3, 2, 2)
class NoCritic(Plain):
    def __init__(self):
        super().__init__()
        del self.discriminator
class Frozen(Plain):
    def __init__(self, weights=None):
        super().__init__()
        self.generator_network.requires_grad_(False)
class Flat(Plain):
    def __init__(self, weights=None): super().__init__()
    def decode(self, latents, conditions): return self.generator_network(latents)
def no_latents():
    made = Plain()
    return type("Seeds", (), {"num_classes": 0, "takes_prompts": False, "identity": lambda self: {}, "generate": None,
        "generator_network": made.generator_network, "discriminator": made.discriminator})()
def weights_unknown(): return Plain()
"""


@pytest.mark.parametrize(
    ("factory", "expected"),
    [
        ("NoCritic", "NoCritic has no discriminator, which fine-tuning needs"),
        ("no_latents", "Seeds has no latents, no decode, which fine-tuning needs"),
        ("weights_unknown", "takes no argument weights"),
        ("Frozen", "generator_network: has no weights that can be trained"),
        ("Flat", "the generator gives [1, 12] for one latent"),
    ],
)
def test_factories_without_a_pair_are_one_line(factory: str, expected: str, tmp_path: Path) -> None:
    file = tmp_path / "lacking.py"
    file.write_text(LACKING)
    refused(expected, lambda: open_pair(GeneratorSettings(kind="python", path=f"{file}:{factory}")))


# ---- Pairs: StyleGAN -------------------------------------------------------------------------------------------------


@pytest.fixture
def nvidia(tmp_path: Path) -> Iterator[StandIn]:
    stand_in = StandIn(tmp_path)
    yield stand_in
    stand_in.forget()


@pytest.mark.parametrize("classes", [0, 3])
def test_stylegan_pickles_are_trained_and_written_as_they_came(classes: int, nvidia: StandIn, tmp_path: Path) -> None:
    path = nvidia.saved(classes, "G", "D", "G_ema")
    settings = GeneratorSettings(kind="stylegan", path=path, code=str(nvidia.code), allow_pickle=True, truncation=0.5)
    pair = open_pair(settings)
    conditions = Conditions(labels=(0, 2)) if classes else Conditions()
    assert (pair.colors, pair.size, pair.live.num_classes) == (3, (SIDE, SIDE), classes)
    # sampled from G_ema at its truncation, trained from G without one
    opened, start = open_generator(settings), pair.sampler(pair.averaged_start)
    assert torch.equal(start.generate([1, 2], conditions), opened.generate([1, 2], conditions))
    z = pair.live.latents([1, 2])
    c = torch.tensor([[1.0, 0, 0], [0, 0, 1]])[:, :classes]
    direct = pair.generator(z, c, truncation_psi=1, noise_mode="const", force_fp32=True)
    assert torch.equal(pair.live.decode(z, conditions), direct)
    gan = Gan(pair, SETTINGS, ALONE, 0, CLASSES if classes else None, BRIGHT)
    for step in range(3):
        gan.step(batch_of(step))
    gan.save(str(tmp_path), gan.averaged())
    again = settings.model_copy(update={"path": str(tmp_path / "network.pkl")})
    sampler, state = gan.sampler(gan.averaged()), gan.state()
    nvidia.forget()  # as in another process
    assert torch.equal(open_generator(again).generate([1, 2], conditions), sampler.generate([1, 2], conditions))
    content = pickle.loads((tmp_path / "network.pkl").read_bytes())
    assert list(content) == ["training_set_kwargs", "G", "D", "G_ema"] and content["training_set_kwargs"] is None
    for name, expected in (("G", state["generator"]), ("D", state["discriminator"]), ("G_ema", state["averaged"])):
        assert not content[name].training and not any(p.requires_grad for p in content[name].parameters())
        assert all(torch.equal(tensor, expected[key]) for key, tensor in content[name].state_dict().items())
    assert not torch.equal(content["G"].mapping.weight, content["G_ema"].mapping.weight)
    Gan(open_pair(again), SETTINGS, ALONE, 0, CLASSES if classes else None).step(batch_of(0))


def test_stylegan_pickles_without_a_pair_are_one_line(nvidia: StandIn) -> None:
    def opened(path: str, **settings: Any) -> Callable[[], Any]:
        options: dict[str, Any] = {"code": str(nvidia.code), "allow_pickle": True} | settings
        return lambda: open_pair(GeneratorSettings(kind="stylegan", path=path, **options))

    path = nvidia.saved(0, "G", "D", "G_ema")
    refused("a pickle, which can run any code it holds", opened(path, allow_pickle=False))
    refused("--generator.precision fp16: a StyleGAN is fine-tuned in fp32", opened(path, precision="fp16"))
    refused("holds no network D; name a network-snapshot", opened(nvidia.saved(0, "G", "G_ema")))
    refused("holds no network G; name a network-snapshot", opened(nvidia.saved(0, "D", "G_ema")))
