"""Small image classifiers: the two networks of FedMRN's code, FedAvg's two-layer CNN, and a perceptron for digits.

CNN4 and CNN8 follow the official code of FedMRN (`Leopold1423/fedmrn-mm24`, f0fb8a0): 3x3 convolutions with padding 1,
BatchNorm, ReLU, 2x2 max-pooling, a linear classifier; no biases anywhere.
"""

from __future__ import annotations

from torch import nn

from fedlib.errors import SpecError
from fedlib.models.initializers import normal_weights
from fedlib.rng import Rng


def cnn4(channels: int, side: int, classes: int, root: Rng) -> nn.Sequential:
    """Four convolutions, a pool after each. 1x28x28: 389,920 weights; 3x32x32: 398,176 (10 classes)."""
    return normal_weights(_blocks((32, 64, 128, 256), 1, channels, side, classes), deviation=0.01, root=root)


def cnn8(channels: int, side: int, classes: int, root: Rng) -> nn.Sequential:
    """Eight convolutions, a pool after every second. 3x32x32: 1,181,536 weights (10 classes), 1,273,696 (100)."""
    widths = (32, 32, 64, 64, 128, 128, 256, 256)
    return normal_weights(_blocks(widths, 2, channels, side, classes), deviation=0.01, root=root)


def _blocks(widths: tuple[int, ...], pool_every: int, channels: int, side: int, classes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    images = side
    for index, width in enumerate(widths, 1):
        layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
        if index % pool_every == 0:
            layers.append(nn.MaxPool2d(2))
            side //= 2
    if side < 1:
        raise SpecError(
            f"model: cnn4 and cnn8 halve images four times; {images} x {images} pixels are too small, 16 are enough"
        )
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * side * side, classes, bias=False))


def cnn2(channels: int, side: int, classes: int, root: Rng) -> nn.Sequential:
    """Two unpadded convolutions and two linear layers with biases. 3x32x32: 1,626,442 parameters (10 classes)."""
    features = 64 * ((side - 4) // 2) ** 2
    network = nn.Sequential(
        nn.Conv2d(channels, 32, 3),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(features, 128),
        nn.ReLU(),
        nn.Linear(128, classes),
    )
    return normal_weights(network, deviation=0.03, root=root)


def vanilla(channels: int, side: int, classes: int, root: Rng) -> nn.Sequential:
    """Two 5x5 convolutions without padding, each with a pool, and a hidden layer: the network of FedDQ's script for
    Fashion-MNIST (`lqu-001/FedDQ`, 8946cc1). 1x28x28: 582,026 parameters (10 classes)."""
    features = 64 * (((side - 4) // 2 - 4) // 2) ** 2
    if features < 1:
        raise SpecError(f"model: vanilla needs images of 16 x 16 pixels or more; these have {side} x {side}")
    network = nn.Sequential(
        *(nn.Conv2d(channels, 32, 5), nn.MaxPool2d(2), nn.ReLU()),
        *(nn.Conv2d(32, 64, 5), nn.MaxPool2d(2), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(features, 512), nn.ReLU(), nn.Linear(512, classes)),
    )
    return normal_weights(network, None, root)


def cnn7(channels: int, side: int, classes: int, root: Rng) -> nn.Sequential:
    """Four convolutions and three linear layers: the network of FedDQ's script for CIFAR-10, without its dropout.
    3x32x32: 9,074,218 parameters (10 classes)."""
    convolutions: list[nn.Module] = []
    for index, (before, after) in enumerate(((channels, 48), (48, 96), (96, 192), (192, 256)), 1):
        convolutions += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU()]
        if index % 2 == 0:
            convolutions.append(nn.MaxPool2d(2))
    if side < 4:
        raise SpecError(f"model: cnn7 halves images twice; {side} x {side} pixels are too small, 4 are enough")
    linear = [nn.Linear(256 * (side // 4) ** 2, 512), nn.ReLU(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, classes)]
    return normal_weights(nn.Sequential(*convolutions, nn.Flatten(), *linear), None, root)


def mlp(channels: int, side: int, classes: int, root: Rng) -> nn.Sequential:
    """Perceptron with one hidden layer of 64 ReLU units and no biases. 1x8x8: 4,736 weights (10 classes)."""
    hidden = nn.Linear(channels * side * side, 64, bias=False)
    network = nn.Sequential(nn.Flatten(), hidden, nn.ReLU(), nn.Linear(64, classes, bias=False))
    return normal_weights(network, deviation=0.1, root=root)
