"""Networks that are trained in part: counts of the specification of FedPT, networks spelt out, laws of weights known by
seed and name, policies, and the cost of training."""

import hashlib
import math
from collections.abc import Callable, Mapping
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.flop_counter import FlopCounterMode

from fedlib import rng
from fedlib.errors import SpecError
from fedlib.models import freezing, initializers, macs, partial
from fedlib.models.registry import MODELS, build
from fedlib.rng import Rng

F = nn.functional
Shapes = dict[str, torch.Size]


def on_paper(make: Callable[[], nn.Sequential]) -> nn.Sequential:
    """The network without entries: shapes are all that counting needs."""
    with torch.device("meta"):
        return make()


def shapes(network: nn.Module) -> Shapes:
    return {name: p.shape for name, p in network.named_parameters()}


def size(shapes: Mapping[str, torch.Size]) -> int:
    return sum(shape.numel() for shape in shapes.values())


def emnist() -> nn.Sequential:
    return on_paper(lambda: partial.convolutional((32, 64), 512, 1, 28, 62))


def resnet(outputs: int) -> nn.Sequential:
    return on_paper(lambda: partial.resnet(3, outputs))


def spec_transformer(blocks: int) -> nn.Sequential:
    return on_paper(lambda: partial.language_model(10_004, blocks=blocks))


def shaken(network: nn.Sequential) -> nn.Sequential:
    """Biases away from 0 and scales away from 1, or a forgotten one would not show."""
    generator = torch.Generator().manual_seed(5)
    network.requires_grad_(False)
    for p in network.parameters():
        if p.ndim == 1:
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return network


# Networks. ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "channels", "side", "classes", "d", "outputs"),
    [
        ("emnist", 1, 28, 62, 1_690_046, 62),
        ("emnist-narrow", 1, 28, 62, 208 + 3_216 + 100_480 + 7_998, 62),
        ("emnist-hidden8", 1, 8, 10, 208 + 3_216 + 65 * 8 + 9 * 10, 10),
        ("emnist-hidden2048", 1, 8, 10, 208 + 3_216 + 65 * 2048 + 2049 * 10, 10),
        ("emnist-thin", 1, 28, 10, 52 + 204 + 197 * 21 + 22 * 10, 10),
        ("resnet18-gn", 3, 24, 10, 11_181_642, 10),
        ("resnet18-gn-100head", 3, 24, 10, 11_227_812, 100),
    ],
)
def test_counts(name: str, channels: int, side: int, classes: int, d: int, outputs: int) -> None:
    network = build(name, channels, side, classes, Rng(0))
    assert sum(p.numel() for p in network.parameters()) == d
    assert not list(network.buffers()), "nothing but parameters to send"
    assert {p.ndim for p in network.parameters()} <= {1, 2, 4}
    assert network(torch.zeros(2, channels, side, side)).shape == (2, outputs)


def test_counts_by_layer_of_the_convolutional_network() -> None:
    counts = {layer: size({n: s for n, s in shapes(emnist()).items() if n.startswith(layer)}) for layer in LAYERS}
    assert counts == {"conv1": 832, "conv2": 51_264, "dense1": 1_606_144, "dense2": 31_806}


LAYERS = ("conv1", "conv2", "dense1", "dense2")


def test_counts_by_group_of_the_resnet() -> None:
    groups = {
        "stem": ("stem.weight", 9_408),
        **{f"stage{i}": (f"stage{i}.block?.conv?.weight", n) for i, n in enumerate(STAGES, 1)},
        **{f"shortcut{i}": (f"stage{i}.*.project.weight", n) for i, n in zip((2, 3, 4), SHORTCUTS, strict=True)},
        "norms": ("*norm*", 9_600),
        "head": ("head.*", 5_130),
    }
    own = shapes(resnet(10))
    found = {group: freezing.matching([pattern], own) for group, (pattern, _) in groups.items()}
    assert {group: size({n: own[n] for n in names}) for group, names in found.items()} == {
        group: n for group, (_, n) in groups.items()
    }
    assert sum(len(names) for names in found.values()) == len(own) == len(set().union(*found.values()))
    assert size({n: s for n, s in shapes(resnet(100)).items() if n.startswith("head")}) == 51_300


STAGES = (147_456, 516_096, 2_064_384, 8_257_536)
SHORTCUTS = (8_192, 32_768, 131_072)


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


