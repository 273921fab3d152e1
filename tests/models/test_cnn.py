"""Convolutional networks and those for masks: the counts that the papers' messages go by, networks spelt out, laws of
their initial weights."""

import math

import pytest
import torch
from networks import follows, norms, untouched
from torch import nn

from fedlib.models.registry import build
from fedlib.rng import Rng


# Spec, section 5: masked weights d, BatchNorm's trainable values and its statistics.
@pytest.mark.parametrize(
    ("name", "channels", "side", "classes", "d", "batchnorm", "layers"),
    [
        ("cnn4", 1, 28, 10, 389_920, 960, 5),
        ("cnn4", 3, 32, 10, 398_176, 960, 5),
        ("cnn8", 3, 32, 10, 1_181_536, 1_920, 9),
        ("cnn8", 3, 32, 100, 1_273_696, 1_920, 9),
        ("mlp", 1, 8, 10, 4_736, 0, 2),
    ],
)
def test_counts(name: str, channels: int, side: int, classes: int, d: int, batchnorm: int, layers: int) -> None:
    network = build(name, channels, side, classes, Rng(0))
    weights = [p for p in network.parameters() if p.ndim > 1]
    assert sum(p.numel() for p in weights) == d
    assert len(weights) == layers and all(p.numel() % 8 == 0 for p in weights)
    assert sum(p.numel() for p in network.parameters() if p.ndim == 1) == batchnorm, "scale and shift, no other vector"
    assert sum(b.numel() for b in network.buffers() if b.is_floating_point()) == batchnorm, "running mean and variance"
    assert network(torch.zeros(2, channels, side, side)).shape == (2, classes)


def test_two_layer_cnn_counts() -> None:
    network = build("cnn2", 3, 32, 10, Rng(0))
    by_hand = (3 * 32 * 9 + 32) + (32 * 64 * 9 + 64) + (64 * 14 * 14 * 128 + 128) + (128 * 10 + 10)
    assert sum(p.numel() for p in network.parameters()) == by_hand == 1_626_442
    assert all(not p.any() for name, p in network.named_parameters() if name.endswith("bias"))


# FedDQ's networks: 582,026 parameters, 581,408 without biases; 9,074,218 and 9,073,040 (specification, section 5).
@pytest.mark.parametrize(
    ("name", "channels", "side", "weights", "biases"),
    [
        ("vanilla", 1, 28, [25 * 32, 25 * 32 * 64, 1024 * 512, 512 * 10], 618),
        ("cnn7", 3, 32, [27 * 48, 432 * 96, 864 * 192, 1728 * 256, 16384 * 512, 512 * 64, 640], 1_178),
    ],
)
def test_counts_of_quantized_networks(name: str, channels: int, side: int, weights: list[int], biases: int) -> None:
    network = build(name, channels, side, 10, Rng(0))
    assert [p.numel() for p in network.parameters() if p.ndim > 1] == weights
    assert sum(p.numel() for p in network.parameters() if p.ndim == 1) == biases
    assert sum(weights) + biases == {"vanilla": 582_026, "cnn7": 9_074_218}[name]
    assert network(torch.zeros(2, channels, side, side)).shape == (2, 10)


# FedPM's networks: every parameter is masked, biases included. Specification of sparse networks, section 6.2.
@pytest.mark.parametrize(
    ("name", "channels", "side", "classes", "n", "biases", "layers"),
    [
        ("conv4", 1, 28, 10, 1_933_258, 906, 7),
        ("conv4", 1, 28, 47, 1_942_767, 943, 7),
        ("conv6", 3, 32, 10, 2_262_602, 1_418, 9),
        ("conv10", 3, 32, 100, 19_197_092, 4_580, 13),
        ("conv4-narrow", 1, 28, 10, 121_594, 234, 7),
        ("mlp256", 1, 8, 10, 84_480, 0, 3),
    ],
)
def test_counts_of_masked_networks(
    name: str, channels: int, side: int, classes: int, n: int, biases: int, layers: int
) -> None:
    network = build(name, channels, side, classes, Rng(0))
    assert sum(p.numel() for p in network.parameters()) == n
    assert sum(p.numel() for p in network.parameters() if p.ndim == 1) == biases
    assert sum(p.ndim > 1 for p in network.parameters()) == layers
    assert not list(network.buffers()), "no BatchNorm"
    assert network(torch.zeros(2, channels, side, side)).shape == (2, classes)


