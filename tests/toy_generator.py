"""A generator of tiny images for tests, by `tests/toy_generator.py:make`; it can be told to fail."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

    from pd_core.generators.protocol import Conditions


class Toy:
    """16x16 px: one colour with a rectangle of another, as tests/tiny.py draws the real images, or that of a class."""

    def __init__(
        self, classes: int, texts: bool, bad_seeds: Sequence[int], fail: str, once: str | None, pause_s: float
    ):
        self.num_classes, self.takes_prompts = classes, texts
        self.bad_seeds, self.fail, self.once, self.pause_s = set(bad_seeds), fail, once, pause_s

    def identity(self) -> dict[str, Any]:
        return {"toy": 1, "classes": self.num_classes}

    def generate(self, seeds: Sequence[int], conditions: Conditions) -> torch.Tensor:
        import torch

        from pd_core.generators.protocol import to_uint8

        time.sleep(self.pause_s)
        if self.fail == "always":
            raise RuntimeError("no image")
        bad = self.bad_seeds & set(seeds)
        if bad and not (self.once and Path(self.once).exists()):
            if self.once and Path(self.once).parent.exists():
                Path(self.once).touch()
            if self.fail == "raise":
                raise RuntimeError("CUDA error: an illegal memory access")
            return to_uint8(torch.full((len(seeds), 3, 16, 16), float("nan")))
        labels = conditions.labels or [0] * len(seeds)
        return torch.from_numpy(np.stack([draw(s, c) for s, c in zip(seeds, labels, strict=True)]))


def draw(seed: int, label: int) -> np.ndarray:
    rng = np.random.default_rng([seed, label])
    pixels = np.full((16, 16, 3), rng.integers(0, 255, 3), np.uint8)
    pixels[rng.integers(16) :, rng.integers(16) :] = rng.integers(0, 255, 3)
    return pixels


def make(
    classes: int = 0,
    texts: bool = False,
    bad_seeds: Sequence[int] = (),
    fail: str = "raise",
    once: str | None = None,
    pause_s: float = 0.0,
) -> Toy:
    return Toy(classes, texts, bad_seeds, fail, once, pause_s)


def sampling(**more: object) -> list[str]:
    """Arguments of generate.py for twenty of its images; more: further settings, such as index and output."""
    settings = {
        "generator.kind": "python",
        "generator.path": f"{__file__}:make",
        "n": 20,
        "weighting.threshold": "p60",
        "weighting.weight": 10,
        "chunk": 16,
        "pilot": 64,
    }
    return [f"--{name}={value}" for name, value in (settings | more).items()]
