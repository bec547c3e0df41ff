"""The GAN loop: non-saturating logistic loss with lazy R1, whose generated images are drawn by importance sampling.

Algorithm 3 of arXiv 2407.08659: the discriminator's and the generator's batches of generated images are both
rejection-sampled from the generator of that step, by the predicted density of each image as it would be saved. Without
DistributedDataParallel: R1 is a gradient of a gradient.

An image is a function of its latent and class alone, in training as in sampling: the generator runs in evaluation mode,
so that the image that is scored is the one that is trained on, in whatever batch. The discriminator runs in training
mode.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pd_core.core import seeds as core_seeds
from pd_core.core.errors import RunError, UserError
from pd_core.core.settings.finetune import TrainingSettings
from pd_core.density import weighting as density_weighting
from pd_core.density.formula import density_of
from pd_core.density.scorer import Scorer
from pd_core.finetune.averaging import decay_at, warm_up, weights_of
from pd_core.finetune.parallel import average, average_gradients, images_of, own_random_state, sum_of
from pd_core.finetune.protocol import Batch, Share
from pd_core.generators.pairs import Pair, check_passes, conditions_of
from pd_core.generators.protocol import Generator, LatentGenerator, to_uint8

if TYPE_CHECKING:
    import torch

Densities = Callable[["torch.Tensor"], np.ndarray]
"""Pseudo densities float64 [B] of images uint8 [B, H, W, 3] on the generator's device."""

Labels = Sequence[int] | None
VAIN = 200  # candidates of every draw of a batch, of which not one was accepted
BETAS = (0.0, 0.99)  # of Adam, for both networks, as in StyleGAN


@dataclass(frozen=True)
class FakeSampling:
    """How generated images are drawn: weight `weight` where their density is above `threshold`, 1 elsewhere.

    Attributes:
        densities: of images, such as `predicted` gives.
        threshold: τ on the density scale.
        weight: w > 0.
        max_candidates: of one image, after which the run stops.
    """

    densities: Densities
    threshold: float
    weight: float
    max_candidates: int


def predicted(scorer: Scorer) -> Densities:
    """Densities by the predictor of an index."""

    def densities(images: torch.Tensor) -> np.ndarray:
        log_density: np.ndarray = scorer.log_density(scorer.features(images)).cpu().numpy()
        return density_of(log_density)

    return densities


# ---- Which generated images ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tally:
    """Counts of a search: images wanted, candidates up to the accepted one of each, those of them above τ, images
    without one.

    broken: batches with an image that was not finite, after which the search ended.
    """

    wanted: float = 0
    candidates: float = 0
    above: float = 0
    rejected: float = 0
    broken: float = 0


@dataclass(frozen=True)
class Choice:
    """latents: float32 [b, ...]. images: [b, C, H, W] in [-1, 1], without gradient, or None where none had to
    be made.
    """

    latents: torch.Tensor
    images: torch.Tensor | None
    tally: Tally


def seeds_of(positions: np.ndarray, attempts: np.ndarray, stream: int) -> np.ndarray:
    """Seeds in [0, 2^63) of candidates, int64 [m]: those of a draw's position and the number of the attempt,
    int64 [m].
    """
    return core_seeds.integers(
        core_seeds.integers(positions, stream).astype(np.uint64) + attempts.astype(np.uint64), stream
    )


def choose(
    live: LatentGenerator, fake: FakeSampling | None, positions: np.ndarray, labels: Labels, seed: int, name: str
) -> Choice:
    """One generated image for each draw: its first candidate that rejection sampling accepts.

    Candidate t of a draw has a latent and a u of its own, so that the choice does not depend on which candidates are
    made together, up to the rounding of other batches. As draws are done, the batch is filled with further candidates
    of the others.

    Args:
        live: the generator.
        fake: how to choose; None takes every draw's first candidate.
        positions: of the draws in the run, int64 [b].
        labels: classes that the draws have, [b], or None.
        seed: of the run.
        name: of the random stream; other batches of a step have others.
    """
    stream = core_seeds.stream(seed, f"finetune/{name}-latent")
    if fake is None:
        seeds = seeds_of(positions, np.zeros_like(positions), stream)
        return Choice(live.latents(seeds.tolist()), None, Tally())
    import torch

    with torch.no_grad():
        return _search(live, fake, positions, labels, stream, core_seeds.stream(seed, f"finetune/{name}-accept"))