def test_conv6_is_the_network_of_the_spec() -> None:
    """Twice convolution and ReLU, then a pool, three times; three linear layers: spelt out, on the same weights."""
    network = build("conv6", 3, 32, 10, Rng(3)).requires_grad_(False)
    shapes = [tuple(p.shape) for p in network.parameters()]
    assert [math.prod(shape) for shape in shapes] == [
        *(1_728, 64, 36_864, 64, 73_728, 128, 147_456, 128, 294_912, 256, 589_824, 256),
        *(1_048_576, 256, 65_536, 256, 2_560, 10),
    ]
    parameters = list(network.parameters())
    for bias in parameters[1::2]:
        bias.add_(0.1)  # or a forgotten one would not show
    pairs = list(zip(parameters[::2], parameters[1::2], strict=True))
    x = hidden = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for index, (kernel, bias) in enumerate(pairs[:6], 1):
        hidden = nn.functional.conv2d(hidden, kernel, bias, padding=1).relu()
        hidden = nn.functional.max_pool2d(hidden, 2) if index % 2 == 0 else hidden
    hidden = hidden.flatten(1)
    for index, (matrix, bias) in enumerate(pairs[6:]):
        hidden = nn.functional.linear(hidden if index == 0 else hidden.relu(), matrix, bias)
    assert float(hidden.std()) > 0.1
    torch.testing.assert_close(network(x), hidden)


@pytest.mark.parametrize(("name", "channels", "side"), [("conv6", 3, 32), ("conv4-narrow", 1, 28), ("mlp256", 1, 8)])
def test_initial_values_of_masked_networks(name: str, channels: int, side: int) -> None:
    """He's, which keep the size of the activations through ReLU, for methods that train them; biases are 0."""
    for p in build(name, channels, side, 10, Rng(1)).parameters():
        if p.ndim == 1:
            assert not p.any()
        else:
            assert follows(p, math.sqrt(2 / p[0].numel()))


def test_cnn4_is_the_network_of_the_spec() -> None:
    """Four times convolution, BatchNorm, ReLU, pool, then the classifier: spelt out, run on the same weights."""
    network = build("cnn4", 1, 28, 10, Rng(3)).eval().requires_grad_(False)
    for p in network.parameters():
        if p.ndim > 1:
            p.mul_(10)  # or the output would be so small that any two agree
    x = torch.randn(5, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    convolutions = [p for p in network.parameters() if p.ndim == 4]
    hidden = x
    for convolution, norm in zip(convolutions, norms(network), strict=True):
        hidden = nn.functional.conv2d(hidden, convolution, padding=1) / (1 + norm.eps) ** 0.5  # mean 0, variance 1
        hidden = nn.functional.max_pool2d(hidden.relu(), 2)
    (classifier,) = [p for p in network.parameters() if p.ndim == 2]
    output = hidden.flatten(1) @ classifier.T
    assert float(output.std()) > 0.1
    torch.testing.assert_close(network(x), output)


def test_cnn8_pools_after_every_second_convolution() -> None:
    network = build("cnn8", 3, 32, 10, Rng(0))
    kinds = "".join(
        {nn.Conv2d: "C", nn.BatchNorm2d: "B", nn.ReLU: "R", nn.MaxPool2d: "P"}.get(type(m), "") for m in network
    )
    assert kinds == "CBRCBRP" * 4
    assert [m.out_channels for m in network if isinstance(m, nn.Conv2d)] == [32, 32, 64, 64, 128, 128, 256, 256]


@pytest.mark.parametrize(("name", "side", "deviation"), [("cnn4", 28, 0.01), ("cnn2", 28, 0.03), ("mlp", 8, 0.1)])
def test_initial_values(name: str, side: int, deviation: float) -> None:
    network = build(name, 1, side, 10, Rng(1))
    assert all(follows(p, deviation) for p in network.parameters() if p.ndim > 1)
    for norm in norms(network):
        assert torch.equal(norm.weight, torch.ones_like(norm.weight)) and not norm.bias.any() and untouched(norm)


def test_layers_and_seeds_get_weights_of_their_own() -> None:
    one, other = (build("cnn8", 3, 32, 10, Rng(seed)) for seed in (0, 1))
    starts = [p.detach().flatten()[:100] for network in (one, other) for p in network.parameters() if p.ndim > 1]
    assert len({tuple(start.tolist()) for start in starts}) == 18
