"""Diffusion models in training: one step of denoising training on weighted images; the loss is the one the model was
trained with.

Only the real side is weighted (docs/method.md, section 5): the generated images of a diffusion model take no part in
its training. What the network predicts is what the scheduler saved with it says: the noise (Ho et al. 2020, Algorithm
1), the image (Ho et al. 2020, section 3.2), the velocity (Salimans & Ho 2022, appendix D) or the flow (Lipman et al.
2023, equation 23).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pd_core.core import seeds as core_seeds
from pd_core.core.errors import RunError, UserError
from pd_core.core.settings.finetune import TrainingSettings
from pd_core.core.settings.generate import GeneratorSettings
from pd_core.finetune import averaging, parallel
from pd_core.finetune.protocol import Batch, Share
from pd_core.generators import diffusers
from pd_core.generators.noise import generators_of, normal
from pd_core.generators.protocol import Generator

if TYPE_CHECKING:
    import torch

BETAS = (0.9, 0.999)  # of AdamW, as diffusion models are trained with
DISTILLED = ("LCMScheduler", "TCDScheduler", "CMStochasticIterativeScheduler", "FlowMatchLCMScheduler")
PRECONDITIONED = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")


# ---- the forward process ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VariancePreserving:
    """x_t = sqrt(ᾱ_t) x + sqrt(1 - ᾱ_t) ε; the target is ε, x or v = sqrt(ᾱ_t) ε - sqrt(1 - ᾱ_t) x.

    How noise is added while training, and what the network is to say of it. Levels are integers in [0, levels).

    min_snr: γ of Hang et al. 2023 ("Efficient diffusion training via min-SNR weighting strategy", equation 5 and
    section 3.4): min(SNR, γ) in the image's loss is min(SNR, γ)/SNR in that of ε and min(SNR, γ)/(SNR + 1) in that of
    v. None: 1.
    """

    scheduler: Any
    prediction: str
    min_snr: float | None

    @property
    def levels(self) -> int:
        """How many: T."""
        return int(self.scheduler.config.num_train_timesteps)

    def noisy(
        self, latents: torch.Tensor, noise: torch.Tensor, level: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(noisy latents, timesteps as the network takes them [B], target) of latents and noise [B, C, h, w], level
        [B].
        """
        target = {
            "epsilon": lambda: noise,
            "sample": lambda: latents,
            "v_prediction": lambda: self.scheduler.get_velocity(latents, noise, level),
        }[self.prediction]()
        return self.scheduler.add_noise(latents, noise, level), level, target

    def weight(self, level: torch.Tensor) -> torch.Tensor:
        """Of each image's loss, float32 [B]."""
        import torch

        if self.min_snr is None:
            return torch.ones(len(level), device=level.device)
        alphas = self.scheduler.alphas_cumprod.to(level.device)[level]
        snr = alphas / (1 - alphas)
        kept = snr.clamp(max=self.min_snr)
        return {"epsilon": kept / snr, "sample": kept, "v_prediction": kept / (snr + 1)}[self.prediction].float()


