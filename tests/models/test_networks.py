"""Networks of all kinds: counts, initial weights, plain ones spelt out, gradients side by side, refusals by name."""

import math

import pytest
import torch
from common import digest
from networks import POOLED, few, follows, norms, untouched
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from fedlib.errors import SpecError
from fedlib.models.registry import build
from fedlib.rng import Rng


@pytest.mark.parametrize(
    ("name", "channels", "side", "classes", "seed", "expected"),
    [
        ("cnn4", 1, 28, 10, 20240806, "bbb9d727ae04a07f"),
        ("mlp", 1, 8, 10, 20240806, "8cbf852ef872c6cb"),
        ("emnist-narrow", 1, 28, 62, 20211006, "f670caf2517479b2"),
        ("transformer", 1, 20, 62, 20211006, "e0f7ab689ccf701a"),
        ("resnet20", 3, 32, 10, 3, "703fc44fe855f251"),
        ("mobilenet-short", 1, 98, 12, 3, "15e4cc6bb30c3d42"),
        ("pooled4", 1, 8, 10, 3, "4670e100cd346bba"),
    ],
)
def test_known_initial_weights(name: str, channels: int, side: int, classes: int, seed: int, expected: str) -> None:
    """The same bytes on every machine; torch's global generator has no part in them."""
    torch.manual_seed(int.from_bytes(name.encode(), "little") % 1000)
    assert digest(build(name, channels, side, classes, Rng(seed)).parameters()) == expected


# Entries of all parameters, of vectors (biases, scales, shifts) and of BatchNorm's statistics; number of kernels and
# matrices. From the specifications, section 5, and of sparse networks, section 6.2; the rest by hand.
@pytest.mark.parametrize(
    ("name", "shape", "outputs", "total", "vectors", "statistics", "layers"),
    [
        ("cnn2", (3, 32, 32), 10, 896 + 18_496 + (64 * 14 * 14 * 128 + 128) + 1_290, 32 + 64 + 128 + 10, 0, 4),
        ("cnn4", (1, 28, 28), 10, 389_920 + 960, 960, 960, 5),
        ("cnn4", (3, 32, 32), 10, 398_176 + 960, 960, 960, 5),
        ("cnn7", (3, 32, 32), 10, 9_073_040 + 1_178, 1_178, 0, 7),
        ("cnn8", (3, 32, 32), 10, 1_181_536 + 1_920, 1_920, 1_920, 9),
        ("cnn8", (3, 32, 32), 100, 1_273_696 + 1_920, 1_920, 1_920, 9),
        ("conv4", (1, 28, 28), 10, 1_933_258, 906, 0, 7),
        ("conv4", (1, 28, 28), 47, 1_942_767, 943, 0, 7),
        ("conv4-narrow", (1, 28, 28), 10, 121_594, 234, 0, 7),
        ("conv6", (3, 32, 32), 10, 2_262_602, 1_418, 0, 9),
        ("conv10", (3, 32, 32), 100, 19_197_092, 4_580, 0, 13),
        ("emnist", (1, 28, 28), 62, 1_690_046, 32 + 64 + 512 + 62, 0, 4),
        ("emnist-narrow", (1, 28, 28), 62, 208 + 3_216 + 100_480 + 7_998, 8 + 16 + 128 + 62, 0, 4),
        ("emnist-hidden8", (1, 8, 8), 10, 208 + 3_216 + 65 * 8 + 9 * 10, 8 + 16 + 8 + 10, 0, 4),
        ("emnist-hidden2048", (1, 8, 8), 10, 208 + 3_216 + 65 * 2048 + 2049 * 10, 8 + 16 + 2048 + 10, 0, 4),
        ("emnist-thin", (1, 28, 28), 10, 52 + 204 + 197 * 21 + 22 * 10, 2 + 4 + 21 + 10, 0, 4),
        ("mlp", (1, 8, 8), 10, 4_736, 0, 0, 2),
        ("mlp256", (1, 8, 8), 10, 84_480, 0, 0, 3),
        ("mobilenet", (1, 98, 40), 12, 3_207_756, 10_944 + 12, 21_888, 28),
        (
            "pooled4",
            (1, 8, 8),
            10,
            9 * (1 * 16 + 16 * 32 + 32 * 32 + 32 * 64) + 2 * 144 + 650,
            2 * 144 + 10,
            2 * 144,
            5,
        ),
        ("resnet18-gn", (3, 24, 24), 10, 11_181_642, 9_600 + 10, 0, 21),
        ("resnet18-gn-100head", (3, 24, 24), 100, 11_227_812, 9_600 + 100, 0, 21),
        ("resnet20", (3, 32, 32), 10, 269_722, 1_376 + 10, 1_376, 20),
        ("resnet20-quick", (1, 28, 28), 10, 269_722 - 2 * 9 * 16, 1_376 + 10, 1_376, 20),
        ("vanilla", (1, 28, 28), 10, 581_408 + 618, 618, 0, 4),
    ],
)
def test_counts(
    name: str, shape: tuple[int, int, int], outputs: int, total: int, vectors: int, statistics: int, layers: int
) -> None:
    network = build(name, *shape[:2], min(outputs, 62) if "head" in name else outputs, Rng(0))
    sizes = [p.numel() for p in network.parameters() if p.ndim > 1]
    assert len(sizes) == layers and {p.ndim for p in network.parameters()} <= {1, 2, 4}
    assert sum(p.numel() for p in network.parameters() if p.ndim == 1) == vectors
    assert sum(sizes) + vectors == total
    buffers = list(network.buffers())
    assert sum(b.numel() for b in buffers if b.is_floating_point()) == statistics and bool(buffers) == bool(statistics)
    assert not statistics or all(entries % 8 == 0 for entries in sizes), "masks of whole bytes"
    assert network(torch.zeros(2, *shape)).shape == (2, outputs)


