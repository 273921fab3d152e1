"""FedMRN's noise: properties 8, 13, 14 and 16 of its specification (section 10), by number."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fedmrn_references import of, uniform
from small_task import begun
from torch import Tensor

from fedlib import rng
from fedlib.methods import fedmrn
from fedlib.methods.fedmrn import FedMRN
from fedlib.rng import Rng


def noise(method: FedMRN, seed: int, *shape: int) -> Tensor:
    return method.drawn_noise(seed, method.magnitude, {"x": torch.Size(shape)})


# Begin of the SHA-256 over two layers of 288 and 70 entries.
KNOWN_NOISE = {"uniform": "d4678f9eb98319ef", "gauss": "6e54b9df76196f11", "bernoulli": "1250ce5182b25115"}


def test_08_same_noise_in_another_process() -> None:
    """And on every machine: the server makes these bytes again from the seed that travelled."""
    code = """
import hashlib
import torch
from fedlib.methods.fedmrn import FedMRN
def digest(law):
    shapes = {"a": torch.Size([32, 1, 3, 3]), "b": torch.Size([10, 7])}
    n = FedMRN(noise=law).drawn_noise(2**63 + 5, 0.005, shapes)
    return hashlib.sha256(n.numpy().astype("<f4").tobytes()).hexdigest()[:16]
found = {law: digest(law) for law in ("uniform", "gauss", "bernoulli")}
"""
    here: dict[str, Any] = {}
    exec(code, here)
    assert here["found"] == KNOWN_NOISE
    command, root = [sys.executable, "-c", code + "print(found, end='')"], Path(fedmrn.__file__).parents[2]
    there = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert there.stdout == str(KNOWN_NOISE)


def test_08_every_client_round_and_layer_has_noise_of_its_own() -> None:
    method = of("binary")
    places = [Rng(seed).child("client", number, k) for seed in (0, 1) for number in (1, 2) for k in (0, 1, 2)]
    noises = [begun(method, rng=place).frozen["n"] for place in places]
    assert torch.equal(noises[0], begun(method, rng=places[0]).frozen["n"])
    correlations = torch.corrcoef(torch.stack(noises)) - torch.eye(len(noises))
    assert float(correlations.abs().max()) < 5 / 4736**0.5
    layers = method.drawn_noise(1, 0.05, {str(layer): torch.Size([4000]) for layer in range(6)}).view(6, 4000)
    assert float((torch.corrcoef(layers) - torch.eye(6)).abs().max()) < 5 / 4000**0.5


@pytest.mark.parametrize(
    ("law", "variance", "fourth"), [("uniform", 1 / 3, 1 / 5), ("gauss", 1.0, 3.0), ("bernoulli", 1.0, 1.0)]
)
def test_13_noise_law(law: str, variance: float, fourth: float) -> None:
    a, d = 0.02, 400_000
    n = noise(FedMRN(noise=law, magnitude=a), 11, d // 4, 4).double() / a
    assert n.shape == (d,)
    assert abs(float(n.mean())) < 5 * (variance / d) ** 0.5
    assert abs(float((n**2).mean()) - variance) <= 5 * ((fourth - variance**2) / d) ** 0.5 + 1e-6
    assert float(n.abs().min()) * a >= 1e-8 * (1 - 1e-6)
    largest = float(n.abs().max())
    assert (0.9999 < largest <= 1.000001) if law != "gauss" else (4 < largest < 6.5)


def test_13_tiny_noise_is_replaced() -> None:
    """Uniform on +-1e-6: one entry in a hundred lies below 1e-8 and becomes +1e-8, the others stay as drawn."""
    n = noise(FedMRN(magnitude=1e-6), 11, 40_000).numpy()
    drawn = rng.uniform(11, 0, 40_000) * np.float32(1e-6)
    tiny = np.abs(drawn) < 1e-8
    assert abs(int(tiny.sum()) - 400) < 100 and bool((drawn[tiny] < 0).any())
    assert np.array_equal(n[~tiny], drawn[~tiny])
    assert set(n[tiny].tolist()) == {float(np.float32(1e-8))}


def g(u: float, law: str, a: float) -> float:
    """Lemma 4: E min(|u|, |n|)."""
    size = abs(u)
    if law == "uniform":
        return size - size**2 / (2 * a)
    if law == "bernoulli":
        return min(size, a)
    return a * math.sqrt(2 / math.pi) * (1 - math.exp(-(size**2) / (2 * a**2))) + size * (
        1 - math.erf(size / a / math.sqrt(2))
    )


@pytest.mark.parametrize("law", ["uniform", "gauss", "bernoulli"])
@pytest.mark.parametrize("u", [0.7, -0.3])
def test_14_average_over_fresh_noise(law: str, u: float) -> None:
    """A binary mask passes half of what a signed one passes: half of the noise has the wrong sign."""
    a, d = 0.02, 400_000
    for mask, share in (("signed", 1.0), ("binary", 0.5)):
        method = FedMRN(mask=mask, noise=law, magnitude=a)
        drawn = method.masked_update(torch.full((d,), u * a), noise(method, 5, d), 1.0, uniform(d)).double()
        expected = math.copysign(share * g(u * a, law, a), u)
        assert abs(float(drawn.mean()) - expected) < 5 * float(drawn.std()) / d**0.5
        assert 5 * float(drawn.std()) / d**0.5 < 0.05 * abs(expected), "fine enough to tell"


def test_16_with_two_valued_noise_the_sign_of_the_noise_does_not_matter() -> None:
    """The transmitted entry is +alpha with probability (1 + u / alpha) / 2: FedBAT's binarisation with a fixed step."""
    method, samples = FedMRN(mask="signed", noise="bernoulli", magnitude=0.03), 100_000
    for ratio in (-1.2, -1.0, -0.4, 0.0, 0.7, 1.0):
        n = noise(method, 2, samples)
        assert set(n.abs().tolist()) == {float(np.float32(0.03))}
        update = method.masked_update(torch.full((samples,), ratio * 0.03), n, 1.0, uniform(samples))
        chance = min(max((1 + ratio) / 2, 0), 1)
        for side in (n > 0, n < 0):
            up = int((update[side] > 0).sum())
            assert abs(up - chance * int(side.sum())) <= 5 * (int(side.sum()) * chance * (1 - chance)) ** 0.5