def _search(
    live: LatentGenerator, fake: FakeSampling, positions: np.ndarray, labels: Labels, stream: int, u_stream: int
) -> Choice:
    """`choose` by rejection; latents and images of draws without an accepted candidate are not set."""
    import torch

    count, weighting = len(positions), density_weighting.two_level(fake.threshold, fake.weight)
    pending, done, candidates, above = np.arange(count), 0, 0, 0
    kept: tuple[torch.Tensor, torch.Tensor] | None = None
    while len(pending) and done < fake.max_candidates and not (len(pending) == count and done >= VAIN):
        each = min(count // len(pending), fake.max_candidates - done)
        draws = np.repeat(pending, each)
        seeds = seeds_of(positions[draws], np.tile(np.arange(done, done + each), len(pending)), stream)
        latents = live.latents(seeds.tolist())
        images = live.decode(latents, conditions_of(labels and [labels[int(draw)] for draw in draws]))
        kept = kept or (latents.new_empty(count, *latents.shape[1:]), images.new_empty(count, *images.shape[1:]))
        if not bool(torch.isfinite(images).all()):
            return Choice(*kept, Tally(broken=1))
        density = fake.densities(to_uint8(images))
        accepted = core_seeds.uniform(seeds, u_stream) < density_weighting.acceptance_probability(density, weighting)
        accepted = accepted.reshape(-1, each)
        found, first = accepted.any(axis=1), accepted.argmax(axis=1)
        looked_at = np.where(found, first + 1, each)
        candidates += int(looked_at.sum())
        above += int((density.reshape(-1, each) > fake.threshold)[np.arange(each) < looked_at[:, None]].sum())
        rows = (np.arange(len(pending)) * each + first)[found]
        for place, values in zip(kept, (latents, images), strict=True):
            place[torch.from_numpy(pending[found]).to(place.device)] = values[torch.from_numpy(rows).to(place.device)]
        pending, done = pending[~found], done + each
    assert kept is not None, "a batch has draws"
    return Choice(*kept, Tally(count, candidates, above, len(pending)))


# ---- Losses ----------------------------------------------------------------------------------------------------------


def squared_gradients(logits: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """‖∇_x D(x)‖² of each image, [B], differentiable: what R1 is the mean of (Mescheder et al. 2018, equation 9)."""
    import torch

    (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return gradient.square().flatten(1).sum(dim=1)


# ---- The loop --------------------------------------------------------------------------------------------------------


class Gan:
    """A pair in training; a `Trainable`.

    Per step: Adam on the discriminator's loss -log σ(D(x)) - log(1 - σ(D(G(z)))) (Goodfellow et al. 2014) plus γ/2 R1,
    computed at every r1_interval-th step and then that many times as heavy (Karras et al. 2020, appendix B); Adam on
    the generator's, -log σ(D(G(z))); the moving average of the generator. A draw's generated images have the class of
    its real one.

    Args:
        pair: the networks; they are moved in place.
        training: the optimisation.
        share: this worker's.
        seed: of the run.
        classes: label text to class number; None where the generator takes no classes.
        fake: how generated images are drawn; None: as they come.

    Raises:
        UserError: the generator wants classes and there are none, or the discriminator does not take its images.
    """

    def __init__(
        self,
        pair: Pair,
        training: TrainingSettings,
        share: Share,
        seed: int,
        classes: Mapping[str, int] | None = None,
        fake: FakeSampling | None = None,
    ) -> None:
        import torch

        if pair.live.num_classes and not classes:
            raise UserError(
                f"--generator.labels: the generator draws one of {pair.live.num_classes} classes; set all, and "
                "--generator.label_names to the labels of the index where these are no class numbers"
            )
        self.size = pair.size
        self._pair, self._training, self._share, self._seed = pair, training, share, seed
        self._classes, self._fake = classes or {}, fake
        pair.generator.eval()
        pair.discriminator.train()
        check_passes(pair, _pass_sizes(training, share.world))
        self._averaged = {name: tensor.detach().clone() for name, tensor in pair.averaged_start.items()}
        own = pair.generator.state_dict()
        self.came_averaged = any(not torch.equal(own[name], start) for name, start in self._averaged.items())
        self._trained = {
            network: [parameter for parameter in network.parameters() if parameter.requires_grad]
            for network in (pair.generator, pair.discriminator)
        }
        self._optimizers = {
            network: torch.optim.Adam(parameters, training.learning_rate, betas=BETAS, fused=True)
            for network, parameters in self._trained.items()
        }
        self.parameters = sum(p.numel() for trained in self._trained.values() for p in trained)
        self._steps = 0

    def step(self, batch: Batch) -> dict[str, float]:
        """See Trainable.

        Returns: d_loss and g_loss; real_logit and fake_logit, the discriminator's means; r1, the mean squared gradient,
            where
        it was penalised; acceptance, accepted over candidates of both batches, where images are drawn by their density.

        Raises:
            UserError: a label without a class.
            RunError: a loss or a gradient that is not finite, or images that are rejected again and again.
        """
        assert batch.step == self._steps and batch.pixels.shape[1:3] == self.size, (batch.step, batch.pixels.shape)
        labels = self._labels(batch)
        rate = self._training.learning_rate * warm_up(batch.step, self._training.warmup_steps)
        with own_random_state(self._seed, batch.step, self._share):
            for optimizer in self._optimizers.values():
                optimizer.param_groups[0]["lr"] = rate
            logged, d_tally = self._step_discriminator(batch, labels)
            moved, g_tally = self._step_generator(batch, labels)
        average(self._pair.discriminator.buffers(), self._share.world)
        self._steps += 1
        self._follow()
        if candidates := d_tally.candidates + g_tally.candidates:
            moved["acceptance"] = (d_tally.wanted + g_tally.wanted) / candidates
        return logged | moved

    @property
    def _networks(self) -> dict[str, torch.nn.Module]:
        return {"generator": self._pair.generator, "discriminator": self._pair.discriminator}

    def state(self) -> dict[str, Any]:
        """See Trainable. The tensors are the live ones: write them before the next step."""
        networks = {name: dict(network.state_dict()) for name, network in self._networks.items()}
        optimizers = {f"{n}_optimizer": self._optimizers[network].state_dict() for n, network in self._networks.items()}
        return networks | optimizers | {"averaged": dict(self._averaged), "steps": self._steps}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """See Trainable."""
        for name, network in self._networks.items():
            network.load_state_dict(state[name])
            self._optimizers[network].load_state_dict(state[f"{name}_optimizer"])
        for name, tensor in self._averaged.items():
            tensor.copy_(state["averaged"][name])
        self._steps = state["steps"]

    def averaged(self) -> dict[str, torch.Tensor]:
        """See Trainable; with its buffers."""
        return {name: tensor.cpu().clone() for name, tensor in self._averaged.items()}

    def companions(self) -> dict[str, torch.Tensor]:
        """See Trainable: generator and discriminator as they are in training."""
        return {
            f"{part}.{name}": tensor
            for part, network in self._networks.items()
            for name, tensor in weights_of(network).items()
        }

    def load_companions(self, companions: Mapping[str, torch.Tensor]) -> None:
        """See Trainable."""
        for part, network in self._networks.items():
            own = {n.removeprefix(f"{part}."): t for n, t in companions.items() if n.startswith(f"{part}.")}
            network.load_state_dict(own)

    def sampler(self, weights: Mapping[str, torch.Tensor]) -> Generator:
        """See Trainable."""
        return self._pair.sampler(weights)

    def save(self, folder: str, weights: Mapping[str, torch.Tensor]) -> None:
        """See Trainable: the generator with these weights, the discriminator as it is."""
        self._pair.save(folder, weights)

    # -- one step

    def _step_discriminator(self, batch: Batch, labels: Labels) -> tuple[dict[str, float], Tally]:
        import torch
        from torch.nn.functional import softplus

        choice, tally = self._chosen(batch, labels, "d")
        real = images_of(batch.pixels, self._pair.colors, self._share.device)
        penalty = self._penalty()
        sums = {"d_loss": 0.0, "real_logit": 0.0, "fake_logit": 0.0, "r1": 0.0}
        for part in _passes(len(real), self._training.accumulate):
            images, classes = real[part].requires_grad_(penalty > 0), self._tensor(labels and labels[part])
            with torch.no_grad():
                fakes = self._decode(choice.latents, labels, part) if choice.images is None else choice.images[part]
            real_logits, fake_logits = self._pair.logits(images, classes), self._pair.logits(fakes, classes)
            loss = (softplus(-real_logits) + softplus(fake_logits)).sum()
            squared = squared_gradients(real_logits, images).sum() if penalty else torch.zeros(())
            self._backward(loss + penalty / 2 * squared if penalty else loss)
            for name, value in zip(sums, (loss, real_logits.sum(), fake_logits.sum(), squared), strict=True):
                sums[name] += value.item()
        means = self._move(self._pair.discriminator, sums, len(real), batch.step)
        if not penalty:
            del means["r1"]
        return means, tally

    def _step_generator(self, batch: Batch, labels: Labels) -> tuple[dict[str, float], Tally]:
        from torch.nn.functional import softplus

        choice, tally = self._chosen(batch, labels, "g")
        loss_sum = 0.0
        for parameter in self._trained[self._pair.discriminator]:
            parameter.requires_grad_(False)
        for part in _passes(len(batch.pixels), self._training.accumulate):
            images = self._decode(choice.latents, labels, part)
            loss = softplus(-self._pair.logits(images, self._tensor(labels and labels[part]))).sum()
            self._backward(loss)
            loss_sum += loss.item()
        for parameter in self._trained[self._pair.discriminator]:
            parameter.requires_grad_(True)
        return self._move(self._pair.generator, {"g_loss": loss_sum}, len(batch.pixels), batch.step), tally

    def _chosen(self, batch: Batch, labels: Labels, name: str) -> tuple[Choice, Tally]:
        """This worker's choice, and the counts of all workers'."""
        choice = choose(self._pair.live, self._fake, batch.positions, labels, self._seed, name)
        if self._fake is None:
            return choice, choice.tally
        tally = Tally(**sum_of(asdict(choice.tally), self._share.world, self._share.device))
        if tally.broken:
            raise self._not_finite("an image of the generator", batch.step)
        if tally.rejected:
            raise RunError(self._hopeless(tally, self._fake, batch.step))
        return choice, tally

    def _decode(self, latents: torch.Tensor, labels: Labels, part: slice) -> torch.Tensor:
        return self._pair.live.decode(latents[part], conditions_of(labels and labels[part]))

    def _backward(self, loss: torch.Tensor) -> None:
        # a sum over this pass, divided by what is a worker's on average: gradients averaged over workers are those of
        # the mean
        (loss * (self._share.world / self._training.batch_size)).backward()

    def _move(self, network: torch.nn.Module, sums: dict[str, float], count: int, step: int) -> dict[str, float]:
        """Adam on the gradients of all workers; means over the images of all of them."""
        import torch

        parameters, optimizer = self._trained[network], self._optimizers[network]
        average_gradients(parameters, self._share.world)
        total = sum_of({**sums, "count": count}, self._share.world, self._share.device)
        means = {name: total[name] / total["count"] for name in sums}
        for name, value in means.items():
            if not math.isfinite(value):
                raise self._not_finite(f"{name} ({value})", step)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if not bool(torch.stack([torch.isfinite(gradient).all() for gradient in gradients]).all()):
            raise self._not_finite(f"a gradient of {' and '.join(sums)}", step)
        optimizer.step()
        optimizer.zero_grad()
        return means

    def _follow(self) -> None:
        """The moving average after t steps; buffers are copied. One that came with the pair is not to be forgotten at
        first.
        """
        import torch

        decay = self._training.ema_decay if self.came_averaged else decay_at(self._steps, self._training.ema_decay)
        buffers = {name for name, _ in self._pair.generator.named_buffers()}
        with torch.no_grad():
            for name, tensor in self._pair.generator.state_dict().items():
                if name in buffers:
                    self._averaged[name].copy_(tensor)
                else:
                    self._averaged[name].lerp_(tensor, 1 - decay)

    def _penalty(self) -> float:
        """Weight of R1 in this step, 0 in those between two penalties."""
        interval = self._training.r1_interval
        return self._training.r1_weight * interval if self._steps % interval == 0 else 0.0

    def _labels(self, batch: Batch) -> Labels:
        """Class of each draw."""
        if not self._pair.live.num_classes:
            return None
        for image, label in zip(batch.sample_id, batch.label, strict=True):
            if label is None or label not in self._classes:
                known = ", ".join(list(self._classes)[:8])
                raise UserError(
                    f"--data: image {image} has the label {label!r}, of which the generator has no class (it has "
                    f"{known}); name its classes by --generator.label_names, or leave such images out"
                )
        return [self._classes[str(label)] for label in batch.label]

    def _tensor(self, labels: Labels) -> torch.Tensor | None:
        import torch

        return None if labels is None else torch.tensor(labels, dtype=torch.int64, device=self._share.device)

    # -- what is said

    def _not_finite(self, what: str, step: int) -> RunError:
        return RunError(
            f"training: {what} is not finite at step {step}, seed {self._seed}; lower --training.learning_rate or "
            "raise --training.r1_weight, and go on from the last checkpoint"
        )

    def _hopeless(self, tally: Tally, fake: FakeSampling, step: int) -> str:
        accepted = (tally.wanted - tally.rejected) / tally.candidates
        times = min(fake.max_candidates, VAIN) if tally.rejected == tally.wanted else fake.max_candidates
        side = "lower --fake.threshold" if fake.weight > 1 else "raise --fake.threshold"
        return (
            f"training: at step {step}, seed {self._seed}, {tally.rejected:.0f} of {tally.wanted:.0f} generated images "
            f"were rejected {times} times: {tally.above / tally.candidates:.2%} of {tally.candidates:.0f} candidates "
            f"have a density above tau = {fake.threshold:.4g}, and with w = {fake.weight:.4g} {accepted:.2%} were "
            f"accepted; set --fake.weight nearer to 1, {side}, or raise --fake.max_candidates at the cost of time"
        )


def _passes(count: int, parts: int) -> Iterator[slice]:
    """At most `parts` slices of `count` images, of equal size within one."""
    borders = [count * part // parts for part in range(parts + 1)]
    return (slice(a, b) for a, b in itertools.pairwise(borders) if b > a)


def _pass_sizes(training: TrainingSettings, world: int) -> set[int]:
    """Images that a discriminator may see at a time."""
    shares = {training.batch_size // world, -(-training.batch_size // world)}
    return {part.stop - part.start for share in shares for part in _passes(share, training.accumulate)}
