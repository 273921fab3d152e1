"""Networks that are trained in part: counts of the specification of FedPT, networks spelt out."""

import math

import pytest
import torch
from networks import Shapes, emnist, resnet, shaken, shapes, size, spec_transformer
from torch import Tensor, nn

from fedlib.errors import SpecError
from fedlib.models import freezing, initializers, partial
from fedlib.models.registry import build
from fedlib.rng import Rng

F = nn.functional


# Entries by the pattern of their names; together all that the network has.
PARTS = {
    "emnist": {"conv1.*": 832, "conv2.*": 51_264, "dense1.*": 1_606_144, "dense2.*": 31_806},
    "resnet18-gn": {
        "stem.weight": 9_408,
        "stage1.block?.conv?.weight": 147_456,
        "stage2.block?.conv?.weight": 516_096,
        "stage3.block?.conv?.weight": 2_064_384,
        "stage4.block?.conv?.weight": 8_257_536,
        "stage2.*.project.weight": 8_192,
        "stage3.*.project.weight": 32_768,
        "stage4.*.project.weight": 131_072,
        "*norm*": 9_600,
        "head.*": 5_130,
    },
}


@pytest.mark.parametrize(("name", "own"), [("emnist", shapes(emnist())), ("resnet18-gn", shapes(resnet(10)))])
def test_counts_by_part(name: str, own: Shapes) -> None:
    names = {pattern: freezing.matching([pattern], own) for pattern in PARTS[name]}
    assert {pattern: size({n: own[n] for n in part}) for pattern, part in names.items()} == PARTS[name]
    assert sum(len(part) for part in names.values()) == len(own) == len(set().union(*names.values()))


def test_the_convolutional_network_spelt_out() -> None:
    network = shaken(build("emnist-narrow", 1, 28, 10, Rng(3)))
    x = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    w = dict(network.named_parameters())
    hidden = F.max_pool2d(F.conv2d(x, w["conv1.weight"], w["conv1.bias"], padding=2).relu(), 2)
    hidden = F.max_pool2d(F.conv2d(hidden, w["conv2.weight"], w["conv2.bias"], padding=2).relu(), 2)
    hidden = F.linear(hidden.flatten(1), w["dense1.weight"], w["dense1.bias"]).relu()
    expected = F.linear(hidden, w["dense2.weight"], w["dense2.bias"])
    assert float(expected.std()) > 0.1
    torch.testing.assert_close(network(x), expected)


