"""The denoising loop of pixel and latent diffusion: any network, any of diffusers' schedulers, one random generator per
sample.

diffusers' own loops are passed over where they hold only a U-Net or a DiT, for three reasons: DDIMPipeline and
PNDMPipeline put their own scheduler in the place of any other, LDMPipeline and DiTPipeline hand the scheduler no random
generator, and all of them turn gradients off. With the scheduler a pipeline was saved with, the images are those of the
pipeline.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from pd_core.core.errors import UserError, one_line
from pd_core.generators.noise import generators_of, normal, normal_latents
from pd_core.generators.protocol import Conditions, check_conditions, own_randomness, to_uint8

if TYPE_CHECKING:
    import torch

    Predict = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Network:
    """A denoising network with its way from latents to pixels; float32 outside, its own arithmetic inside.

    Attributes:
        predict: noisy latents [B, C, h, w], timestep, labels int64 [B] or None, to the network's output [B, C or 2C, h,
            w].
        to_pixels: latents [B, C, h, w] to images [B, 1 or 3, H, W] in [-1, 1].
        shape: (C, h, w) of one sample's latents.
        out_channels: channels of the output; 2C where it predicts a variance too.
        num_classes: number of class labels, 0 where there are none.
    """

    predict: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
    to_pixels: Callable[[torch.Tensor], torch.Tensor]
    shape: tuple[int, int, int]
    out_channels: int
    num_classes: int


def unet_network(pipeline: Any) -> Network:
    """The network of a pipeline of `unet` (UNet2DModel) and scheduler, and `vqvae` where it is latent diffusion."""
    unet, vqvae = pipeline.unet, getattr(pipeline, "vqvae", None)

    def predict(noisy: torch.Tensor, timestep: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        return unet(noisy.to(unet.dtype), timestep, class_labels=labels).sample.float()

    if unet.config.class_embed_type is not None:
        raise UserError(
            f"--generator.path {pipeline.config._name_or_path}: its U-Net takes class embeddings of the type "
            f"{unet.config.class_embed_type!r}, not class numbers; write a --generator.kind python for it"
        )
    size = unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return Network(
        predict=predict,
        to_pixels=partial(_decode, vqvae) if vqvae is not None else _same,
        shape=(unet.config.in_channels, height, width),
        out_channels=unet.config.out_channels,
        num_classes=unet.config.num_class_embeds or 0,
    )


def dit_network(pipeline: Any, guidance: float) -> Network:
    """The network of a DiTPipeline, with classifier-free guidance where `guidance` exceeds 1.

    Guided noise: e_null + guidance * (e_class - e_null), Ho and Salimans 2022, equation 6, with scale 1 + w.
    """
    import torch

    transformer, config = pipeline.transformer, pipeline.transformer.config
    classes = config.num_embeds_ada_norm

    def network(noisy: torch.Tensor, timestep: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        steps = torch.as_tensor(timestep, device=noisy.device).expand(len(noisy))
        return transformer(noisy.to(transformer.dtype), timestep=steps, class_labels=labels).sample.float()

    def guided(noisy: torch.Tensor, timestep: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        assert labels is not None, "check_conditions refuses a class-conditional generator without labels"
        null = torch.full_like(labels, classes)  # the table's last row, learned with labels dropped
        both = network(torch.cat([noisy, noisy]), timestep, torch.cat([labels, null]))
        conditional, unconditional = both.chunk(2)
        channels = noisy.shape[1]  # a predicted variance, behind the noise, is not guided
        conditional_noise, unconditional_noise = conditional[:, :channels], unconditional[:, :channels]
        noise = unconditional_noise + guidance * (conditional_noise - unconditional_noise)
        return torch.cat([noise, conditional[:, channels:]], dim=1)

    return Network(
        predict=guided if guidance > 1 else network,
        to_pixels=partial(_decode, pipeline.vae),
        shape=(config.in_channels, config.sample_size, config.sample_size),
        out_channels=config.out_channels or config.in_channels,
        num_classes=classes,
    )


def _same(latents: torch.Tensor) -> torch.Tensor:
    return latents


def encoded(pipeline: Any, images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Latents of images [B, C, H, W] in [-1, 1], float32: what `Network.to_pixels` of the pipeline undoes.

    noise: standard normal, of the latents' shape, for autoencoders whose latents are a distribution. No gradients.
    """
    import torch

    autoencoder = getattr(pipeline, "vqvae", None) or getattr(pipeline, "vae", None)
    if autoencoder is None:
        return images
    with torch.no_grad():
        found = autoencoder.encode(images.to(autoencoder.dtype))
        if hasattr(found, "latent_dist"):
            latents = found.latent_dist.mean.float() + found.latent_dist.std.float() * noise
        else:
            latents = found.latents.float()
        return latents * autoencoder.config.scaling_factor


def _decode(autoencoder: Any, latents: torch.Tensor) -> torch.Tensor:
    scaled = latents / autoencoder.config.scaling_factor
    return autoencoder.decode(scaled.to(autoencoder.dtype)).sample.float()


