"""What holds for networks of all kinds: bytes of their initial weights, gradients side by side, refusals by name."""

import pytest
import torch
from common import digest
from networks import POOLED, few, norms
from torch import Tensor
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
