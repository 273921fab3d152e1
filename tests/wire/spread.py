"""Masks that are as good as random and the same everywhere."""

import numpy as np


def turns(n: int, factor: int, width: int) -> np.ndarray:
    """Multiples of the factor modulo 2**width, as fractions of it; by the golden ratio they fall evenly into [0, 1)."""
    return (np.arange(n, dtype=np.uint64) * np.uint64(factor) % np.uint64(2**width)).astype(np.float64) * 2.0**-width


def spread_mask(n: int, density: float) -> np.ndarray:
    return turns(n, 2654435761, 32) < density


def falling_mask(n: int) -> tuple[np.ndarray, np.ndarray]:
    """A mask and magnitudes x in [0, 1) with P(1 | x) = min(0.1 / x, 1) / 2: FedMRN's law for |u| = 0.1 and noise on
    [-1, 1)."""
    x = turns(n, 2654435761, 32).astype(np.float32)
    return turns(n, 40503, 16) < np.minimum(0.1 / np.maximum(x, np.float32(1e-6)), 1) / 2, x
