"""The cost of training, in products: of the specification of FedPT, by hand, and by PyTorch's own count."""

from collections.abc import Callable

import pytest
import torch
from networks import emnist, few, on_paper, resnet, shapes
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fedlib.models import freezing, macs, partial
from fedlib.models.registry import build
from fedlib.rng import Rng

# Forward: 28 * 28 * 32 * 25, 14 * 14 * 64 * 800, 3136 * 512, 512 * 62.
COST = {"conv1": 627_200, "conv2": 10_035_200, "dense1": 1_605_632, "dense2": 31_744}


def test_cost_by_layer() -> None:
    """Of a prefix that is frozen only the forward product is left; nothing needs a gradient of the images."""
    x = torch.zeros(1, 1, 28, 28)
    full = macs.count(emnist(), x)
    assert full == {f"{n}.weight": macs.Macs(c, 0 if n == "conv1" else c, c) for n, c in COST.items()}
    frozen = freezing.frozen_names("emnist/conv", shapes(emnist()))
    expected = {
        "conv1.weight": macs.Macs(627_200, 0, 0),
        "conv2.weight": macs.Macs(10_035_200, 0, 0),
        "dense1.weight": macs.Macs(1_605_632, 0, 1_605_632),
        "dense2.weight": macs.Macs(31_744, 31_744, 31_744),
    }
    assert macs.count(emnist(), x, frozen) == expected
    assert macs.count(emnist(), torch.zeros(9, 1, 28, 28), frozen) == expected, "per example"


@pytest.mark.parametrize(
    ("make", "side", "policy", "cost", "saved"),
    [
        (emnist, 28, "none", "36.27", "0.0"),
        (emnist, 28, "emnist/dense1", "34.67", "4.4"),
        (emnist, 28, "emnist/conv", "13.97", "61.5"),
        (emnist, 28, "emnist/all_but_head", "12.33", "66.0"),
        (lambda: resnet(10), 24, "none", "1207.7", "0.0"),
        (lambda: resnet(10), 24, "cifar/s1234", "812.3", "32.7"),
        (lambda: resnet(100), 24, "cifar/s1234", "812.4", "32.7"),
    ],
)
def test_cost_of_the_spec(make: Callable[[], nn.Sequential], side: int, policy: str, cost: str, saved: str) -> None:
    network = make()
    x = torch.zeros(1, 1 if side == 28 else 3, side, side)
    full = macs.total(macs.count(network, x)).total
    own = macs.total(macs.count(network, x, freezing.frozen_names(policy, shapes(network)))).total
    assert f"{own / 1e6:.{len(cost.split('.')[1])}f}" == cost
    assert f"{100 * (1 - own / full):.1f}" == saved


def test_cost_of_a_block_of_the_transformer() -> None:
    """By hand: 5 tokens, embedding 6, width 8, hidden 12, 11 words."""
    sizes = dict(embedding=6, width=8, heads=2, hidden=12, blocks=1)
    network = on_paper(lambda: partial.language_model(11, **sizes))
    counts = macs.count(network, torch.zeros(1, 1, 5, 1), {"block1.attention.query.weight", "embedding.weight"})
    assert counts["widen.weight"] == macs.Macs(5 * 48, 0, 5 * 48), "nothing trained below it"
    assert counts["block1.attention.query.weight"] == macs.Macs(5 * 64, 5 * 64, 0)
    assert counts["block1.feed.hidden.weight"] == macs.Macs(5 * 96, 5 * 96, 5 * 96)
    assert counts["embedding.weight"] == macs.Macs(5 * 66, 5 * 66, 0), "the logits"
    assert counts[""] == macs.Macs(2 * 5 * 5 * 8, 2 * 2 * 5 * 5 * 8, 0), "scores and mixture, two gradients each"


@pytest.mark.parametrize("name", ["emnist", "resnet", "transformer"])
@pytest.mark.parametrize("p", [None, "0.3", "0.7"])
def test_cost_is_what_pytorch_does(name: str, p: str | None) -> None:
    """Against PyTorch's own count of what a forward and a backward pass really call: two operations a product."""
    network, inputs = few(name)
    frozen = freezing.frozen_names(f"random/{p}", shapes(network)) if p else set()
    for label, parameter in network.named_parameters():
        parameter.requires_grad_(label not in frozen)
    x = inputs(1)
    with FlopCounterMode(display=False) as counter:
        network(x).sum().backward()
    assert 2 * macs.total(macs.count(network, x, frozen)).total == counter.get_total_flops()


def test_cost_of_a_network_with_batchnorm() -> None:
    """Its statistics stay as they are."""
    network = build("cnn4", 1, 28, 10, Rng(0))
    before = {name: b.clone() for name, b in network.named_buffers()}
    forward = macs.total(macs.count(network, torch.zeros(1, 1, 28, 28))).forward
    assert forward == 784 * 32 * 9 + 196 * 64 * 288 + 49 * 128 * 576 + 9 * 256 * 1_152 + 256 * 10
    assert all(torch.equal(b, before[name]) for name, b in network.named_buffers())
