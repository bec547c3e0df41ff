"""Randomness from ids: what is drawn for a row depends on the row, never on who draws it or when."""

from __future__ import annotations

import hashlib

import numpy as np


def splitmix64(x: np.ndarray) -> np.ndarray:
    """The SplitMix64 output function (Steele, Lea & Flood 2014), uint64 [N] to uint64 [N], modulo 2^64."""
    z = x + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def stream(seed: int, name: str) -> int:
    """A seed in [0, 2^63) for one purpose of a run: streams of other names or other seeds are independent."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def integers(sample_id: np.ndarray, seed: int) -> np.ndarray:
    """One integer in [0, 2^63) for each id: int64 [N], without collisions among fewer than 2^32 or so of them."""
    state = splitmix64(sample_id.astype(np.uint64) ^ splitmix64(np.array([seed], dtype=np.uint64)))
    return (state >> np.uint64(1)).astype(np.int64)


def uniform(sample_id: np.ndarray, seed: int | None = None) -> np.ndarray:
    """One number in [0, 1) for each id: float64 [N]. Other seeds give other numbers; None: the id's plain hash."""
    state = sample_id.astype(np.uint64)
    if seed is not None:
        state ^= splitmix64(np.array([seed], dtype=np.uint64))
    return (splitmix64(state) >> np.uint64(11)).astype(np.float64) / 2.0**53
