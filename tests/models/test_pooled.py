"""Networks with an embedding: counts and cost of FedCompress's specification, networks spelt out, initial weights, and
BatchNorm with and without a scale."""

import itertools
import math

import pytest
import torch
from networks import follows, norms, shaken, untouched
from torch import Tensor, nn

from fedlib.models import macs, registry
from fedlib.rng import Rng

F = nn.functional


SIZES = {  # name -> channels, height, width, classes, width of the embedding
    "resnet20": (3, 32, 32, 10, 64),
    "resnet20-quick": (1, 28, 28, 10, 64),
    "mobilenet": (1, 98, 40, 12, 1024),
    "mobilenet-quarter": (1, 98, 40, 12, 256),
    "mobilenet-short": (1, 98, 40, 12, 256),
    "pooled4": (1, 8, 8, 10, 64),
}


def build(name: str) -> nn.Sequential:
    channels, side, _, classes, _ = SIZES[name]
    return registry.build(name, channels, side, classes, Rng(3))


def some(name: str, n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, *SIZES[name][:3], generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("name", "cost"), [("resnet20", 40_551_040), ("mobilenet", 59_277_568)])
def test_cost_of_the_spec(name: str, cost: int) -> None:
    network = build(name)
    assert macs.total(macs.count(network, some(name, 1))).forward == cost
    depthwise = [p.numel() for n, p in network.named_parameters() if n.endswith("depthwise.weight")]
    assert (sum(depthwise), len(depthwise)) == {"resnet20": (0, 0), "mobilenet": (44_640, 13)}[name]


@pytest.mark.parametrize(("name", "equal", "expected"), [("quarter", 6, 213_276), ("short", 1, 124_316)])
def test_counts_of_our_own(name: str, equal: int, expected: int) -> None:
    """By hand: per block of the MobileNet 9a + ab kernels and a + b shifts for a -> b channels."""
    steps = [8 * factor for factor in (1, 2, 4, 4, 8, 8, *[16] * equal, 32, 32)]
    blocks = sum(9 * a + a * b + a + b for a, b in itertools.pairwise(steps))
    assert 9 * steps[0] + steps[0] + blocks + 12 * (steps[-1] + 1) == expected
    assert sum(p.numel() for p in build(f"mobilenet-{name}").parameters()) == expected


@pytest.mark.parametrize("name", SIZES)
def test_the_last_layer_is_the_head_and_what_lies_before_it_the_embedding(name: str) -> None:
    network, (*_, classes, width) = build(name).eval(), SIZES[name]
    x = some(name, 3)
    assert [child for child, _ in network.named_children()][-3:] == ["mean", "flatten", "head"]
    head = network[-1]
    assert isinstance(head, nn.Linear) and (head.in_features, head.out_features) == (width, classes)
    embedding = network[:-1](x)
    assert embedding.shape == (3, width)
    torch.testing.assert_close(embedding, network[:-3](x).mean((2, 3)))
    torch.testing.assert_close(network(x), head(embedding))


def normed(x: Tensor, tensors: dict[str, Tensor], at: str, eps: float) -> Tensor:
    """BatchNorm by its moving statistics; a scale of 1 where there is none."""
    own = {part: tensors[f"{at}.{part}"][:, None, None] for part in ("running_mean", "running_var", "bias")}
    scale = tensors[f"{at}.weight"][:, None, None] if f"{at}.weight" in tensors else 1.0
    return (x - own["running_mean"]) / (own["running_var"] + eps).sqrt() * scale + own["bias"]