def denoise(
    predict: Predict,
    scheduler: Any,
    noise: torch.Tensor,
    steps: int,
    eta: float | None = None,
    generators: Sequence[torch.Generator] | None = None,
) -> torch.Tensor:
    """Latents of a sample from standard normal noise.

    Args:
        predict: noisy latents [B, C, h, w] and timestep to the network's output [B, C or 2C, h, w].
        scheduler: one of diffusers'; it is started anew, so what a multistep one remembers of the last batch is gone.
        noise: standard normal float32 [B, C, h, w].
        steps: denoising steps.
        eta: DDIM's noise per step (Song et al. 2020, equation 16); None: the scheduler's default.
        generators: one on the CPU for each sample, where the scheduler draws noise.
    """
    scheduler.set_timesteps(steps, device=noise.device)
    options: dict[str, Any] = {} if eta is None else {"eta": eta}
    if "generator" in inspect.signature(scheduler.step).parameters and generators is not None:
        options["generator"] = list(generators)
    latents = noise * getattr(
        scheduler, "init_noise_sigma", 1.0
    )  # flow matching schedulers have neither this nor a scale
    scaled = getattr(scheduler, "scale_model_input", _unscaled)
    for timestep in scheduler.timesteps:
        output = predict(scaled(latents, timestep), timestep)
        if not _reads_variance(scheduler):
            output = output[:, : latents.shape[1]]
        latents = scheduler.step(output, timestep, latents, **options).prev_sample
    return latents


def _unscaled(latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    return latents


def _reads_variance(scheduler: Any) -> bool:
    """Whether the scheduler uses the variance that some networks predict behind the noise."""
    learned = scheduler.config.get("variance_type") in ("learned", "learned_range")
    return learned and type(scheduler).__name__.startswith("DDPM")


def draws_noise(scheduler: Any, channels: int, out_channels: int, steps: int, eta: float | None) -> bool:
    """Whether sampling draws noise after its start; found by a run with a network that predicts nothing.

    Raises:
        UserError: the scheduler cannot run that many steps, or draws from torch's global random state.
    """
    import torch

    generator = torch.Generator("cpu").manual_seed(0)
    before = generator.get_state()
    name = f"--generator.scheduler {type(scheduler).__name__}"
    try:
        with torch.no_grad(), own_randomness(name, "cpu"):
            nothing = torch.zeros(1, out_channels, 2, 2)
            denoise(lambda noisy, t: nothing, scheduler, torch.zeros(1, channels, 2, 2), steps, eta, [generator])
    except (ValueError, IndexError) as error:
        if isinstance(error, UserError):
            raise
        reason = one_line(error)
        raise UserError(f"--generator.steps {steps}: {type(scheduler).__name__} refuses it ({reason})") from None
    return not torch.equal(before, generator.get_state())


class Diffusion:
    """Unconditional or class-conditional diffusion in pixels or latents; a `Generator`."""

    takes_prompts = False

    def __init__(
        self,
        network: Network,
        scheduler: Any,
        steps: int,
        eta: float | None,
        device: str,
        identity: Callable[[], dict[str, Any]],
    ):
        self.num_classes = network.num_classes
        self._network, self._scheduler = network, scheduler
        self._steps, self._eta = steps, eta
        self._device = device
        self._identity = identity

    def identity(self) -> dict[str, Any]:
        """Weights' hash, pipeline, scheduler and its configuration, steps, library versions."""
        return self._identity()

    def generate(self, seeds: Sequence[int], conditions: Conditions) -> torch.Tensor:
        """uint8 [B, H, W, 3] on the device; see Generator."""
        import torch

        labels = self._labels(conditions, len(seeds))
        generators = generators_of(seeds)
        noise = normal(generators, self._network.shape, self._device)
        # not inference_mode: a scheduler may keep a tensor of this run, which decode's gradients could not pass
        with torch.no_grad():
            latents = denoise(
                partial(_predict, self._network, labels), self._scheduler, noise, self._steps, self._eta, generators
            )
            return to_uint8(self._network.to_pixels(latents))

    def _labels(self, conditions: Conditions, count: int) -> torch.Tensor | None:
        import torch

        check_conditions(self, conditions.labels, conditions.prompts)
        if conditions.labels is None:
            return None
        assert len(conditions.labels) == count, "one label would be spread over all samples in silence"
        return torch.tensor(conditions.labels, device=self._device)


def _predict(
    network: Network, labels: torch.Tensor | None, noisy: torch.Tensor, timestep: torch.Tensor
) -> torch.Tensor:
    return network.predict(noisy, timestep, labels)


class DeterministicDiffusion(Diffusion):
    """Diffusion whose scheduler draws no noise: an image is a function of its first noise; a `LatentGenerator`."""

    def latents(self, seeds: Sequence[int]) -> torch.Tensor:
        """Standard normal float32 [B, C, h, w] on the device: the noise that denoising starts from."""
        return normal_latents(seeds, self._network.shape, self._device)

    def decode(self, latents: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        """float32 [B, 1 or 3, H, W], about [-1, 1], not clamped; differentiable in the latents.

        Each call of the network is a checkpoint: its activations are computed again on the way back, so memory grows
        with the number of steps by a few latents, not by a network's activations each (Chen et al. 2016).
        """
        from torch.utils.checkpoint import checkpoint

        again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)  # networks in eval mode draw nothing
        predict = partial(again, partial(_predict, self._network, self._labels(conditions, len(latents))))
        return again(self._network.to_pixels, denoise(predict, self._scheduler, latents, self._steps, self._eta))
