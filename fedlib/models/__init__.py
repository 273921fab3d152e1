"""The papers' networks by name, each with its initial weights; parameter counts are tested against the papers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from fedlib import rng
from fedlib.errors import SpecError
from fedlib.models import cnn

# name -> (builder from (channels, side, classes), standard deviation of the initial weights)
MODELS: dict[str, tuple[Callable[[int, int, int], nn.Sequential], float]] = {
    "cnn2": (cnn.cnn2, 0.03),
    "cnn4": (cnn.cnn4, 0.01),
    "cnn8": (cnn.cnn8, 0.01),
    "mlp": (cnn.mlp, 0.1),
}


def build(name: str, channels: int, side: int, classes: int, seed: rng.Rng) -> nn.Sequential:
    """Network `name` for images [n, channels, side, side]; weights from the travelling normal law under `seed`.

    Weights of convolutions and linear layers are normal around 0, biases 0; BatchNorm keeps scale 1 and shift 0.
    Raises SpecError for an unknown name.
    """
    if name not in MODELS:
        raise SpecError(f"model: {name!r} is unknown; allowed: {', '.join(sorted(MODELS))}")
    builder, deviation = MODELS[name]
    model = builder(channels, side, classes)
    number = seed.child("initial weights").seed()
    with torch.no_grad():
        for index, (label, p) in enumerate(model.named_parameters()):
            if p.ndim > 1:
                p.copy_(torch.from_numpy(rng.normal(number, index, p.numel()).reshape(p.shape) * deviation))
            elif label.endswith("bias"):
                p.zero_()
    return model