def test_the_resnet_spelt_out_with_the_padding_of_keras() -> None:
    """Keras pads 24 x 24 by (2, 3) before the stem and by (0, 1) before the pool: the same on turned images."""
    small = initializers.initialise(partial.resnet(3, 7, widths=(32, 32, 64, 128)), "he", Rng(2))
    network = shaken(small).double()
    w = dict(network.named_parameters())
    turned = {name: p.flip(2, 3) if p.ndim == 4 else p for name, p in w.items()}

    def norm(x: Tensor, name: str) -> Tensor:
        """Groups of channels / 32, whose mean and variance go over channels and places."""
        grouped = x.reshape(len(x), 32, -1)
        variance, mean = torch.var_mean(grouped, 2, correction=0, keepdim=True)
        plain = ((grouped - mean) / (variance + 1e-3).sqrt()).reshape(x.shape)
        return plain * w[f"{name}.weight"][:, None, None] + w[f"{name}.bias"][:, None, None]

    def expected(x: Tensor) -> Tensor:
        x = F.conv2d(F.pad(x, (2, 3, 2, 3)), turned["stem.weight"], stride=2)
        x = F.max_pool2d(F.pad(norm(x, "norm1").relu(), (0, 1, 0, 1)), 3, stride=2)
        assert x.shape[2:] == (6, 6)
        for stage in (1, 2, 3, 4):
            for number in (1, 2):
                at = f"stage{stage}.block{number}"
                skipped = stage == 1 and number == 1
                hidden = x if skipped else norm(x, f"{at}.enter.norm1").relu()
                hidden = norm(F.conv2d(hidden, turned[f"{at}.conv1.weight"], padding=1), f"{at}.norm2").relu()
                hidden = F.conv2d(hidden, turned[f"{at}.conv2.weight"], padding=1)
                if f"{at}.shortcut.project.weight" in w:
                    x = norm(F.conv2d(x, w[f"{at}.shortcut.project.weight"]), f"{at}.shortcut.norm")
                x = x + hidden
        x = norm(x, "norm2").relu().mean((2, 3))
        return F.linear(x, w["head.weight"], w["head.bias"])

    x = torch.randn(2, 3, 24, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert [n for n in w if n.endswith("project.weight")] == [
        f"stage{i}.block1.shortcut.project.weight" for i in (3, 4)
    ]
    torch.testing.assert_close(network(x), expected(x.flip(2, 3)))


def test_the_transformer_has_the_counts_of_the_spec() -> None:
    assert [size(shapes(spec_transformer(blocks))) for blocks in (1, 2, 3)] == [4_211_680, 7_364_064, 10_516_448]
    network = build("transformer", 1, 20, 1_000, Rng(0))
    assert size(shapes(network)) == 32 * 1_000 + 37_664
    assert [n for n, p in network.named_parameters() if p.numel() == 32_000] == ["embedding.weight"], (
        "tied, counted once"
    )
    assert not list(network.buffers())


def test_the_transformer_spelt_out() -> None:
    """Blocks by PyTorch's own layer, positions by Python's sine."""
    vocabulary, e, width, heads, hidden = 11, 6, 8, 2, 12
    sizes = dict(embedding=e, width=width, heads=heads, hidden=hidden, blocks=2)
    network = shaken(initializers.initialise(partial.language_model(vocabulary, **sizes), "glorot", Rng(4))).double()
    w = dict(network.named_parameters())
    tokens = torch.tensor([[1, 5, 2, 10, 0], [3, 3, 7, 0, 0]])
    places = [
        [(math.sin, math.cos)[j % 2](t / 10_000 ** ((j - j % 2) / e)) for j in range(e)] for t in range(tokens.shape[1])
    ]
    x = w["embedding.weight"][tokens] * math.sqrt(e) + torch.tensor(places, dtype=torch.float64)
    x = F.linear(x, w["widen.weight"], w["widen.bias"])
    for at in ("block1", "block2"):
        layer = nn.TransformerEncoderLayer(width, heads, hidden, 0.0, "relu", 1e-6, batch_first=True).double()
        inward = [f"{at}.attention.{part}" for part in ("query", "key", "value")]
        theirs = {
            "self_attn.in_proj_weight": torch.cat([w[f"{part}.weight"] for part in inward]),
            "self_attn.in_proj_bias": torch.cat([w[f"{part}.bias"] for part in inward]),
        }
        for their, own in (
            *(("self_attn.out_proj", "attention.output"), ("linear1", "feed.hidden"), ("linear2", "feed.output")),
            *(("norm1", "norm1"), ("norm2", "norm2")),
        ):
            theirs |= {f"{their}.{kind}": w[f"{at}.{own}.{kind}"] for kind in ("weight", "bias")}
        layer.load_state_dict(theirs)
        x = layer(x, src_mask=torch.full((5, 5), -math.inf, dtype=torch.float64).triu(1))
    expected = F.linear(x, w["narrow.weight"], w["narrow.bias"]) @ w["embedding.weight"].T
    assert expected.shape == (2, 5, vocabulary)
    torch.testing.assert_close(network(tokens), expected, atol=2e-6, rtol=1e-5)  # positions are float32 in between
    assert torch.equal(network(tokens), network(tokens[:, None, :, None].float())), "ids as numbers, as Task has them"


def test_the_transformer_looks_at_no_later_token() -> None:
    network = build("transformer", 1, 20, 50, Rng(1))
    tokens = torch.randint(0, 50, (3, 9), generator=torch.Generator().manual_seed(1))
    other = tokens.clone()
    other[:, 5] = (tokens[:, 5] + 1) % 50
    one, two = network(tokens), network(other)
    torch.testing.assert_close(one[:, :5], two[:, :5])
    assert bool(((one - two)[:, 5:].abs().amax(2) > 1e-4).all()), "all later places see it"
    torch.testing.assert_close(network(tokens[:, :4]), one[:, :4])


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(SpecError, match="heads: 3 must divide the width 64"):
        partial.language_model(10, width=64, heads=3)