@dataclass(frozen=True)
class Flow:
    """x_σ = (1 - σ) x + σ ε, target ε - x; σ on the scheduler's own grid, its shift included (Esser et al. 2024,
    section 5.3.2).
    """

    scheduler: Any

    @property
    def levels(self) -> int:
        """How many σ."""
        return len(self.scheduler.sigmas)

    def noisy(
        self, latents: torch.Tensor, noise: torch.Tensor, level: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See VariancePreserving."""
        sigma = self.scheduler.sigmas.to(latents.device)[level].view(-1, 1, 1, 1)
        timesteps = self.scheduler.timesteps.to(latents.device)[level]
        return (1 - sigma) * latents + sigma * noise, timesteps, noise - latents

    def weight(self, level: torch.Tensor) -> torch.Tensor:
        """See VariancePreserving."""
        import torch

        return torch.ones(len(level), device=level.device)


Process = VariancePreserving | Flow


def process_of(saved: Any, min_snr: float | None, channels: int, out_channels: int, where: str) -> Process:
    """The process that a scheduler of diffusers was saved for.

    Args:
        saved: the scheduler of the pipeline.
        min_snr: of the settings.
        channels: C of the latents. out_channels: of the network, C or 2C, the latter with a variance behind the
            prediction.
        where: the pipeline, for messages.

    Raises:
        UserError: a distilled or preconditioned model, another number of channels, an unknown kind of prediction,
            min-SNR where it means nothing.
    """
    from diffusers import DDPMScheduler

    name, config = type(saved).__name__, saved.config
    if name in (*DISTILLED, *PRECONDITIONED):
        raise UserError(
            f"{where}: {name} belongs to a distilled or preconditioned model, whose loss is not a plain prediction; "
            "fine-tune the model that it was made from"
        )
    if out_channels not in (channels, 2 * channels):
        raise UserError(
            f"{where}: the network gives {out_channels} channels for latents of {channels}; model and scheduler "
            f"disagree, expected {channels}, or {2 * channels} with a variance"
        )
    prediction = config.get("prediction_type", "epsilon")
    if name.startswith("FlowMatch"):
        if min_snr is not None:
            raise UserError("--training.min_snr: has no meaning for flow matching; drop it")
        if config.get("use_dynamic_shifting") or not hasattr(saved, "sigmas"):
            raise UserError(
                f"{where}: {name} shifts its noise by the size of the image, which is not built; set a fixed shift"
            )
        return Flow(type(saved).from_config(config))
    if prediction not in ("epsilon", "sample", "v_prediction") or "beta_schedule" not in config:
        raise UserError(
            f"{where}: {name} with prediction_type {prediction!r}: model and scheduler disagree, or it is not known "
            "here; known are epsilon, sample and v_prediction with a beta schedule, and flow matching"
        )
    return VariancePreserving(DDPMScheduler.from_config(config), prediction, min_snr)


# ---- the model -------------------------------------------------------------------------------------------------------


class DiffusionModel:
    """A diffusers pipeline that is trained; a `Trainable`. A variance that it predicts behind the noise is not trained.

    Args:
        settings: of the generator: what is loaded, and how images are sampled for evaluation.
        training: the optimisation.
        share: this worker.
        seed: of the run.
        classes: class number of each label; empty where the model takes none.

    Raises:
        UserError: as `diffusers.open_trainable` and `process_of`.
    """

    def __init__(
        self,
        settings: GeneratorSettings,
        training: TrainingSettings,
        share: Share,
        seed: int,
        classes: Mapping[str, int],
    ):
        import torch

        self._pipeline = diffusers.open_trainable(settings, share.device)
        pipeline, where = self._pipeline, f"--generator.path {settings.path}"
        self.came_averaged = False
        self._process = process_of(
            pipeline.scheduler, training.min_snr, pipeline.shape[0], pipeline.out_channels, where
        )
        self._training, self._share, self._seed, self._classes = training, share, seed, classes
        self.size = pipeline.size
        self.network = pipeline.network
        self.parameters = sum(parameter.numel() for parameter in self.network.parameters())
        if training.gradient_checkpointing:
            self.network.enable_gradient_checkpointing()
        self._averaged = averaging.averaged(self.network, training.ema_decay)
        self._optimizer = torch.optim.AdamW(
            self.network.parameters(), training.learning_rate, betas=BETAS, weight_decay=0.0, fused=True
        )
        self._scaler = torch.amp.GradScaler(share.device.partition(":")[0], enabled=training.precision == "fp16")

    def step(self, batch: Batch) -> dict[str, float]:
        """See Trainable; logs loss, gradient_norm and learning_rate."""
        import torch

        training, world = self._training, self._share.world
        rate = training.learning_rate * averaging.warm_up(batch.step, training.warmup_steps)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.zero_grad()
        total = 0.0
        with parallel.own_random_state(self._seed, batch.step, self._share):
            for part in np.array_split(np.arange(len(batch.sample_id)), min(training.accumulate, len(batch.sample_id))):
                loss = self._loss(batch, part) * (len(part) / len(batch.sample_id))
                self._scaler.scale(loss).backward()
                total += loss.item()
        parameters = list(self.network.parameters())
        parallel.average_gradients(parameters, world)
        self._scaler.unscale_(self._optimizer)
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, training.clip))
        loss_of_all = parallel.sum_of({"loss": total}, world, self._share.device)["loss"] / world
        if not math.isfinite(loss_of_all) or not (math.isfinite(norm) or self._scaler.is_enabled()):
            raise RunError(
                f"training: the loss is {loss_of_all:g} and its gradient {norm:g} at step {batch.step} (seed "
                f"{self._seed}); lower --training.learning_rate, or set --training.precision fp32"
            )
        self._scaler.step(self._optimizer)
        self._scaler.update()
        if self._scaler.is_enabled() and self._scaler.get_scale() < 1:  # every step so far has been skipped on the way
            raise RunError(
                f"training: gradients in fp16 are not finite however they are scaled, up to step {batch.step} (seed "
                f"{self._seed}); set --training.precision bf16 or fp32"
            )
        if math.isfinite(norm):
            self._averaged.update_parameters(self.network)
        return {"loss": loss_of_all, "gradient_norm": norm, "learning_rate": rate}

    def _loss(self, batch: Batch, part: np.ndarray) -> torch.Tensor:
        import torch

        device, training = self._share.device, self._training
        images = parallel.images_of(batch.pixels[part], self._pipeline.colors, device)
        positions = batch.positions[part]
        latents = self._pipeline.encode(images, self._noise(positions, "latent"))
        noise = self._noise(positions, "noise")
        level = torch.from_numpy(self._levels(batch, positions)).to(device)
        noisy, timesteps, target = self._process.noisy(latents, noise, level)
        dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[training.precision]
        with torch.autocast(device.partition(":")[0], dtype=dtype, enabled=dtype is not None):
            predicted = self._pipeline.predict(noisy, timesteps, self._labels(batch, part))
        predicted = predicted[:, : target.shape[1]].float()  # a variance behind it is left as it is
        errors = (predicted - target).square().flatten(1).mean(1)
        return (errors * self._process.weight(level)).mean()

    def _noise(self, positions: np.ndarray, name: str) -> torch.Tensor:
        seeds = core_seeds.integers(positions, core_seeds.stream(self._seed, f"finetune/{name}"))
        return normal(generators_of([int(seed) for seed in seeds]), self._pipeline.shape, self._share.device)

    def _levels(self, batch: Batch, positions: np.ndarray) -> np.ndarray:
        """Noise level of each draw, int64; those of a step are spread evenly (Kingma et al. 2021, appendix I.1)."""
        of_all = len(batch.sample_id) * self._share.world
        start = core_seeds.uniform(np.array([batch.step]), core_seeds.stream(self._seed, "finetune/level"))
        u = (start + (positions - batch.step * of_all) / of_all) % 1.0
        return np.minimum((u * self._process.levels).astype(np.int64), self._process.levels - 1)

    def _labels(self, batch: Batch, part: np.ndarray) -> torch.Tensor | None:
        import torch

        if not self._pipeline.num_classes:
            return None
        numbers = [self._classes[str(batch.label[i])] for i in part]
        return torch.tensor(numbers, device=self._share.device)

    @property
    def _kept(self) -> dict[str, Any]:
        """What its state is made of."""
        return {
            "network": self.network,
            "averaged": self._averaged,
            "optimizer": self._optimizer,
            "scaler": self._scaler,
        }

    def state(self) -> dict[str, Any]:
        """See Trainable."""
        return {name: kept.state_dict() for name, kept in self._kept.items()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """See Trainable."""
        for name, kept in self._kept.items():
            kept.load_state_dict(state[name])

    def averaged(self) -> dict[str, torch.Tensor]:
        """See Trainable."""
        return averaging.weights_of(self._averaged.module)

    def companions(self) -> dict[str, torch.Tensor]:
        """See Trainable: none, a pipeline is saved with its average."""
        return {}

    def load_companions(self, companions: Mapping[str, torch.Tensor]) -> None:
        """See Trainable."""
        assert not companions, "a diffusion model has none"

    def sampler(self, weights: Mapping[str, torch.Tensor]) -> Generator:
        """See Trainable."""
        return self._pipeline.sampler(averaging.with_weights(self.network, weights))

    def save(self, folder: str, weights: Mapping[str, torch.Tensor]) -> None:
        """See Trainable."""
        self._pipeline.save(folder, averaging.with_weights(self.network, weights))
