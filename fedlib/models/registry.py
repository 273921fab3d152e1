"""The papers' networks by name; parameter counts are tested against the papers."""

from __future__ import annotations

import torch
from torch import nn

from fedlib.errors import require_name
from fedlib.models import cnn, partial, pooled
from fedlib.models.initializers import Builder
from fedlib.rng import Rng

MODELS: dict[str, Builder] = {  # beside each: its parameters, for the data of its paper
    "cnn2": cnn.plain("cnn2", (32, 64), (128,), deviation=0.03, padding=0),  # 3x32x32, 10 classes: 1,626,442
    "cnn4": cnn.normed("cnn4", (32, 64, 128, 256), 1),  # weights, 10 classes: 1x28x28 389,920; 3x32x32 398,176
    "cnn7": cnn.plain("cnn7", (48, 96, 192, 256), (512, 64)),  # 3x32x32, 10 classes: 9,074,218
    "cnn8": cnn.normed("cnn8", (32, 32, 64, 64, 128, 128, 256, 256), 2),  # weights, 3x32x32: 1,181,536 (10 classes)
    # 3x32x32, 100 classes: 19,197,092
    "conv10": cnn.plain("conv10", (64, 64, 128, 128, 256, 256, 512, 512, 1024, 1024), (256, 256)),
    "conv4": cnn.plain("conv4", (64, 64, 128, 128), (256, 256)),  # 1x28x28, 10 classes: 1,933,258
    "conv4-narrow": cnn.plain("conv4-narrow", (16, 16, 32, 32), (64, 64)),  # 121,594
    "conv6": cnn.plain("conv6", (64, 64, 128, 128, 256, 256), (256, 256)),  # 3x32x32, 10 classes: 2,262,602
    "emnist": partial.emnist((32, 64), 512),  # McMahan et al. 2017; 1x28x28, 62 classes: 1,690,046
    # How wide must a layer be for its random weights to do?
    **{f"emnist-hidden{hidden}": partial.emnist((8, 16), hidden) for hidden in (8, 32, 512, 2048)},
    "emnist-narrow": partial.emnist((8, 16), 128),  # 111,902
    # To be trained whole; sends no more than emnist-narrow with its hidden layer frozen.
    "emnist-thin": partial.emnist((2, 4), 21),  # 4,613 (10 classes), where that trains 4,714
    "mlp": cnn.plain("mlp", (), (64,), deviation=0.1, bias=False),  # 1x8x8, 10 classes: 4,736
    "mlp256": cnn.plain("mlp256", (), (256, 256), bias=False),  # 84,480
    "mobilenet": pooled.mobilenet(momentum=0.01),  # 1 channel, 12 classes: 3,207,756, 44,640 of them depthwise
    # A quarter of the channels; short: without the five equal blocks in the middle.
    "mobilenet-short": pooled.mobilenet(momentum=0.1, divisor=4, left_out=range(7, 12)),  # 124,316
    "mobilenet-quarter": pooled.mobilenet(momentum=0.1, divisor=4),  # 213,276
    "pooled4": pooled.pooled4,
    "resnet18-gn": partial.resnet18_gn,
    "resnet18-gn-100head": partial.resnet18_gn_100head,
    "resnet20": pooled.resnet20(momentum=0.01),  # 3 channels, 10 classes: 269,722, of them 267,696 in 19 kernels
    "resnet20-quick": pooled.resnet20(momentum=0.1),
    "transformer": partial.transformer,
    "vanilla": cnn.plain("vanilla", (32, 64), (512,), pool_every=1, kernel=5, padding=0, pool_first=True),  # 582,026
}


def build(name: str, channels: int, side: int, classes: int, root: Rng) -> nn.Sequential:
    """Network `name` for images [n, channels, side, side]. SpecError: unknown name, or images too small for it."""
    require_name("model", name, MODELS)
    with torch.random.fork_rng(devices=[]):  # torch draws weights of its own first; leave its global state alone
        return MODELS[name](channels, side, classes, root)
