"""The papers' networks by name; parameter counts are tested against the papers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from fedlib.errors import require_name
from fedlib.models import cnn, masked, partial, pooled
from fedlib.rng import Rng

# name -> builder from (channels, side, classes, root of the random draws), initial weights included
MODELS: dict[str, Callable[[int, int, int, Rng], nn.Sequential]] = {
    "cnn2": cnn.cnn2,
    "cnn4": cnn.cnn4,
    "cnn7": cnn.cnn7,
    "cnn8": cnn.cnn8,
    "conv10": masked.conv10,
    "conv4": masked.conv4,
    "conv4-narrow": masked.conv4_narrow,
    "conv6": masked.conv6,
    "emnist": partial.emnist,
    **{f"emnist-hidden{hidden}": partial.emnist_hidden(hidden) for hidden in (8, 32, 512, 2048)},
    "emnist-narrow": partial.emnist_narrow,
    "emnist-thin": partial.emnist_thin,
    "mlp": cnn.mlp,
    "mlp256": masked.mlp256,
    "mobilenet": pooled.mobilenet,
    "mobilenet-short": pooled.mobilenet_short,
    "mobilenet-quarter": pooled.mobilenet_quarter,
    "pooled4": pooled.pooled4,
    "resnet18-gn": partial.resnet18_gn,
    "resnet18-gn-100head": partial.resnet18_gn_100head,
    "resnet20": pooled.resnet20,
    "resnet20-quick": pooled.resnet20_quick,
    "transformer": partial.transformer,
    "vanilla": cnn.vanilla,
}


def build(name: str, channels: int, side: int, classes: int, root: Rng) -> nn.Sequential:
    """Network `name` for images [n, channels, side, side]. SpecError: unknown name, or images too small for it."""
    require_name("model", name, MODELS)
    with torch.random.fork_rng(devices=[]):  # torch draws weights of its own first; leave its global state alone
        return MODELS[name](channels, side, classes, root)