def few(name: str) -> tuple[nn.Sequential, Callable[[int], Tensor]]:
    """A network and inputs for it: `n` of them."""
    generator = torch.Generator().manual_seed(2)
    if name == "transformer":
        network = build(name, 1, 6, 12, Rng(0))
        return network, lambda n: torch.randint(0, 12, (n, 1, 6, 1), generator=generator).float()
    if name == "emnist":
        network = build("emnist-narrow", 1, 8, 5, Rng(0))
        return network, lambda n: torch.randn(n, 1, 8, 8, generator=generator)
    network = initializers.initialise(partial.resnet(3, 5, widths=(32, 32, 64, 64)), "he", Rng(0))
    return network, lambda n: torch.randn(n, 3, 8, 8, generator=generator)


@pytest.mark.parametrize("name", ["emnist", "resnet", "transformer"])
def test_gradients_of_clients_side_by_side(name: str) -> None:
    """vmap over clients with tensors of their own gives each client's gradient; as the stacked engine has it."""
    network, inputs = few(name)
    clients = 2
    own = {n: torch.stack([p.detach() * (1 + 0.1 * c) for c in range(clients)]) for n, p in network.named_parameters()}
    x = torch.stack([inputs(3) for _ in range(clients)])

    def loss(tensors: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(network, tensors, (x,)).log_softmax(-1)[..., 1].mean()

    together = vmap(grad(loss))(own, x)
    for client in range(clients):
        alone = grad(loss)({n: tensor[client] for n, tensor in own.items()}, x[client])
        for n, expected in alone.items():
            torch.testing.assert_close(together[n][client], expected, atol=1e-5, rtol=1e-4)
            assert bool(expected.any()) or n.endswith("key.bias"), "a bias of keys adds the same to all scores"


@pytest.mark.parametrize(
    ("name", "channels", "side", "classes", "message"),
    [
        ("emnist", 1, 3, 62, "model: emnist halves images twice; 3 x 3 pixels are too small"),
        ("emnist-narrow", 1, 3, 62, "model: emnist halves images twice; 3 x 3"),
        ("resnet18-gn-100head", 3, 24, 101, "model: resnet18-gn-100head has 100 outputs, the data 101 classes"),
        ("transformer", 3, 20, 50, "model: transformer reads one token id a place; these data have 3 channels"),
    ],
)
def test_data_that_do_not_fit_are_named(name: str, channels: int, side: int, classes: int, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        build(name, channels, side, classes, Rng(0))


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(SpecError, match="heads: 3 must divide the width 64"):
        partial.language_model(10, width=64, heads=3)


# Initial weights. --------------------------------------------------------------------------------


def test_the_seed_of_a_tensor() -> None:
    """Spelt out: s = 258 is the bytes 2, 1 and six zeros; s has 64 bits."""
    digest = hashlib.sha256(b"\x02\x01\x00\x00\x00\x00\x00\x00conv1.weight").digest()
    expected = sum(byte << 8 * place for place, byte in enumerate(digest[:8]))
    assert initializers.seed_of(258, "conv1.weight") == initializers.seed_of(258 + 2**64, "conv1.weight") == expected
    assert len({initializers.seed_of(s, n) for s in (0, 1) for n in ("a.weight", "b.weight")}) == 4


def test_values_from_words() -> None:
    """Each law from the words of the stream by its formula, in Python's own numbers."""
    shape, count = (4, 3, 5, 5), 300
    words = rng.words(initializers.seed_of(7, "conv1.weight"), 0, count).tolist()
    even = np.array([(word >> 8) * 2**-23 - 1 for word in words])
    glorot = initializers.values(7, "conv1.weight", shape, "glorot").flatten().numpy()
    np.testing.assert_allclose(glorot, even * math.sqrt(6 / (3 * 25 + 4 * 25)), rtol=1e-6)
    usual = initializers.values(7, "conv1.weight", shape, "torch").flatten().numpy()
    np.testing.assert_allclose(usual, even / math.sqrt(75), rtol=1e-6)
    z = np.array([NormalDist().inv_cdf((word + 0.5) * 2.0**-32) for word in words])
    he = initializers.values(7, "conv1.weight", shape, "he").flatten().numpy()
    inside = np.abs(z) < 2
    assert 250 < inside.sum() < 300, "some are cut"
    np.testing.assert_allclose(he[inside], z[inside] * math.sqrt(2 / 75) / 0.8796256610342398, rtol=2e-6)
    assert not np.isclose(he[~inside], z[~inside] * math.sqrt(2 / 75) / 0.8796256610342398).any()


@pytest.mark.parametrize(
    ("law", "start", "expected"),
    [
        ("glorot", [0.0230697151273489, 0.029635567218065262, -0.030852509662508965], "74439fb13b6aa15d"),
        ("he", [0.03495367616415024, 0.04710381105542183, -0.049593474715948105], "c4862e34e79177f9"),
        ("torch", [0.016312753781676292, 0.020955510437488556, -0.021816018968820572], "dd3cee085a50bd47"),
    ],
)
def test_known_values(law: str, start: list[float], expected: str) -> None:
    """The same bytes on every machine."""
    content = initializers.values(20211006, "conv2.weight", (64, 32, 5, 5), law)
    assert content.dtype == torch.float32 and content.shape == (64, 32, 5, 5)
    assert content.flatten()[:3].tolist() == start, "float32, exactly"
    assert hashlib.sha256(content.numpy().astype("<f4").tobytes()).hexdigest()[:16] == expected


@pytest.mark.parametrize(
    ("name", "channels", "side", "expected"),
    [("emnist-narrow", 1, 28, "f670caf2517479b2"), ("transformer", 1, 20, "e0f7ab689ccf701a")],
)
def test_known_networks(name: str, channels: int, side: int, expected: str) -> None:
    network = build(name, channels, side, 62, Rng(20211006))
    content = b"".join(p.detach().numpy().astype("<f4").tobytes() for p in network.parameters())
    assert hashlib.sha256(content).hexdigest()[:16] == expected


# Variance, by fan-in 288 and fan-out 576, and the largest value in deviations.
@pytest.mark.parametrize(
    ("law", "variance", "most"),
    [("he", 2 / 288, 2 / 0.8796), ("glorot", 2 / (288 + 576), math.sqrt(3)), ("torch", 1 / (3 * 288), math.sqrt(3))],
)
def test_laws(law: str, variance: float, most: float) -> None:
    entries = initializers.values(1, "conv.weight", (64, 32, 3, 3), law)
    n, deviation = entries.numel(), math.sqrt(variance)
    assert abs(float(entries.mean())) < 5 * deviation / n**0.5
    assert abs(float(entries.std()) / deviation - 1) < 5 / (2 * n) ** 0.5
    assert 0.99 * most < float(entries.abs().max()) / deviation < 1.0001 * most


def test_cut_normal_values_have_the_cut_law() -> None:
    """Shares below some bounds against the normal law between -2 and 2."""
    z = (
        initializers.values(3, "conv.weight", (100, 1_000), "he").flatten().numpy()
        * initializers.CUT
        / math.sqrt(2 / 1_000)
    )
    law = NormalDist()
    mass = law.cdf(2) - law.cdf(-2)
    for at in (-1.5, -0.5, 0.0, 1.0, 1.9):
        share = (law.cdf(at) - law.cdf(-2)) / mass
        assert abs(float((z < at).mean()) - share) < 5 * math.sqrt(share * (1 - share) / z.size)
    kept = math.sqrt(1 - 4 * law.pdf(2) / mass)
    assert abs(initializers.CUT - kept) < 1e-12, "deviation of the cut law, by its formula"


@pytest.mark.parametrize("name", ["emnist-narrow", "resnet18-gn", "transformer"])
def test_biases_norms_heads_and_embeddings(name: str) -> None:
    law = {"resnet18-gn": "he"}.get(name, "glorot")
    root = Rng(9)
    network = build(name, 1, 28, 62, root)
    for label, p in network.named_parameters():
        entries = p.detach()
        assert torch.equal(entries, initializers.values(initializers.number(root), label, p.shape, law)), (
            "one tensor, made again"
        )
        if label.endswith("bias"):
            assert not entries.any()
        elif p.ndim == 1:
            assert bool((entries == 1).all())
    if name == "resnet18-gn":
        head = network.get_parameter("head.weight").detach()
        assert head.numel() == 62 * 512 and abs(float(head.std()) / 0.01 - 1) < 5 / (2 * head.numel()) ** 0.5
    if name == "transformer":
        embedding = network.get_parameter("embedding.weight").detach()
        assert 0.0499 < float(embedding.abs().max()) <= 0.05


def test_a_tensor_depends_on_seed_and_name_alone() -> None:
    """Not on the order of modules, on what else there is, or on torch's global generator."""
    one = nn.Sequential()
    one.add_module("first", nn.Linear(5, 4))
    one.add_module("second", nn.Linear(4, 4))
    other = nn.Sequential()
    other.add_module("second", nn.Linear(4, 4))
    torch.manual_seed(0)
    a = dict(initializers.initialise(one, "he", Rng(1)).named_parameters())
    torch.manual_seed(1)
    b = dict(initializers.initialise(other, "he", Rng(1)).named_parameters())
    assert torch.equal(a["second.weight"], b["second.weight"])
    c = dict(initializers.initialise(other, "he", Rng(2)).named_parameters())
    assert not torch.equal(a["second.weight"], c["second.weight"])
    assert len({tuple(initializers.values(s, n, (3, 3), "he").flatten().tolist()) for s in (0, 1) for n in "ab"}) == 4


def test_unknown_law_is_refused() -> None:
    with pytest.raises(SpecError, match="law: 'xavier' is unknown; allowed: glorot, he, torch"):
        initializers.values(0, "conv1.weight", (3, 3), "xavier")


# Policies. ---------------------------------------------------------------------------------------

EMNIST, CIFAR10, CIFAR100 = (lambda: shapes(emnist())), (lambda: shapes(resnet(10))), (lambda: shapes(resnet(100)))


# Trained parameters, and the factor by which messages shrink as the specification prints it.
@pytest.mark.parametrize(
    ("make", "policy", "trained", "factor"),
    [
        (EMNIST, "none", 1_690_046, "1.00"),
        (EMNIST, "emnist/dense1", 83_902, "20.14"),
        (EMNIST, "emnist/conv", 1_637_950, "1.03"),
        (EMNIST, "emnist/all_but_head", 31_806, "53.1"),
        (CIFAR100, "none", 11_227_812, "1.00"),
        (CIFAR100, "cifar/s4", 2_970_276, "3.78"),
        (CIFAR100, "cifar/s34", 905_892, "12.39"),
        (CIFAR100, "cifar/s234", 389_796, "28.80"),
        (CIFAR100, "cifar/s1234", 242_340, "46.33"),
        (CIFAR10, "cifar/s4", 2_924_106, "3.82"),
        (CIFAR10, "cifar/s34", 859_722, "13.01"),
        (CIFAR10, "cifar/s234", 343_626, "32.54"),
        (CIFAR10, "cifar/s1234", 196_170, "57.00"),
    ],
)
def test_policies(make: Callable[[], Shapes], policy: str, trained: int, factor: str) -> None:
    own = make()
    frozen = freezing.frozen_names(policy, own)
    assert size({name: shape for name, shape in own.items() if name not in frozen}) == trained
    assert f"{size(own) / trained:.{len(factor.split('.')[1])}f}" == factor


@pytest.mark.parametrize(
    ("patterns", "trained", "factor"),
    [(["conv2.*", "dense1.*"], 32_638, "51.8"), (["dense1.weight"], 84_414, "20.0")],
)
def test_patterns(patterns: list[str], trained: int, factor: str) -> None:
    own = EMNIST()
    assert size(own) - size({name: own[name] for name in freezing.matching(patterns, own)}) == trained
    assert f"{size(own) / trained:.1f}" == factor


# Share that is trained in per cent and factor, for one block and for three. "*" stands for patterns that are no policy.
@pytest.mark.parametrize(
    ("policy", "one", "three"),
    [
        ("*block*.feed.hidden.*", "75.05 1.33", "70.03 1.43"),
        ("so/ffn", "50.15 1.99", "40.10 2.49"),
        ("so/att", "75.05 1.33", "70.03 1.43"),
        ("so/blocks", "25.20 3.97", "10.13 9.87"),
        ("*[!e]*", "22.80 4.39", "9.13 10.95"),
    ],
)
def test_policies_of_the_transformer(policy: str, one: str, three: str) -> None:
    for blocks, expected in ((1, one), (3, three)):
        own = shapes(spec_transformer(blocks))
        starred = policy.startswith("*")
        frozen = freezing.matching([policy[1:]], own) if starred else freezing.frozen_names(policy, own)
        trained = size(own) - size({name: own[name] for name in frozen})
        assert f"{100 * trained / size(own):.2f} {size(own) / trained:.2f}" == expected


def test_policies_fit_the_networks_that_are_built() -> None:
    for name, channels, prefix, policies in (
        *(("emnist", 1, "emnist/", 3), ("emnist-narrow", 1, "emnist/", 3)),
        *(("resnet18-gn-100head", 3, "cifar/", 4), ("transformer", 1, "so/", 3)),
    ):
        own = shapes(on_paper(lambda name=name, channels=channels: MODELS[name](channels, 28, 62, Rng(0))))  # type: ignore[misc]
        fitting = [policy for policy in freezing.POLICIES if policy.startswith(prefix)]
        assert len(fitting) == policies and all(freezing.frozen_names(policy, own) for policy in fitting)


ALLOWED = "allowed for this network: none, emnist/all_but_head, emnist/conv, emnist/dense1, random/p with 0 < p < 1"


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("emnist/dense9", "'emnist/dense9' is unknown"),
        (None, "None is unknown"),
        (["none"], r"\['none'\] is unknown"),
        ("cifar/s4", r"'cifar/s4' does not fit this network \(its parameters: conv1.weight to dense2.bias\)"),
        ("random/", "'random/' must end in a number between 0 and 1"),
        ("random/half", "'random/half' must end in a number between 0 and 1"),
        ("random/0", "'random/0' must end in a number between 0 and 1"),
        ("random/1.0", "'random/1.0' must end in a number between 0 and 1"),
        ("random/nan", "'random/nan' must end in a number between 0 and 1"),
        ("random/1e-9", "'random/1e-9' leaves nothing to train"),
    ],
)
def test_wrong_policies_are_named(policy: str, message: str) -> None:
    with pytest.raises(SpecError, match=f"^hyper.policy: {message}; {ALLOWED}$"):
        freezing.frozen_names(policy, EMNIST())


