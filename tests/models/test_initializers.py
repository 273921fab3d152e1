"""Initial weights known by seed and name: values from words, the laws, what has no law."""

import hashlib
import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from common import digest
from networks import follows
from torch import nn

from fedlib import rng
from fedlib.errors import SpecError
from fedlib.models import initializers
from fedlib.models.registry import build
from fedlib.rng import Rng


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
    assert digest([content]) == expected


# Variance, by fan-in 288 and fan-out 576, and the largest value in deviations.
@pytest.mark.parametrize(
    ("law", "variance", "most"),
    [("he", 2 / 288, 2 / 0.8796), ("glorot", 2 / (288 + 576), math.sqrt(3)), ("torch", 1 / (3 * 288), math.sqrt(3))],
)
def test_laws(law: str, variance: float, most: float) -> None:
    entries = initializers.values(1, "conv.weight", (64, 32, 3, 3), law)
    deviation = math.sqrt(variance)
    assert follows(entries, deviation)
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
