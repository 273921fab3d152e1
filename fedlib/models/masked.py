"""The networks of FedPM's code (`BerivanIsik/sparse-random-networks`, cf6b549), and a perceptron for digits.

3x3 convolutions with padding 1, ReLU, 2x2 max-pooling after every second, three linear layers; biases, no BatchNorm.
Masked methods replace the weights by their own; others start from He's.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import nn

from fedlib.errors import SpecError
from fedlib.models.initializers import normal_weights
from fedlib.rng import Rng


def conv4(channels: int, side: int, classes: int, root: Rng) -> nn.Sequential:
    """1x28x28: 1,933,258 parameters (10 classes)."""
    return _conv((64, 64, 128, 128), 256, channels, side, classes, root)


def conv4_narrow(channels: int, side: int, classes: int, root: Rng) -> nn.Sequential:
    """A quarter of conv4's channels and hidden units. 1x28x28: 121,594 parameters (10 classes)."""
    return _conv((16, 16, 32, 32), 64, channels, side, classes, root)


def conv6(channels: int, side: int, classes: int, root: Rng) -> nn.Sequential:
    """3x32x32: 2,262,602 parameters (10 classes)."""
    return _conv((64, 64, 128, 128, 256, 256), 256, channels, side, classes, root)


def conv10(channels: int, side: int, classes: int, root: Rng) -> nn.Sequential:
    """3x32x32: 19,197,092 parameters (100 classes)."""
    return _conv((64, 64, 128, 128, 256, 256, 512, 512, 1024, 1024), 256, channels, side, classes, root)


def mlp256(channels: int, side: int, classes: int, root: Rng) -> nn.Sequential:
    """Perceptron with two hidden layers of 256 ReLU units and no biases. 1x8x8: 84,480 weights (10 classes)."""
    sizes = (channels * side * side, 256, 256, classes)
    linear = [nn.Linear(a, b, bias=False) for a, b in itertools.pairwise(sizes)]
    network = nn.Sequential(nn.Flatten(), linear[0], nn.ReLU(), linear[1], nn.ReLU(), linear[2])
    return normal_weights(network, None, root)


def _conv(widths: Sequence[int], hidden: int, channels: int, side: int, classes: int, root: Rng) -> nn.Sequential:
    if side >> len(widths) // 2 < 1:
        raise SpecError(
            f"model: conv{len(widths)} halves images {len(widths) // 2} times; {side} x {side} is too small"
        )
    network: list[nn.Module] = []
    for index, width in enumerate(widths, 1):
        network += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
        channels = width
        if index % 2 == 0:
            network.append(nn.MaxPool2d(2))
            side //= 2
    network += [nn.Flatten(), nn.Linear(channels * side * side, hidden), nn.ReLU()]
    network += [nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, classes)]
    return normal_weights(nn.Sequential(*network), None, root)
