"""Plain image classifiers, listed in `registry`: convolutions, pools and linear layers one after another.

From the code of FedMRN (`Leopold1423/fedmrn-mm24`, f0fb8a0), FedDQ (`lqu-001/FedDQ`, 8946cc1; its dropout left out) and
FedPM (`BerivanIsik/sparse-random-networks`, cf6b549), with FedAvg's two-layer CNN and perceptrons for digits.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import nn

from fedlib.errors import SpecError
from fedlib.models.initializers import Builder, normal_weights
from fedlib.rng import Rng


def normed(name: str, widths: Sequence[int], pool_every: int, deviation: float = 0.01) -> Builder:
    """A network of FedMRN: BatchNorm after each convolution, a linear classifier, no biases anywhere."""
    return plain(name, widths, (), deviation, pool_every, bias=False, norm=True)


def plain(
    name: str,
    widths: Sequence[int],
    hidden: Sequence[int],
    deviation: float | None = None,
    pool_every: int = 2,
    *,
    kernel: int = 3,
    padding: int = 1,
    bias: bool = True,
    norm: bool = False,
    pool_first: bool = False,
) -> Builder:
    """Convolutions of `widths` channels with ReLU, a 2x2 max-pool beside every `pool_every`-th ReLU, linear layers of
    `hidden` units with ReLU, the classifier. deviation: as of `normal_weights`."""

    def build(channels: int, side: int, classes: int, root: Rng) -> nn.Sequential:
        lost, least = kernel - 1 - 2 * padding, 1
        for index in range(len(widths), 0, -1):
            least = least * (1 if index % pool_every else 2) + lost
        if side < least:
            raise SpecError(
                f"model: {name} needs images of {least} x {least} pixels or more; {side} x {side} is too small"
            )
        layers: list[nn.Module] = []
        for index, width in enumerate(widths, 1):
            layers.append(nn.Conv2d(channels, width, kernel, padding=padding, bias=bias))
            layers += [nn.BatchNorm2d(width), nn.ReLU()] if norm else [nn.ReLU()]
            channels, side = width, side - lost
            if index % pool_every == 0:
                layers.insert(len(layers) - pool_first, nn.MaxPool2d(2))
                side //= 2
        layers.append(nn.Flatten())
        for before, after in itertools.pairwise((channels * side * side, *hidden, classes)):
            layers += [nn.Linear(before, after, bias=bias), nn.ReLU()]
        return normal_weights(nn.Sequential(*layers[:-1]), deviation, root)

    return build