def test_half_a_policy_and_nothing_left_to_train() -> None:
    part = {"conv1.weight": torch.Size([2, 2]), "dense2.weight": torch.Size([2, 2])}
    with pytest.raises(SpecError, match="'emnist/conv' does not fit this network"):
        freezing.frozen_names("emnist/conv", part)
    with pytest.raises(SpecError, match="'emnist/dense1' leaves nothing to train; allowed"):
        freezing.frozen_names("emnist/dense1", {"dense1.weight": torch.Size([2, 2]), "dense1.bias": torch.Size([2])})


@pytest.mark.parametrize(
    ("make", "fractions"),
    [(CIFAR100, (0.0216, 0.05, 0.1, 0.25, 0.5)), (lambda: shapes(spec_transformer(1)), (0.25, 0.5))],
)
def test_random_policies_come_near_to_the_fraction(make: Callable[[], Shapes], fractions: tuple[float, ...]) -> None:
    own = make()
    for p in fractions:
        frozen = freezing.frozen_names(f"random/{p}", own)
        assert frozen == freezing.frozen_names(f"random/{p}", dict(reversed(own.items()))), "whatever the order"
        assert 0.99 * p < 1 - size({n: own[n] for n in frozen}) / size(own) <= p


def test_a_random_policy_by_hand() -> None:
    """In the order d, c, b, a of the hashes; half of the 16 entries has room for 1, 4 and 3."""
    own = {name: torch.Size([n]) for name, n in {"a": 8, "b": 3, "c": 4, "d": 1}.items()}
    assert [hashlib.sha256(name).hexdigest()[:2] for name in (b"d", b"c", b"b", b"a")] == ["18", "2e", "3e", "ca"]
    assert freezing.drawn(0.5, own) == {"a"}
    assert freezing.drawn(0.25, own) == {"a", "c"}, "1, then no room for 4, then 3"


