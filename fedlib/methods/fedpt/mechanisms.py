"""Training that is private for a whole client: clipped updates, Gaussian noise once a round or in a tree.

Noise is measured by the noise multiplier nm: its standard deviation in the sum of a cohort's updates, divided by the
clipping norm C. Sources: McMahan et al. 2018 (DP-FedAvg), Kairouz et al. 2021 (DP-FTRL, arXiv 2103.00039).

This is for research: the generators are repeatable and no cipher, and noise in floating point leaks (Mironov 2012).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedlib.core.plan import Tensors
from fedlib.errors import PayloadError
from fedlib.rng import Rng


def clip(update: Mapping[str, Tensor], bound: float) -> tuple[Tensors, float]:
    """The update times min(1, bound / norm), and the norm: jointly over all tensors. PayloadError: it is not finite."""
    norms = [float(torch.linalg.vector_norm(tensor.detach(), dtype=torch.float64)) for tensor in update.values()]
    norm = math.hypot(*norms)
    if not math.isfinite(norm):
        raise PayloadError(f"update: its norm is {norm}, so it cannot be clipped; leave this client out of the round")
    if norm <= bound:
        return dict(update), norm
    return {name: tensor * (bound / norm) for name, tensor in update.items()}, norm


def flatten(tensors: Mapping[str, Tensor]) -> Tensor:
    """All entries in a row, in the mapping's order."""
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


def unflatten(flat: Tensor, shapes: Mapping[str, torch.Size]) -> Tensors:
    """The inverse."""
    parts = flat.split([shape.numel() for shape in shapes.values()])
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def gaussian(rng: Rng, size: int, std: float) -> Tensor:
    """`size` independent float32 draws from N(0, std^2), the same for the same place `rng`.

    By numpy, since torch keeps 32 bits of a seed, and that many vectors can be tried out.
    """
    generator = np.random.Generator(np.random.Philox(key=np.array([rng.seed(), 0], dtype=np.uint64)))
    return torch.from_numpy(generator.standard_normal(size, dtype=np.float32)) * std


def private_mean(total: Tensor, rng: Rng, std: float, cohort: float) -> Tensor:
    """DP-FedAvg: (flat sum of clipped updates + N(0, std^2)) / M, std = nm C; M is fixed, the expected cohort."""
    return (total + gaussian(rng, total.numel(), std)) / cohort


def tree_nodes(rounds: int) -> list[tuple[int, int]]:
    """(level, index) of the nodes that cover the first `rounds` rounds: node (l, i) covers i 2^l to (i + 1) 2^l - 1."""
    return [(level, (rounds >> level) - 1) for level in reversed(range(rounds.bit_length())) if rounds >> level & 1]


def tree_noise(rng: Rng, rounds: int, size: int, std: float) -> Tensor:
    """Noise of the sum over the first `rounds` rounds, float64: variance popcount(rounds) std^2 per entry.

    Each node's draw is made anew from its name, so nothing is kept between rounds but `rng`.
    """
    noise = torch.zeros(size, dtype=torch.float64)
    for level, index in tree_nodes(rounds):
        noise += gaussian(rng.child(level, index), size, std)
    return noise


@dataclass(frozen=True)
class Ftrl:
    """What the server of DP-FTRL-M keeps: flat y^0, and in float64 the sum of pseudo-gradients and its momentum."""

    start: Tensor
    total: Tensor
    velocity: Tensor


def ftrl_start(point: Tensor) -> Ftrl:
    """The first state; also the state after a restart of the tree, which needs a new place for its noise too."""
    zeros = torch.zeros_like(point, dtype=torch.float64)
    return Ftrl(point, zeros, zeros)


def ftrl_step(
    state: Ftrl, gradient: Tensor, noise: Tensor | float, *, lr: float, momentum: float
) -> tuple[Ftrl, Tensor]:
    """One round: the new state and the new flat point. `gradient` is minus the mean of the clipped updates and `noise`
    the tree's for all rounds so far (std nm C / M a node); without noise it is SGD with momentum (Kairouz et al.)."""
    total = state.total + gradient
    velocity = momentum * state.velocity + total + noise
    return Ftrl(state.start, total, velocity), (state.start - lr * velocity).to(state.start.dtype)