@pytest.mark.parametrize(("channels", "side"), [(3, 32), (1, 28), (1, 7), (3, 4)])
def test_the_resnet_spelt_out(channels: int, side: int) -> None:
    network = shaken(registry.build("resnet20", channels, side, 10, Rng(3))).double()
    t = dict(network.state_dict())
    x = torch.randn(2, channels, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    hidden = normed(F.conv2d(x, t["conv.weight"], padding=1), t, "norm", 1e-3).relu()
    for stage in (1, 2, 3):
        for block in (1, 2, 3):
            at, stride = f"stage{stage}.block{block}", 2 if block == 1 and stage > 1 else 1
            inner = F.conv2d(hidden, t[f"{at}.conv1.weight"], stride=stride, padding=1)
            inner = F.conv2d(normed(inner, t, f"{at}.norm1", 1e-3).relu(), t[f"{at}.conv2.weight"], padding=1)
            shortcut = torch.zeros_like(inner)
            shortcut[:, : hidden.shape[1]] = hidden[:, :, ::stride, ::stride]
            hidden = (normed(inner, t, f"{at}.norm2", 1e-3) + shortcut).relu()
    assert hidden.shape[1:] == (64, -(-side // 4), -(-side // 4))
    expected = F.linear(hidden.mean((2, 3)), t["head.weight"], t["head.bias"])
    assert float(expected.std()) > 0.1
    torch.testing.assert_close(network(x), expected)


@pytest.mark.parametrize(("height", "width"), [(98, 40), (32, 33)])
def test_the_mobilenet_spelt_out_with_the_padding_of_keras(height: int, width: int) -> None:
    """Keras pads even sides by (0, 1) and odd ones by (1, 1) before a stride of 2: the same on turned images."""
    network = shaken(build("mobilenet-quarter")).double()
    t = dict(network.state_dict())
    turned = {name: tensor.flip(2, 3) for name, tensor in t.items() if tensor.ndim == 4}

    def convolved(x: Tensor, name: str, stride: int, groups: int = 1) -> Tensor:
        ends = [(1, 1) if stride == 1 or side % 2 else (0, 1) for side in (x.shape[3], x.shape[2])]
        return F.conv2d(F.pad(x, (*ends[0], *ends[1])), turned[name], stride=stride, groups=groups)

    x = torch.randn(2, 1, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    hidden = normed(convolved(x.flip(2, 3), "conv.weight", 2), t, "norm", 1e-4).relu()
    for block, stride in enumerate((1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1), 1):
        at = f"block{block}"
        hidden = convolved(hidden, f"{at}.depthwise.weight", stride, groups=hidden.shape[1])
        hidden = normed(hidden, t, f"{at}.norm1", 1e-4).relu()
        mixed = torch.einsum("nihw,oi->nohw", hidden, t[f"{at}.pointwise.weight"][:, :, 0, 0])
        hidden = normed(mixed, t, f"{at}.norm2", 1e-4).relu()
    assert hidden.shape[1:] == (256, -(-height // 32), -(-width // 32))
    expected = F.linear(hidden.mean((2, 3)), t["head.weight"], t["head.bias"])
    assert float(expected.std()) > 0.1
    torch.testing.assert_close(network(x), expected)


def test_the_network_for_digits_spelt_out() -> None:
    network = shaken(build("pooled4"))
    t, x = dict(network.state_dict()), some("pooled4", 3)
    hidden = x
    for index in (1, 2, 3, 4):
        hidden = normed(F.conv2d(hidden, t[f"conv{index}.weight"], padding=1), t, f"norm{index}", 1e-5).relu()
        hidden = F.max_pool2d(hidden, 2) if index == 2 else hidden
    assert hidden.shape == (3, 64, 4, 4)
    expected = F.linear(hidden.mean((2, 3)), t["head.weight"], t["head.bias"])
    assert float(expected.std()) > 0.1
    torch.testing.assert_close(network(x), expected)


# Largest weight in deviations: He's law is cut at two of those that it has uncut, Glorot's is uniform.
CUT = {"he": 2 / 0.8796, "glorot": math.sqrt(3)}


@pytest.mark.parametrize(("name", "law"), [("resnet20", "he"), ("mobilenet-quarter", "glorot"), ("pooled4", "he")])
def test_initial_values(name: str, law: str) -> None:
    network = build(name)
    for label, p in network.named_parameters():
        if p.ndim == 1:
            assert bool((p == (0 if label.endswith("bias") else 1)).all())
            continue
        own = "glorot" if label == "head.weight" else law
        fans = p.shape[1] / 2 if own == "he" else (p.shape[0] + p.shape[1]) / 2
        deviation = (fans * p[0, 0].numel()) ** -0.5
        assert follows(p, deviation), label
        assert 1.5 < float(p.detach().abs().max()) / deviation <= CUT[own], label
    assert all(untouched(norm) for norm in norms(network))


def test_the_quick_resnet_differs_in_its_statistics_alone() -> None:
    one, other = (registry.build(name, 1, 8, 10, Rng(3)) for name in ("resnet20", "resnet20-quick"))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert str(one).replace("momentum=0.01", "momentum=0.1") == str(other) != str(one)


@pytest.mark.parametrize(
    ("name", "eps", "momentum", "count"),
    [
        ("resnet20", 1e-3, 0.01, 19),
        ("resnet20-quick", 1e-3, 0.1, 19),
        ("mobilenet", 1e-4, 0.01, 27),
        ("mobilenet-quarter", 1e-4, 0.1, 27),
        ("mobilenet-short", 1e-4, 0.1, 17),
        ("pooled4", 1e-5, 0.1, 4),
    ],
)
def test_settings_of_batchnorm(name: str, eps: float, momentum: float, count: int) -> None:
    found = norms(build(name))
    assert {(norm.eps, norm.momentum) for norm in found} == {(eps, momentum)} and len(found) == count
    assert all((norm.weight is None) == name.startswith("mobilenet") for norm in found)


def test_batchnorm_without_a_scale_by_hand() -> None:
    """One channel, values 0 0 3 5: mean 2, variance 4.5; the moving variance takes the unbiased 6."""
    norm = norms(build("mobilenet-short"))[0]
    with torch.no_grad():
        norm.bias.fill_(0.5)
    x = torch.tensor([0.0, 0.0, 3.0, 5.0]).reshape(2, 1, 1, 2).expand(2, 8, 1, 2).clone().requires_grad_()
    y = norm(x)
    expected = [(value - 2) / math.sqrt(4.5 + 1e-4) + 0.5 for value in (0, 0, 3, 5)]
    torch.testing.assert_close(y[:, 1].flatten(), torch.tensor(expected))
    torch.testing.assert_close(norm.running_mean, torch.full((8,), 0.1 * 2))
    torch.testing.assert_close(norm.running_var, torch.full((8,), 0.9 + 0.1 * 6))
    y[:, 1].sum().backward()
    assert norm.bias.grad is not None and norm.bias.grad.tolist() == [0, 4, 0, 0, 0, 0, 0, 0]
    torch.testing.assert_close(norm.eval()(x)[0, 2, 0], (torch.tensor([0.0, 0.0]) - 0.2) / math.sqrt(1.5 + 1e-4) + 0.5)
