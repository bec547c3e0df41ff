"""The networks of demo/train_gan.py. They are classes of torch's, so this module is imported inside functions only."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

GROUPS = 8  # of channels, each normalised alone: unlike batch statistics, the same whatever else is in a batch
DEVIATIONS_OF = 4  # images over which the discriminator sees how much they differ


class Modulated(nn.Module):
    """Upsamples by 2 where told to, then a residual block whose norms are scaled and shifted by the latent.

    Self-modulation: Chen et al. 2019, "On self modulation for generative adversarial networks", equation 2.
    """

    def __init__(self, inputs: int, outputs: int, code: int, scale: int):
        super().__init__()
        self.scale = scale
        self.norm1, self.norm2 = nn.GroupNorm(GROUPS, inputs, affine=False), nn.GroupNorm(GROUPS, outputs, affine=False)
        self.style1, self.style2 = nn.Linear(code, 2 * inputs), nn.Linear(code, 2 * outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
        """float32 [B, inputs, S, S] and [B, code] to [B, outputs, S * scale, S * scale]."""
        scale1, shift1 = self.style1(code)[:, :, None, None].chunk(2, dim=1)
        scale2, shift2 = self.style2(code)[:, :, None, None].chunk(2, dim=1)
        h = F.silu(self.norm1(x) * (1 + scale1) + shift1)
        x = self.skip(x)
        if self.scale > 1:
            h = F.interpolate(h, scale_factor=float(self.scale), mode="nearest")
            x = F.interpolate(x, scale_factor=float(self.scale), mode="nearest")
        h = self.conv1(h)
        h = F.silu(self.norm2(h) * (1 + scale2) + shift2)
        return x + self.conv2(h)


class Generator(nn.Module):
    """Latents, standard normal float32 [B, latent_dim], to images [B, colors, S, S] in [-1, 1]; smooth, for its
    gradients.

    channels: at half of the images' resolution, at a quarter, and so on. The last step up moves four channels into 2x2
    pixels (Shi et al. 2016): layers at full resolution would take most of the time.
    """

    def __init__(self, latent_dim: int, channels: tuple[int, ...], colors: int, side: int):
        super().__init__()
        from_low = channels[::-1]
        self.low_side, self.low_channels = side // 2 ** len(channels), from_low[0]
        code = 2 * latent_dim
        self.mapping = nn.Sequential(nn.Linear(latent_dim, code), nn.SiLU(), nn.Linear(code, code), nn.SiLU())
        self.start = nn.Linear(latent_dim, self.low_channels * self.low_side**2)
        self.blocks = nn.ModuleList([Modulated(from_low[0], from_low[0], code, 1)])
        self.blocks.extend(Modulated(a, b, code, 2) for a, b in itertools.pairwise(from_low))
        self.norm = nn.GroupNorm(GROUPS, channels[0])
        self.to_image = nn.Conv2d(channels[0], 4 * colors, 3, padding=1)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """See the class."""
        code = self.mapping(latents)
        x = self.start(latents).reshape(-1, self.low_channels, self.low_side, self.low_side)
        for block in self.blocks:
            x = block(x, code)
        return torch.tanh(F.pixel_shuffle(self.to_image(F.silu(self.norm(x))), 2))


class Halved(nn.Module):
    """A residual block, then the mean of 2x2 pixels. Without norms, which R1 makes up for (Mescheder et al. 2018)."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, inputs, 3, padding=1)
        self.conv2 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """float32 [B, inputs, S, S] to [B, outputs, S / 2, S / 2]."""
        h = F.leaky_relu(self.conv1(F.leaky_relu(x, 0.2)), 0.2)
        return (self.skip(F.avg_pool2d(x, 2)) + self.conv2(F.avg_pool2d(h, 2))) / 2**0.5


