"""The networks: parameter counts that the papers' messages are counted by, and their initial weights."""

import hashlib

import pytest
import torch
from torch import nn

from fedlib import models
from fedlib.errors import SpecError
from fedlib.rng import Rng


def norms(network: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]


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
    network = models.build(name, channels, side, classes, Rng(0))
    weights = [p for p in network.parameters() if p.ndim > 1]
    assert sum(p.numel() for p in weights) == d
    assert len(weights) == layers and all(p.numel() % 8 == 0 for p in weights)
    assert sum(p.numel() for p in network.parameters() if p.ndim == 1) == batchnorm, "scale and shift, no other vector"
    assert sum(b.numel() for b in network.buffers() if b.is_floating_point()) == batchnorm, "running mean and variance"
    assert network(torch.zeros(2, channels, side, side)).shape == (2, classes)


def test_two_layer_cnn_counts() -> None:
    network = models.build("cnn2", 3, 32, 10, Rng(0))
    by_hand = (3 * 32 * 9 + 32) + (32 * 64 * 9 + 64) + (64 * 14 * 14 * 128 + 128) + (128 * 10 + 10)
    assert sum(p.numel() for p in network.parameters()) == by_hand == 1_626_442
    assert all(not p.any() for name, p in network.named_parameters() if name.endswith("bias"))


def test_cnn4_is_the_network_of_the_spec() -> None:
    """Four times convolution, BatchNorm, ReLU, pool, then the classifier: spelt out, run on the same weights."""
    network = models.build("cnn4", 1, 28, 10, Rng(3)).eval().requires_grad_(False)
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
    network = models.build("cnn8", 3, 32, 10, Rng(0))
    kinds = "".join(
        {nn.Conv2d: "C", nn.BatchNorm2d: "B", nn.ReLU: "R", nn.MaxPool2d: "P"}.get(type(m), "") for m in network
    )
    assert kinds == "CBRCBRP" * 4
    assert [m.out_channels for m in network if isinstance(m, nn.Conv2d)] == [32, 32, 64, 64, 128, 128, 256, 256]


@pytest.mark.parametrize(("name", "side", "deviation"), [("cnn4", 28, 0.01), ("cnn2", 28, 0.03), ("mlp", 8, 0.1)])
def test_initial_values(name: str, side: int, deviation: float) -> None:
    network = models.build(name, 1, side, 10, Rng(1))
    for p in network.parameters():
        if p.ndim > 1:
            n = p.numel()
            assert abs(float(p.detach().mean())) < 5 * deviation / n**0.5
            assert abs(float(p.detach().std()) / deviation - 1) < 5 / (2 * n) ** 0.5
    for norm in norms(network):
        assert torch.equal(norm.weight, torch.ones_like(norm.weight)) and not norm.bias.any()
        assert norm.running_mean is not None and norm.running_var is not None
        assert not norm.running_mean.any() and bool((norm.running_var == 1).all())


@pytest.mark.parametrize(
    ("name", "side", "expected"), [("cnn4", 28, "bbb9d727ae04a07f"), ("mlp", 8, "8cbf852ef872c6cb")]
)
def test_known_initial_weights(name: str, side: int, expected: str) -> None:
    """The same bytes on every machine; torch's global generator has no part in them."""
    torch.manual_seed(int.from_bytes(name.encode(), "little") % 1000)
    network = models.build(name, 1, side, 10, Rng(20240806))
    content = b"".join(p.detach().numpy().astype("<f4").tobytes() for p in network.parameters())
    assert hashlib.sha256(content).hexdigest()[:16] == expected


def test_layers_and_seeds_get_weights_of_their_own() -> None:
    one, other = (models.build("cnn8", 3, 32, 10, Rng(seed)) for seed in (0, 1))
    starts = [p.detach().flatten()[:100] for network in (one, other) for p in network.parameters() if p.ndim > 1]
    assert len({tuple(start.tolist()) for start in starts}) == 18


def test_unknown_name_is_refused() -> None:
    with pytest.raises(SpecError, match="model: 'cnn5' is unknown; allowed: cnn2, cnn4, cnn8, mlp"):
        models.build("cnn5", 1, 28, 10, Rng(0))
