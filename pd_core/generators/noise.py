"""Noise from ids: latents that depend on their seed alone, and initial states of random generators."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch


# Where torch's CPU generator, a Mersenne Twister, keeps its words: 32 bits each, widened to uint64, after a header that
# begins
# with the seed as uint64. `_twister_state` holds torch to it.
TWISTER_WORDS = 624
WORDS_AT = slice(24, 24 + 8 * TWISTER_WORDS)


def generators_of(seeds: Sequence[int]) -> list[torch.Generator]:
    """One CPU random generator for each seed in [0, 2^64); the whole seed decides.

    `manual_seed` would drop all but the low 32 bits of a seed, and 256 of a million candidates would share their noise.
    The words of the Mersenne Twister's state are SHAKE-128 (FIPS 202) of the seed's 8 bytes, little-endian, instead.

    Raises:
        RuntimeError: this torch keeps the state of its generators in another way.
    """
    import torch

    return [_filled(torch.Generator("cpu"), int(seed), _twister_state()) for seed in seeds]


def _twister_words(seed: int) -> np.ndarray:
    """uint32 [624]."""
    return np.frombuffer(hashlib.shake_128(seed.to_bytes(8, "little")).digest(4 * TWISTER_WORDS), "<u4")


def _filled(generator: torch.Generator, seed: int, blank: np.ndarray) -> torch.Generator:
    import torch

    state = blank.copy()
    state[:8].view(np.uint64)[0] = seed  # what initial_seed() tells
    state[WORDS_AT].view(np.uint64)[:] = _twister_words(seed)
    generator.set_state(torch.from_numpy(state))
    return generator


@functools.cache
def _twister_state() -> np.ndarray:
    """The state of a CPU generator that has drawn nothing yet, uint8; proved to lie as `_filled` takes it to.

    Raises:
        RuntimeError: a filled generator does not give what numpy's Mersenne Twister gives from the same words.
    """
    import torch

    drawn = TWISTER_WORDS + 100  # over the end of the first words; torch tells the low 31 bits of each draw
    reference: Any = np.random.MT19937()
    reference.state = {
        "bit_generator": "MT19937",
        "state": {"key": _twister_words(1).astype(np.uint32), "pos": TWISTER_WORDS},
    }
    blank = torch.Generator("cpu").manual_seed(0).get_state().numpy()
    try:
        generator = _filled(torch.Generator("cpu"), 1, blank)
        found = torch.empty(drawn, dtype=torch.int32).random_(generator=generator).numpy()
    except (ValueError, RuntimeError) as error:
        raise RuntimeError(f"torch {torch.__version__}: cannot set the state of its CPU generator ({error})") from error
    if generator.initial_seed() != 1 or not np.array_equal(found, reference.random_raw(drawn) & 0x7FFFFFFF):
        raise RuntimeError(
            f"torch {torch.__version__}: keeps the state of its CPU generator in a way that pd_core does not know, so "
            "seeds would be cut to 32 bits; use torch 2.15, and report this"
        )
    return blank


def normal(generators: Sequence[torch.Generator], shape: Sequence[int], device: torch.device | str) -> torch.Tensor:
    """The next standard normal draw, float32 [B, *shape] on a device; row i from the CPU generator i alone."""
    import torch

    return torch.stack([torch.randn(*shape, generator=g) for g in generators]).to(device)


def normal_latents(seeds: Sequence[int], shape: Sequence[int], device: torch.device | str = "cpu") -> torch.Tensor:
    """Standard normal float32 [B, *shape] on a device, row i from seeds[i] alone."""
    return normal(generators_of(seeds), shape, device)


def truncated_latents(
    seeds: Sequence[int], shape: Sequence[int], bound: float, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """`normal_latents` whose entries beyond ±bound > 0 are drawn again (Brock et al. 2019, section 3.1)."""
    import torch

    rows = []
    for generator in generators_of(seeds):
        row = torch.randn(*shape, generator=generator)
        while many := int((beyond := row.abs() > bound).sum()):
            row[beyond] = torch.randn(many, generator=generator)
        rows.append(row)
    return torch.stack(rows).to(device)