class Discriminator(nn.Module):
    """Images float32 [B, colors, S, S] to logits [B]: positive for real. channels: as the generator's."""

    def __init__(self, channels: tuple[int, ...], colors: int, side: int):
        super().__init__()
        self.from_image = nn.Conv2d(colors, channels[0], 4, stride=2, padding=1)
        self.blocks = nn.Sequential(*(Halved(a, b) for a, b in itertools.pairwise(channels)))
        low_side, low = side // 2 ** len(channels), channels[-1]
        self.conv = nn.Conv2d(low + 1, low, 3, padding=1)
        self.hidden, self.out = nn.Linear(low * low_side**2, low), nn.Linear(low, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """See the class."""
        x = self.blocks(self.from_image(images))
        x = torch.cat([x, deviation(x)], dim=1)
        x = F.leaky_relu(self.conv(F.leaky_relu(x, 0.2)), 0.2).flatten(1)
        return self.out(F.leaky_relu(self.hidden(x), 0.2)).squeeze(1)


def deviation(x: torch.Tensor, of: int = DEVIATIONS_OF) -> torch.Tensor:
    """Mean standard deviation over groups of images, so that a batch of look-alikes shows (Karras et al. 2018, section
    3).

    x: float32 [B, C, S, S], with B a multiple of the group; returns [B, 1, S, S]. of: a default, since TorchScript sees
    no globals. Raises ValueError: another B.
    """
    batch, _, height, width = x.shape
    if batch % of != 0:
        raise ValueError(f"this discriminator compares images in groups of {of}, the batch has {batch}")
    groups = x.reshape(of, batch // of, -1)
    mean = (groups.var(dim=0, unbiased=False) + 1e-8).sqrt().mean(dim=1)  # one per group
    return mean.repeat(of).reshape(-1, 1, 1, 1).expand(batch, 1, height, width)


# ---- DiffAugment (Zhao et al. 2020, "Differentiable augmentation for data-efficient GAN training", section 3) --------


def augmented(images: torch.Tensor, how: Sequence[str], random: torch.Generator) -> torch.Tensor:
    """Images changed by the functions of AUGMENTATIONS that `how` names, each its own way: [B, C, S, S],
    differentiable.
    """
    for name in how:
        images = AUGMENTATIONS[name](images, random)
    return images


def recoloured(images: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """Brightness moved by up to 0.5, saturation times 0 to 2, contrast times 0.5 to 1.5."""
    brightness, saturation, contrast = torch.rand(3, len(images), 1, 1, 1, generator=random)
    x = images + (brightness - 0.5)
    grey = x.mean(dim=1, keepdim=True)
    x = (x - grey) * (saturation * 2) + grey if x.shape[1] > 1 else x
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    return (x - mean) * (contrast + 0.5) + mean


def moved(images: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """Shifted by up to an eighth of the side along both axes, with zeros where nothing was."""
    batch, _, side, _ = images.shape
    most = max(1, side // 8)
    down, right = torch.randint(0, 2 * most + 1, (2, batch, 1), generator=random)
    ticks = torch.arange(side)
    rows, columns = (down + ticks)[:, :, None], (right + ticks)[:, None, :]  # of the padded image
    padded = F.pad(images, (most,) * 4).permute(0, 2, 3, 1)
    return padded[torch.arange(batch)[:, None, None], rows, columns].permute(0, 3, 1, 2).contiguous()


def cut_out(images: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """A square of half the side is 0, its centre anywhere in the image."""
    batch, _, side, _ = images.shape
    middle = torch.randint(0, side, (2, batch, 1), generator=random)
    inside = (torch.arange(side) - middle + side // 4).clamp(-1, side // 2)  # -1 or side // 2: outside
    inside = (inside >= 0) & (inside < side // 2)
    hole = inside[0][:, :, None] & inside[1][:, None, :]
    return images * (~hole)[:, None].to(images.dtype)


AUGMENTATIONS = {"color": recoloured, "translation": moved, "cutout": cut_out}