@pytest.mark.parametrize(
    ("name", "channels", "side", "weights"),
    [
        ("vanilla", 1, 28, [25 * 32, 25 * 32 * 64, 1024 * 512, 512 * 10]),
        ("cnn7", 3, 32, [27 * 48, 432 * 96, 864 * 192, 1728 * 256, 16384 * 512, 512 * 64, 640]),
    ],
)
def test_weights_of_quantized_networks(name: str, channels: int, side: int, weights: list[int]) -> None:
    network = build(name, channels, side, 10, Rng(0))
    assert [p.numel() for p in network.parameters() if p.ndim > 1] == weights


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


# Deviation of the weights. None: He's, which keeps the size of the activations through ReLU.
@pytest.mark.parametrize(
    ("name", "channels", "side", "deviation"),
    [
        *(("cnn2", 1, 28, 0.03), ("cnn4", 1, 28, 0.01), ("mlp", 1, 8, 0.1)),
        *(("conv6", 3, 32, None), ("conv4-narrow", 1, 28, None), ("mlp256", 1, 8, None)),
    ],
)
def test_initial_values(name: str, channels: int, side: int, deviation: float | None) -> None:
    network = build(name, channels, side, 10, Rng(1))
    for label, p in network.named_parameters():
        if p.ndim == 1:
            assert bool((p == (0 if label.endswith("bias") else 1)).all())
        else:
            assert follows(p, deviation or math.sqrt(2 / p[0].numel()))
    assert all(untouched(norm) for norm in norms(network))


def test_layers_and_seeds_get_weights_of_their_own() -> None:
    one, other = (build("cnn8", 3, 32, 10, Rng(seed)) for seed in (0, 1))
    starts = [p.detach().flatten()[:100] for network in (one, other) for p in network.parameters() if p.ndim > 1]
    assert len({tuple(start.tolist()) for start in starts}) == 18


@pytest.mark.parametrize("name", ["emnist", "resnet", "transformer", *POOLED])
def test_gradients_of_clients_side_by_side(name: str) -> None:
    """vmap over clients with tensors of their own gives each client's gradient and statistics, in training mode."""
    network, inputs = few(name)
    network, clients = network.double(), 2
    for norm in norms(network):
        norm.num_batches_tracked = None  # as `Task` has it
    x = torch.stack([inputs(4).double() for _ in range(clients)])
    own, statistics = (
        {n: torch.stack([p.detach() * (1 + 0.1 * c) for c in range(clients)]) for n, p in named}
        for named in (network.named_parameters(), network.named_buffers())
    )
    assert len(statistics) == 2 * len(norms(network))
    before = {n: tensor.clone() for n, tensor in statistics.items()}

    def loss(tensors: dict[str, Tensor], statistics: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(network, tensors | statistics, (x,)).log_softmax(-1)[..., 1].mean()

    together = vmap(grad(loss))(own, statistics, x)
    for client in range(clients):
        moved = {n: tensor[client].clone() for n, tensor in before.items()}
        alone = grad(loss)({n: tensor[client] for n, tensor in own.items()}, moved, x[client])
        for n, expected in alone.items():
            torch.testing.assert_close(together[n][client], expected)
            assert bool(expected.any()) or n.endswith("key.bias"), "a bias of keys adds the same to all scores"
        for n, expected in moved.items():
            torch.testing.assert_close(statistics[n][client], expected)
            assert not torch.equal(expected, before[n][client]), n


@pytest.mark.parametrize(
    ("name", "channels", "side", "classes", "message"),
    [
        ("vanilla", 1, 15, 10, "vanilla .* x"),
        ("cnn7", 3, 3, 10, "cnn7 .* x"),
        ("conv4", 1, 3, 10, "3 x 3 is too small"),
        ("conv4-narrow", 1, 3, 10, "3 x 3 is too small"),
        ("conv6", 1, 7, 10, "7 x 7 is too small"),
        ("conv10", 1, 31, 10, "31 x 31 is too small"),
        ("emnist", 1, 3, 62, "model: emnist halves images twice; 3 x 3 pixels are too small"),
        ("emnist-narrow", 1, 3, 62, "model: emnist halves images twice; 3 x 3"),
        ("resnet18-gn-100head", 3, 24, 101, "model: resnet18-gn-100head has 100 outputs, the data 101 classes"),
        ("transformer", 3, 20, 50, "model: transformer reads one token id a place; these data have 3 channels"),
        ("resnet20", 1, 3, 10, "resnet20 needs images of 4 x 4 .* have 3 x 3"),
        ("resnet20-quick", 1, 3, 10, "resnet20 needs images of 4 x 4 .* have 3 x 3"),
        ("mobilenet-short", 1, 31, 10, "mobilenet needs images of 32 x 32 .* have 31 x 31"),
        ("pooled4", 1, 1, 10, "pooled4 needs images of 2 x 2 .* have 1 x 1"),
        ("cnn5", 1, 28, 10, r"model: 'cnn5' is unknown; allowed: cnn2, cnn4, cnn7, cnn8, conv10, .*, mlp, mlp256, .*"),
    ],
)
def test_what_does_not_fit_is_named(name: str, channels: int, side: int, classes: int, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        build(name, channels, side, classes, Rng(0))


@pytest.mark.parametrize(
    ("name", "least"), [("resnet20", 4), ("resnet20-quick", 4), ("mobilenet-short", 32), ("pooled4", 2)]
)
def test_the_smallest_images_that_fit(name: str, least: int) -> None:
    assert build(name, 1, least, 10, Rng(0))(torch.ones(2, 1, least, least)).shape == (2, 10)