@given(st.lists(st.integers(1, 1_000), min_size=1, max_size=12), st.floats(0.001, 0.999))
def test_a_random_policy_fills_its_room(sizes: list[int], p: float) -> None:
    own = {f"layer{index}.weight": torch.Size([entries]) for index, entries in enumerate(sizes)}
    frozen = freezing.drawn(p, own)
    trained = size(own) - size({name: own[name] for name in frozen})
    assert frozen and trained <= p * size(own) + 1e-6
    assert all(trained + own[name].numel() > p * size(own) - 1e-6 for name in frozen), "no other would fit"


# Cost of training. -------------------------------------------------------------------------------

# Forward: 28 * 28 * 32 * 25, 14 * 14 * 64 * 800, 3136 * 512, 512 * 62.
COST = {"conv1": 627_200, "conv2": 10_035_200, "dense1": 1_605_632, "dense2": 31_744}


def test_cost_by_layer() -> None:
    """Of a prefix that is frozen only the forward product is left; nothing needs a gradient of the images."""
    x = torch.zeros(1, 1, 28, 28)
    full = macs.count(emnist(), x)
    assert full == {f"{n}.weight": macs.Macs(c, 0 if n == "conv1" else c, c) for n, c in COST.items()}
    frozen = freezing.frozen_names("emnist/conv", EMNIST())
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
