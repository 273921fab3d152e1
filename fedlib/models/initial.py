"""Initial weights, from the travelling normal law, so that they are the same on every device and library version."""

from __future__ import annotations

import math

import torch
from torch import nn

from fedlib.rng import Rng, normal


def normal_weights(network: nn.Sequential, deviation: float | None, root: Rng) -> nn.Sequential:
    """Weights of convolutions and linear layers normal around 0, biases 0; BatchNorm keeps scale 1 and shift 0.

    deviation: None is sqrt(2 / fan_in), which keeps the variance through layers with ReLU (He et al., ICCV 2015).
    """
    number = root.child("initial weights").seed()
    with torch.no_grad():
        for index, (label, p) in enumerate(network.named_parameters()):
            if p.ndim > 1:
                own = math.sqrt(2 / p[0].numel()) if deviation is None else deviation
                p.copy_(torch.from_numpy(normal(number, index, p.numel()).reshape(p.shape) * own))
            elif label.endswith("bias"):
                p.zero_()
    return network
